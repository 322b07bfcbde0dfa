"""The configuration of a bilinear image classifier, and its translation from and to the published `config.json`."""

from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from bilens.errors import CheckpointError
from bilens.model.config import check_positive_integers, check_switches

SIZE_KEYS = ("d_input", "d_hidden", "d_output", "n_layer")
SWITCH_KEYS = ("bias", "residual")


@dataclass(frozen=True)
class ClassifierConfig:
    """The architecture of a `BilinearClassifier`, in the published names.

    Args:
        d_input: pixels of an image.
        d_hidden: width of the residual stream, and hidden units of every layer.
        d_output: classes.
        n_layer: bilinear layers.
        bias: true gives both branches biases.
        residual: true lets a layer add its input.
        height, width: the size of an image; a square if they are not given and `d_input` is a square number.
        class_names: one per class; their numbers where they are not given.
        published: the `config.json` as it was read, keys that bilens does not use included.
    """

    d_input: int
    d_hidden: int
    d_output: int
    n_layer: int = 1
    bias: bool = False
    residual: bool = False
    height: int | None = None
    width: int | None = None
    class_names: tuple[str, ...] | None = None
    published: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_positive_integers(vars(self), SIZE_KEYS)
        check_switches(vars(self), SWITCH_KEYS)
        for key in ("height", "width"):
            if getattr(self, key) is not None:
                check_positive_integers(vars(self), (key,))
        if self.height is not None and self.width is not None and self.height * self.width != self.d_input:
            raise CheckpointError(
                f"config.json: {self.height} x {self.width} pixels are not the {self.d_input} of d_input."
            )
        if self.class_names is not None and len(self.class_names) != self.d_output:
            raise CheckpointError(
                f"config.json: class_names has {len(self.class_names)} names, d_output is {self.d_output}."
            )

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width of an image; `None` where they are not given and `d_input` is no square."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        side = isqrt(self.d_input)
        return (side, side) if side * side == self.d_input else None

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every class."""
        return self.class_names or tuple(map(str, range(self.d_output)))


def classifier_config_from_published(published: dict[str, Any]) -> ClassifierConfig:
    """Read a published `config.json`.

    Args:
        published: the JSON object; needs `d_input d_hidden d_output n_layer`. An absent `bias` or `residual` is false,
            as in the authors' code.

    Raises:
        CheckpointError: a needed key is missing, or a value is not of its kind.
    """
    check_positive_integers(published, SIZE_KEYS)
    keys = (*SIZE_KEYS, *SWITCH_KEYS, "height", "width")
    names = published.get("class_names")
    if not isinstance(names, list | tuple | None):
        raise CheckpointError(f"config.json: class_names is {names!r:.100}, expected a list of names.")
    return ClassifierConfig(
        **{key: published[key] for key in keys if key in published},
        class_names=None if names is None else tuple(map(str, names)),
        published=dict(published),
    )


def classifier_config_to_published(cfg: ClassifierConfig) -> dict[str, Any]:
    """The published `config.json`: what was read, overwritten by what the model is now."""
    optional = {"height": cfg.height, "width": cfg.width, "class_names": cfg.class_names and list(cfg.class_names)}
    return {
        **cfg.published,
        **{key: getattr(cfg, key) for key in (*SIZE_KEYS, *SWITCH_KEYS)},
        **{key: value for key, value in optional.items() if value is not None},
    }
