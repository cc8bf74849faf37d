"""Methods do in a task what they do in a loop of one's own, alone and together, also when the run is stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from convatlas.catalog import METHODS, resolve
from convatlas.errors import Interrupted, UnknownName, Unsupported
from convatlas.training.method import Method, Together, make_methods
from convatlas.training.optim import learning_rate, make_optimizer, parameter_groups
from convatlas.training.run import Run
from convatlas.training.sampling import EpochSampler, seed_everything
from convatlas.training.settings import SettingsError, Training
from convatlas.training.tract import TrAct
from training.methods import Added, Adversarial, Alternating, Distilled, Growing, Replaced
from training.toy import Net, Toy

SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr": 0.05, "warmup_epochs": 0.5}
HERE = "training.methods:"
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tract": {"tract": {"lam": 0.3}},
    "added": {HERE + "Added": {"weight": 0.02}},
    "adversarial": {HERE + "Adversarial": {}},
    "distilled": {HERE + "Distilled": {}},
    "alternating": {HERE + "Alternating": {}},
    "replaced": {HERE + "Replaced": {}},
    "growing": {HERE + "Growing": {}},
    "all": {
        name: {} for name in ("tract", *(HERE + each for each in ("Growing", "Adversarial", "Distilled", "Added")))
    },
    "alternating with others": {HERE + "Alternating": {}, HERE + "Added": {}, "tract": {}},
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(model(batch["x"]).float(), batch["y"])}


def by_hand(training: Training) -> tuple[nn.Module, Method]:
    """A loop without Lightning or a task."""
    toy = Toy(dropout=0.2)
    seed_everything(training.seed)
    method = Together(make_methods(training.methods))
    seed_everything(training.seed)
    toy.prepare()
    model = method.prepare(toy.network)
    optimizers = list(method.optimizers(model, training)) or [make_optimizer(model, training)]
    for part in method.parts():
        for group in parameter_groups(part, weight_decay=training.weight_decay):
            optimizers[0].add_param_group({**group, "lr": training.lr})
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    sampler, done = EpochSampler(len(toy.train_set), training.batch_size, training.seed), 0
    for epoch in range(training.epochs):
        sampler.set_epoch(epoch)
        method.start_epoch(model, epoch)
        model.train()
        for pairs in sampler:
            samples = [toy.train_set[pair] for pair in pairs]
            batch = {"x": torch.stack([s["x"] for s in samples]), "y": torch.stack([s["y"] for s in samples])}
            factor = learning_rate(training, done, len(sampler)) / training.lr
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            for number, losses in method.turns(model, batch, loss_fn):
                optimizers[number].zero_grad()
                losses["loss"].backward()
                optimizers[number].step()
            done += 1
    return model, method


@each_case
def test_a_task_does_what_a_loop_of_ones_own_does(tmp_path: Path, case: str):
    training = Training(**SHORT, methods=CASES[case])
    Toy(dropout=0.2).fit(tmp_path / "run", training)
    model, method = by_hand(training)
    held = checkpoint(tmp_path / "run")["state_dict"]
    expected = {f"network.{key}": value for key, value in model.state_dict().items()}
    for number, part in enumerate(method.parts()):
        expected |= {f"method_parts.{number}.{key}": value for key, value in part.state_dict().items()}
    assert held.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(held[key], value, rtol=1e-5, atol=1e-6)


@each_case
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, case: str):
    training = Training(**SHORT, methods=CASES[case], ema=0.9)
    Toy(dropout=0.2).fit(tmp_path / "whole", training)
    toy = Toy(dropout=0.2)
    toy.stop_at = 29  # of 10, 20 or 40 batches an epoch, as often as the method asks for losses
    with pytest.raises(Interrupted):
        toy.fit(tmp_path / "cut", training)
    Toy(dropout=0.2).fit(tmp_path / "cut", training, resume=True)
    for name in ("state_dict", "current_model_state"):
        found, expected = checkpoint(tmp_path / "cut")[name], checkpoint(tmp_path / "whole")[name]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    rows = [Run(tmp_path / name).read_metrics() for name in ("whole", "cut")]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]
    # What is kept is the plain network.
    Net().load_state_dict(load_file(tmp_path / "cut" / "checkpoints" / "best.safetensors"))
    assert Run(tmp_path / "cut").settings()["methods"] == CASES[case]


def test_methods_change_what_is_learned(tmp_path: Path):
    runs = {"plain": {}, **{name: CASES[name] for name in ("tract", "added", "adversarial", "replaced")}}
    weights = []
    for name, methods in runs.items():
        Toy().fit(tmp_path / name, Training(**{**SHORT, "epochs": 1}, methods=methods))
        weights.append(checkpoint(tmp_path / name)["state_dict"]["network.0.weight"])
    assert not any(torch.allclose(a, b) for row, a in enumerate(weights) for b in weights[:row])


def test_clipping_holds_for_each_turn(tmp_path: Path):
    training = Training(**{**SHORT, "epochs": 1, "schedule": "constant", "warmup_epochs": 0}, clip=1e-4)
    toy = Toy()
    seed_everything(0)
    toy.prepare()
    before = copy.deepcopy(toy.network.state_dict())
    Toy().fit(tmp_path / "run", Training(**{**vars(training), "methods": CASES["alternating"]}))
    held = checkpoint(tmp_path / "run")["state_dict"]
    moved = (held["network.0.weight"] - before["0.weight"]).norm()
    assert 0 < moved <= 10 * 0.05 * 1e-4 * 1.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 2}, "accumulate must be 1 with a method of several optimizers, got 2"),
        ({"strategy": "fsdp"}, "several optimizers cannot train with the strategy fsdp: take ddp"),
        ({"precision": "16"}, "precision must be 32 or bf16 with a method of several optimizers, got 16"),
    ],
)
def test_what_turns_cannot_have_is_told(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Toy().fit(tmp_path / "run", Training(**SHORT, methods=CASES["alternating"], **settings))


# -- making them -------------------------------------------------------------------------------------------------------


def test_methods_are_made_from_settings():
    made = make_methods({"tract": {"lam": 0.2, "layer": "0"}, HERE + "Added": {"weight": 3}})
    assert made["tract"] == TrAct(lam=0.2, layer="0")
    assert isinstance(made[HERE + "Added"], Added)
    assert made[HERE + "Added"].weight == 3.0
    assert make_methods({}) == {}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"trakt": {}}, UnknownName, "unknown method 'trakt': did you mean tract"),
        ({"tract": {"lamb": 1}}, SettingsError, "methods: tract: unknown setting 'lamb': did you mean lam"),
        ({"tract": {"solver": "qr"}}, SettingsError, "methods: tract: solver must be one of cholesky, inverse, eigh"),
        ({"tract": {"lam": -1}}, ValueError, "lam must be positive, got -1"),
        ({HERE + "NoMethod": {}}, Unsupported, "must be a class below .*Method, training.methods:NoMethod is none"),
        ({HERE + "Missing": {}}, Unsupported, "training.methods:Missing is none"),
        ({"nowhere.at_all:Method": {}}, ImportError, "nowhere"),
    ],
)
def test_wrong_methods_are_told(settings: dict[str, dict[str, Any]], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make_methods(settings)


def test_unknown_names_are_told_with_the_settings():
    with pytest.raises(UnknownName, match="unknown method 'trakt': did you mean tract"):
        Training(methods={"trakt": {}})


def test_two_methods_with_optimizers_are_refused():
    with pytest.raises(ValueError, match="one method at most may bring its optimizers, got a and b"):
        Together({"a": Alternating(), "b": Replaced()})


def test_a_method_that_renames_weights_is_refused(tmp_path: Path):
    with pytest.raises(Unsupported, match="Wrapping changes the names of weights, as 0"):
        Toy().fit(tmp_path / "run", Training(**SHORT, methods={HERE + "Wrapping": {}}))
    assert not (tmp_path / "run").exists()


def test_the_first_method_is_the_innermost():
    order: list[str] = []

    class Noted(Method):
        def __init__(self, name: str) -> None:
            self.name = name

        def losses(self, model: nn.Module, batch: Any, loss_fn: Any) -> dict[str, Tensor]:
            losses = loss_fn(model, batch)
            order.append(self.name)
            return losses

    methods = Together({name: Noted(name) for name in "abc"})
    methods.losses(nn.Identity(), None, lambda model, batch: {"loss": torch.zeros(())})
    assert order == ["a", "b", "c"]


def test_the_plain_method_is_plain_training():
    model, method = nn.Linear(2, 2), Method()
    assert method.prepare(model) is model
    assert list(method.optimizers(model, Training())) == []
    batch = {"x": torch.ones(1, 2), "y": torch.zeros(1, dtype=torch.long)}
    ((number, losses),) = method.turns(model, batch, loss_fn)
    assert number == 0
    assert torch.equal(losses["loss"], loss_fn(model, batch)["loss"])
    assert not Together({}).alternates
    assert Together({"a": Alternating()}).alternates
    assert not Together({"a": Replaced(), "b": Growing(), "c": Adversarial()}).alternates
    assert len(Together({"a": Distilled(), "b": Added()}).parts()) == 1


def test_every_name_stands_for_a_method():
    needed = {"learned_filters": {"images": "photos"}}
    for name, target in METHODS.items():
        assert issubclass(resolve(target), Method), name
        assert list(make_methods({name: needed.get(name, {})})) == [name]
