"""The super-resolution task: every form of data, what it learns and writes, whole files, and how data can be bad."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from convatlas.data.image_pairs import Sample, read_pairs
from convatlas.data.pictures import Picture, read_picture, write_picture
from convatlas.data.video import read_video
from convatlas.errors import CheckpointError, DataError, UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.restoration.evaluation import ClipQuality, macs_per_pixel, mean_quality, measure_clip, measure_image
from convatlas.restoration.patches import PatchSet, Shelf, learning_pair
from convatlas.restoration.protocol import Protocol, as_tensor
from convatlas.restoration.super_resolution import SuperResolution
from convatlas.restoration.upscaling import upscale_image
from convatlas.training.optim import learning_rate
from convatlas.training.run import Run, from_mapping, to_mapping
from convatlas.training.settings import Training
from convatlas.training.task import open_task, split_settings
from convatlas.weights import save_weights
from data.clips import frames_of, sound_packets, write_clip
from restoration.conftest import Trained
from restoration.scenes import SHORT, scene, write_scenes

QUICK = Training(**{**SHORT, "epochs": 1})


def part(report: Any, title: str) -> dict[str, Any]:
    document = json.loads(report.to_json())
    parts = [part for section in document["sections"] for part in section["parts"]]
    return next(part for part in parts if part.get("title") == title)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def small(data: Any, **settings: Any) -> SuperResolution:
    fixed = {"model": "espcn_x2", "options": {"channels": 8}, "patch_size": 9, "patch_stride": 8}
    return SuperResolution(data=str(data), **{**fixed, **settings})


# -- patches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_lie_on_a_grid_and_fit_each_other(channels: int):
    samples = [(scene(0), 2), (scene(1, (30, 34)), 2), (scene(2, (16, 60)), 2)]
    protocol = Protocol(downscale="pillow")
    pairs = [learning_pair(Sample((image,)), protocol, scale=2, channels=channels) for image, _ in samples]
    assert [pair.low.shape for pair in pairs] == [(channels, 32, 36), (channels, 15, 17), (channels, 8, 30)]
    patches = PatchSet(pairs, 2, 9, 5)
    assert len(patches) == 5 * 6 + 2 * 2  # the last image is smaller than a patch
    item = patches[30 + 3]
    assert item["low"].shape == (channels, 9, 9)
    assert item["high"].shape == (channels, 18, 18)
    seen = pairs[1].high if channels == 1 else pairs[1].high.astype(np.float32) / 255
    assert np.allclose(item["high"].numpy(), seen[:, 10:28, 10:28])
    small_image = protocol.shrink(samples[1][0], 2)
    if channels == 3:
        assert np.allclose(255 * item["low"].numpy(), np.moveaxis(small_image, -1, 0)[:, 5:14, 5:14])
    assert torch.equal(patches[(7, 123)]["low"], patches[7]["low"])


def test_patches_are_turned_in_eight_ways_alike():
    pairs = [learning_pair(Sample((scene(0),)), Protocol(), scale=2, channels=1)]
    turned = PatchSet(pairs, 2, 9, 5, turn=True)
    lows = {tuple(turned[(3, seed)]["low"].flatten().tolist()) for seed in range(16)}
    assert len(lows) == 8
    assert torch.equal(turned[(3, 5)]["low"], turned[(3, 13)]["low"])
    for seed in range(8):
        item = turned[(3, seed)]
        coarse = item["high"].unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
        assert (coarse - item["low"]).abs().mean() < 0.02  # both were turned alike


def test_many_images_lie_in_a_file():
    shelf = Shelf(limit=1000)
    arrays = [np.random.default_rng(n).random((3, 10, n + 1)).astype(np.float32) for n in range(8)]
    kept = [shelf.keep(array) for array in arrays]
    assert isinstance(kept[-1], np.memmap)
    assert not isinstance(kept[0], np.memmap)
    assert all(np.array_equal(a, b) for a, b in zip(kept, arrays, strict=True))
    assert shelf.held <= 1000


# -- every form of data ------------------------------------------------------------------------------------------------


def make_folder(root: Path) -> Path:
    return write_scenes(root / "data")


def make_splits(root: Path) -> Path:
    for split, count in (("train", 4), ("val", 1), ("test", 2)):
        write_scenes(root / "data" / split, count, seed=10 * count)
    return root / "data"


def make_pairs(root: Path) -> Path:
    write_scenes(root / "data" / "HR", 6)
    (root / "data" / "LR").mkdir()
    for path in (root / "data" / "HR").iterdir():
        with Image.open(path) as image:
            image.resize((36, 32), Image.Resampling.BOX).save(root / "data" / "LR" / f"{path.stem}x2.png")
    return root / "data"


def make_mixed(root: Path) -> Path:
    data = write_scenes(root / "data", 6)
    write_picture(data / "deep.png", Picture(scene(90).astype(np.uint16) * 257))
    Image.fromarray(scene(91)[..., 0]).save(data / "grey.png")
    Image.fromarray(scene(92, (41, 57))).convert("RGBA").save(data / "odd.png")
    return data


def make_clip(root: Path) -> Path:
    pytest.importorskip("av")
    frames = [np.roll(scene(0), number, 1) for number in range(14)]
    return write_clip(root / "clip.mp4", frames, sound=None)


def make_npz(root: Path) -> Path:
    high = np.stack([scene(seed) for seed in range(6)])
    np.savez(root / "data.npz", hr=high, lr=high[:, ::2, ::2])
    return root / "data.npz"


def make_luma(root: Path) -> Path:
    high = np.stack([scene(seed)[..., 1] for seed in range(6)]).astype(np.float32)
    np.savez(root / "data.npz", hr=high, lr=high[:, ::2, ::2])
    return root / "data.npz"


@pytest.mark.parametrize(
    ("make", "settings", "counts"),
    [
        (make_folder, {}, {"train": 5, "val": 1, "test": 2}),
        (make_folder, {"colour": "rgb", "turn": True}, {"train": 5, "val": 1, "test": 2}),
        (make_splits, {"protocol": Protocol(downscale="gaussian")}, {"train": 4, "val": 1, "test": 2}),
        (make_pairs, {}, {"train": 4, "val": 1, "test": 1}),
        (make_mixed, {"protocol": Protocol(downscale="pillow", luma="studio256", rounding=False)}, None),
        (make_mixed, {"colour": "rgb"}, None),
        (make_clip, {"frames_per_clip": 6}, {"train": 4, "val": 1, "test": 1}),
        (make_clip, {"options": {"channels": 8, "frames": 3}, "frames_per_clip": 6}, {"train": 4, "val": 1, "test": 1}),
        (make_npz, {"colour": "rgb"}, {"train": 4, "val": 1, "test": 1}),
        (make_luma, {}, {"train": 4, "val": 1, "test": 1}),
        (make_folder, {"model": "srcnn_915_x2", "options": {"dims": [4, 4]}}, {"train": 5, "val": 1, "test": 2}),
        (make_folder, {"model": "vdsr_x2", "options": {"depth": 3, "dim": 4}}, None),
        (make_folder, {"model": "edsr_baseline_x2", "options": {"depth": 1, "dim": 4}, "colour": "rgb"}, None),
        (make_folder, {"model": "wdsr_x2", "options": {"depth": 1, "dim": 4}, "colour": "rgb"}, None),
    ],
    ids=lambda value: value.__name__[5:] if callable(value) else None,
)
def test_every_form_of_data_goes_through_training_and_evaluation(
    tmp_path: Path, make: Any, settings: dict[str, Any], counts: dict[str, int] | None
):
    task = small(make(tmp_path), **settings)
    task.fit(tmp_path / "run", QUICK)
    sizes = {name: len(pairs) for name, pairs in task.splits.items()}
    assert counts is None or sizes == counts
    assert len({entry.name for pairs in task.splits.values() for entry in pairs.entries}) == sum(sizes.values())
    loaded = SuperResolution.load(tmp_path / "run")
    loaded.evaluate(folder=tmp_path / "evaluation")
    assert rows_of(tmp_path / "evaluation" / "quality.csv") == rows_of(tmp_path / "run" / "quality.csv")
    assert len(rows_of(tmp_path / "run" / "quality.csv")) == sizes["test"]
    assert all(float(row["PSNR"]) > 1 for row in rows_of(tmp_path / "run" / "quality.csv"))


def test_clips_are_split_whole_or_by_time(tmp_path: Path):
    pytest.importorskip("av")
    (tmp_path / "clips").mkdir()
    for name in ("a", "b", "c"):
        write_clip(tmp_path / "clips" / f"{name}.mp4", frames_of(6, (48, 48)), sound=None)
    task = small(tmp_path / "clips", frames_per_clip=4)
    task.prepare()
    clips = {name: {entry.clip for entry in pairs.entries} for name, pairs in task.splits.items()}
    assert sorted(len(names) for names in clips.values()) == [1, 1, 1]
    assert set.union(*clips.values()) == {"a.mp4", "b.mp4", "c.mp4"}
    task = small(tmp_path / "clips" / "a.mp4", frames_per_clip=6)
    task.prepare()
    names = [entry.name for split in ("train", "val", "test") for entry in task.splits[split].entries]
    assert names == sorted(names)


# -- what it learns and writes -----------------------------------------------------------------------------------------


def test_it_learns(trained: Trained):
    rows = Run(trained.run).read_metrics()
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 8
    assert max(row["val_psnr"] for row in rows) > rows[0]["val_psnr"] + 4
    measured, _ = trained.task.measure(trained.task.splits["train"])
    assert min(each.network.psnr for each in measured) > 15
    assert "dB to bicubic interpolation" in trained.report.summary


def test_the_run_holds_what_a_user_looks_at(trained: Trained):
    rows = rows_of(trained.run / "quality.csv")
    means = part(trained.report, "Means over the images")
    table = dict(zip([row[0] for row in means["rows"]], means["rows"], strict=True))
    assert table["espcn_x2"][1] == pytest.approx(np.mean([float(row["PSNR"]) for row in rows]), abs=1e-3)
    assert table["bicubic"][1] == pytest.approx(np.mean([float(row["bicubic PSNR"]) for row in rows]), abs=1e-3)
    assert table["espcn_x2"][3] == pytest.approx(table["espcn_x2"][1] - table["bicubic"][1])
    assert "as in MATLAB" in means["caption"]
    cost = part(trained.report, "Cost on this machine")
    assert cost["rows"][0][1] == sum(p.numel() for p in trained.task.network.parameters())
    pictures = sorted((trained.run / "samples").iterdir())
    assert len(pictures) == len(rows) == 2
    for path in pictures:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        side = 64
        assert pixels.shape == (side, 4 * side + 3 * 4, 3)
        squares = [pixels[:, start : start + side] for start in range(0, 4 * (side + 4), side + 4)]
        assert all(square.std() > 3 for square in squares)
        assert not np.array_equal(squares[0], squares[1])
        error = 4 * np.abs(squares[1].astype(int) - squares[2]).max(2)
        assert np.array_equal(squares[3][..., 0], error.clip(max=255))
    text = (trained.run / "report.html").read_text()
    for word in ("broken.png", "Quality on test images", "error of the network times 4"):
        assert word in text
    best = max(Run(trained.run).read_metrics(), key=lambda row: row["val_psnr"])
    assert f"Best epoch {best['epoch']:.0f} of 12" in trained.report.summary


def test_validation_is_the_quality_without_rounding(trained: Trained):
    task = SuperResolution.load(trained.run)
    pairs = task._held_out(None) and task.splits["val"]
    unrounded = Protocol(rounding=False)
    (measured,) = task.measure(pairs, unrounded)[0]
    best = max(row["val_psnr"] for row in Run(trained.run).read_metrics())
    assert measured.network.psnr == pytest.approx(best, abs=0.01)


def test_a_run_and_a_saved_file_give_the_same_task(trained: Trained, tmp_path: Path):
    trained.task.save(tmp_path / "task.safetensors")
    image = scene(50)
    expected = upscale_image(trained.task.network, image)
    for source in (trained.run, tmp_path / "task.safetensors"):
        task = SuperResolution.load(source)
        assert np.array_equal(upscale_image(task.network, image), expected)
        assert task.protocol == trained.task.protocol
    assert isinstance(open_task(trained.run), SuperResolution)
    save_weights(create_model("espcn_x2"), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="was not written by the task super-resolution"):
        SuperResolution.load(tmp_path / "other.safetensors")


def test_the_configuration_runs_the_run_again_to_the_same_weights(tmp_path: Path):
    data = make_folder(tmp_path)
    small(data, turn=True, protocol=Protocol(downscale="pillow", shave=1)).fit(tmp_path / "first", QUICK)
    again, training = split_settings(SuperResolution, Run.open(tmp_path / "first").settings())
    again.fit(tmp_path / "second", dataclasses.replace(training, workers=1))
    first, second = (load_file(tmp_path / name / "checkpoints" / "best.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_goes_on_from_a_checkpoint_of_another_code(tmp_path: Path):
    data = make_folder(tmp_path)
    source = create_model("espcn_x2", channels=8)
    keys = {"feature_maps.": "first_part.", "sub_pixel.conv.": "last_part.0."}
    state = source.state_dict()
    for ours, theirs in keys.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    torch.save(state, tmp_path / "espcn_x2.pth")
    task = small(data, weights=str(tmp_path / "espcn_x2.pth"))
    task.prepare()
    assert torch.equal(task.network.sub_pixel.conv.weight, source.sub_pixel.conv.weight)  # type: ignore[union-attr]
    assert "layout yjn870" in task.started_from
    with pytest.raises(CheckpointError, match="enlarges 2 times, the model 3 times"):
        small(data, weights=str(tmp_path / "espcn_x2.pth"), model="espcn_x3").prepare()
    with pytest.raises(Unsupported, match="must be downloaded by hand"):
        small(data, weights="published", model="espcn_x3").prepare()


def test_defaults_suit_small_networks():
    assert Training(**SuperResolution.defaults).batch_size == 16


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_tells_the_quality_by_every_protocol(trained: Trained, tmp_path: Path):
    other = write_scenes(tmp_path / "other", 2, seed=70)
    report = trained.task.evaluate(other, folder=tmp_path / "out")
    table = part(report, "The same network by the protocols in use")
    figures = {row[0]: row[1:5] for row in table["rows"]}
    assert list(figures) == ["usual", "Lornatang's", "yjn870's"]
    means = part(report, "Means over the images")["rows"]
    assert figures["usual"] == pytest.approx([means[0][1], means[1][1], means[0][2], means[1][2]])
    assert len({round(values[0], 3) for values in figures.values()}) == 3
    assert len(rows_of(tmp_path / "out" / "quality.csv")) == 2
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("rounding", [True, False])
def test_quality_is_measured_on_what_the_network_gives(trained: Trained, rounding: bool):
    protocol = Protocol(rounding=rounding, shave=2)
    (entry, *_) = trained.task.splits["test"].entries
    image = entry.read().high[0]
    measured = measure_image(trained.task.network, "a", entry.read(), protocol)
    low = protocol.shrink(image, 2)
    if rounding:
        expected = protocol.measure(upscale_image(trained.task.network, low), image, 2)
    else:
        with torch.no_grad():
            y = trained.task.network(protocol.luma_of(as_tensor(low))[None])[0].clamp(0, 1)
        truth = protocol.luma_of(as_tensor(image))
        expected = protocol.measure(y.movedim(0, -1).numpy(), truth.movedim(0, -1).numpy(), 2, is_luma=True)
    assert measured.network == pytest.approx(expected)
    assert measured.shape == image.shape[:2]
    assert mean_quality([measured.network, measured.network]) == pytest.approx(measured.network)


def test_a_clip_is_measured_frame_by_frame(trained: Trained, tmp_path: Path):
    pytest.importorskip("av")
    path = write_clip(tmp_path / "clip.mp4", [np.roll(scene(0), number, 1) for number in range(5)], sound=None)
    report = trained.task.evaluate(path, folder=tmp_path / "out")
    curve = part(report, "PSNR of each frame")["series"]
    frames = list(read_video(path))
    single = [measure_clip(trained.task.network, [frame], trained.task.protocol) for frame in frames]
    assert curve["espcn_x2"]["y"] == pytest.approx([each.network[0] for each in single], abs=0.02)
    assert curve["bicubic"]["y"] == pytest.approx([each.bicubic[0] for each in single])
    table = part(report, "PSNR of luma")["rows"]
    errors = [10 ** (-value / 10) for value in curve["espcn_x2"]["y"]]
    assert table[1][1] == pytest.approx(np.mean(curve["espcn_x2"]["y"]))
    assert table[1][2] == pytest.approx(-10 * np.log10(np.mean(errors)))
    assert ClipQuality.overall([np.inf, np.inf]) == np.inf
    assert (tmp_path / "out" / "report.html").is_file()


def test_evaluating_where_the_data_have_changed_is_refused(tmp_path: Path):
    data = make_folder(tmp_path)
    small(data).fit(tmp_path / "run", QUICK)
    Image.fromarray(scene(99)).save(data / "new.png")
    with pytest.raises(DataError, match="are not those of the training, so which of them were held out cannot be told"):
        SuperResolution.load(tmp_path / "run").evaluate()


def test_multiply_adds_are_those_of_the_large_image():
    assert macs_per_pixel(create_model("espcn_x3")) == pytest.approx((20_032 + 288 * 9) / 9)  # type: ignore[arg-type]
    assert macs_per_pixel(create_model("srcnn_955_x2")) == 57_184  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_are_enlarged_as_they_are(trained: Trained, tmp_path: Path):
    image = scene(3)
    pictures = {
        "photo.png": Picture(image),
        "photo.jpg": Picture(image),
        "grey.png": Picture(image[..., :1]),
        "alpha.png": Picture(image, image[..., 2:]),
        "deep.png": Picture(image.astype(np.uint16) * 257),
    }
    for name, picture in pictures.items():
        write_picture(tmp_path / "in" / name, picture)
    (tmp_path / "in" / "bad.png").write_text("x")
    (tmp_path / "in" / "notes.txt").write_text("x")
    report = trained.task.predict([tmp_path / "in"], tmp_path / "out")
    for name in pictures:
        given = read_picture(tmp_path / "in" / name)
        result = read_picture(tmp_path / "out" / f"{Path(name).stem}_x2{Path(name).suffix}")
        assert result.pixels.dtype == given.pixels.dtype
        assert result.pixels.shape == (128, 144, given.pixels.shape[2])
        assert (result.alpha is None) == (given.alpha is None)
        expected = upscale_image(trained.task.network, given.pixels)
        off = np.abs(result.pixels.astype(float) - expected).max() / np.iinfo(expected.dtype).max
        assert off == 0 if name != "photo.jpg" else off < 0.2
    assert "enlarged 5 files 2 times" in report.summary
    assert part(report, "1 file was left out")["rows"] == [["bad.png", "not an image"]]
    assert {row[1] for row in part(report, "Files")["rows"]} == {
        *("alpha_x2.png", "deep_x2.png", "grey_x2.png", "photo_x2.jpg", "photo_x2.png")
    }


def test_results_with_equal_names_do_not_meet(trained: Trained, tmp_path: Path):
    for folder in ("a", "b"):
        write_picture(tmp_path / folder / "x.png", Picture(scene(3)))
    trained.task.predict([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"x_x2.png", "x_x2_2.png"}
    trained.task.predict([tmp_path], tmp_path / "tree")
    assert (tmp_path / "tree" / "a" / "x_x2.png").is_file()
    assert (tmp_path / "tree" / "b" / "x_x2.png").is_file()


def test_a_clip_is_enlarged_with_its_sound(trained: Trained, tmp_path: Path):
    pytest.importorskip("av")
    path = write_clip(tmp_path / "clip.mp4", [np.roll(scene(0), number, 1) for number in range(6)])
    report = trained.task.predict([path], tmp_path / "out")
    video, enlarged = read_video(path), read_video(tmp_path / "out" / "clip_x2.mp4")
    assert (enlarged.height, enlarged.width, enlarged.fps) == (128, 144, video.fps)
    frames = list(enlarged.frames("ycbcr"))
    assert len(frames) == 6
    originals = list(video.frames("ycbcr"))
    interpolated = trained.task.protocol.bicubic(originals[2], 2)
    assert np.abs(frames[2][..., 0].astype(int) - interpolated[..., 0]).mean() < 6
    contents = [content for _, content in sound_packets(path)]
    copied = [content for _, content in sound_packets(tmp_path / "out" / "clip_x2.mp4")]
    assert copied == contents[: len(copied)]
    assert len(copied) >= 10
    assert part(report, "Files")["rows"][0][4] == 6


def test_clips_of_other_formats_become_matroska(trained: Trained, tmp_path: Path):
    pytest.importorskip("av")
    path = write_clip(tmp_path / "clip.avi", frames_of(3), sound="mp2")
    trained.task.predict([path], tmp_path / "out")
    assert read_video(tmp_path / "out" / "clip_x2.mkv").has_sound


def test_a_network_of_several_frames_takes_clips_only(tmp_path: Path):
    task = small(make_clip(tmp_path), options={"channels": 8, "frames": 3}, frames_per_clip=6)
    task.fit(tmp_path / "run", QUICK)
    task.predict([tmp_path / "clip.mp4"], tmp_path / "out")
    assert read_video(tmp_path / "out" / "clip_x2.mp4").count == 14
    task.evaluate(tmp_path / "clip.mp4")
    write_picture(tmp_path / "a.png", Picture(scene(1)))
    with pytest.raises(
        DataError, match=r"a\.png cannot be enlarged: the network takes 3 frames of a clip, not an image"
    ):
        task.predict([tmp_path / "a.png"], tmp_path / "out")


def test_nothing_to_enlarge_is_told(trained: Trained, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no image and no clip in"):
        trained.task.predict([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match=r"missing.png does not exist; expected an image, a clip or a folder"):
        trained.task.predict([tmp_path / "missing.png"], tmp_path / "out")
    (tmp_path / "bad.mp4").write_bytes(b"x" * 50)
    with pytest.raises(DataError, match=r"bad.mp4 cannot be enlarged: .*damaged or no video"):
        trained.task.predict([tmp_path / "bad.mp4"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- comparison --------------------------------------------------------------------------------------------------------


def test_networks_are_compared_side_by_side(trained: Trained, tmp_path: Path):
    settings = {**to_mapping(trained.task), "model": "srcnn_915_x2", "options": {"dims": [4, 4]}}
    other = from_mapping(SuperResolution, settings)
    other.fit(tmp_path / "srcnn", QUICK)
    tasks = {"espcn": trained.task, "srcnn": other}
    runs = {"espcn": Run(trained.run), "srcnn": Run(tmp_path / "srcnn")}
    report = SuperResolution.compare(tasks, runs, tmp_path.parents[1])
    means = {row[0]: row for row in part(report, "Means over the images")["rows"]}
    assert list(means) == ["bicubic", "espcn", "srcnn"]
    cost = {row[0]: row for row in part(report, "Cost on this machine")["rows"]}
    assert cost["espcn"][1] == sum(p.numel() for p in trained.task.network.parameters())
    assert cost["srcnn"][3] == 81 * 4 + 16 + 25 * 4
    assert cost["espcn"][3] == round((25 * 16 + 9 * 16 * 8 + 9 * 8 * 4) / 4)
    assert "Quality against speed" in report.to_html()
    tripled = from_mapping(SuperResolution, {**settings, "model": "espcn_x3", "options": {}})
    with pytest.raises(ValueError, match=r"must enlarge by the same factor to be compared, got \[2, 3\]"):
        SuperResolution.compare({"a": trained.task, "b": tripled}, runs, tmp_path)


# -- bad settings and data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "espcn_x5"}, "unknown model 'espcn_x5': did you mean espcn_x"),
        ({"model": "resnet18"}, "resnet18 is not a network for super-resolution"),
        ({"options": {"chanels": 3}}, "unknown option of ESPCNConfig 'chanels': did you mean channels"),
        ({"options": {"in_channels": 3}}, "options must not hold in_channels: it follows from colour"),
        ({"colour": "yuv"}, "colour must be 'y' or 'rgb', got 'yuv'"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
    ],
)
def test_impossible_settings_are_refused_before_data_are_read(settings: dict[str, Any], message: str):
    with pytest.raises((ValueError, UnknownName), match=message):
        SuperResolution(data="missing", **settings)


def test_data_that_cannot_be_used_are_told(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist; expected a folder of images, a file, or 'photographs'"):
        small(tmp_path / "missing").prepare()
    write_scenes(tmp_path / "two", 2)
    with pytest.raises(DataError, match="two holds 2 images, but training needs at least 3"):
        small(tmp_path / "two").prepare()
    write_scenes(tmp_path / "few", 4)
    with pytest.raises(DataError, match="too few images: training needs some of at least 80 x 80 pixels"):
        small(tmp_path / "few", patch_size=40).prepare()
    write_scenes(tmp_path / "tested" / "test", 2)
    with pytest.raises(DataError, match="has no train folder, only test"):
        small(tmp_path / "tested").prepare()
    luma = make_luma(tmp_path)
    with pytest.raises(DataError, match="too few images"):
        small(luma, colour="rgb").prepare()


def test_images_that_fail_later_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = write_scenes(tmp_path / "data", 8)
    whole = (data / "03.png").read_bytes()
    (data / "03.png").write_bytes(whole[: len(whole) // 2])
    task = small(data)
    task.prepare()
    assert "03.png" in task.unreadable or "03.png" in {entry.name for entry in task.splits["test"].entries}
    measured, skipped = task.measure(read_pairs(data, scale=2)["all"])
    assert len(measured) == 7
    assert [each.path for each in skipped] == ["03.png"]


# -- recipes -----------------------------------------------------------------------------------------------------------

RATES = {
    "espcn_paper": {0: 0.01},
    "espcn_yjn870": {0: 1e-3, 159: 1e-3, 160: 1e-4, 199: 1e-4},
    "espcn_lornatang": {0: 0.01, 299: 0.01, 300: 1e-3, 2399: 1e-3, 2400: 1e-4},
}


def test_every_recipe_is_tested():
    assert set(SuperResolution.recipes()) == set(RATES)


@pytest.mark.parametrize("recipe", RATES)
def test_recipes_have_the_published_numbers_and_train(recipe: str, tmp_path: Path):
    settings = yaml.safe_load(SuperResolution.recipe(recipe).read_text(encoding="utf-8"))
    task, training = split_settings(SuperResolution, settings)
    known = {entry.name for cls in (SuperResolution, Training) for entry in dataclasses.fields(cls) if entry.init}
    assert set(settings) <= known
    for epoch, rate in RATES[recipe].items():
        assert learning_rate(training, 100 * epoch, 100) == pytest.approx(rate)
    assert (task.patch_size, training.batch_size, task.scale) == (17, 16, 3)
    assert task.protocol.downscale == {"espcn_paper": "gaussian", "espcn_yjn870": "pillow"}.get(recipe, "matlab")
    assert (training.ema, training.patience) == {
        "espcn_lornatang": (0.999, None),
        "espcn_paper": (None, 100),
    }.get(recipe, (None, None))
    data = write_scenes(tmp_path / "data", 4)
    again, _ = split_settings(SuperResolution, {**settings, "data": str(data)})
    again.fit(tmp_path / "run", dataclasses.replace(training, epochs=1))
    assert Run(tmp_path / "run").read_metrics()[0]["step"] >= 1
    if recipe == "espcn_paper":
        last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        assert sorted(group["lr_scale"] for group in last["optimizer_states"][0]["param_groups"]) == [0.1, 1.0]
