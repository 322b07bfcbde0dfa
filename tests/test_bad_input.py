"""Wrong arguments and damaged files that fuzzing (`benchmarks/fuzz.py`) once found answered by a raw exception.

One case of each kind; the fuzz run tries some thousands.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bilens
from bilens.attribute import Circuit, freeze
from bilens.decompose.sweep import sweep_layers
from bilens.errors import ArgumentError, CheckpointError
from bilens.train.data import load_texts, train_tokenizer
from bilens.vision import BilinearClassifier, ClassifierConfig
from tests.conftest import make_model
from tests.random_saes import make_sae

SEVERAL, NUMBER = np.arange(3), torch.tensor(1)
TEXTS = ["the little fox found a red kite.", "a tired owl lost three stones."]


@pytest.fixture(scope="module")
def given(tokenizer: Any) -> SimpleNamespace:
    model = make_model(tokenizer=tokenizer)
    saes = {f"1-{point}": make_sae("topk", hook) for point, hook in HOOKS.items()}
    return SimpleNamespace(
        model=model,
        saes=saes,
        d=bilens.Decomposer(model, 1, *saes.values()),
        frozen=freeze(model, TEXTS[0], saes.values()),
    )


HOOKS = {"mlp-in": "blocks.1.ln2.hook_normalized", "mlp-out": "blocks.1.hook_mlp_out"}
CALLS: dict[str, tuple[Callable[[SimpleNamespace, Path], Any], str]] = {
    "overwrite=": (lambda g, out: g.model.save_pretrained(out, overwrite=SEVERAL), "overwrite is"),
    "overwrite= of a classifier": (
        lambda g, out: BilinearClassifier(ClassifierConfig(16, 6, 3)).save_pretrained(out, overwrite=SEVERAL),
        "overwrite is",
    ),
    "overwrite= of a store": (
        lambda g, out: bilens.build_feature_store(g.model, g.saes, TEXTS, out, overwrite="no"),
        "overwrite is 'no'",
    ),
    "an SAE's name": (
        lambda g, out: bilens.build_feature_store(g.model, g.saes, TEXTS, out)[0],
        "the store has no SAE 0",
    ),
    "checkpoint_seconds": (
        lambda g, out: bilens.build_feature_store(g.model, g.saes, TEXTS, out, checkpoint_seconds="x"),
        "checkpoint_seconds is 'x'",
    ),
    "a corpus that is a number": (lambda g, out: bilens.build_feature_store(g.model, g.saes, NUMBER, out), "texts is"),
    "truncate=": (lambda g, out: g.model.to_tokens("fox", truncate=SEVERAL), "truncate is"),
    "prepend_bos=": (lambda g, out: g.model.to_tokens("fox", prepend_bos=SEVERAL), "prepend_bos is"),
    "padding_side=": (lambda g, out: g.model.to_tokens("fox", padding_side=SEVERAL), "padding_side"),
    "return_cache_object=": (
        lambda g, out: g.model.run_with_cache("fox", return_cache_object=SEVERAL),
        "return_cache_object is",
    ),
    "pos_slice=": (lambda g, out: g.model.run_with_cache("fox", pos_slice=[object()]), "is no position"),
    "past_kv_cache=": (lambda g, out: g.model("fox", past_kv_cache={"a": 1}), "expected a KeyValueCache"),
    "temperature=": (lambda g, out: g.model.generate("fox", temperature=float("inf")), "temperature inf"),
    "max_new_tokens=": (lambda g, out: g.model.generate("fox", max_new_tokens="x"), "max_new_tokens is 'x'"),
    "a seed beyond int64": (lambda g, out: g.model.generate("fox", seed=10**30), "seed is"),
    "no single token": (lambda g, out: g.model.to_single_token(SEVERAL), "string is"),
    "tokens that are none": (lambda g, out: g.model.to_str_tokens([1.5]), "tokens are whole numbers"),
    "tokens below 0": (lambda g, out: g.model.to_str_tokens(torch.tensor([-1])), "tokens are whole numbers"),
    "tokens to run": (lambda g, out: g.d.run("fox"), "tokens is 'fox'"),
    "k that is no number": (lambda g, out: g.d.fidelity(TEXTS, k="x"), "'x' is not an integer"),
    "names that are a number": (lambda g, out: bilens.Decomposer(g.model, 1, input_names=NUMBER), "input_names is"),
    "a model that is none": (lambda g, out: bilens.Decomposer(7, 1), "model is a int"),
    "an output beyond int64": (lambda g, out: g.d.eigen(10**30), "no feature's number"),
    "activations of another length": (
        lambda g, out: g.d.top_interactions(1, activations=torch.ones(3)),
        "expected one",
    ),
    "k above d_model": (lambda g, out: sweep_layers([g.d], out, k=10**6), "k is 1000000"),
    "dtype of the algebra": (lambda g, out: freeze(g.model, "fox", dtype=SEVERAL), "dtype is"),
    "a text that is a dict": (lambda g, out: freeze(g.model, {}), "text_or_tokens is {}"),
    "a text that is bytes": (lambda g, out: freeze(g.model, b"fox"), "text_or_tokens is b'fox'"),
    "SAEs that are a number": (lambda g, out: freeze(g.model, "fox", 7), "saes is 7"),
    "SAEs that are texts": (lambda g, out: freeze(g.model, "fox", ["a"]), "saes holds 'a'"),
    "a target that is none": (lambda g, out: Circuit.trace(g.model, [], "fox", 7), "no Target"),
    "a target beyond int64": (lambda g, out: bilens.attribute.split(g.frozen, 10**30), "target is 1000"),
    "texts that are a number": (lambda g, out: bilens.evaluate_saes(g.model, g.saes, NUMBER), "texts is"),
    "SAEs to evaluate": (lambda g, out: bilens.evaluate_saes(g.model, {"a": 7}, TEXTS), "7"),
    "data that are a number": (lambda g, out: load_texts(7), "source is 7"),
    "vocab_size": (lambda g, out: train_tokenizer(TEXTS, vocab_size=10**15), "vocab_size is"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_refused_by_name(given: SimpleNamespace, tmp_path: Path, name: str) -> None:
    call, said = CALLS[name]
    with pytest.raises(ArgumentError, match=said):
        call(given, tmp_path / "out")


def test_memory_beyond_int64_is_room_for_all_at_once(given: SimpleNamespace) -> None:
    assert given.d.spectra(memory=10**30).to_frame().equals(given.d.spectra().to_frame())


def test_a_damaged_store_says_so(given: SimpleNamespace, tmp_path: Path) -> None:
    """A column renamed in one of its files; a count in its manifest that is none."""
    store = bilens.build_feature_store(given.model, given.saes, TEXTS, tmp_path)
    file = next(tmp_path.rglob("statistics.safetensors"))
    columns = load_file(file)
    save_file({"sux" if name == "sum" else name: column for name, column in columns.items()}, file)
    with pytest.raises(CheckpointError, match=r"statistics\.safetensors has no sum.*build it again"):
        [store[name].feature(0) for name in store.names]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"n_tokens": ', '"n_tokens": 0.5e1, "was": '))
    with pytest.raises(CheckpointError, match="no whole numbers"):
        bilens.FeatureStore.load(tmp_path)
