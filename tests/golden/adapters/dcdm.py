"""The deep conjugate direction method: iterations, network and loss, Lanczos."""

from __future__ import annotations

import torch
from torch import Tensor

from convatlas.networks.dcdm import DCDMNet, DCDMNetConfig
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.dcdm import dcdm, dcdm_loss, network_predictor
from convatlas.physics.linear_solvers import cg, lanczos
from golden.cases import Case

_SOLVE = ("shape", "max_it", "boundary", "tol", "predictor")
_NET = ("channels", "c", "top", "mid", "up")
_STENCIL = "homogeneous Dirichlet, stencil 2d/-1, h=1"


def run(case: Case) -> dict[str, Tensor]:
    if "W" in case.outputs or "ritz_values" in case.outputs:
        return _lanczos(case)
    if "loss" in case.outputs or "y" in case.outputs:
        return _loss(case)
    if "x" in case.outputs:
        return _solve(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know what gives {sorted(case.outputs)}")


def _operator(case: Case) -> PoissonOperator:
    if case.config.get("boundary", _STENCIL) != _STENCIL:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {case.config['boundary']!r}")
    return PoissonOperator(case.config["shape"])


def _network(case: Case) -> DCDMNet:
    config = case.config
    ours = DCDMNetConfig(
        ndim=len(config["shape"]),
        width=config["channels"] if "channels" in config else config.get("c", 16),
        depths=(config.get("top", 1), config.get("mid", 3), config.get("up", 2)),
    )
    return case.load(DCDMNet(ours))


def _solve(case: Case) -> dict[str, Tensor]:
    case.only(*_SOLVE, *_NET)
    # The matrix is the operator's; where both are given they must be one.
    A, config, b, x0 = _operator(case), case.config, case.inputs["b"], case.inputs.get("x_init")
    if "A" in case.inputs:
        torch.testing.assert_close(torch.from_numpy(A.to_csr().toarray()).to(b), case.inputs["A"])
    if config.get("predictor", "") == "linear, matrix approx_inverse":
        predictor = case.inputs["approx_inverse"].__matmul__
    elif "predictor" in config:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {config['predictor']!r}")
    else:
        predictor = network_predictor(_network(case), A.shape)
    limits = {"tol": config.get("tol", 0.0), "max_iter": config["max_it"]}
    results = {}
    for name in (name for name in case.outputs if name.split("_")[0] == "x"):
        suffix = name.removeprefix("x")
        if suffix == "_cg":
            found = cg(A, b, x0, **limits)
        elif suffix == "":
            found = dcdm(A, b, predictor, x0, **limits)
        elif suffix.startswith("_orth"):
            kept = int(suffix.removeprefix("_orth"))
            form = {"n_orthogonal": kept, "gram_schmidt": "modified", "recompute": False}
            found = dcdm(A, b, predictor, x0, **limits, **form)
        else:
            raise KeyError(f"{case.system}/{case.name}: the adapter does not know {name}")
        results |= {name: found.x, f"residuals{suffix}": torch.tensor(found.residuals, dtype=torch.float64)}
    return {name: results[name] for name in case.outputs}


def _loss(case: Case) -> dict[str, Tensor]:
    case.only("shape", "boundary", *_NET)
    model, b = _network(case), case.inputs["b"]
    y = model(b)
    loss = dcdm_loss(y, b, _operator(case))
    loss.backward()
    gradients = {f"grad_weight_{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: ({"y": y, "loss": loss} | gradients)[name] for name in case.outputs}


def _lanczos(case: Case) -> dict[str, Tensor]:
    case.only("shape", "m", "boundary")
    A = case.inputs["A"] if "A" in case.inputs else _operator(case)
    found = lanczos(A, case.inputs["b"], case.config["m"])
    vectors = found.vectors
    if "W" in case.outputs:  # up to sign
        vectors = vectors * (vectors * case.outputs["W"]).sum(1, keepdim=True).sign()
    values, ritz = found.ritz()
    results = {
        "W": vectors,
        "diagonal": found.diagonal,
        "sub_diagonal": found.sub_diagonal,
        "ritz_values": values,
        "ritz_vectors": ritz,
    }
    return {name: results[name] for name in case.outputs}
