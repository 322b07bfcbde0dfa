"""SAEs and transcoders inside the running model: `HookedSAETransformer`'s methods, for our model.

    1. an SAE reads its `metadata.hook_name` and writes there too; a transcoder writes `metadata.hook_name_out`
    2. while attached, the hook point it writes to returns its reconstruction instead of the activation (plus the
       reconstruction error, if asked for), and carries one hook point per place inside the SAE:
       `blocks.1.hook_mlp_out.hook_sae_acts_post`
    3. at a forward pass the SAE's own hook points are routed through those, so that caching, ablating and steering
       through the model reach the SAE, and nothing is left on the SAE afterwards

No module of the model is replaced: the hook point stays, with the hooks on it, and shows what flows on. Detaching takes
the points of step 2 off again. SAELens itself is imported only with the first SAE.

SAEs work token by token, so generation with a key-value cache gives what it gives without. The exception are SAELens'
*training* classes of batch-top-k, which choose among all tokens of a pass; what they are saved as (JumpReLU) does not.
"""

import copyreg
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from bilens.errors import ArgumentError, HookNameError, SAEMismatchError, TokenizationError, nearest

if TYPE_CHECKING:
    from sae_lens import SAE

HEAD_HOOKS = ("hook_v", "hook_z", *(f"hook_{rot}{x}{i}" for rot in ("", "rot_") for x in "qk" for i in ("", "1", "2")))
COPY_HOOKS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_result")  # d_model for every head
NEURON_HOOKS = ("hook_pre", "hook_pre_linear", "hook_post")


