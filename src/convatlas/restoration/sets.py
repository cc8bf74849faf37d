"""Sets of images or volumes to learn restoration from: splitting them, telling them, and putting batches together."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from convatlas.errors import DataError

__all__ = ["Entries", "collate", "digest", "divided", "train_val_test"]


class _Entry(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def clip(self) -> str: ...


class Entries(Protocol):
    """Samples of one split; each has a name, and that of the clip which it is a part of, "" for none."""

    @property
    def entries(self) -> Sequence[_Entry]:
        """The samples, in order."""
        ...

    def __len__(self) -> int: ...

    def subset(self, rows: Sequence[int]) -> Self:
        """The entries at some places."""
        ...


Set = TypeVar("Set", bound=Entries)


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Stack patches; whole images, which differ in size, stay a list."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    alike = len({sample["low"].shape for sample in samples}) == 1
    return {name: torch.stack(column) if alike else column for name, column in columns.items()}


def divided(
    pairs: Set, fractions: Mapping[str, float], seed: int, data: str, *, what: str = "images"
) -> dict[str, Set]:
    """Split at random by images and whole clips; a source of few clips is split in the order of its frames."""
    units: dict[str, list[int]] = {}
    for row, entry in enumerate(pairs.entries):
        units.setdefault(entry.clip or entry.name, []).append(row)
    parts = len(fractions)
    if len(units) >= parts:
        order = sorted(units)
        random.Random(seed).shuffle(order)
        groups = [units[name] for name in order]
    else:
        groups = [[row] for row in range(len(pairs))]
    if len(groups) < parts:
        raise DataError(f"{data} holds {len(groups)} {what}, but training needs at least {parts}")
    held_out = {name: max(1, round(share * len(groups))) for name, share in fractions.items() if name != "train"}
    chosen: dict[str, Any] = {}
    end = len(groups)
    for name, count in held_out.items():
        start = max(end - count, parts - 1 - len(chosen))
        chosen[name], end = groups[start:end], start
    chosen["train"] = groups[:end]
    return {name: pairs.subset(sorted(row for group in part for row in group)) for name, part in chosen.items()}


def train_val_test(
    sets: Mapping[str, Set], val_fraction: float, test_fraction: float, seed: int, data: str, *, what: str = "images"
) -> dict[str, Set]:
    """Splits to train on, to choose the best epoch by and to test on, from those that the data have.

    Args:
        sets: by split, or under "all" what has none.
        val_fraction: share of the training part that chooses the best epoch, where the data have no such part.
        test_fraction: share of all that is left for the test, where the data have no split.
        seed: of the random split.
        data, what: for messages: the source, and what it holds.

    Raises:
        DataError: there is no training part, or there are too few.
    """
    if "all" in sets:
        held_out = {"test": test_fraction, "val": (1 - test_fraction) * val_fraction}
        return divided(sets["all"], {"train": 1 - sum(held_out.values()), **held_out}, seed, data, what=what)
    if "train" not in sets:
        raise DataError(f"{data} has no train folder, only {', '.join(sets)}")
    parts = dict(sets)
    if "val" not in parts:
        parts |= divided(parts["train"], {"train": 1 - val_fraction, "val": val_fraction}, seed, data, what=what)
    return {**parts, "test": parts.get("test", parts["val"])}


def digest(splits: Mapping[str, Entries]) -> str:
    """A short text that tells whether samples were split in the same way."""
    digest = hashlib.sha256()
    for name, pairs in splits.items():
        digest.update(f"{name} {len(pairs)}\n".encode())
        digest.update("".join(f"{entry.name}\n" for entry in pairs.entries).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
