"""Interaction tensors, eigencircuits, and the `Decomposer` over them."""

from bilens.decompose.comparison import FidelityComparison
from bilens.decompose.decomposer import Decomposer
from bilens.decompose.directions import head_basis, through_ov, token_basis
from bilens.decompose.explanation import Explanation
from bilens.decompose.feature import FeatureCircuit, RankedFeatures, feature_circuit, rank_features
from bilens.decompose.fidelity import Fidelity
from bilens.decompose.firing import Firing, FiringSpectra
from bilens.decompose.gallery import GalleryEntry, MotifGallery, motif_gallery
from bilens.decompose.interactions import Interactions
from bilens.decompose.layers import strongest_interactions
from bilens.decompose.motifs import Motifs
from bilens.decompose.replacing import replace_mlp
from bilens.decompose.results import Attribution
from bilens.decompose.similarity import FeatureClusters, FeatureCosines, Neighbours
from bilens.decompose.sparsity import Sparsity
from bilens.decompose.spectra import Spectra
from bilens.decompose.sweep import Sweep, sweep_layers
from bilens.layer.eigen.circuits import Eigencircuits
from bilens.layer.inner import LayerSimilarity, layer_similarity

__all__ = [
    "Attribution",
    "Decomposer",
    "Eigencircuits",
    "Explanation",
    "FeatureCircuit",
    "FeatureClusters",
    "FeatureCosines",
    "Fidelity",
    "FidelityComparison",
    "Firing",
    "FiringSpectra",
    "GalleryEntry",
    "Interactions",
    "LayerSimilarity",
    "MotifGallery",
    "Motifs",
    "Neighbours",
    "RankedFeatures",
    "Sparsity",
    "Spectra",
    "Sweep",
    "feature_circuit",
    "head_basis",
    "layer_similarity",
    "motif_gallery",
    "rank_features",
    "replace_mlp",
    "strongest_interactions",
    "sweep_layers",
    "through_ov",
    "token_basis",
]
