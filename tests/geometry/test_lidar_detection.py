"""The task for LiDAR sweeps, from KITTI's files to boxes, with a tiny network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.data.image_files import Unreadable
from convatlas.data.sweeps import Sweep, SweepAugment, read_sweep, read_sweeps, street
from convatlas.errors import DataError, Unsupported
from convatlas.geometry.lidar_detection import Finding, LidarDetection, SweepDataset, _AveragePrecision, _collate
from convatlas.geometry.lidar_reports import from_above
from convatlas.networks.registry import model_config
from convatlas.training.settings import Training

RANGE = (0.0, -6.4, -3.0, 12.8, 6.4, 1.0)
TINY: dict[str, Any] = {
    **{"embed_dim": 4, "dims": (4, 4), "depths": (0, 0), "out_dim": 4, "spatial_shape": (21, 32, 32)},
    **{"map_depths": (1,), "map_strides": (1,), "map_dims": (8,), "up_strides": (1,), "up_dims": (8,)},
    "point_range": RANGE,
    "refinement": {"grid": 2, "levels": [1, 2], "radii": [1.0, 2.0], "dim": 4, "hidden_dims": [8, 8]},
}


def kitti(folder: Path, count: int = 1) -> Path:
    """KITTI's layout, with a camera at the LiDAR that looks along x."""
    for part in ("velodyne", "calib", "label_2"):
        (folder / "training" / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        sweep = street(RANGE, seed=index)
        sweep.points.tofile(folder / "training" / "velodyne" / f"{index:06d}.bin")
        (folder / "training" / "calib" / f"{index:06d}.txt").write_text(
            "P2: 700 0 621 0 0 700 187 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
            "Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
        )
        (folder / "training" / "label_2" / f"{index:06d}.txt").write_text(
            "Car 0.00 0 0 100 100 200 150 1.5 1.6 3.9 -2.0 1.73 6.0 0.3\n"
            "Van 0.00 0 0 100 100 200 150 2.0 1.8 4.5 2.0 1.73 8.0 0.0\n"
            "Car 0.00 3 0 100 100 200 150 1.5 1.6 3.9 0.0 1.73 9.0 0.0\n"
            "Car 0.00 0 0 100 100 200 150 1.5 1.6 3.9 0.0 1.73 60.0 0.0\n"
            "DontCare -1 -1 -10 1 1 2 2 -1 -1 -1 -1000 -1000 -1000 -10\n"
        )
    return folder


def test_kitti_boxes_come_into_the_frame_of_the_lidar(tmp_path: Path):
    sets = read_sweeps(kitti(tmp_path), ("Car",), RANGE)
    sweep = sets["all"].cloud(0)
    # x of the camera is -y of the LiDAR, its y is -z, its z is x; the place is the middle of the bottom.
    np.testing.assert_allclose(sweep.boxes[0], [6, 2, -1.73 + 0.75, 3.9, 1.6, 1.5, -(0.3 + math.pi / 2)], atol=1e-5)
    assert sweep.labels.tolist() == [0, 0, 0]
    assert sweep.ignored.tolist() == [False, True, True]  # a car; a van; a car that is hidden
    angle = np.abs(np.arctan2(sweep.points[:, 1], sweep.points[:, 0]))
    assert angle.max() < math.atan(622 / 700)  # what the camera sees
    assert len(sweep.points) < len(read_sweep(str(tmp_path / "training" / "velodyne" / "000000.bin")).points)


def test_kitti_is_split_by_its_lists(tmp_path: Path):
    kitti(tmp_path, 2)
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("000001\n")
    (tmp_path / "ImageSets" / "val.txt").write_text("000000\n")
    sets = read_sweeps(tmp_path, ("Car", "Van"), RANGE)
    assert {name: part.names for name, part in sets.items()} == {"train": ("000001",), "val": ("000000",)}
    assert sets["val"].cloud(0).labels.tolist() == [0, 1, 0]
    (tmp_path / "training" / "calib" / "000000.txt").write_text("P2: 1 2 3\n")
    with pytest.raises(Unreadable, match="its labels or calibration fail"):
        sets["val"].cloud(0)
    with pytest.raises(DataError, match="must be KITTI's object data"):
        read_sweeps(tmp_path / "training", ("Car",), RANGE)


def test_streets_have_cars_on_the_road():
    sweep = street(RANGE, seed=3)
    assert 1 <= len(sweep.boxes) <= 6
    for box in sweep.boxes:
        local = sweep.points[:, :2] - box[:2]
        cos, sin = math.cos(box[6]), math.sin(box[6])
        along, across = local @ [cos, sin], local @ [-sin, cos]
        inside = (np.abs(along) < box[3] / 2 + 0.1) & (np.abs(across) < box[4] / 2 + 0.1) & (sweep.points[:, 2] > -1.5)
        assert inside.sum() > 20
        assert box[2] - box[5] / 2 == pytest.approx(-1.73, abs=1e-4)
    assert np.array_equal(sweep.points, street(RANGE, seed=3).points)


def test_points_and_boxes_change_together():
    sweep = street(RANGE, seed=1)
    box = sweep.boxes[0]
    # The corner of the box and a point stay where they are to each other.
    corner = box[:2] + np.array([math.cos(box[6]), math.sin(box[6])]) * box[3] / 2
    marked = Sweep(np.array([[*corner, box[2], 0.5]], np.float32), sweep.boxes, sweep.labels, sweep.ignored)
    for seed in range(4):
        moved = SweepAugment(flip=0.5, rotate=1.0, scale=(0.8, 1.2))(marked, torch.Generator().manual_seed(seed))
        after = moved.boxes[0]
        corner = after[:2] + np.array([math.cos(after[6]), math.sin(after[6])]) * after[3] / 2
        np.testing.assert_allclose(moved.points[0, :3], [*corner, after[2]], atol=1e-4)
    with pytest.raises(ValueError, match="rotate must be from 0 to pi, got 4"):
        SweepAugment(rotate=4)


def test_voxels_lie_in_the_grid_of_the_network():
    config: Any = model_config("e3dsnn_kitti_car", **TINY)
    data = SweepDataset(read_sweeps("streets", ("Car",), RANGE)["all"], config, 5)
    sample = data[2]
    assert (sample["cells"] < torch.tensor([20, 32, 32])).all()
    centres = (sample["cells"].flip(1) + 0.5) * torch.tensor([0.4, 0.4, 0.2]) + torch.tensor(RANGE[:3])
    assert ((sample["features"][:, :3] - centres).abs() <= torch.tensor([0.2, 0.2, 0.1]) + 1e-4).all()
    batch = _collate([sample, {"unreadable": "x"}, data[3]])
    assert batch["unreadable"] == ["x"]
    assert len(batch["boxes"]) == 2
    assert batch["batch"].bincount().tolist() == [len(sample["cells"]), len(data[3]["cells"])]


def test_average_precision_of_batches_is_that_of_all():
    true = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [9, 0, 0, 4, 2, 1, 0]])
    scores, hard = torch.tensor([0.9, 0.8]), torch.tensor([False, False])
    metric = _AveragePrecision(2, 0.7)
    for kind in (0, 0, 1):
        labels = torch.full((2,), kind)
        metric.update([(true, scores, labels)], [true], [labels], [hard])
    assert float(metric.compute()) == 1
    labels = torch.ones(2, dtype=torch.int64)
    metric.update([(true[:0], scores[:0], labels[:0])], [true], [labels], [torch.tensor([False, True])])
    # One box of the second class is missed of three that count: 26 of 40 recalls are reached.
    assert float(metric.compute()) == pytest.approx((1 + 26 / 40) / 2)


