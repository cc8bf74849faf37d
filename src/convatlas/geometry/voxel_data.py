"""The torch Dataset over a set of point clouds: one point a voxel, and batches of voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.image_files import Unreadable
from convatlas.data.point_sets import CloudSet
from convatlas.data.point_transforms import CloudAugment, CloudPreprocess
from convatlas.data.points import Cloud
from convatlas.ops.point_grid import farthest_points, grid_sample

__all__ = ["VoxelDataset", "collate", "merge_pairs", "point_features", "thinned"]


def point_features(cloud: Cloud) -> Tensor:
    """What a network sees of each point (N, 3 + F): its coordinates, then its features."""
    return torch.cat([torch.from_numpy(cloud.coordinates), torch.from_numpy(cloud.features)], 1).float()


def thinned(cloud: Cloud, most: int | None) -> Cloud:
    """A cloud of at most so many points, far from each other."""
    if most is None or len(cloud) <= most:
        return cloud
    return cloud.rows(farthest_points(torch.from_numpy(cloud.coordinates), most).numpy())


class VoxelDataset(Dataset[dict[str, Any]]):
    """Clouds as voxels, indexed by position or by (position, seed).

    A sample holds ``features`` (V, 3 + F), ``cells`` (V, 3), ``labels`` (V) of the points or -1, ``label`` of the cloud
    and ``index``; or ``unreadable``, the name of a file that fails. With a seed (training) the cloud is changed at
    random and a random point of each voxel is taken; without one the first.

    Args:
        clouds: the set.
        preprocess: of every cloud.
        augment: random changes; none when left out.
        max_points: more points than these are thinned out by their distances, once a cloud: thinned clouds are kept.
    """

    def __init__(
        self,
        clouds: CloudSet,
        preprocess: CloudPreprocess,
        augment: CloudAugment | None = None,
        max_points: int | None = None,
    ) -> None:
        self.clouds, self.preprocess, self.augment, self.max_points = clouds, preprocess, augment, max_points
        self._thinned: dict[int, Cloud] = {}

    def __len__(self) -> int:
        return len(self.clouds)

    def cloud(self, index: int) -> Cloud:
        """A cloud as it is prepared, before it is changed at random.

        Raises:
            Unreadable: the file fails, or nothing of it is left.
        """
        if index in self._thinned:
            return self._thinned[index]
        cloud = self.preprocess(thinned(self.clouds.cloud(index), self.max_points))
        if not len(cloud):
            raise Unreadable(self.clouds.names[index], "no point is inside of clip")
        if self.max_points is not None:
            self._thinned[index] = cloud
        return cloud

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple | list) else (key, None)
        try:
            cloud = self.cloud(index)
        except Unreadable as error:
            return {"unreadable": error.name}
        generator = torch.Generator().manual_seed(int(seed)) if seed is not None else None
        if self.augment is not None and generator is not None:
            cloud = self.augment(cloud, generator)
        grid = grid_sample(torch.from_numpy(cloud.coordinates), self.preprocess.grid_size)
        rows = grid.choose(generator) if generator is not None else next(grid.fragments())
        labels = torch.full((len(rows),), -1) if cloud.labels is None else torch.from_numpy(cloud.labels)[rows]
        return {
            "features": point_features(cloud)[rows],
            "cells": grid.cells[rows],
            "labels": labels,
            "label": int(self.clouds.labels[index]),
            "index": int(index),
        }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The voxels of several clouds in one list.

    Returns:
        ``features`` (N, 3 + F), ``cells`` (N, 3), ``batch`` (N), ``labels`` (N), ``label`` (B), ``index`` (B), and
        ``unreadable``, a list of names. Where no sample could be read, B is 0.
    """
    read = [sample for sample in samples if "unreadable" not in sample]
    counts = torch.tensor([len(sample["cells"]) for sample in read], dtype=torch.int64)
    joined: dict[str, Any] = {
        name: torch.cat([sample[name] for sample in read]) if read else torch.empty(0)
        for name in ("features", "cells", "labels")
    }
    return {
        **joined,
        "batch": torch.arange(len(read)).repeat_interleave(counts),
        "label": torch.tensor([sample["label"] for sample in read], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in read], dtype=torch.int64),
        "unreadable": [sample["unreadable"] for sample in samples if "unreadable" in sample],
    }


def merge_pairs(batch: dict[str, Any]) -> dict[str, Any]:
    """Lay the clouds of each pair of a batch into one another (mix3d: Nekrasov et al., 3DV 2021, arXiv 2110.02210).

    Of voxels that both clouds have, that of the first stays. The classes of the clouds are lost.
    """
    merged = batch["batch"] // 2
    places = torch.cat([merged[:, None], batch["cells"]], 1)
    _, inverse = places.unique(dim=0, return_inverse=True)
    rows = torch.arange(len(places), device=places.device)
    first = rows.new_full((int(inverse.max()) + 1,), len(rows)).scatter_reduce(0, inverse, rows, "amin")
    kept = first.sort().values
    result = {name: batch[name][kept] for name in ("features", "cells", "labels")}
    return {**batch, **result, "batch": merged[kept], "label": batch["label"][::2], "index": batch["index"][::2]}
