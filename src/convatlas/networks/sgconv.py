"""Networks on long sequences by structured global convolution, and ConvNeXt with global kernels.

Li, Cai, Zhang, Chen, Dey: "What Makes Convolutional Models Great on Long Sequence Modeling?", ICLR 2023, arXiv
2210.09298. The networks of the Long Range Arena are stacks of residual blocks; those of its images read them pixel by
pixel. Their authors published no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, NetworkConfig
from convatlas.networks.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtConfig
from convatlas.nn.mixers.sgconv import SGCONV_LAYOUT, SGConv1d, SGConv2d
from convatlas.nn.norm import ScalarLayerNorm
from convatlas.nn.sgconv_kernel import LearnableDecay, SGConvKernel
from convatlas.weights import Layout

__all__ = [
    "VARIANTS",
    "SGConvBlock",
    "SGConvNeXt",
    "SGConvNeXtConfig",
    "SGConvPixels",
    "SGConvPixelsConfig",
    "SGConvSequence",
    "SGConvSequenceConfig",
    "SGConvTrunk",
    "SGConvTrunkConfig",
    "sgconv_parameter_groups",
]

Pool = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class SGConvTrunkConfig:
    """Config of `SGConvTrunk`.

    Attributes:
        dim: channels.
        depth: number of blocks.
        l_max: length of the sequences.
        prenorm: whether the norm stands before the layer of a block, or behind the addition.
        norm: ``batch``, or ``layer`` with one scale and one shift.
        dropout: probability to drop a channel of a sequence, in the layer and behind it.
        kernel_dim, init_scale, mode, init, decay, learnable_decay, bidirectional, heads: of the layers, see `SGConv1d`.
    """

    dim: int = 256
    depth: int = 6
    l_max: int = 1024
    prenorm: bool = True
    norm: str = "batch"
    dropout: float = 0.0
    kernel_dim: int = 32
    init_scale: int = 0
    mode: Literal["cat", "sum"] = "cat"
    init: Literal["randn", "cos"] = "randn"
    decay: tuple[float, float] = (2.0, 2.0)
    learnable_decay: LearnableDecay | None = None
    bidirectional: bool = True
    heads: int = 1


@dataclass(frozen=True, kw_only=True)
class SGConvSequenceConfig(NetworkConfig):
    """Config of `SGConvSequence`.

    Attributes:
        vocabulary: number of tokens; 0 for sequences of values.
        in_channels: values at each position, where there are no tokens.
        num_classes: size of the classifier; 0 leaves it out.
        pool: ``mean`` over the positions, or the ``last`` one.
        pairs: whether two sequences are compared.
        trunk: the blocks; a mapping replaces some of its fields.
    """

    vocabulary: int = 0
    in_channels: int = 1
    num_classes: int = 10
    pool: Pool = "mean"
    pairs: bool = False
    trunk: SGConvTrunkConfig = field(default_factory=SGConvTrunkConfig)

    def __post_init__(self) -> None:
        for name, least in (("vocabulary", 0), ("in_channels", 1), ("num_classes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        _check_pool(self.pool)

    def build(self) -> SGConvSequence:
        return SGConvSequence(self)


@dataclass(frozen=True, kw_only=True)
class SGConvPixelsConfig(BackboneConfig):
    """Config of `SGConvPixels`.

    Attributes:
        pool: ``mean`` over the pixels, or the ``last`` one.
        trunk: the blocks; a mapping replaces some of its fields.
    """

    pool: Pool = "mean"
    trunk: SGConvTrunkConfig = field(default_factory=SGConvTrunkConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pool(self.pool)

    def build(self) -> SGConvPixels:
        return SGConvPixels(self)


def _check_pool(pool: str) -> None:
    if pool not in ("mean", "last"):
        raise unknown("pool", pool, ("mean", "last"))


class SGConvBlock(nn.Module):
    """x + drop(layer(norm(x))), or norm(x + drop(layer(x))) where the norm comes last.

    Args:
        layer: keeps the shape (B, C, L).
        norm: keeps it too.
        prenorm: which of the two.
        dropout: probability to drop a channel of a sequence behind the layer.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module, *, prenorm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        self.prenorm, self.dropout = prenorm, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L) to the same shape."""
        y = x + F.dropout1d(self.layer(self.norm(x) if self.prenorm else x), self.dropout, self.training)
        return y if self.prenorm else self.norm(y)


class SGConvTrunk(nn.Module):
    """The blocks, and a norm behind them where they begin with theirs.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such norm or option of the layers.
        ValueError: a size is out of range.
    """

    def __init__(self, config: SGConvTrunkConfig) -> None:
        super().__init__()
        if config.norm not in ("batch", "layer"):
            raise unknown("norm", config.norm, ("batch", "layer"))

        def norm() -> nn.Module:
            return nn.BatchNorm1d(config.dim) if config.norm == "batch" else ScalarLayerNorm()

        self.blocks = nn.ModuleList(
            SGConvBlock(_layer(config), norm(), prenorm=config.prenorm, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = norm() if config.prenorm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L) to the same shape."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _layer(config: SGConvTrunkConfig) -> SGConv1d:
    return SGConv1d(
        config.dim, config.l_max, kernel_dim=config.kernel_dim, init_scale=config.init_scale, mode=config.mode,
        init=config.init, decay=config.decay, learnable_decay=config.learnable_decay, heads=config.heads,
        bidirectional=config.bidirectional, post_act="glu", dropout=config.dropout,
    )  # fmt: skip


#: The S4 code in which the authors trained keeps encoder and decoder in lists.
_AUTHORS = Layout(
    renames=(
        (r"^model\.layers\.", "trunk.blocks."),
        (r"^model\.norm\.", "trunk.norm."),
        (r"^encoder\.\d+\.", "encoder."),
        (r"^decoder\.\d+\.output_transform\.", "decoder."),
        *SGCONV_LAYOUT.renames,
    ),
    function=SGCONV_LAYOUT.function,
)


class SGConvSequence(nn.Module):
    """Classifier of sequences of tokens or of values: embedding, blocks, pool, linear classifier.

    With ``pairs`` it compares two sequences a and b by a two-layer classifier of (a, b, a b, a - b) of their pooled
    features, as the Long Range Arena does (Tay et al., ICLR 2021, arXiv 2011.04006).

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such pool, norm or option of the layers.
        ValueError: a size is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _AUTHORS}

    def __init__(self, config: SGConvSequenceConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.trunk.dim
        self.encoder: nn.Module = (
            nn.Embedding(config.vocabulary, dim) if config.vocabulary else nn.Linear(config.in_channels, dim)
        )
        self.trunk = SGConvTrunk(config.trunk)
        self.decoder: nn.Module = nn.Identity()
        if config.num_classes and config.pairs:
            self.decoder = nn.Sequential(nn.Linear(4 * dim, dim), nn.ReLU(), nn.Linear(dim, config.num_classes))
        elif config.num_classes:
            self.decoder = nn.Linear(dim, config.num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Class scores (B, num_classes), or pooled features where there are no classes.

        Args:
            x: tokens (B, L), whole numbers below the vocabulary, or values (B, L, in_channels); with ``pairs``
                (B, 2, L) or (B, 2, L, in_channels).
            lengths: positions of each sequence that count in the pool, (B) or (B, 2); all when left out.

        Raises:
            ValueError: x or lengths has another shape or type.
        """
        config = self.config
        self._check(x, lengths)
        if config.pairs:
            first, second = (self._pooled(x[:, i], None if lengths is None else lengths[:, i]) for i in (0, 1))
            return self.decoder(torch.cat([first, second, first * second, first - second], dim=1))
        return self.decoder(self._pooled(x, lengths))

    def _pooled(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        y = self.trunk(self.encoder(x).transpose(1, 2))
        if lengths is None:
            return y.mean(2) if self.config.pool == "mean" else y[..., -1]
        position = torch.arange(y.shape[-1], device=y.device)
        if self.config.pool == "mean":
            return (y * (position < lengths[:, None])[:, None]).sum(2) / lengths[:, None].to(y.dtype)
        return y[torch.arange(len(y), device=y.device), :, lengths - 1]

    def _check(self, x: Tensor, lengths: Tensor | None) -> None:
        config = self.config
        shape = ["B", *(["2"] if config.pairs else []), "L", *([] if config.vocabulary else [str(config.in_channels)])]
        fits = x.dim() == len(shape) and all(
            name in ("B", "L") or int(name) == size for name, size in zip(shape, x.shape, strict=False)
        )
        if not fits or x.is_floating_point() == bool(config.vocabulary):
            kind = "tokens, whole numbers" if config.vocabulary else "floating-point values"
            raise ValueError(f"x must be ({', '.join(shape)}) of {kind}, got {tuple(x.shape)} {x.dtype}")
        if lengths is not None and lengths.shape != x.shape[: 2 if config.pairs else 1]:
            raise ValueError(f"lengths must have one number for each sequence, got {tuple(lengths.shape)}")

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random batch of the published length, for tracing and timing."""
        shape = (batch, *([2] if self.config.pairs else []), self.config.trunk.l_max)
        if self.config.vocabulary:
            return (torch.randint(self.config.vocabulary, shape),)
        return (torch.randn(*shape, self.config.in_channels),)


class SGConvPixels(Backbone):
    """Classifier of images that reads them pixel by pixel, row behind row: a linear map, blocks, pool, classifier.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such pool, norm or option of the layers.
        ValueError: a size is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _AUTHORS}
    classifier_modules: ClassVar[tuple[str, ...]] = ("decoder",)
    stem_modules: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self, config: SGConvPixelsConfig) -> None:
        super().__init__(config)
        dim = config.trunk.dim
        self.encoder = nn.Linear(config.in_channels, dim)
        self.trunk = SGConvTrunk(config.trunk)
        self.feature_info = (Feature(dim, 1),)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        y = self.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        for block in self.trunk.blocks:
            y = self._run_stage(block, y)
        return [self.trunk.norm(y).unflatten(2, x.shape[2:])]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.decoder(x.mean((2, 3)) if self.config.pool == "mean" else x[..., -1, -1])

    def layers(self) -> list[nn.Module]:
        ends = [self.trunk.norm, self.decoder]
        return [self.encoder, *self.trunk.blocks, *(end for end in ends if any(True for _ in end.parameters()))]

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.decoder: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.encoder.weight
            self.decoder = nn.Linear(weight.shape[0], num_classes, device=weight.device, dtype=weight.dtype)
            self.decoder.train(self.training)


def sgconv_parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, kernel_lr: float = 1e-3
) -> list[dict[str, Any]]:
    """Parameter groups of the authors' AdamW, of any model with these layers.

    The sub-kernels and exponents have a learning rate of their own, the bias of a layer's linear map does not decay.

    Args:
        model: has `SGConv1d` or `SGConv2d` layers.
        lr: of all other parameters.
        weight_decay: of everything else than those biases.
        kernel_lr: of the kernels.
    """
    kernels = {id(p) for part in model.modules() if isinstance(part, SGConvKernel) for p in part.parameters()}
    layers = [part for part in model.modules() if isinstance(part, SGConv1d) and part.output is not None]
    biases = {id(part.output.bias) for part in layers if part.output is not None}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trained if id(p) not in kernels | biases],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if id(p) in kernels], "lr": kernel_lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in biases], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, kw_only=True)
class SGConvNeXtConfig(ConvNeXtConfig):
    """Config of `SGConvNeXt`: that of ConvNeXt, and

    Attributes:
        form: of the global kernels, ``separable`` or ``flattened``.
        kernel_dim: values of a sub-kernel.
        decay: alpha of the first and of the last channel.
    """

    form: Literal["separable", "flattened"] = "separable"
    kernel_dim: int = 4
    decay: tuple[float, float] = (2.0, 2.0)

    def build(self) -> SGConvNeXt:
        return SGConvNeXt(self)


class SGConvNeXt(ConvNeXt):
    """ConvNeXt with global kernels in the place of the depthwise ones (paper, section 4.4).

    The kernels are as large as the maps of images of the size in ``preprocess``; in larger images they end before the
    border.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such form.
        ValueError: a size is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {}

    def __init__(self, config: SGConvNeXtConfig) -> None:
        super().__init__(config)
        height, width = config.preprocess.shape[-2:]
        for stage, (feature, blocks) in enumerate(zip(self.feature_info, self.stages, strict=True)):
            size = (max(height // feature.stride, 1), max(width // feature.stride, 1))
            shortest = min(size) if config.form == "separable" else size[0] * size[1]
            for block in blocks.modules():
                if isinstance(block, ConvNeXtBlock):
                    block.dwconv = SGConv2d(
                        config.dims[stage],
                        size,
                        form=config.form,
                        kernel_dim=min(config.kernel_dim, shortest),
                        decay=config.decay,
                    )


def _arena(size: int, **trunk: Any) -> dict[str, Any]:
    """A square image of one grey value a pixel, in [-1, 1], and the blocks for it."""
    preprocess = Preprocess(size=size, crop=1.0, mean=(0.5,), std=(0.5,))
    return {"in_channels": 1, "preprocess": preprocess, "trunk": SGConvTrunkConfig(l_max=size**2, **trunk)}


#: Bytes, and one token to fill up.
_BYTES = 257
#: Ten digits, four operators, the end of an operation, and one token to fill up.
_LIST_TOKENS = 16

VARIANTS: dict[str, NetworkConfig] = {
    "sgconv_listops": SGConvSequenceConfig(
        vocabulary=_LIST_TOKENS,
        trunk=SGConvTrunkConfig(dim=128, depth=8, l_max=2048, prenorm=False, kernel_dim=1),
    ),
    "sgconv_text": SGConvSequenceConfig(
        vocabulary=_BYTES, num_classes=2, trunk=SGConvTrunkConfig(l_max=4096, kernel_dim=2)
    ),
    "sgconv_retrieval": SGConvSequenceConfig(
        vocabulary=_BYTES, num_classes=2, pairs=True, trunk=SGConvTrunkConfig(l_max=4000, kernel_dim=1)
    ),
    "sgconv_image": SGConvPixelsConfig(
        num_classes=10,
        **_arena(32, dim=512, prenorm=False, norm="layer", dropout=0.2, learnable_decay="fixed", decay=(1.0, 1.0)),
    ),
    "sgconv_pathfinder": SGConvPixelsConfig(num_classes=2, pool="last", **_arena(32, dropout=0.2)),
    "sgconv_pathx": SGConvPixelsConfig(
        num_classes=2, pool="last", **_arena(128, kernel_dim=64, init_scale=1, init="cos", decay=(1.0, 3.0))
    ),
    "sgconvnext_tiny": SGConvNeXtConfig(),
    "sgconvnext_small": SGConvNeXtConfig(depths=(3, 3, 27, 3), drop_path=0.4),
    "sgconvnext_base": SGConvNeXtConfig(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024), drop_path=0.5),
}
