"""What an attribution explains: a feature, a logit, a difference of logits, or any direction.

All of them are linear reads of the frozen residual stream at one *level* and position: level `2l` is the stream
entering layer `l`, `2l + 1` the one between its attention and its MLP, `2 n_layers` the last. Norm scales and SAE
normalisations are frozen factors of the read; what does not depend on the stream is its constant.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from bilens._core.checks import check_index, check_sizes
from bilens.attribute.frozen import FrozenPass
from bilens.errors import ArgumentError, HookNameError, SAEMismatchError, nearest

READABLE = (
    "hook_embed",
    "blocks.{}.hook_resid_pre",
    "blocks.{}.ln1.hook_normalized",
    "blocks.{}.hook_attn_out",
    "blocks.{}.hook_resid_mid",
    "blocks.{}.ln2.hook_normalized",
    "blocks.{}.hook_mlp_out",
    "blocks.{}.hook_resid_post",
    "ln_final.hook_normalized",
)
LOGITS = "logits"
STREAM, ATTN, MLP = 0, 1, 2  # what a read sees: the whole stream, or one module's output


@dataclass(frozen=True)
class Target:
    """What to explain; made by `Target.feature`, `Target.logit` or `Target.direction`.

    Attributes:
        hook: an activation point, or `logits`.
        position: negative counts from the end.
        of: the feature, the token and the one it is compared with, or the direction.
    """

    hook: str
    position: int
    of: int | str | tuple[int | str, int | str] | Tensor
    name: str = ""

    @classmethod
    def feature(cls, sae: str | SAE[Any], feature: int, position: int = -1, name: str = "") -> "Target":
        """An SAE feature's pre-activation.

        Args:
            sae: itself, its hook, or its name: `2-mlp-in`.
            feature: active there or not.
            position: `[BOS]` counted.
            name: the name to show.

        Raises:
            ArgumentError: an SAE that does not say which hook it is on.
        """
        hook = sae if isinstance(sae, str) else sae.cfg.metadata.hook_name
        if hook is None:
            raise ArgumentError("the SAE does not say which hook it is on: its cfg.metadata.hook_name is None.")
        return cls(hook, position, feature, name)

    @classmethod
    def logit(cls, token: int | str, position: int = -1, *, minus: int | str | None = None, name: str = "") -> "Target":
        """A token's logit, or its difference from another token's.

        Raises:
            ArgumentError: compared with itself.
        """
        if minus is not None and minus == token:
            raise ArgumentError(f"the logit of {token!r} minus itself is 0, give minus= another token.")
        return cls(LOGITS, position, token if minus is None else (token, minus), name)

    @classmethod
    def direction(
        cls, vector: Float[Tensor, "d_model"] | np.ndarray, hook: str, position: int = -1, name: str = ""
    ) -> "Target":
        """`vector . activation` at any point of width d_model.

        Raises:
            ArgumentError: no tensor or array.
        """
        if not isinstance(vector, Tensor):
            if not isinstance(vector, np.ndarray):
                raise ArgumentError(f"a direction is a tensor or an array of floats, given is {vector!r}.")
            vector = torch.from_numpy(vector)
        return cls(hook, position, vector, name)


@dataclass(frozen=True)
class Reads:
    """Targets as linear reads of the frozen stream: `vectors . stream[level, position] + constants`.

    Attributes:
        vectors: frozen scales divided out.
        levels, positions: the place that each reads.
        sees: `STREAM`, or `ATTN` / `MLP` for a read of what the last module below its level adds.
        constants: the part that does not come from the stream.
        actual: the value itself: the SAE's own pre-activation, or the model's activation times the direction.
        hooks, directions: the same reads at their own activation points, nothing divided out.
        names: the names to show.
    """

    vectors: Float[Tensor, "t d_model"]
    levels: Int[Tensor, "t"]
    positions: Int[Tensor, "t"]
    sees: Int[Tensor, "t"]
    constants: Float[Tensor, "t"]
    actual: Float[Tensor, "t"]
    directions: Float[Tensor, "t d_model"]
    hooks: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice) -> "Reads":
        return Reads(*(column[rows] for column in vars(self).values()))

    @classmethod
    def concatenate(cls, parts: Sequence["Reads"]) -> "Reads":
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        joined: list[Any] = [torch.cat(c) if isinstance(c[0], Tensor) else list(chain(*c)) for c in columns]
        return cls(*joined)


@torch.no_grad()
def read_targets(frozen: FrozenPass, targets: Target | Sequence[Target]) -> Reads:
    """Where and what each target reads.

    Raises:
        ArgumentError: a direction that is no finite vector of d_model, or no target at all.
        HookNameError: a point that is not there, or that is no linear read of the residual stream.
        MissingSAEError, OutOfRangeError, TokenizationError: no such SAE, feature, position or token.
        SAEMismatchError: a feature of an SAE without linear reads.
        StaleError: the model or an SAE was changed after `freeze`.
    """
    frozen.check_current()
    return Reads.concatenate([_read_one(frozen, target) for target in as_targets(targets)])


def as_targets(targets: Target | Sequence[Target]) -> list[Target]:
    """One target or several, as a list.

    Raises:
        ArgumentError: anything else, or none.
    """
    makers = "make one with Target.logit, Target.feature or Target.direction."
    listed: list[Any] = list(targets) if isinstance(targets, list | tuple) else [targets]
    if not listed:
        raise ArgumentError(f"no target was given; {makers}")
    for target in listed:
        if not isinstance(target, Target):
            shown = f"an array of shape {tuple(target.shape)}" if hasattr(target, "shape") else repr(target)
            raise ArgumentError(f"target {shown} is no Target; {makers}")
    return listed


def likeliest(
    frozen: FrozenPass, max_n_logits: int = 10, desired_logit_prob: float = 0.95, position: int = -1
) -> list[Target]:
    """The logits of the likeliest next tokens: the fewest whose probabilities add up to `desired_logit_prob`.

    Args:
        frozen: the forward pass.
        max_n_logits: the largest number of logits.
        desired_logit_prob: more than 0, at most 1.
        position: the position of the prediction; a negative one counts from the end.

    Raises:
        ArgumentError, OutOfRangeError: numbers outside their range.
    """
    check_sizes(max_n_logits=max_n_logits)
    if not 0 < desired_logit_prob <= 1:
        raise ArgumentError(f"desired_logit_prob is {desired_logit_prob}, expected more than 0 and at most 1.")
    at = _position(frozen, position)
    values, tokens = frozen.logits[at].double().softmax(-1).topk(min(max_n_logits, frozen.logits.shape[1]))
    n = int((values.cumsum(0) < desired_logit_prob).sum()) + 1
    return [Target.logit(token, at) for token in tokens[:n].tolist()]


def logit_token(frozen: FrozenPass, target: Target) -> int:
    """The token of a single logit; -1 for other targets."""
    return -1 if target.hook != LOGITS or isinstance(target.of, tuple) else _token(frozen, target.of)


def probability(frozen: FrozenPass, target: Target) -> float | None:
    """Of a logit's token (the first one of a difference), by the model; `None` of other targets."""
    if target.hook != LOGITS:
        return None
    token = _token(frozen, target.of[0] if isinstance(target.of, tuple) else target.of)  # type: ignore[arg-type]
    return frozen.logits[_position(frozen, target.position)].double().softmax(-1)[token].item()


