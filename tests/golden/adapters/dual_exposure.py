"""Dual exposures: histograms, features, EMLP, ECCC with its gradients, losses, errors and baselines."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from convatlas.networks.colour_constancy.ensembles import DualExposureEnsemble, EnsembleConfig
from convatlas.networks.colour_constancy.histograms import ECCC, ECCCConfig
from convatlas.networks.colour_constancy.perceptron import EMLP, EMLPConfig
from convatlas.ops.heat_maps import bivariate_von_mises, smoothness
from convatlas.ops.illuminant import (
    angular_error,
    channel_ratios,
    dual_exposure_feature,
    error_statistics,
    gray_edge,
    gray_world,
    reproduction_error,
    shades_of_gray,
    white_patch,
)
from convatlas.ops.log_chroma import local_gradient, log_chroma_histogram
from golden.cases import Case

_STATISTICS = {
    "mean": "mean",
    "median": "median",
    "tri": "trimean",
    "b25": "best 25 %",
    "w25": "worst 25 %",
    "w05": "worst 5 %",
    "max": "max",
}


def run(case: Case) -> dict[str, Tensor]:
    case.only("n_bins", "h", "w", "hist_boundary", "def_threshold", "emlp", "eccc")
    low, boundary = case.config["hist_boundary"]
    if low != -boundary:
        raise KeyError(f"{case.system}/{case.name}: the adapter knows no boundaries {low} and {boundary}")
    results = _pair(case, boundary) | _network(case, boundary) | _errors(case)
    left = set(case.outputs) - set(results)
    if left:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know the outputs {sorted(left)}")
    return {name: results[name] for name in case.outputs}


def _exposures(case: Case) -> tuple[Tensor, Tensor]:
    # Colours come last there, first here.
    long, short = (case.inputs[name].movedim(-1, 0)[None] for name in ("long", "short"))
    return long, short


def _pair(case: Case, boundary: float) -> dict[str, Tensor]:
    long, short = _exposures(case)
    least, bins = float(case.config["def_threshold"]), int(case.config["n_bins"])
    results = {
        "ratio_rgb": channel_ratios(long, short, least=least)[0],
        "gray_world": gray_world(long)[0],
        "white_patch": white_patch(long)[0],
        "gray_edge": gray_edge(long)[0],
    }
    for kind in ("uv", "matrix"):
        ratio = case.inputs.get("exposure_ratio")
        results[f"def_{kind}"] = dual_exposure_feature(long, short, kind, ratio=ratio, least=least)[0]
    for name, image in (("long", long), ("short", short)):
        edges = local_gradient(image)
        results[f"edges_{name}_mean"] = edges.mean((0, 2, 3))
        results[f"edges_{name}"] = edges[0].movedim(0, -1)
        for backend in ("naive", "auto"):  # the last one counts; both must pass
            found = [log_chroma_histogram(x, bins, boundary, backend=backend)[0] for x in (image, edges)]
            results[f"hist_{name}"], results[f"hist_{name}_edges"] = found
    for output in case.outputs:
        if match := re.fullmatch(r"shades_of_gray_p(\d+)", output):
            results[output] = shades_of_gray(long, int(match[1]))[0]
    return results


def _network(case: Case, boundary: float) -> dict[str, Tensor]:
    bins = int(case.config["n_bins"])
    sizes = [int(number) for number in re.findall(r"(\d+)(?=-|\s)", case.config["emlp"])]
    filters, biases, inner, outer = (int(number) for number in re.findall(r"\d+", case.config["eccc"]))
    if outer != biases or not case.config["emlp"].endswith("LeakyReLU 0.01, output (u,v)"):
        raise KeyError(f"{case.system}/{case.name}: the adapter knows no such networks")
    emlp = EMLPConfig(feature_channels=sizes[0], hidden=tuple(sizes[1:-1]))
    frames = {2: "long", 4: "both"}[filters]
    eccc = ECCCConfig(bins=bins, boundary=boundary, biases=biases, feature_channels=inner, frames=frames)
    model = case.load(DualExposureEnsemble(EnsembleConfig(emlp=emlp, eccc=eccc)))
    assert isinstance(model.emlp, EMLP)
    assert isinstance(model.eccc, ECCC)
    long, short = _exposures(case)
    feature = dual_exposure_feature(long, short, "uv", least=float(case.config["def_threshold"]))
    found = model.eccc.heat_map(model.eccc.histograms(long, short), feature)
    loss = angular_error(found.rgb, case.inputs["illuminant"], "c5").mean()
    loss.backward()
    at = bivariate_von_mises(found.heat[0], 0)
    results = {
        "response": found.response,
        "gate": found.gate,
        "bias_map": found.bias,
        "heat": found.heat,
        "u": found.uv[:, 0],
        "v": found.uv[:, 1],
        "rgb": found.rgb,
        "angular_loss_shrink_pi22over7": loss,
        "von_mises_mu_idx0": at.mean,
        "von_mises_sigma": at.covariance.triu(),
        "smooth_bias": smoothness(found.bias)[0],
        "emlp_uv": model.emlp.answer(feature),
        "emlp_rgb": model.emlp(feature),
    }
    results |= {f"smooth_filter{i}": each for i, each in enumerate(smoothness(model.eccc.filters))}
    results |= {f"grad_weight_{name}": each.grad for name, each in model.eccc.named_parameters()}
    return {name: torch.as_tensor(value) for name, value in results.items()}


def _errors(case: Case) -> dict[str, Tensor]:
    errors = angular_error(case.inputs["pred"], case.inputs["gt"])
    statistics = error_statistics(errors)
    return {
        "ang_error": errors,
        "reproduction_error": reproduction_error(case.inputs["pred"], case.inputs["gt"]),
        **{f"stat_{name}": torch.tensor(statistics[ours]) for name, ours in _STATISTICS.items()},
    }
