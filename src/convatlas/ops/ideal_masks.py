"""Separation by ideal masks: what could be reached on a spectrogram if the magnitudes of the sources were known.

The bounds in Luo, Mesgarani: "Conv-TasNet", TASLP 2019, arXiv 1809.07454, section IV:
an STFT of the mixture, in each time-frequency bin a weight for each source, and the phase of the mixture.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["MaskKind", "ideal_mask_separation"]

MaskKind = Literal["binary", "ratio", "wiener"]

_EPS = 1e-8


def ideal_mask_separation(
    mixture: Tensor, sources: Tensor, kind: MaskKind = "ratio", *, n_fft: int = 256, hop_length: int = 64
) -> Tensor:
    """Sources taken out of a mixture by masks that were made from the sources themselves.

    With the magnitudes |S_i| of the sources, the mask of source i is

    - ``binary`` (IBM): 1 where |S_i| is the largest, the first of equal ones, else 0;
    - ``ratio`` (IRM): |S_i| / sum_j |S_j|;
    - ``wiener`` (WFM): |S_i|^2 / sum_j |S_j|^2.

    The window is Hann's; the paper takes 32 ms with a hop of 8 ms, which are the defaults at 8 kHz.

    Args:
        mixture: (..., T).
        sources: (..., C, T).
        kind: of mask.
        n_fft: samples of the window.
        hop_length: samples between windows.

    Returns:
        Estimates (..., C, T) in the order of the sources.

    Raises:
        UnknownName: there is no such kind.
        ValueError: shapes do not fit together, or the window or the hop is out of range.
    """
    if kind not in get_args(MaskKind):
        raise unknown("kind of mask", kind, get_args(MaskKind))
    if sources.dim() < 2 or mixture.shape != sources.shape[:-2] + sources.shape[-1:]:
        raise ValueError(
            f"mixture must be (..., T) and sources (..., C, T), got {tuple(mixture.shape)} and {tuple(sources.shape)}"
        )
    if not 0 < hop_length <= n_fft // 2:
        raise ValueError(f"hop_length must be from 1 to half of n_fft ({n_fft}), got {hop_length}")
    length, lead = mixture.shape[-1], sources.shape[:-1]
    window = torch.hann_window(n_fft, dtype=mixture.dtype, device=mixture.device)
    how = {"n_fft": n_fft, "hop_length": hop_length, "window": window}

    def transform(x: Tensor) -> Tensor:
        # Zeros around the signal, so that short ones have windows too.
        flat = x.reshape(-1, length)
        spectrum = torch.stft(flat, **how, center=True, pad_mode="constant", return_complex=True)  # type: ignore[arg-type]
        return spectrum.reshape(*x.shape[:-1], *spectrum.shape[1:])

    magnitude = transform(sources).abs()
    if kind == "binary":
        largest = magnitude.argmax(-3, keepdim=True)
        mask = torch.zeros_like(magnitude).scatter_(-3, largest, 1.0)
    else:
        weight = magnitude if kind == "ratio" else magnitude.square()
        mask = weight / (weight.sum(-3, keepdim=True) + _EPS)
    masked = mask * transform(mixture).unsqueeze(-3)
    flat = masked.reshape(-1, *masked.shape[-2:])
    estimates: Tensor = torch.istft(flat, **how, center=True, length=length)  # type: ignore[arg-type]
    return estimates.reshape(*lead, length)
