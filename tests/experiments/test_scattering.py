"""The experiment of scattering: it runs in small, and its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convatlas.experiments import scattering
from convatlas.report import Report, Table


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    small = {
        "SEEDS": (0, 1),
        "SIGNALS": 2,
        "LENGTH": 64,
        "LABELS": (50, 100),
        "TESTED": 300,
        "POOLINGS": ("none", "max"),
    }
    for name, value in small.items():
        monkeypatch.setattr(scattering, name, value)


def _tables(report: Report) -> dict[str, Table]:
    return {part.title: part for section in report.sections for part in section.parts if isinstance(part, Table)}


def test_quick_runs() -> None:
    report = scattering.run("quick")
    verdicts = {claim.statement: claim.verdict for claim in report.claims}
    assert len(verdicts) == 8
    # What the theory proves, at any scale; and what digits say even with two seeds.
    for start in ("They change no more", "Features move no", "Features are no further", "If the test images"):
        assert [verdict for statement, verdict in verdicts.items() if statement.startswith(start)] == ["holds"]
    rows = _tables(report)["Accuracy on the test images"].rows
    assert [row[0] for row in rows] == [
        f"{kind}, {how}" for how in ("as they are", "shifted") for kind in ("raw pixels", "scattering")
    ]
    assert all(20 < float(value or 0) < 100 for row in rows for value in row[1:])
    assert "What a layer of shearlets" in report.to_html()


def test_increases_are_seen() -> None:
    assert scattering._increases({1: [[3.0, 2.0, 1.0], [3.0, 1.0, 2.5]], 4: [[3.0, 2.5, 0.5]] * 2}) == [-0.5, 1.5]


def test_full_runs_on_other_images_and_says_so(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("test", 6)):
        labels = np.arange(count) % 2
        images = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[labels == 1, 8:20, 8:20] += 150
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(tmp_path / "squares.npz", **arrays)
    report = scattering.run("full", data=tmp_path / "squares.npz")
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale"]
    table = _tables(report)["Error on the test images"]
    assert [row[0] for row in table.rows] == ["modulus", "relu", "tanh", "sigmoid"]
    assert all(0 <= float(value or 0) <= 50 for row in table.rows for value in row[1:])


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        scattering.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget 'full' needs data, got None"):
        scattering.run("full")
