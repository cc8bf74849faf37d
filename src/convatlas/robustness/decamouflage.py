"""Decamouflage: tells pictures that were crafted to become others when they are resized for a network.

Kim, Abuadbba, Gao et al.: "Decamouflage: A Framework to Detect Image-Scaling Attacks on Convolutional Neural Networks",
DSN 2021, arXiv 2010.03735. Three detectors look at one picture and vote: it is compared with itself scaled down and up
again (scaling), with itself after a minimum filter (filtering), and the bright places of its spectrum are counted
(steganalysis). `reconstruct` is the prevention of Quiring et al., "Adversarial Preprocessing", USENIX Security 2020.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import DataError, unknown
from convatlas.files import write_text
from convatlas.ops.colour import rgb_to_gray
from convatlas.ops.image_quality import ssim
from convatlas.ops.rank_filters import maximum_filter, minimum_filter
from convatlas.ops.resize import resize
from convatlas.ops.spectral_points import spectral_mask, spectral_points
from convatlas.robustness.scaling_attack import Bytes, Scaler, from_planes, planes

__all__ = [
    "CSP_THRESHOLD",
    "METRICS",
    "Decamouflage",
    "Detection",
    "Threshold",
    "black_box_threshold",
    "reconstruct",
    "spectrum_threshold",
    "squared_error",
    "white_box_threshold",
]

Direction = Literal["above", "below"]

#: Metric -> on which side of its threshold an attack lies; the threshold itself counts as an attack.
METRICS: dict[str, Direction] = {
    "scaling_mse": "above",
    "scaling_ssim": "below",
    "min_mse": "above",
    "min_ssim": "below",
    "max_mse": "above",
    "max_ssim": "below",
    "csp": "above",
}
#: Bright places of the spectrum that make an attack; one is the centre.
CSP_THRESHOLD = 2.0
_FILTERS = {"min": minimum_filter, "max": maximum_filter}
#: Threshold of the spectrum for pictures of 224 x 224.
_BASE, _BASE_STEP, _HIGHEST_BASE = 230.0, 5.0, 300.0
_SSIM_WINDOW = 11
#: Rows of pictures that are compared at once.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Threshold:
    """Where a metric begins to mean an attack.

    Attributes:
        metric: one of `METRICS`.
        direction: "above": an attack has this value or more; "below": this or less.
        value: the threshold.
        percentile: of benign pictures beyond it, in percent, if it was chosen from those alone.
    """

    metric: str
    direction: Direction
    value: float
    percentile: float | None = None

    def flags(self, score: float) -> bool:
        """Whether a score means an attack."""
        return score >= self.value if self.direction == "above" else score <= self.value


class Detection(NamedTuple):
    """What is said of one picture: the vote, the methods that voted for an attack or against, and all scores."""

    attack: bool
    votes: dict[str, bool]
    scores: dict[str, float]


# -- thresholds --------------------------------------------------------------------------------------------------------


def white_box_threshold(
    benign: npt.ArrayLike, attack: npt.ArrayLike, direction: Direction = "above"
) -> tuple[float, float]:
    """The threshold with the highest accuracy on benign pictures and attacks together, and that accuracy.

    Tried are the middles between neighbouring scores, 1 below the smallest and 1 above the largest; the first best one
    is taken. Scores that are NaN do not count.

    Raises:
        DataError: there are no scores of a kind.
    """
    good, bad = _finite(benign, "benign"), _finite(attack, "attack")
    unique = np.unique(np.concatenate([good, bad]))
    candidates = np.concatenate([[unique[0] - 1], (unique[1:] + unique[:-1]) / 2, [unique[-1] + 1]])
    sign = 1.0 if direction == "above" else -1.0
    # Of sorted scores, how many lie beyond each candidate.
    good, bad, limits = np.sort(sign * good), np.sort(sign * bad), sign * candidates
    right = np.searchsorted(good, limits, "left") + len(bad) - np.searchsorted(bad, limits, "left")
    best = int(right.argmax())
    return float(candidates[best]), float(right[best] / (len(good) + len(bad)))


def black_box_threshold(benign: npt.ArrayLike, percentile: float = 1.0, direction: Direction = "above") -> float:
    """The threshold beyond which a share of benign pictures lies.

    Args:
        benign: scores.
        percentile: that share in percent; the paper takes 1, 2 or 3.
        direction: on which side attacks lie.

    Raises:
        DataError: there are no scores.
        ValueError: the percentile is not between 0 and 100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be from 0 to 100, got {percentile}")
    return float(np.percentile(_finite(benign, "benign"), 100 - percentile if direction == "above" else percentile))


