"""TrAct: gradients of linear and convolutional layers, and a few steps of training."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.training.tract import TrActConv1d, TrActConv2d, TrActConv3d, TrActLinear, without_tract
from golden.cases import Case

_CONVS = {3: TrActConv1d, 4: TrActConv2d, 5: TrActConv3d}
_SIZES = ("in_features", "out_features", "in_channels", "out_channels")
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def run(case: Case) -> dict[str, Tensor]:
    return _training(case) if "steps" in case.config else _gradients(case)


def _gradients(case: Case) -> dict[str, Tensor]:
    layer = _layer(case)
    with without_tract(layer):
        _, plain = _backward(case, layer)
    output, found = _backward(case, layer)
    results = {"output": output, "plain_grad_weight": plain["grad_weight_weight"], **found}
    return {name: results[name] for name in case.outputs}


def _layer(case: Case) -> nn.Module:
    # "rows" and "features" count what the inputs and the geometry give anyway.
    case.only("kind", "lambda_", "rows", "features", "bias", *_SIZES, *_GEOMETRY)
    config, options = case.config, {"lam": case.config["lambda_"], "bias": "bias" in case.weights}
    if config["kind"] == "linear":
        return case.load(TrActLinear(config["in_features"], config["out_features"], **options))
    kind = _CONVS[case.weights["weight"].dim()]
    geometry = {key: config[key] for key in _GEOMETRY if key in config}
    geometry = {key: tuple(value) if isinstance(value, list) else value for key, value in geometry.items()}
    return case.load(kind(config["in_channels"], config["out_channels"], **geometry, **options))


def _backward(case: Case, layer: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    layer.zero_grad()
    x = case.inputs["x"].detach().requires_grad_()
    output = layer(x)
    return output, case.gradients(layer, output, {"grad_input": x})


def _training(case: Case) -> dict[str, Tensor]:
    case.only("layer", "lambda_", "lr", "momentum", "weight_decay", "nesterov", "steps", "loss")
    config = case.config
    if config["loss"] != "mean cross entropy":
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle the loss {config['loss']!r}")
    sizes = re.fullmatch(r"Linear\((\d+), *(\d+)\)", config["layer"])
    if sizes is None:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle the layer {config['layer']!r}")
    layer = case.load(TrActLinear(int(sizes[1]), int(sizes[2]), bias="bias" in case.weights, lam=config["lambda_"]))
    options = {key: config[key] for key in ("momentum", "weight_decay", "nesterov") if key in config}
    optimizer = torch.optim.SGD(layer.parameters(), config["lr"], **options)
    losses = []
    for step in range(config["steps"]):
        loss = F.cross_entropy(layer(case.inputs["x"][step]), case.inputs["y"][step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **layer.state_dict()}
