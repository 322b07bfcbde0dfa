"""The feature store: against a plain loop, whole or in parts, stopped and resumed, by one process or two."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bilens import cli
from bilens._core.folders import alone_in
from bilens.errors import (
    ArgumentError,
    CheckpointError,
    EmptyTextError,
    HookNameError,
    ModelNotFoundError,
    OutOfRangeError,
    OverwriteError,
    SAEMismatchError,
    TokenizationError,
    TrainingError,
    WriteError,
)
from bilens.sae.features import collecting as feature_pass
from bilens.sae.features import store as store_module
from bilens.sae.features.collecting import FeaturePass
from bilens.sae.features.corpus import batches, open_corpus
from bilens.sae.features.examples import feature_activations
from bilens.sae.features.statistics import (
    FeatureStatistics,
    Firings,
    Places,
    Window,
    histogram_bin,
    histogram_edges,
)
from bilens.sae.features.store import FeatureStore, FeatureStoreConfig, build_feature_store
from tests.conftest import make_model
from tests.processes import run_in_processes
from tests.random_saes import D_SAE, make_sae

pytestmark = pytest.mark.usefixtures("datasets_cache")

MLP_IN, MLP_OUT = "blocks.0.ln2.hook_normalized", "blocks.1.hook_mlp_out"
# Small groups and batches, so that a small corpus has many of both.
SMALL = FeatureStoreConfig(n_top=4, bands=2, per_band=2, before=3, after=2, batch_texts=3, batch_tokens=60)


@pytest.fixture
def saes():
    """One whose features may be negative, one that may be steered by biases, one behind the last MLP."""
    return {
        "in": make_sae("scope", MLP_IN),
        "out": make_sae("topk", MLP_OUT, seed=1),
        "jump/relu": make_sae("jumprelu", MLP_OUT, seed=2),
    }


@pytest.fixture
def sample(texts):
    """Texts of several lengths, the last one longer than two contexts of 32."""
    return [*texts[::17], "the little fox found a red kite near the river! " * 7]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- against a plain loop ---------------------------------------------------------------------------------------------


class Plain:
    """The same numbers by a loop over contexts, positions and features, one context at a time."""

    @torch.no_grad()
    def __init__(self, model, sae, texts):
        self.n_tokens, self.n_by_token = 0, Counter()
        self.fired: dict[int, list[tuple]] = defaultdict(list)  # feature: (value, text, position, token)
        self.contexts: dict[tuple[int, int], tuple[list[int], torch.Tensor]] = {}
        room = model.cfg.n_ctx - 1
        hook = sae.cfg.metadata.hook_name
        for text, string in enumerate(texts):
            ids = model.to_tokens(string, prepend_bos=False, truncate=False)[0]
            for at in range(0, len(ids), room):
                row = torch.cat([torch.tensor([model.tokenizer.bos_token_id]), ids[at : at + room]])
                _, cache = model.run_with_cache(row[None], names_filter=hook)
                acts = sae.encode(cache[hook])[0, 1:]
                self.contexts[text, at] = (row[1:].tolist(), acts)
                self.n_tokens += len(acts)
                self.n_by_token.update(row[1:].tolist())
                for place, feature in acts.nonzero().tolist():
                    value, token = acts[place, feature].item(), int(row[1 + place])
                    self.fired[feature].append((value, text, at + place + 1, token))

    def top(self, feature, n, room):
        """The strongest firing of each context, the strongest of those first."""
        strongest: dict[tuple[int, int], tuple] = {}
        for value, text, position, _ in self.fired[feature]:
            key = (text, (position - 1) // room)
            strongest[key] = min(strongest.get(key, (0.0, 0, 0, 0.0)), (-abs(value), text, position, value))
        return sorted(strongest.values())[:n]


@pytest.mark.parametrize("counted_pairs", [2**26, 0], ids=["all tokens", "sampled tokens"])
def test_it_is_what_a_plain_loop_finds(text_model, saes, sample, tmp_path, monkeypatch, counted_pairs):
    """Also with tokens counted on a sample, which here holds all firings of almost every feature."""
    monkeypatch.setattr(store_module, "COUNTED_PAIRS", counted_pairs)
    store = build_feature_store(text_model, saes, sample, tmp_path / "store", config=SMALL)
    strings = text_model.tokenizer.convert_ids_to_tokens(list(range(text_model.cfg.d_vocab)))
    room, counted = text_model.cfg.n_ctx - 1, 0
    for name, sae in saes.items():
        plain = Plain(text_model, sae, sample)
        assert store.n_tokens == plain.n_tokens
        for feature in range(D_SAE):
            record, fired = store[name].feature(feature), plain.fired[feature]
            values = [value for value, *_ in fired]
            # A context by itself and in a batch: float32 sums in another order.
            close = {"rel": 1e-4, "abs": 1e-5}
            assert record.fired == len(fired)
            assert record.frequency == len(fired) / plain.n_tokens
            assert record.mean == pytest.approx(sum(values) / plain.n_tokens, **close)
            assert record.maximum == pytest.approx(max(values + [0.0] * (plain.n_tokens - len(values))), **close)
            assert record.histogram.sum() == len(fired)
            if not fired:
                assert math.isnan(record.mean_active)
                assert not record.top
                continue
            assert record.mean_active == pytest.approx(sum(values) / len(values), **close)

            expected = plain.top(feature, SMALL.n_top, room)
            assert [c.activation for c in record.top] == pytest.approx([v for *_, v in expected], **close)
            firings = {(text, position): value for value, text, position, _ in fired}
            for context in (*record.top, *(c for band in record.random for c in band)):
                assert context.activation == pytest.approx(firings[context.text, context.position], **close)
                self_at = (context.position - 1) // room * room
                ids, acts = plain.contexts[context.text, self_at]
                place = context.position - 1 - self_at
                low, high = max(0, place - SMALL.before), place + SMALL.after + 1
                assert context.tokens == [strings[i] for i in ids[low:high]]
                assert context.values == pytest.approx(acts[low:high, feature].tolist(), **close)
                assert context.focus == place - low

            if counted_pairs == 0 and len(fired) > 256:
                continue
            counts, mass = Counter(token for *_, token in fired), Counter()
            for value, *_, token in fired:
                mass[strings[token]] += abs(value)
            counted += 1
            for found in record.tokens:
                token = strings.index(found.token)
                assert found.count == counts[token]
                pmi = math.log(counts[token] * plain.n_tokens / (len(fired) * plain.n_by_token[token]))
                assert found.pmi == pytest.approx(pmi, abs=1e-5)
                assert found.share == pytest.approx(mass[found.token] / sum(mass.values()), abs=1e-4)
            kept = {found.token for found in record.tokens}
            assert len(kept) == min(SMALL.n_tokens, len(counts))
            least = min(mass[token] for token in kept)
            assert all(value <= least * 1.0001 for token, value in mass.items() if token not in kept)
    assert counted > D_SAE


def test_labels_are_those_of_the_report(text_model, texts, tmp_path):
    """Texts that fit the context, and room for every firing and token: then both look at the same."""
    sample = texts[::17]
    saes = {str(seed): make_sae("topk", MLP_OUT, seed=seed, d_sae=120, k=4) for seed in range(2)}
    everything = FeatureStoreConfig(per_band=60, n_tokens=200)
    store = build_feature_store(text_model, saes, sample, tmp_path, config=everything)
    for name, found in zip(saes, feature_activations(text_model, list(saes.values()), sample), strict=True):
        assert any("→" in label for label in found.labels())
        assert list(store.labels(name)) == list(found.labels())
        assert 0 < len(found.labels().dense) < 120
        assert store.labels(name).dense == found.labels().dense
        assert [record.label for record in store[name]] == found.labels()
        assert [record.summary.label for record in store[name]] == found.labels()


def test_promoted_tokens_are_the_decoder_through_the_unembedding(text_model, tmp_path):
    """Rescaled SAEs write their decoder rows at length one; an MLP's input writes nowhere."""
    saes = {
        "plain": make_sae("topk", MLP_OUT),
        "rescaled": make_sae("topk-rescaled", MLP_OUT),
        "in": make_sae("topk", MLP_IN),
    }
    store = build_feature_store(text_model, saes, ["the little fox"], tmp_path, config=SMALL)
    strings = text_model.tokenizer.convert_ids_to_tokens(list(range(text_model.cfg.d_vocab)))
    for name in ("plain", "rescaled"):
        W_dec = saes[name].W_dec.detach()
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) if name == "rescaled" else W_dec
        effects = (W_dec @ text_model.W_U.detach())[7]
        record = store[name].feature(7)
        order = effects.argsort(descending=True)
        assert [token for token, _ in record.promoted] == [strings[i] for i in order[:10]]
        assert [token for token, _ in record.suppressed] == [strings[i] for i in order.flip(0)[:10]]
        torch.testing.assert_close(torch.tensor([v for _, v in record.promoted]), effects[order[:10]])
    assert store["in"].feature(7).promoted is None