def spectrum_threshold(height: int, width: int, base: float = _BASE) -> float:
    """From which 20 ln|F| on a frequency is bright: base + 20 ln(HW / 224^2), as |F| grows with the pixels."""
    return base + 20 * math.log(height * width / 224**2)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Sum over channels of the mean over pixels of (x - y)^2, in float64; not divided by the channels.

    Args:
        x: (..., C, H, W).
        y: of the same shape.
    """
    total = torch.zeros(x.shape[:-3], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(_ROWS_AT_ONCE, -2), y.split(_ROWS_AT_ONCE, -2), strict=True):
        difference = a.to(torch.float32) - b.to(torch.float32)  # exact for bytes, and so are their squares
        total += difference.square_().sum((-3, -2, -1), dtype=torch.float64)
    return total / (x.shape[-2] * x.shape[-1])


def _finite(scores: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, np.float64).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        raise DataError(f"{name} must hold at least one score that is a number")
    return values


# -- the detectors and their vote --------------------------------------------------------------------------------------


@dataclass
class Decamouflage:
    """Detects attacks on one scaler and one network size.

    Attributes:
        size: height and width that the network sees.
        scaler: that the pictures are resized with.
        methods: metrics that vote, of `METRICS`; one each of scaling, filtering and steganalysis by default.
        filter_size: side of the window of the minimum and maximum, 3 or 2.
        base: of `spectrum_threshold`.
        thresholds: by method; `fit` sets them.
        channels: of the first benign picture of `fit`, to which others are converted, as errors are summed over them.
        benign, attack: the scores that they were chosen from, by metric, so that others can be chosen.
    """

    size: tuple[int, int] = (224, 224)
    scaler: Scaler = Scaler()  # noqa: RUF009
    methods: tuple[str, ...] = ("scaling_mse", "min_ssim", "csp")
    filter_size: int = 3
    base: float = _BASE
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    channels: Literal[1, 3] | None = None
    benign: dict[str, list[float]] = field(default_factory=dict, repr=False)
    attack: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be a positive height and width, got {self.size}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different metrics, got {self.methods}")
        for method in self.methods:
            if method not in METRICS:
                raise unknown("method", method, METRICS)
        if self.filter_size not in (2, 3):
            raise ValueError(f"filter_size must be 2 or 3, got {self.filter_size}")

    def scores(self, x: Tensor, metrics: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Metrics of a batch of pictures.

        Args:
            x: (B, C, H, W) uint8 with 1 or 3 channels, on any device.
            metrics: of `METRICS`; all when left out.

        Returns:
            (B) in float64 for each metric. NaN where it is not defined: SSIM below 11 x 11 pixels, scaling where the
            picture is not larger than the network's size.
        """
        wanted = tuple(METRICS) if metrics is None else tuple(metrics)
        height, width = x.shape[-2:]
        nothing = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
        found: dict[str, Tensor] = {}
        for kind in dict.fromkeys(metric.partition("_")[0] for metric in wanted if metric != "csp"):
            names = [metric for metric in wanted if metric.startswith(f"{kind}_")]
            if kind == "scaling" and height <= self.size[0] and width <= self.size[1]:
                found |= dict.fromkeys(names, nothing)
                continue
            other = self.rescaled(x) if kind == "scaling" else _FILTERS[kind](x, self.filter_size)
            for name in names:
                if name.endswith("_mse"):
                    found[name] = squared_error(x, other)
                elif min(height, width) < _SSIM_WINDOW:
                    found[name] = nothing
                else:
                    found[name] = ssim(x, other, data_range=255, covariance="sample")
        if "csp" in wanted:
            threshold = spectrum_threshold(height, width, self.base)
            found["csp"] = spectral_points(spectral_mask(_gray(x)[:, 0], threshold)).double()
        return {metric: found[metric] for metric in wanted}

    def rescaled(self, x: Tensor) -> Tensor:
        """Pictures (..., H, W) scaled to the network's size and back."""
        return self.scaler.resize(self.scaler.resize(x, self.size), x.shape[-2:])

    def smooth(self, x: Tensor) -> Tensor:
        """Pictures (..., H, W) at the network's size with every pixel weighed, as they are seen from afar."""
        return resize(x, self.size, convention="pillow", interpolation="box")

    def score(self, image: npt.NDArray[Any], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Metrics of one picture (H, W) or (H, W, C) uint8; all of them unless some are named.

        Raises:
            ValueError: it is not uint8, or not of one or three channels.
        """
        x = planes(image)[None]
        if self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        elif self.channels == 1:
            x = _gray(x)
        if x.shape[-2] <= self.size[0] and x.shape[-1] <= self.size[1]:
            logging.getLogger(__name__).warning(
                "an image of %d x %d is not larger than the network's %d x %d: it is not scaled down, and the scaling "
                "detector says nothing",
                *x.shape[-2:],
                *self.size,
            )
        return {metric: float(value[0]) for metric, value in self.scores(x, metrics).items()}

    def calibrate_spectrum_threshold(self, benign: Iterable[npt.NDArray[Any]], share: float = 0.99) -> float:
        """Set ``base`` to the lowest value, in steps of 5 from above, where benign pictures have one bright place.

        Args:
            benign: pictures.
            share: of them that must have at most one.

        Raises:
            DataError: there are no pictures.
        """
        grays = [_gray(planes(image, "benign"))[0] for image in benign]
        if not grays:
            raise DataError("benign must hold at least one image")
        base = _HIGHEST_BASE
        # From above: far below the right value everything is bright and makes one place again.
        while base > 0:
            limits = [spectrum_threshold(gray.shape[0], gray.shape[1], base - _BASE_STEP) for gray in grays]
            counts = [int(spectral_points(spectral_mask(x, limit))) for x, limit in zip(grays, limits, strict=True)]
            if sum(count <= 1 for count in counts) < share * len(grays):
                break
            base -= _BASE_STEP
        self.base = base
        return base

    def fit(
        self,
        benign: Iterable[npt.NDArray[Any]],
        attack: Iterable[npt.NDArray[Any]] | None = None,
        percentile: float = 1.0,
    ) -> Decamouflage:
        """Choose the thresholds: white-box with attacks, else black-box from benign pictures. Steganalysis keeps its 2.

        Args:
            benign: pictures.
            attack: pictures crafted with an algorithm that is known.
            percentile: of benign pictures to be taken for attacks, in percent, where there are no attacks.

        Raises:
            DataError: a method has no score of any picture.
        """
        self.channels = None
        self.benign = _columns([self._first(image) for image in benign])
        self.attack = {} if attack is None else _columns([self.score(image) for image in attack])
        return self.choose(percentile)

    def _first(self, image: npt.NDArray[Any]) -> dict[str, float]:
        if self.channels is None:
            self.channels = 1 if planes(image).shape[0] == 1 else 3
        return self.score(image)

    def choose(self, percentile: float = 1.0) -> Decamouflage:
        """Choose the thresholds again from the scores that `fit` has kept."""
        if not self.benign:
            raise DataError("benign must hold at least one image")
        self.thresholds = {}
        for method in self.methods:
            direction, share = METRICS[method], None
            if method == "csp":
                value = CSP_THRESHOLD
            elif self.attack:
                value, _ = white_box_threshold(self.benign[method], self.attack[method], direction)
            else:
                value, share = black_box_threshold(self.benign[method], percentile, direction), percentile
            self.thresholds[method] = Threshold(method, direction, value, share)
        return self

    def predict(self, image: npt.NDArray[Any]) -> Detection:
        """Whether a picture is an attack: the majority of the methods that have a score.

        Raises:
            DataError: there are no thresholds yet.
            ValueError: the picture is not uint8, or not of one or three channels.
        """
        if not self.thresholds:
            raise DataError("there are no thresholds yet: call fit, or load them")
        return self.vote(self.score(image, self.methods))

    def vote(self, scores: Mapping[str, float]) -> Detection:
        """The majority of the methods on given scores; those without a score abstain, a tie is no attack."""
        votes = {
            name: each.flags(scores[name]) for name, each in self.thresholds.items() if not math.isnan(scores[name])
        }
        return Detection(2 * sum(votes.values()) > len(votes), votes, dict(scores))

    def save(self, path: str | Path) -> Path:
        """Write settings, thresholds and the scores behind them as JSON."""
        held = {
            "size": list(self.size),
            "scaler": asdict(self.scaler),
            "filter_size": self.filter_size,
            "spectrum_base": self.base,
            "channels": self.channels,
            "thresholds": [asdict(threshold) for threshold in self.thresholds.values()],
            "scores": {"benign": self.benign, "attack": self.attack},
        }
        write_text(path, json.dumps(held, indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Decamouflage:
        """Read what `save` wrote.

        Raises:
            DataError: the file was not written by it.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            thresholds = {each["metric"]: Threshold(**each) for each in held["thresholds"]}
            return cls(
                size=tuple(held["size"]),
                scaler=Scaler(**held["scaler"]),
                methods=tuple(thresholds),
                filter_size=held["filter_size"],
                base=held["spectrum_base"],
                channels=held["channels"],
                thresholds=thresholds,
                **held["scores"],
            )
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; it should hold thresholds") from None
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} does not hold thresholds of Decamouflage: {error}") from None


