"""Comparing outputs of any structure, with one tolerance for each type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: The same numbers computed along another way: another backend, memory layout, compiler or batch.
TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
}
#: Largest distance of a bfloat16 result from the float32 one, relative to its norm.
BFLOAT16_DISTANCE = 0.05


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit by bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual: Any, expected: Any, label: str = "result") -> None:
    """Equal up to the tolerance of the type."""
    for ours, theirs in zip(leaves(actual), leaves(expected), strict=True):
        tolerance = TOLERANCES.get(theirs.dtype, {"rtol": 0, "atol": 0})
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text: f"{label}: {text}")


def assert_near(rough: Any, exact: Any) -> None:
    """A half-precision result is finite and near the exact one."""
    for ours, theirs in zip(leaves(rough), leaves(exact), strict=True):
        distance = (ours.to(theirs.dtype) - theirs).norm() / theirs.norm()
        assert distance < BFLOAT16_DISTANCE, f"relative distance {distance:.3f} from the result in {theirs.dtype}"


def loss(output: Any) -> Tensor:
    """A scalar on which every output has a say."""
    generator = torch.Generator().manual_seed(2)
    terms = [
        (leaf.float() * torch.randn(leaf.shape, generator=generator)).sum()
        for leaf in leaves(output)
        if leaf.is_floating_point()
    ]
    return torch.stack(terms).sum()


def first(output: Any, count: int) -> list[Tensor]:
    """The first samples of a batch, in every tensor."""
    return [leaf[:count] for leaf in leaves(output)]
