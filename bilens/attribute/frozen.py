"""One forward pass, frozen: everything that the exact attributions of a text are made of.

1. the model runs once; its residual stream, module outputs, attention patterns and norm scales are kept
2. each SAE given is read at its hook: which features are active at every position, what each writes, what is missed
   (the error), with the SAE's own run-time normalisation frozen token by token
3. `split`, `attribute_tokens` and `Circuit.trace` do algebra on these, by default in float64: the activations are the
   model's own, so what is left of completeness is the rounding of its forward pass

With these held, an input feature's pre-activation is linear in the residual stream, which is a sum: the token's
embedding, every `(layer, head, source position)` through OV, every MLP below (quadratic in its own input), and biases.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checks import check_budget, check_finite, how_many_fit
from bilens._core.fingerprint import Snapshot, model_fingerprint, sae_fingerprint
from bilens.errors import ArgumentError, MissingSAEError, SAEMismatchError, nearest
from bilens.layer.bilinear import BilinearLayer, check_model
from bilens.model.attached import check_attention_scale
from bilens.model.hook_points import HOOK_TO_POINT, hook_of, point_of
from bilens.model.tokenization import token_strings
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.store import FeatureStore
from bilens.sae.passes import SAEPass
from bilens.sae.view import SAEView

INPUT_POINTS = ("mlp-in", "resid-mid")  # where an SAE may read an MLP's input; the first that is there is taken
Names: TypeAlias = Mapping[str, Sequence[str]] | FeatureStore
TEXT_MEMORY = 2**32  # bytes that a call on one text works in, if it is not told otherwise
SAEs: TypeAlias = SAE[Any] | Iterable[SAE[Any]] | Mapping[str, SAE[Any]]


@dataclass(frozen=True)
class FrozenPass:
    """A forward pass with attention patterns and norm scales frozen; made by `freeze`.

    Attributes:
        model: the model that ran.
        tokens, strings: the tokens of the text and their strings, `[BOS]` first.
        cache: every activation point that the algebra or a target reads, without the batch axis, in the model's dtype.
        logits: the logits at every position.
        saes: the frozen SAEs, by hook.
        pattern, scale1, scale2, scale_final: attention patterns and norm divisors.
        embed, attn_out, mlp_out: the parts that are added to the residual stream.
        W_V, b_V, W_O: the weights of every layer, `W_O` with the residual scale.
        made_from: model and SAEs as they were.
        memory: bytes that a call on this pass may work in.
    """

    model: HookedBilinearTransformer = field(repr=False)
    tokens: Int[Tensor, "p"]
    strings: list[str] = field(repr=False)
    cache: dict[str, Tensor] = field(repr=False)
    logits: Float[Tensor, "p d_vocab"] = field(repr=False)
    saes: dict[str, SAEPass] = field(repr=False)
    pattern: Float[Tensor, "layer head p p"] = field(repr=False)
    scale1: Float[Tensor, "layer p"] = field(repr=False)
    scale2: Float[Tensor, "layer p"] = field(repr=False)
    scale_final: Float[Tensor, "p"] = field(repr=False)
    embed: Float[Tensor, "p d_model"] = field(repr=False)
    attn_out: Float[Tensor, "layer p d_model"] = field(repr=False)
    mlp_out: Float[Tensor, "layer p d_model"] = field(repr=False)
    W_V: Float[Tensor, "layer head d_model d_head"] = field(repr=False)
    b_V: Float[Tensor, "layer head d_head"] = field(repr=False)
    W_O: Float[Tensor, "layer head d_head d_model"] = field(repr=False)
    made_from: Snapshot = field(repr=False)
    memory: int = field(default=TEXT_MEMORY, repr=False)

    def check_current(self) -> None:
        """Refuse to go on where the model or an SAE was changed since: activations and weights would not fit together.

        Raises:
            StaleError: it was.
        """
        self.made_from.check("this frozen pass", "call freeze again.")

    @property
    def n_layers(self) -> int:
        return len(self.mlp_out)

    @property
    def n_positions(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of the algebra."""
        return self.embed.dtype

    @cached_property
    def _layers(self) -> dict[int, BilinearLayer]:
        return {}

    @cached_property
    def _pre_activations(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the model (`model`) and of the SAEs by hook: what is made from this pass is known by them."""
        saes = {hook: sae_fingerprint(sae.view.original) for hook, sae in self.saes.items()}
        return {"model": model_fingerprint(self.model)} | saes

    def at_once(self, call: str, each: float, at_most: float) -> int:
        """How many rows a call works on together, of so many bytes each: as many as fit the memory, and no more than
        take `at_most` bytes.

        Raises:
            ArgumentError: there is not enough memory for one.
        """
        fit = how_many_fit(call, each, self.memory, "freeze a shorter text")
        return max(1, min(fit, int(at_most // max(each, 1))))

    def pre_activations(self, sae: SAEPass) -> Float[Tensor, "p d_sae"]:
        """What an SAE's activation function is given at every position, by its own forward pass."""
        if sae.hook not in self._pre_activations:
            self._pre_activations[sae.hook] = sae.view.pre_activations(self.cache[sae.hook])
        return self._pre_activations[sae.hook]

    def mlp(self, layer: int) -> BilinearLayer:
        """The weights of one MLP.

        Raises:
            NotBilinearError: a gated or one-branch model.
        """
        if layer not in self._layers:
            self._layers[layer] = BilinearLayer.of(self.model, layer).to(self.dtype)
        return self._layers[layer]

    def values(self, layer: int) -> Float[Tensor, "head p d_head"]:
        """`hook_v`, from the residual stream and the frozen scale."""
        resid = self.cache[f"blocks.{layer}.hook_resid_pre"].to(self.dtype) / self.scale1[layer][:, None]
        return torch.einsum("pd,hde->hpe", resid, self.W_V[layer]) + self.b_V[layer][:, None]

    def attention_bias(self, layer: int) -> Float[Tensor, "p d_model"]:
        """What the biases of values add to the residual stream: wherever a head looks it moves the same, as often as
        its pattern sums to."""
        moved = torch.einsum("he,hed->hd", self.b_V[layer], self.W_O[layer])
        return torch.einsum("hpk,hd->pd", self.pattern[layer], moved)

    def output_sae(self, layer: int) -> SAEPass | None:
        """The SAE on the MLP's output."""
        return self.saes.get(hook_of("mlp-out", layer))

    def input_sae(self, layer: int) -> SAEPass | None:
        """The SAE on the MLP's input: on `ln2.hook_normalized`, else on `hook_resid_mid`."""
        return next((self.saes[hook] for p in INPUT_POINTS if (hook := hook_of(p, layer)) in self.saes), None)

    def input_sources(
        self, layer: int, positions: int | Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "*n source d_model"], Float[Tensor, "source"]]:
        """What the MLP's input is made of at some positions (or the active part of it at one): each active feature's
        write, `b_dec`, the error, and the constant that MLP biases multiply; and each one's last homogeneous coordinate
        (1 for the last)."""
        sae = self.input_sae(layer)
        if sae is None:
            raise MissingSAEError(f"layer {layer} has no SAE on its MLP's input (ln2.hook_normalized).")
        return sae.sources(self.scale2[layer], positions)

    def sae(self, hook: str) -> SAEPass:
        """The SAE on a hook, by the hook's name or the SAE's (`2-mlp-in`, or a folder name such as `2-mlp-in-x8-k32`).

        Raises:
            MissingSAEError: no SAE there.
        """
        found = self.saes.get(_hook_by_label(hook))
        if found is None:
            labels = [sae.label for sae in self.saes.values()]
            raise MissingSAEError(
                f"no SAE on {hook!r} was given; there are {', '.join(labels) or 'none'}." + nearest(hook, labels)
            )
        return found

    def __str__(self) -> str:
        names = ", ".join(sae.label for sae in self.saes.values()) or "no SAEs"
        return f"FrozenPass of {self.n_positions} tokens, {self.n_layers} layers; {names}"


