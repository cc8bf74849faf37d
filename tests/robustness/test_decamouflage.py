"""Decamouflage: thresholds, votes, and the task that scans folders."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from convatlas.cli.main import main
from convatlas.errors import DataError
from convatlas.robustness.camouflage import Camouflage
from convatlas.robustness.decamouflage import (
    METRICS,
    Decamouflage,
    Threshold,
    black_box_threshold,
    reconstruct,
    squared_error,
    white_box_threshold,
)
from convatlas.robustness.detection_quality import area_under_curve, error_rates, roc_curve
from convatlas.robustness.scaling_attack import Scaler, planes
from robustness.pictures import SIZE, attack, picture


def test_white_box_takes_the_first_best_candidate() -> None:
    # By hand: 2.5 to 5 and 5 to 6 are equally good; the middle of 3 and 5 comes first.
    assert white_box_threshold([1, 2, 3], [5, 6]) == (4.0, 1.0)
    assert white_box_threshold([5, 6], [1, 2, 3], "below") == (4.0, 1.0)
    assert white_box_threshold([2.0], [1.0]) == (0.0, 0.5)
    random = np.random.default_rng(0)
    good, bad = random.integers(0, 9, 20) * 1.0, random.integers(3, 12, 15) * 1.0
    for direction in ("above", "below"):
        value, accuracy = white_box_threshold(good, bad, direction)
        unique = np.unique([*good, *bad])
        right = []
        for limit in [unique[0] - 1, *(unique[1:] + unique[:-1]) / 2, unique[-1] + 1]:
            flags = Threshold("csp", direction, limit).flags
            right.append((sum(not flags(x) for x in good) + sum(flags(x) for x in bad), limit))
        best = max(count for count, _ in right)
        assert (value, accuracy) == (next(limit for count, limit in right if count == best), best / 35)
    with pytest.raises(DataError, match="attack must hold at least one score"):
        white_box_threshold([1.0], [np.nan])


def test_black_box_is_a_percentile_of_benign_scores() -> None:
    scores = np.arange(101.0)
    assert black_box_threshold(scores, 2) == 98
    assert black_box_threshold(scores, 2, "below") == 2
    with pytest.raises(ValueError, match="percentile must be from 0 to 100, got 101"):
        black_box_threshold(scores, 101)


def test_constant_images_differ_in_nothing() -> None:
    scores = Decamouflage(SIZE).score(np.full((48, 40, 3), 77, np.uint8))
    for metric, value in scores.items():
        assert value == pytest.approx({"mse": 0.0, "ssim": 1.0}.get(metric[-4:].strip("_"), scores["csp"])), metric
    assert scores["csp"] <= 1
    x = torch.zeros(3, 2, 2, dtype=torch.uint8)
    assert squared_error(x, x + 2) == 12  # summed over channels


def test_batches_are_scored_as_single_images() -> None:
    detector, images = Decamouflage(SIZE), [picture(0), attack(1)]
    together = detector.scores(torch.stack([planes(image) for image in images]))
    for row, image in enumerate(images):
        assert detector.score(image) == pytest.approx({name: float(value[row]) for name, value in together.items()})
    assert list(together) == list(METRICS)


def test_attacks_are_told_and_thresholds_can_be_chosen_again(tmp_path: Path) -> None:
    benign, attacks = [picture(seed) for seed in range(8)], [attack(seed) for seed in range(8)]
    detector = Decamouflage(SIZE).fit(benign, percentile=3)
    assert all(detector.predict(attack(seed)).attack for seed in range(20, 24))
    assert not any(detector.predict(picture(seed)).attack for seed in range(8))
    read = Decamouflage.load(detector.save(tmp_path / "t.json"))
    assert read == detector
    assert read.predict(attacks[0]) == detector.predict(attacks[0])
    before = detector.thresholds["scaling_mse"]
    assert before.percentile == 3
    assert detector.choose(20).thresholds["scaling_mse"].value < before.value
    white = detector.fit(benign, attacks).thresholds
    assert white["scaling_mse"].percentile is None
    assert white["csp"].value == 2
    held = json.loads((tmp_path / "t.json").read_text())
    assert held["size"] == [12, 12]
    assert held["scaler"]["convention"] == "opencv"
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match="does not hold thresholds"):
        Decamouflage.load(tmp_path / "t.json")


def test_pictures_are_scored_with_the_channels_of_the_calibration() -> None:
    colour, gray = picture(0), picture(0)[..., :1]
    detector = Decamouflage(SIZE).fit([colour, picture(1)])
    assert detector.score(gray) == pytest.approx(detector.score(gray.repeat(3, 2)))
    assert Decamouflage(SIZE).score(gray)["min_mse"] == pytest.approx(detector.score(gray)["min_mse"] / 3)
    detector.fit([gray, picture(1)])
    assert detector.channels == 1
    assert detector.score(gray.repeat(3, 2)) == pytest.approx(Decamouflage(SIZE).score(gray))


def test_methods_without_a_score_abstain_and_a_tie_is_no_attack(caplog: pytest.LogCaptureFixture) -> None:
    values = {"scaling_mse": 10.0, "min_ssim": 0.5, "csp": 2.0}
    detector = Decamouflage(
        SIZE, thresholds={name: Threshold(name, METRICS[name], value) for name, value in values.items()}
    )
    assert detector.vote({"scaling_mse": 10.0, "min_ssim": 0.5, "csp": 0.0}).attack  # the threshold itself counts
    assert not detector.vote({"scaling_mse": np.nan, "min_ssim": 0.4, "csp": 1.0}).attack
    assert detector.vote({"scaling_mse": np.nan, "min_ssim": np.nan, "csp": 2.0}).attack
    assert not detector.vote(dict.fromkeys(values, np.nan)).attack
    with caplog.at_level(logging.WARNING):
        scores = detector.score(picture(0, (10, 9)))
    assert "not larger than the network's 12 x 12" in caplog.text
    assert np.isnan([scores["scaling_mse"], scores["min_ssim"]]).all()
    assert np.isfinite(scores["min_mse"])


def test_the_threshold_of_the_spectrum_is_the_lowest_that_benign_images_pass() -> None:
    detector, images = Decamouflage(SIZE), [picture(seed) for seed in range(3)]
    base = detector.calibrate_spectrum_threshold(images)
    assert max(detector.score(image, ["csp"])["csp"] for image in images) <= 1
    detector.base = base - 5
    assert max(detector.score(image, ["csp"])["csp"] for image in images) > 1


def test_bad_input_is_named() -> None:
    for options, error in (
        ({"size": (0, 5)}, "size must be a positive height and width"),
        ({"methods": ("scaling_mes",)}, "unknown method 'scaling_mes': did you mean scaling_mse"),
        ({"filter_size": 4}, "filter_size must be 2 or 3, got 4"),
    ):
        with pytest.raises(ValueError, match=error):
            Decamouflage(**options)
    with pytest.raises(DataError, match="no thresholds yet"):
        Decamouflage(SIZE).predict(picture(0))
    with pytest.raises(ValueError, match=r"uint8 image in .*, got float64"):
        Decamouflage(SIZE).score(np.zeros((20, 20)))
    with pytest.raises(ValueError, match="unknown how 'mean'"):
        reconstruct(picture(0), SIZE, Scaler(), "mean")


@pytest.mark.parametrize("how", ["median", "random"])
def test_what_the_scaler_looks_at_is_replaced(how: str) -> None:
    scaler, crafted = Scaler(), attack(0)
    clean = reconstruct(crafted, SIZE, scaler, how, torch.Generator().manual_seed(0))
    scaled, benign, target = (
        scaler.resize(planes(image), SIZE).double() for image in (clean, picture(0), picture(100, SIZE))
    )
    assert (scaled - benign).abs().mean() < (scaled - target).abs().mean() / 2
    seen = (scaler.matrix(48, 12) != 0).any(0).numpy()
    assert np.array_equal(clean[~seen], crafted[~seen])
    assert np.array_equal(clean[:, ~seen], crafted[:, ~seen])


def test_rates_and_areas() -> None:
    assert error_rates([False, True], [True, True, False, True]) == pytest.approx(
        {"accuracy": 4 / 6, "FAR": 0.25, "FRR": 0.5}
    )
    assert area_under_curve([1, 2], [2, 3, np.nan]) == pytest.approx(3.5 / 4)
    assert area_under_curve([1, 2], [2, 3], "below") == pytest.approx(0.5 / 4)
    random = np.random.default_rng(0)
    benign, attacks = random.integers(0, 9, 30) * 1.0, random.integers(3, 12, 20) * 1.0
    for direction in ("above", "below"):
        rejected, found = roc_curve(benign, [*attacks, np.nan], direction)
        assert (rejected[0], found[0], rejected[-1], found[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(found, rejected) == pytest.approx(area_under_curve(benign, attacks, direction))
    with pytest.raises(DataError, match="at least one score each"):
        roc_curve([1.0], [np.nan])


# -- the task ----------------------------------------------------------------------------------------------------------


def test_a_run_holds_thresholds_and_measures_the_rest(calibrated: Path, folder: Path, tmp_path: Path) -> None:
    task = Camouflage.load(calibrated)
    assert task.detector.thresholds["scaling_mse"].percentile is None  # with attacks: white-box
    assert len(task.detector.benign["csp"]) == 7
    report = json.loads((calibrated / "report.json").read_text())
    assert "white-box, on 7 benign, 7 attack" in report["summary"]
    assert main(["evaluate", str(calibrated), "--data", str(folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.json").read_text()
    assert [part["title"] for part in json.loads(text)["sections"][0]["parts"]] == ["Rates", "Scores", "ROC"]
    assert "On 10 benign, 10 attack images." in text
    assert (calibrated / "report.html").stat().st_size > 1000
    assert main(["evaluate", str(calibrated), "--data", str(tmp_path)]) == 1


def test_what_cannot_be_read_is_told_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(folder / "benign", tmp_path / "benign")
    (tmp_path / "benign" / "broken.png").write_bytes(b"no picture")
    task = Camouflage(data=str(tmp_path / "benign"), size=SIZE, spectrum="calibrate")
    with caplog.at_level(logging.WARNING):
        report = task.fit(tmp_path / "run")
    assert "1 file is left out: broken.png: not an image" in caplog.text
    assert "black-box, on 7 benign." in report.summary
    assert [section.title for section in report.sections][-1] == "Skipped files"


def test_a_scan_lists_scores_and_ends_with_an_alarm(calibrated: Path, folder: Path, tmp_path: Path) -> None:
    assert main(["predict", str(calibrated), str(folder), "--out", str(tmp_path / "all")]) == 3
    rows = list(csv.DictReader((tmp_path / "all" / "report.csv").open()))
    found = {row["image"]: row["attack"] for row in rows}
    assert len(found) == 20
    right = [("attack" in name) == (answer == "yes") for name, answer in found.items()]
    assert sum(right) >= 18
    quiet = [str(folder / name) for name, answer in found.items() if answer == "no"]
    assert main(["predict", str(calibrated), *quiet, "--out", str(tmp_path / "quiet")]) == 0


def test_what_a_calibration_cannot_do_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "camouflage", "--data", str(folder / "benign"), "--size", "[12, 12]", "--run"]
    assert main([*words, str(tmp_path / "a"), "--epochs", "3"]) == 1
    assert "it takes no settings of a training" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be resumed"):
        Camouflage(data=str(folder)).fit(tmp_path / "b", resume=True)
    for options, error in (
        ({"spectrum": "high"}, "spectrum must be a number or 'calibrate'"),
        ({"percentile": 0.0}, "percentile must be between 0 and 100"),
        ({"library": "torch", "algorithm": "area"}, "algorithm of torch"),
    ):
        with pytest.raises(ValueError, match=error):
            Camouflage(data="x", **options)
