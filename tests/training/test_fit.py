"""Training does what the settings say: each feature against a loop written out by hand, or by its effect."""

from __future__ import annotations

import copy
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from convatlas.errors import CheckpointError, DataError, Interrupted, Unsupported
from convatlas.report import Report
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.sampling import EpochSampler
from convatlas.training.settings import SettingsError, Training
from convatlas.training.task import open_task, seed_everything, split_settings
from training.toy import Net, Toy

SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr": 0.05, "warmup_epochs": 0.5}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "best.safetensors")


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def current(run: Path) -> dict[str, torch.Tensor]:
    """The weights after the last step, not averaged."""
    checkpoint = last(run)
    weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
    return {key.removeprefix("network."): value for key, value in weights.items() if key.startswith("network.")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def by_hand(toy: Toy, training: Training) -> tuple[Net, Net]:
    """The network and its average after a plain loop with the same settings."""
    seed_everything(training.seed)
    toy.prepare()
    net = toy.network
    sampler = EpochSampler(len(toy.train_set), training.batch_size, training.seed)
    steps = -(-len(sampler) // training.accumulate)
    optimizer, done, averaged = make_optimizer(net, training), 0, None
    for epoch in range(training.epochs):
        sampler.set_epoch(epoch)
        net.train()
        for number, pairs in enumerate(sampler, 1):
            samples = [toy.train_set[pair] for pair in pairs]
            x, y = torch.stack([s["x"] for s in samples]), torch.stack([s["y"] for s in samples])
            with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
                scores = net(x)
            (F.cross_entropy(scores.float(), y) / training.accumulate).backward()
            if number % training.accumulate and number < len(sampler):
                continue
            if training.clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), training.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, done, steps) * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if averaged is None:
                averaged = copy.deepcopy(net)
            elif training.ema is not None:
                for average, parameter in zip(averaged.parameters(), net.parameters(), strict=True):
                    average.data.lerp_(parameter.data, 1 - training.ema)
    return net, averaged


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.8},
        {"optimizer": "lion", "lr": 0.005},
        {"schedule": "constant", "warmup_epochs": 0},
        {"schedule": "step", "decay_epochs": 1, "decay_rate": 0.3},
        {"schedule": "exponential", "decay_epochs": 2, "decay_rate": 0.3},
        {"cooldown_epochs": 1, "min_lr": 0.01},
        {"clip": 0.1},
        {"layer_decay": 0.3},
        {"schedule": "step", "decay_at": (1, 2)},
        {"lr_factors": {"3.": 0.1}},
        {"accumulate": 2},
        {"accumulate": 4, "optimizer": "sgd"},
        {"precision": "bf16"},
        {"ema": 0.8},
        {"seed": 5},
    ],
    ids=str,
)
def test_training_is_the_loop_that_the_settings_describe(tmp_path: Path, settings: dict[str, Any]):
    training = Training(**{**SHORT, **settings})
    Toy(dropout=0.2).fit(tmp_path / "run", training)
    net, averaged = by_hand(Toy(dropout=0.2), training)
    for key, value in current(tmp_path / "run").items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=1e-6, atol=1e-7)
    if training.ema is not None:
        for key, value in last(tmp_path / "run")["state_dict"].items():
            if key.startswith("network."):
                expected = averaged.state_dict()[key.removeprefix("network.")]
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_accumulation_equals_a_larger_batch(tmp_path: Path):
    common = {**SHORT, "optimizer": "sgd", "epochs": 2}
    Toy(samples=24).fit(tmp_path / "large", Training(**{**common, "batch_size": 8}))
    Toy(samples=24).fit(tmp_path / "small", Training(**{**common, "batch_size": 4, "accumulate": 2}))
    for key, value in current(tmp_path / "large").items():
        torch.testing.assert_close(current(tmp_path / "small")[key], value, rtol=1e-5, atol=1e-6)


