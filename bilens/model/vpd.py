"""The format of github.com/henrylhale/bilinear-vpd, whose small models learnt written rules, as the published one.

    x0 = embed[t];  x += attn(a * x);  x += w_proj((w_m (b * x)) * (w_n (b * x)));  logits = unembed (c * x)

`a`, `b` and `c` are learned diagonal scales in the place of norms. What reads the stream next is linear in it, so they
are folded into its weights, exactly: `W (a * x)` is `(W diag(a)) x`.

`is_vpd` knows the format by its `config.json`, and `read_vpd` gives what the published format would hold.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilens.errors import CheckpointError, nearest
from bilens.model.config import ATTENTION_SCALES, NEEDED_KEYS, check_positive_integers
from bilens.model.files import EMBEDDING, check_layers, check_shapes, read_header, read_tensors

# Its keys, and what the published format calls them.
SIZES = {
    "n_layers": "n_layer",
    "seq_len": "n_ctx",
    "d_model": "d_model",
    "d_mlp": "d_hidden",
    "d_head": "d_head",
    "vocab_size": "vocab_size",
}
FORMAT_KEYS = {"n_layers", "seq_len", "d_mlp"}  # by which the format is known
NORMS = ("channel", "none")  # learned diagonal scales, or nothing
# What else a config may hold: the values under which the model is the one above, and what only concerned its training.
FIXED: dict[str, Any] = {"rope_base": 10_000, "n_heads": 1}
TRAINING = ("init_std", "norm_init")
PARTS = {"bilinear": ("q1", "k1", "q2", "k2", "v"), "quadratic": ("q", "k", "v")}


def is_vpd(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this format: it has its names of sizes, and lacks the published ones."""
    return config.keys() >= FORMAT_KEYS and not set(NEEDED_KEYS) <= config.keys()


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """The published `config.json` of the same model.

    Raises:
        CheckpointError: a size is missing or none, or the config asks for a model that this format does not have.
    """
    check_positive_integers(config, tuple(SIZES))
    choices = {
        "norm_type": ("channel", NORMS),
        "attention": ("bilinear", tuple(PARTS)),
        "attention_scale": ("d_head", tuple(ATTENTION_SCALES)),
    }
    for key, (default, known) in choices.items():
        if config.get(key, default) not in known:
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r:.100}, expected one of {', '.join(known)}."
                + nearest(config[key], known)
            )
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r:.100}, which bilens does not implement in this format; it reads "
                f"models where {key} is {value}."
            )
    every = {*SIZES, *choices, *FIXED, *TRAINING, "residual_scale"}
    if unknown := sorted(config.keys() - every):
        raise CheckpointError(f"config.json: the keys {unknown} are none of this format: {', '.join(sorted(every))}.")
    return {
        "n_head": 1,
        **{ours: config[theirs] for theirs, ours in SIZES.items()},
        "bilinear": True,
        "attention": config.get("attention", "bilinear"),
        "attention_scale": config.get("attention_scale", "d_head"),
        "scale_attn": False,
        "residual_scale": config.get("residual_scale", 1.0),
        "normalization": False,
    }


def stored_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a config of this format asks for."""
    d_model, d_mlp, d_head = config["d_model"], config["d_mlp"], config["d_head"]
    scales = config.get("norm_type", "channel") == "channel"
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config["vocab_size"], d_model)}
    for layer in range(config["n_layers"]):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.norm_attn.scale": (d_model,), f"{at}.norm_mlp.scale": (d_model,)} if scales else {}
        for part in PARTS[config.get("attention", "bilinear")]:
            shapes[f"{at}.attn.{part}_proj.weight"] = (d_head, d_model)
        shapes[f"{at}.attn.o_proj.weight"] = (d_model, d_head)
        shapes |= {f"{at}.mlp.{name}.weight": (d_mlp, d_model) for name in ("w_m", "w_n")}
        shapes[f"{at}.mlp.w_proj.weight"] = (d_model, d_mlp)
    shapes |= {"final_norm.scale": (d_model,)} if scales else {}
    return shapes | {"unembed.weight": (config["vocab_size"], d_model)}


def published_weights(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors of the same model, the scales folded into what reads through them.

    Args:
        config: the config in this format, which `published_config` took.
        tensors: the tensors in this format, of `stored_shapes`.
    """

    def scaled(names: list[str], scale: str) -> Tensor:
        rows = torch.cat([tensors[f"{name}.weight"] for name in names])
        if f"{scale}.scale" not in tensors:
            return rows
        # Half precision would round the product to three digits.
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(wide) * tensors[f"{scale}.scale"].to(wide)

    published = {
        EMBEDDING: tensors["embed.weight"],
        "lm_head.weight": scaled(["unembed"], "final_norm"),
    }
    for layer in range(config["n_layers"]):
        at, to = f"blocks.{layer}", f"transformer.h.{layer}"
        parts = [f"{at}.attn.{part}_proj" for part in PARTS[config.get("attention", "bilinear")]]
        published |= {
            f"{to}.attn.qkv.weight": scaled(parts, f"{at}.norm_attn"),
            f"{to}.attn.o.weight": tensors[f"{at}.attn.o_proj.weight"],
            f"{to}.mlp.w.weight": scaled([f"{at}.mlp.w_m", f"{at}.mlp.w_n"], f"{at}.norm_mlp"),
            f"{to}.mlp.p.weight": tensors[f"{at}.mlp.w_proj.weight"],
        }
    return published


def read_vpd(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The published config and tensors of a model of this format.

    Args:
        config: its `config.json`.
        path: the file of its weights.

    Raises:
        CheckpointError: a size or a tensor is missing or none, or the config asks for what this format does not have.
    """
    published, header = published_config(config), read_header(path)
    check_layers(config["n_layers"], header, path)
    check_shapes(header, stored_shapes(config), path)
    return published, published_weights(config, read_tensors(path))
