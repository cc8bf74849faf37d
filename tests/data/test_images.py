"""Folders of images, the set itself, its split, and every way in which files can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convatlas.data import image_files
from convatlas.data.image_files import Unreadable, decode
from convatlas.data.images import ImageSet, check_trainable, from_arrays, read_images, stratified_split
from convatlas.errors import DataError

RNG = np.random.default_rng(0)


def picture(height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    pixels = RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with three images each."""
    for name in ("dog", "cat"):
        for i in range(3):
            save(tmp_path / "photos" / name / f"{i}.png", picture())
    return tmp_path / "photos"


def test_a_folder_of_classes(folder: Path) -> None:
    save(folder / "cat" / "deeper" / "9.BMP", picture())
    (folder / "cat" / ".hidden.png").write_bytes(b"junk")
    (folder / ".git").mkdir()
    images = read_images(folder)["all"]
    assert images.classes == ("cat", "dog")
    assert list(images.names) == [
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "cat/deeper/9.BMP",
        *(f"dog/{i}.png" for i in range(3)),
    ]
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert images.labels.dtype == np.int64
    assert (len(images), images.channels, images.skipped) == (7, 3, ())
    assert images.counts.tolist() == [4, 3]
    np.testing.assert_array_equal(images.image(4), np.asarray(Image.open(folder / "dog" / "0.png")))
    check_trainable(images)


def test_subsets_and_pickles_read_the_same_pixels(folder: Path) -> None:
    for images in (read_images(folder)["all"], read_images("digits")["all"]):
        part = images.subset([4, 1])
        assert list(part.names) == [images.names[4], images.names[1]]
        assert part.labels.tolist() == images.labels[[4, 1]].tolist()
        np.testing.assert_array_equal(part.image(0), images.image(4))
        again: ImageSet = pickle.loads(pickle.dumps(part))
        np.testing.assert_array_equal(again.image(1), images.image(1))
        assert len(part.subset([1])) == 1


@pytest.mark.parametrize(("val", "test"), [("val", None), ("Validation", "test"), ("valid", "test"), (None, "test")])
def test_a_folder_of_splits(tmp_path: Path, val: str | None, test: str | None) -> None:
    for name in filter(None, ("train", val, test)):
        save(tmp_path / name / "a" / "0.png", picture())
        save(tmp_path / name / "b" / "0.png", picture())
    (tmp_path / "notes").mkdir()
    splits = read_images(tmp_path)
    assert list(splits) == [s for s, given in (("train", True), ("val", val), ("test", test)) if given]
    assert all(s.classes == ("a", "b") and s.labels.tolist() == [0, 1] for s in splits.values())
    assert splits["train"].names[0] == "train/a/0.png"


def test_splits_share_the_classes_and_channels_of_all(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "train" / name / "0.png", picture(channels=1))
    save(tmp_path / "test" / "c" / "0.png", picture(channels=3))
    splits = read_images(tmp_path)
    assert splits["test"].labels.tolist() == [2]
    assert splits["train"].channels == splits["test"].channels == 3
    assert splits["train"].image(0).shape == (6, 5, 3)
    save(tmp_path / "test" / "d" / "0.png", picture())
    with pytest.raises(DataError, match=r"test/d is a class that .*train does not have"):
        read_images(tmp_path)


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        save(tmp_path / name / "a" / "0.png", picture())
    with pytest.raises(DataError, match="two val folders: val and valid"):
        read_images(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        save(tmp_path / name / "0.png", picture())
    assert read_images(tmp_path)["all"].classes == ("bus", "car", "train")


def test_unlabelled_folder_file_and_list(folder: Path, tmp_path: Path) -> None:
    loose = save(tmp_path / "one.jpg", picture())
    images = read_images(folder, labelled=False)["all"]
    assert len(images) == 6
    assert images.classes == ()
    assert images.labels.tolist() == [-1] * 6
    assert images.names[0] == "cat/0.png"
    single = read_images(str(loose), labelled=False, channels=1)["all"]
    assert list(single.names) == [loose.as_posix()]
    assert single.image(0).shape == (6, 5, 1)
    several = read_images([loose, folder / "dog"], labelled=False)["all"]
    assert list(several.names) == [loose.as_posix(), *((folder / "dog" / f"{i}.png").as_posix() for i in range(3))]
    np.testing.assert_array_equal(several.image(1), images.image(3))
    with pytest.raises(DataError, match="does not exist"):
        read_images([loose, folder / "nothing.png"], labelled=False)
    with pytest.raises(DataError, match="no image was given"):
        read_images([], labelled=False)
    with pytest.raises(DataError, match="not from single files"):
        read_images([loose, loose])
    with pytest.raises(DataError, match="must be a folder with one subfolder for each class"):
        read_images(loose)


def test_wrong_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; expected a folder, an \.npz file"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty: expected one subfolder of images for each class"):
        read_images(tmp_path)
    with pytest.raises(DataError, match="holds no image files"):
        read_images(tmp_path, labelled=False)
    save(tmp_path / "0.png", picture())
    with pytest.raises(DataError, match="holds 1 images, but no class subfolders"):
        read_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds no image files: expected one subfolder"):
        read_images(tmp_path)
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_images(tmp_path / ("x" * 5000))
    with pytest.raises(ValueError, match="channels must be 1, 3 or None, got 4"):
        read_images(tmp_path, channels=4)


