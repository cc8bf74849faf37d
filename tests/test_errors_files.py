"""Errors that help, and files that are never half written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import convatlas
from convatlas import errors
from convatlas.errors import MissingExtra, require, unknown
from convatlas.files import atomic_path, write_bytes, write_text

SOURCE = Path(convatlas.__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("resnet5", ["resnet50", "vgg"], "unknown model 'resnet5': did you mean resnet50?"),
        ("resnet19", ["resnet10", "resnet18"], "unknown model 'resnet19': did you mean resnet18 or resnet10?"),
        ("xyz", ["b", "a"], "unknown model 'xyz': known: a, b"),
        (
            "xyz",
            [f"net{i:02}" for i in range(13)],
            "unknown model 'xyz': there are 13 known names, from net00 to net12",
        ),
    ],
)
def test_unknown_names_offer_the_nearest(name: str, known: list[str], message: str):
    assert str(unknown("model", name, known)) == message


def test_errors_for_bad_input_are_value_errors_and_missing_packages_import_errors():
    for name in ("UnknownName", "Unsupported", "DataError", "CheckpointError", "UnsafeCheckpoint"):
        assert issubclass(getattr(errors, name), ValueError)
    assert issubclass(errors.UnsafeCheckpoint, errors.CheckpointError)
    assert issubclass(MissingExtra, ImportError)
    assert errors.Interrupted("stopped", 130).exit_code == 130


def test_require_names_the_extra_that_is_missing():
    assert require("json", extra="none", purpose="reading") is sys.modules["json"]
    with pytest.raises(
        MissingExtra, match=r"reading HDF5 needs the package absent_one: pip install 'convatlas\[hdf5\]'"
    ):
        require("absent_one.part", extra="hdf5", purpose="reading HDF5")


def test_require_does_not_hide_what_an_installed_package_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_one.py").write_text("import absent_two")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_two") as caught:
        require("broken_one", extra="x", purpose="y")
    assert not isinstance(caught.value, MissingExtra)


def test_writing_makes_folders_and_leaves_one_file_with_the_usual_rights(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "note.txt"
    write_text(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    write_bytes(path, b"again")
    assert path.read_bytes() == b"again"
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "state.bin"
    write_bytes(path, b"old")

    def half() -> None:
        with atomic_path(path) as part:
            part.write_bytes(b"ne")
            assert path.read_bytes() == b"old"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "state.bin"
    write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_bytes(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "state.bin"
    write_bytes(path, b"old")
    code = f"""
import os, signal
from convatlas.files import atomic_path
with atomic_path({str(path)!r}) as part:
    part.write_bytes(b"new, but not all of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_a_path_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "below.txt", "x")


def test_an_error_of_the_disk_names_the_file_and_not_its_temporary_name(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_path(tmp_path / "a.txt") as part:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
    assert caught.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(OSError, match="in words"), atomic_path(tmp_path / "a.txt"):
        raise OSError("in words")
    assert list(tmp_path.iterdir()) == []
