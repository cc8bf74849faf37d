"""Linear files of every kind, folders of scenes, single frames, arrays, what is refused, and the simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from convatlas.data.exposure_pairs import ExposurePair, exposure_files, read_exposure_pairs, scene, write_scene
from convatlas.data.image_files import Unreadable
from convatlas.data.linear_images import Levels, LinearImage, read_linear_image
from convatlas.data.png16 import write_png16
from convatlas.data.simulators.exposures import Camera, draw_illuminant, expose, illuminant_exposures
from convatlas.errors import DataError


def deep(seed: int = 0, size: tuple[int, int] = (10, 14)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 65536, (*size, 3)).astype(np.uint16)


def made(seed: int = 0, **options: Any) -> ExposurePair:
    found = illuminant_exposures(seed, (12, 16), **options)
    return ExposurePair(str(seed), LinearImage(found.long), LinearImage(found.short), found.illuminant, found.ratio)


# -- files -------------------------------------------------------------------------------------------------------------


def test_16_bits_come_back_from_every_file(tmp_path: Path):
    pixels = deep()
    (tmp_path / "a.png").write_bytes(write_png16(pixels))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    tifffile.imwrite(tmp_path / "z.tiff", pixels, photometric="rgb", compression="zlib")
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", image=pixels)
    for name in ("a.png", "a.tif", "z.tiff", "a.npy", "a.npz"):
        found = read_linear_image(tmp_path / name)
        assert np.array_equal(found.pixels, pixels), name
        np.testing.assert_allclose(found.array(), pixels / 65535, rtol=1e-5)
    values = (pixels / 65535).astype(np.float32)
    tifffile.imwrite(tmp_path / "f.tif", values, photometric="rgb")
    assert np.array_equal(read_linear_image(tmp_path / "f.tif").array(), values)


def test_levels():
    pixels = np.array([[[0, 64, 1023], [543, 564, 600]]], np.uint16)
    found = LinearImage(pixels, Levels(black=64, white=1023)).array()
    np.testing.assert_allclose(found[0, 0], [0, 0, 1])
    np.testing.assert_allclose(found[0, 1], [479 / 959, 500 / 959, 536 / 959], rtol=1e-6)
    each = LinearImage(pixels, Levels(black=(0, 64, 23), white=1023)).array()
    np.testing.assert_allclose(each[0, 1], [543 / 1023, 500 / 959, 577 / 1000], rtol=1e-6)


def test_srgb_is_undone_and_8_bits_need_it():
    pixels = np.full((2, 2, 3), 188, np.uint8)
    with pytest.raises(ValueError, match="8 bits a channel, which hold gamma-encoded values"):
        LinearImage(pixels)
    assert float(LinearImage(pixels, Levels(srgb=True)).array()[0, 0, 0]) == pytest.approx(0.5029, abs=1e-3)


def test_reduction_is_a_mean_and_strips_make_the_whole():
    image = LinearImage(deep(1, (131, 90)))
    whole = image.array()
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in image.strips()]), whole)
    small = image.reduced(33)  # squares of 4
    assert small.shape == (32, 22, 3)
    np.testing.assert_allclose(small[3, 5], whole[12:16, 20:24].mean((0, 1)), rtol=1e-5)
    assert image.reduced(131).shape == whole.shape
    assert image.reduced(1).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (np.zeros((4, 4, 4), np.uint16), r"expected an image \(H, W, 3\) of linear RGB, got \(4, 4, 4\)"),
        (np.zeros((4, 4), np.uint16), "expected an image"),
        (np.full((2, 2, 3), 1.5, np.float32), r"expected linear RGB in \[0, 1\], got values from 1.5 to 1.5"),
        (np.full((2, 2, 3), -0.5, np.float32), r"expected linear RGB in \[0, 1\]"),
        (np.full((2, 2, 3), np.nan, np.float32), r"expected linear RGB in \[0, 1\]"),
        (np.zeros((2, 2, 3), np.int32), "uint8, uint16 or floating point"),
    ],
)
def test_what_is_no_linear_image(pixels: np.ndarray[Any, Any], match: str):
    with pytest.raises(ValueError, match=match):
        LinearImage(pixels)


def test_bad_levels_and_files(tmp_path: Path):
    for options, match in (
        ({"black": -1}, "black must be"),
        ({"black": (1, 2)}, "black must be"),
        ({"black": 9, "white": 9}, "white must be above black"),
    ):
        with pytest.raises(ValueError, match=match):
            Levels(**options)
    with pytest.raises(ValueError, match="white must be above black, got 1 and 2"):
        LinearImage(np.zeros((2, 2, 3), np.float32), Levels(black=2.0))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.tif").write_bytes(b"no picture")
    np.savez(tmp_path / "two.npz", a=deep(), b=deep())
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "alpha.png")
    for name in ("broken.png", "broken.tif", "two.npz", "alpha.png", "missing.npy"):
        with pytest.raises(Unreadable, match=name):
            read_linear_image(tmp_path / name)


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_a_scene_comes_back_with_all_that_is_told(tmp_path: Path):
    pair = made()
    write_scene(tmp_path / "one", pair)
    meta = json.loads((tmp_path / "one" / "meta.json").read_text())
    meta |= {"charts": [[2, 3, 4, 5]]}
    (tmp_path / "one" / "meta.json").write_text(json.dumps(meta))
    found = scene(tmp_path / "one")
    np.testing.assert_allclose(found.long.array(), pair.long.array(), atol=1e-5)
    np.testing.assert_allclose(found.illuminant, pair.illuminant)
    assert found.ratio == pair.ratio
    assert found.mask is not None
    assert not found.mask[3:8, 2:6].any()
    assert found.mask.sum() == 12 * 16 - 20
    Image.fromarray(np.eye(12, 16, dtype=np.uint8) * 255).save(tmp_path / "one" / "mask.png")
    assert scene(tmp_path / "one").mask.sum() < found.mask.sum()
    write_scene(tmp_path / "two", found)
    np.testing.assert_array_equal(scene(tmp_path / "two").mask, found.mask)
    _, _, small = scene(tmp_path / "one").reduced(4)
    assert small.shape == (3, 4)
    assert not small[1].all()  # a square with a part of a chart is left out


def test_meta_gives_levels_and_times(tmp_path: Path):
    folder = tmp_path / "s"
    folder.mkdir()
    long = np.full((4, 4, 3), 500, np.uint16)
    (folder / "long.png").write_bytes(write_png16(long))
    np.save(folder / "short.npy", long // 4)
    meta = {"black": 100, "white": 900, "exposure_times": [0.08, 0.02], "illuminant": [1, 2, 2]}
    (folder / "meta.json").write_text(json.dumps(meta))
    found = scene(folder, Levels(black=7))
    assert found.ratio == pytest.approx(4)
    np.testing.assert_allclose(found.illuminant, [1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(found.long.array(), 0.5)


def test_sources_splits_and_what_is_left_out(tmp_path: Path):
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            write_scene(tmp_path / "split" / split / f"{number}", made(number))
    sets = read_exposure_pairs(tmp_path / "split")
    assert {name: len(found) for name, found in sets.items()} == {"train": 3, "test": 2}
    (tmp_path / "split" / "test" / "0" / "short.png").unlink()
    again = read_exposure_pairs(tmp_path / "split")["test"]
    assert [(each.path, each.reason) for each in again.skipped] == [("test/0", "it has no short exposure")]
    simulated = read_exposure_pairs("simulated")["all"]
    assert len(simulated) == 400
    np.testing.assert_array_equal(simulated.entries[5].read().long.pixels, simulated.entries[5].read().long.pixels)


def test_pairs_are_simulated_from_single_frames(tmp_path: Path):
    frame = (made(3).long.array() * 30000).astype(np.uint16)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(write_png16(frame))
    (tmp_path / "a_metadata.json").write_text('{"illuminant_color_raw": [0.7, 0.65, 0.28]}')
    (tmp_path / "illuminants.csv").write_text("file,r,g,b\nb.png,0.5,0.7,0.4\n")
    found = read_exposure_pairs(tmp_path, camera=Camera(ratios=(8.0,), clipped=(0.1, 0.1)))["all"]
    assert [each.name for each in found.entries] == ["a.png", "b.png"]
    assert [each.path for each in found.skipped] == ["c.png"]
    first = found.entries[0].read()
    np.testing.assert_allclose(first.illuminant / first.illuminant[0], [1, 0.65 / 0.7, 0.4], rtol=1e-6)
    assert first.ratio == 8
    long, short = first.long.array(), first.short.array()
    assert 0.05 < (long >= 1).any(2).mean() < 0.2
    clear = long < 0.99
    np.testing.assert_allclose(8 * short[clear], long[clear], atol=8 / 1023)
    np.testing.assert_array_equal(found.entries[0].read().long.pixels, first.long.pixels)


def test_arrays(tmp_path: Path):
    pairs = [made(number) for number in range(3)]
    columns = {
        "long": np.stack([each.long.pixels for each in pairs]),
        "short": np.stack([each.short.pixels for each in pairs]),
        "illuminant": np.stack([each.illuminant for each in pairs]),
        "exposure_ratio": np.array([each.ratio for each in pairs]),
    }
    np.savez(tmp_path / "set.npz", **columns)
    found = read_exposure_pairs(tmp_path / "set.npz")["all"]
    assert [each.name for each in found.entries] == [f"set.npz/{row:05d}" for row in range(3)]
    second = found.entries[1].read()
    np.testing.assert_allclose(second.illuminant, pairs[1].illuminant)
    np.testing.assert_array_equal(second.short.pixels, pairs[1].short.pixels)
    np.savez(tmp_path / "bad.npz", long=columns["long"])
    with pytest.raises(DataError, match="must hold long and short, got long"):
        read_exposure_pairs(tmp_path / "bad.npz")


def test_files_of_a_user(tmp_path: Path):
    write_scene(tmp_path / "scenes" / "one", made())
    folder = exposure_files([tmp_path / "scenes"], Levels())
    assert [each.name for each in folder.entries] == ["one"]
    two = [tmp_path / "scenes" / "one" / f"{role}.png" for role in ("long", "short")]
    assert exposure_files(two, Levels()).entries[0].read().short is not None
    with pytest.raises(Unreadable, match="long exposure is darker than short"):
        exposure_files(two[::-1], Levels()).entries[0].read()
    assert exposure_files(two[:1], Levels()).entries[0].read().short is None
    with pytest.raises(DataError, match="does not exist"):
        exposure_files([tmp_path / "nothing.png"], Levels())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no scene"):
        exposure_files([tmp_path / "empty"], Levels())


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"illuminant": [1, 0, 1]}, "illuminant must be three numbers above 0"),
        ({"illuminant": "red"}, "illuminant must be three numbers"),
        ({"exposure_times": [1, 4]}, "the long exposure must be longer"),
        ({"exposure_times": [1]}, "exposure_times must be two numbers"),
        ({"charts": [[1, 2, 3]]}, "charts must be boxes"),
        ({"black": 70000}, "white must be above black"),
        ([1], "must hold names and values"),
    ],
)
def test_bad_meta(meta: Any, match: str, tmp_path: Path):
    write_scene(tmp_path / "one", made())
    (tmp_path / "one" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(Unreadable, match=match):
        scene(tmp_path / "one")


def test_sizes_must_fit(tmp_path: Path):
    write_scene(tmp_path / "one", made())
    (tmp_path / "one" / "short.png").write_bytes(write_png16(deep() // 100))
    with pytest.raises(Unreadable, match="long and short must have the same size"):
        scene(tmp_path / "one")
    with pytest.raises(DataError, match="does not exist"):
        read_exposure_pairs(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no scenes"):
        read_exposure_pairs(tmp_path / "empty")


# -- simulation --------------------------------------------------------------------------------------------------------


def test_lights_lie_along_their_line():
    random = np.random.default_rng(0)
    rgb = np.stack([draw_illuminant(random) for _ in range(500)])
    u, v = np.log(rgb[:, 1] / rgb[:, 0]), np.log(rgb[:, 1] / rgb[:, 2])
    np.testing.assert_allclose(np.linalg.norm(rgb, axis=1), 1)
    assert -0.3 <= u.min() < -0.25
    assert 0.75 < u.max() <= 0.8
    assert np.std(v - (1.1 - 0.9 * u)) == pytest.approx(0.1, rel=0.1)


def test_exposures_clip_as_asked_and_are_quantised():
    camera = Camera(ratios=(4.0,), clipped=(0.2, 0.2), shot=0, read=0, bits=8)
    found = illuminant_exposures(1, (40, 40), camera)
    assert (found.long >= 1).any(2).mean() == pytest.approx(0.2, abs=0.05)
    np.testing.assert_allclose(found.long * 255, np.round(found.long * 255), atol=1e-4)
    clear = found.long < 0.99
    np.testing.assert_allclose(4 * found.short[clear], found.long[clear], atol=4.1 / 255)
    noisy = illuminant_exposures(1, (40, 40), Camera(ratios=(4.0,), clipped=(0.2, 0.2), shot=0, read=0.02))
    assert np.std((noisy.short - found.short)[found.short > 0.1]) == pytest.approx(0.02, rel=0.15)


def test_a_light_can_be_given_and_bad_cameras_are_told():
    light = np.array([0.5, 0.7, 0.3])
    found = illuminant_exposures(0, (8, 8), illuminant=light)
    np.testing.assert_allclose(found.illuminant, light / np.linalg.norm(light))
    for options in ({"ratios": (1.0,)}, {"clipped": (0.5, 0.2)}, {"read": -1.0}, {"bits": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Camera(**options)
    dark = expose(np.zeros((4, 4, 3)), light, Camera(), np.random.default_rng(0), clean=False)
    assert dark.long.max() == 0
