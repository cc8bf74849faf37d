"""Files of every format, and what is no checkpoint."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convatlas.errors import CheckpointError, MissingExtra
from convatlas.weights.checkpoint import find_parts, read_checkpoint


def test_formats_are_told_from_the_content(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    arrays = {key: value.numpy() for key, value in state.items()}
    save_file(state, tmp_path / "0.bin", metadata={"note": "x"})
    torch.save(state, tmp_path / "1.safetensors")
    torch.save(state, tmp_path / "2.pkl", _use_new_zipfile_serialization=False)
    (tmp_path / "3.pth").write_bytes(pickle.dumps(arrays))
    (tmp_path / "4.bin").write_bytes(pickle.dumps(arrays, protocol=0))
    with open(tmp_path / "5.pt", "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    with open(tmp_path / "6.h5", "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    for path in sorted(tmp_path.iterdir()):
        parts = read_checkpoint(path).parts
        assert list(parts) == [""], path
        assert all(torch.equal(parts[""][key], value) for key, value in state.items()), path
    assert read_checkpoint(tmp_path / "0.bin").metadata == {"note": "x"}


def test_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["conv3d/conv3d/kernel:0"] = np.arange(6, dtype=np.float32).reshape(1, 6)
        file["conv3d/conv3d/names"] = "text"
        file["optimizer_weights/adam/m"] = np.zeros(3)
        file.attrs["backend"] = "tensorflow"
    checkpoint = read_checkpoint(tmp_path / "model.h5")
    assert list(checkpoint.parts[""]) == ["conv3d.conv3d.kernel:0"]
    assert checkpoint.parts[""]["conv3d.conv3d.kernel:0"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert checkpoint.metadata == {"backend": "tensorflow"}


def test_hdf5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        MissingExtra, match=r"reading x\.h5 \(HDF5\) needs the package h5py: pip install 'convatlas\[hdf5"
    ):
        read_checkpoint(tmp_path / "x.h5")


def test_metadata_and_content_of_a_pickle(tmp_path: Path) -> None:
    content = {"net": {"w": torch.ones(1)}, "epoch": 90, "arch": "resnet", "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "x.pth")
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    assert checkpoint.metadata == {"epoch": "90", "arch": "resnet"}
    assert checkpoint.content["args"].contents() == {"lr": 0.1}  # type: ignore[index]
    assert checkpoint.source == str(tmp_path / "x.pth")


def test_arrays_of_objects_in_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="allow_pickle=False"):
        read_checkpoint(tmp_path / "x.npz")


def _scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its tracer is old
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), str(path))  # type: ignore[no-untyped-call]


def _written(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def _cut(save: Callable[[Path], Any], share: float) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

    return write


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder; give the checkpoint file"),
    "empty": (_written(b""), "is empty"),
    "text": (_written(b"hello, this is a readme\n" * 100), "is a text file, not a checkpoint"),
    "umlauts": (_written("grüße\n".encode() * 1000), "is a text file, not a checkpoint"),
    "json": (_written(b'{"weight_map": {}}'), "is a text file, not a checkpoint"),
    "noise": (_written(bytes(range(255, 0, -1)) * 4), "is of no known format, not a checkpoint"),
    "lfs": (
        _written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "is a Git LFS pointer, not the file itself: download the real file",
    ),
    "web page": (_written(b"\n<!DOCTYPE html><html>sign in</html>"), "is a web page, not a checkpoint"),
    "gzip": (_written(b"\x1f\x8b\x08\x00" + bytes(20)), "is compressed with gzip: unpack it first"),
    "tar": (_written(bytes(257) + b"ustar" + bytes(600)), "is a tar archive: unpack it"),
    "torchscript": (_scripted, r"is a TorchScript archive.* torch\.save\(torch\.jit\.load\(path\)\.state_dict"),
    "cut zip": (_cut(lambda path: torch.save({"a": torch.zeros(99)}, path), 0.6), "zip archive that was cut off"),
    "cut legacy": (
        _cut(lambda path: torch.save({"a": torch.zeros(99)}, path, _use_new_zipfile_serialization=False), 0.8),
        "it ends in the middle of a tensor|it is shorter than its tensors",
    ),
    "cut safetensors": (
        _cut(lambda path: save_file({"a": torch.zeros(99)}, path), 0.6),
        "is no whole safetensors file",
    ),
    "huge header": (
        _written((2**40).to_bytes(8, "little") + b'{"a":1}' * 9),
        "is cut off: its header should have 1099",
    ),
    "bad header": (_written((9).to_bytes(8, "little") + b'{"a":nope}'), "is no whole safetensors file"),
    "other zip": (_written(b"PK\x05\x06" + bytes(18)), "is a zip archive without a checkpoint"),
    "cut hdf5": (_written(b"\x89HDF\r\n\x1a\n" + bytes(50)), "cannot be read|is damaged"),
    "one tensor": (lambda path: torch.save(torch.ones(3), path), "holds no weights"),
    "only numbers": (lambda path: torch.save({"epoch": 3, "name": "x"}, path), "holds no weights"),
    "pickled text": (_written(pickle.dumps("hello")), "holds no weights"),
    "broken pickle": (_written(b"\x80\x04garbage"), "cannot be read as a pickled checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_clear_error(name: str, tmp_path: Path) -> None:
    if name == "cut hdf5":
        pytest.importorskip("h5py")
    write, message = BAD[name]
    write(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / "x.pth")
    assert "x.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1)}, path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_checkpoint(path)


def test_whole_pickled_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2)))
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    torch.save({"model": module, "epoch": 1}, tmp_path / "x.pt")
    part = read_checkpoint(tmp_path / "x.pt").parts["model"]
    assert {key: value.shape for key, value in part.items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert all(torch.equal(value, part[key]) for key, value in module.state_dict().items())


def test_parts_of_nested_containers() -> None:
    weights = {"w": torch.ones(2), "b": np.zeros(3)}
    content: dict[Any, Any] = {
        "model": weights,
        "again": weights,
        "nets": [{"w": torch.ones(1)}, {"w": torch.ones(2)}],
        "mixed": {"w": torch.ones(1), "x": 1, "y": 2},
        "optimizer": {"m": torch.zeros(1)},
        "router_optimizer": {"m": torch.zeros(1)},
        "lr_schedulers": [{"m": torch.zeros(1)}],
        b"old": {b"w": torch.ones(1)},
        3: {"w": torch.ones(1)},
    }
    content["loop"] = content
    parts = find_parts(content)
    assert list(parts) == ["model", "again", "nets.0", "nets.1", "old", "3"]
    assert parts["model"] is parts["again"]
    assert parts["model"]["b"].dtype == torch.float64
    assert list(parts["old"]) == ["w"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_that_are_no_plain_tensors() -> None:
    found = find_parts(
        {
            "sparse": torch.eye(3).to_sparse(),
            "quantized": torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.5, 0, torch.qint8),
            "parameter": nn.Parameter(torch.ones(2)),
            "big_endian": np.arange(3, dtype=">i4"),
            "zero_dim": np.array(1.5),
            "meta": torch.ones(2, device="meta"),
            "text": np.array(["x"]),
        }
    )[""]
    assert torch.equal(found["sparse"], torch.eye(3))
    assert found["quantized"].tolist() == [0.5, 1.0]
    assert not found["parameter"].requires_grad
    assert found["big_endian"].tolist() == [0, 1, 2]
    assert found["zero_dim"].item() == 1.5
    assert "meta" not in found
    assert "text" not in found
