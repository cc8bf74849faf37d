"""Pre-training by the command line: a run folder, its report and pictures, going on with recognition, recipes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from convatlas.cli.main import main
from convatlas.errors import DataError, Interrupted, UnknownName, Unsupported
from convatlas.recognition.pretraining import Pretraining
from convatlas.recognition.task import Recognition
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.spark import SparK
from convatlas.training.task import split_settings
from recognition.pictures import TINY, short, write_pictures

SPARK: dict[str, Any] = {"spark": {"decoder_width": 32}}
RECIPES = ("spark_resnet", "spark_convnext", "spark_convnext_384")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pretrained")
    data = write_pictures(root / "data")
    (data / "loose.png").write_bytes((data / "cat" / "00.png").read_bytes())
    words = ["--method", "spark", "--methods", json.dumps(SPARK), "--model", "convnext_tiny", "--data", str(data)]
    words += ["--options", json.dumps(TINY), "--epochs", "2", "--batch_size", "8", "--run", str(root / "run")]
    assert main(["pretrain", *words]) == 0
    return data, root / "run"


def test_a_run_holds_curves_and_pictures(pretrained: tuple[Path, Path]):
    run = Run.open(pretrained[1])
    rows = run.read_metrics()
    assert len(rows) == 2
    assert all(0.5 < row["val_loss"] < 2 for row in rows)
    pictures = sorted(run.samples.glob("*.png"))
    pixels = np.asarray(Image.open(pictures[0]))
    assert pixels.shape == (64, 3 * 64 + 2 * 4, 3)
    assert pixels.std() > 1
    page = (run.folder / "report.html").read_text()
    assert "Original, masked, reconstructed" in page
    assert "--weights" in page


def test_recognition_goes_on_from_the_run_or_its_file(pretrained: tuple[Path, Path], tmp_path: Path):
    data, run = write_pictures(tmp_path / "data"), pretrained[1]
    learned = Pretraining.load(run).network.state_dict()
    for source in (run, run / "checkpoints" / "best.safetensors"):
        task = Recognition(data=str(data), model="convnext_tiny", options=TINY, weights=str(source))
        task.prepare()
        assert "keeps its own" in task.started_from
        assert torch.equal(task.network.state_dict()["stages.2.0.dwconv.weight"], learned["stages.2.0.dwconv.weight"])
    task.loss = "binary"
    task.fit(tmp_path / "tuned", short(epochs=1))
    assert Run.open(tmp_path / "tuned").read_metrics()[0]["train_loss"] < 1


def test_a_finished_run_gets_its_report_again(pretrained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    (pretrained[1] / "report.html").unlink()
    assert main(["pretrain", "--resume", str(pretrained[1])]) == 0
    assert (pretrained[1] / "report.html").is_file()
    assert "mean squared error" in capsys.readouterr().out


def test_a_folder_with_parts_is_taken_by_its_parts(tmp_path: Path):
    for part in ("train", "val", "test"):
        write_pictures(tmp_path / part, count=2, classes=("cat",))
    sets = Pretraining(data=str(tmp_path), model="convnext_tiny", options=TINY)._read()
    assert {name: len(images) for name, images in sets.items()} == {"train": 2, "val": 2}


def test_grey_digits_train_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = Pretraining(data="digits", model="convnext_tiny", options=TINY, val_fraction=0.99)
    task.fit(tmp_path / "run", Training(epochs=1, batch_size=16, warmup_epochs=0, methods=SPARK))
    assert task.preprocess.shape == (64, 64)
    assert task.network.in_channels == 1
    assert task.unreadable == {}


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_pictures(tmp_path / "data", count=4)
    method = {"spark": {"decoder_width": 32, "weight_decay_end": 0.2}}
    training = Training(epochs=2, batch_size=4, warmup_epochs=0, optimizer="lamb", lr=0.01, methods=method)

    def fit(name: str, *, resume: bool = False) -> None:
        task = Pretraining(data=str(data), model="convnext_tiny", options=TINY, image_size=64)
        task.fit(tmp_path / name, training, resume=resume)

    fit("whole")
    plain, calls = SparK.losses, []

    def stopping(self: SparK, *words: Any) -> Any:
        calls.append(None)
        if len(calls) == 5:  # within the second epoch
            signal.raise_signal(signal.SIGTERM)
        return plain(self, *words)

    monkeypatch.setattr(SparK, "losses", lambda self, model, batch, loss_fn: stopping(self, model, batch, loss_fn))
    with pytest.raises(Interrupted):
        fit("cut")
    fit("cut", resume=True)
    states = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    whole, cut = (state["state_dict"] for state in states)
    assert any(key.startswith("method_parts.0.mask_tokens") for key in whole)
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    decays = [{group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]} for state in states]
    assert decays == [{0.0, 0.2}] * 2


def test_bad_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(Unsupported, match="spark alone"):
        Pretraining(data="digits", options={}).fit(tmp_path / "a", Training(epochs=1, warmup_epochs=0))
    task = Pretraining(data="digits", model="convnext_tiny", options=TINY, image_size=48)
    with pytest.raises(ValueError, match="multiples of the total stride 32"):
        task.fit(tmp_path / "b", Training(epochs=1, warmup_epochs=0, methods=SPARK))
    with pytest.raises(ValueError, match="num_classes"):
        Pretraining(options={"num_classes": 3})
    with pytest.raises(ValueError, match="val_fraction"):
        Pretraining(val_fraction=0.0)
    with pytest.raises(Unsupported, match="r3d_18 is not a network for images"):
        Pretraining(model="r3d_18")
    with pytest.raises(Unsupported, match="go on with"):
        Pretraining().evaluate()
    with pytest.raises(UnknownName, match="loss"):
        Recognition(loss="hinge")  # type: ignore[arg-type]
    write_pictures(tmp_path / "one", count=1, classes=("cat",))
    with pytest.raises(DataError, match="at least 2"):
        Pretraining(data=str(tmp_path / "one"))._read()
    assert main(["pretrain", "--method"]) == 2
    assert "must be followed" in capsys.readouterr().err
    assert main(["evaluate", "pretraining"]) != 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_pre_training_have_the_published_numbers(name: str):
    assert set(Pretraining.recipes()) == set(RECIPES)
    task, training = split_settings(Pretraining, yaml.safe_load(Pretraining.recipe(name).read_text()))
    large = name.endswith("384")
    batch = training.batch_size * training.accumulate
    assert batch == (2048 if large else 4096)
    assert training.lr == pytest.approx((4e-4 if large else 2e-4) * batch / 256)
    assert learning_rate(training, 0, 10) == pytest.approx(0.005 * training.lr)
    assert learning_rate(training, 16000, 10) == pytest.approx(0.001 * training.lr)
    spark = training.methods["spark"]
    assert (spark["mask_ratio"], spark["weight_decay_end"]) == (0.75 if large else 0.6, 0.2)
    assert (training.clip, training.weight_decay, training.epochs) == (5, 0.04, 1600)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), training)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95 if "resnet" in name else 0.999)
    assert task.augment.scale == (0.67, 1.0)
    assert task.image_size == (384 if large else 224)


@pytest.mark.parametrize(
    ("name", "batch", "base", "epochs"),
    [
        ("spark_resnet_finetune", 2048, 2e-3, 300),
        ("spark_convnext_finetune", 4096, 2e-4, 400),
        ("spark_convnext_384_finetune", 1024, 6e-5, 200),
    ],
)
def test_recipes_of_fine_tuning_have_the_published_numbers(name: str, batch: int, base: float, epochs: int):
    task, training = split_settings(Recognition, yaml.safe_load(Recognition.recipe(name).read_text()))
    assert training.batch_size * training.accumulate == batch
    assert training.lr == pytest.approx(base * batch / 256)
    assert (training.epochs, training.layer_decay) == (epochs, 0.7)
    resnet = "resnet" in name
    assert (task.loss == "binary", task.mixup, training.optimizer) == (
        (True, 0.1, "lamb") if resnet else (False, 0.8, "adamw")
    )
    assert task.augment.trivial_augment
    assert task.augment.random_erasing == 0.25
