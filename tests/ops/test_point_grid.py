"""Points in cells: keys, one point a cell, fragments, voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.ops.point_grid import fnv_keys, from_points, grid_cells, grid_sample, ravel_keys, voxel_means


def test_keys_are_those_of_unsigned_numbers():
    cells = torch.randint(0, 1000, (50, 3))
    hashed = np.full(50, 14695981039346656037, np.uint64)
    for column in cells.numpy().astype(np.uint64).T:
        hashed *= np.uint64(1099511628211)
        hashed ^= column
    assert np.array_equal(fnv_keys(cells).numpy().view(np.uint64), hashed)
    low = cells - cells.amin(0)
    assert ravel_keys(cells).tolist() == np.ravel_multi_index(low.T.numpy(), low.amax(0).numpy() + 1).tolist()


@pytest.mark.parametrize("keys", ["fnv", "ravel"])
def test_every_cell_gives_one_point_and_fragments_give_all(keys: str):
    points = torch.rand(200, 3) * 2 - 5
    grid = grid_sample(points, 0.5, keys=keys)
    cells = {tuple(cell) for cell in grid.cells.tolist()}
    assert min(min(cell) for cell in cells) == 0
    ordered = grid.keys[grid.order].numpy().view(np.uint64 if keys == "fnv" else np.int64)
    assert (ordered[1:] >= ordered[:-1]).all()
    chosen = grid.choose(torch.Generator().manual_seed(0))
    assert torch.equal(chosen, grid.choose(torch.Generator().manual_seed(0)))
    assert not torch.equal(chosen, grid.choose(torch.Generator().manual_seed(1)))
    fragments = list(grid.fragments())
    for rows in (chosen, *fragments):
        assert {tuple(cell) for cell in grid.cells[rows].tolist()} == cells
        assert len(rows) == len(cells)
    assert set(torch.cat(fragments).tolist()) == set(range(200))
    assert len(fragments) == int(grid.counts.max())


def test_division_is_done_in_double_precision():
    points = torch.tensor([[0.0], [0.3]])  # 0.3 / 0.1 is 3.0000001 in float64 of the float32 number
    assert grid_cells(points, 0.1).flatten().tolist() == [0, 3]
    assert grid_cells(points[:0], 0.1).shape == (0, 1)
    assert len(list(grid_sample(points[:0], 0.1).fragments())) == 0


def test_voxels_hold_a_mean_a_first_or_a_random_point():
    points = torch.tensor([[0.1, 0.1], [1.1, 0.2], [0.2, 0.2], [5.0, 5.0]])
    features = torch.tensor([[1.0], [2.0], [5.0], [7.0]])
    batch = torch.tensor([0, 0, 0, 1])
    mean = from_points(points, features, batch, 1.0)
    assert mean.indices.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert mean.features.flatten().tolist() == [3, 2, 7]
    assert mean.spatial_shape == (2, 1)
    assert from_points(points, features, batch, 1.0, margin=96).spatial_shape == (97, 96)
    assert from_points(points, features, batch, 1.0, reduce="first").features.flatten().tolist() == [1, 2, 7]
    drawn = {
        from_points(points, features, batch, 1.0, reduce="random", generator=torch.Generator().manual_seed(seed))
        .features[0]
        .item()
        for seed in range(10)
    }
    assert drawn == {1, 5}


def test_detectors_take_the_mean_of_the_first_points_of_a_voxel():
    points = torch.tensor(
        [[0.1, 0.1, 0.1, 1.0], [0.2, 0.3, 0.4, 3.0], [0.3, 0.3, 0.3, 8.0], [1.5, 0.5, 0.5, 2.0], [9.0, 0.0, 0.0, 4.0]]
    )
    features, places = voxel_means(points, (1.0, 1.0, 1.0), (0, 0, 0, 2, 2, 2), max_points=2)
    assert places.tolist() == [[0, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(features, torch.tensor([[0.15, 0.2, 0.25, 2.0], [1.5, 0.5, 0.5, 2.0]]))


def test_what_is_no_cloud():
    with pytest.raises(ValueError, match=r"coordinates must be \(N, A\), got \(3,\)"):
        grid_cells(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        grid_cells(torch.ones(3, 3), 0)
    with pytest.raises(ValueError, match=r"coordinates must be finite, but row 1 is \[inf\]"):
        grid_cells(torch.tensor([[0.0], [torch.inf]]), 1.0)
    with pytest.raises(UnknownName, match="unknown keys 'fvn': did you mean fnv"):
        grid_sample(torch.ones(3, 3), 1.0, keys="fvn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have as many rows, got 3, 3 and 2"):
        from_points(torch.ones(3, 3), torch.ones(3, 1), torch.zeros(2).long(), 1.0)
    with pytest.raises(UnknownName, match="unknown reduction 'max'"):
        from_points(torch.ones(3, 3), torch.ones(3, 1), torch.zeros(3).long(), 1.0, reduce="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one point"):
        from_points(torch.ones(0, 3), torch.ones(0, 1), torch.zeros(0).long(), 1.0)
