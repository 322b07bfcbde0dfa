"""Special tokens in texts: every pass over texts puts the same ones around them, whatever is written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bilens.attribute.faithfulness import feature_means
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.corpus import batches
from bilens.sae.features.examples import feature_activations
from bilens.sae.texts import text_starts
from bilens.sae.train.evaluation import evaluate_saes
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import validate
from tests.random_saes import make_sae

PLAIN = ["the little fox found a red kite", "Mira lost three stones near the river", "a tired owl"]
WRITTEN = [f"[BOS] {PLAIN[0]}", f"[BOS][BOS]{PLAIN[1]} [EOS]", "a [BOS] tired owl[EOS]"]


def measured(model: HookedBilinearTransformer, texts: list[str]) -> dict[str, Any]:
    """What the passes over texts find."""
    sae = make_sae("topk", "blocks.1.hook_mlp_out")
    found = feature_activations(model, [sae], texts)[0]
    scores = evaluate_saes(model, {"sae": sae}, texts)
    return {
        "tokens": found.tokens,
        "mask": found.mask,
        "values": found.values,
        "scores": scores,
        "validation": validate(model, TokenizedTexts.from_texts(texts, model.tokenizer, bool(model.n_bos))),
        "store": [
            (batch.tokens, batch.mask, torch.from_numpy(batch.places.position))
            for batch in batches(texts, 0, model.tokenizer, model.cfg.n_ctx, 64, bool(model.n_bos))
        ],
    }


def the_same(one: Any, other: Any) -> None:
    """To the last bit: it is the same computation on the same tokens."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        for key in one if isinstance(one, dict) else range(len(one)):
            the_same(one[key], other[key])
    else:
        assert one == other


def test_special_tokens_that_are_written_out_change_nothing(text_model: HookedBilinearTransformer) -> None:
    """Activations, scores, losses per token and per character, and a store's contexts are those of the plain texts."""
    assert torch.equal(text_starts(text_model, WRITTEN)[0], text_starts(text_model, PLAIN)[0])
    the_same(measured(text_model, WRITTEN), measured(text_model, PLAIN))


@pytest.mark.parametrize("without", ["the model's default", "a tokenizer that has none"])
def test_without_bos(text_model: HookedBilinearTransformer, without: str) -> None:
    """No [BOS] is prepended, every token counts, and positions are those of `to_tokens`."""
    if without == "the model's default":
        text_model.cfg.default_prepend_bos = False
    else:
        text_model.tokenizer = copy.deepcopy(text_model.tokenizer)
        text_model.tokenizer.bos_token = None
    found = measured(text_model, PLAIN)
    for i, text in enumerate(PLAIN):
        tokens = text_model.to_tokens(text)[0]
        assert found["tokens"][i, : len(tokens)].tolist() == tokens.tolist()
        assert found["mask"][i].tolist() == [1] * len(tokens) + [0] * (found["mask"].shape[1] - len(tokens))
        (batch,) = batches([text], 0, text_model.tokenizer, text_model.cfg.n_ctx, 64, bool(text_model.n_bos))
        assert batch.tokens.tolist() == [tokens.tolist()]
        assert batch.places.position.tolist() == list(range(len(tokens)))
    losses = torch.cat([text_model(text, return_type="loss", loss_per_token=True)[0] for text in PLAIN])
    assert found["validation"].nats_per_token == pytest.approx(losses.mean().item(), rel=1e-5)
    hook = "blocks.1.hook_mlp_out"
    sae = make_sae("topk", hook)
    acts = torch.cat([sae.encode(text_model.run_with_cache(text)[1][hook])[0] for text in PLAIN])
    torch.testing.assert_close(feature_means(text_model, [sae], PLAIN)[hook], acts.mean(0), atol=1e-5, rtol=1e-4)
