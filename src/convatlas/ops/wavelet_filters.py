"""The filters of discrete wavelet transforms, computed from their definitions.

Haar, Daubechies (db), symlets (sym), coiflets (coif) and biorthogonal splines (bior, and rbio with analysis and
synthesis exchanged), with the names and signs of PyWavelets; of its wavelets only dmey is missing, whose filters do not
reconstruct. Daubechies: "Ten Lectures on Wavelets", SIAM 1992, chapters 6 and 8; Cohen, Daubechies, Feauveau:
"Biorthogonal Bases of Compactly Supported Wavelets", 1992; Daubechies: "Orthonormal Bases of Compactly Supported
Wavelets II", 1993 (coiflets).

The equations behind long filters lose all digits in float64, so they are solved with a hundred decimal digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.errors import unknown

__all__ = ["Wavelet", "find_wavelet", "wavelet_names"]

_DIGITS = 100
_CONVERGED = Decimal("1e-40")
_MOST_STEPS = 100

_LONGEST_DAUBECHIES = 38
_LONGEST_COIFLET = 17

#: For sym2, sym3, ...: which roots are taken outside the unit circle, a bit a root, for a nearly symmetric filter.
_SYMLET_FLIPS = (0, 0, 2, 1, 5, 1, 10, 6, 21, 6, 21, 28, 44, 28, 89, 142, 333, 116, 357)

#: Zeros at half the sampling rate of synthesis and analysis. The name tells them, except for bior5.5.
_BIORTHOGONAL = {
    **{f"1.{order}": (1, order) for order in (1, 3, 5)},
    **{f"2.{order}": (2, order) for order in (2, 4, 6, 8)},
    **{f"3.{order}": (3, order) for order in (1, 3, 5, 7, 9)},
    **{"4.4": (4, 4), "5.5": (6, 4), "6.8": (6, 8)},
}
#: Which other root, in ascending order, belongs to synthesis; all belong to analysis where none is named.
_SYNTHESIS_ROOT = {"4.4": 0, "5.5": 0, "6.8": 1}

#: A polynomial in the delay operator: Decimal coefficients, constant first.
_Polynomial = npt.NDArray[Any]


@dataclass(frozen=True)
class Wavelet:
    """A filter bank with two channels: analysis (dec) and synthesis (rec) filters, low-pass (lo) and high-pass (hi).

    ``Wavelet("mine", *pywt_wavelet.filter_bank)`` takes over a wavelet of PyWavelets.

    Attributes:
        name: what it is called.
        dec_lo, dec_hi, rec_lo, rec_hi: the filters' taps, in the order of PyWavelets.

    Raises:
        ValueError: the filters do not have one even length.
    """

    name: str
    dec_lo: tuple[float, ...]
    dec_hi: tuple[float, ...]
    rec_lo: tuple[float, ...]
    rec_hi: tuple[float, ...]

    def __post_init__(self) -> None:
        filters = ("dec_lo", "dec_hi", "rec_lo", "rec_hi")
        for name in filters:
            object.__setattr__(self, name, tuple(float(tap) for tap in getattr(self, name)))
        lengths = [len(getattr(self, name)) for name in filters]
        if len(set(lengths)) > 1 or lengths[0] < 2 or lengths[0] % 2:
            raise ValueError(f"the filters of a wavelet must have the same even length, got {lengths}")

    @property
    def length(self) -> int:
        """Number of taps of each filter."""
        return len(self.dec_lo)

    @property
    def orthogonal(self) -> bool:
        """Whether synthesis is the transpose of analysis."""
        pairs = zip((*self.dec_lo, *self.dec_hi), (*self.rec_lo[::-1], *self.rec_hi[::-1]), strict=True)
        return all(math.isclose(a, b, abs_tol=1e-12) for a, b in pairs)


@functools.cache
def find_wavelet(name: str) -> Wavelet:
    """The wavelet of a name: haar, db1 to db38, sym2 to sym20, coif1 to coif17, or bior and rbio with two orders.

    Raises:
        UnknownName: there is none; the message offers the nearest names.
    """
    if name not in wavelet_names():
        raise unknown("wavelet", name, wavelet_names())
    family = name.rstrip("0123456789.")
    order = name.removeprefix(family)
    with localcontext() as context:
        context.prec = _DIGITS
        if family in ("bior", "rbio"):
            analysis, synthesis = _biorthogonal(order)
            if family == "rbio":
                analysis, synthesis = synthesis[::-1], analysis[::-1]
        else:
            make: Callable[[int], tuple[float, ...]] = {"sym": _symlet, "coif": _coiflet}.get(family, _daubechies)
            synthesis = make(int(order or 1))
            analysis = synthesis[::-1]
    return Wavelet(
        name,
        dec_lo=analysis,
        dec_hi=tuple(tap if index % 2 else -tap for index, tap in enumerate(synthesis)),
        rec_lo=synthesis,
        rec_hi=tuple(-tap if index % 2 else tap for index, tap in enumerate(analysis)),
    )


def wavelet_names() -> list[str]:
    """Every name that `find_wavelet` knows."""
    return [
        "haar",
        *(f"db{order}" for order in range(1, _LONGEST_DAUBECHIES + 1)),
        *(f"sym{order}" for order in range(2, len(_SYMLET_FLIPS) + 2)),
        *(f"coif{order}" for order in range(1, _LONGEST_COIFLET + 1)),
        *(f"{family}{orders}" for family in ("bior", "rbio") for orders in _BIORTHOGONAL),
    ]


# -- families ----------------------------------------------------------------------------------------------------------


def _daubechies(order: int, flips: int = 0) -> tuple[float, ...]:
    """h = ((1 + z) / 2)^N q(z), where |q|^2 = P_N(sin^2(w / 2)).

    Each root of P_N stands for a root of q inside the unit circle and one outside; a bit of ``flips`` takes the latter.
    """
    if order == 1:
        return (math.sqrt(0.5),) * 2
    h = _power(_polynomial("0.5", "0.5"), order)
    for index, y in enumerate(_roots(order)):
        half = _ONE - y - y
        distance = (half * half - _ONE).sqrt()
        z = max(half + distance, half - distance, key=_Complex.norm)  # the other one, with fewer digits, is 1 / z
        if not flips >> index & 1:
            z = _ONE / z
        factor = _polynomial(1, -2 * z.re, z.norm()) if y.im else _polynomial(1, -z.re)
        h = np.convolve(h, factor / factor.sum())
    return _floats(h)


def _symlet(order: int) -> tuple[float, ...]:
    return _daubechies(order, _SYMLET_FLIPS[order - 2])


def _coiflet(order: int) -> tuple[float, ...]:
    """h = c^K (P_K(s) + s^K f), where c = cos^2(w / 2), s = sin^2(w / 2) and f has 2K taps.

    That gives h its vanishing moments, whatever f is. Newton's method, from f = 0, finds one that makes it orthonormal.
    """
    size = 6 * order
    h = _placed(np.convolve(_power(_COS2, order), _maxflat(order)), 1, size)
    bump = np.convolve(_power(_COS2, order), _power(_SIN2, order))
    steps = [_placed(bump, tap, size) for tap in range(2 * order)]
    lags = range(2 * order, size, 2)  # at the smaller even lags the autocorrelation follows
    change = h
    for _ in range(_MOST_STEPS):
        if max(abs(change)) < _CONVERGED:
            break
        errors = [_correlation(h, h, lag) for lag in lags]
        slopes = [[_correlation(h, step, lag) + _correlation(step, h, lag) for step in steps] for lag in lags]
        change = np.array(_solve(slopes, errors)) @ np.array(steps)
        h = h - change
    return _floats(h)


def _biorthogonal(orders: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass filters of analysis and synthesis: splines, or as equal as can be; padded to one even length."""
    synthesis, analysis = (_power(_polynomial("0.5", "0.5"), zeros) for zeros in _BIORTHOGONAL[orders])
    order = sum(_BIORTHOGONAL[orders]) // 2
    if orders in _SYNTHESIS_ROOT:
        for index, y in enumerate(_roots(order)):
            inverse = _ONE / y
            factor = _in_sin2([1, -2 * inverse.re, inverse.norm()] if y.im else [1, -inverse.re])
            if index == _SYNTHESIS_ROOT[orders]:
                synthesis = np.convolve(synthesis, factor)
            else:
                analysis = np.convolve(analysis, factor)
    else:
        analysis = np.convolve(analysis, _maxflat(order))
    # The centres of filters of odd length stand on both sides of the middle.
    size = 2 * ((max(len(analysis), len(synthesis)) + 1) // 2)
    after, before = (size - len(analysis) + 1) // 2, (size - len(synthesis)) // 2
    return _floats(_placed(analysis, after, size)), _floats(_placed(synthesis, before, size))


# -- arithmetic with many digits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Complex:
    re: Decimal
    im: Decimal

    def __add__(self, other: _Complex) -> _Complex:
        return _Complex(self.re + other.re, self.im + other.im)

    def __sub__(self, other: _Complex) -> _Complex:
        return _Complex(self.re - other.re, self.im - other.im)

    def __mul__(self, other: _Complex) -> _Complex:
        return _Complex(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def __truediv__(self, other: _Complex) -> _Complex:
        square = other.norm()
        product = self * _Complex(other.re, -other.im)
        return _Complex(product.re / square, product.im / square)

    def norm(self) -> Decimal:
        return self.re * self.re + self.im * self.im

    def sqrt(self) -> _Complex:
        size = self.norm().sqrt()
        re, im = (((size + part) / 2).sqrt() for part in (self.re, -self.re))
        return _Complex(re, im.copy_sign(self.im))


_ONE = _Complex(Decimal(1), Decimal(0))


def _roots(order: int) -> list[_Complex]:
    """Roots of P_N(y) = sum of C(N - 1 + k, k) y^k over k < N, one of each conjugate pair, by ascending real part.

    Aberth's method, which moves all roots at once and keeps them apart.
    """
    coefficients = [math.comb(order - 1 + k, k) for k in range(order)]
    roots = [_Complex(Decimal(y.real), Decimal(y.imag)) for y in np.roots(coefficients[::-1])]
    change = Decimal(1)
    for _ in range(_MOST_STEPS):
        if change < _CONVERGED:
            break
        change = Decimal(0)
        for index, y in enumerate(roots):
            value = slope = _Complex(Decimal(0), Decimal(0))
            for coefficient in reversed(coefficients):
                slope = slope * y + value
                value = value * y + _Complex(Decimal(coefficient), Decimal(0))
            step = value / slope
            repulsion = _Complex(Decimal(0), Decimal(0))
            for other in (*roots[:index], *roots[index + 1 :]):
                repulsion = repulsion + _ONE / (y - other)
            step = step / (_ONE - step * repulsion)
            roots[index] = y - step
            change = max(change, step.norm().sqrt())
    real = [_Complex(y.re, Decimal(0)) for y in roots if abs(y.im) < _CONVERGED]
    return sorted([*real, *(y for y in roots if y.im >= _CONVERGED)], key=lambda y: y.re)


def _polynomial(*coefficients: Any) -> _Polynomial:
    return np.array([Decimal(coefficient) for coefficient in coefficients], dtype=object)


#: cos^2(w / 2) and sin^2(w / 2), centred.
_COS2 = _polynomial("0.25", "0.5", "0.25")
_SIN2 = _polynomial("-0.25", "0.5", "-0.25")


def _power(base: _Polynomial, exponent: int) -> _Polynomial:
    result = _polynomial(1)
    for _ in range(exponent):
        result = np.convolve(result, base)
    return result


def _placed(part: _Polynomial, first: int, size: int) -> _Polynomial:
    return np.concatenate([_polynomial(*[0] * first), part, _polynomial(*[0] * (size - first - len(part)))])


def _in_sin2(coefficients: Sequence[Any]) -> _Polynomial:
    """The polynomial in sin^2(w / 2) with these coefficients, constant first, as a centred filter."""
    width = len(coefficients) - 1
    terms = [
        _placed(_power(_SIN2, k), width - k, 2 * width + 1) * coefficient for k, coefficient in enumerate(coefficients)
    ]
    return np.sum(terms, axis=0)


def _maxflat(order: int) -> _Polynomial:
    """P_N(sin^2(w / 2)): its product with cos^2(w / 2)^N is an interpolating filter."""
    return _in_sin2([math.comb(order - 1 + k, k) for k in range(order)])


def _correlation(a: _Polynomial, b: _Polynomial, lag: int) -> Decimal:
    return (a[lag:] * b[: len(b) - lag]).sum()


def _solve(matrix: Sequence[Sequence[Decimal]], right: Sequence[Decimal]) -> list[Decimal]:
    """Gauss-Jordan elimination with row pivots."""
    rows = np.array([[*row, value] for row, value in zip(matrix, right, strict=True)], dtype=object)
    for index in range(len(rows)):
        pivot = index + int(np.argmax(abs(rows[index:, index])))
        rows[[index, pivot]] = rows[[pivot, index]]
        rows[index] /= rows[index, index]
        for other in range(len(rows)):
            if other != index:
                rows[other] -= rows[other, index] * rows[index]
    return list(rows[:, -1])


def _floats(h: _Polynomial) -> tuple[float, ...]:
    """The taps, scaled to a sum of sqrt(2)."""
    return tuple(float(tap * Decimal(2).sqrt()) for tap in h)
