"""Simulated voices and mixtures of them: vowels of a vibrating pitch under two formants, cut into syllables.

They stand in for speech where there is none: speakers differ in pitch and formants, and their spectra overlap. All
samples are float32, with unit variance before they are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convatlas.errors import unknown

__all__ = ["SPEAKERS", "Speaker", "VoiceMixtures", "mix_at_snr", "simulated_mixtures", "voices"]

Samples = npt.NDArray[np.float32]

_HARMONICS = 12
#: Width of a formant in Hz.
_FORMANT_WIDTH = 250.0
#: How far the vibrato moves the pitch, as a share of it, and how fast, in Hz.
_VIBRATO, _VIBRATO_RATE = 0.03, (3.0, 5.0)
#: How fast syllables follow each other, in Hz, and how sharply they begin and end.
_SYLLABLE_RATE, _SYLLABLE_EDGE = (2.0, 5.0), 6.0


@dataclass(frozen=True)
class Speaker:
    """A kind of speaker.

    Attributes:
        pitch: lowest and highest fundamental frequency in Hz.
        formants: lowest and highest centre in Hz, of the first and of the second formant.
    """

    pitch: tuple[float, float]
    formants: tuple[tuple[float, float], tuple[float, float]] = ((300.0, 900.0), (900.0, 2700.0))


#: Kinds of speakers by name, from the deepest to the highest; mixtures of C speakers take the first C.
SPEAKERS: dict[str, Speaker] = {
    "low": Speaker((85.0, 150.0)),
    "high": Speaker((180.0, 290.0)),
    "child": Speaker((310.0, 420.0), ((400.0, 1100.0), (1200.0, 3200.0))),
}


@dataclass(frozen=True)
class VoiceMixtures:
    """Mixtures with the sources that they are the sums of.

    Attributes:
        mixture: (N, T).
        sources: (N, C, T); their order is random.
        sample_rate: in Hz.
    """

    mixture: Samples
    sources: Samples
    sample_rate: int


def voices(
    speaker: str, count: int, *, seconds: float = 0.5, sample_rate: int = 8000, seed: int | np.random.Generator = 0
) -> Samples:
    """Simulate voices (count, T) of one kind of speaker, each with a pitch, formants and syllables of its own.

    Args:
        speaker: a name in `SPEAKERS`.
        count: how many.
        seconds: length.
        sample_rate: in Hz; harmonics above half of it are left out.
        seed: the same seed gives the same voices.

    Raises:
        UnknownName: there is no such kind of speaker.
        ValueError: count, seconds or sample_rate is out of range.
    """
    if speaker not in SPEAKERS:
        raise unknown("speaker", speaker, SPEAKERS)
    if count < 1 or sample_rate < 1000 or not seconds * sample_rate >= 1:
        raise ValueError(
            f"count must be at least 1, sample_rate 1000 and seconds one sample, got {count}, {sample_rate}, {seconds}"
        )
    # With one seed, speakers of different kinds still speak at different times.
    rng = np.random.default_rng([seed, list(SPEAKERS).index(speaker)]) if isinstance(seed, int) else seed
    kind = SPEAKERS[speaker]
    length = round(seconds * sample_rate)
    return np.stack([_voice(kind, length, sample_rate, rng) for _ in range(count)])


def _voice(kind: Speaker, length: int, sample_rate: int, rng: np.random.Generator) -> Samples:
    time = np.arange(length) / sample_rate
    pitch = rng.uniform(*kind.pitch)
    rate = rng.uniform(*_VIBRATO_RATE)
    moving = pitch * (1 + _VIBRATO * np.sin(2 * np.pi * (rate * time + rng.uniform())))
    turns = np.cumsum(moving) / sample_rate
    centres = [rng.uniform(*limits) for limits in kind.formants]
    orders = np.arange(1, _HARMONICS + 1)
    orders = orders[orders * pitch * (1 + _VIBRATO) < sample_rate / 2]
    strength = sum(np.exp(-0.5 * ((orders * pitch - centre) / _FORMANT_WIDTH) ** 2) for centre in centres) + 0.02
    phases = rng.uniform(size=len(orders))
    tone = np.zeros(length)
    for order, amplitude, phase in zip(orders, np.broadcast_to(strength, orders.shape), phases, strict=True):
        tone += amplitude * np.sin(2 * np.pi * (order * turns + phase))
    beat = rng.uniform(*_SYLLABLE_RATE)
    syllables = 1 / (1 + np.exp(-_SYLLABLE_EDGE * np.sin(2 * np.pi * (beat * time + rng.uniform()))))
    voice = tone * syllables
    voice -= voice.mean()
    return (voice / max(float(voice.std()), 1e-8)).astype(np.float32)


def mix_at_snr(sources: npt.ArrayLike, snr_db: npt.ArrayLike) -> Samples:
    """Scale sources (C, T) such that the first is ``snr_db`` decibels above each of the others.

    Args:
        sources: (C, T).
        snr_db: one number, or one for each source after the first.

    Returns:
        The scaled sources (C, T); their sum is the mixture. The first one stays as it is, others that are silent too.
    """
    scaled = np.array(sources, np.float64)
    wanted = np.broadcast_to(np.asarray(snr_db, np.float64), (len(scaled) - 1,))
    reference = np.square(scaled[0]).mean()
    for source, ratio in zip(scaled[1:], wanted, strict=True):
        power = np.square(source).mean()
        if power > 0 and reference > 0:
            source *= np.sqrt(reference / power) * 10 ** (-ratio / 20)
    return scaled.astype(np.float32)


def simulated_mixtures(
    count: int,
    *,
    num_speakers: int = 2,
    seconds: float = 0.5,
    sample_rate: int = 8000,
    snr_db: tuple[float, float] = (-5.0, 5.0),
    voices_per_speaker: int | None = None,
    seed: int = 0,
) -> VoiceMixtures:
    """Mixtures of voices of different kinds, at random ratios of their powers.

    Different seeds give different voices, so a set for evaluation is one of another seed.

    Args:
        count: number of mixtures.
        num_speakers: voices in each, at most as many as there are kinds; 1 gives the voices themselves.
        seconds: length.
        sample_rate: in Hz.
        snr_db: lowest and highest ratio of the first voice to each other one, in decibels.
        voices_per_speaker: how many voices of each kind there are to draw from; by default one for each mixture.
        seed: the same seed gives the same mixtures.

    Raises:
        ValueError: a number is out of range.
    """
    if count < 1 or not 1 <= num_speakers <= len(SPEAKERS):
        raise ValueError(
            f"count must be at least 1 and num_speakers from 1 to {len(SPEAKERS)}, got {count} and {num_speakers}"
        )
    if voices_per_speaker is not None and voices_per_speaker < 1:
        raise ValueError(f"voices_per_speaker must be at least 1, got {voices_per_speaker}")
    if not snr_db[0] <= snr_db[1]:
        raise ValueError(f"snr_db must be a lowest and a highest ratio, got {snr_db}")
    rng = np.random.default_rng(seed)
    pool = voices_per_speaker or count
    kinds = list(SPEAKERS)[:num_speakers]
    spoken = [voices(kind, pool, seconds=seconds, sample_rate=sample_rate, seed=rng) for kind in kinds]
    sources = []
    for index in range(count):
        picked = [index if voices_per_speaker is None else int(rng.integers(pool)) for _ in kinds]
        chosen = np.stack([each[at] for each, at in zip(spoken, picked, strict=True)])[rng.permutation(num_speakers)]
        sources.append(mix_at_snr(chosen, rng.uniform(*snr_db, size=num_speakers - 1)))
    stacked = np.stack(sources)
    return VoiceMixtures(stacked.sum(1), stacked, sample_rate)
