"""Several processes train one network: what they compute, how they stop, and checkpoints that move between them."""

from __future__ import annotations

import signal
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from convatlas.training import devices
from convatlas.training.devices import Launcher, every_process
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.sampling import EpochSampler, seed_everything
from convatlas.training.settings import Training
from training import ranks
from training.toy import Toy

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "fsdp")
COMMON: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 3,
    "lr": 0.05,
    "warmup_epochs": 0.5,
    "accelerator": "cpu",
}
#: Everything that draws random numbers or keeps a state.
ALL: dict[str, Any] = {**COMMON, "ema": 0.9, "accumulate": 2, "clip": 0.5, "methods": {"tract": {"lam": 0.2}}}
TOY: dict[str, Any] = {"dropout": 0.3, "norm": True}


#: So many samples fill the batches of one device and of two.
EVEN = 42


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def together(
    run: Path, training: dict[str, Any], toy: dict[str, Any] | None = None, **options: Any
) -> list[ranks.Ended]:
    given = {"devices": 2, **training}
    return ranks.run(given["devices"], ranks.fit, run, given, toy, folder=run.parent / f"out-{run.name}", **options)


def finish(run: Path, training: dict[str, Any], toy: dict[str, Any] | None = None, **options: Any) -> None:
    ended = together(run, training, toy, **options)
    assert {each.code for each in ended} == {0}, "\n".join(each.text for each in ended)


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def best(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "best.safetensors")


def rows(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in Run(run).read_metrics()]


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, dict | list):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: leaf for part, value in parts for key, leaf in leaves(value, f"{name}.{part}").items()}
    return {name: tree}


def contents(run: Path) -> dict[str, Any]:
    held = checkpoint(run)
    names = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "random_states", "loss_sum")
    return leaves([{name: held[name] for name in names if name in held}, best(run), rows(run)])


