"""Writing files so that a reader sees the old content or the new, never half of one; and names for results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "free_name", "write_bytes", "write_text"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without an error.

    The data are flushed to disk before the rename, so a kill or a full disk at any moment leaves the old file whole.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # mkstemp makes private files; what users get follows their umask
        os.replace(part, target)
    except OSError as error:
        if error.errno is not None:  # the user knows this file, not the temporary one
            error.filename = str(target)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data``, atomically."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def free_name(name: str, mark: str, suffix: str, taken: set[str]) -> str:
    """The name of a result, below the output folder: as the input, with a mark such as the scale."""
    place = Path(name)
    parent = Path() if place.is_absolute() or ".." in place.parts else place.parent
    stem, number = f"{place.stem}_{mark}", 1
    while (result := (parent / f"{stem}{suffix}").as_posix()) in taken:
        number += 1
        stem = f"{place.stem}_{mark}_{number}"
    taken.add(result)
    return result
