"""The interaction tensor of one bilinear layer, as pure functions of its weights.

    y = W_out^T ((W_gate^T x + b_gate) * (W_in^T x + b_in)) + b_out           (TransformerLens shapes, column x)

For an output direction u, with c = W_out u (one number per hidden unit), l_m and r_m the columns of W_gate and W_in:

    u . y = x^T Q x + g . x + h
    Q     = 1/2 sum_m c_m (l_m r_m^T + r_m l_m^T)
    g     = sum_m c_m (b_in_m l_m + b_gate_m r_m)
    h     = sum_m c_m b_gate_m b_in_m + u . b_out

Source: Pearce et al. 2025 (arXiv 2410.08417), section 3 (there without biases). Everything downstream, eigencircuits,
feature interactions and attributions, is these three and inner products with them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_finite
from bilens.errors import ArgumentError, NotBilinearError
from bilens.model.transformer import HookedBilinearTransformer

# Of products in bfloat16: both factors are rounded to eight bits, so is the result; a little for sums in float32.
BFLOAT16_FACTORS, BFLOAT16_RESULT = 2.0**-8 * 1.1, 2.0**-8


@dataclass(frozen=True)
class BilinearLayer:
    """The weights of one bilinear MLP in TransformerLens shapes, and nothing else.

    What it writes (`d_out`) is as wide as what it reads in a transformer; a toy's logits and a classifier's are not.
    """

    W_gate: Float[Tensor, "d_model d_mlp"]
    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_out"]
    b_gate: Float[Tensor, "d_mlp"]
    b_in: Float[Tensor, "d_mlp"]
    b_out: Float[Tensor, "d_out"]

    @classmethod
    def of(cls, model: HookedBilinearTransformer, layer: int) -> "BilinearLayer":
        """One layer of a model, detached, in float32 at least: views of a model in float32, copies of one below.

        Raises:
            CheckpointError: weights that are not finite.
            NotBilinearError: a gated or one-branch model: its output is not a quadratic form of its input.
        """
        check_bilinear(model)
        mlp = model.blocks[layer].mlp
        names = ("W_gate", "W_in", "W_out", "b_gate", "b_in", "b_out")
        dtype = torch.promote_types(model.cfg.dtype, torch.float32)
        weights = {name: getattr(mlp, name).detach().as_subclass(Tensor).to(dtype) for name in names}
        for name, weight in weights.items():
            check_finite(name, weight, f"layer {layer} of the model {model.cfg.model_name!r}")
        return cls(**weights)

    def to(self, dtype: torch.dtype) -> "BilinearLayer":
        return BilinearLayer(*(t.to(dtype) for t in vars(self).values()))

    def __call__(self, x: Float[Tensor, "*x d_model"]) -> Float[Tensor, "*x d_out"]:
        """What the layer writes when it reads `x`."""
        made = branches(self, x, x.new_ones(x.shape[:-1]))
        return (made.left * made.right) @ self.W_out + self.b_out

    def copy(self) -> "BilinearLayer":
        """Of its own: what `of` gives follows a float32 model."""
        return BilinearLayer(*(t.clone() for t in vars(self).values()))


def check_model(model: Any) -> None:
    """Refuse what is no `HookedBilinearTransformer`, and name the one inside where there is one (`ArgumentError`)."""
    if hasattr(model, "blocks") and hasattr(getattr(model, "cfg", None), "is_bilinear"):
        return
    inside = {"BilinearForCausalLM": ".hooked", "TransformerBridge": ".original_model.hooked"}.get(type(model).__name__)
    way_out = f"the one inside it, {inside}" if inside else "such as bilens.load_model() gives"
    raise ArgumentError(f"model is a {type(model).__name__}, expected a HookedBilinearTransformer: {way_out}.")


def check_bilinear(model: HookedBilinearTransformer) -> None:
    """Refuse a model whose MLPs are no quadratic forms.

    Raises:
        ArgumentError: no model of bilens.
        NotBilinearError: a gated or one-branch model.
    """
    check_model(model)
    if not model.cfg.is_bilinear:
        kind = f"gated by {model.cfg.gate!r}" if model.cfg.bilinear else "a one-branch MLP"
        raise NotBilinearError(
            f"the model {model.cfg.model_name!r} is {kind}: its output is not a quadratic form of its input, so it "
            "has no interaction matrices. A bilinear model has config bilinear true and gate null."
        )


def hidden_coefficients(
    layer: BilinearLayer, u: Float[Tensor, "*n d_out"], *, exact: bool = False
) -> Float[Tensor, "*n d_mlp"]:
    """`c = W_out u`: how much each hidden unit writes along each direction; `exact` is in float64."""
    return double(u) @ double(layer.W_out).T if exact else u @ layer.W_out.T


def double(tensor: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have: there it moves to the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def interaction_matrix(layer: BilinearLayer, u: Float[Tensor, "*n d_out"]) -> Float[Tensor, "*n d_model d_model"]:
    """The symmetric `Q_u` of each direction: the quadratic part of `u . mlp(x)`."""
    c = hidden_coefficients(layer, u)
    raw = (layer.W_gate * c[..., None, :]) @ layer.W_in.T
    return 0.5 * (raw + raw.mT)


def linear_term(layer: BilinearLayer, u: Float[Tensor, "*n d_out"]) -> Float[Tensor, "*n d_model"]:
    """`g_u`: the part of `u . mlp(x)` linear in `x`; zero without MLP biases."""
    c = hidden_coefficients(layer, u)
    return (c * layer.b_in) @ layer.W_gate.T + (c * layer.b_gate) @ layer.W_in.T


def constant_term(layer: BilinearLayer, u: Float[Tensor, "*n d_out"]) -> Float[Tensor, "*n"]:
    """`h_u`: the part of `u . mlp(x)` that does not depend on `x`; zero without MLP biases."""
    return hidden_coefficients(layer, u) @ (layer.b_gate * layer.b_in) + u @ layer.b_out


def biases_as_weights(layer: BilinearLayer) -> BilinearLayer:
    """The layer over `(x, 1)`: the branch biases as one more row of each branch. Its `Q_u` hold all but `u . b_out`."""
    return replace(
        layer,
        W_gate=torch.cat([layer.W_gate, layer.b_gate[None]]),
        W_in=torch.cat([layer.W_in, layer.b_in[None]]),
        b_gate=torch.zeros_like(layer.b_gate),
        b_in=torch.zeros_like(layer.b_in),
    )


def in_basis(
    matrix: Float[Tensor, "*n d_model d_model"], directions: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "*n d_sae d_sae"]:
    """`D Q D^T`: the interaction matrix between directions instead of between coordinates, symmetric to the bit."""
    product = directions @ matrix @ directions.T
    return 0.5 * (product + product.mT)


@dataclass(frozen=True)
class Branches:
    """What the two branches of a layer make of inputs, or of parts of one."""

    left: Float[Tensor, "*x d_mlp"]
    right: Float[Tensor, "*x d_mlp"]

    def __getitem__(self, at: Any) -> "Branches":
        return Branches(self.left[at], self.right[at])

    def sum(self, dim: int) -> "Branches":
        return Branches(self.left.sum(dim), self.right.sum(dim))


def branches(
    layer: BilinearLayer, x: Float[Tensor, "*x d_model"], ones: Float[Tensor, "*#x"] | None = None
) -> Branches:
    """Both branches of each input; `ones` is how much of their biases each takes, `None` for none of them."""
    left, right = x @ layer.W_gate, x @ layer.W_in
    return (
        Branches(left, right)
        if ones is None
        else Branches(left + ones[..., None] * layer.b_gate, right + ones[..., None] * layer.b_in)
    )


def products(x: Branches, y: Branches) -> Float[Tensor, "*x d_mlp"]:
    """The hidden units of `B(x, y)`, the symmetric bilinear form with `mlp(x) = B(x, x)`; times `W_out`, `B` itself."""
    return 0.5 * (x.left * y.right + y.left * x.right)


def pair_products(
    layer: BilinearLayer,
    u: Float[Tensor, "*n d_out"],
    parts: Branches,
    ones: Float[Tensor, "source"],
) -> Float[Tensor, "*n source source"]:
    """How much every pair of sources contributes to `u . mlp(x)`, where the sources add up to `(x, 1)`.

    Entry `(s, t)` is `u . B(s, t)`: half of what the pair adds, `(t, s)` the other half; the entries of one direction
    add up to `u . mlp(x)` exactly. No `Q` is formed: the cost is that of running the layer on the sources.

    Args:
        layer: the layer.
        u: directions of its output.
        parts: the branches of the sources, the same for every direction or of its own for each.
        ones: each source's last homogeneous coordinate: 1 for the one that carries the biases, 0 for the others.
    """
    raw = (parts.left * hidden_coefficients(layer, u)[..., None, :]) @ parts.right.mT
    corner = (u @ layer.b_out)[..., None, None] * ones[:, None] * ones
    return 0.5 * (raw + raw.mT) + corner


def triple_coefficients(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n_out d_out"],
    inputs: Float[Tensor, "n_in d_model"],
    output: Int[Tensor, "n"],
    i: Int[Tensor, "n"],
    j: Int[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """`Q_ii`, or `2 Q_ij` where `i != j`, of each triple, in the precision given."""
    which, place = output.unique(return_inverse=True)
    c = hidden_coefficients(layer, outputs[which])
    features, pair = torch.cat([i, j]).unique(return_inverse=True)
    made = branches(layer, inputs[features])
    first, second = pair[: len(i)], pair[len(i) :]
    parts = [c.new_zeros(0)]
    for rows in torch.arange(len(i)).split(max(1, 2**20 // c.shape[1])):
        parts.append((c[place[rows]] * products(made[first[rows]], made[second[rows]])).sum(1))
    return torch.cat(parts) * torch.where(i == j, 1.0, 2.0).to(c)


def search_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a search multiplies in whose result is refined: bfloat16 where this kind of device has products of it that
    are faster than those of `dtype`; a fixed rule, so that the same call does the same everywhere."""
    if device.type == "cpu":
        # Private functions, which another release of torch may not have: bfloat16 then counts as slow.
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
        fast = any(ask is not None and ask() for ask in asked)
    else:
        fast = device.type != "mps"
    return torch.bfloat16 if fast else dtype
