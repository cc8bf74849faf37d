"""The protocols of networks: a frozen config; backbones, with features from high to low resolution and a head that can
be replaced; upscalers, which enlarge an image or a volume; networks that map fields to fields.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convatlas.data.transforms import Preprocess
from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import unknown
from convatlas.weights import Layout

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Denoiser",
    "DenoiserConfig",
    "Feature",
    "FeatureExtractor",
    "FieldNetwork",
    "FieldNetworkConfig",
    "NetworkConfig",
    "PublishedFile",
    "Upscaler",
    "UpscalerConfig",
    "decay_groups",
]

#: Group of the last stage in the layer-wise decay of ConvNeXt's code.
_LAST_GROUP = 12


class Feature(NamedTuple):
    """One map of a feature pyramid: its channels and how many input pixels one of its positions spans."""

    channels: int
    stride: int


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that the authors published.

    Attributes:
        url: where it lies (``https://`` or ``hf://``).
        licence: of the weights.
        figures: what it should reach, as published, e.g. ``{"ImageNet-1K top-1 [%]": 82.3}``.
        verified: how its layout was checked here.
        sha256: of the file, where it is known.
        by_hand: whether ``url`` is a page from which only a person can fetch the file.
    """

    url: str
    licence: str
    figures: Mapping[str, float]
    verified: str = "key names and shapes follow the authors' code; not tried on the file itself"
    sha256: str | None = None
    by_hand: bool = False


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ABC):
    """Everything that decides what a network is. A subclass adds its fields and names its network in `build`."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network with fresh weights."""

    def override(self, **changes: Any) -> Self:
        """A copy with some fields replaced; lists become tuples, mappings become the nested config of that field.

        Raises:
            UnknownName: there is no such field; the message offers the nearest names.
        """
        return _replaced(self, changes)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(NetworkConfig):
    """Config of a network for images, or for volumes and short videos, with a classifier.

    Attributes:
        num_classes: size of the classifier; 0 leaves it out, so that `forward` gives the features before it.
        in_channels: channels of the input image.
        preprocess: how the published weights expect an image to be prepared; a `VolumePreprocess` says that the network
            takes volumes.

    Raises:
        ValueError: num_classes or in_channels is out of range.
    """

    num_classes: int = 1000
    in_channels: int = 3
    preprocess: Preprocess | VolumePreprocess = field(default_factory=Preprocess)

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {self.num_classes}")

    @abstractmethod
    def build(self) -> Backbone: ...


