"""Scaling MLPs: both networks with all gradients, steps of LION and SAM, losses and accuracies."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.networks.scaling_mlps import BottleneckMLP, BottleneckMLPConfig, StandardMLP, StandardMLPConfig
from convatlas.ops.accuracy import real_accuracy, top_k_accuracy
from convatlas.ops.mixup import mixed_accuracy, mixed_cross_entropy
from convatlas.training.optim import Lion
from convatlas.training.sam import SAM
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "dim_in" in case.config:
        return _network(case)
    if "grads" in case.inputs:
        return _lion(case)
    if "rho" in case.config:
        return _sam(case)
    return _scores(case)


def _refuse(case: Case, name: str) -> KeyError:
    return KeyError(f"{case.system}/{case.name}: the adapter does not handle {name} {case.config[name]!r}")


def _network(case: Case) -> dict[str, Tensor]:
    case.only("dim_in", "dim_out", "block_dims", "norm", "widths", "act", "drop_rate", "training", "cls")
    config = case.config
    for name, known in (("act", (None, "gelu")), ("drop_rate", (None, 0, 0.0))):
        if config.get(name) not in known:
            raise _refuse(case, name)
    # A row of numbers is an image of one pixel with as many channels.
    fixed: dict[str, Any] = {"num_classes": config["dim_out"], "in_channels": config["dim_in"]}
    fixed["preprocess"] = {"size": 1}
    model: BottleneckMLP | StandardMLP
    if "block_dims" in config:
        norm = {"norm": config["norm"] or "none"} if "norm" in config else {}
        model = BottleneckMLP(BottleneckMLPConfig().override(**fixed, block_dims=config["block_dims"], **norm))
    else:
        model = StandardMLP(StandardMLPConfig().override(**fixed, widths=config["widths"]))
    case.load(model)
    model.train(config.get("training", False))
    x = case.inputs["x"].flatten(1).requires_grad_()
    logits = model(x)
    results = {"logits": logits}
    if "cotangent" in case.inputs:
        results |= case.gradients(model, logits, {"grad_input": x})
    results |= {f"after.{name}": buffer for name, buffer in model.named_buffers()}
    return {
        name: results[name].reshape(expected.shape) if "grad" in name else results[name]
        for name, expected in case.outputs.items()
    }


def _lion(case: Case) -> dict[str, Tensor]:
    case.only("lr", "betas", "weight_decay")
    config = case.config
    parameter = torch.nn.Parameter(case.inputs["p0"].clone())
    options = {key: config[key] for key in ("lr", "weight_decay") if key in config}
    optimizer = Lion([parameter], betas=tuple(config.get("betas", (0.9, 0.99))), **options)
    steps = []
    for gradient in case.inputs["grads"]:
        parameter.grad = gradient.clone()
        optimizer.step()
        steps.append(parameter.detach().clone())
    results = {"params": torch.stack(steps), "exp_avg": optimizer.state[parameter]["momentum"]}
    return {name: results[name] for name in case.outputs}


def _sam(case: Case) -> dict[str, Tensor]:
    case.only("rho", "adaptive", "lr", "momentum", "weight_decay", "nesterov", "loss", "steps")
    config = case.config
    if config["loss"] != "mean((A w - b)^2)":
        raise _refuse(case, "loss")
    w = torch.nn.Parameter(case.inputs["w0"].clone())
    options = {key: config[key] for key in ("momentum", "weight_decay", "nesterov") if key in config}
    optimizer = SAM(
        torch.optim.SGD([w], config["lr"], **options), config["rho"], adaptive=config.get("adaptive", False)
    )

    def closure() -> Tensor:
        loss = F.mse_loss(case.inputs["A"] @ w, case.inputs["b"])
        loss.backward()
        return loss

    steps = []
    for _ in range(config.get("steps", len(case.outputs["w"]))):
        optimizer.step(closure)
        steps.append(w.detach().clone())
    return {"w": torch.stack(steps)}


def _scores(case: Case) -> dict[str, Tensor]:
    case.only("smooth", "lam", "k")
    config = case.config
    scores, labels = case.inputs["preds"], case.inputs["targets"]
    smoothing = config.get("smooth", 0.0)
    results = {"loss_plain": F.cross_entropy(scores, labels, label_smoothing=smoothing)}
    if "targets_perm" in case.inputs:
        both = (labels, case.inputs["targets_perm"])
        results["loss_mixup"] = mixed_cross_entropy(scores, *both, config["lam"], label_smoothing=smoothing)
    named = (re.fullmatch(r"top(\d+)(_mix)?", name) for name in case.outputs)
    for k in {1, config.get("k", 5), *(int(found[1]) for found in named if found)}:
        results[f"top{k}"] = top_k_accuracy(scores, labels, k)
        if "targets_perm" in case.inputs:
            results[f"top{k}_mix"] = mixed_accuracy(scores, *both, k)
    if "real_labels" in case.inputs:
        results["real_top1"] = real_accuracy(scores, case.inputs["real_labels"])
    return {name: results[name] for name in case.outputs}
