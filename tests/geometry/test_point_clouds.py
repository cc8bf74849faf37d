"""The tasks for point clouds, from files to predictions, with tiny networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from convatlas.data.point_sets import CloudSet
from convatlas.data.point_shapes import SCENE_CLASSES, scene, solid
from convatlas.data.point_transforms import CloudAugment, CloudPreprocess
from convatlas.data.points import read_cloud, write_ply
from convatlas.errors import DataError, Unsupported
from convatlas.geometry import point_clouds
from convatlas.geometry.point_clouds import PointRecognition, PointSegmentation
from convatlas.geometry.point_reports import colours, portrait
from convatlas.geometry.voxel_data import VoxelDataset, collate, merge_pairs, thinned
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

TINY: dict[str, Any] = {"embed_dim": 4, "dims": (4, 4), "depths": (0, 0)}
SEGMENTER = {**TINY, "decoder_dims": (4, 4)}


def published(task: Any, name: str) -> tuple[Any, Training]:
    settings = yaml.safe_load(task.recipe(name).read_text())
    fields = {entry.name for cls in (task, Training) for entry in dataclasses.fields(cls) if entry.init}
    assert set(settings) <= fields
    return split_settings(task, settings)


def coarse(grid_size: float) -> CloudPreprocess:
    return CloudPreprocess(grid_size=grid_size)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    for kind in ("sphere", "cube"):
        for seed in range(5):
            cloud = solid(kind, points=120, seed=seed)
            path = tmp_path / "shapes" / kind / f"{seed}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, points=cloud.coordinates, normals=cloud.features)
    (tmp_path / "shapes" / "cube" / "broken.ply").write_bytes(b"ply?")
    return tmp_path / "shapes"


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    for seed in range(6):
        cloud = scene(points=400, seed=seed)
        path = tmp_path / "rooms" / f"{seed}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, points=cloud.coordinates, intensity=cloud.features, labels=cloud.labels)
    (tmp_path / "rooms" / "classes.txt").write_text("\n".join(SCENE_CLASSES))
    return tmp_path / "rooms"


def test_recognition_from_files_to_predictions(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    task, training = published(PointRecognition, "e3dsnn_modelnet40")
    task.data, task.options, task.max_points, task.test_rotations = str(shapes), TINY, 60, 2
    task.preprocess = coarse(0.3)
    report = task.fit(tmp_path / "run", dataclasses.replace(training, epochs=1, batch_size=4, decay_at=()))
    assert task.classes == ("cube", "sphere")
    assert "broken.ply" in report.to_json()
    assert len(report.to_html()) > 10_000
    again = PointRecognition.load(tmp_path / "run")
    assert again.quality() == task.quality()
    assert set(again.quality()) == {"accuracy", "mean class accuracy"}
    cloud = task._prepared(read_cloud(shapes / "cube" / "1.npz"), "")
    chances = task.point_probabilities(cloud)
    assert torch.equal(again.point_probabilities(cloud), chances)
    assert float(chances.sum()) == pytest.approx(1)
    again.predict([shapes / "sphere", shapes / "cube" / "broken.ply"], tmp_path / "out")
    rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert rows[0] == "cloud,class,probability"
    assert len(rows) == 6
    assert json.loads(again.evaluate(shapes).to_json())["title"] == "Evaluation of e3dsnn_t"


def test_segmentation_from_files_to_coloured_points(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    task, training = published(PointSegmentation, "e3dsnn_semantic_kitti")
    task.data, task.options, task.preprocess = str(rooms), SEGMENTER, coarse(0.3)
    task.mix_prob, task.class_weights, task.test_rotations = 1.0, (1, 2, 3, 4), 1
    task.fit(tmp_path / "run", dataclasses.replace(training, epochs=1, batch_size=4, warmup_epochs=0))
    again = PointSegmentation.load(tmp_path / "run")
    assert again.quality() == task.quality()
    assert set(task.quality()) == {"mean IoU", "accuracy"}
    again.predict([rooms / "3.npz"], tmp_path / "out")
    cloud = read_cloud(tmp_path / "out" / "0000_3.ply")
    original = read_cloud(rooms / "3.npz")
    assert np.array_equal(cloud.coordinates, original.coordinates)
    (answer,), skipped = again.answers(again._files([rooms / "3.npz"]))
    assert not skipped
    assert cloud.labels is not None
    assert np.array_equal(cloud.labels, answer.best)
    assert np.array_equal((255 * cloud.features).round().astype(int), colours(4)[answer.best])


def test_measures_of_known_answers():
    task = PointSegmentation(options=SEGMENTER)
    task.classes = ("a", "b", "c")
    cloud = dataclasses.replace(scene(points=4), labels=np.array([0, 0, 1, -1]))
    chances = torch.eye(3)[[0, 1, 1, 2]]
    answer = point_clouds.Answer("x", cloud, chances, -1)
    assert task.confusion([answer]).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert task.measures([answer]) == {"mean IoU": 0.5, "accuracy": pytest.approx(2 / 3)}
    named = PointRecognition(options=TINY)
    named.classes = ("a", "b")
    answers = [
        point_clouds.Answer("", cloud, torch.eye(2)[[best]], label) for best, label in ((0, 0), (1, 0), (0, 0), (1, 1))
    ]
    assert named.measures(answers) == {"accuracy": 0.75, "mean class accuracy": pytest.approx((2 / 3 + 1) / 2)}


def test_fragments_give_every_point_an_answer_and_turns_are_averaged():
    task = PointSegmentation(options=SEGMENTER, preprocess=coarse(0.5))
    task.classes = SCENE_CLASSES
    task.network = task._build(4).eval()
    for parameter in task.network.parameters():
        parameter.data.normal_()
    cloud = scene(points=300)
    once = task.point_probabilities(cloud)
    assert once.shape == (300, 4)
    torch.testing.assert_close(once.sum(1), torch.ones(300))
    task.test_rotations = 4
    assert not torch.allclose(task.point_probabilities(cloud), once)


def test_samples_depend_on_their_seed_only():
    clouds = CloudSet(("0", "1"), np.array([0, 1]), ("a", "b"), lambda name: solid("cube", points=300, seed=int(name)))
    data = VoxelDataset(clouds, coarse(0.3), CloudAugment(rotate_z=1.0))
    first, second, other, plain = data[1, 5], data[1, 5], data[1, 6], data[1]
    assert torch.equal(first["features"], second["features"])
    assert first["features"].shape != other["features"].shape or not torch.equal(first["features"], other["features"])
    assert torch.equal(plain["features"], data[1]["features"])
    assert len({tuple(cell) for cell in plain["cells"].tolist()}) == len(plain["cells"])
    batch = collate([first, {"unreadable": "x"}, plain])
    assert batch["unreadable"] == ["x"]
    assert batch["label"].tolist() == [1, 1]
    assert batch["batch"].bincount().tolist() == [len(first["cells"]), len(plain["cells"])]
    assert not len(collate([{"unreadable": "x"}])["label"])


def test_clouds_laid_into_one_another_keep_a_voxel_once():
    cells = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0], [2, 0, 0], [5, 5, 5]])
    batch = {
        "features": torch.arange(5.0)[:, None],
        "cells": cells,
        "labels": torch.arange(5),
        "batch": torch.tensor([0, 0, 1, 1, 2]),
        "label": torch.tensor([0, 1, 2]),
        "index": torch.tensor([0, 1, 2]),
        "unreadable": [],
    }
    merged = merge_pairs(batch)
    assert merged["labels"].tolist() == [0, 1, 3, 4]
    assert merged["batch"].tolist() == [0, 0, 0, 1]
    assert len(merged["label"]) == 2


def test_thinned_clouds_are_spread_out():
    cloud = solid("sphere", points=500)
    few = thinned(cloud, 20)
    assert len(few) == 20
    gaps = np.linalg.norm(few.coordinates[:, None] - few.coordinates, axis=2) + 9 * np.eye(20)
    rest = np.linalg.norm(cloud.coordinates[:, None] - few.coordinates, axis=2).min(1)
    assert gaps.min() >= rest.max()  # each was farther from the others than any point is now
    assert thinned(cloud, 500) is cloud


def test_settings_are_checked(tmp_path: Path):
    with pytest.raises(Unsupported, match="e3dsnn_seg is not a network for point-recognition"):
        PointRecognition(model="e3dsnn_seg")
    with pytest.raises(ValueError, match="options must not hold in_channels: it follows from the data"):
        PointSegmentation(options={"in_channels": 3})
    with pytest.raises(ValueError, match=r"mix_prob must be in \[0, 1\], got 2"):
        PointSegmentation(mix_prob=2)
    with pytest.raises(ValueError, match="test_rotations must be at least 1, got 0"):
        PointRecognition(test_rotations=0)
    with pytest.raises(DataError, match="class_weights must be 4, one for each class, got 2"):
        PointSegmentation(class_weights=(1, 2), options=SEGMENTER).prepare()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/1.ply", "b/1.ply"):
        write_ply(tmp_path / name, np.zeros((1, 3), np.float32), np.zeros((1, 3), np.uint8))
    with pytest.raises(DataError, match="has 1 clouds of class a but needs at least 3"):
        PointRecognition(data=str(tmp_path), options=TINY).prepare()


def test_portraits_show_what_is_near():
    near = portrait(solid("sphere", points=3000), np.full((3000, 3), 7, np.uint8))
    assert near.shape == (200, 200, 3)
    assert (near == 7).any()
    assert (near == 255).any()
    assert len({tuple(colour) for colour in colours(19).tolist()}) == 19


# Recipes


def test_recipe_of_modelnet40():
    assert list(PointRecognition.recipes()) == ["e3dsnn_modelnet40"]
    task, training = published(PointRecognition, "e3dsnn_modelnet40")
    assert (task.model, task.label_smoothing, task.max_points) == ("e3dsnn_t", 0.2, 8192)
    assert task.preprocess == CloudPreprocess(grid_size=0.01, normalize=True)
    assert task.augment == CloudAugment(scale=(0.9, 1.1), shift=0.2)
    assert (training.batch_size, training.optimizer, training.nesterov, training.weight_decay) == (
        16,
        "sgd",
        True,
        1e-3,
    )
    (group, *_) = make_optimizer(torch.nn.Linear(2, 2), training).param_groups
    assert group["nesterov"]
    with pytest.raises(ValueError, match="nesterov needs the optimizer sgd with momentum"):
        dataclasses.replace(training, optimizer="adamw")
    rates = [learning_rate(training, epoch * 10, 10) for epoch in (0, 179, 180, 239, 240, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


def test_recipe_of_semantic_kitti():
    assert list(PointSegmentation.recipes()) == ["e3dsnn_semantic_kitti"]
    task, training = published(PointSegmentation, "e3dsnn_semantic_kitti")
    assert task.preprocess == CloudPreprocess(grid_size=0.05, clip=(-35.2, -35.2, -4, 35.2, 35.2, 2))
    assert task.augment == CloudAugment(rotate_z=0.5, scale=(0.9, 1.1), flip=0.5, jitter=0.005)
    assert (task.model, task.mix_prob, task.test_rotations, len(task.class_weights)) == ("e3dsnn_seg", 0.8, 4, 19)
    assert (training.batch_size, training.epochs, training.weight_decay) == (24, 100, 5e-3)
    rates = [learning_rate(training, epoch * 10, 10) for epoch in (0, 4, 100)]
    assert rates == pytest.approx([2e-4, 2e-3, 2e-6], rel=0.3)
