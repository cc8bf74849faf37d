"""Are images that were crafted to change when they are resized told from others, without knowing the attack?

Kim, Abuadbba, Gao et al.: "Decamouflage", DSN 2021, arXiv 2010.03735.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from skimage import data as photographs

from convatlas.data.images import ImageSet, read_images
from convatlas.experiments.small_training import finished, one_thread, progress
from convatlas.report import Cell, Claim, Images, Report, Section, Table
from convatlas.robustness.decamouflage import Decamouflage, Detection, reconstruct
from convatlas.robustness.detection_quality import detection_sections, error_rates
from convatlas.robustness.scaling_attack import Scaler, ScalingAttack, planes

__all__ = ["full", "quick", "run"]

Bytes = npt.NDArray[np.uint8]

# Thresholds, fixed before anything was measured.

#: Accuracy of the vote; the paper has 99.8 %.
ACCURACY = 0.95
#: By how much the vote may be worse than the best method alone.
LOSS = 0.0
#: Largest distance of a scaled attack from its target: twice eps of 1, and rounding.
DISTANCE = 3.0
FULL_ACCURACY = 0.99

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
SIDE, SMALL = 240, 48
CALIBRATION, ATTACKS, SEEDS = 24, 12, (0, 1, 2)
PERCENTILE = 1.0
ALGORITHMS = ("linear", "cubic")
RATIOS = (2, 3, 4, 6, 8)

FULL_SIZE, FULL_COUNT = (224, 224), 1000


class _Measured(NamedTuple):
    """One seed: what was found of benign images and of attacks, and the largest distance of an attack."""

    benign: list[tuple[str, Detection]]
    attack: list[tuple[str, Detection]]
    distance: float
    seconds: float
    detector: Decamouflage


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" crops scikit-image's photographs; "full" takes a folder of photographs such as Caltech-256.
        data: for "full": images of more than 224 x 224 pixels.
        folder: not needed.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None:
        raise ValueError("budget 'full' needs data, got None")
    return full(data)


def quick() -> Report:
    """Thresholds from benign crops alone, then unseen crops and attacks on them; ratios; the prevention."""
    sections = []
    with progress(len(ALGORITHMS) * len(SEEDS) + 2) as advance, one_thread():
        for algorithm in ALGORITHMS:
            scaler, measured = Scaler.of("cv2", algorithm), []
            for seed in SEEDS:
                measured.append(_measured(scaler, seed))
                advance(f"{algorithm}, seed {seed}")
            sections.append(_section(algorithm, measured))
        sections.append(_ratios())
        advance("ratios")
        sections.append(_prevention())
        advance("prevention")
    return finished("Decamouflage: quick test of its claims", sections)


def _photograph(name: str) -> Bytes:
    image: Bytes = getattr(photographs, name)()
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)


def _crop(image: Bytes, side: int, random: np.random.Generator) -> Bytes:
    row, column = (int(random.integers(0, length - side + 1)) for length in image.shape[:2])
    return image[row : row + side, column : column + side]


def _crops(count: int, side: int, random: np.random.Generator, first: int = 0) -> list[Bytes]:
    return [_crop(_photograph(PHOTOGRAPHS[(first + i) % len(PHOTOGRAPHS)]), side, random) for i in range(count)]


def _targets(count: int, side: int, random: np.random.Generator) -> list[Bytes]:
    """Small pictures of other photographs than those that hide them: large crops, scaled down smoothly."""
    whole = _crops(count, min(4 * side, SIDE), random, first=1)
    return [Scaler.of("pil", "linear").resize(planes(crop), (side, side)).permute(1, 2, 0).numpy() for crop in whole]


def _measured(scaler: Scaler, seed: int) -> _Measured:
    random = np.random.default_rng(seed)
    detector, known = Decamouflage((SMALL, SMALL), scaler), _crops(CALIBRATION, SIDE, random)
    detector.calibrate_spectrum_threshold(known)
    detector.fit(known, percentile=PERCENTILE)
    sources, targets = _crops(ATTACKS, SIDE, random), _targets(ATTACKS, SMALL, random)
    attacks = [ScalingAttack(scaler).generate(*pair) for pair in zip(sources, targets, strict=True)]
    distance = max(_distance(scaler, attack, target) for attack, target in zip(attacks, targets, strict=True))
    start = time.perf_counter()
    benign, attack = _found(detector, sources), _found(detector, attacks)
    seconds = (time.perf_counter() - start) / (2 * ATTACKS)
    return _Measured(benign, attack, distance, seconds, detector)


def _distance(scaler: Scaler, image: Bytes, target: Bytes) -> float:
    scaled = scaler.resize(planes(image), target.shape[:2])
    return float((scaled.int() - planes(target).int()).abs().max())


def _found(detector: Decamouflage, images: Iterable[Bytes]) -> list[tuple[str, Detection]]:
    return [(str(row), detector.predict(image)) for row, image in enumerate(images)]


def _accuracy(measured: _Measured, method: str | None = None) -> float:
    """Of the vote, or of one method."""
    benign, attack = (
        [found.attack if method is None else found.votes[method] for _, found in rows]
        for rows in (measured.benign, measured.attack)
    )
    return error_rates(benign, attack)["accuracy"]


def _section(algorithm: str, measured: list[_Measured]) -> Section:
    votes = [_accuracy(each) for each in measured]
    gains = [
        vote - max(_accuracy(each, method) for method in each.detector.methods)
        for vote, each in zip(votes, measured, strict=True)
    ]
    claims = [
        Claim.judge(
            f"Thresholds from benign images alone tell attacks on {algorithm} scaling",
            published="99.8 % (black-box, 2,000 images of Caltech-256)",
            statistic=f"accuracy of the vote on {ATTACKS} unseen benign crops and {ATTACKS} attacks",
            value=votes,
            at_least=ACCURACY,
            seeds=len(measured),
        ),
        Claim.judge(
            f"The vote is no worse than the best method alone, {algorithm}",
            published="the ensemble is the best",
            statistic="accuracy of the vote less that of the best method",
            value=gains,
            at_least=0.0 - LOSS,
            seeds=len(measured),
        ),
        Claim.judge(
            f"The attack hits its target, {algorithm}",
            published="within eps of each of the two programmes",
            statistic="largest distance of a scaled attack from its target, in grey levels",
            value=[each.distance for each in measured],
            at_most=DISTANCE,
            seeds=len(measured),
        ),
    ]
    first = measured[0]
    tables = detection_sections(first.detector, {"benign": first.benign, "attack": first.attack})[0].parts
    seconds = sum(each.seconds for each in measured) / len(measured)
    time_table = Table("Time", ["what", "per image [ms]"], [["three detectors and the vote", 1000 * seconds]])
    return Section(f"Attacks on {algorithm} scaling, OpenCV's convention", [*claims, *tables, time_table])


def _ratios() -> Section:
    """Scores against the ratio of the sizes: the fewer pixels a scaler leaves out, the more an attack must change."""
    random = np.random.default_rng(0)
    source = _crops(1, SIDE, random)[0]
    rows: list[list[Cell]] = []
    for algorithm in ALGORITHMS:
        scaler = Scaler.of("cv2", algorithm)
        for ratio in RATIOS:
            side = SIDE // ratio
            attack = ScalingAttack(scaler, eps=(1.0, 4.0, 16.0, 64.0)).generate(source, _targets(1, side, random)[0])
            detector = Decamouflage((side, side), scaler)
            scores = [detector.score(image, detector.methods) for image in (source, attack)]
            change = float(np.abs(attack.astype(float) - source).mean())
            rows.append([algorithm, ratio, change, *(score[name] for name in detector.methods for score in scores)])
    names = [f"{name}, {kind}" for name in Decamouflage().methods for kind in ("benign", "attack")]
    return Section("Ratio of the sizes", [Table("Scores", ["scaling", "ratio", "mean change", *names], rows)])


def _prevention() -> Section:
    """What is left of an attack when the pixels that the scaler looks at are replaced."""
    random, scaler, size = np.random.default_rng(1), Scaler(), (SMALL, SMALL)
    source, target = _crops(1, SIDE, random)[0], _targets(1, SMALL, random)[0]
    attack = ScalingAttack(scaler).generate(source, target)
    images: dict[str, Bytes] = {"as it is": attack}
    images["median"] = reconstruct(attack, size, scaler)
    images["random"] = reconstruct(attack, size, scaler, "random", torch.Generator().manual_seed(0))
    rows: list[list[Cell]] = []
    shown: list[tuple[Bytes, str]] = [(source, "source"), (attack, "attack")]
    for name, image in images.items():
        scaled = scaler.resize(planes(image), size).double()
        away = [float((scaled - other).abs().mean()) for other in (planes(target), scaler.resize(planes(source), size))]
        rows.append([name, *away])
        shown.append((scaled.to(torch.uint8).permute(1, 2, 0).numpy(), f"scaled, {name}"))
    columns = ["attack", "distance from the target", "distance from the scaled source"]
    return Section("Prevention", [Table("Mean distances in grey levels", columns, rows), Images("Pictures", shown)])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path) -> Report:
    """Calibrate on up to 1,000 photographs, attack up to 1,000 others with the photographs after them as targets."""
    images = next(iter(read_images(data, channels=3, labelled=False).values()))
    order = np.random.default_rng(0).permutation(len(images))
    scaler = Scaler.of("cv2", "linear")
    half = min(len(order) // 2, FULL_COUNT)
    detector = Decamouflage(FULL_SIZE, scaler)
    with progress(1 + half) as advance:
        detector.fit((image for image in _large(images, order[:half])), percentile=PERCENTILE)
        advance("calibrated")
        benign: list[tuple[str, Detection]] = []
        attack: list[tuple[str, Detection]] = []
        previous: Bytes | None = None
        for image in _large(images, order[half : 2 * half]):
            if previous is not None:
                target = Scaler.of("pil", "linear").resize(planes(previous), FULL_SIZE).permute(1, 2, 0).numpy()
                crafted = ScalingAttack(scaler, eps=(1.0, 4.0, 16.0)).generate(image, target)
                benign += _found(detector, [image])
                attack += _found(detector, [crafted])
            previous = image
            advance("attacking")
    found = _Measured(benign, attack, 0.0, 0.0, detector)
    claim = Claim.judge(
        "Thresholds from benign images alone tell attacks on linear scaling",
        published="99.8 % on 2,000 images of Caltech-256",
        statistic="accuracy of the vote on unseen images and attacks on them",
        value=_accuracy(found),
        at_least=FULL_ACCURACY,
        seeds=0,
    )
    tables = detection_sections(detector, {"benign": benign, "attack": attack})
    return finished("Decamouflage: full test of its claims", [Section("Claim", [claim]), *tables])


def _large(images: ImageSet, rows: npt.NDArray[Any]) -> Iterable[Bytes]:
    """Images that are larger than the network's size."""
    for row in rows:
        image = images.image(int(row))
        if image.shape[0] > FULL_SIZE[0] and image.shape[1] > FULL_SIZE[1]:
            yield image
