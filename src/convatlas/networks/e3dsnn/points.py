"""E-3DSNN for point clouds: a classifier, and a segmenter with skip connections.

Qiu, Yao, Zhang, Chou, Qiao, Zhou, Xu, Li: "Efficient 3D Recognition with Event-driven Spike Sparse Convolution",
AAAI 2025, arXiv 2412.07360. What flows between the blocks are membrane potentials; a neuron stands before every
convolution but the first, so that convolutions see whole numbers from 0 to 4.

The authors' figure shows a neuron and a layer before the last one; their code, and so their weights, have neither.
Their last layer is a convolution of one tap whose weights spconv reads in another order than it says
(see `convatlas.nn.conv.sparse.from_spconv`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from convatlas.networks.base import Feature, NetworkConfig, PublishedFile
from convatlas.nn.conv.sparse import (
    SparseConv3d,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
    from_spconv,
)
from convatlas.nn.spiking import IntegerLIF
from convatlas.ops.sparse import SparseTensor, sparse_mean
from convatlas.weights import Layout

__all__ = [
    "E3DSNN",
    "PUBLISHED",
    "VARIANTS",
    "BasicBlock",
    "DownBlock",
    "E3DSNNClassifier",
    "E3DSNNClassifierConfig",
    "E3DSNNConfig",
    "E3DSNNSegmenter",
    "E3DSNNSegmenterConfig",
    "UpBlock",
    "conv_norm",
    "stem",
]


@dataclass(frozen=True, kw_only=True)
class E3DSNNConfig(NetworkConfig):
    """What the classifier and the segmenter share.

    Attributes:
        num_classes: of the scores.
        in_channels: features of a voxel.
        embed_dim: channels of the stem.
        dims: channels of each stage, each at half the resolution of the one before.
        depths: blocks of each stage.
        max_spikes: largest number of spikes that a neuron sends at once.
        margin: the grid ends so many voxels after the lowest place of the last voxel (see `E3DSNN.voxels`).

    Raises:
        ValueError: sizes are out of range or do not belong together.
    """

    num_classes: int = 40
    in_channels: int = 6
    embed_dim: int = 16
    dims: tuple[int, ...] = (16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    max_spikes: int = 4
    margin: int = 1

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "embed_dim", "max_spikes", "margin"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.dims) != len(self.depths) or min(self.dims, default=0) < 1 or min(self.depths) < 0:
            raise ValueError(f"dims and depths must be as many positive numbers, got {self.dims} and {self.depths}")

    @abstractmethod
    def build(self) -> E3DSNN: ...


@dataclass(frozen=True, kw_only=True)
class E3DSNNClassifierConfig(E3DSNNConfig):
    """Config of `E3DSNNClassifier`; its grid ends far beyond the voxels, so that halving it loses none."""

    margin: int = 96

    def build(self) -> E3DSNNClassifier:
        """Make the network with fresh weights."""
        return E3DSNNClassifier(self)


@dataclass(frozen=True, kw_only=True)
class E3DSNNSegmenterConfig(E3DSNNConfig):
    """Config of `E3DSNNSegmenter`.

    The grid ends with the last voxel, as in the authors' code. Where its size is odd, its last plane is lost on the way
    down, so that a batch can change the result of its samples; a grid given to `E3DSNN.voxels` avoids it.

    Attributes:
        decoder_dims: channels of each stage on the way up, from high to low resolution.
    """

    num_classes: int = 19
    in_channels: int = 4
    embed_dim: int = 64
    dims: tuple[int, ...] = (64, 128, 128, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_dims: tuple[int, ...] = (256, 256, 256, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.decoder_dims) != len(self.dims) or min(self.decoder_dims) < 1:
            raise ValueError(f"decoder_dims must be {len(self.dims)} positive numbers, got {self.decoder_dims}")

    def build(self) -> E3DSNNSegmenter:
        """Make the network with fresh weights."""
        return E3DSNNSegmenter(self)


# -- blocks ------------------------------------------------------------------------------------------------------------


def conv_norm(conv: nn.Module, channels: int) -> list[nn.Module]:
    """A layer and the batch normalisation of its ``channels``."""
    return [conv, nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)]


def _spiking(in_channels: int, out_channels: int, max_spikes: int) -> list[nn.Module]:
    """Neuron, submanifold 3 x 3 x 3 convolution, normalisation."""
    conv = SubMConv3d(in_channels, out_channels, 3, bias=False)
    return [IntegerLIF(max_spikes), *conv_norm(conv, out_channels)]


def stem(in_channels: int, channels: int, max_spikes: int) -> SparseSequential:
    """The encoder of voxels: three submanifold convolutions, the first of them on what is no spike."""
    first = conv_norm(SubMConv3d(in_channels, channels, 3, bias=False), channels)
    second, third = (_spiking(channels, channels, max_spikes) for _ in range(2))
    return SparseSequential(*first, *second, *third)


class BasicBlock(SparseModule):
    """y = BN(conv(SN(x))) + x, then two such convolutions in a row and a shortcut around both."""

    def __init__(self, channels: int, max_spikes: int) -> None:
        super().__init__()
        self.first = SparseSequential(*_spiking(channels, channels, max_spikes))
        self.second = SparseSequential(
            *_spiking(channels, channels, max_spikes), *_spiking(channels, channels, max_spikes)
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Keep the places and channels."""
        x = x.replace_feature(self.first(x).features + x.features)
        return x.replace_feature(self.second(x).features + x.features)


