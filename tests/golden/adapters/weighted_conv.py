"""Weighted convolution: fixed and trained densities in one to three dimensions."""

from __future__ import annotations

import re

from torch import Tensor

from convatlas.nn.conv.weighted_conv import WeightedConv1d, WeightedConv2d, WeightedConv3d
from golden.cases import Case

_KINDS = {1: WeightedConv1d, 2: WeightedConv2d, 3: WeightedConv3d}
_GEOMETRY = ("stride", "padding", "dilation", "groups", "bias")
#: What the authors' trained form starts from.
_TRAINED = (0.27, 0.17, 0.54)


def run(case: Case) -> dict[str, Tensor]:
    case.only("cls", "in_channels", "out_channels", "kernel_size", "den", *_GEOMETRY)
    config = case.config
    found = re.fullmatch(r"w[ct]\.wConv([123])d", config["cls"])
    if found is None:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {config['cls']!r}")
    size, trained = config["kernel_size"], "den" in case.weights
    den = config.get("den", _TRAINED[-(size // 2) :] if trained and size <= 7 else [1.0] * (size // 2))
    options = {key: config[key] for key in _GEOMETRY if key in config}
    kind = _KINDS[int(found[1])]
    shape = (config["in_channels"], config["out_channels"], size, den if size > 1 else [])
    layer = case.load(kind.as_published(*shape, trainable_density=trained, **options))
    x = case.inputs["x"].requires_grad_()
    output = layer(x)
    gradients = case.gradients(layer, output, {"grad_input": x})
    # W has another name in our state dict.
    (weight,) = (value for name, value in layer.named_parameters() if name.endswith("weight.original"))
    if weight.grad is not None:
        gradients["grad_weight_weight"] = weight.grad
    return {"output": output, **gradients}
