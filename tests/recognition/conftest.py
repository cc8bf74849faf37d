"""One small trained run that the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from convatlas.recognition.task import Recognition
from convatlas.report import Report
from recognition.pictures import TINY, short, write_pictures


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


class Trained(NamedTuple):
    data: Path
    run: Path
    task: Recognition
    report: Report


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run on a folder of three classes in which three files are no pictures."""
    root = tmp_path_factory.mktemp("trained")
    data = write_pictures(root / "data")
    (data / "cat" / "text.png").write_text("hello")
    whole = (data / "dog" / "00.png").read_bytes()
    (data / "dog" / "half.png").write_bytes(whole[: len(whole) // 2])
    (data / "hen" / "notes.txt").write_text("no picture")
    before = os.environ.get("CONVATLAS_PROGRESS")
    os.environ["CONVATLAS_PROGRESS"] = "0"
    try:
        task = Recognition(data=str(data), options=TINY)
        report = task.fit(root / "run", short(epochs=6))
    finally:
        os.environ.pop("CONVATLAS_PROGRESS") if before is None else os.environ.update(CONVATLAS_PROGRESS=before)
    return Trained(data, root / "run", task, report)
