"""CvT: convolutional attention in both modes, and the whole network from the reference's specification."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convatlas.networks.cvt import ConvAttention, CvT, CvTConfig
from golden.cases import Case

#: Fields of our config by the names of the specification.
_FIELDS = {
    "DEPTH": "depths",
    "DIM_EMBED": "dims",
    "NUM_HEADS": "num_heads",
    "MLP_RATIO": "mlp_ratios",
    "PATCH_SIZE": "patch_sizes",
    "PATCH_STRIDE": "patch_strides",
    "PATCH_PADDING": "patch_paddings",
    "QKV_PROJ_METHOD": "projections",
    "KERNEL_QKV": "kernel_sizes",
    "STRIDE_KV": "kv_strides",
    "PADDING_KV": "kv_paddings",
    "QKV_BIAS": "qkv_bias",
    "CLS_TOKEN": "class_tokens",
    "DROP_RATE": "drop",
    "ATTN_DROP_RATE": "attn_drop",
    "DROP_PATH_RATE": "drop_path",
    "INIT": "init",
}


def run(case: Case) -> dict[str, Tensor]:
    return _attention(case) if "module" in case.config else _network(case)


def _refuse(case: Case, name: str, value: Any) -> None:
    raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {name} {value!r}")


def _attention(case: Case) -> dict[str, Tensor]:
    options = ("qkv_bias", "method", "kernel_size", "stride_kv", "stride_q", "padding_kv", "padding_q")
    drops = ("attn_drop", "proj_drop")
    case.only("module", "dim_in", "dim_out", "num_heads", "H", "W", "with_cls_token", "training", *options, *drops)
    config = case.config
    kernel_size = config.get("kernel_size", 3)
    for name, only in (("dim_out", config["dim_in"]), ("stride_q", 1), ("padding_q", kernel_size // 2)):
        if config.get(name, only) != only:
            _refuse(case, name, config[name])
    layer = ConvAttention(
        config["dim_in"],
        config["num_heads"],
        kernel_size=kernel_size,
        stride_kv=config.get("stride_kv", 1),
        padding_kv=config.get("padding_kv", 1),
        method=config.get("method", "dw_bn"),
        class_token=config.get("with_cls_token", True),
        qkv_bias=config.get("qkv_bias", False),
        attn_drop=config.get("attn_drop", 0.0),
        drop=config.get("proj_drop", 0.0),
    )
    case.load(layer)
    layer.train(config.get("training", False))
    x = case.inputs["x"].requires_grad_()
    y = layer(x, (config["H"], config["W"]))
    results = {"y": y}
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, y, {"grad_input": x})
    results |= {f"after.{name}": buffer for name, buffer in layer.named_buffers()}
    return {name: results[name] for name in case.outputs}


def _network(case: Case) -> dict[str, Tensor]:
    case.only("spec", "num_classes", "act", "norm", "in_chans")
    config = case.config
    spec = config["spec"]
    stages = spec["NUM_STAGES"]
    fixed = {
        "NUM_STAGES": stages,
        "POS_EMBED": [False] * stages,
        "STRIDE_Q": [1] * stages,
        "PADDING_Q": [size // 2 for size in spec["KERNEL_QKV"][:stages]],
    }
    for name, value in spec.items():
        if name not in _FIELDS and (name not in fixed or value != fixed[name]):
            _refuse(case, name, value)
    for name, only in (("act", "QuickGELU"), ("norm", "LayerNorm eps 1e-5")):
        if config.get(name, only) != only:
            _refuse(case, name, config[name])
    fields = {
        ours: spec[theirs][:stages] if isinstance(spec[theirs], list) else spec[theirs]
        for theirs, ours in _FIELDS.items()
        if theirs in spec
    }
    fields |= {"num_classes": config.get("num_classes", 0), "in_channels": config.get("in_chans", 3)}
    model = case.load(CvT(CvTConfig().override(**fields)))
    x = case.inputs["x"]
    maps, token = model.forward_stages(x)
    results = {f"stage{stage}": feature for stage, feature in enumerate(maps)}
    results["logits"] = model(x)
    if token is not None:
        results[f"stage{len(maps) - 1}_cls"] = token[:, None]
    model.reset_classifier(0)
    results["features"] = model(x)
    return {name: results[name] for name in case.outputs}
