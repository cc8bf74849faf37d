"""The experiment of FFDNN: its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.data.series import write_series
from convatlas.data.wheat_seasons import simulate_wheat_season
from convatlas.experiments import ffdnn
from convatlas.experiments.ffdnn import _Result
from convatlas.report import Lines, Table

UNKNOWN = "cannot be told at this scale"


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {"SEEDS": (0, 1), "PIXELS": 36, "FIELDS": 12, "EPOCHS": 1}.items():
        monkeypatch.setattr(ffdnn, name, value)
    report = ffdnn.run("quick")
    assert len(report.claims) == 5
    assert report.claims[0].verdict == "does not hold"
    [table] = [part for part in report.sections[0].parts if isinstance(part, Table)]
    parameters = {str(row[0]): row[1] for row in table.rows}
    plain, own = int(parameters["CNN, indices"] or 0), int(parameters["FFDNN, indices"] or 0)
    assert 0.9 < plain / own < 1.1
    assert parameters["forest, bands"] is None
    [curves] = [part for part in report.sections[1].parts if isinstance(part, Lines)]
    assert set(curves.series) == {"healthy", "nitrogen deficiency", "yellow rust"}
    assert "FFDNN" in report.to_html()


@pytest.mark.parametrize(
    ("accuracies", "verdicts"),
    [
        ((90.0, 84.0, 88.0, 85.0), ["holds", "holds", "holds", "holds"]),
        ((84.0, 88.0, 80.0, 90.0), ["does not hold"] * 4),
        ((90.0, 90.0, 87.0, 90.0), ["holds", UNKNOWN, UNKNOWN, "holds"]),
    ],
)
def test_verdicts_follow_the_accuracies(accuracies: tuple[float, ...], verdicts: list[str]) -> None:
    names = ("FFDNN, indices", "FFDNN, bands", "FFDNN, medium frequencies", "CNN, indices")
    results = {
        name: [_Result(100.0, value + wobble * (name == names[0]), 0.01, 10) for wobble in (-0.5, 0.5, 0.0)]
        for name, value in zip(names, accuracies, strict=True)
    }
    claims = [part for part in ffdnn._accuracy_parts(results) if hasattr(part, "verdict")]
    assert [claim.verdict for claim in claims] == verdicts
    assert ffdnn._importance_claims([60.0, 49.0, 44.0])[0].verdict == "holds"
    assert ffdnn._importance_claims([55.0, 49.0, 44.0])[0].verdict == "does not hold"


def test_full_trains_by_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    write_series(simulate_wheat_season(36, 0, fields=12).series, tmp_path / "pixels.csv")
    options = {"widths": [4, 4], "capsule_dim": 4, "class_dim": 4}
    report = ffdnn.full(tmp_path / "pixels.csv", tmp_path / "runs", epochs=1, options=options, accelerator="cpu")
    assert [claim.verdict for claim in report.claims] == [UNKNOWN]
    assert (tmp_path / "runs" / "ffdnn" / "report.html").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        ffdnn.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        ffdnn.run("full", data=tmp_path)
