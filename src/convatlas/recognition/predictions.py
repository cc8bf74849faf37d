"""What a classifier says of a set of images, and the sets it is asked about."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.images import ImageSet, Skipped
from convatlas.files import write_text
from convatlas.report import printable

__all__ = ["Predictions", "joined"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities for a set of images.

    Attributes:
        images: the images, without those that could not be read.
        probabilities: (N, number of classes) float32; rows sum to 1.
        classes: names of the columns.
        skipped: files that could not be read.
    """

    images: ImageSet
    probabilities: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """Index of the most probable class of each image, (N)."""
        return self.probabilities.argmax(1)

    def write_csv(self, path: str | Path, most: int = 5) -> None:
        """One row an image: name, class, probability, true class where it is known, then the next probable classes."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :most]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        further = [f"{what} {rank}" for rank in range(2, order.shape[1] + 1) for what in ("class", "probability")]
        writer.writerow(["image", "class", "probability", "true class", *further])
        for row, name in enumerate(self.images.names):
            label = self.images.labels[row]
            first, *rest = [(self.classes[index], f"{self.probabilities[row, index]:.6f}") for index in order[row]]
            true = self.images.classes[label] if label >= 0 else ""
            writer.writerow([printable(name), *first, true, *(cell for pair in rest for cell in pair)])
        write_text(path, text.getvalue())


def joined(sets: Sequence[ImageSet]) -> ImageSet:
    """Unlabelled images of several splits as one set."""
    if len(sets) == 1:
        return sets[0]
    places = tuple((images, row) for images in sets for row in range(len(images)))
    skipped = tuple(each for images in sets for each in images.skipped)
    return ImageSet((), np.full(len(places), -1), sets[0].channels, skipped, _Joined(places))


@dataclass(frozen=True, eq=False)
class _Joined:
    """The images of several sets, one after the other."""

    places: tuple[tuple[ImageSet, int], ...]

    @property
    def names(self) -> Sequence[str]:
        return [images.names[row] for images, row in self.places]

    def image(self, index: int, channels: int) -> npt.NDArray[Any]:
        images, row = self.places[index]
        return images.source.image(row, channels)

    def subset(self, indices: npt.NDArray[np.int64]) -> _Joined:
        return _Joined(tuple(self.places[index] for index in indices))
