"""The blocks of UniFormer: a position embedding, a relation aggregator (MHRA) that is local or global, and an MLP.

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
TPAMI 2023, arXiv 2201.09450, section 3; for video arXiv 2201.04676. Every block is

    X = DPE(X_in) + X_in,    Y = MHRA(norm(X)) + X,    Z = FFN(norm(Y)) + Y        (equations 1 to 3)

where DPE is a depthwise convolution of 3 taps on each axis. The aggregator is local (a depthwise convolution of 5 taps,
between two 1x1 convolutions) or global (self-attention). ``axes`` is 2 for images and 3 for video.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from convatlas.nn.attention import SelfAttention
from convatlas.nn.depthwise import DepthwiseConv2d, DepthwiseConv3d
from convatlas.nn.drop import DropPath
from convatlas.nn.mlp import Mlp
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.nn.scale import LayerScale
from convatlas.ops.tokens import map_to_tokens, tokens_to_map
from convatlas.ops.windows import merge_windows, partition_windows
from convatlas.weights import Layout

__all__ = [
    "BlockOptions",
    "GlobalBlock",
    "LocalBlock",
    "SplitBlock",
    "WindowBlock",
    "conv_embed",
    "flat_scales",
    "patch_embed",
]

CONVS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DEPTHWISE: dict[int, type[DepthwiseConv2d] | type[DepthwiseConv3d]] = {2: DepthwiseConv2d, 3: DepthwiseConv3d}
_TOKEN_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What the blocks of a stage have in common.

    Attributes:
        channels: C of the map.
        num_heads: attention heads of a global block; divides C.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the attention scores; (C / num_heads)^-0.5 when left out.
        drop: rate of the dropout in the MLP and behind the attention.
        attn_drop: rate of the dropout of the attention weights.
        layer_scale_init: initial factor of the residual branches; None leaves the factors out.
        axes: 2 for images, 3 for video.
    """

    channels: int
    num_heads: int = 1
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    layer_scale_init: float | None = None
    axes: int = 2

    def depthwise(self, kernel_size: int) -> nn.Module:
        """A depthwise convolution that keeps the size of the map."""
        return _DEPTHWISE[self.axes](self.channels, self.channels, kernel_size, padding=kernel_size // 2)

    def attention(self, kind: type[SelfAttention] = SelfAttention) -> SelfAttention:
        """The global aggregator."""
        return kind(
            self.channels,
            self.num_heads,
            qkv_bias=self.qkv_bias,
            scale=self.qk_scale,
            attn_drop=self.attn_drop,
            drop=self.drop,
        )

    def mlp(self) -> Mlp:
        """The feed-forward network on tokens."""
        return Mlp(self.channels, int(self.channels * self.mlp_ratio), drop=self.drop)

    def norm(self) -> nn.LayerNorm:
        """The norm of tokens."""
        return nn.LayerNorm(self.channels, eps=_TOKEN_EPS)

    def scale(self, *, channel_dim: int) -> nn.Module:
        """The factors of a residual branch."""
        if self.layer_scale_init is None:
            return nn.Identity()
        return LayerScale(self.channels, self.layer_scale_init, channel_dim=channel_dim)


#: The authors' names of the factors of the residual branches.
SCALES = (r"(^|\.)gamma_(\d)$", r"\1scale\2.gamma")


def flat_scales(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Factors of local blocks without the authors' axes of size one for the positions."""
    return {key: value.flatten() if key.endswith(".gamma") else value for key, value in state.items()}


class _Block(nn.Module):
    """What all blocks have: x + DPE(x) first, and the authors' names of the factors."""

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=(SCALES,), function=flat_scales)}

    def __init__(self, options: BlockOptions, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = options.depthwise(3)
        self.drop_path = DropPath(drop_path)


class LocalBlock(_Block):
    """A block with the local aggregator: conv 1x1, depthwise convolution of 5 taps an axis, conv 1x1 (section 3.2.1).

    Nothing non-linear lies in the aggregator; the MLP consists of 1x1 convolutions, the norms are batch norms.

    Args:
        options: of the stage; heads and attention do not matter.
        drop_path: rate of the residual branches.
    """

    def __init__(self, options: BlockOptions, drop_path: float = 0.0) -> None:
        super().__init__(options, drop_path)
        conv, norm, channels = CONVS[options.axes], NORMS[options.axes], options.channels
        self.norm1 = norm(channels)
        self.conv1 = conv(channels, channels, 1)
        self.attn = options.depthwise(5)
        self.conv2 = conv(channels, channels, 1)
        self.norm2 = norm(channels)
        self.mlp = _ConvMlp(options)
        self.scale1 = options.scale(channel_dim=1)
        self.scale2 = options.scale(channel_dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *grid) to the same shape."""
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.scale1(self.conv2(self.attn(self.conv1(self.norm1(x))))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class _ConvMlp(nn.Module):
    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        conv, hidden = CONVS[options.axes], int(options.channels * options.mlp_ratio)
        self.fc1 = conv(options.channels, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = conv(hidden, options.channels, 1)
        self.drop = nn.Dropout(options.drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class GlobalBlock(_Block):
    """A block with the global aggregator: self-attention over all positions, of all frames (section 3.2.2).

    Args:
        options: of the stage.
        drop_path: rate of the residual branches.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    attention: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, options: BlockOptions, drop_path: float = 0.0) -> None:
        super().__init__(options, drop_path)
        self.norm1 = options.norm()
        self.attn = options.attention(self.attention)
        self.norm2 = options.norm()
        self.mlp = options.mlp()
        self.scale1 = options.scale(channel_dim=-1)
        self.scale2 = options.scale(channel_dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *grid) to the same shape."""
        x = x + self.pos_embed(x)
        grid = x.shape[2:]
        tokens = map_to_tokens(x).contiguous()  # no copy behind a LayerNorm or another global block
        tokens = tokens + self.drop_path(self.scale1(self.aggregate(self.norm1(tokens), grid)))
        tokens = tokens + self.drop_path(self.scale2(self.mlp(self.norm2(tokens))))
        return tokens_to_map(tokens, grid)

    def aggregate(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Relate the normed tokens (B, N, C) of a grid to each other."""
        return self.attn(tokens)


