"""Camouflage attacks on image scaling: a picture that becomes another one when it is resized for a network.

Xiao, Chen, Shen, Chen, Li: "Seeing is Not Believing: Camouflage Attacks on Image Scaling Algorithms", USENIX Security
2019. Scaling is linear and separable, D = C_L X C_R; a scaler whose matrices are sparse looks at few pixels, and these
can be set at will. Made to test defences, such as `convatlas.robustness.decamouflage`.

Pictures are arrays (H, W) or (H, W, C), uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.resize import Convention, Interpolation, resize, resize_matrix

__all__ = ["PenaltyAttack", "Scaler", "ScalingAttack", "from_planes", "least_change", "planes"]

Bytes = npt.NDArray[np.uint8]

#: Libraries by name -> whose convention they follow. Those of deep learning sample as OpenCV where they do not smooth.
_LIBRARIES: dict[str, Convention] = {
    "cv2": "opencv",
    "opencv": "opencv",
    "tf": "opencv",
    "torch": "opencv",
    "pil": "pillow",
    "pillow": "pillow",
    "matlab": "matlab",
}
_ALGORITHMS: dict[str, Interpolation] = {
    "nearest": "nearest",
    "linear": "bilinear",
    "bilinear": "bilinear",
    "cubic": "bicubic",
    "bicubic": "bicubic",
    "area": "area",
    "box": "box",
    "lanczos": "lanczos",
    "lanczos4": "lanczos",
}
#: What torch and TensorFlow do as OpenCV; their "area" and "lanczos" are others.
_SHARED = ("nearest", "bilinear", "bicubic")
_WHITE = 255.0
#: Taps of an output up to which the exact solution by sorting is taken.
_MOST_TAPS = 16
#: Of the alternating directions: weight of the constraints, change at which they stop, most steps, and the residual
#: above which a line counts as unsolvable; after how many steps it is looked at, and the pixels of the columns that are
#: solved together, as many as stay in a processor's cache.
_RHO, _DONE, _STEPS, _UNSOLVED = 1.0, 1e-7, 5000, 1e-3
_LOOK, _AT_ONCE = 5, 1 << 15


@dataclass(frozen=True)
class Scaler:
    """How a picture is resized.

    Attributes:
        convention: whose resizing.
        interpolation: which one of it.

    Raises:
        ValueError: the convention has no such interpolation.
    """

    convention: Convention = "opencv"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        self.matrix(1, 1)

    @classmethod
    def of(cls, library: str, algorithm: str) -> Scaler:
        """The scaler of a library by the names in use there.

        Args:
            library: "cv2", "pil", "matlab", or "torch" and "tf": their resizing without antialiasing, with half-pixel
                centres, which is OpenCV's.
            algorithm: "nearest", "linear", "cubic", "area", "box", "lanczos".

        Raises:
            UnknownName: there is no such library, or it has no such algorithm.
        """
        if library not in _LIBRARIES:
            raise unknown("library", library, _LIBRARIES)
        if algorithm not in _ALGORITHMS:
            raise unknown("algorithm", algorithm, _ALGORITHMS)
        if library in ("torch", "tf") and _ALGORITHMS[algorithm] not in _SHARED:
            raise unknown(f"algorithm of {library}", algorithm, ("nearest", "linear", "cubic"))
        return cls(_LIBRARIES[library], _ALGORITHMS[algorithm])

    def matrix(self, length: int, size: int) -> Tensor:
        """The matrix (size, length) in float64 that resizes one axis: C_L, or C_R transposed."""
        return resize_matrix(length, size, convention=self.convention, interpolation=self.interpolation)

    def resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Resize (..., H, W) to (height, width)."""
        return resize(x, size, convention=self.convention, interpolation=self.interpolation)


