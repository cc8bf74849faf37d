"""CrossViT: cross-attention, a multi-scale block on token lists, and the whole classifier."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from convatlas.networks.crossvit import CrossAttention, CrossViT, CrossViTConfig, MultiScaleBlock
from golden.cases import Case

#: Fields of our config by the reference's names.
_FIELDS = {
    "img_size": "image_sizes",
    "patch_size": "patch_sizes",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "embed_dim": "dims",
    "depth": "depths",
    "num_heads": "num_heads",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "multi_conv": "multi_conv",
    "drop_rate": "drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path",
}


def run(case: Case) -> dict[str, Tensor]:
    if "img_size" in case.config:
        return _network(case)
    return _block(case) if isinstance(case.config["dim"], list) else _attention(case)


def _eps(case: Case) -> float:
    """That of the norms: as published where the description does not name the norm, torch's where it names no eps."""
    found = re.fullmatch(r"LayerNorm(?: eps ([\d.e-]+))?", case.config.get("norm_layer", "LayerNorm eps 1e-6"))
    if not found:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {case.config['norm_layer']!r}")
    return float(found[1] or 1e-5)


def _attention(case: Case) -> dict[str, Tensor]:
    case.only("module", "dim", "num_heads", "qkv_bias", "qk_scale", "attn_drop", "proj_drop", "N")
    config = case.config
    layer = CrossAttention(
        config["dim"],
        config.get("num_heads", 8),
        qkv_bias=config.get("qkv_bias", False),
        scale=config.get("qk_scale"),
        attn_drop=config.get("attn_drop", 0.0),
        drop=config.get("proj_drop", 0.0),
    )
    case.load(layer)
    x = case.inputs["x"].requires_grad_()
    y = layer(x)
    return {"y": y, **case.gradients(layer, y, {"grad_input": x})} if "cotangent" in case.inputs else {"y": y}


def _block(case: Case) -> dict[str, Tensor]:
    drops = ("drop", "attn_drop", "drop_path")
    case.only(
        "module", "dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale", "norm_layer", "patches", *drops
    )
    config = case.config
    block = MultiScaleBlock(
        config["dim"],
        config["depth"],
        config["num_heads"],
        config["mlp_ratio"][: len(config["dim"])],
        qkv_bias=config.get("qkv_bias", False),
        qk_scale=config.get("qk_scale"),
        norm_eps=_eps(case),
        drop=config.get("drop", 0.0),
        attn_drop=config.get("attn_drop", 0.0),
        drop_path=config.get("drop_path"),
    )
    case.load(block)
    outputs = block([case.inputs[f"x{branch}"] for branch in range(len(config["dim"]))])
    return {f"y{branch}": output for branch, output in enumerate(outputs)}


def _network(case: Case) -> dict[str, Tensor]:
    case.only("mlp_ratio", "norm_layer", "hybrid_backbone", *_FIELDS)
    config = case.config
    if any(config.get("hybrid_backbone") or ()):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {config['hybrid_backbone']}")
    fields: dict[str, Any] = {"qkv_bias": False, "norm_eps": _eps(case)}
    fields |= {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    fields["mlp_ratios"] = config["mlp_ratio"][: len(fields["dims"])]
    model = case.load(CrossViT(CrossViTConfig().override(**fields)))
    x = case.inputs["x"]
    _, tokens = model.forward_branches(x)
    results = {f"feat{branch}": token for branch, token in enumerate(tokens)}
    results["logits"] = model(x)
    return {name: results[name] for name in case.outputs}
