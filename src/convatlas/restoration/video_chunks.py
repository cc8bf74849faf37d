"""Cutting frames into patches, telling how hard each is to enlarge, and grouping them into chunks of like difficulty.

Li, Ji, Qin et al.: "Towards High-Quality and Efficient Video Super-Resolution via Spatial-Temporal Data Overfitting",
CVPR 2023, arXiv 2303.08331, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.dct import dct

__all__ = [
    "Chunks",
    "Division",
    "JointSampling",
    "PatchGrid",
    "Scheme",
    "chunk_by_psnr",
    "chunk_by_time",
    "chunk_randomly",
    "complexity",
    "patch_errors",
    "patch_psnr",
    "score_patches",
    "whole_psnr",
]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: What a video is divided by: PSNR of a general network (STDO), time (NAS), or others for comparison.
Division = Literal["psnr", "time", "variance", "dct", "random"]
#: How one network is fitted to all chunks.
Scheme = Literal["fraction", "curriculum", "uniform"]


@dataclass(frozen=True)
class PatchGrid:
    """Rows and columns of patches that a frame is cut into; patches are numbered row by row.

    Attributes:
        rows, columns: number of patches along height and width.

    Raises:
        ValueError: a number is smaller than 1.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"rows and columns must be at least 1, got {self.rows} and {self.columns}")

    def __len__(self) -> int:
        return self.rows * self.columns

    def patch_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a patch.

        Raises:
            ValueError: the grid does not divide the frame.
        """
        if height % self.rows or width % self.columns or not height * width:
            raise ValueError(
                f"a grid of {self.rows} x {self.columns} patches must divide the frame, got {height} x {width} pixels"
            )
        return height // self.rows, width // self.columns

    def filled(self, height: int, width: int, scale: int = 1) -> tuple[int, int]:
        """The least size, not below the given one, whose 1 / scale the grid divides."""
        steps = (self.rows * scale, self.columns * scale)
        return (-(-height // steps[0]) * steps[0], -(-width // steps[1]) * steps[1])

    def cut(self, frames: Tensor, halo: int = 0) -> Tensor:
        """The patches (..., rows * columns, C, h + 2 halo, w + 2 halo) of frames (..., C, H, W).

        Args:
            frames: of any type.
            halo: pixels of the neighbours around each patch, zeros beyond the frame.

        Raises:
            ValueError: the grid does not divide the frames, or halo is negative.
        """
        if halo < 0:
            raise ValueError(f"halo must not be negative, got {halo}")
        height, width = self.patch_size(*frames.shape[-2:])
        if halo == 0:
            return rearrange(frames, "... c (i h) (j w) -> ... (i j) c h w", i=self.rows, j=self.columns)
        windows = F.pad(frames, (halo,) * 4).unfold(-2, height + 2 * halo, height).unfold(-2, width + 2 * halo, width)
        return rearrange(windows, "... c i j h w -> ... (i j) c h w")

    def join(self, patches: Tensor) -> Tensor:
        """The frames (..., C, H, W) of patches (..., rows * columns, C, h, w): the inverse of `cut` without a halo.

        Raises:
            ValueError: there is another number of patches.
        """
        if patches.dim() < 4 or patches.shape[-4] != len(self):
            raise ValueError(f"patches must be (..., {len(self)}, C, h, w), got {tuple(patches.shape)}")
        return rearrange(patches, "... (i j) c h w -> ... c (i h) (j w)", i=self.rows, j=self.columns)


# -- how hard a patch is -----------------------------------------------------------------------------------------------


def patch_errors(enlarged: Tensor, truth: Tensor, grid: PatchGrid, *, shave: int = 0) -> Tensor:
    """Mean squared error of each patch over RGB in [0, 1], as between files of 8 bits.

    Args:
        enlarged: (N, C, H, W) in [0, 1], cut to that range and rounded to 8 bits first.
        truth: frames of the same shape, uint8 or in [0, 1].
        grid: of the patches.
        shave: pixels left out along the border of each patch; usually scale + 4.

    Returns:
        (N * rows * columns) in float64, in the order of frame, row, column.

    Raises:
        ValueError: the shapes differ, the grid does not divide the frames, or shave leaves nothing of a patch.
    """
    if enlarged.shape != truth.shape:
        raise ValueError(
            f"enlarged and truth must have one shape, got {tuple(enlarged.shape)} and {tuple(truth.shape)}"
        )
    height, width = grid.patch_size(*truth.shape[-2:])
    if shave < 0 or 2 * shave >= min(height, width):
        raise ValueError(f"shave must leave some of the patches of {height} x {width} pixels, got {shave}")
    rounded = (enlarged.clamp(0, 1) * 255).round().double()
    exact = truth.double() if truth.dtype == torch.uint8 else truth.double() * 255
    squares = grid.cut((rounded - exact).square() / 255**2)
    inside = squares[..., shave : height - shave, shave : width - shave]
    return inside.mean((-3, -2, -1)).flatten()


def patch_psnr(errors: Tensor) -> Tensor:
    """PSNR in dB, -10 log10, of mean squared errors in [0, 1]; infinite where there is none."""
    return -10 * errors.double().log10()


def whole_psnr(errors: Tensor) -> float:
    """PSNR in dB of a whole video: of the mean of its patches' mean squared errors, not the mean of their PSNR."""
    return float(patch_psnr(errors.double().mean()))


