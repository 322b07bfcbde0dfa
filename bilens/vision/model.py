"""The hooked bilinear image classifier, and its exact form as interaction matrices.

    x      = W_E^T pixels                                    embed: d_input -> d_hidden, no bias
    x      = (left x + b_gate) * (right x + b_in)  [+ x]     n_layer times; `+ x` where `residual`
    logits = W_U^T x                                         head: d_hidden -> d_output, no bias

Source: Pearce et al. 2025, section 4 and its appendices. Parameters have the names and the layout of the authors'
checkpoints (`blocks.L.weight`: rows left, then right), so that loading and saving are copies.

Named activation points, each `(batch, d_hidden)`: `hook_embed`; of layer L `blocks.L.hook_resid_pre`,
`blocks.L.mlp.hook_pre` (left) and `blocks.L.mlp.hook_pre_linear` (right), both with their biases,
`blocks.L.mlp.hook_post` (their product, which is what the layer computes) and `blocks.L.hook_resid_post`.

All mathematics is that of `bilens.decompose`, which reads a `BilinearLayer`:

1. `model.layer(L)`: layer L over its own input, or (`pixels=True`) the first layer over the pixels. Its output is the
   residual stream, so directions are rows of `model.head.weight`, eigenvectors of the layer above, or any others
2. `class_layer(model)`: the last layer with the head in its output matrix, over the pixels where it is also the first:
   its directions are mixtures of classes, one-hot for one class, `e_a - e_b` for a difference
3. `homogeneous=True` for either: the same layer over `(x, 1)`. Biases become a row of each branch; the residual
   addition becomes hidden units whose left branch copies x and whose right branch reads the 1. Its matrices are then
   all of it: `logits = (x, 1)^T Q (x, 1)` exactly, where without, `x^T Q x` is the quadratic part, `linear_term` and
   `constant_term` are what the biases add, and the residual addition is left out
"""

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from bilens._core.bare import require_bare
from bilens._core.checks import check_finite
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, biases_as_weights, interaction_matrix
from bilens.model.hook_points import CheckedHooks, eager_while_hooked
from bilens.model.named_weights import NamedWeight, NamedWeightsMixin
from bilens.vision.config import ClassifierConfig
from bilens.vision.published import PublishedClassifierMixin

Images: TypeAlias = Float[Tensor, "batch *image"] | Float[np.ndarray, "batch *image"]


