"""Mixtures of sounds and their sources: made on the fly from recordings by speaker, or given; and Datasets over them.

Everything random follows from the seed of a sample and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from convatlas.data.audio import Audio
from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.errors import DataError

__all__ = [
    "Given",
    "Made",
    "Maker",
    "Mixed",
    "MixedPieces",
    "Mixing",
    "Mixtures",
    "Recording",
    "Scenario",
    "Sound",
    "Voices",
    "Waveform",
    "WholeMixtures",
    "collate_mixtures",
]

Samples = npt.NDArray[np.float32]

#: What is heard, and what is to be found in it, as WHAM and LibriMix name it.
Scenario = Literal["sep_clean", "sep_noisy", "enh_single", "enh_both"]

#: Peak of a mixture that is made here.
_PEAK = 0.9
#: Sounds below this root mean square are silent; 16 bits reach down to 3e-5.
_SILENT = 1e-5
#: How often something else is drawn where what was drawn is silent or damaged.
_DRAWS = 20


class Sound(Protocol):
    """One channel of sound that is read when asked for.

    Attributes:
        name: what to call it.
        samples: number of samples.
    """

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def samples(self) -> int:
        """Number of samples."""

    def read(self, start: int = 0, stop: int | None = None) -> Samples:
        """Samples start to stop, (T,) float32; raises `Unreadable`."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A file, mixed down to one channel."""

    name: str
    audio: Audio

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.audio.samples

    def read(self, start: int = 0, stop: int | None = None) -> Samples:
        """Samples start to stop, (T,).

        Raises:
            Unreadable: the file is damaged or holds values that are not finite.
        """
        try:
            samples: Samples = self.audio.read(start, stop, mono=True)[0]
        except DataError as error:
            raise Unreadable(self.name, str(error).removeprefix(f"{self.audio.path} ")) from None
        return samples


@dataclass(frozen=True, eq=False)
class Waveform:
    """Samples (T,) in memory."""

    name: str
    values: Samples

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.values)

    def read(self, start: int = 0, stop: int | None = None) -> Samples:
        """Samples start to stop, (T,)."""
        return self.values[start:stop]


