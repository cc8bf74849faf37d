"""Ensem-NN: the base network, its four networks, the preparation of clips and the fusion of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.data.skeletons import normalise_view, resample_frames
from convatlas.networks.skeleton_cnn import (
    BodyPartNetConfig,
    FrameDifferenceNetConfig,
    SkeletonAttentionNetConfig,
    SkeletonBase,
    TwoStreamNetConfig,
)
from convatlas.ops.score_fusion import fuse_scores
from golden.cases import Case

_SIZES = ("joints", "dim", "frames", "widths", "blocks", "kernel", "classes")


def run(case: Case) -> dict[str, Tensor]:
    if "root" in case.config or any(name.startswith("seq") for name in case.inputs) or "logits" in case.inputs:
        return _preparation(case)
    if "widths" not in case.config:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know what this is")
    model = case.load(_network(case))
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    logits = model(x)
    results = {"logits": logits}
    if "frame_weights" in case.outputs or "channel_weights" in case.outputs:
        frames: Any = model.frame_weights(x)
        results |= {"frame_weights": frames, "channel_weights": model.channel_weights(model.base.features(x * frames))}
    if "cotangent" in case.inputs:
        results |= case.gradients(model, logits, {"grad_input": x})
    return {name: results[name] for name in case.outputs}


def _network(case: Case) -> nn.Module:
    config = case.config
    keys = set(case.weights)
    sizes: dict[str, Any] = {
        "joints": config["joints"],
        "dim": config["dim"],
        "frames": config["frames"],
        "num_classes": config["classes"],
        "widths": tuple(config["widths"]),
        "depths": tuple(config["blocks"]),
        "kernel_size": config.get("kernel", 3),
    }
    if "0.stem.weight" in keys:
        case.only(*_SIZES)
        channels = case.weights["0.stem.weight"].shape[1]
        base = SkeletonBase(channels, sizes["widths"], sizes["depths"], sizes["kernel_size"])
        return nn.Sequential(base, nn.Linear(sizes["widths"][-1], sizes["num_classes"]))
    if "spatial.stem.weight" in keys:
        case.only(*_SIZES)
        return TwoStreamNetConfig(**sizes).build()
    if "parts" in config:
        case.only(*_SIZES, "parts")
        return BodyPartNetConfig(**sizes, parts=tuple(tuple(part) for part in config["parts"])).build()
    if "frame.weight" in keys:
        case.only(*_SIZES, "reduction")
        return SkeletonAttentionNetConfig(**sizes, reduction=config.get("reduction", 16)).build()
    case.only(*_SIZES)
    return FrameDifferenceNetConfig(**sizes).build()


def _preparation(case: Case) -> dict[str, Tensor]:
    case.only("root", "spine", "right_hip", "left_hip", "frames", "fusion_weights")
    config, results = case.config, {}
    for name, clip in case.inputs.items():
        if name.startswith("seq"):
            number = name.removeprefix("seq")
            joints = [config[joint] for joint in ("root", "spine", "right_hip", "left_hip")]
            view = normalise_view(clip.numpy(), *joints)
            results[f"view{number}"] = torch.from_numpy(view)
            results[f"resampled{number}"] = torch.from_numpy(resample_frames(view, config["frames"]))
    if "logits" in case.inputs:
        scores = case.inputs["logits"].softmax(-1)
        results |= {"mean": fuse_scores(scores), "product": fuse_scores(scores, "product")}
        results["maximum"] = fuse_scores(scores, "max")
        if "fusion_weights" in config:
            results["weighted"] = fuse_scores(scores, "weighted", config["fusion_weights"])
    return {name: results[name] for name in case.outputs}