@torch.inference_mode()
def score_patches(
    model: nn.Module, low: Tensor, high: Tensor, grid: PatchGrid, *, shave: int | None = None, batch_size: int = 64
) -> Tensor:
    """PSNR that a network reaches on each patch of frames: the labels that STDO divides a video by.

    Args:
        model: enlarges (B, C, h, w) in [0, 1] by a whole factor.
        low: (N, C, H, W) uint8 or in [0, 1].
        high: the truth (N, C, scale H, scale W).
        grid: the same for both.
        shave: pixels of the large patch left out along its border; scale + 4 when left out.
        batch_size: patches that go through the network together.

    Returns:
        (N * rows * columns) in dB, in float64.

    Raises:
        ValueError: high is no multiple of low, the model has another scale, the grid does not divide the frames, or
            shave leaves nothing.
    """
    scale = high.shape[-1] // max(1, low.shape[-1])
    if not scale or tuple(high.shape[-2:]) != (scale * low.shape[-2], scale * low.shape[-1]):
        raise ValueError(f"high must be a multiple of low, got {tuple(high.shape[-2:])} and {tuple(low.shape[-2:])}")
    known = getattr(model, "scale", scale)
    if known != scale:
        raise ValueError(f"the network enlarges {known} times, but the frames are of scale {scale}")
    weight = next(model.parameters())
    found = []
    for small, large in zip(low, high, strict=True):
        patches = grid.cut(small).to(weight.device)
        patches = patches.to(weight.dtype) / 255 if patches.dtype == torch.uint8 else patches.to(weight.dtype)
        enlarged = torch.cat([model(batch) for batch in patches.split(batch_size)])
        joined = grid.join(enlarged).cpu()
        errors = patch_errors(joined[None], large[None], grid, shave=scale + 4 if shave is None else shave)
        found.append(patch_psnr(errors))
    return torch.cat(found)


def complexity(frame: Tensor, grid: PatchGrid, kind: Literal["variance", "dct"]) -> Tensor:
    """How plain each patch of a frame is in dB, without any network: large where there is little detail.

    Args:
        frame: (3, H, W) uint8 or in [0, 1].
        grid: of the patches.
        kind: ``variance`` of luma, or ``dct`` for the weighted energy of its cosine transform (Menon et al.: "VCA:
            Video Complexity Analyzer", 2022, equation 1, as in efficient patch sampling).

    Returns:
        (rows * columns) in float64, -10 log10 of the variance or of the energy of a pixel.

    Raises:
        UnknownName: kind is unknown.
    """
    if kind not in ("variance", "dct"):
        raise unknown("kind", kind, ("variance", "dct"))
    levels = frame.double() / 255 if frame.dtype == torch.uint8 else frame.double()
    patches = grid.cut((levels * levels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True))[:, 0]
    if kind == "variance":
        return patch_psnr(patches.var((-2, -1), correction=0))
    height, width = patches.shape[-2:]
    modes = dct(patches, (-2, -1)).abs()
    places = torch.outer(torch.arange(height).double() / height, torch.arange(width).double() / width)
    weights = torch.exp((places.square() - 1).abs())
    weights[0, 0] = 0.0
    return patch_psnr((weights * modes).sum((-2, -1)) / (height * width))