class SAEAttachmentMixin:
    """The SAE half of `HookedBilinearTransformer`: names, arguments and meaning of SAELens' `HookedSAETransformer`.

    An SAE never changes: `use_error_term` belongs to the attachment. At most one SAE reads a hook and one writes it; a
    new one takes the place of the old.
    """

    cfg: Any
    tokenizer: Any
    mod_dict: Any
    hook_dict: Any
    setup: Callable[[], None]
    check_hook_name: Callable[[str], None]
    run_with_cache: Callable[..., Any]
    run_with_hooks: Callable[..., Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._splices: dict[str, _Splice] = {}  # by the hook that is read

    @property
    def acts_to_saes(self) -> "dict[str, SAE[Any]]":
        """The attached SAEs by the hook they read."""
        return {name: splice.sae for name, splice in self._splices.items()}

    def add_sae(
        self, sae: "SAE[Any]", use_error_term: bool | None = None, exclude_special_tokens: bool | Sequence[int] = False
    ) -> None:
        """Attach an SAE or transcoder until `reset_saes`; one that is at its hook already gives way.

        Args:
            sae: any SAELens SAE or transcoder with a `metadata.hook_name`.
            use_error_term: add what the SAE misses, so that the model computes what it would without it until its
                features are intervened on; the error carries no gradient. `None` is the SAE's own setting.
            exclude_special_tokens: leave the activation alone at the tokenizer's BOS, EOS, padding, ... or at the
                token ids given.

        Raises:
            SAEMismatchError: no `metadata.hook_name`, another width than the hook's, or one head only.
            HookNameError: the model has no such hook.
        """
        self._attach(self._splice(sae, use_error_term, exclude_special_tokens))

    def reset_saes(
        self, act_names: str | Sequence[str] | None = None, prev_saes: "Sequence[SAE[Any] | None] | None" = None
    ) -> None:
        """Detach SAEs.

        Args:
            act_names: the hooks they read; `None` is all.
            prev_saes: the SAE to attach in place of each, or `None` for none.

        Raises:
            HookNameError: no SAE is attached there.
        """
        names = list(self._splices) if act_names is None else [act_names] if isinstance(act_names, str) else act_names
        for name in names:
            if name not in self._splices:
                raise HookNameError(
                    f"no SAE is attached at {name!r}; attached are {list(self._splices)}."
                    + nearest(name, self._splices)
                )
        previous = list(prev_saes) if prev_saes is not None else [None] * len(names)
        if len(previous) != len(names):
            raise ArgumentError(f"{len(previous)} prev_saes for {len(names)} act_names; expected one for each.")
        splices = [self._splice(sae) for sae in previous if sae is not None]
        for name in names:
            self._detach(name)
        for splice in splices:
            self._attach(splice)

    @contextmanager
    def saes(
        self,
        saes: "SAE[Any] | Iterable[SAE[Any]]" = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[Any]:
        """SAEs that are attached as long as the `with` block; see `add_sae` for the arguments and what is refused.

        A bad SAE is refused before any is attached. At the end what was attached before is attached again, and only
        that, unless `reset_saes_end` is false. Hooks put on the inside of an SAE through the model go when it goes.
        """
        from sae_lens import SAE

        before = dict(self._splices)
        given = [saes] if isinstance(saes, SAE | str) else saes
        splices = [self._splice(sae, use_error_term, exclude_special_tokens) for sae in given]
        try:
            for splice in splices:
                self._attach(splice)
            yield self
        finally:
            if reset_saes_end:
                self._restore(before)

    def run_with_saes(
        self,
        *model_args: Any,
        saes: "SAE[Any] | Iterable[SAE[Any]]" = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass with SAEs attached."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*model_args, **model_kwargs)  # type: ignore[operator]

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: "SAE[Any] | Iterable[SAE[Any]]" = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`run_with_cache` with SAEs attached: the cache has their insides, `...hook_sae_acts_post` among them."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(
                *model_args, return_cache_object=return_cache_object, remove_batch_dim=remove_batch_dim, **kwargs
            )

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: "SAE[Any] | Iterable[SAE[Any]]" = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        fwd_hooks: Sequence[tuple[Any, Callable]] = (),
        bwd_hooks: Sequence[tuple[Any, Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """`run_with_hooks` with SAEs attached: hooks may name their insides. (SAELens has no `use_error_term` here.)"""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_hooks(
                *model_args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **model_kwargs,
            )

    # --- what the model asks for --------------------------------------------------------------------------------------

    def _begin_splices(self, tokens: Int[Tensor, "batch pos"] | None) -> None:
        """A forward pass over these tokens starts."""
        for splice in self._splices.values():
            splice.begin(self.mod_dict[splice.reads], tokens)

    def _is_unused_error_hook(self, name: str) -> bool:
        """Whether this is the error term of an SAE that is attached without one."""
        return any(name == f"{s.writes}.hook_sae_error" and not s.use_error_term for s in self._splices.values())

    # --- attaching and detaching --------------------------------------------------------------------------------------

    def _splice(
        self, sae: Any, use_error_term: bool | None = None, exclude_special_tokens: bool | Sequence[int] = False
    ) -> "_Splice":
        reads, writes = splice_hooks(self, sae)
        for splice in self._splices.values():
            for name in (reads, writes):
                if name.startswith(f"{splice.writes}."):
                    raise SAEMismatchError(f"{name!r} is inside an attached SAE, where no other can be attached.")
        use_error_term = sae.use_error_term if use_error_term is None else use_error_term
        return _Splice(sae, reads, writes, use_error_term, self._excluded_ids(exclude_special_tokens))

    def _excluded_ids(self, exclude: bool | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(exclude, bool):
            return tuple(exclude)
        if not exclude:
            return ()
        if self.tokenizer is None:
            raise TokenizationError("exclude_special_tokens=True needs the model's tokenizer: give the token ids.")
        from sae_lens.util import get_special_token_ids

        return tuple(get_special_token_ids(self.tokenizer))

    def _attach(self, splice: "_Splice") -> None:
        for name, other in list(self._splices.items()):
            if name == splice.reads or other.writes == splice.writes:
                self._detach(name)
        self._splices[splice.reads] = splice  # first, so that an interruption from here on is undone too
        splice.install(self.mod_dict[splice.writes])
        self.setup()

    def _detach(self, name: str) -> None:
        splice = self._splices[name]
        splice.remove(self.mod_dict[splice.writes])
        del self._splices[name]
        self.setup()

    def _restore(self, before: "dict[str, _Splice]") -> None:
        for name, splice in list(self._splices.items()):
            if before.get(name) is not splice:
                self._detach(name)
        for name, splice in before.items():
            if name not in self._splices:
                self._attach(splice)
        self._splices = dict(before)  # in the order they had


class _Splice:
    """One SAE in its place.

    Args:
        sae: the SAE or transcoder.
        reads, writes: hook names; the same but for a transcoder.
        use_error_term: add `activation - reconstruction`, as it is without interventions on the SAE.
        excluded: token ids at which the activation stays.
    """

    def __init__(self, sae: Any, reads: str, writes: str, use_error_term: bool, excluded: tuple[int, ...]):
        make_picklable(sae)
        self.sae, self.reads, self.writes = sae, reads, writes
        self.use_error_term, self.excluded = use_error_term, excluded
        self.points = {name: HookPoint() for name in (*sae.hook_dict, "hook_sae_error", "hook_sae_output")}
        self._untouched: Bool[Tensor, "batch pos"] | None = None
        self._read: Tensor | None = None
        self._reader: Any = None

    def install(self, point: HookPoint) -> None:
        for name, inside in self.points.items():
            point.add_module(name, inside)
        point.forward = self.forward  # type: ignore[assignment, method-assign]

    def remove(self, point: HookPoint) -> None:
        """Undo `install`, also one that was interrupted."""
        point.__dict__.pop("forward", None)
        for name in self.points:
            point._modules.pop(name, None)
        self._forget()

    def begin(self, reads: HookPoint, tokens: Int[Tensor, "batch pos"] | None) -> None:
        """A forward pass starts: nothing is carried over from the last."""
        self._forget()
        if self.excluded:
            if tokens is None:
                raise ArgumentError("exclude_special_tokens with start_at_layer needs the tokens: pass tokens=.")
            self._untouched = torch.isin(tokens, torch.tensor(self.excluded, device=tokens.device))
        if self.reads != self.writes:
            # Registered anew for every pass, and so last: it sees what the hooks on that point made of the activation.
            self._reader = reads.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, activation: Tensor) -> None:
        self._read = activation

    def _forget(self) -> None:
        """Lets go of what belongs to one forward pass."""
        self._read = self._untouched = None
        if self._reader is not None:
            self._reader.remove()
            self._reader = None

    def forward(self, activation: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "batch pos *width"]:
        """What flows on instead of the activation."""
        read, untouched = activation if self.reads == self.writes else self._read, self._untouched
        self._forget()
        if read is None:
            raise SAEMismatchError(
                f"the transcoder reads {self.reads!r}, which this pass did not compute before {self.writes!r}: "
                "start_at_layer is past it, or metadata.hook_name and hook_name_out are the wrong way round."
            )
        with _through(self.sae, self.points):
            out = reconstruct(self.sae, encode(self.sae, read), read, activation)
        if untouched is not None:
            untouched = untouched.view(*untouched.shape, *(1 for _ in activation.shape[2:]))
        if self.use_error_term:
            with torch.no_grad():
                with _without_hooks(self.sae):
                    error = activation - reconstruct(self.sae, encode(self.sae, read), read, activation)
                if untouched is not None:
                    error = error.masked_fill(untouched, 0.0)
                error = self.points["hook_sae_error"](error)
            out = out + error
        if untouched is not None:
            out = torch.where(untouched, activation, out)
        return self.points["hook_sae_output"](out)


def make_picklable(sae: Any) -> None:
    """Let SAEs of this class be pickled, and with them what holds one.

    SAELens' classes keep functions that are made in `__init__` and cannot be pickled: they are left out of the state,
    and made again.
    """
    copyreg.pickle(type(sae), _reduced)  # type: ignore[arg-type]


def _reduced(sae: Any) -> tuple[Any, ...]:
    state = {name: value for name, value in vars(sae).items() if "<locals>" not in getattr(value, "__qualname__", "")}
    return type(sae), (sae.cfg,), state


# --- pure functions ---------------------------------------------------------------------------------------------------


def encode(sae: Any, x: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "batch pos d_sae"]:
    """Feature activations, of an activation as the hook has it: where it has heads, they are laid side by side."""
    return sae.encode(_flat(sae, x))


def reconstruct(
    sae: Any,
    acts: Float[Tensor, "batch pos d_sae"],
    x: Float[Tensor, "batch pos *width"],
    like: Float[Tensor, "batch pos *width_out"],
) -> Float[Tensor, "batch pos *width_out"]:
    """What an SAE or transcoder makes of its features.

    Args:
        sae: the SAE or transcoder.
        acts: the result of `encode` for `x`.
        x: the activation it reads; a skip transcoder's skip connection reads it too.
        like: the activation whose place it takes: its shape, dtype and device.
    """
    out = sae.decode(acts)
    skip = getattr(sae, "W_skip", None)
    if skip is not None:
        out = out + _flat(sae, x).to(out.dtype) @ skip.T
    return out.to(like).reshape(like.shape)


def _flat(sae: Any, x: Tensor) -> Tensor:
    """On the SAE's device, one vector per token, unless the SAE does that by itself (`reshape_activations`)."""
    x = x.to(sae.W_dec.device)
    return x if sae.hook_z_reshaping_mode else x.flatten(2)


def splice_hooks(model: Any, sae: Any, called: str = "the SAE") -> tuple[str, str]:
    """Where an SAE reads and writes, after checking that it fits there.

    Args:
        model: the model.
        sae: an SAE or transcoder.
        called: the name that messages give it.

    Raises:
        ArgumentError: not an SAE.
        HookNameError: the model has no such hook.
        SAEMismatchError: no hook, another width than the hook's, one head only, or no reconstruction of each token.
    """
    from sae_lens import SAE

    if not isinstance(sae, SAE):
        raise ArgumentError(f"expected a SAELens SAE (bilens.load_sae gives one), not {type(sae).__name__} {sae!r}.")
    if not hasattr(model, "check_hook_name"):
        raise ArgumentError(
            f"model is {model!r:.80}, expected a HookedBilinearTransformer (bilens.load_model gives one)."
        )
    metadata = sae.cfg.metadata
    if metadata.hook_name is None:
        raise SAEMismatchError(f"{called} has no metadata.hook_name; set it to the hook it was trained on.")
    is_transcoder = "transcoder" in sae.cfg.architecture()
    if is_transcoder and metadata.hook_name_out is None:
        raise SAEMismatchError(
            f"{called} is a transcoder without metadata.hook_name_out; set it to the hook it writes."
        )
    reads, writes = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
    for name in (reads, writes):
        model.check_hook_name(name)
    if metadata.hook_head_index is not None:
        raise SAEMismatchError(
            f"{called} was trained on head {metadata.hook_head_index} of {reads!r} alone; only SAEs on all of a hook "
            "can be put in its place."
        )
    if sae.cfg.architecture() == "temporal":
        raise SAEMismatchError(f"{called} is temporal: it reconstructs a token from the ones before it as well.")
    for name, width, kind in ((reads, sae.cfg.d_in, "d_in"), (writes, sae.W_dec.shape[-1], "d_out")):
        if width != (found := hook_width(model.cfg, name)):
            raise SAEMismatchError(
                f"{called} has {kind} {width}; {name!r} is {found} wide, so it belongs to another model or hook."
            )
    check_attention_scale(model, sae, called)
    return reads, writes


def check_attention_scale(model: Any, sae: Any, called: str = "the SAE") -> None:
    """Refuse an SAE in which another factor on attention's output was folded than the model has.

    Raises:
        SAEMismatchError: it was; that is only known of published attn-out SAEs.
    """
    folded, here = sae.cfg.metadata.attention_scale, getattr(model.cfg, "residual_scale", None)
    if folded is not None and here is not None and not math.isclose(folded, here):
        raise SAEMismatchError(
            f"{called} was loaded for a model that multiplies attention's output by {folded:.4g}, this one multiplies "
            f"it by {here:.4g}. Load it with n_layers={model.cfg.n_layers}, scale_attn={model.cfg.scale_attn}."
        )


def hook_width(cfg: Any, name: str) -> int:
    """How many numbers a hook's activation has at one token, all heads together.

    Raises:
        SAEMismatchError: token ids, and attention scores or patterns, whose width is the length of the text.
    """
    last = name.rsplit(".", 1)[-1]
    if last == "hook_tokens":
        raise SAEMismatchError("'hook_tokens' shows token ids: an SAE cannot be on it.")
    if last in ("hook_attn_scores", "hook_attn_scores_1", "hook_attn_scores_2", "hook_pattern"):
        raise SAEMismatchError(f"{name!r} is as wide as the text is long: an SAE cannot be on it.")
    if last in HEAD_HOOKS:
        return cfg.n_heads * cfg.d_head
    if last in NEURON_HOOKS:
        return cfg.d_mlp
    if last == "hook_scale":
        return 1
    return cfg.n_heads * cfg.d_model if last in COPY_HOOKS else cfg.d_model


@contextmanager
def _through(sae: Any, points: dict[str, HookPoint]) -> Iterator[None]:
    """Everything that passes the SAE's own hook points goes through `points` next."""
    handles: list[Any] = []
    try:
        for name, own in sae.hook_dict.items():
            inside = points[name]
            handles.append(own.register_forward_hook(lambda module, args, out, inside=inside: inside(out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_hooks(sae: Any) -> Iterator[None]:
    """The SAE as it computes by itself, whoever hooked it."""
    own = dict(sae.hook_dict)
    try:
        for name in own:
            setattr(sae, name, nn.Identity())
        yield
    finally:
        for name, point in own.items():
            setattr(sae, name, point)
