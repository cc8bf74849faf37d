"""Relative errors against their definition."""

from __future__ import annotations

import pytest
import torch

from convatlas.ops.relative_error import relative_l2


def test_relative_l2_is_one_number_a_sample():
    truth = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    prediction = truth * torch.tensor([1.0, 1.1, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    torch.testing.assert_close(relative_l2(prediction, truth), torch.tensor([0, 0.1, 2], dtype=torch.float64))
    spectra = [torch.fft.fft2(field, norm="ortho") for field in (prediction, truth)]
    torch.testing.assert_close(relative_l2(*spectra), relative_l2(prediction, truth))


def test_other_shapes_are_told():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3\) and \(1, 1, 3\)"):
        relative_l2(torch.randn(1, 2, 3), torch.randn(1, 1, 3))
