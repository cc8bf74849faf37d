"""Images kept as arrays, validated: NPZ files, MNIST-format idx files and scikit-learn's handwritten digits."""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError

__all__ = ["Arrays", "as_labels", "as_samples", "digits", "idx_files", "read_idx", "read_npz"]

_IMAGE_KEYS = ("images", "image", "x", "data")
_LABEL_KEYS = ("labels", "label", "y", "targets", "target")
_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IDX_NAME = re.compile(r"(?P<stem>.*?)[-._]?(?P<kind>images|labels)[-.]idx[13]-ubyte(?:\.gz)?", re.IGNORECASE)
_MAX_CHANNELS = 16


class Arrays(NamedTuple):
    """One split: images (N, H, W, C), uint8 or float32, and labels (N,), int64 or strings, or None."""

    images: npt.NDArray[Any]
    labels: npt.NDArray[Any] | None


def as_samples(array: npt.NDArray[Any], what: str, dims: int = 2) -> npt.NDArray[Any]:
    """Bring an array of images into the shape (N, H, W, C), or of volumes into (N, D, H, W, C), as uint8 or float32.

    Takes (N, H, W), (N, H, W, C) and (N, C, H, W), or the same with D before H. Where there is an axis for them, the
    channels are the last or the second one, whichever is at most 16 and smaller than the height and width; if that fits
    neither, the layout is ambiguous and an error.
    bool becomes 0 and 255; integers from 0 to 255 become uint8; uint16 beyond that is scaled to 8 bit with rounding
    (v * 255 / 65535); floats become float32 and keep their values, which preprocessing takes to be in [0, 1].

    Args:
        array: the images.
        what: what to call the array in an error, e.g. ``"photos.npz: x_train"``.
        dims: 2 for images, 3 for volumes.

    Raises:
        DataError: the shape, the type or a value cannot be an image; NaN and infinity name the first bad index.
    """
    axes = "D, H, W" if dims == 3 else "H, W"
    if array.ndim not in (dims + 1, dims + 2):
        raise DataError(f"{what} must have the shape (N, {axes}), (N, {axes}, C) or (N, C, {axes}), got {array.shape}")
    if 0 in array.shape:
        raise DataError(f"{what} holds no {'volume' if dims == 3 else 'image'}: its shape is {array.shape}")
    if array.ndim == dims + 1:
        array = array[..., None]
    else:
        last = array.shape[-1] <= _MAX_CHANNELS and array.shape[-1] < min(array.shape[-3:-1])
        first = array.shape[1] <= _MAX_CHANNELS and array.shape[1] < min(array.shape[-2:])
        if not last and not first:
            raise DataError(
                f"{what} has the ambiguous shape {array.shape}: the channels must be the last or the second axis, "
                f"at most {_MAX_CHANNELS}, and fewer than the pixels of each side"
            )
        if not last:
            array = np.moveaxis(array, 1, -1)
    return np.ascontiguousarray(_as_pixels(array, what))


def _as_pixels(array: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):
            images = array.astype(np.float32)
        finite = np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
        if not finite.all():
            bad = int(np.argmin(finite))
            raise DataError(f"{what}[{bad}] holds NaN or infinite values ({int((~finite).sum())} such images in all)")
        return images
    if np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high <= 255:
            return array.astype(np.uint8)
        if array.dtype == np.uint16:
            return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
        raise DataError(f"{what} holds {array.dtype} values from {low} to {high}; expected 0 to 255, or floats")
    raise DataError(f"{what} has the type {array.dtype}; expected uint8 or float32")


def as_labels(array: npt.NDArray[Any], count: int, what: str) -> npt.NDArray[Any]:
    """Check one label for each of ``count`` images: (N,) or (N, 1), integers from 0 or strings; int64 or strings (N,).

    Raises:
        DataError: another count, shape or type, or a negative label.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{what} must have the shape (N,) or (N, 1), got {array.shape}")
    if len(array) != count:
        raise DataError(f"{what} holds {len(array)} labels for {count} images")
    if array.dtype.kind == "U":
        return array
    if array.dtype.kind not in "iub":
        raise DataError(f"{what} must be integers (or class names), got {array.dtype}")
    labels = array.astype(np.int64)
    if labels.min() < 0:
        bad = int(np.argmax(labels < 0))
        raise DataError(f"{what} must not be negative, got {array[bad]} at index {bad}")
    return labels


def read_npz(path: Path, dims: int = 2) -> tuple[dict[str, Arrays], tuple[str, ...] | None]:
    """Read the splits of an NPZ file and its class names, if it holds any.

    Images stand under ``images``, ``x`` or ``data``, labels under ``labels``, ``y`` or ``targets``, either alone (the
    split "all") or with a split before or behind them (``x_train``, ``train_images``, ``y_test``, ``val_labels``, ...).
    Nothing pickled is read.

    Raises:
        DataError: the file is damaged, holds pickled objects, has no images, or has two arrays for one purpose.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array, not an .npz file with images and labels")
        with file:
            images = _by_split(path, file.files, _IMAGE_KEYS)
            labels = _by_split(path, file.files, _LABEL_KEYS)
            wanted = {*images.values(), *labels.values(), "classes"}
            found = {key: file[key] for key in file.files if key in wanted}
            present = ", ".join(file.files) or "nothing"
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    if not images:
        raise DataError(
            f"{path} must hold images under images, x or data (or x_train, x_test, ...); it holds {present}"
        )
    splits = {}
    for split, key in images.items():
        array = as_samples(found[key], f"{path}: {key}", dims)
        label_key = labels.get(split)
        given = None if label_key is None else as_labels(found[label_key], len(array), f"{path}: {label_key}")
        splits[split] = Arrays(array, given)
    if "all" in splits and len(splits) > 1:
        raise DataError(f"{path} holds both whole and split images: {', '.join(images.values())}")
    names = found.get("classes")
    return splits, None if names is None else tuple(str(name) for name in names.reshape(-1))


