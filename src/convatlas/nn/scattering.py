"""Wavelet scattering as layers without parameters: Scattering1D, Scattering2D and HarmonicScattering3D.

Features of signals, images and volumes that change little under shifts and deformations, made for few labels. Mallat:
"Group invariant scattering", 2012, arXiv 1101.2286; Eickenberg et al.: "Solid harmonic wavelet scattering for
predictions of molecule properties", 2018, arXiv 1805.00571. Constructors and numbers are those of Kymatio (its main
branch; where 0.3.0 differs, an option says so). Wiatowski, Boelcskei, arXiv 1512.06293, is the theory that holds for
these and any other frames; `convatlas.nn.frame_scattering` builds such networks.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from convatlas.ops.morlet import Harmonics, Morlet1D, Morlet2D, harmonics, morlet_1d, morlet_2d
from convatlas.ops.scattering import harmonic_scattering_3d, scattering_1d, scattering_2d
from convatlas.weights import Layout

__all__ = ["KYMATIO_LAYOUT", "HarmonicScattering3D", "Scattering1D", "Scattering2D"]

OutType = Literal["array", "list", "dict"]

#: Drops the filters that Kymatio's layers store in a checkpoint. Give it to a network that has such a layer:
#: ``layouts = {"kymatio": KYMATIO_LAYOUT}``.
KYMATIO_LAYOUT = Layout(renames=((r"^(.*\.)?tensor(\d+|_gaussian_filter)$", ""),))


class _Scattering(nn.Module):
    """Keeps the filters of a layer in float32 where the layer is, and exactly where they were made."""

    layouts: ClassVar[Mapping[str, Layout]] = {"kymatio": KYMATIO_LAYOUT}

    def __init__(self, bank: Morlet1D | Morlet2D | Harmonics) -> None:
        super().__init__()
        self._exact = bank
        for index, tensor in enumerate(_tensors(bank)):
            kept = torch.complex64 if tensor.is_complex() else torch.float32
            self.register_buffer(f"filter{index}", tensor.to(kept), persistent=False)

    def bank(self, x: Tensor) -> Any:
        """The filters for an input, cast from the exact ones unless the kept ones have its type."""
        buffers = list(self.buffers(recurse=False))
        double = x.dtype == torch.float64
        single = all(buffer.dtype in (torch.float32, torch.complex64) for buffer in buffers)
        if single and not double:
            return _with_tensors(self._exact, iter(buffers))
        exact = _tensors(self._exact)
        types = (torch.complex128, torch.float64) if double else (torch.complex64, torch.float32)
        cast = (tensor.to(x.device, types[0] if tensor.is_complex() else types[1]) for tensor in exact)
        return _with_tensors(self._exact, cast)


class Scattering1D(_Scattering):
    """Scattering of signals by Morlet wavelets.

    Features (..., paths, N / stride): the low-passed signal, then for each wavelet of order 1 the low-passed modulus
    |x * psi_1|, then for each pair of wavelets ||x * psi_1| * psi_2| * phi.

    Args:
        J: log2 of the largest scale, in samples.
        shape: length N of the signals, at least 2^J.
        Q: wavelets an octave: of order 1, or of both orders; an int stands for (Q, 1).
        T: samples that are averaged over; 2^J when left out, 0 for no average, ``"global"`` for the sum over all
            samples, padded ones included.
        stride: of the output, a power of two, at most T; the largest one when left out.
        max_order: 1 or 2.
        out_type: ``array``; ``list``, of a dictionary for each path, coef and what `meta` tells of it; or ``dict``, of
            the coefficients by key. Without average there is no array, because strides differ.
        legacy_energy: the numbers of Kymatio 0.3.0: order 1 is smaller by 2^j1, order 2 by 2^(j1 + j2), as far as the
            stride allows.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        J: int,
        shape: int | tuple[int],
        Q: int | tuple[int, int] = 1,
        T: float | Literal["global"] | None = None,
        stride: int | None = None,
        max_order: int = 2,
        out_type: OutType = "array",
        legacy_energy: bool = False,
    ) -> None:
        length = shape if isinstance(shape, int) else _sizes("shape", shape, 1)[0]
        wavelets = (Q, 1) if isinstance(Q, int) else (*Q, 1)[:2]
        _check_scale(J, (length,))
        _check_options(max_order, out_type)
        if min(wavelets) < 1:
            raise ValueError(f"Q must be at least 1, got {Q}")
        average = "global" if T == "global" else "none" if T == 0 else "local"
        if average == "none" and out_type == "array":
            raise ValueError("out_type must be 'list' or 'dict' without average (T=0), got 'array'")
        support = length if average == "global" else 2**J if T in (None, 0) else float(T)
        if not 1 <= support <= length:
            raise ValueError(f"T must be from 1 to the length {length}, 0 or 'global' for a global average, got {T}")
        log2_stride = None
        if average == "local":
            log2_stride = _log2_stride(stride, support)
        elif stride is not None:
            raise ValueError(f"stride belongs to a local average, got stride {stride} and T={T!r}")
        bank = morlet_1d(
            length,
            J,
            wavelets,
            support,
            average=average,
            log2_stride=log2_stride,
            max_order=max_order,
            legacy_energy=legacy_energy,
        )
        if bank.short:
            warnings.warn(
                f"J={J} and T={support:g} reach beyond what reflection can put around {length} samples: coefficients "
                "near the ends depend on the border",
                stacklevel=2,
            )
        super().__init__(bank)
        self.J, self.shape, self.Q, self.T, self.out_type = J, (length,), wavelets, T, out_type

    def forward(self, x: Tensor) -> Any:
        """Features of signals (..., N): (..., paths, N / stride), or a list or dictionary of paths."""
        bank = self.bank(x)
        y = scattering_1d(x, bank)
        if self.out_type == "array":
            return y
        parts = y.split(bank.lengths(), dim=-1) if bank.average == "none" else y.unbind(-2)
        return _labelled(parts, self.meta(), self.out_type)

    def output_size(self) -> tuple[int, ...]:
        """Paths and samples of the features; without average, the samples of all paths together."""
        lengths = self._exact.lengths()  # type: ignore[union-attr]
        return (sum(lengths),) if self.T == 0 else (len(lengths), lengths[0])

    def meta(self) -> dict[str, list[Any]]:
        """For each path: its order, the numbers n of its wavelets, and their xi, sigma and j; its key is n."""
        bank: Morlet1D = self._exact  # type: ignore[assignment]
        waves = [tuple(kind[n] for kind, n in zip((bank.psi1, bank.psi2), path, strict=False)) for path in bank.paths]
        return {
            "order": [len(path) for path in bank.paths],
            "n": list(bank.paths),
            "xi": [tuple(wave.xi for wave in pair) for pair in waves],
            "sigma": [tuple(wave.sigma for wave in pair) for pair in waves],
            "j": [tuple(wave.j for wave in pair) for pair in waves],
            "key": list(bank.paths),
        }

    def extra_repr(self) -> str:
        """Show scale, length, wavelets an octave and average."""
        return f"J={self.J}, shape={self.shape}, Q={self.Q}, T={self.T!r}"


