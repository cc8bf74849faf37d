"""DeepMAD: plain convolutional networks described by a list of blocks, as found by mathematical architecture design.

Shen, Wang, Lin, Huang, Tang, Sun, Wang: "DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural
Network", CVPR 2023, arXiv 2303.02165. The earlier structures are from Sun, Lin, Sun, Tan, Li, Jin: "MAE-DET:
Revisiting Maximum Entropy Principle in Zero-Shot NAS for Efficient Object Detection", ICML 2022, arXiv 2111.13336.

The search that finds such structures, and its scores, are in `convatlas.design.deepmad`.
"""

from __future__ import annotations

import ast
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import DataError, unknown
from convatlas.files import write_text
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.drop import DropPath
from convatlas.weights import Layout

__all__ = [
    "CONV",
    "PUBLISHED",
    "SUPER_BLOCKS",
    "VARIANTS",
    "Block",
    "CnnNet",
    "CnnNetConfig",
    "ConvBN",
    "ResK1DWK1",
    "ResK1KXK1",
    "SqueezeExciteBN",
    "check_structure",
    "load_structure",
    "make_structure",
    "parse_structure",
    "save_structure",
    "squeezed_channels",
    "stage_ends",
]

#: k x k convolution, batch norm, ReLU.
CONV = "ConvKXBNRELU"
#: L residual blocks: with a full k x k convolution, with a depthwise one, with a depthwise one and squeeze-excitation.
SUPER_BLOCKS = ("SuperResK1KXK1", "SuperResK1DWK1", "SuperResK1DWSEK1")

# -- structures: a network as a list of blocks -------------------------------------------------------------------------

_LETTERS = {
    "class": "kind",
    "in": "in_channels",
    "out": "out_channels",
    "k": "kernel_size",
    "s": "stride",
    "L": "depth",
    "btn": "bottleneck",
}


class Block(NamedTuple):
    """One entry of a structure.

    Attributes:
        kind: `CONV` or one of `SUPER_BLOCKS` (the authors' ``class``).
        in_channels, out_channels: of the whole block (``in``, ``out``).
        kernel_size: of the convolution that is not 1 x 1 (``k``), odd.
        stride: 1 or 2, of the first inner layer (``s``).
        depth: number of inner layers of a super block (``L``); 1 for `CONV`.
        bottleneck: channels of the k x k convolution of a super block (``btn``); 0 for `CONV`.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    depth: int = 1
    bottleneck: int = 0

    @classmethod
    def parse(cls, entry: Mapping[str, Any] | Sequence[Any]) -> Self:
        """A block from a mapping with the authors' keys or ours, or from its values in order.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        if isinstance(entry, Mapping):
            values = {_LETTERS.get(key, key): value for key, value in entry.items() if key != "inner_class"}
            if wrong := values.keys() - set(cls._fields):
                raise unknown("key of a block", min(wrong), [*_LETTERS, *cls._fields])
        else:
            values = dict(zip(cls._fields, entry, strict=False))
        if missing := [name for name in cls._fields if name not in values and name not in cls._field_defaults]:
            raise ValueError(f"a block must have {', '.join(missing)}, got {entry}")
        block = cls(**values)
        block.check()
        return block

    def check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: a value is out of range.
        """
        if self.kind not in (CONV, *SUPER_BLOCKS):
            raise unknown("class of a block", str(self.kind), (CONV, *SUPER_BLOCKS))
        for name, value in zip(self._fields[1:], self[1:], strict=True):
            least = 0 if name == "bottleneck" and self.kind == CONV else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} of {self.kind} must be an integer of at least {least}, got {value!r}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of {self.kind} must be odd, got {self.kernel_size}")
        if self.stride > 2:
            raise ValueError(f"stride of {self.kind} must be 1 or 2, got {self.stride}")
        if self.kind == CONV and (self.depth, self.bottleneck) != (1, 0):
            raise ValueError(f"{CONV} has no depth and no bottleneck, got {self.depth} and {self.bottleneck}")

    def as_mapping(self) -> dict[str, Any]:
        """The block with the authors' keys."""
        values = {letter: getattr(self, name) for letter, name in _LETTERS.items()}
        return {key: value for key, value in values.items() if self.kind != CONV or key not in ("L", "btn")}


