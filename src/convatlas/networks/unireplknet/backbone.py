"""UniRepLKNet: few large depthwise kernels that see wide, many small ones and pointwise layers that make it deep.

Ding, Zhang, Ge, Zhao, Song, Yue, Shan: "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video,
Point Cloud, Time-Series and Image Recognition", CVPR 2024, arXiv 2311.15599. Zhang, Ding, Yue: "Scaling Up Your
Kernels: Large Kernel Design in ConvNets towards Universal Representations", TPAMI 2025, arXiv 2410.08049.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile, decay_groups
from convatlas.nn.depthwise import DepthwiseConv2d
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.mixers.dilated_reparam import DilatedReparamBlock, fold_norm
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.nn.norm import ChannelLayerNorm, GlobalResponseNorm
from convatlas.nn.scale import LayerScale
from convatlas.weights import Layout

__all__ = [
    "PUBLISHED",
    "VARIANTS",
    "MergedUniRepLKNetBlock",
    "UniRepLKNet",
    "UniRepLKNetBlock",
    "UniRepLKNetConfig",
    "stage_kernels",
]

#: Smallest kernel that is trained with dilated ones beside it.
_SMALLEST_LARGE = 7
#: The depthwise kernel of each block, stage by stage.
_Kernels: TypeAlias = tuple[tuple[int, ...], ...]


def stage_kernels(depths: tuple[int, ...], *, large: int = 13, last: int = 13, period: int = 1) -> _Kernels:
    """The published kernels of four stages: 3 in the first, large ones in the second and, in turn with 3, the third.

    Args:
        depths: blocks of each stage.
        large: kernel of the second and third stage.
        last: kernel of the last stage.
        period: one in so many blocks of the third stage has the large kernel, the first of each group.
    """
    third = tuple(large if block % period == 0 else 3 for block in range(depths[2]))
    return ((3,) * depths[0], (large,) * depths[1], third, (last,) * depths[3])


@dataclass(frozen=True, kw_only=True)
class UniRepLKNetConfig(BackboneConfig):
    """Config of `UniRepLKNet`.

    Attributes:
        depths: blocks of each stage.
        dims: channels of each stage.
        kernel_sizes: for each stage, the depthwise kernel of each block: 0 for none, 3 or 5 for a plain one, from 7 a
            Dilated Reparam Block.
        drop_path: rate at the last block; it rises linearly from 0.
        layer_scale_init: initial LayerScale factor, or None to leave LayerScale out.
        head_init_scale: factor of the classifier's initial weights.
        dense: for dense prediction: every map of the pyramid gets a norm of its own, and there is no classifier.
        deploy: build the merged form, as `convatlas.surgery.merge` makes it, to load merged weights.
    """

    depths: tuple[int, ...] = (3, 3, 18, 3)
    dims: tuple[int, ...] = (80, 160, 320, 640)
    kernel_sizes: tuple[tuple[int, ...], ...] = stage_kernels((3, 3, 18, 3), period=2)
    drop_path: float = 0.2
    layer_scale_init: float | None = 1e-6
    head_init_scale: float = 1.0
    dense: bool = False
    deploy: bool = False

    def build(self) -> UniRepLKNet:
        return UniRepLKNet(self)


class _Block(nn.Module):
    """x + drop_path(F(x)): the parts of F that training and deployed form share."""

    def __init__(self, channels: int, *, expansion: int) -> None:
        super().__init__()
        self.dwconv: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.se = SqueezeExcite(channels, reduction=4)
        self.pwconv1 = nn.Linear(channels, expansion * channels)
        self.grn = GlobalResponseNorm(expansion * channels)
        self.pwconv2 = nn.Linear(expansion * channels, channels)
        self.ffn_norm: nn.Module = nn.Identity()
        self.layer_scale: nn.Module = nn.Identity()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = self.se(self.norm(self.dwconv(x))).permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)
        return x + self.drop_path(self.layer_scale(self.ffn_norm(y)))


def _authors(*first: tuple[str, str]) -> Layout:
    """The authors' keys: indices of containers for names, and squeeze-and-excitation by 1x1 convolutions."""

    def flatten(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        del model
        gates = (".se.fc1.weight", ".se.fc2.weight")
        return {key: value.flatten(1) if f".{key}".endswith(gates) else value for key, value in state.items()}

    return Layout(
        renames=(
            *first,
            *DilatedReparamBlock.layouts["authors"].renames,
            (r"(^|\.)se\.down\.", r"\1se.fc1."),
            (r"(^|\.)se\.up\.", r"\1se.fc2."),
            (r"(^|\.)pwconv1\.1\.", r"\1pwconv1."),
            (r"(^|\.)act\.1\.", r"\1grn."),
            (r"(^|\.)pwconv2\.2\.", r"\1ffn_norm."),
            (r"(^|\.)pwconv2\.0\.", r"\1pwconv2."),
            (r"(^|\.\d+\.)gamma$", r"\1layer_scale.gamma"),
        ),
        function=flatten,
    )


_LAYOUTS = {"authors": _authors(), "authors_deployed": _authors((r"(^|\.)dwconv\.lk_origin\.", r"\1dwconv."))}


class UniRepLKNetBlock(_Block):
    """Depthwise convolution, batch norm, squeeze-and-excitation, then an MLP with global response norm; one residual.

    F(x) = gamma BN(W2 GRN(gelu(W1 SE(BN(DW(x)))))) (paper, figure 2). `merged` gives the form for use.

    Args:
        channels: channels C.
        kernel_size: 0 for no depthwise convolution and norm, 3 or 5 for a plain one, from 7 a `DilatedReparamBlock`.
        drop_path: probability to drop the branch of a sample.
        layer_scale_init: initial LayerScale factor, or None to leave LayerScale out.
        expansion: hidden width of the MLP over C.

    Raises:
        ValueError: there is no such kernel.
    """

    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        drop_path: float = 0.0,
        layer_scale_init: float | None = 1e-6,
        expansion: int = 4,
    ) -> None:
        super().__init__(channels, expansion=expansion)
        _check_kernel(kernel_size)
        if kernel_size >= _SMALLEST_LARGE:
            self.dwconv = DilatedReparamBlock(channels, kernel_size)
        elif kernel_size > 0:
            self.dwconv = DepthwiseConv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        if kernel_size > 0:
            self.norm = nn.BatchNorm2d(channels)
        self.pwconv2 = nn.Linear(expansion * channels, channels, bias=False)
        self.ffn_norm = nn.BatchNorm2d(channels)
        if layer_scale_init is not None:
            self.layer_scale = LayerScale(channels, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def merged(self) -> MergedUniRepLKNetBlock | None:
        """The block for use, which computes the same in evaluation; None if parts were exchanged for others.

        The first batch norm goes into the depthwise convolution, the last and gamma into W2, and the bias beta of GRN
        becomes W2 beta.
        """
        plain = self.dwconv.merged() if type(self.dwconv) is DilatedReparamBlock else self.dwconv
        norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
        whole = type(self.grn) is GlobalResponseNorm and type(self.pwconv2) is nn.Linear
        whole = whole and type(self.ffn_norm) in norms and type(self.pwconv1) is nn.Linear
        convolved = type(plain) is DepthwiseConv2d and type(self.norm) in norms
        if not whole or not (convolved or (type(plain) is type(self.norm) is nn.Identity)):
            return None
        kernel_size = plain.kernel_size[0] if isinstance(plain, DepthwiseConv2d) else 0
        hidden, channels = self.pwconv1.out_features, self.pwconv1.in_features
        block = MergedUniRepLKNetBlock(
            channels, kernel_size, drop_path=self.drop_path.rate, expansion=hidden // channels
        )
        block.se, block.pwconv1 = self.se, self.pwconv1
        old = self.pwconv2.weight

        def parameter(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.to(old.dtype), old.requires_grad)

        if isinstance(plain, DepthwiseConv2d):
            weight, bias = fold_norm(plain, self.norm)
            block.dwconv.weight, block.dwconv.bias = parameter(weight), parameter(bias)
        block.grn.gamma = self.grn.gamma
        weight, bias = fold_norm(self.pwconv2, self.ffn_norm)
        if self.grn.beta is not None:
            bias = bias + weight @ self.grn.beta.detach().flatten().to(weight.dtype)
        if isinstance(self.layer_scale, LayerScale):
            gamma = self.layer_scale.gamma.detach().to(weight.dtype)
            weight, bias = weight * gamma[:, None], bias * gamma
        block.pwconv2.weight, block.pwconv2.bias = parameter(weight), parameter(bias)
        return block.to(old.device).train(self.training)


class MergedUniRepLKNetBlock(_Block):
    """`UniRepLKNetBlock` as it is deployed: a depthwise convolution and two linear layers with biases, no norms.

    Args:
        channels, kernel_size, drop_path, expansion: as of the block.

    Raises:
        ValueError: there is no such kernel.
    """

    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS

    def __init__(self, channels: int, kernel_size: int, *, drop_path: float = 0.0, expansion: int = 4) -> None:
        super().__init__(channels, expansion=expansion)
        _check_kernel(kernel_size)
        if kernel_size > 0:
            self.dwconv = DepthwiseConv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.grn = GlobalResponseNorm(expansion * channels, bias=False)
        self.drop_path = DropPath(drop_path)


def _check_kernel(kernel_size: int) -> None:
    if kernel_size not in (0, 3, 5) and (kernel_size < _SMALLEST_LARGE or kernel_size % 2 == 0):
        raise ValueError(f"kernel_size must be 0, 3, 5 or an odd number from {_SMALLEST_LARGE}, got {kernel_size}")


class UniRepLKNet(Backbone):
    """UniRepLKNet (paper, section 3.2): a stem of two convolutions, four stages, mean pool, norm, linear classifier.

    Args:
        config: what to build.

    Raises:
        ValueError: depths, dims and kernel_sizes do not fit each other, or there is no such kernel.
    """

    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("downsample_layers.0.0",)
    min_size = 1

    def __init__(self, config: UniRepLKNetConfig) -> None:
        super().__init__(config)
        depths, dims = config.depths, config.dims
        if not 0 < len(depths) == len(dims):
            raise ValueError(f"depths and dims must name the same stages, got {depths} and {dims}")
        if tuple(map(len, config.kernel_sizes)) != depths:
            raise ValueError(
                f"kernel_sizes must name a kernel for each block of depths {depths}, got {config.kernel_sizes}"
            )
        narrow = dims[0] // 2
        stem = nn.Sequential(
            nn.Conv2d(config.in_channels, narrow, 3, stride=2, padding=1),
            ChannelLayerNorm(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, dims[0], 3, stride=2, padding=1),
            ChannelLayerNorm(dims[0]),
        )
        downsamples = [
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), ChannelLayerNorm(after))
            for before, after in pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *downsamples])
        stages = []
        for stage, rates in enumerate(drop_path_rates(config.drop_path, depths)):
            blocks = [
                MergedUniRepLKNetBlock(dims[stage], kernel, drop_path=rate)
                if config.deploy
                else UniRepLKNetBlock(dims[stage], kernel, drop_path=rate, layer_scale_init=config.layer_scale_init)
                for kernel, rate in zip(config.kernel_sizes[stage], rates, strict=True)
            ]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_info = tuple(Feature(channels, 4 * 2**stage) for stage, channels in enumerate(dims))
        self._norms = [f"norm{stage}" for stage in range(len(dims))] if config.dense else []
        for name, channels in zip(self._norms, dims, strict=False):
            self.add_module(name, ChannelLayerNorm(channels))
        self.norm = nn.Identity() if config.dense else nn.LayerNorm(dims[-1], eps=1e-6)
        self.apply(_initialise)
        self.reset_classifier(0 if config.dense else config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        return self.forward_maps(x)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """`forward_features` of what a front end has made into an image."""
        features = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = self._run_stage(stage, downsample(x))
            features.append(x)
        norms = [self.get_submodule(name) for name in self._norms]
        return [norm(feature) for norm, feature in zip(norms, features, strict=True)] if norms else features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3))))

    def layers(self) -> list[nn.Module]:
        """The groups of the published layer-wise decay: stages, with three blocks a group in the last but one."""
        ends = [self.get_submodule(name) for name in self._norms] or [self.norm, self.head]
        return decay_groups(self.downsample_layers, self.stages, ends, blocks=3)

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.get_parameter("downsample_layers.0.0.weight")
            self.head = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            _initialise(self.head)
            self.head.weight.data.mul_(self.config.head_init_scale)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _small(dims: tuple[int, ...], third: int = 6) -> UniRepLKNetConfig:
    depths = (2, 2, third, 2)
    return UniRepLKNetConfig(depths=depths, dims=dims, kernel_sizes=stage_kernels(depths), drop_path=0.0)


