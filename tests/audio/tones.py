"""Speakers whom a tiny network can tell apart: one hums, one whistles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convatlas.audio.separation import Separation
from convatlas.data.audio import write_audio

RATE = 4000
#: Options of a network that learns them in a few seconds.
TINY: dict[str, Any] = {
    "num_filters": 24,
    "kernel_size": 16,
    "bottleneck_channels": 12,
    "hidden_channels": 16,
    "skip_channels": 12,
    "num_blocks": 2,
    "num_repeats": 1,
    "sample_rate": RATE,
}
BANDS = {"hum": (150, 400), "whistle": (1000, 1600)}


def tone(kind: str, seed: int, samples: int = 2000) -> np.ndarray:
    """A sound (T,) with a pitch of its own that swells and fades."""
    random = np.random.default_rng([seed, len(kind)])
    time = np.arange(samples) / RATE
    swell = 1.2 + np.sin(2 * np.pi * (random.uniform(2, 5) * time + random.uniform()))
    return (0.2 * swell * np.sin(2 * np.pi * random.uniform(*BANDS[kind]) * time)).astype(np.float32)


def write_speakers(root: Path, takes: int = 6, kinds: tuple[str, ...] = ("hum", "whistle")) -> Path:
    """A folder for each speaker."""
    for kind in kinds:
        for take in range(takes):
            write_audio(root / kind / f"{take}.wav", tone(kind, take), RATE)
    return root


def write_mixtures(root: Path, count: int, first: int = 0, samples: int = 2000) -> Path:
    """Folders mix, s1 and s2."""
    for number in range(first, first + count):
        one, two = tone("hum", 100 + number, samples), tone("whistle", 100 + number, samples)
        for name, values in (("mix", one + two), ("s1", one), ("s2", two)):
            write_audio(root / name / f"{number}.wav", values, RATE, subtype="FLOAT")
    return root


def task(data: Path | str, **settings: Any) -> Separation:
    """A small task on these."""
    given = {"segment": 0.25, "options": TINY, "epoch_mixtures": 96, "held_out_mixtures": 3, **settings}
    return Separation(data=str(data), **given)
