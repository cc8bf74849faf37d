"""The separator of Conv-TasNet: a temporal convolutional network that finds the mask of each source.

Luo, Mesgarani: "Conv-TasNet", TASLP 2019, arXiv 1809.07454, section 2.3, figures 1B and 1C. Letters of the paper: N
filters, B bottleneck, H hidden and Sc skip channels, P kernel, X blocks a repeat, R repeats; K frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.nn.activation import ScalarPReLU
from convatlas.nn.depthwise import DepthwiseConv1d
from convatlas.nn.norm import ChannelLayerNorm, CumulativeLayerNorm, CumulativeMoments

__all__ = ["BlockState", "History", "Norm", "Separator", "SeparatorState", "TCNBlock", "make_norm"]

#: What is normalised over: everything; all frames so far; the frame; the channel; the batch.
Norm = Literal["global", "cumulative", "frame", "feature", "batch"]

_EPS = 1e-8


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A norm for (B, channels, K) by name.

    ==============  ========  =============  ======================================================
    name            paper     asteroid       mean and variance over
    ==============  ========  =============  ======================================================
    ``global``      gLN       ``gLN``        channels and time
    ``cumulative``  cLN       ``cgLN``       channels and all frames up to the present one
    ``frame``       --        ``cLN``        channels, each frame alone
    ``feature``     --        ``fgLN``       time, each channel alone
    ``batch``       BN        ``bN``         batch and time, each channel alone; running ones in use
    ==============  ========  =============  ======================================================

    The cLN of asteroid and of some other codes is not that of the paper.

    Raises:
        UnknownName: there is no such norm.
    """
    if kind == "global":
        return nn.GroupNorm(1, channels, eps=_EPS)
    if kind == "cumulative":
        return CumulativeLayerNorm(channels, eps=_EPS)
    if kind == "frame":
        return ChannelLayerNorm(channels, eps=_EPS)
    if kind == "feature":
        return nn.GroupNorm(channels, channels, eps=_EPS)
    if kind == "batch":
        return nn.BatchNorm1d(channels)
    raise unknown("norm", str(kind), get_args(Norm))


#: Layers that can be used block by block.
_STREAMED = (
    nn.Conv1d,
    DepthwiseConv1d,
    ScalarPReLU,
    nn.Identity,
    ChannelLayerNorm,
    CumulativeLayerNorm,
    nn.BatchNorm1d,
)


class History:
    """The frames that a dilated convolution still needs, in a buffer that seldom moves.

    Args:
        like: gives type and device, (B, ...).
        channels: of a frame.
        reach: (P - 1) dilation, frames to keep; they begin as zeros.
    """

    def __init__(self, like: Tensor, channels: int, reach: int) -> None:
        self.reach = reach
        self.end = reach
        self.rows = like.new_zeros(len(like), 2 * reach, channels)

    def extend(self, x: Tensor) -> int:
        """Append frames (B, n, channels) to ``rows``; gives the row of the first frame that x still sees."""
        count = x.shape[1]
        if self.end + count > self.rows.shape[1]:
            kept = self.rows[:, self.end - self.reach : self.end].clone()
            if self.reach + count > self.rows.shape[1]:
                self.rows = self.rows.new_zeros(len(kept), 2 * self.reach + count, kept.shape[2])
            self.rows[:, : self.reach] = kept
            self.end = self.reach
        self.rows[:, self.end : self.end + count] = x
        self.end += count
        return self.end - count - self.reach


@dataclass
class BlockState:
    """What a block remembers of the past: both norms, and frames in front of the depthwise convolution."""

    norm: Any
    history: History
    depthwise_norm: Any


@dataclass
class SeparatorState:
    """What a separator remembers of the past."""

    input_norm: Any
    blocks: list[BlockState]


