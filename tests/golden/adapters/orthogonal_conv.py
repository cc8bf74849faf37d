"""Orthogonal convolutions: L_orth, errors and singular values; the existence table; the distances of Wang et al."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from convatlas.ops.orthogonality import (
    conv_orth_dist,
    conv_singular_values,
    deconv_orth_dist,
    l_orth,
    orth_dist,
    orthogonal_case,
    orthogonal_conv_exists,
    orthogonality_errors,
    spectral_bound_factor,
)
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "config" in case.inputs:
        return _table(case)
    return _measures(case) if "N" in case.config else _distances(case)


def _measures(case: Case) -> dict[str, Tensor]:
    case.only("M", "C", "k", "S", "N", "ndim", "case")
    config = case.config
    shape, stride, dims = (config["M"], config["C"], config["k"]), config["S"], config.get("ndim", 2)
    kernel = case.inputs["kernel"].requires_grad_()
    if config.get("case") not in (None, orthogonal_case(*shape[:2], stride, dims), "square"):
        raise KeyError(f"{case.system}/{case.name}: the case is not {config['case']}")
    loss = l_orth(kernel, stride)
    (gradient,) = torch.autograd.grad(loss, kernel)
    values = conv_singular_values(kernel, stride * config["N"], stride)
    frobenius, spectral = orthogonality_errors(values)
    return {
        "l_orth": loss,
        "grad_weight_kernel": gradient,
        "singular_values": values,
        "err_frobenius": frobenius,
        "err_spectral": spectral,
        "alpha": torch.tensor(spectral_bound_factor(*shape, stride, dims=dims), dtype=case.dtype),
    }


def _table(case: Case) -> dict[str, Tensor]:
    case.only("columns", "ndim")
    dims = case.config.get("ndim", 2)
    found = [orthogonal_conv_exists(*row, dims=dims) for row in case.inputs["config"].tolist()]
    rows = [orthogonal_case(row[0], row[1], row[3], dims) == "RO" for row in case.inputs["config"].tolist()]
    return {"exists": torch.tensor([each.exists for each in found]).long(), "is_ro": torch.tensor(rows).long()}


def _distances(case: Case) -> dict[str, Tensor]:
    case.only("M", "C", "k")
    kernel, linear = case.inputs["kernel"], case.inputs.get("linear")
    results: dict[str, Tensor] = {}
    for name in case.outputs:
        if found := re.fullmatch(r"deconv_orth_dist_s(\d+)_p(\d+)", name):
            results[name] = deconv_orth_dist(kernel, int(found[1]), int(found[2]))
        elif found := re.fullmatch(r"conv_orth_dist_s(\d+)", name):
            results[name] = conv_orth_dist(kernel, int(found[1]))
        elif found := re.fullmatch(r"orth_dist_(\d+)x\1", name):
            results[name] = orth_dist(linear if found[1] == "1" and linear is not None else kernel)
        else:
            raise KeyError(f"{case.system}/{case.name}: the adapter does not handle the output {name}")
    return results
