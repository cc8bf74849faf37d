"""Pickled checkpoints are read exactly, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convatlas.errors import CheckpointError, UnsafeCheckpoint
from convatlas.weights.safe_pickle import Inert, load_pickle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Reduced:
    """Pickles as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def write(content: Any, path: Path, form: str) -> Path:
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def in_module(name: str, build: Callable[[], Any], content_of: Callable[[Any], bytes]) -> bytes:
    """Pickle something of a module that exists only meanwhile."""
    module = types.ModuleType(name)
    made = build()
    made.__module__, made.__qualname__ = name, made.__name__
    setattr(module, made.__name__, made)
    sys.modules[name] = module
    try:
        return content_of(made)
    finally:
        del sys.modules[name]


FORMS = ("zip", "legacy", "bare")


def attacks(marker: Path) -> dict[str, Any]:
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Reduced(os.system, (command,)),
        "subprocess": Reduced(subprocess.call, (["touch", str(marker)],)),
        "popen": Reduced(subprocess.Popen, (["touch", str(marker)],)),
        "eval": Reduced(eval, (f"__import__('os').system({command!r})",)),
        "exec": Reduced(exec, (code,)),
        "getattr": Reduced(getattr, ("text", "upper")),
        "import": Reduced(__import__, ("os",)),
        "open": Reduced(open, (str(marker), "w")),
        "partial": Reduced(functools.partial, (os.system, command)),
        "partial_alone": Reduced(functools.partial, (print, command)),
        "pickle": Reduced(pickle.loads, (pickle.dumps(Reduced(os.system, (command,))),)),
        "torch.load": Reduced(torch.load, (str(marker),)),
        "torch.hub": Reduced(torch.hub.load, ("owner/name", "entry")),
        "numpy": Reduced(np.load, (str(marker), None, True)),
        "state": Reduced(collections.OrderedDict, (), {"x": Reduced(os.system, (command,))}),
        "setstate": Reduced(argparse.Namespace, (), Reduced(os.system, (command,))),
        "items": Reduced(dict, (), None, None, iter([("a", Reduced(os.system, (command,)))])),
    }


