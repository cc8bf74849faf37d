"""Mixing of channels, with its own matrix at every mode of a spectrum: the multiplication of spectral convolutions.

Poli, Massaroli, Berto, Park, Dao, Re, Ermon: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS
2022, arXiv 2211.14453, section 3; Li et al.: "Fourier Neural Operator for Parametric Partial Differential Equations",
ICLR 2021, arXiv 2010.08895, equation 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["mix_modes", "mode_major"]

_backends = Backends("mix_modes", auto=lambda *_: "matmul")


def mix_modes(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """y[b, o, k] = sum_i x[b, i, k] weight[i, o, k] at every mode k.

    Real or complex; a real spectrum with complex weights is mixed as a complex one, and the other way round. Half
    precision is summed in float32, also under autocast.

    Args:
        x: spectrum (B, I, *modes) with any number of axes.
        weight: (I, O, *modes). The products run without a copy of it if `mode_major` laid out its memory.
        backend: ``auto``; ``naive`` (the sum, by einsum); ``matmul`` (a matrix product for each mode).

    Returns:
        (B, O, *modes), its memory mode by mode.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() < 3 or weight.dim() != x.dim() or x.shape[1] != weight.shape[0] or x.shape[2:] != weight.shape[2:]:
        raise ValueError(
            f"x must be (B, I, *modes) and weight (I, O, *modes), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    return _backends.run(backend, x, weight)


def mode_major(weight: Tensor) -> Tensor:
    """The same weight (I, O, *modes) with the memory of (*modes, I, O), which `mix_modes` multiplies without a copy.

    Copies, optimisers and gradients keep the order of memory; the shape stays that of published checkpoints.
    """
    return _modes_first(weight).contiguous().permute(-2, -1, *range(weight.dim() - 2))


def _modes_first(x: Tensor) -> Tensor:
    return x.permute(*range(2, x.dim()), 0, 1)


def _common_type(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype)


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(_common_type(x, weight), torch.float32)
    return x.to(dtype), weight.to(dtype)


@_backends.register("naive")
def _naive(x: Tensor, weight: Tensor) -> Tensor:
    with without_autocast(x):
        return torch.einsum("bi...,io...->bo...", *_wide(x, weight)).to(_common_type(x, weight))


@_backends.register("matmul")
def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    spectrum, matrices = (_modes_first(each) for each in _wide(x, weight))
    modes, (inputs, outputs), batch = x.shape[2:], weight.shape[:2], len(x)
    count = math.prod(modes)
    with without_autocast(x):
        y = torch.bmm(spectrum.reshape(count, batch, inputs), matrices.reshape(count, inputs, outputs))
    return y.view(*modes, batch, outputs).permute(-2, -1, *range(len(modes))).to(_common_type(x, weight))