def test_random_contexts_are_of_their_bands(text_model, texts, tmp_path):
    """The estimated quantile is within a tenth of the true one for nearly all; every band has contexts."""
    config = FeatureStoreConfig(bands=5, per_band=3, batch_texts=40)
    sae = make_sae("topk", MLP_OUT)
    store = build_feature_store(text_model, {"a": sae}, texts, tmp_path, config=config)
    found = feature_activations(text_model, [sae], texts)[0]
    off, seen = [], 0
    for record in store["a"]:
        if record.fired < 200:
            continue
        seen += 1
        values = found.values[found.entries(record.feature)]
        assert all(record.random)
        for band, contexts in enumerate(record.random):
            assert len(contexts) <= 3
            for c in contexts:
                assert band / 5 <= c.quantile < (band + 1) / 5
                # Equal activations share an interval of quantiles.
                low, high = (
                    (values < c.activation - 1e-4).float().mean(),
                    (values <= c.activation + 1e-4).float().mean(),
                )
                off.append(max(low - c.quantile, c.quantile - high, 0))
    assert seen > 10
    assert np.quantile(off, 0.95) < 0.1


def test_a_store_says_what_activations_say(text_model, texts, tmp_path):
    """Whatever takes one takes the other: densities, typical activations, and what a feature fires on most."""
    sae = make_sae("topk", MLP_OUT)
    stored = build_feature_store(text_model, {"a": sae}, texts[:40], tmp_path)["a"]
    found = feature_activations(text_model, [sae], texts[:40])[0]
    assert stored.d_sae == found.d_sae
    torch.testing.assert_close(stored.density(), found.density())
    # Sums of a few hundred float32 numbers, in another order.
    torch.testing.assert_close(stored.typical_activations(), found.typical_activations(), rtol=1e-5, atol=1e-6)
    feature = int(found.density().argmax())
    assert stored.summary(feature).density == pytest.approx(found.summary(feature).density)
    strongest = (of.summary(feature).examples[0] for of in (stored, found))
    assert next(strongest).activation == pytest.approx(next(strongest).activation, rel=1e-5)


