"""Files of fields: names, splits, shapes, resolutions, and how they can be bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from convatlas.data.fields import read_fields
from convatlas.errors import DataError


def fields(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(
    ("arrays", "dims", "expected"),
    [
        ({"x": fields(5, 9), "y": fields(5, 9)}, None, {"all": (5, 1, 9)}),
        ({"a": fields(5, 8, 9), "u": fields(5, 8, 9)}, None, {"all": (5, 1, 8, 9)}),
        ({"a": fields(5, 8, 9), "u": fields(5, 8, 9)}, 1, {"all": (5, 8, 9)}),
        ({"input": fields(5, 2, 8, 9), "target": fields(5, 3, 8, 9)}, None, {"all": (5, 2, 8, 9)}),
        ({"x": fields(5, 20, 8, 9), "y": fields(5, 20, 8, 9)}, 3, {"all": (5, 1, 20, 8, 9)}),
        (
            {"x_train": fields(5, 8), "y_train": fields(5, 8), "test_x": fields(2, 8), "test_y": fields(2, 8)},
            None,
            {"train": (5, 1, 8), "test": (2, 1, 8)},
        ),
    ],
)
def test_arrays_are_told_by_name_and_shape(tmp_path: Path, arrays: dict[str, Any], dims: int, expected: dict[str, Any]):
    np.savez(tmp_path / "f.npz", **arrays)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    for name in ("f.npz", "f.h5"):
        sets = read_fields(tmp_path / name, dims=dims)
        assert {split: pairs[0].x.shape for split, pairs in sets.items()} == expected
    first = sets["train" if "train" in sets else "all"][0]
    assert first.x.dtype == np.float64
    np.testing.assert_array_equal(first.x.squeeze(), next(iter(arrays.values())).squeeze())


def test_a_folder_holds_several_resolutions(tmp_path: Path):
    for name, size in (("flow_8_train", 8), ("flow_16_train", 16), ("flow_16_test", 16)):
        np.savez(tmp_path / f"{name}.npz", x=fields(3, size, size), y=fields(3, size, size))
    sets = read_fields(tmp_path)
    assert [pairs.grid for pairs in sets["train"]] == [(16, 16), (8, 8)]
    assert [pairs.grid for pairs in sets["test"]] == [(16, 16)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": fields(3, 8)}, "must hold inputs under x .*; it holds z"),
        ({"x": fields(3, 8)}, "must hold outputs under y"),
        ({"x": fields(3, 8), "a": fields(3, 8), "y": fields(3, 8)}, "holds both x and a"),
        ({"x": fields(3, 8), "y": fields(3, 9)}, "on one grid"),
        ({"x": fields(3, 8), "y": fields(2, 8)}, "on one grid"),
        ({"x": fields(3), "y": fields(3)}, "must have the shape"),
        ({"x": np.full((3, 8), np.nan), "y": fields(3, 8)}, r"x\[0\] holds NaN"),
        ({"x": np.array(["a"] * 3), "y": fields(3, 8)}, "real numbers"),
        ({"x": np.array([object()] * 3), "y": fields(3, 8)}, "plain arrays"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, arrays: dict[str, Any], message: str):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_fields(tmp_path / "f.npz")


def test_damaged_and_missing_files_are_told(tmp_path: Path):
    for name in ("f.npz", "f.h5"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(DataError, match="cannot be read"):
            read_fields(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        read_fields(tmp_path / "none.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of fields"):
        read_fields(tmp_path / "empty")
