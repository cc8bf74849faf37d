"""UniRepLKNet for sounds: a log-mel filter bank as an image of one channel.

Ding et al.: "UniRepLKNet", CVPR 2024, arXiv 2311.15599, section 3.3. Preparation and augmentation are those of Gong,
Chung, Glass: "AST: Audio Spectrogram Transformer", Interspeech 2021, arXiv 2104.01778.

Published training on Speech Commands V2: Adam with lr 2.5e-4, betas 0.95 and 0.999 and weight decay 5e-7, batches of
128, 100 epochs; from the fifth on lr is multiplied by 0.85 after every epoch. Published accuracy: 98.5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig
from convatlas.networks.unireplknet.backbone import UniRepLKNet, UniRepLKNetConfig, stage_kernels
from convatlas.ops.kaldi_filter_bank import kaldi_filter_bank
from convatlas.weights import Layout

__all__ = [
    "VARIANTS",
    "LogMelFrontEnd",
    "UniRepLKNetAudio",
    "UniRepLKNetAudioConfig",
    "mask_spectrogram",
    "mix_waveforms",
    "shift_and_disturb",
]

#: Published probability that a waveform is mixed, and both parameters of the beta distribution of its share.
MIX_PROBABILITY, MIX_ALPHA = 0.6, 10.0
#: Most bands and frames that are masked in training; most frames by which a spectrogram is rolled.
FREQUENCY_MASK, TIME_MASK, ROLL = 48, 48, 10


class LogMelFrontEnd(nn.Module):
    """Waveforms (B, samples) to normalised log-mel filter banks (B, T, F).

    The waveform loses its mean; the filter bank (`convatlas.ops.kaldi_filter_bank`) is padded with zeros or cut to T
    frames; then (f - mean) / (2 std).

    Args:
        sample_rate: in Hz.
        num_filters: number F of mel bands.
        target_length: number T of frames; 128 for Speech Commands, 1024 for AudioSet.
        mean, std: of the filter banks of the training data.

    Raises:
        ValueError: target_length or std is not positive.
    """

    def __init__(
        self,
        sample_rate: float = 16000,
        *,
        num_filters: int = 128,
        target_length: int = 128,
        mean: float = -6.845978,
        std: float = 5.5654526,
    ) -> None:
        super().__init__()
        if target_length < 1 or std <= 0:
            raise ValueError(f"target_length and std must be positive, got {target_length} and {std:g}")
        self.sample_rate, self.num_filters, self.target_length = sample_rate, num_filters, target_length
        self.mean, self.std = mean, std

    def filter_bank(self, waveform: Tensor) -> Tensor:
        """The filter bank of waveforms (B, samples), as many frames as there are."""
        if waveform.dim() != 2:
            raise ValueError(f"waveform must be (B, samples), got {tuple(waveform.shape)}")
        wide = waveform.to(torch.promote_types(waveform.dtype, torch.float32))
        centred = wide - wide.mean(1, keepdim=True)
        return kaldi_filter_bank(centred, self.sample_rate, num_filters=self.num_filters)

    def fit(self, filter_bank: Tensor) -> Tensor:
        """Pad a filter bank (B, frames, F) with zeros or cut it to (B, T, F)."""
        frames = self.target_length - filter_bank.shape[1]
        return F.pad(filter_bank, (0, 0, 0, max(frames, 0)))[:, : self.target_length]

    def normalise(self, filter_bank: Tensor) -> Tensor:
        """(f - mean) / (2 std)."""
        return (filter_bank - self.mean) / (2 * self.std)

    def forward(self, waveform: Tensor) -> Tensor:
        """Map (B, samples) to (B, T, F), in at least float32."""
        return self.normalise(self.fit(self.filter_bank(waveform)))


def mask_spectrogram(
    spectrogram: Tensor,
    *,
    frequency_mask: int = FREQUENCY_MASK,
    time_mask: int = TIME_MASK,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SpecAugment: set one band of frequencies and one span of frames of each spectrogram (B, T, F) to zero.

    Park et al., Interspeech 2019, arXiv 1904.08779. Widths are uniform below the given ones, then the place is.
    """
    for axis, most in ((2, frequency_mask), (1, time_mask)):
        size = spectrogram.shape[axis]
        draws = torch.rand(2, len(spectrogram), 1, generator=generator).to(spectrogram.device)
        width = draws[0] * min(most, size)
        start = (draws[1] * (size - width)).long()
        place = torch.arange(size, device=spectrogram.device)
        kept = (place < start) | (place >= start + width.long())
        spectrogram = spectrogram * kept.unsqueeze(3 - axis)
    return spectrogram


def shift_and_disturb(spectrogram: Tensor, *, roll: int = ROLL, generator: torch.Generator | None = None) -> Tensor:
    """Add noise of a random strength below 0.1 to each spectrogram (B, T, F); roll it by -roll to roll - 1 frames."""
    count = len(spectrogram)
    noise = torch.rand(spectrogram.shape, generator=generator) * torch.rand(count, 1, 1, generator=generator) / 10
    shifts = torch.randint(-roll, roll, (count, 1), generator=generator)
    frames = (torch.arange(spectrogram.shape[1]) - shifts) % spectrogram.shape[1]
    disturbed = spectrogram + noise.to(spectrogram)
    return disturbed.gather(1, frames.to(spectrogram.device)[..., None].expand_as(disturbed))


