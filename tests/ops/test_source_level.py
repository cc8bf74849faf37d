"""Levels of separated sources: loud as the mixture, or such that they add up to it."""

from __future__ import annotations

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.ops.source_level import match_level, mixture_consistent


def _sources() -> tuple[torch.Tensor, torch.Tensor]:
    sources = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sources, sources.sum(1)


def test_sources_become_as_loud_as_the_mixture():
    sources, mixture = _sources()
    loud = 3e4 * sources
    loud[1, 2] = 0
    peak = match_level(loud, mixture).abs().amax(2)
    torch.testing.assert_close(peak[0], mixture[0].abs().max().expand(3))
    rms = match_level(loud, mixture, "rms").square().mean(2).sqrt()
    torch.testing.assert_close(rms[0], mixture[0].square().mean().sqrt().expand(3))
    assert not match_level(loud, mixture)[1, 2].any()
    torch.testing.assert_close(match_level(loud[0], mixture[0]), match_level(loud, mixture)[0])


def test_gains_bring_back_sources_of_another_scale_and_sign():
    sources, mixture = _sources()
    scaled = sources * torch.tensor([1e3, -0.2, 5.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(mixture_consistent(scaled, mixture), sources)
    noisy = scaled + torch.randn(scaled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left = mixture - mixture_consistent(noisy, mixture).sum(1)
    # Nothing of the estimates is left in what is missing.
    assert (noisy @ left.unsqueeze(-1)).abs().max() < 1e-6
    silent = torch.cat([scaled, torch.zeros_like(scaled[:, :1])], 1)
    torch.testing.assert_close(mixture_consistent(silent, mixture)[:, :3], sources)


def test_errors_name_the_argument():
    sources, mixture = _sources()
    with pytest.raises(UnknownName, match="unknown level 'loud'"):
        match_level(sources, mixture, "loud")
    for function in (match_level, mixture_consistent):
        with pytest.raises(ValueError, match=r"must be \(..., C, T\) and \(..., T\), got \(2, 3, 400\) and \(2, 399\)"):
            function(sources, mixture[:, 1:])
