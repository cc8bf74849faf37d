"""Is a feature extractor stable? Frame bounds, the admissibility condition, energy, shifts and deformations.

Wiatowski, Boelcskei: "A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction", IEEE Trans.
Information Theory 2018, arXiv 1512.06293. The studies of shifts and deformations take any function of a signal that
returns features, as one tensor or as a list with one for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from convatlas.nn.frame_scattering import ScatteringNetwork
from convatlas.ops.frames import Frame
from convatlas.report import Cell, Claim, Lines, Note, Report, Section, Table

__all__ = [
    "check_admissible",
    "deform",
    "deformation_report",
    "energy_report",
    "frame_report",
    "relative_change",
    "translation_bounds",
    "translation_report",
]

#: Features of a signal: one tensor, or one for each layer.
Features = Callable[[Tensor], Tensor | Sequence[Tensor]]

#: Numerical noise that the inequalities of the theory are judged with.
ROUNDING = 1e-9


def frame_report(frame: Frame, name: str = "frame") -> Report:
    """Bounds of a frame, and its Littlewood-Paley sum over the frequencies.

    Args:
        frame: on any grid.
        name: what to call it.
    """
    lower, upper = frame.bounds()
    claim = Claim.judge(
        f"The {name} keeps the energy of every signal",
        published="A = B = 1 for the Parseval frames of the paper",
        statistic="distance of the frame bounds A and B from 1, whichever is larger",
        value=max(abs(lower - 1), abs(upper - 1)),
        at_most=ROUNDING,
        seeds=0,
    )
    rows: list[list[Cell]] = [
        [len(frame.filters), lower, upper, frame.decay_constant(), "real" if frame.is_real else "complex"]
    ]
    table = Table("Bounds", ["filters", "A", "B", "decay constant K", "atoms in space"], rows)
    total = frame.lp_sum()
    line = total if total.dim() == 1 else total[0]
    order = torch.fft.fftfreq(len(line)).argsort()
    curves = {"sum": line[order], "output-generating atom": _first_line(frame.atom)[order].abs().square()}
    curves |= {f"filter {k}": _first_line(g)[order].abs().square() for k, g in enumerate(frame.filters[:8])}
    xi = torch.fft.fftfreq(len(line))[order].tolist()
    lines = Lines(
        "Littlewood-Paley sum",
        "frequency [cycles a sample]",
        "squared absolute value",
        {key: (xi, values.tolist()) for key, values in curves.items()},
        caption="" if total.dim() == 1 else "Along the second axis, at frequency 0 of the first.",
    )
    summary = f"A = {lower:.6g}, B = {upper:.6g}."
    return Report(f"Frame bounds of the {name}", summary, [Section("Frame", [claim, table, lines])])


def check_admissible(network: ScatteringNetwork, *, lipschitz: Literal["tight", "paper"] = "tight") -> Report:
    """Whether max(B_n, B_n L_n^2 R_n^2) <= 1 in every layer (equation 4), and by what the atoms have to be scaled.

    Pooling has R = 1 in all its forms. If the condition holds, the features of two signals are no further apart than
    the signals, they move with the signal, and they change less under shifts the deeper the layer is.

    Args:
        network: any frames, non-linearities and pooling.
        lipschitz: the smallest constants of the non-linearities, or those of the paper's table, which are safe.
    """
    rows: list[list[Cell]] = []
    worst = 0.0
    for number, frame in enumerate(network.frames, start=1):
        lower, upper = frame.bounds()
        layer = network.layers[number - 1] if number <= len(network.layers) else None
        constant = 0.0
        if layer is not None:
            constant = layer.function.lipschitz if lipschitz == "tight" else layer.function.paper
        value = max(upper, upper * constant**2)
        worst = max(worst, value)
        label = f"layer {number}" if layer is not None else "output"
        rows.append([label, lower, upper, constant if layer else None, 1.0 if layer else None, value, value**-0.5])
    claim = Claim.judge(
        "The network is admissible",
        published="max(B, B L^2 R^2) <= 1 in every layer (equation 4)",
        statistic="largest max(B, B L^2 R^2) of all layers",
        value=worst,
        at_most=1 + ROUNDING,
        seeds=0,
    )
    table = Table(
        "Constants of the layers",
        ["layer", "A", "B", "L", "R", "max(B, B L^2 R^2)", "scale of the atoms"],
        rows,
        "L and R: Lipschitz constants of non-linearity and pooling. Atoms times the last column make every constant 1.",
    )
    parts: list[Claim | Table | Note] = [claim, table]
    if network.dilation_norm:
        parts.append(Note("In discrete time the factor S^(d/2) after pooling can undo what the condition promises."))
    return Report("Admissibility", f"The largest constant is {worst:.6g}.", [Section("Layers", parts)])


def energy_report(network: ScatteringNetwork, signals: Tensor) -> Report:
    """Where the energy of signals goes: into the features of each layer, and on to the next one.

    Without pooling, with Parseval frames and the modulus, nothing is lost on the way.

    Args:
        network: the extractor.
        signals: a batch (B, *shape).
    """
    whole = float(signals.abs().square().sum())
    carried = [float(u.abs().square().sum()) / whole for u in network.propagated(signals)]
    kept = [float(part.abs().square().sum()) / whole for part in network(signals)]
    totals = [sum(kept[:depth]) + share for depth, share in enumerate(carried)]
    claim = Claim.judge(
        "Features and what goes on hold no more than the energy of the signals",
        published="|||Phi(f)||| <= ||f|| for every admissible network (proposition 1)",
        statistic="largest energy of the features of all layers before one and of the maps that reach it, over that of "
        "the signals",
        value=max(totals),
        at_most=1 + _slack(signals),
        seeds=0,
    )
    rows: list[list[Cell]] = [
        [layer, *row, sum(kept[: layer + 1])] for layer, row in enumerate(zip(carried, kept, totals, strict=True))
    ]
    columns = ["layer", "reaches it", "its features", "reaches it or was kept before", "features so far"]
    lines = Lines(
        "Energy against depth",
        "layer",
        "share of the energy",
        {"reaches the layer": (range(len(carried)), carried), "its features": (range(len(kept)), kept)},
        log_y=True,
    )
    summary = f"The features hold {100 * sum(kept):.3g} % of the energy."
    return Report("Energy", summary, [Section("Energy", [claim, Table("Shares of the energy", columns, rows), lines])])


def relative_change(features: Features, x: Tensor, y: Tensor) -> list[float]:
    """For each layer, the distance of the features of two batches of signals over the norm of those of the first."""
    pairs = zip(_as_list(features(x)), _as_list(features(y)), strict=True)
    return [float((b - a).abs().square().sum().sqrt() / a.abs().square().sum().sqrt()) for a, b in pairs]


def translation_bounds(network: ScatteringNetwork, shift: float) -> list[float]:
    """For each layer, 2 pi |t| K_n / (S_1 ... S_n): how far its features move at most, over the norm of the signal.

    It holds for an admissible network and shifts that are a multiple of S_1 ... S_n; between those, a discrete signal
    has to be so smooth that subsampling loses nothing.
    """
    bounds, factor = [], 1
    for number, frame in enumerate(network.frames):
        bounds.append(2 * math.pi * abs(shift) * frame.decay_constant() / factor)
        factor *= network.layers[number].factor if number < len(network.layers) else 1
    return bounds


def translation_report(features: Features, signals: Tensor, shifts: Iterable[int]) -> Report:
    """How much the features of each layer change when the signals are shifted around their circle.

    For a `ScatteringNetwork` with at least one shift that is a multiple of all pooling factors together, the change is
    also held against `translation_bounds`.

    Args:
        features: the extractor.
        signals: a batch (B, ..., N) or (B, ..., H, W); shifted along the last axis.
        shifts: in samples.
    """
    shifts = list(shifts)
    changes = [relative_change(features, signals, signals.roll(shift, -1)) for shift in shifts]
    depth = len(changes[0])
    steps = [change[layer + 1] - change[layer] for change in changes for layer in range(depth - 1)]
    claim = Claim.judge(
        "The deeper the layer, the less its features change under shifts",
        published="2 pi |t| K / (S_1 ... S_n), which decreases with the depth n (theorem 1)",
        statistic="largest increase of the relative change from one layer to the next, over all shifts",
        value=max(steps, default=math.nan),
        at_most=0.0,
        seeds=0,
    )
    rows: list[list[Cell]] = [[shift, *change] for shift, change in zip(shifts, changes, strict=True)]
    table = Table("Relative change of the features", ["shift", *(f"layer {layer}" for layer in range(depth))], rows)
    lines = Lines(
        "Relative change against depth",
        "layer",
        "relative change",
        {f"shift of {shift}": (range(depth), change) for shift, change in zip(shifts, changes, strict=True)},
        log_y=True,
    )
    parts: list[Claim | Table | Lines] = [claim, table, lines]
    if isinstance(features, ScatteringNetwork):
        whole = math.prod(layer.factor for layer in features.layers)
        parts[1:1] = _bounded(features, signals, [shift for shift in shifts if shift and shift % whole == 0])
    return Report("Shifts", f"{depth} layers, {len(shifts)} shifts.", [Section("Shifts", parts)])


def _bounded(network: ScatteringNetwork, signals: Tensor, shifts: Sequence[int]) -> list[Claim]:
    """Theorem 1, for shifts that go through the pooling unbroken."""
    if not shifts:
        return []
    norm, before = float(signals.abs().square().sum().sqrt()), network(signals)
    ratios = []
    for shift in shifts:
        after, bounds = network(signals.roll(shift, -1)), translation_bounds(network, shift)
        ratios += [
            float((b - a).abs().square().sum().sqrt()) / norm / bound
            for a, b, bound in zip(before, after, bounds, strict=True)
        ]
    return [
        Claim.judge(
            "The features of every layer move no further under shifts than theorem 1 allows",
            published="|||Phi^n(T_t f) - Phi^n(f)||| <= 2 pi |t| K / (S_1 ... S_n) ||f|| for every admissible network",
            statistic="largest ratio of the two sides over layers, and shifts that are a multiple of all factors",
            value=max(ratios),
            at_most=1 + _slack(signals),
            seeds=0,
        )
    ]


def deformation_report(
    features: Features, signals: Tensor, deformation: Callable[[float], Tensor], sizes: Iterable[float]
) -> Report:
    """How far the features move when the signals are deformed, against how far the signals move.

    Args:
        features: the extractor; if it is admissible, its features move no further.
        signals: a batch (B, N) or (B, H, W).
        deformation: tau for a size: (N) or (2, H, W), in samples, see `deform`.
        sizes: of the deformations, ascending.
    """
    sizes = list(sizes)
    energy = float(signals.abs().square().sum().sqrt())
    before = _as_list(features(signals))
    rows: list[list[Cell]] = []
    for size in sizes:
        moved = deform(signals, deformation(size))
        squares = [(b - a).abs().square().sum() for a, b in zip(before, _as_list(features(moved)), strict=True)]
        distance = float(torch.stack(squares).sum().sqrt()) / energy
        rows.append([size, distance, float((moved - signals).abs().square().sum().sqrt()) / energy])
    claim = Claim.judge(
        "The features move no further than the signals",
        published="|||Phi(F f) - Phi(f)||| <= ||F f - f|| for every admissible network",
        statistic="largest ratio of the distance of the features to that of the signals",
        value=max(float(row[1] or 0) / max(float(row[2] or 0), 1e-30) for row in rows),
        at_most=1 + _slack(signals),
        seeds=0,
    )
    table = Table("Distances over the norm of the signals", ["size of tau", "features", "signals"], rows)
    columns = {"features": 1, "signals": 2}
    curves = {name: (sizes, [float(row[index] or 0) for row in rows]) for name, index in columns.items()}
    lines = Lines("Distance against the size of the deformation", "size of tau", "distance", curves)
    return Report("Deformations", f"{len(sizes)} sizes.", [Section("Deformations", [claim, table, lines])])


def deform(x: Tensor, tau: Tensor, omega: Tensor | None = None) -> Tensor:
    """(F f)(x) = exp(2 pi i omega(x)) f(x - tau(x)), with f between the samples by its Fourier series.

    Args:
        x: signals (..., N) with tau (N), or images (..., H, W) with tau (2, H, W); periodic, real or complex.
        tau: how far each point is moved, in samples, along each axis.
        omega: phase of each point in turns, (N) or (H, W); none when left out.

    Returns:
        The shape of x; complex if x is or omega is given.
    """
    grid = tuple(tau.shape) if tau.dim() == 1 else tuple(tau.shape[1:])
    dims = len(grid)
    if (dims == 2 and tau.shape[0] != 2) or dims not in (1, 2) or tuple(x.shape[-dims:]) != grid:
        raise ValueError(f"tau must be (N) or (2, H, W) of the size of x, got {tuple(tau.shape)} and {tuple(x.shape)}")
    moves = tau.unsqueeze(0) if dims == 1 else tau
    kernels = [_interpolation(move, axis, size) for axis, (move, size) in enumerate(zip(moves, grid, strict=True))]
    work = x.to(torch.promote_types(x.dtype, kernels[0].dtype))
    kernels = [kernel.to(work.dtype) for kernel in kernels]
    if dims == 1:
        y = work @ kernels[0].T
    else:
        rows = torch.einsum("...uv,pv->...pu", work, kernels[1])
        y = torch.einsum("...pu,pu->...p", rows, kernels[0]).unflatten(-1, grid)
    return y if omega is None else y * torch.exp(2j * math.pi * omega)


def _interpolation(move: Tensor, axis: int, size: int) -> Tensor:
    """(points, size): the weights of the samples of one axis at every moved point, by the periodic sinc."""
    positions = torch.arange(size, dtype=move.dtype)
    shape = [1] * move.dim()
    shape[axis] = size
    distance = (positions.view(shape) - move).reshape(-1, 1) - positions
    frequencies = torch.arange(1, (size + 1) // 2, dtype=move.dtype)
    angles = 2 * math.pi * distance.unsqueeze(-1) * frequencies / size
    weights = 1 + 2 * torch.cos(angles).sum(-1)
    if size % 2 == 0:
        weights = weights + torch.cos(math.pi * distance)
    return weights / size


def _slack(signals: Tensor) -> float:
    """Rounding of sums of squares of such signals."""
    return ROUNDING if signals.dtype in (torch.float64, torch.complex128) else 1e-5


def _as_list(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _first_line(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values[0]
