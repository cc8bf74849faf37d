"""What `evaluate` and `predict` of the separation task may be told."""

from dataclasses import dataclass
from typing import Literal

from convatlas.data.sound_streams import PcmKind

__all__ = ["Measuring", "Separating"]


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What to measure beside the SI-SNR.

    Attributes:
        sdr: also the signal-to-distortion ratio of BSS-eval with its filters of 512 taps, which takes long.
    """

    sdr: bool = False


@dataclass(frozen=True, kw_only=True)
class Separating:
    """How recordings are separated.

    Attributes:
        level: loudness of the results: ``peak`` of the recording, ``consistent`` for gains such that the results add up
            to the recording as well as they can, or ``none`` for what the network gives.
        chunk: seconds that a network sees at once of recordings longer than that; causal ones see the whole.
        floats: write samples as 32-bit floats instead of 16-bit integers.
        raw: form of the samples on standard input, where it is no WAV stream.
        rate: sample rate of raw samples in Hz; by default the network's.
        channels: of raw samples.
        block: samples that are taken from standard input at once.
        speaker: number of the source, from 1, that goes to standard output while a stream is separated.
        output: form of the samples on standard output.

    Raises:
        ValueError: a value is out of range.
    """

    level: Literal["peak", "consistent", "none"] = "peak"
    chunk: float = 8.0
    floats: bool = False
    raw: PcmKind | None = None
    rate: int | None = None
    channels: int = 1
    block: int = 160
    speaker: int | None = None
    output: PcmKind = "s16le"

    def __post_init__(self) -> None:
        if not 0 < self.chunk < float("inf"):
            raise ValueError(f"chunk must be positive, got {self.chunk}")
        for name in ("rate", "channels", "block", "speaker"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def takes_stdout(self) -> bool:
        """Whether standard output is for sound."""
        return self.speaker is not None
