"""All recipes by name, in the order of the paper. Nothing heavy is imported: the list is there at once."""

from bilens.errors import ArgumentError, nearest
from bilens.reproduce.reproduction import Kind, Recipe

_RECIPES: list[tuple[str, str, str, Kind, str]] = [
    (
        "quadratic",
        "figure 2A",
        "an eigenvector's activation is a parabola in the image: it fires on a pattern and on its negative",
        "images",
        "eigenvectors:quadratic",
    ),
    (
        "eigenfeatures",
        "figures 2B, 3, 10 to 12, and 15 and 16",
        "what every class of an image classifier looks for",
        "images",
        "eigenvectors:eigenvectors",
    ),
    (
        "regularisation",
        "figure 4 (section 4.1)",
        "eigenfeatures under more and more input noise",
        "images",
        "regularised:noise",
    ),
    (
        "stability",
        "figure 5 (section 4.2)",
        "eigenfeatures of equal rank across seeds, and how few of them are enough",
        "images",
        "sizes:stability",
    ),
    (
        "similarity-task",
        "figure 6 (section 4.3)",
        "a classifier whose labels follow a known rule, with biases: the rule is in its first eigenvector",
        "images",
        "similarity_task:similarity_task",
    ),
    (
        "masks",
        "figures 7 and 26 (section 4.4)",
        "images that change predictions, from the weights alone: the paper's masks and ours",
        "images",
        "attacks:masks",
    ),
    (
        "low-rank",
        "figure 9 (section 5.2)",
        "how well the leading eigenvectors of an output feature reproduce its activation on text",
        "language",
        "low_rank:low_rank",
    ),
    (
        "augmentation",
        "figures 13 and 14 (appendix B)",
        "eigenfeatures under translation, rotation and blur, each with and without noise",
        "images",
        "regularised:augmentation",
    ),
    (
        "structure",
        "figures 17 and 18 (appendix D)",
        "mixtures of classes by importance (HOSVD); and, beyond the paper, shared neurons and a deeper model",
        "images",
        "structure:structure",
    ),
    (
        "sparsity",
        "figure 19 (appendix E)",
        "how many eigenvalues and pixels matter, under noise and weight decay",
        "images",
        "regularised:sparsity",
    ),
    (
        "sizes",
        "figure 20 (appendix F)",
        "eigenfeatures and truncation across sizes of the model",
        "images",
        "sizes:sizes",
    ),
    (
        "sae-loss",
        "figure 23 (appendix G.3)",
        "what SAEs add to the loss, layer by layer",
        "language",
        "sae_quality:sae_loss",
    ),
    (
        "training-time",
        "figure 24 and table 5 (appendix H)",
        "how low-rank features look, against how long their SAE was trained",
        "language",
        "sae_quality:training_time",
    ),
    (
        "activation-functions",
        "table 6 (appendix I)",
        "the loss of bilinear, ReGLU and SwiGLU models of equal size, for equal data and equal time",
        "language",
        "activation_functions:activation_functions",
    ),
    (
        "re-expressed",
        "appendix K",
        "a layer rebuilt from the eigenvectors of its output features, through a pseudo-inverse",
        "language",
        "reexpressed:reexpressed_layer",
    ),
    (
        "interactions",
        "figure 27 (appendix N)",
        "self- and cross-interactions of a feature, and its eigenvalues against a random matrix",
        "language",
        "interactions:interactions",
    ),
]

RECIPES: dict[str, Recipe] = {entry[0]: Recipe(*entry) for entry in _RECIPES}
"""All there are, by name."""


def recipe(name: str) -> Recipe:
    """One of them.

    Raises:
        ArgumentError: no such recipe.
    """
    if name not in RECIPES:
        raise ArgumentError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}." + nearest(name, RECIPES))
    return RECIPES[name]
