"""Scaling MLPs: multi-layer perceptrons on the pixels of an image in a row, without any prior about space.

Bachmann, Anagnostidis, Hofmann: "Scaling MLPs: A Tale of Inductive Bias", NeurIPS 2023, arXiv 2306.13575. The largest,
pre-trained on ImageNet-21k, reaches 93 % on CIFAR-10.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import UnknownName, unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.mlp import Mlp
from convatlas.ops.resize import resize_matrix
from convatlas.weights import Layout

__all__ = [
    "PUBLISHED",
    "VARIANTS",
    "BottleneckBlock",
    "BottleneckMLP",
    "BottleneckMLPConfig",
    "PixelLinear",
    "StandardMLP",
    "StandardMLPConfig",
    "first_layer_images",
    "flatten_images",
    "for_image_size",
    "mlp_from_name",
    "with_normalisation",
]

#: Images are resized by the mean of areas, as the authors' loader does.
_IMAGENET = Preprocess(size=64, interpolation="box", crop=1.0)
_CIFAR = dataclasses.replace(_IMAGENET, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_IMAGENET_21K = 11230


@dataclass(frozen=True, kw_only=True)
class BottleneckMLPConfig(BackboneConfig):
    """Config of `BottleneckMLP`.

    Attributes:
        block_dims: wide and thin width of each block; the thin one is that of the network and is the same in all.
        norm: before each block: ``layer``, ``batch`` or ``none``.
        preprocess: its size is the only one that the network takes; ``in_channels=n, preprocess={"size": 1}`` is a
            network for any n numbers.
    """

    block_dims: tuple[tuple[int, int], ...] = ((2048, 512),) * 6
    norm: Literal["layer", "batch", "none"] = "layer"
    preprocess: Preprocess = field(default_factory=lambda: _IMAGENET)

    def build(self) -> BottleneckMLP:
        return BottleneckMLP(self)


@dataclass(frozen=True, kw_only=True)
class StandardMLPConfig(BackboneConfig):
    """Config of `StandardMLP`.

    Attributes:
        widths: of the hidden layers, the first included; they are equal.
        preprocess: its size is the only one that the network takes.
    """

    widths: tuple[int, ...] = (1024,) * 6
    preprocess: Preprocess = field(default_factory=lambda: _IMAGENET)

    def build(self) -> StandardMLP:
        return StandardMLP(self)


def flatten_images(images: Tensor) -> Tensor:
    """The pixels of images (B, C, H, W) in a row, (B, C * H * W): channel by channel, each row by row."""
    return images.flatten(1)


class PixelLinear(nn.Conv2d):
    """A linear layer on all values of an image: a convolution whose kernel is as large as the image.

    The weight (D, C, H, W) holds an image for each output; its rows ``weight.flatten(1)`` are those of a
    `torch.nn.Linear` on `flatten_images`.

    Args:
        in_channels: channels C of the image.
        out_features: outputs D.
        size: height and width of the image.
    """

    def __init__(self, in_channels: int, out_features: int, size: tuple[int, int]) -> None:
        super().__init__(in_channels, out_features, size)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) of the size of the kernel to (B, D, 1, 1)."""
        weight = self.weight
        if not weight.is_contiguous():  # channels last: put in a row as they lie, which needs no copy
            x, weight = x.movedim(1, -1), weight.movedim(1, -1)
        return F.linear(x.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]


def _norm(kind: str, channels: int) -> nn.Module:
    norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    return norms[kind](channels) if kind in norms else nn.Identity()


class BottleneckBlock(nn.Module):
    """h + W2 gelu(W1 norm(h) + b1) + b2, an inverted bottleneck (paper, section 3).

    Args:
        channels: thin width.
        hidden_channels: wide width.
        norm: ``layer``, ``batch`` or ``none``.
    """

    def __init__(self, channels: int, hidden_channels: int, norm: Literal["layer", "batch", "none"] = "layer") -> None:
        super().__init__()
        self.norm = _norm(norm, channels)
        self.mlp = Mlp(channels, hidden_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D) to the same shape."""
        return x + self.mlp(self.norm(x))


class _StandardLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.norm(x)))


def _as_images(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rows of the first layer as the images that they are."""
    key = "linear_in.weight"
    if key in state and state[key].dim() == 2 and isinstance(model, _PixelMLP):
        size = model.config.preprocess.shape
        if state[key].shape[1] % (size[0] * size[1]) == 0:
            return {**state, key: state[key].unflatten(1, (-1, *size))}
    return state


