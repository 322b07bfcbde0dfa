"""All recipes by name, in the order of the paper. Nothing heavy is imported: the list is there at once."""

from bilens.errors import ArgumentError, nearest
from bilens.reproduce.reproduction import Recipe

_IMAGES = ("images",)
_LAYERS = ("model", "saes", "layer", "expansion", "k", "texts")
_RECIPES: list[tuple[str, str, str, tuple[str, ...], str]] = [
    (
        "quadratic",
        "figure 2A",
        "an eigenvector's activation is a parabola in the image: it fires on a pattern and on its negative",
        _IMAGES,
        "eigenvectors:quadratic",
    ),
    (
        "eigenfeatures",
        "figures 2B, 3, 10 to 12, and 15 and 16",
        "what every class of an image classifier looks for",
        _IMAGES,
        "eigenvectors:eigenvectors",
    ),
    (
        "regularisation",
        "figure 4 (section 4.1)",
        "eigenfeatures under more and more input noise",
        _IMAGES,
        "regularised:noise",
    ),
    (
        "stability",
        "figure 5 (section 4.2)",
        "eigenfeatures of equal rank across seeds, and how few of them are enough",
        _IMAGES,
        "sizes:stability",
    ),
    (
        "similarity-task",
        "figure 6 (section 4.3)",
        "a classifier whose labels follow a known rule, with biases: the rule is in its first eigenvector",
        _IMAGES,
        "similarity_task:similarity_task",
    ),
    (
        "masks",
        "figures 7 and 26 (section 4.4)",
        "images that change predictions, from the weights alone: the paper's masks and ours",
        _IMAGES,
        "attacks:masks",
    ),
    (
        "low-rank",
        "figure 9 (section 5.2)",
        "how well the leading eigenvectors of an output feature reproduce its activation on text",
        _LAYERS,
        "low_rank:low_rank",
    ),
    (
        "augmentation",
        "figures 13 and 14 (appendix B)",
        "eigenfeatures under translation, rotation and blur, each with and without noise",
        _IMAGES,
        "regularised:augmentation",
    ),
    (
        "structure",
        "figures 17 and 18 (appendix D)",
        "mixtures of classes by importance (HOSVD); and, beyond the paper, shared neurons and a deeper model",
        _IMAGES,
        "structure:structure",
    ),
    (
        "sparsity",
        "figure 19 (appendix E)",
        "how many eigenvalues and pixels matter, under noise and weight decay",
        _IMAGES,
        "regularised:sparsity",
    ),
    (
        "sizes",
        "figure 20 (appendix F)",
        "eigenfeatures and truncation across sizes of the model",
        _IMAGES,
        "sizes:sizes",
    ),
    (
        "sae-loss",
        "figure 23 (appendix G.3)",
        "what SAEs add to the loss, layer by layer",
        _LAYERS,
        "sae_quality:sae_loss",
    ),
    (
        "training-time",
        "figure 24 and table 5 (appendix H)",
        "how low-rank features look, against how long their SAE was trained",
        ("model", "layer", "texts"),
        "sae_quality:training_time",
    ),
    (
        "activation-functions",
        "table 6 (appendix I)",
        "the loss of bilinear, ReGLU and SwiGLU models of equal size, for equal data and equal time",
        ("model", "texts"),
        "activation_functions:activation_functions",
    ),
    (
        "re-expressed",
        "appendix K",
        "a layer rebuilt from the eigenvectors of its output features, through a pseudo-inverse",
        _LAYERS,
        "reexpressed:reexpressed_layer",
    ),
    (
        "interactions",
        "figure 27 (appendix N)",
        "self- and cross-interactions of a feature, and its eigenvalues against a random matrix",
        _LAYERS,
        "interactions:interactions",
    ),
]

_PROGRAMS = Recipe(
    "programs",
    "known programs",
    "how often the rules of models are found of which it is known what they compute",
    ("model",),
    "programs:programs",
    paper="no paper: a scoreboard",
)
RECIPES: dict[str, Recipe] = {one.name: one for one in (*(Recipe(*entry) for entry in _RECIPES), _PROGRAMS)}
"""All there are, by name."""


def recipe(name: str) -> Recipe:
    """One of them.

    Raises:
        ArgumentError: no such recipe.
    """
    if name not in RECIPES:
        raise ArgumentError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}." + nearest(name, RECIPES))
    return RECIPES[name]
