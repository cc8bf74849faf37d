"""One small trained run that the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from convatlas.report import Report
from convatlas.restoration import comparison
from convatlas.restoration.super_resolution import SuperResolution
from convatlas.training.settings import Training
from restoration.scenes import SHORT, TINY, write_scenes


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(comparison, "_FRAME", (12, 16))  # what is timed


class Trained(NamedTuple):
    data: Path
    run: Path
    task: SuperResolution
    report: Report


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run on a folder of eight images and one file that is none."""
    root = tmp_path_factory.mktemp("trained")
    data = write_scenes(root / "data")
    (data / "broken.png").write_text("no picture")
    before = os.environ.get("CONVATLAS_PROGRESS")
    os.environ["CONVATLAS_PROGRESS"] = "0"
    try:
        task = SuperResolution(data=str(data), model="espcn_x2", options=TINY, patch_size=9, patch_stride=6)
        report = task.fit(root / "run", Training(**SHORT))
    finally:
        os.environ.pop("CONVATLAS_PROGRESS") if before is None else os.environ.update(CONVATLAS_PROGRESS=before)
    return Trained(data, root / "run", task, report)
