"""Reports: which features are picked, what is refused, and the command line around them."""

import pytest
import torch
from typer.testing import CliRunner

import bilens.pages.report
from bilens import cli
from bilens.decompose import Decomposer
from bilens.decompose.feature import feature_circuit, rank_features
from bilens.errors import (
    ArgumentError,
    ContextLengthError,
    EmptyTextError,
    NotBilinearError,
    OutOfRangeError,
    SAEMismatchError,
)
from bilens.model.files import DEFAULT_MODEL
from bilens.pages.circuit import circuit_page, emphasised
from bilens.pages.report import (
    explained,
    interesting_circuits,
    label_layers,
    report,
    trace,
    well_explained,
)
from bilens.sae import example_texts
from tests.conftest import make_model
from tests.random_saes import make_sae

LAYER = 1
TEXT = "Once upon a time, there was a little dog. He did not want to share his toy."


@pytest.fixture(scope="module")
def labelled():
    decomposer = Decomposer.from_pretrained(DEFAULT_MODEL, LAYER)
    return label_layers([decomposer], example_texts(decomposer.model)[:60])[LAYER]


def test_names_are_index_and_tokens(labelled):
    names = labelled.decomposer.output_names
    assert len(names) == labelled.outputs.d_sae
    assert all(name.split(" ")[0] == str(i) for i, name in enumerate(names))


def test_ranking_is_sorted_and_respects_its_filters(labelled):
    ranked = rank_features(labelled.decomposer, labelled.outputs, min_active=10)
    assert ranked.score.diff().le(1e-6).all()
    counts = labelled.outputs.offsets.diff()
    assert (counts[ranked.features] >= 10).all()
    assert ((ranked.cross_share >= 0) & (ranked.cross_share <= 1)).all()
    few = ranked.features[:5].tolist()
    assert set(rank_features(labelled.decomposer, labelled.outputs, among=few, min_active=10).features.tolist()) == set(
        few
    )


def test_ranking_correlation_is_pearsons(labelled):
    """The best feature's correlation, recomputed from circuits of the same texts with torch.corrcoef."""
    decomposer, outputs = labelled.decomposer, labelled.outputs
    ranked = rank_features(decomposer, outputs, min_active=10)
    feature = int(ranked.features[0])
    dense = outputs.dense(feature)
    fit = decomposer.firing(example_texts(decomposer.model)[:60])
    circuits = decomposer.eigen(feature, k=2, metric="firing", order="size", fit=fit)
    predicted, actual = [], []
    for row in range(len(outputs.tokens)):
        _, cache = decomposer.model.run_with_cache(outputs.tokens[row : row + 1])
        x = cache[decomposer.normalized_hook][0]
        on = dense[row] != 0
        predicted.append(circuits.activations(x[on]).sum(-1))
        actual.append(dense[row][on])
    expected = torch.corrcoef(torch.stack([torch.cat(predicted), torch.cat(actual)]))[0, 1]
    # Circuits of all features at once are found to about 1e-3 of each; the rest is float32 rounding.
    assert ranked.correlation[0].item() == pytest.approx(expected.item(), abs=1e-3)
    assert ranked.plot().data[0].y[0] == ranked.correlation[0]


def test_circuit_shows_what_the_attribution_says(labelled):
    decomposer = labelled.decomposer
    feature = well_explained(labelled, TEXT, 1)[0]
    circuit = feature_circuit(decomposer, TEXT, feature, inputs=labelled.inputs, outputs=labelled.outputs)
    a = circuit.attribution
    expected = decomposer.interaction(feature, basis="features")[circuit.shown][:, circuit.shown]
    torch.testing.assert_close(circuit.interactions, expected, atol=1e-5, rtol=1e-4)
    assert set(circuit.shown) <= set(a.inputs.tolist())
    assert circuit.output_activations[a.position] > 0
    assert set(circuit.shown) == circuit.input_summaries.keys()
    assert circuit.plot().data
    assert "completeness error" in str(circuit)
    assert "<iframe" in circuit._repr_html_()