def parse_structure(entries: Iterable[Mapping[str, Any] | Sequence[Any]]) -> tuple[Block, ...]:
    """A structure from its entries, each as `Block.parse` takes it.

    Raises:
        ValueError: an entry is wrong, or the blocks do not fit together.
    """
    structure = tuple(Block.parse(entry) for entry in entries)
    check_structure(structure)
    return structure


def check_structure(structure: Sequence[Block]) -> None:
    """Refuse blocks that do not fit together.

    Raises:
        ValueError: there is none, the first is no convolution, or channels differ between two of them.
    """
    if not structure or structure[0].kind != CONV:
        raise ValueError(f"a structure must begin with {CONV}, got {structure[0].kind if structure else 'no block'}")
    for index, (before, block) in enumerate(itertools.pairwise(structure), 1):
        if block.in_channels != before.out_channels:
            raise ValueError(
                f"in_channels of block {index} must be out_channels of the block before, {before.out_channels}, "
                f"got {block.in_channels}"
            )


def make_structure(
    kind: str, stem: int, rows: Sequence[tuple[int, int, int, int, int]], last: int | None = None
) -> tuple[Block, ...]:
    """A structure as the paper's tables give it.

    Args:
        kind: of its super blocks.
        stem: channels of the first convolution, 3 x 3 with stride 2, which reads 3 channels.
        rows: (out, k, s, L, btn) of each super block.
        last: channels of a 1 x 1 convolution at the end; none where it is left out.
    """
    blocks = [Block(CONV, 3, stem, 3, 2)]
    for channels, kernel_size, stride, depth, bottleneck in rows:
        blocks.append(Block(kind, blocks[-1].out_channels, channels, kernel_size, stride, depth, bottleneck))
    if last is not None:
        blocks.append(Block(CONV, blocks[-1].out_channels, last, 1, 1))
    return tuple(blocks)


def stage_ends(structure: Sequence[Block]) -> tuple[int, ...]:
    """Indices of the last blocks of the stages: those before a block with stride 2, and the last one."""
    return (*(index - 1 for index in range(1, len(structure)) if structure[index].stride == 2), len(structure) - 1)