class DownBlock(SparseModule):
    """Neuron, strided convolution, normalisation; then basic blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        max_spikes: int,
        *,
        kernel_size: int,
        padding: int,
        key: str,
    ) -> None:
        super().__init__()
        conv = SparseConv3d(in_channels, out_channels, kernel_size, 2, padding, bias=False, indice_key=key)
        self.down = SparseSequential(IntegerLIF(max_spikes), *conv_norm(conv, out_channels))
        self.blocks = SparseSequential(*(BasicBlock(out_channels, max_spikes) for _ in range(depth)))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """To half the resolution."""
        after: SparseTensor = self.blocks(self.down(x))
        return after


class UpBlock(SparseModule):
    """u = BN(inverse conv(SN(x))), and u plus two linear layers of u beside the skipped features."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, max_spikes: int, *, key: str) -> None:
        super().__init__()
        conv = SparseInverseConv3d(in_channels, out_channels, 2, key, bias=False)
        self.up = SparseSequential(IntegerLIF(max_spikes), *conv_norm(conv, out_channels))
        self.fuse = SparseSequential(
            IntegerLIF(max_spikes),
            *conv_norm(nn.Linear(skip_channels + out_channels, out_channels), out_channels),
            IntegerLIF(max_spikes),
            *conv_norm(nn.Linear(out_channels, out_channels), out_channels),
        )

    def forward(self, x: SparseTensor, skip: SparseTensor) -> SparseTensor:
        """Back to the places of ``skip``."""
        up: SparseTensor = self.up(x)
        both = up.replace_feature(torch.cat([up.features, skip.features], 1))
        return up.replace_feature(up.features + self.fuse(both).features)


# -- networks ----------------------------------------------------------------------------------------------------------


