"""Wavelet scattering: moduli of wavelet transforms, of their moduli once more, and what a low pass leaves of them.

Mallat: "Group invariant scattering", 2012, arXiv 1101.2286; Bruna, Mallat: "Invariant scattering convolution networks",
2013, arXiv 1203.1513; Eickenberg et al.: "Solid harmonic wavelet scattering for predictions of molecule properties",
2018, arXiv 1805.00571. Wavelet scattering is the best known case of the feature extractors of Wiatowski and Boelcskei,
arXiv 1512.06293.

Half precision is transformed in float32, also under autocast. The modulus has the gradient 0 at 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.boundary import extend
from convatlas.ops.morlet import Harmonics, Morlet1D, Morlet2D, Wave1D, Wave2D
from convatlas.ops.precision import without_autocast

#: Results of a group of wavelets that stay in the cache of a CPU.
_CACHED = 2**17

__all__ = ["harmonic_scattering_3d", "scattering_1d", "scattering_2d"]

_signals = Backends("scattering_1d", auto=lambda *_: "grouped")
_images = Backends("scattering_2d", auto=lambda *_: "grouped")
_volumes = Backends("harmonic_scattering_3d", auto=lambda *_: "grouped")


def scattering_1d(x: Tensor, bank: Morlet1D, *, backend: str = "auto") -> Tensor:
    """Scattering of signals.

    S0 = x * phi; S1 = |x * psi_1| * phi; S2 = ||x * psi_1| * psi_2| * phi, where the scale of psi_2 is the larger one.

    Args:
        x: (..., N), real.
        bank: the filters, made by `convatlas.ops.morlet.morlet_1d`.
        backend: ``auto``, ``naive`` (path by path) or ``grouped`` (all wavelets of a scale at once).

    Returns:
        (..., paths, N / stride) in the order of ``bank.paths``; (..., paths, 1) for a global average; without average
        (..., sum of ``bank.lengths()``), the paths one behind the other.

    Raises:
        ValueError: x is not real, has another length or no signal.
    """
    _check(x, (bank.length,))
    return _signals.run(backend, x, bank)


def scattering_2d(x: Tensor, bank: Morlet2D, *, backend: str = "auto") -> Tensor:
    """Scattering of images, as of signals; the second wavelet is one of a larger scale.

    Args:
        x: (..., H, W), real.
        bank: the filters, made by `convatlas.ops.morlet.morlet_2d`.
        backend: ``auto``, ``naive`` (path by path) or ``grouped`` (all wavelets of a scale at once, averages as
            products of matrices).

    Returns:
        (..., paths, H / 2^J, W / 2^J) in the order of ``bank.paths``.

    Raises:
        ValueError: x is not real, has another size or is empty.
    """
    _check(x, bank.padded if bank.pre_pad else bank.shape)
    return _images.run(backend, x, bank)


def harmonic_scattering_3d(x: Tensor, bank: Harmonics, *, backend: str = "auto") -> Tensor:
    """Solid harmonic scattering of volumes: integrals of powers of U1 and U2, which no rotation changes.

    U1 = sqrt(sum_m |x * psi_lmj|^2); U2 is the same of U1 with the same degree l and a larger scale. There is nothing
    around the volume, which is periodic.

    Args:
        x: (..., D, H, W), real.
        bank: the filters, made by `convatlas.ops.morlet.harmonics`.
        backend: ``auto``, ``naive`` (one filter at a time) or ``grouped`` (all orders and scales at once).

    Returns:
        (..., paths, L + 1, powers) in the order of ``bank.paths``.

    Raises:
        ValueError: x is not real, has another size or is empty.
    """
    _check(x, bank.shape)
    return _volumes.run(backend, x, bank)


def _check(x: Tensor, shape: Sequence[int]) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be real floating point, got {x.dtype}")
    if x.dim() < len(shape) or tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        raise ValueError(f"x must be (..., {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if not x.numel():
        raise ValueError(f"x must hold at least one sample, got {tuple(x.shape)}")


# -- one path after the other ------------------------------------------------------------------------------------------


@_signals.register("naive")
def _scattering_1d_naive(x: Tensor, bank: Morlet1D) -> Tensor:
    padded = _padded_1d(x, bank)

    def output(u: Tensor, k: int) -> Tensor:
        """What is left of a modulus with a stride of 2^k."""
        if bank.average == "global":
            return u.sum(-1, keepdim=True)
        if bank.log2_stride is None:
            return u[..., bank.crop(k)]
        low = _kept(torch.fft.fft(u) * bank.phi[k].to(u), 2 ** (bank.log2_stride - k), 1)
        return torch.fft.ifft(low).real[..., bank.crop(bank.log2_stride)]

    def modulus(u: Tensor, k: int, wave: Wave1D) -> tuple[Tensor, int]:
        level = bank.level(wave.j)
        spectrum = _kept(torch.fft.fft(u) * wave.levels[k].to(u), 2 ** (level - k), 1)
        return torch.fft.ifft(spectrum).abs(), level

    paths: dict[tuple[int, ...], Tensor] = {(): output(padded, 0)}
    for n1, first in enumerate(bank.psi1):
        u1, k1 = modulus(padded, 0, first)
        paths[n1,] = output(u1, k1)
        for n2, second in enumerate(bank.psi2):
            if second.j > first.j:
                paths[n1, n2] = output(*modulus(u1, k1, second))
    return _joined([paths[path] for path in bank.paths], bank).to(x.dtype)


@_images.register("naive")
def _scattering_2d_naive(x: Tensor, bank: Morlet2D) -> Tensor:
    def output(u: Tensor, k: int) -> Tensor:
        low = _kept(torch.fft.fft2(u) * bank.phi[k].to(u), 2 ** (bank.J - k), 2)
        return torch.fft.ifft2(low).real[..., 1:-1, 1:-1]

    def modulus(u: Tensor, k: int, wave: Wave2D) -> Tensor:
        return torch.fft.ifft2(_kept(torch.fft.fft2(u) * wave.levels[k].to(u), 2 ** (wave.j - k), 2)).abs()

    padded = _padded_2d(x, bank)
    paths: dict[tuple[int, ...], Tensor] = {(): output(padded, 0)}
    for n1, first in enumerate(bank.psi):
        u1 = modulus(padded, 0, first)
        paths[n1,] = output(u1, first.j)
        for n2, second in enumerate(bank.psi):
            if bank.max_order == 2 and second.j > first.j:
                paths[n1, n2] = output(modulus(u1, first.j, second), second.j)
    return torch.stack([paths[path] for path in bank.paths], dim=-3).to(x.dtype)


@_volumes.register("naive")
def _harmonic_3d_naive(x: Tensor, bank: Harmonics) -> Tensor:
    def modulus(u: Tensor, degree: int, j: int) -> Tensor:
        spectrum = torch.fft.fftn(u, dim=(-3, -2, -1))
        parts = [torch.fft.ifftn(spectrum * psi.to(spectrum), dim=(-3, -2, -1)) for psi in bank.psi[degree][j]]
        return _norm(torch.stack(parts, dim=-1))

    work = x.to(torch.promote_types(x.dtype, torch.float32))
    degrees = []
    for degree in range(bank.L + 1):
        first = [modulus(work, degree, j) for j in range(bank.J + 1)]
        moduli = [first[path[0]] if len(path) == 1 else modulus(first[path[0]], degree, path[1]) for path in bank.paths]
        degrees.append(torch.stack([_integrals(u, bank.powers) for u in moduli], dim=-2))
    return torch.stack(degrees, dim=-2).to(x.dtype)


# -- all wavelets of a scale at once -----------------------------------------------------------------------------------


@_signals.register("grouped")
def _scattering_1d_grouped(x: Tensor, bank: Morlet1D) -> Tensor:
    padded = _padded_1d(x, bank)
    spectrum = torch.fft.fft(padded)
    found: dict[tuple[int, ...], Tensor] = {(): _output_1d(padded, 0, bank, spectrum)}
    for j1, numbers in _pieces(bank.psi1, padded, bank):
        k1 = bank.level(j1)
        u1 = _filtered_1d(spectrum, [bank.psi1[n] for n in numbers], 0, k1)
        slower = [piece for piece in _pieces(bank.psi2, u1, bank) if piece[0] > j1]
        spectrum1 = torch.fft.fft(u1)
        found |= {(n,): part for n, part in zip(numbers, _output_1d(u1, k1, bank, spectrum1).unbind(-2), strict=True)}
        for j2, numbers2 in slower:
            k2 = bank.level(j2)
            u2 = _filtered_1d(spectrum1, [bank.psi2[n] for n in numbers2], k1, k2)
            parts = _output_1d(u2.flatten(-3, -2), k2, bank).unbind(-2)
            found |= dict(zip(itertools.product(numbers, numbers2), parts, strict=True))
    return _joined([found[path] for path in bank.paths], bank).to(x.dtype)


def _pieces(waves: Sequence[Wave1D], like: Tensor, bank: Morlet1D) -> Iterator[tuple[int, list[int]]]:
    """Scales and the indices of wavelets that are applied at once: as many as the cache of a CPU holds results of."""
    for j, numbers in _by_scale(waves):
        size = like.numel() // like.shape[-1] * (bank.padded >> bank.level(j))
        most = max(_CACHED // size, 1) if like.device.type == "cpu" else len(numbers)
        yield from ((j, numbers[first : first + most]) for first in range(0, len(numbers), most))


def _filtered_1d(spectra: Tensor, waves: Sequence[Wave1D], k: int, to: int) -> Tensor:
    """Moduli (..., waves, time) with a stride of 2^to of spectra (..., frequencies) of a stride of 2^k."""
    step = 2 ** (to - k)
    split = spectra.unflatten(-1, (step, spectra.shape[-1] // step)).unsqueeze(-3)
    psi = torch.stack([wave.levels[k] for wave in waves]).to(spectra.real).unflatten(-1, split.shape[-2:]) / step
    aliases = sorted({part for wave in waves for part in wave.aliases[k]})
    folded = split[..., aliases[0], :] * psi[:, aliases[0]]
    for part in aliases[1:]:
        folded = folded + split[..., part, :] * psi[:, part]
    return torch.fft.ifft(folded).abs()


def _output_1d(u: Tensor, k: int, bank: Morlet1D, spectra: Tensor | None = None) -> Tensor:
    """What is left of moduli (..., time) with a stride of 2^k, whose spectra may be known."""
    if bank.average == "global":
        return u.sum(-1, keepdim=True)
    if bank.log2_stride is None:
        return u[..., bank.crop(k)]
    n = u.shape[-1] >> (bank.log2_stride - k)
    half = torch.fft.rfft(u) if spectra is None else spectra[..., : u.shape[-1] // 2 + 1]
    half = half[..., : n + 1] if n < u.shape[-1] else half
    half = half * bank.phi[k][: half.shape[-1]].to(u)
    if n < u.shape[-1]:
        # Of the frequencies that fold onto each other, the low pass lets two through.
        folded = half[..., : n // 2 + 1] + half[..., n - n // 2 :].flip(-1).conj()
        half = folded * (n / u.shape[-1])
    return torch.fft.irfft(half, n=n)[..., bank.crop(bank.log2_stride)]


@_images.register("grouped")
def _scattering_2d_grouped(x: Tensor, bank: Morlet2D) -> Tensor:
    padded = _padded_2d(x, bank)
    spectrum = torch.fft.fft2(padded)
    found: dict[tuple[int, ...], Tensor] = {(): _output_2d(padded, 0, bank)}
    scales = _by_scale(bank.psi)
    for j1, numbers in scales:
        waves = [bank.psi[n].levels[0] for n in numbers]
        u1 = _filtered_2d(spectrum.unsqueeze(-3), waves, 2**j1)[..., 0, :, :, :]
        found |= {(n,): part for n, part in zip(numbers, _output_2d(u1, j1, bank).unbind(-3), strict=True)}
        coarser = [group for group in scales if group[0] > j1] if bank.max_order == 2 else []
        if not coarser:
            continue
        spectrum1 = torch.fft.fft2(u1)
        for j2, numbers2 in coarser:
            u2 = _filtered_2d(spectrum1, [bank.psi[n].levels[j1] for n in numbers2], 2 ** (j2 - j1))
            parts = _output_2d(u2.flatten(-4, -3), j2, bank).unbind(-3)
            found |= dict(zip(itertools.product(numbers, numbers2), parts, strict=True))
    return torch.stack([found[path] for path in bank.paths], dim=-3).to(x.dtype)


def _output_2d(u: Tensor, k: int, bank: Morlet2D) -> Tensor:
    rows, columns = (matrix.to(u) for matrix in bank.low[k])
    with without_autocast(u):
        return rows @ (u @ columns.T)


@_volumes.register("grouped")
def _harmonic_3d_grouped(x: Tensor, bank: Harmonics) -> Tensor:
    axes = (-3, -2, -1)
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.fftn(work, dim=axes)

    def moduli(spectra: Tensor, degree: int, scales: Sequence[int]) -> Tensor:
        """(..., scales, D, H, W) of spectra (..., D, H, W)."""
        psi = torch.stack([bank.psi[degree][j] for j in scales]).to(spectra)  # (scales, m, D, H, W)
        return _norm(torch.fft.ifftn(spectra[..., None, None, :, :, :] * psi, dim=axes).movedim(-4, -1))

    degrees = []
    for degree in range(bank.L + 1):
        u1 = moduli(spectrum, degree, range(bank.J + 1))
        paths = list(_integrals(u1, bank.powers).unbind(-2))
        if bank.max_order == 2:
            for j1 in range(bank.J):
                u2 = moduli(torch.fft.fftn(u1[..., j1, :, :, :], dim=axes), degree, range(j1 + 1, bank.J + 1))
                paths += _integrals(u2, bank.powers).unbind(-2)
        degrees.append(torch.stack(paths, dim=-2))
    return torch.stack(degrees, dim=-2).to(x.dtype)


def _by_scale(waves: Sequence[Wave1D] | Sequence[Wave2D]) -> list[tuple[int, list[int]]]:
    """Scales and the indices of their wavelets."""
    scales = [wave.j for wave in waves]
    return [(j, [n for n, scale in enumerate(scales) if scale == j]) for j in sorted(set(scales))]


def _filtered_2d(spectra: Tensor, waves: Sequence[Tensor], step: int) -> Tensor:
    """Moduli (..., n, waves, H / step, W / step) of spectra (..., n, H, W) filtered by real waves.

    Subsampling adds up the frequencies that are a multiple of (H, W) / step apart. For each of the others, that is a
    product of matrices: of those step^2 frequencies of all spectra with those of all waves.
    """
    psi = torch.stack([wave.to(spectra.real) for wave in waves])
    if step == 1:
        return torch.fft.ifft2(spectra.unsqueeze(-3) * psi).abs()
    *lead, height, width = spectra.shape
    coarse = height // step, width // step
    split = (step, coarse[0], step, coarse[1])
    rows = torch.view_as_real(spectra.reshape(math.prod(lead), *split))
    left = rows.permute(2, 4, 0, 5, 1, 3).reshape(math.prod(coarse), 2 * len(rows), step**2)
    right = psi.reshape(len(waves), *split).permute(2, 4, 1, 3, 0).reshape(math.prod(coarse), step**2, len(waves))
    with without_autocast(left):
        product = left @ right / step**2  # (positions, spectra x 2, waves)
    product = product.reshape(*coarse, len(rows), 2, len(waves)).permute(2, 4, 0, 1, 3)
    folded = torch.view_as_complex(product.contiguous())
    return torch.fft.ifft2(folded).abs().reshape(*lead, len(waves), *coarse)


# -- parts -------------------------------------------------------------------------------------------------------------


def _padded_1d(x: Tensor, bank: Morlet1D) -> Tensor:
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    return extend(work, work.dim() - 1, bank.left, bank.padded - bank.length - bank.left, "reflect")


def _padded_2d(x: Tensor, bank: Morlet2D) -> Tensor:
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    if bank.pre_pad:
        return work
    for axis, (before, after) in zip((work.dim() - 2, work.dim() - 1), bank.margins, strict=True):
        work = extend(work, axis, before, after, "reflect")
    return work


def _kept(spectrum: Tensor, step: int, dims: int) -> Tensor:
    """The spectrum of every ``step``-th sample along the last axes: the mean of the frequencies that become one."""
    for axis in range(spectrum.dim() - dims, spectrum.dim()):
        spectrum = spectrum.unflatten(axis, (step, spectrum.shape[axis] // step)).mean(axis)
    return spectrum


def _joined(paths: Sequence[Tensor], bank: Morlet1D) -> Tensor:
    averaged = bank.average != "none"
    return torch.stack(tuple(paths), dim=-2) if averaged else torch.cat(tuple(paths), dim=-1)


def _norm(parts: Tensor) -> Tensor:
    """The root of the sum of squared absolute values over the last axis, with the gradient 0 at 0."""
    return torch.linalg.vector_norm(torch.view_as_real(parts.contiguous()), dim=(-2, -1))


def _integrals(u: Tensor, powers: Sequence[float]) -> Tensor:
    """Sums of powers over the last three axes, (..., powers); no power of 0 has a slope."""
    positive = u > 0
    base = torch.where(positive, u, 1.0)
    parts = [torch.where(positive, base**power, 0.0).sum((-3, -2, -1)) for power in powers]
    return torch.stack(parts, dim=-1)
