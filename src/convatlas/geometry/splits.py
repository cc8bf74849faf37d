"""Sets of clouds into parts to learn from, to choose by and to measure on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from convatlas.data.point_sets import CloudSet
from convatlas.errors import DataError

__all__ = ["digest", "split_sets"]


def split_sets(
    sets: Mapping[str, CloudSet], data: str, *, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, CloudSet]:
    """The parts ``train``, ``val`` and ``test``; those that the data lack are drawn at random, class by class.

    Args:
        sets: what was read, in splits or all under ``all``.
        data: what to call it in errors.
        val_fraction: share of the clouds that are not for the test.
        test_fraction: share of all clouds.
        seed: of the draw.

    Raises:
        DataError: there are too few clouds, or no part to learn from.
    """
    if "all" in sets:
        held_out = {"test": test_fraction, "val": (1 - test_fraction) * val_fraction}
        return _divided(sets["all"], held_out, data, seed)
    if "train" not in sets:
        raise DataError(f"{data} has no train part, only {', '.join(sets)}")
    found = dict(sets)
    if "val" not in found:
        found |= _divided(found["train"], {"val": val_fraction}, data, seed)
    return {**found, "test": found.get("test", found["val"])}


def _divided(clouds: CloudSet, held_out: Mapping[str, float], data: str, seed: int) -> dict[str, CloudSet]:
    """Parts of a set, each with the same share of every class."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[int]] = {"train": [], **{name: [] for name in held_out}}
    for label in np.unique(clouds.labels):
        order = generator.permutation(np.flatnonzero(clouds.labels == label)).tolist()
        if len(order) <= len(held_out):
            what = f"of class {clouds.classes[label]} " if label >= 0 else ""
            raise DataError(f"{data} has {len(order)} clouds {what}but needs at least {len(held_out) + 1}")
        total = len(order)
        for name, share in held_out.items():
            count = min(max(1, round(share * total)), len(order) - 1)
            rows[name] += order[:count]
            order = order[count:]
        rows["train"] += order
    return {name: clouds.subset(sorted(part)) for name, part in rows.items()}


def digest(splits: Mapping[str, CloudSet]) -> str:
    """A short text that tells whether clouds were split in the same way."""
    found = hashlib.sha256()
    for name, clouds in splits.items():
        found.update(f"{name} {len(clouds)}\n".encode())
        found.update("".join(f"{entry}\n" for entry in clouds.names).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]
