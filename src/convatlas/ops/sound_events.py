"""Sound event detection on frames: spectrogram, targets, loss, events and their F-score.

As in task 2 of the L3DAS21 challenge without localisation, by the code of Grassucci, Zhang, Comminiello: "PHNNs:
Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE TNNLS 2022, arXiv 2110.04176.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.precision import without_autocast

__all__ = [
    "EventScore",
    "sound_event_loss",
    "sound_event_score",
    "sound_event_spectrogram",
    "sound_event_targets",
    "sound_events",
]


class EventScore(NamedTuple):
    """Counts of an event detection and what follows from them; 0 where a quotient has no denominator."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float:
        """Share of the predicted events that are right."""
        return self.true_positives / max(self.true_positives + self.false_positives, 1)

    @property
    def recall(self) -> float:
        """Share of the true events that are found."""
        return self.true_positives / max(self.true_positives + self.false_negatives, 1)

    @property
    def f_score(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def sound_event_spectrogram(signal: Tensor, *, n_fft: int = 512, hop: int = 400, phases: bool = False) -> Tensor:
    """Magnitudes of a short-time Fourier transform over ``n_fft``, without the constant row and the last frame.

    The window is a periodic Hamming window as long as ``n_fft``; the signal is surrounded by zeros, so that the frame t
    is centred at t * hop. The published setting has 512 samples a window that overlap in 112, at 32 kHz: 60 s give 4800
    frames of 256 frequencies.

    Args:
        signal: (B, C, samples).
        n_fft: samples of a window; even.
        hop: samples from one frame to the next.
        phases: put the phases behind the magnitudes, in units of pi.

    Returns:
        (B, C, n_fft / 2, samples // hop), with ``phases`` (B, 2 C, ...); at least float32.

    Raises:
        ValueError: signal has another number of dimensions or is shorter than hop, n_fft is odd, or hop is not
            positive.
    """
    if signal.dim() != 3:
        raise ValueError(f"signal must be (B, C, samples), got {tuple(signal.shape)}")
    if n_fft < 2 or n_fft % 2:
        raise ValueError(f"n_fft must be even and positive, got {n_fft}")
    if not 0 < hop <= signal.shape[2]:
        raise ValueError(f"hop must be from 1 to the {signal.shape[2]} samples of the signal, got {hop}")
    signal = signal.to(torch.promote_types(signal.dtype, torch.float32))
    window = torch.hamming_window(n_fft, dtype=signal.dtype, device=signal.device)
    flat = F.pad(signal.flatten(0, 1), (n_fft // 2, n_fft // 2))
    spectrum = torch.stft(flat, n_fft, hop, window=window, center=False, return_complex=True)
    frames = signal.shape[2] // hop
    spectrum = spectrum[:, 1:, :frames].unflatten(0, signal.shape[:2])
    magnitudes = spectrum.abs() / n_fft
    return torch.cat([magnitudes, spectrum.angle() / math.pi], dim=1) if phases else magnitudes


def sound_event_targets(events: Tensor, frames: int, num_classes: int, overlaps: int = 3) -> Tensor:
    """What a network should put out: 1 in column class * overlaps + k for the k-th event of a class in a frame.

    Args:
        events: rows (frame, class), integers; equal rows are events that sound at once.
        frames: number of frames.
        num_classes: kinds of events.
        overlaps: events of one kind that may sound at once.

    Returns:
        (frames, num_classes * overlaps), float32.

    Raises:
        ValueError: a frame or class is out of range, or more events of a kind sound at once.
    """
    _check_events("events", events)
    highest = torch.tensor([frames, num_classes], device=events.device)
    if bool(((events < 0) | (events >= highest)).any()):
        raise ValueError(f"events must have frames below {frames} and classes below {num_classes}")
    counts = torch.zeros(frames, num_classes, dtype=torch.long, device=events.device)
    counts.index_put_((events[:, 0], events[:, 1]), torch.ones_like(events[:, 0]), accumulate=True)
    if bool((counts > overlaps).any()):
        raise ValueError(f"at most overlaps = {overlaps} events of a class may sound at once, got {int(counts.max())}")
    return (counts[..., None] > torch.arange(overlaps, device=events.device)).flatten(1).float()


def sound_event_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy, in at least float32.

    Args:
        probabilities: from 0 to 1, e.g. (B, frames, num_classes * overlaps).
        targets: 0 and 1, of the same shape.
    """
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    with without_autocast(probabilities):
        return F.binary_cross_entropy(probabilities, targets.to(probabilities.dtype))


def sound_events(probabilities: Tensor, overlaps: int = 3) -> Tensor:
    """The events in an output: an entry above a half (a half is none) is an event of class column // overlaps.

    Args:
        probabilities: (frames, num_classes * overlaps).
        overlaps: columns of each class.

    Returns:
        Rows (frame, class), int64, ordered by frame and class.

    Raises:
        ValueError: probabilities has another number of dimensions, or overlaps does not divide its columns.
    """
    if probabilities.dim() != 2:
        raise ValueError(f"probabilities must be (frames, classes * overlaps), got {tuple(probabilities.shape)}")
    if overlaps < 1 or probabilities.shape[1] % overlaps:
        raise ValueError(f"overlaps must divide the {probabilities.shape[1]} columns, got {overlaps}")
    events = (probabilities > 0.5).nonzero()
    events[:, 1] //= overlaps
    return events


def sound_event_score(predicted: Tensor, true: Tensor, *, legacy: bool = False) -> EventScore:
    """Count how many events of each class are right, wrong and missed in each frame, and add up over the frames.

    Args:
        predicted: rows (frame, class), integers; equal rows are events that sound at once.
        true: rows (frame, class), integers.
        legacy: count as the authors' code does, which gave their figures: one predicted event finds all true ones of
            its class, the predicted events of a frame without true ones are wrong twice, and the true events of a frame
            without predicted ones are missed twice.

    Raises:
        ValueError: an argument has another shape or type.
    """
    _check_events("predicted", predicted)
    _check_events("true", true)
    _, kinds = torch.cat([predicted, true]).unique(dim=0, return_inverse=True)
    of_predicted, of_true = kinds.split([len(predicted), len(true)])
    size = len(kinds)
    guesses, truths = of_predicted.bincount(minlength=size), of_true.bincount(minlength=size)
    found = int((truths[guesses > 0] if legacy else torch.minimum(guesses, truths)).sum())
    wrong, missed = len(predicted) - found, len(true) - found
    if legacy:
        wrong += int((~torch.isin(predicted[:, 0], true[:, 0])).sum())
        missed += int((~torch.isin(true[:, 0], predicted[:, 0])).sum())
    return EventScore(found, wrong, missed)


def _check_events(name: str, events: Tensor) -> None:
    if events.dim() != 2 or events.shape[1] != 2:
        raise ValueError(f"{name} must have rows (frame, class), got the shape {tuple(events.shape)}")
    if events.is_floating_point() or events.is_complex():
        raise ValueError(f"{name} must be integers, got {events.dtype}")
