"""The task of waves: what it learns and writes, its losses and errors, and how data can be bad."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.cli.main import main
from convatlas.data.wave_fem import WaveSequences, wave_dataset
from convatlas.data.wave_files import read_sequences, write_sequences
from convatlas.errors import DataError, Unsupported
from convatlas.networks.registry import create_model
from convatlas.physics.wave import Simulation, Waves
from convatlas.physics.wave_evaluation import Windows, bounded_error, errors_of, shuffled
from convatlas.training.settings import Training
from convatlas.training.task import open_task, split_settings

SCENES = Simulation(scenes=8, size=12, frames=10, interval=0.06)
TINY = {"widths": (4, 8), "depth": 1}
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.01, "warmup_epochs": 0, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waves") / "run"
    settings: dict[str, Any] = {f"simulation.{name}": getattr(SCENES, name) for name in ("scenes", "size", "frames")}
    settings |= {
        "simulation.interval": SCENES.interval,
        "options": json.dumps(TINY),
        "rollout": 2,
        "horizon": 5,
        **SHORT,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        words = [f"--{name}={value}" for name, value in settings.items()]
        assert main(["train", "waves", f"--run={folder}", *words]) == 0
    assert "steps on 5 fields of 2 scenes" in (folder / "report.json").read_text()
    return folder


def test_a_run_can_be_opened_and_evaluated(trained: Path, tmp_path: Path):
    task = open_task(trained)
    with (trained / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    mean = sum(float(row["relative L2"]) for row in rows) / 2
    assert task.quality()["relative L2 of the rollout"] == pytest.approx(mean, rel=1e-4)
    assert all(task.better(measure) == "min" for measure in task.quality())
    report = task.evaluate(folder=tmp_path)
    assert (
        json.loads((tmp_path / "report.json").read_text())["title"]
        == report.title
        == "Evaluation of wave_surrogate_oneway"
    )
    picture = np.asarray(Image.open(trained / "samples" / "rollout.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 0
    losses = [float(row["train_loss"]) for row in csv.DictReader((trained / "metrics.csv").open())]
    assert losses[-1] < losses[0]


def test_files_are_rolled_out(trained: Path, tmp_path: Path):
    task: Any = open_task(trained)
    scenes = wave_dataset(2, 12, frames=6, interval=0.06, seed=9)
    write_sequences(tmp_path / "known.npz", scenes)
    write_sequences(tmp_path / "start.npz", replace(scenes, fields=scenes.fields[:, :4]))
    report = task.predict([tmp_path / "known.npz", tmp_path / "start.npz"], tmp_path / "out")
    table = report.sections[0].parts[0]
    assert [row[:4] for row in table.rows] == [
        ("known", 2, 5, "known_rollout.npz"),
        ("start", 2, 5, "start_rollout.npz"),
    ]
    assert table.rows[0][4] > 0
    assert table.rows[1][4] is None
    made = [read_sequences(tmp_path / "out" / f"{name}_rollout.npz") for name in ("known", "start")]
    torch.testing.assert_close(made[0].fields, made[1].fields)
    seen = scenes.fields[:, :4] / task.scale
    expected = task.network.rollout(seen, scenes.speed, 5).detach() * task.scale
    torch.testing.assert_close(made[0].fields, expected)
    with Image.open(tmp_path / "out" / "known_rollout.gif") as film:
        assert film.n_frames == 5
    write_sequences(tmp_path / "short.npz", replace(scenes, fields=scenes.fields[:, :3]))
    with pytest.raises(DataError, match="has 3 fields a scene, but wave_surrogate_oneway needs 4"):
        task.predict([tmp_path / "short.npz"], tmp_path / "out2")


def test_fields_of_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    options = {"widths": (4, 4), "hidden": 8, "frames": 2}
    task = Waves(model="wave_field", options=options, simulation=replace(SCENES, inclusions=0), horizon=5)
    report = task.fit(tmp_path / "run", Training(**{**SHORT, "epochs": 1}))
    assert "makes 5 fields of 2 scenes" in report.summary
    again: Any = open_task(tmp_path / "run")
    scenes = wave_dataset(1, 12, frames=2, inclusions=0)
    write_sequences(tmp_path / "one.npz", scenes)
    again.predict([tmp_path / "one.npz"], tmp_path / "out")
    made = read_sequences(tmp_path / "out" / "one_rollout.npz").fields
    x = torch.cat([scenes.parameters, torch.tensor([[2 / 10]])], dim=1)  # type: ignore[list-item]
    torch.testing.assert_close(made[:, 2:4], again.network(x).detach() * again.scale)
    with pytest.raises(DataError, match="needs the parameters of each scene; simulated has none"):
        Waves(model="wave_field", options=options, simulation=SCENES).prepare()


def test_losses_are_those_of_a_step_and_of_a_rollout():
    task = Waves(options=TINY, rollout=2, rollout_weight=0.5)
    task.network, task.scale = create_model("wave_surrogate", **TINY), 2.0
    batch = {"fields": torch.randn(3, 6, 9, 9), "speed": torch.rand(3, 9, 9)}
    losses = task.losses(batch)
    fields = batch["fields"] / 2
    made = task.network.rollout(fields[:, :4], batch["speed"], 2)
    step = ((made[:, 0] - fields[:, 4]).flatten(1).norm(dim=1) / fields[:, 4].flatten(1).norm(dim=1)).mean()
    both = ((made - fields[:, 4:]).flatten(1).norm(dim=1) / fields[:, 4:].flatten(1).norm(dim=1)).mean()
    torch.testing.assert_close(losses["loss"], step + 0.5 * both)


def test_errors_of_known_forecasts():
    scenes = wave_dataset(2, 12, frames=8, interval=0.06)

    class Keeps(type(create_model("wave_surrogate", **TINY))):  # type: ignore[misc]
        """Lets every field stay as it is."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x[:, :1])

    network = Keeps(create_model("wave_surrogate", **TINY).config)
    errors = errors_of(network, scenes, 20, 1e-3, 8)
    assert errors.prediction.shape == (2, 4, 12, 12)
    truth = scenes.fields[:, 4:]
    kept = scenes.fields[:, 3:4].expand_as(truth)
    torch.testing.assert_close(errors.each, (kept - truth).flatten(2).norm(dim=2) / truth.flatten(2).norm(dim=2))
    torch.testing.assert_close(errors.whole, (kept - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1))
    assert errors.one_step is not None
    assert len(errors.one_step) == 2 * 4
    assert (errors.energy > 0.1).all()  # nothing moves any more, so the kinetic energy is lost
    assert bounded_error(torch.ones(1, 4), torch.zeros(1, 4), 1.0).tolist() == [100.0]


