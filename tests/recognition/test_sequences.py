"""The task of time series: what a run learns and writes, and how data can be bad."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.cli.main import main
from convatlas.data.series import SeriesSet, write_series
from convatlas.data.wheat_seasons import simulate_wheat_season
from convatlas.errors import DataError, Unsupported
from convatlas.networks.ffdnn import FFDNN
from convatlas.recognition.sequences import SequenceRecognition
from convatlas.training.settings import Training
from convatlas.training.task import open_task

TINY: dict[str, Any] = {"widths": [8, 8], "capsule_dim": 4, "class_dim": 6, "decoder": True}
SHORT: dict[str, Any] = {"epochs": 8, "batch_size": 32, "lr": 0.01, "warmup_epochs": 0, "weight_decay": 0.0}
GRID = {"step": 10.0, "chlorophyll": [0.0, -1.0]}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sequences") / "pixels.csv"
    write_series(simulate_wheat_season(108, 0, fields=18, field_effect=0.3).series, path)
    return path


@pytest.fixture(scope="module")
def run(table: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        settings = {"model": "ffdnn", "options": TINY, "grid": GRID, **SHORT}
        words = [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
        code = main(["train", "sequences", "--data", str(table), *words, "--run", str(table.parent / "run")])
    assert code == 0
    return table.parent / "run"


def test_a_run_names_held_out_fields_and_can_be_opened(run: Path, table: Path, tmp_path: Path):
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 36
    assert len({row["field"] for row in rows}) == 6
    right = np.mean([row["class"] == row["true class"] for row in rows])
    assert right > 0.6
    task: Any = open_task(run)
    assert isinstance(task.network, FFDNN)
    weights = str(run / "checkpoints" / "best.safetensors")
    again = SequenceRecognition(data=str(table), options=TINY, grid=task.grid, weights=weights)
    again.prepare()
    assert again.started_from.startswith(weights)
    torch.testing.assert_close(again.network.caps.W, task.network.caps.W)
    assert task.quality()["accuracy"] == pytest.approx(right)
    task.evaluate(folder=tmp_path / "own")
    assert (tmp_path / "own" / "predictions.csv").read_text() == (run / "predictions.csv").read_text()
    report = task.evaluate(table, folder=tmp_path / "all")
    assert "of 108 pixels" in report.summary
    page = (run / "report.html").read_text()
    for text in ("Accuracy with the season known up to a day", "Importance of the dates", "random forest, all columns",
                 "LAI that the decoder makes of a capsule of yellow rust", "producer&#39;s accuracy"):  # fmt: skip
        assert text in page, text


def test_new_pixels_are_named_without_labels(run: Path, tmp_path: Path):
    series = simulate_wheat_season(9, 5, fields=9).series
    series.values[2][:] = np.nan
    new = SeriesSet(series.names, series.fields, (), np.full(9, -1), series.columns, series.days, series.values)
    write_series(new, tmp_path / "new.csv")
    report = open_task(run).predict([tmp_path / "new.csv"], tmp_path / "found")
    with (tmp_path / "found" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [name for name in series.names if name != "pixel 2"]
    assert {row["true class"] for row in rows} == {""}
    shares = [float(value) for name, value in rows[0].items() if name.startswith("probability of ")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert report.sections[-1].title == "Skipped files"


def test_networks_and_simple_methods_side_by_side(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    small: dict[str, Any] = {"data": str(table), "grid": SequenceRecognition().grid}
    training = Training(**{**SHORT, "epochs": 1})
    tasks = {
        "cnn": SequenceRecognition(model="sequence_cnn", options={"widths": [4]}, **small),
        "gru": SequenceRecognition(model="sequence_gru", options={"hidden": 4}, **small),
    }
    from convatlas.training.run import Run

    for name, task in tasks.items():
        task.fit(tmp_path / name, training)
    runs = {name: Run.open(tmp_path / name) for name in tasks}
    report = SequenceRecognition.compare(tasks, runs, tmp_path)
    text = report.to_json()
    for name in ("cnn", "gru", "random forest, same features", "SVM, all columns"):
        assert name in text


def test_the_recipe_trains(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    words = ["--data", str(table), "--recipe", "ffdnn", "--options", json.dumps({**TINY, "decoder": False})]
    changes = ["--epochs", "1", "--grid.step", "20", "--run", str(tmp_path / "run")]
    assert main(["train", "sequences", *words, *changes]) == 0
    settings = (tmp_path / "run" / "config.yaml").read_text()
    for line in ("optimizer: adamw", "lr: 0.001", "weight_decay: 0.0", "patience: 30", "features: indices"):
        assert line in settings


def test_bad_settings_and_data_are_named(run: Path, table: Path, tmp_path: Path):
    with pytest.raises(Unsupported, match="inceptionnext_atto is not a network for time series"):
        SequenceRecognition(model="inceptionnext_atto")
    with pytest.raises(ValueError, match="options must not hold length: it follows from the data"):
        SequenceRecognition(options={"length": 30})
    with pytest.raises(ValueError, match="test_fraction must be between 0 and 1, got 1"):
        SequenceRecognition(test_fraction=1)
    lines = table.read_text().splitlines()
    one = tmp_path / "one.csv"
    one.write_text(
        "\n".join(line.replace("yellow rust", "healthy").replace("nitrogen deficiency", "healthy") for line in lines)
    )
    with pytest.raises(DataError, match="must have at least two labels, got healthy"):
        SequenceRecognition(data=str(one)).prepare()
    other = tmp_path / "other.csv"
    other.write_text("\n".join(line.replace("yellow rust", "mildew") for line in lines))
    with pytest.raises(DataError, match="there are labels mildew, but the classes are healthy, nitrogen deficiency"):
        open_task(run).evaluate(other)
    short = tmp_path / "short.csv"
    short.write_text("id,date,B3,B4,B5,B8,label\n" + "".join(
        f"{kind}{number},{day},0.1,0.1,0.1,0.3,{kind}\n" for kind in "ab" for number in range(4) for day in (1, 20)
    ))  # fmt: skip
    with pytest.raises(DataError, match="a series must have at least 8 steps, got 4 from day 1 to 20"):
        SequenceRecognition(data=str(short)).prepare()
    task: Any = open_task(run)
    task.transform = dataclasses.replace(task.transform, features="columns")
    with pytest.raises(DataError, match="trained on LAI, LCC, the table has B3, B4, B5, B8"):
        task.evaluate(table)
