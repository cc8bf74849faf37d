"""Small pictures and attacks on their scaling."""

from __future__ import annotations

import numpy as np

from convatlas.robustness.scaling_attack import ScalingAttack

SIZE = (12, 12)


def picture(seed: int, shape: tuple[int, int] = (48, 48)) -> np.ndarray:
    """Smooth waves with a little noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / 48
    waves = [np.sin(a * x + b * y + c) for a, b, c in random.uniform(-6, 6, (3, 3))]
    return (np.stack(waves, 2) * 90 + 128 + random.normal(0, 2, (*shape, 3))).clip(0, 255).astype(np.uint8)


def attack(seed: int) -> np.ndarray:
    return ScalingAttack().generate(picture(seed), picture(seed + 100, SIZE))
