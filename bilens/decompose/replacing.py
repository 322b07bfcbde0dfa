"""A copy of a model in which one MLP computes with other weights: a narrower fit, a truncated tensor."""

import copy

import torch

from bilens._core.checks import check_index
from bilens.errors import OutOfRangeError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer
from bilens.model.transformer import HookedBilinearTransformer


@torch.no_grad()
def replace_mlp(model: HookedBilinearTransformer, layer: int, weights: BilinearLayer) -> HookedBilinearTransformer:
    """A copy of the model, one MLP replaced; what is narrower is filled up with hidden units that are zero.

    Args:
        model: a bilinear model; not changed.
        layer: the layer of the MLP; a negative one counts from the end.
        weights: the new weights, of the model's d_model, with at most its d_mlp hidden units.

    Raises:
        ArgumentError, OutOfRangeError: no such layer, or too many hidden units.
        NotBilinearError: a gated or one-branch model.
        SAEMismatchError: another d_model, or biases for a model that has none.
    """
    layer = check_index(layer, model.cfg.n_layers, "layer {} is outside the model's {} layers", negative=True)
    BilinearLayer.of(model, layer)  # refuses what is not bilinear
    d_model, d_mlp = model.cfg.d_model, model.cfg.d_mlp
    n = len(weights.W_out)
    if weights.W_gate.shape[0] != d_model or weights.W_out.shape[1] != d_model:
        raise SAEMismatchError(
            f"weights that read {weights.W_gate.shape[0]} dimensions and write {weights.W_out.shape[1]}, "
            f"for a model of d_model {d_model}."
        )
    if n > d_mlp:
        raise OutOfRangeError(f"{n} hidden units do not fit the model's d_mlp of {d_mlp}.")
    if not model.cfg.bias and any(bias.any() for bias in (weights.b_gate, weights.b_in, weights.b_out)):
        raise SAEMismatchError("the weights have biases, the model's MLPs have none (config: bias is false).")
    changed = copy.deepcopy(model)
    mlp = changed.blocks[layer].mlp
    names = ("W_gate", "W_in", "W_out", *(("b_gate", "b_in") if model.cfg.bias else ()))
    for name in names:
        stored, new = getattr(mlp, name), getattr(weights, name)
        stored.zero_()
        stored[..., :n].copy_(new) if name != "W_out" else stored[:n].copy_(new)
    if model.cfg.bias:
        mlp.b_out.copy_(weights.b_out)
    return changed
