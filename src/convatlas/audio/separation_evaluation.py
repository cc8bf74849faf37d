"""Measuring how well sources are separated, beside ideal masks on a spectrogram and the mixture as it is."""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.mixing_voices import Mixed, Mixtures
from convatlas.errors import DataError
from convatlas.files import write_text
from convatlas.networks.conv_tasnet.network import ConvTasNet
from convatlas.nn.separation_losses import PITLoss, SignalRatioLoss
from convatlas.ops.ideal_masks import MaskKind, ideal_mask_separation
from convatlas.ops.separation_quality import bss_eval_sources
from convatlas.ops.signal_ratios import si_snr
from convatlas.report import printable
from convatlas.training.progress import progress

__all__ = [
    "IDEAL_MASKS",
    "Measured",
    "Quality",
    "ideal_estimates",
    "mean_quality",
    "measure_mixtures",
    "separate_like",
    "write_qualities",
]

#: What stands beside a network, by the name in tables.
IDEAL_MASKS: dict[MaskKind, str] = {
    "binary": "ideal binary mask",
    "ratio": "ideal ratio mask",
    "wiener": "ideal Wiener-like mask",
}

#: Window and hop of the ideal masks in seconds, as in the paper.
_WINDOW, _HOP = 0.032, 0.008


class Quality(NamedTuple):
    """Means over the sources of a mixture, in decibels.

    Attributes:
        si_snr: scale-invariant signal-to-noise ratio.
        si_snri: by how much it is above that of the mixture.
        sdr, sdri: the same of the signal-to-distortion ratio of BSS-eval, where it was asked for.
    """

    si_snr: float
    si_snri: float
    sdr: float | None = None
    sdri: float | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """One mixture that was separated.

    Attributes:
        name: of the mixture.
        row: its place in the set.
        length: in seconds.
        network: quality of the network.
        mixture: quality of the mixture itself.
        ideal: quality of ideal masks.
        seconds: that the network took.
    """

    name: str
    row: int
    length: float
    network: Quality
    mixture: Quality
    ideal: Mapping[MaskKind, Quality]
    seconds: float


@torch.inference_mode()
def separate_like(network: ConvTasNet, mixed: Mixed, *, fixed: bool = False) -> tuple[Tensor, float]:
    """Estimates (C, T) of a mixture in the order of its sources, on the CPU, and the seconds that the network took.

    Args:
        network: in evaluation mode.
        mixed: the mixture.
        fixed: whether the network's outputs have an order; otherwise the best one is taken, by SI-SNR.
    """
    weight = next(network.parameters())
    x = torch.from_numpy(mixed.mixture)[None].to(weight.device, weight.dtype)
    started = time.perf_counter()
    estimates = network(x).float().cpu()
    seconds = time.perf_counter() - started
    sources = torch.from_numpy(mixed.sources)[None]
    if not fixed:
        estimates = PITLoss(SignalRatioLoss("si_snr")).match(estimates, sources).estimates
    return estimates[0], seconds


def ideal_estimates(mixed: Mixed, kind: MaskKind, sample_rate: int) -> Tensor:
    """Estimates (C, T) by an ideal mask on windows of 32 ms with a hop of 8 ms.

    Where there is one source, the rest of the mixture stands as another one.
    """
    mixture, sources = torch.from_numpy(mixed.mixture), torch.from_numpy(mixed.sources)
    alone = len(sources) == 1
    if alone:
        sources = torch.cat([sources, (mixture - sources[0])[None]])
    n_fft, hop = (max(2, 2 * round(seconds * sample_rate / 2)) for seconds in (_WINDOW, _HOP))
    found = ideal_mask_separation(mixture, sources, kind, n_fft=n_fft, hop_length=hop)
    return found[:1] if alone else found


def measure_mixtures(
    network: ConvTasNet, mixtures: Mixtures, *, fixed: bool = False, sdr: bool = False
) -> tuple[list[Measured], list[Skipped]]:
    """Separate whole mixtures one by one and compare them with the truth.

    Args:
        network: in evaluation mode, on any device.
        mixtures: what to separate.
        fixed: as in `separate_like`.
        sdr: measure the SDR of BSS-eval too, which takes longer than the network.

    Returns:
        What was measured, and what could not be read, with the reasons.

    Raises:
        DataError: nothing could be measured.
    """
    measured: list[Measured] = []
    skipped = list(mixtures.skipped)
    with progress("separating", len(mixtures)) as advance:
        for row, entry in enumerate(mixtures.entries):
            try:
                measured.append(_measure(network, row, entry.read(), fixed, sdr))
            except Unreadable as error:
                skipped.append(Skipped(error.name, error.reason))
            except ValueError as error:  # shorter than a frame of the network
                skipped.append(Skipped(entry.name, str(error)))
            advance()
    if not measured:
        first = skipped[0] if skipped else Skipped("the set", "it is empty")
        raise DataError(f"none of the mixtures can be measured; first: {first.path}: {first.reason}")
    return measured, skipped


def _measure(network: ConvTasNet, row: int, mixed: Mixed, fixed: bool, sdr: bool) -> Measured:
    estimates, seconds = separate_like(network, mixed, fixed=fixed)
    sources = torch.from_numpy(mixed.sources)
    unprocessed = torch.from_numpy(mixed.mixture).expand_as(sources)
    before = float(si_snr(unprocessed, sources).mean())
    distortion = _sdr(unprocessed, sources) if sdr else None

    def quality(found: Tensor) -> Quality:
        ratio = float(si_snr(found, sources).mean())
        if distortion is None:
            return Quality(ratio, ratio - before)
        after = _sdr(found, sources)
        return Quality(ratio, ratio - before, after, after - distortion)

    rate = network.sample_rate
    ideal = {kind: quality(ideal_estimates(mixed, kind, rate)) for kind in get_args(MaskKind)}
    length = len(mixed.mixture) / rate
    return Measured(mixed.name, row, length, quality(estimates), quality(unprocessed), ideal, seconds)


def _sdr(found: Tensor, sources: Tensor) -> float:
    # The order is that of the best SI-SNR, as for all other numbers; BSS-eval's own is nearly always the same.
    return float(bss_eval_sources(found, sources, permute=False).sdr.mean())


def mean_quality(measured: Iterable[Measured], of: Callable[[Measured], Quality]) -> Quality:
    """Means over mixtures of the quality that ``of`` takes from each."""
    rows = [of(each) for each in measured]
    columns: list[Any] = [None if None in column else statistics.fmean(column) for column in zip(*rows, strict=True)]
    return Quality(*columns)


def write_qualities(path: str | Path, measured: Sequence[Measured]) -> None:
    """One row a mixture: its name, length and quality."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with_sdr = measured[0].network.sdr is not None
    columns = ["SI-SNR", "SI-SNRi", *(["SDR", "SDRi"] if with_sdr else [])]
    writer.writerow(["mixture", "seconds", *columns, *(f"SI-SNRi of the {name}" for name in IDEAL_MASKS.values())])
    for each in measured:
        own = [f"{value:.4f}" for value in each.network if value is not None]
        ideal = [f"{each.ideal[kind].si_snri:.4f}" for kind in IDEAL_MASKS]
        writer.writerow([printable(each.name), f"{each.length:.3f}", *own, *ideal])
    write_text(path, text.getvalue())
