"""What is kept and removed, against passes of the model whose hooks say it once more."""

import pandas as pd
import pytest
import torch

from bilens.attribute import Faithfulness, Target, check_circuit, freeze, trace_circuit
from bilens.attribute.faithfulness import MODES
from tests.attribute.conftest import TOKENS, model_of, saes_of


@pytest.fixture(scope="module")
def frozen():
    return freeze(model_of(True, True), TOKENS, saes_of(kind="topk", k=5, apply_b_dec_to_input=False))


@pytest.mark.parametrize(
    ("part", "word", "number"),
    [(0.93, "faithful", "93 %"), (1.3, "weak", "130 %"), (0.6, "partial", "60 %"), (0.1, "weak", "10 %"),
     (float("nan"), "unclear", "")],
)  # fmt: skip
def test_the_verdict_is_a_word_and_its_number(part, word, number):
    rows = [{"attention": mode, "kept": "circuit", "nodes": 7, "value": 1.0, "recovered": part} for mode in MODES]
    found = Faithfulness("t", pd.DataFrame(rows)).verdict
    assert found[:2] == (word, number)
    assert "7 features and errors" in found[2] or word == "unclear"


@pytest.mark.parametrize("errors", ["circuit", "all"])
@pytest.mark.parametrize("target", [Target.logit(7), Target.direction(torch.ones(16), "blocks.2.hook_resid_post", 5)])
def test_kept_features_read_what_reaches_them(frozen, errors, target):
    """Frozen: nothing kept leaves every `b_dec` (and every error, if those stay); a feature kept is its pre-activation
    of what is left."""
    circuit = trace_circuit(frozen, target, max_nodes=30, node_threshold=1.0)
    members = circuit.nodes[circuit.nodes.kind.isin(["feature", "error"])].sort_values("influence", ascending=False)
    place = int((members.kind == "feature").to_numpy().argmax())
    assert place < 10
    found = check_circuit(frozen, circuit, target, errors=errors, counts=[place, place + 1]).frame
    found = found[found.attention == "frozen"].set_index("kept").value
    for kept, name in ((0, "nothing"), (place, f"top {place}"), (place + 1, f"top {place + 1}")):
        assert found[name] == pytest.approx(_by_hand(frozen, members.iloc[:kept], target, errors), abs=1e-3)
    assert abs(found["nothing"] - found["everything"]) > 0.1


def _by_hand(frozen, kept, target, errors):
    def splice(value, hook):
        sae, rows = frozen.saes[hook.name], kept[kept.hook == hook.name]
        out = sae.b_dec + (sae.error if errors == "all" else 0.0)
        for row in rows.itertuples():
            if row.kind == "error":
                out[row.position] += 0.0 if errors == "all" else sae.error[row.position]
                continue
            given, own = sae.view.sae, value[0, row.position]
            amount = own @ given.W_enc[:, row.feature] + given.b_enc[row.feature]
            out[row.position] += amount * given.W_dec[row.feature]
        return out[None].to(value)

    def same(value, hook):
        return frozen.cache[hook.name].expand_as(value)

    names = [name for name in frozen.cache if name.endswith(("hook_pattern", "hook_scale"))]
    hooks = [(name, same) for name in names] + [(name, splice) for name in frozen.saes]
    model = frozen.model
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(frozen.tokens[None], names_filter="blocks.2.hook_resid_post")
    if target.hook == "logits":
        return logits[0, -1, target.of].item()
    return (cache[target.hook][0, target.position] @ target.of).item()
