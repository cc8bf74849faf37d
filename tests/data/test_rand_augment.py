"""RandAugment: each operation by its definition, the notation, the randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from convatlas.data.rand_augment import OPERATIONS, RandAugment, apply_operation, parse_rand_augment
from convatlas.errors import UnknownName

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def apply(name: str, level: float, **options: object) -> np.ndarray:
    return np.asarray(apply_operation(PICTURE, name, level, **options))


def test_pixelwise_operations_by_hand() -> None:
    np.testing.assert_array_equal(apply("Invert", 0.3), 255 - PIXELS)
    np.testing.assert_array_equal(apply("PosterizeIncreasing", 0.0), PIXELS & 0xF0)
    np.testing.assert_array_equal(apply("PosterizeIncreasing", 0.5), PIXELS & 0xC0)
    np.testing.assert_array_equal(apply("PosterizeIncreasing", 1.0), PIXELS * 0)
    np.testing.assert_array_equal(apply("SolarizeIncreasing", 0.0), PIXELS)
    np.testing.assert_array_equal(apply("SolarizeIncreasing", 0.5), np.where(PIXELS < 128, PIXELS, 255 - PIXELS))
    np.testing.assert_array_equal(apply("SolarizeIncreasing", 1.0), 255 - PIXELS)
    np.testing.assert_array_equal(
        apply("SolarizeAdd", 1.0), np.where(PIXELS < 128, np.minimum(PIXELS.astype(int) + 110, 255), PIXELS)
    )
    np.testing.assert_array_equal(apply("AutoContrast", 0.9), np.asarray(ImageOps.autocontrast(PICTURE)))
    np.testing.assert_array_equal(apply("Equalize", 0.9), np.asarray(ImageOps.equalize(PICTURE)))


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
@pytest.mark.parametrize(("level", "sign", "factor"), [(0.5, 1, 1.45), (0.5, -1, 0.55), (1.0, -1, 0.1), (0.0, 1, 1.0)])
def test_enhancements(name: str, level: float, sign: int, factor: float) -> None:
    expected = getattr(ImageEnhance, name)(PICTURE).enhance(factor)
    np.testing.assert_array_equal(apply(f"{name}Increasing", level, sign=sign), np.asarray(expected))


def test_geometric_operations() -> None:
    fill = (1, 2, 3)
    right = apply("TranslateXRel", 2 / 3, sign=-1, fill=fill)  # 0.45 * 2 / 3 * 30 = 9 pixels
    np.testing.assert_array_equal(right[:, 9:], PIXELS[:, :-9])
    assert (right[:, :9] == fill).all()
    up = apply("TranslateYRel", 1.0, sign=1, fill=fill)  # 0.45 * 20 = 9 pixels
    np.testing.assert_array_equal(up[:-9], PIXELS[9:])
    assert (up[-9:] == fill).all()
    turned = PICTURE.rotate(-15, Image.Resampling.BICUBIC, fillcolor=fill)
    rotated = apply("Rotate", 0.5, sign=-1, resampling=Image.Resampling.BICUBIC, fill=fill)
    np.testing.assert_array_equal(rotated, np.asarray(turned))
    stripe = np.zeros((20, 60), np.uint8)
    stripe[:, 30] = 255
    sheared = np.asarray(apply_operation(Image.fromarray(stripe), "ShearX", 1.0, fill=(0,)))
    assert sheared[0].argmax() - sheared[19].argmax() == pytest.approx(0.3 * 19, abs=1)
    sheared = np.asarray(apply_operation(Image.fromarray(stripe.T.copy()), "ShearY", 1.0, sign=-1, fill=(0,)))
    assert sheared[:, 0].argmax() - sheared[:, 19].argmax() == pytest.approx(-0.3 * 19, abs=1)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_operation_keeps_size_and_mode(name: str, mode: str) -> None:
    picture = PICTURE.convert(mode)
    changed = apply_operation(picture, name, 0.7, fill=(128,) * len(mode))
    assert (changed.size, changed.mode) == (picture.size, mode)
    if (name, mode) != ("ColorIncreasing", "L"):
        assert not np.array_equal(np.asarray(changed), np.asarray(picture)) or name == "AutoContrast"


def test_notation() -> None:
    assert parse_rand_augment("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 2, 0.5)
    assert parse_rand_augment("rand-n3-m5-inc1") == RandAugment(5.0, 3, 0.0)
    assert parse_rand_augment("rand-inc1") == RandAugment(10.0, 2, 0.0)
    with pytest.raises(UnknownName, match="unknown RandAugment operation 'Inverse': did you mean Invert"):
        apply_operation(PICTURE, "Inverse", 0.5)


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("augmix-m3", "must begin with 'rand', got 'augmix-m3'"),
        ("rand-m9-mstd0.5", "only the increasing operations, marked by 'inc1'"),
        ("rand-m9-inc1-w0", "unknown part 'w0' in 'rand-m9-inc1-w0'; expected a notation such as"),
        ("rand-m-inc1", "unknown part 'm'"),
        ("rand-m11-inc1", "magnitude must be between 0 and 10, got 11"),
        ("rand-m9-mstd101-inc1", "magnitude_std must be between 0 and 10, got 101"),
        ("rand-n0-inc1", "num_ops must be at least 1, got 0"),
        ("rand-n1.5-inc1", "a whole number of operations, got n1.5"),
    ],
)
def test_notation_that_is_unknown(notation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rand_augment(notation)


def test_the_generator_decides_everything() -> None:
    augment = RandAugment(num_ops=3)
    results = [augment(PIXELS, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert results[0].dtype == np.uint8
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    grey = augment(PIXELS[..., :1].copy(), torch.Generator().manual_seed(1), fill=(9,))
    assert grey.shape == (20, 30, 1)


def test_each_operation_is_applied_half_of_the_time() -> None:
    augment = RandAugment(magnitude=10, num_ops=1, magnitude_std=0.0)
    same = sum(np.array_equal(augment(PIXELS, torch.Generator().manual_seed(seed)), PIXELS) for seed in range(400))
    assert 165 <= same <= 265  # one half, and AutoContrast changes nothing on an image that spans the range