def predicted(frozen: FrozenPass, target: Target, n: int = 4) -> dict[str, float]:
    """The probabilities of next tokens at a target's position: its own tokens, and others down to the `n` likeliest."""
    chances = frozen.logits[_position(frozen, target.position)].double().softmax(-1)
    of = target.of if isinstance(target.of, tuple) else (target.of,)
    own = [_token(frozen, token) for token in of] if target.hook == LOGITS else []  # type: ignore[arg-type]
    tokens = dict.fromkeys([*own, *chances.topk(min(n, len(chances))).indices.tolist()])
    return {_token_string(frozen, token): chances[token].item() for token in list(tokens)[: max(n, len(own))]}


def feature_reads(frozen: FrozenPass, hook: str, positions: Int[Tensor, "t"], features: Int[Tensor, "t"]) -> Reads:
    """Features of one SAE, many at once."""
    sae, device = frozen.sae(hook), frozen.embed.device
    positions, features = positions.to(device), features.to(device)
    vectors, constants = sae.reads(positions, features)
    values = frozen.pre_activations(sae)[positions, features].to(frozen.dtype)
    names = [f"{sae.label}/{f}" for f in features.tolist()]
    return at_hook(frozen, sae.hook, vectors, positions, constants, values, names)


def at_hook(
    frozen: FrozenPass,
    hook: str,
    vectors: Float[Tensor, "t d_model"],
    positions: Int[Tensor, "t"],
    constants: Float[Tensor, "t"],
    actual: Float[Tensor, "t"],
    names: list[str],
) -> Reads:
    """Reads of the activation at a hook as reads of the frozen stream."""
    level, scale, sees = _place(frozen, hook)
    n = len(vectors)
    return Reads(
        vectors=vectors if scale is None else vectors / scale[positions][:, None],
        levels=positions.new_full((n,), level),
        positions=positions,
        sees=positions.new_full((n,), sees),
        constants=constants,
        actual=actual,
        directions=vectors,
        hooks=[hook] * n,
        names=names,
    )


