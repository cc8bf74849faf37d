"""BSS-eval: how much of a separated source is wanted signal, other sources, and artefacts.

Vincent, Gribonval, Fevotte: "Performance measurement in blind audio source separation", TASLP 2006; version 3 as in
``bss_eval_sources`` of mir_eval. Each estimate e is split into what a filter of 512 taps can make of its own source
(target), what filters can make of all sources beyond that (interference), and the rest (artefacts).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.fourier import fast_length

__all__ = ["SeparationQuality", "bss_eval_sources", "sdr_improvement"]


class SeparationQuality(NamedTuple):
    """Measures in decibels, one for each reference.

    Attributes:
        sdr: signal to distortion, 10 log10 ||target||^2 / ||interference + artefacts||^2, (..., C).
        sir: signal to interference, 10 log10 ||target||^2 / ||interference||^2, (..., C).
        sar: signal to artefacts, 10 log10 ||target + interference||^2 / ||artefacts||^2, (..., C).
        order: number of the estimate that belongs to each reference, (..., C).
    """

    sdr: Tensor
    sir: Tensor
    sar: Tensor
    order: Tensor


@torch.no_grad()
def bss_eval_sources(
    estimates: Tensor, references: Tensor, *, filter_length: int = 512, permute: bool = True
) -> SeparationQuality:
    """SDR, SIR and SAR of BSS-eval version 3, in float64.

    Projections are by least squares on the references delayed by 0 to filter_length - 1 samples: a system of block
    Toeplitz form from correlations by FFT, solved once for all estimates.

    Args:
        estimates: (C, T) or (B, C, T).
        references: as the estimates.
        filter_length: taps of the distortion filter.
        permute: assign the estimates to the references by the highest mean SIR; otherwise they are in order.

    Raises:
        ValueError: shapes do not fit, filter_length is not positive, values are not finite, or a reference or an
            estimate is silent.
    """
    if references.dim() not in (2, 3) or estimates.shape != references.shape:
        raise ValueError(
            f"estimates and references must be (C, T) or (B, C, T) alike, got {tuple(estimates.shape)} and "
            f"{tuple(references.shape)}"
        )
    if filter_length < 1:
        raise ValueError(f"filter_length must be at least 1, got {filter_length}")
    for name, signals in (("references", references), ("estimates", estimates)):
        if not bool(signals.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        silent = (signals == 0).all(-1)
        if bool(silent.any()):
            place = tuple(silent.nonzero()[0].tolist())
            raise ValueError(f"{name} must not be silent, because no ratio is defined then; {name}[{place}] is zero")
    if references.dim() == 3:
        each = [
            bss_eval_sources(e, s, filter_length=filter_length, permute=permute)
            for e, s in zip(estimates, references, strict=True)
        ]
        return SeparationQuality(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    e, s = estimates.double(), references.double()
    count = len(s)
    everything = _project(e, s, filter_length)
    padded = F.pad(e, (0, filter_length - 1))
    # (estimate, reference): with the order given, only pairs of equal numbers are needed.
    pairs = itertools.product(range(count), repeat=2) if permute else ((at, at) for at in range(count))
    tables = e.new_full((3, count, count), -torch.inf)
    for j, group in itertools.groupby(sorted(pairs, key=lambda pair: pair[1]), key=lambda pair: pair[1]):
        rows = [i for i, _ in group]
        target = _project(e[rows], s[j : j + 1], filter_length)
        interference, artefacts = everything[rows] - target, padded[rows] - everything[rows]
        tables[0, rows, j] = _decibels(target, interference + artefacts)
        tables[1, rows, j] = _decibels(target, interference)
        tables[2, rows, j] = _decibels(target + interference, artefacts)
    order = torch.arange(count, device=e.device)
    if permute:
        choices = torch.tensor(list(itertools.permutations(range(count))), device=e.device)
        order = choices[tables[1][choices, torch.arange(count, device=e.device)].mean(1).argmax()]
    sdr, sir, sar = tables[:, order, torch.arange(count, device=e.device)]
    return SeparationQuality(sdr, sir, sar, order)


def sdr_improvement(
    estimates: Tensor, references: Tensor, mixture: Tensor, *, filter_length: int = 512, permute: bool = True
) -> Tensor:
    """SDRi: SDR of the estimates minus that of the mixture itself, for each reference, in decibels.

    Args:
        estimates: (C, T) or (B, C, T).
        references: as the estimates.
        mixture: (T,) or (B, T).
        filter_length, permute: as in `bss_eval_sources`; the mixture, which is the same for all, is never permuted.

    Returns:
        (C,) or (B, C).

    Raises:
        ValueError: as `bss_eval_sources`, or the mixture does not fit.
    """
    if mixture.shape != (*references.shape[:-2], references.shape[-1]):
        raise ValueError(f"mixture must fit the references {tuple(references.shape)}, got {tuple(mixture.shape)}")
    after = bss_eval_sources(estimates, references, filter_length=filter_length, permute=permute)
    repeated = mixture.unsqueeze(-2).expand_as(references)
    return after.sdr - bss_eval_sources(repeated, references, filter_length=filter_length, permute=False).sdr


def _project(signals: Tensor, sources: Tensor, taps: int) -> Tensor:
    """Least-squares fits (N, T + taps - 1) to signals (N, T) by all delays 0 to taps - 1 of sources (C, T)."""
    length = sources.shape[-1] + taps - 1
    size = fast_length(length + taps - 1)
    spectra = torch.fft.rfft(sources, size)
    # Correlations at lags -(taps - 1) to taps - 1; the negative ones wrap around to the end.
    products = torch.fft.irfft(spectra[:, None].conj() * spectra[None], size)
    lags = torch.arange(taps, device=signals.device)
    lags = lags[:, None] - lags[None]
    count = len(sources)
    # Entry ((i, a), (j, b)) is the sum over t of s_i[t - a] s_j[t - b], the correlation at lag a - b.
    gram = products[:, :, lags % size].permute(0, 2, 1, 3).reshape(count * taps, count * taps)
    against = torch.fft.irfft(spectra[:, None].conj() * torch.fft.rfft(signals, size)[None], size)[..., :taps]
    right = against.permute(0, 2, 1).reshape(count * taps, len(signals))
    filters = _solve(gram, right).reshape(count, taps, len(signals)).permute(2, 0, 1)
    return torch.fft.irfft((torch.fft.rfft(filters, size) * spectra).sum(1), size)[:, :length]


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    solution, info = torch.linalg.solve_ex(gram, right)
    if int(info) == 0 and bool(solution.isfinite().all()):
        return solution
    # Sources that are filtered versions of each other leave the filters open, not the projection.
    return torch.linalg.lstsq(gram.cpu(), right.cpu(), driver="gelsd").solution.to(right)


def _decibels(wanted: Tensor, unwanted: Tensor) -> Tensor:
    """10 log10 of the ratio of energies; infinite where nothing is unwanted."""
    return 10 * torch.log10(wanted.square().sum(-1) / unwanted.square().sum(-1))