def test_one_class_can_be_read_but_not_trained_on(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "0.png", picture())
    images = read_images(tmp_path)["all"]
    assert images.classes == ("cat",)
    with pytest.raises(DataError, match="at least two classes, got only 'cat'"):
        check_trainable(images)
    with pytest.raises(DataError, match="training needs a label for every image; 1 have none"):
        check_trainable(read_images(tmp_path, labelled=False)["all"])


def test_files_that_cannot_be_used_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cat" / "text.png").write_text("not a picture at all")
    (folder / "cat" / "empty.jpg").touch()
    (folder / "cat" / "readme.txt").write_text("hello")
    (folder / "cat" / "dangling.png").symlink_to(folder / "nothing.png")
    save(folder / "loose.png", picture())
    cut = save(folder / "dog" / "cut.jpg", picture(50, 50), quality=95)
    cut.write_bytes(cut.read_bytes()[:-800])
    cut = save(folder / "dog" / "cut.png", picture(50, 50))
    cut.write_bytes(cut.read_bytes()[:-800])
    save(folder / "dog" / "float.tiff", np.zeros((4, 4), np.float32))
    save(folder / "dog" / "wide.tiff", np.full((4, 4), 70_000, np.int32))
    save(folder / "dog" / "bomb.png", picture(80, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    images = read_images(folder)["all"]
    assert len(images) == 6
    reasons = {skipped.path: skipped.reason for skipped in images.skipped}
    expected = {
        "cat/dangling.png": "No such file or directory",
        "cat/empty.jpg": "the file is empty",
        "cat/readme.txt": "not an image file (.txt)",
        "cat/text.png": "not an image",
        "dog/bomb.png": "exceeds limit of 6000 pixels",
        "dog/cut.jpg": "image file is truncated",
        "dog/cut.png": "image file is truncated",
        "dog/float.tiff": "floating-point pixels",
        "dog/wide.tiff": "pixels from 70000 to 70000; expected at most 16 bit",
        "loose.png": "in no class folder",
    }
    assert list(reasons) == sorted(expected)
    assert all(part in reasons[name] for name, part in expected.items()), reasons


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_text("text")
    with pytest.raises(
        DataError, match=r"none of the 2 image files .* can be read; first: a/0.png cannot be read: not an"
    ):
        read_images(tmp_path)
    with pytest.raises(DataError, match=r"0.png cannot be read: not an image"):
        read_images(tmp_path / "a" / "0.png", labelled=False)
    save(tmp_path / "a" / "1.png", picture())
    images = read_images(tmp_path)["all"]
    assert images.classes == ("a", "b")
    with pytest.raises(DataError, match="1 of 2 classes have no readable image: 'b'"):
        check_trainable(images)


def test_of_very_many_files_only_the_headers_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = save(folder / "dog" / "cut.jpg", picture(64, 64), quality=95)
    cut.write_bytes(cut.read_bytes()[:-800])
    (folder / "dog" / "text.png").write_text("text")
    monkeypatch.setattr(image_files, "_DECODE_ALL", 5)
    images = read_images(folder)["all"]
    assert [skipped.path for skipped in images.skipped] == ["dog/text.png"]
    with pytest.raises(Unreadable, match=r"dog/cut\.jpg cannot be read: image file is truncated") as caught:
        images.image(list(images.names).index("dog/cut.jpg"))
    assert caught.value.name == "dog/cut.jpg"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


def test_a_file_that_fails_later(folder: Path) -> None:
    images = read_images(folder)["all"]
    (folder / "cat" / "0.png").unlink()
    with pytest.raises(Unreadable, match=r"cat/0\.png cannot be read: No such file"):
        images.image(0)


def test_channels_of_a_folder(tmp_path: Path) -> None:
    grey = picture(channels=1)
    save(tmp_path / "a" / "0.png", grey)
    save(tmp_path / "b" / "0.png", grey > 128)
    images = read_images(tmp_path)["all"]
    assert images.channels == 1
    np.testing.assert_array_equal(images.image(0)[..., 0], grey)
    np.testing.assert_array_equal(images.image(1)[..., 0], np.where(grey > 128, 255, 0))
    coloured = read_images(tmp_path, channels=3)["all"]
    np.testing.assert_array_equal(coloured.image(0), grey[..., None].repeat(3, 2))


def test_grey_from_colour_is_pillows(tmp_path: Path) -> None:
    pixels = picture()
    grey = decode(save(tmp_path / "0.png", pixels), 1)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_is_scaled_with_rounding(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], np.uint16)
    pixels = decode(save(tmp_path / f"0.{suffix}", values), 1)[..., 0]
    assert pixels.tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(decode(tmp_path / f"0.{suffix}", 3)[..., 2], pixels)


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    assert decode(save(tmp_path / "0.png", pixels), 3).tolist() == [[[255, 255, 255], [200, 100, 0], [244, 224, 204]]]
    grey = np.array([[[10, 0], [10, 255]]], np.uint8)
    assert decode(save(tmp_path / "1.png", grey), 1).tolist() == [[[255], [10]]]


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(tmp_path / "0.png")
    assert decode(tmp_path / "0.png", 3).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    picture.save(tmp_path / "1.png", transparency=1)
    assert decode(tmp_path / "1.png", 3).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_cmyk_animations_and_other_suffixes(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "0.jpg", quality=100)
    red = decode(tmp_path / "0.jpg", 3)
    assert red.shape == (8, 8, 3)
    assert abs(red.astype(int) - [255, 0, 0]).max() <= 3
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("lime", "blue")]
    frames[0].save(tmp_path / "1.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "1.gif", 3)[0, 0].tolist() == [0, 255, 0]
    frames[1].save(tmp_path / "2.webp", lossless=True)
    assert decode(tmp_path / "2.webp", 3)[0, 0].tolist() == [0, 0, 255]
    frames[1].save(tmp_path / "3.jpg", format="PNG")  # the content counts, not the name
    assert decode(tmp_path / "3.jpg", 3)[0, 0].tolist() == [0, 0, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = picture(2, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save(tmp_path / "0.png", pixels, exif=exif)
    np.testing.assert_array_equal(decode(tmp_path / "0.png", 3), np.rot90(pixels, -1))


def test_with_classes_maps_by_name() -> None:
    images = from_arrays(np.zeros((3, 4, 4), np.uint8), np.array([3, 5, 3]))
    assert images.classes == ("3", "5")
    mapped = images.with_classes([str(i) for i in range(10)])
    assert mapped.labels.tolist() == [3, 5, 3]
    assert mapped.classes[9] == "9"
    with pytest.raises(DataError, match="1 classes that are not among the 2 expected ones: '5'"):
        images.with_classes(["3", "4"])
    assert images.subset([0, 2]).with_classes(["3", "4"]).labels.tolist() == [0, 0]
    unlabelled = from_arrays(np.zeros((3, 4, 4), np.uint8))
    assert unlabelled.with_classes(["a"]).labels.tolist() == [-1, -1, -1]


def test_stratified_split() -> None:
    digits = read_images("digits")["all"]
    parts = stratified_split(digits, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    assert [len(part) for part in parts.values()] == [1258, 180, 359]
    names = [name for part in parts.values() for name in part.names]
    assert sorted(names) == sorted(digits.names)
    for part, share in zip(parts.values(), (0.7, 0.1, 0.2), strict=True):
        assert abs(part.counts - share * digits.counts).max() < 1.5
    again = stratified_split(digits, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    assert all(list(parts[name].names) == list(again[name].names) for name in parts)
    other = stratified_split(digits, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=4)
    assert list(other["test"].names) != list(parts["test"].names)


def test_stratified_split_of_small_sets() -> None:
    images = from_arrays(np.zeros((9, 4, 4), np.uint8), np.array([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    parts = stratified_split(images, {"train": 0.75, "val": 0.25}, seed=0)
    assert parts["val"].counts.tolist() == [1, 1, 0]
    assert parts["train"].counts.tolist() == [3, 3, 1]
    with pytest.raises(
        DataError, match=r"9 images of 3 classes are too few to split into train \(0.95\), val \(0.05\)"
    ):
        stratified_split(images, {"train": 0.95, "val": 0.05}, seed=0)
    with pytest.raises(ValueError, match="fractions must be positive and add up to 1"):
        stratified_split(images, {"train": 0.8, "val": 0.1}, seed=0)
    assert len(stratified_split(images, {"all": 1.0}, seed=0)["all"]) == 9
    unlabelled = from_arrays(np.zeros((10, 4, 4), np.uint8))
    assert [len(p) for p in stratified_split(unlabelled, {"a": 0.5, "b": 0.5}, seed=0).values()] == [5, 5]