class _PixelMLP(Backbone):
    """What both networks share: a linear layer on the pixels, blocks without space, a linear classifier."""

    classifier_modules: ClassVar[tuple[str, ...]] = ("linear_out",)
    stem_modules: ClassVar[tuple[str, ...]] = ("linear_in",)

    def __init__(self, config: BottleneckMLPConfig | StandardMLPConfig, width: int, blocks: list[nn.Module]) -> None:
        super().__init__(config)
        size = config.preprocess.shape
        self.linear_in = PixelLinear(config.in_channels, width, size)
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = (Feature(width, min(size)),)
        self.min_size = size
        self.reset_classifier(config.num_classes)

    @property
    def dim_in(self) -> int:
        """Numbers of an image."""
        height, width = self.config.preprocess.shape
        return self.in_channels * int(height) * int(width)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of images (B, C, H, W) or of their pixels in a row (B, C * H * W).

        Raises:
            ValueError: x has a wrong number of dimensions, channels or pixels.
        """
        return super().forward(x)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """What the classifier sees, as one map (B, D, 1, 1)."""
        height, width = self.config.preprocess.shape
        if x.dim() != 2:
            self._check_input(x)
        if (inputs := math.prod(x.shape[1:])) != self.dim_in:
            raise ValueError(
                f"expected {height}x{width}x{self.in_channels} = {self.dim_in} inputs, got {inputs}; "
                "for_image_size makes a network for images of another size"
            )
        if x.dim() == 2:
            x = x.unflatten(1, (self.in_channels, height, width))
        h = self.linear_in(x).flatten(1)
        for block in self.blocks:
            h = self._run_stage(block, h)
        return [h[:, :, None, None]]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.linear_out(x.flatten(1))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.linear_out: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.linear_in.weight
            self.linear_out = nn.Linear(len(weight), num_classes, device=weight.device, dtype=weight.dtype)


class BottleneckMLP(_PixelMLP):
    """An MLP of inverted bottlenecks with skip connections and without a norm at the end (paper, section 3).

    Args:
        config: what to build.

    Raises:
        ValueError: the thin widths differ, a width is not positive, or there is no block.
        UnknownName: there is no such norm.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"^blocks\.(\d+)\.block\.0\.", r"blocks.\1.mlp.fc1."),
                (r"^blocks\.(\d+)\.block\.2\.", r"blocks.\1.mlp.fc2."),
                (r"^layernorms\.(\d+)\.", r"blocks.\1.norm."),
            ),
            function=_as_images,
        )
    }

    def __init__(self, config: BottleneckMLPConfig) -> None:
        if not config.block_dims or any(len(dims) != 2 or min(dims) < 1 for dims in config.block_dims):
            raise ValueError(f"block_dims must hold a wide and a thin width for each block, got {config.block_dims}")
        if len({thin for _, thin in config.block_dims}) > 1:
            raise ValueError(f"the thin widths of block_dims must be equal, got {config.block_dims}")
        if config.norm not in ("layer", "batch", "none"):
            raise unknown("norm", config.norm, ("layer", "batch", "none"))
        blocks: list[nn.Module] = [BottleneckBlock(thin, wide, config.norm) for wide, thin in config.block_dims]
        super().__init__(config, config.block_dims[0][1], blocks)


