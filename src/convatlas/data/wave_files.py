"""Sequences of wave fields in NPZ files."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from convatlas.data.wave_fem import WaveSequences
from convatlas.errors import DataError

__all__ = ["read_sequences", "sequences_digest", "write_sequences"]

_KEYS = ("fields", "speed", "interval", "spacing", "parameters")


def read_sequences(path: str | Path) -> WaveSequences:
    """Read an ``.npz`` file.

    It holds ``fields`` (S, T, H, W) or, of one scene, (T, H, W); ``speed`` (S, H, W), (H, W) or one number; and where
    they are known ``interval`` between two fields, ``spacing`` of the nodes and ``parameters`` (S, P) of the scenes.

    Raises:
        DataError: the file cannot be read, or an array is missing, of another shape or not finite.
    """
    path = Path(path)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array, not an .npz file with fields and speed")
        with file:
            held = {key: file[key] for key in file.files if key in _KEYS}
            present = ", ".join(file.files) or "nothing"
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    for key in ("fields", "speed"):
        if key not in held:
            raise DataError(f"{path} must hold fields and speed; it holds {present}")
    for key, array in held.items():
        if array.dtype.kind not in "fiu":
            raise DataError(f"{path}: {key} must be real numbers, got {array.dtype}")
        if not np.isfinite(array).all():
            raise DataError(f"{path}: {key} holds NaN or infinite values")
    fields, speed = held["fields"].astype(np.float32), held["speed"].astype(np.float32)
    fields = fields[None] if fields.ndim == 3 else fields
    if fields.ndim != 4 or 0 in fields.shape or min(fields.shape[2:]) < 3:
        raise DataError(
            f"{path}: fields must be (scenes, times, H, W) with H and W of at least 3, got {held['fields'].shape}"
        )
    try:
        speed = np.broadcast_to(speed, (len(fields), *fields.shape[2:])).copy()
    except ValueError:
        wanted = (len(fields), *fields.shape[2:])
        raise DataError(f"{path}: speed must be {wanted}, got {held['speed'].shape}") from None
    if speed.min() <= 0:
        raise DataError(f"{path}: speed must be positive")
    parameters = held.get("parameters")
    if parameters is not None and (parameters.ndim != 2 or len(parameters) != len(fields)):
        raise DataError(f"{path}: parameters must be ({len(fields)}, P), got {parameters.shape}")
    return WaveSequences(
        torch.from_numpy(fields),
        torch.from_numpy(speed),
        _number(held, "interval", path),
        _number(held, "spacing", path),
        None if parameters is None else torch.from_numpy(parameters.astype(np.float32)),
    )


def _number(held: dict[str, npt.NDArray[np.generic]], key: str, path: Path) -> float:
    array = held.get(key, np.array(1.0))
    if array.size != 1 or float(array.reshape(())) <= 0:
        raise DataError(f"{path}: {key} must be one positive number, got {array.tolist()}")
    return float(array.reshape(()))


def write_sequences(path: str | Path, sequences: WaveSequences) -> None:
    """Write an ``.npz`` file that `read_sequences` reads, whole or not at all."""
    from convatlas.files import atomic_path

    held = {
        "fields": sequences.fields.numpy(),
        "speed": sequences.speed.numpy(),
        "interval": np.array(sequences.interval),
        "spacing": np.array(sequences.spacing),
    }
    if sequences.parameters is not None:
        held["parameters"] = sequences.parameters.numpy()
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **held)  # type: ignore[arg-type]


def sequences_digest(sequences: WaveSequences) -> str:
    """A short text that tells sequences from others."""
    digest = hashlib.sha256()
    for tensor in (sequences.fields, sequences.speed):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
