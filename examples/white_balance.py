"""Takes the colour of the light away from photographs: python examples/white_balance.py.

ECCC learns from made-up scenes. Photographs of scikit-image, made linear, lit by coloured light and taken twice by a
simulated camera, are what it has to correct. Less than a minute on one core. Writes white_balance.png, each photograph
as taken, corrected, and as it should be, and runs/white_balance/report.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import data as photographs

from convatlas.data.exposure_pairs import ExposurePair, write_scene
from convatlas.data.linear_images import Levels, LinearImage
from convatlas.data.simulators.exposures import Camera, draw_illuminant, expose
from convatlas.restoration.illuminant_estimation import IlluminantEstimation
from convatlas.restoration.illuminant_evaluation import view
from convatlas.training.settings import Training

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SHOWN = 256
RUN, SCENES = Path("runs/white_balance"), Path("runs/white_balance_scenes")


def take(name: str, seed: int) -> ExposurePair:
    """The middle of a photograph under coloured light, taken twice."""
    random = np.random.default_rng(seed)
    pixels: npt.NDArray[Any] = getattr(photographs, name)()[..., :3]
    row, column = ((length - SHOWN) // 2 for length in pixels.shape[:2])
    square = LinearImage(pixels[row : row + SHOWN, column : column + SHOWN], Levels(srgb=True)).array()
    light = draw_illuminant(random)
    made = expose(square * light, light, Camera(clipped=(0.0, 0.1)), random)
    return ExposurePair(name, LinearImage(made.long), LinearImage(made.short), made.illuminant, made.ratio)


def main() -> None:
    """Train, correct the photographs, and put them side by side."""
    task = IlluminantEstimation(data="simulated", model="eccc")
    task.fit(RUN, Training(**{**task.defaults, "epochs": 15})).to_terminal()
    for seed, name in enumerate(PHOTOGRAPHS):
        write_scene(SCENES / name, take(name, seed))
    rows = []
    for each in task.held_out(SCENES)[0]:
        lights = (None, each.rgb["eccc"], each.truth)
        rows.append(np.concatenate([view(each.picture, light) for light in lights], 1))
    Image.fromarray(np.concatenate(rows)).save("white_balance.png")
    task.predict([SCENES], RUN / "predictions")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
