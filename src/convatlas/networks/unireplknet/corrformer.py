"""The decoder of Corrformer: correlations in time and, along a tree of nodes, in space instead of attention.

Wu, Zhou, Long, Wang: "Interpretable Weather Forecasting for Worldwide Stations with a Unified Deep Model", Nature
Machine Intelligence 2023. It is built on Wu, Xu, Wang, Long: "Autoformer", NeurIPS 2021, arXiv 2106.13008.

Nodes are groups of series that belong together; a tree of nodes says which groups are neighbours. A tensor (B N, L, C)
holds the N nodes of each sample beside each other, L times and C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from convatlas.nn.attention import check_heads
from convatlas.ops.precision import without_autocast
from convatlas.weights import Layout

__all__ = [
    "AutoCorrelation",
    "CorrformerDecoder",
    "CorrformerDecoderLayer",
    "CrossCorrelation",
    "MultiCorrelation",
    "correlation",
    "decompose",
]


def decompose(x: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Seasonal part and trend of (B, L, C): the trend is the mean of a window, the first and last values repeated.

    Raises:
        ValueError: window is even.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd, got {window}")
    reach = window // 2
    padded = torch.cat([x[:, :1].expand(-1, reach, -1), x, x[:, -1:].expand(-1, reach, -1)], dim=1)
    trend = F.avg_pool1d(padded.transpose(1, 2), window, stride=1).transpose(1, 2)
    return x - trend, trend


def correlation(query: Tensor, key: Tensor) -> Tensor:
    """Circular correlation along the last axis: c(lag) = sum over t of query(t + lag) key(t); at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        spectrum = torch.fft.rfft(query.to(dtype)) * torch.fft.rfft(key.to(dtype)).conj()
        return torch.fft.irfft(spectrum, query.shape[-1])


def _roll(values: Tensor, shift: Tensor) -> Tensor:
    """Values (..., L) at t + shift, round the end; shift has the axes of values without the last, or is expanded."""
    length = values.shape[-1]
    index = (torch.arange(length, device=values.device) + shift.unsqueeze(-1)) % length
    return values.gather(-1, index.expand_as(values))


class _Projected(nn.Module):
    """Projections of queries, keys and values into heads, and of the result."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.query_projection = nn.Linear(channels, channels)
        self.key_projection = nn.Linear(channels, channels)
        self.value_projection = nn.Linear(channels, channels)
        self.out_projection = nn.Linear(channels, channels)

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """(..., L, C) to (..., heads, channels, L); keys and values are cut or padded with zeros to the queries."""
        length = query.shape[-2]
        projected = (self.query_projection(query), self.key_projection(key), self.value_projection(value))
        fitted = [F.pad(x, (0, 0, 0, max(length - x.shape[-2], 0)))[..., :length, :] for x in projected]
        return [x.unflatten(-1, (self.num_heads, -1)).movedim(-3, -1) for x in fitted]

    def joined(self, heads: Tensor) -> Tensor:
        """(..., heads, channels, L) to (..., L, C)."""
        weight = self.out_projection.weight
        return self.out_projection(heads.movedim(-1, -3).flatten(-2).to(weight.dtype))


class AutoCorrelation(_Projected):
    """Values rolled by the lags at which queries and keys agree best, weighted by how well: correlation in time.

    Args:
        channels: channels C.
        num_heads: divides C.
        factor: the int(factor ln L) best lags of each head are taken.
    """

    def __init__(self, channels: int, num_heads: int, *, factor: float = 1.0) -> None:
        super().__init__(channels, num_heads)
        self.factor = factor

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map queries (B, L, C), keys and values (B, S, C) to (B, L, C)."""
        q, k, v = self.heads(query, key, value)
        count = min(max(int(self.factor * math.log(q.shape[-1])), 1), q.shape[-1])
        weights, lags = correlation(q, k).mean(-2).topk(count, dim=-1)
        weights = weights.softmax(-1)
        pairs = zip(lags.unbind(-1), weights.unbind(-1), strict=True)
        rolled = [_roll(v, lag.unsqueeze(-1)) * weight[..., None, None] for lag, weight in pairs]
        return self.joined(torch.stack(rolled).sum(0))


