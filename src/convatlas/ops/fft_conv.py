"""Long depthwise convolution by FFT: one, two or three position axes, causal, circular or in both directions, gated.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908. The kernels of other backends than Triton's are those of torch.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends
from convatlas.ops.fourier import (
    convolve,
    convolve_blocks,
    fast_length,
    gated_convolve,
    gated_gradients,
    spectrum,
    work_type,
)
from convatlas.ops.precision import without_autocast

__all__ = ["KernelSpectrum", "fft_conv", "kernel_spectrum"]

# Where the transforms begin to pay on a CPU, in taps of the kernel.
_LONGEST_DIRECT = {1: 95, 2: 31 * 31, 3: 7 * 7 * 7}
_LONGEST_DIRECT_TRAINED = 15  # torch's gradients for the kernel of a depthwise Conv1d are slow
_LONGEST_DIRECT_GPU = 32
_SHORTEST_BLOCK = 2048
_SHORTEST_TRITON = 256
_TRITON_AUTO_LENGTH = 1024


@dataclass(frozen=True)
class KernelSpectrum:
    """The transform of a kernel that does not change, made by `kernel_spectrum`.

    Attributes:
        values: (C, *lengths of the spectrum), complex.
        kernel_size: number of taps that count, for each axis.
        size: the signal's L that it is made for.
        lengths: lengths of the transforms.
        backend: ``fft`` or ``overlap_save``.
    """

    values: Tensor
    kernel_size: tuple[int, ...]
    size: tuple[int, ...]
    lengths: tuple[int, ...]
    backend: Literal["fft", "overlap_save"]


@dataclass(frozen=True)
class _Geometry:
    size: tuple[int, ...]
    taps: tuple[int, ...]
    period: tuple[int, ...]
    wraps: tuple[bool, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of one transform of the whole signal; they are free on an axis where nothing wraps."""
        return tuple(
            period if wraps else fast_length(size + taps - 1)
            for size, taps, period, wraps in zip(self.size, self.taps, self.period, self.wraps, strict=True)
        )

    @property
    def block(self) -> int:
        """Length of a block of overlap-save."""
        return max(_SHORTEST_BLOCK, 1 << (4 * self.taps[0] - 1).bit_length())

    @property
    def in_blocks(self) -> bool:
        """Whether overlap-save pays."""
        return len(self.size) == 1 and not self.wraps[0] and self.size[0] >= max(2 * self.block, 8 * self.taps[0])


