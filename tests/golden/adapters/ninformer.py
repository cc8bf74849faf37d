"""NiNformer: the classifier, the trunk, a block, the gating unit and the Mixer block, told apart by their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convatlas.networks.ninformer import (
    MixerBlock,
    MixerGatingUnit,
    NiNBlock,
    NiNformer,
    NiNformerClassifier,
    NiNformerConfig,
)
from convatlas.ops.tokens import map_to_tokens
from golden.cases import Case

_FIELDS = {
    "d_model": "dim",
    "d_ffn": "ffn_dim",
    "num_layers": "depth",
    "dropout": "drop",
    "image_size": "size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "num_classes": "num_classes",
}


def run(case: Case) -> dict[str, Tensor]:
    return _classifier(case) if "patcher.weight" in case.weights else _tokens(case)


def _classifier(case: Case) -> dict[str, Tensor]:
    case.only("seq_len", *_FIELDS)
    fields: dict[str, Any] = {ours: case.config[theirs] for theirs, ours in _FIELDS.items() if theirs in case.config}
    size = fields.pop("size")
    config = NiNformerConfig().override(**fields, preprocess={"size": size})
    if case.config.get("seq_len", config.num_tokens) != config.num_tokens:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle seq_len {case.config['seq_len']}")
    model = NiNformerClassifier(config)
    case.load(model)
    x = case.inputs["x"].requires_grad_()
    (feature,) = model.forward_features(x)
    logits = model(x)
    results = {"tokens": map_to_tokens(feature), "logits": logits, "y": logits}
    if "cotangent" in case.inputs:
        results |= case.gradients(model, logits, {"grad_input": x})
    return {name: results[name] for name in case.outputs}


def _tokens(case: Case) -> dict[str, Tensor]:
    model = _module(case)
    case.load(model)
    x = case.inputs["x"].requires_grad_()
    y = model(x)
    results = {"y": y, "tokens": y}
    if "cotangent" in case.inputs:
        results |= case.gradients(model, y, {"grad_input": x})
    return {name: results[name] for name in case.outputs}


def _module(case: Case) -> nn.Module:
    case.only("d_model", "d_ffn", "seq_len", "num_layers", "dropout")
    config, drop = case.config, case.config.get("dropout", 0.5)
    dim, hidden, tokens = config["d_model"], config["d_ffn"], config["seq_len"]
    if any(key.startswith("model.") for key in case.weights):
        return NiNformer(dim, hidden, tokens, config["num_layers"], drop=drop)
    mixer = MixerBlock(dim, tokens, hidden, hidden, drop=drop)
    if "norm.weight" in case.weights:
        return NiNBlock(dim, mixer, hidden, drop=drop)
    return MixerGatingUnit(dim, mixer) if "proj.weight" in case.weights else mixer