_DEEP = UniRepLKNetConfig(
    depths=(3, 3, 27, 3),
    dims=(96, 192, 384, 768),
    kernel_sizes=stage_kernels((3, 3, 27, 3), period=3),
    drop_path=0.4,
)
_BASE, _LARGE, _XLARGE = (
    dataclasses.replace(_DEEP, dims=tuple(width * 2**stage for stage in range(4))) for width in (128, 192, 256)
)


def _pretrained(config: UniRepLKNetConfig, size: int, drop_path: float) -> UniRepLKNetConfig:
    return dataclasses.replace(config, num_classes=21841, drop_path=drop_path, preprocess=Preprocess(size=size))


def _tuned(config: UniRepLKNetConfig, drop_path: float) -> UniRepLKNetConfig:
    whole = Preprocess(size=384, crop=1.0, stretch=True)
    return dataclasses.replace(config, drop_path=drop_path, head_init_scale=0.001, preprocess=whole)


VARIANTS: dict[str, UniRepLKNetConfig] = {
    "unireplknet_a": _small((40, 80, 160, 320)),
    "unireplknet_f": _small((48, 96, 192, 384)),
    "unireplknet_p": dataclasses.replace(_small((64, 128, 256, 512)), drop_path=0.1),
    "unireplknet_n": dataclasses.replace(_small((80, 160, 320, 640), third=8), drop_path=0.1),
    "unireplknet_t": UniRepLKNetConfig(),
    "unireplknet_s": _DEEP,
    "unireplknet_b": _BASE,
    "unireplknet_l": _LARGE,
    "unireplknet_xl": _XLARGE,
    "unireplknet_s_in22k": _pretrained(_DEEP, 224, 0.1),
    "unireplknet_b_in22k": _pretrained(_BASE, 224, 0.1),
    "unireplknet_l_in22k": _pretrained(_LARGE, 192, 0.1),
    "unireplknet_xl_in22k": _pretrained(_XLARGE, 192, 0.2),
    "unireplknet_s_384": _tuned(_DEEP, 0.2),
    "unireplknet_b_384": _tuned(_BASE, 0.2),
    "unireplknet_l_384": _tuned(_LARGE, 0.3),
    "unireplknet_xl_384": _tuned(_XLARGE, 0.3),
}


