"""The constants of the authors' module for FFT convolution: its matrices and twiddle factors for each length.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908. Any network that holds the module has them in its checkpoints; `convatlas.ops.fft_conv.fft_conv` needs
none of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convatlas.ops.monarch import roots

__all__ = ["authors_constants", "authors_factors"]

#: Length -> factors of one fused transform.
_FUSED = {
    **{256: (16, 16), 1024: (32, 32), 4096: (16, 16, 16), 8192: (32, 16, 16), 16384: (16, 32, 32)},
    **{32768: (32, 32, 32)},
}
#: Length -> outer factors, with butterflies of at least 32 and of 16 where there are both; a fused transform is inside.
_BUTTERFLIES = {
    **{65536: (16, 16), 131072: (32, 16), 262144: (32, 16), 524288: (32, 16)},
    **{1048576: (32, 32), 2097152: (64, 64), 4194304: (128, 128)},
}
#: Lengths of real signals that are transformed as complex ones of half as many samples.
_HALVED = (512, 2048)


def authors_factors(seqlen: int, use_32_butterfly: bool = True) -> tuple[int, ...]:
    """The factors of the authors' module, outermost first; for 512 and 2048 those of the half as long complex signal.

    Raises:
        ValueError: seqlen is no power of two from 256 to 4,194,304.
    """
    if seqlen in _HALVED:
        return _FUSED[seqlen // 2]
    if seqlen in _FUSED:
        return _FUSED[seqlen]
    if seqlen not in _BUTTERFLIES:
        raise ValueError(f"seqlen must be a power of two from 256 to 4194304, got {seqlen}")
    outer = _BUTTERFLIES[seqlen][not use_32_butterfly]
    return outer, *_FUSED[seqlen // outer]


def authors_constants(
    seqlen: int, dtype: torch.dtype = torch.float16, use_32_butterfly: bool = True
) -> dict[str, Tensor]:
    """The buffers of the authors' module by their names.

    Fourier matrices and twiddle factors of both directions, real and imaginary part on the last axis. The forward
    factors of the outermost fused stage are divided by the length of its transform, those of a butterfly by its size.

    Args:
        seqlen: a power of two from 256 to 4,194,304.
        dtype: float16 or bfloat16, in which butterflies have matrices of their own.
        use_32_butterfly: for 131,072 to 524,288: outer factors of 32 instead of 16.

    Raises:
        ValueError: seqlen or dtype is another.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float16 or bfloat16, got {dtype}")
    factors = authors_factors(seqlen, use_32_butterfly)
    outer, inner = (factors[0], factors[1:]) if seqlen in _BUTTERFLIES else (None, factors)
    n = math.prod(inner)
    found: dict[str, Tensor] = {}

    def pair(name: str, forward: Tensor, backward: Tensor) -> None:
        for direction, table in (("fft", forward), ("ifft", backward.conj())):
            found[name.format(direction)] = torch.view_as_real(table.resolve_conj()).to(dtype)

    for size in sorted(set(inner)):
        alone = inner in ((16, 16), (32, 32), (16, 16, 16))
        pair("f_sqrt_N_{}" if alone else f"f_{size}_{{}}", roots(size, size, size), roots(size, size, size))
    if len(inner) == 2:
        pair("twiddle_factors_{}", roots(*inner, n) / n, roots(*inner, n))
    else:
        first, second, third = inner
        columns = second * third
        pair(f"twiddle_factors_{{}}_{second}_{third}", *2 * (roots(second, third, columns),))
        shown = f"{columns // 1024}K" if columns >= 1024 else str(columns)
        pair(f"twiddle_factors_{{}}_{first}_{shown}", roots(first, columns, n) / n, roots(first, columns, n))
    if seqlen in _HALVED:
        found["twid"] = torch.view_as_real(roots(2, seqlen // 2, seqlen)[1]).to(dtype)
    if outer is not None:
        twiddle = roots(outer, n, seqlen)
        tables = {"twiddle_factors_{}_{}": (twiddle / outer, twiddle.conj())}
        if dtype == torch.bfloat16:
            matrix = roots(outer, outer, outer)
            tables[f"f_{outer}_{{}}_{{}}"] = (matrix, matrix.conj())
        for name, both in tables.items():
            for direction, table in zip(("fft", "ifft"), both, strict=True):
                found[name.format(direction, "real")] = table.real.to(dtype)
                found[name.format(direction, "imag")] = table.imag.to(dtype)
    return found