class CrossCorrelation(_Projected):
    """Values of several nodes brought in step by their lags behind the mean node, convolved in the order of the lags.

    Args:
        channels: channels C.
        num_heads: divides C.
        length: number L of times, which decides the channels of the convolutions.
        num_layers: of the convolutions along the nodes.
        dropout: in them.
    """

    def __init__(
        self, channels: int, num_heads: int, *, length: int, num_layers: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__(channels, num_heads)
        width = channels // num_heads * length
        self.fusion = nn.Sequential(*(_CausalBlock(width, 3**layer, dropout) for layer in range(num_layers)))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map queries (B, N, L, C), keys and values (B, N, S, C) of N nodes to (B, N, L, C)."""
        q, k, v = self.heads(query, key, value)
        length = q.shape[-1]
        agreement, lag = correlation(q.mean(1, keepdim=True).expand_as(k), k).mean(-2).max(-1)  # (B, N, heads)
        lead = length - lag
        aligned = _roll(v, lead.unsqueeze(-1)) * agreement.sigmoid()[..., None, None]
        order = lead.argsort(dim=1, stable=True)
        ordered = aligned.gather(1, order[..., None, None].expand_as(aligned))
        # A head's channels and times are the channels of a signal along the nodes.
        signal = ordered.movedim(1, -1).flatten(2, 3).flatten(0, 1)
        fused = self.fusion(signal.to(self.out_projection.weight.dtype))
        fused = fused.reshape(*q.shape[:1], *q.shape[2:], -1).movedim(-1, 1)
        back = order.argsort(1)
        return self.joined(_roll(fused.gather(1, back[..., None, None].expand_as(fused)), lag.unsqueeze(-1)))


class _WeightNorm(nn.Module):
    """A weight as magnitude times direction, one magnitude an output channel; torch's own leaves a hook behind."""

    def forward(self, magnitude: Tensor, direction: Tensor) -> Tensor:
        return direction * (magnitude / _norm(direction))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _norm(weight), weight


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)


class _CausalBlock(nn.Module):
    """Two weight-normalised convolutions that look back, each with ReLU and dropout; ReLU of the sum with the input."""

    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv1d(channels, channels, 3, dilation=dilation) for _ in range(2))
        for conv in (self.conv1, self.conv2):
            register_parametrization(conv, "weight", _WeightNorm())
        self.margin = 2 * dilation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(F.pad(x, (self.margin, 0))).relu())
        y = self.dropout(self.conv2(F.pad(y, (self.margin, 0))).relu())
        return (x + y).relu()


class MultiCorrelation(nn.Module):
    """The sum of `AutoCorrelation` of each node and `CrossCorrelation` at every level of a tree of nodes.

    At a level the nodes below are averaged, and the children of one node are correlated with each other; what comes
    out goes to all nodes below, and the levels are averaged.

    Args:
        channels, num_heads: as of both.
        length: number of times of the queries.
        tree: children of each node, level by level; their product is the number N of nodes.
        factor, num_layers, dropout: of the two.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        length: int,
        tree: Sequence[int],
        factor: float = 1.0,
        num_layers: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tree = tuple(tree)
        self.auto_correlation = AutoCorrelation(channels, num_heads, factor=factor)
        self.cross_correlation = CrossCorrelation(
            channels, num_heads, length=length, num_layers=num_layers, dropout=dropout
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map queries (B N, L, C), keys and values (B N, S, C) to (B N, L, C)."""
        total = torch.zeros_like(query)
        for level, children in enumerate(self.tree):
            above, below = math.prod(self.tree[:level]), math.prod(self.tree[level + 1 :])

            def averaged(x: Tensor, above: int = above, children: int = children, below: int = below) -> Tensor:
                return x.unflatten(0, (-1, above, children, below)).mean(3).flatten(0, 1)

            y = self.cross_correlation(averaged(query), averaged(key), averaged(value))
            total = total + y.unsqueeze(2).expand(-1, -1, below, -1, -1).flatten(0, 2)
        return self.auto_correlation(query, key, value) + total / len(self.tree)


