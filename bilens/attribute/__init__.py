"""Exact attribution through every layer: splits, token attributions, circuits, and their checks by intervention."""

from bilens.attribute.chains import Chain, trace_chain
from bilens.attribute.circuit import Circuit, trace_circuit
from bilens.attribute.faithfulness import (
    CircuitChecks,
    EdgeCheck,
    Faithfulness,
    check_circuit,
    check_circuits,
    check_edges,
    feature_means,
)
from bilens.attribute.frozen import FrozenPass, freeze
from bilens.attribute.gradients import (
    GradientAttribution,
    compare_tokens,
    gradient_times_input,
    integrated_gradients,
)
from bilens.attribute.imported_graphs import from_attribution_graph
from bilens.attribute.reading import read_positions
from bilens.attribute.scores import ScoreSplit, split_score
from bilens.attribute.splitting import Split, split
from bilens.attribute.targets import Target
from bilens.attribute.tokens import TokenAttribution, attribute_tokens

__all__ = [
    "Chain",
    "Circuit",
    "CircuitChecks",
    "EdgeCheck",
    "Faithfulness",
    "FrozenPass",
    "GradientAttribution",
    "ScoreSplit",
    "Split",
    "Target",
    "TokenAttribution",
    "attribute_tokens",
    "check_circuit",
    "check_circuits",
    "check_edges",
    "compare_tokens",
    "feature_means",
    "freeze",
    "from_attribution_graph",
    "gradient_times_input",
    "integrated_gradients",
    "read_positions",
    "split",
    "split_score",
    "trace_chain",
    "trace_circuit",
]
