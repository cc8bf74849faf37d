"""Reading pickled checkpoints without running anything of theirs.

A pickle is a program: it names functions and has them called. This reader never looks a name up. It knows a short table
of names that tensors, arrays and plain containers need, and answers them with code of its own; classes of other
packages become objects that keep what they are given and do nothing; every other name is refused.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from convatlas.errors import CheckpointError, UnsafeCheckpoint

__all__ = ["Inert", "load_pickle"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}

# Classes of the standard library that configurations and logs in checkpoints are made of.
_INERT_STANDARD = re.compile(
    r"argparse\.Namespace|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|types\.SimpleNamespace|collections\.deque"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|uuid\.UUID|decimal\.Decimal|fractions\.Fraction"
    r"|builtins\.(range|slice)"
)
# What torch's layers and numpy's generators pickle of themselves, and by convention all classes (capital letter).
_INERT_NUMERIC = re.compile(
    r"(torch|numpy)\.(.+\.)?[A-Z]\w*|torch\.nn\..+|torch\._utils\._rebuild_\w+|torch\.(device|dtype)"
    r"|numpy\.random\._pickle\.\w+|numpy\.(ndarray|bool_?|u?int\d+|float\d+|complex\d+|str_|bytes_)"
)


class Inert:
    """Stands for an object of a class that was not loaded: it keeps what the pickle gave it and does nothing.

    Attributes:
        pickled_name: module and name of the class.
        arguments: what it was constructed with.
        state: what was set as its state, usually its attributes.
        items: what was put in as a mapping.
        values: what was put in as a list or a set.
    """

    pickled_name: ClassVar[str] = ""
    arguments: tuple[object, ...]
    state: object
    items: dict[object, object]
    values: list[object]

    def __new__(cls, *arguments: object, **options: object) -> Inert:
        """Keep the arguments; a pickle may call this alone, without the initialiser."""
        self = object.__new__(cls)
        self.arguments, self.state, self.items, self.values = arguments, None, dict[object, object](), []
        self.items.update(options)
        return self

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __call__(self, *arguments: object, **options: object) -> Inert:
        """Another object that does nothing."""
        return Inert(*arguments, **options)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, value: object) -> None:
        """Keep a value."""
        self.values.append(value)

    add = append

    def extend(self, values: list[object]) -> None:
        """Keep some values."""
        self.values.extend(values)

    def __repr__(self) -> str:
        return f"<inert {self.pickled_name}>"

    def contents(self) -> dict[object, object]:
        """Its items and attributes in one dictionary."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        found = dict(self.items)
        for state in states:
            found |= state if isinstance(state, dict) else {}
        return found