def _gray(x: Tensor) -> Tensor:
    """Pictures (..., C, H, W) of one or three channels as (..., 1, H, W)."""
    return x if x.shape[-3] == 1 else rgb_to_gray(x, "opencv")


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    if not rows:
        raise DataError("benign and attack must hold at least one image each")
    return {metric: [row[metric] for row in rows] for metric in rows[0]}


# -- prevention --------------------------------------------------------------------------------------------------------


def reconstruct(
    image: npt.NDArray[Any],
    size: tuple[int, int],
    scaler: Scaler,
    how: Literal["median", "random"] = "median",
    generator: torch.Generator | None = None,
) -> Bytes:
    """Replace the pixels that a scaler looks at by others around them, so that what was hidden in them is lost.

    The window reaches as far as one step of the scaler in each direction. Scalers that look at every pixel cannot be
    cleaned so: then all pixels are filtered.

    Args:
        image: (H, W) or (H, W, C) uint8.
        size: height and width that it is going to be scaled to.
        scaler: the scaler.
        how: "median" of the window, or a "random" pixel of it.
        generator: of the random choice.

    Raises:
        UnknownName: ``how`` is neither.
        ValueError: the image is not uint8, or not of one or three channels.
    """
    if how not in ("median", "random"):
        raise unknown("how", how, ("median", "random"))
    x = planes(image)
    reach = [math.ceil(length / wanted) for length, wanted in zip(x.shape[1:], size, strict=True)]
    rows, columns = (
        (scaler.matrix(length, wanted) != 0).any(0).nonzero()[:, 0]
        for length, wanted in zip(x.shape[1:], size, strict=True)
    )
    padded = F.pad(x[None].float(), (reach[1], reach[1], reach[0], reach[0]), mode="replicate")[0].to(torch.uint8)
    sides = [2 * each + 1 for each in reach]
    windows = padded.unfold(1, sides[0], 1).unfold(2, sides[1], 1)
    for row in rows:  # one row at a time: the windows of all would take their area times the memory
        around = windows[:, row, columns].flatten(2)
        if how == "median":
            x[:, row, columns] = around.median(2).values
        else:
            choice = torch.randint(around.shape[2], (1, len(columns), 1), generator=generator)
            x[:, row, columns] = around.gather(2, choice.expand(len(x), -1, -1))[..., 0]
    return from_planes(x, np.asarray(image))
