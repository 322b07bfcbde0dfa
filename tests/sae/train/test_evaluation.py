"""Scores of SAEs: against the same numbers text by text, and of an SAE that is perfect and one that is silent."""

import math

import pytest
import torch
from datasets import Dataset
from sae_lens import SkipTranscoder, SkipTranscoderConfig, StandardSAE, StandardSAEConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from torch.testing import assert_close

from bilens.errors import ArgumentError, EmptyTextError, HookNameError, SAEMismatchError, TokenizationError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.train.evaluation import SAEScore, evaluate_saes
from tests.random_saes import make_sae

MLP_IN, MLP_OUT = "blocks.0.ln2.hook_normalized", "blocks.1.hook_mlp_out"
LONG = "the little fox found a red kite near the river! " * 5  # more than the context of 32


@pytest.fixture
def sample(texts: list[str]) -> list[str]:
    """Texts of different lengths, so that there is padding, and one cut at the context."""
    return [*texts[::40], LONG]


def identity(hook: str, d: int = 16) -> StandardSAE:
    """`relu(x) - relu(-x) = x`: exact, with d active features of 2 d (one of the two)."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d))
    sae.cfg.metadata.hook_name = hook
    eye = torch.eye(d)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae


def zero(hook: str) -> StandardSAE:
    """Silent, reconstructing zeros."""
    sae = identity(hook)
    with torch.no_grad():
        sae.b_enc.fill_(-1000.0)
    return sae


def score(model: HookedBilinearTransformer, sae: StandardSAE, texts: list[str], **kwargs: int) -> SAEScore:
    return evaluate_saes(model, {"it": sae}, texts, **kwargs).scores[0]


@torch.no_grad()
def directly(model: HookedBilinearTransformer, sae: StandardSAE, texts: list[str]) -> dict[str, float]:
    """The definitions of `SAEScore`, one unpadded text after the other, in float64 where sums are long."""
    hook, losses = sae.cfg.metadata.hook_name, {"clean": 0.0, "spliced": 0.0, "ablated": 0.0}
    activations, reconstructions, n_active, fires, predicted = [], [], [], torch.zeros(sae.cfg.d_sae), 0

    def swap(value: Tensor) -> list:
        return [(hook, lambda activation, hook: value)]

    for text in texts:
        tokens = model.to_tokens(text, truncate=True)
        logits, cache = model.run_with_cache(tokens, names_filter=hook)
        runs = {
            "clean": logits,
            "spliced": model.run_with_hooks(tokens, fwd_hooks=swap(sae(cache[hook]))),
            "ablated": model.run_with_hooks(tokens, fwd_hooks=swap(torch.zeros_like(cache[hook]))),
        }
        for name, of_run in runs.items():
            logprobs = of_run[0].log_softmax(-1)
            losses[name] -= sum(logprobs[p - 1, tokens[0, p]].item() for p in range(1, tokens.shape[1]))
        predicted += tokens.shape[1] - 1
        activations.append(cache[hook][0, 1:].double())
        reconstructions.append(sae(cache[hook])[0, 1:].double())
        active = sae.encode(cache[hook])[0, 1:] != 0
        n_active += active.sum(-1).tolist()
        fires += active.sum(0)
    x, x_hat = torch.cat(activations), torch.cat(reconstructions)
    assert len(x) == predicted
    residual, total = (x - x_hat).pow(2).sum(), (x - x.mean(0)).pow(2).sum()
    loss = {name: value / predicted for name, value in losses.items()}
    return {
        "l0": sum(n_active) / len(n_active),
        "explained_variance": (1 - residual / total).item(),
        "loss_recovered": (loss["ablated"] - loss["spliced"]) / (loss["ablated"] - loss["clean"]),
        "dead": (fires == 0).sum().item(),
        "dense": (fires / predicted > 0.1).float().mean().item(),
        "loss_clean": loss["clean"],
        "loss_spliced": loss["spliced"],
        "loss_ablated": loss["ablated"],
        "n_tokens": predicted,
    }


@pytest.mark.parametrize("hook", [MLP_IN, MLP_OUT])
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "scope"])
def test_every_number_is_its_definition(text_model, sample, hook, kind):
    sae = make_sae(kind, hook)
    scores = evaluate_saes(text_model, {"it": sae}, sample, batch_size=5)
    found, expected = scores.scores[0], directly(text_model, sae, sample)
    assert scores.n_tokens == expected.pop("n_tokens")
    assert (found.name, found.hook_name, found.d_sae) == ("it", hook, 40)
    for name, value in expected.items():
        # Losses are means of a few hundred float32 numbers of order five; the ratio divides by a difference of two.
        assert getattr(found, name) == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_batches_and_company_change_nothing(text_model, sample):
    saes = {
        "a": make_sae("topk", MLP_IN),
        "b": make_sae("topk", MLP_OUT, seed=1),
        "c": make_sae("standard", MLP_IN, seed=2),
    }
    together = evaluate_saes(text_model, saes, sample)
    assert [one.name for one in together.scores] == ["a", "b", "c"]
    for found in together.scores:
        alone = score(text_model, saes[found.name], sample, batch_size=1)
        for field in (
            "l0",
            "explained_variance",
            "loss_recovered",
            "dead",
            "loss_clean",
            "loss_spliced",
            "loss_ablated",
        ):
            assert getattr(found, field) == pytest.approx(getattr(alone, field), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("hook", [MLP_IN, MLP_OUT])
def test_a_perfect_sae(text_model, sample, hook):
    found = score(text_model, identity(hook), sample)
    assert found.loss_recovered == pytest.approx(1.0, abs=1e-6)
    assert found.explained_variance == pytest.approx(1.0, abs=1e-9)
    assert found.loss_spliced == pytest.approx(found.loss_clean, abs=1e-6)
    assert found.l0 == pytest.approx(16, abs=1e-6)  # no entry of a random activation is exactly zero
    assert found.dead == 0
    assert found.dense == 1.0  # the sign of a random activation is positive more than a tenth of the time, and negative


def test_a_silent_sae(text_model, sample):
    found = score(text_model, zero(MLP_OUT), sample)
    assert found.loss_spliced == pytest.approx(found.loss_ablated, abs=1e-6)
    assert found.loss_recovered == pytest.approx(0.0, abs=1e-5)
    assert found.explained_variance <= 0  # zeros predict worse than the mean
    assert (found.l0, found.dead, found.dense) == (0, 32, 0.0)


def test_the_clean_loss_is_the_models(text_model, sample):
    losses = [
        (text_model(text_model.to_tokens(t, truncate=True), return_type="loss", loss_per_token=True)) for t in sample
    ]
    expected = torch.cat([loss.flatten() for loss in losses]).mean().item()
    assert score(text_model, zero(MLP_OUT), sample).loss_clean == pytest.approx(expected, abs=1e-5)


def test_bos_counts_for_the_splice_alone(text_model, sample):
    """An SAE that is wrong at `[BOS]` only: fidelity does not see it, the losses do (it is spliced there)."""
    plain = identity(MLP_IN)
    _, cache = text_model.run_with_cache(text_model.to_tokens(sample[0]), names_filter=MLP_IN)
    bos = cache[MLP_IN][0, 0]

    class Forgetful(StandardSAE):
        def decode(self, acts: Tensor) -> Tensor:
            out = super().decode(acts)
            return out.masked_fill(((out - bos).abs().amax(-1, keepdim=True) < 1e-4), 0.0)

    forgetful = Forgetful(plain.cfg)
    forgetful.load_state_dict(plain.state_dict())
    found = score(text_model, forgetful, sample)
    assert found.explained_variance == pytest.approx(1.0, abs=1e-9)
    assert found.loss_spliced != pytest.approx(found.loss_clean, abs=1e-4)


@pytest.mark.parametrize("hook", [MLP_IN, MLP_OUT])
def test_half_precision_saes(text_model, sample, hook):
    """As they are on disk: the reconstruction is spliced into a float32 model."""
    sae = make_sae("topk", hook)
    full = score(text_model, sae, sample)
    half = score(text_model, sae.to(dtype=torch.float16), sample)
    # float16 keeps three digits; a feature at the edge of the top k may change places.
    assert half.explained_variance == pytest.approx(full.explained_variance, abs=1e-2)
    assert half.loss_spliced == pytest.approx(full.loss_spliced, abs=1e-2)


def test_the_model_is_left_as_it_was(text_model, sample):
    before = text_model(sample[0])
    evaluate_saes(text_model, {"a": make_sae("topk", MLP_IN)}, sample)
    assert torch.equal(text_model(sample[0]), before)
    assert not any(point.fwd_hooks for point in text_model.hook_dict.values())


def test_table_and_text(text_model, sample):
    scores = evaluate_saes(text_model, {"a": make_sae("topk", MLP_IN), "b": make_sae("topk", MLP_OUT)}, sample)
    frame = scores.to_frame()
    assert frame.name.tolist() == ["a", "b"]
    assert set(frame.columns) == set(SAEScore.__dataclass_fields__)
    assert str(scores).endswith(f"on {scores.n_tokens} tokens")


def test_an_sae_that_does_not_know_its_hook(text_model, sample):
    with pytest.raises(SAEMismatchError, match=r"'mine' has no metadata.hook_name"):
        evaluate_saes(text_model, {"mine": make_sae("topk")}, sample)


def test_an_sae_on_a_hook_that_the_model_has_not(text_model, sample):
    with pytest.raises(HookNameError, match=r"no hook 'blocks.7.hook_mlp_out'"):
        evaluate_saes(text_model, {"mine": make_sae("topk", "blocks.7.hook_mlp_out")}, sample)


def test_an_sae_of_another_width(text_model, sample):
    with pytest.raises(SAEMismatchError, match=r"the SAE 'mine' has d_in 8; 'blocks.1.hook_mlp_out' is 16 wide"):
        evaluate_saes(text_model, {"mine": make_sae("topk", MLP_OUT, d_in=8)}, sample)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], EmptyTextError, "the list of texts is empty"),
        (["Mira", ""], EmptyTextError, r"text 1 of 2, '', has nothing in it"),
        ([" \n\t", "Mira"], EmptyTextError, r"text 0 of 2, ' \\n\\t', has nothing in it"),
        ("the little fox", ArgumentError, r"texts is the one text 'the little fox'; expected a list"),
        (["the", 3], ArgumentError, "text 1 of 2 is 3; expected a string"),
    ],
)
def test_texts_with_nothing_in_them(text_model, bad, error, message):
    with pytest.raises(error, match=message):
        evaluate_saes(text_model, {"mine": make_sae("topk", MLP_OUT)}, bad)


def test_what_else_is_refused(text_model, sample):
    with pytest.raises(ArgumentError, match=r"saes is a list; expected SAEs by name"):
        evaluate_saes(text_model, [make_sae("topk", MLP_OUT)], sample)
    text_model.tokenizer = None
    with pytest.raises(TokenizationError, match="has no tokenizer"):
        evaluate_saes(text_model, {"mine": make_sae("topk", MLP_OUT)}, sample)


def test_one_token(text_model):
    """Its variance is zero, so that the share explained does not exist."""
    found = score(text_model, make_sae("topk", MLP_OUT), ["fox"])
    assert math.isnan(found.explained_variance)
    assert math.isfinite(found.loss_recovered)


# --- transcoders and other places -------------------------------------------------------------------------------------


def the_mlp(model: HookedBilinearTransformer, layer: int, d: int = 16, **skip: Tensor) -> SkipTranscoder:
    """A silent transcoder from `ln2.hook_normalized` to `hook_mlp_out`: a constant and a linear map."""
    cfg = SkipTranscoderConfig(d_in=d, d_out=d, d_sae=8, apply_b_dec_to_input=False)
    cfg.metadata.hook_name = f"blocks.{layer}.ln2.hook_normalized"
    cfg.metadata.hook_name_out = f"blocks.{layer}.hook_mlp_out"
    it = SkipTranscoder(cfg)
    with torch.no_grad():
        it.b_enc.fill_(-1000.0)
        it.W_skip.copy_(skip.get("W_skip", torch.zeros(d, d)))
    return it


@torch.no_grad()
def test_a_transcoder_is_scored_where_it_writes(text_model, sample):
    """Least squares over the texts is the best linear map from one hook to the other: its R^2 is the score."""
    pairs = [
        text_model.run_with_cache(
            text_model.to_tokens(t, truncate=True), names_filter=["blocks.1.ln2.hook_normalized", MLP_OUT]
        )[1]
        for t in sample
    ]
    x, y = (
        torch.cat([cache[hook][0, 1:] for cache in pairs]).double()
        for hook in ("blocks.1.ln2.hook_normalized", MLP_OUT)
    )
    W = torch.linalg.lstsq(x, y).solution
    it = the_mlp(text_model, 1, W_skip=W.T.float())
    found = score(text_model, it, sample)
    expected = 1 - (y - x @ W).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert 0 < expected < 1
    assert found.explained_variance == pytest.approx(expected.item(), abs=1e-5)
    assert (found.hook_name, found.l0, found.dead) == ("blocks.1.ln2.hook_normalized", 0, 8)
    # Spliced, its loss is that of the model with the transcoder attached; ablated is with zeros where it writes.
    losses = [
        text_model.run_with_saes(tokens, saes=it, return_type="loss", loss_per_token=True).flatten()
        for tokens in (text_model.to_tokens(t, truncate=True) for t in sample)
    ]
    assert found.loss_spliced == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert found.loss_ablated == pytest.approx(score(text_model, zero(MLP_OUT), sample).loss_ablated, abs=1e-6)
    silent = score(text_model, the_mlp(text_model, 1), sample)
    assert silent.loss_recovered == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_z", "hook_embed", "ln_final.hook_normalized"])
def test_a_perfect_sae_anywhere(text_model, sample, hook):
    """Where activations have heads, and outside the blocks."""
    found = score(text_model, identity(hook), sample)
    assert found.explained_variance == pytest.approx(1.0, abs=1e-9)
    assert found.loss_spliced == pytest.approx(found.loss_clean, abs=1e-6)


# --- SAELens' own evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "scope"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saelens_evals_agree(text_model, texts, kind):
    """SAELens' `run_evals` runs on the model, and where the two measure the same thing they get the same number.

    They differ in one thing, which both of SAELens' settings show: without special tokens, SAELens leaves `[BOS]` out
    of everything, of the splice and the losses too; `evaluate_saes` leaves it out of sparsity and variance alone.
    """
    full = [" ".join([text] * 8) for text in texts[::60]]  # more than a context each: no padding
    sae = make_sae(kind, MLP_OUT)
    sae.cfg.metadata.prepend_bos = True
    tokens = text_model.to_tokens(full, truncate=True)
    assert tokens.shape == (8, 32)
    assert (tokens[:, 1:] != text_model.tokenizer.pad_token_id).all()
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    found = {}
    for excluded in (True, False):
        store = ActivationsStore.from_sae(
            text_model, sae, data, context_size=32, streaming=False, store_batch_size_prompts=4
        )
        found[excluded], _ = run_evals(
            sae,
            store,
            text_model,
            ActivationScaler(),
            get_eval_everything_config(4, 2, 2),
            exclude_special_tokens=excluded,
        )
    ours = score(text_model, sae, full)
    fidelity, losses = found[True], found[False]["model_performance_preservation"]
    # Means of 248 float32 numbers, summed in another order.
    assert fidelity["sparsity"]["l0"] == pytest.approx(ours.l0, rel=1e-5)
    assert fidelity["reconstruction_quality"]["explained_variance"] == pytest.approx(ours.explained_variance, rel=1e-4)
    assert losses["ce_loss_without_sae"] == pytest.approx(ours.loss_clean, rel=1e-5)
    assert losses["ce_loss_with_sae"] == pytest.approx(ours.loss_spliced, rel=1e-5)
    assert losses["ce_loss_with_ablation"] == pytest.approx(ours.loss_ablated, rel=1e-5)
    assert losses["ce_loss_score"] == pytest.approx(ours.loss_recovered, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_forms_and_sums_losses_in_float32_at_least(
    text_model: HookedBilinearTransformer, sample: list[str], dtype: torch.dtype
) -> None:
    """Losses that the dtype has no room for add up, and those it cannot tell apart do not all come out as one."""
    sae = make_sae(hook=MLP_OUT)
    exact = score(text_model, sae, sample)
    halved = score(text_model.to(dtype), sae, sample)
    # What is left is the forward pass in half precision, 2^-8 of logits of about one.
    for name in ("loss_clean", "loss_spliced", "loss_ablated"):
        assert getattr(halved, name) == pytest.approx(getattr(exact, name), abs=0.02)
    assert math.isfinite(halved.loss_recovered)
    tokens = text_model.to_tokens(sample[0])
    per_token = text_model(tokens, return_type="loss", loss_per_token=True)
    assert per_token.dtype == text_model(tokens, return_type="loss").dtype == torch.float32
    assert_close(per_token.mean(), text_model.loss_fn(text_model(tokens).float(), tokens), rtol=1e-6, atol=0)


def test_losses_beyond_the_range_of_half_precision_add_up(
    text_model: HookedBilinearTransformer, texts: list[str]
) -> None:
    """Their sum is past float16's 65,504."""
    text_model.unembed.head.weight.data *= 200
    exact = score(text_model, zero(MLP_OUT), texts[:64])
    assert exact.loss_ablated * 64 * 7 > 65504
    halved = score(text_model.to(torch.float16), zero(MLP_OUT), texts[:64])
    assert halved.loss_ablated == pytest.approx(exact.loss_ablated, rel=0.02)
    assert math.isfinite(halved.loss_recovered)


def test_batches_have_a_size(text_model: HookedBilinearTransformer, texts: list[str]) -> None:
    for size in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match=f"batch_size is {size}, expected a positive whole number"):
            evaluate_saes(text_model, {"it": zero(MLP_OUT)}, texts[:2], batch_size=size)