class _Step:
    """A callable that pickles may use: our own code."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)


class _ArrayType:
    """A numpy dtype that is still being unpickled; only plain numbers, text and objects have a counterpart."""

    def __init__(self, spec: str | bytes, *_: object) -> None:
        self.spec = (spec if isinstance(spec, str) else spec.decode("latin1")).lstrip("<>|=")
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if isinstance(state[1], str) else state[1].decode("latin1")

    def dtype(self) -> np.dtype[Any]:
        if not re.fullmatch(r"[biufcSU]\d{1,9}|O8?|\?", self.spec) or self.order not in "<>=|":
            raise CheckpointError(f"numpy arrays of dtype {self.spec!r} cannot be read safely")
        return np.dtype(self.order + self.spec)


class _Array(np.ndarray[Any, Any]):
    """An array that is filled only after its size was checked: numpy itself trusts the pickle."""

    def __setstate__(self, state: Any) -> None:
        shape, kind, fortran, data = state[-4:]
        dtype = kind.dtype()
        if isinstance(data, str):  # Python 2 wrote bytes as text
            data = data.encode("latin1")
        if dtype.hasobject:
            fits = type(data) is list and len(data) == math.prod(shape)
        else:
            fits = type(data) is bytes and len(data) == math.prod(shape) * dtype.itemsize
        if not fits or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError("a numpy array has another size than it says")
        checked: Any = (1, tuple(shape), dtype, bool(fortran), data)
        super().__setstate__(checked)


def _array(*_: object) -> _Array:
    return _Array((0,), dtype=np.int8)


def _array_from_buffer(data: bytes | bytearray, kind: _ArrayType, shape: tuple[int, ...], order: str) -> object:
    if kind.dtype().hasobject:
        raise CheckpointError("numpy arrays of objects cannot be read from a buffer")
    return np.frombuffer(bytes(data), kind.dtype()).reshape(shape, order="F" if order == "F" else "C")


def _scalar(kind: _ArrayType, data: object = b"") -> object:
    if kind.dtype().hasobject:
        return data
    raw = data.encode("latin1") if isinstance(data, str) else data
    if type(raw) is not bytes or len(raw) != kind.dtype().itemsize:
        raise CheckpointError("a numpy scalar has another size than it says")
    return np.frombuffer(raw, kind.dtype())[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "utf-8", "ascii"):
        raise UnsafeCheckpoint(f"for the codec {encoding!r}")
    return text.encode(encoding)


# Storages are flat tensors here, so that as_strided checks every bound.
def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    tensor = flat.as_strided(size, stride, offset)
    marks = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    if marks.get("conj"):
        tensor = tensor.conj()
    return torch.neg(tensor) if marks.get("neg") else tensor


def _tensor_of_dtype(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    return flat.view(rest[2]).as_strided(size, stride, offset)


def _tensor_from_array(data: Any, dtype: torch.dtype, *_: object) -> Tensor:
    return torch.as_tensor(data if isinstance(data, Tensor) else np.array(data)).to(dtype)


def _first(data: object, *_: object) -> object:
    return data


def _of_type(function: object, kind: object, arguments: tuple[object, ...], state: object) -> object:
    return function(*arguments) if isinstance(function, _Step) else Inert(function, kind, arguments, state)


def _reconstructed(kind: object, base: object = None, state: object = None) -> object:
    made = kind() if isinstance(kind, type) and issubclass(kind, Inert) else Inert(kind)
    made.items |= state if isinstance(state, dict) else {}
    made.values += state if isinstance(state, list) else []
    return made


def _allowed_names() -> dict[str, object]:
    plain = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, set, str, tuple)
    names: dict[str, object] = {f"builtins.{kind.__name__}": kind for kind in plain}
    names |= {
        "collections.OrderedDict": collections.OrderedDict,
        "collections.defaultdict": _Step(lambda factory=None, *_: {}),
        "collections.Counter": _Step(dict),
        "copyreg._reconstructor": _Step(_reconstructed),
        "_codecs.encode": _Step(_encode),
        "torch.Size": _Step(tuple),
        "torch._utils._rebuild_tensor": _Step(_tensor),
        "torch._utils._rebuild_tensor_v2": _Step(_tensor),
        "torch._utils._rebuild_tensor_v3": _Step(_tensor_of_dtype),
        "torch._utils._rebuild_parameter": _Step(_first),
        "torch._utils._rebuild_parameter_with_state": _Step(_first),
        "torch._utils._rebuild_device_tensor_from_numpy": _Step(_tensor_from_array),
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Step(_tensor_from_array),
        "torch._utils._rebuild_xla_tensor": _Step(_tensor_from_array),
        "torch._tensor._rebuild_from_type_v2": _Step(_of_type),
        "numpy.dtype": _Step(_ArrayType),
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray._reconstruct"] = _Step(_array)
        names[f"{core}.multiarray.scalar"] = _Step(_scalar)
        names[f"{core}.numeric._frombuffer"] = _Step(_array_from_buffer)
    names |= {f"torch.{name}": dtype for name, dtype in _STORAGE_DTYPES.items()}
    names |= {f"torch.cuda.{name}": dtype for name, dtype in _STORAGE_DTYPES.items()}
    names |= {f"torch.storage.{name}": dtype for name, dtype in _STORAGE_DTYPES.items()}
    constants = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
    return names | {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, constants)}


class _Reader(pickle._Unpickler):
    """Unpickler whose names come from the table alone.

    It extends the unpickler written in Python: the one in C makes room for whatever index or length a file names before
    it looks whether the file has so much, which can take minutes and all memory.
    """

    allowed = _allowed_names()

    def load_bytearray8(self: Any) -> None:
        length = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(length)))

    def load_build(self: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert | _Array | _ArrayType):
            target.__setstate__(state)
        elif type(target) is not collections.OrderedDict:  # whose only state is the versions of its modules
            raise UnsafeCheckpoint(f"to change a {type(target).__name__}")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
    }

    def __init__(self, stream: IO[bytes], storage: Callable[..., Tensor] | None = None) -> None:
        super().__init__(stream, encoding="latin1")
        self.storage = storage
        self.inert: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in self.allowed:
            return self.allowed[full]
        package = module.partition(".")[0]
        if package in ("torch", "numpy"):
            inert = _INERT_NUMERIC.fullmatch(full) is not None
        else:
            inert = package not in sys.stdlib_module_names or _INERT_STANDARD.fullmatch(full) is not None
        if not inert:
            raise UnsafeCheckpoint(f"to call {full}")
        return self.inert.setdefault(full, type("Inert", (Inert,), {"pickled_name": full}))

    def persistent_load(self, identity: Any) -> Any:
        kind, *details = identity
        if kind == "module":  # the legacy format keeps a class together with its source code
            return details[0]
        if kind != "storage" or self.storage is None or not isinstance(details[0], torch.dtype):
            raise CheckpointError(f"it refers to {kind!r}, which a checkpoint file does not hold")
        return self.storage(*details)


def load_pickle(path: str | os.PathLike[str]) -> object:
    """Read what ``torch.save`` (zip and legacy format) or ``pickle.dump`` wrote, running no code from the file.

    Tensors come on the CPU and numpy arrays as arrays; objects of unknown classes are `Inert`.

    Raises:
        UnsafeCheckpoint: the file asks to call a function that is not among the few that data need.
        CheckpointError: the file is damaged, or holds something that cannot be read safely.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return _load(file)
        except UnsafeCheckpoint as error:
            raise UnsafeCheckpoint(f"{path} asks {error}; refused, nothing of it was run") from None
        except Exception as error:  # damaged or hostile bytes can raise anything
            reason = str(error) or type(error).__name__
            raise CheckpointError(f"{path} cannot be read as a pickled checkpoint: {reason}") from error


