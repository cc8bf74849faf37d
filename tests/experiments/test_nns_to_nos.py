"""The experiment on neural operators at a tiny scale, and its full form on files of the published names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from convatlas.experiments import nns_to_nos
from convatlas.training.settings import Training


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(nns_to_nos, "GRID", 16)
    monkeypatch.setattr(nns_to_nos, "GRIDS", (8, 16, 32))
    monkeypatch.setattr(nns_to_nos, "FINEST", 32)
    monkeypatch.setattr(nns_to_nos, "PAIRS", 12)
    monkeypatch.setattr(nns_to_nos, "TESTS", 4)
    monkeypatch.setattr(nns_to_nos, "SEEDS", (0, 1))
    monkeypatch.setattr(
        nns_to_nos, "FNO", dataclasses.replace(nns_to_nos.FNO, n_modes=4, dim=4, depth=1, resolution=16)
    )
    unet = dataclasses.replace(nns_to_nos.UNET, dim=4, kernel_size=3, resolution=16)
    monkeypatch.setattr(nns_to_nos, "UNET", unet)
    monkeypatch.setattr(nns_to_nos, "TRAINING", Training(epochs=1, batch_size=6, warmup_epochs=0))
    sweep = nns_to_nos.layer_sweep
    monkeypatch.setattr(nns_to_nos, "layer_sweep", lambda grids, points: sweep((8, 16, 32), points=(64, 256)))


def test_quick_runs():
    report = nns_to_nos.run("quick")
    flat, grows, smaller, *layers = report.claims
    for claim in (flat, grows, smaller):
        assert claim.verdict == "cannot be told at this scale"  # nothing has been learned
        assert len(claim.values) == 2
    assert len(layers) == 8
    table = next(part for part in report.sections[0].parts if hasattr(part, "rows"))
    errors = {row[0]: row[1:] for row in table.rows}
    # All forms of the U-Net are one network on the grid of the training.
    assert len({round(float(errors[name][1]), 4) for name in nns_to_nos.NAMES[1:]}) == 1


def test_verdicts_follow_the_errors():
    flat, steep = [{16: 11.0, 32: 10.0, 64: 12.0}], [{16: 20.0, 32: 10.0, 64: 40.0}]
    errors = {"FNO": flat, "U-Net": steep, "U-Net, kernels interpolated": flat}
    assert [claim.verdict for claim in nns_to_nos._claims(errors, 1, 32)] == ["holds"] * 3
    errors = {"FNO": steep, "U-Net": flat, "U-Net, kernels interpolated": flat}
    assert [claim.verdict for claim in nns_to_nos._claims(errors, 1, 32)] == ["does not hold"] * 3
    assert nns_to_nos._claims(errors, 1, 32, scale_ok=False)[0].verdict == "cannot be told at this scale"


def test_full_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nns_to_nos, "BASE", 16)
    data = tmp_path / "files"
    data.mkdir()
    for grid, part, count in ((16, "train", 6), (16, "test", 2), (32, "test", 2)):
        x = torch.randn(count, grid, grid)
        torch.save({"x": x, "y": x.roll(1, -1)}, data / f"nsforcing_{grid}_{part}.pt")
    split = nns_to_nos.split_settings
    options = {
        "fno_navier_stokes": {"n_modes": 4, "dim": 4},
        "modern_unet_navier_stokes": {"dim": 4, "dim_mults": [1, 2]},
    }
    monkeypatch.setattr(
        nns_to_nos,
        "split_settings",
        lambda cls, values: split(cls, {**values, "options": options[values["model"]], "val_fraction": 0.5}),
    )
    report = nns_to_nos.full(data, tmp_path / "runs", epochs=1, batch_size=4)
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale"] * 3
    table = next(part for part in report.sections[0].parts if hasattr(part, "rows"))
    assert [row[0] for row in table.rows] == ["FNO", "U-Net", "U-Net, kernels interpolated"]
    assert table.rows[1][1] == pytest.approx(table.rows[2][1])
    assert table.rows[1][2] != table.rows[2][2]


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="budget"):
        nns_to_nos.run("half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs data and folder"):
        nns_to_nos.run("full")
    with pytest.raises(ValueError, match="must hold nsforcing"):
        nns_to_nos.full(tmp_path, tmp_path)
