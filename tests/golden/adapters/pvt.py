"""PVT and PVTv2: spatial-reduction attention, classifiers and dense backbones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convatlas.networks.pvt import PVT, PVTConfig, PVTv2, PVTv2Config, SpatialReductionAttention
from golden.cases import Case

#: Fields of our configs by the reference's names.
_FIELDS = {
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "embed_dims": "dims",
    "depths": "depths",
    "num_heads": "num_heads",
    "mlp_ratios": "mlp_ratios",
    "sr_ratios": "sr_ratios",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_rate": "drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path",
}


def run(case: Case) -> dict[str, Tensor]:
    return _attention(case) if "module" in case.config else _network(case)


def _attention(case: Case) -> dict[str, Tensor]:
    options = ("qkv_bias", "qk_scale", "sr_ratio", "linear", "attn_drop", "proj_drop")
    case.only("module", "dim", "num_heads", "H", "W", *options)
    config = case.config
    if not config["module"].startswith("Attention"):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle the module {config['module']!r}")
    layer = SpatialReductionAttention(
        config["dim"],
        config.get("num_heads", 8),
        config.get("sr_ratio", 1),
        linear=config.get("linear", False),
        qkv_bias=config.get("qkv_bias", False),
        scale=config.get("qk_scale"),
        attn_drop=config.get("attn_drop", 0.0),
        drop=config.get("proj_drop", 0.0),
    )
    case.load(layer)
    x = case.inputs["x"].requires_grad_()
    y = layer(x, (config["H"], config["W"]))
    return {"y": y, **case.gradients(layer, y, {"grad_input": x})} if "cotangent" in case.inputs else {"y": y}


def _network(case: Case) -> dict[str, Tensor]:
    case.only("cls", "img_size", "patch_size", "norm_layer", "linear", "num_stages", "F4", *_FIELDS)
    config = case.config
    if "eps=1e-6" not in config.get("norm_layer", "eps=1e-6"):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {config['norm_layer']}")
    fields: dict[str, Any] = {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    fields.setdefault("num_classes", len(case.weights["head.weight"]) if "head.weight" in case.weights else 0)
    model: PVT | PVTv2
    if config["cls"].endswith("V2"):
        model = PVTv2(PVTv2Config().override(**fields, linear=config.get("linear", False)))
    else:
        class_token = "cls_token" in case.weights
        sized = {"patch_size": config["patch_size"], "preprocess": {"size": config["img_size"]}}
        model = PVT(PVTConfig().override(**fields, **sized, class_token=class_token))
    case.load(model)
    x = case.inputs["x"]
    results: dict[str, Tensor] = {}
    if any(name.startswith("feat") and name != "features" for name in case.outputs):
        maps = model.forward_features(x)
        results |= {f"feat{stage}": feature for stage, feature in enumerate(maps, start=1)}
        results["feat"] = maps[-1]
    if "logits" in case.outputs:
        results["logits"] = model(x)
    if "features" in case.outputs:
        model.reset_classifier(0)
        results["features"] = model(x)
    return {name: results[name] for name in case.outputs}