def mix_waveforms(
    waveforms: Tensor,
    targets: Tensor,
    *,
    probability: float = MIX_PROBABILITY,
    alpha: float = MIX_ALPHA,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix some waveforms of a batch with others of it: lambda a + (1 - lambda) b, lambda from Beta(alpha, alpha).

    Waveforms lose their means before and after; targets are mixed by the same lambda.

    Args:
        waveforms: (B, samples).
        targets: (B, classes), one-hot or multi-hot.
        probability: that a waveform is mixed.
        alpha: of the beta distribution.
        generator: of the draws.

    Raises:
        ValueError: sizes do not fit, or probability or alpha is out of range.
    """
    if waveforms.dim() != 2 or targets.dim() != 2 or len(waveforms) != len(targets):
        raise ValueError(
            f"waveforms must be (B, samples) and targets (B, classes), got {tuple(waveforms.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if not 0 <= probability <= 1 or alpha <= 0:
        raise ValueError(f"probability must be from 0 to 1 and alpha positive, got {probability} and {alpha}")
    count = len(waveforms)
    # Of two gamma variables, the share of the first is beta distributed.
    gammas = torch._standard_gamma(torch.full((2, count, 1), alpha, dtype=torch.float64), generator=generator)
    share = gammas[0] / gammas.sum(0)
    mixed = torch.rand(count, 1, generator=generator) < probability
    share = torch.where(mixed, share, 1.0).to(waveforms)
    partner = torch.randint(count, (count,), generator=generator).to(waveforms.device)
    centred = waveforms - waveforms.mean(1, keepdim=True)
    both = share * centred + (1 - share) * centred[partner]
    return both - both.mean(1, keepdim=True), share * targets + (1 - share) * targets[partner]


_S = UniRepLKNetConfig(
    depths=(3, 3, 27, 3),
    dims=(96, 192, 384, 768),
    kernel_sizes=stage_kernels((3, 3, 27, 3), period=3),
    drop_path=0.4,
    in_channels=1,
    num_classes=35,
)


@dataclass(frozen=True, kw_only=True)
class UniRepLKNetAudioConfig(NetworkConfig):
    """Config of `UniRepLKNetAudio`.

    Attributes:
        network: the network; its num_classes is that of the sounds.
        sample_rate: in Hz.
        num_filters: mel bands, the height of the image.
        target_length: frames, the width of the image.
        mean, std: of the filter banks of the training data.
    """

    network: UniRepLKNetConfig = field(default_factory=lambda: _S)
    sample_rate: float = 16000
    num_filters: int = 128
    target_length: int = 128
    mean: float = -6.845978
    std: float = 5.5654526

    def build(self) -> UniRepLKNetAudio:
        return UniRepLKNetAudio(self)


class UniRepLKNetAudio(nn.Module):
    """Waveforms to scores of sounds: the filter bank (B, T, F) as an image (B, 1, F, T), the network, LN and Linear.

    In training the spectrograms are masked, disturbed and rolled; `mix_waveforms` is for the batch before. The loss is
    `loss`, binary cross-entropy: several sounds may be in one recording.

    Args:
        config: what to build.

    Raises:
        ValueError: the network takes several channels, or as of its parts.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        name: Layout(((r"^", "network."), *layout.renames), layout.function)
        for name, layout in UniRepLKNet.layouts.items()
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("network.head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("network.downsample_layers.0.0",)

    def __init__(self, config: UniRepLKNetAudioConfig) -> None:
        super().__init__()
        if config.network.in_channels != 1:
            raise ValueError(f"in_channels of the network must be 1, got {config.network.in_channels}")
        self.config = config
        self.front_end = LogMelFrontEnd(
            config.sample_rate,
            num_filters=config.num_filters,
            target_length=config.target_length,
            mean=config.mean,
            std=config.std,
        )
        self.network = UniRepLKNet(config.network)

    def forward(self, waveform: Tensor) -> Tensor:
        """Scores (B, classes), before a sigmoid, of waveforms (B, samples).

        Raises:
            ValueError: waveform is not (B, samples) or shorter than a frame.
        """
        if self.training:
            masked = mask_spectrogram(self.front_end.fit(self.front_end.filter_bank(waveform)))
            spectrogram = shift_and_disturb(self.front_end.normalise(masked))
        else:
            spectrogram = self.front_end(waveform)
        image = spectrogram.transpose(1, 2).unsqueeze(1)
        weight = self.network.get_parameter("downsample_layers.0.0.weight")
        return self.network(image.to(weight.dtype))

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of scores (B, classes) and targets from 0 to 1 (B, classes)."""
        return F.binary_cross_entropy_with_logits(scores.float(), targets.float())

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random waveforms that fill the frames."""
        samples = int(self.config.sample_rate * (0.01 * (self.config.target_length - 1) + 0.025))
        return (torch.randn(batch, samples),)


VARIANTS: dict[str, UniRepLKNetAudioConfig] = {
    "unireplknet_s_speech_commands": UniRepLKNetAudioConfig(),
}
