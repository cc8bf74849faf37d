"""The experiment on wavelets in the discriminator, at a scale that only shows that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from convatlas.data.phantoms import phantom
from convatlas.experiments import disgan


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "SEEDS": (5, 6),
        "SIDE": 16,
        "PATCH": 8,
        "TRAIN": 2,
        "TEST": 1,
        "FIRST": 10,
        "STEPS": 4,
    }.items():
        monkeypatch.setattr(disgan, name, value)
    monkeypatch.setattr(disgan, "GENERATOR", {"filters": 3, "num_blocks": 1})
    monkeypatch.setattr(disgan, "DISCRIMINATOR", {"levels": 2, "filters": 3})
    report = disgan.run("quick")
    assert [claim.seeds for claim in report.claims] == [2] * 5
    assert [claim.verdict for claim in report.claims][1:] == ["cannot be told at this scale"] * 4
    kinds = [part["kind"] for section in json.loads(report.to_json())["sections"] for part in section["parts"]]
    assert {"images", "lines", "table"} <= set(kinds)
    assert len(report.to_html()) > 10_000


@pytest.mark.slow
def test_full_test_trains_the_three_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            np.save(tmp_path / "data" / split / f"{number}.npy", phantom(8, np.random.default_rng(number)))
    small = {
        "options": {"filters": 3, "num_blocks": 1},
        "patch_size": 8,
        "patch_stride": 8,
        "patches": {"tile": 4, "overlap": 1},
        "epochs": 1,
        "methods": {"adversarial": {"discriminator_options": {"levels": 2, "filters": 3}}},
        "foreground": 0.0,
    }
    report = disgan.full(tmp_path / "data", tmp_path / "runs", **small)
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale"] * 3
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["disgan", "disgan_l1", "disgan_plain"]


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        disgan.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        disgan.run("slow")  # type: ignore[arg-type]
