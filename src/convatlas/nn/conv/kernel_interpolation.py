"""Convolutions whose kernels grow with the grid, so that they keep their size in space.

Berner et al.: "Principled Approaches for Extending Neural Architectures to Function Spaces for Operator Learning",
2025, arXiv 2506.10973, section 3. On the grid of the training they are plain convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.nn.conv.geometry import geometry, plain_conv
from convatlas.ops.fourier_resize import fourier_resize

__all__ = [
    "Interpolation",
    "KernelInterpolatedConv1d",
    "KernelInterpolatedConv2d",
    "KernelInterpolatedConv3d",
    "KernelInterpolatedConvTranspose2d",
    "centred",
    "interpolate_field",
    "scale_kernel",
    "scaled_window",
]

#: How kernels and fields are resized: ``bilinear`` stands for linear on every axis.
Interpolation = Literal["bilinear", "fourier"]
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolate_field(x: Tensor, size: Sequence[int], interpolation: Interpolation) -> Tensor:
    """Resize a field (B, C, *grid) to another grid, linearly between the middles of its cells or by Fourier series.

    Raises:
        UnknownName: there is no such interpolation.
    """
    if interpolation not in ("bilinear", "fourier"):
        raise unknown("interpolation", interpolation, ("bilinear", "fourier"))
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if interpolation == "fourier":
        return fourier_resize(x, size)
    return F.interpolate(x, tuple(size), mode=_LINEAR[x.dim() - 2], align_corners=False)


def scale_kernel(weight: Tensor, scale: Sequence[float], interpolation: Interpolation) -> Tensor:
    """A kernel (O, I, *k) for a grid that is ``scale`` times as fine: int(s k - s + 1) taps with the same sum.

    Taps at distance h on the coarse grid span (k - 1) h, and so do those on the fine one.
    """
    size = [max(1, int(s * k - s + 1)) for s, k in zip(scale, weight.shape[2:], strict=True)]
    resized = interpolate_field(weight, size, interpolation)
    return resized / (resized[0, 0].numel() / weight[0, 0].numel())


def scaled_window(
    points: int, taps: int, stride: int, padding: int, scale: float, keep_ratio: bool
) -> tuple[int, int, int]:
    """A window of some taps on a grid that is ``scale`` times as fine: its taps, and the padding before and behind.

    Args:
        points: of the grid.
        taps, stride, padding: on the coarse grid.
        scale: how many times as fine the grid is.
        keep_ratio: pad the end such that there are as many windows as the coarse taps would have on this grid, which
            keeps the ratio of resolutions; else only of windows that keep the size of a field.
    """
    size, before = max(1, int(scale * taps - scale + 1)), int(padding * scale)
    if not (2 * padding + stride >= taps if keep_ratio else stride == 1 and 2 * padding == taps - 1):
        return size, before, before
    windows = (points + 2 * padding - taps) // stride + 1
    return size, before, max(before, (windows - 1) * stride + size - points - before)


class _KernelInterpolated:
    """What plain and transposed layers share; stands before one of torch's convolutions."""

    base_resolution: tuple[int, ...] | None
    interpolation: Interpolation

    def _tell(self, base_resolution: int | Sequence[int] | None, interpolation: Interpolation) -> None:
        layer: Any = self
        dims = len(layer.kernel_size)
        if interpolation not in ("bilinear", "fourier"):
            raise unknown("interpolation", interpolation, ("bilinear", "fourier"))
        if base_resolution is not None:
            base = (base_resolution,) * dims if isinstance(base_resolution, int) else tuple(base_resolution)
            if len(base) != dims or min(base) < 1:
                raise ValueError(f"base_resolution must be one positive number or {dims}, got {base_resolution}")
            base_resolution = base
        self.base_resolution, self.interpolation = base_resolution, interpolation

    @classmethod
    def _made(cls, conv: nn.Module, arguments: dict[str, Any], options: dict[str, Any]) -> Self:
        try:
            layer: Any = cls(**arguments, **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        layer.load_state_dict(conv.state_dict())
        layer.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    def _scale(self, x: Tensor, scale: float | Sequence[float] | None) -> list[float]:
        """How many times as fine the grid of x is, on each axis."""
        dims = x.dim() - 2
        if scale is not None:
            return [float(scale)] * dims if isinstance(scale, int | float) else [float(s) for s in scale]
        if self.base_resolution is None:
            return [1.0] * dims
        return [n / base for n, base in zip(x.shape[2:], self.base_resolution, strict=True)]

    def to_conv(self) -> Any:
        """The plain convolution, of a layer without base resolution; else None, because its kernel follows the grid."""
        return plain_conv(self) if self.base_resolution is None else None

    def extra_repr(self) -> str:
        """Show the geometry and the grid of the training."""
        inherited: str = super().extra_repr()  # type: ignore[misc]
        return f"{inherited}, base_resolution={self.base_resolution}, interpolation={self.interpolation}"


class _KernelInterpolatedConv(_KernelInterpolated):
    """Body of the plain layers."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        base_resolution: int | Sequence[int] | None = None,
        interpolation: Interpolation = "bilinear",
        keep_ratio: bool = False,
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        self._tell(base_resolution, interpolation)
        self.keep_ratio = keep_ratio
        layer: Any = self
        if max(layer.dilation) > 1:
            raise ValueError(f"dilation must be 1, got {layer.dilation}: the taps of the finer kernel fill the gaps")

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """The same convolution with a kernel that follows the grid.

        Args:
            conv: the convolution of torch that the layer is a subclass of.
            **options: of the layer; without ``base_resolution`` its kernel stays as it is.

        Raises:
            Unsupported: it is something else, or dilated.
        """
        dims = next(n for n, kind in _FORMS.items() if issubclass(cls, kind))
        return cls._made(conv, geometry(conv, dims), options)

    def forward(self, x: Tensor, scale: float | Sequence[float] | None = None) -> Tensor:
        """Convolve with the kernel of the grid of x; padding grows with it, the stride stays.

        A layer that keeps the size of a field keeps it on every grid.

        Args:
            x: (B, in_channels, *grid).
            scale: how many times as fine the grid of x is, for all axes or each; found by ``base_resolution`` when left
                out.
        """
        layer: Any = self
        factors = self._scale(x, scale)
        if all(factor == 1 for factor in factors):
            y: Tensor = layer._conv_forward(x, layer.weight, layer.bias)
            return y
        kernel = scale_kernel(layer.weight, factors, self.interpolation)
        edges: list[int] = []
        for axis, (factor, taps) in enumerate(zip(factors, layer.kernel_size, strict=True)):
            window = (x.shape[2 + axis], taps, layer.stride[axis], _pad(layer.padding, axis, taps))
            edges = [*scaled_window(*window, factor, self.keep_ratio)[1:], *edges]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, edges, mode=mode) if any(edges) else x
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(factors) - 1]
        return conv(x, kernel, layer.bias, layer.stride, 0, 1, layer.groups)


def _pad(padding: str | tuple[int, ...], axis: int, taps: int) -> int:
    if isinstance(padding, str):
        return (taps - 1) // 2 if padding == "same" else 0
    return padding[axis]


class KernelInterpolatedConv1d(_KernelInterpolatedConv, nn.Conv1d):
    """Convolution of signals on any grid; see `KernelInterpolatedConv2d` for the arguments."""


class KernelInterpolatedConv2d(_KernelInterpolatedConv, nn.Conv2d):
    """Convolution whose kernel is resized to the grid of its input, so that it spans the same length on all grids.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them; dilation is 1.
        base_resolution: points of each axis, or of all, of the input on the grid of the training; without it the kernel
            stays as it is unless ``forward`` is told the scale.
        interpolation: of the kernel: ``bilinear`` or ``fourier``.
        keep_ratio: pad the end where a grown kernel would find fewer places than a stride leaves points, so that an
            even kernel with its size as stride halves every grid; the authors' code does not.

    Raises:
        ValueError: a number is out of range.
        UnknownName: there is no such interpolation.
    """


class KernelInterpolatedConv3d(_KernelInterpolatedConv, nn.Conv3d):
    """Convolution of volumes on any grid; see `KernelInterpolatedConv2d` for the arguments."""


class KernelInterpolatedConvTranspose2d(_KernelInterpolated, nn.ConvTranspose2d):
    """Transposed convolution that is computed on the grid of the training, between two resizings.

    On other grids its result has ``stride`` times the points of its input.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as torch's transposed convolution takes them.
        output_padding, groups, bias, dilation, padding_mode, device, dtype: the same.
        base_resolution, interpolation: as in `KernelInterpolatedConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        base_resolution: int | Sequence[int] | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        place = (stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[arg-type]
        self._tell(base_resolution, interpolation)

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """The same transposed convolution for any grid.

        Raises:
            Unsupported: it is something else.
        """
        return cls._made(conv, geometry(conv, 2, transposed=True), options)

    def forward(self, x: Tensor, scale: float | Sequence[float] | None = None) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H', W'); ``scale`` as in `KernelInterpolatedConv2d`."""
        factors = self._scale(x, scale)
        if all(factor == 1 for factor in factors):
            return super().forward(x)
        grid = x.shape[2:]
        coarse = [max(1, int(n / factor)) for n, factor in zip(grid, factors, strict=True)]
        y = super().forward(interpolate_field(x, coarse, self.interpolation))
        y = centred(y, [step * n for step, n in zip(self.stride, coarse, strict=True)])
        return interpolate_field(y, [step * n for step, n in zip(self.stride, grid, strict=True)], self.interpolation)


def centred(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pad a field (B, C, H, W) with zeros to a size, or crop it, evenly on both sides."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    missing = [wanted - n for wanted, n in zip(size, x.shape[2:], strict=True)]
    return F.pad(x, [side for gap in reversed(missing) for side in (gap // 2, gap - gap // 2)])


_FORMS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
