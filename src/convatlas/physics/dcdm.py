"""The deep conjugate direction method: conjugate directions from a network, exact line searches along them.

Kaneda, Akar, Chen, Kala, Hyde, Teran: "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems", ICML
2023 (PMLR 202), arXiv 2205.10763. The network sees a residual and answers with a search direction; step sizes and
residuals use the true operator, so that any accuracy can be reached whatever the network says.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.linear_operators import Operator, as_operator, size_of
from convatlas.physics.linear_solvers import Callback, Problem, SolveResult, Vector, lanczos

__all__ = ["dcdm", "dcdm_loss", "fit_directions", "network_predictor", "ritz_dataset", "warm_cosine"]

#: A search direction for a residual (n,).
Predictor = Callable[[Tensor], Tensor]

#: Standard deviation of the coefficients of the smooth half of the spectrum, that of the rest being 1.
SMOOTH = 9.0
#: Right-hand sides that are mixed at a time.
_ROWS = 64
#: Smaller Ritz values belong to the null space.
SMALLEST = 1e-8


def dcdm(
    A: Operator,
    b: Vector,
    predictor: Predictor,
    x0: Vector | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 100,
    n_orthogonal: int = 2,
    gram_schmidt: Literal["classical", "modified"] = "classical",
    recompute: bool = True,
    scale_input: bool = True,
    callback: Callback | None = None,
) -> SolveResult:
    """Solve A x = b along predicted directions (paper, algorithm 1).

    Each direction is made A-orthogonal to the last ``n_orthogonal`` ones. Where it is not finite or its curvature is
    not positive, the residual takes its place, and a warning says so.

    Args:
        A: symmetric positive definite: scipy or torch matrix, function, or operator such as `PoissonOperator`.
        b: right-hand side (n,), or of the grid's shape.
        predictor: gives a direction (n,) for a residual (n,), ideally parallel to A^-1 r; its scale does not matter.
        x0: start; zero when left out.
        tol: end when the residual is below this times the first.
        max_iter: end after so many iterations.
        n_orthogonal: how many directions are kept; with 0 each is only searched along.
        gram_schmidt: ``classical`` takes all coefficients from the predicted direction, as published for two;
            ``modified`` one after the other, as the authors do for more.
        recompute: whether the residual is computed from x in every iteration, or reduced step by step.
        scale_input: whether the predictor sees residuals of norm 1, as in training. The authors' fluid solver does not
            scale.
        callback: called after each iteration with its number, x and the norm of the residual; True ends the solve.

    Raises:
        ValueError: shapes do not fit, b is not finite, or a limit is out of range.
        UnknownName: there is no such form of orthogonalisation.
    """
    if n_orthogonal < 0:
        raise ValueError(f"n_orthogonal must not be negative, got {n_orthogonal}")
    if gram_schmidt not in ("classical", "modified"):
        raise unknown("gram_schmidt", gram_schmidt, ("classical", "modified"))
    problem = Problem(A, b, x0, tol=tol, max_iter=max_iter, callback=callback)
    kept: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=n_orthogonal)
    for _ in problem.iterations():
        r = problem.r
        q = predictor(r / problem.residuals[-1] if scale_input else r).reshape(-1).to(r)
        if q.shape != r.shape:
            raise ValueError(f"predictor must give {len(r)} values, got {len(q)}")
        direction = _conjugate(problem, q, kept, gram_schmidt) if bool(q.isfinite().all()) else None
        if direction is None:
            warnings.warn(
                "search direction lost positive curvature: the residual takes its place", RuntimeWarning, stacklevel=2
            )
            direction = _conjugate(problem, r, kept, gram_schmidt)
        if direction is None:
            problem.give_up(float(r @ problem.A(r)))
            break
        q, product, curvature = direction
        kept.append(direction)
        length = (q @ r) / curvature
        problem.advance(q * length, None if recompute else product * length)
    return problem.result()


def _conjugate(
    problem: Problem, q: Tensor, kept: deque[tuple[Tensor, Tensor, Tensor]], gram_schmidt: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A direction, its product with A and its curvature; None where it has none that is positive."""
    start = q
    for p, product, curvature in kept:
        q = q - p * ((start if gram_schmidt == "classical" else q) @ product / curvature)
    if float(q.norm()) <= 100 * torch.finfo(q.dtype).eps * float(start.norm()):
        return None  # what is left is rounding
    product = problem.A(q)
    curvature = q @ product
    return (q, product, curvature) if 0 < float(curvature) < float("inf") else None


def network_predictor(
    model: nn.Module, shape: tuple[int, ...], fluid: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Predictor:
    """A predictor for `dcdm` from a network of grids (B, 1, *shape).

    Args:
        model: the network, on the device of the right-hand side.
        shape: of the grid.
        fluid: which cells are fluid (*shape); the direction is zero elsewhere. All are when left out.
        dtype: precision of the network; that of its parameters when left out. A lower one costs iterations, not
            accuracy: bfloat16 suits GPUs.

    Raises:
        ValueError: ``fluid`` has another shape.
    """
    if fluid is not None and tuple(fluid.shape) != tuple(shape):
        raise ValueError(f"fluid must be {tuple(shape)}, got {tuple(fluid.shape)}")
    own = next((parameter.dtype for parameter in model.parameters()), torch.float32)

    @torch.inference_mode()
    def predict(r: Tensor) -> Tensor:
        x = r.reshape(1, 1, *shape).to(own)
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None and dtype != own):
            q: Tensor = model.eval()(x)
        q = q.reshape(-1).to(r)
        return q if fluid is None else torch.where(fluid.reshape(-1).to(q.device), q, 0)

    # Outside the inference mode it must be an ordinary tensor.
    return lambda r: predict(r).clone()


