"""Pictures with edges that interpolation blurs, and a network small enough to learn them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

TINY: dict[str, Any] = {"channels": 16}
SHORT: dict[str, Any] = {"epochs": 12, "batch_size": 8, "warmup_epochs": 0, "lr": 0.01, "weight_decay": 0.0}


def scene(seed: int, size: tuple[int, int] = (64, 72)) -> npt.NDArray[np.uint8]:
    """Coloured discs before a coloured sky, (H, W, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([60 + y + 10 * channel for channel in range(3)], 2).astype(float)
    for _ in range(12):
        centre, radius = random.uniform(0, size), random.uniform(3, 14)
        image[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = random.integers(20, 236, 3)
    return image.clip(0, 255).astype(np.uint8)


def write_scenes(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """A folder of PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(scene(seed + number)).save(folder / f"{number:02}.png")
    return folder
