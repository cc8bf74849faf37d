"""Denoising from the words of a user to the files they get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.conftest import Run
from convatlas.restoration import comparison
from restoration.scenes import scene, write_scenes

WORDS = ["--options", '{"depth": 3, "dim": 8}', "--patch_size=16", "--epochs=1"]


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_FRAME", (12, 16))


def test_train_evaluate_predict_and_compare(run: Run, tmp_path: Path):
    data = write_scenes(tmp_path / "data", 5)
    words = ["--data", data, "--noise.sigma=15", "--colour=rgb", *WORDS]
    ended = run("train", "denoising", *words, "--run", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert "sigma: 15" in (tmp_path / "run" / "config.yaml").read_text()
    evaluated = run("evaluate", tmp_path / "run", "--data", data, "--json")
    assert json.loads(evaluated.out)["title"] == "Evaluation of dncnn"
    Image.fromarray(scene(9)).save(tmp_path / "photo.png")
    predicted = run("predict", tmp_path / "run", "photo.png", "--out", tmp_path / "out")
    assert predicted.code == 0
    with Image.open(tmp_path / "out" / "photo_clean.png") as image:
        assert image.size == (72, 64)
        assert np.asarray(image).std() > 1
    ended = run(
        "compare", "denoising", "--models", "dncnn,dncnn_weighted", *words, "--out", tmp_path / "both", "--json"
    )
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["title"].startswith("dncnn and dncnn_weighted on")


def test_recipe_of_trained_densities(run: Run, tmp_path: Path):
    data = write_scenes(tmp_path / "data", 5)
    words = [
        "--data",
        data,
        "--recipe=dncnn_trained_density",
        "--epochs=1",
        "--patch_size=16",
        "--run",
        tmp_path / "run",
    ]
    ended = run("train", "denoising", *words, "--options", '{"depth": 2, "dim": 4}')
    assert ended.code == 0, ended.err
    assert "density:" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--model dncn", 1, "unknown model 'dncn': did you mean dncnn"),
        ("--model espcn_x3", 1, "espcn_x3 is not a network for denoising"),
        ("--colour y", 2, "colour must be one of grey, rgb, got y"),
        ("--noise.sigm 3", 2, "unknown setting 'noise.sigm': did you mean noise.sigma"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Run, words: str, code: int, message: str):
    ended = run("train", "denoising", *words.split())
    assert ended.code == code
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
