"""One bilinear layer as matrices: interaction matrices, eigenpairs, higher-order SVD, CP, inner products."""

from bilens.layer.bilinear import (
    BilinearLayer,
    Branches,
    branches,
    constant_term,
    hidden_coefficients,
    interaction_matrix,
    linear_term,
    pair_products,
    triple_coefficients,
)
from bilens.layer.cp import CPCurve, CPDecomposition, cp_decompose
from bilens.layer.eigen.fitted import best_squares
from bilens.layer.eigen.metric import metric_eigenpairs, moment, shares_of
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.layer.eigen.solve import LeadingEigenpairs, top_eigenpairs
from bilens.layer.hosvd import HOSVD
from bilens.layer.inner import LayerSimilarity, inner_products, layer_similarity, norms, traces
from bilens.layer.pairs import top_pairs
from bilens.layer.triples import Triples, top_triples

__all__ = [
    "HOSVD",
    "BilinearLayer",
    "Branches",
    "CPCurve",
    "CPDecomposition",
    "LayerSimilarity",
    "LeadingEigenpairs",
    "Triples",
    "best_squares",
    "branches",
    "constant_term",
    "cp_decompose",
    "hidden_coefficients",
    "inner_products",
    "interaction_matrix",
    "layer_similarity",
    "linear_term",
    "metric_eigenpairs",
    "moment",
    "norms",
    "pair_products",
    "shares_of",
    "sorted_eigenpairs",
    "top_eigenpairs",
    "top_pairs",
    "top_triples",
    "traces",
    "triple_coefficients",
]
