"""The command itself: its verbs, its exit codes, its one line of error, and how fast it answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

import convatlas
from cli.conftest import Run
from convatlas.cli import main as module
from convatlas.cli.main import VERBS, main
from convatlas.errors import Interrupted, MissingExtra

ROOT = Path(module.__file__).parent


def verb_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(argv: list[str]) -> int:
        raise error

    fake = types.ModuleType("convatlas.cli.list")
    fake.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "convatlas.cli.list", fake)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(run: Run, words: list[str]):
    ended = run(*words)
    assert ended.code == 0
    assert ended.err == ""
    assert all(f"  {verb} " in ended.out for verb in VERBS)


def test_every_verb_has_its_file_and_its_help(run: Run):
    helpers = {"__init__", "main", "parser"}
    assert {path.stem for path in ROOT.glob("*.py")} - helpers == set(VERBS)
    for verb in VERBS:
        ended = run(verb, "--help")
        assert ended.code == 0
        assert ended.out.startswith(f"usage: convatlas {verb} ")
        assert ended.err == ""


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(run: Run, word: str):
    assert run(word).out == f"convatlas {convatlas.__version__}\n"


def test_an_unknown_verb_offers_the_nearest(run: Run):
    ended = run("trian", "recognition")
    assert ended == (2, "", "convatlas: error: unknown verb 'trian': did you mean train or pretrain?\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("the size must be 3,\n got 4"), 1, "the size must be 3, got 4"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "a.txt: No such file"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError("told in words"), 1, "told in words"),
        (MissingExtra("reading HDF5 needs the package h5py: pip install 'convatlas[hdf5]'"), 1, "reading HDF5 needs"),
        (MemoryError(), 1, "MemoryError"),
        (Interrupted("stopped; go on with --resume x", 143), 143, "stopped; go on with --resume x"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RuntimeError("shapes\ndiffer"), 1, "RuntimeError: shapes differ (CONVATLAS_TRACEBACK=1 shows where)"),
        (KeyError("x"), 1, "KeyError: 'x' (CONVATLAS_TRACEBACK=1 shows where)"),
    ],
)
def test_every_error_is_one_line_and_a_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
):
    verb_that_raises(monkeypatch, error)
    ended = run("list")
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.startswith(f"convatlas list: error: {line}")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("x"), ValueError("x")])
def test_a_developer_can_ask_for_the_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception):
    verb_that_raises(monkeypatch, error)
    monkeypatch.setenv("CONVATLAS_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["list"])


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["list"], ["show", "inceptionnext"], ["--help"], ["train", "--help"], ["list", "--json"]]
)
def test_looking_things_up_is_quick_and_imports_no_torch(words: list[str]):
    code = (
        "import sys; from convatlas.cli.main import main; code = main(sys.argv[1:]);"
        "sys.stderr.write(' '.join(name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules));"
        "sys.exit(code)"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = python(code, *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (ended.returncode, ended.stderr) == (0, "")
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5  # processor time: other work on this machine does not count


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m convatlas.cli.main list | head -n 1; echo ${{PIPESTATUS[0]}} >&2"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == "0"
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.slow
def test_the_installed_command_is_this_one():
    command = Path(sys.executable).with_name("convatlas")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    ended = subprocess.run([command, "show", "inceptionet"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("convatlas show: error: unknown system 'inceptionet': did you mean inceptionnext")


@pytest.mark.slow
def test_using_a_run_imports_no_lightning(finished: Path, pictures: Path, tmp_path: Path):
    code = (
        "import sys; from convatlas.cli.main import main;"
        f"codes = [main(['evaluate', {str(finished)!r}, '--json', '--out', 'e']),"
        f" main(['predict', {str(finished)!r}, {str(pictures / 'cat')!r}, '--json', '--out', 'p'])];"
        "sys.stderr.write(str(codes) + str([name for name in ('lightning', 'torchmetrics') if name in sys.modules]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert ended.stderr == "[0, 0][]"
    first, second = ended.stdout.splitlines()
    assert json.loads(first)["title"] == "Evaluation of inceptionnext_atto"
    assert json.loads(second)["title"] == "Predictions of inceptionnext_atto"
