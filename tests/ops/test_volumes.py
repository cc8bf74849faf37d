"""Measures of volumes, lower resolution and the way back, losses of two players."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import normalized_root_mse, structural_similarity

from convatlas.errors import UnknownName
from convatlas.ops.adversarial import relativistic_discriminator_loss, relativistic_generator_loss
from convatlas.ops.volume_quality import nrmse, sharpness, volume_psnr, volume_ssim
from convatlas.ops.volume_resize import is_centred, linear_enlarge, shrink


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(9, 12, 8, generator=generator, dtype=torch.float64) * 3 - 1
    return truth + 0.2 * torch.randn(truth.shape, generator=generator, dtype=torch.float64), truth


def test_measures_are_those_of_scikit_image():
    x, truth = _pair()
    extent = float(truth.max() - truth.min())
    ours = float(volume_ssim(x, truth)), float(volume_ssim(x, truth, dims=2))
    theirs = [
        structural_similarity(truth.numpy(), x.numpy(), data_range=extent, channel_axis=axis) for axis in (None, -1)
    ]
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert float(nrmse(x, truth)) == pytest.approx(
        normalized_root_mse(truth.numpy(), x.numpy(), normalization="min-max"), rel=1e-12
    )
    assert float(volume_psnr(x, truth)) == pytest.approx(-20 * math.log10(float(nrmse(x, truth))))
    assert math.isinf(float(volume_psnr(truth, truth)))
    assert float(volume_ssim(truth, truth)) == pytest.approx(1)


def test_sharpness_is_the_mean_length_of_the_gradient():
    z, y, x = torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij")
    assert float(sharpness(2 * z - y + 2 * x)) == pytest.approx(3)
    volume = _pair()[0]
    lengths = np.sqrt(sum(part**2 for part in np.gradient(volume.numpy())))
    assert float(sharpness(volume)) == pytest.approx(float(lengths.mean()))


def test_measures_refuse_what_cannot_be_measured():
    x, truth = _pair()
    with pytest.raises(ValueError, match="same shape"):
        volume_psnr(x[1:], truth)
    with pytest.raises(ValueError, match="truth must not be constant"):
        nrmse(x, torch.ones_like(truth))
    with pytest.raises(ValueError, match="at least 7 x 7 x 7 voxels"):
        volume_ssim(x[:6], truth[:6])
    with pytest.raises(ValueError, match="dims must be 2 or 3"):
        volume_ssim(x, truth, dims=1)
    with pytest.raises(ValueError, match="axes of at least 2 voxels"):
        sharpness(x[:1])


@pytest.mark.parametrize("degradation", ["linear", "nearest", "kspace"])
def test_the_way_back_puts_a_linear_volume_where_it_was(degradation: str):
    axes = [torch.arange(length, dtype=torch.float64) for length in (8, 12, 4)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    if degradation == "kspace":  # what it keeps whole: waves that go around, far below half the resolution
        volume = torch.cos(2 * torch.pi * (y / 12 + 0.1))[None, None]
    else:
        volume = (2 * z - y + 3 * x)[None, None]
    low = shrink(volume, 2, degradation)
    assert low.shape == (1, 1, 4, 6, 2)
    back = linear_enlarge(low, 2, degradation)
    inside = (..., slice(1, -2), slice(1, -2), slice(1, -2))
    tolerance = 0.14 if degradation == "kspace" else 1e-12  # a straight line between samples of a wave
    assert float((back - volume)[inside].abs().max()) <= tolerance


def test_low_resolution_is_what_its_name_says():
    volume = torch.rand(2, 1, 6, 4, 8)
    assert torch.equal(shrink(volume, 2, "nearest"), volume[..., ::2, ::2, ::2])
    torch.testing.assert_close(shrink(volume, 2), torch.nn.functional.avg_pool3d(volume, 2))
    torch.testing.assert_close(shrink(volume, 2, "kspace").mean(), volume.mean())
    assert [is_centred(name) for name in ("linear", "nearest", "kspace")] == [True, False, False]
    assert shrink(torch.rand(1, 2, 8, 4), 4).shape == (1, 2, 2, 1)
    with pytest.raises(ValueError, match="multiples of scale 2"):
        shrink(volume[..., 1:], 2)
    with pytest.raises(UnknownName, match="unknown degradation 'cubic'"):
        shrink(volume, 2, "cubic")


def test_players_that_know_nothing_lose_log_two():
    logits = torch.full((3, 1, 2, 2, 2), 0.7)
    assert float(relativistic_discriminator_loss(logits, logits)) == pytest.approx(math.log(2))
    assert float(relativistic_generator_loss(logits, logits)) == pytest.approx(math.log(2))


def test_means_run_over_the_batch_only_and_the_network_sees_no_gradient_of_real_ones():
    real = torch.tensor([[0.0, 10.0], [2.0, 10.0]], requires_grad=True)
    fake = torch.tensor([[1.0, 10.0], [1.0, 10.0]], requires_grad=True)
    loss = relativistic_generator_loss(real, fake)
    assert float(loss) == pytest.approx(math.log(2))  # the means of both positions are those of the fake
    loss.backward()
    assert real.grad is None
    assert fake.grad is not None
    assert float(relativistic_generator_loss(torch.zeros(1, 1), torch.zeros(1, 1))) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="same shape"):
        relativistic_discriminator_loss(real, fake[:1])