class BranchHooks(nn.Module):
    """The points inside a layer, under TransformerLens' names."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()


class BilinearBlock(NamedWeightsMixin, nn.Linear):
    """One bilinear layer: a linear map to both branches, multiplied, and added to its input where `residual`."""

    _stored = ("weight", "bias")

    def __init__(self, cfg: ClassifierConfig):
        super().__init__(cfg.d_hidden, 2 * cfg.d_hidden, bias=cfg.bias)
        self.residual = cfg.residual
        self.mlp = BranchHooks()
        self.hook_resid_pre, self.hook_resid_post = HookPoint(), HookPoint()

    @property
    def W_gate(self) -> Float[Tensor, "d_hidden d_hidden"]:
        """The left branch, input x hidden unit."""
        return NamedWeight.viewing(self.weight[: self.in_features].T)

    @property
    def W_in(self) -> Float[Tensor, "d_hidden d_hidden"]:
        """The right branch, input x hidden unit."""
        return NamedWeight.viewing(self.weight[self.in_features :].T)

    @property
    def b_gate(self) -> Float[Tensor, "d_hidden"]:
        """Bias of the left branch (zeros where the model has none)."""
        return self._bias(slice(self.in_features))

    @property
    def b_in(self) -> Float[Tensor, "d_hidden"]:
        """Bias of the right branch, added before the product (zeros where the model has none)."""
        return self._bias(slice(self.in_features, None))

    def _bias(self, units: slice) -> Float[Tensor, "d_hidden"]:
        if self.bias is not None:
            return NamedWeight.viewing(self.bias[units])
        return NamedWeight.zeros(
            self.weight, (self.in_features,), "this classifier has no biases (config: bias is false)"
        )

    def forward(self, x: Float[Tensor, "batch d_hidden"]) -> Float[Tensor, "batch d_hidden"]:
        x = self.hook_resid_pre(x)
        left, right = F.linear(x, self.weight, self.bias).chunk(2, dim=-1)
        product = self.mlp.hook_post(self.mlp.hook_pre(left) * self.mlp.hook_pre_linear(right))
        return self.hook_resid_post(x + product if self.residual else product)


class BilinearClassifier(PublishedClassifierMixin, NamedWeightsMixin, CheckedHooks):
    """An image classifier of bilinear layers, hooked like the language model; see the module's header.

    Args:
        cfg: the architecture.
        seed: the seed of the initial weights; `None` draws from torch's global generator.

    Weights start normal at `1 / sqrt(fan in)`, biases at zero.
    """

    blocks: Any  # an nn.ModuleList of BilinearBlock, whose attributes a type checker would not know

    def __init__(self, cfg: ClassifierConfig, seed: int | None = None):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Linear(cfg.d_input, cfg.d_hidden, bias=False)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList([BilinearBlock(cfg) for _ in range(cfg.n_layer)])
        self.head = nn.Linear(cfg.d_hidden, cfg.d_output, bias=False)
        self._init_weights(seed)
        self.setup()

    def _init_weights(self, seed: int | None) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            if weight.ndim == 1:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)

    @eager_while_hooked
    def forward(self, images: Images) -> Float[Tensor, "batch d_output"]:
        """Logits of the classes.

        Args:
            images: a tensor or an array, `(batch, height, width)`, `(batch, channels, height, width)` or
                `(batch, d_input)`; brightness from 0 to 1.

        Raises:
            ArgumentError: not floating point (bytes have to be divided by 255), or not `d_input` numbers an image.
        """
        x = self.hook_embed(self.embed(self.flatten(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def flatten(self, images: Images) -> Float[Tensor, "batch d_input"]:
        """Images as rows of pixels, in the model's dtype and on its device; raises as `forward`."""
        images = torch.as_tensor(images)
        shape, d_input = tuple(images.shape), self.cfg.d_input
        if not images.is_floating_point():
            raise ArgumentError(f"images are {images.dtype}, expected floating point from 0 to 1; divide by 255?")
        if images.ndim < 2 or images[0].numel() != d_input:
            one = " For one image, pass image[None]." if images.numel() == d_input else ""
            wanted = "" if self.cfg.image_shape is None else ", {} x {} pixels".format(*self.cfg.image_shape)
            raise ArgumentError(f"images have shape {shape}, expected {d_input} numbers each (d_input{wanted}).{one}")
        return images.flatten(1).to(self.embed.weight)

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "batch *image"], batch_size: int = 4096) -> Int[Tensor, "batch"]:
        """The most likely class of every image."""
        return torch.cat([self(part).argmax(-1) for part in images.split(batch_size)])

    @torch.no_grad()
    def accuracy(self, images: Float[Tensor, "batch *image"], labels: Int[Tensor, "batch"]) -> float:
        """The share of images whose most likely class is their label; `AlteredModelError` with hooks on the model."""
        require_bare(self)
        return (self.predict(images) == labels.to(self.W_E.device)).float().mean().item()

    # --- weights under TransformerLens' names, and as the layers that bilens.decompose reads --------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_input d_hidden"]:
        return NamedWeight.viewing(self.embed.weight.T)

    @property
    def W_U(self) -> Float[Tensor, "d_hidden d_output"]:
        return NamedWeight.viewing(self.head.weight.T)

    def layer(self, layer: int, *, pixels: bool = False, homogeneous: bool = False) -> BilinearLayer:
        """One layer's weights, detached, in float32 at least; the output matrix is the identity.

        Args:
            layer: the layer's number; a negative one counts from the end.
            pixels: fold the embedding in, so that the first layer reads pixels instead of `hook_resid_pre`.
            homogeneous: over `(x, 1)`, with biases and the residual addition in the tensor; see the module's header.

        Raises:
            OutOfRangeError: no such layer.
            ArgumentError: `pixels` of a layer that is not the first: it is not quadratic in the pixels.
            CheckpointError: weights that are not finite.
        """
        n = self.cfg.n_layer
        if not -n <= layer < n:
            raise OutOfRangeError(f"layer {layer} is outside the model's {n} layers.")
        if pixels and layer % n:
            raise ArgumentError(f"layer {layer} is not the first: only layer 0 is a quadratic form of the pixels.")
        block = self.blocks[layer]
        for name, weight in self.named_parameters():
            check_finite(name, weight.detach(), "the classifier")
        W_gate, W_in, b_gate, b_in = (_exact(w) for w in (block.W_gate, block.W_in, block.b_gate, block.b_in))
        identity = torch.eye(self.cfg.d_hidden, dtype=W_gate.dtype, device=W_gate.device)
        reads = _exact(self.W_E) if pixels else identity
        if pixels:
            W_gate, W_in = reads @ W_gate, reads @ W_in
        # The residual addition is not a product of branches; over (x, 1) it is.
        plain = BilinearLayer(W_gate, W_in, identity, b_gate, b_in, torch.zeros_like(identity[0]))
        if not homogeneous:
            return plain
        return over_homogeneous(plain, reads if self.cfg.residual else None)


