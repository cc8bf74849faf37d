"""As-ViT: networks from genotypes, patch merging, scores, rewards of the search, one step of the scaling."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from convatlas.design.as_vit.scaling import candidates, choose
from convatlas.design.as_vit.scores import (
    condition,
    extrinsic_curvature,
    gauss_length,
    length_distortion,
    ntk_gram,
    random_plane,
    raw_features,
    without_norms,
)
from convatlas.design.as_vit.topology import Rewards, TopologySpace
from convatlas.networks.as_vit import AsViT, AsViTConfig, Genotype, PatchMerging
from golden.cases import Case

_NETWORK = ("genotype", "img_size", "hidden", "num_classes", "depths", "ape", "num_mlp")
_SPACE = {
    **{f"kernel{stage}": f"KERNEL_CHOICE{stage}" for stage in (1, 2, 3, 4)},
    **{f"split{stage}": f"WINDOW_CHOICE{stage}" for stage in (1, 2, 3)},
    **{f"expansion{stage}": f"FFN_EXP_CHOICE{stage}" for stage in (1, 2, 3, 4)},
    "heads": "HEAD_CHOICE",
}
_SCORES = {"ntk": "ntk", "exp": "length"}


def run(case: Case) -> dict[str, Tensor]:
    config = case.config
    if "genotype" in config:
        if "U" in case.inputs or "n_theta" in config:
            return _lengths(case)
        return _gram(case) if any(name in case.outputs for name in ("gram", "cond", "ntk")) else _network(case)
    if "search_space" in config:
        return _genotypes(case)
    if "reward_types" in config or "buffer_size" in config:
        return _rewards(case)
    if "width_ratios" in config or "choices" in config:
        return _growth(case)
    return _merging(case)


def _model(case: Case) -> nn.Module:
    config = case.config
    genotype = Genotype.parse(config["genotype"])
    changes = {"hidden": config.get("hidden", genotype.hidden), "depths": tuple(config.get("depths", genotype.depths))}
    settings = AsViTConfig(
        genotype=str(dataclasses.replace(genotype, **changes)),
        num_classes=config.get("num_classes", case.weights["head.2.bias"].shape[0]),
        in_channels=case.weights["patch_embed.proj.weight"].shape[1],
        absolute_position=config.get("ape", False),
        num_mlps=config.get("num_mlp", 1),
    )
    return AsViT(settings.override(preprocess={"size": config.get("img_size", 224)}))


def _network(case: Case) -> dict[str, Tensor]:
    case.only(*_NETWORK)
    model = _model(case)
    case.load(model)
    x = case.inputs["x"]
    features = model.forward_features(x)
    results = {"raw_features": raw_features(model, x), "features": model.pooled(features[-1])}
    results |= {name: model(x) for name in ("logits", "output", "y")}
    results |= {f"stage{index}": feature for index, feature in enumerate(features)}
    return {name: results[name] for name in case.outputs}


def _gram(case: Case) -> dict[str, Tensor]:
    case.only(*_NETWORK)
    model = _model(case)
    case.load(model)
    gram = ntk_gram(model, next(iter(case.inputs.values())))
    number = torch.tensor(condition(gram), dtype=torch.float64)
    return {name: gram if name == "gram" else number for name in case.outputs}


def _lengths(case: Case) -> dict[str, Tensor]:
    case.only(*_NETWORK, "n_theta", "batch_curve", "theta")
    model = without_norms(_model(case))
    case.load(model)
    side = case.config.get("img_size", 224)
    shape = (case.weights["patch_embed.proj.weight"].shape[1], side, side)
    theta = case.inputs.get("theta", case.config.get("n_theta", 10))
    plane = case.inputs.get("U", random_plane(1))
    functions = {
        "length_distortion": length_distortion,
        "gauss_length": partial(gauss_length, reference_chunk=case.config.get("batch_curve", 6)),
        "extrinsic_curvature": extrinsic_curvature,
    }
    return {
        name: torch.tensor(functions[name](model, shape, theta=theta, plane=plane), dtype=torch.float64)
        for name in case.outputs
    }


def _genotypes(case: Case) -> dict[str, Tensor]:
    case.only("search_space", "actions", "strings")
    theirs = case.config["search_space"]
    space = TopologySpace(**{name: tuple(theirs[key]) for name, key in _SPACE.items()})
    actions = case.inputs["actions"].tolist() if "actions" in case.inputs else case.config["actions"]
    assert [str(space.genotype(action)) for action in actions] == case.config["strings"]
    return {"n_choices": torch.tensor([len(options) for options in space.choices])}


def _rewards(case: Case) -> dict[str, Tensor]:
    case.only("buffer_size", "reward_types")
    names = [_SCORES[name] for name in case.config.get("reward_types", _SCORES)]
    rewards = Rewards(case.config.get("buffer_size", 20), names, reference=True)
    columns = {_SCORES[name]: values.tolist() for name, values in case.inputs.items()}
    # -1 is how the reference says that a condition could not be computed.
    columns["ntk"] = [float("nan") if value == -1 else value for value in columns.get("ntk", [])]
    number = max(map(len, columns.values()))
    rows = [{name: column[index] for name, column in columns.items() if column} for index in range(number)]
    return {"reward": torch.tensor([rewards(row) for row in rows], dtype=torch.float64)}


def _growth(case: Case) -> dict[str, Tensor]:
    case.only("depth", "hidden", "width_ratios", "choices", "best")
    config = case.config
    d1, d2, d3, d4 = config["depth"]
    seed = Genotype((8, 4, 4, 4), (2, 1, 1, 1), (3, 2, 4, 6), 8, (d1, d2, d3, d4), config["hidden"])
    grown = candidates(seed, config["width_ratios"])
    if "choices" in config:
        assert [[list(each.depths), each.hidden] for each in grown] == config["choices"]
    best = grown[choose(case.inputs["ntk"].tolist(), case.inputs["exp"].tolist())]
    return {"best_depth": torch.tensor(best.depths), "best_hidden": torch.tensor(best.hidden)}


def _merging(case: Case) -> dict[str, Tensor]:
    case.only("input_resolution", "kernel", "dim")
    config = case.config
    layer = PatchMerging(config["dim"], case.weights["reduction.weight"].shape[0], config["kernel"])
    case.load(layer)
    x = case.inputs["x"].requires_grad_()
    y = layer(x.unflatten(1, tuple(config["input_resolution"]))).flatten(1, 2)
    results = dict.fromkeys(("y", "output"), y)
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, y, {"grad_input": x})
    return {name: results[name] for name in case.outputs}