class Backbone(nn.Module, ABC):
    """A network that turns an image (B, C, H, W), or a volume (B, C, D, H, W), into feature maps and class scores.

    A subclass sets ``feature_info`` in its constructor and defines `forward_features`, `forward_head` and
    `reset_classifier`.
    """

    #: How foreign checkpoint layouts map to this class (see `convatlas.weights`).
    layouts: ClassVar[Mapping[str, Layout]] = {}
    #: Modules whose first weight dimension is the number of classes.
    classifier_modules: ClassVar[tuple[str, ...]] = ()
    #: Modules between the last feature map and the classifier, which a network trained on its maps may lack.
    head_modules: ClassVar[tuple[str, ...]] = ()
    #: Convolutions that read the image.
    stem_modules: ClassVar[tuple[str, ...]] = ()
    #: Last names of parameters of several axes that weight decay leaves alone, such as class tokens.
    undecayed: ClassVar[tuple[str, ...]] = ()
    #: Smallest size of an image on every axis, or on each; None is the total stride.
    min_size: int | tuple[int, ...] | None = None

    feature_info: tuple[Feature, ...]

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.gradient_checkpointing = False

    @property
    def num_classes(self) -> int:
        """Size of the classifier."""
        return int(self.config.num_classes)

    @property
    def in_channels(self) -> int:
        """Channels of the input image."""
        return int(self.config.in_channels)

    @abstractmethod
    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of an image (B, C, H, W), from high to low resolution, as `feature_info` describes them."""

    @abstractmethod
    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of the last feature map; its pooled features when num_classes is 0.

        A network with a class token, which its maps do not hold, takes that token (B, C) instead of the map.
        """

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` classes."""

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of an image (B, in_channels, H, W).

        A network with further heads for training returns a tuple of scores while it trains, one for each head; the loss
        is the mean of theirs.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is smaller than the total stride.
        """
        return self.forward_head(self.forward_features(x)[-1])

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random input of the published size, for tracing and timing."""
        return (torch.randn(batch, self.in_channels, *self.config.preprocess.shape),)

    def layers(self) -> list[nn.Module]:
        """The network cut into steps from input to output, which layer-wise learning-rate decay goes down.

        By default its children, containers opened; together they hold every parameter.
        """
        found: list[nn.Module] = []
        for child in self.children():
            found += child if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
        return [layer for layer in found if any(True for _ in layer.parameters())]

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of each stage in the backward pass instead of keeping them: less memory, slower."""
        self.gradient_checkpointing = enabled

    def _run_stage(self, stage: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # A captured graph updates the statistics once anyway, and takes no context.
            contexts: dict[str, Any] = (
                {} if torch.compiler.is_compiling() else {"context_fn": lambda: _recomputing(stage)}
            )
            return checkpoint(stage, *inputs, use_reentrant=False, **contexts)
        return stage(*inputs)

    def _check_input(self, x: Tensor) -> None:
        dims = len(self.config.preprocess.shape)
        if x.dim() != dims + 2 or x.shape[1] != self.in_channels:
            axes = "D, H, W" if dims == 3 else "H, W"
            raise ValueError(f"x must be (B, {self.in_channels}, {axes}), got {tuple(x.shape)}")
        least = self.min_size or self.feature_info[-1].stride
        least = (least,) * dims if isinstance(least, int) else least
        if any(size < bound for size, bound in zip(x.shape[2:], least, strict=True)):
            what = "voxels" if dims == 3 else "pixels"
            wanted, got = (" x ".join(map(str, sizes)) for sizes in (least, x.shape[2:]))
            raise ValueError(f"x must be at least {wanted} {what}, got {got}")


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig(NetworkConfig):
    """Config of a network that enlarges an image or a volume.

    Attributes:
        scale: how many times as long each axis becomes.
        in_channels: channels of the image: 1 for luma, 3 for RGB.

    Raises:
        ValueError: scale or in_channels is smaller than 1.
    """

    scale: int = 3
    in_channels: int = 1

    def __post_init__(self) -> None:
        for name in ("scale", "in_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")

    @property
    def spatial_dims(self) -> int:
        """Axes of position: 2 of images, 3 of volumes."""
        return 2

    @abstractmethod
    def build(self) -> Upscaler: ...


class Upscaler(nn.Module, ABC):
    """A network that enlarges an image (B, C, H, W) with values in [0, 1] to (B, C, scale H, scale W), or a volume.

    What it does at a pixel must not depend on where the pixel lies, so that a large image can be enlarged in tiles.
    """

    #: How foreign checkpoint layouts map to this class (see `convatlas.weights`).
    layouts: ClassVar[Mapping[str, Layout]] = {}

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.config: Any = config

    @property
    def scale(self) -> int:
        """How many times as long each axis becomes."""
        return int(self.config.scale)

    @property
    def dims(self) -> int:
        """Axes of position: 2 of images, 3 of volumes."""
        return int(self.config.spatial_dims)

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return int(self.config.in_channels)

    @property
    def frames(self) -> int:
        """Consecutive frames that it takes, their channels one after the other; it enlarges the middle one."""
        return 1

    @property
    @abstractmethod
    def reach(self) -> int:
        """How many pixels of the input away something can still change the pixels that one pixel becomes."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The enlarged image (B, in_channels, scale H, scale W) of an image (B, frames * in_channels, H, W) in [0, 1].

        Volumes have one axis more, D before H.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is not floating point.
        """

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random image of 64 x 64 pixels, or a volume of 32 x 32 x 32 voxels, for tracing and timing."""
        size = (64, 64) if self.dims == 2 else (32,) * self.dims
        return (torch.rand(batch, self.frames * self.in_channels, *size),)

    def _check_input(self, x: Tensor) -> None:
        channels, dims = self.frames * self.in_channels, self.dims
        if x.dim() != dims + 2 or x.shape[1] != channels:
            raise ValueError(f"x must be (B, {channels}, {', '.join('DHW'[-dims:])}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point with values in [0, 1], got {x.dtype}")


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(UpscalerConfig):
    """Config of a network that cleans an image and keeps its size.

    Attributes:
        scale: 1.
        in_channels: channels of the image: 1 for grey, 3 for RGB.

    Raises:
        ValueError: scale is not 1, or in_channels is smaller than 1.
    """

    scale: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != 1:
            raise ValueError(f"scale must be 1, because the image keeps its size, got {self.scale}")

    @abstractmethod
    def build(self) -> Denoiser: ...


class Denoiser(Upscaler):
    """A network that cleans an image (B, C, H, W) with values in [0, 1]; the noisy values may lie outside."""


@dataclass(frozen=True, kw_only=True)
class FieldNetworkConfig(NetworkConfig):
    """Config of a network that maps fields to fields on the same grid.

    Attributes:
        in_channels: of the fields that it takes.
        out_channels: of those that it gives.
        dims: axes of position, 1 to 3.
        resolution: points of each axis of the grid that it is trained on, or one number for all. It may be used on
            others; some networks take sizes or initial weights from it.

    Raises:
        ValueError: a value is out of range.
    """

    in_channels: int = 1
    out_channels: int = 1
    dims: int = 2
    resolution: int | tuple[int, ...] = 64

    def __post_init__(self) -> None:
        if self.in_channels < 1 or self.out_channels < 1:
            given = f"{self.in_channels} and {self.out_channels}"
            raise ValueError(f"in_channels and out_channels must be at least 1, got {given}")
        if not 1 <= self.dims <= 3:
            raise ValueError(f"dims must be 1, 2 or 3, got {self.dims}")
        if len(self.grid) != self.dims or min(self.grid) < 1:
            raise ValueError(f"resolution must be one number or {self.dims}, at least 1, got {self.resolution}")

    @property
    def grid(self) -> tuple[int, ...]:
        """Points of each axis of the grid that it is trained on."""
        return (self.resolution,) * self.dims if isinstance(self.resolution, int) else self.resolution

    @abstractmethod
    def build(self) -> FieldNetwork: ...


class FieldNetwork(nn.Module, ABC):
    """A network that maps a field (B, in_channels, *grid) to one on the same grid.

    It may answer in another space, such as that of the lowest frequencies, so that training needs no inverse
    transform: `as_answer` brings a true field there, `as_field` brings an answer back. Both are linear and keep norms.
    """

    #: How foreign checkpoint layouts map to this class (see `convatlas.weights`).
    layouts: ClassVar[Mapping[str, Layout]] = {}

    def __init__(self, config: FieldNetworkConfig) -> None:
        super().__init__()
        self.config: Any = config

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The answer to a field (B, in_channels, *grid): a field (B, out_channels, *grid), unless `as_field` differs.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or the grid is too small.
        """

    def takes(self, grid: Sequence[int]) -> bool:
        """Whether it can be used on this grid, which may be another than that of the training."""
        return True

    def as_answer(self, field: Tensor) -> Tensor:
        """What the network should answer where the true field is (B, out_channels, *grid)."""
        return field

    def as_field(self, answer: Tensor, grid: Sequence[int]) -> Tensor:
        """The field (B, out_channels, *grid) that an answer to an input on this grid stands for."""
        return answer

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random field on the grid of the training, for tracing and timing."""
        return (torch.randn(batch, self.config.in_channels, *self.config.grid),)

    def _check_input(self, x: Tensor) -> None:
        channels, dims = self.config.in_channels, self.config.dims
        if x.dim() != dims + 2 or x.shape[1] != channels:
            raise ValueError(f"x must be (B, {channels}, {', '.join('DHW'[-dims:])}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")


class FeatureExtractor(nn.Module):
    """A backbone without its classifier that returns chosen maps of its feature pyramid.

    Args:
        backbone: the network; it is used as it is, not copied.
        out_indices: which maps to return, as indices into its ``feature_info``.

    Raises:
        ValueError: an index is out of range.
    """

    def __init__(self, backbone: Backbone, out_indices: Sequence[int]) -> None:
        super().__init__()
        count = len(backbone.feature_info)
        if not out_indices or not all(-count <= index < count for index in out_indices):
            raise ValueError(f"out_indices must be indices below {count}, got {tuple(out_indices)}")
        backbone.reset_classifier(0)
        self.backbone = backbone
        self.out_indices = tuple(index % count for index in out_indices)
        self.feature_info = tuple(backbone.feature_info[index] for index in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The chosen feature maps of an image (B, C, H, W)."""
        features = self.backbone.forward_features(x)
        return [features[index] for index in self.out_indices]


def _recomputing(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed pass and of its repetition, which must not count in running statistics again."""
    return nullcontext(), _statistics_kept(stage)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    kept = [
        (module, name, buffer) for module in stage.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


def _replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    known = {entry.name for entry in dataclasses.fields(config)}
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise unknown(f"option of {type(config).__name__}", name, known)
        current = getattr(config, name)
        nested = dataclasses.is_dataclass(current) and isinstance(value, Mapping)
        values[name] = _replaced(current, value) if nested else _tuples(value)
    return dataclasses.replace(config, **values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def decay_groups(
    downsample_layers: nn.ModuleList, stages: nn.ModuleList, ends: Sequence[nn.Module], blocks: int
) -> list[nn.Module]:
    """The groups of the layer-wise decay of ConvNeXt's code, for `Backbone.layers` of networks with four stages.

    Args:
        downsample_layers: what stands before each stage.
        stages: each a sequence of blocks.
        ends: norms and classifier, the last group.
        blocks: so many blocks of the last stage but one make a group; each other stage is one.
    """
    last = len(stages) - 1
    groups: dict[int, list[nn.Module]] = {0: [downsample_layers[0]]}
    for stage, holder in enumerate(stages):
        first = _LAST_GROUP if stage == last else stage + 1
        if stage:
            groups.setdefault(first, []).append(downsample_layers[stage])
        for index, block in enumerate(holder.children()):
            group = min(first + index // blocks, _LAST_GROUP - 1) if stage == last - 1 else first
            groups.setdefault(group, []).append(block)
    groups[_LAST_GROUP + 1] = list(ends)
    layers: list[nn.Module] = [nn.ModuleList(groups[group]) for group in sorted(groups)]
    return [layer for layer in layers if any(True for _ in layer.parameters())]
