"""The task of video delivery: what a run holds, playing, going on after a stop, every way to divide, bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from convatlas.data.video import read_video
from convatlas.errors import DataError, Interrupted, UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.report import Report
from convatlas.restoration.chunk_fitting import ChunkFit
from convatlas.restoration.delivery import PackageBytes
from convatlas.restoration.delivery_quality import frame_error
from convatlas.restoration.stdo import VideoDelivery
from convatlas.restoration.video_chunks import chunk_by_psnr
from convatlas.training.run import Run, from_mapping, to_mapping
from convatlas.training.settings import SettingsError, Training
from convatlas.training.task import open_task, split_settings
from convatlas.weights import save_weights
from data.clips import sound_packets, write_clip
from restoration.scenes import scene

pytest.importorskip("av")

SIZE = (46, 62)  # the grid adds two rows and columns
COUNT = 4
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "lr": 0.01, "weight_decay": 0.0}
TINY: dict[str, Any] = {
    **{"model": "espcn_x2", "options": {"channels": 4, "init": "icnr"}, "general_epochs": 1, "grid": (2, 4)},
    **{"halo": 2, "shave": 2, "plain_crfs": (20, 40)},
}


def task_for(data: Any, **settings: Any) -> VideoDelivery:
    return VideoDelivery(data=str(data), **{**TINY, **settings})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four frames with sound: half is plain, half has edges."""
    frames = [np.roll(scene(0, SIZE), 3 * number, 1) for number in range(COUNT)]
    for frame in frames:
        frame[:, : SIZE[1] // 2] = 120
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames)


class Delivered(NamedTuple):
    run: Path
    task: VideoDelivery
    report: Report


