"""Optimizers, parameter groups and schedules, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.training.optim import Lion, learning_rate, make_optimizer, parameter_groups
from convatlas.training.settings import Training

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 3}


def test_lion_follows_its_formula_with_decoupled_decay():
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = Lion([weight], lr=0.1, betas=(0.8, 0.6), weight_decay=0.5)
    gradients = [[0.2, -0.1, 0.0, 5.0], [-1.0, -0.1, 0.3, -0.5], [0.01, 0.2, -2.0, -9.0]]
    expected, momentum = weight.detach().clone(), torch.zeros(4, dtype=torch.float64)
    for values in gradients:
        weight.grad = gradient = torch.tensor(values, dtype=torch.float64)
        optimizer.step()
        direction = torch.sign(0.8 * momentum + 0.2 * gradient)
        expected = expected - 0.1 * (direction + 0.5 * expected)
        momentum = 0.6 * momentum + 0.4 * gradient
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], momentum, rtol=1e-14, atol=1e-14)


def test_lion_decays_a_weight_without_gradient_signal_and_leaves_one_without_gradient():
    still, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    still.grad = torch.zeros(2)
    Lion([still, unused], lr=0.1, weight_decay=0.5).step()
    assert still.tolist() == pytest.approx([0.95, 0.95])
    assert unused.tolist() == [1, 1]


def test_lion_runs_a_closure():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([weight], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert weight.item() == 1.5


def test_parameters_that_the_model_names_are_not_decayed():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model.cls_token, model[0].cls_token = nn.Parameter(torch.zeros(1, 1, 2)), nn.Parameter(torch.zeros(1, 1, 2))
    model.undecayed = ("cls_token",)
    decays = {
        group["weight_decay"]: {id(p) for p in group["params"]} for group in parameter_groups(model, weight_decay=1)
    }
    assert decays == {1: {id(model[0].weight)}, 0: {id(model.cls_token), id(model[0].cls_token)}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr and weight_decay must not be negative, got -1 and 0"),
        ({"weight_decay": -1}, "must not be negative"),
        ({"betas": (0.9, 1)}, r"betas must be in \[0, 1\), got \(0.9, 1\)"),
    ],
)
def test_lion_refuses_what_makes_no_sense(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Lion([nn.Parameter(torch.ones(1))], **options)


def test_one_dimensional_parameters_are_not_decayed_and_frozen_ones_left_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].weight.requires_grad = False
    groups = parameter_groups(model, weight_decay=0.3)
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    others = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed == {id(model[0].weight)}
    (single,) = parameter_groups(model, weight_decay=0.3, decay_all=True)
    assert {id(p) for p in single["params"]} == decayed | others
    assert others == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)}
    assert {group["lr_scale"] for group in groups} == {1.0}
    everything = parameter_groups(model, weight_decay=0.3, decay_all=True)
    assert [(group["weight_decay"], len(group["params"])) for group in everything] == [(0.3, 5)]
    optimizer = make_optimizer(model, Training(weight_decay=0.3, decay_all=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize("name", ["inceptionnext_atto", "resnet18", "mobilenet_v2", "convnext_tiny"])
def test_layer_decay_scales_every_layer_by_its_distance_from_the_head(name: str):
    options = {"num_classes": 3} if name in ("resnet18", "mobilenet_v2") else TINY
    model = create_model(name, **options)
    layers = model.layers()
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for depth, layer in enumerate(reversed(layers)):
        assert {scale[id(p)] for p in layer.parameters()} == {0.5**depth}
    assert max(scale.values()) == 1
    assert min(scale.values()) == 0.5 ** (len(layers) - 1)


def test_layer_decay_needs_a_network_that_names_its_layers():
    assert len(parameter_groups(nn.Linear(2, 2), weight_decay=0)) == 1
    with pytest.raises(Unsupported, match="layer_decay needs a network that names its layers, Linear does not"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0, layer_decay=0.9)


def test_the_optimizer_is_the_one_asked_for():
    model = create_model("inceptionnext_atto", **TINY)
    adamw = make_optimizer(model, Training(lr=0.02, momentum=0.8, weight_decay=0.1, layer_decay=0.5))
    assert isinstance(adamw, AdamW)
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.999)}
    assert all(group["lr"] == 0.02 * group["lr_scale"] for group in adamw.param_groups)
    assert len({group["lr"] for group in adamw.param_groups}) == len(model.layers())
    sgd = make_optimizer(model, Training(optimizer="sgd", momentum=0.7))
    assert isinstance(sgd, SGD)
    assert {(group["momentum"], group["nesterov"]) for group in sgd.param_groups} == {(0.7, False)}
    lion = make_optimizer(model, Training(optimizer="lion"))
    assert isinstance(lion, Lion)
    assert {group["betas"] for group in lion.param_groups} == {(0.9, 0.99)}


def rates(steps: list[int], per_epoch: int = 10, **settings: object) -> list[float]:
    training = Training(**{"lr": 1.0, "warmup_epochs": 0, "epochs": 10, **settings})
    return [learning_rate(training, step, per_epoch) for step in steps]


def test_warm_up_rises_linearly_from_its_first_rate():
    settings = {"warmup_epochs": 2, "warmup_lr": 0.2, "schedule": "constant"}
    assert rates([0, 5, 10, 19, 20, 99], **settings) == pytest.approx([0.2, 0.4, 0.6, 0.96, 1, 1])


def test_cosine_goes_from_the_peak_to_its_end():
    settings = {"warmup_epochs": 2, "min_lr": 0.1}
    middle, end = 20 + 40, 100
    assert rates([20, middle, end], **settings) == pytest.approx([1, 0.55, 0.1])
    assert rates([20 + 20], **settings) == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2])
    assert rates([end + 50], **settings) == pytest.approx([0.1])


def test_a_cosine_longer_than_the_training_is_cut_off():
    settings = {"cosine_epochs": 40, "min_lr": 0.1}
    assert rates([0, 50, 100], **settings) == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 1 / 8, 1 / 4)]
    )
    assert rates([25, 50, 99], cosine_epochs=5, min_lr=0.1) == pytest.approx([0.55, 0.1, 0.1])


def test_cool_down_stays_at_the_end_of_the_cosine():
    settings = {"cooldown_epochs": 3, "min_lr": 0.1}
    assert rates([35, 69, 70, 85, 99], **settings)[2:] == pytest.approx([0.1, 0.1, 0.1])
    assert rates([35], **settings) == pytest.approx([0.55])


def test_step_and_exponential_decay_by_epochs():
    settings = {"decay_epochs": 2, "decay_rate": 0.5}
    assert rates([0, 19, 20, 39, 40], schedule="step", **settings) == [1, 1, 0.5, 0.5, 0.25]
    exponential = rates([0, 10, 20, 40], schedule="exponential", **settings)
    assert exponential == pytest.approx([1, math.sqrt(0.5), 0.5, 0.25])


def test_step_decays_at_the_epochs_that_are_named():
    assert rates([0, 29, 30, 79, 80, 99], schedule="step", decay_at=(3, 8)) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_plateau_has_a_least_rate():
    training = Training(lr=1.0, warmup_epochs=0, schedule="plateau", min_lr=0.05)
    assert [learning_rate(training, 5, 10, plateau=factor) for factor in (1, 0.1, 0.01)] == [1, 0.1, 0.05]


def test_factors_of_the_learning_rate_go_by_the_longest_beginning_of_a_name():
    net = nn.ModuleDict({"a": nn.Linear(2, 3), "ab": nn.Linear(2, 3), "c": nn.Linear(2, 3)})
    groups = parameter_groups(net, weight_decay=0.1, lr_factors={"a": 0.5, "ab.": 0.1, "c.bias": 0})
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales == {"a.weight": 0.5, "a.bias": 0.5, "ab.weight": 0.1, "ab.bias": 0.1, "c.weight": 1.0}
    with pytest.raises(ValueError, match=r"lr_factors names 'd', but no parameter begins so; the first is a\.weight"):
        parameter_groups(net, weight_decay=0.1, lr_factors={"d": 0.5})


def test_a_run_that_is_all_warm_up_has_a_schedule():
    assert rates([0, 5, 10], epochs=1, warmup_epochs=1, warmup_lr=0.0, min_lr=0.1) == pytest.approx([0, 0.5, 0.1])
