"""Fourier neural operators, also with branches that see details: local integrals and finite differences.

Li et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv 2010.08895;
Liu-Schiaffini et al.: "Neural Operators with Localized Integral and Differential Kernels", ICML 2024, arXiv 2402.16845;
configurations of Berner et al., 2025, arXiv 2506.10973.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.nn.conv.disco import DiscreteContinuousConv2d
from convatlas.nn.conv.finite_difference import (
    FiniteDifferenceConv1d,
    FiniteDifferenceConv2d,
    FiniteDifferenceConv3d,
)
from convatlas.nn.conv.spectral_conv import Factorization, SpectralConv, real_parts
from convatlas.nn.fields import ChannelMLP, PointwiseConv, SoftGating, with_coordinates
from convatlas.ops.spectral_conv import Precision
from convatlas.weights import Layout

__all__ = ["FNO", "VARIANTS", "FNOConfig", "LocalNO", "LocalNOConfig"]

Skip = Literal["linear", "soft-gating", "identity"]
_SKIPS = ("linear", "soft-gating", "identity")
_DIFFERENCES: dict[int, Any] = {1: FiniteDifferenceConv1d, 2: FiniteDifferenceConv2d, 3: FiniteDifferenceConv3d}
_PADDINGS = {"periodic": "circular", "replicate": "replicate", "reflect": "reflect", "zeros": "zeros"}


@dataclass(frozen=True, kw_only=True)
class FNOConfig(FieldNetworkConfig):
    """Config of `FNO`.

    Attributes:
        n_modes: frequencies of each axis, or one number for all.
        dim: channels of the blocks.
        depth: blocks.
        lifting_ratio: hidden channels before the blocks, over ``dim``; 0 makes it a single linear map.
        projection_ratio: hidden channels behind the blocks, over ``dim``.
        embed_position: whether the network is given the coordinates.
        mlp: whether blocks end with two linear maps of the channels.
        mlp_expansion: hidden channels between these, over ``dim``.
        mlp_skip: what goes past them: ``soft-gating``, ``linear`` or ``identity``.
        skip: what goes past the convolution.
        stabilizer: ``tanh`` bounds what is transformed, for half precision.
        domain_padding: share of the domain's length that is added on each side, as zeros, for fields that are not
            periodic.
        separable: convolve each channel on its own.
        factorization, rank: of the spectral weights; see `SpectralConv`.
        align: see `SpectralConv`.
        precision: of the spectral products, ``full``, ``mixed`` or ``half``; see `SpectralConv`.

    Raises:
        ValueError: a value is out of range.
        UnknownName: there is no such skip.
    """

    n_modes: int | tuple[int, ...] = 12
    dim: int = 32
    depth: int = 4
    lifting_ratio: float = 2.0
    projection_ratio: float = 2.0
    embed_position: bool = True
    mlp: bool = True
    mlp_expansion: float = 0.5
    mlp_skip: Skip = "soft-gating"
    skip: Skip = "linear"
    stabilizer: Literal["tanh"] | None = None
    domain_padding: float = 0.0
    separable: bool = False
    factorization: Factorization | None = None
    rank: float | tuple[int, ...] = 0.5
    align: bool = False
    precision: Precision = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.modes) != self.dims or min(self.modes) < 1:
            raise ValueError(f"n_modes must be one number or {self.dims}, at least 1, got {self.n_modes}")
        if self.dim < 1 or self.depth < 1:
            raise ValueError(f"dim and depth must be at least 1, got {self.dim} and {self.depth}")
        for name in ("lifting_ratio", "mlp_expansion", "domain_padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if round(self.dim * self.mlp_expansion) < 1 or int(self.dim * self.projection_ratio) < 1:
            raise ValueError(
                "mlp_expansion and projection_ratio must leave a channel, got "
                f"{self.mlp_expansion} and {self.projection_ratio} of {self.dim}"
            )
        for name in ("skip", "mlp_skip"):
            if getattr(self, name) not in _SKIPS:
                raise unknown(name, str(getattr(self, name)), _SKIPS)
        if self.precision not in ("full", "mixed", "half"):
            raise unknown("precision", str(self.precision), ("full", "mixed", "half"))
        if self.stabilizer not in (None, "tanh"):
            raise unknown("stabilizer", str(self.stabilizer), ("tanh",))

    @property
    def modes(self) -> tuple[int, ...]:
        """Frequencies of each axis."""
        return (self.n_modes,) * self.dims if isinstance(self.n_modes, int) else tuple(self.n_modes)

    def build(self) -> FNO:
        return FNO(self)


def _skip(kind: Skip, channels: int, dims: int) -> nn.Module:
    if kind == "linear":
        return PointwiseConv(channels, channels, bias=False)
    return SoftGating(channels, dims) if kind == "soft-gating" else nn.Identity()


def _without_joint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Older files hold the weights of all layers in one tensor."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in ("blocks.convs.weight", "blocks.convs.bias"):
            part = key.rpartition(".")[2]
            split |= {f"blocks.convs.{index}.{part}": each for index, each in enumerate(value)}
        else:
            split[key] = value
    return real_parts(split, model)


_SPECTRAL = (
    (r"(^|\.)weight\.tensor$", r"\1weight"),
    (r"(^|\.)weight\.(core|weights)$", r"\1factorized.\2"),
    (r"(^|\.)weight\.factors\.factor_(\d+)$", r"\1factorized.factors.\2"),
    (r"(^|\.)_metadata$", ""),
)


class _Blocks(nn.Module):
    """The parts of all blocks, each kind in a list of its own as in the authors' files."""

    def __init__(self, config: FNOConfig) -> None:
        super().__init__()
        self.config = config
        dim, dims = config.dim, config.dims
        self.convs = nn.ModuleList(
            [
                SpectralConv(
                    dim,
                    dim,
                    config.modes,
                    separable=config.separable,
                    factorization=config.factorization,
                    rank=config.rank,
                    align=config.align,
                    precision=config.precision,
                )
                for _ in range(config.depth)
            ]
        )
        self.skips = nn.ModuleList([_skip(config.skip, dim, dims) for _ in range(config.depth)])
        hidden, depth = round(dim * config.mlp_expansion), config.depth if config.mlp else 0
        self.mlps = nn.ModuleList([ChannelMLP(dim, hidden, dim) for _ in range(depth)])
        self.mlp_skips = nn.ModuleList([_skip(config.mlp_skip, dim, dims) for _ in range(depth)])

    def conv(self, x: Tensor, index: int) -> Tensor:
        """What the operator of a block makes of a field."""
        return self.convs[index](x)

    def act_between(self, last: bool) -> bool:
        """Whether an activation follows the sum of operator and skip."""
        return not last

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, *grid) to the same shape."""
        for index in range(self.config.depth):
            last = index == self.config.depth - 1
            stable = torch.tanh(x) if self.config.stabilizer == "tanh" else x
            h = self.conv(stable, index) + self.skips[index](x)
            if self.act_between(last):
                h = F.gelu(h)
            if self.config.mlp:
                h = self.mlps[index](h) + self.mlp_skips[index](x)
                if not last:
                    h = F.gelu(h)
            x = h
        return x


class FNO(FieldNetwork):
    """Lifting of the channels, blocks of spectral convolutions with pointwise maps, projection of the channels.

    A block is h = GELU(conv(x) + skip(x)), GELU(MLP(h) + gate * x); the last one has no GELU. It works on any grid.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                *_SPECTRAL,
                (r"^fno_blocks\.fno_skips\.", "blocks.skips."),
                (r"^fno_blocks\.channel_mlp\.", "blocks.mlps."),
                (r"^fno_blocks\.channel_mlp_skips\.", "blocks.mlp_skips."),
                (r"^fno_blocks\.", "blocks."),
            ),
            function=_without_joint,
        )
    }

    def __init__(self, config: FNOConfig) -> None:
        super().__init__(config)
        inputs = config.in_channels + config.dims * config.embed_position
        lifting = int(config.lifting_ratio * config.dim)
        self.lifting = ChannelMLP(inputs, *([lifting] if lifting else []), config.dim)
        self.blocks = self._blocks(config)
        self.projection = ChannelMLP(config.dim, int(config.projection_ratio * config.dim), config.out_channels)

    def _blocks(self, config: FNOConfig) -> _Blocks:
        return _Blocks(config)

    def forward(self, x: Tensor) -> Tensor:
        """The answer (B, out_channels, *grid) to a field (B, in_channels, *grid)."""
        self._check_input(x)
        grid = x.shape[2:]
        x = self.lifting(with_coordinates(x) if self.config.embed_position else x)
        pads = [round(self.config.domain_padding * n) for n in grid]
        if any(pads):
            x = F.pad(x, [pad for pad in reversed(pads) for _ in range(2)])
        x = self.blocks(x)
        for axis, (pad, n) in enumerate(zip(pads, grid, strict=True), 2):
            x = x.narrow(axis, pad, n)
        y: Tensor = self.projection(x)
        return y