@pytest.fixture(scope="module")
def delivered(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """A run with two networks."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        task = task_for(clip)
        report = task.fit(run, Training(**SHORT))
    return Delivered(run, task, report)


def part(report: Report, title: str) -> dict[str, Any]:
    document = json.loads(report.to_json())
    parts = [part for section in document["sections"] for part in section["parts"]]
    return next(part for part in parts if part.get("title") == title)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_the_run_holds_labels_chunks_and_fits(delivered: Delivered):
    run = delivered.run
    labels, assignment = np.load(run / "labels.npy"), np.load(run / "assignment.npy")
    assert labels.shape == (COUNT * 8,)
    assert labels.dtype == np.float64
    assert assignment.shape == (COUNT, 2, 4)
    assert assignment.dtype == np.uint8
    assert np.array_equal(chunk_by_psnr(labels, 2).index, assignment.ravel())
    assert assignment[:, :, :2].mean() > assignment[:, :, 2:].mean()  # what is plain is easier
    assert json.loads((run / "thresholds.json").read_text())[1] == np.sort(labels)[COUNT * 4 - 1]
    rows = Run(run).read_metrics()
    assert [row["fit"] for row in rows] == [0, 1, 1, 2, 2]  # general, chunk 0, chunk 1
    first = json.loads((run / "fits" / "chunk0" / "report.json").read_text())
    assert "16 visits of 16 patches an epoch" in json.dumps(first)
    for name in ("squares", "chunks"):
        with Image.open(run / "samples" / f"{name}.png") as image:
            assert np.asarray(image).std() > 5


def test_the_networks_of_a_fit_are_ones_for_every_verb(delivered: Delivered):
    best = delivered.run / "fits" / "chunk1" / "checkpoints" / "best.safetensors"
    model = create_model("espcn_x2", channels=4, in_channels=3, weights=str(best))
    packed = delivered.task.playback.networks[1].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(packed[name], tensor.half().float())


def test_the_report_tells_bytes_and_quality_as_they_are(delivered: Delivered, clip: Path):
    task, package = delivered.task, delivered.run / "package"
    sizes = PackageBytes.of(package)
    rows = {row[0]: row[1:] for row in part(delivered.report, "Quality for bytes")["rows"]}
    assert rows["package"][2] == pytest.approx(sizes.total / 1000)
    assert rows["package"][3] == pytest.approx(sizes.total / 1000 / (COUNT / 25))
    assert rows["clip as it was given"][2] == pytest.approx(clip.stat().st_size / 1000)
    assert rows["clip itself, rate factor 20"][0] > rows["clip itself, rate factor 40"][0]
    played = list(task.playback.play(read_video(package / "low.mp4")))
    error = np.mean([frame_error(a, b) for a, b in zip(played, read_video(clip), strict=True)])
    assert rows["package"][0] == pytest.approx(-10 * np.log10(error))
    formula = {row[0]: row[1:] for row in part(delivered.report, "Bytes of networks in float16")["rows"]}
    parameters = sum(parameter.numel() for parameter in task.playback.networks[0].parameters())
    assert formula["delivered"] == [2, parameters, 2 * 2 * parameters / 1000]
    assert formula["a network for 5 s each (NAS)"][0] == 1
    table = part(delivered.report, "Chunks")["rows"]
    assert [row[1] for row in table] == [16, 16]
    assert table[0][3] <= table[1][2]
    assert "dB to bicubic interpolation" in delivered.report.summary


def test_evaluation_repeats_the_measurement_from_the_package_alone(delivered: Delivered, clip: Path, tmp_path: Path):
    package = tmp_path / "sent"
    delivered.task.save(package)
    with pytest.raises(FileExistsError, match="already exists: choose another folder"):
        delivered.task.save(package)
    loaded = VideoDelivery.load(package)
    assert loaded.data == "clip.mp4"  # the server's folders stay unknown
    report = loaded.evaluate(clip, folder=tmp_path / "out")
    assert part(report, "Quality for bytes")["rows"][:2] == part(delivered.report, "Quality for bytes")["rows"][:2]
    assert (tmp_path / "out" / "quality.csv").read_text() == (delivered.run / "quality.csv").read_text()
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    other = write_clip(tmp_path / "other.mp4", [scene(1, (48, 48))] * 4, sound=None)
    with pytest.raises(DataError, match="they were fitted to that clip and serve no other"):
        loaded.evaluate(other)


# -- playing -----------------------------------------------------------------------------------------------------------


def test_a_package_its_run_and_its_small_clip_play_alike(delivered: Delivered, tmp_path: Path):
    package = delivered.run / "package"
    task = open_task(package)
    inputs = [package, delivered.run, package / "low.mp4"]
    report = task.predict(inputs, tmp_path / "out")
    videos = [read_video(tmp_path / "out" / name) for name in ("clip_x2.mp4", "clip_x2_2.mp4", "low_x2.mp4")]
    assert [(video.height, video.width, video.count) for video in videos] == [(*SIZE, COUNT)] * 3
    first, *others = [np.stack(list(video)) for video in videos]
    assert all(np.array_equal(first, other) for other in others)
    played = np.stack(list(delivered.task.playback.play(read_video(package / "low.mp4"))))
    assert np.abs(first.astype(int) - played).mean() < 6  # what the codec loses
    copied = [content for _, content in sound_packets(tmp_path / "out" / "clip_x2.mp4")]
    assert copied == [content for _, content in sound_packets(package / "low.mp4")][: len(copied)]
    assert copied
    assert [row[4:6] for row in part(report, "Videos")["rows"]] == [[COUNT, 2]] * 3


def test_other_clips_need_a_run_of_one_network(delivered: Delivered, clip: Path, tmp_path: Path):
    other = write_clip(tmp_path / "other.mp4", [scene(2, (20, 24))] * 3, sound=None)
    with pytest.raises(DataError, match="which of the 2 networks its patches need is known only of"):
        delivered.task.predict([other], tmp_path / "out")
    single = task_for(clip, chunks=1, division="time", start="scratch", plain_crfs=())
    single.fit(tmp_path / "run", Training(**{**SHORT, "epochs": 1}))
    assert single.network is single.playback.networks[0]
    assert single.network(*single.example_inputs(2)).shape == (2, 3, 2 * (12 + 4), 2 * (8 + 4))
    (tmp_path / "notes.txt").write_text("x")
    report = single.predict([other, tmp_path / "notes.txt"], tmp_path / "out")
    assert (read_video(tmp_path / "out" / "other_x2.mp4").height, read_video(other).height) == (40, 20)
    assert part(report, "1 file was left out")["rows"][0][1] == "it is no clip"
    with pytest.raises(Unsupported, match="this run holds 2 networks; take one of the files"):
        _ = delivered.task.network
    with pytest.raises(DataError, match="missing does not exist; expected a package, a run or a clip"):
        single.predict([tmp_path / "missing"], tmp_path / "out")


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_with_the_same_result(
    delivered: Delivered, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fits: list[str] = []
    plain = ChunkFit.fit

    def stopping(self: ChunkFit, *arguments: Any, **settings: Any) -> Report:
        fits.append(self.label)
        if len(fits) == 3:
            raise Interrupted("stopped", 143)
        return plain(self, *arguments, **settings)

    monkeypatch.setattr(ChunkFit, "fit", stopping)
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"go on with 'convatlas train video-delivery --resume .*run'") as stopped:
        task_for(clip).fit(run, Training(**SHORT))
    assert stopped.value.exit_code == 143
    with pytest.raises(DataError, match="is not finished; go on with 'convatlas train video-delivery --resume"):
        VideoDelivery.load(run)
    with pytest.raises(FileExistsError, match="already exists"):
        task_for(clip).fit(run, Training(**SHORT))
    with pytest.raises(SettingsError, match="halo was 2, now it is 1"):
        task_for(clip, halo=1).fit(run, Training(**SHORT), resume=True)
    task_for(clip).fit(run, Training(**SHORT), resume=True)
    assert fits == ["general", "chunk0", "chunk1", "chunk1"]
    for name in ("networks.safetensors", "chunks.bin", "low.mp4"):
        assert (run / "package" / name).read_bytes() == (delivered.run / "package" / name).read_bytes()
    (run / "clip.json").write_text('{"digest": "other"}')
    with pytest.raises(DataError, match=r"clip\.mp4 has changed since the run began"):
        task_for(clip).fit(run, Training(**SHORT), resume=True)


# -- every way ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "networks", "fits"),
    [
        ({"joint": "fraction"}, 1, ["general", "joint"]),
        ({"joint": "curriculum", "division": "random", "store": "float32"}, 1, ["general", "joint"]),
        ({"division": "time", "segment_seconds": 0.1, "start": "scratch"}, 2, ["chunk0", "chunk1"]),
        ({"division": "dct", "general_epochs": 0, "start": "scratch", "compress": False}, 2, ["chunk0", "chunk1"]),
        (
            {
                **{"model": "wdsr_x2", "options": {"dim": 2, "depth": 1}, "general_epochs": 0, "start": "scratch"},
                **{"store": "int8", "halo": 0},
            },
            2,
            ["chunk0", "chunk1"],
        ),
    ],
    ids=["fraction", "curriculum", "time", "dct", "bicubic"],
)
def test_every_way_to_deliver(clip: Path, tmp_path: Path, settings: dict[str, Any], networks: int, fits: Any):
    task = task_for(clip, **{"plain_crfs": (), **settings})
    report = task.fit(tmp_path / "run", Training(**{**SHORT, "epochs": 1}))
    assert len(task.playback.networks) == networks
    done = sorted(path.name for path in (tmp_path / "run" / "fits").iterdir())
    assert done == sorted(fits)
    assert (tmp_path / "run" / "labels.npy").is_file() == (task.division in ("psnr", "dct"))
    loaded = VideoDelivery.load(tmp_path / "run")
    assert to_mapping(loaded) == to_mapping(task)
    rows = part(report, "Quality for bytes")["rows"]
    assert rows[0][1] > 5
    visits = json.loads((tmp_path / "run" / "fits" / done[-1] / "report.json").read_text())
    if settings.get("joint") == "fraction":
        assert "24 visits of 32 patches" in json.dumps(visits)  # all of chunk 0, half of chunk 1


def test_weights_of_a_general_network_are_started_from(clip: Path, tmp_path: Path):
    general = create_model("espcn_x2", channels=4, in_channels=3)
    save_weights(general, tmp_path / "general.safetensors")
    task = task_for(clip, weights=str(tmp_path / "general.safetensors"), chunks=1, plain_crfs=())
    task.fit(tmp_path / "run", Training(**{**SHORT, "epochs": 1, "lr": 1e-9, "min_lr": 0.0}))
    assert not (tmp_path / "run" / "fits" / "general").exists()
    for name, tensor in general.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)
    assert VideoDelivery.load(tmp_path / "run" / "package").weights is None


# -- bad settings and data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "espcn_x5"}, "unknown model 'espcn_x5': did you mean espcn_x"),
        ({"model": "dncnn", "options": {}}, "dncnn is not a network for super-resolution"),
        ({"options": {"frames": 3}}, "espcn_x2 must take one frame at a time, got frames 3"),
        ({"options": {"in_channels": 3}}, "options must not hold in_channels: videos are RGB"),
        ({"division": "colour"}, "unknown division 'colour'"),
        ({"store": "int4"}, "unknown store 'int4'"),
        ({"joint": "some"}, "unknown scheme 'some'"),
        ({"chunks": 0}, "chunks must be at least 1, got 0"),
        ({"chunks": 300}, "chunks must be at most 256, got 300"),
        ({"start": "zero"}, "start must be 'general' or 'scratch', got 'zero'"),
        ({"general_epochs": 0}, "start must be 'scratch' without weights and with general_epochs 0"),
        ({"segment_seconds": 5.0}, "segment_seconds must be positive and is for the division by time, got 5.0"),
        ({"drops": (3,)}, r"drops are for the joint training by curriculum, got \(3,\) with joint no"),
        ({"joint": "fraction", "fraction": 2.0}, r"fraction must be in \(0, 1\], got 2.0"),
        ({"grid": (0, 3)}, "rows and columns must be at least 1, got 0 and 3"),
        ({"crf": 60}, "crf and plain_crfs must be from 0 to 51, got 60"),
    ],
)
def test_impossible_settings_are_refused_before_data_are_read(settings: dict[str, Any], message: str):
    with pytest.raises((ValueError, UnknownName), match=message):
        task_for("missing", **settings)


def test_clips_that_cannot_be_used_leave_no_run(clip: Path, tmp_path: Path):
    run = tmp_path / "run"
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: task_for(tmp_path / "missing").fit(run), "missing does not exist; expected a clip, a folder"),
        (lambda: task_for(clip, shave=8).fit(run), "patches of 24 x 16 pixels are too small to leave out 8 along"),
        (lambda: task_for(clip).fit(run, Training(devices=2)), "devices and nodes must be 1: fits follow each other"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
        assert not run.exists()
    many = task_for(clip, chunks=40, general_epochs=0, start="scratch")
    with pytest.raises(ValueError, match="chunks must be at most the 32 patches of the clip, got 40"):
        many.fit(run)


def test_grids_are_of_patches_of_a_usual_size():
    for size, scale, grid in (((1080, 1920), 2, (10, 20)), ((1080, 1920), 4, (5, 10)), ((96, 160), 2, (4, 4))):
        task = VideoDelivery(model=f"espcn_x{scale}")
        found = task._grid(size)
        assert (found.rows, found.columns) == grid


# -- recipes -----------------------------------------------------------------------------------------------------------

WAYS = {
    **{f"stdo_wdsr_x{scale}": (scale, "psnr", "no", 2) for scale in (2, 3, 4)},
    "jstdo_wdsr_x2": (2, "psnr", "fraction", 2),
    "nas_wdsr_x2": (2, "time", "no", 2),
    "awdnn_wdsr_x2": (2, "time", "no", 1),
}


def test_every_recipe_is_tested():
    assert set(VideoDelivery.recipes()) == set(WAYS)


@pytest.mark.parametrize("recipe", WAYS)
def test_recipes_have_the_published_numbers(recipe: str):
    settings = yaml.safe_load(VideoDelivery.recipe(recipe).read_text(encoding="utf-8"))
    task, training = split_settings(VideoDelivery, settings)
    known = {entry.name for cls in (VideoDelivery, Training) for entry in dataclasses.fields(cls) if entry.init}
    assert set(settings) <= known
    assert (task.scale, task.division, task.joint, task.chunks) == WAYS[recipe]
    assert (training.epochs, training.batch_size, training.min_lr, training.seed) == (50, 16, 4e-8, 226)
    assert (task.halo, task.border) == (0, task.scale + 4)
    assert task.grid == {4: (5, 10)}.get(task.scale, (10, 20))
    assert training.drop_last


def test_a_recipe_trains_on_a_small_clip(clip: Path, tmp_path: Path):
    settings = yaml.safe_load(VideoDelivery.recipe("jstdo_wdsr_x2").read_text(encoding="utf-8"))
    small = {"data": str(clip), "options": {"dim": 2, "depth": 1}, "grid": [2, 2], "plain_crfs": []}
    short = {"general_epochs": 0, "start": "scratch", "epochs": 1, "batch_size": 4}
    task, training = split_settings(VideoDelivery, {**settings, **small, **short})
    task.fit(tmp_path / "run", training)
    assert Run(tmp_path / "run").read_metrics()[-1]["step"] == 3  # 8 + 4 of 16 patches, in batches of 4
    assert from_mapping(VideoDelivery, to_mapping(task)).joint == "fraction"
