"""Kernels as products of small factors: which factors a format has, the kernel they make, and convolving without it.

A format describes the kernel (out, in / groups, *kernel_size) of a convolution with R terms; that of a transposed one
is kept the same way round, so that its factors mean the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convatlas.ops.tensor_decomposition import cp_decomposition, tucker_decomposition

__all__ = [
    "FORMATS",
    "KernelFormat",
    "KernelPlan",
    "OneWayFormat",
    "SeparableFormat",
    "SharedCPFormat",
    "Stage",
    "Tucker2Format",
]


@dataclass(frozen=True)
class KernelPlan:
    """The kernel that is to be represented.

    Attributes:
        in_channels, out_channels, groups, kernel_size: of the convolution.
        rank: number of terms.
        transposed: whether it belongs to a transposed convolution.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    rank: int
    transposed: bool = False

    @property
    def fan_in(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.groups

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel_size)


@dataclass(frozen=True)
class Stage:
    """One convolution of the evaluation stage by stage.

    Attributes:
        weight: (out, in / groups, *size), as of a plain convolution.
        groups: of it.
        axes: the position axes along which it goes: these have the stride, padding and dilation of the layer.
        sums: so many neighbouring channels of its output are added up.
    """

    weight: Tensor
    groups: int
    axes: tuple[int, ...] = ()
    sums: int = 1


