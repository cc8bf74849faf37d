"""PHNN: hypercomplex and quaternion layers, residual networks, VGG, sound event detection and its score."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.networks.phnn.resnet import PHResNet, PHResNetConfig
from convatlas.networks.phnn.sed import PHSED, PHSEDConfig
from convatlas.networks.phnn.vgg import PHVGG, PHVGGConfig
from convatlas.nn.conv.hypercomplex import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHLinear,
    QuaternionConv1d,
    QuaternionConv2d,
    QuaternionConv3d,
)
from convatlas.ops.sound_events import sound_event_score, sound_events
from golden.cases import Case

_CONVS = {"phconv1d": PHConv1d, "phconv2d": PHConv2d, "phconv3d": PHConv3d}
_QUATERNION_CONVS = {3: QuaternionConv1d, 4: QuaternionConv2d, 5: QuaternionConv3d}
_PLACE = ("kernel_size", "stride", "padding", "dilation", "groups")


def run(case: Case) -> dict[str, Tensor]:
    if "layer" in case.config:
        return _layer(case)
    if "block" in case.config or "num_blocks" in case.config:
        return _compare(case, _resnet(case), "logits")
    if "rnn_size" in case.config or "rnn.weight_hh_l0" in case.weights:
        return _compare(case, _sed(case), "sed")
    if any(key.startswith("features.") for key in case.weights):
        return _compare(case, _vgg(case), "logits")
    if "r_weight" in case.weights:
        case.only("in_channels", "out_channels", "bias", *_PLACE)
        kind = _QUATERNION_CONVS[case.weights["r_weight"].dim()]
        return _compare(case, kind(**{"bias": "bias" in case.weights, **case.config}), "y")
    if {"pred", "target"} <= set(case.inputs):
        return _score(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know what this is")


def _layer(case: Case) -> dict[str, Tensor]:
    case.only("layer", "n", "in_features", "out_features", "bias", *_PLACE)
    config, kind = case.config, case.config["layer"].lower()
    sizes = (config["in_features"], config["out_features"])
    if kind == "phmlinear":
        return _compare(case, PHLinear(*sizes, bias="bias" in case.weights, n=config["n"]), "y")
    place = {key: config[key] for key in _PLACE if key in config}
    bias = "bias" in case.weights
    return _compare(case, _CONVS[kind](*sizes, **place, bias=bias, unused_bias=bias, n=config["n"]), "y")


def _compare(case: Case, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Output, weight and gradients; the filters get the shape that they have in the reference."""
    case.load(model)
    x = case.inputs["x"].requires_grad_()
    y = model(x)
    results = {name: y}
    if "weight" in case.outputs:
        results["weight"] = model.weight
    if "cotangent" in case.inputs:
        results |= case.gradients(model, y, {"grad_input": x})
    found = {key: results[key] for key in case.outputs if key in results}
    return {key: value.reshape(case.outputs[key].shape) for key, value in found.items()}


def _kind(case: Case) -> dict[str, Any]:
    """n and algebra, of which the names of the tensors tell the latter."""
    if any(key.endswith(".r_weight") for key in case.weights):
        return {"n": 4, "algebra": "quaternion"}
    if any(re.search(r"\.[Aa]$", key) for key in case.weights):
        biased = any(re.search(r"\.F$", key) and f"{key[:-1]}bias" in case.weights for key in case.weights)
        return {"n": case.config["n"], "unused_bias": biased}
    return {"n": 1, "algebra": "real"}


def _resnet(case: Case) -> nn.Module:
    case.only("block", "num_blocks", "widths", "channels", "n", "num_classes", "cls")
    config = case.config
    block = {"basicblock": "basic", "bottleneck": "bottleneck"}[config["block"].lower()]
    return PHResNet(
        PHResNetConfig(
            block=block,
            depths=tuple(config["num_blocks"]),
            widths=tuple(config["widths"]),
            in_channels=config["channels"],
            num_classes=config["num_classes"],
            **_kind(case),
        )
    )


def _vgg(case: Case) -> nn.Module:
    """The places of the convolutions and norms tell where the max-poolings are."""
    case.only("cls", "cfg", "n", "channels", "num_classes", "batch_norm", "widths", "head_widths", "dropout")
    convs = {
        int(found[1]): value.shape[0] * value.shape[1] if found[2] == "F" else value.shape[0]
        for key, value in case.weights.items()
        if (found := re.fullmatch(r"features\.(\d+)\.(F|weight|r_weight)", key)) and value.dim() > 1
    }
    stages: list[list[int]] = [[]]
    last = -3
    for place, width in sorted(convs.items()):
        if place > last + 3:
            stages.append([])
        stages[-1].append(width * (4 if "features.0.r_weight" in case.weights else 1))
        last = place
    return PHVGG(
        PHVGGConfig(
            widths=tuple(tuple(stage) for stage in stages),
            head_widths=tuple(len(case.weights[f"classifier.{place}.bias"]) for place in (1, 4)),
            in_channels=case.inputs["x"].shape[1],
            num_classes=len(case.weights["classifier.6.bias"]),
            **_kind(case),
        )
    )


def _sed(case: Case) -> nn.Module:
    names = ("cls", "n", "time_dim", "freq_dim", "input_channels", "output_classes", "pool_size", "cnn_filters")
    case.only(*names, "rnn_size", "n_rnn", "fc_size", "dropout_perc", "class_overlaps", "rnn_input")
    config = case.config
    return PHSED(
        PHSEDConfig(
            in_channels=config["input_channels"],
            frequencies=config["freq_dim"],
            num_classes=config["output_classes"],
            overlaps=config["class_overlaps"],
            widths=tuple(config["cnn_filters"]),
            pools=tuple(tuple(pool) for pool in config["pool_size"]),
            recurrent_width=config["rnn_size"],
            recurrent_depth=config["n_rnn"],
            head_width=config["fc_size"],
            dropout=config["dropout_perc"],
            hypercomplex_head="sed.0.a" in case.weights,
            **_kind(case),
        )
    )


def _score(case: Case) -> dict[str, Tensor]:
    case.only("frames", "num_classes", "max_overlaps")
    overlaps = case.config["max_overlaps"]
    predicted, true = (sound_events(case.inputs[name], overlaps) for name in ("pred", "target"))
    score = sound_event_score(predicted, true, legacy=True)
    results = {
        "pred_events": predicted,
        "true_events": true,
        "counts": torch.tensor(score),
        "f_score": torch.tensor(score.f_score, dtype=torch.float64),
        "precision": torch.tensor(score.precision, dtype=torch.float64),
        "recall": torch.tensor(score.recall, dtype=torch.float64),
    }
    return {name: results[name] for name in case.outputs}
