"""What modulates a frequency dynamic convolution: factors for its weight, and for the bands of its input.

Chen, Gu, Li, Fu et al.: "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv 2503.18783: kernel
spatial modulation (KSM) is section 3.3, frequency band modulation (FBM) section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.precision import without_autocast
from convatlas.weights import Layout

__all__ = ["Act", "FrequencyBandModulation", "KernelSpatialModulation", "LocalKernelModulation"]

#: Activation of factors: twice a sigmoid, or one and a hyperbolic tangent.
Act = Literal["sigmoid", "tanh"]
#: Side of the grid on which the masks of frequency bands are made, whatever the size of the map.
_MASK_SIDE = 64


# -- kernel spatial modulation -----------------------------------------------------------------------------------------


class _StarReLU(nn.Module):
    """s * relu(x)^2 + b with learned scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.relu().square() + self.bias


def _modulation(logits: Tensor, act: Act, factor: float = 2.0) -> Tensor:
    """Factors around 1: twice a sigmoid, or one and a hyperbolic tangent."""
    return factor * logits.sigmoid() if act == "sigmoid" else 1 + logits.tanh()


class KernelSpatialModulation(nn.Module):
    """Factors for channels, filters, taps and groups of frequencies, from the mean of a sample (KSM, global branch).

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        kernel_num: number of kernels, one for each group of frequencies and each copy.
        reduction: hidden channels over in_channels; there are at least ``min_hidden``.
        min_hidden: see there.
        act: ``sigmoid`` or ``tanh``, of the factors.
        kernel_act: of the factors of the groups: ``sigmoid``, ``tanh`` or ``softmax``.
        temperature, kernel_temperature: what the sigmoids' arguments are divided by; the former is the latter by
            default.
        factor: of the sigmoids.
        only_kernels: leave the factors for channels, filters and taps out.
        kaiming_filters: draw the layer behind the filters' factors as the authors' code does by a slip, instead of near
            zero; a converted layer then differs from the convolution by some percent at first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        kernel_num: int,
        *,
        reduction: float = 0.0625,
        min_hidden: int = 16,
        act: Act = "sigmoid",
        kernel_act: Literal["sigmoid", "tanh", "softmax"] = "sigmoid",
        temperature: float | None = None,
        kernel_temperature: float = 1.0,
        factor: float = 2.0,
        only_kernels: bool = False,
        kaiming_filters: bool = False,
    ) -> None:
        super().__init__()
        if act not in ("sigmoid", "tanh"):
            raise unknown("act", act, ("sigmoid", "tanh"))
        if kernel_act not in ("sigmoid", "tanh", "softmax"):
            raise unknown("kernel_act", kernel_act, ("sigmoid", "tanh", "softmax"))
        hidden = max(int(in_channels * reduction), min_hidden)
        self.act, self.kernel_act, self.factor = act, kernel_act, factor
        self.kernel_temperature = kernel_temperature
        self.temperature = kernel_temperature if temperature is None else temperature
        self.kaiming_filters = kaiming_filters
        self.fc = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.relu = _StarReLU()
        self.channel_fc = None if only_kernels else nn.Conv2d(hidden, in_channels, 1)
        self.filter_fc = None if only_kernels else nn.Conv2d(hidden, out_channels, 1)
        self.spatial_fc = None if only_kernels or kernel_size == 1 else nn.Conv2d(hidden, kernel_size**2, 1)
        self.kernel_fc = nn.Conv2d(hidden, kernel_num, 1)
        self.kernel_size = kernel_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first layer by Kaiming's rule, the others near zero, so that every factor is about one."""
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")
        for layer in (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc):
            if layer is None:
                continue
            if layer is self.filter_fc and self.kaiming_filters:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=1e-6)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, mean: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Factors (B, C), (B, C'), (B, k, k) and (B, n) of means (B, C); each of the first three may be None.

        A batch of one sample is normalised by the running statistics, also in training.
        """
        h = self.fc(mean[:, :, None, None])
        bn = self.bn
        batch_statistics = bn.training and mean.shape[0] > 1
        if batch_statistics:
            h = bn(h)
        else:
            h = F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        h = self.relu(h)

        def factors(layer: nn.Module | None) -> Tensor | None:
            return None if layer is None else _modulation(layer(h) / self.temperature, self.act, self.factor).flatten(1)

        taps = factors(self.spatial_fc)
        spatial = None if taps is None else taps.unflatten(1, (self.kernel_size, self.kernel_size))
        logits = self.kernel_fc(h).flatten(1) / self.kernel_temperature
        if self.kernel_act == "softmax":
            kernels = logits.softmax(1)
        else:
            kernels = _modulation(logits, self.kernel_act) / logits.shape[1]
        return factors(self.channel_fc), factors(self.filter_fc), spatial, kernels


class LocalKernelModulation(nn.Module):
    """A factor for every element of the weight, by a convolution over the channel means (KSM, local branch).

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        act: ``sigmoid`` or ``tanh``.
        factor: of the sigmoid.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, act: Act = "sigmoid", factor: float = 2.0
    ) -> None:
        super().__init__()
        if act not in ("sigmoid", "tanh"):
            raise unknown("local_act", act, ("sigmoid", "tanh"))
        taps = round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1
        self.act, self.factor, self.kernel_size = act, factor, kernel_size
        self.norm = nn.LayerNorm(in_channels)
        self.conv = nn.Conv1d(1, out_channels * kernel_size**2, taps, padding=taps // 2, bias=False)
        nn.init.constant_(self.conv.weight, 1e-6)

    def forward(self, mean: Tensor) -> Tensor:
        """Factors (B, C', C, k, k) of means (B, C)."""
        logits = self.conv(self.norm(mean)[:, None])
        taps = (-1, self.kernel_size, self.kernel_size)
        return _modulation(logits.unflatten(1, taps).movedim(-1, 2), self.act, self.factor)


# -- frequency band modulation -----------------------------------------------------------------------------------------


class FrequencyBandModulation(nn.Module):
    """Cut a map into bands of frequencies and weigh each at every position (FBM).

    With x_k the frequencies of x below 1 / (2 k), the bands are x - x_2, x_2 - x_4, x_4 - x_8 and x_8 for the default.
    Each is multiplied by a factor from a 3x3 convolution of x; the last one is not, unless ``weigh_lowest``.

    Args:
        channels: of the map.
        bands: the k that cut, in rising order.
        weigh_lowest: whether the lowest band is weighed too.
        groups: of channels that have factors of their own.
        act: ``sigmoid`` or ``tanh``.

    Raises:
        ValueError: bands do not rise, or channels are not divisible by groups.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"(^|\.)freq_weight_conv_list\.(\d+)\.", r"\1convs.\2."),))
    }

    def __init__(
        self,
        channels: int,
        *,
        bands: Sequence[int] = (2, 4, 8),
        weigh_lowest: bool = False,
        groups: int = 1,
        act: Act = "sigmoid",
    ) -> None:
        super().__init__()
        if not bands or list(bands) != sorted(set(bands)) or bands[0] < 1:
            raise ValueError(f"bands must be positive and rise, got {tuple(bands)}")
        if groups < 1 or channels % groups:
            raise ValueError(f"channels must be divisible by groups, got {channels} and {groups}")
        if act not in ("sigmoid", "tanh"):
            raise unknown("act", act, ("sigmoid", "tanh"))
        self.bands, self.groups, self.act = tuple(bands), groups, act
        count = len(self.bands) + weigh_lowest
        self.convs = nn.ModuleList(nn.Conv2d(channels, groups, 3, padding=1, groups=groups) for _ in range(count))
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=1e-6)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        factors: list[Tensor | float] = [_modulation(conv(x), self.act) for conv in self.convs]
        if len(factors) == len(self.bands):
            factors.append(1.0)
        # sum_i a_i (x_i - x_{i+1}) + a_last x_last, put in order of the x_i
        y = self._weighed(x, factors[0])
        with without_autocast(x):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            spectrum = torch.fft.rfft2(wide, norm="ortho")
            masks = self._masks(spectrum)
            lows = [torch.fft.irfft2(spectrum * mask, s=x.shape[2:], norm="ortho").to(x.dtype) for mask in masks]
        for low, above, below in zip(lows, factors, factors[1:], strict=False):
            y = y + self._weighed(low, below - above)
        return y

    def _weighed(self, x: Tensor, factor: Tensor | float) -> Tensor:
        if self.groups == 1 or not isinstance(factor, Tensor):
            return x * factor
        return (x.unflatten(1, (self.groups, -1)) * factor[:, :, None]).flatten(1, 2)

    def _masks(self, spectrum: Tensor) -> list[Tensor]:
        """Which frequencies lie below each band, made on one grid and resized as in the authors' code."""
        # Frequencies at an edge count as below it, which float32 cannot express at 1/4 with this margin.
        place = {"dtype": torch.float64, "device": "cpu"}
        rows, columns = torch.fft.fftfreq(_MASK_SIDE, **place).abs(), torch.fft.rfftfreq(_MASK_SIDE, **place)
        frequency = torch.maximum(rows[:, None], columns[None])
        nearest = F.interpolate(frequency[None, None], size=spectrum.shape[2:], mode="nearest")[0, 0]
        return [(nearest < 0.5 / band + 1e-8).to(spectrum.device) for band in self.bands]