class KernelFormat(nn.Module, ABC):
    """Parametrization of a weight by the factors of a format; its inverse finds the factors of the nearest kernel.

    Args:
        plan: the kernel.
    """

    def __init__(self, plan: KernelPlan) -> None:
        super().__init__()
        self.plan = plan

    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the factors."""

    @abstractmethod
    def fans(self) -> list[int]:
        """For each factor by what its variance is divided at the start."""

    @abstractmethod
    def kernel(self, *factors: Tensor) -> Tensor:
        """The kernel (out, in / groups, *kernel_size) of the factors."""

    @abstractmethod
    def nearest(self, kernel: Tensor) -> Sequence[Tensor]:
        """Factors of the nearest kernel that is found."""

    @abstractmethod
    def stages(self, *factors: Tensor) -> list[Stage]:
        """Convolutions that one after the other compute what the kernel does."""

    @property
    def terms(self) -> int:
        """Products that are summed in an element of the kernel."""
        return self.plan.rank

    @property
    def variances(self) -> list[float]:
        """Variances of the factors at the start: each element of the kernel has the variance 2 / (in / groups * taps).

        The variance of a product is the product of the variances, so with f the `fans` and n terms those of the factors
        are a / f with a^factors = 2 prod(f) / (n in / groups * taps).
        """
        fans = self.fans()
        whole = 2 * math.prod(fans) / (self.terms * self.plan.fan_in * self.plan.taps)
        return [whole ** (1 / len(fans)) / fan for fan in fans]

    @property
    def macs(self) -> int:
        """Multiply-adds of the stages for each output position of a convolution with stride 1, but for the borders."""
        return sum(
            stage.weight.numel() for stage in self.stages(*(torch.empty(s, device="meta") for s in self.shapes()))
        )

    def forward(self, *factors: Tensor) -> Tensor:
        """The weight of the layer; (in, out / groups, *kernel_size) of a transposed one."""
        kernel = self.kernel(*factors)
        return self._turned(kernel) if self.plan.transposed else kernel

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factors of the nearest weight."""
        return tuple(self.nearest(self._turned(weight) if self.plan.transposed else weight))

    @abstractmethod
    def unit_filters(self, *factors: Tensor) -> Sequence[Tensor]:
        """Factors of the same kernel whose filters have the length 1; the first factor holds the lengths."""

    def extra_repr(self) -> str:
        """Show the number of terms."""
        return f"rank={self.plan.rank}"

    def _turned(self, weight: Tensor) -> Tensor:
        """From (in, out / groups, ...) to (out, in / groups, ...), or back."""
        return weight.unflatten(0, (self.plan.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _along(self, filters: Tensor, axis: int) -> Tensor:
        """Filters (channels, k) as a weight (channels, 1, 1, ..., k, ..., 1)."""
        size = [1] * (1 + len(self.plan.kernel_size))
        size[1 + axis] = self.plan.kernel_size[axis]
        return filters.reshape(-1, *size)

    def _pointwise(self, weight: Tensor) -> Tensor:
        return weight[(...,) + (None,) * len(self.plan.kernel_size)]


class OneWayFormat(KernelFormat):
    """Every output filter is a sum of R products of one-way filters: K[o,i,u,v] = sum_r channel axis0 axis1.

    Factors: channel[r,o,i] (R, out, in / groups) and for each axis axis_d[r,o,u] (R, out, k_d).
    """

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the factors."""
        plan = self.plan
        return [(plan.rank, plan.out_channels, size) for size in (plan.fan_in, *plan.kernel_size)]

    def fans(self) -> list[int]:
        """By what the variances of the factors are divided at the start."""
        return [self.plan.fan_in, *self.plan.kernel_size]

    def kernel(self, *factors: Tensor) -> Tensor:
        """The sum over r of channel, axis0, axis1, ..."""
        axes = "uvw"[: len(factors) - 1]
        return torch.einsum("roi," + ",".join(f"ro{axis}" for axis in axes) + f"->oi{axes}", *factors)

    def nearest(self, kernel: Tensor) -> Sequence[Tensor]:
        """A CP decomposition for each output."""
        return [factor.movedim(2, 0).contiguous() for factor in cp_decomposition(kernel, self.plan.rank)]

    def stages(self, *factors: Tensor) -> list[Stage]:
        """Pointwise to R channels for each output, along each axis in turn, then the sum over the terms."""
        # The terms of an output lie side by side, so that groups stay together.
        channel, *axes = (factor.transpose(0, 1).flatten(0, 1) for factor in factors)
        stages = [Stage(self._pointwise(channel), self.plan.groups)]
        for axis, filters in enumerate(axes):
            sums = self.plan.rank if axis == len(axes) - 1 else 1
            stages.append(Stage(self._along(filters, axis), len(filters), (axis,), sums))
        return stages

    def unit_filters(self, *factors: Tensor) -> Sequence[Tensor]:
        """Filters of length 1; the first factor takes the lengths."""
        channel, *axes = factors
        units, lengths = zip(*(_unit(filters, 2) for filters in axes), strict=True)
        return [channel * torch.stack(lengths).prod(0)[..., None], *units]


class SeparableFormat(KernelFormat):
    """Depthwise separable: R filters for each input channel, mixed. K[o,i,...] = sum_r point[r,o,i] depth[r,i,...].

    Factors: point (R, out, in / groups) and depth (R, in, *kernel_size).
    """

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the factors."""
        plan = self.plan
        return [(plan.rank, plan.out_channels, plan.fan_in), (plan.rank, plan.in_channels, *plan.kernel_size)]

    def fans(self) -> list[int]:
        """By what the variances of the factors are divided at the start."""
        return [self.plan.fan_in, self.plan.taps]

    def kernel(self, *factors: Tensor) -> Tensor:
        """The sum over r of point and depth."""
        point, depth = (factor.unflatten(1, (self.plan.groups, -1)) for factor in factors)
        return torch.einsum("rgoi,rgi...->goi...", point, depth).flatten(0, 1)

    def nearest(self, kernel: Tensor) -> Sequence[Tensor]:
        """The best there is: a singular value decomposition for each input channel."""
        of_inputs = kernel.unflatten(0, (self.plan.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(2)
        point, depth = cp_decomposition(of_inputs, self.plan.rank)
        point = point.unflatten(0, (self.plan.groups, -1)).permute(3, 0, 2, 1).flatten(1, 2)
        return [point.contiguous(), depth.movedim(2, 0).unflatten(2, self.plan.kernel_size).contiguous()]

    def stages(self, *factors: Tensor) -> list[Stage]:
        """Depthwise, then pointwise."""
        point, depth = factors
        filters = depth.transpose(0, 1).flatten(0, 1)[:, None]
        every = tuple(range(len(self.plan.kernel_size)))
        mixing = point.permute(1, 2, 0).flatten(1)
        return [
            Stage(filters, self.plan.in_channels, every),
            Stage(self._pointwise(mixing), self.plan.groups),
        ]

    def unit_filters(self, *factors: Tensor) -> Sequence[Tensor]:
        """Filters of length 1; the first factor takes the lengths."""
        point, (depth, length) = factors[0], _unit(factors[1], 2)
        repeated = self.plan.out_channels // self.plan.groups
        length = length.unflatten(1, (self.plan.groups, -1)).repeat_interleave(repeated, dim=1)
        return [point * length, depth]


class SharedCPFormat(KernelFormat):
    """CP with factors that all outputs share: 1x1 to R channels, a filter along each axis for each, 1x1 to the outputs.

    Factors, for each group by itself: outer (out, R), inner (groups * R, in / groups), and for each axis
    (groups * R, k_d).
    """

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the factors."""
        plan = self.plan
        inner = plan.groups * plan.rank
        return [(plan.out_channels, plan.rank), *((inner, size) for size in (plan.fan_in, *plan.kernel_size))]

    def fans(self) -> list[int]:
        """By what the variances of the factors are divided at the start."""
        return [self.plan.rank, self.plan.fan_in, *self.plan.kernel_size]

    def kernel(self, *factors: Tensor) -> Tensor:
        """The sum over r of outer, inner, axis0, axis1, ..."""
        outer, inner, *axes = (factor.unflatten(0, (self.plan.groups, -1)) for factor in factors)
        letters = "uvw"[: len(axes)]
        terms = ["gor", "gri", *(f"gr{letter}" for letter in letters)]
        return torch.einsum(f"{','.join(terms)}->goi{letters}", outer, inner, *axes).flatten(0, 1)

    def nearest(self, kernel: Tensor) -> Sequence[Tensor]:
        """One CP decomposition for each group."""
        outer, *inner = cp_decomposition(kernel.unflatten(0, (self.plan.groups, -1)), self.plan.rank)
        return [outer.flatten(0, 1), *(factor.mT.flatten(0, 1).contiguous() for factor in inner)]

    def stages(self, *factors: Tensor) -> list[Stage]:
        """Pointwise, along each axis in turn, pointwise."""
        outer, inner, *axes = factors
        between = [Stage(self._along(filters, axis), len(filters), (axis,)) for axis, filters in enumerate(axes)]
        groups = self.plan.groups
        return [Stage(self._pointwise(inner), groups), *between, Stage(self._pointwise(outer), groups)]

    def unit_filters(self, *factors: Tensor) -> Sequence[Tensor]:
        """Filters of length 1; the first factor takes the lengths."""
        outer, *inner = factors
        units, lengths = zip(*(_unit(filters, 1) for filters in inner), strict=True)
        length = torch.stack(lengths).prod(0).unflatten(0, (self.plan.groups, -1))
        repeated = self.plan.out_channels // self.plan.groups
        return [outer * length.repeat_interleave(repeated, dim=0), *units]


class Tucker2Format(KernelFormat):
    """Tucker on the channels: 1x1 to R channels, a small dense convolution, 1x1 to the outputs.

    Factors, for each group by itself: outer (out, R), core (groups * R, R, *kernel_size) and inner
    (groups * R, in / groups).
    """

    @property
    def terms(self) -> int:
        """Products in an element of the kernel."""
        return self.plan.rank**2

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the factors."""
        plan = self.plan
        inner = plan.groups * plan.rank
        return [(plan.out_channels, plan.rank), (inner, plan.rank, *plan.kernel_size), (inner, plan.fan_in)]

    def fans(self) -> list[int]:
        """By what the variances of the factors are divided at the start."""
        return [self.plan.rank, self.plan.rank * self.plan.taps, self.plan.fan_in]

    def kernel(self, *factors: Tensor) -> Tensor:
        """outer core inner, the sum over both ranks."""
        outer, core, inner = (factor.unflatten(0, (self.plan.groups, -1)) for factor in factors)
        return torch.einsum("goa,gab...,gbi->goi...", outer, core, inner).flatten(0, 1)

    def nearest(self, kernel: Tensor) -> Sequence[Tensor]:
        """A Tucker decomposition on the channels for each group."""
        rank = self.plan.rank
        core, (outer, inner) = tucker_decomposition(kernel.unflatten(0, (self.plan.groups, -1)), (rank, rank))
        return [outer.flatten(0, 1), core.flatten(0, 1), inner.mT.flatten(0, 1).contiguous()]

    def stages(self, *factors: Tensor) -> list[Stage]:
        """Pointwise, the core, pointwise."""
        outer, core, inner = factors
        groups, every = self.plan.groups, tuple(range(len(self.plan.kernel_size)))
        return [
            Stage(self._pointwise(inner), groups),
            Stage(core, groups, every),
            Stage(self._pointwise(outer), groups),
        ]

    def unit_filters(self, *factors: Tensor) -> Sequence[Tensor]:
        """Factors of the same kernel with orthonormal channels; the core takes the other parts of their QR."""
        outer, core, inner = (factor.unflatten(0, (self.plan.groups, -1)) for factor in factors)
        (outer, left), (mixed, right) = _filled_qr(outer), _filled_qr(inner.mT)
        core = torch.einsum("gca,gab...,gdb->gcd...", left, core, right)
        return [outer.flatten(0, 1), core.flatten(0, 1), mixed.mT.flatten(0, 1).contiguous()]


def _unit(filters: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Filters divided by their lengths, and these; the first axes count the filters, and those of zeros stay."""
    length = filters.flatten(axes).norm(dim=axes)
    divisor = torch.where(length > 0, length, 1.0)
    return filters / divisor.reshape(*divisor.shape, *(1 for _ in filters.shape[axes:])), length


def _filled_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q (n, rows, columns) and R (n, columns, columns), filled up with zeros where there are fewer rows."""
    q, r = torch.linalg.qr(matrix)
    missing = matrix.shape[-1] - q.shape[-1]
    return nn.functional.pad(q, (0, missing)), nn.functional.pad(r, (0, 0, 0, missing))


#: The formats by name.
FORMATS: dict[str, Callable[[KernelPlan], KernelFormat]] = {
    "oneway": OneWayFormat,
    "separable": SeparableFormat,
    "tucker2": Tucker2Format,
    "cp_shared": SharedCPFormat,
}
