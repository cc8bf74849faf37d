"""DHVT: head-interacted attention, DAFF, and the whole classifier, in evaluation and with batch statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convatlas.networks.dhvt import DAFF, DHVT, SOPE, DHVTConfig, HeadInteractedAttention
from golden.cases import Case

#: Fields of our config by the reference's names.
_FIELDS = {
    "patch_size": "patch_size",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "drop_rate": "drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path",
}


def run(case: Case) -> dict[str, Tensor]:
    if "in_features" in case.config:
        return _daff(case)
    if "dim" in case.config:
        return _attention(case)
    return _network(case) if "num_heads" in case.config else _embedding(case)


def _attention(case: Case) -> dict[str, Tensor]:
    case.only("module", "dim", "num_heads", "qkv_bias", "attn_drop", "proj_drop")
    config = case.config
    layer = HeadInteractedAttention(
        config["dim"],
        config.get("num_heads", 8),
        qkv_bias=config.get("qkv_bias", False),
        attn_drop=config.get("attn_drop", 0.0),
        drop=config.get("proj_drop", 0.0),
    )
    return _module(case, layer)


def _daff(case: Case) -> dict[str, Tensor]:
    case.only("module", "in_features", "hidden_features", "out_features", "kernel_size", "drop", "training")
    config = case.config
    channels = config["in_features"]
    if config.get("out_features", channels) != channels:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle out_features other than in_features")
    return _module(case, DAFF(channels, config.get("hidden_features", channels), config.get("kernel_size", 3)))


def _embedding(case: Case) -> dict[str, Tensor]:
    case.only("module", "img_size", "patch_size", "in_chans", "embed_dim", "training")
    config = case.config
    layer = SOPE(config.get("in_chans", 3), config["embed_dim"], config["patch_size"])
    results = _module(case, layer)
    if case.outputs["y"].dim() == 3:
        results["y"] = results["y"].flatten(2).transpose(1, 2)
    return results


def _module(case: Case, layer: Any) -> dict[str, Tensor]:
    case.load(layer)
    layer.train(case.config.get("training", False))
    x = case.inputs["x"].requires_grad_()
    y = layer(x)
    results = {"y": y}
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, y, {"grad_input": x})
    results |= {f"after.{name}": buffer for name, buffer in layer.named_buffers()}
    return {name: results[name] for name in case.outputs}


def _network(case: Case) -> dict[str, Tensor]:
    case.only("img_size", "kernel_size", "apply_dhvt", *_FIELDS)
    config = case.config
    if config.get("apply_dhvt", True) is not True:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle apply_dhvt False")
    fields: dict[str, Any] = {"drop_path": 0.0}
    fields |= {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    fields["kernel_size"] = config.get("kernel_size", 3)
    model = case.load(DHVT(DHVTConfig().override(**fields)))
    x = case.inputs["x"]
    results = {"features": model.forward_tokens(x)[1], "logits": model(x)}
    if "logits_train" in case.outputs:
        results["logits_train"] = model.train()(x)
    return {name: results[name] for name in case.outputs}
