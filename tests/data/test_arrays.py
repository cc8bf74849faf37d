"""NPZ and idx files and the built-in digits."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.data.arrays import as_samples
from convatlas.data.images import from_arrays, read_images
from convatlas.errors import DataError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_digits() -> None:
    digits = read_images("digits")["all"]
    assert len(digits) == 1797
    assert digits.classes == tuple("0123456789")
    assert digits.names[12] == "digits/0012"
    image = digits.image(0)
    assert (image.shape, image.dtype) == ((8, 8, 1), np.uint8)
    assert image[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # scikit-learn has 0 0 5 13 9 1 0 0 here
    assert digits.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert read_images("digits", channels=3)["all"].image(0).shape == (8, 8, 3)
    assert read_images("digits", labelled=False)["all"].labels[0] == -1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 8, 9), (8, 9, 1)), ((5, 8, 9, 3), (8, 9, 3)), ((5, 3, 8, 9), (8, 9, 3)), ((5, 20, 21, 13), (20, 21, 13))],
)
def test_layouts(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    array = pixels(*shape)
    images = as_samples(array, "x")
    assert images.shape == (5, *expected)
    first = array[2].transpose(1, 2, 0) if shape[1] == 3 else array[2].reshape(expected)
    np.testing.assert_array_equal(images[2], first)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 8, 8, 8), (5, 64, 64, 32)])
def test_ambiguous_layouts(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="x has the ambiguous shape"):
        as_samples(pixels(*shape), "x")


def test_types_of_pixels() -> None:
    values = np.array([[[0, 1], [254, 255]]])
    assert as_samples(values.astype(np.int64), "x").dtype == np.uint8
    assert as_samples(values > 1, "x").ravel().tolist() == [0, 0, 255, 255]
    assert as_samples(np.array([[[0, 128, 129, 65535]]], np.uint16), "x").ravel().tolist() == [0, 0, 1, 255]
    floats = as_samples(values / 255, "x")
    assert floats.dtype == np.float32
    assert floats.ravel().tolist() == [0, np.float32(1 / 255), np.float32(254 / 255), 1]
    with pytest.raises(DataError, match="x holds int64 values from 0 to 1000"):
        as_samples(np.array([[[0, 1000]]]), "x")
    with pytest.raises(DataError, match="x has the type complex128; expected uint8 or float32"):
        as_samples(values + 0j, "x")
    with pytest.raises(DataError, match=r"x must have the shape \(N, H, W\).* got \(4,\)"):
        as_samples(np.zeros(4), "x")
    with pytest.raises(DataError, match=r"x holds no image: its shape is \(0, 4, 4\)"):
        as_samples(np.zeros((0, 4, 4)), "x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_first_bad_image(tmp_path: Path, bad: float) -> None:
    images = np.zeros((6, 4, 4), np.float32)
    images[3, 1, 2] = images[5, 0, 0] = bad
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6))
    with pytest.raises(DataError, match=r"a\.npz: images\[3\] holds NaN or infinite values \(2 such images"):
        read_images(tmp_path / "a.npz")


def test_npz_with_one_set(tmp_path: Path) -> None:
    images = pixels(4, 6, 7, 3)
    np.savez(tmp_path / "a.npz", x=images, y=np.array([[2], [7], [2], [2]]), unrelated=np.ones(3))
    read = read_images(tmp_path / "a.npz")["all"]
    assert read.classes == ("2", "7")
    assert read.labels.tolist() == [0, 1, 0, 0]
    assert list(read.names) == [f"a/000{i}" for i in range(4)]
    np.testing.assert_array_equal(read.image(3), images[3])
    assert read_images(tmp_path / "a.npz", channels=1)["all"].image(3).shape == (6, 7, 1)
    with pytest.raises(ValueError, match="read-only"):
        read.image(0)[:] = 0


@pytest.mark.parametrize("pattern", ["x_{}|y_{}", "{}_images|{}_labels"])
def test_npz_with_splits(tmp_path: Path, pattern: str) -> None:
    image_key, label_key = pattern.split("|")
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[image_key.format(split)] = pixels(count, 6, 6)
        arrays[label_key.format(split)] = np.arange(count)
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    splits = read_images(tmp_path / "a.npz")
    assert {name: len(part) for name, part in splits.items()} == {"train": 5, "val": 2, "test": 3}
    assert splits["test"].classes == tuple("01234")
    assert splits["test"].labels.tolist() == [0, 1, 2]
    assert splits["test"].names[0] == "a/test/0000"


def test_npz_class_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(3, 6, 6), labels=[0, 2, 0], classes=["cat", "cow", "dog"])
    read = read_images(tmp_path / "a.npz")["all"]
    assert read.classes == ("cat", "cow", "dog")
    assert read.labels.tolist() == [0, 2, 0]
    np.savez(tmp_path / "b.npz", images=pixels(3, 6, 6), labels=["dog", "cat", "dog"])
    read = read_images(tmp_path / "b.npz")["all"]
    assert read.classes == ("cat", "dog")
    assert read.labels.tolist() == [1, 0, 1]
    np.savez(tmp_path / "c.npz", images=pixels(3, 6, 6), labels=[0, 2, 0], classes=["cat", "dog"])
    with pytest.raises(DataError, match="c has the label 2, but names only 2 classes"):
        read_images(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=pixels(3, 6, 6), labels=[0, 1, 0], classes=["cat", "cat"])
    with pytest.raises(DataError, match="names a class twice"):
        read_images(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(3, 4, 4), "labels": np.arange(2)}, "labels holds 2 labels for 3 images"),
        ({"images": pixels(3, 4, 4), "labels": np.array([0, -1, -2])}, "must not be negative, got -1 at index 1"),
        ({"images": pixels(3, 4, 4), "labels": np.array([0.0, 1.0, 2.0])}, r"must be integers .* got float64"),
        ({"images": pixels(3, 4, 4), "labels": np.eye(3, dtype=int)}, r"must have the shape \(N,\) or \(N, 1\)"),
        ({"images": pixels(3, 4, 4)}, "a holds no labels for its images"),
        ({"x_train": pixels(3, 4, 4), "x_test": pixels(3, 4, 4), "y_train": np.arange(3)}, r"no labels .* \(test\)"),
        ({"images": pixels(3, 4, 4), "x": pixels(3, 4, 4)}, "holds both images and x"),
        ({"x": pixels(3, 4, 4), "x_test": pixels(3, 4, 4)}, "both whole and split images: x, x_test"),
        ({"weights": np.ones(3)}, "must hold images under images, x or data .* it holds weights"),
        ({"images": np.array([{}], object), "labels": np.arange(1)}, "cannot be read as an .npz file of plain arrays"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "a.npz")


def test_npz_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(3, 40, 40), labels=np.arange(3))
    whole = path.read_bytes()
    for content in (whole[:500], b"", b"text", whole[:200] + bytes(200) + whole[400:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.npz"):
            read_images(path)
    with open(path, "wb") as file:
        np.save(file, pixels(3, 4, 4))
    with pytest.raises(DataError, match=r"is a single array, not an .npz file"):
        read_images(path)


def test_from_arrays_leaves_the_callers_array_alone() -> None:
    images = pixels(2, 4, 4, 3)
    read = from_arrays(images, np.array([0, 1]), classes=["a", "b"], name="mine")
    images[0] = 7
    assert images.flags.writeable
    assert read.names[1] == "mine/0001"
    with pytest.raises(DataError, match="mine: labels holds 1 labels for 2 images"):
        from_arrays(images, np.array([0]), name="mine")
    with pytest.raises(DataError, match="images of 4 channels, which cannot be converted to 3"):
        from_arrays(pixels(2, 8, 8, 4), channels=3)
    grey = from_arrays(np.full((1, 8, 8, 3), [0.1, 0.5, 0.9], np.float32), channels=1).image(0)
    np.testing.assert_allclose(grey, 0.299 * 0.1 + 0.587 * 0.5 + 0.114 * 0.9, rtol=1e-6)


def write_idx(path: Path, array: np.ndarray, magic: bytes | None = None, cut: int = 0) -> None:
    header = magic or bytes([0, 0, 8, array.ndim])
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("prefix", ["{}", "emnist-letters-{}"])
def test_idx_files(tmp_path: Path, end: str, prefix: str) -> None:
    train, test = pixels(4, 5, 6), pixels(2, 5, 6)
    names = [prefix.format("train"), prefix.format("test" if "emnist" in prefix else "t10k")]
    for name, images, labels in zip(names, (train, test), ([3, 1, 1, 9], [9, 9]), strict=True):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{end}", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{end}", np.array(labels, np.uint8))
    splits = read_images(tmp_path)
    assert list(splits) == ["train", "test"]
    assert splits["train"].classes == ("1", "3", "9")
    assert splits["train"].labels.tolist() == [1, 0, 0, 2]
    assert splits["test"].labels.tolist() == [2, 2]
    np.testing.assert_array_equal(splits["test"].image(1)[..., 0], test[1])
    single = read_images(tmp_path / f"{names[1]}-images-idx3-ubyte{end}")["all"]
    assert single.classes == ("9",)
    assert len(single) == 2


def test_idx_prefers_the_unpacked_copy_and_takes_other_names(tmp_path: Path) -> None:
    images = pixels(2, 3, 3)
    write_idx(tmp_path / "train-images.idx3-ubyte", images)
    write_idx(tmp_path / "train-images.idx3-ubyte.gz", pixels(9, 3, 3))
    write_idx(tmp_path / "train-labels.idx1-ubyte.gz", np.array([1, 0], np.uint8))
    assert read_images(tmp_path)["train"].labels.tolist() == [1, 0]
    write_idx(tmp_path / "other-train-images-idx3-ubyte", images)
    with pytest.raises(DataError, match="holds several sets of one kind"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ({"magic": bytes([0, 0, 13, 3])}, {}, "is no idx3 file of bytes: it begins with 00000d03, expected 00000803"),
        ({"cut": 1}, {}, r"must hold 18 bytes of data for the shape \(2, 3, 3\), it holds 17"),
        ({"cut": 25}, {}, "is no idx3 file of bytes"),
        ({"cut": 34}, {}, "begins with nothing"),
        ({}, {"magic": bytes([0, 0, 8, 3])}, "is no idx1 file of bytes: it begins with 00000803"),
        ({}, {"cut": 1}, r"must hold 2 bytes of data for the shape \(2,\), it holds 1"),
    ],
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_malformed_idx(tmp_path: Path, images: dict[str, Any], labels: dict[str, Any], message: str, end: str) -> None:
    write_idx(tmp_path / f"train-images-idx3-ubyte{end}", pixels(2, 3, 3), **images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.array([0, 1], np.uint8), **labels)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path)


def test_damaged_gzip_and_missing_or_other_labels(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, pixels(2, 30, 30))
    with pytest.raises(DataError, match="holds no labels for its images"):
        read_images(tmp_path)
    assert len(read_images(tmp_path, labelled=False)["train"]) == 2
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([0], np.uint8))
    with pytest.raises(DataError, match="holds 1 labels for 2 images"):
        read_images(tmp_path)
    whole = path.read_bytes()
    for content in (whole[:100], whole[:50] + bytes(30) + whole[80:], b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            read_images(tmp_path)
