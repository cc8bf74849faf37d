"""Solving the program with an off-the-shelf solver: real numbers first, then the nearest whole ones.

With channels, bottlenecks, depths and kernel sizes as real numbers the program is smooth, so that sequential quadratic
programming solves it in a second. Rounding down leaves a little of every budget; an ascent over small changes of one or
two blocks uses it up. The paper leaves the solver open; the authors' own is in `convatlas.design.deepmad.evolution`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.design.deepmad.program import Program, Space, falls, repair
from convatlas.networks.deepmad import CONV, Block

__all__ = ["climb", "neighbours", "relax"]

Structure = tuple[Block, ...]
Vector = npt.NDArray[np.float64]

_LARGEST_DEPTH = 64.0


def relax(program: Program, space: Space, init: Structure, seed: tuple[int, int]) -> Structure:
    """A structure that meets the constraints, near a local optimum of the relaxed program.

    Args:
        program: objective and constraints.
        space: what may be chosen.
        init: number and strides of the blocks, and a convolution at the end, which stays as it is.
        seed: two numbers that decide the point from which the solver goes; if the second is 0, that is ``init``.

    Raises:
        ValueError: no structure that meets the constraints was found; the message says what is violated.
    """
    # Only scipy's optimisation needs it, and importing it takes long.
    from scipy.optimize import minimize

    relaxed = _Relaxed(program, space, init)
    x0 = relaxed.start(init, np.random.default_rng(seed) if seed[1] else None)
    constraints = [{"type": "ineq", "fun": relaxed.margins}]
    solved: Any = minimize(
        relaxed.loss, x0, method="SLSQP", bounds=relaxed.bounds, constraints=constraints, options={"maxiter": 200}
    )
    x = np.clip(np.where(np.isfinite(solved.x), solved.x, x0), *np.array(relaxed.bounds).T)
    return climb(relaxed.rounded(x), program, space)


class _Relaxed:
    """The program over a vector: ln out of every changeable block, then ln btn, L and k of every super block."""

    def __init__(self, program: Program, space: Space, init: Structure) -> None:
        self.program, self.space, self.init = program, space, init
        self.supers = [index for index, block in enumerate(init) if block.kind != CONV]
        self.wide = [0, *self.supers]
        self.scale = max(program.objective(init), 1.0)
        number, fewest = len(self.supers), math.log(8)
        self.bounds = [
            (math.log(space.stem[0]), math.log(space.stem[1])),
            *[(fewest, math.log(space.largest))] * number,
            *[(fewest, math.log(space.largest * max(space.ratios, default=1.0)))] * number,
            *[(1.0, 3.0 if index == 0 else _LARGEST_DEPTH) for index in range(number)],
            *[(float(min(space.kernels)), float(max(space.kernels)))] * number,
        ]

    def start(self, structure: Structure, generator: np.random.Generator | None) -> Vector:
        blocks = [structure[index] for index in self.supers]
        x = np.array(
            [
                *(math.log(structure[index].out_channels) for index in self.wide),
                *(math.log(block.bottleneck) for block in blocks),
                *(float(block.depth) for block in blocks),
                *(float(block.kernel_size) for block in blocks),
            ]
        )
        if generator is not None:
            number = len(blocks)
            x[: 2 * number + 1] += generator.normal(0.0, 0.5, 2 * number + 1)
            x[2 * number + 1 : 3 * number + 1] += generator.exponential(4.0, number)
            x[3 * number + 1 :] = generator.uniform(*self.bounds[-1], number)
        return np.clip(x, *np.array(self.bounds).T)

    def structure(self, x: Vector) -> Structure:
        """The blocks that a vector stands for, with numbers that need not be whole."""
        number = len(self.supers)
        outs = dict(zip(self.wide, np.exp(x[: number + 1]).tolist(), strict=True))
        rest = x[number + 1 :].reshape(3, number).T.tolist()
        blocks: list[Block] = []
        for index, block in enumerate(self.init):
            changes: dict[str, Any] = {"in_channels": blocks[-1].out_channels} if blocks else {}
            if index in outs:
                changes["out_channels"] = outs[index]
            if block.kind != CONV:
                log_bottleneck, depth, kernel = rest[self.supers.index(index)]
                changes |= {"bottleneck": math.exp(log_bottleneck), "depth": depth, "kernel_size": kernel}
            blocks.append(block._replace(**changes))
        return tuple(blocks)

    def loss(self, x: Vector) -> float:
        return -self.program.objective(self.structure(x)) / self.scale

    def margins(self, x: Vector) -> Vector:
        """What is left of each constraint; none may be negative."""
        structure = self.structure(x)
        used = self.program.used(structure).values()
        found = [math.log(limit / value) for value, limit in used if math.isfinite(limit)]
        for before, block in itertools.pairwise(structure):
            found.append(math.log(block.out_channels / before.out_channels))
            if block.kind != CONV:
                lowest, highest = _shares(self.space)
                share = block.bottleneck / block.out_channels
                found += [math.log(share / lowest), math.log(highest / share)]
        return np.array(found)

    def rounded(self, x: Vector) -> Structure:
        """The whole numbers below, kernel sizes to the nearest odd one."""
        blocks: list[Block] = []
        for block in self.structure(x):
            whole = block.kind == CONV and len(blocks) > 0
            out = block.out_channels if whole else max(8, int(block.out_channels + 1e-6) // 8 * 8)
            changes: dict[str, Any] = {"out_channels": out}
            if block.kind != CONV:
                kernel = min(self.space.kernels, key=lambda size: abs(size - block.kernel_size))
                bottleneck = max(8, int(block.bottleneck + 1e-6) // 8 * 8)
                changes |= {"bottleneck": bottleneck, "depth": int(block.depth + 1e-6), "kernel_size": kernel}
            if blocks:
                changes["in_channels"] = blocks[-1].out_channels
            blocks.append(block._replace(**changes))
        return repair(blocks, self.program.image_size)


def _shares(space: Space) -> tuple[float, float]:
    """Least and largest bottleneck over output channels."""
    return (min(space.ratios), max(space.ratios)) if space.expands else (0.1, 1.0)


def climb(structure: Structure, program: Program, space: Space, *, until_feasible: bool = False) -> Structure:
    """Improve a structure by small changes of one block, then of two, until none improves it.

    Being over a budget is worse than any objective.

    Args:
        structure: where to begin.
        program: objective and constraints.
        space: what may be chosen.
        until_feasible: stop as soon as all constraints are met.

    Raises:
        ValueError: no structure that meets the constraints was found; the message says what is violated.
    """

    def rank(candidate: Structure) -> tuple[float, float]:
        excess = program.excess(candidate)
        return (-excess, program.objective(candidate) if excess == 0 else 0.0)

    best = rank(structure)
    while not (until_feasible and best[0] == 0):
        near = list(neighbours(structure, program, space))
        found = max(((rank(candidate), candidate) for candidate in near), default=None)
        if found is None or found[0] <= best:
            further = (other for candidate in near for other in neighbours(candidate, program, space))
            found = next(((value, other) for other in further if (value := rank(other)) > best), None)
        if found is None:
            break
        best, structure = found
    violation = program.violation(structure)
    if violation is not None:
        raise ValueError(f"no structure within the budgets was found; at the nearest one {violation}")
    return structure


def neighbours(structure: Structure, program: Program, space: Space) -> Iterator[Structure]:
    """The structures that differ in one number of one block and whose channels do not fall."""
    lowest, highest = _shares(space)
    for index, block in enumerate(structure):
        for changed in _changes(structure, index, space):
            if block.kind != CONV:
                share = changed.bottleneck / changed.out_channels
                if not (lowest - 8 / changed.out_channels <= share <= highest):
                    continue
            candidate = repair((*structure[:index], changed, *structure[index + 1 :]), program.image_size)
            if falls(candidate) is None:
                yield candidate


def _changes(structure: Sequence[Block], index: int, space: Space) -> Iterator[Block]:
    block = structure[index]
    if block.kind == CONV:
        if index == 0:
            for out in (block.out_channels - 8, block.out_channels + 8):
                if space.stem[0] <= out <= space.stem[1]:
                    yield block._replace(out_channels=out)
        return
    for step in (-64, -32, -16, -8, 8, 16, 32, 64):
        if 8 <= block.out_channels + step <= space.largest:
            yield block._replace(out_channels=block.out_channels + step)
        if 8 <= block.bottleneck + step:
            yield block._replace(bottleneck=block.bottleneck + step)
    first = next(place for place, other in enumerate(structure) if other.kind != CONV)
    for depth in (block.depth - 1, block.depth + 1):
        if 1 <= depth <= (3 if index == first else _LARGEST_DEPTH):
            yield block._replace(depth=depth)
    for kernel in space.kernels:
        if kernel != block.kernel_size:
            yield block._replace(kernel_size=kernel)
