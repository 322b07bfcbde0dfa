"""Labelled images from wherever they are, as tensors from 0 to 1.

1. find the reader: a name (`digits`, `mnist`, `fashion_mnist`), a folder of idx files, an `.npz` file, or what
   `datasets` reads (a hub id, a folder of parquet or image files)
2. the reader gives raw arrays: training images and labels and, where the source has them, test ones
3. `ImageDataset.from_arrays` checks them, scales brightness to 0..1, names the classes, and splits off a seeded test
   part where there is none
"""

import gzip
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_seeds
from bilens._core.extras import need
from bilens._core.files import regular_file, to_path
from bilens.errors import ArgumentError, CheckpointError, ImageDataError, ModelNotFoundError, nearest
from bilens.model.files import HUB_ID

HUB_SOURCES = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
SOURCES = ("digits", *HUB_SOURCES)
# idx: two zero bytes, this type, the number of dimensions, each dimension as four bytes, then the numbers, big-endian.
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
IDX_PARTS = {"train": ("train",), "test": ("t10k", "test")}
MAX_BYTES = 2**31  # of one array: what a header asks for is not made before it is believed
MAX_CLASSES = 2**16
DATA_SUFFIXES = (".parquet", ".arrow", ".zip", ".tar", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tiff", ".webp")
LOOKED_AT = 10_000  # entries of a folder, before it is taken to hold no images
ARRAY_NAMES = {  # of an .npz file: Keras' MNIST, MedMNIST, and plain ones
    "train images": ("train_images", "x_train", "images", "x", "data"),
    "train labels": ("train_labels", "y_train", "labels", "y", "target"),
    "test images": ("test_images", "x_test"),
    "test labels": ("test_labels", "y_test"),
}


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Grey images from 0 to 1 with their classes.

    Args:
        train_images, test_images: brightness, 0 to 1.
        train_labels, test_labels: indices into `class_names`.
        class_names: one per class.
        source: the source it came from.
    """

    train_images: Float[Tensor, "train height width"] = field(repr=False)
    train_labels: Int[Tensor, "train"] = field(repr=False)
    test_images: Float[Tensor, "test height width"] = field(repr=False)
    test_labels: Int[Tensor, "test"] = field(repr=False)
    class_names: tuple[str, ...]
    source: str = "arrays"

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return self.train_images.shape[1]

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return self.train_images.shape[2]

    @property
    def d_input(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def __str__(self) -> str:
        return (
            f"{self.source}: {len(self.train_images)} training and {len(self.test_images)} test images, "
            f"{self.height} x {self.width}, {self.n_classes} classes ({', '.join(self.class_names)})"
        )

    @classmethod
    def from_arrays(
        cls,
        train_images: Any,
        train_labels: Any,
        test_images: Any = None,
        test_labels: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        test_share: float = 0.2,
        seed: int = 0,
        source: str = "arrays",
    ) -> "ImageDataset":
        """Check and scale arrays or tensors.

        Args:
            train_images, test_images: `(n, height, width)`, or with one channel before or after; whole numbers from 0
                to 255, or floating point from 0 to 1.
            train_labels, test_labels: whole numbers from 0, or names (then the classes are the names in order).
            class_names: one per class; their numbers by default.
            test_share: the share of the images that is set aside for testing if there are no test images.
            seed: the seed of that split.
            source: shown in messages.

        Raises:
            ImageDataError: shapes, values or labels that do not fit, or no images.
            ArgumentError: a share outside 0 to 1, or class names that are none.
        """
        if (test_images is None) != (test_labels is None):
            raise ImageDataError(f"{source}: test images and test labels go together; one of them is missing.")
        check_seeds(seed=seed)
        if not isinstance(test_share, int | float) or not 0 < test_share < 1:
            raise ArgumentError(f"test_share is {test_share!r}, expected a number between 0 and 1.")
        if class_names is not None and not (
            isinstance(class_names, list | tuple) and all(isinstance(name, str) for name in class_names)
        ):
            raise ArgumentError(f"class_names is {class_names!r:.100}, expected a list of names.")
        images = _images(train_images, source)
        labels, names = _labels(train_labels, len(images), class_names, source)
        if test_images is not None:
            tests = _images(test_images, source)
            if tests.shape[1:] != images.shape[1:]:
                shapes = [" x ".join(map(str, part.shape[1:])) for part in (images, tests)]
                raise ImageDataError(f"{source}: training images are {shapes[0]}, test images {shapes[1]}.")
            strings = not _is_whole(_array(train_labels, source))
            known = names if class_names is not None or strings else None
            test_classes, test_names = _labels(test_labels, len(tests), known, source)
            names = max(names, test_names, key=len)
            return cls(images, labels, tests, test_classes, names, source)
        held = round(test_share * len(images))
        if not 0 < held < len(images):
            raise ImageDataError(f"{source}: {len(images)} images cannot be split into training and test images.")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = order[held:], order[:held]
        return cls(images[train], labels[train], images[test], labels[test], names, source)


def load_images(
    source: "str | os.PathLike[str] | ImageDataset", *, test_share: float = 0.2, seed: int = 0
) -> ImageDataset:
    """Labelled images.

    Args:
        source: `"digits"` (8 x 8, comes with scikit-learn), `"mnist"` or `"fashion_mnist"` (28 x 28, from the hub
            through `datasets`), another hub id, a folder of idx files (`train-images-idx3-ubyte`,
            `t10k-labels-idx1-ubyte.gz`, ...), of parquet or of image files, an `.npz` file with `x_train, y_train`,
            `train_images, train_labels` or `images, labels` (and `x_test, y_test`, ... for testing); or a dataset,
            which is returned as it is.
        test_share: set aside for testing where the source has no test part.
        seed: the seed of that split.

    Raises:
        ImageDataError: nothing there (with the nearest name), a damaged file, or images and labels that do not fit.
        ArgumentError: a source that is neither text nor a path, or a share outside 0 to 1.
        MissingPackageError: `digits` without scikit-learn, or pictures without pillow.
    """
    if isinstance(source, ImageDataset):
        return source
    name, path = str(source), to_path(source, "source")
    class_names: Sequence[str] | None = None
    if name == "digits":
        arrays = _digits()
    elif name in HUB_SOURCES:
        arrays, class_names = _from_datasets(HUB_SOURCES[name])
    elif path.is_dir():
        idx = _idx_files(path)
        if idx:
            arrays = _from_idx(path, idx)
        elif _holds_data(path):
            arrays, class_names = _from_datasets(str(path))
        else:
            raise ImageDataError(f"{path} holds no idx files, no parquet and no image files.")
    elif path.suffix == ".npz" and path.exists():
        arrays = _from_npz(path)
    elif path.exists():
        raise ImageDataError(f"{path} is a file of no known kind; expected an .npz file, or a folder.")
    elif HUB_ID.fullmatch(name) and path.suffix != ".npz":
        arrays, class_names = _from_datasets(name)
    else:
        raise ImageDataError(
            f"no images {name!r}: not one of {', '.join(SOURCES)}, not a folder or .npz file (in {Path.cwd()}), and "
            f"not a hub id of the form owner/name.{nearest(name, SOURCES)}"
        )
    return ImageDataset.from_arrays(*arrays, class_names=class_names, test_share=test_share, seed=seed, source=name)


# --- readers: (train images, train labels[, test images, test labels]) ------------------------------------------------


def _digits() -> tuple[Any, ...]:
    digits = need("sklearn.datasets", "vision", "The data set 'digits'").load_digits()
    return digits.images / 16, digits.target


def _from_datasets(name: str) -> tuple[tuple[Any, ...], list[str] | None]:
    """Arrays and class names of a hub dataset, or of a folder that `datasets` reads."""
    from datasets import ClassLabel, Image, load_dataset

    need("PIL", "vision", "Reading images from parquet or image files")
    try:
        data = load_dataset(name)
    # Of the hub, the cache and the readers of the formats; DatasetGenerationError is none of the builtins' children.
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        offline = "" if Path(name).exists() else " What comes with scikit-learn needs no connection: 'digits'."
        raise ImageDataError(f"datasets cannot read {name!r} ({type(error).__name__}: {reason}).{offline}") from error
    train = data["train"] if "train" in data else data[next(iter(data))]
    features = train.features
    image = next((key for key, feature in features.items() if isinstance(feature, Image)), None)
    label = next((key for key, feature in features.items() if isinstance(feature, ClassLabel)), None)
    label = label or ("label" if "label" in features else None)
    if image is None or label is None:
        raise ImageDataError(f"{name}: expected a column of images and one of labels; it has {dict(features)}.")
    arrays: list[Any] = []
    for part in [train, *([data["test"]] if "test" in data else [])]:
        arrays += [_grey(part, image, name), part.with_format("numpy")[label][:]]
    names = features[label].names if isinstance(features[label], ClassLabel) else None
    return tuple(arrays), names


def _grey(part: Any, column: str, name: str) -> np.ndarray:
    """A column of pictures as bytes of brightness."""
    from tqdm.auto import tqdm

    pictures = part.select_columns(column)
    grey = [np.asarray(row[column].convert("L")) for row in tqdm(pictures, desc=f"reading {name}", unit="image")]
    sizes = {picture.shape for picture in grey}
    if len(sizes) > 1:
        raise ImageDataError(f"{name}: images of {len(sizes)} sizes, such as {sorted(sizes)[:3]}; expected one.")
    return np.stack(grey) if grey else np.zeros((0, 0, 0), np.uint8)


def _idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """The idx files of a folder by part (train, test) and kind (images, labels)."""
    found = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.lower()
        for part, words in IDX_PARTS.items():
            for kind in ("images", "labels"):
                if "idx" in stem and kind in stem and stem.startswith(words):
                    found[part, kind] = path
    return found


def _from_idx(folder: Path, files: dict[tuple[str, str], Path]) -> tuple[Any, ...]:
    arrays: list[Any] = []
    for part in IDX_PARTS:
        kinds = [kind for kind in ("images", "labels") if (part, kind) in files]
        if len(kinds) == 1:
            raise ImageDataError(
                f"{folder} has {files[part, kinds[0]].name} but no idx file with the other half of it."
            )
        arrays += [read_idx(files[part, kind]) for kind in kinds]
    return tuple(arrays)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an idx file, gzipped or not (http://yann.lecun.com/exdb/mnist).

    Raises:
        ImageDataError: not idx, truncated, or longer than its header says.
    """
    path = _regular(to_path(path))
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_TYPES:
                raise ImageDataError(f"{path} is no idx file: it starts with {start!r}.")
            dtype, sizes = np.dtype(IDX_TYPES[start[2]]), file.read(4 * start[3])
            shape = struct.unpack(f">{start[3]}I", sizes) if len(sizes) == 4 * start[3] else (0,)
            wanted = prod(shape) * dtype.itemsize
            if wanted > MAX_BYTES:
                raise ImageDataError(f"{path}: its header asks for {wanted:,} bytes, more than {MAX_BYTES:,}.")
            data = file.read(wanted + 1)
            held, asked = 4 + len(sizes) + len(data), 4 + 4 * start[3] + wanted
            if held != asked:
                more = " or more" if held > asked else ""
                raise ImageDataError(
                    f"{path} holds {held} bytes{more}, its header asks for {asked}. A truncated download?"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise ImageDataError(f"{path} cannot be read: {error}. A truncated download?") from error
    return np.frombuffer(data, dtype).reshape(shape)


def _from_npz(path: Path) -> tuple[Any, ...]:
    arrays: list[Any] = []
    try:
        with zipfile.ZipFile(_regular(path)) as archive:
            held = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            for what, names in ARRAY_NAMES.items():
                name = next((name for name in names if name in held), None)
                if name is None and what.startswith("train"):
                    raise ImageDataError(
                        f"{path}: no {what}; it holds {sorted(held)}, expected one of {', '.join(names)}."
                    )
                arrays.append(None if name is None else _npy(archive, held[name], path))
    # A header is a Python literal: what is wrong with it shows in many ways.
    except (
        *(OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
        *(SyntaxError, TokenError, TypeError, RecursionError, RuntimeError),
    ) as error:
        if isinstance(error, ImageDataError):
            raise
        raise ImageDataError(f"{path} cannot be read: {error}") from error
    return tuple(arrays)


def _npy(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array; its header's size is compared with the member's before the array is made."""
    member = archive.getinfo(name)
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        wanted, held = prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if not dtype.hasobject and (wanted != held or wanted > MAX_BYTES):
            raise ImageDataError(f"{path}: the header of {name} asks for {wanted:,} bytes, it holds {held:,}.")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _regular(path: Path) -> Path:
    try:
        return regular_file(path)
    except (CheckpointError, ModelNotFoundError) as error:
        raise ImageDataError(str(error)) from error


def _holds_data(folder: Path) -> bool:
    """Whether a folder has files that `datasets` reads; a large one without is not searched to its end."""
    files = (name for _, _, names in os.walk(folder) for name in (names or [""]))
    return any(name.lower().endswith(DATA_SUFFIXES) for name in islice(files, LOOKED_AT))


# --- checks -----------------------------------------------------------------------------------------------------------


def _array(given: Any, source: str) -> np.ndarray:
    try:
        return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (ValueError, TypeError) as error:
        raise ImageDataError(f"{source}: {type(given).__name__} is no array: {error}.") from error


def _images(given: Any, source: str) -> Float[Tensor, "n height width"]:
    images = _array(given, source)
    if images.ndim == 4 and 1 in (images.shape[1], images.shape[-1]):
        images = images.squeeze(1 if images.shape[1] == 1 else -1)
    if images.ndim != 3 or 0 in images.shape or images.dtype.kind not in "buif":
        raise ImageDataError(
            f"{source}: images are {images.dtype} of shape {images.shape}, expected numbers (n, height, width)."
        )
    if images.dtype.kind == "f":
        wrong, top = not (images.min() >= 0 and images.max() <= 1), 1  # a NaN is on neither side
    else:
        wrong, top = not (images.min() >= 0 and images.max() <= 255), 255
    if wrong:
        raise ImageDataError(
            f"{source}: {images.dtype} images go from {images.min()} to {images.max()}, expected 0 to {top}."
        )
    scaled = torch.from_numpy(np.array(images, dtype=np.float32))
    return scaled if images.dtype.kind in "bf" else scaled / 255


def _is_whole(labels: np.ndarray) -> bool:
    return labels.dtype.kind in "iu"


def _labels(
    given: Any, n: int, class_names: Sequence[str] | None, source: str
) -> tuple[Int[Tensor, "n"], tuple[str, ...]]:
    """Indices, and the names they index."""
    labels = _array(given, source)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (n,):
        raise ImageDataError(f"{source}: labels have shape {labels.shape}, expected one for each of {n} images.")
    if not _is_whole(labels):
        if labels.dtype.kind not in "US":
            raise ImageDataError(f"{source}: labels are {labels.dtype}, expected whole numbers or names.")
        words = labels.astype(str)
        names = sorted(set(words.tolist())) if class_names is None else list(class_names)
        index = {name: place for place, name in enumerate(names)}
        unknown = sorted(set(words.tolist()) - index.keys())
        if unknown:
            raise ImageDataError(f"{source}: label {unknown[0]!r} is no class.{nearest(unknown[0], names)}")
        labels = np.array([index[word] for word in words.tolist()])
        class_names = names
    n_classes = MAX_CLASSES if class_names is None else len(class_names)
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ImageDataError(
            f"{source}: labels go from {labels.min()} to {labels.max()}, expected 0 to {n_classes - 1}."
        )
    named = tuple(map(str, range(int(labels.max()) + 1))) if class_names is None else tuple(map(str, class_names))
    return torch.from_numpy(labels.astype(np.int64)), named
