"""PVT, with and without a class token, and PVTv2 with both reductions."""

from __future__ import annotations

from battery.subjects import Network

_TINY = {
    "depths": (1, 2),
    "dims": (8, 12),
    "num_heads": (1, 3),
    "mlp_ratios": (2, 3),
    "sr_ratios": (2, 1),
    "num_classes": 7,
}

NETWORKS = [
    Network(
        "pvt_tiny",
        {**_TINY, "preprocess": {"size": 32}},
        exempt={
            "logits_come_from_the_last_feature": "the class token takes part in the last stage of the classifier only"
        },
    ),
    Network("pvt_small", {**_TINY, "preprocess": {"size": 32}, "class_token": False}),
    Network("pvt_v2_b0", _TINY),
    Network("pvt_v2_b2_li", _TINY),
]
