"""Simulated voices: what they are made of, ratios, seeds and errors."""

from __future__ import annotations

import numpy as np
import pytest

from convatlas.data.voices import SPEAKERS, mix_at_snr, simulated_mixtures, voices
from convatlas.errors import UnknownName


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_pitch_and_level(speaker: str):
    found = voices(speaker, 3, seconds=2.0, seed=1)
    assert found.shape == (3, 16_000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.std(1), 1, atol=1e-3)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-3)
    low, high = SPEAKERS[speaker].pitch
    for voice in found:
        # The autocorrelation of a harmonic sound peaks at its period.
        spectrum = np.fft.rfft(voice, 32_000)
        correlation = np.fft.irfft(np.abs(spectrum) ** 2)
        lags = np.arange(int(8000 / (1.03 * high)), int(8000 / (0.97 * low)) + 2)
        period = lags[correlation[lags].argmax()]
        assert correlation[period] > 0.3 * correlation[0]


def test_mixtures_are_sums_at_the_ratio_asked_for():
    mixed = simulated_mixtures(4, num_speakers=3, seconds=0.25, snr_db=(3.0, 3.0))
    assert mixed.sources.shape == (4, 3, 2000)
    np.testing.assert_allclose(mixed.mixture, mixed.sources.sum(1), atol=1e-5)
    power = np.square(mixed.sources).mean(2)
    np.testing.assert_allclose(10 * np.log10(power[:, :1] / power[:, 1:]), 3, atol=1e-3)
    varied = simulated_mixtures(40, seconds=0.1, snr_db=(-5.0, 5.0))
    power = np.square(varied.sources).mean(2)
    ratios = 10 * np.log10(power[:, 0] / power[:, 1])
    assert -5.01 < ratios.min() < -3 < 3 < ratios.max() < 5.01


def test_seeds():
    one, again, other = (simulated_mixtures(2, seconds=0.1, seed=seed).mixture for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    low, high = (np.abs(voices(speaker, 1, seed=1)[0]).reshape(-1, 80).mean(1) for speaker in ("low", "high"))
    assert abs(np.corrcoef(low, high)[0, 1]) < 0.9  # syllables of their own
    pool = simulated_mixtures(30, seconds=0.05, voices_per_speaker=2).sources
    firsts = {np.round(source / source.std(), 3).tobytes() for source in pool.reshape(60, -1)}
    assert len(firsts) <= 12  # four voices, apart from rounding


def test_silence_stays_silent():
    scaled = mix_at_snr(np.stack([np.ones(8), np.zeros(8)]), 5.0)
    assert not scaled[1].any()
    np.testing.assert_array_equal(scaled[0], 1)


def test_errors_name_the_argument():
    with pytest.raises(UnknownName, match="unknown speaker 'deep'"):
        voices("deep", 1)
    with pytest.raises(ValueError, match="count must be at least 1, sample_rate 1000 and seconds one sample"):
        voices("low", 1, seconds=0.0)
    with pytest.raises(ValueError, match="num_speakers from 1 to 3, got 2 and 4"):
        simulated_mixtures(2, num_speakers=4)
    with pytest.raises(ValueError, match="voices_per_speaker must be at least 1, got 0"):
        simulated_mixtures(2, voices_per_speaker=0)
    with pytest.raises(ValueError, match=r"lowest and a highest ratio, got \(5, -5\)"):
        simulated_mixtures(2, snr_db=(5, -5))
