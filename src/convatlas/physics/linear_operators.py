"""Whatever can be multiplied with a vector, under one protocol: matrices, functions and matrix-free operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from convatlas.data.linear_systems import GridSystem
from convatlas.errors import Unsupported
from convatlas.ops.poisson import Boundary, PoissonOperator, without_means

__all__ = ["LinearOperator", "Operator", "as_operator", "size_of", "system_operator"]

#: A scipy sparse matrix, a dense or sparse torch matrix, a function of a vector (n,), or an operator.
Operator: TypeAlias = Any


@runtime_checkable
class LinearOperator(Protocol):
    """A square matrix as far as the solvers need it. `PoissonOperator` is one."""

    @property
    def n(self) -> int:
        """Rows and columns."""

    def __call__(self, x: Tensor) -> Tensor:
        """A x for each vector of (..., n)."""

    def diagonal(self) -> Tensor:
        """The diagonal (n,)."""

    def to_csr(self) -> Any:
        """The entries as a scipy CSR array in float64."""

    def project(self, x: Tensor) -> Tensor:
        """x without what is known of the null space."""


def as_operator(A: Operator, n: int, *, check: bool = True) -> LinearOperator:
    """Wrap a matrix or a function of vectors of length n.

    Of a matrix it is found out where rows sum to zero, as with walls all around: the solvers then leave out the means
    of right-hand sides and solutions. For several solves with one matrix, wrap it once.

    Args:
        A: scipy sparse matrix, dense or sparse torch matrix, function of a vector (n,), or `LinearOperator`.
        n: length of the vectors.
        check: whether to test on two random vectors that A is symmetric; a `PoissonOperator` always is.

    Raises:
        ValueError: A is not square, or of another size.
        TypeError: A is none of these.
    """
    if isinstance(A, PoissonOperator):
        operator: LinearOperator = A
    elif sparse.issparse(A) or isinstance(A, Tensor):
        if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"A must be square, got {tuple(A.shape)}")
        operator = _Matrix(A)
    elif isinstance(A, LinearOperator):
        operator = A
    elif callable(A):
        operator = _Function(A, n)
    else:
        raise TypeError(f"A must be a sparse or dense matrix, a function or an operator, got {type(A).__name__}")
    if operator.n != n:
        raise ValueError(f"A must be {n} x {n} for vectors of length {n}, got {operator.n} x {operator.n}")
    if check and not isinstance(operator, PoissonOperator) and not _symmetric(operator):
        warnings.warn("A is not symmetric, so the solver need not converge", RuntimeWarning, stacklevel=3)
    return operator


def size_of(A: Operator) -> int:
    """Number of rows of a matrix or an operator.

    Raises:
        Unsupported: A is a function.
    """
    if not isinstance(A, LinearOperator) and not hasattr(A, "shape"):
        raise Unsupported("A is a function, so its size is not known: give a matrix or an operator")
    return A.n if isinstance(A, LinearOperator) else int(A.shape[0])


def _symmetric(operator: LinearOperator) -> bool:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, operator.n, generator=generator, dtype=torch.float64)
    try:
        left, right = u @ operator(v).double().cpu(), v @ operator(u).double().cpu()
        scale = u.norm() * operator(v).double().cpu().norm()
    except (RuntimeError, TypeError):  # a function of other types or devices
        return True
    return bool((left - right).abs() <= 1e-6 * scale)


class _Matrix:
    """A matrix that is stored. On the CPU scipy multiplies, elsewhere torch."""

    def __init__(self, A: Any) -> None:
        self.dense = A if isinstance(A, Tensor) and A.layout == torch.strided else None
        self.stored = A
        self.n = int(A.shape[0])
        self._csr: dict[torch.dtype, Any] = {}
        self._torch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.n:
            raise ValueError(f"x must be (..., {self.n}), got {tuple(x.shape)}")
        if self.dense is not None:
            return x @ self.dense.to(x).T
        rows = x.reshape(-1, self.n)
        if x.device.type == "cpu":
            product: Tensor = _Product.apply(rows, self._scipy(x.dtype))  # type: ignore[no-untyped-call]
        else:
            product = (self._on_device(x) @ rows.T).T
        return product.reshape(x.shape)

    def _scipy(self, dtype: torch.dtype) -> Any:
        if dtype not in self._csr:
            wanted = np.float32 if dtype == torch.float32 else np.float64
            self._csr[dtype] = self.to_csr().astype(wanted)
        return self._csr[dtype]

    def _on_device(self, x: Tensor) -> Tensor:
        key = (x.dtype, x.device)
        if key not in self._torch:
            csr = self.to_csr()
            starts, columns, values = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
            settings: Any = {"size": csr.shape, "dtype": x.dtype, "device": x.device, "check_invariants": False}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
                self._torch[key] = torch.sparse_csr_tensor(starts, columns, values, **settings)
        return self._torch[key]

    def diagonal(self) -> Tensor:
        if self.dense is not None:
            return self.dense.diagonal()
        return torch.from_numpy(self.to_csr().diagonal())

    def to_csr(self) -> Any:
        if torch.float64 in self._csr:
            return self._csr[torch.float64]
        csr = _from_torch(self.stored) if isinstance(self.stored, Tensor) else sparse.csr_array(self.stored)
        self._csr[torch.float64] = csr.astype(np.float64)
        return self._csr[torch.float64]

    def project(self, x: Tensor) -> Tensor:
        closed = self._closed
        return x if closed is None else without_means(x.reshape(-1, self.n), closed).reshape(x.shape)

    @cached_property
    def _closed(self) -> Tensor | None:
        """Numbers from 1 of the bodies of unknowns whose rows all sum to zero, 0 elsewhere; None if there are none.

        Such a body knows its solution up to a constant only. An empty row is one too.
        """
        csr = self.to_csr()
        count, body = csgraph.connected_components(csr, directed=False)
        open_rows = np.abs(csr.sum(1)) > 1e-6 * np.abs(csr.diagonal())
        opened = np.isin(body, np.unique(body[open_rows]))
        return None if count == 0 or bool(opened.all()) else torch.from_numpy(np.where(opened, 0, body + 1)).long()


class _Product(torch.autograd.Function):
    """Rows (B, n) times the transpose of a scipy matrix."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Any) -> Tensor:
        ctx.matrix = matrix
        product = (matrix @ rows.detach().numpy().T).T
        return torch.from_numpy(np.ascontiguousarray(product)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        product: Tensor = _Product.apply(gradients[0], ctx.matrix.T)  # type: ignore[no-untyped-call]
        return product, None


def _from_torch(matrix: Tensor) -> Any:
    if matrix.layout == torch.strided:
        return sparse.csr_array(matrix.detach().cpu().double().numpy())
    coo = matrix.detach().cpu().to_sparse_coo().coalesce()
    rows, columns = coo.indices().numpy()
    return sparse.csr_array((coo.values().double().numpy(), (rows, columns)), shape=tuple(matrix.shape))


class _Function:
    """A function of one vector."""

    def __init__(self, function: Callable[[Tensor], Tensor], n: int) -> None:
        self.function, self.n = function, n

    def __call__(self, x: Tensor) -> Tensor:
        rows = [self._one(row) for row in x.reshape(-1, self.n)]
        return torch.stack(rows).reshape(x.shape)

    def _one(self, row: Tensor) -> Tensor:
        product = self.function(row)
        if product.shape != row.shape:
            raise ValueError(f"A must give a vector {tuple(row.shape)}, got {tuple(product.shape)}")
        return product

    def diagonal(self) -> Tensor:
        raise Unsupported("A is a function, so its diagonal is not known: give a matrix, or a preconditioner")

    def to_csr(self) -> Any:
        raise Unsupported("A is a function, so its entries are not known: give a matrix")

    def project(self, x: Tensor) -> Tensor:
        return x


def system_operator(system: GridSystem) -> LinearOperator:
    """The operator of a system that was read or simulated: matrix-free where its cells tell it."""
    if system.matrix is not None:
        return as_operator(system.matrix, system.b.size)
    air = None if system.air is None else torch.from_numpy(system.air)
    boundary = cast("Boundary", system.boundary)
    return PoissonOperator(system.shape, fluid=torch.from_numpy(system.fluid), air=air, boundary=boundary)