def _load(file: IO[bytes]) -> object:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return _load_stream(file)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        return _load_zip(archive)


def _load_zip(archive: zipfile.ZipFile) -> object:
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("it is a zip archive without the data.pkl of a torch checkpoint")
    root = roots[0]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise CheckpointError("its contents are compressed, which torch.save never does")
    big_endian = f"{root}byteorder" in entries and archive.read(f"{root}byteorder") == b"big"
    loaded: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, location: str, numel: int) -> Tensor:
        if key not in loaded:
            entry = entries[f"{root}data/{key}"]
            flat = torch.empty(entry.file_size // dtype.itemsize, dtype=dtype)
            with archive.open(entry) as stream:
                _fill(flat, stream)
            if big_endian != (sys.byteorder == "big"):
                flat.untyped_storage().byteswap(dtype)
            loaded[key] = flat
        return loaded[key].view(dtype)

    with archive.open(f"{root}data.pkl") as stream:
        return _Reader(stream, storage).load()


def _load_stream(file: IO[bytes]) -> object:
    first = _Reader(file).load()
    if type(first) is not int or first != _LEGACY_MAGIC:
        return first
    for _ in ("protocol version", "system"):
        _Reader(file).load()
    space = os.fstat(file.fileno()).st_size
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, location: str, numel: int, view: tuple[str, int, int] | None) -> Tensor:
        nonlocal space
        if key not in storages:
            space -= numel * dtype.itemsize
            if numel < 0 or space < 0:
                raise CheckpointError("it is shorter than its tensors, so it was cut off or damaged")
            storages[key] = torch.empty(numel, dtype=dtype)
        flat = storages[key].view(dtype)
        return flat if view is None else flat.narrow(0, view[1], view[2])

    # The tensors come first, as views of storages whose bytes follow.
    content = _Reader(file, storage).load()
    for key in _Reader(file).load():
        flat = storages[key]
        if int.from_bytes(file.read(8), "little") != flat.numel():
            raise CheckpointError("its tensors have another size than it says")
        _fill(flat, file)
    return content


def _fill(flat: Tensor, stream: IO[bytes]) -> None:
    space = memoryview(flat.view(torch.uint8).numpy().data)
    done = 0
    while done < len(space):
        count = stream.readinto(space[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError("it ends in the middle of a tensor, so it was cut off or damaged")
        done += count
