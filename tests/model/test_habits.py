"""What a TransformerLens user types first works on our model, and gives what an independent computation gives.

Every result is held against tensors put together here from cached activations and weights, on random models and on the
reference checkpoint of the published kind. Tolerances: float32 sums of at most a few hundred terms, in two orders,
differ by about 1e-6 of their size; 1e-4 leaves room for activations of size ten and for division by norms.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import FactoredMatrix, SVDInterpreter, patching
from transformer_lens import utilities as utils
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.head_detector import detect_head

from bilens.draw.circuits import AttentionPatterns
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import SHARED, make_model

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), **CLOSE)


@pytest.fixture(params=["random", "gated", "reference"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> HookedBilinearTransformer:
    """A random model with biases, one with a gate and no normalisation, and the reference checkpoint."""
    if request.param == "random":
        return make_model(tokenizer=tokenizer, bias=True, n_layer=3)
    if request.param == "gated":
        return make_model(tokenizer=tokenizer, gate="silu", normalization=False)
    if not (SHARED / "reference" / "ts-micro").exists():
        pytest.skip("the reference checkpoint is not here")
    return HookedBilinearTransformer.from_pretrained(SHARED / "reference" / "ts-micro", device="cpu")


@pytest.fixture
def tokens(model: HookedBilinearTransformer) -> Tensor:
    """Two sequences of six tokens."""
    return torch.randint(3, model.cfg.d_vocab, (2, 6), generator=torch.Generator().manual_seed(1))


# --- activation patching ----------------------------------------------------------------------------------------------


def rotate(x: Tensor) -> Tensor:
    """Rotary positions by complex multiplication: the two halves of a head are real and imaginary parts."""
    first, second = x.double().chunk(2, dim=-1)
    half = first.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] / 10_000.0 ** (torch.arange(half) / half)[None].double()
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor) -> Tensor:
    """The pattern from unrotated queries and keys."""
    scores = torch.einsum("bqhe,bkhe->bhqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -torch.inf).softmax(-1)


def finish(model: HookedBilinearTransformer, cache: Any, layer: int, z: Tensor) -> Tensor:
    """The logits of the cached run, had the heads of one layer computed `z`."""
    mid = cache["resid_pre", layer] + torch.einsum("bphe,hem->bpm", z, model.W_O[layer])
    return from_mid(model, layer, mid)


def from_mid(model: HookedBilinearTransformer, layer: int, mid: Tensor) -> Tensor:
    block = model.blocks[layer]
    return model(mid + block.mlp(block.ln2(mid)), start_at_layer=layer + 1)


class Patching:
    """A clean and a corrupted run, a metric, and the metric after an independent patch."""

    def __init__(self, model: HookedBilinearTransformer, tokens: Tensor):
        self.model, self.clean = model, tokens
        self.corrupted = tokens.clone()
        self.corrupted[:, 2] = (tokens[:, 2] + 7) % model.cfg.d_vocab
        self.clean_cache = model.run_with_cache(tokens)[1]
        self.cache = model.run_with_cache(self.corrupted)[1]
        self.layers, self.heads, self.n_pos = range(model.cfg.n_layers), range(model.cfg.n_heads), tokens.shape[1]

    @staticmethod
    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 5] - logits[:, -1, 9]).mean()

    def mixed(self, name: str, layer: int, index: tuple) -> Tensor:
        """The corrupted activation with the clean one at `index`."""
        x = self.cache[name, layer].clone()
        x[index] = self.clean_cache[name, layer][index]
        return x

    def head(self, kind: str, layer: int, index: tuple) -> Tensor:
        """The metric with q, k, v, z or the pattern of one layer patched at `index`."""
        mixed = self.mixed(kind, layer, index)
        q, k, v = (mixed if kind == name else self.cache[name, layer] for name in "qkv")
        pattern = mixed if kind == "pattern" else attend(q, k)
        z = mixed if kind == "z" else torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        return self.metric(finish(self.model, self.cache, layer, z))

    def stream(self, name: str, layer: int, position: int) -> Tensor:
        """The metric with the stream, or what attention or the MLP adds to it, patched at one position."""
        x = self.mixed(name, layer, (slice(None), position))
        if name == "resid_pre":
            return self.metric(self.model(x, start_at_layer=layer))
        if name == "attn_out":
            return self.metric(from_mid(self.model, layer, self.cache["resid_pre", layer] + x))
        return self.metric(self.model(self.cache["resid_mid", layer] + x, start_at_layer=layer + 1))


@pytest.fixture
@torch.no_grad()
def runs(model: HookedBilinearTransformer, tokens: Tensor) -> Patching:
    return Patching(model, tokens)


@torch.no_grad()
def test_patching_the_residual_stream(runs: Patching) -> None:
    """get_act_patch_resid_pre and get_act_patch_block_every are runs from the mixed stream."""
    args = (runs.model, runs.corrupted, runs.clean_cache, runs.metric)
    expected = torch.stack(
        [
            torch.stack([torch.stack([runs.stream(kind, at, p) for p in range(runs.n_pos)]) for at in runs.layers])
            for kind in ("resid_pre", "attn_out", "mlp_out")
        ]
    )
    close(patching.get_act_patch_block_every(*args), expected)
    found = patching.get_act_patch_resid_pre(*args)
    close(found, expected[0])
    close(found[0, 2], runs.metric(runs.model(runs.clean)))  # the one token that differs, put back
    close(found[0, 0], runs.metric(runs.model(runs.corrupted)))
    assert (found - found[0, 0]).abs().max() > 1e-2, "no patch does anything"


@torch.no_grad()
def test_patching_heads_at_every_position(runs: Patching) -> None:
    """Output, query, key, value and pattern of every head against attention put together by hand."""
    found = patching.get_act_patch_attn_head_all_pos_every(runs.model, runs.corrupted, runs.clean_cache, runs.metric)
    everywhere = slice(None)
    for i, kind in enumerate(("z", "q", "k", "v", "pattern")):
        for layer in runs.layers:
            for head in runs.heads:
                index = (everywhere, head) if kind == "pattern" else (everywhere, everywhere, head)
                close(found[i, layer, head], runs.head(kind, layer, index))


@torch.no_grad()
def test_patching_heads_by_position(runs: Patching) -> None:
    """The same at single positions, for head outputs and for the rows of the pattern."""
    args = (runs.model, runs.corrupted, runs.clean_cache, runs.metric)
    out = patching.get_act_patch_attn_head_out_by_pos(*args)
    rows = patching.get_act_patch_attn_head_pattern_by_pos(*args)
    everywhere = slice(None)
    for layer in runs.layers:
        for position in range(runs.n_pos):
            for head in runs.heads:
                close(out[layer, position, head], runs.head("z", layer, (everywhere, position, head)))
                close(rows[layer, head, position], runs.head("pattern", layer, (everywhere, head, position)))


# --- reading the residual stream --------------------------------------------------------------------------------------


def normalized(model: HookedBilinearTransformer, x: Tensor) -> Tensor:
    """torch's own RMS norm, where the model has one."""
    return x if model.cfg.normalization_type is None else F.rms_norm(x, x.shape[-1:], eps=1e-8)


