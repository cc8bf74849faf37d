"""Spectra, bright places in them, and minimum filters, against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from convatlas.ops.rank_filters import maximum_filter, minimum_filter
from convatlas.ops.spectral_points import count_contours, log_spectrum, spectral_mask, spectral_points


@pytest.mark.parametrize("shape", [(12, 16), (11, 13), (8, 7), (1, 5), (6, 1)])
def test_spectra_are_those_of_the_whole_transform(shape: tuple[int, int]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = 20 * np.log(np.abs(np.fft.fftshift(np.fft.fft2(x.numpy()))) + 1e-12)
    found = log_spectrum(x)
    keep = torch.from_numpy(expected > 0)
    torch.testing.assert_close(found[keep], torch.from_numpy(expected)[keep], rtol=1e-9, atol=1e-9)
    for threshold in (90, 120.7):
        assert torch.equal(spectral_mask(x, threshold), torch.from_numpy(expected.round() > threshold))


def test_a_grid_of_changed_pixels_repeats_the_bright_place() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 96), torch.linspace(0, 5, 96), indexing="ij")
    smooth = (127 + 100 * torch.sin(rows) * torch.cos(columns)).to(torch.uint8)
    changed = smooth.clone()
    changed[::4, ::4] = 255 - changed[::4, ::4]
    # By size: 230 is for 224 x 224.
    counts = spectral_points(spectral_mask(torch.stack([smooth, changed]), 180.0))
    assert counts.tolist()[0] == 1
    assert counts.tolist()[1] > 4


def test_contours_count_blobs_and_holes() -> None:
    mask = torch.zeros(12, 14, dtype=torch.bool)
    assert count_contours(mask) == 0
    mask[0, 0] = mask[1, 1] = True  # neighbours across a corner are one blob
    assert count_contours(mask) == 1
    mask[4:9, 4:9] = True
    mask[6, 6] = False
    assert count_contours(mask) == 3  # two blobs and a hole
    mask[7, 7] = False  # holes do not join across a corner
    assert count_contours(mask) == 4
    assert count_contours(~torch.zeros(3, 3, dtype=torch.bool)) == 1


def test_tiny_masks_are_mirrored_as_often_as_it_takes() -> None:
    for shape in ((1, 1), (2, 3), (4, 25)):
        assert spectral_points(torch.ones(shape, dtype=torch.bool)) == 1
        assert spectral_points(torch.zeros(shape, dtype=torch.bool)) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(2, 9, 8), (1, 1, 4), (3, 2, 1)])
def test_rank_filters_are_scipys(size: int, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for ours, theirs in ((minimum_filter, ndimage.minimum_filter), (maximum_filter, ndimage.maximum_filter)):
        before = x.clone()
        expected = theirs(x.numpy(), (1, size, size), mode="nearest")
        assert torch.equal(ours(x, size), torch.from_numpy(expected))
        assert torch.equal(x, before)
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        minimum_filter(x, 0)
