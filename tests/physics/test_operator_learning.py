"""Operator learning: what it learns and writes, several resolutions, files, and how settings can be bad."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.physics import operator_learning
from convatlas.physics.operator_learning import OperatorLearning
from convatlas.training.settings import Training
from convatlas.training.task import open_task

SHORT: dict[str, Any] = {"epochs": 12, "batch_size": 4, "lr": 0.1, "warmup_epochs": 0, "weight_decay": 0.0}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(FieldNetworkConfig):
    """A convolution; in the space of cosines, halved, if ``halved``."""

    halved: bool = False

    def build(self) -> Toy:
        return Toy(self)


class Toy(FieldNetwork):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[config.dims - 1]
        self.conv = kind(config.in_channels, config.out_channels, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self.as_answer(self.conv(x))

    def as_answer(self, field: Tensor) -> Tensor:
        return field / 2 if self.config.halved else field

    def as_field(self, answer: Tensor, grid: Any) -> Tensor:
        return answer * 2 if self.config.halved else answer


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    real = operator_learning.model_config
    table = {"toy": ToyConfig(), "halved": ToyConfig(halved=True)}
    monkeypatch.setattr(
        operator_learning,
        "model_config",
        lambda name, **options: table[name].override(**options) if name in table else real(name, **options),
    )


def pairs(samples: int, *grid: int, channels: int = 1) -> dict[str, np.ndarray]:
    """A shift by one point and a factor, which the toy can learn."""
    x = np.random.default_rng(samples).standard_normal((samples, channels, *grid)) + 5
    return {"x": x, "y": 3 * np.roll(x[:, :1], 1, -1) - 7}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "small.npz", **pairs(30, 8, 8))
    np.savez(folder / "large.npz", **pairs(20, 16, 16))
    return folder


@pytest.mark.parametrize(("model", "normalise"), [("toy", "both"), ("halved", "both"), ("toy", "inputs")])
def test_a_run_learns_and_can_be_opened(data: Path, tmp_path: Path, model: str, normalise: Any):
    task = OperatorLearning(data=str(data), model=model, normalise=normalise)
    report = task.fit(tmp_path / "run", Training(**SHORT))
    assert "held out" in report.summary
    with (tmp_path / "run" / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["grid"] for row in rows} == {"8 x 8", "16 x 16"}
    assert len(rows) == 6 + 4
    found = float(np.mean([float(row["relative L2"]) for row in rows]))
    assert found < 0.3
    again = open_task(tmp_path / "run")
    assert again.quality()["relative L2"] == pytest.approx(found, rel=1e-4)
    assert {part.title for section in report.sections for part in section.parts if hasattr(part, "title")} >= {
        "Relative L2 error",
        "Error against resolution",
        "Input, truth, forecast and error on 8 x 8",
    }


def test_files_are_forecast(data: Path, tmp_path: Path):
    task = OperatorLearning(data=str(data), model="toy")
    task.fit(tmp_path / "run", Training(**SHORT))
    known = pairs(3, 12, 12)
    np.savez(tmp_path / "known.npz", **known)
    np.savez(tmp_path / "new.npz", x=known["x"])
    report = open_task(tmp_path / "run").predict([tmp_path / "known.npz", tmp_path / "new.npz"], tmp_path / "out")
    with (
        np.load(tmp_path / "out" / "new_output.npz") as written,
        np.load(tmp_path / "out" / "known_output.npz") as same,
    ):
        error = float(np.linalg.norm(written["y"] - known["y"]) / np.linalg.norm(known["y"]))
        assert error < 0.2
        np.testing.assert_array_equal(written["y"], same["y"])
    rows = json.loads(report.to_json())["sections"][0]["parts"][0]["rows"]
    assert rows[0][4] == pytest.approx(error, rel=0.1)
    assert rows[1][4] is None
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    np.savez(tmp_path / "two.npz", x=pairs(2, 12, 12, channels=2)["x"])
    with pytest.raises(DataError, match="2 channels, but the network takes 1"):
        open_task(tmp_path / "run").predict([tmp_path / "two.npz"], tmp_path / "more")


def test_published_tensors_are_read(tmp_path: Path):
    torch.save({name: torch.from_numpy(array[:, 0]) for name, array in pairs(20, 8, 8).items()}, tmp_path / "f.pt")
    task = OperatorLearning(data=str(tmp_path / "f.pt"), model="toy")
    task.prepare()
    assert [len(task.splits[name][0]) for name in ("train", "val", "test")] == [14, 2, 4]
    assert task.splits["train"][0].x.shape[1:] == (1, 8, 8)


def test_simulators_train_on_several_resolutions():
    task = OperatorLearning(data="burgers", samples=20, resolution=[16, 32], model="toy")
    task.prepare()
    assert [(len(part), part.grid) for part in task.splits["train"]] == [(7, (16,)), (7, (32,))]
    assert [part.grid for part in task.splits["test"]] == [(16,)]
    assert [part.grid for part in task.other_resolutions()] == [(8,), (32,)]
    half, double = task.other_resolutions()
    np.testing.assert_allclose(double.x[..., ::4], half.x, atol=1e-12)
    batch = task.collate([task.train_set[0], task.train_set[10], task.train_set[1]])
    assert [tuple(x.shape) for x in batch["x"]] == [(2, 1, 16), (1, 1, 32)]
    assert task.losses(batch)["loss"].isfinite()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "dncnn"}, Unsupported, "dncnn is not a network that maps fields to fields"),
        ({"options": {"dims": 1}}, ValueError, "options must not hold dims"),
        ({"normalise": "all"}, ValueError, "normalise must be one of none, inputs, both, got 'all'"),
        ({"samples": 2}, ValueError, "samples must be at least 3, got 2"),
        ({"resolution": 2}, ValueError, "resolution must be at least 4, got 2"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction must be between 0 and 1"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        OperatorLearning(**{"model": "toy", **settings})


def test_too_few_data_are_told(tmp_path: Path):
    np.savez(tmp_path / "f.npz", **pairs(1, 8, 8))
    with pytest.raises(DataError, match="1 pairs on one grid"):
        OperatorLearning(data=str(tmp_path / "f.npz"), model="toy").prepare()
    with pytest.raises(DataError, match="does not exist"):
        OperatorLearning(data="navier", model="toy").prepare()