def _auto(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    fft_size: int | Sequence[int] | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> str:
    if isinstance(k, KernelSpectrum):
        return k.backend
    geometry = _geometry(u.shape[2:], k.shape[k.dim() - u.dim() + 2 :], fft_size)
    taps = math.prod(geometry.taps)
    # A captured graph must serve every length, and may run elsewhere.
    if torch.compiler.is_compiling():
        return "direct" if taps <= _LONGEST_DIRECT_GPU else "fft"
    if u.device.type != "cpu":
        if taps <= _LONGEST_DIRECT_GPU:
            return "direct"
        short = u.dim() == 3 and _triton_length(geometry)[0] <= _TRITON_AUTO_LENGTH
        half = u.dtype in (torch.float16, torch.bfloat16)
        fits = short and half and "triton" in _backends.names and _refuses_triton(u, k, fft_size) is None
        return "triton" if fits else "fft"
    trained = torch.is_grad_enabled() and (u.requires_grad or k.requires_grad)
    if taps <= (_LONGEST_DIRECT_TRAINED if trained and u.dim() == 3 else _LONGEST_DIRECT[u.dim() - 2]):
        return "direct"
    return "overlap_save" if geometry.in_blocks else "fft"


_backends = Backends("fft_conv", auto=_auto)


def fft_conv(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    fft_size: int | Sequence[int] | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own, possibly very long kernel.

    y[t] = postgate[t] * (sum_j k[j] (pregate u)[(t - j) mod N] + skip (pregate u)[t]) for t < L, where u is zero from
    L to N. This is the convolution of mathematics: the kernel runs backwards compared with `torch.nn.Conv1d`. On every
    axis:

    - N >= L + K - 1, the default: causal, nothing wraps; taps that reach beyond the signal have no effect.
    - N = L: circular.
    - K = N = 2 L: both directions; the taps L to 2 L - 1 belong to the lags -L to -1.
    - any other N >= max(L, K): the tail wraps around.

    Half precision is computed in float32, also under autocast. Of the backward pass, the transforms keep only u, k and
    the gates. Differentiable twice, except with ``triton``.

    Args:
        u: signals (B, C, *L), real, with one, two or three position axes.
        k: kernels (C, *K) or (1, C, *K), real; or what `kernel_spectrum` made of them.
        fft_size: the period N of each axis, or one number for all; None where nothing is to wrap. With a spectrum, the
            one that it was made with counts.
        pregate, postgate: factors of the shape and type of u, both or none.
        skip: (C,), added to the kernel at lag 0, so that it costs nothing.
        backend: ``auto``; ``naive`` (the sum, tap by tap); ``direct`` (torch's convolution, for short kernels); ``fft``
            (one transform of the whole signal); ``overlap_save`` (transforms of blocks, causal signals, kernels much
            shorter than the signal); or ``triton`` (matrix products on a GPU, signals of any length, also with a
            backward pass of such kernels; checked through the interpreter only).

    Returns:
        The shape and type of u.

    Raises:
        ValueError: a tensor has a wrong shape or type, only one gate is given, or fft_size is too small.
        Unsupported: the backend cannot serve the call.
    """
    _check(u, k, fft_size, pregate, postgate)
    if backend == "triton" and backend not in _backends.names:
        raise Unsupported("backend 'triton' of fft_conv needs the triton package")
    if isinstance(k, Tensor) and k.dim() == u.dim():
        k = k.squeeze(0)
    if skip is not None:
        k = _with_skip(k, skip)
    return _backends.run(backend, u, k, fft_size, pregate, postgate)


def kernel_spectrum(
    k: Tensor, size: int | Sequence[int], fft_size: int | Sequence[int] | None = None
) -> KernelSpectrum:
    """Transform a kernel once, for many calls of `fft_conv` that give it in place of the kernel.

    Args:
        k: kernels (C, *K), real.
        size: the signal's L, one number for every axis.
        fft_size: as `fft_conv` takes it.

    Raises:
        ValueError: k is not real or has a wrong shape, or fft_size is too small.
    """
    dims = k.dim() - 1
    if not 1 <= dims <= 3:
        raise ValueError(f"k must be (C, *K) with one, two or three position axes, got {k.dim()} dimensions")
    _check_real("k", k)
    size = _each_axis(size, dims)
    if len(size) != dims:
        raise ValueError(f"size must have {dims} numbers, one for each position axis, got {len(size)}")
    geometry = _geometry(size, k.shape[1:], fft_size)
    lengths = (geometry.block,) if geometry.in_blocks else geometry.lengths
    values = spectrum(_truncated(k, geometry).to(work_type(k)), lengths)
    return KernelSpectrum(values, geometry.taps, size, lengths, "overlap_save" if geometry.in_blocks else "fft")


def _with_skip(k: Tensor | KernelSpectrum, skip: Tensor) -> Tensor:
    if isinstance(k, KernelSpectrum):
        raise ValueError("skip must be added to the kernel, at lag 0, before it is transformed, got a transformed one")
    if skip.shape != k.shape[:1]:
        raise ValueError(f"skip must be ({k.shape[0]},) like the channels of k, got {tuple(skip.shape)}")
    tap = skip.to(torch.promote_types(k.dtype, skip.dtype)).view(-1, *[1] * (k.dim() - 1))
    return k + F.pad(tap, _paddings([(0, size - 1) for size in k.shape[1:]]))


def _check_real(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be real floating point, got {tensor.dtype}; convolve the real and imaginary parts one by one"
            if tensor.is_complex()
            else f"{name} must be real floating point, got {tensor.dtype}"
        )


def _check(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    fft_size: int | Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> None:
    if not 3 <= u.dim() <= 5:
        raise ValueError(f"u must be (B, C, L), (B, C, H, W) or (B, C, D, H, W), got {u.dim()} dimensions")
    _check_real("u", u)
    size, channels = tuple(u.shape[2:]), u.shape[1]
    if isinstance(k, KernelSpectrum):
        if k.values.shape[0] != channels:
            raise ValueError(f"k must have the {channels} channels of u, got {k.values.shape[0]}")
        if k.size != size and k.backend == "fft":
            raise ValueError(f"k was transformed for signals of size {k.size}, got u of size {size}")
        if len(k.size) != len(size) or fft_size is not None:
            raise ValueError("with a transformed kernel, u must have its axes and fft_size must be None")
    else:
        _check_real("k", k)
        if k.dim() == u.dim() and k.shape[0] == 1:
            k = k[0]
        if k.dim() != u.dim() - 1 or k.shape[0] != channels:
            axes = ", ".join("KHW"[-len(size) :] if len(size) > 1 else "K")
            raise ValueError(f"k must be ({channels}, {axes}) like the channels of u, got {tuple(k.shape)}")
        _geometry(size, k.shape[1:], fft_size)
    if (pregate is None) != (postgate is None):
        raise ValueError("pregate and postgate must be given both or none")
    for name, gate in (("pregate", pregate), ("postgate", postgate)):
        if gate is not None and (gate.shape != u.shape or gate.dtype != u.dtype):
            raise ValueError(
                f"{name} must have the shape and type of u, {tuple(u.shape)} {u.dtype}, "
                f"got {tuple(gate.shape)} {gate.dtype}"
            )


def _geometry(size: Sequence[int], taps: Sequence[int], fft_size: int | Sequence[int] | None) -> _Geometry:
    size, taps = tuple(size), tuple(taps)
    period = fft_size if fft_size is None or isinstance(fft_size, int) else tuple(fft_size)
    # Sizes of a captured graph may have no value, and cannot be looked up.
    if torch.compiler.is_compiling() or not all(type(length) is int for length in size + taps):
        return _laid_out(size, taps, period)
    return _known_geometry(size, taps, period)


def _laid_out(size: tuple[int, ...], taps: tuple[int, ...], fft_size: int | tuple[int, ...] | None) -> _Geometry:
    if min(size) < 1 or min(taps) < 1:
        raise ValueError(f"signals and kernels must not be empty, got sizes {size} and {taps}")
    needed = tuple(length + count - 1 for length, count in zip(size, taps, strict=True))
    period = needed if fft_size is None else _each_axis(fft_size, len(size))
    if len(period) != len(size):
        raise ValueError(f"fft_size must have {len(size)} numbers, one for each position axis, got {len(period)}")
    for n, length, count in zip(period, size, taps, strict=True):
        if n < length or n < count:
            raise ValueError(f"fft_size must not be smaller than the signal ({length}) or kernel ({count}), got {n}")
    wraps = tuple(n < least for n, least in zip(period, needed, strict=True))
    # In an exported graph the length has no value to compare with.
    used = tuple(
        t if wrapped or isinstance(s, torch.SymInt) else min(t, s)  # type: ignore[unreachable]
        for t, s, wrapped in zip(taps, size, wraps, strict=True)
    )
    return _Geometry(size, used, period, wraps)


# A short call spends a tenth of its time on this otherwise.
_known_geometry = lru_cache(maxsize=1024)(_laid_out)


def _each_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _prepared(u: Tensor, k: Tensor, fft_size: int | Sequence[int] | None) -> tuple[Tensor, _Geometry]:
    geometry = _geometry(u.shape[2:], k.shape[1:], fft_size)
    return _truncated(k, geometry), geometry


def _truncated(k: Tensor, geometry: _Geometry) -> Tensor:
    # Where nothing wraps, taps beyond the length of the signal would only make the transform longer.
    return k if tuple(k.shape[1:]) == geometry.taps else k[(slice(None), *(slice(taps) for taps in geometry.taps))]


def _refuses_spectrum(u: Tensor, k: Tensor | KernelSpectrum, *rest: object) -> str | None:
    return "it needs the kernel itself, got its spectrum" if isinstance(k, KernelSpectrum) else None


@_backends.register("naive", refuses=_refuses_spectrum)
def _naive(
    u: Tensor,
    k: Tensor,
    fft_size: int | Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    period = _geometry(u.shape[2:], k.shape[1:], fft_size).period
    dtype = work_type(u, k)
    axes = tuple(range(2, u.dim()))
    x = u.to(dtype) if pregate is None else u.to(dtype) * pregate
    x = F.pad(x, _paddings([(0, n - length) for n, length in zip(period, u.shape[2:], strict=True)]))
    y = torch.zeros_like(x)
    taps = itertools.product(*(range(size) for size in k.shape[1:]))
    for weight, tap in zip(k.to(dtype).flatten(1).unbind(1), taps, strict=True):
        y = y + weight.view(-1, *[1] * len(axes)) * torch.roll(x, tap, axes)
    crop: tuple[Any, ...] = (..., *(slice(length) for length in u.shape[2:]))
    y = y[crop]
    return (y if postgate is None else y * postgate).to(u.dtype)


@_backends.register("direct", refuses=_refuses_spectrum)
def _direct(
    u: Tensor,
    k: Tensor,
    fft_size: int | Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    k, geometry = _prepared(u, k, fft_size)
    dtype = work_type(u, k)
    x = u.to(dtype) if pregate is None else u.to(dtype) * pregate
    for axis, (size, taps, period, wraps) in enumerate(
        zip(geometry.size, geometry.taps, geometry.period, geometry.wraps, strict=True), start=2
    ):
        if taps == 1:
            continue
        # What stands before the signal: the end of its period, which is zero where nothing wraps.
        zeros = min(period - size, taps - 1) if wraps else taps - 1
        shape = list(x.shape)
        shape[axis] = zeros
        tail = x.narrow(axis, size - (taps - 1 - zeros), taps - 1 - zeros)
        x = torch.cat([tail, x.new_zeros(shape), x], dim=axis)
    dims = u.dim() - 2
    kernel = k.to(dtype).flip(tuple(range(1, k.dim()))).unsqueeze(1)
    # Torch's kernels for large filters are many times faster in this layout.
    if dims == 2 and u.device.type == "cpu" and max(geometry.taps) >= 11:
        x = x.contiguous(memory_format=torch.channels_last)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    with without_autocast(x):
        y = convolution(x, kernel, groups=u.shape[1])
    return (y if postgate is None else y * postgate).to(u.dtype)


def _refuses_fft(u: Tensor, k: Tensor | KernelSpectrum, *rest: object) -> str | None:
    return _refuses_foreign(k, "fft")


@_backends.register("fft", refuses=_refuses_fft)
def _fft(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    fft_size: int | Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    if isinstance(k, KernelSpectrum):
        return _with_spectrum(u, k, pregate, postgate)
    k, geometry = _prepared(u, k, fft_size)
    return _transformed(u, k, pregate, postgate, geometry.lengths, False)


def _refuses_blocks(
    u: Tensor, k: Tensor | KernelSpectrum, fft_size: int | Sequence[int] | None = None, *rest: object
) -> str | None:
    if isinstance(k, KernelSpectrum):
        return _refuses_foreign(k, "overlap_save")
    if u.dim() != 3:
        return f"it takes signals with one position axis, got {u.dim() - 2}"
    if _geometry(u.shape[2:], k.shape[-1:], fft_size).wraps[0]:
        return f"its blocks are causal, and fft_size {fft_size} makes the tail wrap"
    return None


@_backends.register("overlap_save", refuses=_refuses_blocks)
def _overlap_save(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    fft_size: int | Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    if isinstance(k, KernelSpectrum):
        return _with_spectrum(u, k, pregate, postgate)
    k, geometry = _prepared(u, k, fft_size)
    return _transformed(u, k, pregate, postgate, (geometry.block,), True)


def _refuses_foreign(k: Tensor | KernelSpectrum, backend: str) -> str | None:
    if isinstance(k, KernelSpectrum) and k.backend != backend:
        return f"the kernel was transformed for {k.backend}"
    return None


def _with_spectrum(u: Tensor, k: KernelSpectrum, pregate: Tensor | None, postgate: Tensor | None) -> Tensor:
    dtype = torch.promote_types(work_type(u), k.values.real.dtype)
    x = u.to(dtype) if pregate is None else u.to(dtype) * pregate
    if k.backend == "fft":
        y = convolve(x, k.values, k.lengths)
    else:
        y = convolve_blocks(x, k.values, k.kernel_size[0], k.lengths[0])
    return (y if postgate is None else y * postgate).to(u.dtype)


class _Transformed(torch.autograd.Function):
    """Keeps its inputs and nothing else: their spectra take four times the room, and little time to compute again."""

    @staticmethod
    def forward(
        u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, lengths: tuple[int, ...], blocks: bool
    ) -> Tensor:
        return gated_convolve(u, k, pregate, postgate, lengths, blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.lengths, ctx.blocks = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, k, pregate, postgate = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        return *gated_gradients(u, k, pregate, postgate, g, ctx.lengths, ctx.blocks, needs), None, None


def _transformed(
    u: Tensor,
    k: Tensor,
    pregate: Tensor | None,
    postgate: Tensor | None,
    lengths: tuple[int, ...],
    blocks: bool,
) -> Tensor:
    args = u, k, pregate, postgate, lengths, blocks
    if not torch.is_grad_enabled():
        return gated_convolve(*args)
    y: Tensor = _Transformed.apply(*args)  # type: ignore[no-untyped-call]
    return y


def _triton_length(geometry: _Geometry) -> tuple[int, bool]:
    """Points of the transform, a power of two, and whether negative lags need room of their own in it."""
    size, taps, period = geometry.size[0], geometry.taps[0], geometry.period[0]
    if geometry.wraps[0] and period >= _SHORTEST_TRITON and not period & (period - 1):
        return period, False
    needed = 2 * size - 1 if geometry.wraps[0] else size + taps - 1
    return max(_SHORTEST_TRITON, 1 << (needed - 1).bit_length()), geometry.wraps[0]


def _refuses_triton(u: Tensor, k: Tensor | KernelSpectrum, *rest: object) -> str | None:
    if isinstance(k, KernelSpectrum):
        return "it needs the kernel itself, got its spectrum"
    if u.dim() != 3:
        return f"it takes signals with one position axis, got {u.dim() - 2}"
    if u.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"u must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {u.device.type}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(
        u: Tensor,
        k: Tensor,
        fft_size: int | Sequence[int] | None,
        pregate: Tensor | None,
        postgate: Tensor | None,
    ) -> Tensor:
        from convatlas.ops.kernels.fft_conv import monarch_conv

        k, geometry = _prepared(u, k, fft_size)
        n, two_sided = _triton_length(geometry)
        if two_sided:
            # A longer period serves any other: only lags from 1 - L to L - 1 count, and those below 0 stand at its end.
            size, taps, period = geometry.size[0], geometry.taps[0], geometry.period[0]
            k = F.pad(k, (0, period - taps))
            ahead, behind = k[:, :size], k[:, period - size + 1 :]
            k = torch.cat([ahead, k.new_zeros(len(k), n - 2 * size + 1), behind], dim=1)
        y: Tensor = monarch_conv(u, k, pregate, postgate, n)
        return y


def _paddings(pairs: Sequence[tuple[int, int]]) -> list[int]:
    # F.pad counts from the last axis.
    return [amount for pair in reversed(pairs) for amount in pair]
