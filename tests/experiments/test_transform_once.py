"""The experiment on Transform Once, at a scale that only shows that it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from convatlas.experiments import transform_once
from convatlas.networks.registry import model_config


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(transform_once, "SEEDS", (5,))
    monkeypatch.setattr(transform_once, "SAMPLES", 6)
    monkeypatch.setattr(transform_once, "HELD_OUT", 2)
    monkeypatch.setattr(
        transform_once, "TRAINING", dataclasses.replace(transform_once.TRAINING, epochs=1, batch_size=2)
    )
    problems = (transform_once.PROBLEMS[0], transform_once.PROBLEMS[1]._replace(simulate=_planes))
    monkeypatch.setattr(transform_once, "PROBLEMS", problems)
    monkeypatch.setattr(transform_once, "NETWORK", {"width": 4, "depth": 1})
    for name, value in {"WIDTH": 8, "POINTS": 32, "MODES": 8, "DEPTH": 2, "FIELDS": 2}.items():
        monkeypatch.setattr(transform_once, name, value)
    report = transform_once.run("quick")
    assert len(report.claims) == 7
    verdicts = {claim.statement: claim.verdict for claim in report.claims}
    assert verdicts["T1 is as accurate as an FNO of its width on Burgers, 64"] == "cannot be told at this scale"
    assert verdicts["A variance-preserving spectral convolution keeps the variance of a white field"] == "holds"
    assert len(report.to_html()) > 10_000


def _planes(samples: int, resolution: int, seed: int) -> transform_once.FieldPairs:
    pairs = transform_once.burgers(samples, resolution, seed)
    return transform_once.FieldPairs(*(field[..., None].repeat(resolution, -1) for field in (pairs.x, pairs.y)))


def test_full_test_trains_by_the_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    changes = {"data": "poisson", "samples": 6, "resolution": 16, "epochs": 1, "batch_size": 4}
    report = transform_once.full(tmp_path, options={"modes": 4, "width": 3, "depth": 1}, **changes)
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale"] * 2
    assert all((tmp_path / recipe / "report.html").is_file() for recipe in transform_once.RECIPES.values())


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs a folder, got None"):
        transform_once.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        transform_once.run("slow")  # type: ignore[arg-type]
    assert all(model_config(model) for model in transform_once.MODELS.values())
