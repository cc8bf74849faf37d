"""Subspace attention: output, gradients and, in training, the running statistics."""

from __future__ import annotations

from torch import Tensor

from convatlas.nn.mixers.ulsam import ULSAM
from golden.cases import Case

#: Name in the reference -> ours, and the shape of its part for one group.
_PARAMETERS = {
    "conv_dws.weight": "scale",
    "conv_dws.bias": "shift",
    "conv_point.weight": "point",
    "conv_point.bias": "offset",
}


def run(case: Case) -> dict[str, Tensor]:
    case.only("cls", "nin", "nout", "h", "w", "num_splits", "mode")
    config = case.config
    if config["nin"] != config["nout"]:
        raise KeyError(f"{case.system}/{case.name}: nin and nout differ")
    layer = case.load(ULSAM(config["nin"], num_splits=config["num_splits"])).train(config["mode"] == "train")
    x = case.inputs["x"].requires_grad_()
    output = layer(x)
    results = {"output": output}
    if "cotangent" in case.inputs:
        (output * case.inputs["cotangent"]).sum().backward()
        results["grad_input"] = x.grad
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for key in case.weights:
        _, index, name = key.split(".", 2)
        tensor = tensors[_PARAMETERS.get(name, name)]
        part = _part(tensor, int(index), config["num_splits"])
        if tensor.requires_grad and tensor.grad is not None:
            results[f"grad_weight_{key}"] = _part(tensor.grad, int(index), config["num_splits"]).reshape(
                case.weights[key].shape
            )
        module, _, statistic = name.partition(".")
        if module.startswith("bn_"):
            results[f"{statistic}_{module.removeprefix('bn_')}{index}"] = part
    return {name: results[name] for name in case.outputs}


def _part(tensor: Tensor, index: int, groups: int) -> Tensor:
    return tensor if tensor.dim() == 0 else tensor.chunk(groups)[index]