def class_layer(model: BilinearClassifier, *, pixels: bool | None = None, homogeneous: bool = False) -> BilinearLayer:
    """The last layer with the head folded in, and the embedding where it is also the first: directions are classes.

    Of a one-layer model this is the whole classifier, `logits = class_layer(pixels)` (plus the residual addition, which
    only the homogeneous form holds). Of a deeper one it reads the last `hook_resid_pre`.

    Args:
        model: the classifier.
        pixels: fold the embedding in; by default where the last layer is also the first.
        homogeneous: over `(x, 1)`, with biases and the residual addition in the tensor.
    """
    pixels = model.cfg.n_layer == 1 if pixels is None else pixels
    last = model.layer(-1, pixels=pixels, homogeneous=homogeneous)
    writes = last.W_out @ _exact(model.W_U)
    return replace(last, W_out=writes, b_out=torch.zeros_like(writes[0]))


def class_matrices(model: BilinearClassifier, *, homogeneous: bool = False) -> Float[Tensor, "d_output d d"]:
    """The symmetric interaction matrix of every class: `interaction_matrix` of `class_layer`.

    Args:
        model: the classifier.
        homogeneous: `(d + 1) x (d + 1)` matrices with `logits = (x, 1)^T Q (x, 1)` exactly; without, the quadratic
            part. `x` is the pixels of a one-layer model, the last `hook_resid_pre` of a deeper one.
    """
    layer = class_layer(model, homogeneous=homogeneous)
    return interaction_matrix(
        layer, torch.eye(layer.W_out.shape[1], dtype=layer.W_out.dtype, device=layer.W_out.device)
    )


def over_homogeneous(layer: BilinearLayer, skip: Float[Tensor, "d_model d_out"] | None = None) -> BilinearLayer:
    """The layer that reads `(x, 1)` and has no branch biases: `layer(x) + W_out^T skip^T x` where there is a skip.

    Args:
        layer: the layer; where there is a skip, unit i of its `W_out` writes what `skip`'s column i reads.
        skip: the part that is added linearly, as one more hidden unit for each column, `(skip_i . x) * 1`.
    """
    plain = biases_as_weights(layer)
    if skip is None:
        return plain
    ones = torch.zeros(len(plain.W_in), skip.shape[1], dtype=skip.dtype, device=skip.device)
    ones[-1] = 1
    W_gate = torch.cat([plain.W_gate, F.pad(skip, (0, 0, 0, 1))], 1)
    W_in, W_out = torch.cat([plain.W_in, ones], 1), torch.cat([plain.W_out, plain.W_out])
    zeros = torch.zeros_like(W_gate[0])
    return BilinearLayer(W_gate, W_in, W_out, zeros, zeros, layer.b_out)


def with_one(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_plus_one"]:
    """`(x, 1)`: what homogeneous matrices act on."""
    return F.pad(x, (0, 1), value=1.0)


def _exact(weight: Tensor) -> Tensor:
    """Detached, in float32 at least."""
    return weight.detach().as_subclass(Tensor).to(torch.promote_types(weight.dtype, torch.float32))
