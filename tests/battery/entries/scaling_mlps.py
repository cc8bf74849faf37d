"""MLPs on pixels, which take images of one size only."""

from __future__ import annotations

from battery.subjects import Network, image

_TINY = {"num_classes": 7, "preprocess": {"size": (6, 5)}}
_FIXED = {"features_are_as_described": "there is no space in the features, and images have one size"}

NETWORKS = [
    Network("B_6-Wi_512", {**_TINY, "block_dims": ((16, 8), (12, 8))}, image(6, 5), exempt=_FIXED),
    Network("B_12-Wi_512", {**_TINY, "block_dims": ((16, 8), (12, 8)), "norm": "batch"}, image(6, 5), exempt=_FIXED),
    Network("MLP_6-Wi_1024", {**_TINY, "widths": (8, 8, 8)}, image(6, 5), exempt=_FIXED),
]
