"""Bright places in the spectrum of a picture, found and counted as OpenCV does.

A picture has one around frequency zero. A grid of pixels that differ from their neighbours repeats it at the multiples
of the grid's frequency: Kim, Abuadbba, Gao et al., "Decamouflage", arXiv 2010.03735, section on steganalysis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.ndimage import label
from torch import Tensor

__all__ = ["count_contours", "log_spectrum", "spectral_mask", "spectral_points"]

#: OpenCV's Gaussian of 21 pixels and standard deviation 3.5 in 256ths: rounded from the edge inwards, each error
#: carried on to the next weight, and the centre takes what is left.
_HALF = (0, 2, 2, 4, 6, 11, 15, 20, 25, 28)
_GAUSSIAN = (*_HALF, 256 - 2 * sum(_HALF), *_HALF[::-1])
#: A blurred 255 counts where its fixed-point value rounds to at least 1.
_SMALLEST = 2.0**15


def log_spectrum(x: Tensor) -> Tensor:
    """20 ln|F| of the centred Fourier transform F, in float64; frequency zero lies at (H // 2, W // 2).

    Args:
        x: grey pictures (..., H, W).

    Returns:
        (..., H, W), not rounded; an OpenCV script that shows it rounds and cuts it to 0..255.
    """
    power = _power(x)
    return torch.fft.fftshift(_whole(10 * torch.log(power + 1e-24), x.shape[-1]), (-2, -1))


def spectral_mask(x: Tensor, threshold: float) -> Tensor:
    """Where the spectrum, rounded to whole numbers, lies above a threshold.

    Args:
        x: grey pictures (..., H, W).
        threshold: of 20 ln|F|.

    Returns:
        (..., H, W) bool, centred.
    """
    least = math.exp((math.floor(threshold) + 0.5) / 10)  # of |F|^2: no logarithm of every frequency is needed
    return torch.fft.fftshift(_whole(_power(x) >= least, x.shape[-1]), (-2, -1))


def spectral_points(mask: Tensor) -> Tensor:
    """How many bright places a `spectral_mask` has (the paper's CSP).

    Single pixels are taken out by a median over 3 x 3 pixels, what lies near each other is joined by a Gaussian blur of
    21 x 21, and the contours of what is not zero are counted.

    Args:
        mask: (..., H, W) bool.

    Returns:
        (...) int64.
    """
    planes = mask.reshape(-1, *mask.shape[-2:]).to(torch.uint8)
    median = _of_three(_of_three(planes, -1), -2) >= 5
    # Sums of these whole numbers stay below 2^24: float32 is exact.
    blurred = _around_ones(median).float() * 255
    for dim in (-1, -2):
        blurred = _blurred(blurred, dim)
    counts = [count_contours(plane >= _SMALLEST) for plane in blurred]
    return torch.tensor(counts, device=mask.device).reshape(mask.shape[:-2])


def count_contours(mask: Tensor) -> int:
    """Number of contours of a mask (H, W): outer ones (neighbours in 8 directions) and those of holes (in 4)."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return 0
    inside = mask[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    framed = F.pad(inside, (1, 1, 1, 1)).cpu().numpy()
    blobs, background = label(framed, [[1] * 3] * 3)[1], label(~framed)[1]
    return int(blobs + background - 1)


def _power(x: Tensor) -> Tensor:
    """|F|^2 of the non-negative frequencies of the last axis."""
    half = torch.fft.rfft2(x.double())
    return half.real.square() + half.imag.square()


def _whole(half: Tensor, width: int) -> Tensor:
    """All frequencies of a real picture from those that rfft2 gives: values at k and -k are the same."""
    mirrored = half[..., 1 : (width + 1) // 2].flip(-2, -1).roll(1, -2)
    return torch.cat([half, mirrored], -1)


def _of_three(x: Tensor, dim: int) -> Tensor:
    """Sums of each entry and its neighbours; the outermost entries are repeated beyond the ends."""
    length = x.shape[dim]
    x = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, length - 1, 1)], dim)
    return x.narrow(dim, 0, length) + x.narrow(dim, 1, length) + x.narrow(dim, 2, length)


def _around_ones(masks: Tensor) -> Tensor:
    """The part of masks (N, H, W) that the ones of any of them can reach, and as much again that is zero."""
    for dim in (1, 2):
        found = masks.any(0).any(2 - dim).nonzero()
        first, last = (int(found[0]), int(found[-1])) if len(found) else (0, 0)
        start = max(0, first - 2 * len(_HALF))
        masks = masks.narrow(dim, start, min(masks.shape[dim], last + 1 + 2 * len(_HALF)) - start)
    return masks


def _blurred(x: Tensor, dim: int) -> Tensor:
    """The Gaussian along one axis, as a sum of shifted masks."""
    length, reach = x.shape[dim], len(_HALF)
    x = _reflected(x, dim)
    result = x.narrow(dim, reach, length) * _GAUSSIAN[reach]
    for shift in range(1, reach):  # the outermost weight is zero
        both = x.narrow(dim, reach - shift, length) + x.narrow(dim, reach + shift, length)
        result.add_(both, alpha=_GAUSSIAN[reach + shift])
    return result


def _reflected(x: Tensor, dim: int) -> Tensor:
    """10 pixels more on both ends of an axis, mirrored at the centres of the outermost, as often as it takes."""
    length, border = x.shape[dim], len(_HALF)
    places = torch.arange(-border, length + border, device=x.device) % max(2 * (length - 1), 1)
    return x.index_select(dim, torch.minimum(places, (2 * (length - 1) - places).abs()))