def test_dead_blocks_of_features(text_model, sample, tmp_path):
    """Whole row groups without a context are found at their place."""
    sae = make_sae("standard", MLP_OUT, d_sae=400)
    with torch.no_grad():
        sae.b_enc[100:300] = -1e4
    store = build_feature_store(text_model, {"a": sae}, sample, tmp_path, config=SMALL)
    frame = store.to_frame()
    assert frame.dead[100:300].all()
    assert store["a"].feature(299).label == "299 (silent)"
    for feature in (99, 300, 399):
        record = store["a"].feature(feature)
        assert len(record.top) == min(record.fired, 4) or record.fired > 4
        assert all(abs(c.values[c.focus]) == abs(c.activation) for c in record.top)


# --- parts and wholes -------------------------------------------------------------------------------------------------


def random_parts(seed: int, n_parts: int):
    """Forward passes with random contexts and firings, many of them equally strong."""
    rng = np.random.default_rng(seed)
    parts = []
    for part in range(n_parts):
        lengths = rng.integers(1, 9, size=rng.integers(1, 5))
        ends = lengths.cumsum()
        n = int(ends[-1])
        start = np.repeat(ends - lengths, lengths)
        places = Places(
            ids=rng.integers(0, 12, n),
            text=np.repeat(part * 10 + np.arange(len(lengths)), lengths),
            position=np.arange(n) - start + 1,
            start=start,
            end=np.repeat(ends, lengths),
        )
        dense = np.where(rng.random((n, 6)) < 0.4, rng.choice([1.0, -1.5, 0.1, 3e-9, 7e4, 2.5], (n, 6)), 0)
        place, feature = np.nonzero(dense)
        parts.append((Firings(place, feature, dense[place, feature].astype(np.float32)), places))
    return parts


