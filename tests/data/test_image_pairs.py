"""Images and pairs are found however they are laid out, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convatlas.data.image_files import Unreadable
from convatlas.data.image_pairs import PHOTOGRAPHS, read_pairs
from convatlas.errors import DataError
from data.clips import frames_of, write_clip


def write(path: Path, height: int, width: int, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 50, 0)).save(path)


def pair(high: Path, low: Path, scale: int = 3, size: tuple[int, int] = (7, 5)) -> None:
    write(low, *size)
    write(high, *(scale * length for length in size))


def shapes(pairs: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    found = []
    for entry in pairs.entries:
        sample = entry.read()
        found.append((entry.name, sample.high[0].shape, sample.low and sample.low[0].shape))
    return found


def test_photographs_need_no_files():
    sets = read_pairs("photographs", scale=3)
    assert {split: tuple(entry.name for entry in pairs.entries) for split, pairs in sets.items()} == PHOTOGRAPHS
    for pairs in sets.values():
        for _, shape, low in shapes(pairs):
            assert low is None
            assert min(shape[:2]) >= 300
            assert shape[2] in (1, 3)


def test_a_folder_of_images_at_any_depth(tmp_path: Path):
    for name in ("b.png", "deep/er/a.jpg"):
        write(tmp_path / name, 30, 20)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.png").write_text("x")
    (pairs,) = read_pairs(tmp_path, scale=3).values()
    assert shapes(pairs) == [("b.png", (30, 20, 3), None), ("deep/er/a.jpg", (30, 20, 3), None)]
    reasons = {each.path: each.reason for each in pairs.skipped}
    assert reasons == {"broken.png": "not an image", "notes.txt": "no image and no clip"}


def test_one_image(tmp_path: Path):
    write(tmp_path / "a.png", 30, 20)
    assert shapes(read_pairs(tmp_path / "a.png", scale=3)["all"]) == [("a.png", (30, 20, 3), None)]


def test_splits(tmp_path: Path):
    for split in ("train", "valid", "test"):
        write(tmp_path / split / f"{split}.png", 30, 20)
    sets = read_pairs(tmp_path, scale=3)
    assert {split: shapes(pairs)[0][0] for split, pairs in sets.items()} == {
        "train": "train/train.png",
        "val": "valid/valid.png",
        "test": "test/test.png",
    }


def tagged(root: Path) -> None:
    for name in ("img_001_SRF_3", "img_002_SRF_3"):
        pair(root / f"{name}_HR.png", root / f"{name}_LR.png")


def folders(root: Path) -> None:
    for name in ("a", "b"):
        pair(root / "HR" / f"{name}.png", root / "LR" / f"{name}.png")


def marked(root: Path) -> None:
    for name in ("a", "b"):
        pair(root / "GTmod12" / f"{name}.png", root / "LRbicx3" / f"{name}x3.png")
        write(root / "LRbicx2" / f"{name}x2.png", 10, 7)


def nested(root: Path) -> None:
    for name in ("0801", "0802"):
        pair(root / "high_res" / f"{name}.png", root / "low" / "X3" / f"{name}x3.png")
        write(root / "low" / "X2" / f"{name}x2.png", 10, 7)


@pytest.mark.parametrize("layout", [tagged, folders, marked, nested])
def test_pairs_are_found_by_their_names(tmp_path: Path, layout: Any):
    layout(tmp_path)
    (pairs,) = read_pairs(tmp_path, scale=3).values()
    assert [(high, low) for _, high, low in shapes(pairs)] == [((21, 15, 3), (7, 5, 3))] * 2
    assert pairs.skipped == ()


def test_pairs_in_splits(tmp_path: Path):
    folders(tmp_path / "train")
    tagged(tmp_path / "test")
    sets = read_pairs(tmp_path, scale=3)
    assert {split: len(pairs) for split, pairs in sets.items()} == {"train": 2, "test": 2}
    assert all(low == (7, 5, 3) for pairs in sets.values() for _, _, low in shapes(pairs))


def test_splits_by_the_names_of_folders(tmp_path: Path):
    for split, numbers in (("train", ("0001", "0002", "0003")), ("valid", ("0801",))):
        for number in numbers:
            high, low = f"DIV2K_{split}_HR/{number}.png", f"DIV2K_{split}_LR_bicubic/X3/{number}x3.png"
            pair(tmp_path / high, tmp_path / low)
    sets = read_pairs(tmp_path, scale=3)
    assert {split: len(pairs) for split, pairs in sets.items()} == {"train": 3, "val": 1}


def test_pairs_that_do_not_fit_are_named(tmp_path: Path):
    pair(tmp_path / "a_HR.png", tmp_path / "a_LR.png", scale=2)
    pair(tmp_path / "b_HR.png", tmp_path / "b_LR.png", scale=3)
    write(tmp_path / "c_HR.png", 21, 15)
    write(tmp_path / "d_LR.png", 7, 5)
    write(tmp_path / "e.png", 21, 15)
    write(tmp_path / "f_HR.png", 22, 17)  # as much too large as is left over
    write(tmp_path / "f_LR.png", 7, 5)
    (pairs,) = read_pairs(tmp_path, scale=3).values()
    assert shapes(pairs) == [("b_HR.png", (21, 15, 3), (7, 5, 3)), ("f_HR.png", (21, 15, 3), (7, 5, 3))]
    assert {each.path: each.reason for each in pairs.skipped} == {
        "a_HR.png": "14 x 10 pixels are not 3 times 7 x 5",
        "c_HR.png": "has no partner of low resolution",
        "d_LR.png": "has no partner",
        "e.png": "has no partner",
    }
    with pytest.raises(DataError, match=r"none of the 6 files of .* can be used; first: a_HR.png: 14 x 10 pixels are"):
        read_pairs(tmp_path, scale=5)


def test_depth_is_kept(tmp_path: Path):
    Image.fromarray(np.full((9, 6), 300, np.uint16)).save(tmp_path / "a.png")
    sample = read_pairs(tmp_path, scale=3)["all"].entries[0].read()
    assert sample.high[0].dtype == np.uint16
    assert sample.high[0].shape == (9, 6, 1)


# -- clips -------------------------------------------------------------------------------------------------------------


def test_frames_of_clips_are_images(tmp_path: Path):
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", frames_of(12), sound=None)
    (pairs,) = read_pairs(tmp_path, scale=2, frames_per_clip=4).values()
    assert [entry.name for entry in pairs.entries] == [f"clip.mp4/{number:05d}" for number in (0, 4, 7, 11)]
    assert {entry.clip for entry in pairs.entries} == {"clip.mp4"}
    brightness = [entry.read().high[0][0, -1].mean() for entry in [*pairs.entries, pairs.entries[1]]]
    assert [round((value - 20) / 15) for value in brightness] == [0, 4, 7, 11, 4]


def test_windows_of_frames(tmp_path: Path):
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", frames_of(12), sound=None)
    write(tmp_path / "a.png", 30, 20)
    (pairs,) = read_pairs(tmp_path, scale=2, frames=3, frames_per_clip=20).values()
    assert len(pairs) == 10
    for number in (0, 1, 5, 9, 2):
        window = pairs.entries[number].read().high
        assert [round((frame[0, -1].mean() - 20) / 15) for frame in window] == [number, number + 1, number + 2]
    assert [each.path for each in pairs.skipped] == ["a.png"]
    assert "3 consecutive frames are needed" in pairs.skipped[0].reason


def test_damaged_clips_are_left_out(tmp_path: Path):
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"x" * 99)
    write(tmp_path / "a.png", 30, 20)
    (pairs,) = read_pairs(tmp_path, scale=2).values()
    assert [(each.path, each.reason.split(" (")[0]) for each in pairs.skipped] == [
        ("bad.mp4", "it is damaged or no video")
    ]


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_hdf5_of_patches_and_of_groups(tmp_path: Path):
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    low, high = 255 * random.random((3, 4, 4), np.float32), 255 * random.random((3, 12, 12), np.float32)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["lr"], file["hr"] = low, high
    with h5py.File(tmp_path / "eval.h5", "w") as file:
        for name, arrays in (("lr", low), ("hr", high)):
            group = file.create_group(name)
            for row, array in enumerate(arrays):
                group[str(row)] = array
    for name in ("train.h5", "eval.h5"):
        pairs = read_pairs(tmp_path / name, scale=3)["all"]
        assert len(pairs) == 3
        sample = pairs.entries[1].read()
        assert sample.luma
        assert sample.low is not None
        assert np.allclose(sample.low[0][..., 0], low[1] / 255)
        assert np.allclose(sample.high[0][..., 0], high[1] / 255)
        assert sample.high[0].dtype == np.float32


def test_npz_of_images(tmp_path: Path):
    low, high = np.full((2, 4, 4, 3), 9, np.uint8), np.full((2, 12, 12, 3), 7, np.uint8)
    np.savez(tmp_path / "a.npz", lr=low, hr=high)
    sample = read_pairs(tmp_path / "a.npz", scale=3)["all"].entries[0].read()
    assert not sample.luma
    assert sample.high[0].dtype == np.uint8
    np.savez(tmp_path / "b.npz", lr=low[:1], hr=high)
    with pytest.raises(DataError, match="must hold as many arrays hr as lr, got 2 and 1"):
        read_pairs(tmp_path / "b.npz", scale=3)
    np.savez(tmp_path / "c.npz", lr=np.zeros((1, 4, 4, 5)), hr=np.zeros((1, 12, 12, 5)))
    with pytest.raises(Unreadable, match="are no images"):
        read_pairs(tmp_path / "c.npz", scale=3)["all"].entries[0].read()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: root / "missing",
            "missing does not exist; expected a folder of images, a file, or 'photographs'",
        ),
        (lambda root: root, "holds no images and no clips"),
        (lambda root: (root / "a.npz").write_text("x") and root / "a.npz", "a.npz cannot be read"),
        (
            lambda root: (root / "a.png").write_text("x") and root / "a.png",
            r"none of the 1 files .* a.png: not an image",
        ),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, make: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_pairs(make(tmp_path), scale=3)
