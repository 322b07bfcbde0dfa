"""Every source of images gives the same tensors as the arrays it was made of."""

import gzip
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilens.errors import ArgumentError, ImageDataError
from bilens.vision.data import ImageDataset, load_images, read_idx

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(0, 256, (30, 5, 4), dtype=np.uint8), RNG.integers(0, 256, (10, 5, 4), dtype=np.uint8)
TRAIN_LABELS, TEST_LABELS = np.arange(30, dtype=np.uint8) % 3, np.arange(10, dtype=np.uint8) % 3


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the idx format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def is_it(data: ImageDataset) -> None:
    """Whether a dataset holds exactly the arrays above."""
    assert torch.equal(data.train_images, torch.from_numpy(TRAIN).float() / 255)
    assert torch.equal(data.test_images, torch.from_numpy(TEST).float() / 255)
    assert data.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert data.test_labels.tolist() == TEST_LABELS.tolist()
    assert (data.height, data.width, data.d_input, data.n_classes) == (5, 4, 20, 3)


def test_digits_come_with_scikit_learn() -> None:
    data = load_images("digits")
    assert (len(data.train_images), len(data.test_images)) == (1438, 359)
    assert (data.height, data.width, data.class_names) == (8, 8, tuple("0123456789"))
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    # The split is a permutation, decided by the seed.
    sums = torch.cat([data.train_images, data.test_images]).sum((1, 2)).sort().values
    other = load_images("digits", seed=1)
    assert not torch.equal(other.test_images, data.test_images)
    assert torch.equal(torch.cat([other.train_images, other.test_images]).sum((1, 2)).sort().values, sums)
    assert torch.equal(load_images("digits").test_images, data.test_images)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files(tmp_path: Path, packed: bool) -> None:
    for name, array in {
        "train-images-idx3-ubyte": TRAIN,
        "train-labels-idx1-ubyte": TRAIN_LABELS,
        "t10k-images-idx3-ubyte": TEST,
        "t10k-labels-idx1-ubyte": TEST_LABELS,
    }.items():
        data = idx(array)
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    is_it(load_images(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),  # Keras
        ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST: labels are a column there
    ],
)
def test_an_npz_file(tmp_path: Path, names: tuple[str, ...]) -> None:
    column = TRAIN_LABELS[:, None] if names[0] == "train_images" else TRAIN_LABELS
    np.savez(tmp_path / "a.npz", **dict(zip(names, (TRAIN, column, TEST, TEST_LABELS), strict=True)))
    is_it(load_images(tmp_path / "a.npz"))


@pytest.mark.usefixtures("datasets_cache")
def test_what_datasets_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of parquet files, and the hub's MNIST by its short name: `load_dataset` is given the id."""
    import datasets
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    parts = {"train": (TRAIN, TRAIN_LABELS), "test": (TEST, TEST_LABELS)}
    for part, (images, labels) in parts.items():
        rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}.parquet")
    data = load_images(tmp_path)
    is_it(data)
    assert data.class_names == ("a", "b", "c")
    asked: list[str] = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (asked.append(name), real(str(tmp_path)))[1])
    is_it(load_images("mnist"))
    assert asked == ["ylecun/mnist"]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ImageDataError, match=r"Couldn't reach zalando-datasets/fashion_mnist.*'digits'"):
        load_images("fashion_mnist")


def test_the_shared_images(shared: Path) -> None:
    """No training part there: 8,000 and 2,000 of the 10,000, brightness to the bit as the bytes over 255."""
    data = load_images(shared / "mnist")
    assert (len(data.train_images), len(data.test_images), data.n_classes) == (8000, 2000, 10)
    total = sum(part.double().mul(255).round().sum().item() for part in (data.train_images, data.test_images))
    assert total == read_idx(shared / "mnist" / "t10k-images-idx3-ubyte.gz").astype(np.int64).sum()


