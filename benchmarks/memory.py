"""What every call takes of the memory that it is given: a table of call, size, memory, limit and peak.

    python -m benchmarks.memory [CALL ...]

Every call runs in a process of its own, on a made-up model (two layers of d_model 512 and d_mlp 2048) with SAEs of
4,096 features, of which 32 are active on a token. Its budget is `memory`; its address space is limited to what was
mapped before, the budget twice (what a call works in, and its result), and `SLACK` for the allocator and for what is
imported late: a call that asked for more would end with an error. The peak is by how much the resident memory grew. A
call over every output feature that would take minutes is asked for some of them; the table says so.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from bilens import Decomposer, attribute
from bilens.attribute import Circuit, Target, freeze
from bilens.decompose.gallery import motif_gallery
from bilens.sae.features.examples import FeatureActivations, feature_activations
from bilens.train.data import train_tokenizer
from tests.conftest import make_model
from tests.memory import peak_within
from tests.random_saes import make_sae

MIB = 2**20
SLACK = 192 * MIB
D_MODEL, D_MLP, FEATURES, ACTIVE, TOKENS = 512, 2048, 4096, 32, 128
TARGET = Target.logit(7)


class Made:
    """What calls are given, made before their memory is measured."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        letters = torch.randint(26, (64, TOKENS, 4), generator=generator).tolist()
        self.texts = [" ".join("".join(chr(97 + i) for i in word) for word in text) for text in letters]
        size = {"n_layer": 2, "n_head": 8, "n_ctx": TOKENS, "d_model": D_MODEL, "d_hidden": D_MLP}
        self.model = make_model(tokenizer=train_tokenizer(self.texts, vocab_size=1000, n_ctx=TOKENS), **size)
        self.saes = [
            make_sae("topk", f"blocks.{layer}.{point}", d_in=D_MODEL, d_sae=FEATURES, k=ACTIVE, seed=layer)
            for layer in range(2)
            for point in ("ln2.hook_normalized", "hook_mlp_out")
        ]
        self.d = Decomposer(self.model, 1, *self.saes[2:])
        self.every, self.many, self.some = torch.arange(FEATURES), torch.arange(1024), torch.arange(16)
        self.tokens = torch.arange(TOKENS)
        self.vocabulary = torch.randn(20_000, D_MODEL, generator=generator)
        for dtype in (torch.float64, torch.bfloat16):  # what libraries set up once
            _ = torch.ones(256, 256, dtype=dtype) @ torch.ones(256, 256, dtype=dtype)

    @cached_property
    def activations(self) -> list[FeatureActivations]:
        return feature_activations(self.model, self.saes[2:], self.texts)

    def run(self, memory: int) -> object:
        return feature_activations(self.model, self.saes[2:], self.texts, batch_size=4, memory=memory)

    def gallery(self, memory: int) -> object:
        inputs, outputs = self.activations
        return motif_gallery([self.d], [inputs], [outputs], min_tokens=10, memory=memory, progress=False)

    def trace(self, memory: int, mlps: Any) -> object:
        return Circuit.trace(self.model, self.saes, self.tokens, TARGET, max_nodes=50, mlps=mlps, memory=memory)

    def of_text(self, name: str, memory: int, *args: object, **options: object) -> object:
        frozen = freeze(self.model, self.tokens, self.saes, memory=memory)
        if name.startswith("check"):
            args = (attribute.trace_circuit(frozen, TARGET, max_nodes=20), *args)
        return getattr(attribute, name)(frozen, *args, **options)


