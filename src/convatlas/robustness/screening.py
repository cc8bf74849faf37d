"""Images that look camouflaged, found before a task uses them: left out, or used and told.

Tasks that read images have the setting ``camouflage``, a `Screening`; each verb looks with a new `Screen`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from convatlas.data.image_pairs import Entry, Pairs, Sample
from convatlas.data.images import ImageSet, Skipped, Unreadable
from convatlas.errors import DataError, unknown
from convatlas.report import Images, Report, Section, Table, printable
from convatlas.robustness.decamouflage import Decamouflage
from convatlas.robustness.scaling_attack import Bytes, planes
from convatlas.training.progress import progress

__all__ = ["ALARM", "MOST_PICTURES", "Screen", "Screening", "revealed", "revealed_pictures"]

#: What ``convatlas predict`` ends with where images look camouflaged.
ALARM = 3
#: Pictures that a report shows.
MOST_PICTURES = 8
_MOST_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Screening:
    """What a task does about images that look crafted to become others when they are resized.

    Attributes:
        thresholds: file of Decamouflage's, as the task ``camouflage`` writes it; without one nothing is looked for.
        action: ``refuse`` leaves such images out and lists them with the unreadable ones, ``flag`` uses and lists them.
    """

    thresholds: str | None = None
    action: Literal["refuse", "flag"] = "refuse"

    def __post_init__(self) -> None:
        if self.action not in ("refuse", "flag"):
            raise unknown("action", self.action, ("refuse", "flag"))


@dataclass(eq=False)
class Screen:
    """Looks through the images of one verb of a task, and keeps what it found.

    Attributes:
        settings: of the task.
        found: what speaks against the images that look camouflaged, by their names.
        pictures: the first of them as they are seen beside what a network gets, with their names.
    """

    settings: Screening = Screening()
    found: dict[str, str] = field(default_factory=dict)
    pictures: list[tuple[Bytes, str]] = field(default_factory=list)

    @cached_property
    def detector(self) -> Decamouflage | None:
        """The detector, if it is wanted.

        Raises:
            DataError: the thresholds cannot be read.
        """
        return None if self.settings.thresholds is None else Decamouflage.load(self.settings.thresholds)

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return ALARM if self.found else 0

    def check(self, name: str, pixels: npt.NDArray[Any]) -> None:
        """Look at one image (H, W, C), uint8, uint16 or float in [0, 1].

        Images that are not larger than the detector's size on either axis hide nothing and are not looked at.

        Raises:
            Unreadable: it looks camouflaged and is refused.
            DataError: it is neither grey nor RGB, or the thresholds cannot be read.
        """
        detector = self.detector
        if detector is None or not any(np.array(pixels.shape[:2]) > detector.size):
            return
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise DataError(f"camouflage is looked for in grey and RGB images, but {name} has the shape {pixels.shape}")
        image = _as_bytes(pixels)
        detection = detector.predict(image)
        if not detection.attack:
            return
        scores = (f"{method} {detection.scores[method]:.4g}" for method, vote in detection.votes.items() if vote)
        reason = f"looks camouflaged: {', '.join(scores)}"
        if name not in self.found and len(self.pictures) < MOST_PICTURES:
            self.pictures.append((revealed(detector, image), name))
        self.found[name] = reason
        if self.settings.action == "refuse":
            raise Unreadable(name, reason)

    def sets(self, sets: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
        """Sets of images; the refused ones are listed in ``skipped``.

        Raises:
            DataError: all images of a set are refused, or as of `check`.
        """
        if self.detector is None:
            return dict(sets)
        with progress("looking for camouflage", sum(map(len, sets.values()))) as advance:
            return {name: self._set(images, advance) for name, images in sets.items()}

    def _set(self, images: ImageSet, advance: Any) -> ImageSet:
        kept: list[int] = []
        refused: list[Skipped] = []
        for row, name in enumerate(images.names):
            try:
                pixels = images.image(row)
            except Unreadable:  # whoever needs it leaves it out
                kept.append(row)
                continue
            finally:
                advance()
            try:
                self.check(name, pixels)
                kept.append(row)
            except Unreadable as error:
                refused.append(Skipped(name, error.reason))
        if refused and not kept:
            raise DataError(f"all {len(refused)} images look camouflaged; first: {refused[0].path}")
        return dataclasses.replace(images.subset(kept), skipped=(*images.skipped, *refused))

    def pairs(self, sets: Mapping[str, Pairs]) -> dict[str, Pairs]:
        """Sets of images that are looked at when they are read; frames of clips are not."""
        if self.detector is None:
            return dict(sets)
        return {name: Pairs(tuple(map(self._entry, pairs.entries)), pairs.skipped) for name, pairs in sets.items()}

    def _entry(self, entry: Entry) -> Entry:
        def read() -> Sample:
            sample = entry.read()
            for image in (*sample.high, *(sample.low or ())):
                self.check(entry.name, image)
            return sample

        return entry if entry.clip else dataclasses.replace(entry, read=read)

    def noted(self, report: Report) -> Report:
        """A report with what was found, as it stands and in pictures; also told as a warning where it is used."""
        if not self.found:
            return report
        count = len(self.found)
        what = f"{'1 image looks' if count == 1 else f'{count} images look'} camouflaged"
        done = "left out" if self.settings.action == "refuse" else "used all the same"
        if self.settings.action == "flag":
            some = "; ".join(printable(f"{name}: {reason}") for name, reason in list(self.found.items())[:3])
            logging.getLogger(__name__).warning("%s, %s: %s", what, done, some)
        rows = [[name, reason] for name, reason in sorted(self.found.items())[:_MOST_ROWS]]
        table = Table(what, ["image", "reason"], rows, f"The first {_MOST_ROWS}." if count > _MOST_ROWS else "")
        section = Section("Camouflaged images", [table, revealed_pictures(self.pictures)])
        summary = f"{report.summary} {what} and {'was' if count == 1 else 'were'} {done}."
        return dataclasses.replace(report, summary=summary, sections=[*report.sections, section])


def _as_bytes(pixels: npt.NDArray[Any]) -> Bytes:
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        return (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def revealed(detector: Decamouflage, image: Bytes) -> Bytes:
    """An image (H, W, C) as it is seen from afar, and beside it what the network gets: (h, 2 w + 4, 3)."""
    x = planes(image)
    seen = detector.smooth(x), detector.scaler.resize(x, detector.size)
    left, right = (each.expand(3, -1, -1).permute(1, 2, 0).numpy() for each in seen)
    return np.concatenate([left, np.full((len(left), 4, 3), 255, np.uint8), right], axis=1)


def revealed_pictures(pictures: Iterable[tuple[Bytes, str]]) -> Images:
    """The part of a report that shows pictures made by `revealed`, each with its name."""
    return Images(
        "What hides in them", list(pictures), "Left: the image, shrunk smoothly. Right: what the network gets."
    )
