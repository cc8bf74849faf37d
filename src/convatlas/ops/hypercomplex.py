"""Weights of hypercomplex layers: sums of Kronecker products of an algebra and filters.

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176. Below, A is the algebra and F the filters of the paper.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = [
    "fill_channels",
    "hypercomplex_algebra",
    "hypercomplex_filters",
    "nearest_kronecker_sum",
    "ph_weight",
]

_DIMENSIONS = {"real": 1, "complex": 2, "quaternion": 4, "octonion": 8}
_backends = Backends("ph_weight", auto=lambda *_: "matmul")


def ph_weight(algebra: Tensor, filters: Tensor, groups: int = 1, *, backend: str = "auto") -> Tensor:
    """H = sum_i A_i (x) F_i, the weight of a layer on numbers with n components; (x) is the Kronecker product.

    H[a O + o, b C + c, ...] = sum_i A[i, a, b] F[i, o, c, ...] with O = out / n and C = in / n. The product takes
    n multiply-adds for each element of H, and runs in the precision of its inputs, also under autocast.

    Args:
        algebra: A (n, n, n): n matrices that say how components are multiplied.
        filters: F (n, out / n, in / n / groups, *kernel); no kernel axis for a linear layer.
        groups: of a grouped convolution: each group of output channels has a sum of its own, with the same A.
        backend: ``auto``, ``naive`` (the sum of Kronecker products) or ``matmul`` (one product of matrices).

    Returns:
        H (out, in / groups, *kernel), as torch's layers take it.

    Raises:
        ValueError: the shapes do not belong together, or groups does not divide out / n.
    """
    n = len(algebra)
    if algebra.shape != (n, n, n):
        raise ValueError(f"algebra must be (n, n, n), got {tuple(algebra.shape)}")
    if filters.dim() < 3 or len(filters) != n:
        raise ValueError(f"filters must be ({n}, out / {n}, in / {n}, ...), got {tuple(filters.shape)}")
    if groups < 1 or filters.shape[1] % groups:
        raise ValueError(f"groups must divide out / n = {filters.shape[1]}, got {groups}")
    with without_autocast(filters):
        return _backends.run(backend, algebra, filters, groups)


@_backends.register("naive")
def _naive(algebra: Tensor, filters: Tensor, groups: int = 1) -> Tensor:
    sums = []
    for part in filters.chunk(groups, dim=1):
        products = [torch.einsum("ab,oc...->aobc...", a, f) for a, f in zip(algebra, part, strict=True)]
        sums.append(torch.stack(products).sum(0).flatten(2, 3).flatten(0, 1))
    return torch.cat(sums)


@_backends.register("matmul")
def _matmul(algebra: Tensor, filters: Tensor, groups: int = 1) -> Tensor:
    n, out, channels, *kernel = filters.shape
    products = algebra.flatten(1).T @ filters.flatten(1)
    # (a, b, g, o, c) to (g, a, o, b, c)
    parts = products.reshape(n, n, groups, out // groups, -1).permute(2, 0, 3, 1, 4)
    return parts.reshape(n * out, n * channels, *kernel)


def nearest_kronecker_sum(weight: Tensor, n: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The algebra and filters whose `ph_weight` is nearest to a weight in the sum of squares.

    They are the first n singular vectors of the weight with its elements in another order (Van Loan and Pitsianis,
    1993). The matrices of the algebra are orthonormal; the filters carry the singular values. A weight that is such a
    sum comes back exactly.

    Args:
        weight: (out, in / groups, *kernel).
        n: number of components.
        groups: of a grouped convolution.

    Returns:
        A (n, n, n) and F (n, out / n, in / n / groups, *kernel).

    Raises:
        ValueError: n does not divide the channels of a group.
    """
    rows = _by_components(weight, n, groups)
    # The triangular factor has the same singular vectors on the side of the algebra, and is n^2 wide at most.
    small = torch.linalg.qr(rows.T, mode="r").R
    vectors = torch.linalg.svd(small, full_matrices=True).Vh[:n]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    algebra = vectors * largest.sign()
    return algebra.to(weight.dtype).reshape(n, n, n), _as_filters(algebra @ rows, weight, n, groups)


def hypercomplex_filters(weight: Tensor, algebra: Tensor, groups: int = 1) -> Tensor:
    """The filters whose `ph_weight` with a given algebra is nearest to a weight in the sum of squares.

    Args:
        weight: (out, in / groups, *kernel).
        algebra: A (n, n, n).
        groups: of a grouped convolution.

    Returns:
        F (n, out / n, in / n / groups, *kernel).

    Raises:
        ValueError: n does not divide the channels of a group.
    """
    n = len(algebra)
    rows = _by_components(weight, n, groups)
    inverse = torch.linalg.pinv(algebra.to(rows.dtype).flatten(1).T)
    return _as_filters(inverse @ rows, weight, n, groups)


def _by_components(weight: Tensor, n: int, groups: int) -> Tensor:
    """The weight as (a b, g o c ...), in at least float32: a row for each pair of components."""
    out, channels = weight.shape[0] // groups, weight.shape[1]
    if n < 1 or out % n or channels % n:
        raise ValueError(f"n must divide the {channels} input and {out} output channels of a group, got {n}")
    parts = weight.reshape(groups, n, out // n, n, channels // n, -1).permute(1, 3, 0, 2, 4, 5)
    return parts.reshape(n * n, -1).to(torch.promote_types(weight.dtype, torch.float32))


def _as_filters(rows: Tensor, weight: Tensor, n: int, groups: int) -> Tensor:
    return rows.to(weight.dtype).reshape(n, weight.shape[0] // n, weight.shape[1] // n, *weight.shape[2:])


def hypercomplex_algebra(name: str) -> Tensor:
    """A (n, n, n) of a known algebra: ``real`` (n = 1), ``complex`` (2), ``quaternion`` (4) or ``octonion`` (8).

    e_i e_b = sum_a A[i, a, b] e_a for its units e. Each is made of the one before by the construction of Cayley and
    Dickson, (p, q) (r, s) = (p r - s* q, s p + q r*); for n = 4 these are Hamilton's rules.

    Raises:
        UnknownName: there is no such algebra.
    """
    if name not in _DIMENSIONS:
        raise unknown("algebra", name, _DIMENSIONS)
    left = torch.ones(1, 1, 1)
    for _ in range(int(math.log2(_DIMENSIONS[name]))):
        right = left.permute(2, 1, 0)
        conjugate = torch.ones(len(left))
        conjugate[1:] = -1
        nothing = torch.zeros_like(left)
        first = torch.cat([torch.cat([left, nothing], 2), torch.cat([nothing, right], 2)], 1)
        second = torch.cat([torch.cat([nothing, -right * conjugate], 2), torch.cat([left * conjugate, nothing], 2)], 1)
        left = torch.cat([first, second])
    return left


def fill_channels(x: Tensor, n: int) -> Tensor:
    """Put channels of zeros in front until n divides their number: RGB becomes a quaternion without real part.

    Args:
        x: (B, C, *positions).
        n: number of components.
    """
    missing = -x.shape[1] % n
    return F.pad(x, (*[0, 0] * (x.dim() - 2), missing, 0)) if missing else x