def test_from_files_to_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    task = LidarDetection(data=str(kitti(tmp_path / "kitti", 4)), options=TINY, score_threshold=0.005)
    report = task.fit(tmp_path / "run", Training(epochs=1, batch_size=2, warmup_epochs=0))
    assert len(report.to_html()) > 10_000
    again = LidarDetection.load(tmp_path / "run")
    assert again.quality() == task.quality()
    assert set(task.quality()) == {"AP 3D [%]", "AP from above [%]"}
    files = tmp_path / "kitti" / "training" / "velodyne"
    again.predict([files], tmp_path / "out")
    rows = (tmp_path / "out" / "boxes.csv").read_text().splitlines()
    boxes, scores, _ = again.find(read_sweep(str(files / "000002.bin")))
    assert sum("000002" in row for row in rows) == len(boxes) > 0
    assert rows[0].startswith("sweep,class,score,x,y,z")
    assert (scores[:-1] >= scores[1:]).all()


def test_measures_of_known_findings():
    task = LidarDetection(options=TINY)
    sweep = street(RANGE, seed=3)
    true = torch.from_numpy(sweep.boxes)
    lifted = true + torch.tensor([0, 0, 5.0, 0, 0, 0, 0])
    ones, zeros = torch.ones(len(true)), torch.zeros(len(true), dtype=torch.int64)
    measured = task.measures([Finding("", sweep, true, ones, zeros)])
    assert measured == {"AP 3D [%]": 100, "AP from above [%]": 100}
    measured = task.measures([Finding("", sweep, lifted, ones, zeros)])
    assert measured == {"AP 3D [%]": 0, "AP from above [%]": 100}
    picture = from_above(Finding("", sweep, lifted[:0], ones[:0], zeros[:0]), RANGE)
    assert (picture == [30, 140, 60]).all(2).any()
    assert not (picture == [210, 60, 30]).all(2).any()


def test_settings_are_checked():
    with pytest.raises(Unsupported, match="e3dsnn_t is not a network for lidar-detection"):
        LidarDetection(model="e3dsnn_t")
    with pytest.raises(ValueError, match="classes must be 1, as many as anchors, got Car, Van"):
        LidarDetection(classes=("Car", "Van"))
    with pytest.raises(ValueError, match="matched must be between 0 and 1, got 1"):
        LidarDetection(matched=1)