def dcdm_loss(q: Tensor, b: Tensor, A: Operator) -> Tensor:
    """mean || b - A q (q . b) / (q . A q) ||^2: how far the best step along q is from solving A x = b.

    It does not depend on the scale of q, and is zero where q is parallel to A^-1 b.

    Args:
        q: directions (B, n), or (B, 1, *grid) of a network.
        b: right-hand sides of norm 1, of the same shape.
        A: symmetric positive definite.

    Raises:
        ValueError: shapes differ.
    """
    if q.shape != b.shape or q.dim() < 2:
        raise ValueError(f"q and b must be of one shape (B, ...), got {tuple(q.shape)} and {tuple(b.shape)}")
    q, b = q.flatten(1), b.flatten(1)
    # float16 and bfloat16 cannot hold the quotient.
    exact = torch.promote_types(q.dtype, torch.float32)
    q, b = q.to(exact), b.to(exact)
    product = as_operator(A, q.shape[1], check=False)(q)
    step = (q * b).sum(1) / (q * product).sum(1)
    return (b - product * step[:, None]).square().sum(1).mean()


def ritz_dataset(
    A: Operator,
    m: int,
    count: int,
    theta: int | None = None,
    *,
    n: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Right-hand sides of norm 1 for the training: mixtures of Ritz vectors, smooth ones weighted more.

    Args:
        A: operator of the training.
        m: Lanczos steps; the paper takes 10,000.
        count: how many vectors; the paper takes 20,000 for each resolution.
        theta: how many Ritz vectors beyond the half are weighted as smooth; 500 of 10,000 in the paper, and the same
            share of m when left out.
        n: length of the vectors, where A is a function.
        generator: of the random numbers.
        dtype: of the result; the Lanczos iteration runs in float64.
        progress: called after each Lanczos step.

    Returns:
        (count, n).

    Raises:
        ValueError: ``count`` or ``theta`` is out of range, or A has no positive Ritz value.
    """
    size = size_of(A) if n is None else n
    if count < 1 or (theta is not None and theta < 0):
        raise ValueError(f"count must be at least 1 and theta not negative, got {count} and {theta}")
    operator = as_operator(A, size)
    start = operator(torch.randn(size, generator=generator, dtype=torch.float64))
    found = lanczos(operator, start, m, progress=progress)
    values, Q = found.eigen()
    Q = Q[:, values >= SMALLEST]
    if not Q.shape[1]:
        raise ValueError("A must have a positive Ritz value")
    weights = torch.ones(Q.shape[1], dtype=torch.float64)
    weights[: len(weights) // 2 + (round(m / 20) if theta is None else theta)] = SMOOTH
    mixed = torch.empty(count, size, dtype=dtype)
    for rows in torch.arange(count).split(_ROWS):
        c = torch.randn(len(rows), len(weights), generator=generator, dtype=torch.float64) * weights
        b = c @ Q.T @ found.vectors  # the Ritz vectors themselves would take as much memory again
        mixed[rows] = (b / b.norm(dim=1, keepdim=True)).to(dtype)
    return mixed


def fit_directions(
    model: nn.Module,
    A: PoissonOperator,
    vectors: Tensor,
    *,
    steps: int,
    batch_size: int = 10,
    lr: float = 1e-4,
    schedule: Callable[[float], float] = lambda share: 1.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a network on right-hand sides by `dcdm_loss` and Adam, in a plain loop. The task ``poisson`` does more.

    Args:
        model: network of grids (B, 1, *shape).
        A: operator of the training.
        vectors: right-hand sides of norm 1, (count, n), as `ritz_dataset` gives.
        steps: optimizer steps.
        batch_size: vectors of a step.
        lr: learning rate; constant in the paper.
        schedule: for a share of the training in [0, 1) a factor of the learning rate; `warm_cosine` suits short ones.
        clip: largest gradient norm.
        generator: of the order of the vectors.
        callback: called with the step and its loss.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    losses: list[float] = []
    while len(losses) < steps:
        for chosen in torch.randperm(len(vectors), generator=generator).split(batch_size)[: steps - len(losses)]:
            b = vectors[chosen].reshape(-1, 1, *A.shape)
            loss = dcdm_loss(model(b), b, A)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.param_groups[0]["lr"] = lr * schedule(len(losses) / steps)
            optimizer.step()
            losses.append(loss.item())
            callback(len(losses), losses[-1])
    model.eval()
    return losses


def warm_cosine(share: float, warm_up: float = 0.2) -> float:
    """Factor of the learning rate at a share of the training in [0, 1): a linear rise, and half a cosine down to 0."""
    if share < warm_up:
        return max(share / warm_up, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))
