"""Pooling and padding whose windows and margins have a size in space instead of one in points.

Berner et al.: "Principled Approaches for Extending Neural Architectures to Function Spaces for Operator Learning",
2025, arXiv 2506.10973, section 3. On the grid of the training they do what torch's layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import as_tuple
from convatlas.nn.conv.kernel_interpolation import scaled_window

__all__ = ["PADS", "POOLS", "GridPad", "GridPool"]

POOLS: dict[type[nn.Module], int] = {
    **{nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
    **{nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3},
}
PADS = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMUM = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


class GridPool(nn.Module):
    """The mean or maximum over windows of one length in space, with the stride of a pooling layer.

    Args:
        pool: one of torch's pooling layers.
        base_resolution: points of each axis of its input on the grid of the training.

    Raises:
        Unsupported: it is no such layer, or one with dilation, indices or a divisor of its own.
    """

    def __init__(self, pool: Any, base_resolution: Sequence[int]) -> None:
        super().__init__()
        dims = POOLS.get(type(pool))
        if dims is None:
            raise Unsupported(f"it must be one of torch's pooling layers, got {type(pool).__name__}")
        if as_tuple(getattr(pool, "dilation", 1), dims, "dilation") != (1,) * dims or pool.ceil_mode:
            raise Unsupported("its windows have gaps or reach beyond the end")
        if getattr(pool, "return_indices", False) or getattr(pool, "divisor_override", None) is not None:
            raise Unsupported("it returns indices or has a divisor of its own")
        self.pool, self.base_resolution = pool, tuple(base_resolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *grid) to (B, C, *grid / stride)."""
        pool: Any = self.pool
        dims = len(self.base_resolution)
        scale = [n / base for n, base in zip(x.shape[2:], self.base_resolution, strict=True)]
        if all(factor == 1 for factor in scale):
            y: Tensor = pool(x)
            return y
        kernel, stride, padding = (
            as_tuple(getattr(pool, name), dims, name) for name in ("kernel_size", "stride", "padding")
        )
        windows = [
            scaled_window(*each, keep_ratio=True)
            for each in zip(x.shape[2:], kernel, stride, padding, scale, strict=True)
        ]
        size = [window[0] for window in windows]
        edges = [pad for window in reversed(windows) for pad in window[1:]]
        if isinstance(pool, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
            return _MAXIMUM[dims - 1](F.pad(x, edges, value=float("-inf")), size, stride)
        # Whether zeros beyond the border count is told by what the mean of ones becomes.
        total = _AVERAGE[dims - 1](F.pad(x, edges), size, stride)
        if pool.count_include_pad and any(padding):
            return total
        ones = _AVERAGE[dims - 1](F.pad(x.new_ones(1, 1, *x.shape[2:]), edges), size, stride)
        return total / ones


class GridPad(nn.Module):
    """A margin of one length in space around a field.

    Args:
        pad: one of torch's padding layers.
        base_resolution: points of each axis of its input on the grid of the training.

    Raises:
        Unsupported: it is no such layer.
    """

    def __init__(self, pad: Any, base_resolution: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(pad, PADS):
            raise Unsupported(f"it must be one of torch's padding layers, got {type(pad).__name__}")
        name = type(pad).__name__
        self.mode = next(mode for start, mode in _MODES.items() if name.startswith(start))
        self.padding, self.base_resolution = tuple(pad.padding), tuple(base_resolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *grid) to a larger grid."""
        scale = [n / base for n, base in zip(x.shape[2:], self.base_resolution, strict=True)]
        edges = [round(pad * scale[len(scale) - 1 - index // 2]) for index, pad in enumerate(self.padding)]
        return F.pad(x, edges, mode=self.mode)


_MODES = {"Zero": "constant", "Circular": "circular", "Reflection": "reflect", "Replication": "replicate"}
