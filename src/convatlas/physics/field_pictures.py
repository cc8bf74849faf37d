"""Fields as pictures: colours for two axes, curves for one, the middle slice of three."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.report import Lines

__all__ = ["field_picture", "field_row"]

Array = npt.NDArray[Any]

#: Pixels between fields side by side, and least pixels of the side of one.
_GAP, _SIDE = 4, 128


def field_picture(field: Array, low: float, high: float) -> npt.NDArray[np.uint8]:
    """A field (H, W) in colours from ``low`` to ``high``, (h, w, 3), small ones enlarged without smoothing."""
    from matplotlib import colormaps

    share = (field - low) / (high - low) if high > low else np.zeros_like(field)
    pixels = (255 * colormaps["viridis"](np.clip(np.nan_to_num(share), 0, 1))[..., :3]).round().astype(np.uint8)
    times = max(1, _SIDE // max(field.shape))
    return pixels.repeat(times, 0).repeat(times, 1)


def field_row(x: Array, output: Array, truth: Array | None, caption: str) -> tuple[Array, str] | Lines:
    """Input, truth, forecast and error of one sample side by side, or as curves where there is one axis.

    Truth and forecast have the colours of one range; the error has its own, told in the caption. Shown are the first
    channels, and of three axes the middle of the first.

    Args:
        x, output, truth: (C, *grid); truth may be None.
        caption: what stands below.
    """
    fields = {"input": x[0], "truth": None if truth is None else truth[0], "forecast": output[0]}
    given = {name: np.asarray(field, dtype=np.float64) for name, field in fields.items() if field is not None}
    if x.ndim == 2:
        places = np.linspace(0, 1, x.shape[1], endpoint=False).tolist()
        return Lines(
            caption[:1].upper() + caption[1:], "position", "value", {n: (places, f.tolist()) for n, f in given.items()}
        )
    flat = {name: field[len(field) // 2] if field.ndim == 3 else field for name, field in given.items()}
    answers = [field for name, field in flat.items() if name != "input"]
    low, high = min(field.min() for field in answers), max(field.max() for field in answers)
    pictures = [
        field_picture(field, *((field.min(), field.max()) if name == "input" else (low, high)))
        for name, field in flat.items()
    ]
    if truth is not None:
        error = np.abs(flat["forecast"] - flat["truth"])
        pictures.append(field_picture(error, 0, error.max()))
        caption += f"; errors up to {error.max():.3g}, values from {low:.3g} to {high:.3g}"
    gap = np.full((pictures[0].shape[0], _GAP, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, gap)][:-1]
    return np.concatenate(row, 1), caption
