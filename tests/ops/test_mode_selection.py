from __future__ import annotations

import pytest
import torch

from convatlas.ops.dct import idct
from convatlas.ops.forecast_errors import (
    mean_absolute_error,
    normalised_mse,
    spectral_mse,
    spectral_relative_l2,
    symmetric_percentage_error,
)
from convatlas.ops.mode_selection import select_modes, truncation_error


def test_the_smallest_box_that_holds_the_energy():
    modes = torch.zeros(2, 1, 8, 6, dtype=torch.float64)
    modes[:, :, 0, 0], modes[:, :, 4, 0], modes[:, :, 0, 1] = 8.0, 3.0, 1.0
    fields = idct(modes, (2, 3))
    assert select_modes(fields, 0.8) == (1, 1)
    assert select_modes(fields, 0.95) == (5, 1)
    assert select_modes(fields, 1.0) == (5, 2)
    torch.testing.assert_close(truncation_error(fields, (4, 2)), torch.full((2,), (9 / 74) ** 0.5, dtype=torch.float64))
    assert truncation_error(fields, (5, 2)).max() < 1e-12


def test_small_boxes_win_over_long_ones():
    modes = torch.zeros(1, 1, 9, 9, 9)
    modes[..., 2, 2, 1], modes[..., 8, 0, 0] = 1.0, 0.99
    assert select_modes(idct(modes, (2, 3, 4)), 0.5) == (9, 1, 1) or select_modes(idct(modes, (2, 3, 4)), 0.5) == (
        3,
        3,
        2,
    )
    assert select_modes(idct(modes, (2, 3, 4)), 0.505) == (3, 3, 2)
    assert select_modes(torch.randn(3, 2, 7), 1.0) == (7,)


def test_errors_of_forecasts():
    truth = torch.tensor([[[1.0, 2.0, 0.0, -1.0]], [[2.0, 2.0, 2.0, 2.0]]])
    prediction = torch.tensor([[[1.0, 1.0, 0.0, 1.0]], [[1.0, 2.0, 2.0, 3.0]]])
    torch.testing.assert_close(mean_absolute_error(prediction, truth), torch.tensor([0.75, 0.5]))
    expected = torch.tensor([(2 / 3 + 2) / 4, (2 / 3 + 2 / 5) / 4])
    torch.testing.assert_close(symmetric_percentage_error(prediction, truth), expected)
    torch.testing.assert_close(normalised_mse(prediction, truth), torch.tensor([5 / 6, 2 / 16]))
    modes = torch.randn(2, 1, 4)
    field = idct(modes)
    torch.testing.assert_close(spectral_mse(modes, truth), (field - truth).square().flatten(1).mean(1))
    expected = (field - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    torch.testing.assert_close(spectral_relative_l2(modes, truth), expected)


def test_bad_input():
    fields = torch.randn(2, 1, 4)
    with pytest.raises(ValueError, match="energy must be above 0 and at most 1, got 0"):
        select_modes(fields, 0)
    with pytest.raises(ValueError, match=r"targets must be \(N, C, \*grid\) with one, two or three axes, got \(2, 1\)"):
        select_modes(fields[..., 0])
    with pytest.raises(ValueError, match="targets must hold a field, got none"):
        select_modes(fields[:0])
    with pytest.raises(ValueError, match=r"modes must be from 1 to \(4,\), got \(5,\)"):
        truncation_error(fields, (5,))
    with pytest.raises(ValueError, match="prediction and truth must have one shape"):
        normalised_mse(fields, fields[:1])
