"""A folder of generated pictures in the form of ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``val`` with two classes of four 32 x 32 pictures each: bright on the left or on the right."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("left", "right")):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                pixels[:, 16 * label : 16 * label + 16] += 120
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder
