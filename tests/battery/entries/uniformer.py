"""UniFormers: attention in windows, a token head behind a convolutional stem, pruned tokens, divided attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from battery.subjects import Network, image

_TINY = {"dims": (8, 8, 12, 16), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2), "head_dim": 4, "num_classes": 5}
_PRUNED = {"prune_ratios": ((1, 0.5), (0.5,)), "trade_offs": ((1, 0.5), (0.4,)), "depths": (1, 1, 2, 1)}
_HALF = {"half_precision": "rounding may choose other tokens, which is no small change of the output"}


def clip(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, model.in_channels, 3, 39, 33),)


_VOLUMES = {"half_precision": "torch's bfloat16 gradient of a 3-D convolution of few positions is not always finite"}

NETWORKS = [
    Network("uniformer_small", {**_TINY, "stage3": "window", "window_size": 2}),
    Network("uniformer_small_plus_tl", {**_TINY, "layer_scale_init": 0.5, "local_layer_scale": True}),
    Network("uniformer_xxs", {**_TINY, **_PRUNED}, image(64, 96), exempt=_HALF),
    Network("uniformer3d_small_split", {**_TINY, "overlapping_time": True}, clip, exempt=_VOLUMES),
]