NAMES = sorted(attacks(Path("marker")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_run(name: str, form: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack = attacks(marker)[name]
    path = write({"state_dict": {"weight": torch.ones(2)}, "epoch": attack}, tmp_path / "evil.pth", form)
    with pytest.raises(UnsafeCheckpoint, match=r"asks to call [\w.]+; refused, nothing of it was run"):
        load_pickle(path)
    assert not marker.exists()


def test_the_attack_is_real(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(attacks(marker)["os.system"]))
    assert marker.exists()


def test_the_refused_name_is_said(tmp_path: Path) -> None:
    path = write(Reduced(os.system, ("true",)), tmp_path / "evil.pth", "zip")
    with pytest.raises(UnsafeCheckpoint, match=r"evil\.pth asks to call (posix|nt)\.system; refused"):
        load_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_refused(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Reduced(os.system, (f"touch {tmp_path / 'marker'}",)), protocol=protocol))
    with pytest.raises(UnsafeCheckpoint, match="system"):
        load_pickle(path)
    assert not (tmp_path / "marker").exists()


RAW = {
    "python 2 name": b"c__builtin__\neval\n(V1\ntR.",
    "commands of python 2": b"ccommands\ngetoutput\n(Vid\ntR.",
    "inst": b"(Vtrue\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nVtrue\no.",
    "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93.",
    "dotted in a module": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "change a class": b"ccollections\nOrderedDict\n(N}Vkeys\nI1\nstb.",
    "change an inert class": b"csomeproject\nThing\n(N}Vkeys\nI1\nstb.",
    "change a reader function": b"ctorch._utils\n_rebuild_parameter\n(N}Vx\nI1\nstb.",
    "codec": b"c_codecs\nencode\n(Vx\nVzip\ntR.",
}


@pytest.mark.parametrize("name", RAW)
def test_hand_written_programs_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(RAW[name])
    with pytest.raises(UnsafeCheckpoint, match="nothing of it was run"):
        load_pickle(path)


HARMLESS_ERRORS = {
    "unknown persistent id": b"Psecret\n.",
    "no such object": b"\x80\x02h\x05.",
    "stops early": b"\x80\x02}q\x00X\x05",
    "call of data": b"I1\n(tR.",
    "claims gigabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"abc.",
    "claims gigabytes of text": b"\x80\x04\x8d" + struct.pack("<Q", 2**36) + b"abc.",
    "memo of gigabytes": b"\x80\x04]r\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", HARMLESS_ERRORS)
def test_nonsense_is_one_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(HARMLESS_ERRORS[name])
    with pytest.raises(CheckpointError, match=r"bad\.pkl cannot be read as a pickled checkpoint"):
        load_pickle(path)


def test_calls_of_inert_classes_do_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def build() -> Any:
        def start(*_: Any) -> int:
            marker.touch()
            return 1

        return start

    data = in_module("someproject", build, lambda made: pickle.dumps({"a": Reduced(made, (1, 2)), "b": 5}))
    (tmp_path / "x.pkl").write_bytes(data)
    content: Any = load_pickle(tmp_path / "x.pkl")
    assert content["b"] == 5
    assert isinstance(content["a"], Inert)
    assert content["a"].pickled_name == "someproject.start"
    assert content["a"].arguments == (1, 2)
    assert not marker.exists()


def test_packages_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"cantigravity_like_package.sub\nThing\n(tR.")
    content = load_pickle(tmp_path / "x.pkl")
    assert isinstance(content, Inert)
    assert not any(name.startswith("antigravity_like_package") for name in sys.modules)


def settings() -> dict[str, Any]:
    return {
        "args": argparse.Namespace(lr=0.1, model="tiny", when=datetime.date(2024, 1, 2)),
        "folder": pathlib.PurePosixPath("runs/1"),
        "log": collections.deque([1.5, 2.5]),
        "counts": collections.Counter("aab"),
        "lists": collections.defaultdict(list, {"a": [1]}),
        "numbers": {1, 2},
        "loss": np.float32(0.25),
        "flag": np.bool_(True),
        "kind": np.int64,
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "version": torch.__version__,
        "name": np.str_("résumé"),
        "bytes": b"\x00\xff",
    }


@pytest.mark.parametrize("form", FORMS)
def test_settings_become_data_or_inert(form: str, tmp_path: Path) -> None:
    content: Any = load_pickle(write(settings(), tmp_path / "x.pth", form))
    assert content["args"].contents()["lr"] == 0.1
    assert isinstance(content["args"].contents()["when"], Inert)
    assert content["folder"].arguments[-1] == "1" or content["folder"].arguments
    assert content["log"].values == [1.5, 2.5]
    assert content["counts"] == {"a": 2, "b": 1}
    assert content["lists"] == {"a": [1]}
    assert content["numbers"] == {1, 2}
    assert content["loss"] == np.float32(0.25)
    assert content["flag"] == np.bool_(True)
    assert content["size"] == (2, 3)
    assert content["dtype"] is torch.bfloat16
    assert content["name"] == "résumé"
    assert content["bytes"] == b"\x00\xff"


TENSORS = {
    "float32": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "float64": torch.linspace(0, 1, 5, dtype=torch.float64),
    "float16": torch.arange(4).half(),
    "bfloat16": torch.arange(4).bfloat16(),
    "complex64": torch.tensor([1 + 2j, 3 - 4j]),
    "int64": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "uint8": torch.arange(3, dtype=torch.uint8),
    "uint16": torch.arange(3).to(torch.uint16),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "slice": torch.arange(10.0)[3:7:2],
    "expanded": torch.ones(1).expand(4),
    "channels_last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative": torch.tensor([1 + 2j]).conj().imag,
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_tensors_are_exact(form: str, tmp_path: Path) -> None:
    content: Any = load_pickle(write(TENSORS, tmp_path / "x.pth", form))
    for name, expected in TENSORS.items():
        if form == "legacy" and name in ("conjugate", "negative"):
            continue  # torch itself reads the bytes after the conjugation here
        assert content[name].dtype == expected.dtype, name
        assert torch.equal(content[name], expected), name
        if name != "negative":
            assert content[name].stride() == expected.stride(), name


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_shared_tensors_stay_shared(form: str, tmp_path: Path) -> None:
    base = torch.arange(4.0)
    content: Any = load_pickle(write({"all": base, "half": base[2:]}, tmp_path / "x.pth", form))
    content["all"][2] = 9
    assert content["half"].tolist() == [9.0, 3.0]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_parameters_and_modules(form: str, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    parameter = nn.Parameter(torch.ones(3))
    parameter.note = "kept by some trainers"  # type: ignore[attr-defined]
    content: Any = load_pickle(write({"module": module, "parameter": parameter}, tmp_path / "x.pth", form))
    assert torch.equal(content["parameter"], torch.ones(3))
    assert isinstance(content["module"], Inert)
    first = content["module"].contents()["_modules"]["0"]
    assert torch.equal(first.contents()["_parameters"]["weight"], module[0].weight)


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "big_endian": np.arange(3, dtype=">f8"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "complex": np.array([1 + 2j]),
    "int8": np.arange(-2, 2, dtype=np.int8),
    "bool": np.array([True, False]),
    "text": np.array(["ab", "cde"]),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 2)),
    "objects": np.array([None, "x", 3], dtype=object),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_exact(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(ARRAYS, protocol=protocol))
    content: Any = load_pickle(tmp_path / "x.pkl")
    for name, expected in ARRAYS.items():
        assert content[name].dtype.newbyteorder("=") == expected.dtype.newbyteorder("="), name
        assert np.array_equal(content[name], expected), name


def test_old_numpy_names_are_read(tmp_path: Path) -> None:
    data = pickle.dumps(ARRAYS["float32"], protocol=2)
    (tmp_path / "x.pkl").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert np.array_equal(load_pickle(tmp_path / "x.pkl"), ARRAYS["float32"])  # type: ignore[arg-type]


def numpy_program(shape: tuple[int, ...], kind: str, flags: int, data: Any) -> bytes:
    """What numpy writes for an array, with chosen contents."""
    core = np.arange(2).__reduce__()[0]
    dtype = Reduced(np.dtype, (kind, False, True), (3, "|", None, None, None, -1, -1, flags))
    return pickle.dumps(Reduced(core, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data)), protocol=2)


@pytest.mark.parametrize(
    ("shape", "kind", "flags", "data"),
    [
        ((4,), "O8", 0, b"\x00" * 32),  # bytes taken for addresses of objects
        ((1000,), "O8", 63, [1, 2]),
        ((1000,), "f4", 0, b"\x00" * 8),
        ((-1,), "f4", 0, b""),
        ((2,), "V8", 63, b"\x00" * 16),
        ((2**40,), "f4", 0, b""),
    ],
)
def test_lying_arrays_are_refused(shape: tuple[int, ...], kind: str, flags: int, data: Any, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(numpy_program(shape, kind, flags, data))
    with pytest.raises(CheckpointError, match="numpy array"):
        load_pickle(tmp_path / "x.pkl")


def test_tensors_cannot_be_changed_after_they_were_checked(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    remake, arguments = tensor.__reduce_ex__(2)[:2]
    path = write({"w": Reduced(remake, arguments, (tensor, 0, (1000,), (1,)))}, tmp_path / "x.pth", "zip")
    with pytest.raises(UnsafeCheckpoint, match="asks to change a Tensor"):
        load_pickle(path)


def edited_zip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    source = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_tensor_out_of_its_storage(tmp_path: Path) -> None:
    path = write({"w": torch.arange(4.0)}, tmp_path / "x.pth", "zip")
    edited_zip(path, lambda name, data: data[:8] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="out of bounds"):
        load_pickle(path)


def test_big_endian_storage(tmp_path: Path) -> None:
    path = write({"w": torch.arange(4.0)}, tmp_path / "x.pth", "zip")
    swapped = np.arange(4, dtype=">f4").tobytes()
    replaced = {"byteorder": b"big", "data/0": swapped}
    edited_zip(path, lambda name, data: replaced.get(name.split("/", 1)[1], data))
    content: Any = load_pickle(path)
    assert content["w"].tolist() == [0, 1, 2, 3]


def test_compressed_zip_is_refused(tmp_path: Path) -> None:
    path = write({"w": torch.zeros(1000)}, tmp_path / "x.pth", "zip")
    edited_zip(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        load_pickle(path)


def test_zip_without_a_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(CheckpointError, match=r"without the data\.pkl"):
        load_pickle(tmp_path / "x.zip")


@pytest.mark.parametrize("form", FORMS)
def test_cut_off_files(form: str, tmp_path: Path) -> None:
    content = {"w": torch.arange(1000.0) if form != "bare" else np.arange(1000.0)}
    path = write(content, tmp_path / "x.pth", form)
    whole = path.read_bytes()
    for share in (0.1, 0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="cannot be read as a pickled checkpoint"):
            load_pickle(path)


def test_legacy_file_that_claims_gigabytes(tmp_path: Path) -> None:
    path = write({"w": torch.zeros(0x1234)}, tmp_path / "x.pth", "legacy")
    huge = path.read_bytes().replace(b"M" + struct.pack("<H", 0x1234), b"J" + struct.pack("<i", 2**31 - 1))
    path.write_bytes(huge)
    with pytest.raises(CheckpointError, match="shorter than its tensors"):
        load_pickle(path)


def test_inert_objects_as_keys(tmp_path: Path) -> None:
    def build() -> Any:
        return type("Key", (), {"__hash__": lambda self: 1})

    data = in_module("someproject", build, lambda made: pickle.dumps({made(): 1, "b": {made()}}))
    (tmp_path / "x.pkl").write_bytes(data)
    content: Any = load_pickle(tmp_path / "x.pkl")
    assert next(iter(content.values())) == 1
    assert repr(next(iter(content))) == "<inert someproject.Key>"


def test_subclasses_of_containers(tmp_path: Path) -> None:
    """Configurations of mmcv, easydict and yacs are dictionaries with a class of their own."""

    def build() -> Any:
        return type("ConfigDict", (dict,), {})

    data = in_module("mmcvlike", build, lambda made: pickle.dumps({"cfg": made(lr=1), "old": made(a=2)}, protocol=2))
    (tmp_path / "x.pkl").write_bytes(data)
    content: Any = load_pickle(tmp_path / "x.pkl")
    assert content["cfg"].contents() == {"lr": 1}
    data = in_module("mmcvlike", build, lambda made: pickle.dumps(made(lr=1), protocol=1))
    (tmp_path / "x.pkl").write_bytes(data)
    old: Any = load_pickle(tmp_path / "x.pkl")
    assert old.contents() == {"lr": 1}


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "none.pth")