def _by_split(path: Path, keys: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """The key of each split's array, among those of the ``keys`` that stand for one of ``names``."""
    purpose = dict.fromkeys(names, "all")
    for word, split in _SPLIT_KEYS.items():
        for name in names:
            purpose |= {f"{word}_{name}": split, f"{name}_{word}": split}
    result: dict[str, str] = {}
    for key in keys:
        matched = purpose.get(key.lower())
        if matched in result:
            raise DataError(f"{path} holds both {result[matched]} and {key}: only one of them can be meant")
        if matched is not None:
            result[matched] = key
    return result


def idx_files(path: Path) -> list[Path]:
    """The MNIST-format image files (``*-images-idx3-ubyte``, also ``.gz``) in a folder, or the one that ``path`` is."""
    candidates = [path] if path.is_file() else sorted(path.iterdir())
    matches = {file.name: _IDX_NAME.fullmatch(file.name) for file in candidates}
    images = [file for file in candidates if (match := matches[file.name]) and match["kind"].lower() == "images"]
    return [file for file in images if not (file.suffix == ".gz" and file.with_suffix("") in images)]


def read_idx(path: Path) -> dict[str, Arrays]:
    """Read the pairs of MNIST-format files of a folder (MNIST, Fashion-MNIST, EMNIST, ...), or one image file's pair.

    A name that ends in ``train`` before ``-images`` is the split "train", in ``t10k`` or ``test`` "test", in ``val``
    "val"; a single pair of another name is "all". Images are taken as they are stored (EMNIST stores them transposed).

    Raises:
        DataError: wrong magic number, wrong size, other counts of images and labels, or two files for one split.
    """
    splits: dict[str, Arrays] = {}
    sources: dict[str, Path] = {}
    files = idx_files(path)
    for file in files:
        match = _IDX_NAME.fullmatch(file.name)
        stem = match["stem"].lower() if match else ""
        known = {"train": "train", "t10k": "test", "test": "test", "val": "val", "valid": "val"}
        split = "all" if path.is_file() else next((s for word, s in known.items() if stem.endswith(word)), "all")
        if split in splits or (split == "all" and len(files) > 1):
            others = ", ".join(other.name for other in files if other != file)
            raise DataError(
                f"{path} holds several sets of one kind ({file.name} beside {others}): give each its folder"
            )
        images = as_samples(_read_idx_array(file, 3), str(file))
        sources[split], partner = file, _label_file(file)
        labels = None if partner is None else as_labels(_read_idx_array(partner, 1), len(images), str(partner))
        splits[split] = Arrays(images, labels)
    return splits


def _label_file(images: Path) -> Path | None:
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("IMAGES", "LABELS")
    stem = stem.replace("idx3", "idx1").replace("IDX3", "IDX1")
    return next((file for suffix in ("", ".gz") if (file := images.with_name(stem + suffix)).is_file()), None)


def _read_idx_array(path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    """Read an unsigned-byte idx file: two zero bytes, type 8, number of axes, big-endian sizes, data."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes([0, 0, 8, ndim]) or len(header) < 4 + 4 * ndim:
                raise DataError(
                    f"{path} is no idx{ndim} file of bytes: it begins with {header[:4].hex() or 'nothing'}, "
                    f"expected 000008{ndim:02x}"
                )
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            data = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    expected = math.prod(shape)
    if len(data) != expected:
        raise DataError(f"{path} must hold {expected} bytes of data for the shape {shape}, it holds {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def digits() -> Arrays:
    """scikit-learn's 1797 handwritten digits, (1797, 8, 8, 1) uint8 (0 to 16 scaled to 0 to 255), labels 0 to 9."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return Arrays(scaled, labels.astype(np.int64))
