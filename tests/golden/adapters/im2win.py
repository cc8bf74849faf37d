"""Im2win: window tensor, window filter, convolution and gradients."""

from __future__ import annotations

from torch import Tensor

from convatlas.ops.im2win import conv2d_im2win, im2win, im2win_filter
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    case.only(*"NCHWO", "kernel", "stride", "padding", "dilation", "groups", "layout")
    config = case.config
    layout = config.get("layout", "nchw").lower()
    x, weight = (case.inputs[name].requires_grad_() for name in ("x", "weight"))
    kernel, stride, padding, dilation = (
        tuple(value) if isinstance(value, list) else value
        for value in (config["kernel"], config["stride"], config["padding"], config.get("dilation", 1))
    )
    y = conv2d_im2win(x, weight, case.inputs.get("bias"), stride, padding, dilation, config.get("groups", 1))
    results = {
        "y": y,
        "window_tensor": im2win(x, kernel, stride, padding, dilation, layout),
        "window_filter": im2win_filter(weight, layout),
    }
    if "cotangent" in case.inputs:
        (y * case.inputs["cotangent"]).sum().backward()
        gradients = {"grad_input": x.grad, "grad_x": x.grad, "grad_weight_weight": weight.grad}
        results |= {name: value for name, value in gradients.items() if value is not None}
    return {name: results[name] for name in case.outputs}
