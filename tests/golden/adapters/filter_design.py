"""Filter design: analytic banks, filters from patches, initialisers, measures of filters."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from convatlas.analysis.filters import (
    cosine_similarity,
    effective_rank,
    frame_upper_bound,
    mean_frequency,
    mutual_coherence,
    orthogonality_defect,
    separability,
)
from convatlas.nn.initialisers import (
    delta_orthogonal_,
    dirac_,
    he_normal_,
    he_uniform_,
    lecun_normal_,
    lsuv_,
    normal_,
    orthogonal_,
    xavier_normal_,
    xavier_uniform_,
)
from convatlas.ops.conv_spectrum import conv_spectrum
from convatlas.ops.image_filters import (
    EDGE_FILTERS,
    dct_bank,
    difference_of_gaussians,
    gabor_bank,
    gaussian,
    haar_bank,
    laplacian_of_gaussian,
    walsh_hadamard_bank,
    zigzag_order,
)
from convatlas.ops.patch_statistics import (
    contrast_normalised,
    fast_ica,
    pcanet_components,
    principal_components,
    spherical_kmeans,
)
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    for key, function in (("gabor", _analytic), ("whiten_eps", _data_driven), ("lsuv", _statistical), ("N", _metrics)):
        if key in case.config:
            results = function(case)
            return {name: results[name] for name in case.outputs}
    raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {sorted(case.config)}")


def _number(value: float | str) -> float:
    if isinstance(value, str):
        found = re.fullmatch(r"(-?[\d.]*)\*?pi(?:/([\d.]+))?", value)
        if found is None:
            raise KeyError(f"the adapter does not handle the angle {value!r}")
        return float(found[1] or 1) * math.pi / float(found[2] or 1)
    return float(value)


def _orientations(text: str) -> list[float]:
    found = re.fullmatch(r"i\*pi/(\d+)([+-][\d.]+)?, ?i=0\.\.(\d+)", text)
    if found is None:
        raise KeyError(f"the adapter does not handle the orientations {text!r}")
    return [i * math.pi / int(found[1]) + float(found[2] or 0) for i in range(int(found[3]) + 1)]


def _analytic(case: Case) -> dict[str, Tensor]:
    case.only("k", "gabor", "gaussian_sigma", "dog", "log_sigma")
    config, k, settings = case.config, case.config["k"], case.config["gabor"]
    banks = {}
    for name, normalised in (("gabor", False), ("gabor_zero_mean_unit", True)):
        banks[name] = gabor_bank(
            k,
            settings["wavelengths"],
            [_number(phase) for phase in settings["phases"]],
            _orientations(settings["orientations"]),
            gamma=settings["gamma"],
            normalised=normalised,
        )
    separable = {"haar": haar_bank(k), "walsh_hadamard": walsh_hadamard_bank(k)} if k & (k - 1) == 0 else {}
    return {
        **banks,
        **separable,
        **EDGE_FILTERS,
        "gaussian": gaussian(k, config["gaussian_sigma"]),
        "dog": difference_of_gaussians(k, *config["dog"]),
        "log": laplacian_of_gaussian(k, config["log_sigma"]),
        "dct2_ortho": dct_bank(k),
        "dct_zigzag_order": zigzag_order(k),
    }


def _data_driven(case: Case) -> dict[str, Tensor]:
    keys = ("contrast_eps", "kmeans_iters", "ica_components", "ica_iters")
    case.only("n", "channels", "k", "m", "whiten_eps", *keys)
    config, patches = case.config, case.inputs["patches"]
    m, eps, q = config["m"], config["whiten_eps"], config["ica_components"]
    found = principal_components(patches)
    normalised = contrast_normalised(patches, config["contrast_eps"])
    clusters = principal_components(normalised)
    zca = clusters.zca(eps)
    data = (normalised - clusters.mean) @ zca
    start = data[:m] / torch.linalg.vector_norm(data[:m], dim=1, keepdim=True)
    # The starting point of ICA is a draw that is stored among the outputs.
    ica_start = case.outputs["ica_start"]
    whitening = found.whitening(0.0)[:q]
    unmixing = fast_ica((patches - found.mean) @ whitening.T, ica_start, config["ica_iters"])
    return {
        "mean": found.mean,
        "covariance": found.covariance,
        "eigenvalues": found.values,
        "pca_filters": found.vectors[:m],
        "pcanet_filters": pcanet_components(patches)[:m],
        "pca_whitening": found.whitening(eps),
        "zca": found.zca(eps),
        "contrast_normalized_first4": normalised[:4],
        "zca_after_contrast": zca,
        "kmeans_start": start,
        "kmeans_filters": spherical_kmeans(data, start, config["kmeans_iters"]),
        "ica_start": ica_start,
        f"ica_W{config['ica_iters']}": unmixing,
        "ica_filters": unmixing @ whitening,
    }


def _statistical(case: Case) -> dict[str, Tensor]:
    case.only("out", "inp", "k", "lsuv")
    config, settings = case.config, case.config["lsuv"]
    normal, uniform = {"draw": case.inputs["normal"]}, {"draw": case.inputs["uniform01"]}

    def fresh() -> Tensor:
        return torch.empty(config["out"], config["inp"], config["k"], config["k"], dtype=case.dtype)

    results = {
        "normal": normal_(fresh(), **normal),
        "lecun_normal": lecun_normal_(fresh(), **normal),
        "xavier_normal": xavier_normal_(fresh(), **normal),
        "xavier_uniform": xavier_uniform_(fresh(), **uniform),
        "orthogonal": orthogonal_(fresh(), **normal),
        "dirac": dirac_(fresh()),
    }
    for mode in ("fan_in", "fan_out"):
        results[f"he_normal_{mode}"] = he_normal_(fresh(), mode, **normal)
        results[f"he_uniform_{mode}"] = he_uniform_(fresh(), mode, **uniform)
    if "delta_draw" in case.outputs:
        # A draw that is stored among the outputs.
        results["delta_draw"] = case.outputs["delta_draw"]
        results["delta_orthogonal"] = delta_orthogonal_(fresh(), draw=case.outputs["delta_draw"])
    net = _net(case)
    counts = lsuv_(net, case.inputs["lsuv_batch"], tol=settings["tol"], max_iter=settings["max_iter"])
    results["lsuv_iterations"] = torch.tensor(list(counts.values()))
    return {**results, **{f"lsuv.{name}": value for name, value in net.state_dict().items()}}


def _net(case: Case) -> nn.Module:
    """A chain of convolutions and ReLUs with a linear layer at the end, by the stored weights."""
    layers: dict[int, nn.Module] = {}
    for name, weight in case.weights.items():
        place, _, kind = name.partition(".")
        if kind == "weight" and weight.dim() == 4:
            out, channels, side, _ = weight.shape
            layers[int(place)] = nn.Conv2d(channels, out, side, padding=side // 2)
        elif kind == "weight":
            layers[int(place)] = nn.Linear(weight.shape[1], weight.shape[0])
    last = max(layers)
    chain = [layers.get(i, nn.Flatten() if i == last - 1 else nn.ReLU()) for i in range(last + 1)]
    return case.load(nn.Sequential(*chain))


def _metrics(case: Case) -> dict[str, Tensor]:
    case.only("out", "inp", "k", "N")
    weight, size = case.inputs["weight"], case.config["N"]
    values = conv_spectrum(weight, size)
    return {
        "circular_singular_values": values,
        "spectral_norm": values.max(),
        "frame_upper": frame_upper_bound(weight, size),
        "orthogonality": orthogonality_defect(weight),
        "cosine_similarity": cosine_similarity(weight),
        "mutual_coherence": mutual_coherence(weight),
        "effective_rank": effective_rank(weight),
        "separability": separability(weight),
        "mean_frequency": mean_frequency(weight, size),
    }
