"""AutoAugment: one of 25 pairs of image operations that were searched for on ImageNet.

Cubuk, Zoph, Mane, Vasudevan, Le: "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019,
arXiv 1805.09501; the policy "v0" with which EfficientNets were trained, and as timm applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps

from convatlas.data.rand_augment import apply_operation

__all__ = ["POLICY", "auto_augment"]

#: An operation, its probability and its strength from 0 to 10.
Operation = tuple[str, float, int]
#: The pairs, of which one is drawn for an image.
POLICY: tuple[tuple[Operation, Operation], ...] = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateYRel", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
_STRENGTHS = 10
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def auto_augment(
    image: npt.NDArray[Any], generator: torch.Generator, fill: Sequence[int] = (128, 128, 128)
) -> npt.NDArray[np.uint8]:
    """Apply a random pair of the `POLICY` to an image (H, W, C), uint8 with 1 or 3 channels.

    Args:
        image: what to augment.
        generator: a CPU generator, where all randomness comes from.
        fill: the colour, C values from 0 to 255, of the pixels that a geometric operation uncovers.
    """
    if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"AutoAugment takes uint8 images of 1 or 3 channels, got {image.dtype} of {image.shape[2]} channels"
        )
    channels = image.shape[2]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    for name, probability, strength in POLICY[int(torch.randint(len(POLICY), (), generator=generator))]:
        applied, negative, resampling = torch.rand(3, generator=generator).tolist()
        if applied < probability:
            picture = _applied(
                picture,
                name,
                strength / _STRENGTHS,
                sign=-1 if negative < 0.5 else 1,
                resampling=_RESAMPLING[int(resampling < 0.5)],
                fill=tuple(fill[:channels]),
            )
    return np.asarray(picture).reshape(image.shape)


def _applied(picture: Image.Image, name: str, level: float, **how: Any) -> Image.Image:
    # Three operations have another scale here than in RandAugment: posterizing and solarizing weaken with the level.
    match name:
        case "Color":
            return ImageEnhance.Color(picture).enhance(0.1 + 1.8 * level)
        case "Posterize":
            return apply_operation(picture, "PosterizeIncreasing", 1 - int(4 * level) / 4)
        case "Solarize":
            return ImageOps.solarize(picture, int(256 * level))
    return apply_operation(picture, name, level, **how)
