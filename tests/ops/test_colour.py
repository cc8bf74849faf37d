"""Colour conversions against the published examples, stored references and each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convatlas.errors import UnknownName
from convatlas.ops.colour import linear_to_srgb, rgb_to_gray, rgb_to_ycbcr, srgb_to_linear, ycbcr_to_rgb

CASES = Path(__file__).parents[1] / "golden" / "cases"


@pytest.mark.parametrize(("form", "levels", "name"), [("matlab", 255, "matlab01"), ("studio256", 1, "256form")])
def test_published_forms(form: str, levels: int, name: str) -> None:
    stored = load_file(CASES / "espcn" / "image_pipeline.safetensors")
    rgb = stored["input.rgb_uint8"].permute(2, 0, 1).double() / levels
    ycbcr = rgb_to_ycbcr(rgb, form)
    for result, key in ((ycbcr, f"ycbcr_{name}"), (ycbcr_to_rgb(ycbcr, form), f"rgb_back_{name}")):
        torch.testing.assert_close(
            result, stored[f"output.{key}"].permute(2, 0, 1).double(), rtol=1e-6, atol=1e-4 / levels
        )


@pytest.mark.parametrize(
    ("form", "top", "error"), [("matlab", 1.0, 1e-5), ("studio256", 255.0, 1.2), ("jpeg", 1.0, 1e-12)]
)
def test_there_and_back_again(form: str, top: float, error: float) -> None:
    x = torch.rand(2, 4, 3, 5, 7, dtype=torch.float64) * top
    y = rgb_to_ycbcr(x, form)
    assert y.shape == x.shape
    assert (ycbcr_to_rgb(y, form) - x).abs().max() < error
    assert rgb_to_ycbcr(x.float(), form).dtype == torch.float32
    assert rgb_to_ycbcr(x.bfloat16(), form).dtype == torch.bfloat16


def test_gray_has_no_chroma() -> None:
    gray = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64).expand(3, 1, 3)
    studio, full = rgb_to_ycbcr(gray), rgb_to_ycbcr(gray, "jpeg")
    torch.testing.assert_close(studio[0], (16 + 219 * gray[0]) / 255)
    torch.testing.assert_close(studio[1:], torch.full((2, 1, 3), 128 / 255, dtype=torch.float64))
    torch.testing.assert_close(full[0], gray[0])
    torch.testing.assert_close(full[1:], torch.full((2, 1, 3), 0.5, dtype=torch.float64))


def test_jpeg_is_that_of_pillow() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    expected = torch.from_numpy(np.array(Image.fromarray(image).convert("YCbCr"))).permute(2, 0, 1)
    # Pillow works in whole numbers, with chroma about 128 instead of 127.5.
    result = rgb_to_ycbcr(torch.from_numpy(image).permute(2, 0, 1).double() / 255, "jpeg") * 255
    assert (result + torch.tensor([0.0, 0.5, 0.5]).view(3, 1, 1) - expected).abs().max() < 1.01


def test_gray() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(rgb_to_gray(x), expected)
    torch.testing.assert_close(rgb_to_gray(torch.ones(3, 1, 1), "bt709"), torch.ones(1, 1, 1))
    stored = load_file(CASES / "decamouflage" / "detectors.safetensors")
    rgb = stored["input.attack0"].permute(2, 0, 1)
    assert torch.equal(rgb_to_gray(rgb, "opencv")[0], stored["output.attack0_gray"])
    pillow = np.array(Image.fromarray(stored["input.attack0"].numpy()).convert("L"))
    assert torch.equal(rgb_to_gray(rgb, "pillow")[0], torch.from_numpy(pillow))


def test_linear_light() -> None:
    x = torch.linspace(-0.1, 1.2, 50, dtype=torch.float64)
    torch.testing.assert_close(linear_to_srgb(srgb_to_linear(x)), x, rtol=1e-6, atol=1e-8)
    values = srgb_to_linear(torch.tensor([0.0, 0.04045, 0.5, 1.0], dtype=torch.float64))
    expected = torch.tensor([0, 0.04045 / 12.92, 0.2140411, 1], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("function", [rgb_to_ycbcr, ycbcr_to_rgb, rgb_to_gray, srgb_to_linear, linear_to_srgb])
def test_gradients(function) -> None:
    x = torch.linspace(-0.2, 1, 24, dtype=torch.float64).view(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 3, H, W\), got \(4, 5, 5\)"):
        rgb_to_ycbcr(torch.zeros(4, 5, 5))
    with pytest.raises(ValueError, match="x must be floating point, got"):
        ycbcr_to_rgb(torch.zeros(3, 5, 5, dtype=torch.uint8))
    with pytest.raises(UnknownName, match="form of YCbCr 'matlb': did you mean matlab"):
        rgb_to_ycbcr(torch.zeros(3, 5, 5), "matlb")
    with pytest.raises(UnknownName, match="form of gray of uint8 images 'bt601'"):
        rgb_to_gray(torch.zeros(3, 5, 5, dtype=torch.uint8))
    with pytest.raises(UnknownName, match="form of gray of floating-point images 'opencv'"):
        rgb_to_gray(torch.zeros(3, 5, 5), "opencv")
    with pytest.raises(ValueError, match="x must be floating point"):
        srgb_to_linear(torch.zeros(3, dtype=torch.int64))
