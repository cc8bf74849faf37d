"""Signal ratios: their definitions, what they do not depend on, lengths, silence and errors."""

from __future__ import annotations

import math

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.ops.signal_ratios import (
    pairwise_signal_ratio,
    sd_sdr,
    si_snr,
    si_snr_improvement,
    signal_ratio,
    snr,
)


def _signals(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    return reference + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64), reference


def test_orthogonal_noise_gives_the_ratio_of_powers():
    time = torch.arange(800, dtype=torch.float64) / 100
    reference, noise = torch.sin(2 * math.pi * time), 0.1 * torch.cos(2 * math.pi * time)
    for ratio in (si_snr, sd_sdr, snr):
        assert ratio(reference + noise, reference).item() == pytest.approx(20, abs=1e-6)
    # Half the amplitude is an error of half the signal, but none of its shape.
    assert snr(0.5 * reference, reference).item() == pytest.approx(20 * math.log10(2), abs=1e-6)
    assert sd_sdr(0.5 * reference, reference).item() == pytest.approx(0, abs=1e-6)
    assert si_snr(0.5 * reference, reference) > 80


def test_si_snr_does_not_depend_on_scale_sign_and_offset_of_the_estimate():
    estimate, reference = _signals(3, 500)
    plain = si_snr(estimate, reference)
    torch.testing.assert_close(si_snr(-7 * estimate + 3, reference), plain, rtol=0, atol=1e-6)
    assert ((si_snr(estimate + 3, reference, zero_mean=False) - plain).abs() > 1).all()
    assert ((sd_sdr(2 * estimate, reference) - sd_sdr(estimate, reference)).abs() > 1).all()


def test_every_pair_is_compared():
    estimates, references = _signals(2, 3, 200)
    for kind in ("si_snr", "sd_sdr", "snr"):
        table = pairwise_signal_ratio(estimates, references, kind)
        expected = signal_ratio(estimates[1, 2], references[1, 0], kind)
        torch.testing.assert_close(table[1, 2, 0], expected)
        assert table.shape == (2, 3, 3)


def test_samples_behind_the_length_do_not_count():
    estimates, references = _signals(2, 2, 120)
    lengths = torch.tensor([120, 70])
    mixture = references.sum(1)
    table = pairwise_signal_ratio(estimates, references, lengths=lengths)
    cut = pairwise_signal_ratio(estimates[1:, :, :70], references[1:, :, :70])
    torch.testing.assert_close(table[1:], cut)
    gain = si_snr_improvement(estimates, references, mixture, lengths=lengths)
    cut_gain = si_snr_improvement(estimates[1:, :, :70], references[1:, :, :70], mixture[1:, :70])
    torch.testing.assert_close(gain[1:], cut_gain)
    spoilt = estimates.clone()
    spoilt[1, :, 70:] = 1e3
    torch.testing.assert_close(pairwise_signal_ratio(spoilt, references, lengths=lengths), table)


def test_the_mixture_improves_on_itself_by_nothing():
    _, references = _signals(2, 3, 90)
    mixture = references.sum(1)
    gain = si_snr_improvement(mixture.unsqueeze(1).expand_as(references), references, mixture)
    torch.testing.assert_close(gain, torch.zeros_like(gain))


def test_silence_and_half_precision_stay_finite():
    silent, noise = torch.zeros(2, 50), torch.randn(2, 50, requires_grad=True)
    for kind in ("si_snr", "sd_sdr", "snr"):
        value = signal_ratio(noise, silent, kind).sum() + signal_ratio(silent, silent, kind).sum()
        assert value.isfinite()
        assert torch.autograd.grad(value, noise)[0].isfinite().all()
    estimate, reference = _signals(1000)
    half = si_snr(estimate.bfloat16(), reference.bfloat16())
    assert half.dtype == torch.float32
    assert abs(half.item() - si_snr(estimate, reference).item()) < 0.1


def test_errors_name_the_argument():
    x = torch.randn(2, 2, 9)
    with pytest.raises(UnknownName, match="unknown ratio 'sdr'"):
        signal_ratio(x, x, "sdr")
    with pytest.raises(ValueError, match=r"of one length, got \(2, 2, 9\) and \(2, 2, 8\)"):
        si_snr(x, x[..., :8])
    with pytest.raises(ValueError, match=r"must be floating point, got torch.int64"):
        si_snr(x.long(), x)
    with pytest.raises(ValueError, match=r"must be \(B, C, T\) alike, got \(2, 9\) and \(2, 9\)"):
        pairwise_signal_ratio(x[0], x[0])
    with pytest.raises(ValueError, match=r"mixture must be \(B, T\) of the estimates \(2, 2, 9\), got \(2, 8\)"):
        si_snr_improvement(x, x, x[:, 0, :8])
    with pytest.raises(ValueError, match=r"lengths must be \(2,\), got \(3,\)"):
        pairwise_signal_ratio(x, x, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="lengths must be whole numbers"):
        pairwise_signal_ratio(x, x, lengths=torch.tensor([1.0, 2.0]))
