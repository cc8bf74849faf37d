"""Conv-TasNet: a learnt encoder, masks by a temporal convolutional network, a learnt decoder.

Luo, Mesgarani: "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech Separation", TASLP 2019,
arXiv 1809.07454. Letters of the paper: N filters, L samples of a filter, B bottleneck, H hidden and Sc skip channels,
P kernel, X blocks a repeat, R repeats, C sources.

Published training: segments of 4 s, SI-SNR with permutation-invariant training, Adam with lr 1e-3, halved after 3
epochs without improvement, gradients clipped to norm 5, 100 epochs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import NetworkConfig, PublishedFile
from convatlas.networks.conv_tasnet.checkpoints import LAYOUTS, describe
from convatlas.networks.conv_tasnet.filterbank import Decoder, Encoder, FilterbankKind, make_filterbank
from convatlas.networks.conv_tasnet.separator import Norm, Separator, SeparatorState
from convatlas.ops.chunked_separation import separate_in_chunks
from convatlas.ops.precision import without_autocast
from convatlas.ops.source_level import Level, match_level
from convatlas.weights import Layout, load_weights, read_checkpoint

__all__ = ["PUBLISHED", "VARIANTS", "ConvTasNet", "ConvTasNetConfig", "MaskAct", "StreamState"]

MaskAct = Literal["sigmoid", "relu", "softmax", "tanh", "linear"]
EncoderAct = Literal["linear", "relu"]
Init = Literal["default", "xavier"]
Ends = Literal["trimmed", "padded", "aligned"]


@dataclass(frozen=True, kw_only=True)
class ConvTasNetConfig(NetworkConfig):
    """Config of `ConvTasNet`.

    Attributes:
        num_sources: C, number of sources; 1 for speech enhancement.
        num_filters: N, filters of the encoder and the decoder.
        kernel_size: L, samples of a filter.
        stride: samples between frames; half of kernel_size when left out.
        bottleneck_channels: B.
        hidden_channels: H.
        skip_channels: Sc; 0 for no skip connections.
        conv_kernel_size: P, odd.
        num_blocks: X, blocks of a repeat.
        num_repeats: R.
        norm: norm of the blocks, see `convatlas.networks.conv_tasnet.separator.make_norm`.
        input_norm: norm of the encoder's features, by default the same.
        mask_act: activation of the masks: ``sigmoid``, ``relu``, ``softmax`` over the sources, ``tanh`` or ``linear``.
        causal: whether the output depends on the past only; needed for streaming.
        encoder_act: activation of the encoder's features: ``linear`` or ``relu``.
        bias: whether the separator's convolutions have biases.
        mask_prelu: whether there is a PReLU before the masks' convolution.
        filterbank: ``free``, ``analytic_free``, ``param_sinc`` or ``stft``, see
            `convatlas.networks.conv_tasnet.filterbank`.
        ends: what happens at the ends of a signal. ``trimmed``: frames as they fit, and zeros where no frame reached:
            up to stride - 1 samples at the end are lost. ``padded``: zeros on both sides, no sample is lost (first
            author's code). ``aligned``: zeros on both sides up to whole strides (torchaudio's code).
        init: how weights begin: ``default`` (filters by Xavier's normal rule, all else as torch does) or ``xavier``
            (that rule for every matrix, as in kaituoxu's code).
        sample_rate: of the signals that it is trained on, in Hz.

    Raises:
        UnknownName: there is no such norm, activation, filter bank or treatment of the ends.
        ValueError: a size is out of range.
    """

    num_sources: int = 2
    num_filters: int = 512
    kernel_size: int = 16
    stride: int | None = None
    bottleneck_channels: int = 128
    hidden_channels: int = 512
    skip_channels: int = 128
    conv_kernel_size: int = 3
    num_blocks: int = 8
    num_repeats: int = 3
    norm: Norm = "global"
    input_norm: Norm | None = None
    mask_act: MaskAct = "sigmoid"
    causal: bool = False
    encoder_act: EncoderAct = "linear"
    bias: bool = True
    mask_prelu: bool = True
    filterbank: FilterbankKind = "free"
    ends: Ends = "trimmed"
    init: Init = "default"
    sample_rate: int = 8000

    def __post_init__(self) -> None:
        sizes = ("num_sources", "num_filters", "bottleneck_channels", "hidden_channels", "num_blocks", "num_repeats")
        for name in (*sizes, "conv_kernel_size", "sample_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.skip_channels < 0:
            raise ValueError(f"skip_channels must not be negative, got {self.skip_channels}")
        if self.kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2, got {self.kernel_size}")
        if not 1 <= self.hop <= self.kernel_size:
            raise ValueError(f"stride must be from 1 to kernel_size {self.kernel_size}, got {self.stride}")
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, or frames would get lost, got {self.conv_kernel_size}")
        for name, value, kinds in (
            ("norm", self.norm, Norm),
            ("norm", self.input_norm or self.norm, Norm),
            ("mask_act", self.mask_act, MaskAct),
            ("encoder_act", self.encoder_act, EncoderAct),
            ("filterbank", self.filterbank, FilterbankKind),
            ("ends", self.ends, Ends),
            ("init", self.init, Init),
        ):
            if value not in get_args(kinds):
                raise unknown(name, str(value), get_args(kinds))

    @property
    def hop(self) -> int:
        """Samples between frames."""
        return self.kernel_size // 2 if self.stride is None else self.stride

    @property
    def receptive_field(self) -> int:
        """Frames that a mask depends on: 1 + R (P - 1) (2^X - 1)."""
        return 1 + self.num_repeats * (self.conv_kernel_size - 1) * (2**self.num_blocks - 1)

    def build(self) -> ConvTasNet:
        return ConvTasNet(self)


@dataclass
class StreamState:
    """What `ConvTasNet.step` remembers of the stream; `copy.deepcopy` makes one to come back to.

    Attributes:
        waiting: samples (B, n) that do not fill a frame yet.
        overlap: what frames so far contribute to the next samples, (B, C, kernel_size - stride).
        received: number of samples that came in.
        given: number of samples that went out.
        to_skip: samples in front that are only padding and do not go out.
        separator: the past of the separator.
    """

    waiting: Tensor
    overlap: Tensor
    received: int
    given: int
    to_skip: int
    separator: SeparatorState


class ConvTasNet(nn.Module):
    """Separate the sources of a mixture (paper, figure 1).

    Args:
        config: what to build.
    """

    #: How the checkpoints of asteroid, of the first author's group, of kaituoxu's code and of torchaudio map to this.
    layouts: ClassVar[Mapping[str, Layout]] = LAYOUTS

    def __init__(self, config: ConvTasNetConfig) -> None:
        super().__init__()
        self.config = config
        if config.mask_act == "softmax" and config.num_sources == 1:
            warnings.warn("a softmax over one source is always 1: use mask_act 'sigmoid' or 'relu'", stacklevel=2)
        stride = config.hop
        banks = [
            make_filterbank(config.filterbank, config.num_filters, config.kernel_size, stride, config.sample_rate)
            for _ in range(2)
        ]
        self.encoder = Encoder(banks[0], stride)
        self.separator = Separator(
            banks[0].features,
            config.num_sources,
            config.bottleneck_channels,
            config.hidden_channels,
            config.skip_channels,
            config.conv_kernel_size,
            config.num_blocks,
            config.num_repeats,
            norm=config.norm,
            input_norm=config.input_norm or config.norm,
            mask_act=config.mask_act,
            mask_prelu=config.mask_prelu,
            causal=config.causal,
            bias=config.bias,
        )
        self.decoder = Decoder(banks[1], stride)
        if config.init == "xavier":
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_normal_(parameter)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> Self:
        """Build the network that a published checkpoint belongs to and load it, in evaluation mode.

        Args:
            source: a path, ``hf://owner/name`` or ``https://...``, of any of the ``layouts``.
            overrides: fields of `ConvTasNetConfig` that the file does not tell.

        Raises:
            CheckpointError: it cannot be read, does not tell its settings, or does not fit.
        """
        checkpoint = read_checkpoint(source)
        fields = describe(checkpoint)
        model = cls(ConvTasNetConfig().override(**{**fields, **overrides}))
        parts = checkpoint.parts
        load_weights(model, parts["state_dict"] if "state_dict" in parts else next(iter(parts.values())))
        return model.eval()

    @property
    def num_sources(self) -> int:
        """C, number of sources."""
        return self.config.num_sources

    @property
    def sample_rate(self) -> int:
        """Of the signals that it is trained on, in Hz."""
        return self.config.sample_rate

    @property
    def latency(self) -> int:
        """Samples that must come in before the first one is complete, when it streams."""
        return self.config.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Sources (B, C, T) of mixtures (B, T) or (B, 1, T); (C, T) of one mixture (T,).

        Raises:
            ValueError: x has another shape, is not floating point, or is shorter than a frame.
        """
        mixture = self._checked(x)
        left, right = self._padding(mixture.shape[-1])
        if left or right:
            mixture = F.pad(mixture, (left, right))
        w = self.encode(mixture)
        y = self.decode(w, self.separator(w))
        length = x.shape[-1]
        # One form for all ends, so that exported programs take any length.
        y = F.pad(y, (-left, left + length - y.shape[-1]))
        return y.squeeze(0) if x.dim() == 1 else y

    @torch.no_grad()
    def separate(self, x: Tensor, *, level: Level | None = "peak", chunk: int | None = None) -> Tensor:
        """Sources of a mixture, as one would write them to files.

        Args:
            x: (B, T), (B, 1, T) or (T,), at the sample rate of the network.
            level: make each source as loud as the mixture, by ``peak`` or ``rms``; None keeps the network's scale,
                which means nothing after training by SI-SNR.
            chunk: work on pieces of so many samples, some seconds, so that the memory does not grow with the length.

        Returns:
            (B, C, T), or (C, T) of one mixture (T,).

        Raises:
            ValueError: x has another shape, is not floating point, too short, or not finite.
        """
        mixture = self._checked(x)
        if not bool(mixture.isfinite().all()):
            raise ValueError("x must be finite, got NaN or infinity")
        y = self(mixture) if chunk is None else separate_in_chunks(self, mixture, window_size=chunk)
        y = y if level is None else match_level(y, mixture, level)
        return y.squeeze(0) if x.dim() == 1 else y

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, N, K) of padded mixtures (B, T); they keep their precision under autocast."""
        with without_autocast(x):
            w: Tensor = self.encoder(x)
            return w.relu() if self.config.encoder_act == "relu" else w

    def decode(self, w: Tensor, masks: Tensor) -> Tensor:
        """Signals (B, C, T) of features (B, N, K) under masks (B, C, N, K)."""
        with without_autocast(w):
            y: Tensor = self.decoder(w.unsqueeze(1) * masks.to(w.dtype))
            return y

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A quarter of a second of noise, for tracing and timing."""
        return (torch.randn(batch, max(self.sample_rate // 4, 2 * self.config.kernel_size)),)

    # Streaming

    def initial_state(self, batch: int = 1) -> StreamState:
        """What `step` needs before the first samples.

        Raises:
            Unsupported: the network is not causal, or a norm looks ahead.
        """
        like = next(self.parameters()).new_zeros(batch, 0)
        left, _ = self._padding(0)
        overlap = like.new_zeros(batch, self.num_sources, self.config.kernel_size - self.config.hop)
        state = self.separator.initial_state(like)
        return StreamState(like.new_zeros(batch, left), overlap, 0, 0, left, state)

    @torch.no_grad()
    def step(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Separate the next samples of a stream; all outputs together are those of the whole mixture at once.

        A sample goes out as soon as all of its frames are complete, at most ``latency`` samples after it came in.

        Args:
            x: samples (B, n) of any number n, also 0.
            state: from `initial_state` or the step before; it is used up.

        Returns:
            The samples of the sources that are complete, (B, C, m) with m from 0 to n + latency; and the next state.

        Raises:
            ValueError: x is not (B, n) of the batch of the state, or not floating point.
        """
        if x.dim() != 2 or len(x) != len(state.waiting):
            raise ValueError(f"x must be ({len(state.waiting)}, n), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        state.received += x.shape[1]
        return self._advance(x.to(state.waiting.dtype), state), state

    @torch.no_grad()
    def finish(self, state: StreamState) -> Tensor:
        """The samples (B, C, m) that are left when the stream has ended; the state is used up.

        Raises:
            ValueError: no whole frame came in.
        """
        if self.config.ends == "trimmed" and state.received < self.config.kernel_size:
            raise ValueError(self._too_short(state.received))
        _, right = self._padding(state.received)
        missing = state.received - state.given
        pieces = [self._advance(state.waiting.new_zeros(len(state.waiting), right), state), state.overlap]
        y = torch.cat(pieces, -1)[..., state.to_skip :]
        return F.pad(y, (0, missing - y.shape[-1]))

    def _advance(self, x: Tensor, state: StreamState) -> Tensor:
        size, hop = self.config.kernel_size, self.config.hop
        waiting = torch.cat([state.waiting, x], 1)
        frames = (waiting.shape[1] - size) // hop + 1 if waiting.shape[1] >= size else 0
        if frames == 0:
            state.waiting = waiting
            return state.overlap.new_zeros(*state.overlap.shape[:2], 0)
        w = self.encode(waiting[:, : (frames - 1) * hop + size])
        y = self.decode(w, self.separator.step(w, state.separator))
        y[..., : size - hop] += state.overlap
        state.waiting, state.overlap = waiting[:, frames * hop :], y[..., frames * hop :].clone()
        skipped = min(state.to_skip, frames * hop)
        state.to_skip -= skipped
        state.given += frames * hop - skipped
        return y[..., skipped : frames * hop]

    # Ends and errors

    def _padding(self, length: int) -> tuple[int, int]:
        """Zeros in front of and behind a mixture of so many samples."""
        size, hop = self.config.kernel_size, self.config.hop
        if self.config.ends == "padded":
            return hop, size - (hop + length % size) % size + hop
        if self.config.ends == "aligned":
            return hop, -(length - size % 2) % hop + hop
        return 0, 0

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() not in (1, 2, 3) or (x.dim() == 3 and x.shape[1] != 1):
            raise ValueError(f"x must be (B, T), (B, 1, T) or (T,) of one channel, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if self.config.ends == "trimmed" and x.shape[-1] < self.config.kernel_size:
            raise ValueError(self._too_short(x.shape[-1]))
        if x.shape[-1] < 1:
            raise ValueError("x must hold at least one sample, got none")
        return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x

    def _too_short(self, length: int) -> str:
        return f"x must not be shorter than one encoder frame of {self.config.kernel_size} samples, got {length}"


_PAPER = ConvTasNetConfig()
#: asteroid's recipes differ from the paper in the activation of the masks.
_RECIPE = ConvTasNetConfig(mask_act="relu")

VARIANTS: dict[str, ConvTasNetConfig] = {
    "conv_tasnet": _PAPER,
    "conv_tasnet_causal": _PAPER.override(norm="cumulative", causal=True, ends="padded"),
    "conv_tasnet_3src": _PAPER.override(num_sources=3),
    "conv_tasnet_3src_causal": _PAPER.override(num_sources=3, norm="cumulative", causal=True, ends="padded"),
    "conv_tasnet_relu": _RECIPE,
    "conv_tasnet_relu_3src": _RECIPE.override(num_sources=3),
    "conv_tasnet_relu_16k": _RECIPE.override(kernel_size=32, sample_rate=16000),
    "conv_tasnet_relu_3src_16k": _RECIPE.override(num_sources=3, kernel_size=32, sample_rate=16000),
    "conv_tasnet_enhancement_16k": _RECIPE.override(num_sources=1, kernel_size=32, sample_rate=16000),
    "conv_tasnet_naplab": _PAPER.override(kernel_size=32, sample_rate=16000, ends="padded"),
    "conv_tasnet_torchaudio": _RECIPE.override(ends="aligned"),
    "conv_tasnet_no_skip": _PAPER.override(skip_channels=0),
    "conv_tasnet_v1": ConvTasNetConfig(
        num_filters=256, kernel_size=20, bottleneck_channels=256, num_repeats=4, skip_channels=0, mask_act="relu",
        input_norm="frame", encoder_act="relu", bias=False, mask_prelu=False,
        init="xavier",
    ),
}  # fmt: skip

_ASTEROID_LICENCE = "CC BY-SA 3.0"


def _gains(data: str, si_snri: float, sdri: float) -> dict[str, float]:
    return {f"{data} SI-SNRi [dB]": si_snri, f"{data} SDRi [dB]": sdri}


#: Files whose figures are published; `ConvTasNet.from_pretrained` reads every other one of these codes as well.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "conv_tasnet_relu": (
        PublishedFile(
            "hf://JorisCos/ConvTasNet_Libri2Mix_sepclean_8k", _ASTEROID_LICENCE, _gains("Libri2Mix clean", 14.7, 15.1)
        ),
        PublishedFile(
            "hf://JorisCos/ConvTasNet_Libri2Mix_sepnoisy_8k", _ASTEROID_LICENCE, _gains("Libri2Mix noisy", 12.0, 12.5)
        ),
        PublishedFile(
            "https://zenodo.org/record/3862942/files/model.pth",
            "CC BY-SA 3.0; trained on WSJ0 and WHAM! (CC BY-NC 4.0), for research only",
            _gains("WHAM! sep_clean", 16.2, 16.5),
        ),
    ),
}