def test_windows_tell_time_and_parameters():
    scenes = WaveSequences(
        torch.arange(10.0).view(2, 5, 1, 1), torch.ones(2, 1, 1), parameters=torch.tensor([[1.0], [2.0]])
    )
    windows = Windows(scenes, 3, duration=5)
    assert len(windows) == 6
    assert windows[(4, 7)]["fields"].flatten().tolist() == [6, 7, 8]
    assert windows[4]["parameters"].tolist() == pytest.approx([2, 0.2])
    assert sorted(row for part in shuffled(7, (0.3, 0.1), 0) for row in part) == list(range(7))


def test_recipe_is_made_of_settings():
    import yaml

    values = yaml.safe_load(Waves.recipe("wave_surrogate").read_text(encoding="utf-8"))
    task, training = split_settings(Waves, values)
    assert (task.model, task.rollout, task.simulation.scenes) == ("wave_surrogate_oneway", 4, 500)
    assert (training.lr, training.schedule, training.min_lr, training.weight_decay) == (1e-3, "cosine", 0.0, 0.0)
    assert task.simulation.frames >= 4 + task.horizon


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": 0}, "rollout must be at least 1, got 0"),
        ({"rollout_weight": -1.0}, "rollout_weight must not be negative, got -1.0"),
        ({"test_fraction": 1.0}, "test_fraction must be between 0 and 1, got 1.0"),
        ({"model": "wave_field", "options": {"size": 4}}, "options must not hold size: it follows from the data"),
        ({"options": {"in_channels": 1}}, "in_channels must be at least 2 and out_channels 1"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Waves(**settings)


def test_bad_data_are_told(tmp_path: Path):
    with pytest.raises(Unsupported, match="resnet18 is not a network for waves"):
        Waves(model="resnet18")
    write_sequences(tmp_path / "few.npz", wave_dataset(2, 8, frames=6))
    with pytest.raises(DataError, match="holds 2 scenes, but training needs at least 3"):
        Waves(data=str(tmp_path / "few.npz")).prepare()
    write_sequences(tmp_path / "short.npz", wave_dataset(4, 8, frames=6))
    with pytest.raises(DataError, match="has 6 fields a scene, but training needs at least 8"):
        Waves(data=str(tmp_path / "short.npz"), options=TINY).prepare()
