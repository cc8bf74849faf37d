"""What can go wrong, in sentences: each error names the argument, what was given and what is expected."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "CheckpointError",
    "DataError",
    "Interrupted",
    "MissingExtra",
    "UnknownName",
    "UnsafeCheckpoint",
    "Unsupported",
    "require",
    "unknown",
]


class UnknownName(ValueError):
    """A name that is in no table; the message offers the nearest known names."""


class Unsupported(ValueError):
    """The request is well formed, but this layer, backend or task cannot serve it; the message says why."""


class DataError(ValueError):
    """The user's data cannot be read or cannot be used for the job."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not belong to the model."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint asks to run code. Nothing of it was run."""


class MissingExtra(ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class Interrupted(Exception):
    """The user or the system stopped a run after its state was saved; it can be resumed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Build the error for a ``name`` that is not among the ``known`` ones.

    Args:
        kind: what the name stands for, e.g. ``"model"``.
        name: what was given.
        known: every valid name.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(names) <= 12:
        hint = f"known: {', '.join(names)}"
    else:
        hint = f"there are {len(names)} known names, from {names[0]} to {names[-1]}"
    return UnknownName(f"unknown {kind} {name!r}: {hint}")


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtra(
            f"{purpose} needs the package {module.partition('.')[0]}: pip install 'convatlas[{extra}]'"
        ) from None
