"""What is kept beside an SAE: names that people may edit, examples, and that pages take both from there."""

import gzip
import json

import pytest
import torch

from bilens.errors import ArgumentError, CheckpointError, StaleError
from bilens.model.files import PRETRAINED
from bilens.model.loading import load_model
from bilens.sae import example_texts, list_saes, load_sae
from bilens.sae.features.examples import feature_activations, names_from_texts
from bilens.sae.features.kept import KEPT_EXAMPLES, describe_features, keep_features, read_kept
from bilens.sae.features.names import FeatureNames
from bilens.sae.features.names_file import names_beside, read_names, write_names
from bilens.sae.loading import load_sae_folder
from bilens.sae.origin import EXAMPLES_FILE, NAMES_FILE, forget_origin
from tests.random_saes import make_sae

MLP_IN, MLP_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
D_SAE = 96


@pytest.fixture
def folder(tmp_path):
    """Two SAEs whose features are not all dense."""
    for seed, (point, hook) in enumerate({"mlp-in": MLP_IN, "mlp-out": MLP_OUT}.items()):
        make_sae("topk", hook, d_sae=D_SAE, k=4, seed=seed).save_model(tmp_path / f"1-{point}-x6-k4")
    return tmp_path


@pytest.fixture
def place(folder):
    return folder / "1-mlp-out-x6-k4"


def edited(place, **entries):
    path = place / NAMES_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_what_is_kept_is_what_a_pass_finds(text_model, texts, folder):
    """Names, densities and typical activations to the bit; activations of examples in half precision."""
    sample = texts[::9]
    written = keep_features(text_model, folder, sample)
    assert len(written) == 4
    for entry in sorted(folder.iterdir()):
        sae = load_sae_folder(entry)
        kept = read_kept(text_model, sae)
        found = feature_activations(text_model, [sae], sample)[0]
        assert list(kept.labels()) == list(found.labels())
        assert kept.labels().dense == found.labels().dense
        assert torch.equal(kept.density(), found.density())
        assert torch.equal(kept.typical_activations(), found.typical_activations())
        for feature in range(0, D_SAE, 5):
            here, there = kept.summary(feature), found.summary(feature, KEPT_EXAMPLES)
            assert here.label == there.label
            assert here.density == pytest.approx(there.density)
            assert len(here.examples) == len(there.examples)
            for a, b in zip(here.examples, there.examples, strict=True):
                assert a.values[a.focus] == pytest.approx(b.values[b.focus], rel=1e-3)  # half precision
                assert len(a.tokens) == len(a.values)
                assert json.loads(json.dumps([a.tokens, a.values, a.focus])) == [a.tokens, a.values, a.focus]
            assert len(kept.summary(feature, n_examples=1).examples) <= 1


def test_an_example_is_a_place_of_the_texts(text_model, texts, folder, place):
    sample = texts[::9]
    keep_features(text_model, folder, sample)
    kept = read_kept(text_model, load_sae_folder(place))
    found = feature_activations(text_model, [load_sae_folder(place)], sample)[0]
    for feature in range(0, D_SAE, 7):
        windows = found.summary(feature, n_examples=len(sample))
        for example in kept.summary(feature).examples:
            same = [w for w in windows.examples if (w.tokens, w.focus) == (example.tokens, example.focus)]
            assert any(w.values == pytest.approx(example.values, rel=1e-3, abs=1e-3) for w in same)


def test_nothing_runs_where_everything_is_kept(text_model, texts, folder, monkeypatch):
    keep_features(text_model, folder, texts[::9])
    saes = [load_sae_folder(entry) for entry in sorted(folder.iterdir())]
    monkeypatch.setattr("bilens.sae.features.kept.feature_activations", None)
    monkeypatch.setattr("bilens.sae.features.examples.feature_activations", None)
    described = describe_features(text_model, saes)
    names = names_from_texts(text_model, saes)
    assert [list(one.labels()) for one in described] == [list(one) for one in names]


def test_an_edited_name_is_on_every_page_and_stays(text_model, texts, folder, place):
    keep_features(text_model, folder, texts[::9])
    names = json.loads((place / NAMES_FILE).read_text())["names"]
    edited(place, names=names | {"3": "colours, after 'red'"})
    assert keep_features(text_model, folder, texts[::20]) == []
    sae = load_sae_folder(place)
    assert names_from_texts(text_model, [sae])[0].texts[3] == "colours, after 'red'"
    assert feature_activations(text_model, [sae], texts[:9])[0].summary(3).label.startswith("3 colours, after 'red'")
    keep_features(text_model, folder, texts[::9], overwrite=True)
    assert json.loads((place / NAMES_FILE).read_text())["names"] == names


