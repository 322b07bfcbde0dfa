"""The scoreboard of known programs: models of which it is known what they compute, read from their weights.

1. eight programs compiled by hand (`bilens.toy.programs`): each choice of tokens and logit is scored by its interaction
   (`model.expand`), and by two rivals that see the same tokens, gradient x input and integrated gradients; what is an
   edge is known. The same with noise on every weight
2. a trained model whose data came from written rules, where `--model` is a folder with a `rules.json` beside the
   weights: its rules from the weights alone
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens._core.files import open_tensors, read_json
from bilens.draw import plots
from bilens.expand import Expansion
from bilens.model.loading import load_model
from bilens.reproduce.reproduction import Made, Settings
from bilens.toy.programs import PROGRAMS, Program, compile_program

UNKNOWN = "no value known beforehand"
RULES_FILE, TEXTS_FILE = "rules.json", "expected.safetensors"
BIGRAM, RULE = 0.05, 0.5  # the gain in probability that makes a rule
NOISE = (0.0, 0.01, 0.03, 0.1)  # of the root mean square of each weight
STEPS = 16  # of integrated gradients
DISTANCES = (2, 5, 12, 20, 40)  # of induction's match
EXACT = 1e-3  # below this a compiled program's interaction is none


def programs(settings: Settings) -> Made:
    """The scoreboard."""
    names = PROGRAMS[:2] if settings.reduced else PROGRAMS
    rows: list[tuple[str, str, str]] = []
    scores: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for name in names:
        program = compile_program(name)
        start = time.monotonic()
        edges, found = _edges(program), METHODS["interaction"](program.model, program)
        seconds = time.monotonic() - start
        hit = found > EXACT
        right, told, there = int((hit & edges).sum()), int(hit.sum()), int(edges.sum())
        rows.append(
            (
                f"{name}: {program.about}",
                f"{there} edges of {edges.numel()} choices",
                f"precision {right / max(told, 1):.3f}, recall {right / there:.3f}, in {seconds:.1f} s",
            )
        )
        for method, score in METHODS.items():
            values = found if method == "interaction" else score(program.model, program)
            scores[method].append((auroc(values, edges), average_precision(values, edges)))
    for method, pairs in scores.items():
        rows.append(
            (
                f"compiled programs by {method}",
                UNKNOWN,
                f"AUROC {_mean(a for a, _ in pairs):.3f} (lowest {min(a for a, _ in pairs):.3f}), "
                f"AP {_mean(p for _, p in pairs):.3f} (lowest {min(p for _, p in pairs):.3f})",
            )
        )
    noisy = _under_noise(names, settings.seed)
    levels = "".join(f", {level:g}" for level in NOISE)[2:]
    for method, curve in noisy.items():
        rows.append(
            (
                f"compiled programs under noise of {levels} of each weight, by {method}",
                UNKNOWN,
                "AUROC " + ", ".join(f"{value:.3f}" for value in curve),
            )
        )
    figures = {
        "AUROC of edges against all other choices of tokens, a mean over programs, by the noise on the weights": (
            plots.line(list(NOISE), noisy, x_title="noise, of each weight's root mean square", y_title="AUROC")
        ),
    }
    ran_on = f"{len(names)} compiled programs"
    words = ["An edge is a choice of tokens and a logit that they move together and no fewer of them do."]
    if settings.model is not None:
        folder = Path(settings.model)
        if (folder / RULES_FILE).exists():
            rows += _given(folder, DISTANCES[:1] if settings.reduced else DISTANCES)
            ran_on += f", and {settings.model}"
        else:
            words.append(
                f"{settings.model} has no {RULES_FILE}, so what it computes is not known, and it was not judged."
            )
    return Made(ran_on, rows, figures, words)


# --- compiled programs ------------------------------------------------------------------------------------------------


def _edges(program: Program) -> Bool[Tensor, "*tokens target"]:
    n = len(program.vocabulary)
    edges = torch.zeros([n] * (len(program.offsets) + 1), dtype=torch.bool)
    for edge in program.edges:
        edges[edge] = True
    return edges


def _interaction(model: Any, program: Program) -> Float[Tensor, "*tokens target"]:
    return model.expand(len(program.offsets), program.offsets).interaction(program.offsets).abs()


def _by_gradient(steps: Sequence[float]) -> Callable[[Any, Program], Float[Tensor, "*tokens target"]]:
    """How much the least of the tokens counts: its entries times their gradients, averaged on the way from zero."""

    def score(model: Any, program: Program) -> Float[Tensor, "*tokens target"]:
        n, k = len(program.vocabulary), len(program.offsets)
        choices = torch.cartesian_prod(*[torch.arange(n)] * k).view(-1, k)
        rows = model.W_E.detach()[choices.flip(1)]  # as they stand in a text
        at = (max(program.offsets) - torch.tensor(program.offsets).flip(0))[None]
        counted = rows.new_zeros(len(rows), n, k)
        for step in steps:
            stream = (rows * step).requires_grad_()
            logits = _logits(model, stream, at)
            for target in range(n):
                (grad,) = torch.autograd.grad(logits[:, target].sum(), stream, retain_graph=True)
                counted[:, target] += (grad * rows).sum(-1) / len(steps)
        return counted.abs().min(-1).values.view(*[n] * k, n)

    return score


def _logits(model: Any, stream: Float[Tensor, "b n d"], at: Int[Tensor, "1 n"]) -> Float[Tensor, "b d_vocab"]:
    for block in model.blocks:
        stream = block(stream, at, None, None)
    return model.unembed(model.ln_final(stream[:, -1:]))[:, 0]


METHODS: Mapping[str, Callable[[Any, Program], Tensor]] = {
    "interaction": _interaction,
    "gradient x input": _by_gradient([1.0]),
    "integrated gradients": _by_gradient([(i + 0.5) / STEPS for i in range(STEPS)]),
}


def _under_noise(names: Sequence[str], seed: int) -> dict[str, list[float]]:
    """The mean AUROC over programs, by method and level of noise."""
    curves: dict[str, list[float]] = {method: [] for method in METHODS}
    for level in NOISE:
        found: dict[str, list[float]] = {method: [] for method in METHODS}
        for name in names:
            program, generator = compile_program(name), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for weight in program.model.parameters():
                    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                    weight.add_(level * weight.pow(2).mean().sqrt() * noise)
            for method, score in METHODS.items():
                found[method].append(auroc(score(program.model, program), _edges(program)))
        for method in METHODS:
            curves[method].append(_mean(found[method]))
    return curves


def auroc(scores: Tensor, right: Bool[Tensor, "..."]) -> float:
    """The probability that what is right scores higher than what is not; ties count half."""
    ranks = torch.from_numpy(pd.Series(scores.detach().flatten().numpy()).rank().to_numpy().copy())
    right = right.flatten()
    n = int(right.sum())
    return float((ranks[right].sum() - n * (n + 1) / 2) / (n * (len(right) - n)))


def average_precision(scores: Tensor, right: Bool[Tensor, "..."]) -> float:
    """The precision at each threshold, weighted by the recall that it adds; equal scores are told together."""
    frame = pd.DataFrame({"score": scores.detach().flatten().numpy(), "right": right.flatten().numpy()})
    told = frame.groupby("score").right.agg(["sum", "count"]).iloc[::-1].cumsum()
    recall = told["sum"] / told["sum"].iloc[-1]
    return float((told["sum"] / told["count"] * recall.diff().fillna(recall.iloc[0])).sum())


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- a trained model whose rules are written --------------------------------------------------------------------------


def _given(folder: Path, distances: Sequence[int]) -> list[tuple[str, str, str]]:
    model, rules = load_model(str(folder), device="cpu"), read_json(folder / RULES_FILE)
    rows = _bigrams(model, rules) + _skips(model, rules) + _inductions(model, rules, distances)
    if (folder / TEXTS_FILE).exists():
        rows += _orders(model, folder / TEXTS_FILE)
    return rows


def _bigrams(model: Any, rules: dict[str, Any]) -> list[tuple[str, str, str]]:
    start = time.monotonic()
    alone = model.expand(1)
    found = _rules_of(alone, BIGRAM, (0,))
    known = {(rule["subject"], int(verb)): share for rule in rules["bigram"] for verb, share in rule["verbs"].items()}
    probability = alone.probabilities((0,))
    divergence = sum(p * math.log(p / probability[edge].item()) for edge, p in known.items()) / len(rules["bigram"])
    return [
        ("bigram rules", _wanted(known), _told(found, set(known), start)),
        ("bigram rules: divergence of the probabilities", UNKNOWN, f"{divergence:.4f} nats"),
    ]


def _skips(model: Any, rules: dict[str, Any]) -> list[tuple[str, str, str]]:
    known = {(rule["adj"], rule["loc"], rule["conn"]) for rule in rules["skip"]["rules"]}
    start, window = time.monotonic(), rules["skip"]["window"]
    rows: list[tuple[str, str, str]] = []
    reach = [0]
    for distance in range(1, window + 4):
        if distance >= model.cfg.n_ctx:
            break
        expansion = model.expand(2, (0, distance))
        found = _rules_of(expansion, RULE, (0, distance))
        if distance == 1:
            cube = f"{_wanted(known)}, among {model.cfg.d_vocab}^3 triples"
            rows.append(("skip rules, next to each other", cube, _told(found, known, start)))
        if found >= known:
            reach.append(distance)
    rows.append(
        ("the window of skip rules", f"{window} tokens", f"{max(reach)} tokens: all rules at each distance up to it")
    )
    next_of = {(loc, adj): conn for adj, loc, conn in known}
    places, adjectives = sorted({loc for loc, _ in next_of}), sorted({adj for _, adj in next_of})
    both = model.expand(3, (0, 3, 7), tokens={0: adjectives, 3: places, 7: places}).values[0, 3, 7].argmax(-1)
    right, n = 0, 0
    for (a, adj), (b, late), (c, early) in itertools.product(*map(enumerate, (adjectives, places, places))):
        wanted, other = next_of.get((late, adj)), next_of.get((early, adj))
        if wanted is not None and other is not None and wanted != other:
            right, n = right + int(both[a, b, c] == wanted), n + 1
    rows.append(("of two places that disagree the later wins", f"{n} of {n}", f"{right} of {n}"))
    return rows


def _inductions(model: Any, rules: dict[str, Any], distances: Sequence[int]) -> list[tuple[str, str, str]]:
    """`X Y ... X` gives `Y`; `X` is no subject, filler or special token, `Y` any other that is not special.

    Of `X X ... X` the rule, which asks for exactly one earlier `X`, says nothing.
    """
    ranges = rules["vocabulary"]
    first = torch.cat([torch.arange(*ranges[kind]) for kind in ranges if kind not in ("subj", "filler", "special")])
    second = torch.tensor([t for t in range(model.cfg.d_vocab) if t not in ranges["special"].values()])
    match = torch.eye(len(first), dtype=torch.bool)
    rows = []
    for distance in distances:
        start = time.monotonic()
        offsets = (0, distance - 1, distance)
        found = model.expand(3, offsets, tokens={0: first, distance - 1: second, distance: first}, dtype=torch.float32)
        together = found.interaction(offsets)
        together = together - together.mean(-1, keepdim=True)
        copied = together.permute(1, 0, 2, 3)[torch.arange(len(second)), :, :, second].mean(0)
        told = {edge for edge in _rules_of(found, RULE, offsets) if edge[1] != edge[2]}
        known = {(x, y, x, y) for x in first.tolist() for y in second.tolist() if x != y}
        rows.append(
            (
                f"induction at distance {distance}",
                f"{len(known)} rules; a match tells them",
                f"AUROC of the match {auroc(copied, match):.3f}; {_told(told, known, start)}",
            )
        )
    return rows


def _orders(model: Any, file: Path) -> list[tuple[str, str, str]]:
    with open_tensors(file) as opened:
        texts = opened.get_tensor("input_ids")
    rows = []
    alone = model.expand(1)
    for position in (14, 16):
        left = alone.fidelity(texts[:, : position + 1], order=3).to_frame().nats
        means = ", ".join(f"{value:.3f}" for value in left)
        rows.append((f"parts of up to 1, 2 and 3 tokens at position {position}", UNKNOWN, f"leave {means} nats"))
    return rows


def _rules_of(expansion: Expansion, threshold: float, offsets: tuple[int, ...]) -> set[tuple[int, ...]]:
    frame = expansion.rules(threshold, offsets)
    columns = [*(f"id -{offset}" for offset in offsets), "target_id"]
    return {tuple(row) for row in frame[columns].to_numpy().tolist()}


def _wanted(known: Any) -> str:
    return f"{len(known)} of {len(known)}, none false"


def _told(found: set[Any], known: set[Any], start: float) -> str:
    right = len(found & known)
    return (
        f"{right} of {len(known)}, {len(found) - right} false (precision {right / max(len(found), 1):.3f}, recall "
        f"{right / len(known):.3f}), in {time.monotonic() - start:.1f} s"
    )