# -- chunks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunk of each patch, and what divides them.

    Attributes:
        index: (n) from 0, the hardest.
        thresholds: (k + 1); chunk c holds the labels above the c-th and not above the next. Empty where no labels
            were used.
    """

    index: Integers
    thresholds: Floats


def chunk_by_psnr(labels: npt.ArrayLike | Tensor, k: int) -> Chunks:
    """Groups of equally many patches by rising PSNR: chunk 0 is the hardest; equal labels stay together.

    Threshold c is the (c n / k)-th smallest label, the 0-th is 0. A label of at most 0 or NaN belongs to the first
    chunk, an infinite one to the last.

    Args:
        labels: (n) in dB, or any number that is larger for easier patches.
        k: number of chunks.

    Raises:
        ValueError: labels are not one row, or there are more chunks than patches.
    """
    values = np.array(torch.as_tensor(labels).double().cpu().numpy(), np.float64)
    _check_count(values, k)
    values[np.isnan(values)] = -np.inf
    rising = np.sort(values)
    thresholds = np.array([0.0, *(rising[c * len(values) // k - 1] for c in range(1, k + 1))])
    return Chunks(np.searchsorted(thresholds[1:k], values, side="left").astype(np.int64), thresholds)


def chunk_by_time(frames: int, patches: int, k: int) -> Chunks:
    """All patches of consecutive frames together, as NAS and awDNN (k = 1) divide a video.

    Args:
        frames: number of frames.
        patches: of each frame.
        k: number of segments, of lengths that differ by one frame at most.

    Raises:
        ValueError: there are more segments than frames.
    """
    if not 1 <= k <= frames:
        raise ValueError(f"k must be from 1 to the {frames} frames, got {k}")
    return Chunks(np.repeat(np.arange(frames) * k // frames, patches), np.zeros(0))


def chunk_randomly(count: int, k: int, seed: int = 0) -> Chunks:
    """Groups of equally many patches by chance: what any other division should be better than.

    Raises:
        ValueError: there are more chunks than patches.
    """
    _check_count(np.zeros(count), k)
    return Chunks(np.random.default_rng(seed).permutation(count) * k // count, np.zeros(0))


def _check_count(labels: npt.NDArray[Any], k: int) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels must be (n), got {labels.shape}")
    if not 1 <= k <= len(labels):
        raise ValueError(f"k must be from 1 to the number of patches, {len(labels)}, got {k}")


# -- one network for all chunks ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class JointSampling:
    """Which patches an epoch of the joint training (JSTDO) visits, a function of epoch and seed.

    This is our reading of the paper's data-aware joint training: that easy patches need few visits. Its schedule is not
    published. Patches keep their numbers; ``order`` gives those of an epoch.

    Attributes:
        index: (n), the chunk of each patch, 0 the hardest.
        scheme: ``fraction`` visits all patches of chunk 0 and a random share fraction^c of chunk c, another one in each
            epoch. ``curriculum`` visits all chunks and leaves out the easiest that is left after each epoch of
            ``drops``; the epoch keeps its length, so the harder patches are visited the more. ``uniform`` visits all.
        fraction: of the scheme of that name, in (0, 1].
        drops: rising epochs of the curriculum.

    Raises:
        ValueError: a value is out of range.
    """

    index: Integers
    scheme: Scheme = "fraction"
    fraction: float = 0.5
    drops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise unknown("scheme", str(self.scheme), get_args(Scheme))
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        if list(self.drops) != sorted(set(self.drops)) or min(self.drops, default=1) < 1:
            raise ValueError(f"drops must be epochs from 1 in rising order, got {self.drops}")
        if self.index.ndim != 1 or not len(self.index):
            raise ValueError(f"index must be (n) and not empty, got {self.index.shape}")

    def __len__(self) -> int:
        return sum(count for _, count in self._shares())

    def _shares(self) -> Iterator[tuple[Integers, int]]:
        """The patches of each chunk, and how many of them the scheme ``fraction`` visits."""
        for chunk in range(int(self.index.max()) + 1):
            members = np.flatnonzero(self.index == chunk)
            kept = self.fraction**chunk if self.scheme == "fraction" else 1.0
            yield members, min(len(members), math.ceil(kept * len(members)))

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """The patches of an epoch in the order of their visits, as many as the length says.

        Args:
            epoch: from 0.
            generator: what is random follows from it.
        """
        if self.scheme == "curriculum":
            left = int(self.index.max()) + 1 - sum(epoch >= drop for drop in self.drops)
            members = torch.from_numpy(np.flatnonzero(self.index < max(1, left)))
            rounds = -(-len(self) // max(1, len(members)))
            visits = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
            return torch.cat(visits)[: len(self)]
        drawn = [
            torch.from_numpy(members)[torch.randperm(len(members), generator=generator)[:count]]
            for members, count in self._shares()
        ]
        visited = torch.cat(drawn)
        return visited[torch.randperm(len(visited), generator=generator)]
