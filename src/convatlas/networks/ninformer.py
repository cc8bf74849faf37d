"""NiNformer: blocks whose attention is replaced by a gate that an inner MLP-Mixer generates from the tokens.

Abdullah, Aydin: "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", Neural
Computing and Applications 2025, arXiv 2403.02411 (2024). The MLP-Mixer, which it is compared with, stands here too:
Tolstikhin et al.: "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021, arXiv 2105.01601.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.nn.mlp import Mlp
from convatlas.ops.tokens import map_to_tokens, tokens_to_map
from convatlas.weights import Layout

__all__ = [
    "VARIANTS",
    "MixerBlock",
    "MixerClassifier",
    "MixerConfig",
    "MixerGatingUnit",
    "NiNBlock",
    "NiNformer",
    "NiNformerClassifier",
    "NiNformerConfig",
]

_CIFAR = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)


@dataclass(frozen=True, kw_only=True)
class _TokenConfig(BackboneConfig):
    """Config of both networks.

    Attributes:
        depth: blocks.
        dim: channels D of a token (d_model).
        ffn_dim: hidden width F of the feed-forward parts (d_ffn).
        token_dim: hidden width T of the mixing of tokens; ``ffn_dim`` when left out.
        channel_dim: hidden width C of the mixing of channels; ``ffn_dim`` when left out.
        patch_size: side of a patch in pixels.
        drop: probability of every dropout.
        preprocess: its size is the only one that the network takes, because the weights depend on the number of tokens.
    """

    num_classes: int = 10
    depth: int = 4
    dim: int = 256
    ffn_dim: int = 512
    token_dim: int | None = None
    channel_dim: int | None = None
    patch_size: int = 4
    drop: float = 0.5
    preprocess: Preprocess = field(default_factory=lambda: _CIFAR)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "dim", "ffn_dim", "token_dim", "channel_dim", "patch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")
        if any(side % self.patch_size for side in self.preprocess.shape):
            height, width = self.preprocess.shape
            raise ValueError(f"the image must be divisible into patches of {self.patch_size}, got {height} x {width}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens."""
        height, width = self.preprocess.shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens N of an image (seq_len)."""
        return self.grid[0] * self.grid[1]

    def mixer(self) -> MixerBlock:
        """An MLP-Mixer block of these sizes."""
        token_dim, channel_dim = self.token_dim or self.ffn_dim, self.channel_dim or self.ffn_dim
        return MixerBlock(self.dim, self.num_tokens, token_dim, channel_dim, drop=self.drop)


@dataclass(frozen=True, kw_only=True)
class NiNformerConfig(_TokenConfig):
    """Config of `NiNformerClassifier`.

    Attributes:
        shared_norm: whether both halves of a block read one layer normalisation, as in the authors' code.
        num_classes, in_channels, preprocess: see `BackboneConfig`.
        depth, dim, ffn_dim, token_dim, channel_dim, patch_size, drop: see `MixerConfig`.
    """

    shared_norm: bool = True

    def build(self) -> NiNformerClassifier:
        return NiNformerClassifier(self)


@dataclass(frozen=True, kw_only=True)
class MixerConfig(_TokenConfig):
    """Config of `MixerClassifier`.

    Attributes:
        num_classes, in_channels: see `BackboneConfig`.
        depth: blocks.
        dim: channels D of a token (d_model).
        ffn_dim: hidden width F of the feed-forward parts (d_ffn).
        token_dim: hidden width T of the mixing of tokens; ``ffn_dim`` when left out.
        channel_dim: hidden width C of the mixing of channels; ``ffn_dim`` when left out.
        patch_size: side of a patch in pixels.
        drop: probability of every dropout.
        preprocess: its size is the only one that the network takes, because the weights depend on the number of tokens.
    """

    def build(self) -> MixerClassifier:
        return MixerClassifier(self)


_PARTS = (
    (r"(^|\.)Mixer\.", r"\1mixer."),
    (r"(^|\.)token_mix\.0\.", r"\1norm1."),
    (r"(^|\.)token_mix\.2\.net\.", r"\1mlp_tokens.net."),
    (r"(^|\.)channel_mix\.0\.", r"\1norm2."),
    (r"(^|\.)channel_mix\.1\.net\.", r"\1mlp_channels.net."),
    (r"(^|\.)net\.0\.", r"\1fc1."),
    (r"(^|\.)net\.3\.", r"\1fc2."),
)


class MixerBlock(nn.Module):
    """Mix the tokens, then the channels, by an MLP each (MLP-Mixer, equation 1).

    y = x + FF_tok(LN_a(x)^T)^T, z = y + FF_ch(LN_b(y)). The order of the tokens is known to it.

    Args:
        channels: channels D of a token.
        num_tokens: tokens N.
        token_dim: hidden width T of FF_tok.
        channel_dim: hidden width C of FF_ch.
        drop: probability of every dropout.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=_PARTS)}

    def __init__(self, channels: int, num_tokens: int, token_dim: int, channel_dim: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.mlp_tokens = Mlp(num_tokens, token_dim, drop=drop)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp_channels = Mlp(channels, channel_dim, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class MixerGatingUnit(nn.Module):
    """A projection of the tokens times a gate that another network makes of them: g(x) = (W_p x + b_p) * mixer(x).

    There is no activation on the gate, so that the unit is of second order in x.

    Args:
        channels: channels D of a token.
        mixer: makes the gate and keeps the shape (B, N, D): a `MixerBlock` in the paper.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=_PARTS)}

    def __init__(self, channels: int, mixer: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, channels)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        return self.proj(x) * self.mixer(x)


class NiNBlock(nn.Module):
    """x = x + g(LN(x)), then x = x + FF(LN(x)), with one layer normalisation for both (paper, figure 1).

    Args:
        channels: channels D of a token.
        mixer: makes the gate, see `MixerGatingUnit`.
        ffn_dim: hidden width F of FF.
        drop: probability of both dropouts of FF.
        shared_norm: False gives FF a normalisation of its own.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=_PARTS)}

    def __init__(
        self, channels: int, mixer: nn.Module, ffn_dim: int, *, drop: float = 0.0, shared_norm: bool = True
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mgu = MixerGatingUnit(channels, mixer)
        self.ffn_norm = None if shared_norm else nn.LayerNorm(channels)
        self.ffn = Mlp(channels, ffn_dim, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x = x + self.mgu(self.norm(x))
        return x + self.ffn((self.ffn_norm or self.norm)(x))


class NiNformer(nn.Module):
    """A row of `NiNBlock` on tokens, without a position embedding and without a norm at the end.

    Args:
        channels: channels D of a token (d_model).
        ffn_dim: hidden width F of every feed-forward part (d_ffn), those in the gate included.
        num_tokens: tokens N (seq_len), which the weights depend on.
        depth: blocks (num_layers).
        drop: probability of every dropout.
        mixer: makes the network that makes a block's gate, instead of an MLP-Mixer block.
        shared_norm: whether both halves of a block read one layer normalisation.

    Raises:
        ValueError: a size is not positive, or drop is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=(*_PARTS, (r"^model\.", "blocks.")))}

    def __init__(
        self,
        channels: int,
        ffn_dim: int,
        num_tokens: int,
        depth: int,
        *,
        drop: float = 0.0,
        mixer: Callable[[], nn.Module] | None = None,
        shared_norm: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "ffn_dim": ffn_dim, "num_tokens": num_tokens, "depth": depth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {drop}")
        self.channels, self.num_tokens = channels, num_tokens

        def inner() -> nn.Module:
            return MixerBlock(channels, num_tokens, ffn_dim, ffn_dim, drop=drop)

        make = mixer or inner
        self.blocks = nn.ModuleList(
            NiNBlock(channels, make(), ffn_dim, drop=drop, shared_norm=shared_norm) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to the same shape.

        Raises:
            ValueError: x has another number of dimensions, tokens or channels.
        """
        if x.dim() != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x must be (B, {self.num_tokens}, {self.channels}), got {tuple(x.shape)}")
        if x.shape[1] != self.num_tokens:
            raise ValueError(f"{type(self).__name__} was built for {self.num_tokens} tokens, got {x.shape[1]}")
        for block in self.blocks:
            x = block(x)
        return x


class _TokenClassifier(Backbone):
    """Patches become tokens, blocks change them, their mean is classified."""

    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stem",)

    def __init__(self, config: _TokenConfig, blocks: nn.ModuleList) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        self.blocks = blocks
        self.feature_info = (Feature(config.dim, config.patch_size),)
        self.min_size = config.preprocess.shape
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        height, width = self.config.preprocess.shape
        if x.shape[2] != height or x.shape[3] != width:
            raise ValueError(
                f"{type(self).__name__} was built for {self.config.num_tokens} tokens of {height} x {width} pixels, "
                f"got {x.shape[2]} x {x.shape[3]}; preprocess.size sets the size before training"
            )
        tokens = map_to_tokens(self.stem(x))
        for block in self.blocks:
            tokens = self._run_stage(block, tokens)
        return [tokens_to_map(tokens, self.config.grid)]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.stem.weight
            self.head = nn.Linear(self.config.dim, num_classes, device=weight.device, dtype=weight.dtype)


_WRAPPER = ((r"^model\.", "blocks."), (r"^patcher\.", "stem."), (r"^classifier\.", "head."))


class NiNformerClassifier(_TokenClassifier):
    """The image classifier of the authors' training script: patches, `NiNBlock`, mean over the tokens, Linear.

    `forward_features` gives one map, the tokens behind the last block.

    Args:
        config: what to build.
        mixer: makes the network that makes a block's gate, instead of an MLP-Mixer block.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=(*_PARTS, *_WRAPPER))}

    def __init__(self, config: NiNformerConfig, *, mixer: Callable[[], nn.Module] | None = None) -> None:
        trunk = NiNformer(
            config.dim,
            config.ffn_dim,
            config.num_tokens,
            config.depth,
            drop=config.drop,
            mixer=mixer or config.mixer,
            shared_norm=config.shared_norm,
        )
        super().__init__(config, trunk.blocks)


class MixerClassifier(_TokenClassifier):
    """The same classifier with `MixerBlock` alone: what NiNformer is compared with.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=(*_PARTS, *_WRAPPER))}

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config, nn.ModuleList(config.mixer() for _ in range(config.depth)))


_MNIST = Preprocess(size=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)

VARIANTS: dict[str, NiNformerConfig | MixerConfig] = {
    "ninformer_cifar10": NiNformerConfig(),
    "ninformer_cifar100": NiNformerConfig(num_classes=100),
    "ninformer_mnist": NiNformerConfig(in_channels=1, preprocess=_MNIST),
    "mixer_cifar10": MixerConfig(),
    "mixer_cifar100": MixerConfig(num_classes=100),
    "mixer_mnist": MixerConfig(in_channels=1, preprocess=_MNIST),
}