def test_a_page_needs_no_script_and_says_what_adds_up(labelled):
    """Every bar is of the parts, every direction says where it reads, and the size is that of the markup."""
    feature = well_explained(labelled, TEXT, 1)[0]
    circuit = explained(labelled, TEXT, feature, note="a <note>")
    page = circuit_page([circuit], how="chosen so").to_html()
    assert "<script" not in page
    assert len(page) < 400_000
    told = circuit.explanation
    for words in ("chosen so", "a &lt;note&gt;", emphasised(told.sentence), "Where this direction reads the text"):
        assert words in page
    assert f"pre-activation {told.actual:.5f}" in page
    assert "more than rounding" not in page
    assert told.reads.shape == (2, told.position + 1)
    # Everything that a position adds, and biases, of which this model has none, is the projection.
    torch.testing.assert_close(told.reads.sum(1), told.projections[:2], rtol=1e-4, atol=1e-4)


def test_chosen_features_fire_strongly_and_take_few_eigencircuits(labelled):
    chosen = well_explained(labelled, TEXT, 3)
    assert len(set(chosen)) == 3
    density, values = labelled.outputs.density(), labelled.outputs.values
    places = set()
    for feature in chosen:
        told = explained(labelled, TEXT, feature).explanation
        assert density[feature] <= 0.1
        assert told.active
        assert told.shares[:2].sum() > 0.5
        assert told.actual > 0.3 * values[labelled.outputs.entries(feature)].max()
        places.add(told.position)
    assert len(places) == 3


def test_interesting_circuits_of_a_text_fire_on_it(labelled):
    for circuit in interesting_circuits(labelled, TEXT, n=2):
        assert circuit.attribution.active


@pytest.mark.parametrize(
    ("text", "features", "error"),
    [
        ("", [0], EmptyTextError),
        ("the dog " * 400, [0], ContextLengthError),
        (TEXT, [10**6], OutOfRangeError),
        (TEXT, [-1], OutOfRangeError),
    ],
)
def test_bad_requests_are_refused(labelled, text, features, error):
    with pytest.raises(error):
        interesting_circuits(labelled, text, features)


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_report_command_writes_the_page(tmp_path):
    out = tmp_path / "report.html"
    done = run("report", "--text", TEXT, "--n", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.exists()
    assert "completeness error" in done.output


def test_trace_command_writes_the_graph(tmp_path):
    out, examples = tmp_path / "trace.html", tmp_path / "examples.txt"
    examples.write_text("Once upon a time there was a sad dog.\n\nThe dog did not know where to go.\n")
    common = ["--text", "The dog did not know", "--max-nodes", "30", "--examples", str(examples), "--out", str(out)]
    done = run("trace", *common, "--target", "where", "--minus", "how")
    assert done.exit_code == 0, done.output
    assert "circuit of logit 'where' - 'how' at position 5" in done.output
    page = out.read_text(encoding="utf-8")
    assert len(page) < 10e6
    assert "Checked by intervention</a>" in page
    done = run("trace", *common, "--feature", "1-mlp-out/343@3", "--no-check")
    assert done.exit_code == 0, done.output
    assert "circuit of 1-mlp-out/343 at position 3" in done.output
    assert "Checked by intervention</a>" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"feature": "343"}, ArgumentError, r"'343' names no feature: expected its SAE, index and perhaps position"),
        ({"feature": "1-mlp-out/343", "target": "where"}, ArgumentError, "either a feature or a token's logit"),
        ({"feature": "1-mlp-out/9999"}, OutOfRangeError, "feature 9999 is outside the SAE's 2048"),
        ({"minus": "how"}, ArgumentError, "minus is 'how' without a target"),
        ({"position": 90}, OutOfRangeError, "position 90 is outside the text's"),
        ({"target": "where", "position": 90}, OutOfRangeError, "position 90 is outside the text's"),
    ],
)
def test_a_trace_of_nothing_is_refused(request_, error, message, tmp_path):
    with pytest.raises(error, match=message):
        trace(text=TEXT, out=tmp_path / "trace.html", **request_)
    assert not (tmp_path / "trace.html").exists()


