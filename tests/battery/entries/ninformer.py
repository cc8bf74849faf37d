"""NiNformer and the MLP-Mixer, which take images of one size only."""

from __future__ import annotations

from battery.subjects import Network, image

_TINY = {
    "depth": 2,
    "dim": 12,
    "ffn_dim": 16,
    "patch_size": 4,
    "drop": 0.0,
    "num_classes": 7,
    "preprocess": {"size": (8, 12)},
}
_FIXED = {"features_are_as_described": "the weights depend on the number of tokens, so that images have one size"}

NETWORKS = [
    Network("ninformer_cifar10", _TINY, image(8, 12), exempt=_FIXED),
    Network("mixer_cifar10", {**_TINY, "token_dim": 6}, image(8, 12), exempt=_FIXED),
]
