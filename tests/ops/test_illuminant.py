"""The dual-exposure feature, statistical estimates, errors and their statistics, white balance."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName
from convatlas.ops.illuminant import (
    FEATURE_SIZES,
    STATISTICAL,
    angular_error,
    apply_white_balance,
    channel_ratios,
    dual_exposure_feature,
    error_statistics,
    exposure_ratio,
    gray_edge,
    gray_world,
    reproduction_error,
    shades_of_gray,
    white_patch,
)


def short_exposure(seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 + 0.2 * torch.rand(batch, 3, 9, 11, dtype=torch.float64, generator=generator)


def test_copies_have_no_feature():
    short = short_exposure()
    long = 4 * short
    torch.testing.assert_close(dual_exposure_feature(long, short), torch.zeros(2, 2, dtype=torch.float64))
    identity = torch.eye(3, dtype=torch.float64).flatten().expand(2, 9)
    torch.testing.assert_close(dual_exposure_feature(long, short, "matrix", ratio=4.0), identity)
    torch.testing.assert_close(exposure_ratio(long, short), torch.full((2,), 4.0, dtype=torch.float64))
    both = dual_exposure_feature(long, short, "concat")
    torch.testing.assert_close(both, torch.cat([torch.zeros(2, 2, dtype=torch.float64), identity], 1))


def test_clipping_moves_the_feature_away_from_the_channel():
    short = short_exposure()
    long = 4 * short
    long[:, 0] = long[:, 0].clamp(max=0.3)  # red clips: its ratio is too small
    u, v = dual_exposure_feature(long, short).unbind(1)
    assert bool((u > 0.1).all())
    assert v.abs().max() < 1e-12
    swapped = dual_exposure_feature(short, long)
    torch.testing.assert_close(swapped, -dual_exposure_feature(long, short))


def test_dark_and_masked_pixels_do_not_count():
    short = short_exposure()
    long = 4 * short
    spoiled, mask = long.clone(), torch.ones(2, 1, 9, 11, dtype=torch.bool)
    spoiled[..., 2:4, :], mask[..., 2:4, :] = 0.9, False
    torch.testing.assert_close(channel_ratios(spoiled, short, mask), torch.full((2, 3), 4.0, dtype=torch.float64))
    dark = short.clone()
    dark[..., 2:4, :] = 0.009
    torch.testing.assert_close(channel_ratios(spoiled, dark), torch.full((2, 3), 4.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="no valid pixels"):
        channel_ratios(torch.zeros_like(long), short)
    with pytest.raises(ValueError, match="no valid pixels"):
        channel_ratios(long, short, torch.zeros_like(mask))


def test_a_batch_is_a_loop():
    short = short_exposure(3)
    long = (4 * short).clamp(max=0.5)
    for kind in FEATURE_SIZES:
        both = dual_exposure_feature(long, short, kind)
        assert both.shape == (2, FEATURE_SIZES[kind])
        each = [dual_exposure_feature(long[i : i + 1], short[i : i + 1], kind) for i in range(2)]
        torch.testing.assert_close(both, torch.cat(each))


def test_a_feature_has_gradients():
    short = short_exposure(4, 1)[..., :3, :4].requires_grad_()
    long = (5 * short_exposure(5, 1))[..., :3, :4].requires_grad_()
    for kind in FEATURE_SIZES:
        call = partial(dual_exposure_feature, kind=kind, ratio=5.0)
        assert torch.autograd.gradcheck(call, (long, short), fast_mode=True)


def test_statistical_estimates_find_a_tint():
    """Scenes that are grey in the sense of each estimate, under coloured light."""
    light = torch.tensor([0.5, 0.7, 0.3], dtype=torch.float64)
    grey = torch.rand(1, 1, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(
        1, 3, 24, 20
    )
    x = grey * light.view(1, 3, 1, 1)
    mask = torch.ones(1, 1, 24, 20, dtype=torch.bool)
    mask[..., :6] = False
    spoiled = torch.where(mask, x, torch.tensor([0.9, 0.1, 0.1], dtype=torch.float64).view(1, 3, 1, 1))
    for name, function in STATISTICAL.items():
        assert float(angular_error(function(x)[0], light)) < 1e-4, name
        if name != "gray edge":  # an edge of the mask is an edge of the picture
            assert float(angular_error(function(spoiled, mask=mask)[0], light)) < 1e-4, name
    assert float(angular_error(gray_edge(x, 2, 1, 1.5)[0], light)) < 1e-4
    assert float(angular_error(white_patch(x)[0], light)) < 1e-4


def test_shades_of_gray_lie_between_gray_world_and_white_patch():
    x = short_exposure(7, 1)
    torch.testing.assert_close(shades_of_gray(x, 1), gray_world(x))
    torch.testing.assert_close(shades_of_gray(x, 400), white_patch(x), rtol=0.02, atol=0)
    for bad, match in (
        (lambda: shades_of_gray(x, 0.5), "power must be at least 1"),
        (lambda: white_patch(x, 0), "percentile must be above 0"),
        (lambda: gray_edge(x, 3), "order must be 1 or 2"),
        (lambda: gray_world(x, torch.zeros(1, 1, 9, 11, dtype=torch.bool)), "mask must leave a pixel"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()


def test_angular_errors():
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert float(angular_error(x, 5 * y)) == pytest.approx(45)
    assert float(angular_error(y, 3 * y)) == pytest.approx(0, abs=1e-6)
    assert float(angular_error(y, y, "shrunk")) == pytest.approx(0.02562, rel=1e-3)
    assert float(angular_error(x, y, "c5")) == pytest.approx(45 * math.pi * 7 / 22, rel=1e-5)
    tiny = torch.tensor([1.0, 1e-6, 0.0])
    assert float(angular_error(x.float(), tiny)) == pytest.approx(math.degrees(1e-6), rel=1e-3)
    same = y.clone().requires_grad_()
    angular_error(same, y, "shrunk").backward()
    assert bool(same.grad.isfinite().all())


def test_reproduction_error_is_that_of_what_white_becomes():
    truth = torch.tensor([[0.5, 0.7, 0.2]], dtype=torch.float64)
    predicted = torch.tensor([[0.4, 0.7, 0.3]], dtype=torch.float64)
    white = apply_white_balance(truth.view(1, 3, 1, 1), predicted).flatten()
    cosine = float(white.sum() / (math.sqrt(3) * white.norm()))
    assert float(reproduction_error(predicted, truth)) == pytest.approx(math.degrees(math.acos(cosine)))
    assert float(reproduction_error(3 * truth, truth)) == pytest.approx(0, abs=1e-6)


def test_statistics_of_errors():
    found = error_statistics(torch.arange(1.0, 102.0))
    assert found["mean"] == found["median"] == found["trimean"] == 51
    assert found["best 25 %"] == 13.5  # of 1 to 26
    assert found["worst 25 %"] == 88.5  # of 76 to 101
    assert found["worst 5 %"] == 98.5  # of 96 to 101
    assert found["max"] == 101
    with pytest.raises(ValueError, match="errors must be"):
        error_statistics(torch.zeros(0))


def test_white_balance_makes_the_light_white_and_keeps_green():
    light = torch.tensor([[0.5, 0.8, 0.3], [0.6, 0.6, 0.2]], dtype=torch.float64)
    x = torch.rand(2, 1, 4, 5, dtype=torch.float64) * light.view(2, 3, 1, 1)
    balanced = apply_white_balance(x, light)
    torch.testing.assert_close(balanced[:, :1].expand_as(x), balanced)
    torch.testing.assert_close(balanced[:, 1], x[:, 1])
    with pytest.raises(ValueError, match="positive"):
        apply_white_balance(x, -light)


def test_bad_pairs():
    short = short_exposure()
    with pytest.raises(ValueError, match="long and short must have the same shape"):
        dual_exposure_feature(short[..., :4], short)
    with pytest.raises(ValueError, match="long must be"):
        dual_exposure_feature(short[:, :1], short[:, :1])
    with pytest.raises(UnknownName, match="unknown kind of the feature 'vu'"):
        dual_exposure_feature(short, short, "vu")
    with pytest.raises(ValueError, match="predicted and truth"):
        angular_error(torch.zeros(2), torch.zeros(2))
