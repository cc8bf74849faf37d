"""Running verbs in this process, and a trained run that they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from convatlas.cli.main import main
from recognition.pictures import SHORT, TINY, write_pictures


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)  # what a verb writes without being told where goes below the current folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command; words that are no text are made so."""

    def call(*words: object) -> Ended:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capfd.readouterr())

    return call


def training_words(data: Path, folder: Path, **settings: object) -> list[str]:
    given = {"data": data, "run": folder, "options": str(TINY).replace("None", "null"), **SHORT, **settings}
    return ["train", "recognition", *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(scope="session")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        torch.set_num_threads(1)  # sums have another order on more
        assert main(training_words(pictures, folder)) == 0
    return folder