def test_metrics_tell_rate_loss_and_validation_of_each_epoch(tmp_path: Path):
    toy, training = Toy(), Training(**SHORT, schedule="constant")
    toy.fit(tmp_path / "run", training)
    rows = Run(tmp_path / "run").read_metrics()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [10, 20, 30]  # 41 samples in fours, without the one left over
    assert {row["lr"] for row in rows} == {0.05}
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    with torch.no_grad():
        loss = F.cross_entropy(toy.network(toy.val_set.x), toy.val_set.y).item()
    assert min(row["val_loss"] for row in rows) == pytest.approx(loss, rel=1e-6)
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_metrics_tell_the_norm_of_the_gradients_before_clipping(tmp_path: Path, clip: float | None):
    whole = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 41,
    }
    training = Training(**{**SHORT, **whole, "schedule": "constant", "clip": clip})
    seed_everything(training.seed)
    start = Toy()
    start.prepare()
    Toy().fit(tmp_path / "run", training)
    moves = [value - start.network.state_dict()[key] for key, value in current(tmp_path / "run").items()]
    moved = torch.cat([move.flatten() for move in moves]).norm().item() / training.lr
    (row,) = Run(tmp_path / "run").read_metrics()
    assert row["grad_norm"] > 0.1
    assert moved == pytest.approx(row["grad_norm"] if clip is None else clip, rel=1e-3)


def test_the_best_epoch_is_kept_and_left_in_the_network(tmp_path: Path):
    toy = Toy()
    report = toy.fit(tmp_path / "run", Training(**{**SHORT, "lr": 1.0, "epochs": 6, "schedule": "constant"}))
    rows = Run(tmp_path / "run").read_metrics()
    best = min(row["val_loss"] for row in rows)
    assert rows[-1]["val_loss"] > best  # else this test shows nothing
    assert_equal(dict(toy.network.state_dict()), state(tmp_path / "run"))
    with torch.no_grad():
        loss = F.cross_entropy(toy.network(toy.val_set.x), toy.val_set.y).item()
    assert loss == pytest.approx(best, rel=1e-6)
    assert not toy.network.training
    assert isinstance(report, Report)
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_the_average_is_what_is_validated_and_kept(tmp_path: Path):
    toy = Toy()
    settings = {**SHORT, "lr": 0.01, "epochs": 10, "schedule": "constant"}
    toy.fit(tmp_path / "run", Training(**settings, ema=0.9))
    averaged, newest = last(tmp_path / "run")["state_dict"], current(tmp_path / "run")
    assert not torch.equal(averaged["network.0.weight"], newest["0.weight"])
    rows = Run(tmp_path / "run").read_metrics()
    kept = Net()
    kept.load_state_dict(state(tmp_path / "run"))
    with torch.no_grad():
        loss = F.cross_entropy(kept(toy.val_set.x), toy.val_set.y).item()
    assert loss == pytest.approx(min(row["val_loss"] for row in rows), rel=1e-6)
    assert rows[-1]["val_loss"] == min(row["val_loss"] for row in rows)
    assert torch.equal(state(tmp_path / "run")["0.weight"], averaged["network.0.weight"])


def test_patience_stops_and_a_resumed_run_stays_stopped(tmp_path: Path):
    training = Training(**{**SHORT, "epochs": 40, "lr": 3.0, "schedule": "constant", "patience": 2})
    Toy().fit(tmp_path / "run", training)
    losses = [row["val_loss"] for row in Run(tmp_path / "run").read_metrics()]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 40
    weights, step = state(tmp_path / "run"), last(tmp_path / "run")["global_step"]
    Toy().fit(tmp_path / "run", training, resume=True)
    assert last(tmp_path / "run")["global_step"] == step
    assert_equal(state(tmp_path / "run"), weights)


def test_plateau_lowers_the_rate_and_a_stopped_run_lowers_it_as_well(tmp_path: Path):
    settings = {"epochs": 12, "lr": 3.0, "schedule": "plateau", "plateau_epochs": 2, "decay_rate": 0.1}
    training = Training(**{**SHORT, **settings}, min_lr=0.05)
    Toy().fit(tmp_path / "whole", training)
    with pytest.raises(Interrupted):
        broken(stop_at=57).fit(tmp_path / "cut", training)
    Toy().fit(tmp_path / "cut", training, resume=True)
    rows = Run(tmp_path / "whole").read_metrics()
    best, waited, factor = rows[0]["val_loss"], 0, 1.0
    for row, following in pairwise(rows):
        best, waited = (row["val_loss"], 0) if row["val_loss"] <= best else (best, waited + 1)
        if waited == 2:
            factor, waited = 0.1 * factor, 0
        assert following["lr"] == pytest.approx(max(3 * factor, 0.05))
    assert factor < 1
    assert [row["lr"] for row in Run(tmp_path / "cut").read_metrics()] == [row["lr"] for row in rows]
    assert_equal(current(tmp_path / "cut"), current(tmp_path / "whole"))


