"""PHSED: sound event detection from multichannel spectrograms with hypercomplex convolutions (no localisation).

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176, on task 2 of the L3DAS21 challenge. Its published training: Adam with learning rate 1e-5,
batches of 16, up to 1000 epochs, stopped when 100 of them bring nothing, `convatlas.ops.sound_events.sound_event_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig
from convatlas.networks.phnn.layers import conv_maker, linear_maker
from convatlas.nn.conv.hypercomplex import PHNN_LAYOUT
from convatlas.weights import Layout

__all__ = ["PHSED", "VARIANTS", "PHSEDConfig"]


@dataclass(frozen=True, kw_only=True)
class PHSEDConfig(NetworkConfig):
    """Config of `PHSED`.

    Attributes:
        in_channels: channels of the spectrogram: four for each Ambisonics microphone, twice as many with phases.
        frequencies: rows of the spectrogram.
        num_classes: kinds of events.
        overlaps: events of one kind that may sound at once.
        widths: channels of the convolutions; n divides them and ``in_channels``.
        pools: max-pooling behind each convolution, (frequency, time).
        recurrent_width: features of the recurrent layers in each direction.
        recurrent_depth: number of recurrent layers.
        head_width: features of the hidden layers of the head.
        n: number of components of the numbers that the channels are.
        algebra: ``learned``, ``quaternion`` (n = 4), ``complex`` (2), ``octonion`` (8), or ``real`` (1) for torch's
            layers.
        hypercomplex_head: whether the hidden layers of the head are hypercomplex, too.
        unused_bias: whether the convolutions of a learned algebra hold the bias that the authors' code makes and never
            adds; their checkpoints have it. Otherwise they have none.
        dropout: rate behind each convolution, between the recurrent layers and before the last layer.
    """

    in_channels: int = 8
    frequencies: int = 256
    num_classes: int = 14
    overlaps: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    pools: tuple[tuple[int, int], ...] = ((8, 2), (8, 2), (2, 2), (1, 1))
    recurrent_width: int = 256
    recurrent_depth: int = 3
    head_width: int = 1024
    n: int = 4
    algebra: str = "learned"
    hypercomplex_head: bool = False
    unused_bias: bool = True
    dropout: float = 0.3

    def build(self) -> PHSED:
        return PHSED(self)


class PHSED(nn.Module):
    """Convolutions and max-pooling, bidirectional GRUs over the time, and a head of linear layers for each frame.

    `convatlas.ops.sound_events` makes the spectrogram and the targets, and turns the output into events.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such algebra.
        ValueError: n does not divide the channels or is not that of the algebra, widths and pools differ in length, or
            nothing is left of the frequencies.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": PHNN_LAYOUT}

    def __init__(self, config: PHSEDConfig) -> None:
        super().__init__()
        self.config = config
        if not config.widths or len(config.widths) != len(config.pools):
            raise ValueError(f"widths and pools must be of the same length, got {config.widths} and {config.pools}")
        rows = config.frequencies
        for height, _ in config.pools:
            rows //= height
        if rows < 1:
            raise ValueError(f"pools must leave at least one of {config.frequencies} frequencies, got {config.pools}")
        conv = conv_maker(config.n, config.algebra, unused_bias=config.unused_bias, real_bias=True)
        blocks, channels = [], config.in_channels
        for width, size in zip(config.widths, config.pools, strict=True):
            norm, pool, dropout = nn.BatchNorm2d(width), nn.MaxPool2d(size), nn.Dropout(config.dropout)
            blocks.append(nn.Sequential(conv(channels, width, 3, 1), norm, nn.ReLU(), pool, dropout))
            channels = width
        self.cnn = nn.Sequential(*blocks)
        self.rnn = nn.GRU(
            channels * rows,
            config.recurrent_width,
            config.recurrent_depth,
            batch_first=True,
            dropout=config.dropout if config.recurrent_depth > 1 else 0,
            bidirectional=True,
        )
        linear = linear_maker(config.n, config.algebra) if config.hypercomplex_head else nn.Linear
        width = config.head_width
        self.sed = nn.Sequential(
            *(linear(2 * config.recurrent_width, width), nn.ReLU()),
            *(linear(width, width), nn.ReLU()),
            *(linear(width, width), nn.ReLU(), nn.Dropout(config.dropout)),
            nn.Linear(width, config.num_classes * config.overlaps),
        )

    @property
    def in_channels(self) -> int:
        """Channels of the spectrogram."""
        return self.config.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (B, T / t, num_classes * overlaps) of a spectrogram (B, in_channels, frequencies, T).

        t is the product of the poolings over the time, 8 in the published network; T is rounded down to its multiple.

        Raises:
            ValueError: x has another shape, or fewer than t frames.
        """
        config = self.config
        if x.dim() != 4 or x.shape[1:3] != (config.in_channels, config.frequencies):
            raise ValueError(f"x must be (B, {config.in_channels}, {config.frequencies}, T), got {tuple(x.shape)}")
        least = math.prod(pool for _, pool in config.pools)
        if x.shape[3] < least:
            raise ValueError(f"x must have at least {least} frames, got {x.shape[3]}")
        x = self.cnn(x).permute(0, 3, 1, 2).flatten(2)
        return self.sed(self.rnn(x)[0]).sigmoid()

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random spectrogram of one second, 80 frames; those of the paper have 4800."""
        return (torch.rand(batch, self.config.in_channels, self.config.frequencies, 80),)


VARIANTS: dict[str, PHSEDConfig] = {
    "phsed": PHSEDConfig(),
    "phsed_full": PHSEDConfig(hypercomplex_head=True),
}
