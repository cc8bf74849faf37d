"""TrivialAugment: one random image operation of random strength, and nothing to tune.

Müller, Hutter: "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021, arXiv 2103.10158, with
the wide ranges of strengths.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps

from convatlas.errors import unknown

__all__ = ["TRIVIAL_OPERATIONS", "apply_trivial_operation", "trivial_augment"]

TRIVIAL_OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
_STRENGTHS = 31


def trivial_augment(image: npt.NDArray[Any], generator: torch.Generator) -> npt.NDArray[np.uint8]:
    """Apply one operation of one of 31 strengths, all equally likely, to an 8-bit image (H, W, C).

    Args:
        image: uint8 with 1 or 3 channels.
        generator: a CPU generator, where all randomness comes from.
    """
    if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"TrivialAugment takes uint8 images of 1 or 3 channels, got {image.dtype} of {image.shape[2]} channels"
        )
    choice, strength, negative = (
        int(torch.randint(count, (), generator=generator)) for count in (len(TRIVIAL_OPERATIONS), _STRENGTHS, 2)
    )
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    level = strength / (_STRENGTHS - 1)
    picture = apply_trivial_operation(picture, TRIVIAL_OPERATIONS[choice], level, sign=-1 if negative else 1)
    return np.asarray(picture).reshape(image.shape)


def apply_trivial_operation(image: Image.Image, name: str, level: float, *, sign: int = 1) -> Image.Image:
    """Apply one of the `TRIVIAL_OPERATIONS` to a picture of mode L or RGB; what is uncovered becomes black.

    Args:
        image: the picture.
        name: of the operation.
        level: strength from 0 to 1.
        sign: 1 or -1, the direction of operations that have one.
    """
    signed = sign * level
    match name:
        case "Identity":
            return image
        case "ShearX":
            return _affine(image, (1, 0.99 * signed, 0, 0, 1, 0))
        case "ShearY":
            return _affine(image, (1, 0, 0, 0.99 * signed, 1, 0))
        case "TranslateX":
            return _affine(image, (1, 0, -int(32 * signed), 0, 1, 0))
        case "TranslateY":
            return _affine(image, (1, 0, 0, 0, 1, -int(32 * signed)))
        case "Rotate":
            return image.rotate(135 * signed)
        case "Brightness":
            return ImageEnhance.Brightness(image).enhance(1 + 0.99 * signed)
        case "Color":
            return ImageEnhance.Color(image).enhance(1 + 0.99 * signed)
        case "Contrast":
            return ImageEnhance.Contrast(image).enhance(1 + 0.99 * signed)
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(1 + 0.99 * signed)
        case "Posterize":
            return ImageOps.posterize(image, 8 - round(6 * level))
        case "Solarize":
            return ImageOps.solarize(image, math.floor(255 - 255 * level))
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
    raise unknown("TrivialAugment operation", name, TRIVIAL_OPERATIONS)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
