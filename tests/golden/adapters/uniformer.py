"""UniFormer: image, dense, token-labelling, video and light networks, their blocks, inflation, token-label loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.networks.uniformer.blocks import BlockOptions, GlobalBlock, LocalBlock, SplitBlock, WindowBlock
from convatlas.networks.uniformer.image import UniFormer, UniFormerConfig
from convatlas.networks.uniformer.inflation import inflate_weight
from convatlas.networks.uniformer.light import LightConfig, LightUniFormer
from convatlas.networks.uniformer.video import UniFormer3d, UniFormer3dConfig
from convatlas.training.token_labelling import token_label_loss
from golden.cases import Case

#: Fields of our configs by the reference's names, in small letters.
_FIELDS = {
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "depth": "depths",
    "layers": "depths",
    "embed_dim": "dims",
    "head_dim": "head_dim",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_rate": "drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path",
}
_NETWORK_KEYS = (
    *("mlp_ratio", "img_size", "conv_stem", "layer_scale", "init_value", "return_dense", "mix_token", "loss"),
    *("windows", "hybrid", "window_size", "use_checkpoint", "checkpoint_num"),
    *("model", "split", "std", "prune_ratio", "trade_off", "training", "norm_layer"),
)


def run(case: Case) -> dict[str, Tensor]:
    config = {key.lower(): value for key, value in case.config.items()}
    if "time_dim" in config:
        case.only("time_dim")
        return {mode: inflate_weight(case.inputs["w2d"], config["time_dim"], mode) for mode in case.outputs}
    if "dim" in config:
        return _block(case, config)
    left = set(config) - {*_FIELDS, *_NETWORK_KEYS}
    if left or "eps 1e-6" not in config.get("norm_layer", "eps 1e-6"):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {sorted(left) or config['norm_layer']}")
    results = _losses(case, config) if "loss" in config else {}
    return {**results, **_network(case, config)}


def _block(case: Case, config: dict[str, Any]) -> dict[str, Tensor]:
    options = ("mlp_ratio", "qkv_bias", "qk_scale", "layer_scale", "init_value", "training")
    case.only("dim", "num_heads", "window_size", *options)
    weights = case.weights
    axes = weights["pos_embed.weight"].dim() - 2
    shared = BlockOptions(
        channels=config["dim"],
        num_heads=config.get("num_heads", 1),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias="attn.qkv.bias" in weights,
        qk_scale=config.get("qk_scale"),
        layer_scale_init=1.0 if "gamma_1" in weights else None,
        axes=axes,
    )
    block: nn.Module
    if "attn.qkv.weight" not in weights:
        block = LocalBlock(shared)
    elif "t_attn.qkv.weight" in weights:
        block = SplitBlock(shared)
    elif "window_size" in config:
        block = WindowBlock(shared, window_size=config["window_size"])
    else:
        block = GlobalBlock(shared)
    case.load(block).train(bool(config.get("training", False)))
    x = case.inputs["x"].requires_grad_()
    y = block(x)
    if "cotangent" not in case.inputs:
        return {"y": y}
    found = {"y": y, **case.gradients(block, y, {"grad_input": x})}
    return {name: tensor.reshape(case.outputs[name].shape) for name, tensor in found.items() if name in case.outputs}


def _network(case: Case, config: dict[str, Any]) -> dict[str, Tensor]:
    weights = case.weights
    fields: dict[str, Any] = {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    fields["qkv_bias"] = "blocks3.0.attn.qkv.bias" in weights
    fields["num_classes"] = len(weights["head.weight"]) if "head.weight" in weights else 0
    stem = next(weights[key] for key in ("patch_embed1.proj.weight", "patch_embed1.proj.0.weight") if key in weights)
    fields["in_channels"], axes = stem.shape[1], stem.dim() - 2
    ratio = config.get("mlp_ratio", 4.0)
    fields["mlp_ratios"] = ratio if isinstance(ratio, list) else [ratio] * 4
    scaled = {key for key in weights if key.endswith(".gamma_1")}
    if scaled:
        fields["layer_scale_init"] = config.get("init_value", 1e-6)
    model: UniFormer | UniFormer3d | LightUniFormer
    if "cls_token" in weights:
        light = LightConfig() if axes == 2 else LightConfig(preprocess=UniFormer3dConfig().preprocess)
        given = {"prune_ratios": "prune_ratio", "trade_offs": "trade_off"}
        fields |= {ours: config[theirs][2:] for ours, theirs in given.items() if theirs in config}
        model = LightUniFormer(light.override(**fields, pyramid="norm.weight" not in weights))
    elif axes == 3:
        fields |= {"split": bool(config.get("split")), "overlapping_time": bool(config.get("std"))}
        model = UniFormer3d(UniFormer3dConfig().override(**fields))
    else:
        stage3 = "hybrid" if config.get("hybrid") else "window" if config.get("windows") else "global"
        fields |= {"stage3": stage3, "window_size": config.get("window_size", 14)}
        fields |= {
            "conv_stem": "patch_embed1.proj.0.weight" in weights,
            "token_head": "aux_head.weight" in weights,
            "pyramid": "norm.weight" not in weights,
            "local_layer_scale": "blocks1.0.gamma_1" in weights,
        }
        model = UniFormer(UniFormerConfig().override(**fields))
    case.load(model)
    model.train(bool(config.get("training", False)))
    x = case.inputs["x"]
    results: dict[str, Tensor] = {}
    if isinstance(model, LightUniFormer) and not model.config.pyramid:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        scores = model(x)
        results |= dict(zip(("logits", "logits_cls"), scores if isinstance(scores, tuple) else (scores,), strict=False))
        model.load_state_dict(before)
    elif model.num_classes:
        results["logits"] = results["eval_logits"] = model(x)
    if isinstance(model, LightUniFormer):
        maps, results["cls_token"], results["global_attn"] = model.forward_stages(x)
    else:
        maps = model.forward_features(x)
    results |= {f"feat{stage}": feature for stage, feature in enumerate(maps, start=1)}
    results["features"] = results["feat"] = maps[-1]
    return {name: tensor for name, tensor in results.items() if name in case.outputs}


def _losses(case: Case, config: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs called loss_2d, loss_gt0, loss_gt1_mix, ...: with or without ground truth, by the name of the box."""
    settings = config["loss"]
    scores, tokens = case.inputs["cls_out"], case.inputs["aux_out"]
    results = {}
    for name in case.outputs:
        if not name.startswith("loss"):
            continue
        own = settings["boxes"].get(name, settings.get(name))
        if isinstance(own, dict):
            weights, box = own, own["box"]
        else:
            weights, box = settings, settings["boxes"]["mix" if name.endswith("_mix") else "plain"]
        results[name] = token_label_loss(
            scores,
            tokens,
            case.inputs["target2d" if "2d" in name else "target3d"],
            tuple(box),
            class_weight=weights.get("cls_weight", 1.0),
            token_weight=weights.get("dense_weight", 1.0),
            ground_truth="gt1" in name,
        )
    return {name: torch.as_tensor(value) for name, value in results.items()}
