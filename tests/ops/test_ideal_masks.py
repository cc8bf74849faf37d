"""Ideal masks: what they give where sources do not overlap, and that masks of all sources share out the mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.ops.ideal_masks import ideal_mask_separation


def tones() -> torch.Tensor:
    time = torch.arange(2000, dtype=torch.float64) / 8000
    return torch.stack([torch.sin(2 * torch.pi * 500 * time), 0.5 * torch.sin(2 * torch.pi * 2500 * time)])


@pytest.mark.parametrize("kind", ["binary", "ratio", "wiener"])
def test_sources_in_different_bands_come_apart(kind: Any):
    sources = tones()
    estimates = ideal_mask_separation(sources.sum(0), sources, kind)
    assert float((estimates - sources)[:, 300:-300].abs().max()) < 0.02


@pytest.mark.parametrize("kind", ["binary", "ratio", "wiener"])
def test_estimates_add_up_to_the_mixture(kind: Any):
    sources = torch.randn(3, 2, 701, dtype=torch.float64)
    mixture = sources.sum(1)
    estimates = ideal_mask_separation(mixture, sources, kind, n_fft=64, hop_length=16)
    torch.testing.assert_close(estimates.sum(1), mixture, rtol=0, atol=1e-6)
    one = ideal_mask_separation(mixture[1], sources[1], kind, n_fft=64, hop_length=16)
    torch.testing.assert_close(one, estimates[1])


def test_masks_are_those_of_their_definitions():
    # Parallel sources: every bin has the same shares, whatever the window.
    wave = torch.randn(500, dtype=torch.float64)
    sources = torch.stack([3 * wave, wave])
    shares = {"binary": (1.0, 0.0), "ratio": (0.75, 0.25), "wiener": (0.9, 0.1)}
    for kind, expected in shares.items():
        estimates = ideal_mask_separation(sources.sum(0), sources, kind, n_fft=64, hop_length=16)
        for estimate, share in zip(estimates, expected, strict=True):
            torch.testing.assert_close(estimate, share * 4 * wave, rtol=1e-5, atol=1e-5)


def test_bad_input_is_told():
    x = torch.randn(100)
    with pytest.raises(UnknownName, match="did you mean binary"):
        ideal_mask_separation(x, x[None], "binar")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(100,\) and \(1, 99\)"):
        ideal_mask_separation(x, x[None, 1:])
    with pytest.raises(ValueError, match="hop_length must be from 1 to half"):
        ideal_mask_separation(x, x[None], n_fft=64, hop_length=64)