def counted(parts, all_tokens=True):
    statistics = FeatureStatistics(6, 12, 3, 5, Window(2, 1), all_tokens, seed=3)
    for firings, places in parts:
        statistics.add(firings, places)
    return statistics


@given(seed=st.integers(0, 10**6), cut=st.integers(0, 8), all_tokens=st.booleans(), data=st.data())
def test_parts_in_any_order_are_the_whole(seed, cut, all_tokens, data):
    """Bit for bit: merging is associative and commutative on every array, ties and sums included."""
    parts = random_parts(seed, 8)
    whole = counted(parts, all_tokens).arrays()
    order = data.draw(st.permutations(range(8)))
    one, other = (counted([parts[i] for i in some], all_tokens) for some in (order[:cut], order[cut:]))
    one.merge(other)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


@given(seed=st.integers(0, 10**6))
def test_sums_are_exact(seed):
    """What `math.fsum` gives; the smallest value here has bits below 2^-56, each rounded by less than that."""
    parts = random_parts(seed, 5)
    statistics = counted(parts)
    for feature in range(6):
        values = [float(v) for f, _ in parts for v in f.value[f.feature == feature]]
        assert statistics.sum()[feature] == pytest.approx(math.fsum(values), rel=1e-15, abs=len(values) * 2.0**-57)


@given(value=st.floats(2.0**-16, 2.0**15, width=32))
def test_histogram_bins_hold_what_is_between_their_edges(value):
    edges = histogram_edges()
    place = histogram_bin(np.array([value, -value], np.float32))
    assert place[0] == place[1]
    assert edges[place[0]] <= value < edges[place[0] + 1]


