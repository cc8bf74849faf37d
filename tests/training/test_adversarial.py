"""Adversarial training as a method: what each step moves, the noise, features, exact resuming."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.ops.adversarial import relativistic_discriminator_loss, relativistic_generator_loss
from convatlas.training.adversarial import Adversarial
from convatlas.training.settings import Training

SMALL = {"levels": 2, "filters": 3}


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    result = model(batch["low"])
    return {"loss": F.l1_loss(result, batch["high"]), "result": result, "truth": batch["high"]}


def _made(**options: object) -> tuple[Adversarial, nn.Module, dict[str, Tensor], list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    method = Adversarial("disgan_discriminator", SMALL, **options)
    model = nn.Conv3d(1, 1, 3, padding=1)
    batch = {"low": torch.rand(2, 1, 8, 8, 8), "high": torch.rand(2, 1, 8, 8, 8)}
    optimizers = list(method.optimizers(model, Training(epochs=4, lr=0.01, weight_decay=0.0)))
    return method, model, batch, optimizers


def _copied(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def _moved(module: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))


def test_each_step_moves_its_own_player_only():
    method, model, batch, optimizers = _made()
    before = _copied(model), _copied(method.discriminator)
    order = []
    for number, losses in method.turns(model, batch, _loss):
        optimizers[number].zero_grad()
        losses["loss"].backward()
        if number == 0:
            assert all(parameter.grad is None for parameter in method.discriminator.parameters())
        optimizers[number].step()
        order.append((number, _moved(model, before[0]), _moved(method.discriminator, before[1])))
    assert order == [(0, True, False), (1, True, True)]
    assert all(parameter.requires_grad for parameter in method.discriminator.parameters())


def test_losses_are_those_of_the_paper():
    method, model, batch, _ = _made(weight=0.3)
    method.discriminator.eval()
    (_, first), (_, second) = method.turns(model, batch, _loss)
    result = model(batch["low"])
    real, fake = method.discriminator(batch["high"]), method.discriminator(result)
    wanted = F.l1_loss(result, batch["high"]) + 0.3 * relativistic_generator_loss(real, fake)
    torch.testing.assert_close(first["loss"], wanted)
    torch.testing.assert_close(first["plain"] + 0.3 * first["adversarial"], wanted)
    torch.testing.assert_close(second["loss"], relativistic_discriminator_loss(real, fake))
    assert math.isfinite(second["discriminator"].item())


def test_noise_is_one_volume_for_both_and_falls_to_nothing():
    method, model, batch, _ = _made(noise_epochs=2)
    seen: list[Tensor] = []
    method.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for epoch, sigma in ((0, 1.0), (1, 0.5), (2, 0.0), (3, 0.0)):
        method.start_epoch(model, epoch)
        assert method.sigma == sigma
    method.start_epoch(model, 1)
    list(method.turns(model, batch, _loss))
    result = model(batch["low"]).detach()
    noises = [volume - clean for volume, clean in zip(seen, (batch["high"], result) * 2, strict=True)]
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-5)
    assert float(noises[0].std()) == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(noises[0][0], noises[0][1])


def test_epochs_of_the_noise_are_those_of_the_training_unless_told():
    method, model, *_ = _made()
    assert method.noise_epochs == 4
    silent = _made(noise_epochs=0)[0]
    silent.start_epoch(model, 0)
    assert silent.sigma == 0


def test_features_are_compared_and_never_trained():
    options = {"features": "med3d_resnet10", "features_options": {"width": 2}, "feature_weight": 2.0}
    method, model, batch, _ = _made(weight=0.0, **options)
    assert method.train().features is not None
    assert not method.features.training
    first = next(method.turns(model, batch, _loss))[1]
    own = F.l1_loss(*(method.features.forward_features(x)[-1] for x in (model(batch["low"]), batch["high"])))
    torch.testing.assert_close(first["features"], own)
    torch.testing.assert_close(first["loss"], first["plain"] + 2 * own)
    first["loss"].backward()
    assert not any(parameter.requires_grad for parameter in method.features.parameters())


def test_the_discriminator_may_have_a_learning_rate_of_its_own():
    rates = [group["lr"] for optimizer in _made(lr=0.5)[3] for group in optimizer.param_groups]
    assert set(rates) == {0.01, 0.5}


def test_other_tasks_and_settings_are_refused():
    method, model, batch, _ = _made()
    with pytest.raises(Unsupported, match="losses hold 'result' and 'truth'"):
        list(method.turns(model, batch, lambda model, batch: {"loss": model(batch["low"]).mean()}))
    assert not list(method.turns(model, batch, lambda model, batch: {}))
    for options, message in (
        ({"weight": -1.0}, "weight must not be negative"),
        ({"feature_weight": -1.0}, "feature_weight must not be negative"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"noise_epochs": -1}, "noise_epochs must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Adversarial(**options)
