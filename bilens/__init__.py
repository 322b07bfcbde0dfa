"""bilens: read bilinear transformers from their weights.

Public names are imported where they are first used (PEP 562): `import bilens` is quick, torch and TransformerLens are
loaded with the first name that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

import bilens._core.warnings_of_transformers  # noqa: F401
from bilens._core.display import register_pages

__version__ = "0.2.0"

if TYPE_CHECKING:
    from bilens.attribute import Circuit
    from bilens.decompose import Decomposer
    from bilens.errors import BilensError
    from bilens.model import (
        BilinearConfig,
        BilinearForCausalLM,
        BilinearTransformerConfig,
        HookedBilinearTransformer,
        list_models,
        load_model,
    )
    from bilens.pages.dashboard import FeatureDashboard
    from bilens.pages.report import report
    from bilens.sae import (
        FeatureStore,
        build_feature_store,
        evaluate_saes,
        finetune_saes,
        list_saes,
        load_sae,
        load_saes,
        push_saes,
        train_saes,
    )
    from bilens.train.annealing import AnnealConfig, anneal
    from bilens.train.language_model import TrainConfig, train_lm

_HOME = {
    "AnnealConfig": "bilens.train.annealing",
    "BilensError": "bilens.errors",
    "BilinearConfig": "bilens.model",
    "BilinearForCausalLM": "bilens.model",
    "BilinearTransformerConfig": "bilens.model",
    "Circuit": "bilens.attribute",
    "Decomposer": "bilens.decompose",
    "FeatureDashboard": "bilens.pages.dashboard",
    "FeatureStore": "bilens.sae",
    "HookedBilinearTransformer": "bilens.model",
    "TrainConfig": "bilens.train.language_model",
    "anneal": "bilens.train.annealing",
    "build_feature_store": "bilens.sae",
    "evaluate_saes": "bilens.sae",
    "finetune_saes": "bilens.sae",
    "list_models": "bilens.model",
    "list_saes": "bilens.sae",
    "load_model": "bilens.model",
    "load_sae": "bilens.sae",
    "load_saes": "bilens.sae",
    "push_saes": "bilens.sae",
    "report": "bilens.pages.report",
    "train_lm": "bilens.train.language_model",
    "train_saes": "bilens.sae",
}

register_pages(
    {
        "Circuit": "bilens.pages.graph:graph_page",
        "FeatureCircuit": "bilens.pages.circuit:feature_page",
        "MotifGallery": "bilens.pages.gallery:gallery_page",
    }
)

_PACKAGES = ("attribute", "decompose", "draw", "layer", "model", "pages", "reproduce", "sae", "toy", "train", "vision")

__all__ = [
    "AnnealConfig",
    "BilensError",
    "BilinearConfig",
    "BilinearForCausalLM",
    "BilinearTransformerConfig",
    "Circuit",
    "Decomposer",
    "FeatureDashboard",
    "FeatureStore",
    "HookedBilinearTransformer",
    "TrainConfig",
    "__version__",
    "anneal",
    "build_feature_store",
    "evaluate_saes",
    "finetune_saes",
    "list_models",
    "list_saes",
    "load_model",
    "load_sae",
    "load_saes",
    "push_saes",
    "report",
    "train_lm",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"bilens.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'bilens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES, *(name for name in globals() if name.startswith("__"))})
