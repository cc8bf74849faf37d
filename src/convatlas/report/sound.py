"""Sounds as they stand in a page: WAV files inside a link."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["data_uri"]


def data_uri(samples: npt.NDArray[np.signedinteger[Any]], sample_rate: int) -> str:
    """Samples (T,) int16 as the data URI of a WAV file with one channel of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"
