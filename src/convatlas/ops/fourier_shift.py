"""Middle slices of 3-D kernels that were shifted by fractions of a tap.

Yavuz, Yang: "Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting Operation", 2024, arXiv
2411.02441. A shift by s multiplies the spectrum at the frequency f by exp(-2 pi i f.s), so it is a product of one
matrix along each axis: D(s)[a, b] = 1/K sum_f exp(2 pi i f (a - b - s)), the circulant matrix of Dirichlet's kernel.
Together they are one matrix that takes the K^3 taps of a kernel to the K^2 taps of its slice, so that slices of all
kernels and samples are one matrix product, with no transform and no complex number as large as the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["shifted_slices"]

_backends = Backends("shifted_slices", auto=lambda *_: "dirichlet")


def shifted_slices(weight: Tensor, shift: Tensor, *, backend: str = "auto") -> Tensor:
    """Shift 3-D kernels circularly, for each sample by another distance, and take the middle slice of the first axis.

    The real part is taken of the result, which for odd K is real anyway. It runs in float32 at least, also under
    autocast.

    Args:
        weight: kernels (out, in, K, K, K).
        shift: taps along depth, height and width, (B, 3), fractions included.
        backend: ``auto``, ``naive`` (by the Fourier transform, as the paper does) or ``dirichlet`` (a matrix product).

    Returns:
        (B, out, in, K, K): ``shifted[b, :, :, K // 2]``, in the type of the weight.

    Raises:
        ValueError: the kernels are not cubic, or the shift is not (B, 3).
    """
    if weight.dim() != 5 or len(set(weight.shape[2:])) != 1:
        raise ValueError(f"weight must be (out, in, K, K, K), got {tuple(weight.shape)}")
    if shift.dim() != 2 or shift.shape[1] != 3:
        raise ValueError(f"shift must be (B, 3), got {tuple(shift.shape)}")
    with without_autocast(weight):
        return _backends.run(backend, weight, shift)


@_backends.register("naive")
def _naive(weight: Tensor, shift: Tensor) -> Tensor:
    dtype, size = torch.promote_types(weight.dtype, torch.float32), weight.shape[-1]
    frequency = torch.fft.fftfreq(size, dtype=dtype, device=weight.device)
    along = torch.stack(torch.meshgrid(frequency, frequency, frequency, indexing="ij"))
    angle = -2 * math.pi * torch.einsum("bi,ixyz->bxyz", shift.to(dtype), along)
    spectrum = torch.fft.fftn(weight.to(dtype), dim=(2, 3, 4))
    shifted = torch.fft.ifftn(spectrum * torch.exp(1j * angle)[:, None, None], dim=(3, 4, 5)).real
    return shifted[:, :, :, size // 2].to(weight.dtype)


@_backends.register("dirichlet")
def _dirichlet(weight: Tensor, shift: Tensor) -> Tensor:
    dtype, size = torch.promote_types(weight.dtype, torch.float32), weight.shape[-1]
    matrix = _slicing_matrix(size, shift.to(dtype))
    slices = weight.to(dtype).flatten(0, 1).flatten(1) @ matrix
    return slices.unflatten(-1, (size, size)).unflatten(1, weight.shape[:2]).to(weight.dtype)


def _slicing_matrix(size: int, shift: Tensor) -> Tensor:
    """The matrix (B, K^3, K^2) from the taps of a kernel to those of its shifted middle slice."""
    taps = torch.arange(size, device=shift.device, dtype=shift.dtype)
    frequency = (taps + size // 2) % size - size // 2  # of fftfreq, times K
    # u[b, axis, to, from] = a - b - s
    distance = (taps[:, None] - taps)[None, None] - shift[:, :, None, None]
    angle = 2 * math.pi / size * distance[..., None] * frequency
    real, imaginary = angle.cos().mean(-1), angle.sin().mean(-1)
    depth, height, width = zip(real.unbind(1), imaginary.unbind(1), strict=True)
    depth = (depth[0][:, size // 2], depth[1][:, size // 2])
    plane = _product("bya,bzc->bacyz", height, width)
    return _product("bd,bacyz->bdacyz", depth, plane)[0].flatten(4).flatten(1, 3)


def _product(equation: str, x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """An outer product of complex numbers, given by their real and imaginary parts."""
    terms = [[torch.einsum(equation, one, other) for other in y] for one in x]
    return terms[0][0] - terms[1][1], terms[0][1] + terms[1][0]