def planes(image: npt.NDArray[Any], name: str = "image") -> Tensor:
    """A picture (H, W) or (H, W, C) as a tensor (C, H, W).

    Raises:
        ValueError: it is not uint8, or not of one or three channels.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"{name} must be a uint8 image in 0..255, got {array.dtype}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or not array.size:
        raise ValueError(
            f"{name} must be (H, W), (H, W, 1) or (H, W, 3), without transparency, got shape {array.shape}"
        )
    shaped = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(shaped))


def from_planes(x: Tensor, like: npt.NDArray[Any]) -> Bytes:
    """A tensor (C, H, W) as a picture with the axes of another."""
    array: Bytes = x.cpu().numpy()
    return array[0] if np.ndim(like) == 2 else np.ascontiguousarray(array.transpose(1, 2, 0))


# -- the quadratic programme -------------------------------------------------------------------------------------------


class _Solved(NamedTuple):
    change: Tensor
    failed: Tensor  # of each column


def least_change(x: Tensor, matrix: Tensor, target: Tensor, eps: float | Sequence[float] = 1.0) -> Tensor:
    """The smallest change of columns that makes a matrix map them near a target: for every column

        minimise |d|^2 / 2  subject to  0 <= x + d <= 255,  |C (x + d) - t| <= eps.

    The solution is unique. Where no two outputs share an input (nearest, linear from a ratio of 2, cubic from 4) it is
    found exactly: d is a multiple of the row of C, clipped, and the multiple follows from sorting where it is clipped.
    Elsewhere all columns go through the alternating direction method of multipliers together.

    Args:
        x: (..., n, k), values from 0 to 255.
        matrix: C, (m, n).
        target: t, (..., m, k).
        eps: largest distance in grey levels; of several, each column takes the first that can be kept.

    Returns:
        d, (..., n, k) in float64.

    Raises:
        ValueError: a column has no solution; the message says which.
    """
    limits = (eps,) if isinstance(eps, int | float) else tuple(eps)
    if not limits or not min(limits) >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    matrix = matrix.to(x.device, torch.float64)
    columns, goal = (values.double().movedim(-2, 0).flatten(1) for values in (x, target))
    taps = int((matrix != 0).sum(1).max())
    disjoint = taps <= _MOST_TAPS and int((matrix != 0).sum(0).max()) <= 1
    solve = _by_sorting if disjoint else _by_alternating
    change, left = torch.zeros_like(columns), torch.arange(columns.shape[1], device=x.device)
    for limit in limits:
        solved = solve(columns[:, left], matrix, goal[:, left], float(limit))
        change[:, left[~solved.failed]] = solved.change[:, ~solved.failed]
        left = left[solved.failed]
    if len(left):
        column = int(left[0]) % x.shape[-1]
        raise ValueError(
            f"could not solve at column {column} ({len(left)} of {columns.shape[1]} have no solution): no pixels from "
            f"0 to 255 come within {limits[-1]:g} of the target; raise eps"
        )
    return change.unflatten(1, (*x.shape[:-2], x.shape[-1])).movedim(0, -2)


def _by_sorting(x: Tensor, matrix: Tensor, target: Tensor, eps: float) -> _Solved:
    """One constraint for each output, on inputs of its own: d = clip(l a), with l so that a . d is what is missing."""
    taps = int((matrix != 0).sum(1).max())
    inputs = (matrix != 0).byte().topk(taps, 1).indices
    a = matrix.gather(1, inputs)[..., None]
    own = x[inputs]
    low, high = -own, _WHITE - own
    missing = target - matrix @ x
    missing = missing.sign() * (missing.abs() - eps).clamp(min=0)
    bends = torch.cat([torch.where(a == 0, 0.0, bound / torch.where(a == 0, 1.0, a)) for bound in (low, high)], 1)
    bends = bends.sort(1).values
    reached = torch.stack([(a * (bend[:, None] * a).clamp(low, high)).sum(1) for bend in bends.unbind(1)], 1)
    place = ((reached <= missing[:, None]).sum(1, keepdim=True) - 1).clamp(0, bends.shape[1] - 2)
    (l0, l1), (v0, v1) = ([values.gather(1, place + step)[:, 0] for step in (0, 1)] for values in (bends, reached))
    share = ((missing - v0) / torch.where(v1 > v0, v1 - v0, 1.0)).clamp(0, 1)
    multiple = l0 + share * (l1 - l0)
    change = (multiple[:, None] * a).clamp(low, high)
    off = ((a * change).sum(1) - missing).abs().amax(0)
    whole = torch.zeros_like(x).index_add_(0, inputs.flatten(), change.flatten(0, 1))
    return _Solved(whole, off > 1e-6)


def _by_alternating(x: Tensor, matrix: Tensor, target: Tensor, eps: float) -> _Solved:
    """Splits d (inside the box) and C d (near the target), each with multipliers y; columns in lots."""
    sparse, transposed = matrix.to_sparse(), matrix.mT.to_sparse()
    identity = torch.eye(len(matrix), dtype=x.dtype, device=x.device)
    inner = _RHO * torch.linalg.inv((1 + _RHO) * identity + _RHO * matrix @ matrix.mT)
    low, high = target - eps - matrix @ x, target + eps - matrix @ x
    change, off = torch.zeros_like(x), torch.zeros_like(x[0])
    for lot in torch.arange(x.shape[1], device=x.device).split(max(1, _AT_ONCE // max(1, len(x)))):
        change[:, lot], off[lot] = _alternate(x[:, lot], low[:, lot], high[:, lot], sparse, transposed, inner)
    return _Solved(change, off > _UNSOLVED)


def _alternate(
    x: Tensor, low: Tensor, high: Tensor, sparse: Tensor, transposed: Tensor, inner: Tensor
) -> tuple[Tensor, Tensor]:
    """The changes, and how far each column is from keeping both constraints; columns that are done drop out."""
    found, left = torch.zeros_like(x), torch.full_like(x[0], torch.inf)
    columns = torch.arange(x.shape[1], device=x.device)
    z1, y1, z2, y2 = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(low), torch.zeros_like(low)
    for step in range(1, _STEPS + 1):
        # (1 + rho) I + rho C^T C is inverted by the identity of Woodbury: C is sparse and its rows are few.
        wanted = z1 - y1 + torch.sparse.mm(transposed, z2 - y2)
        change = wanted - torch.sparse.mm(transposed, inner @ torch.sparse.mm(sparse, wanted))
        change *= _RHO / (1 + _RHO)
        mapped = torch.sparse.mm(sparse, change)
        before1, before2 = z1, z2
        moved1, moved2 = change + y1, mapped + y2
        z1, z2 = torch.clamp(moved1, -x, _WHITE - x), torch.minimum(torch.maximum(moved2, low), high)
        y1, y2 = moved1 - z1, moved2 - z2
        if step % _LOOK and step < _STEPS:
            continue
        off = torch.maximum((change - z1).abs().amax(0), (mapped - z2).abs().amax(0))
        moved = torch.maximum((z1 - before1).abs().amax(0), (z2 - before2).abs().amax(0))
        found[:, columns], left[columns] = change, off
        open_ = (torch.maximum(off, moved) >= _DONE).nonzero()[:, 0]
        if not len(open_):
            break
        if len(open_) < len(columns):
            columns = columns[open_]
            x, low, high, z1, y1, z2, y2 = (each[:, open_] for each in (x, low, high, z1, y1, z2, y2))
    return found, left


# -- attacks -----------------------------------------------------------------------------------------------------------


def _pair(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    big, small = planes(source, "source"), planes(target, "target")
    if len(big) != len(small):
        raise ValueError(f"source and target must have the same channels, got {len(big)} and {len(small)}")
    if not (small.shape[1] < big.shape[1] and small.shape[2] < big.shape[2]):
        raise ValueError(
            f"target must be smaller than source, got {small.shape[1]} x {small.shape[2]} and "
            f"{big.shape[1]} x {big.shape[2]}"
        )
    return big, small


def _rounded(x: Tensor) -> Tensor:
    return x.round().clamp(0, _WHITE).to(torch.uint8)


@dataclass(frozen=True)
class ScalingAttack:
    """The strong form: two quadratic programmes, first the columns of the source scaled in width, then its rows.

    Attributes:
        scaler: that is attacked. Those that weigh all pixels (Pillow's, "area") need changes that are seen.
        eps: largest distance from the target in grey levels, of each programme; or several to be tried in turn.
    """

    scaler: Scaler = Scaler()
    eps: float | tuple[float, ...] = 1.0

    def generate(self, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> Bytes:
        """A picture that looks like the source and becomes the target, within 2 eps and rounding, when scaled.

        Args:
            source: (H, W) or (H, W, C) uint8.
            target: (h, w) or (h, w, C) uint8, smaller.

        Raises:
            ValueError: the pictures do not fit each other, or there is no solution for a column (or row).
        """
        big, small = _pair(source, target)
        scaled = self.scaled_in_width(big, small.shape[2])
        columns = _rounded(scaled.double() + self.change_of_columns(scaled, small))
        return from_planes(_rounded(big.double() + self.change_of_rows(big, columns)), np.asarray(source))

    def scaled_in_width(self, source: Tensor, width: int) -> Tensor:
        """The source (..., H, W) uint8 scaled to (..., H, w) as the library does it, rounded."""
        return self.scaler.resize(source, (source.shape[-2], width))

    def change_of_columns(self, scaled: Tensor, target: Tensor) -> Tensor:
        """First step: least change of (..., H, w) so that scaling its height gives (..., h, w); float64."""
        matrix = self.scaler.matrix(scaled.shape[-2], target.shape[-2])
        return least_change(scaled, matrix, target, self.eps)

    def change_of_rows(self, source: Tensor, columns: Tensor) -> Tensor:
        """Second step: least change of (..., H, W) so that scaling its width gives (..., H, w); float64."""
        matrix = self.scaler.matrix(source.shape[-1], columns.shape[-1])
        return least_change(source.mT, matrix, columns.mT, self.eps).mT


@dataclass(frozen=True)
class PenaltyAttack:
    """The weaker form: minimise |x' - x|_p + c |scale(x') - t|^2 by Adam, with x' = (1 + tanh w) / 2.

    Attributes:
        scaler: that is attacked.
        weight: c; pictures are in [0, 1].
        norm: p, e.g. 1, 2 or ``inf``.
        steps, lr: of Adam.
        device: where to compute.
    """

    scaler: Scaler = Scaler()
    weight: float = 1.0
    norm: float = 2.0
    steps: int = 300
    lr: float = 0.1
    device: Literal["cpu", "cuda"] = "cpu"

    def generate(self, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> Bytes:
        """A picture near the source that becomes nearly the target when scaled; arguments as of `ScalingAttack`."""
        big, small = (values.to(self.device).float() / _WHITE for values in _pair(source, target))
        down, across = (
            self.scaler.matrix(length, size).to(big)
            for length, size in zip(big.shape[1:], small.shape[1:], strict=True)
        )
        # Pure black and white lie at infinity.
        free = torch.atanh((2 * big - 1).clamp(-0.999, 0.999)).requires_grad_()
        optimizer = torch.optim.Adam([free], self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                image = (1 + torch.tanh(free)) / 2
                miss = (down @ image @ across.mT - small).square().sum()
                loss = torch.linalg.vector_norm(image - big, self.norm) + self.weight * miss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return from_planes(_rounded((1 + torch.tanh(free.detach())) / 2 * _WHITE), np.asarray(source))
