"""The experiment of ESPCN: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.experiments import espcn
from convatlas.networks.espcn import ESPCNConfig
from convatlas.report import Images, Report, Table
from convatlas.restoration import comparison
from convatlas.restoration.evaluation import ClipQuality, Measured
from convatlas.restoration.protocol import Quality
from restoration.scenes import write_scenes

UNKNOWN = "cannot be told at this scale"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _table(report: Report, title: str) -> Table:
    return next(
        part for section in report.sections for part in section.parts if isinstance(part, Table) and part.title == title
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espcn, "SEEDS", (0, 1))
    monkeypatch.setattr(espcn, "STEPS", 50)
    monkeypatch.setattr(espcn, "NETWORK", ESPCNConfig(scale=3, channels=8))
    monkeypatch.setattr(espcn, "TRAINED", ("camera",))
    monkeypatch.setattr(espcn, "UNSEEN", ("rocket",))
    monkeypatch.setattr(espcn, "STRIDE", 40)
    monkeypatch.setattr(espcn, "CLIP_FRAMES", 2)
    monkeypatch.setattr(espcn, "CLIP_SIZE", (33, 36))
    monkeypatch.setattr(espcn, "TIMED_SIZE", (9, 12))
    monkeypatch.setattr(espcn, "TIMED_PAIRS", 2)


@pytest.mark.usefixtures("small")
def test_quick_runs():
    report = espcn.run("quick")
    assert len(report.claims) == 5
    table = _table(report, "PSNR of luma")
    assert [row[:2] for row in table.rows] == [("camera", "learned from"), ("rocket", "never seen")]
    gains = [(float(row[3] or 0) - float(row[2] or 0)) for row in table.rows]
    for claim, gain in zip(report.claims, gains, strict=False):
        assert len(claim.values) == 2
        assert sum(claim.values) / 2 == pytest.approx(gain)
    cost = {row[0]: row for row in _table(report, "Cost").rows}
    assert [cost[name][2] for name in ("espcn_x3", "srcnn_915_x3", "srcnn_955_x3")] == [2514, 8032, 57184]
    assert cost["espcn_x3"][4] == 1
    images = [part for section in report.sections for part in section.parts if isinstance(part, Images)]
    assert all(pixels.std() > 10 for part in images for pixels, _ in part.images)
    assert "rocket" in report.to_html()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given gains and times."""

    def report(
        trained: float = 0.5, unseen: float = 0.1, clip: float = 0.1, times: tuple[float, float] = (6, 20)
    ) -> Report:
        square = np.zeros((4, 4, 3), np.uint8)

        def train(*_: object) -> Any:
            qualities = dict.fromkeys(espcn.TRAINED, trained) | dict.fromkeys(espcn.UNSEEN, unseen)
            images = {
                name: Measured(name, (4, 4), Quality(30 + gain, 0.9), Quality(30, 0.9), (square,) * 3)
                for name, gain in qualities.items()
            }
            frames = ClipQuality((30 + clip,) * 2, (30,) * 2, 1.0, (square,) * 3)
            return espcn._Trained([1.0] * espcn.STEPS, images, frames)

        monkeypatch.setattr(espcn, "_train", train)
        taken = dict(zip(espcn.SPEEDUPS, ([time] * 2 for time in times), strict=True))
        monkeypatch.setattr(espcn, "_times", lambda advance: {"espcn_x3": [1.0, 1.0], **taken})
        return espcn.run("quick")

    return report


@pytest.mark.usefixtures("small")
def test_verdicts_follow_from_the_numbers(measured: Callable[..., Report]):
    assert _verdicts(measured()) == ["holds"] * 5
    assert _verdicts(measured(trained=0.29))[0] == "does not hold"
    assert _verdicts(measured(unseen=-0.01))[1] == "does not hold"
    assert _verdicts(measured(clip=-0.01))[2] == "does not hold"
    assert _verdicts(measured(times=(4.9, 9.9)))[3:] == ["does not hold"] * 2


def test_full_trains_both_networks_by_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "_FRAME", (12, 16))
    for split, count in (("train", 3), ("test", 2)):
        write_scenes(tmp_path / "data" / split, count)
    report = espcn.full(tmp_path / "data", tmp_path / "runs", epochs=1, batch_size=8, options={}, patch_stride=20)
    assert _verdicts(report) == [UNKNOWN] * 2
    assert [row[0] for row in _table(report, "PSNR of luma").rows] == ["bicubic", *espcn.FULL_MODELS]
    for model in espcn.FULL_MODELS:
        assert (tmp_path / "runs" / model / "report.html").is_file()


def test_budget_is_checked(tmp_path: Path):
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        espcn.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        espcn.run("full", data=tmp_path)