class TCNBlock(nn.Module):
    """1x1 convolution, PReLU, norm, dilated depthwise convolution, PReLU, norm; then residual and skip (figure 1C).

    Args:
        channels: B.
        hidden_channels: H.
        skip_channels: Sc; 0 for no skip connection.
        kernel_size: P.
        dilation: of the depthwise convolution.
        norm: name of both norms.
        causal: whether a frame sees only those before it.
        bias: whether convolutions have biases.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        skip_channels: int,
        kernel_size: int,
        dilation: int,
        norm: Norm,
        *,
        causal: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        reach = (kernel_size - 1) * dilation
        self.reach, self.causal = reach, causal
        self.conv = nn.Conv1d(channels, hidden_channels, 1, bias=bias)
        self.act = ScalarPReLU()
        self.norm = make_norm(norm, hidden_channels)
        self.depthwise = DepthwiseConv1d(
            hidden_channels,
            hidden_channels,
            kernel_size,
            padding=0 if causal else reach // 2,
            dilation=dilation,
            bias=bias,
        )
        self.depthwise_act = ScalarPReLU()
        self.depthwise_norm = make_norm(norm, hidden_channels)
        self.residual = nn.Conv1d(hidden_channels, channels, 1, bias=bias)
        self.skip = nn.Conv1d(hidden_channels, skip_channels, 1, bias=bias) if skip_channels else None

    def forward(self, u: Tensor) -> Tensor:
        """The hidden frames (B, H, K) of (B, channels, K), which ``residual`` and ``skip`` read."""
        h = self.norm(self.act(self.conv(u)))
        if self.causal:
            h = F.pad(h, (self.reach, 0))
        y: Tensor = self.depthwise_norm(self.depthwise_act(self.depthwise(h)))
        return y

    def initial_state(self, like: Tensor) -> BlockState:
        """No past, for a batch of the size, type and device of ``like``."""
        history = History(like, self.depthwise.in_channels, self.reach)
        return BlockState(_norm_state(self.norm, like), history, _norm_state(self.depthwise_norm, like))

    def step(self, u: Tensor, state: BlockState) -> Tensor:
        """The hidden frames (B, n, H) of the next frames (B, n, channels); the state goes on to what comes then."""
        h = self.act(_pointwise(self.conv, u))
        h, state.norm = _norm_step(self.norm, h, state.norm)
        count, first = h.shape[1], state.history.extend(h)
        rows, weight, dilation = state.history.rows, self.depthwise.weight.squeeze(1), self.depthwise.dilation[0]
        y = rows[:, first : first + count] * weight[:, 0]
        for tap in range(1, weight.shape[1]):
            start = first + tap * dilation
            y = torch.addcmul(y, rows[:, start : start + count], weight[:, tap])
        if self.depthwise.bias is not None:
            y = y + self.depthwise.bias
        y, state.depthwise_norm = _norm_step(self.depthwise_norm, self.depthwise_act(y), state.depthwise_norm)
        return y


class Separator(nn.Module):
    """Masks (B, C, N, K) of the features (B, N, K) of a mixture.

    Args:
        features: N.
        num_sources: C.
        bottleneck_channels: B.
        hidden_channels: H.
        skip_channels: Sc; with 0 the masks come from the residual path, as in the first version of the paper.
        kernel_size: P, odd.
        num_blocks: X, with dilations 1, 2, 4, ...
        num_repeats: R.
        norm: name of the norms of the blocks.
        input_norm: name of the norm of the features.
        mask_act: ``sigmoid``, ``relu``, ``softmax`` over the sources, ``tanh`` or ``linear``.
        mask_prelu: whether there is a PReLU before the masks' convolution.
        causal: whether a frame sees only those before it.
        bias: whether convolutions have biases.
    """

    def __init__(
        self,
        features: int,
        num_sources: int,
        bottleneck_channels: int,
        hidden_channels: int,
        skip_channels: int,
        kernel_size: int,
        num_blocks: int,
        num_repeats: int,
        *,
        norm: Norm,
        input_norm: Norm,
        mask_act: str,
        mask_prelu: bool,
        causal: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.num_sources, self.mask_act = num_sources, mask_act
        self.input_norm = make_norm(input_norm, features)
        self.bottleneck = nn.Conv1d(features, bottleneck_channels, 1, bias=bias)
        self.blocks = nn.ModuleList(
            TCNBlock(
                bottleneck_channels,
                hidden_channels,
                skip_channels,
                kernel_size,
                2 ** (index % num_blocks),
                norm,
                causal=causal,
                bias=bias,
            )
            for index in range(num_blocks * num_repeats)
        )
        self.mask_prelu = ScalarPReLU() if mask_prelu else nn.Identity()
        self.mask = nn.Conv1d(skip_channels or bottleneck_channels, num_sources * features, 1, bias=bias)
        if skip_channels:
            # Its output goes nowhere: it is there because published checkpoints have it.
            self.blocks[-1].residual.requires_grad_(False)

    def forward(self, w: Tensor) -> Tensor:
        """Map features (B, N, K) to masks (B, C, N, K)."""
        u: Tensor = self.bottleneck(self.input_norm(w))
        skips: Tensor | None = None
        last = len(self.blocks) - 1
        for index, block in enumerate(self._blocks()):
            h = block(u)
            if block.skip is None:
                u = u + block.residual(h)
                continue
            skips = block.skip(h) if skips is None else skips + block.skip(h)
            if index < last:
                u = u + block.residual(h)
        masks = self.mask(self.mask_prelu(u if skips is None else skips))
        return self._activated(masks.unflatten(1, (self.num_sources, -1)))

    def initial_state(self, like: Tensor) -> SeparatorState:
        """No past, for a batch of the size, type and device of ``like``.

        Raises:
            Unsupported: the separator is not causal, a norm looks ahead, or parts were exchanged for others.
        """
        norms = [self.input_norm, *(norm for block in self._blocks() for norm in (block.norm, block.depthwise_norm))]
        batch = [isinstance(norm, nn.BatchNorm1d) and norm.training for norm in norms]
        ahead = any(batch) or any(isinstance(norm, nn.GroupNorm) for norm in norms)
        if ahead or not all(block.causal for block in self._blocks()):
            raise Unsupported("streaming needs a causal model with cumulative or frame-wise norm")
        for part in self.modules():
            if not any(True for _ in part.children()) and type(part) not in _STREAMED:
                raise Unsupported(f"streaming knows the network's own layers only, got {type(part).__name__}")
        return SeparatorState(
            _norm_state(self.input_norm, like), [block.initial_state(like) for block in self._blocks()]
        )

    def step(self, w: Tensor, state: SeparatorState) -> Tensor:
        """Masks (B, C, N, n) of the next features (B, N, n); the state goes on to what comes then."""
        # Channels are last here: of a few frames, 1x1 convolutions are fastest as linear layers.
        x, state.input_norm = _norm_step(self.input_norm, w.transpose(1, 2), state.input_norm)
        u = _pointwise(self.bottleneck, x)
        skips: Tensor | None = None
        for block, past in zip(self._blocks(), state.blocks, strict=True):
            h = block.step(u, past)
            if block.skip is not None:
                skip = _pointwise(block.skip, h)
                skips = skip if skips is None else skips + skip
            if block.skip is None or block is not self.blocks[-1]:
                u = u + _pointwise(block.residual, h)
        masks = _pointwise(self.mask, self.mask_prelu(u if skips is None else skips))
        return self._activated(masks.unflatten(2, (self.num_sources, -1)).permute(0, 2, 3, 1))

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    def _activated(self, masks: Tensor) -> Tensor:
        if self.mask_act == "sigmoid":
            return masks.sigmoid()
        if self.mask_act == "relu":
            return masks.relu()
        if self.mask_act == "softmax":
            return masks.softmax(1)
        return masks.tanh() if self.mask_act == "tanh" else masks


def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A 1x1 convolution of frames with the channels last."""
    return F.linear(x, conv.weight.squeeze(2), conv.bias)


def _norm_state(norm: nn.Module, like: Tensor) -> CumulativeMoments | None:
    return norm.initial_state(len(like)) if isinstance(norm, CumulativeLayerNorm) else None


def _norm_step(norm: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A norm that does not look ahead, of frames (B, n, C)."""
    if isinstance(norm, CumulativeLayerNorm):
        return norm.step(x, state)
    if isinstance(norm, ChannelLayerNorm):
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), None
    return norm(x.transpose(1, 2)).transpose(1, 2), None
