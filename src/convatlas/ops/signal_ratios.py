"""Ratios of signal to error in decibels, by which separated sources are trained and judged.

Le Roux, Wisdom, Erdogan, Hershey: "SDR - half-baked or well done?", ICASSP 2019, arXiv 1811.02508; SI-SNR as in Luo,
Mesgarani: "Conv-TasNet", TASLP 2019, arXiv 1809.07454, equation 16. All are computed in at least float32.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.precision import without_autocast

__all__ = [
    "Ratio",
    "length_mask",
    "pairwise_signal_ratio",
    "sd_sdr",
    "si_snr",
    "si_snr_improvement",
    "signal_ratio",
    "snr",
]

#: Which ratio: scale-invariant, scale-dependent, or plain.
Ratio = Literal["si_snr", "sd_sdr", "snr"]

#: Added to energies and to the ratio, as in the authors' codes.
_EPS = 1e-8


def signal_ratio(
    estimate: Tensor,
    reference: Tensor,
    kind: Ratio = "si_snr",
    *,
    zero_mean: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """10 log10 of the energy of the wanted part t of an estimate e over that of its error, in decibels.

    With a = <e, s> / ||s||^2 for the reference s: ``si_snr`` compares t = a s with e - t, so that neither the scale nor
    an offset of the estimate matters; ``sd_sdr`` compares t = a s with e - s; ``snr`` compares t = s with e - s.

    Args:
        estimate: (..., T).
        reference: (..., T); its leading axes broadcast with those of the estimate.
        kind: which ratio.
        zero_mean: take the mean over time off both signals first.
        lengths: numbers of valid samples, broadcastable to the leading axes; what lies behind does not count.

    Returns:
        (...), in at least float32; finite, also for silence.

    Raises:
        UnknownName: there is no such ratio.
        ValueError: the signals have different lengths, or are not floating point.
    """
    if kind not in get_args(Ratio):
        raise unknown("ratio", str(kind), get_args(Ratio))
    if estimate.dim() < 1 or reference.dim() < 1 or estimate.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"estimate and reference must be (..., T) of one length, got {tuple(estimate.shape)} and "
            f"{tuple(reference.shape)}"
        )
    if not estimate.is_floating_point() or not reference.is_floating_point():
        raise ValueError(f"estimate and reference must be floating point, got {estimate.dtype} and {reference.dtype}")
    with without_autocast(estimate):
        dtype = torch.promote_types(torch.promote_types(estimate.dtype, reference.dtype), torch.float32)
        e, s = estimate.to(dtype), reference.to(dtype)
        if lengths is not None:
            mask = length_mask(lengths, e.shape[-1]).to(dtype)
            e, s = e * mask, s * mask
        if zero_mean:
            count = e.shape[-1] if lengths is None else lengths.to(dtype).unsqueeze(-1)
            e, s = e - e.sum(-1, keepdim=True) / count, s - s.sum(-1, keepdim=True) / count
            if lengths is not None:
                e, s = e * mask, s * mask
        t = s
        if kind != "snr":
            t = (e * s).sum(-1, keepdim=True) / (s.square().sum(-1, keepdim=True) + _EPS) * s
        error = e - (t if kind == "si_snr" else s)
        return 10 * torch.log10(t.square().sum(-1) / (error.square().sum(-1) + _EPS) + _EPS)


def si_snr(estimate: Tensor, reference: Tensor, *, zero_mean: bool = True, lengths: Tensor | None = None) -> Tensor:
    """Scale-invariant signal-to-noise ratio (also SI-SDR) in decibels; see `signal_ratio`."""
    return signal_ratio(estimate, reference, "si_snr", zero_mean=zero_mean, lengths=lengths)


def sd_sdr(estimate: Tensor, reference: Tensor, *, zero_mean: bool = True, lengths: Tensor | None = None) -> Tensor:
    """Scale-dependent signal-to-distortion ratio in decibels; see `signal_ratio`."""
    return signal_ratio(estimate, reference, "sd_sdr", zero_mean=zero_mean, lengths=lengths)


def snr(estimate: Tensor, reference: Tensor, *, zero_mean: bool = True, lengths: Tensor | None = None) -> Tensor:
    """Signal-to-noise ratio in decibels; see `signal_ratio`."""
    return signal_ratio(estimate, reference, "snr", zero_mean=zero_mean, lengths=lengths)


def pairwise_signal_ratio(
    estimates: Tensor,
    references: Tensor,
    kind: Ratio = "si_snr",
    *,
    zero_mean: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """The ratio of every estimate to every reference.

    Args:
        estimates: (B, C, T).
        references: (B, C, T).
        kind, zero_mean: as in `signal_ratio`.
        lengths: (B,) numbers of valid samples.

    Returns:
        M (B, C, C) in decibels, M[b, i, j] of estimate i and reference j.

    Raises:
        ValueError: shapes differ or are not (B, C, T).
    """
    _check_sources(estimates, references)
    if lengths is not None:
        _check_lengths(lengths, estimates)
    return signal_ratio(
        estimates.unsqueeze(2),
        references.unsqueeze(1),
        kind,
        zero_mean=zero_mean,
        lengths=None if lengths is None else lengths.view(-1, 1, 1),
    )


def si_snr_improvement(
    estimates: Tensor, references: Tensor, mixture: Tensor, *, lengths: Tensor | None = None
) -> Tensor:
    """SI-SNRi: by how many decibels the estimates are better than the mixture itself, as a mean over the sources.

    Args:
        estimates: (B, C, T), in the order of the references (see `convatlas.ops.permutation_invariant`).
        references: (B, C, T).
        mixture: (B, T).
        lengths: (B,) numbers of valid samples.

    Returns:
        (B,) in decibels.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_sources(estimates, references)
    if mixture.shape != (estimates.shape[0], estimates.shape[2]):
        raise ValueError(f"mixture must be (B, T) of the estimates {tuple(estimates.shape)}, got {(*mixture.shape,)}")
    if lengths is not None:
        _check_lengths(lengths, estimates)
        lengths = lengths.unsqueeze(1)
    after = si_snr(estimates, references, lengths=lengths)
    before = si_snr(mixture.unsqueeze(1), references, lengths=lengths)
    return (after - before).mean(1)


def length_mask(lengths: Tensor, total: int) -> Tensor:
    """Which of ``total`` samples are valid: (...,) numbers to booleans (..., total)."""
    return torch.arange(total, device=lengths.device) < lengths.unsqueeze(-1)


def _check_sources(estimates: Tensor, references: Tensor) -> None:
    if estimates.dim() != 3 or estimates.shape != references.shape:
        raise ValueError(
            f"estimates and references must be (B, C, T) alike, got {tuple(estimates.shape)} and "
            f"{tuple(references.shape)}"
        )


def _check_lengths(lengths: Tensor, estimates: Tensor) -> None:
    if lengths.shape != estimates.shape[:1]:
        raise ValueError(f"lengths must be ({len(estimates)},), got {tuple(lengths.shape)}")
    if lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(f"lengths must be whole numbers, got {lengths.dtype}")
