"""Random SAEs of every class that bilens reads, and what each computes, in plain numpy, float64.

The oracle is written from SAELens' documentation and the published code, and shares no code with bilens or SAELens.
`SAEView` and `Decomposer.attribute` are compared with it.
"""

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from torch import Tensor

from bilens.sae.scope import ScopeSAE, ScopeSAEConfig

Array = NDArray[np.float64]

D_IN, D_SAE = 16, 40

CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "topk": (TopKSAE, TopKSAEConfig, {"k": 7}),
    "topk-rescaled": (TopKSAE, TopKSAEConfig, {"k": 7, "rescale_acts_by_decoder_norm": True}),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig, {"k": 7}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "scope": (ScopeSAE, ScopeSAEConfig, {"k": 30}),  # k past the positive pre-activations: negatives are kept
    "scope-bilinear": (ScopeSAE, ScopeSAEConfig, {"k": 7, "bilinear_encoder": True}),
}
LINEAR = [kind for kind in CLASSES if kind != "scope-bilinear"]
NORMS = ["none", "layer_norm", "constant_norm_rescale"]
# Every linear class, b_dec subtracted from the input or not, with every run-time normalisation.
VARIANTS = [
    {"kind": kind, "apply_b_dec_to_input": apply, "normalize_activations": norm}
    for kind, apply, norm in itertools.product(LINEAR, [True, False], NORMS)
]


def variant_name(variant: dict[str, Any]) -> str:
    b_dec = "b_dec" if variant["apply_b_dec_to_input"] else "no b_dec"
    return f"{variant['kind']}, {b_dec}, {variant['normalize_activations']}"


def make_sae(
    kind: str = "topk", hook: str | None = None, *, d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 0, **config: Any
) -> Any:
    """A random SAE: biases, thresholds and decoder norms all far from zero and from one another."""
    sae_class, config_class, defaults = CLASSES[kind]
    sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, **(defaults | config)))
    sae.cfg.metadata.hook_name = hook
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(sae.named_parameters()):
            std = {"W_enc": d_in**-0.5, "W_dec": d_in**-0.5}.get(name, 0.3)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        sae.W_dec.mul_(torch.rand(d_sae, 1, generator=generator) * 2 + 0.5)
    return sae


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


class Oracle:
    """What an SAE computes on inputs `(n, d_in)`."""

    def __init__(self, sae: Any, x: Tensor):
        cfg, n = sae.cfg, len(x)
        weights = {name: array(weight) for name, weight in sae.named_parameters()}
        self.x = array(x)
        shift, divisor, factor = np.zeros((n, 1)), np.ones((n, 1)), np.ones((n, 1))
        if cfg.normalize_activations == "constant_norm_rescale":
            divisor = factor = np.linalg.norm(self.x, axis=1, keepdims=True) / np.sqrt(cfg.d_in)
        elif cfg.normalize_activations == "layer_norm":
            shift = self.x.mean(1, keepdims=True)
            factor = self.x.std(1, ddof=1, keepdims=True)
            divisor = factor + 1e-5  # SAELens adds it going in and not coming out
        self.divisor: Array = divisor[:, 0]  # what the input is divided by, token by token
        read = (self.x - shift) / divisor
        if cfg.apply_b_dec_to_input:
            read = read - weights["b_dec"]
        gated = cfg.architecture() == "gated"
        self.open: np.ndarray = read @ weights["W_enc"] + weights["b_gate"] > 0 if gated else np.ones((n, cfg.d_sae))
        rows, bias = (weights["W_enc"] * np.exp(weights["r_mag"]), "b_mag") if gated else (weights["W_enc"], "b_enc")
        pre = read @ rows + weights[bias]
        if getattr(cfg, "bilinear_encoder", False):
            pre = pre[:, : cfg.d_sae] * pre[:, cfg.d_sae :]
        norms = np.ones(cfg.d_sae)
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            norms = np.linalg.norm(weights["W_dec"], axis=1)
        self.pre: Array = pre * norms
        self.acts: Array = self._activate(cfg, weights)
        self.reconstruction: Array = ((self.acts / norms) @ weights["W_dec"] + weights["b_dec"]) * factor + shift

    def _activate(self, cfg: Any, weights: dict[str, Array]) -> Array:
        kind = cfg.architecture()
        if kind in ("standard", "gated"):
            return np.maximum(self.pre, 0) * self.open
        if kind == "jumprelu":
            return self.pre * (self.pre > np.maximum(weights["threshold"], 0))
        rank = np.abs(self.pre) if kind == "abstopk" else self.pre
        kept = np.argsort(-rank, axis=1)[:, : cfg.k]
        acts = np.zeros_like(self.pre)
        np.put_along_axis(acts, kept, np.take_along_axis(self.pre, kept, 1), 1)
        return np.maximum(acts, 0) if kind == "topk" else acts
