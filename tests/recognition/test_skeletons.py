"""The task of skeletons: one network and the ensemble on arrays and files, and how settings and data can be bad."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from convatlas.cli.main import main
from convatlas.data.stick_figures import ACTIONS, stick_figures
from convatlas.errors import DataError, Unsupported
from convatlas.ops.score_fusion import fuse_scores
from convatlas.recognition.skeleton_reports import clip_picture, subsets_table
from convatlas.recognition.skeletons import MEMBERS, Skeletons
from convatlas.report import Report
from convatlas.training.settings import Training
from convatlas.training.task import open_task, split_settings

TINY: dict[str, Any] = {"widths": [6, 8], "depths": [1, 1], "dropout": 0.0}
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.01, "warmup_epochs": 0}


def _write(path: Path, count: int, seed: int, *, labelled: bool = True) -> Path:
    clips, labels = stick_figures(count, frames=(12, 16), seed=seed)
    array = np.full((count, 16, 15, 3), np.nan, np.float32)
    for row, clip in enumerate(clips):
        array[row, : len(clip)] = clip
    more = {"labels": np.array(ACTIONS)[labels]} if labelled else {}
    np.savez(path, clips=array, lengths=[len(clip) for clip in clips], **more)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Clips, and a run of the ensemble on them by the command line."""
    folder = tmp_path_factory.mktemp("skeletons")
    data = _write(folder / "figures.npz", 48, 0)
    options = json.dumps({**TINY, "reduction": 2})
    settings = {"frames": 12, "fusion": "weighted", "options": options, **SHORT}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        patch.setattr(Report, "to_html", lambda report: report.title)  # the figures of five reports take long
        words = [f"--{name}={value}" for name, value in settings.items()]
        assert main(["train", "skeletons", f"--data={data}", f"--run={folder / 'run'}", *words]) == 0
    return data, folder / "run"


def test_the_ensemble_is_fused_of_its_runs(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, run = trained
    task: Any = open_task(run)
    report = json.loads((run / "report.json").read_text())
    tables = {part["title"]: part for section in report["sections"] for part in section["parts"] if "rows" in part}
    assert len(tables["Every subset"]["rows"]) == 15
    assert len(tables["Diversity"]["rows"]) == 6
    held = np.load(run / "scores.npz")
    assert held["networks"].tolist() == list(MEMBERS)
    with np.errstate(all="raise"):
        scores = torch.from_numpy(held["test"].copy())
    fused = fuse_scores(scores, "weighted", task.fusion_weights).numpy()
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["p(walk)"]) for row in rows], fused[:, ACTIONS.index("walk")], atol=1e-5)
    one: Any = open_task(run / "attention")
    clips = task._held_out(None)
    np.testing.assert_allclose(task.member_probabilities(clips)[2], one.probabilities(clips), atol=1e-6)
    evaluated = task.evaluate(folder=tmp_path)
    assert evaluated.title == "Evaluation of ensem_nn"
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert task.quality()["accuracy"] == pytest.approx(np.mean([row["class"] == row["true class"] for row in rows]))
    monkeypatch.setattr(Report, "to_html", lambda report: report.title)
    again = Skeletons(data=str(data), frames=12, fusion="weighted", options={**TINY, "reduction": 2})
    again.fit(run, Training(**{**Skeletons.defaults, **SHORT}), resume=True)  # nothing is left to do
    np.testing.assert_allclose(again.probabilities(clips), task.probabilities(clips), atol=1e-6)


def test_new_clips_are_named(trained: tuple[Path, Path], tmp_path: Path):
    task: Any = open_task(trained[1])
    report = task.predict([_write(tmp_path / "new.npz", 3, 5, labelled=False)], tmp_path / "out")
    assert report.summary == "ensem_nn named 3 clips."
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == ["new 0", "new 1", "new 2"]
    assert {row["true class"] for row in rows} == {""}
    np.savez(tmp_path / "other.npz", clips=np.zeros((1, 5, 17, 3)))
    with pytest.raises(DataError, match="have 17 joints of 3 coordinates, the network was trained on 15 of 3"):
        task.predict([tmp_path / "other.npz"], tmp_path / "out")


