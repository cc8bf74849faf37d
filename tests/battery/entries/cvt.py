"""CvT with a class token and without, with each way to read queries, keys and values."""

from __future__ import annotations

from battery.subjects import Network

_TINY = {
    "depths": (1, 2),
    "dims": (8, 12),
    "num_heads": (2, 3),
    "mlp_ratios": (2, 3),
    "patch_sizes": (7, 3),
    "patch_strides": (4, 2),
    "patch_paddings": (2, 1),
    "projections": ("dw_bn", "dw_bn"),
    "kernel_sizes": (3, 3),
    "kv_strides": (2, 2),
    "kv_paddings": (1, 1),
    "qkv_bias": (True, True),
    "class_tokens": (False, True),
    "drop": (0.0, 0.0),
    "attn_drop": (0.0, 0.0),
    "drop_path": (0.0, 0.1),
    "num_classes": 7,
}

NETWORKS = [
    Network(
        "cvt_13",
        _TINY,
        exempt={"logits_come_from_the_last_feature": "they come from the class token, which the map does not hold"},
    ),
    Network("cvt_21", {**_TINY, "projections": ("linear", "avg"), "class_tokens": (False, False)}),
]
