"""Low resolution and quality are what the protocols say, to the digits that others publish."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.ops.colour import rgb_to_ycbcr
from convatlas.restoration.protocol import PROTOCOLS, Protocol, as_pixels, as_tensor
from restoration.scenes import scene


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_and_tensors(dtype: type):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (4, 5, 3)).astype(dtype)
    x = as_tensor(pixels)
    assert x.shape == (3, 4, 5)
    assert 0 <= x.min() < x.max() <= 1
    assert np.array_equal(as_pixels(x, dtype), pixels)
    assert as_pixels(2 * x - 0.5, dtype).max() == np.iinfo(dtype).max
    assert as_pixels(x, np.float32).dtype == np.float32


def test_low_resolution_is_that_of_the_libraries():
    image = scene(0)
    small = Protocol(downscale="pillow").shrink(image, 2)
    expected = Image.fromarray(image).resize((36, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(small, np.asarray(expected))
    large = Protocol(downscale="pillow").bicubic(small, 2)
    assert np.array_equal(large, np.asarray(expected.resize((72, 64), Image.Resampling.BICUBIC)))
    assert not np.array_equal(Protocol().shrink(image, 2), small)


@pytest.mark.parametrize("scale", [2, 3])
def test_blur_and_every_so_many_pixels(scale: int):
    protocol = Protocol(downscale="gaussian", blur_sigma=0.8)
    flat = np.full((12, 18, 3), 77, np.uint8)
    assert np.array_equal(protocol.shrink(flat, scale), np.full((12 // scale, 18 // scale, 3), 77))
    # A ramp stays a ramp that is sampled at the middles of the blocks, away from the border.
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.float32)[None, :, None] / 255, (60, 60, 1)).copy()
    small = 255 * protocol.shrink(ramp, scale)[30 // scale, :, 0]
    middles = 4 * (scale * np.arange(60 // scale) + (scale - 1) / 2)
    assert np.abs(small - middles)[3:-3].max() < 1e-3


def test_luma_of_grey_is_in_studio_range():
    grey = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    assert float(Protocol().luma_of(grey)[0, 0, 0]) == pytest.approx((16 + 219 * 0.5) / 255)
    assert float(Protocol(luma="studio256").luma_of(grey)[0, 0, 0]) == pytest.approx((16 + 218.859 * 127.5 / 256) / 255)
    assert Protocol().luma_of(grey, is_luma=True) is grey
    rgb = torch.rand(2, 3, 4, 5)
    assert torch.equal(Protocol().luma_of(rgb), rgb_to_ycbcr(rgb)[:, :1])


def test_quality_follows_the_protocol():
    truth, other = scene(1), scene(1)
    other[:3] = 0
    protocol = Protocol()
    assert protocol.measure(truth, truth, 3).psnr == math.inf
    assert protocol.measure(other, truth, 3).psnr == math.inf  # the difference lies in the border
    assert protocol.measure(other, truth, 2).psnr < 30
    assert Protocol(shave=0).measure(other, truth, 3).psnr < 30
    small = truth[:14, :14]
    assert math.isnan(protocol.measure(small, small, 3).ssim)
    assert protocol.measure(truth, truth, 3).ssim == pytest.approx(1)
    with pytest.raises(ValueError, match="images must have one size"):
        protocol.measure(truth[1:], truth, 3)


def test_images_are_cut_to_a_multiple():
    image = np.zeros((65, 74, 3), np.uint8)
    assert Protocol().cut(image, 3).shape == (63, 72, 3)
    assert Protocol(multiple=12).cut(image, 3).shape == (60, 72, 3)
    assert Protocol(multiple=12).cut(image, 8).shape == (48, 72, 3)
    with pytest.raises(ValueError, match="the sides of the image must be multiples of 3, got 65 x 74"):
        Protocol().shrink(image, 3)


def test_protocols_are_told_in_words():
    assert PROTOCOLS["usual"] == Protocol()
    assert PROTOCOLS["usual"].describe(3) == (
        "Low resolution by bicubic interpolation as in MATLAB; PSNR and SSIM of luma in MATLAB's form, values rounded "
        "as in a file, 3 pixels left out at the border."
    )
    assert "Pillow" in PROTOCOLS["yjn870's"].describe(3)
    assert "values not rounded, 0 pixels" in PROTOCOLS["yjn870's"].describe(3)
    blurred = Protocol(downscale="gaussian", shave=4).describe(2)
    assert blurred.startswith("Low resolution by Gaussian blur of 1.6 pixels and taking one pixel of 2; ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"downscale": "opencv"}, "unknown downscale 'opencv'"),
        ({"luma": "jpeg"}, "unknown luma 'jpeg'"),
        ({"blur_sigma": 0}, "blur_sigma must be positive, got 0"),
        ({"shave": -1}, "shave must not be negative, got -1"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
    ],
)
def test_impossible_protocols_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)
