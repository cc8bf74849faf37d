"""Long-convolution networks: kernels as long as the sequence, held tap by tap and made sparse.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908: the network of its example, for images as sequences of pixels. The paper classifies Path-512, images
of 512 x 512 pixels, with such kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.long_conv import DROPPED_CONSTANTS
from convatlas.nn.mixers.long_conv import LongConv
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "LongConvBlock", "LongConvConfig", "LongConvNet", "kernel_groups"]


@dataclass(frozen=True, kw_only=True)
class LongConvConfig(BackboneConfig):
    """Config of `LongConvNet`.

    Attributes:
        channels: channels of the sequence inside the network.
        depth: number of layers.
        heads: kernels of each channel in a layer.
        lam: threshold of the taps, see `convatlas.nn.mixers.long_conv.LongConv`: 0.001 for training from the start.
        prenorm: whether the norm stands before each layer, or behind its residual sum.
        dropout: rate in the layers, and of whole channels of a residual branch.
        length: how far kernels reach in either direction; over all pixels of an image of ``preprocess`` when left out.
    """

    num_classes: int = 10
    channels: int = 512
    depth: int = 6
    heads: int = 1
    lam: float = 0.1
    prenorm: bool = False
    dropout: float = 0.1
    length: int | None = None
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(size=32, crop=1.0))

    def build(self) -> LongConvNet:
        return LongConvNet(self)


def _as_convolution(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' encoder is a linear layer on tokens."""
    return {**state, "encoder.weight": state["encoder.weight"].unsqueeze(-1)}


class LongConvBlock(nn.Module):
    """x + dropout(conv(norm(x))), or norm(x + dropout(conv(x))); the dropout is that of whole channels.

    Args:
        conv: the layer; it keeps the shape.
        prenorm: whether the norm stands before it.
        dropout: rate.
    """

    def __init__(self, conv: LongConv, *, prenorm: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.norm = nn.LayerNorm(conv.channels)
        self.conv = conv
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L) to the same shape."""
        if self.prenorm:
            return x + self.dropout(self.conv(self.norm(x.mT).mT))
        return self.norm((x + self.dropout(self.conv(x))).mT).mT


class LongConvNet(Backbone):
    """Linear encoder, residual long convolutions with layer norm over the channels, mean over the sequence, classifier.

    It takes sequences (B, L, in_channels) as well as images (B, in_channels, H, W), whose pixels are a sequence row by
    row. Sequences may have any length.

    Args:
        config: what to build.

    Raises:
        ValueError: a size or rate is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                DROPPED_CONSTANTS,
                (r"conv_layers\.(\d+)\.", r"blocks.\1.conv."),
                (r"norms\.(\d+)\.", r"blocks.\1.norm."),
                (r"\.D$", ".skip"),
                (r"output_linear\.0\.", "output_linear."),
            ),
            function=_as_convolution,
        )
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("decoder",)
    stem_modules: ClassVar[tuple[str, ...]] = ("encoder",)
    undecayed: ClassVar[tuple[str, ...]] = ("kernel",)

    def __init__(self, config: LongConvConfig) -> None:
        super().__init__(config)
        if min(config.channels, config.depth) < 1:
            raise ValueError(f"channels and depth must be at least 1, got {config.channels} and {config.depth}")
        channels = config.channels
        length = math.prod(config.preprocess.shape) if config.length is None else config.length
        self.encoder = nn.Conv1d(config.in_channels, channels, 1)
        self.blocks = nn.ModuleList(
            LongConvBlock(
                LongConv(channels, length=length, heads=config.heads, lam=config.lam, dropout=config.dropout),
                prenorm=config.prenorm,
                dropout=config.dropout,
            )
            for _ in range(config.depth)
        )
        self.feature_info = (Feature(channels, 1),)
        self.reset_classifier(config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of sequences (B, L, in_channels) or images (B, in_channels, H, W).

        Raises:
            ValueError: x has another number of axes or channels.
        """
        return super().forward(x)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The last layer's sequence (B, C, L), or image (B, C, H, W)."""
        if x.dim() == 3 and x.shape[2] == self.in_channels:
            return [self._sequence(x.mT)]
        self._check_input(x)
        return [self._sequence(x.flatten(2)).unflatten(2, x.shape[2:])]

    def _sequence(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for block in self.blocks:
            x = self._run_stage(block, x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.decoder(x.flatten(2).mean(2))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.decoder: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.encoder.weight
            self.decoder = nn.Linear(len(weight), num_classes, device=weight.device, dtype=weight.dtype)


def kernel_groups(model: nn.Module, *, kernel_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: kernels with a learning rate of their own and without weight decay.

    Args:
        model: any model that holds `LongConv` layers.
        kernel_lr: learning rate of the kernels.
        weight_decay: of all other parameters.
    """
    kernels = [module.kernel for module in model.modules() if isinstance(module, LongConv)]
    own = {id(kernel) for kernel in kernels}
    others = [parameter for parameter in model.parameters() if id(parameter) not in own]
    return [
        {"params": others, "weight_decay": weight_decay},
        {"params": kernels, "lr": kernel_lr, "weight_decay": 0.0},
    ]


VARIANTS: dict[str, LongConvConfig] = {"long_conv": LongConvConfig()}

PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {}
