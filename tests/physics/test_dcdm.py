"""The deep conjugate direction method: what holds whatever the predictor says, the loss and the right-hand sides."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from convatlas.errors import UnknownName
from convatlas.networks.dcdm import DCDMNetConfig
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.dcdm import dcdm, dcdm_loss, fit_directions, network_predictor, ritz_dataset, warm_cosine
from convatlas.physics.linear_solvers import cg, lanczos

A = PoissonOperator((6, 8))
MATRIX = torch.from_numpy(A.to_csr().toarray())
B = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_directions(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda r: r + 0.5 * torch.randn(r.shape, generator=generator, dtype=r.dtype)


def nonlinear(r: torch.Tensor) -> torch.Tensor:
    return torch.tanh(3 * r) + 0.1 * r.roll(1)


FORMS = [
    {},
    {"gram_schmidt": "modified", "recompute": False, "n_orthogonal": 3},
    {"n_orthogonal": 1, "gram_schmidt": "modified"},
    {"n_orthogonal": 0},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_exact_inverse_needs_one_iteration(form: dict[str, Any]):
    found = dcdm(A, B, lambda r: torch.linalg.solve(MATRIX, r), tol=1e-12, **form)
    assert found.iterations == 1
    torch.testing.assert_close(MATRIX @ found.x, B, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[2]], ids=str)
def test_identity_is_conjugate_gradients(form: dict[str, Any]):
    ours = dcdm(A, B, lambda r: r, tol=0.0, max_iter=10, **form)
    theirs = cg(A, B, tol=0.0, max_iter=10)
    np.testing.assert_allclose(ours.residuals, theirs.residuals, rtol=1e-8)
    torch.testing.assert_close(ours.x, theirs.x)


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_directions_are_conjugate_and_the_error_falls(kept: int):
    steps: list[torch.Tensor] = [torch.zeros_like(B)]
    solution = torch.linalg.solve(MATRIX, B)
    found = dcdm(
        A,
        B,
        random_directions(),
        tol=0.0,
        max_iter=8,
        n_orthogonal=kept,
        gram_schmidt="classical" if kept == 2 else "modified",
        callback=lambda _, x, __: steps.append(x) or False,
    )
    assert found.iterations == 8
    p = [b - a for a, b in pairwise(steps)]
    p = [one / one.norm() for one in p]
    for i in range(len(p)):
        for j in range(max(0, i - kept), i):
            assert abs(float(p[i] @ MATRIX @ p[j])) < 1e-12
    errors = [float((solution - x) @ MATRIX @ (solution - x)) for x in steps]
    assert all(after < before for before, after in pairwise(errors))
    # No step along the last direction would be better.
    assert abs(float(p[-1] @ (B - MATRIX @ steps[-1]))) < 1e-12


def test_scale_of_the_direction_does_not_matter():
    plain, five = (dcdm(A, B, lambda r, s=s: s * nonlinear(r), tol=0.0, max_iter=12) for s in (1, 5))
    np.testing.assert_allclose(plain.residuals, five.residuals, rtol=1e-10)
    scaled = dcdm(A, 1000 * B, nonlinear, tol=0.0, max_iter=12)
    np.testing.assert_allclose(np.array(plain.residuals) * 1000, scaled.residuals, rtol=1e-9)
    unscaled = [dcdm(A, s * B, nonlinear, max_iter=4, scale_input=False).residuals[-1] / s for s in (1, 1000)]
    assert unscaled[0] != pytest.approx(unscaled[1], rel=1e-3)


@pytest.mark.parametrize(
    "bad",
    [
        lambda r: torch.full_like(r, float("nan")),
        torch.zeros_like,
        lambda r: torch.ones_like(r),  # lost after the first, being the same again
    ],
    ids=["nan", "zero", "the same"],
)
def test_bad_directions_give_way_to_the_residual(bad: Any):
    with pytest.warns(RuntimeWarning, match="search direction lost positive curvature"):
        found = dcdm(A, B, bad, tol=1e-10, max_iter=200)
    assert found.converged
    torch.testing.assert_close(MATRIX @ found.x, B, rtol=0, atol=1e-8)


def test_limits_and_mistakes():
    assert dcdm(A, torch.zeros(48), nonlinear).residuals == (0.0,)
    start = torch.ones(48, dtype=torch.float64)
    assert torch.equal(dcdm(A, A(start), nonlinear, start).x, start)
    with pytest.warns(RuntimeWarning, match="A is not positive definite"), pytest.warns(RuntimeWarning, match="lost"):
        dcdm(-MATRIX, B, nonlinear)
    with pytest.raises(UnknownName, match="unknown gram_schmidt 'modifed': did you mean modified"):
        dcdm(A, B, nonlinear, gram_schmidt="modifed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_orthogonal must not be negative, got -1"):
        dcdm(A, B, nonlinear, n_orthogonal=-1)
    with pytest.raises(ValueError, match="predictor must give 48 values, got 2"):
        dcdm(A, B, lambda r: r[:2])
    with pytest.raises(ValueError, match=r"fluid must be \(6, 8\), got \(2, 2\)"):
        network_predictor(torch.nn.Identity(), (6, 8), torch.ones(2, 2))


def test_network_predicts_in_the_fluid_only():
    fluid = torch.ones(6, 8, dtype=torch.bool)
    fluid[2:4, 3:6] = False
    operator = PoissonOperator((6, 8), fluid=fluid)
    torch.manual_seed(0)
    model = DCDMNetConfig(ndim=2, width=4, depths=(1, 1, 1)).build()
    b = operator.project(B)
    found = dcdm(operator, b, network_predictor(model, (6, 8), fluid), tol=0.0, max_iter=5)
    assert found.x.dtype == torch.float64
    assert found.x.reshape(6, 8)[~fluid].abs().sum() == 0
    free = dcdm(operator, b, network_predictor(model, (6, 8)), tol=0.0, max_iter=5)
    np.testing.assert_allclose(free.residuals, found.residuals)  # what is outside does not matter to A
    rough = dcdm(operator, b, network_predictor(model, (6, 8), fluid, dtype=torch.bfloat16), tol=0.0, max_iter=5)
    true = float((b - operator(rough.x)).norm())
    assert rough.residuals[-1] == pytest.approx(true)  # the solver keeps its own precision
    assert rough.residuals[-1] != found.residuals[-1]


@pytest.mark.parametrize("kind", ["operator", "scipy", "dense"])
def test_loss(kind: str):
    operator = {"operator": A, "scipy": A.to_csr(), "dense": MATRIX}[kind]
    b = torch.nn.functional.normalize(torch.randn(3, 48, dtype=torch.float64), dim=1)
    q = torch.randn(3, 48, dtype=torch.float64)
    expected = 0.0
    for one, right in zip(q, b, strict=True):
        step = (one @ right) / (one @ MATRIX @ one)
        expected += float((right - step * (MATRIX @ one)).square().sum()) / 3
    loss = dcdm_loss(q, b, operator)
    assert float(loss) == pytest.approx(expected)
    assert float(dcdm_loss(-7 * q, b, operator)) == pytest.approx(expected)
    solution = torch.linalg.solve(MATRIX, b.T).T
    assert float(dcdm_loss(2 * solution, b, operator)) < 1e-20
    grid = dcdm_loss(q.reshape(3, 1, 6, 8), b.reshape(3, 1, 6, 8), operator)
    assert float(grid) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: dcdm_loss(x, b, operator), q.requires_grad_(), fast_mode=True)
    with pytest.raises(ValueError, match="q and b must be of one shape"):
        dcdm_loss(q, b[:2], operator)


def test_right_hand_sides_are_mostly_smooth():
    generator = torch.Generator().manual_seed(0)
    made = ritz_dataset(A, 30, 400, theta=2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(made.norm(dim=1), torch.ones(400, dtype=torch.float64))
    again = A(torch.randn(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values, vectors = lanczos(A, again, 30).ritz()
    shares = (made @ vectors.T).square().mean(0)
    assert float(shares.sum()) == pytest.approx(1)  # nothing lies outside their span
    smooth = len(values) // 2 + 2
    assert float(shares[:smooth].mean() / shares[smooth:].mean()) == pytest.approx(81, rel=0.2)


def test_null_space_is_left_out():
    closed = PoissonOperator((5, 4), boundary="neumann")
    made = ritz_dataset(closed, 20, 7)
    assert made.dtype == torch.float32
    assert float(made.mean(1).abs().max()) < 1e-6
    empty = sparse.csr_array((4, 4))
    with pytest.raises(ValueError, match="start must not be zero"):
        ritz_dataset(empty, 3, 2)
    with pytest.raises(ValueError, match="count must be at least 1"):
        ritz_dataset(A, 3, 0)


def test_short_trainings_warm_up():
    factors = [warm_cosine(share) for share in (0, 0.1, 0.2, 0.6, 1)]
    assert factors == pytest.approx([1e-3, 0.5, 1, 0.5, 0])


def test_training_saves_iterations():
    operator, generator = PoissonOperator((8, 8)), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = DCDMNetConfig(ndim=2, width=8).build()
    b = torch.randn(64, dtype=torch.float64, generator=generator)

    def iterations() -> int:
        return dcdm(operator, b, network_predictor(model, (8, 8)), max_iter=60).iterations

    before = iterations()
    vectors = ritz_dataset(operator, 40, 200, generator=generator)
    seen: list[int] = []
    losses = fit_directions(
        model, operator, vectors, steps=130, batch_size=8, lr=4e-3, clip=1.0, callback=lambda step, _: seen.append(step)
    )
    assert seen == list(range(1, 131))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert iterations() < 0.7 * before