class Scattering2D(_Scattering):
    """Scattering of images by Morlet wavelets of J scales and L orientations.

    Features (..., 1 + L J + L^2 J (J - 1) / 2, H / 2^J, W / 2^J): the low-passed image, the moduli of order 1, scale by
    scale, and those of order 2, whose second wavelet has the larger scale.

    Args:
        J: log2 of the largest scale, and of the stride of the features.
        shape: size (H, W) of the images, both at least 2^J.
        L: number of orientations.
        max_order: 1 or 2.
        pre_pad: the images come with the margins that this layer would put around them, of size ``padded``.
        out_type: ``array``; ``list``, of a dictionary for each path, coef and what `meta` tells of it; or ``dict``, of
            the coefficients by key.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        J: int,
        shape: tuple[int, int],
        L: int = 8,
        max_order: int = 2,
        pre_pad: bool = False,
        out_type: OutType = "array",
    ) -> None:
        height, width = _sizes("shape", shape, 2)
        _check_scale(J, (height, width))
        _check_options(max_order, out_type)
        if L < 1:
            raise ValueError(f"L must be at least 1, got {L}")
        super().__init__(morlet_2d((height, width), J, L, max_order=max_order, pre_pad=pre_pad))
        self.J, self.L, self.shape, self.out_type = J, L, (height, width), out_type

    @property
    def padded(self) -> tuple[int, int]:
        """Size of the images with their margins."""
        return self._exact.padded  # type: ignore[union-attr, return-value]

    def forward(self, x: Tensor) -> Any:
        """Features of images (..., H, W): (..., paths, H / 2^J, W / 2^J), or a list or dictionary of paths."""
        y = scattering_2d(x, self.bank(x))
        return y if self.out_type == "array" else _labelled(y.unbind(-3), self.meta(), self.out_type)

    def output_size(self) -> tuple[int, int, int]:
        """Paths, height and width of the features."""
        bank: Morlet2D = self._exact  # type: ignore[assignment]
        return (len(bank.paths), *bank.output)

    def meta(self) -> dict[str, list[Any]]:
        """For each path: its order, the numbers n of its wavelets, scales j and orientations theta; its key is n."""
        bank: Morlet2D = self._exact  # type: ignore[assignment]
        return {
            "order": [len(path) for path in bank.paths],
            "n": list(bank.paths),
            "j": [tuple(bank.psi[n].j for n in path) for path in bank.paths],
            "theta": [tuple(bank.psi[n].theta for n in path) for path in bank.paths],
            "key": list(bank.paths),
        }

    def extra_repr(self) -> str:
        """Show scale, size and orientations."""
        return f"J={self.J}, shape={self.shape}, L={self.L}"


class HarmonicScattering3D(_Scattering):
    """Solid harmonic scattering of volumes, which no shift and (for one whole grid) no rotation changes.

    Features (..., paths, L + 1, powers): integrals of powers of the moduli U1 of every scale, then of U2 of every pair
    of scales, for each degree l.

    Args:
        J: the widths are sigma_0, 2 sigma_0, ... 2^J sigma_0.
        shape: size (D, H, W) of the volumes, which are taken as periodic.
        L: largest degree of the harmonics.
        sigma_0: smallest width, in samples.
        max_order: 1 or 2.
        rotation_covariant: join all orders m of a degree; False takes the modulus of the lowest, m = -l, alone.
        method: what is done with the moduli; there is only ``integral``.
        integral_powers: exponents.
        legacy_grid: Kymatio's numbers for odd sizes, along which it takes every frequency one step too low.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        J: int,
        shape: tuple[int, int, int],
        L: int = 3,
        sigma_0: float = 1,
        max_order: int = 2,
        rotation_covariant: bool = True,
        method: Literal["integral"] = "integral",
        integral_powers: Iterable[float] = (0.5, 1.0, 2.0),
        legacy_grid: bool = False,
    ) -> None:
        depth, height, width = _sizes("shape", shape, 3)
        _check_options(max_order, "array")
        if J < 0 or L < 0 or not sigma_0 > 0:
            raise ValueError(f"J and L must not be negative and sigma_0 positive, got {J}, {L} and {sigma_0}")
        if method != "integral":
            raise ValueError(f"method must be 'integral', got {method!r}")
        powers = tuple(float(power) for power in integral_powers)
        if not powers or min(powers) <= 0:
            raise ValueError(f"integral_powers must be positive, got {powers}")
        bank = harmonics(
            (depth, height, width),
            J,
            L,
            sigma_0,
            max_order=max_order,
            rotation_covariant=rotation_covariant,
            powers=powers,
            legacy_grid=legacy_grid,
        )
        super().__init__(bank)
        self.J, self.L, self.shape = J, L, (depth, height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., paths, L + 1, powers) of volumes (..., D, H, W)."""
        y: Tensor = harmonic_scattering_3d(x, self.bank(x))
        return y

    def output_size(self) -> tuple[int, int, int]:
        """Paths, degrees and powers of the features."""
        bank: Harmonics = self._exact  # type: ignore[assignment]
        return len(bank.paths), self.L + 1, len(bank.powers)

    def meta(self) -> dict[str, list[Any]]:
        """For each path: its order, its scales j; its key is j."""
        paths = self._exact.paths
        return {"order": [len(path) for path in paths], "j": list(paths), "key": list(paths)}

    def extra_repr(self) -> str:
        """Show scale, size and degree."""
        return f"J={self.J}, shape={self.shape}, L={self.L}"


# -- arguments ---------------------------------------------------------------------------------------------------------


def _sizes(name: str, sizes: Iterable[int], count: int) -> tuple[int, ...]:
    found = tuple(sizes)
    if len(found) != count or min(found) < 1:
        raise ValueError(f"{name} must be {count} positive sizes, got {found}")
    return found


def _check_scale(J: int, shape: tuple[int, ...]) -> None:
    if J < 1:
        raise ValueError(f"J must be at least 1, got {J}")
    if 2**J > min(shape):
        raise ValueError(f"the smallest dimension must be at least 2^J = {2**J}, got {min(shape)}")


def _check_options(max_order: int, out_type: str) -> None:
    if max_order not in (1, 2):
        raise ValueError(f"max_order must be 1 or 2, got {max_order}")
    if out_type not in ("array", "list", "dict"):
        raise ValueError(f"out_type must be 'array', 'list' or 'dict', got {out_type!r}")


def _log2_stride(stride: int | None, support: float) -> int:
    if stride is None:
        return math.floor(math.log2(support))
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"stride must be a power of two, got {stride}")
    if stride > support:
        raise ValueError(f"stride must be at most T = {support:g}, got {stride}")
    return stride.bit_length() - 1


# -- filters and results -----------------------------------------------------------------------------------------------


#: Fields of filter banks that hold tensors.
_FILTERS = ("phi", "low", "psi", "psi1", "psi2", "levels")


def _tensors(bank: Any) -> list[Tensor]:
    """The tensors of a filter bank, in order."""
    if isinstance(bank, Tensor):
        return [bank]
    parts = bank if isinstance(bank, tuple) else [getattr(bank, name) for name in _FILTERS if hasattr(bank, name)]
    return [tensor for part in parts for tensor in _tensors(part)]


def _with_tensors(bank: Any, tensors: Iterator[Tensor]) -> Any:
    """The same filter bank with other tensors."""
    if isinstance(bank, Tensor):
        return next(tensors)
    if isinstance(bank, tuple):
        return tuple(_with_tensors(part, tensors) for part in bank)
    names = [name for name in _FILTERS if hasattr(bank, name)]
    return dataclasses.replace(bank, **{name: _with_tensors(getattr(bank, name), tensors) for name in names})


def _labelled(parts: Iterable[Tensor], meta: Mapping[str, list[Any]], out_type: OutType) -> Any:
    if out_type == "dict":
        return dict(zip(meta["key"], parts, strict=True))
    rows = zip(*meta.values(), strict=True)
    return [{"coef": part, **dict(zip(meta, row, strict=True))} for part, row in zip(parts, rows, strict=True)]
