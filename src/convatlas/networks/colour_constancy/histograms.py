"""CCC, FFCC and ECCC: filters on histograms of log-chroma plus a bias make a heat map of the light.

Barron: "Convolutional Color Constancy", ICCV 2015, arXiv 1507.00410. Barron, Tsai: "Fast Fourier Color Constancy", CVPR
2017, arXiv 1611.07596. Afifi, Hu, Liang: "Optimizing Illuminant Estimation in Dual-Exposure HDR Imaging", ECCV 2024,
arXiv 2403.02449 (ECCC).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import NetworkConfig
from convatlas.networks.colour_constancy.description import (
    FeatureConfig,
    FeatureFunction,
    IlluminantNetwork,
    check_feature,
    described_feature,
)
from convatlas.ops.heat_maps import (
    bivariate_von_mises,
    circular_convolution,
    confidence,
    dealias,
    expected_log_chroma,
)
from convatlas.ops.illuminant import gray_world
from convatlas.ops.log_chroma import (
    BOUNDARY,
    check_bins,
    local_gradient,
    log_chroma_histogram,
    log_chroma_to_rgb,
    rgb_to_log_chroma,
    valid_pixels,
    wrapped_log_chroma_histogram,
)
from convatlas.weights import Layout

__all__ = ["CCC", "ECCC", "VARIANTS", "CCCConfig", "ECCCConfig", "HeatMap"]

Frames = Literal["long", "short", "both"]

#: Heights of heat maps before the softmax stay within this.
_MOST = 100.0
#: Darker pixels do not count in the gradients of FFCC.
_LEAST_INTENSITY = 1 / 256


class HeatMap(NamedTuple):
    """What a convolutional network finds, of B images and n bins.

    Attributes:
        rgb: (B, 3), of unit length.
        uv: log-chroma (B, 2).
        heat: probability of each bin (B, n, n).
        response: of the filters to the histograms (B, n, n).
        bias: (B, n, n).
        gate: share of each bias (B, K); None where there is one bias.
        covariance: of the estimate in u and v, (B, 2, 2).
        confidence: from 0 to 1, (B).
    """

    rgb: Tensor
    uv: Tensor
    heat: Tensor
    response: Tensor
    bias: Tensor
    gate: Tensor | None
    covariance: Tensor
    confidence: Tensor


@dataclass(frozen=True, kw_only=True)
class _HistogramConfig(NetworkConfig):
    """Config of a network that takes histograms of log-chroma.

    Attributes:
        form: ``c5``, bins up to a boundary, square roots and an expectation; ``ffcc``, a torus and a von Mises
            distribution.
        bins: of each axis, an even number.
        frames: whose histograms it takes; each frame has one of its colours and one of its gradients.
        boundary: of c5: largest log-chroma.
        bin_size, start: of ffcc: extent of a bin, and log-chroma of the first.
        around: of ffcc: which of the places that are the same on the torus is taken, the one nearest to neutral
            ``gray``, to the ``centre`` of the range, or to the mean colour of the image, ``gray_world``.
        epsilon: of ffcc: least variance of an estimate, in square bins.
        init_std: standard deviation of fresh weights; 0 begins with an even heat map.

    Raises:
        ValueError: a value is out of range.
    """

    form: Literal["c5", "ffcc"] = "c5"
    bins: int = 32
    frames: Frames = "long"
    boundary: float = BOUNDARY
    bin_size: float = 1 / 32
    start: tuple[float, float] = (-1.0, -1.0)
    around: Literal["centre", "gray", "gray_world"] = "centre"
    epsilon: float = 1.0
    init_std: float = 0.0

    def __post_init__(self) -> None:
        check_bins(self.bins)
        for name, value, known in (
            ("form", self.form, ("c5", "ffcc")),
            ("frames", self.frames, get_args(Frames)),
            ("around", self.around, ("centre", "gray", "gray_world")),
        ):
            if value not in known:
                raise unknown(name, str(value), known)
        if self.form == "ffcc" and self.bins & (self.bins - 1):
            raise ValueError(f"bins must be a power of two in the form ffcc, got {self.bins}")
        if self.form == "c5" and self.around != "centre":
            raise ValueError(f"around must be 'centre' in the form c5, which does not wrap, got {self.around!r}")
        for name in ("boundary", "bin_size", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}")

    @property
    def channels(self) -> int:
        """Histograms of a pair."""
        return 4 if self.frames == "both" else 2


@dataclass(frozen=True, kw_only=True)
class CCCConfig(_HistogramConfig):
    """Config of `CCC`. Fields as of `ECCCConfig`, without the feature."""

    def build(self) -> CCC:
        return CCC(self)


@dataclass(frozen=True, kw_only=True)
class ECCCConfig(_HistogramConfig, FeatureConfig):
    """Config of `ECCC`.

    Attributes:
        biases: how many biases the gate mixes.

    Raises:
        ValueError: a value is out of range.
    """

    biases: int = 4

    def __post_init__(self) -> None:
        _HistogramConfig.__post_init__(self)
        FeatureConfig.__post_init__(self)
        if self.biases < 1:
            raise ValueError(f"biases must be at least 1, got {self.biases}")

    def build(self) -> ECCC:
        return ECCC(self)


class _HistogramNetwork(IlluminantNetwork):
    """Histograms, filtered on a torus, plus a bias, as a heat map of the light.

    Args:
        config: what to build.
        count: of the biases.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"emlp and eccc": Layout(((r"^eccc\.", ""), (r"^emlp\..*", "")))}

    def __init__(self, config: Any, count: int) -> None:
        super().__init__()
        self.config = config
        self.filters = nn.Parameter(torch.zeros(config.channels, config.bins, config.bins))
        self.biases = nn.Parameter(torch.zeros(count, config.bins, config.bins))
        if config.init_std:
            for maps in (self.filters, self.biases):
                nn.init.normal_(maps, std=config.init_std)

    @abstractmethod
    def bias(self, feature: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The bias of each image (B or 1, n, n), and the share of each of the biases in it."""

    def histograms(self, long: Tensor, short: Tensor, mask: Tensor | None = None) -> Tensor:
        """Histograms (B, C, n, n) of exposures (B, 3, H, W): of colours and of gradients of each frame in use."""
        frames = {"long": (long,), "short": (short,), "both": (long, short)}[self.config.frames]
        found = []
        for frame in frames:
            counted = mask
            if self.config.form == "ffcc":
                bright = valid_pixels(frame, _LEAST_INTENSITY)
                counted = bright if mask is None else bright & mask
            for image in (frame, local_gradient(frame, counted)):
                if self.config.form == "c5":
                    found.append(log_chroma_histogram(image, self.config.bins, self.config.boundary, mask))
                else:
                    options = (self.config.bins, self.config.bin_size, self.config.start)
                    found.append(wrapped_log_chroma_histogram(image, *options, counted))
        return torch.stack(found, 1)

    def scores(self, histograms: Tensor, feature: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Heat maps before the softmax (B, n, n), response, bias and gate.

        Raises:
            ValueError: the histograms or the feature have another size.
        """
        size = (self.config.channels, self.config.bins, self.config.bins)
        if histograms.dim() != 4 or histograms.shape[1:] != size:
            raise ValueError(f"histograms must be (B, {', '.join(map(str, size))}), got {tuple(histograms.shape)}")
        response = circular_convolution(histograms, self.filters)
        bias, gate = self.bias(feature)
        total = response + bias
        if self.config.form == "c5":
            total = total.clamp(-_MOST, _MOST)
        return total, response, bias.expand_as(response), gate

    def heat_map(self, histograms: Tensor, feature: Tensor | None = None, gray: Tensor | None = None) -> HeatMap:
        """All that the network finds; arguments as of `forward`."""
        total, response, bias, gate = self.scores(histograms, feature)
        heat = total.flatten(1).softmax(1).view_as(total)
        config, bins = self.config, self.config.bins
        found = bivariate_von_mises(heat, config.epsilon)
        if config.form == "c5":
            uv, step = expected_log_chroma(heat, config.boundary), 2 * config.boundary / bins
            # Rows go against v and columns along u.
            covariance = found.covariance.flip(-2, -1) * found.covariance.new_tensor([[1.0, -1.0], [-1.0, 1.0]])
        else:
            step, covariance = config.bin_size, found.covariance
            start = found.mean.new_tensor(config.start)
            if config.around == "centre":
                gray = start + bins / 2 * step
            uv = dealias(start + found.mean * step, bins, step, gray)
        sure = confidence(found.covariance, config.epsilon)
        rgb = log_chroma_to_rgb(uv).to(histograms.dtype)
        return HeatMap(rgb, uv, heat, response, bias, gate, covariance * step**2, sure)

    def _gray(self, long: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Log-chroma of the mean colour (B, 2), for those that take it."""
        return (rgb_to_log_chroma(gray_world(long, mask)),) if self.config.around == "gray_world" else ()

    def _random_histograms(self, batch: int) -> Tensor:
        counts = torch.rand(batch, self.config.channels, self.config.bins, self.config.bins) ** 4
        return F.normalize(counts.flatten(2), dim=2).view_as(counts)

    def _random_gray(self, batch: int) -> tuple[Tensor, ...]:
        return (0.1 * torch.randn(batch, 2),) if self.config.around == "gray_world" else ()


class CCC(_HistogramNetwork):
    """Convolutional colour constancy of one frame with one bias (CCC, and FFCC in its form).

    Args:
        config: what to build.
    """

    def __init__(self, config: CCCConfig) -> None:
        super().__init__(config, 1)

    def bias(self, feature: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The bias (1, n, n)."""
        return self.biases, None

    def describe(
        self, long: Tensor, short: Tensor, mask: Tensor | None = None, ratio: Tensor | float | None = None
    ) -> tuple[Tensor, ...]:
        """Histograms (B, C, n, n), and the mean colour where it is taken."""
        return (self.histograms(long, short, mask), *self._gray(long, mask))

    def forward(self, histograms: Tensor, gray: Tensor | None = None) -> Tensor:
        """Colours of the light (B, 3), of unit length.

        Args:
            histograms: (B, C, n, n).
            gray: log-chroma (B, 2) near which the light is sought on the torus, with ``around`` gray_world.

        Raises:
            ValueError: the histograms have another size.
        """
        return self.heat_map(histograms, None, gray).rgb

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random histograms."""
        return (self._random_histograms(batch), *self._random_gray(batch))


class ECCC(_HistogramNetwork):
    """Convolutional colour constancy whose bias is a mixture that the dual-exposure feature decides on.

    Args:
        config: what to build.
        function: a feature of one's own, of ``config.feature_channels`` numbers.
    """

    def __init__(self, config: ECCCConfig, function: FeatureFunction | None = None) -> None:
        super().__init__(config, config.biases)
        self.function = function
        self.gate = nn.Linear(config.size, config.biases)

    def bias(self, feature: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Biases (B, n, n) and their shares (B, K), softmax(A feature + c).

        Raises:
            ValueError: the feature is missing or has another size.
        """
        if feature is None:
            raise ValueError(f"feature must be (B, {self.config.size}), got None")
        check_feature(self.config, feature)
        gate = self.gate(feature).softmax(1)
        return (gate.to(self.biases.dtype) @ self.biases.flatten(1)).unflatten(1, self.biases.shape[1:]), gate

    def describe(
        self, long: Tensor, short: Tensor, mask: Tensor | None = None, ratio: Tensor | float | None = None
    ) -> tuple[Tensor, ...]:
        """Histograms (B, C, n, n), the feature (B, d), and the mean colour where it is taken."""
        feature = described_feature(self.config, self.function, long, short, mask, ratio)
        return (self.histograms(long, short, mask), feature, *self._gray(long, mask))

    def forward(self, histograms: Tensor, feature: Tensor, gray: Tensor | None = None) -> Tensor:
        """Colours of the light (B, 3), of unit length.

        Args:
            histograms: (B, C, n, n).
            feature: (B, d).
            gray: log-chroma (B, 2) near which the light is sought on the torus, with ``around`` gray_world.

        Raises:
            ValueError: the histograms or the feature have another size.
        """
        return self.heat_map(histograms, feature, gray).rgb

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random histograms and a random feature."""
        feature = 0.1 * torch.randn(batch, self.config.size)
        return (self._random_histograms(batch), feature, *self._random_gray(batch))


VARIANTS: dict[str, NetworkConfig] = {
    "eccc": ECCCConfig(),
    "eccc_64": ECCCConfig(bins=64),
    "eccc_short": ECCCConfig(frames="short"),
    "eccc_both": ECCCConfig(frames="both"),
    "eccc_ffcc": ECCCConfig(form="ffcc", bins=64),
    "ccc": CCCConfig(),
    "ccc_64": CCCConfig(bins=64),
    "ffcc": CCCConfig(form="ffcc", bins=64),
}
