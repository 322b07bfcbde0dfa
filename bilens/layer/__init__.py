"""One bilinear layer as matrices: interaction matrices, eigenpairs, higher-order SVD, CP, inner products."""

from bilens.layer.bilinear import interaction_matrix
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.layer.eigen.solve import LeadingEigenpairs, top_eigenpairs

__all__ = ["LeadingEigenpairs", "interaction_matrix", "sorted_eigenpairs", "top_eigenpairs"]