@dataclass(frozen=True, eq=False)
class Mixed:
    """A mixture and what is to be found in it.

    Attributes:
        name: what to call it.
        mixture: (T,) float32.
        sources: (C, T) float32.
    """

    name: str
    mixture: Samples
    sources: Samples


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How mixtures are made of recordings.

    Attributes:
        snr: level of the first speaker above each other one, in dB: drawn evenly between two values.
        noise: a folder of recordings of noise, for the scenarios in which there is some.
        noise_snr: level of the first speaker above the noise, in dB: drawn evenly between two values.
        length: of mixtures of whole recordings: ``min`` cuts to the shortest of them, ``max`` fills up with silence.

    Raises:
        ValueError: a range is not in order, or there is no such length.
    """

    snr: tuple[float, float] = (-5.0, 5.0)
    noise: str | None = None
    noise_snr: tuple[float, float] = (-6.0, 3.0)
    length: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        for name in ("snr", "noise_snr"):
            low, high = getattr(self, name)
            if not -math.inf < low <= high < math.inf:
                raise ValueError(f"{name} must be two numbers in rising order, got {low} and {high}")
        if self.length not in ("min", "max"):
            raise ValueError(f"length must be min or max, got {self.length!r}")


@dataclass(frozen=True, eq=False)
class Voices:
    """Recordings by speaker, of which mixtures are made.

    Attributes:
        speakers: recordings by the speaker's name.
        skipped: files that were left out.
    """

    speakers: Mapping[str, Sequence[Sound]]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.speakers.values()))

    @property
    def names(self) -> list[str]:
        """Names of the recordings, each behind its speaker."""
        return [f"{speaker}: {sound.name}" for speaker, sounds in self.speakers.items() for sound in sounds]


@dataclass(frozen=True, eq=False)
class Given:
    """A mixture that was given with its sources.

    Attributes:
        name: what to call it.
        parts: the sources, all of one length.
        mixture: what is heard; the sum of sources and noise where it is left out.
        noise: what is heard beside the sources, where there is no mixture.
    """

    name: str
    parts: tuple[Sound, ...]
    mixture: Sound | None = None
    noise: Sound | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.parts[0].samples

    def read(self, start: int = 0, stop: int | None = None) -> Mixed:
        """Samples start to stop.

        Raises:
            Unreadable: a file is damaged, or the mixture or, in the whole of it, a source is silent.
        """
        sources = np.stack([part.read(start, stop) for part in self.parts])
        if self.mixture is not None:
            mixture = self.mixture.read(start, stop)
        else:
            mixture = sources.sum(0) + (0 if self.noise is None else self.noise.read(start, stop))
        if start == 0 and stop is None:
            for label, values in [
                ("the mixture", mixture),
                *((p.name, s) for p, s in zip(self.parts, sources, strict=True)),
            ]:
                if _rms(values) < _SILENT:
                    raise Unreadable(self.name, f"{label} is silent")
        return Mixed(self.name, mixture, sources)


@dataclass(frozen=True, eq=False)
class Made:
    """A mixture of whole recordings that is made when asked for, always the same.

    Attributes:
        name: what to call it.
        maker: what makes it.
        seed: that it follows from.
    """

    name: str
    maker: Maker
    seed: int

    def read(self) -> Mixed:
        """The mixture.

        Raises:
            Unreadable: nothing but silent or damaged recordings was found.
        """
        return self.maker.make(np.random.default_rng(self.seed), whole=True, name=self.name)


@dataclass(frozen=True, eq=False)
class Mixtures:
    """Mixtures of one split, and the files that were left out with the reasons."""

    entries: tuple[Given | Made, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def given(self) -> list[Given]:
        """Those entries that were given, not made."""
        return [entry for entry in self.entries if isinstance(entry, Given)]

    @property
    def names(self) -> list[str]:
        """Names of the mixtures."""
        return [entry.name for entry in self.entries]

    def subset(self, rows: Sequence[int]) -> Mixtures:
        """The entries at some places; ``skipped`` stays that of the whole."""
        return Mixtures(tuple(self.entries[row] for row in rows), self.skipped)


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes mixtures of voices.

    Attributes:
        voices: the recordings.
        scenario: what is heard and to be found.
        n_src: speakers of a mixture.
        samples: length of a piece; shorter recordings are followed by more of the same speaker.
        mixing: levels.
        noises: recordings of noise, for the scenarios in which there is some.
    """

    voices: Voices
    scenario: Scenario
    n_src: int
    samples: int
    mixing: Mixing
    noises: Sequence[Sound] = ()
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", sorted(self.voices.speakers))
        if len(self.names) < self.n_src:
            given = f"{len(self.names)} ({', '.join(self.names[:5])})" if self.names else "0"
            raise DataError(f"mixtures of {self.n_src} need at least as many speakers, got {given}")
        if self.scenario != "sep_clean" and not self.noises:
            raise DataError(f"the scenario {self.scenario} needs noise: give a folder of recordings as mixing.noise")

    def make(self, random: np.random.Generator, *, whole: bool = False, name: str = "") -> Mixed:
        """A mixture of random speakers, recordings, crops and levels.

        Args:
            random: where all choices come from.
            whole: take recordings to their ends instead of a piece of ``samples``.
            name: what to call it; by default the names of the speakers.

        Raises:
            Unreadable: nothing but silent or damaged recordings was found.
        """
        chosen = [self.names[row] for row in random.choice(len(self.names), self.n_src, replace=False)]
        voices = [self._voice(self.voices.speakers[speaker], random, whole, speaker) for speaker in chosen]
        length = (min if self.mixing.length == "min" else max)(map(len, voices))
        voices = [_fitted(voice, length) for voice in voices]
        first = _rms(voices[0])
        for row in range(1, self.n_src):
            voices[row] *= first / max(_rms(voices[row]), _SILENT) * 10 ** (-random.uniform(*self.mixing.snr) / 20)
        sources = np.stack(voices).astype(np.float32)
        mixture = sources.sum(0)
        if self.scenario != "sep_clean":
            noise = _fitted(self._voice(self.noises, random, False, "noise", length), length)
            level = first / max(_rms(noise), _SILENT) * 10 ** (-random.uniform(*self.mixing.noise_snr) / 20)
            mixture = mixture + np.float32(level) * noise
        if self.scenario == "enh_both":
            sources = sources.sum(0, keepdims=True)
        scale = np.float32(_PEAK / max(float(np.abs(mixture).max()), _SILENT))
        return Mixed(name or " + ".join(chosen), scale * mixture, scale * sources)

    def _voice(
        self, sounds: Sequence[Sound], random: np.random.Generator, whole: bool, name: str, samples: int | None = None
    ) -> Samples:
        """Recordings one after the other, at least ``samples`` of them, and exactly so many unless ``whole``."""
        samples = samples or self.samples
        failed = Unreadable(name, "has no recording that can be used")
        for _ in range(_DRAWS):
            parts: list[Samples] = []
            count = 0
            try:
                while count < samples:
                    sound = sounds[int(random.integers(len(sounds)))]
                    room = sound.samples - (samples - count)
                    start = int(random.integers(room + 1)) if room > 0 and not whole else 0
                    parts.append(sound.read(start, None if whole else start + min(sound.samples, samples - count)))
                    count += len(parts[-1])
            except Unreadable as error:
                failed = error
                continue
            voice = np.concatenate(parts)
            if _rms(voice) >= _SILENT:
                return voice
            failed = Unreadable(name, "is silent")
        raise failed


