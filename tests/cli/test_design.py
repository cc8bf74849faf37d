"""``convatlas design``: from budgets to a network that ``convatlas train`` takes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cli.conftest import Run
from convatlas.catalog import DESIGNS, resolve
from convatlas.cli.main import main
from convatlas.design.deepmad import ArchitectureSearch
from convatlas.design.study import DesignStudy
from convatlas.networks.deepmad import make_structure, save_structure
from recognition.pictures import arrays

BUDGETS = ["--params=1e6", "--flops=1e8", "--image_size=32", "--rho=1"]


def test_methods_are_searches():
    for name, target in DESIGNS.items():
        cls = resolve(target)
        assert issubclass(cls, DesignStudy)
        assert cls.name == name


def test_a_design_ends_in_a_network_that_trains(run: Run, tmp_path: Path):
    ended = run("design", "deepmad", *BUDGETS, "--candidates=50", "--out", tmp_path / "mine")
    assert (ended.code, ended.err) == (0, "")
    train = tmp_path / "mine" / "train.yaml"
    assert ended.out.splitlines()[-2:] == [
        f"report: {tmp_path / 'mine' / 'report.html'}",
        f"train it: convatlas train recognition --config {train} --data FOLDER",
    ]
    images, labels = arrays(45)
    np.savez(tmp_path / "photos.npz", images=images, labels=labels)
    words = ["--data", tmp_path / "photos.npz", "--epochs=1", "--warmup_epochs=0", "--run", tmp_path / "run"]
    ended = run("train", "recognition", "--config", train, *words)
    assert ended.code == 0, ended.err
    structure = yaml.safe_load(train.read_text())["options"]["structure"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["options"]["structure"] == structure
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").is_file()
    assert run("evaluate", tmp_path / "run").code == 0


def test_the_configuration_of_a_search_runs_it_again(run: Run, tmp_path: Path):
    assert run("design", "deepmad", *BUDGETS, "--candidates=300", "--out", tmp_path / "first").code == 0
    ended = run("design", "deepmad", "--config", tmp_path / "first" / "config.yaml", "--out", tmp_path / "second")
    assert ended.code == 0, ended.err
    for name in ("state.json", "structure.txt", "config.yaml"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    ended = run("design", "deepmad", *BUDGETS, "--candidates=300", "--json")
    assert json.loads(ended.out)["title"] == "A network designed by DeepMAD"
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("design-deepmad-")


def test_a_structure_file_is_scored(run: Run, tmp_path: Path):
    structure = make_structure("SuperResK1KXK1", 8, ((16, 3, 2, 1, 8), (32, 3, 2, 1, 8)))
    save_structure(structure, tmp_path / "mine.txt")
    ended = run("design", "deepmad", "--score", tmp_path / "mine.txt", "--image_size=64", "--out", tmp_path / "scores")
    assert (ended.code, ended.err) == (0, "")
    assert "Scores of mine.txt" in ended.out
    assert (tmp_path / "scores" / "report.html").is_file()
    ended = run("design", "deepmad", "--score", tmp_path / "mine.txt", "--json")
    assert json.loads(ended.out)["title"] == "Scores of mine.txt"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "name a method first: convatlas design deepmad"),
        ("deepmat", 1, "unknown method 'deepmat': did you mean deepmad?"),
        ("deepmad", 1, "give a budget: flops, params or like"),
        ("deepmad --parms 5e6", 2, "unknown setting 'parms': did you mean params"),
        ("deepmad --params many", 2, "params must be a number or null, got many"),
        ("deepmad --resume here --params 5e6", 2, "--resume takes no other settings, got --params 5e6"),
        ("deepmad --resume here", 1, "here holds no search: it has no config.yaml"),
        ("deepmad --score none.txt", 1, "none.txt: No such file or directory"),
        ("deepmad --design as_vit --params 5e6", 2, "these are settings of the method as_vit, not of deepmad"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: str, code: int, message: str):
    ended = run("design", *words.split())
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.startswith(f"convatlas design: error: {message}")
    assert ended.err.count("\n") == 1


def stopped_at(step: int, number: int, words: list[str]) -> int:
    """The exit code of a command in a process of its own that gets a signal at a step; negative for a kill."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    original, steps = ArchitectureSearch.step, []

    def stopping(search: ArchitectureSearch, state: dict[str, Any]) -> dict[str, Any]:
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return original(search, state)

    ArchitectureSearch.step = stopping  # type: ignore[method-assign]
    code = 99
    try:
        code = main(words)
    finally:
        os._exit(code)


@pytest.mark.slow
def test_a_search_that_is_killed_and_stopped_ends_as_one_that_never_was(run: Run, tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ["design", "deepmad", *BUDGETS, "--candidates=24000", "--population=64", "--out"]
    ended = run(*command, whole)
    assert ended.code == 0, ended.err
    assert stopped_at(2, signal.SIGKILL, [*command, str(stopped)]) == -signal.SIGKILL
    assert stopped_at(2, signal.SIGINT, ["design", "deepmad", "--resume", str(stopped)]) == 130
    assert 0 < json.loads((stopped / "state.json").read_text())["trace"][-1][0] < 24000
    ended = run("design", "deepmad", "--resume", stopped)
    assert ended.code == 0, ended.err
    for name in ("state.json", "structure.txt", "config.yaml"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
