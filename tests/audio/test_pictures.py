"""Pictures of sound: what stands where in them."""

from __future__ import annotations

import numpy as np
import pytest

from convatlas.audio.pictures import spectrogram_picture, waveform_picture


def test_a_picture_has_low_frequencies_at_the_bottom():
    values = np.zeros((4, 3))
    values[0, 1] = 1.0
    pixels = spectrogram_picture(values)
    assert pixels.sum(2).argmax() == 3 * 3 + 1
    with pytest.raises(ValueError, match=r"values must be \(F, T\) and not empty"):
        spectrogram_picture(np.zeros((0, 3)))


def test_several_spectrograms_can_have_one_scale():
    values = np.array([[1.0, 0.1]])
    alone, beside = (spectrogram_picture(values, loudest=top).astype(int) for top in (1.0, 100.0))
    assert (alone.sum(2) > beside.sum(2)).all()
    np.testing.assert_array_equal(spectrogram_picture(100 * values, loudest=100.0), alone)


def test_a_waveform_spans_its_columns():
    wave = np.zeros(1000)
    wave[500:] = np.tile([1.0, -0.5], 250)
    blue = waveform_picture(wave, 10, 101)[..., 0] == 0
    np.testing.assert_array_equal(blue[:, 2].nonzero()[0], [50])
    np.testing.assert_array_equal(blue[:, 8].nonzero()[0], np.arange(0, 76))
    half = waveform_picture(wave, 10, 101, loudest=2.0)[..., 0] == 0
    np.testing.assert_array_equal(half[:, 8].nonzero()[0], np.arange(25, 63))
    assert waveform_picture([0.5, -0.5], 7, 5).shape == (5, 7, 3)
    for bad in ((np.zeros((0,)), 3, 3), (np.zeros((2, 2)), 3, 3), (wave, 0, 3)):
        with pytest.raises(ValueError, match=r"must be"):
            waveform_picture(*bad)
