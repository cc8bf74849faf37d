"""Products with a matrix for each mode, as spectral convolutions mix channels, or for each channel, to mix modes.

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

__all__ = ["channel_major", "mix_axis", "mix_modes", "mode_major"]

_channel_mixing = Backends("mix_modes", auto=lambda *_: "matmul")
_axis_mixing = Backends("mix_axis", auto=lambda *_: "matmul")


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
    return _channel_mixing.run(backend, x, weight)


def mode_major(weight: Tensor) -> Tensor:
    """The same weight (I, O, *modes) with the memory of (*modes, I, O), which `mix_modes` multiplies without a copy.

    Copies, optimisers and gradients keep the order of memory; the shape stays that of published checkpoints.
    """
    return _modes_first(weight).contiguous().permute(-2, -1, *range(weight.dim() - 2))


def mix_axis(x: Tensor, weight: Tensor, axis: int = -1, *, backend: str = "auto") -> Tensor:
    """y[b, c, .., o, ..] = sum_i x[b, c, .., i, ..] weight[i, o, c] along one axis of modes, for each channel.

    Real or complex; half precision is summed in float32, also under autocast.

    Args:
        x: spectrum (B, C, *modes).
        weight: (I, O, C). The products run without a copy of it if `channel_major` laid out its memory.
        axis: which axis of x is mixed, not one of the first two.
        backend: ``auto``; ``naive`` (the sum, by einsum); ``matmul`` (a matrix product for each channel).

    Returns:
        x with O in place of I modes.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() < 3 or not 2 <= axis % x.dim() or not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis must be one of the modes of x (B, C, *modes), got {axis} and {tuple(x.shape)}")
    if weight.dim() != 3 or weight.shape[0] != x.shape[axis] or weight.shape[2] != x.shape[1]:
        wanted = f"({x.shape[axis]}, O, {x.shape[1]})"
        raise ValueError(f"weight must be {wanted} for x {tuple(x.shape)} and axis {axis}, got {tuple(weight.shape)}")
    return _axis_mixing.run(backend, x, weight, axis)


def channel_major(weight: Tensor) -> Tensor:
    """The same weight (I, O, C) with the memory of (C, I, O), which `mix_axis` multiplies without a copy."""
    return weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _modes_first(x: Tensor) -> Tensor:
    return x.permute(*range(2, x.dim()), 0, 1)


def _common_type(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype)


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(_common_type(x, weight), torch.float32)
    return x.to(dtype), weight.to(dtype)


@_channel_mixing.register("naive")
def _naive(x: Tensor, weight: Tensor) -> Tensor:
    with without_autocast(x):
        return torch.einsum("bi...,io...->bo...", *_wide(x, weight)).to(_common_type(x, weight))


@_channel_mixing.register("matmul")
def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    spectrum, matrices = (_modes_first(each) for each in _wide(x, weight))
    modes, (inputs, outputs), batch = x.shape[2:], weight.shape[:2], x.shape[0]
    count = math.prod(modes)
    with without_autocast(x):
        # Torch's batched product is up to eight times slower where neither axis of a matrix is dense.
        y = torch.bmm(
            spectrum.reshape(count, batch, inputs).contiguous(), matrices.reshape(count, inputs, outputs).contiguous()
        )
    _dense_gradient(y)
    return y.view(*modes, batch, outputs).permute(-2, -1, *range(len(modes))).to(_common_type(x, weight))


def _dense_gradient(y: Tensor) -> None:
    """Have the products of the backward pass, too, get dense matrices."""
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())


@_axis_mixing.register("naive")
def _naive_axis(x: Tensor, weight: Tensor, axis: int = -1) -> Tensor:
    with without_autocast(x):
        wide, weights = _wide(x, weight)
        y = torch.einsum("bc...i,ioc->bc...o", wide.movedim(axis, -1), weights).movedim(-1, axis)
    return y.to(_common_type(x, weight))


@_axis_mixing.register("matmul")
def _matmul_axis(x: Tensor, weight: Tensor, axis: int = -1) -> Tensor:
    wide, weights = _wide(x, weight)
    rows = wide.movedim(axis, -1).transpose(0, 1)  # (C, B, *others, I)
    with without_autocast(x):
        y = torch.bmm(
            rows.reshape(rows.shape[0], -1, rows.shape[-1]).contiguous(), weights.permute(2, 0, 1).contiguous()
        )
    _dense_gradient(y)
    return y.view(*rows.shape[:-1], -1).transpose(0, 1).movedim(-1, axis).to(_common_type(x, weight))