def test_the_seed_decides_everything(tmp_path: Path):
    for name, seed, workers in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        training = Training(**{**SHORT, "seed": seed, "workers": workers, "epochs": 2})
        Toy(dropout=0.3).fit(tmp_path / name, training)
        torch.rand(5)  # what was drawn before does not matter
    assert_equal(current(tmp_path / "a"), current(tmp_path / "b"))
    assert not torch.equal(current(tmp_path / "a")["0.weight"], current(tmp_path / "c")["0.weight"])


# Stopping and going on, within one process; tests/cli has the same for real processes.


def broken(*, explode_at: int | None = None, stop_at: int | None = None, dropout: float = 0.0) -> Toy:
    toy = Toy(dropout=dropout)
    toy.explode_at, toy.stop_at = explode_at, stop_at
    return toy


@pytest.mark.parametrize("batch", [1, 4, 10, 11, 13, 30])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, batch: int):
    training = Training(**SHORT, ema=0.9, accumulate=2)
    Toy(dropout=0.3).fit(tmp_path / "whole", training)
    before = signal.getsignal(signal.SIGTERM)
    how = "stopped by SIGTERM; go on with 'convatlas train toy --resume .*cut'"
    with pytest.raises(Interrupted, match=how) as stop:
        broken(dropout=0.3, stop_at=batch).fit(tmp_path / "cut", training)
    assert stop.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    Toy(dropout=0.3).fit(tmp_path / "cut", training, resume=True)
    assert_equal(state(tmp_path / "cut"), state(tmp_path / "whole"))
    assert_equal(current(tmp_path / "cut"), current(tmp_path / "whole"))
    rows = [Run(tmp_path / name).read_metrics() for name in ("whole", "cut")]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1]


def test_a_finished_run_can_be_resumed_without_harm(tmp_path: Path):
    training = Training(**SHORT)
    Toy().fit(tmp_path / "run", training)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    toy = Toy()
    toy.fit(tmp_path / "run", training, resume=True)
    assert toy.seen == []
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    assert_equal(dict(toy.network.state_dict()), state(tmp_path / "run"))


def test_going_on_with_other_settings_is_refused(tmp_path: Path):
    Toy().fit(tmp_path / "run", Training(**SHORT))
    with pytest.raises(SettingsError, match=r"began with: lr was 0\.05, now it is 0\.1"):
        Toy().fit(tmp_path / "run", Training(**{**SHORT, "lr": 0.1}), resume=True)
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("lr: 0.05", "lr: 0.1"))
    with pytest.raises(SettingsError, match=r"began with: lr was 0\.05, now it is 0\.1"):
        Toy().fit(tmp_path / "run", Training(**{**SHORT, "lr": 0.1}), resume=True)


def test_going_on_with_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = Training(**SHORT)
    Toy().fit(tmp_path / "run", training)

    def more(self: Toy) -> None:
        prepare(self)
        self.train_set.x = torch.cat([self.train_set.x, torch.zeros(1, 4)])

    prepare = Toy.prepare
    monkeypatch.setattr(Toy, "prepare", more)
    with pytest.raises(DataError, match="were 41 training and 7 validation samples, now 42 and 7"):
        Toy().fit(tmp_path / "run", training, resume=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], r"last\.ckpt cannot be read: "),
        (lambda data: b"", r"last\.ckpt cannot be read: "),
        (lambda data: b"hello", r"last\.ckpt cannot be read: "),
    ],
)
def test_a_damaged_checkpoint_is_told_and_left(tmp_path: Path, damage: Any, message: str):
    training = Training(**{**SHORT, "epochs": 1})
    Toy().fit(tmp_path / "run", training)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        Toy().fit(tmp_path / "run", training, resume=True)
    assert path.read_bytes() == damaged


