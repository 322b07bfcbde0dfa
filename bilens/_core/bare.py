"""One guard for everything that measures: a model (or SAE) is measured by itself, or not at all.

An SAE that is attached and a hook that someone left change what a forward pass computes. A measurement through them is
of another model than the one it names, so it is refused.
"""

from itertools import islice
from typing import Any

from torch import nn

from bilens.errors import AlteredModelError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_COPIES = ("use_attn_in", "use_split_qkv_input")  # what ln1 shows is then of every head's own copy of the stream
SHOWN = 3


def require_bare(*modules: nn.Module) -> None:
    """Refuse models and SAEs that would not compute what their weights say. Call it before the pass.

    Args:
        modules: a model, and the SAEs that are read beside it.

    Raises:
        AlteredModelError: SAEs are attached, there are hooks (TransformerLens' or torch's own, temporary or not), or
            heads read copies of their own.
    """
    for module in modules:
        attached: dict[str, Any] = getattr(module, "acts_to_saes", {})
        hooked = (name for name, part in module.named_modules() if any(getattr(part, kind) for kind in _HOOKS))
        found = [f"an SAE is attached at {name}" for name in attached]
        found += [f"a hook is on {name or 'it'}" for name in islice(hooked, SHOWN)]
        found += [f"{switch} is on" for switch in _COPIES if getattr(getattr(module, "cfg", None), switch, False)]
        if found:
            raise AlteredModelError(
                f"this measures {type(module).__name__} by itself, and {', '.join(found)}: the numbers would be of "
                "something else. Detach SAEs with reset_saes(), and hooks with "
                "reset_hooks(including_permanent=True), a torch hook with its handle's remove(), or leave the `with` "
                "block they are for; switch off with model.set_use_...(False)."
            )
