"""Forecasting: what it learns and writes, how sequences are divided, how settings and data can be bad."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.data.simulators.flow_frames import flow_frames
from convatlas.data.simulators.navier_stokes import navier_stokes
from convatlas.errors import DataError, Unsupported
from convatlas.physics.field_forecasting import FieldForecasting
from convatlas.training.settings import Training
from convatlas.training.task import open_task

SMALL: dict[str, Any] = {"test_steps": 3, "train_steps": 2, "options": {"modes": 3, "width": 4, "depth": 1}}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def wave(frames: int, *grid: int) -> np.ndarray:
    """A standing wave, whose acceleration is a multiple of what it is: (T, *grid)."""
    places = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in grid], indexing="ij")
    shape = np.prod([np.cos(np.pi * place) for place in places], axis=0)
    return np.cos(0.4 * np.arange(frames)).reshape(-1, *[1] * len(grid)) * shape


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "wave.npz", x=wave(60, 8, 6))
    return tmp_path / "wave.npz"


def test_a_run_learns_and_can_be_opened(data: Path, tmp_path: Path):
    settings = {**SMALL, "options": {"modes": 2, "width": 4, "depth": 1, "init": "fan_in"}}
    task = FieldForecasting(data=str(data), **settings)
    training = Training(epochs=15, batch_size=8, lr=0.05, warmup_epochs=0, weight_decay=0.0)
    task.fit(tmp_path / "run", training)
    assert [len(task.splits[name][0]) for name in ("train", "val", "test")] == [42, 9, 9]
    opened = open_task(tmp_path / "run")
    assert isinstance(opened, FieldForecasting)
    report = opened.evaluate(folder=tmp_path / "evaluation")
    with (tmp_path / "evaluation" / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) == {"step", "relative L2", "sMAPE", "MAE", "N-MSE", "PSNR [dB]"}
    # With no acceleration at all the first step is off by 0.16 of the field, and the third by six times as much.
    assert float(rows[-1]["relative L2"]) < 0.3
    assert (tmp_path / "run" / "errors.csv").read_text() == (tmp_path / "evaluation" / "errors.csv").read_text()
    assert "after 3" in report.summary
    mean = sum(float(row["relative L2"]) for row in rows) / 3
    assert opened.quality() == {"relative L2": pytest.approx(mean, rel=1e-4)}
    np.savez(tmp_path / "new.npz", x=wave(10, 8, 6)[:7])
    opened.predict([tmp_path / "new.npz"], tmp_path / "out")
    forecast = np.load(tmp_path / "out" / "new_forecast.npz")["y"]
    truth = wave(10, 8, 6)[7:, None]
    assert forecast.shape == truth.shape
    assert np.linalg.norm(forecast - truth) < 0.4 * np.linalg.norm(truth)
    assert "data:image" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("order", [0, 1])
def test_other_orders_axes_and_many_sequences(tmp_path: Path, order: Any):
    for number in range(5):
        np.savez(tmp_path / f"{number}.npz", x=np.stack([wave(9, 7), wave(9, 7)], 1) + number)
    task = FieldForecasting(data=str(tmp_path), dims=1, order=order, context=1, normalise=False, **SMALL)
    task.prepare()
    assert {name: len(parts) for name, parts in task.splits.items()} == {"train": 3, "val": 1, "test": 1}
    batch = {"frames": task.train_set[0]["frames"][None].expand(2, -1, -1, -1)}
    task.losses(batch)["loss"].backward()
    assert all(each.grad is not None for each in task.network.parameters())
    start, outputs, truth = task.measure(task.splits["test"])
    assert start.shape[1:] == (2, 7)
    assert outputs.shape == truth.shape == (2, 3, 2, 7)
    # Untrained, T1 answers nothing.
    expected = np.zeros_like(truth) if order == 0 else np.broadcast_to(start[:, None], truth.shape)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_simulated_flows_go_on_as_the_pairs_do():
    frames = flow_frames(2, 3, 32, 4)
    assert frames.shape == (2, 3, 1, 32, 32)
    pairs = navier_stokes(2, 32, 4, time=1.0)
    np.testing.assert_allclose(frames[:, 0], pairs.x)
    assert np.abs(frames[:, 2] - pairs.y).max() < 1e-2 * np.abs(pairs.y).max()
    np.testing.assert_allclose(flow_frames(2, 1, 64, 4)[:, 0, :, ::2, ::2], frames[:, 0])


def test_bad_settings_and_data(data: Path, tmp_path: Path):
    for settings, message in (
        ({"order": 3}, "order must be 0, 1 or 2, got 3"),
        ({"context": 1}, "context must be at least 2 with order 2, got 1"),
        ({"train_steps": 0}, "train_steps must be at least 1, got 0"),
        ({"resolution": 3}, "resolution must be at least 4, got 3"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"options": {"dims": 1}}, "options must not hold dims"),
    ):
        with pytest.raises(ValueError, match=message):
            FieldForecasting(**settings)
    with pytest.raises(Unsupported, match="espcn_x3 is not a network that maps fields to fields"):
        FieldForecasting(model="espcn_x3")
    with pytest.raises(DataError, match="needs 12 frames in a row, its longest has 9"):
        FieldForecasting(data=str(data), **{**SMALL, "test_steps": 10}).prepare()
    folder = tmp_path / "mixed"
    folder.mkdir()
    np.savez(folder / "a.npz", x=wave(9, 8, 6))
    np.savez(folder / "b.npz", x=wave(9, 8, 7))
    with pytest.raises(DataError, match="must have the same grid and channels"):
        FieldForecasting(data=str(folder), **SMALL).prepare()
    task = FieldForecasting(data=str(data), **SMALL)
    task.prepare()
    np.savez(tmp_path / "short.npz", x=wave(1, 8, 6))
    with pytest.raises(DataError, match="must have 2 frames of 1 channels at least, got 1 of 1"):
        task.predict([tmp_path / "short.npz"], tmp_path / "out")