def _hub(name: str, top1: float | None = None, after: float | None = None) -> tuple[PublishedFile, ...]:
    figures = {} if top1 is None else {"ImageNet-1K top-1 [%]": top1}
    figures |= {} if after is None else {"ImageNet-1K top-1 after fine-tuning at 384 pixels [%]": after}
    return (PublishedFile(f"hf://DingXiaoH/UniRepLKNet/unireplknet_{name}.pth", "Apache-2.0", figures),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "unireplknet_a": _hub("a_in1k_224_acc77.03", 77.03),
    "unireplknet_f": _hub("f_in1k_224_acc78.58", 78.58),
    "unireplknet_p": _hub("p_in1k_224_acc80.23", 80.23),
    "unireplknet_n": _hub("n_in1k_224_acc81.64", 81.64),
    "unireplknet_t": _hub("t_in1k_224_acc83.21", 83.21),
    "unireplknet_s": _hub("s_in1k_224_acc83.91", 83.91),
    "unireplknet_s_in22k": _hub("s_in22k_pretrain", after=86.44),
    "unireplknet_b_in22k": _hub("b_in22k_pretrain", after=87.40),
    "unireplknet_l_in22k": _hub("l_in22k_pretrain", after=87.88),
    "unireplknet_xl_in22k": _hub("xl_in22k_pretrain", after=87.96),
    "unireplknet_s_384": _hub("s_in22k_to_in1k_384_acc86.44", 86.44),
    "unireplknet_b_384": _hub("b_in22k_to_in1k_384_acc87.40", 87.40),
    "unireplknet_l_384": _hub("l_in22k_to_in1k_384_acc87.88", 87.88),
    "unireplknet_xl_384": _hub("xl_in22k_to_in1k_384_acc87.96", 87.96),
}