def test_one_network_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    data = _write(tmp_path / "figures.npz", 90, 1)
    task = Skeletons(data=str(data), model="skeleton_body_part", frames=12, options={"widths": [12], "depths": [1]})
    training = Training(**{**Skeletons.defaults, **SHORT, "epochs": 8})
    report = task.fit(tmp_path / "run", training)
    assert task.quality()["accuracy"] > 0.5  # chance is 1/6
    assert "chosen by validation accuracy" in report.summary
    assert (tmp_path / "run" / "report.html").is_file()


def test_subsets_are_all_there_and_the_gain_is_that_of_the_mean():
    labels = np.array([0, 1, 0, 1])
    right = np.eye(2)[labels]
    first, second = right.copy(), right.copy()
    first[0] = [0.4, 0.6]
    second[1] = [0.6, 0.4]
    table, gain = subsets_table(np.stack([first, second]), labels, ["a", "b"], np.stack([first, second]), labels)
    assert [row[0] for row in table.rows] == ["a", "b", "a, b"]
    assert [row[1] for row in table.rows] == [0.75, 0.75, 1.0]
    assert gain == 0.25


def test_pictures_have_figures():
    for clip in (stick_figures(1)[0][0], np.random.default_rng(0).normal(size=(4, 7, 2))):
        picture = clip_picture(clip)
        assert picture.shape == (110, 660, 3)
        assert (picture != 255).any(2).sum() > 200


def test_recipes_are_made_of_settings():
    for name, optimizer, lr in (("ensem_nn", "sgd", 0.1), ("ensem_nn_adam", "adamw", 1e-3)):
        values = yaml.safe_load(Skeletons.recipe(name).read_text(encoding="utf-8"))
        task, training = split_settings(Skeletons, values)
        assert (task.model, task.protocol, task.frames, task.augment.crop) == ("ensem_nn", "cross_subject", 100, 0.5)
        assert (training.optimizer, training.lr, training.epochs, training.batch_size) == (optimizer, lr, 100, 64)
        assert (training.schedule, training.weight_decay) == ("cosine", 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 1}, "frames must be at least 2, got 1"),
        ({"options": {"joints": 3}}, "options must not hold joints"),
        ({"weights": "a.pt"}, "weights must be left out for the ensemble"),
        ({"protocol": "cross_city"}, "protocol must be random, cross_subject or cross_view, got 'cross_city'"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1, got 0.0"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Skeletons(**settings)


def test_bad_data_are_told(tmp_path: Path):
    with pytest.raises(Unsupported, match="resnet18 is not a network for skeletons"):
        Skeletons(model="resnet18")
    with pytest.raises(DataError, match="has clips without labels"):
        Skeletons(data=str(_write(tmp_path / "plain.npz", 8, 0, labelled=False))).prepare()
    random = np.random.default_rng(0)
    np.savez(tmp_path / "seven.npz", clips=random.normal(size=(12, 5, 7, 3)), labels=[0, 1] * 6)
    with pytest.raises(DataError, match="parts must be given: the parts of a body with 7 joints are not known"):
        Skeletons(data=str(tmp_path / "seven.npz"), model="skeleton_body_part").prepare()
    task = Skeletons(data=str(tmp_path / "seven.npz"), model="skeleton_body_part", parts=((0, 1), (2,)), options=TINY)
    task.prepare()
    assert task.preparation().view is None
    bad = Skeletons(data=str(tmp_path / "seven.npz"), model="skeleton_difference", view=(0, 1, 2, 7))
    with pytest.raises(DataError, match=r"view must be joints below 7, got \(0, 1, 2, 7\)"):
        bad.prepare()
