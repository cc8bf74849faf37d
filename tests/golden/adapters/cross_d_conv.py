"""Cross-D Conv: the layer with its gradients, and the 3-D convolution that it turns into."""

from __future__ import annotations

from torch import Tensor

from convatlas.nn.conv.cross_d_conv import CrossDConv2d
from golden.cases import Case

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups")


def run(case: Case) -> dict[str, Tensor]:
    case.only("in_channels", "out_channels", "bias", *_GEOMETRY)
    config = case.config
    geometry = {key: config[key] for key in _GEOMETRY if key in config}
    layer = CrossDConv2d(config["in_channels"], config["out_channels"], **geometry, bias="bias" in case.weights)
    case.load(layer)
    x = case.inputs["x"].requires_grad_()
    if x.dim() == 5:
        conv = layer.to_conv3d()
        y = conv(x)
        if "cotangent" not in case.inputs:
            return {"y": y}
        (y * case.inputs["cotangent"]).sum().backward()
        found = {"y": y, "grad_input": x.grad, "grad_weight_weights_3d": conv.weight.grad}
        return {name: tensor for name, tensor in found.items() if name in case.outputs and tensor is not None}
    axis, angle = layer.axis_angle(x)
    y = layer(x)
    results = {"y": y, "axis": axis, "angle": angle, "kernel2d": layer.kernels(x)}
    return {**results, **case.gradients(layer, y, {"grad_input": x})}
