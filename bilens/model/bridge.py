"""The adapter that lets TransformerLens' `TransformerBridge` boot a bilinear model.

    import bilens.model
    bridge = TransformerBridge.boot_transformers("path/to/a/saved/model")

A bridge wraps the modules of a Hugging Face model in components of TransformerLens. Here the modules are those of the
`HookedBilinearTransformer` inside `bilens.model.hf.BilinearForCausalLM`, which have TransformerLens' names, hook points
and weights already, so a component only has to

1. call the module it wraps (the forward pass stays where it is)
2. show the module's hook points as its own: a hook on either acts on the one computation there is
3. answer for weights (`W_Q`, `W_gate`, ...) with the module's

The adapter is announced by the entry point group `transformer_lens.architectures`. TransformerLens (3.9 and 4.3 alike)
reads the group only after it has looked the architecture up in `SUPPORTED_ARCHITECTURES` and refused what is not there,
so importing `bilens.model`, which transformers needs anyway to know the class, also writes it there:
`register_adapter`.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import BlockBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from bilens.errors import TokenizationError
from bilens.model.attached import HEAD_HOOKS
from bilens.model.config import HF_ARCHITECTURE
from bilens.model.files import load_tokenizer

# Of the first two a bridge has its own; the others it can switch on for TransformerLens' attention classes only.
NOT_SHARED = ("hook_in", "hook_mlp_in", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


class HeadsAfterPositions(BaseTensorConversion):
    """Changes nothing. TransformerLens asks it which axis `pos_slice` cuts where it does not know the hook's name."""

    splits_attention_heads = True

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return input_value


class HookedComponent(GeneralizedComponent):
    """A component whose hook points and named weights are those of the module it wraps."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        for name, child in original_component.named_children():
            if isinstance(child, HookPoint) and name not in NOT_SHARED:
                setattr(self, name, child)
                if name in HEAD_HOOKS:
                    child.hook_conversion = HeadsAfterPositions()

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_modules", {}).get("_original_component")
        if isinstance(getattr(type(original), name, None), property):
            setattr(original, name, value)
        else:
            super().__setattr__(name, value)


class BlockComponent(HookedComponent, BlockBridge):
    """A block. Its hook points stand in the residual stream itself; TransformerLens' aliases would stand beside it."""

    hook_aliases = {}  # noqa: RUF012  declared so by TransformerLens


class AttentionComponent(HookedComponent):
    """Attention, with `hook_result` after `bridge.set_use_attn_result(True)`."""

    supports_attn_result = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.config is not None
        self.original_component.cfg.use_attn_result = self.config.use_attn_result  # type: ignore[assignment]
        return super().forward(*args, **kwargs)


class _Nowhere:
    """Where the tokenizer of a folder without one would be: who looks there, as a bridge given none does, is told."""

    def __init__(self, folder: str):
        self.folder = folder

    def __fspath__(self) -> str:
        raise TokenizationError(
            f"{self.folder!r} has no tokenizer.json, and no other tokenizer can be found: put one there, or pass "
            "boot_transformers(..., tokenizer=...)."
        )

    __str__ = __fspath__


class BilinearArchitectureAdapter(ArchitectureAdapter):
    """Where the modules of `bilens.model.hf.BilinearForCausalLM` are; TransformerLens makes one for each bridge.

    Args:
        cfg: TransformerLens' configuration, read from the Hugging Face one.
    """

    # Patterns are read at their hook points; to return them too would only keep them longer.
    supports_hf_output_attentions = False

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.weight_processing_conversions = {}
        self.component_mapping = {
            "embed": HookedComponent("hooked.embed"),
            "blocks": BlockComponent(
                "hooked.blocks",
                submodules={
                    "ln1": HookedComponent("ln1"),
                    "attn": AttentionComponent("attn", config=cfg),
                    "ln2": HookedComponent("ln2"),
                    "mlp": HookedComponent("mlp"),
                },
            ),
            "ln_final": HookedComponent("hooked.ln_final"),
            "unembed": HookedComponent("hooked.unembed"),
        }

    def prepare_loading(self, model_name: str, model_kwargs: dict) -> None:
        """Name the tokenizer that the published config names, where the folder has none of its own."""
        folder, named = Path(model_name), model_kwargs["config"].tokenizer
        if (folder / "tokenizer.json").exists() or (named is None and not folder.is_dir()):
            return
        # Not left to TransformerLens: without a connection transformers would try again for most of a minute.
        with warnings.catch_warnings():  # a bridge that is given a tokenizer misses none
            warnings.simplefilter("ignore")
            tokenizer = load_tokenizer(folder, named)
        found: Any = _Nowhere(model_name) if tokenizer is None else tokenizer.name_or_path
        self.cfg.tokenizer_name = found

    def prepare_model(self, hf_model: Any) -> None:
        """Take from the model what TransformerLens does not read from a Hugging Face configuration."""
        hf_model.config.output_attentions = False
        cfg = hf_model.hooked.cfg
        names = (
            "act_fn",
            "d_head",
            "d_vocab",
            "d_vocab_out",
            "eps",
            "gated_mlp",
            "normalization_type",
            "uses_rms_norm",
        )
        for name in (*names, "positional_embedding_type"):
            setattr(self.cfg, name, getattr(cfg, name))

    def preprocess_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refuse: the one computation there is belongs to the model, and a bridge may not change its weights."""
        raise NotImplementedError(
            "a bilinear model has no weights to process: its norms have none to fold, and without a mean to subtract "
            "there is nothing to centre. Use enable_compatibility_mode(no_processing=True); hook names need neither."
        )


def register_adapter() -> None:
    """Make the adapter known to `TransformerBridge.boot_transformers`."""
    SUPPORTED_ARCHITECTURES[HF_ARCHITECTURE] = BilinearArchitectureAdapter
    # In this order: an entry point for what is registered already gets a warning. Registering serves a source tree that
    # was never installed and has no entry points.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(HF_ARCHITECTURE, BilinearArchitectureAdapter)