@dataclass(frozen=True, kw_only=True)
class LocalNOConfig(FNOConfig):
    """Config of `LocalNO`; `FNOConfig` has the other fields.

    Attributes:
        disco_layers: which blocks have a branch of local integrals, for all or each.
        disco_kernel_shape: rings and angles of its kernel.
        radius_cutoff: radius of its kernel.
        domain_length: lengths of the axes, in the units of the radius.
        disco_groups: of channels.
        disco_bias: whether it has a bias.
        disco_padding: ``zeros``, as the authors' code has it whatever the field, or ``periodic``.
        diff_layers: which blocks have a branch of finite differences.
        diff_kernel_size: of its kernel, odd.
        diff_padding: ``periodic``, ``replicate``, ``reflect`` or ``zeros``.
        mix_derivatives: whether it mixes the channels.

    Raises:
        ValueError: a value is out of range, or local integrals are wanted for other fields than images.
    """

    disco_layers: bool | tuple[bool, ...] = False
    disco_kernel_shape: tuple[int, ...] = (2, 4)
    radius_cutoff: float = 0.03125
    domain_length: tuple[float, float] = (2.0, 2.0)
    disco_groups: int = 1
    disco_bias: bool = True
    disco_padding: Literal["zeros", "periodic"] = "zeros"
    diff_layers: bool | tuple[bool, ...] = False
    diff_kernel_size: int = 3
    diff_padding: Literal["periodic", "replicate", "reflect", "zeros"] = "periodic"
    mix_derivatives: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("disco_layers", "diff_layers"):
            if len(self.branches(name)) != self.depth:
                raise ValueError(f"{name} must be one or {self.depth}, got {getattr(self, name)}")
        if any(self.branches("disco_layers")) and self.dims != 2:
            raise ValueError(f"disco_layers work for dims 2 only, got {self.dims}")
        if self.disco_padding not in ("zeros", "periodic"):
            raise unknown("disco_padding", str(self.disco_padding), ("zeros", "periodic"))
        if self.diff_padding not in _PADDINGS:
            raise unknown("diff_padding", str(self.diff_padding), _PADDINGS)

    def branches(self, name: str) -> tuple[bool, ...]:
        """Whether each block has a branch: ``disco_layers`` or ``diff_layers``."""
        given = getattr(self, name)
        return (given,) * self.depth if isinstance(given, bool) else tuple(given)

    def build(self) -> LocalNO:
        return LocalNO(self)


