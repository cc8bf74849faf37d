"""Pairs of exposures of scenes under coloured light, made up or taken from one linear frame.

Made-up scenes: rectangles of random reflectance and a texture, lit by a colour near the line on which the light of hot
bodies lies in log-chroma. A camera takes them twice: light times gain, shot and read noise, clipping, quantisation.
Gains come before clipping, so that which channel clips depends on the light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Camera", "Exposures", "draw_illuminant", "expose", "illuminant_exposures", "random_reflectance"]

Array = npt.NDArray[Any]

_PATCHES = 14
_REFLECTANCE = (0.05, 0.95)


class Exposures(NamedTuple):
    """Two exposures of a scene.

    Attributes:
        long, short: (H, W, 3) float32, linear, in [0, 1].
        illuminant: colour of the light, (3,), of unit length.
        ratio: exposure of the long frame over that of the short one.
    """

    long: Array
    short: Array
    illuminant: Array
    ratio: float


@dataclass(frozen=True)
class Camera:
    """How exposures are drawn.

    Attributes:
        ratios: exposure of the long frame over that of the short one; one of them is drawn.
        clipped: smallest and largest share of pixels of which a channel clips in the long exposure.
        shot: variance of the shot noise at full light.
        read: standard deviation of the read noise.
        bits: of the quantisation.

    Raises:
        ValueError: a value is out of range.
    """

    ratios: tuple[float, ...] = (4.0, 8.0)
    clipped: tuple[float, float] = (0.0, 0.3)
    shot: float = 1e-4
    read: float = 2e-3
    bits: int = 10

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) <= 1:
            raise ValueError(f"ratios must be above 1, got {self.ratios}")
        if not 0 <= self.clipped[0] <= self.clipped[1] < 1:
            raise ValueError(f"clipped must be two rising shares from 0 to below 1, got {self.clipped}")
        if self.shot < 0 or self.read < 0:
            raise ValueError(f"shot and read must not be negative, got {self.shot} and {self.read}")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits must be from 1 to 16, got {self.bits}")


def draw_illuminant(random: np.random.Generator) -> Array:
    """A colour of light of unit length: u evenly from -0.3 to 0.8, v = 1.1 - 0.9 u, and noise of 0.1 on v."""
    u = random.uniform(-0.3, 0.8)
    v = 1.1 - 0.9 * u + 0.1 * random.standard_normal()
    rgb = np.exp([-u, 0.0, -v])
    return rgb / np.linalg.norm(rgb)


def random_reflectance(size: tuple[int, int], random: np.random.Generator) -> Array:
    """Rectangles of random colours on a ground of another, under a waving texture, (H, W, 3) in (0, 1)."""
    height, width = size
    scene = np.broadcast_to(random.uniform(*_REFLECTANCE, 3), (height, width, 3)).copy()
    for _ in range(_PATCHES):
        top, left = int(random.integers(0, height)), int(random.integers(0, width))
        down, right = (int(random.integers(max(1, length // 8), max(2, length // 2))) for length in size)
        scene[top : top + down, left : left + right] = random.uniform(*_REFLECTANCE, 3)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(2 * np.pi * (random.uniform(1, 6) * x / width + random.uniform(1, 6) * y / height))
    return scene * (1 + 0.2 * waves[..., None])


def expose(
    radiance: Array, illuminant: Array, camera: Camera, random: np.random.Generator, *, clean: bool = True
) -> Exposures:
    """Take two exposures of a scene.

    Args:
        radiance: linear light of any scale, (H, W, 3) from 0 on.
        illuminant: colour of the light.
        camera: how.
        random: draws ratio, gain and noise.
        clean: whether the radiance has no noise of its own, so that shot and read noise are added; a frame of a real
            camera has.
    """
    share, ratio = random.uniform(*camera.clipped), float(random.choice(camera.ratios))
    # The gain at which so many pixels have a channel at or above 1.
    level = float(np.quantile(radiance.max(2), 1 - share))
    light = radiance / max(level, 1e-6)
    frames = []
    for scale in (1.0, 1.0 / ratio):
        frame = light * scale
        if clean:
            deviation = np.sqrt(camera.shot * frame + camera.read**2)
            frame = frame + deviation * random.standard_normal(frame.shape)
        steps = 2**camera.bits - 1
        frames.append((np.round(frame.clip(0, 1) * steps) / steps).astype(np.float32))
    colour = np.asarray(illuminant, np.float64)
    return Exposures(frames[0], frames[1], colour / np.linalg.norm(colour), ratio)


def illuminant_exposures(
    seed: int, size: tuple[int, int] = (48, 64), camera: Camera | None = None, illuminant: Array | None = None
) -> Exposures:
    """Two exposures of a made-up scene; the same for the same seed.

    Args:
        seed: of everything random.
        size: height and width.
        camera: how they are taken.
        illuminant: colour of the light; drawn when left out.
    """
    random = np.random.default_rng(seed)
    light = draw_illuminant(random) if illuminant is None else np.asarray(illuminant, np.float64)
    return expose(random_reflectance(size, random) * light, light, camera or Camera(), random)
