"""Does a network stand for one operator, whatever the grid? Its answers on finer and finer grids, compared.

Berner, Liu-Schiaffini, Kossaifi, Duruisseaux, Bonev, Azizzadenesheli, Anandkumar: "Principled Approaches for Extending
Neural Architectures to Function Spaces for Operator Learning", 2025, arXiv 2506.10973, section 2: discretisation
convergence. A plain convolution on a fine grid tends to a pointwise map, for its neighbours come ever closer: the
errors fall, but the operator is another one than on the grid of the training. The share of its answer that no pointwise
map explains tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.nn.attention_integral import AttentionKernelIntegral
from convatlas.nn.conv.disco import DiscreteContinuousConv2d
from convatlas.nn.conv.finite_difference import FiniteDifferenceConv2d
from convatlas.nn.conv.kernel_interpolation import KernelInterpolatedConv2d
from convatlas.nn.conv.spectral_conv import SpectralConv
from convatlas.nn.fields import coordinates
from convatlas.nn.graph_integral import GNOBlock
from convatlas.report import Cell, Claim, Lines, Note, Part, Report, Section, Table
from convatlas.surgery.selection import undisturbed
from convatlas.training.measure import provenance

__all__ = [
    "Sweep",
    "layer_sweep",
    "monte_carlo_errors",
    "resolution_errors",
    "resolution_sweep",
    "slope",
    "smooth_field",
]

#: A field (C, *grid) at coordinates (d, *grid) in [0, 1).
Field = Callable[[Tensor], Tensor]

# Fixed before anything was measured.

#: Share of the expected order that a fitted slope must reach.
ORDER_SHARE = 0.8
#: Errors below so many units of rounding count as none.
ROUNDING = 1e4
#: Share of what the neighbours contribute that must be left on the finest grid; below it the operator has collapsed.
NONLOCAL = 0.5


@dataclass(frozen=True)
class Sweep:
    """Answers of a network on finer and finer grids.

    Attributes:
        grids: points of an axis, the coarsest first, without the finest.
        finest: points of an axis of the grid that the others are compared with.
        errors: ||model(f_n) - restricted model(f_N)|| over the norm of the latter, for each n.
        drift: ||restricted model(f_n) - model(f_0)|| over the norm of the latter, for the coarsest grid 0 and each n.
        nonlocal_share: for each n and N, the share of the answer that no affine pointwise map of the input explains.
        precision: rounding of the type.
    """

    grids: tuple[int, ...]
    finest: int
    errors: tuple[float, ...]
    drift: tuple[float, ...]
    nonlocal_share: tuple[float, ...]
    precision: float

    @property
    def order(self) -> float:
        """Power of the distance of the points by which the errors fall; infinite where there are none."""
        if self.exact:
            return math.inf
        return -slope(self.grids, self.errors)

    @property
    def exact(self) -> bool:
        """Whether all errors are rounding."""
        return max(self.errors) <= ROUNDING * self.precision

    @property
    def nonlocal_left(self) -> float:
        """Share of the neighbours' contribution on the coarsest grid that is left on the finest."""
        return self.nonlocal_share[-1] / max(self.nonlocal_share[0], 1e-300)


