"""DISGAN: a generator that doubles the resolution of volumes, and a discriminator that judges them by wavelets.

Wang, Mahler, Steiglechner, Birk, Scheffler, Lohmann: "DISGAN: Wavelet-informed Discriminator Guides GAN to MRI
Super-resolution with Noise Cleaning", ICCV Workshops 2023, arXiv 2308.12084. The generator is that of Wang et al.:
"ESRGAN", ECCV Workshops 2018, arXiv 1809.00219, with 3-D convolutions. Both also work on images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig, Upscaler, UpscalerConfig
from convatlas.nn.sub_pixel import SubPixelConv2d, SubPixelConv3d
from convatlas.nn.wavelets import DWTConv
from convatlas.ops.dense_conv import dense_conv
from convatlas.weights import Layout

__all__ = [
    "VARIANTS",
    "DenseResidualBlock",
    "DownBlock",
    "LinearUpBlock",
    "RRDBConfig",
    "RRDBGenerator",
    "ResidualInResidualBlock",
    "UNetDiscriminator",
    "UNetDiscriminatorConfig",
    "UpBlock",
]

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_SUB_PIXEL = {2: SubPixelConv2d, 3: SubPixelConv3d}
#: Slopes of the leaky ReLU in generator and dense blocks, and in the down path of the discriminator.
_SLOPE, _DOWN_SLOPE = 0.01, 0.2
_RESIDUAL = 0.2
_DENSE = 5


@dataclass(frozen=True, kw_only=True)
class RRDBConfig(UpscalerConfig):
    """Config of `RRDBGenerator`.

    Attributes:
        scale: a power of two, one sub-pixel convolution for each doubling.
        dims: 3 for volumes, 2 for images.
        filters: channels of every layer.
        num_blocks: residual-in-residual blocks.
        norm: whether dense blocks normalise over the batch before their activations.

    Raises:
        ValueError: a value is out of range.
    """

    scale: int = 2
    dims: int = 3
    filters: int = 64
    num_blocks: int = 3
    norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale & (self.scale - 1) or self.scale < 2:
            raise ValueError(f"scale must be a power of two, got {self.scale}")
        _check_sizes(self.dims, filters=self.filters, num_blocks=self.num_blocks)

    @property
    def spatial_dims(self) -> int:
        return self.dims

    def build(self) -> RRDBGenerator:
        return RRDBGenerator(self)


@dataclass(frozen=True, kw_only=True)
class UNetDiscriminatorConfig(NetworkConfig):
    """Config of `UNetDiscriminator`.

    Attributes:
        in_channels: of the volume.
        dims: 3 for volumes, 2 for images.
        filters: nf of the paper, the channels at full resolution.
        levels: how often the resolution is halved.
        wavelet: of the units on the way down; without one, the convolutions give their channels as well.
        init_std: standard deviation of the first weights of all convolutions but the transposed ones; 1 as in the
            authors' code, None for torch's own.

    Raises:
        ValueError: a value is out of range.
        UnknownName: there is no such wavelet.
    """

    in_channels: int = 1
    dims: int = 3
    filters: int = 16
    levels: int = 6
    wavelet: str | None = "haar"
    init_std: float | None = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self.dims, in_channels=self.in_channels, filters=self.filters)
        if self.init_std is not None and self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}")
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")
        if self.wavelet is not None and any(of >= self.width(level) for level, of in enumerate(self.wavelets, 1)):
            raise ValueError(f"filters must be more than {self.filters} for {self.levels} levels of wavelet units")

    def build(self) -> UNetDiscriminator:
        return UNetDiscriminator(self)

    def width(self, level: int) -> int:
        """Channels after a level of the way down, at most eight times those at full resolution."""
        return self.filters * min(2 ** (level - 1), 8)

    @property
    def wavelets(self) -> tuple[int, ...]:
        """Channels that the wavelet unit of each level but the last gives; none without a wavelet."""
        return () if self.wavelet is None else tuple(2**level for level in range(self.levels - 1))


def _check_sizes(dims: int, **sizes: int) -> None:
    if dims not in _CONV:
        raise ValueError(f"dims must be 2 or 3, got {dims}")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# -- generator ---------------------------------------------------------------------------------------------------------


class DenseResidualBlock(nn.Module):
    """x + 0.2 y_5 with y_k = act(conv_k(concat(x, y_1, ..., y_{k-1}))), no activation after the fifth.

    Args:
        channels: F of every convolution.
        dims: position axes, 2 or 3.
        norm: whether to normalise over the batch before each activation.
    """

    def __init__(self, channels: int, *, dims: int = 3, norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for number in range(1, _DENSE + 1):
            layers: list[nn.Module] = [_CONV[dims](number * channels, channels, 3, padding=1)]
            layers += [_NORM[dims](channels)] if norm else []
            layers += [nn.LeakyReLU(_SLOPE)] if number < _DENSE else []
            self.blocks.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, channels, *positions)."""
        if parameters := self._plain_parameters():
            return _RESIDUAL * dense_conv(x, _SLOPE, *parameters) + x
        features = [x]
        for block in self.blocks:
            features.append(block(torch.cat(features, 1)))
        return _RESIDUAL * features[-1] + x

    def _plain_parameters(self) -> list[Tensor]:
        """Weights and biases, if each layer is still what it was built as and nobody watches it."""
        parameters: list[Tensor] = []
        for block in self.blocks:
            conv, *rest = block.children() if isinstance(block, nn.Sequential) else (block,)
            plain = type(conv) in (nn.Conv2d, nn.Conv3d) and all(type(layer) is nn.LeakyReLU for layer in rest)
            if not plain or any(layer._forward_hooks or layer._forward_pre_hooks for layer in (conv, *rest)):
                return []
            parameters += [conv.weight, conv.bias]  # type: ignore[list-item]
        return parameters


