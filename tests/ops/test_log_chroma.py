"""Histograms of log-chroma: mass, shifts, what is not counted, gradients of pictures, both forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from convatlas.ops.log_chroma import (
    BOUNDARY,
    local_gradient,
    log_chroma_axis,
    log_chroma_histogram,
    log_chroma_to_rgb,
    rgb_to_log_chroma,
    wrapped_log_chroma_histogram,
)


def picture(seed: int = 0, size: tuple[int, int] = (12, 17)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 + 0.9 * torch.rand(2, 3, *size, dtype=torch.float64, generator=generator)


def single(u: float, v: float) -> Tensor:
    """A picture of one pixel of a given log-chroma."""
    return torch.tensor([math.exp(-u), 1.0, math.exp(-v)], dtype=torch.float64).view(1, 3, 1, 1) / 9


def test_colours_there_and_back():
    rgb = torch.tensor([[0.2, 0.5, 0.1], [1.0, 1.0, 1.0]], dtype=torch.float64)
    back = log_chroma_to_rgb(rgb_to_log_chroma(rgb))
    torch.testing.assert_close(back, rgb / rgb.norm(dim=1, keepdim=True), rtol=1e-7, atol=0)
    assert rgb_to_log_chroma(rgb)[0].tolist() == pytest.approx([math.log(2.5), math.log(5)])


@pytest.mark.parametrize("backend", ["naive", "scatter"])
def test_squares_sum_up_to_one_and_brightness_does_not_matter(backend: str):
    found = log_chroma_histogram(picture(), 16, backend=backend)
    assert found.square().sum((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-6)
    torch.testing.assert_close(log_chroma_histogram(picture() / 7, 16, backend=backend), found, rtol=1e-6, atol=1e-6)
    assert log_chroma_histogram(torch.zeros(1, 3, 4, 4), 16, backend=backend).abs().sum() == 0


@pytest.mark.parametrize("backend", ["naive", "scatter"])
def test_a_pixel_lies_where_it_should(backend: str):
    """v falls along the rows and u rises along the columns."""
    axis = log_chroma_axis(8)
    step = float(axis[1] - axis[0])
    found = log_chroma_histogram(single(float(axis[5]) + 0.4 * step, float(axis[2]) + 0.4 * step), 8, backend=backend)
    assert {(int(r), int(c)) for r, c in found[0].nonzero()} == {(5, 5), (5, 6), (4, 5), (4, 6)}
    beyond = log_chroma_histogram(single(BOUNDARY + 1.5 * step, 0.1), 8, backend=backend)
    assert beyond.abs().sum() == 0


@pytest.mark.parametrize("backend", ["naive", "scatter"])
def test_a_pixel_on_a_centre_is_not_counted_there(backend: str):
    """Bins of 2 on [-1, 1]: with 4 bins the centres are -1, -1/3, 1/3, 1; G = R hits u = 0 between two of them."""
    x = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    x[:, 0] = 0.5 * math.e  # u = -1, the first centre, up to rounding of the logarithm
    u = float(rgb_to_log_chroma(x.flatten(), 1e-9)[0])
    boundary = -u
    found = log_chroma_histogram(x, 4, boundary, backend=backend)[0]
    assert (found.sum(0) > 0).tolist() == [False, True, False, False]


def test_a_tint_moves_the_histogram():
    bins, step = 32, 2 * BOUNDARY / 31
    x = picture(1) * 0.3
    moved = x * torch.tensor([math.exp(-2 * step), 1, 1], dtype=torch.float64).view(1, 3, 1, 1)
    before, after = (log_chroma_histogram(each, bins) for each in (x, moved))
    # The intensities change with the tint, so that what is compared is where there is something at all.
    assert torch.equal(after[:, :, 2:] > 0, before[:, :, :-2] > 0)


def test_both_backends_count_every_pixel_in_the_same_bins():
    """Values of few bits, as cameras give them, hit the borders of bins."""
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float64):
        x = (torch.randint(0, 17, (3, 3, 40, 40), generator=generator) / 16).to(dtype)
        for bins, boundary in ((8, math.log(2) * 3.5), (32, BOUNDARY)):
            slow, fast = (log_chroma_histogram(x, bins, boundary, backend=name) for name in ("naive", "scatter"))
            assert torch.equal(slow > 0, fast > 0)
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def test_masks_leave_pixels_out():
    x = picture(3)
    mask = torch.rand(2, 1, *x.shape[2:], generator=torch.Generator().manual_seed(0)) > 0.4
    for function in (log_chroma_histogram, wrapped_log_chroma_histogram):
        dark = torch.where(mask, x, 0.0)  # dark pixels do not count
        torch.testing.assert_close(function(x, 16, mask=mask), function(dark, 16))
        for backend in ("naive", "scatter"):
            assert function(x, 16, mask=torch.zeros_like(mask), backend=backend).abs().sum() == 0


def test_half_precision_is_computed_in_single():
    x = picture(4).half()
    assert log_chroma_histogram(x, 16).dtype == torch.half
    torch.testing.assert_close(
        log_chroma_histogram(x, 16).float(), log_chroma_histogram(x.float(), 16), atol=1e-3, rtol=0
    )


def test_the_order_of_pixels_does_not_matter():
    x = picture(5)
    order = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    mixed = x.flatten(2)[..., order].view_as(x)
    for function in (log_chroma_histogram, wrapped_log_chroma_histogram):
        torch.testing.assert_close(function(mixed, 16), function(x, 16))
    assert not torch.allclose(local_gradient(mixed).mean(), local_gradient(x).mean())


def test_gradients_are_means_over_neighbours():
    x = torch.zeros(1, 1, 4, 5, dtype=torch.float64)
    x[..., 1, 2] = 1
    found = local_gradient(x)[0, 0]
    assert found[1, 2] == 1
    assert found[0, 1] == found[2, 3] == 1 / 8
    assert found[0, 2] == 2 / 8 - 1 / 8  # its neighbour above lies outside and repeats itself
    assert found[3, 0] == 0
    assert torch.equal(local_gradient(x, torch.ones(1, 1, 4, 5, dtype=torch.bool)), local_gradient(x))


def test_masked_gradients_do_not_see_what_is_left_out():
    x = picture(6)[:1]
    mask = torch.ones(1, 1, *x.shape[2:], dtype=torch.bool)
    mask[..., 4:7, 5:9] = False
    other = torch.where(mask, x, 0.77)
    torch.testing.assert_close(local_gradient(x, mask), local_gradient(other, mask))
    assert local_gradient(x, mask)[..., 4:7, 5:9].abs().sum() == 0


@pytest.mark.parametrize("backend", ["naive", "scatter"])
def test_the_torus_shares_pixels_out_and_wraps(backend: str):
    found = wrapped_log_chroma_histogram(single(0.5 + 0.25 * 0.25, -0.25), 4, 0.25, (0.0, 0.0), backend=backend)[0]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[2, 3], expected[3, 3] = 0.75, 0.25
    torch.testing.assert_close(found, expected)
    turned = wrapped_log_chroma_histogram(single(1.5625, 0.75), 4, 0.25, (0.0, 0.0), backend=backend)[0]
    torch.testing.assert_close(turned, expected)
    assert wrapped_log_chroma_histogram(picture(), 8, backend=backend).sum((1, 2)).tolist() == pytest.approx([1, 1])


def test_bad_arguments():
    x = picture()
    for bad, match in (
        (lambda: log_chroma_histogram(x[0], 16), r"x must be \(B, 3, H, W\)"),
        (lambda: log_chroma_histogram(x[:, :2], 16), r"x must be \(B, 3, H, W\)"),
        (lambda: log_chroma_histogram((x * 255).to(torch.uint8), 16), "floating point"),
        (lambda: log_chroma_histogram(x, 15), "bins must be an even number"),
        (lambda: log_chroma_histogram(x, 16, 0.0), "boundary must be positive"),
        (lambda: log_chroma_histogram(x, 16, mask=torch.ones(2, 1, 3, 3, dtype=torch.bool)), "mask must be"),
        (lambda: wrapped_log_chroma_histogram(x, 16, -1.0), "bin_size must be positive"),
        (lambda: rgb_to_log_chroma(torch.zeros(2)), r"rgb must be \(..., 3\)"),
        (lambda: log_chroma_to_rgb(torch.zeros(3)), r"uv must be \(..., 2\)"),
        (lambda: local_gradient(torch.zeros(3, 3)), r"x must be \(..., C, H, W\)"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
