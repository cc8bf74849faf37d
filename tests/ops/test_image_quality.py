"""PSNR and SSIM against scikit-image, stored references and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import structural_similarity

from convatlas.errors import UnknownName
from convatlas.ops import image_quality
from convatlas.ops.colour import rgb_to_ycbcr
from convatlas.ops.image_quality import psnr, ssim

CASES = Path(__file__).parents[1] / "golden" / "cases"


def test_stored_references() -> None:
    stored = load_file(CASES / "espcn" / "image_pipeline.safetensors")
    x, y = (stored[name].permute(2, 0, 1) for name in ("input.rgb_uint8", "output.up_pil"))
    luma = [rgb_to_ycbcr(image.double() / 255)[:1] for image in (x, y)]
    other_luma = [rgb_to_ycbcr(image.double(), "studio256")[:1] for image in (x, y)]
    results = {
        "psnr_rgb_crop": psnr(x, y, data_range=255, shave=3),
        "psnr_rgb_crop0": psnr(x, y, data_range=255),
        "psnr_y_crop": psnr(*luma, data_range=1, shave=3),
        "psnr_y_256form": psnr(*other_luma, data_range=255),
        "ssim_rgb_crop": ssim(x, y, data_range=255, shave=3),
        "ssim_y_crop": ssim(*luma, data_range=1, shave=3),
    }
    for name, result in results.items():
        assert result.item() == pytest.approx(stored[f"output.{name}"].item(), abs=1e-4), name


def test_one_number_for_each_image() -> None:
    x, y = torch.rand(2, 4, 3, 15, 13), torch.rand(2, 4, 3, 15, 13)
    for measure in (psnr, ssim):
        result = measure(x, y, data_range=1, shave=1)
        assert result.shape == (2, 4)
        assert result.dtype == torch.float64
        assert result[1, 2] == pytest.approx(measure(x[1, 2], y[1, 2], data_range=1, shave=1).item())


def test_closed_forms() -> None:
    x = torch.zeros(1, 20, 20, dtype=torch.float64)
    assert psnr(x, x + 0.1, data_range=1).item() == pytest.approx(20)
    assert psnr(x, x, data_range=1).item() == math.inf
    border = x.clone()
    border[:, 0] = 1
    assert psnr(x, border, data_range=1, shave=1).item() == math.inf
    assert psnr(x, border, data_range=1).item() == pytest.approx(10 * math.log10(20))
    assert ssim(x, x, data_range=1).item() == 1
    # Constant images have no variance: only the means count.
    assert ssim(x, x + 0.5, data_range=1).item() == pytest.approx(1e-4 / (0.25 + 1e-4))


@pytest.mark.parametrize("covariance", ["population", "sample"])
def test_scikit_image(covariance: str) -> None:
    numbers = np.random.default_rng(0)
    x = numbers.random((3, 24, 31))
    y = np.clip(x + 0.2 * numbers.standard_normal(x.shape), 0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": covariance == "sample"}
    expected = structural_similarity(x, y, data_range=1, channel_axis=0, **options)
    result = ssim(torch.from_numpy(x), torch.from_numpy(y), data_range=1, covariance=covariance)
    assert result.item() == pytest.approx(expected, abs=1e-10)


def literal_ssim(x: torch.Tensor, y: torch.Tensor, data_range: float) -> torch.Tensor:
    """As it is defined: the window as a square of weights, each moment on its own."""
    distance = torch.arange(11, dtype=torch.float64) - 5
    row = torch.exp(-(distance**2) / (2 * 1.5**2))
    window = (row[:, None] * row / row.sum() ** 2)[None, None]

    def mean(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(image.flatten(0, -3).unsqueeze(1), window)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    values = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))
    return values.mean((1, 2, 3)).reshape(x.shape[:-2]).mean(-1)


@pytest.mark.parametrize("shape", [(3, 11, 11), (2, 3, 70, 23), (4, 1, 12, 40)])
def test_ssim_is_that_of_its_definition(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_quality, "_AT_ONCE", 1000)  # several strips of the image, and several lots of images
    x, y = (torch.rand(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = literal_ssim(x, y, 1.0)
    with torch.no_grad():
        assert torch.allclose(ssim(x, y, data_range=1.0), expected, rtol=0, atol=1e-12)
    result = ssim(x, y, data_range=1.0)
    assert torch.allclose(result, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(result.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_gradients() -> None:
    x = torch.rand(1, 2, 12, 13, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 2, 12, 13, dtype=torch.float64, requires_grad=True)
    for measure in (psnr, ssim):
        assert torch.autograd.gradcheck(
            lambda x, y, measure=measure: measure(x, y, data_range=1.0), (x, y), fast_mode=True
        )
    x, y = (torch.rand(1, 1, 11, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda x, y: ssim(x, y, data_range=1.0), (x, y), fast_mode=True)


def test_bad_input() -> None:
    image = torch.zeros(3, 12, 12)
    with pytest.raises(ValueError, match=r"x and y must have the same shape, got \(3, 12, 12\) and \(3, 12, 11\)"):
        psnr(image, image[..., 1:], data_range=1)
    with pytest.raises(ValueError, match=r"x and y must be \(\.\.\., C, H, W\), got \(12, 12\)"):
        ssim(image[0], image[0], data_range=1)
    with pytest.raises(ValueError, match="y must be floating point or uint8, got"):
        psnr(image, image.int(), data_range=1)
    with pytest.raises(ValueError, match="leave some of the 12 x 12 pixels, got 6"):
        psnr(image, image, data_range=1, shave=6)
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        psnr(image, image, data_range=0)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels after shaving, got 10 x 10"):
        ssim(image, image, data_range=1, shave=1)
    with pytest.raises(UnknownName, match="did you mean sample"):
        ssim(image, image, data_range=1, covariance="samples")
