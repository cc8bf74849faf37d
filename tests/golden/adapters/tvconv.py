"""TVConv: the layer, the inverted residual with it, AM-Softmax and the verification of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convatlas.networks.mobilenet import InvertedResidual
from convatlas.nn.conv.tvconv import TVCONV_LAYOUT, TVConv2d
from convatlas.nn.margin_softmax import AMSoftmax
from convatlas.ops.verification import verification_accuracy
from convatlas.weights import load_weights
from golden.cases import Case

_GENERATOR = {"posi_chans": "position_channels", "inter_chans": "hidden_channels", "inter_layers": "hidden_layers"}


def run(case: Case) -> dict[str, Tensor]:
    cls = case.config.get("cls", "")
    if "InvertedResidual" in cls:
        return _inverted_residual(case)
    if "Softmax" in cls:
        return _am_softmax(case)
    if cls == "TVConv":
        return _layer(case)
    if {"left", "right", "same"} <= set(case.inputs):
        return _verification(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know {cls!r}")


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the generator, of whose names there are two forms; the operator alone has small defaults."""
    given = {key.removeprefix("TVConv_"): value for key, value in config.items()}
    return {"hidden_channels": 16, "hidden_layers": 1} | {
        ours: given[name] for name, ours in _GENERATOR.items() if name in given
    }


def _tvconv(
    channels: int, size: tuple[int, int], *, kernel_size: int, stride: int, bias: bool, **options: Any
) -> TVConv2d:
    return TVConv2d(
        channels,
        channels,
        kernel_size,
        stride,
        kernel_size // 2,
        groups=channels,
        bias=bias,
        output_size=size,
        **options,
    )


def _layer(case: Case) -> dict[str, Tensor]:
    names = ("cls", "channels", "h", "w", "stride", "TVConv_k", "TVConv_Bias", "kernel_size", "bias")
    case.only(*names, *_GENERATOR, *(f"TVConv_{name}" for name in _GENERATOR))
    config = case.config
    layer = _tvconv(
        config["channels"],
        (config["h"], config["w"]),
        kernel_size=config.get("TVConv_k", config.get("kernel_size", 3)),
        stride=config.get("stride", 1),
        bias=config.get("TVConv_Bias", config.get("bias", False)),
        **_options(config),
    )
    case.load(layer)
    x = case.inputs["x"].requires_grad_()
    output = layer(x)
    maps = layer.weight_maps
    results = {"output": output, "weight_maps": maps.flatten(0, 2)[None]}
    if layer.bias is not None:
        results["bias_maps"] = layer.bias[None]
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, output, {"grad_input": x})
    return {name: results[name] for name in case.outputs}


def _inverted_residual(case: Case) -> dict[str, Tensor]:
    names = ("cls", "inp", "oup", "stride", "h_w", "h", "w", "expand_ratio", "TVConv_k", "TVConv_Bias")
    case.only(*names, *_GENERATOR, *(f"TVConv_{name}" for name in _GENERATOR))
    config = case.config
    size = (config.get("h", config.get("h_w")), config.get("w", config.get("h_w")))

    def depthwise(channels: int, stride: int) -> TVConv2d:
        bias = config.get("TVConv_Bias", False)
        return _tvconv(
            channels, size, kernel_size=config.get("TVConv_k", 3), stride=stride, bias=bias, **_options(config)
        )

    block = InvertedResidual(
        config["inp"],
        config["oup"],
        stride=config.get("stride", 1),
        expand_ratio=config["expand_ratio"],
        depthwise=depthwise,
    ).to(case.dtype)
    state = TVCONV_LAYOUT.apply(case.weights, block)
    block.load_state_dict(state)
    x = case.inputs["x"].requires_grad_()
    output = block.eval()(x)
    results = {"output": output}
    if "cotangent" in case.inputs:
        (output * case.inputs["cotangent"]).sum().backward()
        results["grad_input"] = x.grad
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        results |= {
            f"grad_weight_{key}": gradients[ours]
            for key, value in case.weights.items()
            for ours in TVCONV_LAYOUT.apply({key: value}, block)
            if ours in gradients
        }
    return {name: results[name] for name in case.outputs}


def _am_softmax(case: Case) -> dict[str, Tensor]:
    case.only("cls", "feat_dim", "classnum", "margin", "s")
    config = case.config
    head = AMSoftmax(
        config["feat_dim"], config["classnum"], margin=config.get("margin", 0.35), scale=config.get("s", 32)
    )
    load_weights(head.to(case.dtype), {f"head.{name}": value for name, value in case.weights.items()})
    features, labels = case.inputs["features"].requires_grad_(), case.inputs["labels"]
    loss = head.loss(features, labels)
    loss.backward()
    results = {
        "logits": head(features, labels),
        "loss": loss,
        "grad_features": features.grad,
        "grad_weight": head.weight.grad.T,
    }
    return {name: results[name] for name in case.outputs}


def _verification(case: Case) -> dict[str, Tensor]:
    case.only("op", "method", "thresholds")
    inputs = case.inputs
    result = verification_accuracy(
        inputs["left"],
        inputs["right"],
        inputs["same"],
        inputs.get("fold"),
        method="cosine" if "cos" in case.config["method"] else "l2_distance",
    )
    results = {"accuracy_percent": result.accuracy, "mean_threshold": result.threshold}
    return {name: torch.tensor(results[name], dtype=case.dtype) for name in case.outputs}