def _place(frozen: FrozenPass, hook: str) -> tuple[int, Tensor | None, int]:
    """The level a hook reads, the frozen divisor in between, and what of the stream it sees.

    Raises:
        HookNameError: not a point of the residual stream.
    """
    if hook == "hook_embed":
        return 0, None, STREAM
    if hook in ("ln_final.hook_normalized", LOGITS):
        return 2 * frozen.n_layers, frozen.scale_final, STREAM
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    layer, point = (int(match[1]), match[2]) if match else (-1, "")
    if 0 <= layer < frozen.n_layers:
        places: dict[str, tuple[int, Tensor | None, int]] = {
            "hook_resid_pre": (2 * layer, None, STREAM),
            "ln1.hook_normalized": (2 * layer, frozen.scale1[layer], STREAM),
            "hook_attn_out": (2 * layer + 1, None, ATTN),
            "hook_resid_mid": (2 * layer + 1, None, STREAM),
            "ln2.hook_normalized": (2 * layer + 1, frozen.scale2[layer], STREAM),
            "hook_mlp_out": (2 * layer + 2, None, MLP),
            "hook_resid_post": (2 * layer + 2, None, STREAM),
        }
        if point in places:
            return places[point]
    readable = [name.format(max(layer, 0)) for name in READABLE]
    if re.fullmatch(r"attn\.hook_(q|k|rot_q|rot_k|attn_scores|pattern)|.*hook_scale", point or hook):
        reason = "attention patterns and norm scales are frozen here, so what makes them is not attributed."
    elif re.fullmatch(r"attn\.hook_[vz]|attn\.hook_result|mlp\.hook_.*", point):
        reason = (
            "it belongs to one head or hidden unit. Read the input it is made of: a value is the direction "
            "W_V[layer, head, :, e] at ln1.hook_normalized, a branch W_gate[layer, :, m] at ln2.hook_normalized."
        )
    else:
        raise HookNameError(f"no target can be at {hook!r}." + nearest(hook, [*readable, LOGITS]))
    raise HookNameError(f"no target can be at {hook!r}: {reason} Points of width d_model are {', '.join(readable)}.")


def _position(frozen: FrozenPass, position: int) -> int:
    return check_index(
        position, frozen.n_positions, "position {} is outside the text's {} tokens (with [BOS])", negative=True
    )


def _read_one(frozen: FrozenPass, target: Target) -> Reads:
    position = _position(frozen, target.position)
    at = torch.tensor([position], device=frozen.embed.device)
    if target.hook == LOGITS:
        return _read_logit(frozen, target, at)
    if not isinstance(target.of, Tensor):
        return _read_feature(frozen, target, at)
    vector = target.of.detach().to(frozen.embed.device)
    d_model = frozen.embed.shape[1]
    if not vector.is_floating_point() or vector.shape != (d_model,) or not vector.isfinite().all():
        raise ArgumentError(
            f"a direction of shape {tuple(vector.shape)} and type {vector.dtype}: expected {d_model} finite floats."
        )
    _place(frozen, target.hook)  # before the cache is asked for a point that it does not have
    seen = frozen.cache[target.hook][position]
    vectors = vector.to(frozen.embed)[None]
    actual = (vector.double() @ seen.double()).to(frozen.dtype)[None]
    name = target.name or f"direction at {target.hook}"
    return at_hook(frozen, target.hook, vectors, at, torch.zeros_like(actual), actual, [name])


def _read_feature(frozen: FrozenPass, target: Target, at: Int[Tensor, "1"]) -> Reads:
    sae = frozen.sae(target.hook)
    feature = check_index(target.of, sae.view.d_sae, "feature {} is outside the SAE's {}")  # type: ignore[arg-type]
    if not sae.has_reads:
        raise SAEMismatchError(
            f"the SAE {sae.label} has no linear encoder, so its features are no linear reads; a feature can be "
            "attributed by what it writes, as Target.direction(sae.W_dec[feature], hook)."
        )
    reads = feature_reads(frozen, sae.hook, at, torch.tensor([feature], device=at.device))
    reads.names[0] = target.name or reads.names[0]
    return reads


def _read_logit(frozen: FrozenPass, target: Target, at: Int[Tensor, "1"]) -> Reads:
    given = target.of if isinstance(target.of, tuple) else (target.of,)
    tokens = [_token(frozen, token) for token in given]
    if len(tokens) == 2 and tokens[0] == tokens[1]:
        raise ArgumentError(f"the logit of {given[0]!r} minus that of {given[-1]!r} is 0: they are the same token.")
    signs = torch.tensor([1.0, -1.0][: len(tokens)], device=at.device)
    # The last product in float64: a difference of two large float32 logits is good to fewer digits than its parts.
    directions = frozen.model.W_U.detach()[:, tokens].double() @ signs.double()
    actual = (frozen.cache["ln_final.hook_normalized"][at].double() @ directions).to(frozen.dtype)
    shown = [token if isinstance(token, str) else _token_string(frozen, token) for token in given]
    name = target.name or "logit " + " - ".join(map(repr, shown))
    vectors = directions.to(frozen.dtype)[None]
    return at_hook(frozen, LOGITS, vectors, at, torch.zeros_like(actual), actual, [name])


def _token(frozen: FrozenPass, token: int | str | Tensor) -> int:
    if isinstance(token, str):
        return frozen.model.to_single_token(token)
    return check_index(token, frozen.model.cfg.d_vocab, "token {} is outside the vocabulary of {}")  # type: ignore[arg-type]


def _token_string(frozen: FrozenPass, token: object) -> str:
    number = int(token)  # type: ignore[call-overload]
    return str(number) if frozen.model.tokenizer is None else frozen.model.tokenizer.decode([number])
