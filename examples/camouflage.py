"""Hides a photograph in another and finds it again: python examples/camouflage.py.

Squares of scikit-image's photographs are the images that one trusts. A few others get a face hidden in them, which a
network of 64 x 64 pixels would see. Ten seconds on one core. Writes camouflage.png, for each the photograph, the
attack, and what the network gets of the attack, and runs/camouflage_scan/report.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import data as photographs

from convatlas.robustness.camouflage import Camouflage
from convatlas.robustness.scaling_attack import Scaler, ScalingAttack

PHOTOGRAPHS = ("coffee", "chelsea", "rocket", "immunohistochemistry", "retina")
SIDE, SEEN = 256, 64
TRUSTED, UPLOADS = Path("runs/camouflage_trusted"), Path("runs/camouflage_uploads")


def squares(name: str) -> list[Image.Image]:
    """Squares of a photograph, side by side as far as they fit."""
    pixels: npt.NDArray[Any] = getattr(photographs, name)()[..., :3]
    rows, columns = (range(0, length - SIDE + 1, SIDE // 2) for length in pixels.shape[:2])
    return [Image.fromarray(pixels[row : row + SIDE, column : column + SIDE]) for row in rows for column in columns]


def main() -> None:
    """Calibrate, attack, scan, and put the pictures side by side."""
    for folder in (TRUSTED, UPLOADS):
        folder.mkdir(parents=True, exist_ok=True)
    face = Image.fromarray(photographs.astronaut()[:200, 120:320])
    hidden = np.asarray(face.resize((SEEN, SEEN), Image.Resampling.BICUBIC))
    scaler = Scaler.of("cv2", "linear")
    rows = []
    for name in PHOTOGRAPHS:
        first, *others = squares(name)[:8]
        for number, square in enumerate(others):
            square.save(TRUSTED / f"{name}_{number}.png")
        attack = ScalingAttack(scaler, eps=(1.0, 4.0)).generate(np.asarray(first), hidden)
        first.save(UPLOADS / f"{name}.png")
        Image.fromarray(attack).save(UPLOADS / f"{name}_attacked.png")
        small = scaler.resize(torch.from_numpy(attack).permute(2, 0, 1).double(), (SEEN, SEEN))
        seen = Image.fromarray(small.permute(1, 2, 0).clamp(0, 255).round().byte().numpy())
        rows.append(np.concatenate([np.asarray(first), attack, np.asarray(seen.resize((SIDE, SIDE), 0))], 1))
    Image.fromarray(np.concatenate(rows)).save("camouflage.png")
    task = Camouflage(data=str(TRUSTED), size=(SEEN, SEEN), library="cv2", algorithm="linear")
    task.fit("runs/camouflage")
    task.predict([UPLOADS], "runs/camouflage_scan").to_terminal()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
