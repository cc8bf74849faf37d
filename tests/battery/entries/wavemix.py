"""WaveMix: blocks and networks."""

from __future__ import annotations

from battery.subjects import Layer, Network
from convatlas.nn.mixers.wavemix import WaveMixBlock, WaveMixBlockV1, WaveMixBlockV3

# Odd sizes of maps need a boundary mode.
_SMALL = {"depth": 2, "dim": 8, "mode": "reflect"}

NETWORKS = [
    Network("wavemix_192_16_l3", {**_SMALL, "level": 2, "num_classes": 7}),
    Network("wavemix_144_7_l1_cifar10", {**_SMALL, "block": "v3", "mult": 4, "num_classes": 7}),
    Network("wavemix_segmenter_256_16_l4", {**_SMALL, "level": 1, "num_classes": 5}),
    Network("wavemix_sr_144_4_l1", {**_SMALL, "size": 12}),
]

LAYERS = [
    Layer(WaveMixBlock, 8, {"level": 2, "mode": "reflect"}),
    Layer(WaveMixBlock, 8, {"ff_channels": 6, "wavelet": "db2", "mode": "periodization"}),
    Layer(WaveMixBlockV1, 8, {"mode": "symmetric"}),
    Layer(WaveMixBlockV3, 8, {"mode": "zero"}),
]
