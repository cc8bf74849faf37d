"""ECA: the layer in its forms, the residual blocks that hold it, ResNet and MobileNetV2 with it."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from convatlas.networks.mobilenet import InvertedResidual, MobileNetV2, MobileNetV2Config
from convatlas.networks.resnet import BasicBlock, Bottleneck, ResNet, ResNetConfig, projection
from convatlas.nn.mixers.eca import ECA
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    cls = case.config["cls"]
    if "MobileNetV2" in cls:
        return _compare(case, _mobilenet(case))
    if "InvertedResidual" in cls:
        return _compare(case, _inverted_residual(case))
    if "ResNet" in cls:
        return _compare(case, _resnet(case))
    if "BasicBlock" in cls or "Bottleneck" in cls:
        return _compare(case, _residual(case))
    if re.search(r"eca", cls, re.IGNORECASE) or re.search(r"\bns\.", cls):
        return _compare(case, _layer(case))
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know {cls}")


def _compare(case: Case, model: nn.Module) -> dict[str, Tensor]:
    case.load(model)
    x = case.inputs["x"]
    if "cotangent" not in case.inputs:
        output = model(x)
        results = {"output": output, "logits": output}
        if any(name.startswith("stage") for name in case.outputs):
            results |= {f"stage{index}": feature for index, feature in enumerate(model.forward_features(x))}
        return {name: results[name] for name in case.outputs}
    output = model(x.requires_grad_())
    name = "logits" if "logits" in case.outputs else "output"
    return {name: output, **case.gradients(model, output, {"grad_input": x})}


def _layer(case: Case) -> nn.Module:
    case.only("cls", "channel", "channels", "k_size", "kernel_size", "gamma", "beta", "padding", "circular", "shared")
    config = case.config
    path = config["cls"].split(".")
    shared = config.get("shared", not any(part in ("ns", "eca_ns") for part in path))
    circular = config.get("circular", path[-1].lower().startswith("ceca"))
    return ECA(
        config.get("channel", config.get("channels")),
        kernel_size=config.get("k_size", config.get("kernel_size", case.weights["conv.weight"].shape[-1])),
        shared=shared,
        padding=config.get("padding", "circular" if circular else "zeros"),
        gamma=config.get("gamma", 2),
        beta=config.get("beta", 1),
    )


def _attention(config: dict[str, Any], channels: int) -> nn.Module | None:
    return ECA(channels, kernel_size=config.get("k_size", 3)) if "ECA" in config["cls"] or "k_size" in config else None


def _residual(case: Case) -> nn.Module:
    case.only("cls", "inplanes", "planes", "stride", "downsample", "k_size")
    config, block = case.config, Bottleneck if "Bottleneck" in case.config["cls"] else BasicBlock
    channels, width, stride = config["inplanes"], config["planes"], config.get("stride", 1)
    out_channels = block.expansion * width
    downsample = projection(channels, out_channels, stride=stride) if config.get("downsample") else None
    return block(channels, width, stride=stride, downsample=downsample, attention=_attention(config, out_channels))


def _inverted_residual(case: Case) -> nn.Module:
    case.only("cls", "inp", "oup", "stride", "expand_ratio", "k_size")
    config = case.config
    return InvertedResidual(
        config["inp"],
        config["oup"],
        stride=config["stride"],
        expand_ratio=config["expand_ratio"],
        attention=_attention(config, config["oup"]),
    )


def _resnet(case: Case) -> nn.Module:
    case.only("cls", "layers", "planes", "stem_width", "num_classes", "k_size", "pool")
    config = case.config
    if config.get("pool", "adaptive avg 1") != "adaptive avg 1":
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle pool {config['pool']!r}")
    names = {"layers": "depths", "planes": "widths", "stem_width": "stem_width", "num_classes": "num_classes"}
    ours = ResNetConfig(block="bottleneck" if "Bottleneck" in config["cls"] else "basic")
    ours = ours.override(**{names[key]: value for key, value in config.items() if key in names})
    if "ECA" in config["cls"] or "k_size" in config:
        sizes = config.get("k_size", 3)
        sizes = [sizes] * len(ours.depths) if isinstance(sizes, int) else sizes
        ours = ours.override(eca_kernel_sizes=sizes)
    return ResNet(ours)


def _mobilenet(case: Case) -> nn.Module:
    """The tensors tell the widths, because the reference does not round a scaled width to a multiple of 8."""
    case.only("cls", "num_classes", "width_mult", "inverted_residual_setting", "k_size")
    config, weights = case.config, case.weights
    ours = MobileNetV2Config(num_classes=config.get("num_classes", 1000))
    rows = config.get("inverted_residual_setting", ours.stages)
    stages, index = [], 1
    for expansion, _, depth, stride in rows:
        project = weights[f"features.{index}.conv.{1 if expansion == 1 else 2}.weight"]
        stages.append((expansion, project.shape[0], depth, stride))
        index += depth
    ours = ours.override(
        stages=stages,
        stem_width=weights["features.0.0.weight"].shape[0],
        head_width=weights["classifier.1.weight"].shape[1],
    )
    if any(re.search(r"conv\.[34]\.conv\.weight$", key) for key in weights):
        nominal = [1 if channels < 96 else 3 for _, channels, _, _ in rows]
        ours = ours.override(eca_kernel_sizes=config.get("k_size", nominal))
    return MobileNetV2(ours)
