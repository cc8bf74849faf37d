"""Simulated seasons of winter wheat as Sentinel-2 sees it: healthy, with yellow rust, or short of nitrogen.

The real series of Shi et al., arXiv 2306.17207, are not public. Leaf area follows a double logistic curve,
chlorophyll a plateau; the stresses act on both, and a simple empirical canopy turns them into reflectances.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from convatlas.data.series import SeriesSet

__all__ = ["CLASSES", "WheatSeasons", "simulate_wheat_season"]

Floats = npt.NDArray[np.float64]

CLASSES = ("healthy", "nitrogen deficiency", "yellow rust")
_BANDS = ("B3", "B4", "B5", "B8")


class WheatSeasons(NamedTuple):
    """What `simulate_wheat_season` gives.

    Attributes:
        series: the observations.
        onset: day on which the rust begins, NaN for other pixels, (N,).
    """

    series: SeriesSet
    onset: Floats


def simulate_wheat_season(
    n: int = 600, seed: int = 0, *, fields: int = 30, cloud: float = 0.3, field_effect: float = 1.0
) -> WheatSeasons:
    """Seasons of pixels, as many of each class, in fields of one class each.

    Args:
        n: number of pixels.
        seed: of everything random.
        fields: number of fields, at least one a class.
        cloud: probability that an observation lies under clouds and is missing.
        field_effect: size of what the pixels of a field have in common: time of growth, density, soil, calibration.

    Raises:
        ValueError: a value is out of range.
    """
    if fields < len(CLASSES) or n < fields:
        raise ValueError(f"there must be at least {len(CLASSES)} fields and a pixel in each, got {fields} and {n}")
    if not 0 <= cloud < 1 or field_effect < 0:
        raise ValueError(f"cloud must be in [0, 1) and field_effect not negative, got {cloud} and {field_effect}")
    random = np.random.default_rng(seed)
    plots = [_Field(random, field_effect) for _ in range(fields)]
    names, field_names, labels, days, values, onsets = [], [], [], [], [], []
    for pixel in range(n):
        field = pixel % fields
        label = field % len(CLASSES)
        onset = float(random.uniform(110, 150)) if CLASSES[label] == "yellow rust" else np.nan
        observed = _observed_days(random, cloud)
        names.append(f"pixel {pixel}")
        field_names.append(f"field {field}")
        labels.append(label)
        days.append(observed)
        values.append(plots[field].reflectance(random, label, onset, observed))
        onsets.append(onset)
    series = SeriesSet(
        tuple(names), tuple(field_names), CLASSES, np.array(labels, np.int64), _BANDS, tuple(days), tuple(values)
    )
    return WheatSeasons(series, np.array(onsets))


def _observed_days(random: np.random.Generator, cloud: float) -> Floats:
    end, every = random.uniform(200, 250), random.integers(5, 11)
    days = np.arange(random.uniform(0, every), end, every)
    clear = random.random(len(days)) >= cloud
    clear[[0, len(days) // 2, -1]] = True
    return np.round(days[clear])


class _Field:
    """What the pixels of a field share."""

    def __init__(self, random: np.random.Generator, effect: float) -> None:
        self.shift = effect * random.normal(0, 6)
        self.density = 1 + effect * random.normal(0, 0.06)
        self.soil = effect * random.normal(0, 0.01)
        self.calibration = 1 + effect * random.normal(0, 0.02, len(_BANDS))
        self.rise, self.fall = random.uniform(0.07, 0.10), random.uniform(0.10, 0.14)

    def reflectance(self, random: np.random.Generator, label: int, onset: float, days: Floats) -> Floats:
        """Reflectances (days, bands) of one pixel."""
        leaves, chlorophyll = self._healthy(random, days)
        if CLASSES[label] == "nitrogen deficiency":
            leaves, chlorophyll = leaves * random.uniform(0.6, 0.85), chlorophyll * random.uniform(0.6, 0.8)
        elif CLASSES[label] == "yellow rust":
            leaves, chlorophyll = _rust(random, leaves, chlorophyll, days - onset)
        pale = 1 - np.clip(chlorophyll, 0, 60) / 60
        bands = np.stack(
            [
                0.05 + 0.08 * np.exp(-0.5 * leaves) + 0.05 * pale,
                0.03 + (0.12 + self.soil) * np.exp(-0.6 * leaves) + 0.04 * pale,
                0.08 + (0.10 + self.soil) * np.exp(-0.4 * leaves) + 0.09 * pale,
                0.22 + 0.30 * (1 - np.exp(-0.55 * leaves)),
            ],
            1,
        )
        noise = random.normal(0, random.uniform(0.005, 0.01), bands.shape)
        return np.clip(bands * self.calibration + noise, 0.001, 1.0)

    def _healthy(self, random: np.random.Generator, days: Floats) -> tuple[Floats, Floats]:
        """Leaf area index, and leaf chlorophyll in micrograms per square centimetre."""
        greening, ripening = random.normal(80, 8) + self.shift, random.normal(190, 8) + self.shift
        grown = 1 / (1 + np.exp(-self.rise * (days - greening))) - 1 / (1 + np.exp(-self.fall * (days - ripening)))
        leaves = random.uniform(4, 6) * self.density * np.clip(grown, 0, None)
        chlorophyll = random.uniform(45, 55) * (1 - 0.7 / (1 + np.exp(-self.fall * (days - ripening))))
        return leaves, chlorophyll


def _rust(random: np.random.Generator, leaves: Floats, chlorophyll: Floats, since: Floats) -> tuple[Floats, Floats]:
    """Chlorophyll and leaves are lost along a logistic curve after the onset, in waves of two to three weeks."""
    spread = 1 / (1 + np.exp(-0.15 * (since - 20))) * (since > 0)
    waves = np.sin(2 * np.pi * since / random.uniform(14, 21) + random.uniform(0, 2 * np.pi)) * spread
    chlorophyll = chlorophyll * (1 - random.uniform(0.3, 0.6) * spread + 0.10 * waves)
    return leaves * (1 - random.uniform(0.1, 0.4) * spread + 0.05 * waves), chlorophyll
