"""Reading checkpoint files of every usual format into named parts of tensors."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convatlas.errors import CheckpointError, MissingExtra, require
from convatlas.weights.safe_pickle import Inert, load_pickle
from convatlas.weights.sources import locate

__all__ = ["Checkpoint", "find_parts", "read_checkpoint"]

_NO_WEIGHTS = re.compile(r"opt|(.*_)?(optim|optimizers?|schedulers?|scaler)(_.*)?")
_MAX_DEPTH = 8
_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        parts: state dicts by their place in the file, e.g. ``model``, ``ema``, ``nets.generator``; a file that is a
            state dict itself has the one part ``""``. States of optimizers and schedulers are left out.
        metadata: text stored beside the tensors; of a pickle, the plain values of its top level.
        source: where it was read from.
        content: everything in the file as it was read; objects of unknown classes are `Inert`.
    """

    parts: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]
    source: str
    content: object


def read_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint: safetensors, ``.npz``, HDF5, or what ``torch.save`` and ``pickle.dump`` wrote.

    The format is told from the content, not from the name. No code of the file is run. Tensors come on the CPU.

    Args:
        source: a path, ``hf://owner/name[@revision][/file]`` or ``https://...[#sha256=...]``.

    Raises:
        CheckpointError: the source cannot be found or read, is no checkpoint, or holds no weights.
        UnsafeCheckpoint: it asks to run code; nothing of it was run.
        MissingExtra: it is an HDF5 file and h5py is not installed.
    """
    path = locate(source)
    try:
        content, metadata = _read(path)
        parts = find_parts(content)
    except (CheckpointError, MissingExtra):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged or hostile bytes can raise anything
        raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from error
    if not parts:
        raise CheckpointError(f"{path} holds no weights")
    return Checkpoint(parts, metadata, os.fspath(source), content)


def find_parts(content: object) -> dict[str, dict[str, Tensor]]:
    """The state dicts in nested containers, by their key path joined with dots.

    A mapping whose values are mostly tensors or numeric arrays is a part, and so is a pickled module.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    _collect(content, "", parts, {}, 0)
    return parts


def _collect(value: object, path: str, parts: dict[str, dict[str, Tensor]], seen: dict[int, str], depth: int) -> None:
    if id(value) in seen or depth > _MAX_DEPTH:
        if (same := parts.get(seen.get(id(value), path))) is not None:
            parts[path] = same
        return
    seen[id(value)] = path
    if isinstance(value, Inert):
        value = value.contents()
        if "_parameters" in value and "_modules" in value:
            parts[path] = _module_state(value)
            return
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return
    entries = {key.decode("latin1") if isinstance(key, bytes) else str(key): item for key, item in value.items()}
    tensors = {key: tensor for key, item in entries.items() if (tensor := _as_tensor(item)) is not None}
    if 2 * len(tensors) > len(entries):
        parts[path] = tensors
    for key, item in entries.items():
        if isinstance(item, Mapping | Inert | list | tuple) and not _NO_WEIGHTS.fullmatch(key):
            _collect(item, f"{path}.{key}" if path else key, parts, seen, depth + 1)


def _module_state(attributes: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict of a module that was pickled whole."""
    own = {**attributes["_parameters"], **(attributes.get("_buffers") or {})}
    passing = attributes.get("_non_persistent_buffers_set") or ()
    state = {
        name: tensor for name, item in own.items() if name not in passing and (tensor := _as_tensor(item)) is not None
    }
    for name, child in attributes["_modules"].items():
        if isinstance(child, Inert):
            state |= {f"{name}.{key}": tensor for key, tensor in _module_state(child.contents()).items()}
    return state


def _as_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested:
            return None
        tensor = value.detach()
        if tensor.is_quantized:
            return tensor.dequantize()
        return tensor if tensor.layout == torch.strided else tensor.to_dense()
    if isinstance(value, np.ndarray) and (value.dtype.kind in "iufc" or value.dtype == np.bool_):
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    return None


def _read(path: Path) -> tuple[object, dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
        file.seek(max(size - 1, 0))
        last = file.read(1)
    if not head:
        raise CheckpointError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: download the real file (git lfs pull)"
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint: the download needs the address of the file itself"
        )
    if head.startswith(b"PK"):
        return _read_zip(path)
    if head.startswith(b"\x89HDF"):
        return _read_hdf5(path)
    if head[8:9] == b"{":
        return _read_safetensors(path, int.from_bytes(head[:8], "little"), size)
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive: unpack it and give the checkpoint in it")
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path} is compressed with {name}: unpack it first")
    # Pickles of protocol 0 and 1 are text that ends with a full stop.
    if head.startswith(b"\x80") or (head[:1] in b"(c]}" and last == b"."):
        return _read_pickle(path)
    kind = "a text file" if _is_text(head) else "of no known format"
    raise CheckpointError(f"{path} is {kind}, not a checkpoint (safetensors, torch, npz or HDF5)")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode(errors="strict" if len(head) < 1024 else "ignore")
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _read_safetensors(path: Path, header: int, size: int) -> tuple[object, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if header > size - 8:
        raise CheckpointError(f"{path} is cut off: its header should have {header} bytes, the file has {size}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error


def _read_zip(path: Path) -> tuple[object, dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is a zip archive that was cut off or damaged: {error}") from error
    if any(name.endswith("data.pkl") for name in names):
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which is a program and is not run here; where you trust it, save "
                "its weights: torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
            )
        return _read_pickle(path)
    if names and all(name.endswith(".npy") for name in names):
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays), {}
    raise CheckpointError(f"{path} is a zip archive without a checkpoint (data.pkl or arrays) at its top")


def _read_pickle(path: Path) -> tuple[object, dict[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and deprecated storages: nothing the user can act on
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the second reader says what is wrong
        content = load_pickle(path)
    values = content.items() if isinstance(content, Mapping) else ()
    return content, {str(key): str(value) for key, value in values if isinstance(value, str | int | float | bool)}


def _read_hdf5(path: Path) -> tuple[object, dict[str, str]]:
    h5py = require("h5py", extra="hdf5", purpose=f"reading {path.name} (HDF5)")
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biufc" and not name.startswith("optimizer_weights/"):
            if item.external:
                raise CheckpointError(f"{path} points to other files ({name}), which are not read")
            arrays[name.replace("/", ".")] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
        metadata = {key: value for key, value in file.attrs.items() if isinstance(value, str)}
    return arrays, metadata