def test_a_few_names_of_ones_own(text_model, texts, place):
    """A file that one writes by hand: the other features are named after what they fire on."""
    found = feature_activations(text_model, [load_sae_folder(place)], texts[::9])[0].labels()
    (place / NAMES_FILE).write_text('{"names": {"5": "mine"}}')
    sae = load_sae_folder(place)
    names = names_from_texts(text_model, [sae], texts[::9])[0]
    assert names.texts[5] == "mine"
    assert [names.texts[i] for i in range(D_SAE) if i != 5] == [found.texts[i] for i in range(D_SAE) if i != 5]
    assert names.dense == found.dense


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("[]", "holds a list, expected an object"),
        ("{", "is not JSON"),
        ('{"nmaes": {}}', r"there is no entry 'nmaes', expected .* Did you mean 'names'"),
        ('{"names": []}', "names is .., expected an object"),
        ("{}", "names is None, expected an object"),
        ('{"names": {"96": "x"}}', "names has the entry '96', expected a feature from 0 to 95"),
        ('{"names": {"-1": "x"}}', "names has the entry '-1'"),
        ('{"names": {"01": "x"}}', "names has the entry '01'"),
        ('{"names": {"know": "x"}}', "names has the entry 'know'"),
        ('{"names": {"7": 3}}', "the name of feature 7 is 3, expected text"),
        ('{"names": {}, "dense": 4}', "dense is 4, expected a list of features"),
        ('{"names": {}, "dense": [4, 200]}', "dense holds 200, expected features from 0 to 95"),
        ('{"names": {}, "dense": [true]}', "dense holds True, expected features from 0 to 95"),
        ('{"names": {}, "corpus": 1}', "corpus is 1, expected text"),
    ],
)
def test_a_names_file_that_is_wrong(place, held, message):
    (place / NAMES_FILE).write_text(held)
    with pytest.raises(CheckpointError, match=message):
        names_beside(load_sae_folder(place))


def test_names_of_other_weights(text_model, texts, folder, place):
    keep_features(text_model, folder, texts[::9])
    make_sae("topk", MLP_OUT, d_sae=D_SAE, k=4, seed=9).save_model(place)
    with pytest.raises(StaleError, match=r"names\.json is of other weights than those in sae_weights\.safetensors"):
        names_beside(load_sae_folder(place))
    keep_features(text_model, folder, texts[::9], overwrite=True)
    assert names_beside(load_sae_folder(place)).complete


def test_an_sae_that_was_changed_has_no_names(text_model, texts, folder, place):
    keep_features(text_model, folder, texts[::9])
    sae = load_sae_folder(place)
    with torch.no_grad():
        sae.W_enc[0, 0] += 1
    assert names_beside(sae) is None
    assert read_kept(text_model, sae) is None


def test_damaged_examples(text_model, texts, folder, place):
    keep_features(text_model, folder, texts[::9])
    path = place / EXAMPLES_FILE
    whole = path.read_bytes()
    other = gzip.compress(b"x" * 100)
    for held in (whole[:-20], b"", b"x", other, (folder / "1-mlp-in-x6-k4" / EXAMPLES_FILE).read_bytes()):
        path.write_bytes(held)
        with pytest.raises((CheckpointError, StaleError), match="bilens names --overwrite"):
            read_kept(text_model, load_sae_folder(place))


def test_what_is_written_is_read(tmp_path):
    texts = ['said, "', "", "\ud800", "a → b", "é"]
    write_names(tmp_path / NAMES_FILE, FeatureNames.of(texts, [3]), "two texts", "abc")
    read = read_names(tmp_path / NAMES_FILE, 5)
    assert [read.texts[i] for i in range(5)] == texts
    assert read.dense == {3}
    assert '  "3": "a → b",\n' in (tmp_path / NAMES_FILE).read_text(encoding="utf-8", errors="surrogatepass")


def test_a_folder_without_saes(text_model, tmp_path):
    with (
        pytest.warns(UserWarning, match="holds no SAE folder"),
        pytest.raises(ArgumentError, match="holds no SAEs on this machine"),
    ):
        keep_features(text_model, tmp_path, ["a"])


# --- ts-tiny ----------------------------------------------------------------------------------------------------------


def test_the_bundled_names_are_what_the_code_makes():
    """One SAE, over all stories. A near tie may turn with the rounding of another machine: hence not all of them."""
    model, sae = load_model("ts-tiny"), load_sae("ts-tiny", "mlp-in", 0)
    kept = read_kept(model, sae)
    forget_origin(sae)  # as if nothing were beside it
    found = feature_activations(model, [sae], example_texts(model))[0]
    assert kept.n_tokens == int(found.mask.sum())
    assert sum(a == b for a, b in zip(kept.labels(), found.labels(), strict=True)) >= 0.99 * sae.cfg.d_sae
    torch.testing.assert_close(kept.density(), found.density(), atol=2e-4, rtol=1e-2)
    torch.testing.assert_close(kept.typical_activations(), found.typical_activations(), atol=1e-2, rtol=1e-2)
    strongest = (one.summary(7).examples[0] for one in (kept, found))
    assert next(strongest).tokens == next(strongest).tokens


def test_every_bundled_sae_has_names_and_examples_and_they_are_small():
    model = load_model("ts-tiny")
    size = 0
    for entry in list_saes("ts-tiny"):
        folder = PRETRAINED / "ts-tiny" / "saes" / entry.folder
        sae = load_sae_folder(folder)
        kept = read_kept(model, sae)
        assert kept.d_sae == sae.cfg.d_sae
        assert all(kept.summary(feature).examples for feature in kept.density().nonzero().flatten().tolist()[::50])
        size += sum((folder / file).stat().st_size for file in (NAMES_FILE, EXAMPLES_FILE))
    assert size < 2e6
