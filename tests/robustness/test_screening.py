"""Every task that reads images leaves camouflaged ones out, or uses and lists them, on request."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.cli.main import main
from convatlas.data.images import from_arrays, read_images
from convatlas.design.as_vit import TrainingFreeSearch
from convatlas.errors import DataError, UnknownName
from convatlas.recognition.pretraining import Pretraining
from convatlas.recognition.task import Recognition
from convatlas.restoration.denoising import Denoising
from convatlas.restoration.super_resolution import SuperResolution
from convatlas.robustness.camouflage import Camouflage
from convatlas.robustness.screening import Screen, Screening, revealed
from robustness.pictures import SIZE, attack, picture

ATTACKS = ["a/8.png", "a/9.png", "b/8.png", "b/9.png"]
TINY = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "branch_ratio": 0.125}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
TASKS: dict[str, Any] = {
    "recognition": lambda **options: Recognition(model="inceptionnext_atto", options=TINY, **options),
    "pretraining": lambda **options: Pretraining(
        model="convnext_tiny", options=CONVNEXT, image_size=32, val_fraction=0.2, **options
    ),
    "super-resolution": lambda **options: SuperResolution(options={"channels": 4}, patch_size=5, **options),
    "denoising": lambda **options: Denoising(options={"depth": 2, "dim": 4}, colour="rgb", **options),
}


@pytest.fixture(scope="module")
def photos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images, of which the last two are attacks."""
    root = tmp_path_factory.mktemp("photos")
    for kind, first in (("a", 0), ("b", 5)):
        (root / kind).mkdir()
        for number in range(8):
            shutil.copy(folder / "benign" / f"{(first + number) % 10}.png", root / kind / f"{number}.png")
        for number in (8, 9):
            shutil.copy(folder / "attack" / f"{number - 8 + first}.png", root / kind / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def thresholds(calibrated: Path) -> str:
    return str(calibrated / "thresholds.json")


def test_the_attacks_of_these_tests_are_told_from_the_rest(photos: Path, thresholds: str) -> None:
    screen = Screen(Screening(thresholds=thresholds))
    images = read_images(photos)["all"]
    kept = screen.sets({"all": images})["all"]
    assert sorted(screen.found) == ATTACKS
    assert [each.path for each in kept.skipped] == ATTACKS
    assert set(kept.names) == set(images.names) - set(ATTACKS)
    assert "looks camouflaged: scaling_mse" in kept.skipped[0].reason
    assert Screen().sets({"all": images}) == {"all": images}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("action", ["refuse", "flag"])
def test_training_leaves_them_out_or_lists_them(name: str, action: str, photos: Path, thresholds: str) -> None:
    task = TASKS[name](data=str(photos), camouflage=Screening(thresholds=thresholds, action=action))
    task.prepare()
    assert set(task.screen.found) <= set(ATTACKS)
    assert set(task.unreadable) == (set(task.screen.found) if action == "refuse" else set())
    if name in ("recognition", "pretraining"):
        names = {each for images in task.splits.values() for each in images.names}
        assert sorted(task.screen.found) == ATTACKS
        assert names.isdisjoint(ATTACKS) == (action == "refuse")
    else:  # the images of the test part are not read before they are measured
        assert task.screen.found
        plain = TASKS[name](data=str(photos))
        plain.prepare()
        assert plain.data_digest == task.data_digest
        assert (len(plain.train_set) > len(task.train_set)) == (action == "refuse")


@pytest.mark.parametrize("name", ["recognition", "super-resolution", "denoising"])
def test_use_leaves_them_out_or_lists_them(name: str, photos: Path, thresholds: str, tmp_path: Path) -> None:
    task = TASKS[name](data=str(photos))
    task.prepare()
    assert task.predict([photos], tmp_path / "plain").sections
    assert task.exit_code == 0
    for action in ("refuse", "flag"):
        task.camouflage = Screening(thresholds=thresholds, action=action)
        report = task.predict([photos], tmp_path / action)
        assert task.exit_code == 3
        assert sorted(task.screen.found) == ATTACKS
        told = {section.title: section for section in report.sections}
        assert ("Skipped files" in told) == (action == "refuse")
        assert [row[0] for row in told["Camouflaged images"].parts[0].rows] == ATTACKS
        assert len(told["Camouflaged images"].parts[1].images) == 4
        done = "left out" if action == "refuse" else "used all the same"
        assert report.summary.endswith(f"4 images look camouflaged and were {done}.")
    report = task.evaluate(photos, folder=tmp_path / "evaluation")
    assert sorted(task.screen.found) == ATTACKS
    assert "Camouflaged images" in [section.title for section in report.sections]
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 1000
    assert task.evaluate().sections  # on its own images: split as in the training, whatever is looked for now
    only = [photos / name for name in ATTACKS]
    task.camouflage = Screening(thresholds=thresholds)
    with pytest.raises(DataError, match="camouflaged"):
        task.predict(only, tmp_path / "only")


def test_the_verbs_take_thresholds_of_their_own(
    photos: Path, thresholds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["train", "recognition", "--data", str(photos), "--options", json.dumps(TINY), "--image_size", "32"]
    words += ["--camouflage.thresholds", thresholds, "--camouflage.action", "flag", "--epochs", "1", "--workers", "0"]
    assert main([*words, "--warmup_epochs", "0", "--run", run]) == 0
    assert "4 images look camouflaged and were used all the same." in (tmp_path / "run" / "report.json").read_text()
    words = ["predict", run, str(photos), "--out", str(tmp_path / "p")]
    assert main(words) == 3
    assert main([*words, "--camouflage.thresholds", "null"]) == 0
    assert main([*words, "--camouflage.action", "refuse"]) == 3
    assert "4 images look camouflaged and were left out." in (tmp_path / "p" / "report.json").read_text()
    out = str(tmp_path / "e")
    assert main(["evaluate", run, "--data", str(photos), "--out", out, "--camouflage.action", "refuse"]) == 0
    assert "were left out" in (tmp_path / "e" / "report.json").read_text()
    missing = str(tmp_path / "missing.json")
    assert main([*words, "--camouflage.thresholds", missing]) == 1
    assert "missing.json cannot be read: No such file" in capsys.readouterr().err
    calibrated = str(Path(thresholds).parent)
    assert main(["predict", calibrated, str(photos), "--camouflage.action", "flag", "--out", out]) == 2
    assert "the task camouflage does not look for camouflaged images" in capsys.readouterr().err


def test_a_design_scores_on_the_others(photos: Path, thresholds: str) -> None:
    study = TrainingFreeSearch(data=str(photos), image_size=32, batch=4, camouflage=Screening(thresholds=thresholds))
    assert study.images.shape == (16, 3, 32, 32)
    assert sorted(study.screen.found) == ATTACKS


def test_images_of_any_type_are_looked_at(thresholds: str) -> None:
    crafted = attack(0)
    screen = Screen(Screening(thresholds=thresholds, action="flag"))
    wide = crafted.astype(np.uint16) * 257
    for name, pixels in {"bytes": crafted, "wide": wide, "real": crafted.astype(np.float32) / 255}.items():
        screen.check(name, pixels)
    assert len(set(screen.found.values())) == 1
    assert list(screen.found) == ["bytes", "wide", "real"]
    screen.check("small", attack(0)[: SIZE[0], : SIZE[1]])  # not larger than what the network gets
    assert "small" not in screen.found
    with pytest.raises(DataError, match="grey and RGB images, but four has the shape"):
        screen.check("four", np.zeros((48, 48, 4), np.uint8))
    with pytest.raises(DataError, match="all 2 images look camouflaged"):
        Screen(Screening(thresholds=thresholds)).sets({"all": from_arrays(np.stack([crafted, attack(1)]))})
    with pytest.raises(UnknownName, match="unknown action 'flags': did you mean flag"):
        Screening(action="flags")  # type: ignore[arg-type]


def test_what_is_used_is_told(thresholds: str, caplog: pytest.LogCaptureFixture) -> None:
    from convatlas.report import Report

    screen = Screen(Screening(thresholds=thresholds, action="flag"))
    screen.check("one.png", attack(0))
    with caplog.at_level(logging.WARNING):
        report = screen.noted(Report("T", "Done.", []))
    assert "1 image looks camouflaged, used all the same: one.png: looks camouflaged" in caplog.text
    assert report.summary == "Done. 1 image looks camouflaged and was used all the same."
    assert Screen().noted(report) is report


def test_a_picture_shows_what_hides(calibrated: Path, folder: Path, tmp_path: Path) -> None:
    detector = Camouflage.load(calibrated).detector
    shown = revealed(detector, attack(0))
    assert shown.shape == (12, 28, 3)
    from_afar, given = shown[:, :12].astype(int), shown[:, 16:].astype(int)
    assert np.abs(given - picture(100, SIZE)).max() <= 4  # the target
    assert np.abs(given - from_afar).mean() > 20
    assert main(["predict", str(calibrated), str(folder / "attack"), "--out", str(tmp_path)]) == 3
    assert (tmp_path / "report.html").read_text().count("<img") >= 8


def test_volumes_are_not_looked_at() -> None:
    with pytest.raises(ValueError, match=r"camouflage\.thresholds must be left out for r3d_18"):
        Recognition(model="r3d_18", camouflage=Screening(thresholds="t.json"))
