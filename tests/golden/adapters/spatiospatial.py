"""Video ResNets for volumes, and the measures of a classifier of unequal classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from convatlas.networks.video_resnet import VideoResNet, VideoResNetConfig
from convatlas.recognition.class_scores import balanced_weights, class_scores, confusion_matrix
from golden.cases import Case

_CONVOLUTIONS = {
    "r3d": ("3d",) * 4,
    "mc3": ("3d", "no_depth", "no_depth", "no_depth"),
    "r2plus1d": ("2plus1d",) * 4,
}
_BLOCKS = {"BasicBlock": "basic", "Bottleneck": "bottleneck"}


def run(case: Case) -> dict[str, Tensor]:
    return _network(case) if "kind" in case.config else _metrics(case)


def _network(case: Case) -> dict[str, Tensor]:
    case.only("kind", "layers", "widths", "in_channels", "stem_mid", "num_classes", "block", "size", "stem_width")
    config = case.config
    model = case.load(
        VideoResNet(
            VideoResNetConfig(
                convolutions=_CONVOLUTIONS[config["kind"]],
                block=_BLOCKS[config.get("block", "BasicBlock")],
                depths=tuple(config["layers"]),
                widths=tuple(config["widths"]),
                stem_mid=config.get("stem_mid"),
                stem_width=config.get("stem_width"),
                in_channels=config["in_channels"],
                num_classes=config["num_classes"],
            )
        )
    )
    x = case.inputs["x"].to(case.dtype)
    features = model.forward_features(x)
    logits = model.forward_head(features[-1])
    results = {"logits": logits}
    for index, feature in enumerate(features, 1):
        results |= {f"layer{index}": feature, f"layer{index}_mean": feature.mean((2, 3, 4))}
    if "cotangent" in case.inputs:
        (logits * case.inputs["cotangent"]).sum().backward()
        for name, module in model.named_children():
            first = next((weight for weight in module.parameters() if weight.dim() == 5), None)
            if first is not None:
                results[f"grad_weight_{name}"] = first.grad
    return {name: results[name] for name in case.outputs}


def _metrics(case: Case) -> dict[str, Tensor]:
    case.only("classes", "weights")
    logits, labels = case.inputs["logits"], case.inputs["target"]
    count = len(case.config["classes"])
    confusion = confusion_matrix(labels, logits.argmax(1), count)
    scores = class_scores(confusion)
    weights = balanced_weights(confusion.sum(1))
    results = {
        "confusion": confusion,
        "accuracy": confusion.diag().sum() / confusion.sum(),
        "loss": F.cross_entropy(logits, labels),
        "loss_weighted": F.cross_entropy(logits, labels, weight=weights.to(logits.dtype)),
        "weights_balanced": weights,
        "macro_f1": scores["f1"].mean(),
        "weighted_f1": (scores["f1"] * confusion.sum(1)).sum() / confusion.sum(),
        **scores,
    }
    return {name: results[name] for name in case.outputs}