def _rms(samples: Samples) -> float:
    return math.sqrt(float(np.square(samples, dtype=np.float64).mean())) if samples.size else 0.0


def _fitted(samples: Samples, length: int) -> Samples:
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


# -- datasets ----------------------------------------------------------------------------------------------------------


class MixedPieces(Dataset[dict[str, Any]]):
    """Pieces to learn from, indexed by (position, seed): ``{"mixture": (T,), "sources": (C, T), "name": ...}``.

    Where a file fails after it was found, the sample is ``{"unreadable": (name, reason)}``.

    Args:
        source: what makes mixtures, or given ones, of which random pieces are taken.
        samples: length of a piece of a given mixture.
        count: how many pieces of made mixtures an epoch has; of given ones each gives one.

    Raises:
        ValueError: count is smaller than 1.
    """

    def __init__(self, source: Maker | Mixtures, samples: int, count: int = 1) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.source, self.samples = source, samples
        self.given: list[Given] = [] if isinstance(source, Maker) else source.given
        self.count = count if isinstance(source, Maker) else len(self.given)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple | list) else (key, key)
        random = np.random.default_rng(int(seed))
        try:
            if isinstance(self.source, Maker):
                return _as_sample(self.source.make(random))
            entry = self.given[index]
            start = int(random.integers(entry.samples - self.samples + 1))
            return _as_sample(entry.read(start, start + self.samples))
        except Unreadable as error:
            return {"unreadable": (error.name, error.reason)}


class WholeMixtures(Dataset[dict[str, Any]]):
    """Whole mixtures by position, as `MixedPieces` gives them.

    Args:
        mixtures: given or made ones.
    """

    def __init__(self, mixtures: Mixtures) -> None:
        self.mixtures = mixtures

    def __len__(self) -> int:
        return len(self.mixtures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return _as_sample(self.mixtures.entries[index].read())
        except Unreadable as error:
            return {"unreadable": (error.name, error.reason)}


def _as_sample(mixed: Mixed) -> dict[str, Any]:
    return {
        "mixture": torch.from_numpy(np.ascontiguousarray(mixed.mixture)),
        "sources": torch.from_numpy(np.ascontiguousarray(mixed.sources)),
        "name": mixed.name,
    }


def collate_mixtures(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch without the samples that could not be read.

    Returns:
        ``"mixture"`` (B, T) and ``"sources"`` (B, C, T), or lists of them where lengths differ; ``"name"``, and
        ``"unreadable"``, a list of (name, reason). Where no sample could be read, the lists are empty.
    """
    read = [sample for sample in samples if "unreadable" not in sample]
    batch: dict[str, Any] = {name: [sample[name] for sample in read] for name in ("mixture", "sources", "name")}
    if len({sample["mixture"].shape for sample in read}) == 1:
        batch |= {name: torch.stack(batch[name]) for name in ("mixture", "sources")}
    return {**batch, "unreadable": [sample["unreadable"] for sample in samples if "unreadable" in sample]}