def load_structure(path: str | os.PathLike[str]) -> tuple[Block, ...]:
    """Read the first structure of a file of the authors: ``{'best_structures': [[{'class': ...}, ...]], ...}``.

    A list of blocks alone is read too. The file is parsed as a literal; nothing of it is run.

    Raises:
        DataError: the file is no such literal, or its blocks are wrong.
        OSError: the file cannot be read.
    """
    try:
        value = ast.literal_eval(Path(path).read_text(encoding="utf-8").strip())
        entries = value["best_structures"][0] if isinstance(value, Mapping) else value
        return parse_structure(entries)
    except (SyntaxError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{os.fspath(path)} is not a structure file: {error}") from None


def save_structure(structure: Sequence[Block], path: str | os.PathLike[str]) -> None:
    """Write a structure as the authors do; `load_structure` and their code read it.

    Raises:
        ValueError: the blocks do not fit together.
        OSError: the file cannot be written.
    """
    check_structure(structure)
    blocks = ",\n  ".join(str(block.as_mapping()) for block in structure)
    write_text(path, f"{{'best_structures': [[\n  {blocks},\n]], 'space_arch': 'CnnNet'}}\n")


# -- blocks ------------------------------------------------------------------------------------------------------------


class ConvBN(nn.Module):
    """Convolution k x k with padding (k - 1) / 2 and no bias, batch norm, then ``act``; the identity by default."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        return self.act(self.bn(self.conv(x)))


def squeezed_channels(channels: int) -> int:
    """Width of the bottleneck of squeeze-excitation: a quarter, rounded down to a multiple of 8, at least 8."""
    return max(1, round(channels * 0.25) // 8) * 8


class SqueezeExciteBN(nn.Module):
    """Scale each channel by sigmoid(BN W2 silu(BN W1 mean(x))): squeeze-excitation with batch norms.

    A batch of one cannot be trained on, because the norms see one value for each channel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = squeezed_channels(channels)
        self.conv1 = ConvBN(channels, hidden, act=nn.SiLU(inplace=True))
        self.conv2 = ConvBN(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x * self.conv2(self.conv1(x.mean((2, 3), keepdim=True))).sigmoid()


class ResK1KXK1(nn.Module):
    """relu(conv3(conv2(conv1(x))) + projection(pool(x))) with 1 x 1, k x k and 1 x 1 convolutions.

    Args:
        in_channels, out_channels, kernel_size, stride: of the block.
        bottleneck: channels of the k x k convolution.
        project: whether the shortcut has a 1 x 1 convolution even where the channels agree, as in the first layer of
            every super block.
        drop_path: probability to drop the branch of a sample.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bottleneck: int,
        stride: int = 1,
        project: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, bottleneck, act=nn.ReLU(inplace=True))
        self.conv2 = ConvBN(bottleneck, bottleneck, kernel_size, stride=stride, act=nn.ReLU(inplace=True))
        self.conv3 = ConvBN(bottleneck, out_channels)
        self.pool = _pool(stride)
        self.projection: nn.Module = nn.Identity()
        if project or in_channels != out_channels:
            self.projection = ConvBN(in_channels, out_channels)
        self.drop_path = DropPath(drop_path)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        y = self.conv3(self.conv2(self.conv1(x)))
        return self.act(self.drop_path(y) + self.projection(self.pool(x)))


class ResK1DWK1(nn.Module):
    """act(conv3(se(conv2(conv1(x)))) + pool(x)), where conv2 is depthwise: an inverted bottleneck.

    The shortcut is there only where the channels agree; the activation at the end is there without it, too.

    Args:
        in_channels, out_channels, kernel_size, stride: of the block.
        bottleneck: channels of the depthwise convolution.
        squeeze_excite: squeeze-excitation behind the depthwise convolution; all activations are then SiLU (the
            authors' ResK1DWSEK1) instead of ReLU (ResK1DWK1).
        drop_path: probability to drop the branch of a sample, where there is a shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bottleneck: int,
        stride: int = 1,
        squeeze_excite: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        act = nn.SiLU if squeeze_excite else nn.ReLU
        self.conv1 = ConvBN(in_channels, bottleneck, act=act(inplace=True))
        self.conv2 = ConvBN(
            bottleneck, bottleneck, kernel_size, stride=stride, groups=bottleneck, act=act(inplace=True)
        )
        self.se = SqueezeExciteBN(bottleneck) if squeeze_excite else nn.Identity()
        self.conv3 = ConvBN(bottleneck, out_channels)
        self.shortcut = in_channels == out_channels
        self.pool = _pool(stride) if self.shortcut else nn.Identity()
        self.drop_path = DropPath(drop_path if self.shortcut else 0.0)
        self.act = act(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        y = self.conv3(self.se(self.conv2(self.conv1(x))))
        return self.act(self.drop_path(y) + self.pool(x) if self.shortcut else y)


def _pool(stride: int) -> nn.Module:
    # The authors' pooling rounds odd sizes down, the convolution beside it up; rounding up, maps of any size work.
    return nn.AvgPool2d(2, 2, ceil_mode=True) if stride == 2 else nn.Identity()


def _module(block: Block, rates: Sequence[float]) -> nn.Module:
    if block.kind == CONV:
        act = nn.ReLU(inplace=True)
        return ConvBN(block.in_channels, block.out_channels, block.kernel_size, stride=block.stride, act=act)
    layers: list[nn.Module] = []
    for index, rate in enumerate(rates):
        in_channels = block.in_channels if index == 0 else block.out_channels
        sizes = (in_channels, block.out_channels, block.kernel_size)
        shared: Any = {"bottleneck": block.bottleneck, "stride": 1 if index else block.stride, "drop_path": rate}
        if block.kind == "SuperResK1KXK1":
            layers.append(ResK1KXK1(*sizes, project=index == 0, **shared))
        else:
            layers.append(ResK1DWK1(*sizes, squeeze_excite=block.kind == "SuperResK1DWSEK1", **shared))
    return nn.Sequential(*layers)


# -- network -----------------------------------------------------------------------------------------------------------


def _k1kxk1(stem: int, *rows: tuple[int, int, int, int, int]) -> tuple[Block, ...]:
    return make_structure("SuperResK1KXK1", stem, rows)


def _k1dwsek1(stem: int, *rows: tuple[int, int, int, int, int], last: int) -> tuple[Block, ...]:
    return make_structure("SuperResK1DWSEK1", stem, rows, last)


_R18 = _k1kxk1(
    32, (96, 5, 2, 1, 40), (384, 5, 2, 6, 40), (384, 5, 2, 9, 64), (1024, 3, 1, 10, 104), (672, 5, 2, 12, 104)
)


@dataclass(frozen=True, kw_only=True)
class CnnNetConfig(BackboneConfig):
    """Config of `CnnNet`.

    Attributes:
        structure: the blocks, each a `Block`, a mapping with the authors' keys (class, in, out, k, s, L, btn) or with
            ours, or a list of its values. The first reads ``in_channels``, whatever the structure says.
        drop_path: rate at the last inner layer; it rises linearly from 0.
        dropout: rate before the classifier.

    Raises:
        ValueError: a block is wrong, or the blocks do not fit together.
    """

    structure: tuple[Block, ...] = _R18
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        first, *others = parse_structure(self.structure)
        object.__setattr__(self, "structure", (first._replace(in_channels=self.in_channels), *others))

    def build(self) -> CnnNet:
        return CnnNet(self)


class CnnNet(Backbone):
    """The network that a structure describes: its blocks, mean pool, linear classifier.

    A feature map is given at the end of each stage, before the next block with stride 2. Images of any size at least as
    large as the total stride are taken.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"^block_list\.(\d+)\.block_list\.", r"blocks.\1."),
                (r"^block_list\.", "blocks."),
                (r"\.conv1\.weight$", ".conv.weight"),
                (r"\.bn1\.(?=\w+$)", ".bn."),
                (r"\.se2\.", ".se."),
                (r"\.residual_proj\.", ".projection."),
                (r"^fc_linear\.", "fc."),
            )
        )
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("fc",)
    stem_modules: ClassVar[tuple[str, ...]] = ("blocks.0.conv",)

    def __init__(self, config: CnnNetConfig) -> None:
        super().__init__(config)
        structure = config.structure
        total = sum(block.depth for block in structure if block.kind != CONV)
        rates = iter([config.drop_path * index / max(total - 1, 1) for index in range(total)])
        self.blocks = nn.ModuleList(
            _module(block, [next(rates) for _ in range(block.depth)] if block.kind != CONV else ())
            for block in structure
        )
        self._ends = stage_ends(structure)
        features, stride = [], 1
        for index, block in enumerate(structure):
            stride *= block.stride
            if index in self._ends:
                features.append(Feature(block.out_channels, stride))
        self.feature_info = tuple(features)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        features = []
        for index, block in enumerate(self.blocks):
            x = self._run_stage(block, x)
            if index in self._ends:
                features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(x.mean((2, 3))))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = next(self.blocks.parameters())
            channels = self.feature_info[-1].channels
            self.fc = nn.Linear(channels, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(self.fc.weight, std=self.fc.weight.shape[0] ** -0.5)


def _net(structure: tuple[Block, ...], size: int = 224) -> CnnNetConfig:
    return CnnNetConfig(structure=structure, preprocess=Preprocess(size=size))


VARIANTS: dict[str, CnnNetConfig] = {
    # Any structure, e.g. one that a search has found; without one it is DeepMAD-R18.
    "deepmad": CnnNetConfig(),
    "deepmad_r18": CnnNetConfig(),
    "deepmad_r34": _net(
        _k1kxk1(
            *(24, (128, 5, 2, 1, 24), (512, 5, 2, 10, 48), (896, 5, 2, 13, 88)),
            *((1024, 5, 1, 11, 104), (616, 5, 2, 14, 128)),
        )
    ),
    "deepmad_r50": _net(
        _k1kxk1(
            *(32, (128, 5, 2, 1, 40), (512, 5, 2, 11, 48), (872, 5, 2, 12, 88)),
            *((1024, 5, 1, 13, 104), (1232, 5, 2, 15, 120)),
        )
    ),
    "deepmad_29m": _net(
        _k1dwsek1(
            *(40, (40, 5, 1, 2, 240), (85, 5, 2, 4, 512), (134, 5, 2, 6, 800)),
            *((201, 5, 2, 6, 1208), (312, 5, 2, 5, 1872)),
            last=1792,
        )
    ),
    "deepmad_29m_288": _net(
        _k1dwsek1(
            *(40, (61, 5, 2, 4, 368), (96, 5, 2, 4, 576), (145, 5, 2, 5, 872)),
            *((217, 5, 1, 6, 1304), (328, 5, 2, 4, 1968)),
            last=1792,
        ),
        size=288,
    ),
    "deepmad_50m": _net(
        _k1dwsek1(
            *(48, (112, 5, 2, 7, 672), (168, 5, 2, 9, 1008), (252, 5, 2, 7, 1512)),
            *((378, 5, 2, 3, 2272), (576, 3, 1, 1, 3456)),
            last=2048,
        )
    ),
    "deepmad_89m": _net(
        _k1dwsek1(
            *(56, (136, 5, 2, 10, 816), (204, 5, 2, 9, 1224), (326, 5, 2, 7, 1952)),
            *((490, 5, 2, 4, 2944), (744, 3, 1, 1, 4464)),
            last=2560,
        )
    ),
    "madnas_r18": _net(
        _k1kxk1(
            *(40, (256, 3, 2, 2, 64), (360, 3, 2, 3, 88), (512, 3, 2, 6, 128)),
            *((512, 3, 2, 4, 176), (512, 3, 1, 12, 176)),
        )
    ),
    "madnas_r50": _net(
        _k1kxk1(
            *(16, (256, 3, 2, 6, 64), (360, 3, 2, 8, 88), (512, 3, 2, 7, 176)),
            *((720, 3, 2, 2, 360), (2896, 3, 1, 4, 256)),
        )
    ),
    "madnas_r152": _net(
        _k1kxk1(
            *(128, (512, 3, 2, 4, 88), (720, 3, 2, 8, 176), (720, 3, 2, 13, 256)),
            *((1024, 3, 2, 10, 360), (1024, 3, 1, 12, 256)),
        )
    ),
}


def _published(file: str, top1: float) -> tuple[PublishedFile, ...]:
    url = f"https://idstcv.oss-cn-zhangjiakou.aliyuncs.com/DeepMAD/{file}.pth.tar"
    return (PublishedFile(url, "Apache-2.0", {"ImageNet-1K top-1 [%]": top1}),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "deepmad_r18": _published("R18", 77.7),
    "deepmad_r34": _published("R34", 79.7),
    "deepmad_r50": _published("R50", 80.6),
    "deepmad_29m": _published("DeepMAD-29M-Res224-82.5acc", 82.5),
    "deepmad_29m_288": _published("DeepMAD-29M-Res288-82.8acc", 82.8),
    "deepmad_50m": _published("DeepMAD-50M-Res224-83.9acc", 83.9),
    "deepmad_89m": _published("DeepMAD-89M-Res224-84.0acc", 84.0),
}
