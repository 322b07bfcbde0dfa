"""Exact attribution on the bundled model: how complete, how long, how faithful.

    python benchmarks/attribution.py TEXTS [TARGETS] [PROMPTS]

TEXTS is what `bilens.train.data.load_texts` takes; better texts that the SAEs were not trained on. Prints

1. the completeness error of TARGETS (1000) random targets (features of every SAE, logits, differences, directions) in
   random modes, relative to the sum of absolute parts, and that of their token attributions
2. the CPU seconds of a full trace on 64 tokens, and how they grow with the text and with the nodes kept
3. over PROMPTS (50) prompts: what is recovered by the kept nodes alone, and the correlation of predicted and measured
   changes over all edges
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import bilens
from bilens.attribute import Target, attribute_tokens, check_circuits, feature_means, freeze, split
from bilens.attribute.targets import READABLE
from bilens.train.data import load_texts

PROMPT = 32  # tokens
PER_TEXT = 20  # targets
NODES = (10, 50, 100, 200)
REPEATS = 3


def random_target(choose: random.Random, frozen: Any) -> Target:
    position = choose.randrange(frozen.n_positions)
    kind = choose.choice(["feature", "feature", "logit", "difference", "direction"])
    if kind == "feature":
        sae = choose.choice(list(frozen.saes.values()))
        return Target.feature(sae.label, choose.randrange(sae.view.d_sae), position)
    if kind == "direction":
        hook = choose.choice(READABLE).format(choose.randrange(frozen.n_layers))
        return Target.direction(torch.randn(frozen.embed.shape[1]), hook, position)
    first, second = (choose.randrange(frozen.model.cfg.d_vocab) for _ in range(2))
    return Target.logit(first, position, minus=second if kind == "difference" else None)


def completeness(model: Any, saes: list[Any], texts: list[str], n: int) -> None:
    choose = random.Random(0)
    torch.manual_seed(0)
    errors: dict[str, list[float]] = {"split": [], "tokens": []}
    for _ in range(n // PER_TEXT):
        frozen = freeze(model, model.to_tokens(choose.choice(texts))[:, : choose.randrange(8, 65)], saes)
        targets = [random_target(choose, frozen) for _ in range(PER_TEXT)]
        errors["tokens"] += [found.relative_error for found in attribute_tokens(frozen, targets)]
        for target in targets:
            attention, mlps = choose.choice(["heads", "paths"]), choose.choice(["whole", "features", "pairs"])
            errors["split"].append(split(frozen, target, attention=attention, mlps=mlps).relative_error)
    for name, found in errors.items():
        median, largest = statistics.median(found), max(found)
        print(f"completeness, {name}: {len(found)} targets, median {median:.1e}, largest {largest:.1e}")


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return statistics.median(times), result


def traces(model: Any, saes: list[Any], texts: list[str]) -> None:
    long = model.to_tokens(max(texts, key=len))
    print("tokens  max_nodes  f64 CPU s  f32 CPU s  nodes  edges  hyper-edges  kept  largest error")
    for length, max_nodes in [(16, 200), (32, 200), (64, 200), (128, 200), (64, 50), (64, 100), (64, 400), (64, 800)]:
        tokens = long[:, :length]
        if tokens.shape[1] < length:
            continue
        took = {}
        for dtype in (torch.float64, torch.float32):
            took[dtype], circuit = seconds(
                lambda tokens=tokens, dtype=dtype, max_nodes=max_nodes: bilens.Circuit.trace(
                    model, saes, tokens, max_nodes=max_nodes, node_threshold=1.0, dtype=dtype
                )
            )
            if dtype == torch.float64:
                shown = circuit
        print(
            f"{length:6}  {max_nodes:9}  {took[torch.float64]:9.2f}  {took[torch.float32]:9.2f}  {len(shown.nodes):5}  "
            f"{len(shown.edges):5}  {len(shown.hyperedges):11}  {shown.kept_share:4.0%}  "
            f"{shown.largest_relative_error:.1e}"
        )


def faithfulness(model: Any, saes: list[Any], texts: list[str], n: int) -> None:
    cut = [model.to_string(model.to_tokens(text)[0, 1:PROMPT]) for text in texts[: 2 * n]]
    means = feature_means(model, saes, cut[n:])
    found = check_circuits(model, saes, cut[:n], means=means, max_nodes=NODES[-1], counts=NODES)
    print(f"{n} prompts of {PROMPT} tokens\n{found}")


def main(texts_path: str, n_targets: int = 1000, n_prompts: int = 50) -> None:
    model = bilens.load_model()
    layers = range(model.cfg.n_layers)
    saes = [bilens.load_sae(model.cfg.model_name, point, layer) for layer in layers for point in ("mlp-in", "mlp-out")]
    texts = load_texts(texts_path)
    completeness(model, saes, texts, n_targets)
    traces(model, saes, texts)
    faithfulness(model, saes, texts, n_prompts)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