class CorrformerDecoderLayer(nn.Module):
    """Correlation with itself, with the encoder's output, then an MLP; after each the trend is taken out.

    Args:
        channels: channels C.
        num_heads: divides C.
        out_channels: series of a node.
        length: number L of times.
        tree: of the nodes, see `MultiCorrelation`.
        window: odd number of times that the trend is the mean of.
        hidden_channels: of the MLP.
        factor, num_layers: of the correlations.
        act: activation of the MLP.
        dropout: behind each part.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        out_channels: int,
        *,
        length: int,
        tree: Sequence[int],
        window: int = 25,
        hidden_channels: int = 2048,
        factor: float = 1.0,
        num_layers: int = 3,
        act: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.act = window, act
        self.multi_correlation, self.cross_multi_correlation = (
            MultiCorrelation(
                channels,
                num_heads,
                length=length,
                tree=tree,
                factor=factor,
                num_layers=num_layers,
                dropout=dropout,
            )
            for _ in range(2)
        )
        self.conv1 = nn.Conv1d(channels, hidden_channels, 1, bias=False)
        self.conv2 = nn.Conv1d(hidden_channels, channels, 1, bias=False)
        self.projection = nn.Conv1d(channels, out_channels, 3, padding=1, padding_mode="circular", bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Seasonal part (B N, L, C) and trend (B N, L, out_channels) of x (B N, L, C) beside cross (B N, S, C)."""
        x, first = decompose(x + self.dropout(self.multi_correlation(x, x, x)), self.window)
        x, second = decompose(x + self.dropout(self.cross_multi_correlation(x, cross, cross)), self.window)
        y = self.dropout(self.act(self.conv1(x.transpose(1, 2))))
        y = self.dropout(self.conv2(y)).transpose(1, 2)
        x, third = decompose(x + y, self.window)
        trend = self.projection((first + second + third).transpose(1, 2)).transpose(1, 2)
        return x, trend


class CorrformerDecoder(nn.Module):
    """Decoder layers one behind the other, a norm without time mean, and a linear layer to the series of each node.

    Args:
        depth: number of layers.
        channels, num_heads, out_channels, length, tree, window, hidden_channels, factor, num_layers, act, dropout: of
            `CorrformerDecoderLayer`.

    Raises:
        ValueError: num_heads does not divide channels, window is even, or the tree is empty.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r".*\.causal_fusion\.network\.\d+\.net\..*", ""),  # the same tensors once more
                (r"\.inner_correlation\.causal_fusion\.network\.", ".fusion."),
                (r"(^|\.)norm\.layernorm\.", r"\1norm."),
            )
        )
    }

    def __init__(
        self,
        channels: int,
        num_heads: int,
        out_channels: int,
        *,
        length: int,
        tree: Sequence[int],
        depth: int = 1,
        window: int = 25,
        hidden_channels: int = 2048,
        factor: float = 1.0,
        num_layers: int = 3,
        act: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        if not tree or min(tree) < 1:
            raise ValueError(f"tree must name the children of the nodes at each level, got {tuple(tree)}")
        self.nodes, self.length = math.prod(tree), length
        self.layers = nn.ModuleList(
            CorrformerDecoderLayer(
                channels,
                num_heads,
                out_channels,
                length=length,
                tree=tree,
                window=window,
                hidden_channels=hidden_channels,
                factor=factor,
                num_layers=num_layers,
                act=act,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor, cross: Tensor, trend: Tensor) -> tuple[Tensor, Tensor]:
        """Seasonal part and trend, both (B N, L, out_channels).

        Args:
            x: embedded seasonal part (B N, L, C).
            cross: output of the encoder (B N, S, C).
            trend: what is known of the trend (B N, L, out_channels).

        Raises:
            ValueError: x does not have so many nodes and times.
        """
        if x.dim() != 3 or x.shape[1] != self.length or x.shape[0] % self.nodes:
            raise ValueError(
                f"x must be (B N, L, C) with {self.nodes} nodes and {self.length} times, got {tuple(x.shape)}"
            )
        for layer in self.layers:
            x, more = layer(x, cross)
            trend = trend + more
        x = self.norm(x)
        return self.projection(x - x.mean(1, keepdim=True)), trend
