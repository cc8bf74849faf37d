"""The camouflage task: scan pictures for image-scaling attacks, with thresholds calibrated on the user's own."""

# No postponed annotations here: the command line is built from the real types of the fields.

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from convatlas.data.image_files import Unreadable
from convatlas.data.images import ImageSet, Skipped, read_images, stratified_split
from convatlas.errors import DataError, Unsupported
from convatlas.files import write_text
from convatlas.report import Cell, Files, Note, Report, Section, Table, printable
from convatlas.robustness.decamouflage import Decamouflage, Detection
from convatlas.robustness.detection_quality import detection_sections
from convatlas.robustness.scaling_attack import Bytes, Scaler
from convatlas.robustness.screening import ALARM, MOST_PICTURES, revealed, revealed_pictures
from convatlas.training.left_out import skipped_sections, tell_skipped
from convatlas.training.measure import provenance
from convatlas.training.progress import progress
from convatlas.training.run import Run, from_mapping, to_mapping
from convatlas.training.settings import Training
from convatlas.training.task import Task

__all__ = ["THRESHOLDS", "Camouflage"]

#: Name of the file with the thresholds in a run.
THRESHOLDS = "thresholds.json"


@dataclass(kw_only=True, eq=False)
class Camouflage(Task):
    """Find images that were crafted to become others when they are resized for a network.

    Attributes:
        data: benign images: a folder of them at any depth, or an ``.npz`` file.
        attacks: images crafted against the same scaler, in the same forms; the thresholds are then those of the highest
            accuracy (white-box). Without them they follow from the benign images alone (black-box).
        size: height and width that the network sees.
        library: that resizes the images: ``cv2``, ``pil``, ``torch``, ``tf`` (without antialiasing) or ``matlab``.
        algorithm: of it: ``nearest``, ``linear``, ``cubic``, ``area``, ``box`` or ``lanczos``.
        detectors: metrics that vote: scaling_mse, scaling_ssim, min_mse, min_ssim, max_mse, max_ssim, csp.
        percentile: of the benign images that may be taken for attacks, in percent, where there are no attacks.
        spectrum: from which value on a frequency is bright in images of 224 x 224; ``calibrate`` chooses it from the
            benign images.
        test_fraction: share of the images held out to measure the quality.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "camouflage"

    data: str
    attacks: str | None = None
    size: tuple[int, int] = (224, 224)
    library: Literal["cv2", "pil", "torch", "tf", "matlab"] = "cv2"
    algorithm: Literal["nearest", "linear", "cubic", "area", "box", "lanczos"] = "linear"
    detectors: tuple[str, ...] = ("scaling_mse", "min_ssim", "csp")
    percentile: float = 1.0
    spectrum: float | Literal["calibrate"] = 230.0
    test_fraction: float = 0.3
    split_seed: int = 0

    detector: Decamouflage = field(init=False, repr=False)
    exit_code: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.detector = Decamouflage(self.size, Scaler.of(self.library, self.algorithm), self.detectors)
        if isinstance(self.spectrum, str) and self.spectrum != "calibrate":
            raise ValueError(f"spectrum must be a number or 'calibrate', got {self.spectrum!r}")
        if not 0 < self.percentile < 100:
            raise ValueError(f"percentile must be between 0 and 100, got {self.percentile}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Choose the thresholds on one part of the images, measure them on the rest, and write the run folder.

        Raises:
            Unsupported: ``resume`` is asked: a calibration is short and is done again.
            ValueError: there are settings of a training.
            DataError: there are no or too few images.
            FileExistsError: the folder is not empty.
        """
        if resume:
            raise Unsupported("a calibration cannot be resumed: start it again in a new folder")
        if training is not None and training != Training():
            raise ValueError("the task camouflage is calibrated, not trained: it takes no settings of a training")
        opened = Run(run)
        opened.check_unused()
        skipped: dict[str, str] = {}
        parts = {"benign": self._split(self.data)} | ({"attack": self._split(self.attacks)} if self.attacks else {})
        learn = {kind: sets["learn"] for kind, sets in parts.items()}
        if self.spectrum == "calibrate":
            self.detector.calibrate_spectrum_threshold(image for _, image in _pixels(learn["benign"], skipped))
        else:
            self.detector.base = float(self.spectrum)
        with progress("calibrating", sum(map(len, learn.values()))) as advance:
            seen = {kind: _told(_pixels(images, skipped), advance) for kind, images in learn.items()}
            self.detector.fit(seen["benign"], seen.get("attack"), self.percentile)
        opened = Run.create(run, self.name, to_mapping(self))
        self.save(opened.folder / THRESHOLDS)
        test = {kind: self._detect(sets["test"], skipped) for kind, sets in parts.items()}
        sections = [self._thresholds(), *detection_sections(self.detector, test), *_left_out(skipped)]
        kind = "white-box" if self.attacks else "black-box"
        scores = {"benign": self.detector.benign, "attack": self.detector.attack}
        counts = ", ".join(f"{len(next(iter(scores[name].values())))} {name}" for name in parts)
        report = Report("Calibrated detection of camouflaged images", f"{kind}, on {counts}.", sections, provenance())
        report.save(opened.folder)
        return report

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the detection on the run's held-out images, or on a folder with ``benign`` and ``attack``.

        Raises:
            DataError: the data cannot be read.
        """
        skipped: dict[str, str] = {}
        if data is None:
            sources = {"benign": self.data} | ({"attack": self.attacks} if self.attacks else {})
            sets = {kind: self._split(source)["test"] for kind, source in sources.items()}
        else:
            found = {kind: Path(data) / kind for kind in ("benign", "attack") if (Path(data) / kind).is_dir()}
            if not found:
                raise DataError(f"{data} must hold a folder 'benign', a folder 'attack', or both")
            sets = {kind: _read(path) for kind, path in found.items()}
        test = {kind: self._detect(images, skipped) for kind, images in sets.items()}
        counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in test.items())
        sections = [*detection_sections(self.detector, test), *_left_out(skipped)]
        report = Report("Detection of camouflaged images", f"On {counts} images.", sections, provenance())
        if folder is not None:
            report.save(folder)
        return report

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Scan images; writes ``report.csv`` with every score and a page with pictures of the attacks.

        ``exit_code`` is 3 if there are any.

        Args:
            inputs: image files, folders or ``.npz`` files.
            folder: where to write.

        Raises:
            DataError: no image can be read.
        """
        skipped: dict[str, str] = {}
        pictures: list[tuple[Bytes, str]] = []
        sets = read_images(list(inputs), labelled=False).values()
        rows = [row for images in sets for row in self._detect(images, skipped, pictures)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "attack", *self.detectors])
        for name, found in rows:
            values = (f"{found.scores[method]:.6g}" for method in self.detectors)
            writer.writerow([printable(name), "yes" if found.attack else "no", *values])
        write_text(Path(folder) / "report.csv", text.getvalue())
        flagged = [(name, found) for name, found in rows if found.attack]
        self.exit_code = ALARM if flagged else 0
        cells: list[list[Cell]] = [[name, *(found.scores[m] for m in self.detectors)] for name, found in flagged[:1000]]
        parts: list[Any] = [Table("Camouflaged images", ["image", *self.detectors], cells)] if cells else []
        if pictures:
            parts.append(revealed_pictures(pictures))
        parts.append(Files("Files", {"all scores": "report.csv"}))
        report = Report(
            "Scan for camouflaged images",
            f"{len(flagged)} of {len(rows)} images look camouflaged.",
            [Section("Found", parts), *_left_out(skipped)],
            provenance(),
        )
        report.save(folder)
        return report

    def save(self, path: str | Path) -> Path:
        """Write the thresholds as JSON."""
        return self.detector.save(path)

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read the calibrated task back from a run folder.

        Raises:
            DataError: the folder is not a run of this task.
        """
        run = Run.open(source)
        values = {name: value for name, value in run.settings().items() if name != "task"}
        task = from_mapping(cls, values)
        if not (run.folder / THRESHOLDS).is_file():
            raise DataError(f"{source} has no {THRESHOLDS}: its calibration did not end")
        task.detector = Decamouflage.load(run.folder / THRESHOLDS)
        return task

    def _split(self, source: str) -> dict[str, ImageSet]:
        fractions = {"learn": 1 - self.test_fraction, "test": self.test_fraction}
        return stratified_split(_read(source), fractions, self.split_seed)

    def _detect(
        self,
        images: ImageSet,
        skipped: dict[str, str],
        pictures: list[tuple[Bytes, str]] | None = None,
    ) -> list[tuple[str, Detection]]:
        """Names and detections of images; adds pictures of the first attacks."""
        found: list[tuple[str, Detection]] = []
        with progress("scanning", len(images)) as advance:
            for name, image in _pixels(images, skipped):
                found.append((name, self.detector.predict(image)))
                if pictures is not None and found[-1][1].attack and len(pictures) < MOST_PICTURES:
                    pictures.append((revealed(self.detector, image), name))
                advance()
        return found

    def _thresholds(self) -> Section:
        rows: list[list[Cell]] = [
            [each.metric, f"attack if {each.direction}", each.value, each.percentile]
            for each in self.detector.thresholds.values()
        ]
        note = f"A frequency is bright from {self.detector.base:g} on, for images of 224 x 224."
        table = Table("Thresholds", ["method", "direction", "value", "percentile [%]"], rows)
        return Section("Thresholds", [table, Note(note), Files("Files", {"thresholds": THRESHOLDS})])


def _read(source: str | Path) -> ImageSet:
    return next(iter(read_images(source, labelled=False).values()))


def _told(pairs: Iterable[tuple[str, Bytes]], advance: Callable[[], None]) -> Iterator[Bytes]:
    for _, image in pairs:
        yield image
        advance()


def _pixels(images: ImageSet, skipped: dict[str, str]) -> Iterator[tuple[str, Bytes]]:
    """Names and pixels of a set; what cannot be read or judged is left out and noted."""
    skipped |= {each.path: each.reason for each in images.skipped}
    for row, name in enumerate(images.names):
        try:
            image = images.image(row)
        except Unreadable as error:
            skipped[name] = error.reason
            continue
        if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
            skipped[name] = f"must be grey or RGB bytes, got {image.shape[2]} channels of {image.dtype}"
            continue
        yield name, image


def _left_out(skipped: Mapping[str, str]) -> list[Section]:
    """Tell what was left out, and the section of a report that lists it."""
    tell_skipped(Skipped(path, reason) for path, reason in skipped.items())
    return skipped_sections(skipped)
