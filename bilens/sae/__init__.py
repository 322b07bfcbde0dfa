"""SAEs: SAELens' classes, the published format, training, evaluation, and what features fire on."""

from bilens.sae.features.examples import (
    DescribedFeatures,
    Example,
    FeatureActivations,
    FeatureSummary,
    feature_activations,
)
from bilens.sae.features.kept import KeptFeatures, describe_features, keep_features
from bilens.sae.features.names import FeatureNames
from bilens.sae.features.store import (
    FeatureRecord,
    FeatureStore,
    FeatureStoreConfig,
    StoredFeatures,
    build_feature_store,
)
from bilens.sae.loading import SAEEntry, SAEList, list_saes, load_sae, load_saes, scope_loader
from bilens.sae.pushing import push_saes
from bilens.sae.scope import ScopeSAE, ScopeSAEConfig, ScopeTrainingSAE, ScopeTrainingSAEConfig
from bilens.sae.texts import example_texts
from bilens.sae.train.evaluation import SAEScore, SAEScores, evaluate_saes
from bilens.sae.train.finetuning import FinetuneConfig, finetune_saes
from bilens.sae.train.training import SAETrainConfig, train_saes
from bilens.sae.view import SAEView

__all__ = [
    "DescribedFeatures",
    "Example",
    "FeatureActivations",
    "FeatureNames",
    "FeatureRecord",
    "FeatureStore",
    "FeatureStoreConfig",
    "FeatureSummary",
    "FinetuneConfig",
    "KeptFeatures",
    "SAEEntry",
    "SAEList",
    "SAEScore",
    "SAEScores",
    "SAETrainConfig",
    "SAEView",
    "ScopeSAE",
    "ScopeSAEConfig",
    "ScopeTrainingSAE",
    "ScopeTrainingSAEConfig",
    "StoredFeatures",
    "build_feature_store",
    "describe_features",
    "evaluate_saes",
    "example_texts",
    "feature_activations",
    "finetune_saes",
    "keep_features",
    "list_saes",
    "load_sae",
    "load_saes",
    "push_saes",
    "scope_loader",
    "train_saes",
]
