"""Linear systems as files: what is written is read again, and what is damaged is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from convatlas.data.linear_systems import (
    GridSystem,
    find_systems,
    random_system,
    read_binary_matrix,
    read_binary_vector,
    read_npz_system,
    write_binary_matrix,
    write_binary_vector,
    write_npz_system,
)
from convatlas.errors import DataError

RANDOM = np.random.default_rng(0)


def laplacian(side: int) -> Any:
    line = sparse.diags_array([-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)], offsets=[-1, 0, 1])
    one = sparse.eye_array(side)
    return sparse.csr_array(
        sparse.kron(sparse.kron(line, one), one)
        + sparse.kron(sparse.kron(one, line), one)
        + sparse.kron(sparse.kron(one, one), line)
    )


def test_cells_survive_a_file(tmp_path: Path):
    walls = (("neumann", "dirichlet"), ("neumann", "neumann"))
    fluid = RANDOM.random((4, 6)) < 0.7
    air = ~fluid & (RANDOM.random((4, 6)) < 0.5)
    system = GridSystem("a", RANDOM.standard_normal((4, 6)), fluid, air, walls, x0=np.ones((4, 6)))
    again = read_npz_system(write_npz_system(tmp_path / "a.npz", system))
    assert (again.name, again.boundary, again.shape) == ("a", walls, (4, 6))
    for field in ("b", "fluid", "air", "x0"):
        np.testing.assert_array_equal(getattr(again, field), getattr(system, field))


def test_matrices_survive_a_file(tmp_path: Path):
    matrix = laplacian(4)
    b = RANDOM.standard_normal((4, 4, 4))
    system = GridSystem("m", b, np.ones(b.shape, bool), matrix=matrix)
    again = read_npz_system(write_npz_system(tmp_path / "m.npz", system))
    assert (again.matrix != matrix).nnz == 0
    np.testing.assert_array_equal(again.b, b)
    # As scipy writes it, with b beside; a vector of a cube's length is a cube.
    sparse.save_npz(tmp_path / "s.npz", matrix)
    with np.load(tmp_path / "s.npz") as held:
        np.savez(tmp_path / "s.npz", rhs=b.reshape(-1), **held)
    assert read_npz_system(tmp_path / "s.npz").shape == (4, 4, 4)


def test_shortest_form_is_a_box_of_fluid(tmp_path: Path):
    np.savez(tmp_path / "b.npz", b=np.ones((3, 4), np.float32))
    system = read_npz_system(tmp_path / "b.npz")
    assert system.fluid.all()
    assert (system.b.dtype, system.boundary, system.x0) == (np.float64, "dirichlet", None)


def test_published_format(tmp_path: Path):
    matrix, b = laplacian(3), RANDOM.standard_normal(27)
    write_binary_matrix(tmp_path / "A_7.bin", matrix)
    write_binary_vector(tmp_path / "b_7.bin", b)
    # Written by hand, as it is published.
    header = np.array([27, 27, matrix.nnz, 27, 27], "<i4").tobytes()
    parts = [matrix.data.astype("<f4"), matrix.indptr[:-1].astype("<i4"), matrix.indices.astype("<i4")]
    assert (tmp_path / "A_7.bin").read_bytes() == header + b"".join(part.tobytes() for part in parts)
    assert (tmp_path / "b_7.bin").read_bytes() == np.int64(27).tobytes() + b.tobytes()
    assert (read_binary_matrix(tmp_path / "A_7.bin") != matrix).nnz == 0
    np.testing.assert_array_equal(read_binary_vector(tmp_path / "b_7.bin"), b)
    (system,) = find_systems([tmp_path])
    assert (system.name, system.shape) == ("b_7", (3, 3, 3))
    np.testing.assert_array_equal(system.b, b.reshape(3, 3, 3))
    (same,) = find_systems([tmp_path / "A_7.bin", tmp_path / "b_7.bin"])
    np.testing.assert_array_equal(same.b, system.b)


def test_numbers_pair_matrices_and_right_hand_sides(tmp_path: Path):
    for number, scale in ((1, 1.0), (2, 2.0)):
        write_binary_matrix(tmp_path / f"matrixA_{number}.bin", scale * laplacian(2))
        write_binary_vector(tmp_path / f"div_v_star_{number}.bin", np.full(8, scale))
    systems = find_systems([tmp_path])
    assert [(each.matrix[0, 0], each.b[0, 0, 0]) for each in systems] == [(6, 1), (12, 2)]
    write_binary_vector(tmp_path / "b_3.bin", np.ones(8))
    with pytest.raises(DataError, match=r"b_3\.bin needs one matrix with its number, there are 0 among 2"):
        find_systems([tmp_path])


def test_empty_rows_are_not_fluid(tmp_path: Path):
    matrix = laplacian(2).tolil()
    matrix[5], matrix[:, 5] = 0, 0
    write_binary_matrix(tmp_path / "A.bin", matrix)
    write_binary_vector(tmp_path / "b.bin", np.ones(8))
    (system,) = find_systems([tmp_path])
    assert np.flatnonzero(~system.fluid).tolist() == [5]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mask": np.ones((2, 2))}, "must hold b, the right-hand side; it holds mask"),
        ({"b": np.ones(4)}, r"must be a grid \(H, W\) or \(D, H, W\), got \(4,\)"),
        ({"b": np.ones((2, 2)), "mask": np.ones((2, 3))}, r"mask|fluid must be \(2, 2\), got \(2, 3\)"),
        ({"b": np.full((2, 2), np.inf)}, "holds NaN or infinite values"),
        ({"b": np.ones((2, 2), complex)}, "must hold real numbers, got complex128"),
        ({"b": np.ones((2, 2)), "mask": np.ones((2, 2)), "air": np.eye(2)}, "fluid and air share 2 cells"),
        ({"b": np.ones((2, 2)), "boundary": np.array("wall")}, "boundary must be dirichlet or neumann, got wall"),
        ({"b": np.ones((2, 2)), "boundary": np.array(["neumann"])}, "must be one word or a pair for each axis"),
        ({"b": np.ones((2, 2)), "x0": np.ones(3)}, "x0 must have the values of b"),
        ({"b": np.ones(4), "grid": [2, 3]}, r"must have the values of the grid \(2, 3\)"),
        ({"b": np.array([{}], object)}, "cannot be read as an .npz file of plain arrays"),
        ({"b": np.ones(5), "data": np.ones(1), "indices": [0], "indptr": [0, 1]}, "as many values as a cube"),
        ({"b": np.ones(8), "data": np.ones(1), "indices": [9], "indptr": [0, 1]}, "the matrix is damaged"),
        ({"b": np.ones(8), "data": np.ones(1), "indices": [0], "indptr": [0, 1]}, "must be 8 x 8, got 1 x 1"),
    ],
)
def test_damaged_npz_files_are_told(tmp_path: Path, arrays: dict[str, Any], message: str):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_npz_system(tmp_path / "x.npz")


def test_damaged_binary_files_are_told(tmp_path: Path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"12345")
    with pytest.raises(DataError, match="must hold float64 values behind a length, it has 5 bytes"):
        read_binary_vector(path)
    write_binary_matrix(path, laplacian(2))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="is no matrix of the published format"):
        read_binary_matrix(path)
    write_binary_matrix(path, laplacian(2))
    content = bytearray(path.read_bytes())
    content[-4:] = np.int32(99).tobytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        read_binary_matrix(path)
    with pytest.raises(DataError, match="does not exist"):
        find_systems([tmp_path / "absent.npz"])
    (tmp_path / "note.txt").write_text("no system")
    with pytest.raises(DataError, match=r"must be an \.npz or \.bin file, or a folder of them"):
        find_systems([tmp_path / "note.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no system in"):
        find_systems([tmp_path / "empty"])


@pytest.mark.parametrize("shape", [(12, 16), (6, 8, 10)])
def test_random_systems(shape: tuple[int, ...]):
    plain, hole = random_system(shape, 1), random_system(shape, 1, hole=True)
    assert plain.fluid.all()
    assert 0 < (~hole.fluid).sum() < 0.2 * hole.fluid.size
    assert hole.b[~hole.fluid].sum() == 0
    for system in (plain, hole):
        assert np.linalg.norm(system.b) == pytest.approx(1)
        assert system.shape == shape
    assert not np.array_equal(plain.b, random_system(shape, 2).b)
    np.testing.assert_array_equal(plain.b, random_system(shape, 1).b)
