"""The classical solvers against direct solution, for every kind of operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from convatlas.errors import Unsupported
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.linear_operators import as_operator
from convatlas.physics.linear_solvers import (
    IncompleteCholesky,
    cg,
    deflated_pcg,
    gauss_seidel,
    jacobi,
    lanczos,
    pcg,
)


@pytest.fixture
def problem() -> tuple[PoissonOperator, Any, torch.Tensor, torch.Tensor]:
    """A box with a solid, its matrix without the empty rows' trouble, b and the solution."""
    fluid = torch.ones(6, 7, dtype=torch.bool)
    fluid[2:4, 2:4] = False
    A = PoissonOperator((6, 7), fluid=fluid)
    x = A.project(torch.randn(A.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return A, A.to_csr(), A(x), x


def torch_csr(matrix: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(matrix.toarray()).to_sparse_csr()


SOLVERS: dict[str, Callable[..., Any]] = {
    "cg": cg,
    "jacobi": lambda A, b, **limits: pcg(A, b, jacobi(A), **limits),
    "incomplete Cholesky": lambda A, b, **limits: pcg(A, b, IncompleteCholesky(A), **limits),
    "deflated": lambda A, b, **limits: deflated_pcg(A, b, vectors=5, **limits),
    "Gauss-Seidel": gauss_seidel,
}


@pytest.mark.parametrize("kind", ["operator", "scipy", "torch sparse", "dense"])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_solve(name: str, kind: str, problem: Any):
    operator, matrix, b, x = problem
    A = {
        "operator": lambda: operator,
        "scipy": lambda: matrix,
        "torch sparse": lambda: torch_csr(matrix),
        "dense": lambda: torch.from_numpy(matrix.toarray()),
    }[kind]()
    found = SOLVERS[name](A, b, tol=1e-11)
    assert found.converged
    torch.testing.assert_close(found.x, x, rtol=1e-8, atol=1e-8)
    true = float((b - operator(found.x)).norm())
    assert found.residuals[0] == pytest.approx(float(b.norm()))
    assert true == pytest.approx(found.residuals[-1], rel=1e-3, abs=1e-13)
    assert true < 1e-11 * float(b.norm()) <= found.residuals[-2]
    assert found.iterations == len(found.residuals) - 1


def test_functions_grids_and_starts(problem: Any):
    operator, _, b, x = problem
    assert cg(lambda v: operator(v), b, tol=1e-12).iterations == cg(operator, b, tol=1e-12).iterations
    grid = cg(operator, b.reshape(6, 7).numpy(), tol=1e-12)
    torch.testing.assert_close(grid.x, x.reshape(6, 7))
    near = cg(operator, b, x + 1e-3 * operator(x), tol=1e-12)
    assert near.residuals[0] < grid.residuals[0]
    torch.testing.assert_close(near.x, x)
    for unknown in (gauss_seidel, deflated_pcg, lambda A, _: jacobi(A), lambda A, _: IncompleteCholesky(A)):
        with pytest.raises(Unsupported, match="A is a function, so its"):
            unknown(lambda v: operator(v), b)


def test_preconditioners_save_iterations():
    A = PoissonOperator((24, 24))
    b = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, incomplete, deflated = cg(A, b), pcg(A, b, IncompleteCholesky(A)), deflated_pcg(A, b)
    assert incomplete.iterations < 0.5 * plain.iterations
    assert deflated.iterations < plain.iterations


@pytest.mark.parametrize("seed", range(3))
def test_incomplete_cholesky_is_elimination_without_fill(seed: int):
    random = np.random.default_rng(seed)
    dense = np.where(random.random((12, 12)) < 0.3, -random.random((12, 12)), 0)
    dense = dense + dense.T
    np.fill_diagonal(dense, 0)
    dense += np.diag(0.1 - dense.sum(1))
    dense[4], dense[:, 4] = 0, 0  # an empty row
    factor = np.tril(np.delete(np.delete(dense, 4, 0), 4, 1))
    pattern = factor != 0
    for k in range(len(factor)):
        factor[k, k] = np.sqrt(factor[k, k])
        factor[k + 1 :, k] /= factor[k, k]
        for j in range(k + 1, len(factor)):
            factor[j:, j] -= factor[j:, k] * factor[j, k]
        factor *= pattern
    made = IncompleteCholesky(sparse.csr_array(dense))
    np.testing.assert_allclose(made.factor.toarray(), factor, atol=1e-12)
    r = torch.randn(12, dtype=torch.float64)
    kept = [row for row in range(12) if row != 4]
    expected = np.linalg.solve(factor @ factor.T, r.numpy()[kept])
    np.testing.assert_allclose(made(r).numpy()[kept], expected)
    assert made(r)[4] == 0


@pytest.mark.parametrize("stored", [False, True], ids=["operator", "matrix"])
@pytest.mark.parametrize("name", SOLVERS)
def test_closed_boxes_are_solved_up_to_a_constant(name: str, stored: bool):
    fluid = torch.ones(5, 7, dtype=torch.bool)
    fluid[:, 4] = False  # two bodies
    A = PoissonOperator((5, 7), fluid=fluid, boundary="neumann")
    b = torch.randn(35, dtype=torch.float64, generator=torch.Generator().manual_seed(2))  # its means cannot be met
    found = SOLVERS[name](A.to_csr() if stored else A, b, tol=1e-9)
    assert found.converged
    for body in (slice(0, 4), slice(5, 7)):
        part = b.reshape(5, 7)[:, body]
        torch.testing.assert_close(A(found.x).reshape(5, 7)[:, body], part - part.mean(), rtol=0, atol=1e-7)
        assert abs(float(found.x.reshape(5, 7)[:, body].mean())) < 1e-12
    assert found.x.reshape(5, 7)[:, 4].abs().max() == 0


def test_limits(problem: Any):
    operator, _, b, x = problem
    assert cg(operator, b, max_iter=3).iterations == 3
    assert not cg(operator, b, max_iter=3).converged
    assert cg(operator, torch.zeros_like(b)).residuals == (0.0,)
    assert cg(operator, torch.zeros_like(b)).converged
    assert cg(operator, b, x).iterations <= 1
    seen: list[tuple[int, float]] = []
    stopped = cg(operator, b, callback=lambda i, x, r: seen.append((i, r)) or i == 4)
    assert [i for i, _ in seen] == [1, 2, 3, 4]
    assert tuple(r for _, r in seen) == stopped.residuals[1:]


def test_mistakes_are_told(problem: Any):
    operator, matrix, b, _ = problem
    with pytest.raises(ValueError, match=r"A must be square, got \(3, 4\)"):
        cg(torch.ones(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="A must be 5 x 5 for vectors of length 5, got 42 x 42"):
        cg(operator, torch.ones(5))
    with pytest.raises(ValueError, match="b must be floating point and finite"):
        cg(operator, torch.full((42,), float("nan")))
    with pytest.raises(ValueError, match=r"x0 must have 42 values, got \(3,\)"):
        cg(operator, b, torch.zeros(3))
    with pytest.raises(TypeError, match="A must be a sparse or dense matrix, a function or an operator, got str"):
        cg("A", b)
    with pytest.warns(RuntimeWarning, match="A is not symmetric"):
        as_operator(sparse.csr_array(np.triu(np.ones((4, 4)))), 4)
    with pytest.warns(RuntimeWarning, match="A is not positive definite"):
        assert not cg(-matrix, b).converged
    with pytest.raises(ValueError, match="A must have no negative diagonal"):
        IncompleteCholesky(-matrix)
    with pytest.raises(ValueError, match=r"basis must be \(k, 42\), got \(2, 3\)"):
        deflated_pcg(operator, b, basis=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"A must give a vector \(42,\), got \(2,\)"):
        cg(lambda v: v[:2], b)


def test_lanczos_is_a_similarity(problem: Any):
    operator, matrix, b, _ = problem
    found = lanczos(operator, b, 12)
    W = found.vectors
    torch.testing.assert_close(W @ W.T, torch.eye(12, dtype=torch.float64))
    T = torch.diag(found.diagonal) + torch.diag(found.sub_diagonal, 1) + torch.diag(found.sub_diagonal, -1)
    torch.testing.assert_close(W @ operator(W).T, T, atol=1e-12, rtol=0)
    values, vectors = found.ritz()
    torch.testing.assert_close(vectors @ operator(vectors).T, torch.diag(values), atol=1e-12, rtol=0)
    # With all steps the Ritz values are the eigenvalues that the start has a share in.
    whole = lanczos(operator, b, 42)
    assert len(whole.diagonal) == int(operator.fluid.sum())
    exact = np.linalg.eigvalsh(matrix.toarray())
    np.testing.assert_allclose(whole.ritz()[0].numpy(), exact[exact > 1e-9], atol=1e-8)
    with pytest.raises(ValueError, match="start must not be zero"):
        lanczos(operator, torch.zeros(42), 2)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        lanczos(operator, b, 0)