def test_contexts_of_a_long_text_cover_it(tokenizer):
    """Every token once, each context from [BOS], places as in `to_tokens`; no batch larger than it may be."""
    model = make_model(tokenizer=tokenizer)
    texts = ["the little fox found a red kite near the river! " * 9, "a tired owl"]
    found = {}
    for batch in batches(texts, 5, tokenizer, 32, 70):
        assert batch.tokens.numel() <= 70
        assert (batch.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert batch.tokens[batch.mask].tolist() == batch.places.ids.tolist()
        found |= dict(zip(zip(batch.places.text, batch.places.position, strict=True), batch.places.ids, strict=True))
    for i, text in enumerate(texts):
        ids = model.to_tokens(text, truncate=False)[0].tolist()
        assert [found.pop((5 + i, position)) for position in range(1, len(ids))] == ids[1:]
    assert not found


# --- stopping and going on --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for whatever ends a process without asking."""


def stops(n_forwards, error, *args, **kwargs):
    """Build until so many forward passes are done, then raise; whether it came to that."""
    forward, count = feature_pass.FeaturePass._forward, iter(range(10**6))

    def forward_or_stop(self, batch):
        if next(count) == n_forwards:
            raise error
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_pass.FeaturePass, "_forward", forward_or_stop)
        try:
            build_feature_store(*args, **kwargs)
        except error:
            return True
    return False


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_a_stopped_pass_ends_in_the_same_files(text_model, saes, sample, tmp_path, error):
    """Stopped again and again, with a checkpoint after every group or (Ctrl-C) none but the last."""
    arguments = (text_model, saes, sample)
    build_feature_store(*arguments, tmp_path / "whole", config=SMALL)
    options = {"config": SMALL, "checkpoint_seconds": 0 if error is Killed else 1e9}
    for n_forwards in (0, 3, 1, 0, 2):
        assert stops(n_forwards, error, *arguments, tmp_path / "parts", **options)
    with pytest.raises(CheckpointError, match="is not finished"):
        FeatureStore.load(tmp_path / "parts")
    build_feature_store(*arguments, tmp_path / "parts", config=SMALL)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_kill_between_base_and_cleaning_counts_nothing_twice(text_model, saes, sample, tmp_path):
    arguments = (text_model, saes, sample)
    build_feature_store(*arguments, tmp_path / "whole", config=SMALL)
    assert stops(5, Killed, *arguments, tmp_path / "parts", config=SMALL, checkpoint_seconds=0)
    left = tmp_path / "parts" / "checkpoint" / "process-0.safetensors"
    old = left.read_bytes()
    assert stops(0, Killed, *arguments, tmp_path / "parts", config=SMALL)
    assert not left.exists()
    left.write_bytes(old)  # as if it had not been deleted
    build_feature_store(*arguments, tmp_path / "parts", config=SMALL)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_killed_process_loses_nothing(text_model, saes, texts, tmp_path):
    """SIGKILL, at whatever moment it comes, several times."""
    build_feature_store(text_model, saes, texts[::2], tmp_path / "whole", config=SMALL)
    process = multiprocessing.get_context("fork").Process
    kills = 0
    for seconds in (0.15, 0.3, 0.2):
        child = process(
            target=build_feature_store,
            args=(text_model, saes, texts[::2], tmp_path / "parts"),
            kwargs={"config": SMALL, "checkpoint_seconds": 0},
        )
        child.start()
        time.sleep(seconds)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills
    build_feature_store(text_model, saes, texts[::2], tmp_path / "parts", config=SMALL)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_write_the_same_files(text_model, saes, sample, tmp_path):
    build_feature_store(text_model, saes, sample, tmp_path / "one", config=SMALL)

    def build():
        store = build_feature_store(text_model, saes, sample, tmp_path / "two", config=SMALL)
        assert store.n_texts == len(sample)

    assert run_in_processes(2, build) == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_another_number_of_processes_goes_on(text_model, saes, sample, tmp_path):
    """Begun by three, gone on with by one, finished by two."""
    arguments = (text_model, saes, sample)
    build_feature_store(*arguments, tmp_path / "one", config=SMALL)

    def begin():
        # Each sees the error at its own moment; nothing is waited for after it.
        assert not stops(1, KeyboardInterrupt, *arguments, tmp_path / "many", config=SMALL)

    def finish(config):
        build_feature_store(*arguments, tmp_path / "many", config=config)

    assert run_in_processes(3, begin) == [1, 1, 1]
    assert len(list((tmp_path / "many" / "checkpoint").glob("process-*"))) == 3
    assert stops(2, KeyboardInterrupt, *arguments, tmp_path / "many", config=SMALL)
    # Another configuration is refused by both: nobody waits for the other.
    assert run_in_processes(2, finish, FeatureStoreConfig()) == [1, 1]
    assert run_in_processes(2, finish, SMALL) == [0, 0]
    assert files(tmp_path / "many") == files(tmp_path / "one")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_store_reads_back(text_model, saes, sample, tmp_path):
    built = build_feature_store(text_model, saes, sample, tmp_path, config=SMALL)
    store = FeatureStore.load(tmp_path)
    assert store == built
    assert store.names == tuple(saes)
    frame = store.to_frame()
    assert len(frame) == 3 * D_SAE
    assert list(frame.sae.unique()) == list(saes)
    one = store["out"].to_frame()
    assert one.label.tolist() == store.labels("out")
    record = store["out"].feature(int(one.frequency.idxmax()))
    assert record.frequency == one.frequency.max()
    assert f"feature {record.label}: fires on" in str(record)
    assert len(record.to_frame()) == len(record.top) + sum(map(len, record.random))
    assert "active per token" in str(store)
    assert "<table" in store._repr_html_()
    # Nothing is computed again where all is there.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    build_feature_store(text_model, saes, sample, tmp_path, config=SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_file_is_its_texts(text_model, saes, sample, tmp_path):
    """Streamed from a file or given as a list: all but the corpus' identity is the same; blank texts do not count."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *sample]))
    build_feature_store(text_model, saes, path, tmp_path / "file", config=SMALL)
    build_feature_store(text_model, saes, sample, tmp_path / "list", config=SMALL)
    one, other = files(tmp_path / "file"), files(tmp_path / "list")
    manifests = [json.loads(found.pop("manifest.json")) for found in (one, other)]
    assert one == other
    assert manifests[0].pop("identity")["corpus"] != manifests[1].pop("identity")["corpus"]
    assert manifests[0] == manifests[1]
    limited = build_feature_store(
        text_model, saes, path, tmp_path / "part", config=FeatureStoreConfig(max_texts=4, batch_texts=3)
    )
    assert limited.n_texts == 4


def test_another_store_is_refused(text_model, saes, sample, tmp_path, tokenizer):
    """Finished or not, and what differs is named."""
    build_feature_store(text_model, saes, sample, tmp_path, config=SMALL)
    other_saes = saes | {"out": make_sae("topk", MLP_OUT, seed=9)}
    for kwargs, what in [
        ({"config": FeatureStoreConfig(seed=1)}, r"\bn_top \("),
        ({"saes": other_saes}, r"\bout \("),
        ({"source": sample[1:]}, r"\btexts \("),
        ({"model": make_model(seed=5, tokenizer=tokenizer)}, "model"),
    ]:
        arguments = {"model": text_model, "saes": saes, "source": sample, "config": SMALL} | kwargs
        with pytest.raises(OverwriteError, match=f"differs in .*{what}"):
            build_feature_store(folder=tmp_path, **arguments)
    fewer = {name: sae for name, sae in saes.items() if name != "in"}
    with pytest.raises(OverwriteError, match="differs in"):
        build_feature_store(text_model, fewer, sample, tmp_path, config=SMALL)
    # By the word it is replaced, and nothing of the other is left; somebody's own file in an SAE's folder stays.
    (tmp_path / "in" / "notes.txt").write_text("mine")
    store = build_feature_store(text_model, fewer, sample, tmp_path, config=SMALL, overwrite=True)
    assert store.names == tuple(fewer)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["notes.txt"]


def test_a_pass_that_came_to_nothing_is_in_nobodys_way(text_model, saes, sample, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FeaturePass, "run", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            build_feature_store(text_model, saes, sample, tmp_path, config=FeatureStoreConfig(seed=1))
    assert build_feature_store(text_model, saes, sample, tmp_path, config=SMALL).config == SMALL


def test_two_passes_in_one_folder(text_model, saes, sample, tmp_path):
    """The second is told so, instead of dying when the first removes the checkpoints."""
    with alone_in(tmp_path), pytest.raises(WriteError, match="another process is writing to"):
        build_feature_store(text_model, saes, sample, tmp_path, config=SMALL)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".x", "checkpoint", "Checkpoint", "manifest.json", "a" * 300, "\udc80", 3],
)
def test_names_that_are_none_of_a_folder(text_model, saes, sample, tmp_path, name):
    """They would lead out of the folder, or be its own files; nothing is written."""
    with pytest.raises(ArgumentError, match="name"):
        build_feature_store(text_model, {name: saes["in"]}, sample, tmp_path / "out", config=SMALL)
    assert not (tmp_path / "out").exists()


def test_names_with_other_characters(text_model, saes, sample, tmp_path):
    """They are written as in a URL, all in the store's folder, and found again by their name."""
    names = ["a/b", "x/..", "\0", "ä b", "C:\\x"]
    build_feature_store(text_model, dict.fromkeys(names, saes["in"]), sample, tmp_path / "out", config=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    store = FeatureStore.load(tmp_path / "out")
    assert [store[name].feature(0).sae for name in names] == names


def test_bad_input(text_model, saes, sample, tmp_path):
    build = build_feature_store
    with pytest.raises(ArgumentError, match="expected SAEs by name"):
        build(text_model, [saes["in"]], sample, tmp_path)
    with pytest.raises(ArgumentError, match="expected SAEs by name"):
        build(text_model, {}, sample, tmp_path)
    with pytest.raises(ArgumentError, match="expected a FeatureStoreConfig"):
        build(text_model, saes, sample, tmp_path, config={"n_top": 3})
    with pytest.raises(EmptyTextError, match="text 1 of 2, ' ', has nothing in it"):
        build(text_model, saes, ["a", " "], tmp_path)
    with pytest.raises(EmptyTextError, match="the list of texts is empty"):
        build(text_model, saes, [], tmp_path)
    with pytest.raises(ArgumentError, match="text 0 of 1 is 3; expected a string"):
        build(text_model, saes, [3], tmp_path)
    with pytest.raises(TrainingError, match=r"no file .*nowhere\.jsonl"):
        build(text_model, saes, tmp_path / "nowhere.jsonl", tmp_path / "out")
    with pytest.raises(HookNameError):
        build(text_model, {"a": make_sae("topk", "blocks.9.hook_mlp_out")}, sample, tmp_path)
    with pytest.raises(TokenizationError, match="has no tokenizer"):
        build(make_model(), saes, sample, tmp_path)
    with pytest.raises(ArgumentError, match="bands is 0; expected a whole number, at least 1"):
        FeatureStoreConfig(bands=0)
    broken = make_sae("standard", MLP_OUT)
    with torch.no_grad():
        broken.W_enc[0, 3] = float("nan")
    with pytest.raises(SAEMismatchError, match=r"feature 3 of the SAE 'broken' is nan at text \d+, position \d+"):
        build(text_model, {"broken": broken}, sample, tmp_path / "broken")
    with pytest.raises(ModelNotFoundError, match="no feature store at"):
        FeatureStore.load(tmp_path / "nowhere")
    store = build(text_model, saes, sample, tmp_path / "store", config=SMALL)
    with pytest.raises(ArgumentError, match=r"no SAE 'ou'; it has .* Did you mean 'out'"):
        store["ou"]
    with pytest.raises(OutOfRangeError, match=f"feature {D_SAE} is outside the SAE's {D_SAE}"):
        store["out"].feature(D_SAE)
    with pytest.raises(ArgumentError, match="'12' is not an integer"):
        store["out"].feature("12")


def test_a_stream_without_a_text(text_model, saes, tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": " "}\n')
    with pytest.raises(EmptyTextError, match="every text is empty"):
        build_feature_store(text_model, saes, path, tmp_path / "out")
    assert open_corpus(["a", "b", "c"], max_texts=2).n_texts == 2


def test_the_commands(tmp_path):
    """A store of the bundled model, and a page of two of its features."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Once upon a time, there was a little fox."}\n' * 3)
    arguments = ["features", "ts-tiny", str(path), str(tmp_path / "store"), "--sae", "0-mlp-in-x8-k32"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "0-mlp-in-x8-k32 at blocks.0.ln2.hook_normalized: 2048 features" in result.output
    page = tmp_path / "page.html"
    arguments = ["dashboard", str(tmp_path / "store"), "--sae", "0-mlp-in-x8-k32", "--out", str(page)]
    result = CliRunner().invoke(cli.app, [*arguments, "--feature", "1", "--feature", "2"])
    assert result.exit_code == 0, result.output
    assert "2 features" in page.read_text()
    wrong = CliRunner().invoke(cli.app, ["features", "ts-tiny", str(path), str(tmp_path / "x"), "--sae", "nope"])
    assert isinstance(wrong.exception, ArgumentError)


def test_one_text_is_no_dataset(text_model, saes, tmp_path):
    """It is not sent to the hub as a dataset's name; neither is a file's name with a typing error."""
    for text in ("the little fox found a red kite", "no such/folder/of texts", "a\nb"):
        with pytest.raises(ArgumentError, match=r"neither a file nor the name of a dataset .* in a list: \[text\]"):
            build_feature_store(text_model, saes, text, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_counts_beyond_the_machines_memory_are_refused(text_model, saes, tmp_path):
    """Before anything of them is made: terabytes, by how many contexts are kept and how long they are."""
    for counts in ({"n_top": 10**9}, {"per_band": 2**62}, {"before": 10**9}):
        with pytest.raises(ArgumentError, match=r"contexts of each of .* GB of memory; this machine has"):
            build_feature_store(text_model, saes, ["a fox"], tmp_path / "store", config=FeatureStoreConfig(**counts))
    for name in ("n_top", "bands", "before", "n_effects", "batch_texts"):
        with pytest.raises(ArgumentError, match=f"{name} is True; expected a whole number"):
            FeatureStoreConfig(**{name: True})
    assert not (tmp_path / "store").exists()
