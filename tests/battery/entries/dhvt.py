"""DHVT with each way to embed patches, and without its two modules."""

from __future__ import annotations

from battery.subjects import Network

_TINY = {"dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 7}
_EXEMPT = {
    "logits_come_from_the_last_feature": "they come from the class token, which the map does not hold",
    "weights_of_another_task_are_adapted": "the affine map before the stem is adapted, too: see tests/networks",
}

NETWORKS = [
    Network("dhvt_tiny_cifar_patch4", _TINY, exempt=_EXEMPT),
    Network(
        "dhvt_tiny_imagenet_patch16",
        {**_TINY, "depth": 1, "attention": "self", "mlp": "plain"},
        exempt=_EXEMPT,
    ),
]