QUIET: dict[str, Any] = {"progress": False}
EVERY, MANY, SOME, TEXT = f"{FEATURES:,} outputs", "1,024 outputs", "16 outputs", f"{TOKENS} tokens"
# What is called, of what size, with how many MiB of memory, and how.
CALLS: dict[str, tuple[str, int, Callable[[Made, int], object]]] = {
    "interaction": (SOME, 64, lambda m, n: m.d.interaction(m.some, memory=n)),
    'interaction, basis="features"': ("1 output", 256, lambda m, n: m.d.interaction(0, basis="features", memory=n)),
    "eigen, 2 pairs": (MANY, 256, lambda m, n: m.d.eigen(m.many, 2, memory=n)),
    "top_interactions": (SOME, 64, lambda m, n: m.d.top_interactions(m.some, memory=n)),
    "between": ("1 output, 20,000 directions", 64, lambda m, n: m.d.between(0, m.vocabulary, memory=n)),
    "strongest_interactions": (SOME, 256, lambda m, n: m.d.strongest_interactions(100, m.some, memory=n, **QUIET)),
    "spectra": (MANY, 256, lambda m, n: m.d.spectra(m.many, memory=n, **QUIET)),
    "fidelity, 10 pairs": (f"{MANY}, 4 texts", 384, lambda m, n: m.d.fidelity(m.texts[:4], m.many, memory=n)),
    "sparsity": (SOME, 64, lambda m, n: m.d.sparsity(m.some, memory=n, **QUIET)),
    "outliers": (SOME, 64, lambda m, n: m.d.outliers(m.some, memory=n, **QUIET)),
    "motifs": (SOME, 64, lambda m, n: m.d.motifs(m.some, memory=n, **QUIET)),
    "inner_products": (EVERY, 256, lambda m, n: m.d.inner_products(m.every, memory=n)),
    "neighbours": (EVERY, 256, lambda m, n: m.d.neighbours(memory=n)),
    "clusters": (EVERY, 256, lambda m, n: m.d.clusters(memory=n)),
    "hosvd": ("the layer", 256, lambda m, n: m.d.hosvd(memory=n)),
    "cp, rank 256": ("the layer, 2 sweeps", 256, lambda m, n: m.d.cp(256, max_sweeps=2, memory=n, **QUIET)),
    "feature_activations": ("64 texts, 2 SAEs, 4 texts at a time", 64, Made.run),
    "cofiring": ("64 texts", 128, lambda m, n: m.activations[0].cofiring(memory=n)),
    "token_cosines": ("64 texts", 128, lambda m, n: m.activations[0].token_cosines(memory=n)),
    "motif_gallery": ("64 texts", 1024, Made.gallery),
    "freeze": (TEXT, 256, lambda m, n: freeze(m.model, m.tokens, m.saes, memory=n)),
    "Circuit.trace": (TEXT, 512, lambda m, n: m.trace(n, "eigencircuits")),
    'Circuit.trace, mlps="pairs"': (TEXT, 512, lambda m, n: m.trace(n, "pairs")),
    'split, mlps="pairs"': (TEXT, 256, lambda m, n: m.of_text("split", n, TARGET, attention="paths", mlps="pairs")),
    "attribute_tokens": (f"{TEXT}, 4 targets", 256, lambda m, n: m.of_text("attribute_tokens", n, TARGETS)),
    "attribute_tokens, pairs": (TEXT, 1024, lambda m, n: m.of_text("attribute_tokens", n, TARGET, pairs=True)),
    "check_circuit": (TEXT, 512, lambda m, n: m.of_text("check_circuit", n, TARGET)),
    "check_edges": (TEXT, 512, lambda m, n: m.of_text("check_edges", n, TARGET)),
    "integrated_gradients": (TEXT, 512, lambda m, n: m.of_text("integrated_gradients", n, TARGET, attention="real")),
}
TARGETS = [Target.logit(token) for token in (7, 8, 9, 10)]


def main(*names: str) -> None:
    torch.set_num_threads(1)
    made = Made()
    _ = made.activations
    print("| call | of | memory | limit | peak | seconds |\n|---|---|---|---|---|---|")
    for name in names or CALLS:
        size, mib, call = CALLS[name]
        memory, limit = mib * MIB, 2 * mib * MIB + SLACK
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to hide what the call takes
        start = time.perf_counter()
        try:
            peak = f"{peak_within(lambda: call(made, memory), limit) / MIB:,.0f} MiB"  # noqa: B023
        except AssertionError as error:
            peak = f"failed: {(str(error).strip() or 'it was ended').splitlines()[-1]}"
        print(
            f"| `{name}` | {size} | {mib} MiB | {limit // MIB:,} MiB | {peak} | {time.perf_counter() - start:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
