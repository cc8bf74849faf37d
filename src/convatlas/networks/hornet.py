"""HorNet: a hierarchical network whose token mixer is the recursive gated convolution.

Rao, Zhao, Tang, Zhou, Lim, Lu: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
NeurIPS 2022, arXiv 2207.14284.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile, decay_groups
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.feature_pyramids import FeaturePyramid
from convatlas.nn.mixers.gnconv import GlobalLocalFilter, RecursiveGatedConv
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.nn.scale import LayerScale
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "GatedConvModule", "HorFPN", "HorNet", "HorNetBlock", "HorNetConfig"]


@dataclass(frozen=True, kw_only=True)
class HorNetConfig(BackboneConfig):
    """Config of `HorNet`.

    Attributes:
        depths: blocks of each stage.
        base_dim: channels of the first stage; each stage has twice those of the one before.
        orders: order of the recursive gated convolution in each stage.
        scale: factor of the filtered features.
        filter_grids: for each stage, the frequencies (h, w) of its global-local filters, or None for 7x7 depthwise
            convolutions.
        dense: for dense prediction: every map of the pyramid gets a norm of its own, and there is no classifier.
        drop_path: rate at the last block; it rises linearly from 0.
        layer_scale_init: initial LayerScale factor.
        init: of convolutions and linear layers: ``"trunc_normal"`` or ``"xavier_uniform"``.
    """

    depths: tuple[int, ...] = (2, 3, 18, 2)
    base_dim: int = 64
    orders: tuple[int, ...] = (2, 3, 4, 5)
    scale: float = 1 / 3
    filter_grids: tuple[tuple[int, int] | None, ...] = (None, None, None, None)
    dense: bool = False
    drop_path: float = 0.2
    layer_scale_init: float = 1e-6
    init: str = "trunc_normal"

    def build(self) -> HorNet:
        return HorNet(self)


class HorNetBlock(nn.Module):
    """x + drop_path(gamma1 * gnconv(norm1(x))), then x + drop_path(gamma2 * mlp(norm2(x))) (paper, figure 2).

    Args:
        channels: channels C.
        mixer: the token mixer; it keeps the shape.
        drop_path: probability to drop a branch of a sample.
        layer_scale_init: initial LayerScale factor.
    """

    def __init__(
        self, channels: int, mixer: nn.Module, *, drop_path: float = 0.0, layer_scale_init: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels)
        self.gnconv = mixer
        self.scale1 = LayerScale(channels, layer_scale_init)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.scale2 = LayerScale(channels, layer_scale_init, channel_dim=-1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = x + self.drop_path(self.scale1(self.gnconv(self.norm1(x))))
        y = self.norm2(x.permute(0, 2, 3, 1))
        y = self.scale2(self.pwconv2(F.gelu(self.pwconv1(y))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class HorNet(Backbone):
    """HorNet (paper, section 3.3): patch stem of stride 4, four stages, mean pool, norm, linear classifier.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such init.
        ValueError: depths, orders and filter_grids differ in number, or the channels of a stage do not fit its order.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=((r"\.gamma([12])$", r".scale\1.gamma"),))}
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("downsample_layers.0.0",)

    def __init__(self, config: HorNetConfig) -> None:
        super().__init__(config)
        depths = config.depths
        if not 0 < len(depths) == len(config.orders) == len(config.filter_grids):
            raise ValueError(
                "depths, orders and filter_grids must name the same stages, "
                f"got {depths}, {config.orders} and {config.filter_grids}"
            )
        if config.init not in _INITS:
            raise unknown("init", config.init, _INITS)
        dims = [config.base_dim * 2**stage for stage in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(config.in_channels, dims[0], 4, stride=4), ChannelLayerNorm(dims[0]))
        downsamples = [
            nn.Sequential(ChannelLayerNorm(before), nn.Conv2d(before, after, 2, stride=2))
            for before, after in pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *downsamples])
        stages = []
        for stage, rates in enumerate(drop_path_rates(config.drop_path, depths)):
            grid = config.filter_grids[stage]
            make_filter = None if grid is None else partial(GlobalLocalFilter, grid=grid)
            blocks = [
                HorNetBlock(
                    dims[stage],
                    RecursiveGatedConv(
                        dims[stage], order=config.orders[stage], scale=config.scale, make_filter=make_filter
                    ),
                    drop_path=rate,
                    layer_scale_init=config.layer_scale_init,
                )
                for rate in rates
            ]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_info = tuple(Feature(channels, 4 * 2**stage) for stage, channels in enumerate(dims))
        self._norms = [f"norm{stage}" for stage in range(len(dims))] if config.dense else []
        for name, channels in zip(self._norms, dims, strict=False):
            self.add_module(name, ChannelLayerNorm(channels))
        self.norm = nn.Identity() if config.dense else nn.LayerNorm(dims[-1], eps=1e-6)
        self.apply(partial(_initialise, init=config.init))
        self.reset_classifier(0 if config.dense else config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        features = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = self._run_stage(stage, downsample(x))
            features.append(x)
        norms = [self.get_submodule(name) for name in self._norms]
        return [norm(feature) for norm, feature in zip(norms, features, strict=True)] if norms else features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3))))

    def layers(self) -> list[nn.Module]:
        """The groups of the published layer-wise decay: stages, with two blocks a group in the last but one."""
        ends = [self.get_submodule(name) for name in self._norms] or [self.norm, self.head]
        return decay_groups(self.downsample_layers, self.stages, ends, blocks=2)

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.get_parameter("downsample_layers.0.0.weight")
            self.head = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            _initialise(self.head, init=self.config.init)


_INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "trunc_normal": partial(nn.init.trunc_normal_, std=0.02),
    "xavier_uniform": nn.init.xavier_uniform_,
}


def _initialise(module: nn.Module, *, init: str) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        _INITS[init](module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# -- HorFPN ------------------------------------------------------------------------------------------------------------


class GatedConvModule(nn.Module):
    """The recursive gated convolution in the place of a convolution: other output channels, norm and activation.

    Args:
        in_channels, out_channels: channels.
        order: number of gates.
        kernel_size: odd side of the depthwise convolution.
        dim_ratio: channels of the gated convolution over out_channels.
        project_out: whether a 1x1 convolution follows; without one dim_ratio must be 1.
        make_filter: another filter than the depthwise convolution, from its channels.
        norm: makes a norm from its channels; none when left out.
        act: makes an activation; none when left out.

    Raises:
        ValueError: dim_ratio is not 1 without a projection, or the order does not fit the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        order: int = 2,
        kernel_size: int = 7,
        dim_ratio: int = 1,
        project_out: bool = True,
        make_filter: Callable[[int], nn.Module] | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if dim_ratio < 1 or (dim_ratio != 1 and not project_out):
            raise ValueError(f"dim_ratio must be 1 without project_out and at least 1 with it, got {dim_ratio}")
        channels = dim_ratio * out_channels
        gated = RecursiveGatedConv(channels, order=order, kernel_size=kernel_size, make_filter=make_filter)
        gated.proj_in = nn.Conv2d(in_channels, 2 * channels, 1)
        gated.proj_out = nn.Conv2d(channels, out_channels, 1) if project_out else nn.Identity()  # type: ignore[assignment]
        gated.channels = in_channels
        self.gnconv = gated
        self.norm = norm(out_channels) if norm else nn.Identity()
        self.act = act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return self.act(self.norm(self.gnconv(x)))


class HorFPN(FeaturePyramid):
    """A feature pyramid whose last convolution of each level is a recursive gated one (paper, section 3.3).

    Args:
        in_channels: channels of the maps, from fine to coarse.
        out_channels: channels of every level.
        num_outs: number of levels.
        **options: of `GatedConvModule`.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"(lateral_convs\.\d+)\.conv\.", r"\1."),
                (r"(fpn_convs\.\d+)\.(?:conv\.)?(proj_in|proj_out|dwconv|pws)\b", r"\1.gnconv.\2"),
            )
        )
    }

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, *, num_outs: int | None = None, **options: Any
    ) -> None:
        make = partial(GatedConvModule, **options)
        super().__init__(in_channels, out_channels, num_outs=num_outs, make_output=make)


_GF = (None, None, (14, 8), (7, 4))
_GF_384 = (None, None, (24, 13), (12, 7))

VARIANTS: dict[str, HorNetConfig] = {
    "hornet_tiny_7x7": HorNetConfig(),
    "hornet_tiny_gf": HorNetConfig(filter_grids=_GF),
    "hornet_small_7x7": HorNetConfig(base_dim=96, drop_path=0.4),
    "hornet_small_gf": HorNetConfig(base_dim=96, drop_path=0.4, filter_grids=_GF),
    "hornet_base_7x7": HorNetConfig(base_dim=128, drop_path=0.5),
    "hornet_base_gf": HorNetConfig(base_dim=128, drop_path=0.5, filter_grids=_GF),
    "hornet_base_gf_img384": HorNetConfig(
        base_dim=128, drop_path=0.5, filter_grids=_GF_384, preprocess=Preprocess(size=384, crop=1.0)
    ),
    "hornet_large_7x7": HorNetConfig(base_dim=192),
    "hornet_large_gf": HorNetConfig(base_dim=192, filter_grids=_GF),
    "hornet_large_gf_img384": HorNetConfig(
        base_dim=192, drop_path=0.4, filter_grids=_GF_384, preprocess=Preprocess(size=384, crop=1.0)
    ),
}


def _cloud(top1: float | None) -> tuple[PublishedFile, ...]:
    # The files lie on Tsinghua Cloud, behind links in the authors' README.
    figures = {} if top1 is None else {"ImageNet-1K top-1 [%]": top1}
    return (PublishedFile("https://github.com/raoyongming/HorNet", "MIT", figures, by_hand=True),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "hornet_tiny_7x7": _cloud(82.8),
    "hornet_tiny_gf": _cloud(83.0),
    "hornet_small_7x7": _cloud(83.8),
    "hornet_small_gf": _cloud(84.0),
    "hornet_base_7x7": _cloud(84.2),
    "hornet_base_gf": _cloud(84.3),
}
