"""Detectors of camouflaged images beside SciPy and scikit-image, and the attack beside a general quadratic solver."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.ndimage import correlate1d, label, median_filter, minimum_filter
from scipy.optimize import minimize
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.ops.rank_filters import minimum_filter as our_minimum
from convatlas.ops.spectral_points import spectral_mask, spectral_points
from convatlas.report import Cell, Report, Section, Table
from convatlas.robustness.decamouflage import METRICS, Decamouflage
from convatlas.robustness.scaling_attack import Scaler, least_change
from convatlas.training.measure import peak_bytes

__all__ = ["run"]

# The smallest ratio that counts, fixed before anything was measured.
BARS = [
    Bar(
        statement="All columns together are solved at least 50 times as fast as one after the other by SLSQP",
        published="no figure; the authors' code solves one programme a column",
        theirs="SciPy, SLSQP",
        at_least=50.0,
        what="quadratic programmes",
    ),
    Bar(
        statement="Bright places of a spectrum are counted at least 1.5 times as fast as by SciPy",
        published="milliseconds an image for each detector",
        theirs="SciPy",
        at_least=1.5,
        what="steganalysis",
    ),
    Bar(
        statement="The minimum filter is at least 1.5 times as fast as SciPy's",
        published="milliseconds an image for each detector",
        theirs="SciPy",
        at_least=1.5,
        what="minimum filter",
    ),
]

#: Height and width of the images.
SIZES = ((224, 224), (600, 800))
#: Length, size and number of the columns.
COLUMNS = ((56, 14, 16), (96, 24, 16))
SPECTRUM = 230.0
#: Images of which each detector's time and memory are told, the side of the network, and how often it is measured.
WHOLE, NETWORK, REPEATS = ((224, 224), (600, 800), (2160, 3840)), 224, 5


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory: the programmes of the attack, and the detectors.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the smaller size of each.
    """
    cases = [
        Case(f"{count} columns, {length} to {size}, {name}", "quadratic programmes", make, tolerance=1e-3)
        for length, size, count in (COLUMNS[:1] if quick else COLUMNS)
        for name in ("linear", "cubic")
        for make in [partial(_programmes, length, size, count, name)]
    ]
    for height, width in SIZES[:1] if quick else SIZES:
        image = f"{height} x {width}"
        cases += [
            Case(f"{image}, grey", "steganalysis", partial(_steganalysis, height, width)),
            Case(f"3 x {image}", "minimum filter", partial(_minimum, height, width)),
            Case(f"3 x {image}", "scaling", partial(_scaling, height, width)),
        ]
    made = report("decamouflage", compare(cases, threads=threads, quick=quick), BARS, quick=quick)
    bars, *others = made.sections
    single = Section("One image", [_one_image(WHOLE[:2] if quick else WHOLE)])
    return dataclasses.replace(made, sections=[bars, single, *others])


def _one_image(sizes: Sequence[tuple[int, int]]) -> Table:
    """Time and memory of each detector, and of the vote."""
    rows: list[list[Cell]] = []
    for height, width in sizes:
        side = NETWORK if min(height, width) > NETWORK else NETWORK // 4
        detector = Decamouflage((side, side))
        x = _picture(1, 3, height, width)
        for name, metrics in {**{metric: (metric,) for metric in METRICS}, "vote": detector.methods}.items():
            call = partial(detector.scores, x, metrics)
            peak = peak_bytes(call) / 2**20
            rows.append([f"{height} x {width} to {side}", name, 1000 * _processor_seconds(call), peak])
    caption = (
        f"Median of {REPEATS} calls by processor time, RGB. Peak: most that was taken during a call beside the image. "
        f"The vote is that of {', '.join(Decamouflage().methods)}."
    )
    return Table("Each detector", ["size", "metric", "time [ms]", "peak [MiB]"], rows, caption)


