"""Point clouds: files of every kind, damaged ones, sets and their splits, simulated shapes, random changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.data.image_files import Unreadable
from convatlas.data.point_sets import KITTI_CLASSES, read_clouds, read_scenes
from convatlas.data.point_shapes import SCENE_CLASSES, SOLIDS, scene, solid
from convatlas.data.point_transforms import CloudAugment, CloudPreprocess, turned
from convatlas.data.points import Cloud, read_cloud, sample_surface, write_ply
from convatlas.errors import DataError, UnknownName

PLACES = np.array([[0, 0, 0], [1, 0.5, 0], [2, 1, -3]], np.float32)

# Files


def test_ply_is_read_as_it_was_written(tmp_path: Path):
    colours = np.array([[255, 0, 0], [0, 51, 0], [1, 2, 3]], np.uint8)
    write_ply(tmp_path / "a.ply", PLACES, colours, np.array([2, 0, 1]))
    cloud = read_cloud(tmp_path / "a.ply")
    assert np.array_equal(cloud.coordinates, PLACES)
    np.testing.assert_allclose(cloud.features, colours / 255, rtol=1e-6)
    assert cloud.labels is not None
    assert cloud.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_of_any_byte_order_with_faces_behind(tmp_path: Path, form: str):
    header = (
        f"ply\nformat {form} 1.0\ncomment made by hand\nelement vertex 3\nproperty double x\nproperty double y\n"
        "property double z\nproperty float nx\nproperty ushort label\nelement face 1\n"
        "property list uchar int vertex_indices\nend_header\n"
    )
    order = ">" if form.endswith("big_endian") else "<"
    table = np.zeros(3, [(name, f"{order}f8") for name in "xyz"] + [("nx", f"{order}f4"), ("label", f"{order}u2")])
    for axis, values in zip("xyz", PLACES.T, strict=True):
        table[axis] = values
    table["nx"], table["label"] = [0.25, 0.5, 1], [7, 0, 300]
    rows = "\n".join(" ".join(f"{value:g}" for value in row) for row in table.tolist()) + "\n3 0 1 2\n"
    body = rows.encode() if form == "ascii" else table.tobytes() + b"\x03" + np.arange(3, dtype=f"{order}i4").tobytes()
    (tmp_path / "a.ply").write_bytes(header.encode() + body)
    cloud = read_cloud(tmp_path / "a.ply")
    assert np.array_equal(cloud.coordinates, PLACES)
    assert cloud.features.flatten().tolist() == [0.25, 0.5, 1]
    assert cloud.labels is not None
    assert cloud.labels.tolist() == [7, 0, 300]


@pytest.mark.parametrize("first", ["OFF\n4 2 0\n", "OFF4 2 0\n"])
def test_off_meshes_become_points_of_their_surface(tmp_path: Path, first: str):
    # A square of side 2 in the plane z = 1, as a quadrangle, and a triangle without area.
    text = f"{first}0 0 1\n2 0 1\n2 2 1\n0 2 1 # a corner\n4 0 1 2 3\n3 0 0 0\n"
    (tmp_path / "a.off").write_text(text)
    cloud = read_cloud(tmp_path / "a.off")
    assert len(cloud) == 10_000
    assert cloud.has_normals
    assert np.abs(np.abs(cloud.features) - [0, 0, 1]).max() < 1e-6
    assert np.allclose(cloud.coordinates[:, 2], 1)
    np.testing.assert_allclose(cloud.coordinates.mean(0), [1, 1, 1], atol=0.02)
    np.testing.assert_allclose(cloud.coordinates[:, :2].std(0), np.full(2, 2 / np.sqrt(12)), atol=0.02)
    assert np.array_equal(cloud.coordinates, read_cloud(tmp_path / "a.off").coordinates)


def test_a_mesh_without_surface_is_refused():
    with pytest.raises(ValueError, match="the mesh has no surface"):
        sample_surface(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]]), 5)


def test_lidar_text_and_arrays(tmp_path: Path):
    intensity = np.array([[0.1], [0.2], [0.3]], np.float32)
    table = np.concatenate([PLACES, intensity], 1)
    table.tofile(tmp_path / "a.bin")
    assert np.array_equal(read_cloud(tmp_path / "a.bin").features, intensity)
    np.array([(5 << 16) + 10, 40, 0], np.uint32).tofile(tmp_path / "a.label")
    labels = read_cloud(tmp_path / "a.bin").labels
    assert labels is not None
    assert labels.tolist() == [10, 40, 0]
    for name, text in {
        "a.txt": "\n".join(",".join(map(str, row)) for row in table.tolist()),
        "b.xyz": "\n".join(" ".join(map(str, row)) for row in table.tolist()),
        "c.csv": "x,y,z,i\n" + "\n".join(",".join(map(str, row)) for row in table.tolist()),
    }.items():
        (tmp_path / name).write_text(text)
        np.testing.assert_allclose(read_cloud(tmp_path / name).features, intensity)
    np.savez(tmp_path / "a.npz", coord=PLACES, normals=np.eye(3), labels=np.array([[1], [0], [2]]))
    cloud = read_cloud(tmp_path / "a.npz")
    assert cloud.has_normals
    assert cloud.labels is not None
    assert cloud.labels.tolist() == [1, 0, 2]


def test_points_that_are_not_finite_are_left_out(tmp_path: Path):
    np.savez(tmp_path / "a.npz", points=np.array([[0, 0, 0], [np.nan, 0, 0], [1, 1, 1]]), labels=np.array([4, 5, 6]))
    cloud = read_cloud(tmp_path / "a.npz")
    assert cloud.labels is not None
    assert cloud.labels.tolist() == [4, 6]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.ply", b"something", "it is no PLY file"),
        ("a.ply", b"ply\nformat text 1.0\nelement vertex 1\nproperty float x\nend_header\n", "the format is text"),
        (
            "a.ply",
            b"ply\nformat binary_little_endian 1.0\nelement vertex 9\nproperty int x\nend_header\nab",
            "buffer",
        ),
        ("a.off", b"3 1 0", "it does not begin with OFF"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n", "cannot reshape"),
        ("a.bin", b"abcd", "expected four numbers a point, got 1 in all"),
        ("a.txt", b"1 2\n3 4\n", "at least three numbers a point"),
        ("a.txt", b"", "at least three numbers a point|it holds no point"),
        ("a.npz", b"PK", "it is no NPZ file"),
        ("a.xml", b"<a/>", "expected .off, .ply"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_damaged_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, reason: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=reason):
        read_cloud(tmp_path / name)


# Sets


def cloud_file(path: Path, labels: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = {"points": PLACES}
    np.savez(path, **held, **({} if labels is None else {"labels": np.array(labels)}))


def test_folders_of_classes_with_and_without_splits(tmp_path: Path):
    for name in ("chair/1.npz", "chair/2.npz", "table/1.npz"):
        cloud_file(tmp_path / "plain" / name)
        cloud_file(tmp_path / "split" / "train" / name)
        cloud_file(tmp_path / "split" / "test" / name)
        label, file = name.split("/")
        cloud_file(tmp_path / "mesh" / label / "train" / file)
        cloud_file(tmp_path / "mesh" / label / "test" / file)
    for folder, splits in (("plain", {"all"}), ("split", {"train", "test"}), ("mesh", {"train", "test"})):
        sets = read_clouds(tmp_path / folder)
        assert set(sets) == splits
        for clouds in sets.values():
            assert clouds.classes == ("chair", "table")
            assert clouds.labels.tolist() == [0, 0, 1]
            assert len(clouds.cloud(2)) == 3
            assert clouds.subset([2]).names == clouds.names[2:]


def test_the_lists_of_modelnet(tmp_path: Path):
    for name in ("tv_stand_0001", "tv_stand_0002", "bed_0001"):
        path = tmp_path / name.rpartition("_")[0] / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("0,0,0,0,0,1\n1,1,1,0,1,0\n")
    (tmp_path / "modelnet10_train.txt").write_text("tv_stand_0001\nbed_0001\n")
    (tmp_path / "modelnet10_test.txt").write_text("tv_stand_0002\n")
    sets = read_clouds(tmp_path)
    assert sets["train"].classes == sets["test"].classes == ("bed", "tv_stand")
    assert sets["test"].labels.tolist() == [1]
    assert sets["test"].cloud(0).has_normals


def test_sequences_of_semantic_kitti(tmp_path: Path):
    for number in (0, 8):
        folder = tmp_path / "dataset" / "sequences" / f"{number:02d}"
        (folder / "velodyne").mkdir(parents=True)
        (folder / "labels").mkdir()
        np.concatenate([PLACES, PLACES[:, :1]], 1).tofile(folder / "velodyne" / "000000.bin")
        np.array([(3 << 16) + 252, 81, 99], np.uint32).tofile(folder / "labels" / "000000.label")
    sets = read_scenes(tmp_path)
    assert set(sets) == {"train", "val"}
    assert sets["val"].classes == KITTI_CLASSES
    assert len(KITTI_CLASSES) == 19
    labels = sets["val"].cloud(0).labels
    assert labels is not None
    assert labels.tolist() == [0, 18, -1]
    (tmp_path / "dataset" / "sequences" / "00" / "labels" / "000000.label").unlink()
    with pytest.raises(Unreadable, match=r"its labels, .* cannot be read"):
        sets["train"].cloud(0)


def test_scenes_take_their_classes_from_a_list_or_their_labels(tmp_path: Path):
    cloud_file(tmp_path / "train" / "a.npz", [0, 2, -1])
    cloud_file(tmp_path / "val" / "b.npz", [1, 0, 0])
    sets = read_scenes(tmp_path)
    assert sets["train"].classes == ("class 0", "class 1", "class 2")
    (tmp_path / "classes.txt").write_text("floor\nwall\ndoor\nroof\n")
    assert read_scenes(tmp_path)["val"].classes == ("floor", "wall", "door", "roof")


def test_what_is_no_data(tmp_path: Path):
    with pytest.raises(DataError, match="is no folder"):
        read_clouds(tmp_path / "nothing")
    cloud_file(tmp_path / "one" / "only" / "a.npz")
    with pytest.raises(DataError, match=r"each of at least two classes, .* found only"):
        read_clouds(tmp_path / "one")
    with pytest.raises(DataError, match="must have labels of at least two classes"):
        read_scenes(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no clouds"):
        read_scenes(tmp_path / "empty")


# Simulated


@pytest.mark.parametrize("kind", SOLIDS)
def test_solids_have_normals_that_leave_them(kind: str):
    cloud = solid(kind, points=4000, noise=0.0, seed=3)
    assert cloud.has_normals
    assert len(cloud) == 4000
    # By Gauss, the mean of p . n over the surface is three times the volume over the area: positive if all leave it.
    assert float((cloud.coordinates * cloud.features).sum(1).mean()) > 0.15
    assert np.abs(cloud.coordinates).max() < 1.3
    again = solid(kind, points=4000, noise=0.0, seed=3)
    assert np.array_equal(cloud.coordinates, again.coordinates)
    assert not np.array_equal(cloud.coordinates, solid(kind, points=4000, noise=0.0, seed=4).coordinates)


def test_scenes_have_every_class_where_it_belongs():
    cloud = scene(seed=5)
    assert cloud.labels is not None
    assert len(cloud) == 4096
    height = [cloud.coordinates[cloud.labels == index, 2] for index in range(len(SCENE_CLASSES))]
    assert np.abs(height[0]).max() < 0.1
    assert height[1].max() > 1.5
    assert all(len(part) > 100 for part in height)


def test_unknown_solid():
    with pytest.raises(UnknownName, match="unknown solid 'spere': did you mean sphere"):
        solid("spere")


# Changes


def test_preprocessing_cuts_and_normalises():
    cloud = Cloud(PLACES, np.zeros((3, 0), np.float32), np.array([0, 1, 2]))
    cut = CloudPreprocess(clip=(-1, -1, -1, 3, 3, 3))(cloud)
    assert cut.labels is not None
    assert cut.labels.tolist() == [0, 1]
    normal = CloudPreprocess(normalize=True)(cloud).coordinates
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-6)
    assert np.linalg.norm(normal, axis=1).max() == pytest.approx(1)


def test_changes_are_drawn_from_the_generator_and_keep_normals_true():
    cloud = solid("cube", points=200, noise=0.0)
    augment = CloudAugment(rotate_z=1.0, scale=(0.5, 0.5), flip=0.5, shift=0.2, jitter=0.01)
    first, second = (augment(cloud, torch.Generator().manual_seed(7)) for _ in range(2))
    assert np.array_equal(first.coordinates, second.coordinates)
    assert not np.array_equal(first.coordinates, augment(cloud, torch.Generator().manual_seed(8)).coordinates)
    assert first.has_normals
    plain = CloudAugment(rotate_z=1.0, flip=1.0)(cloud, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(
        (plain.coordinates * plain.features).sum(1), (cloud.coordinates * cloud.features).sum(1), atol=1e-5
    )
    assert np.array_equal(CloudAugment()(cloud, torch.Generator()).coordinates, cloud.coordinates)


def test_colours_do_not_turn():
    cloud = Cloud(PLACES, np.full((3, 3), 0.2, np.float32))
    quarter = turned(cloud, np.pi / 2)
    np.testing.assert_allclose(quarter.coordinates[1], [-0.5, 1, 0], atol=1e-6)
    assert np.array_equal(quarter.features, cloud.features)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CloudPreprocess(grid_size=0), "grid_size must be positive, got 0"),
        (lambda: CloudPreprocess(clip=(0, 0, 0, 1, 1, 0)), "clip must be least and then greatest"),
        (lambda: CloudAugment(rotate_z=2), r"rotate_z must be in \[0, 1\], got 2"),
        (lambda: CloudAugment(scale=(2, 1)), "scale must be a range of positive factors"),
        (lambda: CloudAugment(jitter=-1), "jitter must not be negative, got -1"),
    ],
)
def test_settings_are_checked(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
