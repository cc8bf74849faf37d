"""Video delivery from the words of a user to the files they get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.conftest import Run
from convatlas.data.video import read_video
from data.clips import write_clip
from restoration.scenes import scene

pytest.importorskip("av")

WORDS = ["--options", '{"channels": 4}', "--grid=[2,2]", "--shave=2", "--epochs=1", "--batch_size=4"]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", [np.roll(scene(0, (32, 48)), number, 1) for number in range(3)])


def test_train_evaluate_and_predict(run: Run, clip: Path, tmp_path: Path):
    words = ["--general_epochs=0", "--start=scratch", "--plain_crfs=[30]", "--json", *WORDS]
    ended = run("train", "video-delivery", "--data", clip, "--run", tmp_path / "run", *words)
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["title"] == "Delivery of clip.mp4 with espcn_x2"
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "min_lr: 4.0e-08" in settings  # the default of the task
    package = tmp_path / "run" / "package"
    evaluated = run("evaluate", package, "--data", clip, "--out", tmp_path / "evaluation")
    assert evaluated.code == 0
    assert f"report: {tmp_path / 'evaluation' / 'report.html'}" in evaluated.out
    predicted = run("predict", package, package / "low.mp4", "--out", tmp_path / "out")
    assert predicted.code == 0
    video = read_video(tmp_path / "out" / "low_x2.mp4")
    assert (video.width, video.height, video.count, video.has_sound) == (48, 32, 3, True)
    again = run("train", "video-delivery", "--resume", tmp_path / "run")
    assert again.code == 0, again.err


def test_compare_on_a_folder_of_pictures(run: Run, tmp_path: Path):
    (tmp_path / "frames").mkdir()
    for number in range(3):
        Image.fromarray(scene(number, (32, 48))).save(tmp_path / "frames" / f"{number}.png")
    ways = "{one: {model: espcn_x2, chunks: 1}, two: {model: espcn_x2, chunks: 2}}"
    words = ["--division=time", "--start=scratch", "--plain_crfs=[]", "--data", tmp_path / "frames", *WORDS]
    ended = run("compare", "video-delivery", "--models", ways, *words, "--out", tmp_path / "both", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["title"] == "Deliveries of frames"
    parts = {part["title"]: part for section in report["sections"] for part in section["parts"] if "rows" in part}
    rows = {row[0]: row for row in parts["Side by side"]["rows"]}
    assert {name: row[2] for name, row in rows.items()} == {"one": 1, "two": 2}
    assert rows["two"][6] > rows["one"][6]
    assert (tmp_path / "both" / "two" / "package" / "low.mp4").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--model resnet18", 1, "resnet18 is not a network for super-resolution"),
        ("--division colour", 2, "division must be one of psnr, time, variance, dct, random, got colour"),
        ("--chunk 3", 2, "unknown setting 'chunk': did you mean chunks"),
        ("--data nowhere", 1, "nowhere does not exist; expected a clip, a folder of pictures, or 'photographs'"),
        ("--recipe stdo", 1, "unknown recipe of video-delivery 'stdo': did you mean"),
        ("--devices 2", 1, "devices and nodes must be 1: fits follow each other, got 2 devices"),
    ],
)
def test_what_is_wrong_is_told(run: Run, words: str, code: int, message: str):
    ended = run("train", "video-delivery", *words.split())
    assert ended.code == code
    assert message in ended.err
    assert not Path("runs").exists()