class WindowBlock(GlobalBlock):
    """A global block within windows of a map, for large images in dense prediction (section 3.4).

    Windows that reach over the border are filled with zeros after the norm; these tokens take part.

    Args:
        options: of the stage, for images.
        drop_path: rate of the residual branches.
        window_size: side of a window.

    Raises:
        ValueError: the window is smaller than 1, or the heads do not divide the channels.
    """

    def __init__(self, options: BlockOptions, drop_path: float = 0.0, *, window_size: int = 14) -> None:
        super().__init__(options, drop_path)
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.window_size = window_size

    def aggregate(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Relate the normed tokens (B, H * W, C) within each window."""
        (height, width), window = grid, (self.window_size, self.window_size)
        windows = partition_windows(tokens.unflatten(1, (height, width)), window)
        return merge_windows(self.attn(windows), window, (height, width)).flatten(1, 2)


class SplitBlock(GlobalBlock):
    """A global block for video that attends over time at each position, then over each frame (divided attention).

    As in the authors' code the residual connection of the second attention starts at x, not behind the first:
    y = x + SA(norm1(x + TA(t_norm(x)))).

    Args:
        options: of the stage, for video.
        drop_path: rate of the residual branches.
    """

    def __init__(self, options: BlockOptions, drop_path: float = 0.0) -> None:
        super().__init__(options, drop_path)
        self.t_norm = options.norm()
        self.t_attn = options.attention()

    def init_time(self) -> None:
        """Give the attention over time its initial weights, with which it adds nothing."""
        nn.init.zeros_(self.t_attn.qkv.weight)
        if self.t_attn.qkv.bias is not None:
            nn.init.zeros_(self.t_attn.qkv.bias)
        nn.init.ones_(self.t_attn.proj.weight)
        nn.init.zeros_(self.t_attn.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to the same shape."""
        x = x + self.pos_embed(x)
        batch, _, frames, height, width = x.shape
        tokens = x.movedim(1, -1).flatten(2, 3).contiguous()  # (B, T, H W, C)
        columns = tokens.transpose(1, 2).flatten(0, 1)
        columns = columns + self.drop_path(self.t_attn(self.t_norm(columns)))
        aware = columns.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
        related = self.drop_path(self.scale1(self.attn(self.norm1(aware))))
        y = tokens + related.unflatten(0, (batch, frames))
        y = y.flatten(1, 2)
        y = y + self.drop_path(self.scale2(self.mlp(self.norm2(y))))
        return tokens_to_map(y, (frames, height, width))


# -- from an image or a map to a coarser map ---------------------------------------------------------------------------


def _embedding(proj: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(proj=proj)
    if norm is not None:
        parts["norm"] = norm
    return nn.Sequential(parts)


def patch_embed(
    in_channels: int, channels: int, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> nn.Sequential:
    """A convolution and a LayerNorm over the channels, eps 1e-5; the children are ``proj`` and ``norm``."""
    conv: Callable[..., nn.Module] = CONVS[len(kernel_size)]
    proj = conv(in_channels, channels, tuple(kernel_size), tuple(stride), tuple(padding))
    return _embedding(proj, ChannelLayerNorm(channels, eps=1e-5))


def conv_embed(in_channels: int, widths: Sequence[int], strides: Sequence[Sequence[int]]) -> nn.Sequential:
    """Convolutions of 3 taps an axis with batch norm, GELU between them; the only child is ``proj``.

    Args:
        in_channels: channels of the input.
        widths: channels behind each convolution.
        strides: of each convolution, on each axis.
    """
    layers: list[nn.Module] = []
    for width, stride in zip(widths, strides, strict=True):
        if layers:
            layers.append(nn.GELU())
        conv: Callable[..., nn.Module] = CONVS[len(stride)]
        layers += [conv(in_channels, width, 3, tuple(stride), 1), NORMS[len(stride)](width)]
        in_channels = width
    return _embedding(nn.Sequential(*layers))