class E3DSNN(nn.Module):
    """What the classifier and the segmenter share: stem and stages."""

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"^enc\.", "stages."),
                (r"\.block\.", ".first."),
                (r"\.voxel_block\.", ".second."),
                (r"^dec\.", "decoder."),
                (r"^final\.", "classifier."),
            ),
            function=lambda state, model: from_spconv(model, state),
        )
    }
    #: Modules whose first weight dimension is the number of classes.
    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    feature_info: tuple[Feature, ...]
    classifier: SubMConv3d

    def __init__(self, config: E3DSNNConfig) -> None:
        super().__init__()
        self.config: E3DSNNConfig = config
        spikes = config.max_spikes
        self.stem = stem(config.in_channels, config.embed_dim, spikes)
        pairs = pairwise((config.embed_dim, *config.dims))
        self.stages = nn.ModuleList(
            DownBlock(before, after, depth, spikes, kernel_size=2, padding=0, key=f"stage{index}")
            for index, ((before, after), depth) in enumerate(zip(pairs, config.depths, strict=True))
        )
        self.feature_info = tuple(Feature(dim, 2**level) for level, dim in enumerate((config.embed_dim, *config.dims)))

    @property
    def num_classes(self) -> int:
        """Number of scores."""
        return self.config.num_classes

    @property
    def in_channels(self) -> int:
        """Features of a voxel."""
        return self.config.in_channels

    def voxels(
        self,
        coordinates: Tensor,
        features: Tensor,
        batch: Tensor,
        *,
        batch_size: int | None = None,
        spatial_shape: tuple[int, ...] | None = None,
    ) -> SparseTensor:
        """The sparse tensor that the network takes.

        Args:
            coordinates: (N, 3) whole numbers from 0, as `convatlas.ops.point_grid.grid_sample` gives them; each voxel
                of a sample once.
            features: (N, in_channels).
            batch: (N,) index of the sample of each voxel.
            batch_size: number of samples; by default the last one has a voxel.
            spatial_shape: of the grid; by default it ends ``margin`` after the last voxel of the batch.

        Raises:
            ValueError: shapes do not fit, or a voxel is outside or comes twice.
        """
        if coordinates.dim() != 2 or coordinates.shape[1] != 3 or len(batch) != len(coordinates):
            raise ValueError(
                "coordinates and batch must be (N, 3) and (N,), "
                f"got {tuple(coordinates.shape)} and {tuple(batch.shape)}"
            )
        if spatial_shape is None:
            ends = coordinates.amax(0).tolist() if len(coordinates) else [0, 0, 0]
            least = 2 ** len(self.stages)  # a crop of a few voxels is still a grid that can be halved
            spatial_shape = tuple(max(int(end) + self.config.margin, least) for end in ends)
        if batch_size is None:
            batch_size = int(batch.max()) + 1 if len(batch) else 1
        indices = torch.cat([batch[:, None], coordinates], 1).int()
        return SparseTensor(features, indices, spatial_shape, batch_size)

    def forward_features(self, x: SparseTensor) -> list[SparseTensor]:
        """Potentials after the stem and after each stage, as `feature_info` describes them."""
        features = [self.stem(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features

    def example_inputs(self, batch: int = 1) -> tuple[SparseTensor]:
        """Random voxels on a sphere, some thousand for each sample, with the grid of a normalised cloud."""
        points = nn.functional.normalize(torch.randn(batch * 4096, 3), dim=1)
        cells = ((points + 1) * 32).round().int()
        sample = torch.arange(batch, dtype=torch.int32).repeat_interleave(4096)[:, None]
        indices = torch.cat([sample, cells], 1).unique(dim=0)
        features = torch.randn(len(indices), self.in_channels)
        shape = (64 + self.config.margin,) * 3
        return (SparseTensor(features, indices, shape, batch),)

    def _initialise(self) -> None:
        # Strided and inverse convolutions keep the weights that they begin with, as in the authors' code.
        for module in self.modules():
            if isinstance(module, nn.Linear | SubMConv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _check_input(self, x: SparseTensor) -> None:
        if not isinstance(x, SparseTensor):
            raise ValueError(f"x must be a SparseTensor of voxels, got {type(x).__name__}")
        if x.dims != 3 or x.channels != self.in_channels:
            raise ValueError(
                f"x must have 3 axes and {self.in_channels} features a voxel, got {x.dims} and {x.channels}"
            )
        least = 2 ** len(self.stages)
        if min(x.spatial_shape) < least:
            raise ValueError(f"x must have a grid of at least {least} voxels on every axis, got {x.spatial_shape}")


class E3DSNNClassifier(E3DSNN):
    """Class scores of point clouds: stem, stages, a layer on each voxel, and the mean of its scores."""

    def __init__(self, config: E3DSNNClassifierConfig) -> None:
        super().__init__(config)
        self.classifier = SubMConv3d(config.dims[-1], config.num_classes, 1)
        self._initialise()

    def forward(self, x: SparseTensor) -> Tensor:
        """Class scores (B, num_classes) of voxels with in_channels features.

        Raises:
            ValueError: x has other axes or features, or a grid that is too small to be halved so often.
        """
        self._check_input(x)
        return sparse_mean(self.classifier(self.forward_features(x)[-1]))


class E3DSNNSegmenter(E3DSNN):
    """Class scores of every voxel: stem, stages, the way back with skipped features, a layer on each voxel."""

    def __init__(self, config: E3DSNNSegmenterConfig) -> None:
        super().__init__(config)
        widths = (config.embed_dim, *config.dims)
        self.decoder = nn.ModuleList(
            UpBlock(below, skip, dim, config.max_spikes, key=f"stage{index}")
            for index, (skip, dim, below) in enumerate(
                zip(widths, config.decoder_dims, (*config.decoder_dims[1:], config.dims[-1]), strict=False)
            )
        )
        self.classifier = SubMConv3d(config.decoder_dims[0], config.num_classes, 1)
        self._initialise()

    def forward(self, x: SparseTensor) -> Tensor:
        """Class scores (N, num_classes) of the voxels of x, in the order of its rows.

        Raises:
            ValueError: x has other axes or features, or a grid that is too small to be halved so often.
        """
        self._check_input(x)
        *skips, deepest = self.forward_features(x)
        for block, skip in zip(reversed(self.decoder), reversed(skips), strict=True):
            deepest = block(deepest, skip)
        scores: Tensor = self.classifier(deepest).features
        return scores


_DEEP = (2, 2, 2, 2)

VARIANTS: dict[str, E3DSNNConfig] = {
    "e3dsnn_t": E3DSNNClassifierConfig(),
    "e3dsnn_s": E3DSNNClassifierConfig(embed_dim=24, dims=(24, 48, 96, 160)),
    "e3dsnn_l": E3DSNNClassifierConfig(embed_dim=64, dims=(64, 128, 128, 256), depths=_DEEP),
    "e3dsnn_xl": E3DSNNClassifierConfig(embed_dim=64, dims=(96, 192, 288, 384), depths=_DEEP),
    "e3dsnn_seg": E3DSNNSegmenterConfig(),
    "e3dsnn_seg_deep": E3DSNNSegmenterConfig(
        dims=(64, 64, 128, 256), depths=(2, 3, 6, 4), decoder_dims=(96, 96, 128, 256)
    ),
}


def _on_the_hub(figures: Mapping[str, float]) -> tuple[PublishedFile, ...]:
    # The files have no fixed names; a person chooses one of the repository.
    return (PublishedFile("https://huggingface.co/Xuerui123/E-3DSNN", "not stated", figures, by_hand=True),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {"e3dsnn_t": _on_the_hub({"ModelNet40 accuracy [%]": 91.7})}