def test_another_file_in_place_of_the_checkpoint_is_told(tmp_path: Path):
    training = Training(**{**SHORT, "epochs": 1})
    Toy().fit(tmp_path / "run", training)
    torch.save({"state_dict": {}}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is not the checkpoint of a run"):
        Toy().fit(tmp_path / "run", training, resume=True)


def test_a_loss_that_is_no_number_stops_before_anything_is_overwritten(tmp_path: Path):
    training = Training(**SHORT)
    with pytest.raises(ValueError, match=r"the loss is no finite number in epoch 2: lower lr \(0\.05\)"):
        broken(explode_at=15).fit(tmp_path / "run", training)
    assert all(bool(value.isfinite().all()) for value in current(tmp_path / "run").values())
    assert last(tmp_path / "run")["position"] == [1, 0]
    with pytest.raises(ValueError, match="no finite number in epoch 1"):
        broken(explode_at=2).fit(tmp_path / "other", Training(**SHORT, checkpoint_minutes=0))
    assert last(tmp_path / "other")["position"] == [0, 1]


def test_a_run_that_fails_at_once_leaves_its_folder_free(tmp_path: Path):
    with pytest.raises(ValueError, match="no finite number"):
        broken(explode_at=1).fit(tmp_path / "run", Training(**SHORT))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator": "gpu"}, "accelerator gpu and devices 1 cannot be had on this machine"),
        ({"precision": "16"}, "precision must be 32 or bf16 on this machine, got 16"),
    ],
)
def test_what_the_machine_lacks_is_told(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Toy().fit(tmp_path / "run", Training(**SHORT, **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "gpu", "synchronised"),
    [({"devices": 2}, True, True), ({"nodes": 2}, True, True), ({}, True, False), ({"devices": 2}, False, False)],
)
def test_batches_are_normalised_together_on_several_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], gpu: bool, synchronised: bool
):
    asked: dict[str, Any] = {}

    def trainer(**options: Any) -> None:
        asked.update(options)
        raise ValueError("enough is known")

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("convatlas.training.fit.L.Trainer", trainer)
    with pytest.raises(ValueError, match="enough is known"):
        Toy().fit(tmp_path / "run", Training(**SHORT, **settings))
    assert asked["sync_batchnorm"] is synchronised
    assert (asked["devices"], asked["num_nodes"]) == (settings.get("devices", 1), settings.get("nodes", 1))


def test_a_used_folder_is_refused_before_the_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "note").write_text("mine")
    monkeypatch.setattr(Toy, "prepare", lambda self: pytest.fail("read the data"))
    with pytest.raises(FileExistsError, match="already exists"):
        Toy().fit(tmp_path, Training(**SHORT))


def test_a_disk_that_is_full_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = Training(**SHORT)
    Toy().fit(tmp_path / "whole", training)
    save, calls = torch.save, []

    def full(content: Any, file: Any, **options: Any) -> None:
        if isinstance(content, dict) and "random_states" in content:
            calls.append(1)
            if len(calls) == 2:
                file.write(b"half a checkpoint")
                raise OSError(28, "No space left on device")
        save(content, file, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device; go on with 'convatlas train toy --resume") as caught:
        Toy().fit(tmp_path / "run", training)
    assert caught.value.errno == 28
    assert str(tmp_path / "run") in str(caught.value.filename)
    assert last(tmp_path / "run")["position"] == [1, 0]
    assert not list((tmp_path / "run").rglob("*.part"))
    Toy().fit(tmp_path / "run", training, resume=True)
    assert_equal(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_verbs_that_a_task_lacks_are_told():
    with pytest.raises(
        Unsupported, match="the task toy has no verb 'design'; it has train, evaluate, predict, compare"
    ):
        Toy.require("design")
    Toy.require("train")


def test_settings_of_a_run_are_split_into_task_and_training(tmp_path: Path):
    training = Training(**SHORT)
    Toy(samples=12).fit(tmp_path / "run", training)
    toy, again = split_settings(Toy, Run.open(tmp_path / "run").settings())
    assert (toy.samples, again) == (12, training)
    with pytest.raises(SettingsError, match=r"unknown setting 'sample': did you mean samples?"):
        split_settings(Toy, {"task": "toy", "sample": 3})


def test_a_run_of_an_unknown_task_is_told(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("task: recogniton\n")
    with pytest.raises(ValueError, match=r"unknown task 'recogniton': did you mean recognition?"):
        open_task(tmp_path)