def test_arrays_of_every_kind() -> None:
    is_it(ImageDataset.from_arrays(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS))
    is_it(ImageDataset.from_arrays(TRAIN[:, None], torch.from_numpy(TRAIN_LABELS), TEST[..., None], TEST_LABELS))
    is_it(ImageDataset.from_arrays(torch.from_numpy(TRAIN) / 255, TRAIN_LABELS, TEST / np.float32(255), TEST_LABELS))
    words = np.array(["cat", "dog", "owl"])
    named = ImageDataset.from_arrays(TRAIN, words[TRAIN_LABELS], TEST, words[TEST_LABELS])
    is_it(named)
    assert named.class_names == ("cat", "dog", "owl")
    # A class that only the test images have is a class.
    assert ImageDataset.from_arrays(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS + 1).n_classes == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": TRAIN[0]}, r"images are uint8 of shape \(5, 4\), expected numbers \(n, height, width\)"),
        ({"train_images": TRAIN.astype(float)}, "float64 images go from 0.0 to 255.0, expected 0 to 1"),
        ({"train_images": TRAIN / np.nan}, "go from nan to nan, expected 0 to 1"),
        ({"train_images": TRAIN.astype(int) + 1}, "int64 images go from 1 to 256, expected 0 to 255"),
        ({"train_labels": TRAIN_LABELS[:7]}, r"labels have shape \(7,\), expected one for each of 30 images"),
        ({"train_labels": TRAIN_LABELS / 2}, "labels are float64, expected whole numbers or names"),
        ({"train_labels": TRAIN_LABELS.astype(int) - 1}, "labels go from -1 to 1, expected 0"),
        ({"class_names": ["a", "b"]}, "labels go from 0 to 2, expected 0 to 1"),
        ({"test_images": TEST[:, 1:]}, "training images are 5 x 4, test images 4 x 4"),
        ({"test_labels": None}, "one of them is missing"),
        (
            {"train_labels": np.array(["cat", "dog", "owl"])[TRAIN_LABELS], "test_labels": np.array(["dig"] * 10)},
            "label 'dig' is no class. Did you mean 'dog'",
        ),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arrays = {"train_images": TRAIN, "train_labels": TRAIN_LABELS, "test_images": TEST, "test_labels": TEST_LABELS}
    with pytest.raises(ImageDataError, match=message), np.errstate(invalid="ignore", divide="ignore"):
        ImageDataset.from_arrays(**(arrays | change))


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match="Did you mean 'fashion_mnist'"):
        load_images("fashion-mnist")
    with pytest.raises(ArgumentError, match=r"test_share is 1.0"):
        load_images("digits", test_share=1.0)
    (tmp_path / "a.csv").write_text("1,2\n")
    with pytest.raises(ImageDataError, match=r"a.csv is a file of no known kind"):
        load_images(tmp_path / "a.csv")
    np.savez(tmp_path / "a.npz", images=TRAIN)
    with pytest.raises(ImageDataError, match=r"no train labels; it holds \['images'\]"):
        load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=TRAIN, labels=np.array([{}] * 30))
    with pytest.raises(ImageDataError, match=r"b.npz cannot be read: Object arrays cannot be loaded"):
        load_images(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(ImageDataError, match=r"c.npz cannot be read"):
        load_images(tmp_path / "c.npz")


def test_damaged_idx_files(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    for data, message in (
        (idx(TRAIN)[:-1], "holds 615 bytes, its header asks for 616. A truncated download"),
        (idx(TRAIN)[:9], "holds 9 bytes, its header asks for 16"),
        (b"PK\3\4zip", "is no idx file: it starts with"),
        (b"", "is no idx file"),
        (gzip.compress(idx(TRAIN))[:-20], "cannot be read: .*A truncated download"),
    ):
        path.write_bytes(data)
        with pytest.raises(ImageDataError, match=message):
            read_idx(path)
    path.write_bytes(idx(TRAIN))
    with pytest.raises(ImageDataError, match="no idx file with the other half"):
        load_images(tmp_path)


def test_headers_are_not_believed(tmp_path: Path) -> None:
    """Terabytes in a header, and bytes that inflate without end, are refused before anything of that size is made."""
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**20, 4))
    with pytest.raises(ImageDataError, match=r"its header asks for 9,007,199,254,740,992 bytes, more than"):
        read_idx(path)
    path.write_bytes(gzip.compress(idx(TRAIN) + bytes(10**7)))
    with pytest.raises(ImageDataError, match="holds 617 bytes or more, its header asks for 616"):
        read_idx(path)
    for shape, message in (("(30, 5, 4000000000000)", "asks for 600,000,000,000,000 bytes"), ("(" * 80, "cannot be")):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("x_train.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(600))
        with pytest.raises(ImageDataError, match=message):
            load_images(tmp_path / "x.npz")


def test_only_regular_files_of_images_are_read(tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte", "x.npz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ImageDataError, match="a pipe, a socket or a device"):
            (load_images if name == "x.npz" else read_idx)(tmp_path / name)


@pytest.mark.parametrize(
    "top", [10**7, 2**62, np.uint64(2**63), np.uint64(2**64 - 1)], ids=["10^7", "2^62", "2^63", "2^64"]
)
def test_labels_of_any_size_are_refused_at_once(top: Any) -> None:
    """A name for each of 10^19 classes would fill the memory; so would 10^7."""
    labels = TRAIN_LABELS.astype(np.asarray(top).dtype)
    labels[3] = top
    with pytest.raises(ImageDataError, match=rf"labels go from 0 to {top}, expected 0 to 65535"):
        ImageDataset.from_arrays(TRAIN, labels)


@pytest.mark.parametrize("source", [None, 5, b"digits", ["digits"], "", "a\0b", "x" * 300, "~nobody-at/x"], ids=repr)
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^source "):
        load_images(source)


@pytest.mark.parametrize(
    "images", [None, "abc", [[1], [1, 2]], {"a": 1}, object()], ids=lambda value: type(value).__name__
)
def test_what_is_no_array(images: Any) -> None:
    with pytest.raises(ImageDataError):
        ImageDataset.from_arrays(images, TRAIN_LABELS)
    with pytest.raises(ImageDataError):
        ImageDataset.from_arrays(TRAIN, images)


def test_a_large_folder_without_images_is_not_searched(tmp_path: Path) -> None:
    for source in (tmp_path, Path("/proc")):
        with pytest.raises(ImageDataError, match="holds no idx files, no parquet and no image files"):
            load_images(source)
