"""ESPCN and the SRCNN that it is compared with."""

from __future__ import annotations

from battery.subjects import Network, image

_SMALL = image(9, 7)

NETWORKS = [
    Network("espcn_x3", {"channels": 8}, _SMALL),
    Network("espcn_clamped_x2", {"channels": 8, "in_channels": 3}, _SMALL),
    Network("espcn_deconv_x2", {"channels": 8, "act": "relu"}, _SMALL),
    Network("srcnn_915_x3", {"dims": (8, 4)}, _SMALL),
    Network("srcnn_955_x2", {"dims": (8, 4), "in_channels": 3, "convention": "pillow"}, _SMALL),
]