class StandardMLP(_PixelMLP):
    """A plain MLP: linear, then layer norm, GELU and linear again and again; no skip connections (paper, section 3).

    Args:
        config: what to build.

    Raises:
        ValueError: the widths differ, one is not positive, or there is none.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"^layers\.(\d+)\.", r"blocks.\1.linear."),
                (r"^layernorms\.(\d+)\.", r"blocks.\1.norm."),
            ),
            function=_as_images,
        )
    }

    def __init__(self, config: StandardMLPConfig) -> None:
        if not config.widths or min(config.widths) < 1 or len(set(config.widths)) > 1:
            raise ValueError(f"widths must be equal and positive, got {config.widths}")
        width = config.widths[0]
        super().__init__(config, width, [_StandardLayer(width) for _ in config.widths[1:]])


_Network = TypeVar("_Network", BottleneckMLP, StandardMLP)


@torch.no_grad()
def with_normalisation(network: _Network, mean: tuple[float, ...], std: tuple[float, ...]) -> _Network:
    """A copy that gives the same scores for images of another normalisation, by other weights of the first layer.

    Mean 0 and std 1 take pixels from 0 to 1 as they are; with std 1 / 255 they are bytes from 0 to 255, which can stay
    bytes until they reach the network.

    Args:
        network: what to copy.
        mean: per channel, or one value for all.
        std: in the same way.

    Raises:
        ValueError: there are other numbers of values than channels, or std is not positive.
    """
    preprocess = dataclasses.replace(network.config.preprocess, mean=mean, std=std)
    copied = copy.deepcopy(network)
    weight, channels = copied.linear_in.weight, network.in_channels
    old_mean, old_std = (_values(values, channels).to(weight) for values in _normalisation(network.config.preprocess))
    new_mean, new_std = (_values(values, channels).to(weight) for values in (mean, std))
    bias: Tensor = copied.linear_in.bias  # type: ignore[assignment]
    bias += (weight * ((new_mean - old_mean) / old_std)).sum((1, 2, 3))
    weight *= new_std / old_std
    copied.config = network.config.override(preprocess=preprocess)
    return copied


def _normalisation(preprocess: Preprocess) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return preprocess.mean, preprocess.std


def _values(values: tuple[float, ...], channels: int) -> Tensor:
    """Values of the channels as (C, 1, 1), as `Preprocess` understands them."""
    if len(values) not in (1, channels) and channels != 1:
        raise ValueError(f"mean and std must have one value or {channels}, got {len(values)}")
    if channels == 1:
        values = (sum(values) / len(values),)
    return torch.tensor(values, dtype=torch.float64).expand(channels)[:, None, None]


@torch.no_grad()
def for_image_size(network: _Network, size: int | tuple[int, int]) -> _Network:
    """A copy for images of another size, which gives what the network gives for those images resized to its own size.

    Resizing is linear, so it goes into the weights of the first layer: each of its images is multiplied by the
    transposed matrices of the interpolation of ``config.preprocess``. With fewer pixels it takes fewer operations.

    Args:
        network: what to copy.
        size: height and width, or one value for both.

    Raises:
        ValueError: the size is not positive.
    """
    preprocess = dataclasses.replace(network.config.preprocess, size=size)
    copied = copy.deepcopy(network)
    own = network.config.preprocess
    rows, columns = (
        resize_matrix(new, old, convention="pillow", interpolation=own.interpolation).to(network.linear_in.weight)
        for new, old in zip(preprocess.shape, own.shape, strict=True)
    )
    copied.linear_in.weight = nn.Parameter(rows.mT @ network.linear_in.weight @ columns)
    copied.linear_in.kernel_size = preprocess.shape
    copied.config = network.config.override(preprocess=preprocess)
    copied.feature_info = (Feature(network.feature_info[0].channels, min(preprocess.shape)),)
    copied.min_size = preprocess.shape
    return copied


def first_layer_images(network: BottleneckMLP | StandardMLP, count: int = 16) -> list[npt.NDArray[np.uint8]]:
    """The largest weights of the first layer as pictures (H, W) or (H, W, 3); a weight of 0 is grey.

    Args:
        network: any of the two; of other than 3 channels the mean is shown.
        count: how many outputs of the layer to show, those of the largest norm first.
    """
    weight = network.linear_in.weight.detach().float().cpu()
    chosen = weight[weight.flatten(1).norm(dim=1).argsort(descending=True)[:count]]
    scaled = chosen / chosen.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    pixels = (127.5 * (scaled + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)
    if pixels.shape[3] == 3:
        return list(pixels.numpy())
    return list((127.5 * (scaled.mean(1) + 1)).round().to(torch.uint8).numpy())


_NAME = re.compile(
    r"B[-_](?P<depth>\d+)[-_]Wi[-_](?P<thin>\d+)(?:[-_]exp[-_](?P<expansion>\d+))?"
    r"(?:_res_(?P<size>\d+)_(?P<data>imagenet21|imagenet|cifar100|cifar10)(?:_epochs_\d+)?)?"
)
_DATA = {
    "imagenet21": (_IMAGENET_21K, _IMAGENET),
    "imagenet": (1000, _IMAGENET),
    "cifar10": (10, _CIFAR),
    "cifar100": (100, _CIFAR),
}


def mlp_from_name(
    name: str, *, resolution: int | None = None, num_classes: int | None = None, in_channels: int = 3
) -> BottleneckMLP:
    """Build a bottleneck MLP from a name in the paper's form, ``B_{blocks}-Wi_{width}[-exp_{expansion}]``.

    The form of the authors' files is understood as well, e.g. ``B-12_Wi-1024_res_64_cifar10_epochs_20``; it also says
    the size, the classes and the normalisation.

    Args:
        name: of any depth, width and expansion (4 when left out).
        resolution: side of the images in pixels; that of the name, or 64.
        num_classes: size of the classifier; that of the name's data, or 1000.
        in_channels: channels of the images.

    Raises:
        UnknownName: the name has another form.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UnknownName(f"the name of an MLP must be like B_12-Wi_1024 or B_6-Wi_512-exp_2, got {name!r}")
    classes, preprocess = _DATA.get(found["data"], (1000, _IMAGENET))
    thin = int(found["thin"])
    return BottleneckMLPConfig(
        block_dims=((int(found["expansion"] or 4) * thin, thin),) * int(found["depth"]),
        num_classes=classes if num_classes is None else num_classes,
        in_channels=in_channels,
        preprocess=dataclasses.replace(preprocess, size=resolution or int(found["size"] or 64)),
    ).build()