def slope(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """Slope of log(error) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(errors, 1e-300)), 1)[0])


def smooth_field(channels: int = 1, waves: int = 2, seed: int = 0) -> Field:
    """A random periodic field of the first few frequencies, the same on every grid.

    Args:
        channels: of the field.
        waves: highest frequency of an axis.
        seed: of the amplitudes and phases.
    """

    def field(places: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(channels, *places.shape[1:], dtype=places.dtype, device=places.device)
        for _ in range(3 * waves):
            frequency = torch.randint(-waves, waves + 1, (channels, len(places)), generator=generator)
            amplitude, phase = torch.randn(2, channels, generator=generator, dtype=torch.float64).to(places)
            angle = torch.tensordot(frequency.to(places), 2 * math.pi * places, dims=1)
            shape = (-1, *[1] * (places.dim() - 1))
            total = total + amplitude.view(shape) * torch.cos(angle + phase.view(shape))
        return total

    return field


def resolution_errors(model: nn.Module, function: Field, grids: Sequence[int], *, dims: int = 2) -> Sweep:
    """Run a model on a function sampled on several grids of the unit cube, and compare.

    Args:
        model: maps fields (B, C, *grid) to fields; those that shrink the grid do it by the same factor on all.
        function: an analytic periodic function of the coordinates.
        grids: at least three numbers of points of an axis, each a divisor of the largest.
        dims: axes of position.

    Raises:
        ValueError: the grids do not divide the largest, or the answers cannot be compared.
    """
    sizes = sorted(set(grids))
    if len(sizes) < 3 or any(sizes[-1] % n for n in sizes):
        raise ValueError(f"grids must be at least three divisors of the largest, got {tuple(grids)}")
    pattern = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs, answers = [], []
    with undisturbed(model):
        for n in sizes:
            places = coordinates((n,) * dims, torch.empty(0, dtype=torch.float64, device=pattern.device))
            x = function(places).to(pattern.dtype)[None]
            inputs.append(x)
            answers.append(model(x))
    shrunk = [n / answer.shape[-1] for n, answer in zip(sizes, answers, strict=True)]
    if len({round(each, 6) for each in shrunk}) > 1:
        raise ValueError(f"the answers must be on grids of one ratio, got {[tuple(a.shape) for a in answers]}")
    finest = [_restricted(answers[-1], sizes[-1] // n) for n in sizes]
    errors = [_distance(answer, truth) for answer, truth in zip(answers, finest, strict=True)]
    drift = [_distance(_restricted(answer, answer.shape[-1] // answers[0].shape[-1]), answers[0]) for answer in answers]
    shares = [
        _unexplained(x, answer) if x.shape[2:] == answer.shape[2:] else math.nan
        for x, answer in zip(inputs, answers, strict=True)
    ]
    return Sweep(
        tuple(sizes[:-1]), sizes[-1], tuple(errors[:-1]), tuple(drift), tuple(shares), torch.finfo(pattern.dtype).eps
    )


def _restricted(field: Tensor, every: int) -> Tensor:
    index: tuple[Any, ...] = (..., *[slice(None, None, every)] * (field.dim() - 2))
    return field[index]


def _distance(field: Tensor, truth: Tensor) -> float:
    return float((field.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))


def _unexplained(x: Tensor, y: Tensor) -> float:
    """Share of y that is left when the nearest affine function of the channels of x is taken away."""
    features = torch.cat([x, torch.ones_like(x[:, :1])], 1).transpose(0, 1).flatten(1).t().double()
    values = y.transpose(0, 1).flatten(1).t().double()
    fitted = features @ (torch.linalg.pinv(features) @ values)
    return float((values - fitted).norm() / values.norm().clamp(min=1e-300))


def resolution_sweep(
    model: nn.Module, function: Field, grids: Sequence[int], *, dims: int = 2, order: float = 1.0
) -> Report:
    """A report on whether a model converges when the grid is refined, and how fast.

    Args:
        model, function, grids, dims: as in `resolution_errors`.
        order: power of the distance of the points by which the errors should fall; 1 is what any consistent layer
            reaches for smooth functions.
    """
    sweep = resolution_errors(model, function, grids, dims=dims)
    name = type(model).__name__
    claims = [_converges(name, sweep, order)]
    if not math.isnan(sweep.nonlocal_share[0]):
        claims.append(_nonlocal(name, sweep))
    columns = ["points of an axis", "distance from the finest", "drift from the coarsest", "not pointwise"]
    rows: list[list[Cell]] = [
        [n, error, drift, share]
        for n, error, drift, share in zip(
            (*sweep.grids, sweep.finest), (*sweep.errors, 0.0), sweep.drift, sweep.nonlocal_share, strict=True
        )
    ]
    caption = "Drift: how far the answer is from that on the coarsest grid. Not pointwise: what no map explains."
    parts: list[Part] = [*claims, Table("Grids", columns, rows, caption), _curves({name: sweep})]
    summary = f"{name}: {_order_text(sweep)} on grids of {sweep.grids[0]} to {sweep.finest} points."
    return Report(f"Resolution sweep of {name}", summary, [Section("Convergence", parts)], provenance())


def _curves(sweeps: dict[str, Sweep]) -> Lines:
    series = {
        name: ([float(n) for n in sweep.grids], [max(error, 1e-17) for error in sweep.errors])
        for name, sweep in sweeps.items()
    }
    title = "Distance from the finest grid"
    return Lines(title, "points of an axis", "relative L2", series, log_x=True, log_y=True)


def _order_text(sweep: Sweep) -> str:
    return "exact up to rounding" if sweep.exact else f"errors fall with order {sweep.order:.2f}"


def _converges(name: str, sweep: Sweep, order: float) -> Claim:
    if sweep.exact:
        return Claim.judge(
            f"{name} gives the same on every grid",
            published="discretisation convergence (section 2)",
            statistic="largest distance from the answer on the finest grid, over the rounding of the type",
            value=max(sweep.errors) / sweep.precision,
            at_most=ROUNDING,
            seeds=0,
        )
    return Claim.judge(
        f"{name} converges when the grid is refined",
        published=f"discretisation convergence (section 2); order {order:g} for smooth functions",
        statistic="order of the distance from the answer on the finest grid",
        value=sweep.order,
        at_least=ORDER_SHARE * order,
        seeds=0,
    )


def _nonlocal(name: str, sweep: Sweep) -> Claim:
    return Claim.judge(
        f"{name} stays an operator of its neighbourhood",
        published="a convolution of fixed pixels tends to a pointwise map (section 3)",
        statistic="share of the answer that is not pointwise, on the finest grid over that on the coarsest",
        value=sweep.nonlocal_left,
        at_least=NONLOCAL,
        seeds=0,
    )


# -- what each layer should do -----------------------------------------------------------------------------------------


def layer_sweep(grids: Sequence[int] = (16, 32, 64, 128), *, points: Sequence[int] = (256, 1024, 4096)) -> Report:
    """The layers of neural operators on finer and finer grids, with a plain convolution as the negative control.

    Args:
        grids: of the sweep; the coarsest counts as the grid of the training.
        points: numbers of random points of the graph integral.
    """
    base = min(grids)
    torch.manual_seed(0)
    circular: dict[str, Any] = {"padding_mode": "circular", "base_resolution": base}
    layers: dict[str, nn.Module] = {
        "spectral convolution": SpectralConv(2, 2, (8, 8)),
        "finite difference": FiniteDifferenceConv2d(2, 2, 3, padding=1, **circular),
        "local integral": DiscreteContinuousConv2d(2, 2, (3, 4), 2 / base, domain_length=(1, 1), periodic=True),
        "kernel interpolation": KernelInterpolatedConv2d(2, 2, 5, padding=2, **circular),
        "plain convolution": nn.Conv2d(2, 2, 5, padding=2, padding_mode="circular"),
    }
    sweeps = {name: resolution_errors(layer.double(), smooth_field(2), grids) for name, layer in layers.items()}
    # Eight channels, because the norm of keys and values jumps where all that a head sees vanishes.
    attention = _OnGrid(AttentionKernelIntegral(8, 2, 2, 8)).double()
    sweeps["attention integral"] = resolution_errors(attention, smooth_field(8), grids)
    exact, control = sweeps["spectral convolution"], sweeps["plain convolution"]
    errors = monte_carlo_errors(points)
    kept = ("spectral convolution", "finite difference", "local integral", "kernel interpolation")
    left = "share of the answer that is not pointwise, on the finest grid over that on the coarsest"
    claims = [
        Claim.judge(
            "Spectral convolution of a field of low frequencies is the same on every grid",
            published="exact for band-limited functions",
            statistic="largest distance from the answer on the finest grid, over the rounding of the type",
            value=max(exact.errors) / exact.precision,
            at_most=ROUNDING,
            seeds=0,
        ),
        *(_converges(name.capitalize(), sweeps[name], 1.0) for name in (*kept[1:], "attention integral")),
        Claim.judge(
            "Graph integral converges like a Monte-Carlo estimate",
            published="order 1/2 in the number of points",
            statistic="order of the mean error on random points, of the integral on a fine grid",
            value=-slope(points, errors),
            at_least=ORDER_SHARE / 2,
            seeds=0,
        ),
        Claim.judge(
            "A plain convolution collapses to a pointwise map: the negative control",
            published="it tends to a local operator when the grid is refined (section 3)",
            statistic=left,
            value=control.nonlocal_left,
            at_most=NONLOCAL,
            seeds=0,
        ),
        Claim.judge(
            "The layers that take its place do not",
            published="integral and differential operators in the limit",
            statistic=f"{left}; the smallest of the convolutional layers",
            value=min(sweeps[name].nonlocal_left for name in kept),
            at_least=NONLOCAL,
            seeds=0,
        ),
    ]
    rows: list[list[Cell]] = [
        [name, None if sweep.exact else sweep.order, *sweep.errors, sweep.drift[-1], sweep.nonlocal_left]
        for name, sweep in sweeps.items()
    ]
    columns = ["layer", "order", *(f"{n} points" for n in exact.grids), "drift", "not pointwise, left"]
    caption = f"Distance from the answer on {exact.finest} points, relative L2; drift of that from the coarsest."
    random = {"random points": (points, errors)}
    parts: list[Part] = [
        *claims,
        Table("Layers", columns, rows, caption),
        _curves(sweeps),
        Lines("Graph integral", "points", "relative L2", random, log_x=True, log_y=True),
        Note("Random weights in double precision, on a random field of the first two frequencies."),
    ]
    held = sum(claim.verdict == "holds" for claim in claims)
    summary = f"{held} of {len(claims)} expectations are met."
    return Report("Resolution sweep of layers", summary, [Section("Layers", parts)], provenance())


class _OnGrid(nn.Module):
    """A layer on points, used on the points of a grid."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


def monte_carlo_errors(points: Sequence[int], *, radius: float = 0.25, repeats: int = 4) -> list[float]:
    """Mean error of a graph integral on random points of the unit square, for each number of them.

    Args:
        points: numbers of points.
        radius: of the ball.
        repeats: draws of the points.
    """
    torch.manual_seed(0)
    block: Any = GNOBlock(1, 1, 2, radius, hidden_channels=(16,)).double()
    function = smooth_field(1)
    queries = 0.25 + 0.5 * torch.rand(16, 2, dtype=torch.float64)
    side = 100
    fine = coordinates((side, side), queries).flatten(1).t() + 0.5 / side
    errors = []
    with torch.no_grad():
        truth = block(fine, queries, function(fine.t()).t())
        for count in points:
            total = 0.0
            for _ in range(repeats):
                places = torch.rand(count, 2, dtype=torch.float64)
                total += _distance(block(places, queries, function(places.t()).t()), truth)
            errors.append(total / repeats)
    return errors
