"""Skeletons: NTU files, view, resampling, gaps, augmentation, sets and their splits, simulated figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.data.skeleton_sets import (
    ClipDataset,
    ClipPreparation,
    divide_by_protocol,
    known_layout,
    read_skeletons,
    stratified,
)
from convatlas.data.skeletons import (
    LAYOUTS,
    SkeletonAugment,
    fill_missing,
    normalise_view,
    ntu_name,
    read_ntu_skeleton,
    resample_frames,
)
from convatlas.data.stick_figures import ACTIONS, stick_figures
from convatlas.errors import DataError

RANDOM = np.random.default_rng(0)


def write_ntu(path: Path, bodies: list[dict[str, np.ndarray[Any, Any]]], joints: int = 25) -> Path:
    """A file with frames that hold bodies by their identity, each (joints, 3)."""
    lines = [str(len(bodies))]
    for frame in bodies:
        lines.append(str(len(frame)))
        for identity, positions in frame.items():
            lines += [f"{identity} 0 1 1 1 1 0 0.1 -0.2 2", str(joints)]
            lines += [" ".join(map(str, [*position, *[0.5] * 8, 2])) for position in positions]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def _turned(clip: np.ndarray[Any, Any], angle: float) -> np.ndarray[Any, Any]:
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    return clip @ turn.T


# Files of NTU RGB+D


def test_ntu_files(tmp_path: Path):
    still = np.zeros((25, 3))
    frames = []
    for time in range(4):
        frame = {"7": still + 0.1 * time, "8": still + 2.0 * time, "9": still + 1.0 * time}
        if time == 2:
            del frame["9"]
        frames.append(frame)
    clip = read_ntu_skeleton(write_ntu(tmp_path / "S001C002P003R002A013.skeleton", frames))
    assert clip.shape == (4, 50, 3)
    assert clip[:, 0, 0].tolist() == [0, 2, 4, 6]  # the body that moves most comes first
    assert clip[:2, 25, 0].tolist() == [0, 1]
    assert np.isnan(clip[2, 25:]).all()
    assert not np.isnan(clip[2, :25]).any()
    alone = read_ntu_skeleton(write_ntu(tmp_path / "one.skeleton", [{"1": still + 1}, {"1": still}]))
    assert not alone[:, 25:].any()
    assert ntu_name("x/S001C002P003R004A013.skeleton") == (1, 2, 3, 4, 13)
    assert ntu_name("walk.skeleton") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\n0\n", "it ends too early"),
        ("0\n", "has no tracked body in any frame"),
        ("words\n", "is not a .skeleton file of NTU RGB"),
        ("1\n1\n1 2 3\n1\n1 2 3 4 5 6 7 8 9 10 11 12\n", "a body has 10 numbers and a joint 12"),
    ],
)
def test_broken_ntu_files_are_told(tmp_path: Path, text: str, message: str):
    path = tmp_path / "broken.skeleton"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_ntu_skeleton(path)


# Preparing


def test_view_does_not_depend_on_place_and_direction():
    clip = RANDOM.normal(size=(7, 6, 3))
    view = normalise_view(clip, 0, 1, 2, 3)
    np.testing.assert_allclose(normalise_view(_turned(clip, 1.1) + np.array([3, -2, 5]), 0, 1, 2, 3), view, atol=1e-12)
    np.testing.assert_allclose(view[0, 0], 0, atol=1e-15)
    np.testing.assert_allclose(view[0, 1, :2], 0, atol=1e-12)
    assert view[0, 1, 2] > 0
    hips = view[0, 2] - view[0, 3]
    assert hips[0] > 0
    assert hips[1] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(  # nothing is bent
        np.linalg.norm(view[3, 4] - view[5, 1]), np.linalg.norm(clip[3, 4] - clip[5, 1])
    )
    flat = clip[..., :2]
    np.testing.assert_allclose(normalise_view(flat, 0, 1, 2, 3), flat - flat[0, 0])


def test_a_body_without_hips_is_moved_only():
    clip = RANDOM.normal(size=(3, 4, 3))
    clip[:, 3] = clip[:, 2]
    with pytest.warns(UserWarning, match="spine and hips of the first frame give no view"):
        moved = normalise_view(clip, 0, 1, 2, 3)
    np.testing.assert_array_equal(moved, clip - clip[0, 0])
    with pytest.raises(ValueError, match="spine must be a joint below 4, got 4"):
        normalise_view(clip, 0, 4, 2, 3)


def test_resampling():
    clip = RANDOM.normal(size=(9, 2, 3))
    np.testing.assert_array_equal(resample_frames(clip, 9), clip)
    longer = resample_frames(clip, 17)
    np.testing.assert_allclose(longer[::2], clip)
    np.testing.assert_allclose(longer[1], clip[:2].mean(0))
    np.testing.assert_allclose(resample_frames(clip, 5), clip[::2])
    assert (resample_frames(clip[:1], 4) == clip[0]).all()
    with pytest.raises(ValueError, match="frames must be at least 1"):
        resample_frames(clip, 0)


def test_gaps_are_interpolated():
    clip = np.arange(6.0).reshape(6, 1, 1).repeat(2, axis=1)
    clip[[0, 2, 3, 5], 0] = np.nan
    clip[:, 1] = np.nan
    filled = fill_missing(clip)
    assert filled[:, 0, 0].tolist() == [1, 1, 2, 3, 4, 4]
    assert not filled[:, 1].any()
    assert np.isnan(clip).any()  # the clip itself stays


def test_augmentation_keeps_shapes_and_follows_its_seed():
    augment = SkeletonAugment(crop=0.5, rotation=17, scaling=0.1)
    clip = RANDOM.normal(size=(20, 4, 3))
    lengths = {len(augment.cropped(clip, np.random.default_rng(seed))) for seed in range(60)}
    assert min(lengths) >= 10
    assert len(lengths) > 5
    turned = augment.turned(clip, np.random.default_rng(1))
    factor = np.linalg.norm(turned[0, 0]) / np.linalg.norm(clip[0, 0])
    assert 0.9 <= factor <= 1.1
    np.testing.assert_allclose(turned @ turned[0, 0], factor**2 * (clip @ clip[0, 0]))
    np.testing.assert_array_equal(turned, augment.turned(clip, np.random.default_rng(1)))
    still = SkeletonAugment(crop=1, rotation=0, scaling=0)
    np.testing.assert_allclose(still.turned(still.cropped(clip, RANDOM), RANDOM), clip)
    with pytest.raises(ValueError, match=r"crop must be in \(0, 1\], got 0"):
        SkeletonAugment(crop=0)


def test_preparation_orders_channels_and_leaves_absent_bodies_zero():
    layout, bodies = known_layout(30)  # type: ignore[misc]
    assert (layout, bodies) == (LAYOUTS["stick"], 2)
    clip = np.zeros((6, 30, 3), np.float32)
    clip[:, :15] = stick_figures(1, frames=(6, 6), hidden=0)[0][0]
    prepare = ClipPreparation(frames=8, view=layout.view, bodies=2)
    x = prepare(clip)
    assert x.shape == (90, 8)
    assert not x[45:].any()
    expected = normalise_view(resample_frames(clip[:, :15], 8), *layout.view)
    np.testing.assert_allclose(x[3 * 4 + 2], expected[:, 4, 2])
    clip[2, 3] = np.nan
    with pytest.raises(DataError, match="a joint was not seen"):
        ClipPreparation(frames=8, view=None, fill=False)(clip)
    assert known_layout(17) is None


# Sets


def test_figures_are_what_they_are_called():
    clips, labels = stick_figures(len(ACTIONS) * 2, noise=0, hidden=0, seed=2)
    assert np.bincount(labels).tolist() == [2] * len(ACTIONS)
    for clip, label in zip(clips, labels, strict=True):
        view = normalise_view(clip, *LAYOUTS["stick"].view)
        motion = np.linalg.norm(view.std(0), axis=1)
        left, right = motion[[3, 4, 5]].max(), motion[[6, 7, 8]].max()
        if ACTIONS[label].startswith("wave"):
            assert (left > right) == (ACTIONS[label] == "wave left")
        for joint, parent in LAYOUTS["stick"].bones:  # bones keep their length
            lengths = np.linalg.norm(clip[:, joint] - clip[:, parent], axis=1)
            assert np.ptp(lengths) < 1e-5
    assert np.isnan(stick_figures(3, hidden=0.5)[0][0]).any()


def test_folders_of_ntu_files_and_their_protocols(tmp_path: Path):
    for camera in (1, 2):
        for subject in (1, 3):
            for action in (1, 2):
                name = f"S001C{camera:03d}P{subject:03d}R001A{action:03d}.skeleton"
                write_ntu(tmp_path / "ntu" / name, [{"1": RANDOM.normal(size=(25, 3))} for _ in range(3)])
    write_ntu(tmp_path / "ntu" / "S001C001P001R002A001.skeleton", [{}, {}])
    (tmp_path / "skip.txt").write_text("S001C001P003R001A002\n")
    clips = read_skeletons(tmp_path / "ntu", skip=tmp_path / "skip.txt")["all"]
    assert len(clips) == 7
    assert clips.classes == ("A001", "A002")
    assert {name.split(".")[0]: reason for name, reason in clips.skipped} == {
        "S001C001P001R002A001": "has no tracked body in any frame",
        "S001C001P003R001A002": "it is in the list of files to leave out",
    }
    subjects = divide_by_protocol(clips, "cross_subject")
    assert {ntu_name(name).subject for name in subjects["train"].names} == {1}  # type: ignore[union-attr]
    assert {ntu_name(name).subject for name in subjects["test"].names} == {3}  # type: ignore[union-attr]
    views = divide_by_protocol(clips, "cross_view")
    assert {ntu_name(name).camera for name in views["train"].names} == {2}  # type: ignore[union-attr]
    write_ntu(tmp_path / "own" / "walk" / "a.skeleton", [{"1": np.ones((25, 3))}])
    own = read_skeletons(tmp_path / "own")["all"]
    assert own.classes == ("walk",)
    with pytest.raises(DataError, match="the protocol cross_view needs names such as"):
        divide_by_protocol(own, "cross_view")
    with pytest.raises(DataError, match="does not exist"):
        read_skeletons(tmp_path / "none")


def test_arrays(tmp_path: Path):
    clips = RANDOM.normal(size=(4, 6, 2, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", clips=clips, labels=["run", "sit", "run", "sit"], lengths=[6, 5, 4, 3])
    read = read_skeletons(tmp_path / "a.npz")["all"]
    assert (read.joints, read.dim, read.classes) == (10, 3, ("run", "sit"))
    assert [len(clip) for clip in read.clips] == [6, 5, 4, 3]
    np.testing.assert_array_equal(read.clips[1][2, 7], clips[1, 2, 1, 2])
    np.savez(tmp_path / "b.npz", clips_train=clips[:3], labels_train=[0, 1, 2], clips_test=clips[3:], labels_test=[2])
    assert {name: len(part) for name, part in read_skeletons(tmp_path / "b.npz").items()} == {"train": 3, "test": 1}
    for held, message in (
        ({"x": clips}, "must hold clips, or clips_train and so on; it holds x"),
        ({"clips": clips[0, 0]}, r"clips must be \(N, T, J, dim\)"),
        ({"clips": clips, "labels": [0, 1]}, r"labels must be \(4,\), got \(2,\)"),
        ({"clips": clips, "labels": [0.5] * 4}, "labels must be names, or whole numbers from 0"),
        ({"clips": clips, "lengths": [7, 1, 1, 1]}, "lengths must be 4 numbers from 1 to 6"),
        ({"clips": np.ones((1, 2, 3, 4))}, "must have joints of 2 or 3 coordinates, got 4"),
    ):
        np.savez(tmp_path / "bad.npz", **held)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            read_skeletons(tmp_path / "bad.npz")
    with pytest.raises(DataError, match="the network does not know the classes run"):
        read.with_classes(("sit", "walk"))


def test_splits_and_items():
    clips = read_skeletons("stick_figures")["all"].subset(list(range(60)))
    parts = stratified(clips, {"train": 0.7, "val": 0.1, "test": 0.2}, 0)
    assert sum(len(part) for part in parts.values()) == 60
    assert np.bincount(parts["val"].labels).tolist() == [1] * 6
    assert not set(parts["train"].names) & set(parts["test"].names)
    items = ClipDataset(clips, ClipPreparation(frames=12, view=LAYOUTS["stick"].view), SkeletonAugment())
    assert items[(3, 5)]["clip"].shape == (45, 12)
    assert items[(3, 5)]["clip"].equal(items[(3, 5)]["clip"])
    assert not items[(3, 5)]["clip"].equal(items[(3, 6)]["clip"])
    with pytest.raises(DataError, match="clips, but a split needs at least 31"):
        stratified(clips, {str(number): 1 / 31 for number in range(31)}, 0)