def _config(depth: int, width: int, data: str = "imagenet21") -> BottleneckMLPConfig:
    classes, preprocess = _DATA[data]
    return BottleneckMLPConfig(block_dims=((4 * width, width),) * depth, num_classes=classes, preprocess=preprocess)


VARIANTS: dict[str, BottleneckMLPConfig | StandardMLPConfig] = {
    "B_6-Wi_512": _config(6, 512),
    "B_6-Wi_512_cifar10": _config(6, 512, "cifar10"),
    "B_6-Wi_512_cifar100": _config(6, 512, "cifar100"),
    "B_6-Wi_512_imagenet": _config(6, 512, "imagenet"),
    "B_12-Wi_512": _config(12, 512),
    "B_12-Wi_512_cifar10": _config(12, 512, "cifar10"),
    "B_12-Wi_512_cifar100": _config(12, 512, "cifar100"),
    "B_12-Wi_512_imagenet": _config(12, 512, "imagenet"),
    "B_6-Wi_1024": _config(6, 1024),
    "B_6-Wi_1024_cifar10": _config(6, 1024, "cifar10"),
    "B_6-Wi_1024_cifar100": _config(6, 1024, "cifar100"),
    "B_6-Wi_1024_imagenet": _config(6, 1024, "imagenet"),
    "B_12-Wi_1024": _config(12, 1024),
    "B_12-Wi_1024_cifar10": _config(12, 1024, "cifar10"),
    "B_12-Wi_1024_cifar100": _config(12, 1024, "cifar100"),
    "B_12-Wi_1024_imagenet": _config(12, 1024, "imagenet"),
    "MLP_6-Wi_1024": StandardMLPConfig(),
}

_PAGE = "https://github.com/gregorbachmann/scaling_mlps"


def _published(name: str, *top1: float) -> dict[str, tuple[PublishedFile, ...]]:
    """The files of one size: pre-trained, with what fine-tuning gives, and the fine-tuned ones."""
    names = ("CIFAR-10", "CIFAR-100", "STL-10", "TinyImageNet", "ImageNet-1K", "ImageNet-ReaL")
    figures = {f"{data} top-1 [%]": value for data, value in zip(names, top1, strict=True)}
    files = {name: {f"fine-tuned on {data}": value for data, value in figures.items()}}
    for suffix, data in (("cifar10", names[:1]), ("cifar100", names[1:2]), ("imagenet", names[4:])):
        files[f"{name}_{suffix}"] = {f"{each} top-1 [%]": figures[f"{each} top-1 [%]"] for each in data}
    # The page links files on Google Drive; its ImageNet link of B_6-Wi_512 gives the file for CIFAR-100.
    return {key: (PublishedFile(_PAGE, "not stated", given, by_hand=True),) for key, given in files.items()}


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    **_published("B_6-Wi_512", 88.5, 71.2, 79.9, 53.2, 33.3, 38.2),
    **_published("B_12-Wi_512", 91.4, 75.1, 84.4, 60.0, 38.0, 42.8),
    **_published("B_6-Wi_1024", 92.5, 77.1, 86.5, 64.3, 40.0, 47.0),
    **_published("B_12-Wi_1024", 94.2, 80.0, 89.9, 69.9, 43.2, 48.6),
}
