"""Channel attention by a convolution over the channel axis, and the linear gates that it was derived from.

Wang, Wu, Zhu, Li, Zuo, Hu: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
arXiv 1910.03151.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from convatlas.ops.eca import Padding, channel_gate, eca, eca_kernel_size
from convatlas.weights import Layout

__all__ = ["ECA", "ChannelGate", "eca_per_stage"]


class ECA(nn.Module):
    """Efficient channel attention: x * sigmoid(conv1d(mean of x)) with one short kernel over the channel axis.

    k parameters when shared (the paper's ECA), C * k when not (ECA-NS). Neighbouring channels are coupled, so a
    permutation or pruning of the channels changes the layer.

    Args:
        channels: channels C of the input; may be left out when ``kernel_size`` is given and the weights are shared.
        kernel_size: odd kernel size k; chosen from ``channels`` by the paper's formula when left out.
        shared: one kernel for all channels, or a kernel for each.
        padding: what lies beyond the first and last channel: ``zeros`` or, as in cECA, ``circular``.
        gamma, beta: of the formula for k.
        device, dtype: of the parameter.

    Raises:
        ValueError: neither channels nor kernel_size is given, channels is smaller than 1 or missing where needed,
            kernel_size is even, or padding is unknown.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=((r"^conv\.weight$", "weight"),))}

    def __init__(
        self,
        channels: int | None = None,
        *,
        kernel_size: int | None = None,
        shared: bool = True,
        padding: Padding = "zeros",
        gamma: float = 2,
        beta: float = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels is None and (kernel_size is None or not shared):
            raise ValueError("channels must be given, or kernel_size with shared weights")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if kernel_size is None:
            kernel_size = eca_kernel_size(channels or 1, gamma, beta)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ECA kernel size must be odd, got {kernel_size}")
        if padding not in ("zeros", "circular"):
            raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
        self.channels = channels
        self.padding: Padding = padding
        kernels = 1 if shared or channels is None else channels
        self.weight = nn.Parameter(torch.empty(kernels, 1, kernel_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernel uniformly within 1/sqrt(k), as torch does for a one-channel Conv1d."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same shape."""
        if self.channels is not None:
            _check_channels(x, self.channels)
        return eca(x, self.weight, self.padding)

    def extra_repr(self) -> str:
        """Show channels, kernel size, sharing and padding."""
        shared = self.weight.shape[0] == 1
        return f"{self.channels}, kernel_size={self.weight.shape[2]}, shared={shared}, padding={self.padding!r}"


class ChannelGate(nn.Module):
    """x * sigmoid(W y) with y the channel means and W block-diagonal: the forms between SE and ECA (paper, table 2).

    SE-Var1 has no W (``groups=None``), SE-Var2 a diagonal one (``groups=channels``), SE-Var3 a full one (``groups=1``),
    and SE-GC blocks between the two. C * C / groups parameters, no bias.

    Args:
        channels: channels C of the input.
        groups: number of blocks on the diagonal of W; None leaves W out.
        device, dtype: of the parameter.

    Raises:
        ValueError: channels is smaller than 1, or groups does not divide it.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int | None = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if groups is not None and (groups < 1 or channels % groups):
            raise ValueError(f"groups must divide the {channels} channels, got {groups}")
        self.channels = channels
        self.groups = groups
        self.weight = None
        if groups is not None:
            self.weight = nn.Parameter(torch.empty(channels, channels // groups, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(C / groups), as torch does for a grouped convolution."""
        if self.weight is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same shape."""
        _check_channels(x, self.channels)
        return channel_gate(x, self.weight)

    def extra_repr(self) -> str:
        """Show channels and groups."""
        return f"{self.channels}, groups={self.groups}"


def eca_per_stage(kernel_sizes: Sequence[int] | str, stages: int) -> tuple[Callable[[int], ECA], ...]:
    """Makers of the ECA layers of each stage, from channels, for networks whose kernel size differs by stage.

    Args:
        kernel_sizes: one odd size a stage, as numbers or as the digits that name the released files ("3557").
        stages: how many there must be.

    Raises:
        ValueError: there is another number of sizes. One that is not odd is refused when its layer is made.
    """
    if len(kernel_sizes) != stages or (isinstance(kernel_sizes, str) and not kernel_sizes.isdecimal()):
        raise ValueError(f"kernel_sizes must be {stages} odd numbers, one for each stage, got {kernel_sizes!r}")
    return tuple(partial(ECA, kernel_size=int(size)) for size in kernel_sizes)


def _check_channels(x: Tensor, channels: int) -> None:
    if x.dim() < 3 or x.shape[1] != channels:
        raise ValueError(f"x must be (B, {channels}, ...), got {tuple(x.shape)}")
