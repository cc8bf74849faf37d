"""The illuminant task: what it learns and writes, folds, L-BFGS, augmentation, smoothing, and how data can be bad."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.data.exposure_pairs import ExposurePair, write_scene
from convatlas.data.linear_images import Levels, LinearImage
from convatlas.data.png16 import read_png16
from convatlas.data.simulators.exposures import Camera, illuminant_exposures
from convatlas.errors import DataError, Unsupported
from convatlas.networks.colour_constancy.histograms import CCC, ECCC, CCCConfig, ECCCConfig
from convatlas.networks.registry import create_model
from convatlas.ops.heat_maps import bilinear_target
from convatlas.ops.illuminant import angular_error, apply_white_balance
from convatlas.ops.log_chroma import rgb_to_log_chroma
from convatlas.restoration.illuminant_estimation import IlluminantEstimation
from convatlas.restoration.illuminant_files import balanced
from convatlas.restoration.illuminant_reports import illuminant_report
from convatlas.restoration.illuminant_training import (
    DescribedScenes,
    LossSettings,
    Scene,
    collate_described,
    fit_lbfgs,
    illuminant_losses,
    ready,
    relight,
)
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import open_task

SHORT: dict[str, Any] = {"epochs": 8, "batch_size": 8, "lr": 0.03, "warmup_epochs": 0, "weight_decay": 1e-5}
TINY = {"bins": 16}


def made(seed: int, light: Any = None, size: tuple[int, int] = (24, 32)) -> ExposurePair:
    found = illuminant_exposures(seed, size, Camera(), light)
    return ExposurePair(f"{seed}", LinearImage(found.long), LinearImage(found.short), found.illuminant, found.ratio)


def write_scenes(folder: Path, count: int, first: int = 0) -> Path:
    for seed in range(first, first + count):
        write_scene(folder / f"scene_{seed:02d}", made(seed))
    return folder


def a_scene(seed: int = 0) -> Scene:
    return ready(made(seed), 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scenes and a run on them."""
    root = tmp_path_factory.mktemp("illuminant")
    data = write_scenes(root / "data", 30)
    (data / "broken").mkdir()
    (data / "broken" / "long.png").write_text("no picture")
    (data / "broken" / "short.png").write_text("no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        task = IlluminantEstimation(data=str(data), model="emlp_eccc", options={"eccc": TINY}, weighting="validation")
        report = task.fit(root / "run", Training(**SHORT))
    assert "misses the light of 5 scenes" in report.summary  # the broken one is the sixth
    return data, root / "run"


def test_a_run_learns_and_can_be_opened(trained: tuple[Path, Path], tmp_path: Path):
    data, run = trained
    with (run / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert len(list((run / "samples").glob("*.png"))) == 5
    page = (run / "report.html").read_text()
    for text in ("Reproduction error", "Where the light may be", "bias 4", "broken", "shades of gray"):
        assert text in page
    task = open_task(run)
    own = [float(row["error, emlp_eccc"]) for row in rows]
    constant = [float(row["error, mean of the training"]) for row in rows]
    assert task.quality()["error [deg]"] == pytest.approx(np.mean(own), abs=1e-3)
    assert np.mean(own) < np.mean(constant)
    assert task.network.weights[0] != 0.5
    assert sum(task.network.weights) == pytest.approx(1)
    report = task.evaluate(data, folder=tmp_path / "evaluated")
    assert (tmp_path / "evaluated" / "errors.csv").read_text().count("\n") == 31
    table = next(part for part in report.sections[0].parts if getattr(part, "title", "") == "Angular error")
    assert [row[0] for row in table.rows][:2] == ["emlp_eccc", "mean of the training"]


def test_pictures_are_corrected_whole(trained: tuple[Path, Path], tmp_path: Path):
    task = open_task(trained[1])
    pair = made(50)
    write_scene(tmp_path / "in" / "one", pair)
    report = task.predict([tmp_path / "in"], tmp_path / "out")
    assert "found the light of 1 scene." in report.summary
    with (tmp_path / "out" / "illuminants.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    light = torch.tensor([float(row[name]) for name in "rgb"])
    assert [float(row[f"gain {name}"]) for name in "rgb"] == pytest.approx((light[1] / light).tolist(), rel=1e-4)
    linear = read_png16((tmp_path / "out" / row["linear"]).read_bytes()) / 65535
    expected = apply_white_balance(torch.from_numpy(pair.long.array().transpose(2, 0, 1))[None], light)
    expected = (expected * light.max() / light[1]).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(linear, expected, atol=1e-4)
    with Image.open(tmp_path / "out" / row["view"]) as image:
        assert image.size == (32, 24)
        assert abs(np.asarray(image).mean() / 255 - np.where(expected < 0.0031, 0, expected ** (1 / 2.2)).mean()) < 0.05
    two = [tmp_path / "in" / "one" / f"{role}.png" for role in ("long", "short")]
    task.predict(two, tmp_path / "two")
    assert (tmp_path / "two" / "illuminants.csv").read_text().splitlines()[1].split(",")[1:4] == [
        row[name] for name in "rgb"
    ]
    with pytest.raises(DataError, match="emlp_eccc needs a long and a short exposure, got one frame"):
        task.predict(two[:1], tmp_path / "three")
    with pytest.raises(DataError, match="long exposure is darker than short"):
        task.predict(two[::-1], tmp_path / "four")


def test_full_pixels_stay_white_and_strips_do_not_show():
    pixels = np.random.default_rng(0).integers(0, 65536, (150, 9, 3)).astype(np.uint16)
    pixels[70:80] = 65535
    linear, view = balanced(LinearImage(pixels), torch.tensor([0.4, 0.8, 0.5]))
    assert (linear[70:80] == 65535).all()
    assert (view[70:80] == 255).all()
    gains = np.array([2, 1, 1.6])
    np.testing.assert_allclose(linear, np.minimum(pixels * gains, 65535), atol=1)


def test_frames_are_smoothed_in_their_order(trained: tuple[Path, Path], tmp_path: Path):
    light = np.array([0.55, 0.72, 0.35])
    for number in range(6):
        write_scene(tmp_path / "clip" / f"{number}", made(60 + number, light))
    task = open_task(trained[1])
    assert task.spread > 0
    task.predict([tmp_path / "clip"], tmp_path / "alone")
    task.drift = 1e-6
    report = task.predict([tmp_path / "clip"], tmp_path / "smooth")
    found = {}
    for name in ("alone", "smooth"):
        with (tmp_path / name / "illuminants.csv").open(newline="") as file:
            found[name] = list(csv.DictReader(file))
    colours = {name: np.array([[float(row[c]) for c in "rgb"] for row in rows]) for name, rows in found.items()}
    assert np.ptp(colours["smooth"][2:], axis=0).max() < 0.6 * np.ptp(colours["alone"], axis=0).max()
    np.testing.assert_allclose(colours["smooth"][0], colours["alone"][0], atol=1e-5)
    assert float(found["smooth"][-1]["deviation u"]) < 0.6 * float(found["alone"][-1]["deviation u"])
    assert "Over the frames" in report.to_json()


def test_folds_measure_every_scene_once_and_go_on(trained: tuple[Path, Path], tmp_path: Path):
    data, run = trained[0], tmp_path / "run"
    training = Training(**{**SHORT, "epochs": 1})
    task = IlluminantEstimation(data=str(data), model="ccc", options=TINY, folds=2)
    report = task.fit(run, training)
    assert "misses the light of 30 scenes" in report.summary
    rows = list(csv.DictReader((run / "errors.csv").open(newline="")))
    assert len({row["scene"] for row in rows}) == 30
    shutil.rmtree(run / "fold_2")
    again = task.fit(run, training, resume=True)  # the second fold is done again
    assert again.summary == report.summary
    opened = open_task(run)
    assert len(opened.network.members) == 2
    assert opened.quality()["error [deg]"] == pytest.approx(
        np.mean([float(row["error, ccc"]) for row in rows]), abs=1e-3
    )
    single = tmp_path / "one.npy"
    np.save(single, made(70).long.pixels)
    assert "found the light of 1 scene." in opened.predict([single], tmp_path / "out").summary


def test_lbfgs_fits_and_tells_how_sure_it_is(trained: tuple[Path, Path], tmp_path: Path):
    task = IlluminantEstimation(
        data=str(trained[0]), model="ffcc", options={"bins": 16, "bin_size": 0.25}, solver="lbfgs"
    )
    report = task.fit(tmp_path / "run")
    losses = [row["train_loss"] for row in Run(tmp_path / "run").read_metrics()]
    assert losses[10] < losses[0]
    assert losses[-1] < losses[16]
    opened = open_task(tmp_path / "run")
    assert opened.network.config.start == tuple(task.changes[0]["start"]) != (-1.0, -1.0)
    assert task.fit(tmp_path / "run", resume=True).summary == report.summary
    opened.predict([trained[0]], tmp_path / "out")
    sure = [float(row["confidence"]) for row in csv.DictReader((tmp_path / "out" / "illuminants.csv").open())]
    assert 0 < min(sure) < max(sure) < 1


def test_lbfgs_reaches_the_optimum_of_the_convex_part():
    network = CCC(CCCConfig(form="ffcc", bins=8, bin_size=0.5, start=(-1.5, -1.0)))
    samples = [DescribedScenes([a_scene(seed) for seed in range(6)], network)[row] for row in range(6)]
    settings = LossSettings(rough=1e-3, large=1e-2)
    rows: list[dict[str, float]] = []
    fit_lbfgs(network, samples, settings, (200, 0), told=rows.append)
    before = network.filters.detach().clone()
    # Gradient of the same objective in the plain domain: nothing is left to gain.
    batch = collate_described(samples)
    target = bilinear_target(rgb_to_log_chroma(batch["rgb"]), 8, 0.5, network.config.start)
    scores = network.scores(batch["inputs"][0])[0].flatten(1).log_softmax(1).view_as(target)
    squares = torch.stack([maps.square().sum() for maps in (network.filters, network.biases)]).sum()
    steps = torch.stack(
        [(maps - maps.roll(1, axis)).square().sum() for maps in (network.filters, network.biases) for axis in (1, 2)]
    ).sum()
    cost = 0.5 * (settings.rough * steps + settings.large * squares)
    loss = -(target * scores).sum((1, 2)).mean() + cost
    loss.backward()
    assert float(network.filters.grad.abs().max()) < 1e-3 * float(before.abs().max())
    assert float(loss.detach()) == pytest.approx(rows[-1]["train_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="must be of the form ffcc"):
        fit_lbfgs(CCC(CCCConfig(bins=8)), samples, settings)


def test_relighting_is_what_the_camera_would_have_seen():
    """The same scene under two lights: relighting one gives the other, clipping included."""
    lights = [np.array([0.45, 0.7, 0.5]), np.array([0.7, 0.6, 0.25])]
    camera = Camera(ratios=(4.0,), clipped=(0.2, 0.2), shot=0.0, read=0.0, bits=16)
    pairs = [illuminant_exposures(3, (16, 20), camera, light) for light in lights]
    first = ready(
        ExposurePair("a", LinearImage(pairs[0].long), LinearImage(pairs[0].short), pairs[0].illuminant, 4.0), 20
    )
    new = torch.as_tensor(pairs[1].illuminant).float()
    # The camera meters anew, so that only proportions are told.
    factor = float(np.median(pairs[1].short / relight(first, new, 1.0).short[0].permute(1, 2, 0).numpy()))
    found = relight(first, new, factor)
    np.testing.assert_allclose(found.long[0].permute(1, 2, 0).numpy(), pairs[1].long, atol=2e-3)
    assert float(angular_error(found.rgb, new)) < 1e-3


def test_augmented_scenes_follow_their_seed():
    network = create_model("eccc", **TINY)
    lights = torch.stack([a_scene(seed).rgb for seed in range(8)])
    scenes = DescribedScenes([a_scene(0)], network, lights)
    first, same, other = scenes[(0, 5)], scenes[(0, 5)], scenes[(0, 6)]
    assert torch.equal(first["inputs"][0], same["inputs"][0])
    assert not torch.equal(first["inputs"][0], other["inputs"][0])
    assert any(torch.equal(first["rgb"], light) for light in lights)


def test_scenes_that_tell_nothing_are_left_out():
    black = LinearImage(np.zeros((8, 8, 3), np.float32))
    dim = LinearImage(np.full((8, 8, 3), 0.012, np.float32))
    light = np.array([0.5, 0.7, 0.5])
    scenes = [ready(ExposurePair(name, each, each, light, 4.0), 8) for name, each in (("dark", black), ("dim", dim))]
    found = DescribedScenes(scenes, create_model("emlp"), torch.tensor([[0.1, 0.9, 0.1]]))
    assert list(found.failed) == ["dark"]
    assert "no valid pixels" in found.failed["dark"]
    assert len(found) == 1
    assert torch.equal(found[(0, 1)]["rgb"], scenes[1].rgb)  # under that light red would be too dark


def test_losses_of_networks():
    settings = LossSettings()
    scenes = [a_scene(seed) for seed in range(4)]
    truth = torch.stack([scene.rgb for scene in scenes])
    for name, options in (("emlp", {}), ("eccc", {**TINY, "init_std": 0.5}), ("emlp_eccc", {"eccc": TINY})):
        network = create_model(name, **options)
        inputs = [torch.cat(parts) for parts in zip(*(s.described(network) for s in scenes), strict=True)]
        found = illuminant_losses(network, inputs, truth, settings)
        if name != "emlp_eccc":
            error = angular_error(network(*inputs), truth, "shrunk").mean()
            torch.testing.assert_close(found["error"], error)
            bare = illuminant_losses(network, inputs, truth, LossSettings(smooth_filters=0, smooth_biases=0))
            assert float(bare["loss"].detach()) == pytest.approx(float(error.detach()))
            assert float((found["loss"] - bare["loss"]).detach()) > (0.1 if name == "eccc" else -1e-9)
        found["loss"].backward()
    with pytest.raises(ValueError, match="large must be positive"):
        LossSettings(large=0)


def test_charts_are_left_out_of_all_estimates(tmp_path: Path):
    pair = made(5)
    pixels = [frame.array().copy() for frame in (pair.long, pair.short)]
    for frame, value in zip(pixels, (0.9, 0.2), strict=True):
        frame[:8, :8] = value * np.array([1.0, 0.2, 0.1])
    spoiled = ExposurePair("s", LinearImage(pixels[0]), LinearImage(pixels[1]), pair.illuminant, pair.ratio)
    mask = np.ones((24, 32), bool)
    mask[:9, :9] = False
    network = ECCC(ECCCConfig(bins=16))
    found = []
    for each in (pair, spoiled):
        masked = ExposurePair("m", each.long, each.short, each.illuminant, each.ratio, mask)
        found.append(ready(masked, 32).described(network))
    torch.testing.assert_close(found[0], found[1])


def test_reports_of_any_estimates():
    truth = torch.tensor([[0.5, 0.7, 0.4], [0.6, 0.6, 0.3]])
    report = illuminant_report({"right": 2 * truth, "white": torch.ones(2, 3)}, truth)
    assert report.summary.startswith("right is the best: 0.00 degrees on 2 scenes")
    assert {part.title for part in report.sections[0].parts} == {
        "Angular error",
        "Mean angular error",
        "Reproduction error",
    }
    with pytest.raises(ValueError, match="white must be"):
        illuminant_report({"white": torch.ones(3, 3)}, truth)


def test_bad_settings_and_data(tmp_path: Path):
    with pytest.raises(Unsupported, match="resnet18 is not a network that finds the light"):
        IlluminantEstimation(model="resnet18")
    for settings, match in (
        ({"solver": "lbfgs"}, "solver must be 'adam' for eccc"),
        ({"solver": "sgd"}, "solver must be one of"),
        ({"model": "ffcc", "solver": "lbfgs", "augment": True}, "augment must be false"),
        ({"weighting": "validation"}, "which is no ensemble"),
        ({"longest": 2}, "longest must be at least 8"),
        ({"folds": 1}, "folds must be 0 or at least 2"),
        ({"fold": 1}, "fold must be from 0 to 0"),
        ({"drift": -1.0}, "drift must not be negative"),
        ({"val_fraction": 0.0}, "val_fraction must be between"),
    ):
        with pytest.raises(ValueError, match=match):
            IlluminantEstimation(**settings)
    data = write_scenes(tmp_path / "few", 2)
    with pytest.raises(DataError, match="holds 2 scenes, but training needs at least 3"):
        IlluminantEstimation(data=str(data)).prepare()
    with pytest.raises(DataError, match="holds 2 scenes, but 3 folds need more"):
        IlluminantEstimation(data=str(data), folds=3, fold=1).prepare()
    write_scenes(tmp_path / "split" / "train", 3)
    write_scenes(tmp_path / "split" / "test", 2, 5)
    with pytest.raises(DataError, match="is split already"):
        IlluminantEstimation(data=str(tmp_path / "split"), folds=2, fold=1).prepare()
    task = IlluminantEstimation(data=str(tmp_path / "split"), options=TINY)
    task.prepare()
    assert {name: len(found) for name, found in task.splits.items()} == {"train": 2, "val": 1, "test": 2}
    dark = ExposurePair(
        "dark", LinearImage(np.zeros((8, 8, 3), np.float32)), LinearImage(np.zeros((8, 8, 3), np.float32))
    )
    with pytest.raises(ValueError, match="no valid pixels"):
        ready(dark, 8).described(create_model("emlp"))


def test_other_data_than_those_of_the_run_are_noticed(trained: tuple[Path, Path], tmp_path: Path):
    shutil.copytree(trained[1], tmp_path / "run")
    task = open_task(tmp_path / "run")
    task.data = str(write_scenes(tmp_path / "other", 4))
    with pytest.raises(DataError, match="are not those of the training"):
        task.evaluate()


def test_recipes_name_what_is_published():
    recipes = {name: json.dumps(path.read_text()) for name, path in IlluminantEstimation.recipes().items()}
    assert set(recipes) == {"eccc", "emlp", "c5", "ffcc"}
    assert "smooth_filters: 0.15" in recipes["eccc"]
    assert "smooth_biases: 0.02" in recipes["c5"]
    assert LossSettings().smooth_filters == 0.15
    assert Levels().black is None
