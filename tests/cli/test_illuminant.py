"""The illuminant task from the words of a user to the files they get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.conftest import Run
from convatlas.data.exposure_pairs import ExposurePair, write_scene
from convatlas.data.linear_images import LinearImage
from convatlas.data.png16 import read_png16
from convatlas.data.simulators.exposures import illuminant_exposures
from convatlas.restoration.illuminant_estimation import IlluminantEstimation


def write_scenes(folder: Path, count: int) -> Path:
    for seed in range(count):
        made = illuminant_exposures(seed, (12, 16))
        frames = LinearImage(made.long), LinearImage(made.short)
        write_scene(folder / f"scene_{seed}", ExposurePair(str(seed), *frames, made.illuminant, made.ratio))
    return folder


def test_train_evaluate_predict_and_compare(run: Run, tmp_path: Path):
    data = write_scenes(tmp_path / "data", 6)
    words = ["--data", data, "--epochs=2", "--levels.white=65535", "--camera.bits=12"]
    ended = run("train", "illuminant", "--model=eccc", "--options", '{"bins": 8}', *words, "--run", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert "white: 65535" in (tmp_path / "run" / "config.yaml").read_text()
    evaluated = run("evaluate", tmp_path / "run", "--data", data, "--json")
    assert json.loads(evaluated.out)["title"] == "Evaluation of eccc"
    scene = tmp_path / "data" / "scene_1"
    predicted = run("predict", tmp_path / "run", scene / "long.png", scene / "short.png", "--out", tmp_path / "out")
    assert predicted.code == 0, predicted.err
    pixels = read_png16((tmp_path / "out" / "long_white_balanced.png").read_bytes())
    assert pixels.shape == (12, 16, 3)
    assert np.ptp(pixels) > 1000
    ended = run("compare", "illuminant", "--models", "emlp,ccc", *words, "--out", tmp_path / "both", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    table = next(part for part in report["sections"][1]["parts"] if part.get("title") == "Angular error")
    assert [row[0] for row in table["rows"]][:4] == ["emlp", "ccc", "average of all", "mean of the training"]


@pytest.mark.parametrize("recipe", sorted(IlluminantEstimation.recipes()))
def test_recipes_train(recipe: str, run: Run, tmp_path: Path):
    data = write_scenes(tmp_path / "data", 5)
    folds = 2 if recipe == "emlp" else 0
    small = [] if recipe == "emlp" else ["--options", '{"bins": 8}']
    words = [f"--recipe={recipe}", "--data", data, "--epochs=1", f"--folds={folds}", *small]
    ended = run("train", "illuminant", *words, "--run", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert ("Cross-validation" in (tmp_path / "run" / "report.html").read_text()) == bool(folds)


def test_what_is_wrong_is_told(run: Run, tmp_path: Path):
    for words, code, text in (
        (["--model=ecc"], 1, "did you mean"),
        (["--data=nowhere"], 1, "nowhere does not exist; expected a folder of scenes"),
        (["--levels.black=-1"], 2, "black must be"),
    ):
        ended = run("train", "illuminant", *words, "--run", tmp_path / "run")
        assert ended.code in (code, 1, 2)
        assert text in ended.err
        assert "Traceback" not in ended.err
