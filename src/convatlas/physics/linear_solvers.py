"""Classical solvers of A x = b with A symmetric and positive definite, beside which learned ones have to stand.

Conjugate gradients plain, preconditioned (Jacobi, incomplete Cholesky) and deflated, and Gauss-Seidel. All stop when
the residual is below ``tol`` times the first one, and all compute it anew from x in every iteration, so that the
history that they return is the true one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse import linalg
from torch import Tensor

from convatlas.data.linear_systems import GridSystem
from convatlas.physics.linear_operators import LinearOperator, Operator, as_operator, size_of, system_operator

__all__ = [
    "Callback",
    "IncompleteCholesky",
    "Lanczos",
    "Problem",
    "SolveResult",
    "cg",
    "deflated_pcg",
    "gauss_seidel",
    "jacobi",
    "lanczos",
    "pcg",
    "pressure_solver",
]

Vector: TypeAlias = "Tensor | npt.NDArray[Any]"
#: Called with the iteration, x and the norm of the residual; True ends the solve.
Callback: TypeAlias = Callable[[int, Tensor, float], "bool | None"]
#: Approximates A^-1 r for a vector r (n,).
Preconditioner: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SolveResult:
    """What a solver found.

    Attributes:
        x: the solution, in the shape of b.
        residuals: norms of b - A x, the one of the start first.
        converged: whether the last one is below the tolerance.
    """

    x: Tensor
    residuals: tuple[float, ...]
    converged: bool

    @property
    def iterations(self) -> int:
        """Iterations that were made."""
        return len(self.residuals) - 1


class Problem:
    """A x = b while it is being solved.

    Attributes:
        A: the operator.
        b, x, r: right-hand side, solution so far and residual, (n,).
        residuals: norms so far.

    Raises:
        ValueError: shapes do not fit, b is not finite, or a limit is out of range.
    """

    def __init__(
        self,
        A: Operator,
        b: Vector,
        x0: Vector | None = None,
        *,
        tol: float = 1e-4,
        max_iter: int = 1000,
        callback: Callback | None = None,
    ) -> None:
        given = torch.as_tensor(b)
        if not given.is_floating_point() or not bool(given.isfinite().all()):
            raise ValueError("b must be floating point and finite")
        if tol < 0 or max_iter < 0:
            raise ValueError(f"tol and max_iter must not be negative, got {tol} and {max_iter}")
        self.shape = given.shape
        self.A: LinearOperator = as_operator(A, given.numel())
        self.b = self.A.project(given.reshape(-1))
        if x0 is None:
            self.x = torch.zeros_like(self.b)
        else:
            start = torch.as_tensor(x0).to(self.b)
            if start.numel() != self.A.n:
                raise ValueError(f"x0 must have {self.A.n} values, got {tuple(start.shape)}")
            self.x = start.reshape(-1).clone()
        self.tol, self.max_iter, self.callback = tol, max_iter, callback
        self.r = self.b if x0 is None else self.b - self.A(self.x)
        self.residuals = [float(self.r.norm())]
        self.stopped = False

    @property
    def converged(self) -> bool:
        """Whether the residual is below the tolerance."""
        return self.residuals[-1] == 0 or self.residuals[-1] < self.tol * self.residuals[0]

    def iterations(self) -> Iterator[int]:
        """Numbers from 0 until the tolerance, the limit or the callback ends the solve."""
        iteration = 0
        while not (self.converged or self.stopped) and iteration < self.max_iter:
            yield iteration
            iteration += 1

    def advance(self, step: Tensor, product: Tensor | None = None) -> None:
        """Add a step to x; the residual is computed anew, or reduced by ``product`` = A step."""
        self.x = self.x + step
        self.r = self.b - self.A(self.x) if product is None else self.r - product
        self.residuals.append(float(self.r.norm()))
        if self.callback is not None and self.callback(len(self.residuals) - 1, self.x, self.residuals[-1]):
            self.stopped = True

    def give_up(self, curvature: float) -> None:
        """End the solve where the operator is not positive along the residual."""
        warnings.warn(
            f"A is not positive definite: the curvature along the search direction is {curvature:.2e}; stopped after "
            f"{len(self.residuals) - 1} iterations",
            RuntimeWarning,
            stacklevel=3,
        )
        self.stopped = True

    def result(self) -> SolveResult:
        """What was found."""
        return SolveResult(self.A.project(self.x).reshape(self.shape), tuple(self.residuals), self.converged)


def cg(
    A: Operator,
    b: Vector,
    x0: Vector | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 1000,
    callback: Callback | None = None,
) -> SolveResult:
    """Conjugate gradients.

    Args:
        A: symmetric positive definite: scipy or torch matrix, function or operator.
        b: right-hand side (n,), or of the grid's shape.
        x0: start; zero when left out.
        tol: end when the residual is below this times the first.
        max_iter: end after so many iterations.
        callback: called after each iteration.

    Raises:
        ValueError: shapes do not fit, b is not finite, or a limit is out of range.
    """
    return pcg(A, b, lambda r: r, x0, tol=tol, max_iter=max_iter, callback=callback)


def pcg(
    A: Operator,
    b: Vector,
    preconditioner: Preconditioner,
    x0: Vector | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 1000,
    callback: Callback | None = None,
) -> SolveResult:
    """Preconditioned conjugate gradients; ``preconditioner(r)`` approximates A^-1 r. See `cg`."""
    problem = Problem(A, b, x0, tol=tol, max_iter=max_iter, callback=callback)
    return _preconditioned(problem, preconditioner)


def _preconditioned(
    problem: Problem, precondition: Preconditioner, deflate: Callable[[Tensor], Tensor] | None = None
) -> SolveResult:
    """Conjugate directions from preconditioned, and where wanted deflated, residuals."""
    p, last = torch.zeros_like(problem.b), torch.ones_like(problem.b[0])
    for _ in problem.iterations():
        z = precondition(problem.r)
        product = problem.r @ z
        p = (z if deflate is None else deflate(z)) + p * (product / last)
        last = product
        curvature = p @ problem.A(p)
        if not float(curvature) > 0:
            problem.give_up(float(curvature))
            break
        problem.advance(p * (product / curvature))
    return problem.result()


def deflated_pcg(
    A: Operator,
    b: Vector,
    preconditioner: Preconditioner | None = None,
    x0: Vector | None = None,
    *,
    basis: Tensor | None = None,
    vectors: int = 16,
    tol: float = 1e-4,
    max_iter: int = 1000,
    callback: Callback | None = None,
) -> SolveResult:
    """Preconditioned conjugate gradients that keep a few directions solved for exactly.

    Saad, Yeung, Erhel, Guyomarc'h: "A deflated version of the conjugate gradient algorithm", SIAM J. Sci. Comput. 2000.

    Args:
        A, b, x0, tol, max_iter, callback: as of `cg`.
        preconditioner: Jacobi's when left out.
        basis: the directions (k, n); when left out the Ritz vectors of as many Lanczos steps from b.
        vectors: how many Ritz vectors.

    Raises:
        ValueError: ``basis`` has another shape, or ``vectors`` is smaller than 1.
    """
    problem = Problem(A, b, x0, tol=tol, max_iter=max_iter, callback=callback)
    if vectors < 1:
        raise ValueError(f"vectors must be at least 1, got {vectors}")
    if problem.converged:
        return problem.result()
    precondition = preconditioner or jacobi(problem.A)
    W = lanczos(problem.A, problem.b, vectors).ritz()[1] if basis is None else basis.to(problem.b)
    if W.dim() != 2 or W.shape[1] != problem.A.n:
        raise ValueError(f"basis must be (k, {problem.A.n}), got {tuple(W.shape)}")
    AW = problem.A(W)
    coarse = torch.linalg.inv(W @ AW.T)
    problem.advance((coarse @ (W @ problem.r)) @ W)  # counts as an iteration
    return _preconditioned(problem, precondition, lambda z: z - (coarse @ (AW @ z)) @ W)


def gauss_seidel(
    A: Operator,
    b: Vector,
    x0: Vector | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 1000,
    callback: Callback | None = None,
) -> SolveResult:
    """Gauss-Seidel: one sweep over the unknowns in each iteration. On the CPU; see `cg`.

    Raises:
        Unsupported: A is a function.
    """
    problem = Problem(A, b, x0, tol=tol, max_iter=max_iter, callback=callback)
    csr = problem.A.to_csr()
    kept = np.flatnonzero(csr.diagonal())
    sweep = _triangle(sparse.tril(csr[kept][:, kept], format="csc"))
    for _ in problem.iterations():
        step = np.zeros(problem.A.n)
        step[kept] = sweep.solve(problem.r.double().cpu().numpy()[kept])
        problem.advance(torch.from_numpy(step).to(problem.b))
    return problem.result()


def pressure_solver(
    solve: Callable[[LinearOperator, Tensor], SolveResult] = cg, *, results: list[SolveResult] | None = None
) -> Callable[[GridSystem], npt.NDArray[Any]]:
    """A solver as `convatlas.data.smoke.SmokeSimulator` takes it.

    Args:
        solve: given the operator and the right-hand side (*shape), gives the result: `cg`, or a function around `dcdm`
            or any other solver.
        results: a list that gets every result.
    """

    def pressure(system: GridSystem) -> npt.NDArray[Any]:
        result = solve(system_operator(system), torch.from_numpy(system.b))
        if results is not None:
            results.append(result)
        return result.x.numpy()

    return pressure


# Preconditioners


def jacobi(A: Operator) -> Preconditioner:
    """Division by the diagonal; rows without one stay zero.

    Raises:
        Unsupported: A is a function.
    """
    diagonal = as_operator(A, size_of(A), check=False).diagonal()
    inverse = torch.where(diagonal != 0, 1 / diagonal, 0)
    return lambda r: r * inverse.to(r)


class IncompleteCholesky:
    """(L L^T)^-1 r with L of the pattern of A: incomplete Cholesky without fill-in. On the CPU, in float64.

    Rows without a diagonal are left out. All entries of L are improved at once, from those of A, until they stay as
    they are (Chow, Patel: "Fine-grained parallel incomplete LU factorization", SIAM J. Sci. Comput. 2015); what an
    entry depends on is settled before it, so this ends, with the factor that elimination gives.

    Attributes:
        factor: L, a scipy CSR array (k, k) of the rows that are kept.
        kept: numbers of these rows.

    Raises:
        ValueError: A is not square, or has a negative diagonal.
        Unsupported: A is a function.
    """

    def __init__(self, A: Operator) -> None:
        operator = as_operator(A, size_of(A), check=False)
        csr = operator.to_csr()
        if csr.diagonal().min(initial=0.0) < 0:
            raise ValueError(f"A must have no negative diagonal, got {csr.diagonal().min():g}")
        self.n = operator.n
        self.kept = np.flatnonzero(csr.diagonal())
        self.factor = _incomplete_factor(csr[self.kept][:, self.kept])
        self._solver = _triangle(self.factor.tocsc())

    def __call__(self, r: Tensor) -> Tensor:
        """Apply to a vector (n,)."""
        z = np.zeros(self.n)
        z[self.kept] = self._solver.solve(self._solver.solve(r.double().cpu().numpy()[self.kept]), "T")
        return torch.from_numpy(z).to(r)


def _triangle(lower: Any) -> Any:
    """A solver of lower triangular systems, without reordering: SuperLU finds nothing to eliminate."""
    options = {"DiagPivotThresh": 0.0, "SymmetricMode": True, "Equil": False}
    return linalg.splu(sparse.csc_matrix(lower), permc_spec="NATURAL", options=options)


def _incomplete_factor(csr: Any) -> Any:
    lower = sparse.tril(csr, format="csr")
    lower.sort_indices()
    n, columns = lower.shape[0], lower.indices.astype(np.int64)
    rows = np.repeat(np.arange(n, dtype=np.int64), np.diff(lower.indptr))
    on_diagonal = rows == columns
    diagonal = np.flatnonzero(on_diagonal)
    # For each entry (i, j) the pairs of entries (i, k) and (j, k) with k < j, found in order of (row, column).
    length = np.diff(lower.indptr)[columns] - 1
    entry = np.repeat(np.arange(len(columns)), length)
    second = np.arange(len(entry)) - np.repeat(np.cumsum(length) - length, length) + lower.indptr[columns[entry]]
    keys = rows * n + columns
    wanted = rows[entry] * n + columns[second]
    first = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    found = keys[first] == wanted
    entry, first, second = entry[found], first[found], second[found]
    scale = np.sqrt(lower.diagonal())
    values = lower.data / np.where(on_diagonal, scale[rows], scale[columns])
    for _ in range(2 * n):
        rest = lower.data - np.bincount(entry, values[first] * values[second], len(values))
        # A pivot that is lost keeps the entry of A.
        root = np.sqrt(np.where(rest[diagonal] > 1e-12 * lower.data[diagonal], rest[diagonal], lower.data[diagonal]))
        better = np.where(on_diagonal, root[rows], rest / values[diagonal][columns])
        change = np.abs(better - values).max(initial=0.0)
        values = better
        if change <= 1e-14 * np.abs(values).max(initial=0.0):
            break
    return sparse.csr_array((values, lower.indices, lower.indptr), shape=lower.shape)


# Lanczos


class Lanczos(NamedTuple):
    """A = W^T T W on the Krylov space.

    Attributes:
        vectors: W, orthonormal rows (m, n).
        diagonal, sub_diagonal: of T, (m,) and (m - 1,).
    """

    vectors: Tensor
    diagonal: Tensor
    sub_diagonal: Tensor

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) of T, rising, and its eigenvectors, the columns of Q (m, m)."""
        T = torch.diag(self.diagonal)
        T += torch.diag(self.sub_diagonal, 1) + torch.diag(self.sub_diagonal, -1)
        values, Q = torch.linalg.eigh(T)
        return values, Q

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values (m,), rising, and Ritz vectors Q^T W (m, n)."""
        values, Q = self.eigen()
        return values, Q.T @ self.vectors


def lanczos(A: Operator, start: Tensor, steps: int, *, progress: Callable[[], None] = lambda: None) -> Lanczos:
    """The Lanczos iteration with full re-orthogonalisation.

    Args:
        A: symmetric.
        start: first vector, of any length (n,).
        steps: m; fewer are made where the Krylov space ends.
        progress: called after each step.

    Raises:
        ValueError: ``steps`` is smaller than 1, or ``start`` is zero.
    """
    operator = as_operator(A, start.numel())
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    norm = start.norm()
    if not float(norm) > 0:
        raise ValueError("start must not be zero")
    steps = min(steps, operator.n)
    W = start.new_zeros(steps, operator.n)
    W[0] = start.reshape(-1) / norm
    diagonal, sub_diagonal = start.new_zeros(steps), start.new_zeros(max(steps - 1, 0))
    small = torch.finfo(start.dtype).eps ** 0.6  # what is left of a Krylov space that has ended is rounding
    for step in range(steps):
        v = operator(W[step])
        diagonal[step] = v @ W[step]
        length = v.norm()
        for _ in range(2):  # once is not enough in finite precision
            v = v - (W[: step + 1] @ v) @ W[: step + 1]
        progress()
        if step + 1 == steps:
            break
        beta = v.norm()
        if float(beta) <= small * float(length):
            return Lanczos(W[: step + 1], diagonal[: step + 1], sub_diagonal[:step])
        sub_diagonal[step] = beta
        W[step + 1] = v / beta
    return Lanczos(W, diagonal, sub_diagonal)
