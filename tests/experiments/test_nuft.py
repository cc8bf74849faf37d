"""The experiment of the simplex Fourier transform: shapes are drawn rightly, it runs in small, its verdicts follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from convatlas.data.images import read_images
from convatlas.experiments import nuft
from convatlas.report import Report, Table

UNKNOWN = "cannot be told at this scale"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    training = dataclasses.replace(nuft.TRAINING, epochs=1, warmup_epochs=0)
    small = {
        "SEEDS": (0, 1),
        "RESOLUTIONS": (8, 12),
        "COUNTS": (12, 8),
        "TRAINING": training,
        "STEPS": 5,
        "CORNERS": 10,
    }
    full = {"FULL_RESOLUTIONS": (8, 28), "FULL_TRAINING": training}
    for name, value in {**small, **full, "SIDE": 16}.items():
        monkeypatch.setattr(nuft, name, value)


def _tables(report: Report) -> dict[str, Table]:
    return {part.title: part for section in report.sections for part in section.parts if isinstance(part, Table)}


def test_quick_runs() -> None:
    report = nuft.run("quick")
    verdicts = [claim.verdict for claim in report.claims]
    assert verdicts == [UNKNOWN, UNKNOWN, "does not hold", "holds", "holds"]  # five steps are too few
    rows = _tables(report)["Accuracy on the test shapes"].rows
    assert [row[0] for row in rows] == ["8 x 8, binary", "8 x 8, exact", "12 x 12, binary", "12 x 12, exact"]
    along, turned = _tables(report)["Errors in float64"].rows
    assert along[3] > 100 > 10 > turned[3]
    assert "Rasters" in report.to_html()


def test_both_rasters_show_the_same_digit() -> None:
    images = read_images("digits")["all"]
    random = np.random.default_rng(0)
    shapes = [nuft._jittered(images, index, random) for index in (0, 6, 8, 3)]
    exact, binary = nuft._exact(shapes, 24), nuft._binary(shapes, 24)
    assert exact.shape == binary.shape == (4, 1, 24, 24)
    assert [len(nuft._loops(*shape)) for shape in shapes[:2]] == [2, 1]  # the hole of the zero
    for ours, theirs in zip(exact, binary, strict=True):
        correlation = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]
        assert correlation > 0.8
        assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=0.02)


def test_the_networks_are_those_of_the_paper() -> None:
    assert nuft._network(28)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert nuft._network(28)[8].in_features == 320
    assert nuft._network(8)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_full_runs_on_other_images_and_says_so(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 6), ("test", 4)):
        images = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[:, 8:20, 8:20] += 150
        arrays |= {f"{split}_images": images, f"{split}_labels": np.arange(count) % 2}
    np.savez(tmp_path / "squares.npz", **arrays)
    report = nuft.run("full", data=tmp_path / "squares.npz")
    assert [claim.verdict for claim in report.claims] == [UNKNOWN, UNKNOWN]


def test_budget_is_checked() -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        nuft.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget 'full' needs data, got None"):
        nuft.run("full")
