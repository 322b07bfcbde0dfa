"""Pages of results: reports, graphs, galleries and dashboards as HTML files, and what they are made of."""

from bilens.pages.circuit import circuit_page, feature_page
from bilens.pages.dashboard import FeatureDashboard
from bilens.pages.gallery import gallery_page
from bilens.pages.graph import GraphView, graph_page
from bilens.pages.report import (
    LabelledLayer,
    ModelCard,
    Report,
    demo,
    evaluate,
    label_layers,
    model_saes,
    strongest_example,
    trace,
)

__all__ = [
    "FeatureDashboard",
    "GraphView",
    "LabelledLayer",
    "ModelCard",
    "Report",
    "circuit_page",
    "demo",
    "evaluate",
    "feature_page",
    "gallery_page",
    "graph_page",
    "label_layers",
    "model_saes",
    "strongest_example",
    "trace",
]
