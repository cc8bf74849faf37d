"""The denoising task: what it learns and writes, the noise, whole files, and how data can be bad."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.data.image_pairs import Sample
from convatlas.data.pictures import Picture, read_picture, write_picture
from convatlas.errors import DataError, Unsupported
from convatlas.networks.registry import create_model
from convatlas.restoration.denoising import Denoising
from convatlas.restoration.denoising_evaluation import (
    Noise,
    NoisySet,
    denoise_image,
    measure_cleaned,
    quality_of,
    seen,
)
from convatlas.training.settings import Training
from convatlas.training.task import open_task
from restoration.scenes import scene, write_scenes

TINY = {"depth": 3, "dim": 8}
SHORT: dict[str, Any] = {"epochs": 6, "batch_size": 16, "lr": 0.01, "warmup_epochs": 0, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and a run on them."""
    root = tmp_path_factory.mktemp("denoising")
    data = write_scenes(root / "data", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        patch.setattr("convatlas.restoration.comparison._FRAME", (12, 16))
        task = Denoising(data=str(data), options=TINY, patch_size=16, patch_stride=12)
        report = task.fit(root / "run", Training(**SHORT))
    assert "dB to the noisy ones" in report.summary
    return data, root / "run"


def test_a_run_cleans_and_can_be_opened(trained: tuple[Path, Path], tmp_path: Path):
    data, run = trained
    with (run / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    assert float(rows[0]["PSNR"]) > float(rows[0]["noisy PSNR"]) + 1
    assert [path.suffix for path in (run / "samples").iterdir()] == [".png"]
    task = open_task(run)
    assert task.quality()["PSNR [dB]"] == pytest.approx(float(rows[0]["PSNR"]), abs=1e-3)
    report = task.evaluate(data, folder=tmp_path / "evaluated")
    assert (tmp_path / "evaluated" / "quality.csv").read_text().count("\n") == 7
    assert json.loads(report.to_json())["title"] == "Evaluation of dncnn"


def test_files_are_cleaned_whole(trained: tuple[Path, Path], tmp_path: Path):
    task = open_task(trained[1])
    rng = np.random.default_rng(0)
    noisy = (scene(9, (70, 61)) + rng.normal(0, 25, (70, 61, 3))).clip(0, 255)
    inputs = tmp_path / "in"
    inputs.mkdir()
    Image.fromarray(noisy.astype(np.uint8)).save(inputs / "photo.jpg", quality=95)
    deep = (257 * noisy[..., :1]).astype(np.uint16)
    alpha = np.full((70, 61, 1), 65535, np.uint16)
    write_picture(inputs / "deep.png", Picture(deep, alpha))
    (inputs / "broken.png").write_text("no picture")
    report = task.predict([inputs], tmp_path / "out")
    assert "cleaned 2 files" in report.summary
    colour, grey = (read_picture(tmp_path / "out" / name) for name in ("photo_clean.jpg", "deep_clean.png"))
    assert grey.pixels.dtype == np.uint16
    assert np.array_equal(grey.alpha, alpha)
    truth = torch.from_numpy(scene(9, (70, 61)).astype(np.float32).transpose(2, 0, 1)) / 255
    after = torch.from_numpy(colour.pixels.astype(np.float32).transpose(2, 0, 1)) / 255
    before = torch.from_numpy(noisy.astype(np.float32).transpose(2, 0, 1)) / 255
    assert quality_of(after, truth).psnr > quality_of(before, truth).psnr + 1


def test_noise_follows_its_seed_and_level():
    clean = torch.full((1, 200, 200), 0.5)
    noise = Noise(sigma=51)
    assert torch.equal(noise.add(clean, 3), noise.add(clean, 3))
    assert not torch.equal(noise.add(clean, 3), noise.add(clean, 4))
    assert float((noise.add(clean, 3) - clean).std()) == pytest.approx(0.2, rel=0.02)
    blind = Noise(sigma=51, train_sigma=(0, 51))
    levels = [float((blind.add(clean, seed, training=True) - clean).std()) for seed in range(40)]
    assert min(levels) < 0.03 < 0.15 < max(levels) < 0.21
    cut = Noise(sigma=200, cut=True).add(clean, 0)
    assert 0 == cut.min() < cut.max() == 1
    for arguments in ({"sigma": 0}, {"train_sigma": (5, 1)}):
        with pytest.raises(ValueError, match="sigma must be"):
            Noise(**arguments)


def test_training_noise_is_new_for_each_seed_and_given_noise_stays():
    clean = {"low": torch.zeros(1, 4, 4), "high": torch.zeros(1, 4, 4)}
    given = {"low": torch.ones(1, 4, 4), "high": torch.zeros(1, 4, 4)}

    class Samples(list[dict[str, torch.Tensor]]):
        def __getitem__(self, key: Any) -> Any:
            return dict(super().__getitem__(key[0] if isinstance(key, tuple) else key))

    samples = NoisySet(Samples([clean, given]), Noise(), training=True)
    assert torch.equal(samples[(0, 5)]["low"], samples[(0, 5)]["low"])
    assert not torch.equal(samples[(0, 5)]["low"], samples[(0, 6)]["low"])
    assert torch.equal(samples[(1, 5)]["low"], given["low"])


def test_pairs_of_real_noise_are_taken_as_they_are(tmp_path: Path):
    noisy = scene(0)[..., ::-1].copy()
    measured = measure_cleaned(
        create_model("dncnn", **TINY).eval(), "one", Sample((scene(0),), (noisy,)), Noise(sigma=1)
    )
    x, y = (torch.from_numpy(seen(image, 1)) for image in (noisy, scene(0)))
    assert measured.noisy == quality_of(x, y)


def test_grey_and_rgb_networks_take_grey_and_rgb_images():
    for channels in (1, 3):
        model = create_model("dncnn", **TINY, in_channels=channels).eval()
        for image in (scene(1, (20, 31)), scene(1, (20, 31))[..., :1], scene(1, (20, 31))[..., 0] / 255):
            result = denoise_image(model, image)
            assert (result.shape, result.dtype) == (image.shape, image.dtype)
    with pytest.raises(ValueError, match="image must be"):
        denoise_image(model, np.zeros((3, 3, 4), np.uint8))
    with pytest.raises(ValueError, match="NaN"):
        denoise_image(model, np.full((3, 3), np.nan))


@pytest.mark.parametrize("loss", ["l1", "psnr"])
def test_losses(loss: Any):
    task = Denoising(
        model="nafnet_width32",
        options={"width": 4, "encoder_depths": [1], "decoder_depths": [1], "middle_depth": 1},
        colour="rgb",
        loss=loss,
    )
    task.network = task._config().build()
    for parameter in task.network.ending.parameters():
        torch.nn.init.zeros_(parameter)  # the identity
    high = torch.rand(2, 3, 8, 8)
    value = task.losses({"low": high + 0.1, "high": high})["loss"]
    assert float(value) == pytest.approx(0.1 if loss == "l1" else -20, rel=1e-4)


def test_bad_settings_and_data(tmp_path: Path):
    with pytest.raises(Unsupported, match="resnet18 is not a network for denoising"):
        Denoising(model="resnet18")
    with pytest.raises(ValueError, match="in_channels"):
        Denoising(options={"in_channels": 3})
    for setting in ({"colour": "y"}, {"loss": "l2"}, {"patch_size": 0}, {"val_fraction": 1.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            Denoising(**setting)
    Image.fromarray(scene(0)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="needs at least 3"):
        Denoising(data=str(tmp_path)).prepare()
    write_scenes(tmp_path, 4)
    with pytest.raises(DataError, match="at least 500 x 500"):
        Denoising(data=str(tmp_path), options=TINY, patch_size=500).prepare()
