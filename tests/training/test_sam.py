"""SAM: its step, its limits, its state, and that runs are trained with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.recognition.task import Recognition
from convatlas.report import Report
from convatlas.training.run import Run
from convatlas.training.sam import SAM, SharpnessAware
from convatlas.training.settings import Training


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double(), *torch.randn(2, 8, 5).double()


def train(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    def closure() -> Tensor:
        loss = F.mse_loss(model(x), y[:, :1])
        optimizer.zero_grad()
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_step_is_made_with_the_gradient_higher_up(adaptive: bool) -> None:
    model, x, y = problem()
    other = copy.deepcopy(model)
    rho = 0.1
    train(model, x, y, SAM(torch.optim.SGD(model.parameters(), 0.05), rho, adaptive=adaptive), 1)

    weights = list(other.parameters())
    gradients = torch.autograd.grad(F.mse_loss(other(x), y[:, :1]), weights)
    scaled = [w.abs() * g if adaptive else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.cat([each.flatten() for each in scaled]).norm() + 1e-12
    steps = [rho * (w**2 * g if adaptive else g) / norm for w, g in zip(weights, gradients, strict=True)]
    climbed = copy.deepcopy(other)
    with torch.no_grad():
        for w, step in zip(climbed.parameters(), steps, strict=True):
            w += step
    higher = torch.autograd.grad(F.mse_loss(climbed(x), y[:, :1]), list(climbed.parameters()))
    for ours, w, g in zip(model.parameters(), weights, higher, strict=True):
        torch.testing.assert_close(ours, w - 0.05 * g)


def test_without_climbing_it_is_the_other_optimizer() -> None:
    (model, x, y), other = problem(), problem()[0]
    losses = train(model, x, y, SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 0.0), 5)
    expected = train(other, x, y, torch.optim.SGD(other.parameters(), 0.1, momentum=0.9), 5)
    assert losses == pytest.approx(expected)
    assert losses[-1] < losses[0]


def test_state_goes_on_where_it_was() -> None:
    model, x, y = problem()
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 0.05)
    train(model, x, y, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = SAM(torch.optim.SGD(other.parameters(), 0.1, momentum=0.9), 0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.02  # reaches the steps in both
    assert train(model, x, y, optimizer, 3) == train(other, x, y, resumed, 3)
    assert resumed.base.param_groups[0]["lr"] == 0.02


def test_both_passes_draw_the_same_random_numbers() -> None:
    drawn: list[float] = []
    weight = nn.Parameter(torch.ones(3))
    optimizer = SAM(torch.optim.SGD([weight], 0.1))

    def closure() -> Tensor:
        drawn.append(torch.rand(()).item())
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_wrong_use_is_told() -> None:
    model, _, _ = problem()
    for make in (lambda: SAM(torch.optim.SGD(model.parameters(), 0.1), -0.1), lambda: SharpnessAware(rho=-0.1)):
        with pytest.raises(ValueError, match=r"rho must not be negative, got -0\.1"):
            make()
    with pytest.raises(ValueError, match=r"SAM\.step needs a closure that computes the loss and its gradients"):
        SAM(torch.optim.SGD(model.parameters(), 0.1)).step()
    with pytest.raises(ValueError, match="accumulate must be 1 with sam, which needs each batch twice, got 2"):
        SharpnessAware().optimizers(model, Training(accumulate=2))
    with pytest.raises(ValueError, match="precision must be 32 or bf16 with sam, got 16"):
        SharpnessAware().optimizers(model, Training(precision="16"))
    with pytest.raises(Unsupported, match="sam cannot train with the strategy fsdp"):
        SharpnessAware().optimizers(model, Training(strategy="fsdp"))


def test_a_run_is_trained_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    options = {"block_dims": ((16, 8),)}
    weights = {}
    monkeypatch.setattr(Recognition, "report", lambda self, run: Report("left out", "", []))
    for name, methods in (("plain", {}), ("still", {"sam": {"rho": 0.0}}), ("sam", {"sam": {"rho": 0.5}})):
        training = Training(epochs=1, batch_size=256, lr=0.05, optimizer="sgd", warmup_epochs=0, methods=methods)
        task = Recognition(model="B_6-Wi_512", options=options, image_size=8, mixup=0.8, label_smoothing=0.3)
        task.fit(tmp_path / name, training)
        (row,) = Run(tmp_path / name).read_metrics()
        assert row["step"] == 6
        assert 2.0 < row["train_loss"] < 2.7
        weights[name] = torch.cat([parameter.flatten() for parameter in task.network.parameters()])
    torch.testing.assert_close(weights["still"], weights["plain"])
    assert not torch.allclose(weights["sam"], weights["plain"], atol=1e-4)
