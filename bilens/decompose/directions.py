"""Directions to ask a layer about, and directions to ask it with.

Output directions (`u` of `Q_u`: wherever a `Decomposer` method takes an `output`):

- a token's logit: `model.tokens_to_residual_directions`
- what a head of a later layer reads: `through_ov`
- what a later MLP reads: an eigenvector of its interaction matrix or a feature of its input SAE as it is, since the
  norm between them only divides by a number of each token
- differences and sums are plain arithmetic: `he - she` of two of them

Input directions (rows `left` and `right` of `Decomposer.between`):

- token embeddings, as they reach the layer along the direct path: `token_basis`
- features of an earlier residual stream, or tokens, as a head moves them to a later position: `head_basis`

Between a place in the residual stream and what is computed from it stands a norm, which divides by a number of each
token. As a direction nothing changes; to get exact numbers on a token, give its `scale` (`ln1.hook_scale`,
`ln2.hook_scale`, `ln_final.hook_scale`), or multiply the result by what is known later. Attention adds the pattern's
weight as a second such number: token `s`, moved by head `h` to position `p`, enters the MLP of the same layer as

    pattern[h, p, s] / (ln1.hook_scale[s] ln2.hook_scale[p]) * (x_s W_V W_O)
"""

from typing import Any, SupportsIndex, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import check_index
from bilens._core.typing import typed
from bilens.errors import ArgumentError, SAEMismatchError
from bilens.model.transformer import HookedBilinearTransformer

Scale: TypeAlias = float | int | Float[Tensor, ""] | Float[Tensor, "1"] | None


# --- output directions ------------------------------------------------------------------------------------------------


@typed
@torch.no_grad()
def through_ov(
    model: HookedBilinearTransformer,
    layer: SupportsIndex,
    head: SupportsIndex | None,
    u: Float[Tensor, "*n d_model"],
    *,
    scale: Scale = None,
) -> Float[Tensor, "*n d_model"] | Float[Tensor, "head *n d_model"]:
    """What a head reads of the residual stream at the source position, to write along `u` at the destination.

    `(x W_V W_O) . u = x . (W_V W_O u)`: of a normalised `x`, and times the pattern's weight. In a model with biases in
    attention the head adds `b_V W_O u` besides, whatever it looks at.

    Args:
        model: the model.
        layer: the head's layer; a negative one counts from the end.
        head: the head's number; `None` gives all, in front.
        u: directions after the head.
        scale: the divisor of the norm before the head at the source position (`ln1.hook_scale`); `None` leaves it out.

    Raises:
        ArgumentError, OutOfRangeError: no such layer or head.
        SAEMismatchError: directions of another width.
    """
    W_V, W_O = _ov(model, layer, head, u)
    rows = u.to(W_O).reshape(-1, u.shape[-1])
    return _divided((rows @ W_O.mT) @ W_V.mT, scale).reshape(*W_V.shape[:-2], *u.shape)


# --- input directions -------------------------------------------------------------------------------------------------


@typed
@torch.no_grad()
def token_basis(model: HookedBilinearTransformer, normalised: bool = True) -> Float[Tensor, "d_vocab d_model"]:
    """The token embeddings as input directions: what reaches a layer along the direct path.

    Args:
        model: the model.
        normalised: each as the norm makes it alone, without what attention and MLPs add to the stream. Of a model
            without normalisation the embeddings are what they are.
    """
    W_E = model.W_E
    return model.ln_final(W_E[None])[0] if normalised and model.cfg.normalization_type is not None else W_E.clone()


@typed
@torch.no_grad()
def head_basis(
    model: HookedBilinearTransformer,
    layer: SupportsIndex,
    head: SupportsIndex,
    directions: Float[Tensor, "n d_model"],
) -> Float[Tensor, "n d_model"]:
    """Directions of the residual stream at a source position as a head adds them at the destination: `d_i W_V W_O`.

    With the decoder of an earlier residual-stream SAE these are its features seen from later positions ("virtual"
    interactions); with `token_basis`, earlier tokens (trigrams). Times the pattern's weight, over the norms' divisors.
    In a model with biases in attention the head adds `b_V W_O` besides, whatever it looks at.

    Args:
        model: the model.
        layer: the head's layer; a negative one counts from the end.
        head: the head's number.
        directions: directions in the residual stream before the head.

    Raises:
        ArgumentError, OutOfRangeError: no such layer or head.
        SAEMismatchError: directions of another width.
    """
    W_V, W_O = _ov(model, layer, head, directions)
    return (directions.to(W_V) @ W_V) @ W_O


# --- checks -----------------------------------------------------------------------------------------------------------


def _ov(model: HookedBilinearTransformer, layer: Any, head: Any, directions: Tensor) -> tuple[Tensor, Tensor]:
    layer = _check_layer(model, layer)
    _check_width(model, directions)
    attn = model.blocks[layer].attn
    if head is None:
        return attn.W_V, attn.W_O
    head = check_index(head, model.cfg.n_heads, f"head {{}} is outside layer {layer}'s {{}} heads")
    return attn.W_V[head], attn.W_O[head]


def _check_layer(model: HookedBilinearTransformer, layer: Any) -> int:
    return check_index(layer, model.cfg.n_layers, "layer {} is outside the model's {} layers", negative=True)


def _check_width(model: HookedBilinearTransformer, directions: Tensor) -> None:
    if directions.shape[-1] != model.cfg.d_model:
        raise SAEMismatchError(
            f"directions of shape {tuple(directions.shape)}: the residual stream has {model.cfg.d_model} dimensions."
        )


def _divided(directions: Tensor, scale: Any) -> Tensor:
    if scale is None:
        return directions
    if not (torch.as_tensor(scale) > 0).all():
        raise ArgumentError(f"scale is {scale}, expected a norm's divisor, above zero.")
    return directions / scale
