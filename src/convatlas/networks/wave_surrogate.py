"""Surrogates of a solver of the wave equation: one steps in time, one makes fields of parameters; dense or compressed.

After Boukraichi, Akkari, Casenave, Ryckelynck: "A priori compression of convolutional neural networks for wave
simulators", 2023, arXiv 2304.04964. The paper does not tell widths and depths; those here are this library's.
`WaveSurrogate` takes the last fields and a map of the speed and gives what is added to the last field by the next time.
`WaveFieldDecoder` takes parameters of a simulation and a time and gives the fields from that time on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convatlas.networks.base import FieldNetwork, FieldNetworkConfig, NetworkConfig
from convatlas.nn.conv.derived import originals
from convatlas.nn.conv.kernel_formats import FORMATS
from convatlas.nn.conv.one_way import OneWayConv2d, OneWayConvTranspose2d

__all__ = [
    "VARIANTS",
    "ResidualBlock",
    "WaveFieldConfig",
    "WaveFieldDecoder",
    "WaveSurrogate",
    "WaveSurrogateConfig",
]


@dataclass(frozen=True, kw_only=True)
class WaveSurrogateConfig(FieldNetworkConfig):
    """Config of `WaveSurrogate`.

    Attributes:
        in_channels: past fields that it sees, and the map of the speed.
        dims: 2.
        widths: channels of the levels, from the whole resolution down; each level has half the resolution.
        depth: residual blocks of a level, on the way down and up.
        kernel: ``dense``, or the format of compressed kernels: ``oneway``, ``separable``, ``cp_shared``, ``tucker2``.
        rank: terms of a compressed kernel.

    Raises:
        ValueError: a value is out of range.
    """

    in_channels: int = 5
    resolution: int | tuple[int, ...] = 32
    widths: tuple[int, ...] = (32, 64, 128)
    depth: int = 3
    kernel: str = "dense"
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims != 2:
            raise ValueError(f"dims must be 2, got {self.dims}")
        if self.depth < 1 or min(self.widths, default=0) < 1:
            raise ValueError(f"depth and widths must be at least 1, got {self.depth} and {self.widths}")
        _check_kernel(self.kernel, self.rank)

    @property
    def frames(self) -> int:
        """Past fields that it sees."""
        return self.in_channels - 1

    def build(self) -> WaveSurrogate:
        return WaveSurrogate(self)


@dataclass(frozen=True, kw_only=True)
class WaveFieldConfig(NetworkConfig):
    """Config of `WaveFieldDecoder`.

    Attributes:
        parameters: numbers that describe a simulation, the time included: x and y of the source, speed, time.
        frames: successive fields that it makes.
        size: rows and columns of a field, equal.
        hidden: units of the dense layers.
        widths: channels from the lowest resolution up; each but the first comes with twice the resolution.
        kernel, rank: as `WaveSurrogateConfig` has them.

    Raises:
        ValueError: a value is out of range.
    """

    parameters: int = 4
    frames: int = 1
    size: int = 32
    hidden: int = 256
    widths: tuple[int, ...] = (128, 64, 32)
    kernel: str = "dense"
    rank: int = 1

    def __post_init__(self) -> None:
        least = {"parameters": self.parameters, "frames": self.frames, "size": self.size, "hidden": self.hidden}
        for name, value in {**least, "widths": min(self.widths, default=0)}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _check_kernel(self.kernel, self.rank)

    def build(self) -> WaveFieldDecoder:
        return WaveFieldDecoder(self)


def _check_kernel(kernel: str, rank: int) -> None:
    if kernel not in ("dense", *FORMATS):
        raise ValueError(f"kernel must be one of dense, {', '.join(FORMATS)}, got {kernel!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def _convolutions(
    config: WaveSurrogateConfig | WaveFieldConfig,
) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Makers of the convolutions and transposed convolutions of a network: the one switch between dense and not."""
    if config.kernel == "dense":
        return nn.Conv2d, nn.ConvTranspose2d
    options: dict[str, Any] = {"format": config.kernel, "rank": config.rank}
    return partial(OneWayConv2d, **options), partial(OneWayConvTranspose2d, **options)


@torch.no_grad()
def _damped(layer: nn.Module) -> nn.Module:
    """The layer with first weights ten times smaller: a network without norms begins near the identity."""
    first: Any = originals(layer)[0] if is_parametrized(layer) else layer.weight
    first.mul_(0.1)
    return layer