@pytest.mark.parametrize("write", [bilens.pages.report.gallery, trace])
def test_where_to_write_is_asked_before_the_work(write, tmp_path):
    (tmp_path / "file").touch()
    said = []
    arguments = {"text": TEXT} if write is trace else {}
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "page.html", "its folder cannot be made")):
        with pytest.raises(ArgumentError, match=message):
            write(out=out, say=said.append, **arguments)
    assert not said


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["bilens", "train-lm", "texts.txt", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("Error: Invalid value for 'out': ")
    assert "cannot be a folder to write into" in said


def test_misspelt_model_is_one_line_with_the_nearest_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bilens", "report", "ts-tny"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "Did you mean 'ts-tiny'?" in capsys.readouterr().err


def test_a_gated_model_is_told_that_it_is_not_bilinear(tmp_path):
    """No SAEs would help, so it is not told that none are known."""
    gated = make_model(gate="relu")
    for page in (report, lambda *args, **kwargs: trace(*args, **kwargs, out=tmp_path / "page.html")):
        with pytest.raises(NotBilinearError, match="is gated by 'relu'"):
            page(gated, text="a b")
    for n in (0, -1, True, 10.0):
        with pytest.raises(ArgumentError, match="n is"):
            report(gated, n=n)
    assert not list(tmp_path.iterdir())


def test_a_report_with_ones_own_saes_is_one_call(text_model, texts, tmp_path):
    """SAEs, or folders that SAELens wrote, in any order and among others; the layer is the one that they are on."""
    hooks = {"in": "blocks.1.ln2.hook_normalized", "out": "blocks.1.hook_mlp_out", "other": "blocks.0.hook_mlp_out"}
    saes = [make_sae("topk", hook, d_sae=48, seed=seed) for seed, hook in enumerate(hooks.values())]
    for name, sae in zip(hooks, saes, strict=True):
        sae.save_model(tmp_path / name)
    text = "the little fox found a red kite"
    shown = []
    for given in (saes[::-1], [tmp_path / name for name in hooks], [saes[1], str(tmp_path / "in")], tmp_path):
        found = report(
            text_model, saes=given, layer=None if given is not tmp_path else 1, text=text, n=2, examples=texts
        )
        shown.append([(c.attribution.layer, c.attribution.feature, str(c)) for c in found.circuits])
        assert str(found) == "\n\n".join(map(str, found.circuits))
    assert all(one == shown[0] for one in shown)
    assert found.save(tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert "<iframe" in found._repr_html_()


@pytest.mark.parametrize(
    ("places", "layer", "message"),
    [
        (["blocks.1.hook_mlp_out"], 1, r"no SAE on the input of layer 1's MLP \(blocks.1.ln2.hook_normalized\)"),
        (["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"], 0, "no SAE on the input of layer 0's MLP"),
        (["blocks.0.ln2.hook_normalized"] * 2 + ["blocks.0.hook_mlp_out"], 0, "2 SAEs on the input of layer 0's MLP"),
        ([None], None, r"saes\[0\] does not say which hook it reads: set its cfg.metadata.hook_name"),
        ([], None, "the SAEs are on nothing"),
    ],
)
def test_saes_that_are_not_on_the_layer(text_model, places, layer, message):
    saes = [make_sae("topk", place, d_sae=48) for place in places]
    with pytest.raises(SAEMismatchError, match=message):
        report(text_model, layer=layer, saes=saes, text="the little fox")


def test_saes_of_another_kind(text_model):
    with pytest.raises(ArgumentError, match=r"saes\[0\] is 5, expected an SAE or the folder of one"):
        report(text_model, saes=[5], text="the little fox")
    with pytest.raises(ArgumentError, match="saes is 5, expected a source of SAEs, or a list"):
        report(text_model, saes=5, text="the little fox")
