"""AutoAugment: its policy, the strengths that differ from RandAugment's, randomness from the generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.data import auto_augment as module
from convatlas.data.auto_augment import POLICY, auto_augment
from convatlas.data.transforms import Augment, Preprocess

GREY = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_policy_has_25_pairs_within_their_ranges() -> None:
    assert len(POLICY) == 25
    for _, probability, strength in (operation for pair in POLICY for operation in pair):
        assert 0 <= probability <= 1
        assert 0 <= strength <= 10


def test_strengths_of_the_operations() -> None:
    pixels = np.arange(256).reshape(16, 16)
    assert np.array_equal(np.asarray(module._applied(GREY, "Posterize", 0.6)), pixels & 0b11000000)
    assert not np.asarray(module._applied(GREY, "Posterize", 0.2)).any()
    assert np.array_equal(
        np.asarray(module._applied(GREY, "Solarize", 0.3)), np.where(pixels < 76, pixels, 255 - pixels)
    )
    assert np.array_equal(np.asarray(module._applied(GREY, "Solarize", 1.0)), pixels)
    colour = Image.fromarray(np.full((2, 2, 3), (200, 100, 0), np.uint8))
    assert np.asarray(module._applied(colour, "Color", 0.5))[0, 0].tolist() == [200, 100, 0]
    assert np.ptp(np.asarray(module._applied(colour, "Color", 0.0))[0, 0]) <= 21


@pytest.mark.parametrize("channels", [1, 3])
def test_generator_decides(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 9, channels), dtype=np.uint8)
    results = [auto_augment(image, torch.Generator().manual_seed(seed)) for seed in range(30)]
    again = [auto_augment(image, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
    assert len({result.tobytes() for result in results}) > 4
    augment = Augment(auto_augment=True, hflip=0.0)
    assert augment(image, Preprocess(size=8), torch.Generator().manual_seed(0)).isfinite().all()


def test_wrong_images_and_two_policies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"AutoAugment takes uint8 images .*, got float64 of 3 channels"):
        auto_augment(np.zeros((2, 2, 3)), torch.Generator())
    with pytest.raises(ValueError, match="auto_augment and rand_augment"):
        Augment(auto_augment=True, rand_augment="rand-m9-inc1")