def assert_equal(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if tolerance and isinstance(value, float | torch.Tensor):
            torch.testing.assert_close(value, other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name


def whole_settings(strategy: str) -> dict[str, Any]:
    # Of three addends it matters in which order they are added.
    return {**ALL, "strategy": strategy, "devices": 3 if strategy == "ddp" else 2}


@pytest.fixture(scope="module", params=STRATEGIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run on several devices that was never stopped."""
    run = tmp_path_factory.mktemp(request.param) / "whole"
    finish(run, whole_settings(request.param), TOY)
    return request.param, run


def test_a_stopped_run_goes_on_to_the_same_state_in_every_process(whole: tuple[str, Path], tmp_path: Path):
    strategy, expected = whole
    training, run = whole_settings(strategy), tmp_path / "cut"
    epoch = {"ddp": 5, "fsdp": 7}[strategy]
    ended = together(run, training, TOY, changes={1: {"stop_at": epoch + 2}})  # a signal for one of them
    assert [each.code for each in ended] == [1, *[143] * (training["devices"] - 1)]
    assert f"stopped by SIGTERM; go on with 'convatlas train toy --resume {run}'" in ended[0].text
    assert checkpoint(run)["position"] == [1, 2]
    finish(run, training, TOY, resume=True)
    assert_equal(contents(run), contents(expected))
    states = checkpoint(run)["random_states"]
    assert len({tuple(each["torch"].tolist()) for each in states}) == training["devices"]


def test_checkpoints_are_those_of_one_device(whole: tuple[str, Path], tmp_path: Path):
    _, run = whole
    Toy(**TOY).fit(tmp_path / "single", Training(**ALL))
    assert best(run).keys() == best(tmp_path / "single").keys()  # and those of the plain network, without the method
    ours, single = checkpoint(run), checkpoint(tmp_path / "single")
    for name in ("state_dict", "current_model_state", "optimizer_states"):
        found, expected = leaves(ours[name]), leaves(single[name])
        assert found.keys() == expected.keys()
        tensors = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
        assert tensors
        assert all(type(found[key]) is torch.Tensor and found[key].shape == expected[key].shape for key in tensors)


def test_both_strategies_compute_the_same(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    runs = [tmp_path / strategy for strategy in STRATEGIES]
    for run in runs:
        finish(run, {**ALL, "epochs": 2, "optimizer": "lion", "precision": "bf16", "strategy": run.name}, TOY)
    assert_equal(contents(runs[0]), contents(runs[1]), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_batches_of_all_processes(tmp_path: Path):
    settings = {**COMMON, "epochs": 1, "optimizer": "sgd"}
    finish(tmp_path / "run", settings)
    training, toy = Training(**settings), Toy()
    seed_everything(0)
    toy.prepare()
    shares = [EpochSampler(len(toy.train_set), 3, 0, rank=rank, world_size=2) for rank in range(2)]
    optimizer, total = make_optimizer(toy.network, training), 0.0
    for step, pairs in enumerate(zip(*shares, strict=True)):
        for each in pairs:
            samples = [toy.train_set[pair] for pair in each]
            x, y = torch.stack([s["x"] for s in samples]), torch.stack([s["y"] for s in samples])
            loss = F.cross_entropy(toy.network(x), y)
            (loss / 2).backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, len(shares[0]))
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(best(tmp_path / "run"), dict(toy.network.state_dict()), rtol=1e-5, atol=1e-6)
    (row,) = rows(tmp_path / "run")
    assert row["train_loss"] == pytest.approx(total / (2 * len(shares[0])), rel=1e-5)
    with torch.no_grad():  # seven samples: four and three, in batches of three
        assert row["val_loss"] == pytest.approx(F.cross_entropy(toy.network(toy.val_set.x), toy.val_set.y).item())


@pytest.mark.parametrize(
    ("strategy", "methods"),
    [
        ("ddp", {"training.methods:Alternating": {}, "training.methods:Added": {}}),
        ("fsdp", {"training.methods:Distilled": {}, "training.methods:Adversarial": {}}),
    ],
)
def test_methods_compute_what_they_compute_on_one_device(tmp_path: Path, strategy: str, methods: dict[str, Any]):
    methods = {**methods, "tract": {"distributed": "allreduce"}}
    settings = {**COMMON, "epochs": 1, "methods": methods}
    finish(tmp_path / "two", {**settings, "strategy": strategy}, {"samples": EVEN})
    Toy(samples=EVEN).fit(tmp_path / "one", Training(**{**settings, "batch_size": 6}))
    found, expected = (leaves(checkpoint(tmp_path / name)["state_dict"]) for name in ("two", "one"))
    assert_equal(found, expected, rtol=1e-4, atol=1e-5)


# -- moving between numbers of devices and strategies ------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one device whose step is for two batches, as that of two devices."""
    run = tmp_path_factory.mktemp("single") / "run"
    Toy(samples=EVEN).fit(run, Training(**COMMON, ema=0.5, accumulate=2))
    return run


@pytest.mark.parametrize(("batch", "position"), [(9, [1, 2]), (7, [1, 0])])
def test_from_two_devices_to_one(single: Path, tmp_path: Path, batch: int, position: list[int]):
    run, toy = tmp_path / "run", {"samples": EVEN}
    stopped = together(run, {**COMMON, "ema": 0.5, "strategy": "fsdp"}, toy, changes={0: {"stop_at": batch}})
    assert stopped[0].code == 1
    assert checkpoint(run)["position"] == position
    Toy(**toy).fit(run, Training(**COMMON, ema=0.5, accumulate=2), resume=True)
    assert rows(run) == [pytest.approx(row, rel=1e-4) for row in rows(single)]
    assert_equal(best(run), best(single), rtol=1e-4, atol=1e-5)
    assert Run(run).settings()["devices"] == 1


@pytest.mark.parametrize(("strategy", "batch"), [("fsdp", 18), ("ddp", 14)])
def test_from_one_device_to_two(single: Path, tmp_path: Path, strategy: str, batch: int):
    toy, run = Toy(samples=EVEN), tmp_path / "run"
    toy.stop_at = batch
    with pytest.raises(Exception, match="stopped by SIGTERM"):
        toy.fit(run, Training(**COMMON, ema=0.5, accumulate=2))
    finish(run, {**COMMON, "ema": 0.5, "strategy": strategy}, {"samples": EVEN}, resume=True)
    assert rows(run) == [pytest.approx(row, rel=1e-4) for row in rows(single)]
    assert_equal(best(run), best(single), rtol=1e-4, atol=1e-5)
    assert Run(run).settings()["strategy"] == strategy


def test_a_step_for_fewer_samples_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    toy, run = Toy(), tmp_path / "run"
    toy.stop_at = 4
    with pytest.raises(Exception, match="stopped by SIGTERM"):
        toy.fit(run, Training(**COMMON, accumulate=2))
    Toy().fit(run, Training(**{**COMMON, "batch_size": 5}), resume=True)
    assert "a step is for 5 samples now, it was for 6" in caplog.text
    assert [row["step"] for row in rows(run)] == [8, 16, 24]  # of 12 samples, 10 fill batches of 5


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_process_that_dies_ends_the_others(tmp_path: Path):
    run = tmp_path / "run"
    ended = together(run, COMMON, changes={1: {"stop_at": 9, "signal": signal.SIGKILL}})
    assert [each.code for each in ended] == [1, -signal.SIGKILL]
    how = f"another process of the run has ended; go on with 'convatlas train toy --resume {run}'"
    assert how in ended[0].text
    assert checkpoint(run)["position"] == [1, 0]


def test_a_loss_that_is_no_number_in_one_process_stops_all(tmp_path: Path):
    ended = together(tmp_path / "run", COMMON, changes={1: {"explode_at": 2}})
    assert [each.code for each in ended] == [1, 1]
    for each in ended:
        assert "ValueError: the loss is no finite number in epoch 1" in each.text


def test_parameters_without_a_gradient_are_named(tmp_path: Path):
    ended = together(tmp_path / "run", COMMON, {"spare": True})
    assert [each.code for each in ended] == [1, 1]
    assert "Unsupported: spare.weight, spare.bias got no gradient from a batch" in ended[0].text
    finish(tmp_path / "other", COMMON, {"spare": True}, changes={r: {"unused_parameters": True} for r in (0, 1)})


def test_a_second_run_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(devices, "_trained", types.SimpleNamespace(is_set=lambda: True))
    with pytest.raises(ValueError, match="a process can train with several devices only once"):
        Toy().fit(tmp_path / "run", Training(**COMMON, devices=2))
    assert not (tmp_path / "run").exists()


class Helper:
    def __init__(self, code: int | None, after: float = 0.0) -> None:
        self.returncode, self.code, self.until, self.killed = None, code, time.monotonic() + after, False

    def poll(self) -> int | None:
        if time.monotonic() >= self.until:
            self.returncode = self.code
        return self.returncode

    def kill(self) -> None:
        self.killed = True


def launcher(*helpers: Helper) -> Launcher:
    environment = types.SimpleNamespace(cluster_environment=None, num_processes=2, num_nodes=1)
    made = Launcher(environment, "go on")
    made.helpers = helpers
    return made


def test_launcher_tells_how_a_process_has_ended():
    assert launcher(Helper(None), Helper(0)).ended(0.1) == ""
    assert launcher(Helper(None), Helper(-9)).ended() == "process 2 of the run was ended by SIGKILL; go on"
    assert launcher(Helper(3, after=0.2)).ended(5) == "process 1 of the run ended with exit code 3; go on"


def test_launcher_ends_a_process_that_waits_forever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    ends: list[int] = []
    stuck, over = launcher(Helper(-9), still := Helper(None)), launcher(Helper(-9))
    stuck.patience = 0.1

    def end(code: int) -> None:
        ends.append(code)
        stuck.leave()

    monkeypatch.setattr("os._exit", end)
    over.leave()
    over._watch()
    stuck._watch()
    assert ends == [1]
    assert still.killed
    assert caplog.text.count("error: process 1 of the run was ended by SIGKILL; go on") == 1


def test_alone_a_process_is_every_process():
    assert every_process({"a": 1}) == [{"a": 1}]