@torch.no_grad()
def test_logit_lens(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """Each layer's stream, normalised as the last one is, times W_U; the last row is the model's own logits."""
    logits, cache = model.run_with_cache(tokens)
    stack, labels = cache.accumulated_resid(apply_ln=True, return_labels=True)
    lens = stack @ model.W_U
    for i in range(model.cfg.n_layers):
        close(lens[i], normalized(model, cache["resid_pre", i]) @ model.W_U)
    close(lens[-1], logits)
    assert labels[0] == "0_pre"
    assert labels[-1] == "final_post"


@torch.no_grad()
def test_direct_logit_attribution(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """Contributions of embedding, heads and MLPs to a logit difference, at the last position, add up to it."""
    logits, cache = model.run_with_cache(tokens)
    right, wrong = torch.tensor([5, 6]), torch.tensor([9, 8])
    parts, labels = cache.get_full_resid_decomposition(pos_slice=-1, expand_neurons=False, return_labels=True)
    found = cache.logit_attrs(parts, tokens=right, incorrect_tokens=wrong, pos_slice=-1, has_batch_dim=True)
    direction = model.W_U.T[right] - model.W_U.T[wrong]
    scale = cache["ln_final.hook_scale"][:, -1]
    for i, label in enumerate(labels):
        if label == "embed":
            written = cache["hook_embed"][:, -1]
        elif label == "bias":
            written = torch.zeros(2, model.cfg.d_model)  # the biases are in each MLP's output
        elif label.endswith("mlp_out"):
            written = cache["mlp_out", int(label.split("_")[0])][:, -1]
        else:
            layer, head = map(int, label[1:].split("H"))
            written = cache["z", layer][:, -1, head] @ model.W_O[layer, head]
        close(found[i], (written / scale * direction).sum(-1))
    last = logits[torch.arange(2), -1]
    close(found.sum(0), last.gather(1, right[:, None])[:, 0] - last.gather(1, wrong[:, None])[:, 0])


@torch.no_grad()
def test_components_and_heads_of_the_stream(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """decompose_resid, stack_head_results, stack_neuron_results and stack_activation hold what they say."""
    _, cache = model.run_with_cache(tokens)
    close(cache.decompose_resid(mode="all").sum(0), cache["resid_post", -1])
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    expected = torch.stack(
        [
            cache["z", layer][:, -1, head] @ model.W_O[layer, head]
            for layer in range(model.cfg.n_layers)
            for head in range(model.cfg.n_heads)
        ]
    )
    close(heads, expected)
    neurons = cache.stack_neuron_results(layer=1, pos_slice=-1)
    close(neurons, (cache["post", 0][:, -1, :, None] * model.W_out[0]).transpose(0, 1))
    assert torch.equal(cache.stack_activation("pattern")[1], cache["blocks.1.attn.hook_pattern"])
    assert torch.equal(cache["pattern", 0], cache[utils.get_act_name("pattern", 0)])


@torch.no_grad()
def test_apply_ln_to_stack(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """Each component is divided by the scale of the norm that reads the stream: the final one, or a layer's."""
    _, cache = model.run_with_cache(tokens)
    stack = cache.decompose_resid(mode="all")
    close(cache.apply_ln_to_stack(stack), stack / cache["ln_final.hook_scale"])
    below = cache.decompose_resid(layer=1, mode="all")
    close(cache.apply_ln_to_stack(below, layer=1), below / cache["scale", 1, "ln1"])
    close(cache.apply_ln_to_stack(below, layer=1, mlp_input=True), below / cache["scale", 1, "ln2"])


@torch.no_grad()
def test_tokens_to_residual_directions(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """The columns of W_U, by token and by word; the normalised stream dotted with one is the logit."""
    logits, cache = model.run_with_cache(tokens)
    directions = model.tokens_to_residual_directions(tokens)
    close((cache["ln_final.hook_normalized"] * directions).sum(-1), logits.gather(-1, tokens[..., None])[..., 0])
    assert torch.equal(model.tokens_to_residual_directions("red"), model.W_U[:, model.to_single_token("red")])


# --- ablation and hooks -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_head_ablation(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """Zeroing a head's z, or its value, is a model whose W_O lacks that head; the model itself stays as it was."""
    before = model(tokens)

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 1] = 0
        return z

    cut = make_copy(model)
    d_head = model.cfg.d_head
    cut.blocks[1].attn.o.weight[:, d_head : 2 * d_head] = 0
    expected = cut(tokens)
    for name in (utils.get_act_name("z", 1), utils.get_act_name("v", 1)):
        close(model.run_with_hooks(tokens, fwd_hooks=[(name, ablate)]), expected)
    loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(utils.get_act_name("z", 1), ablate)])
    close(loss, utils.lm_cross_entropy_loss(expected, tokens))
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(model(tokens), before)


def make_copy(model: HookedBilinearTransformer) -> HookedBilinearTransformer:
    copy = HookedBilinearTransformer(model.cfg, model.tokenizer, init_weights=False)
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def test_hooks_stay_until_reset(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """add_hook acts on every run until reset_hooks; a function of the name picks many points."""
    before = model(tokens)
    seen: list[str] = []
    model.add_hook(lambda name: name.endswith("hook_pattern"), lambda x, hook: seen.append(hook.name))
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: torch.zeros_like(x))
    assert not torch.equal(model(tokens), before)
    assert seen == [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    model.reset_hooks()
    assert torch.equal(model(tokens), before)


def test_gradients_through_the_cache(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """A backward hook sees the gradient of a metric; to first order it predicts a patch (attribution patching)."""
    kept: dict[str, Tensor] = {}
    name = "blocks.1.hook_resid_pre"
    with model.hooks(
        fwd_hooks=[(name, lambda x, hook: kept.__setitem__("stream", x.detach()))],
        bwd_hooks=[(name, lambda g, hook: kept.__setitem__("gradient", g.detach()))],
    ):
        Patching.metric(model(tokens)).backward()
    stream = kept["stream"].clone().requires_grad_()
    Patching.metric(model(stream, start_at_layer=1)).backward()
    close(kept["gradient"], stream.grad)  # type: ignore[arg-type]


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_factored_circuits_and_their_svd(model: HookedBilinearTransformer) -> None:
    """QK and OV as FactoredMatrix: product, SVD, eigenvalues and norm of the product matrix, and full circuits."""
    for factored, left, right in (
        (model.OV, model.W_V, model.W_O),
        (model.QK, model.W_Q, model.W_K.transpose(-2, -1)),
    ):
        product = left @ right
        close(factored.AB, product)
        U, S, Vh = factored.svd()
        close(U @ S.diag_embed() @ (Vh if Vh.shape[-2] == S.shape[-1] else Vh.transpose(-2, -1)), product)
        d_head = model.cfg.d_head
        close(S, torch.linalg.svdvals(product)[..., :d_head])
        close(factored.norm(), product.norm(dim=(-2, -1)))
    one = model.blocks[0].attn.OV[1]
    close(one.eigenvalues.real.sum(), one.AB.trace())
    full = model.W_E @ model.OV[0, 1] @ model.W_U
    assert isinstance(full, FactoredMatrix)
    close(full.AB, model.W_E @ model.W_V[0, 1] @ model.W_O[0, 1] @ model.W_U)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["OV", "w_in", "w_out"])
def test_svd_interpreter(model: HookedBilinearTransformer, kind: str) -> None:
    """Singular directions of a head's OV and of the MLP, through the unembedding, up to the sign an SVD leaves open."""
    found = SVDInterpreter(model).get_singular_vectors(kind, layer_index=1, num_vectors=3, head_index=0)
    assert found.shape == (model.cfg.d_vocab, 1, 3)
    matrix = {
        "OV": model.W_V[1, 0] @ model.W_O[1, 0],
        "w_in": model.W_in[1].T,
        "w_out": model.W_out[1],
    }[kind]
    directions = torch.linalg.svd(matrix).Vh[:3]
    close(found[:, 0].abs().T, (directions @ model.W_U).abs())


def test_named_weights(model: HookedBilinearTransformer) -> None:
    """tl_parameters has every weight, under the names and with the tensors that attribute access gives."""
    weights = model.tl_parameters()
    assert sum(weight.numel() for weight in weights.values()) == sum(w.numel() for w in model.parameters())
    for name, weight in weights.items():
        owner: Any = model
        for part in name.split("."):
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        assert torch.equal(owner, weight)
    assert not hasattr(model, "W_pos")


# --- looking ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_pattern_view(model: HookedBilinearTransformer) -> None:
    """The view of a cached pattern holds the softmax of the scores, one number per head, query and key."""
    text = "the old gardener lost three stones"
    _, cache = model.run_with_cache(text, remove_batch_dim=True)
    strings = model.to_str_tokens(text)
    pattern = cache["pattern", 0]
    close(pattern[None], attend(cache["q", 0][None], cache["k", 0][None]))
    props = AttentionPatterns(strings, pattern).props()
    close(torch.tensor(props["attention"]).view(pattern.shape), pattern.cpu())


@torch.no_grad()
def test_prompt_and_detector(model: HookedBilinearTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    """utils.test_prompt prints the answer's rank; detect_head scores heads by their cached patterns."""
    utils.test_prompt("the fox found a red", "kite", model, prepend_space_to_answer=False)
    logits = model("the fox found a red")[0, -1]
    answer = model.to_tokens("kite", prepend_bos=False)[0, 0]
    rank = int((logits > logits[answer]).sum())
    assert f"Rank: {rank}" in capsys.readouterr().out

    text = "the red fox and the red fox"
    found = detect_head(model, text, "previous_token_head")
    _, cache = model.run_with_cache(text, remove_batch_dim=True)
    expected = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
    close(found, expected.diagonal(-1, -2, -1).sum(-1) / expected.sum((-2, -1)))


# --- running ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """The model's loss, TransformerLens' lm_cross_entropy_loss and plain cross-entropy agree, per token too."""
    logits = model(tokens)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    close(model(tokens, return_type="loss", loss_per_token=True), plain)
    close(utils.lm_cross_entropy_loss(logits, tokens, per_token=True), plain)
    close(utils.lm_cross_entropy_loss(logits, tokens), plain.mean())
    close(model(tokens, return_type="loss"), plain.mean())


@torch.no_grad()
def test_a_cache_of_keys_and_values(model: HookedBilinearTransformer, tokens: Tensor) -> None:
    """Token by token with past_kv_cache gives the logits of the whole."""
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    steps = [model(tokens[:, i : i + 1], past_kv_cache=cache) for i in range(tokens.shape[1])]
    close(torch.cat(steps, 1), model(tokens))


def test_generate_as_in_the_demo(model: HookedBilinearTransformer) -> None:
    """generate(verbose=..., temperature=..., top_p=...) gives text that starts with the prompt."""
    text = model.generate("the old gardener", max_new_tokens=5, temperature=0.7, top_p=0.9, verbose=False, seed=0)
    assert text.startswith("the old gardener")
    greedy = model.generate("the old gardener", max_new_tokens=5, do_sample=False)
    assert model.generate("the old gardener", max_new_tokens=5, top_p=1e-6, seed=3) == greedy


def test_tokens_and_devices(model: HookedBilinearTransformer) -> None:
    """Tokens to strings and back, positions, the device, and the shape of everything in cfg."""
    text = "the fox and the red kite"
    tokens = model.to_tokens(text)
    assert model.to_string(tokens[0, 1:]) == text
    assert model.to_str_tokens(tokens)[2] == "fox"
    assert model.get_token_position("red", text) == 5
    assert model.to_single_str_token(model.to_single_token("kite")) == "kite"
    assert model.to("cpu").cfg.device == "cpu"
    assert str(utils.get_device()).split(":")[0] in ("cpu", "cuda", "mps")
    cfg = model.cfg
    assert model.W_E.shape == (cfg.d_vocab, cfg.d_model)
    assert model.blocks[0].attn.W_Q.shape == (cfg.n_heads, cfg.d_model, cfg.d_head)
    close(model.ln_final(model.W_E[None])[0], normalized(model, model.W_E))
