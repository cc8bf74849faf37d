"""FFDNN: Fourier convolution, capsule routing, the network and the vegetation indices."""

from __future__ import annotations

import torch
from torch import Tensor

from convatlas.data.sentinel2 import vegetation_indices
from convatlas.networks.ffdnn import FFDNN, FFDNNConfig
from convatlas.nn.capsules import CapsuleRouting, MarginLoss, capsule_length
from convatlas.nn.fourier_conv import FourierConv1d
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "soil_slope" in case.config or "B4" in case.inputs:
        return _indices(case)
    if "n_in" in case.config:
        return _routing(case)
    return _network(case) if "w" in case.config else _fourier(case)


def _fourier(case: Case) -> dict[str, Tensor]:
    case.only("in_channels", "out_channels", "T", "modes", "padding")
    config = case.config
    sizes = (config["in_channels"], config["out_channels"], config["T"], config.get("modes"))
    layer = FourierConv1d(*sizes, padding=config.get("padding", "circular"))
    case.load(layer)
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    y = layer(x)
    return {"y": y, **(case.gradients(layer, y, {"grad_input": x}) if "cotangent" in case.inputs else {})}


def _routing(case: Case) -> dict[str, Tensor]:
    case.only("n_in", "d_in", "n_out", "d_out", "iterations")
    config = case.config
    sizes = (config["n_in"], config["d_in"], config["n_out"], config["d_out"])
    layer = CapsuleRouting(*sizes, config.get("iterations", 3))
    case.load(layer)
    u = case.inputs["u"].requires_grad_()
    v, coupling = layer(u)
    length = capsule_length(v)
    results = {"v": v, "coupling": coupling, "length": length}
    if "labels" in case.inputs:
        loss = MarginLoss()(length, case.inputs["labels"])
        loss.backward()
        results |= {"margin_loss": loss, "grad_input": u.grad, "grad_weight_W": layer.W.grad}
    return {name: results[name] for name in case.outputs}


def _network(case: Case) -> dict[str, Tensor]:
    case.only("ci", "T", "w", "d_in", "n_cls", "d_out", "modes", "padding", "iterations")
    config = case.config
    ours = FFDNNConfig(
        in_channels=config["ci"],
        length=config["T"],
        widths=tuple(config["w"]),
        capsule_dim=config["d_in"],
        num_classes=config["n_cls"],
        class_dim=config["d_out"],
        modes=config.get("modes"),
        padding=config.get("padding", "circular"),
        iterations=config.get("iterations", 3),
    )
    model = case.load(FFDNN(ours))
    v, coupling = model.capsules(case.inputs["x"])
    results = {"v": v, "length": model(case.inputs["x"]), "coupling": coupling}
    return {name: results[name] for name in case.outputs}


def _indices(case: Case) -> dict[str, Tensor]:
    case.only("soil_slope", "extinction", "wdvi_inf", "clamp")
    bands = {name: values.numpy() for name, values in case.inputs.items()}
    return {name: torch.from_numpy(values) for name, values in vegetation_indices(bands, **case.config).items()}