class _LocalBlocks(_Blocks):
    """Blocks whose operator is a sum of up to three branches."""

    config: LocalNOConfig

    def __init__(self, config: LocalNOConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.places = {
            name: [index for index, there in enumerate(config.branches(name)) if there]
            for name in ("disco_layers", "diff_layers")
        }
        self.differential = nn.ModuleList(
            [
                _DIFFERENCES[config.dims](
                    dim,
                    dim,
                    config.diff_kernel_size,
                    padding=config.diff_kernel_size // 2,
                    groups=1 if config.mix_derivatives else dim,
                    bias=False,
                    padding_mode=_PADDINGS[config.diff_padding],
                    # The authors take the first axis of the training's grid and the last of this one.
                    base_resolution=config.grid[0],
                )
                for _ in self.places["diff_layers"]
            ]
        )
        self.local_convs = nn.ModuleList(
            [
                DiscreteContinuousConv2d(
                    dim,
                    dim,
                    config.disco_kernel_shape,
                    config.radius_cutoff,
                    domain_length=config.domain_length,
                    groups=config.disco_groups,
                    bias=config.disco_bias,
                    periodic=config.disco_padding == "periodic",
                )
                for _ in self.places["disco_layers"]
            ]
        )

    def conv(self, x: Tensor, index: int) -> Tensor:
        """Spectral convolution, finite differences and local integrals, where the block has them."""
        y = super().conv(x, index)
        if index in self.places["diff_layers"]:
            y = y + self.differential[self.places["diff_layers"].index(index)](x)
        if index in self.places["disco_layers"]:
            y = y + self.local_convs[self.places["disco_layers"].index(index)](x)
        return y

    def act_between(self, last: bool) -> bool:
        return self.config.mlp or not last


class LocalNO(FNO):
    """FNO with branches of local integrals and finite differences beside the spectral convolution.

    Unlike in `FNO`, the sum of the branches is activated in the last block as well if it has an MLP.

    Args:
        config: what to build; its ``resolution`` is where the distance of the points counts as 1.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                *_SPECTRAL,
                (r"^local_no_blocks\.differential\.(\d+)\.conv\.weight$", ""),
                (
                    r"^local_no_blocks\.differential\.(\d+)\.weight$",
                    r"blocks.differential.\1.parametrizations.weight.original",
                ),
                (r"^local_no_blocks\.local_no_skips\.", "blocks.skips."),
                (r"^local_no_blocks\.(mlp|channel_mlp)\.", "blocks.mlps."),
                (r"^local_no_blocks\.(mlp|channel_mlp)_skips\.", "blocks.mlp_skips."),
                (r"^local_no_blocks\.", "blocks."),
            ),
            function=_without_joint,
        )
    }

    def _blocks(self, config: FNOConfig) -> _Blocks:
        return _LocalBlocks(cast(LocalNOConfig, config))


_PUBLISHED = {"resolution": 128, "depth": 4}

VARIANTS: dict[str, FNOConfig] = {
    "fno": FNOConfig(),
    "fno_navier_stokes": FNOConfig(n_modes=64, dim=62, lifting_ratio=4.13, projection_ratio=4.13, **_PUBLISHED),  # type: ignore[arg-type]
    "local_no": LocalNOConfig(disco_layers=True, radius_cutoff=0.125, diff_layers=(False, False, False, True)),
    "local_no_disco_navier_stokes": LocalNOConfig(
        n_modes=40,
        dim=99,
        lifting_ratio=2.59,
        projection_ratio=2.59,
        disco_layers=True,
        **_PUBLISHED,  # type: ignore[arg-type]
    ),
    "local_no_difference_navier_stokes": LocalNOConfig(
        n_modes=40,
        dim=99,
        lifting_ratio=2.59,
        projection_ratio=2.59,
        diff_layers=(False, False, False, True),
        **_PUBLISHED,  # type: ignore[arg-type]
    ),
}
