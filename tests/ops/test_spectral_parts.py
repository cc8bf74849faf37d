"""Framing, windows, filter banks, correlation, STFT and constant-Q kernels: definitions, inverses and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F

from convatlas.ops.constant_q import Bins, early_factor, lowpass_filter, spectral_kernels, time_kernels
from convatlas.ops.filter_banks import (
    decibels,
    discrete_cosine_basis,
    gammatone_filter_bank,
    log_frequency_maps,
    mel_filter_bank,
)
from convatlas.ops.framing import frame_pieces, frames, overlap_add, pad_ends, window, zero_padded
from convatlas.ops.stft import bin_positions, fourier_kernels, griffin_lim, inverse_stft, stft
from convatlas.ops.strided_correlation import bands, decimate, strided_correlation

# -- framing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "hop"), [(8, 3), (6, 6), (4, 7), (9, 1)])
def test_overlap_add_is_the_transpose_of_framing(size: int, hop: int):
    x = torch.randn(2, 40, dtype=torch.float64)
    cut = frames(x, size, hop)
    other = torch.randn_like(cut)
    added = overlap_add(other, hop)
    assert added.shape == (2, (cut.shape[1] - 1) * hop + size)
    torch.testing.assert_close((cut * other).sum(), (x[:, : added.shape[1]] * added).sum())


def test_pieces_hold_every_frame_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("convatlas.ops.framing._PIECE", 60)
    x = torch.randn(2, 101)
    pieces = [frames(piece, 9, 4) for piece in frame_pieces(x, 9, 4)]
    assert len(pieces) > 3
    assert torch.equal(torch.cat(pieces, dim=1), frames(x, 9, 4))


def test_windows():
    assert torch.equal(window("ones", 5), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(window("hann", 8), torch.hann_window(8, dtype=torch.float64))
    gauss = window(("gaussian", 60), 200)
    assert 20 * torch.log10(gauss[0]) == pytest.approx(-60, abs=2)
    assert zero_padded(torch.ones(3), 6).tolist() == [0, 1, 1, 1, 0, 0]
    for wrong in ("hannn", ("gaussian", -3), ("kaiser",)):
        with pytest.raises(ValueError, match=r"window|Gaussian"):
            window(wrong, 8)
    with pytest.raises(ValueError, match="length of a window must be positive, got 0"):
        window("hann", 0)
    with pytest.raises(ValueError, match="signal of 4 samples is shorter than the reflect padding of 4"):
        pad_ends(torch.zeros(1, 4), 4)


# -- correlation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [3, 300, 1001])
def test_decimation_is_a_strided_convolution(factor: int, length: int):
    x, taps = torch.randn(3, length, dtype=torch.float64), lowpass_filter(0.5)
    expected = F.conv1d(x[:, None], taps[None, None], stride=factor, padding=127)[:, 0]
    torch.testing.assert_close(decimate(x, taps, factor), expected)


def test_bands_are_where_the_kernels_are_not_zero():
    kernels = torch.zeros(5, 20)
    kernels[0, 1:19] = kernels[1, 3:17] = kernels[2, 8:12] = kernels[3, 9:12] = 1
    assert bands(kernels) == ((0, 2, 1, 19), (2, 4, 8, 12), (4, 5, 0, 1))


def test_nothing_correlated_with_something_is_nothing():
    for backend in ("naive", "conv", "matmul", "polyphase"):
        assert strided_correlation(torch.zeros(0, 9), torch.zeros(2, 4), 2, backend=backend).shape == (0, 2, 3)
    for backend in ("naive", "conv", "fft"):
        assert stft(torch.zeros(0, 9), torch.ones(4), 2, backend=backend).shape == (0, 3, 3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: strided_correlation(torch.zeros(9), torch.zeros(2, 4), 1), r"x must be \(B, L\) and kernels"),
        (lambda: strided_correlation(torch.zeros(1, 9).long(), torch.zeros(2, 4), 1), "real floating point"),
        (lambda: strided_correlation(torch.zeros(1, 9), torch.zeros(2, 4), 0), "hop must be at least 1, got 0"),
        (lambda: strided_correlation(torch.zeros(1, 3), torch.zeros(2, 4), 1), "4 samples of a kernel at least, got 3"),
        (lambda: stft(torch.zeros(1, 3), torch.zeros(4), 1), "4 samples of the window at least, got 3"),
        (lambda: stft(torch.zeros(1, 9), torch.zeros(4), 0), "hop must be at least 1"),
        (lambda: stft(torch.zeros(9), torch.zeros(4), 1), r"x must be \(B, L\)"),
        (lambda: decimate(torch.zeros(1, 9), torch.zeros(1, 4), 2), r"taps must be \(M,\)"),
        (lambda: decimate(torch.zeros(1, 9), torch.zeros(4), 0), "factor must be at least 1"),
        (lambda: bin_positions(1), "n_fft must be at least 2"),
        (lambda: bin_positions(8, freq_scale="mel"), "freq_scale must be 'no', 'linear', 'log' or 'log2', got 'mel'"),
        (lambda: bin_positions(8, freq_scale="log", fmin=0), "fmin and fmax must be positive"),
        (lambda: inverse_stft(torch.zeros(1, 4, 3, 2), torch.ones(8), 2), "one-sided .* must have 5 bins, got 4"),
        (lambda: griffin_lim(torch.zeros(1, 5, 3), n_fft=16), "magnitude must be"),
        (lambda: griffin_lim(torch.zeros(1, 5, 3), momentum=1.0), "momentum from 0 to below 1, got 32 and 1.0"),
        (lambda: griffin_lim(torch.zeros(1, 5, 3), torch.zeros(1, 5, 4)), "init_phase must have the shape"),
        (lambda: mel_filter_bank(8000, 256, 0), "n_mels positive"),
        (lambda: mel_filter_bank(8000, 256, fmin=5000), "fmin must be from 0 to below fmax"),
        (lambda: mel_filter_bank(8000, 256, norm=2), "norm must be 1 or None, got 2"),
        (lambda: gammatone_filter_bank(8000, 256, fmin=5000), "fmin must be from 0 to below fmax"),
        (lambda: log_frequency_maps(8000, 500, 16, 900, 0.001, 4), "three bins lie between"),
        (lambda: time_kernels(Bins(1000, 40), 8000), "The top bin .*Hz has exceeded the Nyquist frequency"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


# -- filters -----------------------------------------------------------------------------------------------------------


def test_mel_bands():
    plain = mel_filter_bank(16000, 4096, 30, norm=None)
    assert 0.95 < float(plain.amax(1).min()) <= float(plain.max()) <= 1
    # Slaney's norm gives each band the same area.
    areas = mel_filter_bank(16000, 4096, 30).sum(1) * 16000 / 4096
    torch.testing.assert_close(areas, torch.ones_like(areas), rtol=0.02, atol=0)
    # HTK's scale has 1000 mel at 1000 Hz: the middle of one band between 0 and 2000 mel.
    middle = mel_filter_bank(16000, 16000, 1, 0, 700 * (10 ** (2000 / 2595) - 1), htk=True)
    assert float(middle.argmax()) == pytest.approx(1000, abs=1)
    with pytest.warns(UserWarning, match="Mel bands .* hold no bin of a transform of 64 samples"):
        mel_filter_bank(16000, 64, 60)


def test_gammatone_filters_peak_at_their_centres():
    bank = gammatone_filter_bank(16000, 4096, 10, 200, 6000)
    peaks = bank.argmax(1) * 16000 / 4096
    assert float(peaks[0]) == pytest.approx(200, abs=10)
    assert bool((peaks.diff() > 0).all())
    # The gain of the published formula makes peaks of one over the size of the transform.
    torch.testing.assert_close(bank.amax(1) * 4096, torch.ones(10, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_cosine_transform(orthonormal: bool):
    x = np.random.default_rng(0).normal(size=13)
    expected = scipy.fft.dct(x, norm="ortho" if orthonormal else None)
    np.testing.assert_allclose(discrete_cosine_basis(13, orthonormal=orthonormal) @ torch.from_numpy(x), expected)


def test_decibels_have_a_floor_of_each_sample():
    power = torch.tensor([[[1.0, 1e-3, 1e-9]], [[100.0, 1e-12, 1.0]]])
    assert decibels(power, top_db=80).flatten().tolist() == pytest.approx([0, -30, -80, 20, -60, 0])
    assert decibels(power, top_db=None, amin=1e-5).flatten().tolist() == pytest.approx([0, -30, -50, 20, -50, 0])
    assert float(decibels(torch.ones(1, 1, 1), ref=10.0)) == pytest.approx(-10)


# -- transforms --------------------------------------------------------------------------------------------------------


def test_kernels_are_exact_in_float64():
    cos, sin = fourier_kernels(2048, bin_positions(2048))
    k, n = np.arange(1025)[:, None], np.arange(2048)
    exact = np.exp(2j * np.pi * (k * n % 2048) / 2048)
    assert np.abs(cos.numpy() - exact.real).max() < 1e-12
    assert np.abs(sin.numpy() - exact.imag).max() < 1e-12


def test_scales_begin_at_fmin_and_do_not_reach_fmax():
    for scale in ("linear", "log", "log2"):
        hertz = bin_positions(256, 40, freq_scale=scale, fmin=100, fmax=3000, sr=8000) * 8000 / 256
        assert float(hertz[0]) == pytest.approx(100)
        assert float(hertz[-1]) < 3000
    steps = hertz[1:] / hertz[:-1]
    torch.testing.assert_close(steps, torch.full_like(steps, 30 ** (1 / 40)))


def test_spectral_convergence_of_griffin_lim():
    x = torch.sin(torch.arange(2048, dtype=torch.float64) ** 1.5 / 60)[None]

    def spectrum(y: torch.Tensor) -> torch.Tensor:
        return torch.hypot(*stft(pad_ends(y, 64), window("hann", 128), 32).unbind(-1))

    target = spectrum(x)
    errors = {}
    for momentum in (0.0, 0.99):
        generator = torch.Generator().manual_seed(0)
        y = griffin_lim(target, hop_length=32, n_iter=60, momentum=momentum, generator=generator)
        errors[momentum] = float((spectrum(y) - target).norm() / target.norm())
    assert errors[0.99] < errors[0.0] < 0.3


def test_constant_q_kernels():
    bins = Bins(220, 30, gamma=3)
    kernels, lengths = time_kernels(bins, 8000), bins.lengths(8000)
    torch.testing.assert_close(kernels.abs().sum(1), torch.ones(30, dtype=torch.float64))
    assert (kernels != 0).sum(1).tolist() == [int(length) - 1 for length in lengths]  # a Hann window begins with zero
    energy = time_kernels(bins, 8000, norm=2).abs().square().sum(1)
    torch.testing.assert_close(energy, torch.ones_like(energy))
    peaks = spectral_kernels(kernels).abs().argmax(1).double() * 8000 / kernels.shape[1]
    torch.testing.assert_close(peaks, bins.frequencies, rtol=0.03, atol=0)


def test_octaves_and_early_decimation():
    bins = Bins(55, 45)
    assert (bins.octaves, bins.highest_octave.n_bins, early_factor(bins, 16000, 256)) == (4, 12, 4)
    torch.testing.assert_close(bins.highest_octave.frequencies, bins.frequencies[-12:])
    assert Bins(55, 7).highest_octave == Bins(55, 7)
    assert early_factor(bins, 16000, 8) == 1  # the hop of the lowest octave would vanish