class ResidualInResidualBlock(nn.Module):
    """x + 0.2 y with y of three dense blocks, one after the other (RRDB of ESRGAN).

    Args:
        channels, dims, norm: as for `DenseResidualBlock`.
    """

    def __init__(self, channels: int, *, dims: int = 3, norm: bool = False) -> None:
        super().__init__()
        self.dense_blocks = nn.Sequential(*(DenseResidualBlock(channels, dims=dims, norm=norm) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, channels, *positions)."""
        y: Tensor = self.dense_blocks(x)
        return _RESIDUAL * y + x


def _once_each(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drop the second names that each layer of a dense block has: b1 to b5 beside blocks.0 to blocks.4."""
    kept = {key: tensor for key, tensor in state.items() if not re.search(r"\.b\d\.", key)}
    for key, tensor in state.items():
        second = re.sub(r"\.b(\d)\.", lambda found: f".blocks.{int(found[1]) - 1}.", key)
        kept.setdefault(second, tensor)  # a file may hold a shared tensor under one of its names only
    return kept


#: The norm of each weight, which only serves to be looked at; wrappers of single convolutions.
_MONITORS = ((r".*weight_sv$", ""), (r"\.module\.(weight|bias)$", r".\1"))


class RRDBGenerator(Upscaler):
    """Shallow features, residual-in-residual blocks around which they are passed, sub-pixel convolutions, two layers.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "wqlevi": Layout(
            renames=(
                (r"^(discriminator|FE)\..*", ""),
                (r"^generator\.", ""),
                *_MONITORS,
                (r"^conv1\.", "shallow."),
                (r"^res_blocks1\.", "blocks."),
                (r"^conv2\.", "fusion."),
                (r"^upsampling\.(\d+)\.", lambda found: f"upsampling.{2 * int(found[1]) // 3}.conv."),
                (r"^conv3\.", "reconstruction."),
            ),
            function=_once_each,
        )
    }

    def __init__(self, config: RRDBConfig) -> None:
        super().__init__(config)
        dims, filters = config.dims, config.filters
        conv = _CONV[dims]
        self.shallow = conv(config.in_channels, filters, 3, padding=1)
        self.blocks = nn.Sequential(
            *(ResidualInResidualBlock(filters, dims=dims, norm=config.norm) for _ in range(config.num_blocks))
        )
        self.fusion = conv(filters, filters, 3, padding=1)
        steps: list[nn.Module] = []
        for _ in range(config.scale.bit_length() - 1):
            # The activation of the paper comes before the shuffle, which it commutes with.
            steps += [_SUB_PIXEL[dims](filters, filters, 3, scale=2), nn.LeakyReLU(_SLOPE)]
        self.upsampling = nn.Sequential(*steps)
        self.reconstruction = nn.Sequential(
            conv(filters, filters, 3, padding=1), nn.LeakyReLU(_SLOPE), conv(filters, config.in_channels, 3, padding=1)
        )

    @property
    def reach(self) -> int:
        # Convolutions at low resolution, a doubling each at the one before, and two at the end.
        doublings = self.config.scale.bit_length() - 1
        high = sum(2.0**-doubling for doubling in range(doublings)) + 2 / self.config.scale
        return int(3 * _DENSE * self.config.num_blocks + 2 + high + 0.999)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        features = self.shallow(x)
        features = features + self.fusion(self.blocks(features))
        y: Tensor = self.reconstruction(self.upsampling(features))
        return y


# -- discriminator -----------------------------------------------------------------------------------------------------


class DownBlock(nn.Module):
    """A convolution of kernel size 4 and stride 2, a dense block and a norm; halves the resolution.

    The leaky ReLU before it belongs to its input, which others see too: whoever calls it applies it first.

    Args:
        in_channels, out_channels: channels.
        dims: position axes, 2 or 3.
        norm: whether to normalise over the batch at the end.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dims: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.conv = _CONV[dims](in_channels, out_channels, 4, 2, 1, bias=False)
        self.dense = DenseResidualBlock(out_channels, dims=dims)
        self.norm = _NORM[dims](out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *positions) to (B, out_channels, *positions / 2)."""
        y: Tensor = self.norm(self.dense(self.conv(x)))
        return y


class UpBlock(nn.Module):
    """ReLU, a transposed convolution of kernel size 4 and stride 2, a dense block and a norm; doubles the resolution.

    Args:
        in_channels, out_channels: channels.
        dims: position axes, 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dims: int = 3) -> None:
        super().__init__()
        self.conv = _TRANSPOSED[dims](in_channels, out_channels, 4, 2, 1, bias=False)
        self.dense = DenseResidualBlock(out_channels, dims=dims)
        self.norm = _NORM[dims](out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *positions) to (B, out_channels, *positions * 2)."""
        y: Tensor = self.norm(self.dense(self.conv(F.relu(x))))
        return y


class LinearUpBlock(nn.Module):
    """ReLU, linear interpolation, a dense block, a 1 x 1 convolution and a norm; doubles the resolution.

    Args:
        in_channels, out_channels: channels.
        dims: position axes, 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dims: int = 3) -> None:
        super().__init__()
        self.mode = "trilinear" if dims == 3 else "bilinear"
        self.dense = DenseResidualBlock(in_channels, dims=dims)
        self.conv = _CONV[dims](in_channels, out_channels, 1, bias=False)
        self.norm = _NORM[dims](out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *positions) to (B, out_channels, *positions * 2)."""
        x = F.interpolate(F.relu(x), scale_factor=2, mode=self.mode, align_corners=False)
        y: Tensor = self.norm(self.conv(self.dense(x)))
        return y


class UNetDiscriminator(nn.Module):
    """Whether each voxel is real: a U-Net that halves its maps by convolutions and by wavelet transforms side by side.

    The low-pass bands join what goes down, the others what goes across. As in the authors' code, the leaky ReLU of each
    level after the first works on what the level gets before anything else sees it: the wavelet unit and the
    connection across get activated maps too.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "wqlevi": Layout(
            renames=(
                (r"^(generator|FE)\..*", ""),
                (r"^discriminator\.", ""),
                *_MONITORS,
                (r"^initial_conv\.", "stem."),
                (r"^bn1\.", "stem_norm."),
                (r"^layer1\.layer1\.", "first."),
                (r"^DWT_down_(\d+)\.conv1x1_", r"wavelets.\1."),
                (r"^layer(\d+)\.", lambda found: f"downs.{int(found[1]) - 2}."),
                (r"^dlayer1\.", "last."),
                (r"^dlayer(\d+)\.", lambda found: f"ups.{int(found[1]) - 2}."),
                (r"\.d?layer\d+_t?conv\.0\.", ".conv."),
                (r"\.d?layer\d+_t?conv\.1\.", ".dense."),
                (r"\.dlayer\d+_linear\.1\.", ".dense."),
                (r"\.dlayer\d+_linear\.2\.", ".conv."),
                (r"\.d?layer\d+_bn\.", ".norm."),
                (r"^tail_conv1\.", "mix."),
                (r"^bn2\.", "mix_norm."),
                (r"^tail_conv2\.", "head."),
            ),
            function=_once_each,
        )
    }

    def __init__(self, config: UNetDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        dims, filters, levels, extra = config.dims, config.filters, config.levels, config.wavelets
        conv, norm, width = _CONV[dims], _NORM[dims], config.width
        per_level = [*extra, 0] if extra else [0] * levels  # channels of the wavelet unit of each level
        self.stem = conv(config.in_channels, filters, 3, padding=1)
        self.stem_norm = norm(filters)
        self.first = conv(filters, width(1) - per_level[0], 4, 2, 1, bias=False)
        self.downs = nn.ModuleList(
            DownBlock(width(level - 1), width(level) - per_level[level - 1], dims=dims, norm=level < levels)
            for level in range(2, levels + 1)
        )
        self.wavelets = nn.ModuleList(
            DWTConv(
                width(level) if level else config.in_channels, channels, dims=dims, wavelet=config.wavelet or "haar"
            )
            for level, channels in enumerate(extra)
        )
        # From the level to the one above; what comes up meets what goes across and the high bands.
        self.ups = nn.ModuleList(
            UpBlock(
                width(level) if level == levels else 2 * width(level) + per_level[level - 1],
                width(level - 1),
                dims=dims,
            )
            for level in range(2, levels + 1)
        )
        self.last = LinearUpBlock(2 * width(1) + per_level[0], 2 * filters, dims=dims)
        self.mix = conv(3 * filters, 2 * filters, 3, padding=1)
        self.mix_norm = norm(2 * filters)
        self.head = conv(2 * filters, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d) and config.init_std is not None:
                nn.init.normal_(module.weight, std=config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def in_channels(self) -> int:
        """Channels of the volume."""
        return self.config.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """How real each voxel of (B, in_channels, D, H, W) looks, as logits (B, 1, D, H, W).

        Raises:
            ValueError: x has a wrong number of axes or channels, or a size is no multiple of 2^levels.
        """
        self._check_input(x)
        full = self.stem_norm(self.stem(x))
        down, seen = self.first(full), x
        across: list[list[Tensor]] = []
        for level, block in enumerate(self.downs):
            joined = [down]
            high: list[Tensor] = []
            if self.wavelets:
                low, bands = self.wavelets[level](seen)
                joined, high = [down, low], [bands]
            seen = F.leaky_relu(torch.cat(joined, 1), _DOWN_SLOPE)
            across.append([seen, *high])
            down = block(seen)
        up = down
        for level in reversed(range(len(self.ups))):
            up = self.ups[level](up)
            up = torch.cat([up, *across[level]], 1)
        y: Tensor = self.head(self.mix_norm(self.mix(torch.cat([self.last(up), full], 1))))
        return y

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random volume of the smallest size, for tracing and timing."""
        return (torch.rand(batch, self.in_channels, *[2**self.config.levels] * self.config.dims),)

    def _check_input(self, x: Tensor) -> None:
        config, step = self.config, 2**self.config.levels
        if x.dim() != config.dims + 2 or x.shape[1] != config.in_channels:
            axes = ", ".join("DHW"[-config.dims :])
            raise ValueError(f"x must be (B, {config.in_channels}, {axes}), got {tuple(x.shape)}")
        if any(size % step or size == 0 for size in x.shape[2:]):
            raise ValueError(f"sizes of x must be multiples of {step}, got {tuple(x.shape[2:])}")


VARIANTS: dict[str, RRDBConfig | UNetDiscriminatorConfig] = {
    "disgan_x2": RRDBConfig(),
    "disgan_x4": RRDBConfig(scale=4),
    "disgan_2d_x2": RRDBConfig(dims=2),
    "disgan_discriminator": UNetDiscriminatorConfig(),
    # For comparison: the same without wavelets.
    "disgan_plain_discriminator": UNetDiscriminatorConfig(wavelet=None),
    "disgan_2d_discriminator": UNetDiscriminatorConfig(dims=2),
}
