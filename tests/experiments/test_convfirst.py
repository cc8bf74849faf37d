"""The experiment of ConvFirst: its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convatlas.analysis.waterline import Machine
from convatlas.experiments import convfirst
from convatlas.report import Report, Table

UNKNOWN = "cannot be told at this scale"


def table(report: Report, title: str) -> Table:
    return next(
        part for section in report.sections for part in section.parts if isinstance(part, Table) and part.title == title
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(convfirst, "measure_machine", lambda *_: Machine(1e15, 1e13, "a fast machine"))
    monkeypatch.setattr(convfirst, "SEEDS", (0, 1))
    monkeypatch.setattr(convfirst, "EQUAL", convfirst.EQUAL[2:])
    monkeypatch.setattr(convfirst, "TILES", ((3, 4),))
    monkeypatch.setattr(convfirst, "CPU_SIZES", ((8, 9),))
    monkeypatch.setattr(convfirst, "PAIRS", 3)


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convfirst, "SIDE", 32)
    monkeypatch.setattr(convfirst, "MODELS", ("mobilenet_v2", "convnext_tiny", "convfirst_tiny"))
    report = convfirst.run("quick")
    assert len(report.claims) == 7
    equality, depthwise, gain, faster, below, speed, memory = report.claims
    assert equality.verdict == depthwise.verdict == below.verdict == "holds"
    assert len(equality.values) == 2
    assert gain.values[0] > 1
    assert faster.values[0] > 1
    assert len(speed.values) == 2
    assert memory.values[0] > 0
    assert [row[1] for row in table(report, "Depthwise layers").rows] == [18, 17]
    efficiencies = [row[3] for row in table(report, "Single blocks").rows]
    assert efficiencies == pytest.approx([0.487, 0.444, 0.304, 0.913, 0.681], abs=1e-3)
    fused = [row[4] for row in table(report, "Single blocks").rows]
    assert fused == pytest.approx([291.8, 399.6, 273.8, 1275.9, 408.1], abs=0.1)
    assert [row[2] for row in table(report, "How often an expanded feature is computed, kernel of 3").rows][1] == 1.5625
    assert report.to_html().count("<svg") >= 4


def test_verdicts_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio, spread, verdict in ((1.2, 0.1, "holds"), (0.9, 0.1, "does not hold"), (1.2, 0.9, UNKNOWN)):
        timing = convfirst._Timing(1.0, 1.0, ratio, spread)
        monkeypatch.setattr(convfirst, "_alternate", lambda *_, timing=timing: timing)
        section = convfirst._on_this_machine(lambda _: None)
        claims = Report("x", "", [section]).claims
        assert claims[1].verdict == verdict


def test_full_trains_and_times(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convfirst, "RESOLUTION", 6)
    monkeypatch.setattr(convfirst, "CHANNELS", 8)
    monkeypatch.setattr(convfirst, "DEPTH", 1)
    changes: dict[str, Any] = {
        "epochs": 1,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "batch_size": 8,
        "accumulate": 1,
        "image_size": 32,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
        "accelerator": "cpu",
    }
    report = convfirst.full(pictures, tmp_path, **changes)
    assert [claim.verdict for claim in report.claims] == [UNKNOWN]
    gap = table(report, "Efficiency gap").rows
    assert [row[0] for row in gap] == ["convfirst_small", "convnext_tiny"]
    assert all(float(row[4] or 0) > 0 for row in gap)
    assert [row[0] for row in table(report, "Stacks").rows] == ["ConvFirst", "MBConv", "ConvNeXt"]
    assert all(float(row[3] or 0) > 0 for row in table(report, "Stacks").rows)
    assert "<svg" in report.to_html()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        convfirst.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs data and folder, got None and"):
        convfirst.run("full", folder=tmp_path)
