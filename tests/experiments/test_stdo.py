"""The experiment of STDO: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.experiments import stdo
from convatlas.networks.wdsr import WDSRConfig
from convatlas.report import Images, Report, Table
from convatlas.restoration.video_chunks import PatchGrid
from data.clips import write_clip
from restoration.scenes import scene


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def _table(report: Report) -> dict[Any, Any]:
    table = next(part for section in report.sections for part in section.parts if isinstance(part, Table))
    return {row[0]: row for row in table.rows}


def test_quick_runs(monkeypatch: pytest.MonkeyPatch):
    small = {"SEEDS": (0, 1), "FRAMES": 4, "SIZE": (32, 48), "GRID": PatchGrid(2, 2), "GENERAL_EPOCHS": 1, "EPOCHS": 1}
    for name, value in small.items():
        monkeypatch.setattr(stdo, name, value)
    monkeypatch.setattr(stdo, "SMALL", WDSRConfig(dim=2, depth=1, expansion=1))
    monkeypatch.setattr(stdo, "LARGE", WDSRConfig(dim=4, depth=1, expansion=1))
    report = stdo.run("quick")
    rows = _table(report)
    pairs = [("STDO", "one network"), ("STDO", "by time"), ("STDO", "general"), ("JSTDO", "uniform")]
    for claim, (first, second) in zip(report.claims, pairs, strict=True):
        assert claim.values == pytest.approx([rows[first][4 + n] - rows[second][4 + n] for n in range(2)])
    assert [rows[name][1] for name in ("bicubic", "one network", "by time", "STDO", "JSTDO")] == [0, 1, 3, 3, 1]
    small_bytes, large_bytes = rows["STDO"][3], rows["one network"][3]
    assert small_bytes == 3 * rows["JSTDO"][3]
    assert large_bytes == 2 * rows["one network"][2] / 1000
    images = [part for section in report.sections for part in section.parts if isinstance(part, Images)]
    assert all(pixels.std() > 10 for part in images for pixels, _ in part.images)


def test_the_large_network_has_no_more_bytes_than_three_small_ones():
    sizes = [sum(parameter.numel() for parameter in config.build().parameters()) for config in (stdo.SMALL, stdo.LARGE)]
    assert 0.95 * 3 * sizes[0] < sizes[1] <= 3 * sizes[0]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given PSNR."""

    def report(**psnr: float) -> Report:
        usual = {"bicubic": 20.0, "general": 25.0, "one network": 30.0, "by time": 30.0, "uniform": 28.0}
        values = {
            **usual,
            "STDO": 31.0,
            "JSTDO": 28.5,
            **{name.replace("_", " "): value for name, value in psnr.items()},
        }
        shown = {name: np.zeros((64, 96, 3), np.uint8) for name in (*values, "truth")}
        fitted = stdo._Fitted(values, shown, torch.arange(9.0), {})
        monkeypatch.setattr(stdo, "_fit_all", lambda seed, advance: fitted)
        return stdo.quick()

    return report


@pytest.mark.parametrize(
    ("psnr", "verdicts"),
    [
        ({}, "yyyy"),
        ({"one_network": 30.95}, "nyyy"),
        ({"by_time": 30.95}, "ynyy"),
        ({"general": 30.8}, "yyny"),
        ({"JSTDO": 27.9}, "yyyn"),
        ({"STDO": 24.0}, "nnny"),
    ],
)
def test_verdicts_follow_from_the_numbers(measured: Callable[..., Report], psnr: dict[str, float], verdicts: str):
    names = {"y": "holds", "n": "does not hold"}
    assert [claim.verdict for claim in measured(**psnr).claims] == [names[letter] for letter in verdicts]


def test_full_trains_by_every_recipe(tmp_path: Path):
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", [scene(number, (48, 48)) for number in range(2)], sound=None)
    changes = {"options": {"dim": 2, "depth": 1}, "grid": [2, 2], "epochs": 1, "batch_size": 4}
    once = {"general_epochs": 0, "start": "scratch", "chunks": 1, "segment_seconds": None}
    small = {**changes, **once, "plain_crfs": []}
    report = stdo.full(clip, tmp_path / "runs", **small)
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale"] * 2
    rows = _table(report)
    assert report.claims[0].values[0] == pytest.approx(rows["STDO"][1] - rows["NAS"][1])
    assert (tmp_path / "runs" / "JSTDO" / "package" / "networks.safetensors").is_file()


def test_what_is_missing_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        stdo.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        stdo.run("full", data=tmp_path)
