"""Volumes: patches to learn from, enlarging whole ones in bounded memory, files in and out, the task, its reports."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from convatlas.cli.main import main
from convatlas.data.phantoms import phantom
from convatlas.data.scans import Scan, read_scan
from convatlas.errors import DataError, Interrupted, Unsupported
from convatlas.networks.registry import create_model
from convatlas.restoration.super_resolution import SuperResolution
from convatlas.restoration.volume_evaluation import (
    VolumePatches,
    VolumeQuality,
    WholeVolumes,
    measure_volume,
    volume_pair,
)
from convatlas.restoration.volume_pictures import middle_slices, orthogonal_slices, residual_slices
from convatlas.restoration.volume_super_resolution import VolumeSuperResolution
from convatlas.restoration.volume_upscaling import Intensities, Patches, enlarge_scans, super_resolve
from convatlas.training.settings import Training
from convatlas.training.task import open_task, split_settings

TINY = {"filters": 4, "num_blocks": 1}
PATCHES = Patches(tile=8, overlap=2)
SETTINGS: dict[str, Any] = {"options": TINY, "patch_size": 8, "patch_stride": 8, "patches": PATCHES, "split_seed": 1}
GAME = {"adversarial": {"discriminator_options": {"levels": 2, "filters": 3}, "weight": 0.01}}
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "warmup_epochs": 0, "weight_decay": 0.0}
AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0])


def write_heads(folder: Path, count: int = 5, size: tuple[int, int, int] = (16, 12, 17)) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        head = 1000 * phantom(size, np.random.default_rng(number)) - 50
        nibabel.save(nibabel.Nifti1Image(head.astype(np.int16), AFFINE), folder / f"{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Volumes, with a file that is none, and a run on them against a discriminator."""
    root = tmp_path_factory.mktemp("volumes")
    data = write_heads(root / "data")
    (data / "broken.nii").write_text("no volume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        report = VolumeSuperResolution(data=str(data), **SETTINGS).fit(root / "run", Training(**SHORT, methods=GAME))
    assert "dB to trilinear interpolation" in report.summary
    return data, root / "run"


class _Linear(torch.nn.Module):
    """Stands for a network; enlarges by linear interpolation."""

    dims, in_channels, scale = 3, 1, 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.nn.functional.interpolate(x, scale_factor=2, mode="trilinear")


# -- what is learned from ----------------------------------------------------------------------------------------------


def test_patches_lie_on_blocks_and_show_something():
    head = phantom(16, np.random.default_rng(0))
    pair = volume_pair(Scan(np.pad(head, ((0, 17), (0, 0), (0, 1))) * 7 + 3, AFFINE), 2, "linear")
    assert pair.high.shape == (32, 16, 16)
    assert pair.high.min() == 0
    patches = VolumePatches([pair], 2, 8, 4)
    assert len(VolumePatches([pair], 2, 8, 4, foreground=0.0)) == 7 * 3 * 3 > len(patches) > 0
    assert all(place[1] < 16 for place in patches.places)  # what was padded shows nothing
    sample = patches[(2, 9)]
    _, z, y, x = patches.places[2]
    assert np.array_equal(sample["high"][0], pair.high[z : z + 8, y : y + 8, x : x + 8])
    torch.testing.assert_close(sample["low"], torch.nn.functional.avg_pool3d(sample["high"][None], 2)[0])
    flipped = dataclasses.replace(patches, flip=True)[(2, 0b101)]
    assert torch.equal(flipped["high"], sample["high"].flip(1, 3))
    assert torch.equal(flipped["low"], sample["low"].flip(1, 3))
    assert torch.equal(WholeVolumes([pair])[0]["high"][0], torch.from_numpy(pair.high))


def test_intensities_come_back():
    values = np.random.default_rng(0).normal(50, 9, (12, 12, 12)).astype(np.float32)
    values[0, 0, 0] = 1e6  # one bright voxel does not set the range
    intensities = Intensities.of(values)
    scaled = intensities.apply(torch.from_numpy(values))
    assert scaled.min() == 0
    assert float(scaled.median()) > 0.2
    torch.testing.assert_close(intensities.undo(scaled), torch.from_numpy(values), rtol=1e-5, atol=1e-3)
    for bad, message in ((np.ones((3, 3, 3)), "constant"), (np.full((3, 3, 3), np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            Intensities.of(bad)


# -- whole volumes -----------------------------------------------------------------------------------------------------


def test_whole_volumes_are_those_of_the_network_where_patches_reach_far_enough():
    model = create_model("disgan_x2", **TINY).eval()
    volume = np.random.default_rng(0).normal(100, 30, (7, 9, 8)).astype(np.float32)
    intensities = Intensities.of(volume)
    with torch.inference_mode():
        whole = intensities.undo(model(intensities.apply(torch.from_numpy(volume))[None, None]))[0, 0]
    result = super_resolve(model, volume, patches=Patches(tile=32))
    np.testing.assert_allclose(result, whole, rtol=1e-4, atol=1e-3)
    in_parts = super_resolve(model, volume, patches=Patches(tile=6, overlap=2))
    assert in_parts.shape == (14, 18, 16)
    assert np.abs(in_parts - whole.numpy()).max() > 1e-3  # patches see less


def test_volumes_are_padded_to_whole_patches_as_the_authors_do():
    model = _Linear()
    volume = np.random.default_rng(0).random((7, 9, 8)).astype(np.float32)
    padded = super_resolve(model, volume, patches=Patches(tile=4, overlap=0, window="flat", pad=True))
    assert padded.shape == (14, 18, 16)
    intensities = Intensities.of(volume)
    wide = np.pad(volume, ((0, 1), (1, 2), (0, 0)), constant_values=intensities.low)
    plain = super_resolve(model, wide, patches=Patches(tile=4, overlap=0, window="flat"), intensities=intensities)
    np.testing.assert_allclose(padded, plain[:14, 2:20], rtol=1e-5)


def test_a_result_goes_where_it_is_told(tmp_path: Path):
    volume = np.random.default_rng(0).random((9, 6, 7)).astype(np.float32)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(18, 12, 14), order="F")
    assert super_resolve(_Linear(), volume, patches=PATCHES, out=out) is out
    np.testing.assert_array_equal(out, super_resolve(_Linear(), volume, patches=PATCHES))
    with pytest.raises(ValueError, match="out must be left out"):
        super_resolve(_Linear(), volume, patches=Patches(tile=8, overlap=2, pad=True), out=out)


def test_volumes_that_cannot_be_enlarged():
    model = create_model("disgan_x2", **TINY)
    for bad, message in (
        (np.zeros((4, 4)), r"volume must be \(D, H, W\)"),
        (np.zeros((0, 4, 4)), "not empty"),
        (np.zeros((4, 4, 4), complex), "must be real"),
        (np.ones((4, 4, 4)), "constant"),
        (np.full((4, 4, 4), np.inf), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            super_resolve(model, bad)
    with pytest.raises(ValueError, match="model must take volumes"):
        super_resolve(create_model("disgan_2d_x2", **TINY), np.zeros((4, 4, 4)))
    for options, message in (({"tile": 0}, "tile must be"), ({"tile": 4, "overlap": 4}, "overlap must be")):
        with pytest.raises(ValueError, match=message):
            Patches(**options)


def test_linear_interpolation_as_a_network_gains_nothing():
    scan = Scan(phantom(16, np.random.default_rng(0)), AFFINE)
    whole = Patches(tile=32)
    measured = measure_volume(_Linear(), "head", scan, degradation="linear", sigma=0.1, patches=whole)
    assert measured.network == pytest.approx(measured.linear)
    assert measured.noisy_network == pytest.approx(measured.noisy_linear)
    assert measured.noisy_linear.psnr < measured.linear.psnr - 1
    again = measure_volume(_Linear(), "head", scan, degradation="linear", sigma=0.1, patches=whole)
    assert again.noisy_linear == measured.noisy_linear
    assert set(measured.slices) == {"linear", "network", "truth", "linear residual", "network residual"}
    assert np.array_equal(measured.slices["linear residual"], measured.slices["network residual"])
    perfect = VolumeQuality.of(torch.from_numpy(scan.values), torch.from_numpy(scan.values))
    assert perfect.ssim == pytest.approx(1)
    assert perfect.nrmse == 0


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_slices_stand_upright_side_by_side():
    volume = np.zeros((6, 8, 10), np.float32)
    volume[5] = 1  # the top of the head
    planes = middle_slices(volume)
    assert [plane.shape for plane in planes] == [(8, 10), (6, 10), (6, 8)]
    assert planes[1][0].min() == planes[2][0].min() == 1
    picture = orthogonal_slices(planes)
    assert (picture.shape, picture.dtype) == ((8, 10 + 10 + 8 + 2 * 4, 3), np.uint8)
    stretched = orthogonal_slices(planes, (2.0, 1.0, 1.0))
    assert stretched.shape == (12, 36, 3)
    mirrored = Scan(volume.transpose(2, 1, 0), np.diag([1, 1, -1, 1.0]))  # slices go down: the first is the top
    assert middle_slices(mirrored.values, mirrored)[1][-1].min() == 1


def test_residuals_are_red_and_blue():
    truth = [np.full((3, 3), 0.5)] * 3
    for shift, colour in ((1.0, (255, 0, 0)), (-1.0, (0, 0, 255)), (0.0, (255, 255, 255))):
        picture = residual_slices([plane + shift for plane in truth], truth)
        assert tuple(picture[1, 1]) == colour


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degradation", "shift"), [("linear", 0.5), ("nearest", 0.0)])
def test_nifti_files_keep_their_place(degradation: Any, shift: float, tmp_path: Path):
    data = write_heads(tmp_path / "in", 1)
    model = _Linear()
    done, skipped = enlarge_scans(model, [data], tmp_path / "out", patches=PATCHES, degradation=degradation)
    assert ([each.path for each in done], skipped) == (["0_x2.nii.gz"], [])
    before, after = nibabel.load(data / "0.nii.gz"), nibabel.load(tmp_path / "out" / "0_x2.nii.gz")
    assert after.shape == tuple(2 * length for length in before.shape)
    np.testing.assert_allclose(after.header.get_zooms(), [1, 1, 1.5])
    place = nibabel.affines.apply_affine
    np.testing.assert_allclose(place(after.affine, np.array([4, 6, 8]) + shift), place(before.affine, [2, 3, 4]))
    values = np.asarray(after.dataobj)
    assert values.min() == pytest.approx(-50, abs=1)  # in the units of the file
    assert done[0].spacing == pytest.approx((1, 1, 1.5))
    assert not list((tmp_path / "out").glob(".convatlas*"))


def test_large_results_are_put_together_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from convatlas.restoration import volume_upscaling

    data = write_heads(tmp_path / "in", 1)
    enlarge_scans(_Linear(), [data], tmp_path / "a", patches=PATCHES, degradation="linear")
    monkeypatch.setattr(volume_upscaling, "_IN_MEMORY", 10)
    enlarge_scans(_Linear(), [data], tmp_path / "b", patches=PATCHES, degradation="linear")
    first, second = (read_scan(tmp_path / folder / "0_x2.nii.gz") for folder in "ab")
    assert np.array_equal(first.values, second.values)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["0_x2.nii.gz"]


# -- the task ----------------------------------------------------------------------------------------------------------


def test_a_run_has_curves_of_both_players_quality_and_slices(trained: tuple[Path, Path], tmp_path: Path):
    data, run = trained
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for column in ("train_plain", "train_adversarial", "train_discriminator", "val_psnr"):
        assert float(rows[1][column]) > 0
    assert float(rows[1]["train_plain"]) < float(rows[0]["train_plain"])
    with (run / "quality.csv").open(newline="") as file:
        quality = list(csv.DictReader(file))
    assert [(row["way"], row["noise"]) for row in quality] == [
        *(("linear", "no"), ("network", "no"), ("linear", "yes"), ("network", "yes"))
    ]
    page = (run / "report.html").read_text()
    for words in ("trilinear", "Noise cleaning", "Loss: adversarial", "broken.nii", "residual of the network"):
        assert words in page
    for path in (run / "samples").iterdir():
        pixels = np.asarray(Image.open(path))
        assert pixels.std() > 10
    assert len(list((run / "samples").iterdir())) == 2
    task = open_task(run)
    assert isinstance(task, VolumeSuperResolution)
    assert "discriminator" not in " ".join(task.network.state_dict())
    assert task.quality()["PSNR [dB]"] == pytest.approx(float(quality[1]["PSNR"]), abs=1e-3)
    report = task.evaluate(data, folder=tmp_path)
    assert (tmp_path / "quality.csv").read_text().count("\n") == 1 + 4 * 5
    assert "Noise cleaning" in report.to_json()


def test_the_command_line_trains_evaluates_predicts_and_compares(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, run = trained
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Evaluation of disgan_x2"
    assert main(["predict", str(run), str(data), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"{n}_x2.nii.gz" for n in range(5)]
    assert "5 volumes" in (tmp_path / "out" / "report.html").read_text()
    config = {
        "data": str(data),
        "models": {
            "l1": {"model": "disgan_x2"},
            "gan": {"model": "disgan_x2", "methods": GAME},
        },
        **{**SETTINGS, "patches": {"tile": 8, "overlap": 2}},
        **{**SHORT, "epochs": 1},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    words = ["compare", "volume-super-resolution", "--config", str(tmp_path / "compare.yaml")]
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "compared"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "dB to trilinear interpolation" in report["summary"]
    methods = [
        yaml.safe_load((tmp_path / "compared" / label / "config.yaml").read_text())["methods"]
        for label in ("l1", "gan")
    ]
    assert methods == [{}, GAME]


def test_a_stopped_game_goes_on_exactly(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, _ = trained
    training = Training(**{**SHORT, "epochs": 3}, methods=GAME)

    def task() -> VolumeSuperResolution:
        return VolumeSuperResolution(data=str(data), **SETTINGS)

    whole = task()
    whole.fit(tmp_path / "whole", training)
    steps = 0
    plain = VolumeSuperResolution.losses

    def stopping(self: VolumeSuperResolution, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 4:  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, batch)

    monkeypatch.setattr(VolumeSuperResolution, "losses", stopping)
    with pytest.raises(Interrupted, match="stopped"):
        task().fit(tmp_path / "parts", training)
    monkeypatch.undo()
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    resumed = task()
    resumed.fit(tmp_path / "parts", training, resume=True)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], tensor), name
    states = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "parts")]
    ours, theirs = (state["state_dict"] for state in states)
    discriminator = [name for name in ours if "discriminator" in name]
    assert discriminator
    assert all(torch.equal(ours[name], theirs[name]) for name in discriminator)
    columns = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(path.open())]
        for path in (tmp_path / run / "metrics.csv" for run in ("whole", "parts"))
    ]
    assert columns[0] == columns[1]


@pytest.mark.parametrize("recipe", ["disgan", "disgan_plain", "disgan_l1"])
def test_recipes_train_a_step(recipe: str, tmp_path: Path):
    settings = yaml.safe_load(VolumeSuperResolution.recipe(recipe).read_text())
    assert (settings["lr"], settings["epochs"], settings["batch_size"], settings["patch_size"]) == (1e-4, 20, 4, 64)
    data = write_heads(tmp_path / "data", 3, (8, 8, 8))
    small = {**settings, **SETTINGS, "data": str(data), "epochs": 1, "batch_size": 2, "foreground": 0.0}
    small["patches"] = {"tile": 8, "overlap": 2}
    if recipe != "disgan_l1":
        assert settings["methods"]["adversarial"]["weight"] == 5e-3
        assert settings["methods"]["adversarial"]["feature_weight"] == 1e-2
        small["methods"]["adversarial"] |= {
            "discriminator_options": {"levels": 2, "filters": 3},
            "features_options": {"width": 2},
        }
    task, training = split_settings(VolumeSuperResolution, small)
    task.fit(tmp_path / "run", dataclasses.replace(training, batch_size=1))


def test_bad_settings_and_data(tmp_path: Path):
    with pytest.raises(Unsupported, match="espcn_x2 is not a network that enlarges volumes"):
        VolumeSuperResolution(model="espcn_x2")
    with pytest.raises(Unsupported, match="disgan_x2 enlarges volumes: take the task volume-super-resolution"):
        SuperResolution(model="disgan_x2")
    assert SuperResolution(model="disgan_2d_x2").scale == 2
    with pytest.raises(Unsupported, match="disgan_2d_x2 is not"):
        VolumeSuperResolution(model="disgan_2d_x2")
    for setting, message in (
        ({"options": {"in_channels": 2}}, "in_channels at 1"),
        ({"patch_size": 9}, "patch_size must be a positive multiple of 2"),
        ({"patch_stride": 0}, "patch_stride must be"),
        ({"degradation": "cubic"}, "unknown degradation"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"foreground": 2.0}, "foreground must be"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            VolumeSuperResolution(**setting)
    data = write_heads(tmp_path / "two", 2)
    with pytest.raises(DataError, match="holds 2 volumes, but training needs at least 3"):
        VolumeSuperResolution(data=str(data), **SETTINGS).prepare()
    data = write_heads(tmp_path / "three", 3)
    with pytest.raises(DataError, match="at least 64 voxels a side"):
        VolumeSuperResolution(data=str(data), options=TINY).prepare()
    with pytest.raises(DataError, match="does not exist"):
        VolumeSuperResolution(data=str(tmp_path / "none"), options=TINY).prepare()
