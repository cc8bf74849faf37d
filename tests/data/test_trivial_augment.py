"""TrivialAugment: each operation by its definition, the randomness, its place among the augmentations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from convatlas.data.transforms import Augment, Preprocess
from convatlas.data.trivial_augment import TRIVIAL_OPERATIONS, apply_trivial_operation, trivial_augment
from convatlas.errors import UnknownName

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def apply(name: str, level: float, sign: int = 1) -> np.ndarray:
    return np.asarray(apply_trivial_operation(PICTURE, name, level, sign=sign))


def test_operations_by_hand():
    np.testing.assert_array_equal(apply("Identity", 1.0), PIXELS)
    np.testing.assert_array_equal(apply("Posterize", 0.0), PIXELS)
    np.testing.assert_array_equal(apply("Posterize", 1.0), PIXELS & 0xC0)
    np.testing.assert_array_equal(apply("Solarize", 1.0), 255 - PIXELS)
    np.testing.assert_array_equal(apply("Solarize", 0.0), np.where(PIXELS < 255, PIXELS, 0))
    np.testing.assert_array_equal(apply("AutoContrast", 0.3), np.asarray(ImageOps.autocontrast(PICTURE)))
    np.testing.assert_array_equal(apply("Equalize", 0.3), np.asarray(ImageOps.equalize(PICTURE)))
    np.testing.assert_array_equal(apply("TranslateX", 0.5)[:, 16:], PIXELS[:, :-16])
    np.testing.assert_array_equal(apply("TranslateY", 1.0, -1)[:-32], PIXELS[32:])
    assert not apply("TranslateY", 1.0, -1)[-32:].any()
    np.testing.assert_array_equal(apply("Rotate", 1.0), np.asarray(PICTURE.rotate(135)))


@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness"])
@pytest.mark.parametrize(
    ("level", "sign", "factor"), [(1.0, 1, 1.99), (1.0, -1, 0.01), (0.5, 1, 1.495), (0.0, -1, 1.0)]
)
def test_enhancements(name: str, level: float, sign: int, factor: float):
    expected = getattr(ImageEnhance, name)(PICTURE).enhance(factor)
    np.testing.assert_array_equal(apply(name, level, sign), np.asarray(expected))


def test_shears_by_the_tangent():
    stripe = np.zeros((20, 60), np.uint8)
    stripe[:, 30] = 255
    sheared = np.asarray(apply_trivial_operation(Image.fromarray(stripe), "ShearX", 1.0))
    assert sheared[0].argmax() - sheared[19].argmax() == pytest.approx(0.99 * 19, abs=1)
    sheared = np.asarray(apply_trivial_operation(Image.fromarray(stripe.T.copy()), "ShearY", 1.0, sign=-1))
    assert sheared[:, 0].argmax() - sheared[:, 19].argmax() == pytest.approx(-0.99 * 19, abs=1)


def test_every_operation_is_drawn_and_repeats():
    for channels in (1, 3):
        image = PIXELS[..., :channels]
        results = [trivial_augment(image, torch.Generator().manual_seed(seed)) for seed in range(40)]
        assert {result.shape for result in results} == {image.shape}
        assert len({result.tobytes() for result in results}) > len(TRIVIAL_OPERATIONS)
        np.testing.assert_array_equal(trivial_augment(image, torch.Generator().manual_seed(3)), results[3])


def test_stands_among_the_augmentations():
    plain = {"random_resized_crop": False, "hflip": 0.0}
    preprocess = Preprocess(size=(40, 50), crop=1.0)
    tensors = [
        Augment(**plain, trivial_augment=on)(PIXELS, preprocess, torch.Generator().manual_seed(5))
        for on in (True, False)
    ]
    assert not torch.equal(*tensors)
    torch.testing.assert_close(tensors[1], preprocess(PIXELS))


def test_what_it_cannot_take():
    with pytest.raises(ValueError, match="uint8 images of 1 or 3 channels, got float32 of 3 channels"):
        trivial_augment(PIXELS.astype(np.float32), torch.Generator())
    with pytest.raises(UnknownName, match="unknown TrivialAugment operation 'Blur'"):
        apply_trivial_operation(PICTURE, "Blur", 0.5)