class ResidualBlock(nn.Module):
    """x + conv3(ReLU(conv3(x))).

    Args:
        channels: of the map.
        conv: makes a convolution.
    """

    def __init__(self, channels: int, conv: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.conv2 = _damped(conv(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of x (B, C, H, W)."""
        y: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return y


class WaveSurrogate(FieldNetwork):
    """Encoder and decoder with skips that predict the increment of a wave field in one interval of time.

    Args:
        config: what to build.
    """

    def __init__(self, config: WaveSurrogateConfig) -> None:
        super().__init__(config)
        conv, transposed = _convolutions(config)
        widths = config.widths

        def level(width: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualBlock(width, conv) for _ in range(config.depth)))

        self.stem = conv(config.in_channels, widths[0], 5, padding=2)
        self.encoders = nn.ModuleList([level(width) for width in widths])
        self.downs = nn.ModuleList([conv(wide, next_, 3, stride=2, padding=1) for wide, next_ in pairwise(widths)])
        self.ups = nn.ModuleList(
            [transposed(low, high, 4, stride=2, padding=1) for high, low in pairwise(widths)][::-1]
        )
        self.decoders = nn.ModuleList([level(width) for width in widths[-2::-1]])
        self.head = _damped(conv(widths[0], config.out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the last field by the next time, (B, 1, H, W).

        Args:
            x: (B, frames + 1, H, W), the past fields, the oldest first, and the speed.

        Raises:
            ValueError: x has a wrong number of dimensions or channels.
        """
        self._check_input(x)
        height, width = x.shape[2:]
        step = 2 ** len(self.downs)
        x = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
        y, skips = self.stem(x), []
        for encoder, down in zip(self.encoders, self.downs, strict=False):
            y = encoder(y)
            skips.append(y)
            y = down(F.relu(y))
        y = self.encoders[-1](y)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            y = decoder(up(F.relu(y)) + skip)
        increment: Tensor = self.head(F.relu(y))
        return increment[:, :, :height, :width]

    def rollout(self, fields: Tensor, speed: Tensor, steps: int) -> Tensor:
        """Step on from past fields, each step on what the ones before have given: (B, steps, H, W).

        Args:
            fields: (B, T, H, W), of which the last ``frames`` are seen.
            speed: (B, H, W).
            steps: how many.

        Raises:
            ValueError: there are too few fields, or steps is smaller than 1.
        """
        seen = self.config.frames
        if fields.dim() != 4 or fields.shape[1] < seen:
            raise ValueError(f"fields must be (B, T, H, W) with T of at least {seen}, got {tuple(fields.shape)}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        past = list(fields[:, -seen:].unbind(1))
        for _ in range(steps):
            increment = self(torch.stack([*past[-seen:], speed], dim=1))
            past.append(past[-1] + increment[:, 0])
        return torch.stack(past[seen:], dim=1)


class WaveFieldDecoder(nn.Module):
    """Dense layers and transposed convolutions that make wave fields of the parameters of a simulation and a time.

    Args:
        config: what to build.
    """

    def __init__(self, config: WaveFieldConfig) -> None:
        super().__init__()
        self.config = config
        conv, transposed = _convolutions(config)
        widths, doublings = config.widths, len(config.widths) - 1
        self.low = -(-config.size // 2**doublings)
        self.dense1 = nn.Linear(config.parameters, config.hidden)
        self.dense2 = nn.Linear(config.hidden, widths[0] * self.low**2)
        self.ups = nn.ModuleList([transposed(wide, next_, 4, stride=2, padding=1) for wide, next_ in pairwise(widths)])
        self.blocks = nn.ModuleList([ResidualBlock(width, conv) for width in widths[1:]])
        self.head = conv(widths[-1], config.frames, 3, padding=1)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random parameters, for tracing and timing."""
        return (torch.rand(batch, self.config.parameters),)

    def forward(self, x: Tensor) -> Tensor:
        """Fields (B, frames, size, size) from a time on.

        Args:
            x: (B, parameters), the time last.

        Raises:
            ValueError: x has another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.config.parameters:
            raise ValueError(f"x must be (B, {self.config.parameters}), got {tuple(x.shape)}")
        y = F.relu(self.dense2(F.relu(self.dense1(x))))
        y = y.unflatten(1, (-1, self.low, self.low))
        for up, block in zip(self.ups, self.blocks, strict=True):
            y = F.relu(block(F.relu(up(y))))
        fields: Tensor = self.head(y)
        return fields[:, :, : self.config.size, : self.config.size]


VARIANTS: dict[str, NetworkConfig] = {
    "wave_surrogate": WaveSurrogateConfig(),
    "wave_surrogate_oneway": WaveSurrogateConfig(kernel="oneway"),
    "wave_surrogate_oneway_rank2": WaveSurrogateConfig(kernel="oneway", rank=2),
    "wave_field": WaveFieldConfig(),
    "wave_field_oneway": WaveFieldConfig(kernel="oneway"),
}
