"""Sets of images as recognition reads them: on request without those that look camouflaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convatlas.data.image_files import FileKind
from convatlas.data.images import ImageSet, read_images
from convatlas.robustness.decamouflage import Decamouflage, without_camouflaged

__all__ = ["read_sets"]


def read_sets(
    source: str | Path | Sequence[str | Path],
    channels: int | None,
    kind: FileKind,
    *,
    labelled: bool = True,
    camouflage: str | None = None,
) -> dict[str, ImageSet]:
    """What `read_images` reads; with the path of thresholds, flagged images are left out and listed as skipped."""
    sets = read_images(source, channels=channels, labelled=labelled, kind=kind)
    if camouflage is None:
        return sets
    detector = Decamouflage.load(camouflage)
    return {name: without_camouflaged(images, detector) for name, images in sets.items()}
