"""DeepMAD: scores and budgets of structures, networks built from them, channel rounding and repair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convatlas.design.deepmad.program import Program, repair, round_channels
from convatlas.design.deepmad.scores import (
    WEIGHTS,
    count,
    deepmad_score,
    depth_penalty,
    effectiveness,
    madnas_score,
    stages,
)
from convatlas.networks.deepmad import Block, CnnNet, CnnNetConfig, parse_structure
from golden.cases import Case

_SCORES = (
    *("structure", "structures", "image_size", "multi_block_ratio", "alpha1", "alpha2"),
    *("depth_penalty_ratio", "madnas_ratio"),
)


def run(case: Case) -> dict[str, Tensor]:
    if case.weights:
        return _network(case)
    if "structure_in" in case.config or any(name.startswith("round") for name in case.outputs):
        return _repair(case)
    return _scores(case)


def _network(case: Case) -> dict[str, Tensor]:
    case.only("structure", "num_classes", "out_indices")
    structure = parse_structure(case.config["structure"])
    classes = case.config.get("num_classes") or 0
    config = CnnNetConfig(structure=structure, num_classes=classes, in_channels=structure[0].in_channels)
    model = CnnNet(config)
    case.load(model)
    x = case.inputs["x"]
    chosen = [feature for index, feature in enumerate(model.forward_features(x)) if index in _indices(case)]
    results = {name: model(x) for name in ("logits", "output")}
    for index, block in enumerate(model.blocks):
        x = block(x)
        results[f"block{index}"] = x
    for name in ("stage", "feature", "out"):
        results |= {f"{name}{index}": feature for index, feature in enumerate(chosen)}
    return {name: results[name] for name in case.outputs}


def _indices(case: Case) -> Sequence[int]:
    return case.config.get("out_indices", (1, 2, 3, 4))


def _repair(case: Case) -> dict[str, Tensor]:
    case.only("image_size", "structure_in", "structure_out", "valid")
    config = case.config
    if "structure_in" in config:
        repaired = repair([Block.parse(entry) for entry in config["structure_in"]], config["image_size"])
        assert [block.as_mapping() for block in repaired] == config["structure_out"]
        for layers, valid in config.get("valid", {}).items():
            limit = math.inf if layers == "None" else int(layers)
            # As there, the budget of layers alone decides: channels of a repaired structure may fall.
            used, budget = Program(layers=limit).used(repaired)["layers"]
            assert (used <= budget) is valid
    results = {}
    for name in case.outputs:
        rounded = [round_channels(x, adaptive=name == "round_adaptive") for x in case.inputs["x"].tolist()]
        results[name] = torch.tensor(rounded)
    return results


def _scores(case: Case) -> dict[str, Tensor]:
    case.only(*_SCORES)
    config = case.config
    if "structures" not in config:
        return _scores_of(config, config["structure"], config["image_size"], "", set(case.outputs))
    results = {}
    for name, entry in config["structures"].items():
        results |= _scores_of(config, entry["structure"], entry["image_size"], f"{name}.", set(case.outputs))
    return results


def _scores_of(
    config: dict[str, Any], entries: list[dict[str, Any]], image_size: int, prefix: str, wanted: set[str]
) -> dict[str, Tensor]:
    structure = parse_structure(entries)
    score = deepmad_score(
        structure,
        image_size,
        weights=config.get("multi_block_ratio", WEIGHTS),
        alpha1=config.get("alpha1", 1),
        alpha2=config.get("alpha2", 1),
    )
    counted, found = count(structure, image_size), stages(structure, image_size)
    values: dict[str, Any] = {
        "score": score.total,
        "score_per_stage": score.stages,
        "effectiveness": effectiveness(structure),
        "depth_penalty": config.get("depth_penalty_ratio", 10) * depth_penalty(structure),
        "flops": counted.flops,
        "model_size": counted.size,
        "layers": counted.layers,
        "stage_channels": [stage.channels for stage in found],
        "stage_layer_num": [stage.layers for stage in found],
        "stage_block_num": [stage.blocks for stage in found],
        "stage_resolution": [stage.resolution for stage in found],
    }
    if f"{prefix}madnas" in wanted:
        values["madnas"] = madnas_score(structure, weights=config.get("madnas_ratio"))
    tensors = {f"{prefix}{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return {name: tensor for name, tensor in tensors.items() if name in wanted}
