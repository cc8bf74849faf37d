"""Efficient local attention."""

from __future__ import annotations

from torch import Tensor

from convatlas.nn.mixers.ela import ELA
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    case.only("variant", "channels", "kernel_size", "groups", "num_groups", "shared")
    config = case.config
    layer = case.load(
        ELA(
            config["channels"],
            variant=config.get("variant", "B"),
            kernel_size=config.get("kernel_size"),
            groups=config.get("groups"),
            num_groups=config.get("num_groups"),
            shared=config.get("shared", True) is not False,
        )
    )
    x = case.inputs["x"].requires_grad_()
    output = layer(x)
    results = {"output": output}
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, output, {"grad_input": x})
    return {name: results[name] for name in case.outputs}
