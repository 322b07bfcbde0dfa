"""Calls keep to the memory that they are given, or refuse beforehand with the bytes that they would need."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from bilens import Decomposer
from bilens.attribute import (
    Circuit,
    Target,
    attribute_tokens,
    check_circuit,
    check_edges,
    freeze,
    integrated_gradients,
    split,
    trace_circuit,
)
from bilens.decompose.gallery import motif_gallery
from bilens.errors import ArgumentError
from bilens.sae.features.examples import feature_activations
from tests.conftest import make_model
from tests.memory import peak_within
from tests.random_saes import make_sae

SLACK = 2**27  # of the allocator and of what is imported late
FEATURES = 2048
QUIET: dict[str, Any] = {"progress": False}
TARGET = Target.logit(7)


class Small:
    """A model of two layers of d_model 64, with SAEs of 2,048 features, which are many beside that, and texts."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.model = make_model(d_model=64, d_hidden=96, tokenizer=tokenizer)
        points = ("ln2.hook_normalized", "hook_mlp_out")
        self.saes = [
            make_sae("topk", f"blocks.{layer}.{point}", d_in=64, d_sae=FEATURES, seed=layer)
            for layer in range(2)
            for point in points
        ]
        self.d, self.texts = Decomposer(self.model, 1, *self.saes[2:]), texts[:40]
        self.every, self.some = torch.arange(FEATURES), torch.arange(3)
        self.activations = feature_activations(self.model, self.saes[2:], self.texts)

    def of_text(self, call: Callable[..., object], memory: int, *args: object, **options: object) -> object:
        frozen = freeze(self.model, self.texts[0], self.saes, memory=memory)
        if call in (check_circuit, check_edges):
            args = (trace_circuit(frozen, TARGET, max_nodes=10), *args)
        return call(frozen, *args, **options)

    def gallery(self, memory: int) -> object:
        inputs, outputs = ([each] for each in self.activations)
        return motif_gallery([self.d], inputs, outputs, min_tokens=3, memory=memory, **QUIET)


@pytest.fixture(scope="module")
def small(tokenizer: Any, texts: list[str]) -> Small:
    return Small(tokenizer, texts)


# Each with the MiB that it is given: what it cannot do without, a few of them, and as many as its result has.
CALLS: dict[str, tuple[int, Callable[[Small, int], object]]] = {
    "interaction": (1, lambda s, n: s.d.interaction(s.every[:64], memory=n)),
    "interaction in features": (64, lambda s, n: s.d.interaction([0, 1], basis="features", memory=n)),
    "eigen": (64, lambda s, n: s.d.eigen(s.every, 2, memory=n)),
    "top_interactions": (1, lambda s, n: s.d.top_interactions(s.some, n=20, memory=n)),
    "between": (1, lambda s, n: s.d.between(0, s.d.input_view.decoder, memory=n)),
    "strongest_interactions": (16, lambda s, n: s.d.strongest_interactions(20, s.some, memory=n, **QUIET)),
    "spectra": (64, lambda s, n: s.d.spectra(memory=n, **QUIET)),
    "fidelity": (128, lambda s, n: s.d.fidelity(s.texts[:4], k=3, memory=n)),
    "sparsity": (12, lambda s, n: s.d.sparsity(s.some, memory=n, **QUIET)),
    "outliers": (12, lambda s, n: s.d.outliers(s.some, memory=n, **QUIET)),
    "motifs": (12, lambda s, n: s.d.motifs(s.some, memory=n, **QUIET)),
    "inner_products": (32, lambda s, n: s.d.inner_products(s.every, memory=n)),
    "neighbours": (32, lambda s, n: s.d.neighbours(memory=n)),
    "clusters": (8, lambda s, n: s.d.clusters(s.every[:1000], memory=n)),
    "hosvd": (1, lambda s, n: s.d.hosvd(memory=64 * n)),
    "cp": (8, lambda s, n: s.d.cp(16, max_sweeps=2, memory=n, **QUIET)),
    "feature_activations": (8, lambda s, n: feature_activations(s.model, s.saes, s.texts, memory=n)),
    "cofiring": (17, lambda s, n: s.activations[0].cofiring(memory=n)),
    "token_cosines": (17, lambda s, n: s.activations[0].token_cosines(memory=n)),
    "motif_gallery": (128, Small.gallery),
    "freeze": (8, lambda s, n: freeze(s.model, s.texts[0], s.saes, memory=n)),
    "trace": (8, lambda s, n: Circuit.trace(s.model, s.saes, s.texts[0], TARGET, max_nodes=10, memory=n)),
    "trace of pairs": (8, lambda s, n: s.of_text(trace_circuit, n, TARGET, max_nodes=10, mlps="pairs")),
    "split": (8, lambda s, n: s.of_text(split, n, TARGET, attention="paths", mlps="pairs")),
    "attribute_tokens": (8, lambda s, n: s.of_text(attribute_tokens, n, [TARGET, Target.logit(8)], pairs=True)),
    "check_circuit": (8, lambda s, n: s.of_text(check_circuit, n, TARGET)),
    "check_edges": (8, lambda s, n: s.of_text(check_edges, n, TARGET)),
    "integrated_gradients": (8, lambda s, n: s.of_text(integrated_gradients, n, TARGET)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_keeps_to_its_memory(small: Small, name: str) -> None:
    """Under a limit of the address space: what it works in, and its result."""
    if name == "integrated_gradients":  # autograd does not run in the fork of a process where it has run
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(keep_to_its_memory, small, name).result()
    else:
        keep_to_its_memory(small, name)


def keep_to_its_memory(small: Small, name: str) -> None:
    mib, call = CALLS[name]
    budget = mib * 2**20
    peak_within(lambda: call(small, budget), 2 * budget + SLACK)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_refuses_beforehand_with_the_bytes(small: Small, name: str) -> None:
    with pytest.raises(ArgumentError, match=r"\d[\d,]* bytes.* memory|memory.*bytes|needs \d"):
        CALLS[name][1](small, 2**9)


def test_it_says_what_to_do_instead(small: Small) -> None:
    d, n = small.d, 2**20
    for call, said in (
        (
            lambda: d.interaction(small.every, memory=n),
            "2,048 outputs .* needs 33,554,432 bytes, .*: ask for fewer out",
        ),
        (lambda: d.interaction(small.every, basis="features"), "needs .* bytes, and memory is 4,294,967,296: ask"),
        (lambda: d.eigen(small.every, 8, memory=n), "eigen .8 pairs of 2,048 outputs. needs .* fewer pairs"),
        (lambda: d.top_interactions([0], memory=2**10), "largest pairs of 2,048 .* needs .* fewer pairs"),
        (lambda: d.neighbours(memory=n), "cosines of every two of 2,048 outputs needs 33,554,432 bytes"),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()