def _processor_seconds(call: Call) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _programmes(length: int, size: int, count: int, name: str, device: torch.device) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(60, 190, (length, count), generator=generator).double().to(device)
    target = torch.randint(60, 190, (size, count), generator=generator).double().to(device)
    matrix = Scaler.of("cv2", name).matrix(length, size).to(device)
    return {
        "least_change": forward(least_change, x, matrix, target, 1.0),
        "SciPy, SLSQP": partial(_one_by_one, x.cpu(), matrix.cpu(), target.cpu()),
    }


def _one_by_one(x: Tensor, matrix: Tensor, target: Tensor) -> Tensor:
    mapping, changes = matrix.numpy(), []
    for column, goal in zip(x.T.numpy(), target.T.numpy(), strict=True):
        missing = goal - mapping @ column
        limits: list[dict[str, Any]] = [
            {"type": "ineq", "fun": lambda d, m=missing: 1 - m + mapping @ d, "jac": lambda d: mapping},
            {"type": "ineq", "fun": lambda d, m=missing: 1 + m - mapping @ d, "jac": lambda d: -mapping},
        ]
        found = minimize(
            lambda d: (d @ d) / 2,
            np.zeros_like(column),
            jac=lambda d: d,
            bounds=np.stack([-column, 255 - column], 1),
            constraints=limits,
            method="SLSQP",
            options={"ftol": 1e-9, "maxiter": 1000},
        )
        changes.append(torch.from_numpy(found.x))
    return torch.stack(changes, 1)


def _picture(*shape: int) -> Tensor:
    """Smooth noise, whose spectrum falls off as that of a photograph."""
    rough = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(-1).cumsum(-2)
    low, high = rough.amin((-2, -1), keepdim=True), rough.amax((-2, -1), keepdim=True)
    return ((rough - low) / (high - low) * 255).to(torch.uint8)


def _steganalysis(height: int, width: int, device: torch.device) -> dict[str, Call]:
    gray = _picture(height, width).to(device)
    return {
        "spectral_points": forward(lambda x: spectral_points(spectral_mask(x, SPECTRUM)), gray),
        "SciPy": partial(_scipy_points, gray.cpu().numpy()),
    }


def _scipy_points(gray: Any) -> Tensor:
    """As an OpenCV script would be written without it; the blur in real numbers, cut where it rounds to 1."""
    spectrum = 20 * np.log(np.abs(np.fft.fftshift(np.fft.fft2(gray))) + 1e-12)
    mask = median_filter(np.where(spectrum.round() > SPECTRUM, 255, 0).astype(np.uint8), 3, mode="nearest")
    distance = np.arange(-10, 11)
    weights = np.exp(-0.5 * (distance / 3.5) ** 2)
    weights /= weights.sum()
    blurred = mask.astype(np.float32)
    for axis in (0, 1):
        blurred = correlate1d(blurred, weights, axis, mode="mirror")
    bright = np.pad(blurred >= 0.5, 1)
    return torch.tensor(label(bright, np.ones((3, 3)))[1] + label(~bright)[1] - 1)


def _minimum(height: int, width: int, device: torch.device) -> dict[str, Call]:
    x = _picture(3, height, width).to(device)
    pixels = x.cpu().numpy()
    return {
        "minimum_filter": forward(our_minimum, x, 3),
        "SciPy": lambda: torch.from_numpy(minimum_filter(pixels, (1, 3, 3), mode="nearest")),
    }


def _scaling(height: int, width: int, device: torch.device) -> dict[str, Call]:
    from skimage import metrics

    structural: Any = metrics.structural_similarity
    side = math.isqrt(height * width) // 4
    detector = Decamouflage((side, side))
    x = _picture(1, 3, height, width).to(device)

    def theirs() -> Tensor:
        first, second = (each[0].permute(1, 2, 0).cpu().numpy() for each in (x, detector.rescaled(x)))
        error = ((first.astype(float) - second) ** 2).sum() / (height * width)
        options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "data_range": 255}
        return torch.tensor([error, structural(first, second, **options)])

    def ours() -> Tensor:
        return torch.cat(list(detector.scores(x, ("scaling_mse", "scaling_ssim")).values()))

    return {"scores": forward(ours), "scikit-image": theirs}
