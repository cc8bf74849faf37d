"""The filter bank of Kaldi: where its bands lie and what a tone gives."""

from __future__ import annotations

import math

import pytest
import torch

from convatlas.ops.kaldi_filter_bank import kaldi_filter_bank, kaldi_mel_filters


def test_triangles_overlap_by_half():
    filters = kaldi_mel_filters(20, 2048, 16000)
    assert filters.shape == (20, 1025)
    inside = slice(int(filters[0].argmax()) + 1, int(filters[-1].argmax()) + 1)
    torch.testing.assert_close(filters.sum(0)[inside], torch.ones_like(filters[0, inside]), rtol=0, atol=1e-12)
    assert not filters[:, -1].any()
    assert not filters[:, 0].any()


def test_a_tone_is_loudest_in_its_band():
    rate, hertz = 8000, 1000.0
    tone = torch.sin(2 * math.pi * hertz * torch.arange(2000) / rate)
    bank = kaldi_filter_bank(tone, rate, num_filters=24)
    assert bank.shape == (1 + (2000 - 200) // 80, 24)
    mel = [1127 * math.log(1 + each / 700) for each in (20, hertz, rate / 2)]
    expected = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 25 - 1
    assert (bank.argmax(1) - expected).abs().max() <= 1


def test_silence_is_the_floor_and_a_constant_is_silence():
    for value in (0.0, 3.0):
        bank = kaldi_filter_bank(torch.full((2, 500), value), 16000, num_filters=8)
        torch.testing.assert_close(bank, torch.full((2, 1, 8), math.log(2.0**-23)))


def test_gradients_reach_the_waveform():
    x = torch.randn(1, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kaldi_filter_bank(x, 2000, num_filters=4), (x,), fast_mode=True)


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="waveform must have at least the 400 samples of a frame"):
        kaldi_filter_bank(torch.zeros(399))
    with pytest.raises(ValueError, match="frame_length and frame_shift must hold samples"):
        kaldi_filter_bank(torch.zeros(500), frame_shift=0)
    with pytest.raises(ValueError, match="num_filters must be positive and n_fft even, got 0 and 512"):
        kaldi_mel_filters(0, 512, 16000)
    with pytest.raises(ValueError, match="sample_rate must be above 40 Hz, got 30"):
        kaldi_mel_filters(4, 512, 30)
