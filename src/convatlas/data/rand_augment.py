"""RandAugment: a few random image operations of one common strength.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (arXiv 1909.13719), with
the 15 operations whose strength always grows with the magnitude, noise on the magnitude and the notation of timm
("rand-m9-mstd0.5-inc1"), which the training recipes of convolutional networks are published in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps

from convatlas.errors import unknown

__all__ = ["OPERATIONS", "RandAugment", "apply_operation", "parse_rand_augment"]

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
_MAX_MAGNITUDE = 10.0
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class RandAugment:
    """Apply ``num_ops`` operations drawn with replacement, each with probability one half, to an 8-bit image.

    Attributes:
        magnitude: strength of the operations, 0 to 10.
        num_ops: how many operations are drawn.
        magnitude_std: standard deviation of the normal noise that each operation adds to the magnitude; the sum is
            clipped to 0 to 10.
    """

    magnitude: float = 9.0
    num_ops: int = 2
    magnitude_std: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= _MAX_MAGNITUDE:
            raise ValueError(f"magnitude must be between 0 and {_MAX_MAGNITUDE:g}, got {self.magnitude:g}")
        if self.num_ops < 1:
            raise ValueError(f"num_ops must be at least 1, got {self.num_ops}")
        if not 0 <= self.magnitude_std <= _MAX_MAGNITUDE:
            raise ValueError(f"magnitude_std must be between 0 and {_MAX_MAGNITUDE:g}, got {self.magnitude_std:g}")

    def __call__(
        self, image: npt.NDArray[Any], generator: torch.Generator, fill: Sequence[int] = (128, 128, 128)
    ) -> npt.NDArray[np.uint8]:
        """Augment an image (H, W, C), uint8 with 1 or 3 channels; all randomness comes from ``generator``.

        Args:
            image: what to augment.
            generator: a CPU generator.
            fill: the colour, C values from 0 to 255, of the pixels that a geometric operation uncovers.
        """
        if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
            raise ValueError(
                f"RandAugment takes uint8 images of 1 or 3 channels, got {image.dtype} of {image.shape[2]} channels"
            )
        channels = image.shape[2]
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        for choice in torch.randint(len(OPERATIONS), (self.num_ops,), generator=generator).tolist():
            applied, negative, resampling = torch.rand(3, generator=generator).tolist()
            noise = torch.randn((), generator=generator).item() * self.magnitude_std
            if applied < 0.5:
                picture = apply_operation(
                    picture,
                    OPERATIONS[choice],
                    min(max(self.magnitude + noise, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE,
                    sign=-1 if negative < 0.5 else 1,
                    resampling=_RESAMPLING[int(resampling < 0.5)],
                    fill=tuple(fill[:channels]),
                )
        return np.asarray(picture).reshape(image.shape)


def parse_rand_augment(notation: str) -> RandAugment:
    """Read timm's notation: "rand", then m (magnitude), n (operations), mstd (noise) and inc1, joined by "-".

    Only the increasing operations are there, so "inc1" must be given. Without them, m is 10, n is 2 and mstd is 0.

    Raises:
        ValueError: a part of the notation is unknown or out of range.
    """
    first, *parts = notation.split("-")
    expected = 'expected a notation such as "rand-m9-mstd0.5-inc1"'
    if first != "rand":
        raise ValueError(f"rand_augment must begin with 'rand', got {notation!r}; {expected}")
    values = {"m": _MAX_MAGNITUDE, "n": 2.0, "mstd": 0.0, "inc": 0.0}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in values:
            raise ValueError(f"rand_augment has the unknown part {part!r} in {notation!r}; {expected}")
        values[match[1]] = float(match[2])
    if values["inc"] != 1:
        raise ValueError(f"rand_augment offers only the increasing operations, marked by 'inc1', got {notation!r}")
    if values["n"] != int(values["n"]):
        raise ValueError(f"rand_augment needs a whole number of operations, got n{values['n']:g} in {notation!r}")
    return RandAugment(values["m"], int(values["n"]), values["mstd"])


def apply_operation(
    image: Image.Image,
    name: str,
    level: float,
    *,
    sign: int = 1,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
    fill: tuple[int, ...] = (128, 128, 128),
) -> Image.Image:
    """Apply one of the :data:`OPERATIONS` to a picture of mode L or RGB.

    Args:
        image: the picture.
        name: of the operation.
        level: strength from 0 to 1.
        sign: 1 or -1, the direction of operations that have one.
        resampling: bilinear or bicubic, for geometric operations.
        fill: colour of uncovered pixels, one value for each channel.
    """
    width, height = image.size
    signed = sign * level
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(30 * signed, resampling, fillcolor=_colour(fill))
        case "PosterizeIncreasing":
            mask = 256 - 2 ** (4 + int(4 * level))  # at full level no bit is kept, which Pillow's posterize refuses
            return image.point([value & mask for value in range(256)] * len(image.getbands()))
        case "SolarizeIncreasing":
            return ImageOps.solarize(image, 256 - int(256 * level))
        case "SolarizeAdd":
            added = int(110 * level)
            table = [min(255, value + added) if value < 128 else value for value in range(256)]
            return image.point(table * len(image.getbands()))
        case "ColorIncreasing":
            return ImageEnhance.Color(image).enhance(_enhancement(signed))
        case "ContrastIncreasing":
            return ImageEnhance.Contrast(image).enhance(_enhancement(signed))
        case "BrightnessIncreasing":
            return ImageEnhance.Brightness(image).enhance(_enhancement(signed))
        case "SharpnessIncreasing":
            return ImageEnhance.Sharpness(image).enhance(_enhancement(signed))
        case "ShearX":
            return _affine(image, (1, 0.3 * signed, 0, 0, 1, 0), resampling, fill)
        case "ShearY":
            return _affine(image, (1, 0, 0, 0.3 * signed, 1, 0), resampling, fill)
        case "TranslateXRel":
            return _affine(image, (1, 0, 0.45 * signed * width, 0, 1, 0), resampling, fill)
        case "TranslateYRel":
            return _affine(image, (1, 0, 0, 0, 1, 0.45 * signed * height), resampling, fill)
    raise unknown("RandAugment operation", name, OPERATIONS)


def _enhancement(signed: float) -> float:
    return max(0.1, 1 + 0.9 * signed)


def _affine(
    image: Image.Image, matrix: tuple[float, ...], resampling: Image.Resampling, fill: tuple[int, ...]
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=_colour(fill))


def _colour(fill: tuple[int, ...]) -> int | tuple[int, ...]:
    return fill[0] if len(fill) == 1 else fill
