"""Volumes in recognition: trained, evaluated, predicted, cross-validated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from convatlas.errors import DataError
from convatlas.experiments.small_training import recipe_settings
from convatlas.recognition.task import Recognition
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import open_task, split_settings

TINY = {"widths": (4, 6), "depths": (1, 1), "convolutions": ("3d", "no_depth")}
TRAINING = Training(epochs=2, batch_size=6, lr=3e-3, warmup_epochs=0)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Dark volumes and volumes with a bright slab."""
    generator = np.random.default_rng(0)
    x = generator.random((30, 5, 18, 16)).astype(np.float32)
    y = np.arange(30) % 2
    x[y == 1, 2, 4:14, 4:12] += 3
    np.savez(tmp_path / "volumes.npz", x=x, y=y, classes=np.array(["dark", "bright"]))
    return tmp_path / "volumes.npz"


def task(data: Path, **changes: object) -> Recognition:
    settings = {"data": str(data), "model": "mc3_18", "options": TINY, "volume_size": (4, 16, 16), "test_fraction": 0.3}
    return Recognition(**{**settings, **changes})


@pytest.mark.slow
def test_a_run_on_volumes_ends_in_a_usable_folder(volumes: Path, tmp_path: Path):
    report = task(volumes, class_weights=True).fit(tmp_path / "run", TRAINING)
    text = json.loads(report.to_json())
    tables = [part for section in text["sections"] for part in section["parts"] if part["kind"] == "table"]
    assert any("specificity" in table["columns"] for table in tables)
    assert any("16 x 16 x 4 voxels" in table["caption"] for table in tables)
    again = open_task(tmp_path / "run")
    assert again.preprocess.shape == (4, 16, 16)
    assert again.network.in_channels == 1
    again.evaluate(folder=tmp_path / "evaluation")
    again.predict([volumes], tmp_path / "prediction")
    assert len((tmp_path / "prediction" / "predictions.csv").read_text().splitlines()) == 31
    assert (tmp_path / "prediction" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_cross_validation_trains_each_fold_and_goes_on_where_it_stopped(volumes: Path, tmp_path: Path):
    folds = task(volumes, folds=2)
    report = folds.fit(tmp_path / "run", Training(epochs=1, batch_size=6, warmup_epochs=0))
    assert report.summary.startswith("mc3_18: macro F1")
    held_out = []
    for fold in (1, 2):
        run = Run.open(tmp_path / "run" / f"fold-{fold}")
        assert run.best.is_file()
        held_out.append(open_task(run.folder))
    assert [each.fold for each in held_out] == [1, 2]
    table = json.loads(report.to_json())["sections"][0]["parts"][0]
    assert [row[0] for row in table["rows"]] == ["fold 1", "fold 2", "mean", "standard deviation"]
    before = (tmp_path / "run" / "fold-1" / "metrics.csv").read_bytes()
    task(volumes, folds=2).fit(tmp_path / "run", Training(epochs=1, batch_size=6, warmup_epochs=0), resume=True)
    assert (tmp_path / "run" / "fold-1" / "metrics.csv").read_bytes() == before
    with pytest.raises(DataError, match="no finished epoch"):
        open_task(tmp_path / "run")


def test_folds_share_out_the_training_samples(volumes: Path):
    parts = []
    for fold in (1, 2, 3):
        one = task(volumes, folds=3, fold=fold)
        one.prepare()
        parts.append({name: set(images.names) for name, images in one.splits.items()})
    held_out = [part["val"] for part in parts]
    assert not held_out[0] & held_out[1]
    assert set.union(*held_out) == parts[0]["train"] | parts[0]["val"]
    assert all(part["test"] == parts[0]["test"] for part in parts)
    with pytest.raises(DataError, match="11 folds need as many training samples of each class"):
        task(volumes, folds=11, fold=1).prepare()


@pytest.mark.slow
def test_the_published_recipe_trains(volumes: Path, tmp_path: Path):
    settings = recipe_settings("spatiospatial")
    assert (settings["lr"], settings["folds"], settings["volumes"]["spacing"]) == (1e-5, 3, [2.0, 2.0, 2.0])
    small = {
        "data": str(volumes),
        "options": TINY,
        "weights": None,
        "volume_size": [4, 16, 16],
        "folds": 1,
        "epochs": 1,
    }
    task, training = split_settings(Recognition, {**settings, **small})
    report = task.fit(tmp_path / "run", training)
    assert "held-out images rightly" in report.summary
    assert Run.open(tmp_path / "run").best.is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, "image_size must be left out for mc3_18, which is a network for volumes, got 32"),
        ({"folds": 3, "fold": 4}, "fold must be from 0 to folds"),
        ({"folds": 0}, "folds at least 1, got 0 and 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(volumes: Path, changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        task(volumes, **changes)
    with pytest.raises(ValueError, match="volume_size must be left out for resnet18"):
        Recognition(model="resnet18", volume_size=(4, 16, 16))


def test_sizes_that_the_network_cannot_take_are_told_at_once(volumes: Path):
    with pytest.raises(ValueError, match="x must be at least 1 x 16 x 16 voxels"):
        task(volumes, volume_size=(4, 8, 8)).prepare()
