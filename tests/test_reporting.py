"""Reports: which features are picked, what is refused, and the command line around them."""

import pytest
import torch
from typer.testing import CliRunner

import bilens
from bilens import cli
from bilens.decompose.circuit import feature_circuit, rank_features
from bilens.errors import ContextLengthError, EmptyTextError, ModelNotFoundError, OutOfRangeError
from bilens.loading import DEFAULT_MODEL
from bilens.reporting import active_features, example_texts, interesting_circuits, label_layers, sae_source

LAYER = 1
TEXT = "Once upon a time, there was a little dog. He did not want to share his toy."


@pytest.fixture(scope="module")
def labelled():
    model = bilens.load_model()
    saes = {LAYER: tuple(bilens.load_sae(DEFAULT_MODEL, point, LAYER) for point in ("mlp-in", "mlp-out"))}
    return label_layers(model, saes, example_texts(model)[:60])[LAYER]


def test_names_are_index_and_tokens(labelled):
    names = labelled.decomposer.output_names
    assert len(names) == labelled.outputs.d_sae
    assert all(name.split(" ")[0] == str(i) for i, name in enumerate(names))


def test_active_features_fire_on_the_text_strongest_first(labelled):
    decomposer = labelled.decomposer
    tokens = decomposer.model.to_tokens(TEXT)
    _, cache = decomposer.model.run_with_cache(tokens)
    strongest = decomposer.output_sae.encode(cache[decomposer.out_hook])[0, 1:].amax(0)
    active = active_features(decomposer, TEXT)
    assert set(active) == set((strongest > 0).nonzero().flatten().tolist())
    assert strongest[active].diff().le(0).all()


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
    """The best feature's correlation, recomputed from the model's activations with torch.corrcoef."""
    decomposer, outputs = labelled.decomposer, labelled.outputs
    ranked = rank_features(decomposer, outputs, min_active=10)
    feature = int(ranked.features[0])
    dense = outputs.dense(feature)
    predicted, actual = [], []
    for row in range(len(outputs.tokens)):
        _, cache = decomposer.model.run_with_cache(outputs.tokens[row : row + 1])
        x = cache[decomposer.normalized_hook][0]
        on = dense[row] != 0
        predicted.append(decomposer.eigen(feature, k=2).activations(x[on]).sum(-1))
        actual.append(dense[row][on])
    expected = torch.corrcoef(torch.stack([torch.cat(predicted), torch.cat(actual)]))[0, 1]
    # Single rows and batches of rows differ in float32 rounding only.
    assert ranked.correlation[0].item() == pytest.approx(expected.item(), abs=1e-3)


def test_circuit_shows_what_the_attribution_says(labelled):
    decomposer = labelled.decomposer
    feature = active_features(decomposer, TEXT)[0]
    circuit = feature_circuit(decomposer, TEXT, feature, inputs=labelled.inputs, outputs=labelled.outputs)
    a = circuit.attribution
    expected = decomposer.interaction(feature, basis="features")[circuit.shown][:, circuit.shown]
    torch.testing.assert_close(circuit.interactions, expected, atol=1e-5, rtol=1e-4)
    assert set(circuit.shown) <= set(a.inputs.tolist())
    assert circuit.output_activations[a.position] > 0
    assert set(circuit.shown) <= circuit.input_summaries.keys()
    assert "completeness error" in str(circuit)
    assert "<iframe" in circuit._repr_html_()


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


def test_models_without_saes_say_so():
    with pytest.raises(ModelNotFoundError, match="say where they are"):
        sae_source("my-own")


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_report_command_writes_the_page(tmp_path):
    out = tmp_path / "report.html"
    done = run("report", "--text", TEXT, "--n", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.exists()
    assert "completeness error" in done.output


def test_misspelt_model_is_one_line_with_the_nearest_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bilens", "report", "ts-tny"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "Did you mean 'ts-tiny'?" in capsys.readouterr().err
