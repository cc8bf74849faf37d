"""Spectra of fields: waves stand at their wave number, whatever their place."""

from __future__ import annotations

import math

import pytest
import torch

from convatlas.ops.field_spectrum import radial_spectrum, spectrum_error


def _wave(along_y: int, along_x: int, phase: float = 0.0, n: int = 16) -> torch.Tensor:
    line = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.cos(along_y * line[:, None] + along_x * line + phase)


def test_waves_stand_at_their_number():
    spectrum = radial_spectrum(torch.stack([_wave(3, 4), _wave(0, 2)]))
    assert spectrum.shape == (2, 9)
    assert spectrum.argmax(1).tolist() == [5, 2]
    torch.testing.assert_close(spectrum.square().sum(1), torch.full((2,), 16 * 16 / 2, dtype=torch.float64))


def test_error_sees_sizes_but_no_places():
    truth = _wave(2, 1)
    assert float(spectrum_error(_wave(2, 1, 0.7), truth)) == pytest.approx(0, abs=1e-12)
    assert float(spectrum_error(1.5 * truth, truth)) == pytest.approx(0.5)
    assert float(spectrum_error(_wave(6, 1), truth)) == pytest.approx(math.sqrt(2))
