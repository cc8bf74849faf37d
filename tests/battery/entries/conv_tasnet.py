"""Conv-TasNet."""

from __future__ import annotations

import torch

from battery.subjects import Inputs, Network

_TINY = {
    "num_filters": 12,
    "bottleneck_channels": 6,
    "hidden_channels": 8,
    "skip_channels": 4,
    "num_blocks": 3,
    "num_repeats": 2,
}


def _mixtures(length: int = 403) -> Inputs:
    return lambda model, batch: (torch.randn(batch, length),)


NETWORKS = [
    Network("conv_tasnet", _TINY, _mixtures()),
    Network("conv_tasnet_causal", {**_TINY, "mask_act": "softmax"}, _mixtures()),
    Network("conv_tasnet_v1", {**_TINY, "skip_channels": 0, "norm": "batch"}, _mixtures()),
]
