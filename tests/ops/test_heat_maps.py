"""Heat maps: convolution on a torus, read-outs, targets, preconditioning, smoothing over frames."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from convatlas.ops.heat_maps import (
    Gaussian,
    bilinear_target,
    bivariate_von_mises,
    circular_convolution,
    confidence,
    dealias,
    expected_log_chroma,
    gaussian_loss,
    histogram_start,
    kalman_smooth,
    kalman_step,
    precondition,
    smoothness,
)

SIZE = 1 / 8


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_convolution_is_the_circular_sum():
    x, filters = maps(2, 3, 6, 6), maps(3, 6, 6)
    expected = torch.zeros(2, 6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            expected += (x * filters[:, i, j].view(1, 3, 1, 1)).sum(1).roll((i, j), (1, 2))
    torch.testing.assert_close(circular_convolution(x, filters), expected)
    with pytest.raises(ValueError, match="maps must be"):
        circular_convolution(x, filters[:2])


def test_smoothness_is_that_of_sobel():
    ramp = torch.arange(6.0, dtype=torch.float64).expand(6, 6)
    assert float(smoothness(ramp)) == 64  # a step of 1 a pixel answers with 8
    assert float(smoothness(torch.ones(5, 5))) == 0
    assert smoothness(maps(4, 2, 5, 5)).shape == (4, 2)
    with pytest.raises(ValueError, match="at least 3 x 3"):
        smoothness(torch.zeros(2, 2))


def test_the_expectation_knows_its_axes_and_its_scale():
    heat = torch.zeros(1, 8, 8, dtype=torch.float64)
    heat[0, 1, 6] = 1
    step = 2 * 2.85 / 8  # over n, not n - 1
    assert expected_log_chroma(heat, 2.85)[0].tolist() == pytest.approx([2.5 * step, 2.5 * step])
    even = torch.full((1, 8, 8), 1 / 64)
    torch.testing.assert_close(expected_log_chroma(even, 2.85), torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_von_mises_finds_a_peak_across_the_border():
    heat = torch.zeros(8, 8, dtype=torch.float64)
    heat[7, 3] = heat[0, 3] = heat[7, 4] = heat[0, 4] = 0.25
    found = bivariate_von_mises(heat, 0.5)
    assert found.mean.tolist() == pytest.approx([7.5, 3.5])
    torch.testing.assert_close(found.covariance, torch.eye(2, dtype=torch.float64) * 0.75)
    shifted = bivariate_von_mises(heat.roll((2, -1), (0, 1)), 0.5)
    assert shifted.mean.tolist() == pytest.approx([1.5, 2.5])
    torch.testing.assert_close(shifted.covariance, found.covariance)


def test_confidence_falls_with_the_spread():
    point = torch.zeros(16, 16, dtype=torch.float64)
    point[3, 4] = 1
    broad = torch.full((16, 16), 1 / 256, dtype=torch.float64)
    sure, unsure = (float(confidence(bivariate_von_mises(heat, 2.0).covariance, 2.0)) for heat in (point, broad))
    assert sure == pytest.approx(1)
    assert unsure < 0.2


def test_targets_hold_their_light():
    uv = torch.tensor([[0.3, -0.45], [0.9, 0.99]], dtype=torch.float64)
    start = (-1.0, -1.0)
    heat = bilinear_target(uv, 16, SIZE, start)
    assert heat.sum((1, 2)).tolist() == pytest.approx([1, 1])
    assert int((heat[0] > 0).sum()) == 4
    found = bivariate_von_mises(heat, 1.0).mean * SIZE - 1
    torch.testing.assert_close(dealias(found, 16, SIZE), uv, atol=2e-3, rtol=0)


def test_starts_put_lights_in_the_middle_and_dealiasing_finds_them():
    uv = torch.tensor([[0.9, 1.5], [1.3, 1.1]], dtype=torch.float64)
    start = histogram_start(uv, 16, SIZE)
    assert start == (1.125 - 1, 1.25 - 1)
    middle = torch.tensor(start, dtype=torch.float64) + 1
    torch.testing.assert_close(dealias(uv - 2, 16, SIZE, middle), uv)
    assert dealias(torch.tensor([1.2, -1.4]), 16, SIZE).tolist() == pytest.approx([-0.8, 0.6])


def test_the_likelihood_is_that_of_a_normal_distribution():
    least = 0.01
    covariance = torch.tensor([[0.05, 0.02], [0.02, 0.03]], dtype=torch.float64)
    mean, uv = torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.1], dtype=torch.float64)
    exact = -torch.distributions.MultivariateNormal(mean, covariance).log_prob(uv) - math.log(2 * math.pi * least)
    torch.testing.assert_close(gaussian_loss(uv, mean, covariance, least), exact)
    best = gaussian_loss(mean, mean, least * torch.eye(2, dtype=torch.float64), least)
    assert float(best) == pytest.approx(0, abs=1e-12)


def test_preconditioned_squares_are_the_cost():
    x, rough, large = maps(2, 8, 8), 0.3, 0.05
    z = precondition(x, rough, large)
    steps = sum((z - z.roll(1, axis)).square().sum() for axis in (-2, -1))
    torch.testing.assert_close(rough * steps + large * z.square().sum(), x.square().sum())
    with pytest.raises(ValueError, match="large must be positive"):
        precondition(x, 1.0, 0.0)


def test_smoothing_over_frames():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.2, 0.5], dtype=torch.float64)
    means = truth + 0.1 * torch.randn(60, 2, dtype=torch.float64, generator=generator)
    seen = Gaussian(means, 0.01 * torch.eye(2, dtype=torch.float64).expand(60, 2, 2))
    still = kalman_smooth(seen, 0.0)
    torch.testing.assert_close(still.mean[-1], means.mean(0))  # equal weights where nothing drifts
    torch.testing.assert_close(still.covariance[-1], 0.01 / 60 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(kalman_smooth(seen, 1e9).mean, means, atol=1e-6, rtol=0)
    drifting = kalman_smooth(seen, 1e-4)
    assert float((drifting.mean[20:] - truth).norm(dim=1).mean()) < 0.5 * float((means[20:] - truth).norm(dim=1).mean())
    first = kalman_step(None, Gaussian(*(each[0] for each in seen)), 0.1)
    torch.testing.assert_close(first.mean, means[0])
    with pytest.raises(ValueError, match="drift"):
        kalman_step(None, first, -1.0)


def test_a_sure_frame_counts_more():
    sure, unsure = 1e-4 * torch.eye(2), 1.0 * torch.eye(2)
    state = kalman_step(None, Gaussian(torch.zeros(2), unsure), 0.0)
    assert kalman_step(state, Gaussian(torch.ones(2), sure), 0.0).mean.tolist() == pytest.approx([1, 1], abs=1e-3)
    state = kalman_step(None, Gaussian(torch.zeros(2), sure), 0.0)
    assert kalman_step(state, Gaussian(torch.ones(2), unsure), 0.0).mean.tolist() == pytest.approx([0, 0], abs=1e-3)


def test_bad_arguments():
    for bad, match in (
        (lambda: bivariate_von_mises(torch.zeros(3, 4)), "heat must be"),
        (lambda: bivariate_von_mises(torch.zeros(4, 4), -1.0), "epsilon must not be negative"),
        (lambda: precondition(torch.zeros(4, 4), -1.0, 1.0), "rough must not be negative"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
