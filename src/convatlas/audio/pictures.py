"""Sound to look at: spectrograms and waveforms as pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["spectrogram_picture", "waveform_picture"]

#: Decibels from black to white in a picture of a spectrogram.
_RANGE = 80.0
_WAVE, _AXIS = (0, 114, 178), (200, 203, 208)


def spectrogram_picture(
    values: npt.ArrayLike, *, decibels: bool = True, loudest: float | None = None
) -> npt.NDArray[np.uint8]:
    """A picture (F, T, 3) of a spectrogram (F, T), low frequencies at the bottom.

    Args:
        values: magnitudes or powers, or with ``decibels=False`` any numbers.
        decibels: show the 80 dB below the largest value.
        loudest: what counts as the largest value, so that several pictures have one scale; by default that of
            ``values``.

    Raises:
        ValueError: values have another number of axes or are empty.
    """
    from matplotlib import colormaps

    shown = np.asarray(values, dtype=np.float64)
    if shown.ndim != 2 or not shown.size:
        raise ValueError(f"values must be (F, T) and not empty, got {shown.shape}")
    if decibels:
        top = max(float(shown.max()) if loudest is None else loudest, float(np.finfo(np.float32).tiny))
        shown = 10 * np.log10(np.clip(shown / top, 10 ** (-_RANGE / 10), 1))
        low, high = (-_RANGE, 0.0) if loudest is not None else (float(shown.min()), float(shown.max()))
    else:
        low, high = float(shown.min()), float(shown.max())
    scaled = (shown - low) / max(high - low, float(np.finfo(np.float64).tiny))
    return (255 * colormaps["magma"](scaled[::-1])[..., :3]).round().astype(np.uint8)


def waveform_picture(
    samples: npt.ArrayLike, width: int, height: int, *, loudest: float | None = None
) -> npt.NDArray[np.uint8]:
    """A picture (height, width, 3) of a sound (T,): for each column the span from its lowest to its highest sample.

    Args:
        samples: (T,).
        width, height: of the picture, in pixels.
        loudest: the magnitude that reaches the upper and lower edge; by default the largest of ``samples``.

    Raises:
        ValueError: samples have another number of axes or are empty, or the picture has no pixels.
    """
    wave = np.asarray(samples, dtype=np.float64)
    if wave.ndim != 1 or not wave.size:
        raise ValueError(f"samples must be (T,) and not empty, got {wave.shape}")
    if min(width, height) < 1:
        raise ValueError(f"width and height must be positive, got {width} and {height}")
    top = max(float(np.abs(wave).max()) if loudest is None else loudest, float(np.finfo(np.float32).tiny))
    starts = np.minimum(np.arange(width) * len(wave) // width, len(wave) - 1)
    edges = np.stack([np.maximum.reduceat(wave, starts), np.minimum.reduceat(wave, starts)])
    rows = np.round((1 - np.clip(edges / top, -1, 1)) / 2 * (height - 1))
    row = np.arange(height)[:, None]
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[(height - 1) // 2] = _AXIS
    pixels[(rows[0] <= row) & (row <= rows[1])] = _WAVE
    return pixels
