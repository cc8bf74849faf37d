"""Subspace attention: one spatial attention map for each group of channels.

Saini, Jha, Das, Mittal, Mohan: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", WACV 2020, arXiv 2006.15102.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.weights import Layout

__all__ = ["ULSAM"]

_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _from_subspaces(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Join the parameters of the authors' modules, one for each group of channels, in the order of the groups."""
    found: dict[str, dict[int, Tensor]] = {}
    joined = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*?)subspaces\.(\d+)\.(.+)", key)
        if match is None:
            joined[key] = value
        else:
            found.setdefault(match[1] + match[3], {})[int(match[2])] = value
    for key, parts in found.items():
        values = [parts[index] for index in sorted(parts)]
        prefix, name = re.fullmatch(r"(.*?)((?:conv|bn)_\w+\.\w+)", key).groups()  # type: ignore[union-attr]
        if name == "conv_dws.weight":
            joined[f"{prefix}scale"] = torch.cat([value.flatten() for value in values])
        elif name == "conv_dws.bias":
            joined[f"{prefix}shift"] = torch.cat(values)
        elif name == "conv_point.weight":
            joined[f"{prefix}point"] = torch.stack([value.flatten() for value in values])
        elif name == "conv_point.bias":
            joined[f"{prefix}offset"] = torch.cat(values)
        else:
            joined[f"{prefix}{name}"] = values[0] if name.endswith("num_batches_tracked") else torch.cat(values)
    return joined


class ULSAM(nn.Module):
    """x + x * A in each group of channels, with A a softmax over the positions (equations 1-4).

    Per group of n channels: a scale and a shift of each channel, batch norm, ReLU; maximum over 3 neighbours along each
    axis; one weighted sum of the channels, batch norm, ReLU; softmax over all positions. The groups are computed
    together. 5 C + 3 g parameters. At high resolution A is small, about one over the number of positions.

    Args:
        channels: channels C of the input.
        num_splits: number g of groups of neighbouring channels.
        momentum: weight of a new batch in the running statistics; the authors' code has 0.9, with which they follow the
            last batch closely.

    Raises:
        ValueError: channels is not divisible by num_splits.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(function=_from_subspaces)}

    def __init__(
        self,
        channels: int,
        *,
        num_splits: int = 4,
        momentum: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or num_splits < 1 or channels % num_splits:
            raise ValueError(f"channels must be divisible by num_splits, got {channels} and {num_splits}")
        self.channels, self.num_splits = channels, num_splits
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bn_dws = nn.BatchNorm1d(channels, momentum=momentum, device=device, dtype=dtype)
        self.point = nn.Parameter(torch.empty(num_splits, channels // num_splits, device=device, dtype=dtype))
        self.offset = nn.Parameter(torch.empty(num_splits, device=device, dtype=dtype))
        self.bn_point = nn.BatchNorm1d(num_splits, momentum=momentum, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as torch does for 1x1 convolutions with one and with n input channels."""
        for parameter in (self.scale, self.shift):
            nn.init.uniform_(parameter, -1, 1)
        bound = (self.channels // self.num_splits) ** -0.5
        for parameter in (self.point, self.offset):
            nn.init.uniform_(parameter, -bound, bound)

    def attention_maps(self, x: Tensor) -> Tensor:
        """The map A of each group, (B, g, *positions): not negative, with sum 1 over the positions."""
        if x.dim() - 2 not in _POOLS or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be (B, {self.channels}, ...) with one to three position axes, got {tuple(x.shape)}"
            )
        flat = x.flatten(2)
        d = self.bn_dws(flat * self.scale[:, None] + self.shift[:, None]).relu()
        p = _POOLS[x.dim() - 2](d.reshape(x.shape), 3, stride=1, padding=1).flatten(2)
        groups = p.unflatten(1, (self.num_splits, -1))
        q = (groups * self.point[:, :, None]).sum(2) + self.offset[:, None]
        q = self.bn_point(q).relu()
        maps = q.softmax(2, dtype=torch.promote_types(q.dtype, torch.float32))
        return maps.reshape(x.shape[0], self.num_splits, *x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same shape."""
        maps = self.attention_maps(x).to(x.dtype).unsqueeze(2)
        groups = x.unflatten(1, (self.num_splits, -1))
        return (groups + groups * maps).flatten(1, 2)

    def extra_repr(self) -> str:
        """Show channels and groups."""
        return f"{self.channels}, num_splits={self.num_splits}"
