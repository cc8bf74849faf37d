"""Automatic scaling: grow a seed topology step by step, in depth and width, by ranks of both scores (section 3.3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from convatlas.networks.as_vit import Genotype

__all__ = ["WIDTH_RATIOS", "candidates", "choose", "ranks"]

#: q: by which share the width may grow in a step.
WIDTH_RATIOS = (0.05, 0.1, 0.15, 0.2)


def candidates(genotype: Genotype, width_ratios: Sequence[float] = WIDTH_RATIOS) -> list[Genotype]:
    """The networks that are one step larger: one block more in one of the stages, and a width times 1 + q.

    Widths are rounded, halves to even; equal ones are one candidate.

    Args:
        genotype: the network at the width at which it is scored.
        width_ratios: q.
    """
    widths = list(dict.fromkeys(round(genotype.hidden * (1 + ratio)) for ratio in width_ratios))
    grown = []
    for stage in range(4):
        d1, d2, d3, d4 = (depth + (index == stage) for index, depth in enumerate(genotype.depths))
        grown += [dataclasses.replace(genotype, depths=(d1, d2, d3, d4), hidden=width) for width in widths]
    return grown


def ranks(values: Sequence[float], *, descending: bool = False) -> list[int]:
    """Place of each value from 0; equal values share one, and the next value has the next."""
    order = {value: place for place, value in enumerate(sorted(set(values), reverse=descending))}
    return [order[value] for value in values]


def choose(ntk: Sequence[float], length: Sequence[float], *, consistent: bool = False) -> int:
    """Index of the candidate with the smallest sum of ranks: condition ascending, length distortion descending.

    If the best two are equal, the score with the larger range, (max - min) / max over all candidates, decides between
    them. As in the authors' code the smaller value of it wins, also of the length distortion.

    Args:
        ntk: condition of each candidate.
        length: length distortion of each candidate.
        consistent: let the larger length distortion win.

    Raises:
        ValueError: there is no candidate, their numbers differ, or a score is not finite.
    """
    if not ntk or len(ntk) != len(length):
        raise ValueError(f"ntk and length must have one value for each candidate, got {len(ntk)} and {len(length)}")
    if not all(map(math.isfinite, (*ntk, *length))):
        raise ValueError("scores must be finite")
    sums = [a + b for a, b in zip(ranks(ntk), ranks(length, descending=True), strict=True)]
    first, *others = sorted(range(len(sums)), key=sums.__getitem__)
    if not others or sums[others[0]] > sums[first]:
        return first
    second = others[0]
    spread_ntk, spread_length = ((max(values) - min(values)) / max(values) for values in (ntk, length))
    if spread_ntk > spread_length:
        return min(first, second, key=lambda index: ntk[index])
    return (max if consistent else min)(first, second, key=lambda index: length[index])