@torch.inference_mode(False)  # what is kept may be asked for gradients later
@torch.no_grad()
def freeze(
    model: HookedBilinearTransformer,
    text_or_tokens: str | Sequence[int] | Int[Tensor, "p"] | Int[Tensor, "1 p"],
    saes: SAEs = (),
    *,
    dtype: torch.dtype = torch.float64,
    memory: int = TEXT_MEMORY,
) -> FrozenPass:
    """Run the model once and keep what exact attribution needs.

    Args:
        model: any; what looks inside MLPs needs a bilinear one.
        text_or_tokens: one text (`[BOS]` is prepended), or its tokens as they are.
        saes: SAEs on any of the published points, at most one per hook; a mapping from hook names if their metadata
            name no hook.
        dtype: the type of the algebra. Activations are the model's own in any case; float32 halves memory and time.
        memory: bytes to work in, and at most as many for the result; 4 GiB by default. What is then asked of this pass
            (`split`, `attribute_tokens`, a circuit and its checks) keeps to it as well.

    Raises:
        AlteredModelError: SAEs are attached to the model, or there are hooks on it or on an SAE.
        ArgumentError: several texts, two SAEs on one hook, a dtype below float32, or less memory than the pass takes.
        CheckpointError: weights or activations that are not finite.
        EmptyTextError, ContextLengthError: the text does not fit.
        SAEMismatchError: an SAE of another width or without a published point.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype is {dtype}, expected torch.float32 or torch.float64.")
    check_model(model)
    given: Any = text_or_tokens
    if not isinstance(given, str | Tensor):
        if not isinstance(given, Sequence | np.ndarray) or isinstance(given, bytes):
            raise ArgumentError(f"text_or_tokens is {given!r:.80}, expected a text or its tokens.")
        are_texts = any(isinstance(each, str) for each in given)
        given = list(given) if are_texts else torch.tensor(given, dtype=torch.long)
    tokens = model.input_to_tokens(given).clone()
    if len(tokens) != 1:
        raise ArgumentError(f"{len(tokens)} texts were given; attribution takes one at a time.")
    views = check_saes(model, saes)
    require_bare(model, *(view.sae for view in views.values()))
    n_bytes = _bytes_of_pass(model, tokens.shape[1], max((view.d_sae for view in views.values()), default=0), dtype)
    check_budget(
        f"freeze of {tokens.shape[1]:,} tokens", n_bytes, memory, "give a shorter text, or dtype=torch.float32"
    )

    blocks = [f"blocks.{layer}" for layer in range(model.cfg.n_layers)]
    parts = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    parts += ["ln1.hook_scale", "ln2.hook_scale", "ln1.hook_normalized", "ln2.hook_normalized", "attn.hook_pattern"]
    names = [f"{block}.{part}" for block in blocks for part in parts]
    names += ["hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"]
    logits, cache = model.run_with_cache(tokens, names_filter=names, return_cache_object=False)
    cache = {name: value[0] for name, value in cache.items()}
    for name, value in (*cache.items(), ("the logits", logits)):
        check_finite(name, value, "this forward pass")

    def stack(part: str) -> Tensor:
        return torch.stack([cache[f"{block}.{part}"] for block in blocks]).to(dtype)

    return FrozenPass(
        model=model,
        tokens=tokens[0],
        strings=token_strings(model.tokenizer, tokens[0]),
        cache=cache,
        logits=logits[0],
        saes={hook: SAEPass.of(view, hook, cache[hook], dtype) for hook, view in views.items()},
        pattern=stack("attn.hook_pattern"),
        scale1=stack("ln1.hook_scale")[..., 0],
        scale2=stack("ln2.hook_scale")[..., 0],
        scale_final=cache["ln_final.hook_scale"][:, 0].to(dtype),
        embed=cache["hook_embed"].to(dtype),
        attn_out=stack("hook_attn_out"),
        mlp_out=stack("hook_mlp_out"),
        W_V=model.W_V.detach().to(dtype, copy=True),
        b_V=model.b_V.detach().to(dtype, copy=True),
        W_O=model.W_O.detach().to(dtype, copy=True),
        made_from=Snapshot(model, {f"the SAE on {hook}": view.original for hook, view in views.items()}),
        memory=memory,
    )


def _bytes_of_pass(model: HookedBilinearTransformer, n: int, d_sae: int, dtype: torch.dtype) -> int:
    """What the activations kept, the copies of attention's weights and one SAE's activations take."""
    cfg, wide = model.cfg, dtype.itemsize
    narrow = torch.promote_types(cfg.dtype, torch.float16).itemsize
    cached = cfg.n_layers * n * (7 * cfg.d_model + cfg.n_heads * n) + n * (2 * cfg.d_model + 3 * cfg.d_vocab)
    copied = cfg.n_layers * n * (2 * cfg.d_model + cfg.n_heads * n) + cfg.n_layers * 2 * cfg.d_model**2
    return narrow * cached + wide * copied + 24 * n * d_sae


def check_saes(model: HookedBilinearTransformer, saes: SAEs) -> dict[str, SAEView]:
    """The SAEs by hook, in float32 at least.

    Raises:
        ArgumentError, SAEMismatchError: the same cases as for `freeze`.
    """
    if isinstance(saes, SAE):
        saes = [saes]
    if not isinstance(saes, Iterable) or isinstance(saes, str | bytes):
        raise ArgumentError(f"saes is {saes!r:.80}, expected SAEs in a list, or by their hooks.")
    named = saes.items() if isinstance(saes, Mapping) else [(None, sae) for sae in saes]
    views: dict[str, SAEView] = {}
    for key, sae in named:
        if not isinstance(sae, SAE):
            raise ArgumentError(f"saes holds {sae!r:.80}, expected SAEs (bilens.load_sae gives one).")
        hook = sae.cfg.metadata.hook_name or key
        if hook is None:
            raise SAEMismatchError("an SAE's metadata names no hook; give saes={'blocks.0.hook_mlp_out': sae}.")
        point, layer = point_of(hook)
        if layer >= model.cfg.n_layers:
            raise SAEMismatchError(f"an SAE is on {hook!r}; the model has {model.cfg.n_layers} layers.")
        if hook in views:
            raise ArgumentError(f"two SAEs are on {hook!r} ({layer}-{point}); give one per hook.")
        views[hook] = view = SAEView.of(sae)
        if view.d_in != model.cfg.d_model:
            raise SAEMismatchError(
                f"the SAE on {hook!r} has d_in {view.d_in}, the model's d_model is {model.cfg.d_model}: "
                "is it an SAE of another model?"
            )
        check_attention_scale(model, sae, f"the SAE on {hook!r}")
    order = list(HOOK_TO_POINT.values())
    return dict(sorted(views.items(), key=lambda item: (point_of(item[0])[1], order.index(point_of(item[0])[0]))))


def _hook_by_label(name: str) -> str:
    """The hook that a label (`2-mlp-in`, or a folder name that begins with it) stands for; other names as they are."""
    match = re.match(rf"(\d+)-({'|'.join(sorted(HOOK_TO_POINT.values(), key=len, reverse=True))})(-|$)", name)
    return hook_of(match[2], int(match[1])) if match else name


def names_by_hook(
    model: HookedBilinearTransformer, saes: Mapping[str, SAEPass], names: Names | None
) -> dict[str, Sequence[str]]:
    """Labels of features by hook, given by hook or by the SAE's name.

    Args:
        model, saes: the pass' model, and its SAEs by hook.
        names: one label per feature of each SAE named; or a feature store, which may know other SAEs as well.

    Raises:
        ArgumentError: names of an SAE that is not there, or not one per feature.
        StaleError: a store of another model or other SAEs.
    """
    if isinstance(names, FeatureStore):
        here = [name for name in names.names if _hook_by_label(name) in saes]
        names.check_made_from(model, {name: saes[_hook_by_label(name)].view.original for name in here})
        names = {name: names.labels(name) for name in here}
    if not isinstance(names, Mapping | None):
        raise ArgumentError(f"names is {names!r}, expected labels by hook or SAE name, or a FeatureStore.")
    found = {}
    for name, labels in (names or {}).items():
        if not isinstance(name, str):
            raise ArgumentError(f"names are given for {name!r}, expected a hook or an SAE's name such as '2-mlp-in'.")
        hook = _hook_by_label(name)
        if hook not in saes:
            raise ArgumentError(f"names are given for {name!r}, which has no SAE here." + nearest(name, saes))
        if len(labels) != saes[hook].view.d_sae:
            raise ArgumentError(f"{len(labels)} names for the {saes[hook].view.d_sae} features of {name!r}.")
        found[hook] = labels
    return found
