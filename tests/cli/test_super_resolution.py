"""Super-resolution from the words of a user to the files they get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.conftest import Run
from convatlas.restoration import comparison
from restoration.scenes import scene, write_scenes

WORDS = ["--options", '{"channels": 8}', "--patch_size=9", "--epochs=1"]


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_FRAME", (12, 16))


def test_train_evaluate_and_predict(run: Run, tmp_path: Path):
    data = write_scenes(tmp_path / "data", 5)
    ended = run("train", "super-resolution", "--data", data, "--model=espcn_x2", "--run", tmp_path / "run", *WORDS)
    assert (ended.code, ended.err) == (0, "")
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "batch_size: 16" in settings  # the default of the task
    assert "lr: 0.003" in settings
    evaluated = run("evaluate", tmp_path / "run", "--data", data, "--json")
    assert evaluated.code == 0
    assert json.loads(evaluated.out)["title"] == "Evaluation of espcn_x2"
    Image.fromarray(scene(9)).save(tmp_path / "photo.png")
    predicted = run("predict", tmp_path / "run", "photo.png", "--out", tmp_path / "out")
    assert predicted.code == 0
    assert f"predictions: {tmp_path / 'out'}" in predicted.out
    with Image.open(tmp_path / "out" / "photo_x2.png") as image:
        assert image.size == (144, 128)
        assert np.asarray(image).std() > 1


def test_compare_and_recipes(run: Run, tmp_path: Path):
    data = write_scenes(tmp_path / "data", 5)
    models = "{wide: {model: espcn_x3, options: {channels: 8}}, deep: {model: srcnn_915_x3, options: {dims: [8, 8]}}}"
    words = ["--data", data, "--recipe=espcn_yjn870", "--epochs=1", "--patch_size=9"]
    ended = run("compare", "super-resolution", "--models", models, *words, "--out", tmp_path / "both", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["title"].startswith("wide and deep on")
    assert "downscale: pillow" in (tmp_path / "both" / "wide" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--model espcn_x33", 1, "unknown model 'espcn_x33': did you mean espcn_x3"),
        ("--model resnet18", 1, "resnet18 is not a network for super-resolution"),
        ("--protocol.downscale opencv", 2, "protocol.downscale must be one of matlab, pillow, gaussian, got opencv"),
        ("--protocol.shav 3", 2, "unknown setting 'protocol.shav': did you mean protocol.shave"),
        ("--data nowhere", 1, "nowhere does not exist; expected a folder of images, a file, or 'photographs'"),
        ("--recipe espcn", 1, "unknown recipe of super-resolution 'espcn': did you mean"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Run, words: str, code: int, message: str):
    ended = run("train", "super-resolution", *words.split())
    assert ended.code == code
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
