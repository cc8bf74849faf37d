"""CrossViT as published, and with branches that see more of a larger image."""

from __future__ import annotations

from battery.subjects import Network

_TINY = {
    "dims": (8, 12),
    "num_heads": (2, 3),
    "mlp_ratios": (2, 3),
    "depths": ((1, 1, 0),),
    "num_classes": 7,
    "preprocess": {"size": 48},
}
_TOKENS = "they come from the class tokens, which the maps do not hold"

NETWORKS = [
    Network(
        "crossvit_9_224",
        _TINY,
        exempt={
            "logits_come_from_the_last_feature": _TOKENS,
            "features_are_as_described": "the branches see any image at the same size, so the strides hold for that of "
            "the config",
        },
    ),
    Network(
        "crossvit_9_dagger_224",
        {**_TINY, "depths": ((1, 1, 2),), "multi_conv": True, "resize": "proportional"},
        exempt={"logits_come_from_the_last_feature": _TOKENS},
    ),
]
