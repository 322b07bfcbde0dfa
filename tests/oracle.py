"""The forward pass of the published format in plain numpy, float64, written from the formulas and nothing else.

It reads the published tensors (`transformer.h.0.attn.qkv.weight`, ...) and the published config, shares no code with
bilens and uses no torch: heads are sliced one by one, positions are rotated as complex numbers, masks are loops.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray

_erf = np.vectorize(math.erf)

ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
}


def _rotate(x: Array) -> Array:
    """Rotary positions of one head, `(pos, d_head)`: components `i` and `i + d_head/2` are one complex number."""
    half = x.shape[1] // 2
    angle = np.array([[p * 10_000.0 ** (-i / half) for i in range(half)] for p in range(len(x))])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def oracle(published: dict[str, Any], tensors: dict[str, Array], tokens: list[int]) -> dict[str, Array]:
    """Every named activation (without the batch axis), `logits` and `loss` of one token sequence."""
    weights = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in tensors.items()}
    n_head, n_layer, d_hidden = published["n_head"], published["n_layer"], published["d_hidden"]
    d_head = published.get("d_head") or published["d_model"] // n_head
    attention = published.get("attention") or ("bilinear" if published.get("attention2") else "softmax")
    letters = ["q1", "k1", "q2", "k2", "v"] if attention == "bilinear" else ["q", "k", "v"]
    scale = d_head if published.get("attention_scale") != "d_head^2" else d_head**2
    activation = ACTIVATIONS[published.get("gate")]
    s = 1 / math.sqrt(2 * n_layer) if published.get("scale_attn", True) else 1.0
    s = published.get("residual_scale", s)
    seen: dict[str, Array] = {}

    def norm(x: Array, name: str) -> Array:
        scale = np.ones((len(x), 1))
        if published.get("normalization", True):
            scale = np.array([[math.sqrt(sum(v * v for v in row) / len(row) + 1e-8)] for row in x])
        seen[f"{name}.hook_scale"], seen[f"{name}.hook_normalized"] = scale, x / scale
        return x / scale

    x = np.stack([weights["transformer.wte.weight"][token] for token in tokens])
    seen["hook_embed"] = x
    n = len(tokens)
    for layer in range(n_layer):
        at, block = f"transformer.h.{layer}", f"blocks.{layer}"
        seen[f"{block}.hook_resid_pre"] = x
        read = norm(x, f"{block}.ln1")
        qkv = read @ weights[f"{at}.attn.qkv.weight"].T + weights.get(f"{at}.attn.qkv.bias", 0.0)
        turned = [f"rot_{letter}" for letter in letters[:-1]]
        heads: dict[str, list[Array]] = {key: [] for key in (*letters, *turned, "z", "result")}
        scores: list[list[Array]] = []
        patterns = []
        for head in range(n_head):
            columns = slice(head * d_head, (head + 1) * d_head)
            read_by = [qkv[:, part * n_head * d_head :][:, columns] for part in range(len(letters))]
            rotated = [_rotate(x) if published.get("rotary", True) else x for x in read_by[:-1]]
            factors = []
            for rot_q, rot_k in zip(rotated[::2], rotated[1::2], strict=True):
                score = np.full((n, n), -np.inf if attention == "softmax" else 0.0)
                for query in range(n):
                    for key in range(query + 1):
                        score[query, key] = (
                            rot_q[query] @ rot_k[key] / math.sqrt(d_head if attention == "softmax" else scale)
                        )
                factors.append(score)
            pattern = np.zeros((n, n))
            for query in range(n):
                for key in range(query + 1):
                    if attention == "softmax":
                        row = factors[0][query, : query + 1]
                        pattern[query, key] = math.exp(row[key] - row.max()) / np.exp(row - row.max()).sum()
                    else:
                        pattern[query, key] = factors[0][query, key] * factors[-1][query, key]
            z = pattern @ read_by[-1]
            result = s * z @ weights[f"{at}.attn.o.weight"][:, columns].T
            for name, value in zip(heads, (*read_by, *rotated, z, result), strict=True):
                heads[name].append(value)
            scores.append(factors)
            patterns.append(pattern)
        for name, values in heads.items():
            seen[f"{block}.attn.hook_{name}"] = np.stack(values, axis=1)
        for factor in range(len(scores[0])):
            name = "attn_scores" if len(scores[0]) == 1 else f"attn_scores_{factor + 1}"
            seen[f"{block}.attn.hook_{name}"] = np.stack([each[factor] for each in scores])
        seen[f"{block}.attn.hook_pattern"] = np.stack(patterns)
        seen[f"{block}.hook_attn_out"] = sum(heads["result"], start=np.zeros_like(x))
        x = x + seen[f"{block}.hook_attn_out"]
        seen[f"{block}.hook_resid_mid"] = x

        w, p = weights[f"{at}.mlp.w.weight"], weights[f"{at}.mlp.p.weight"]
        w_bias = weights.get(f"{at}.mlp.w.bias", np.zeros(len(w)))
        p_bias = weights.get(f"{at}.mlp.p.bias", np.zeros(len(p)))
        assert published.get("bias", False) == (f"{at}.mlp.w.bias" in weights)
        branches = norm(x, f"{block}.ln2") @ w.T + w_bias
        left = branches[:, :d_hidden]
        seen[f"{block}.mlp.hook_pre"] = left
        hidden = activation(left)
        if published.get("bilinear", True):
            right = branches[:, d_hidden:]
            seen[f"{block}.mlp.hook_pre_linear"] = right
            hidden = hidden * right
        seen[f"{block}.mlp.hook_post"] = hidden
        seen[f"{block}.hook_mlp_out"] = hidden @ p.T + p_bias
        x = x + seen[f"{block}.hook_mlp_out"]
        seen[f"{block}.hook_resid_post"] = x

    logits = norm(x, "ln_final") @ weights["lm_head.weight"].T
    losses = [
        math.log(np.exp(logits[i] - logits[i].max()).sum()) + logits[i].max() - logits[i, tokens[i + 1]]
        for i in range(n - 1)
    ]
    return seen | {"logits": logits, "loss": np.array(sum(losses) / len(losses))}
