"""Pages of results: reports, graphs, galleries and dashboards as HTML files, and what they are made of."""

from bilens.pages.dashboard import FeatureDashboard
from bilens.pages.report import (
    LabelledLayer,
    ModelCard,
    demo,
    evaluate,
    label_layers,
    model_saes,
    strongest_example,
    trace,
)

__all__ = [
    "FeatureDashboard",
    "LabelledLayer",
    "ModelCard",
    "demo",
    "evaluate",
    "label_layers",
    "model_saes",
    "strongest_example",
    "trace",
]
