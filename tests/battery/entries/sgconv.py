"""SGConv: the layers and the networks of them."""

from __future__ import annotations

import torch

from battery.subjects import Layer, Network
from convatlas.nn.mixers.sgconv import SGConv1d, SGConv2d

_COUNTED = {
    "gradient_checkpointing_changes_nothing_but_memory": "its blocks call no convolution of torch, by which passes are "
    "counted; the test of the network counts kernels"
}
_TRUNK = {"dim": 8, "depth": 2, "l_max": 40, "kernel_dim": 4}

NETWORKS = [
    Network(
        "sgconvnext_tiny",
        {"depths": (1, 1), "dims": (8, 12), "num_classes": 7, "preprocess": {"size": 48}},
        exempt=_COUNTED,
    ),
    Network(
        "sgconv_image",
        {"trunk": {**_TRUNK, "learnable_decay": "trained"}, "num_classes": 7, "preprocess": {"size": 7}},
        inputs=lambda model, batch: (torch.randn(batch, model.in_channels, 5, 7),),
        exempt=_COUNTED,
    ),
    Network(
        "sgconv_text",
        {"vocabulary": 0, "in_channels": 3, "trunk": _TRUNK, "num_classes": 7},
        inputs=lambda model, batch: (torch.randn(batch, 37, 3),),
    ),
]

LAYERS = [
    Layer(SGConv1d, 6, {"l_max": 7, "kernel_dim": 2, "bidirectional": True, "post_act": "glu"}, dims=(1,)),
    Layer(
        SGConv1d,
        4,
        {"l_max": 7, "kernel_dim": 3, "mode": "sum", "heads": 2, "norm": True, "learnable_decay": "trained"},
        dims=(1,),
    ),
    Layer(SGConv2d, 6, {"size": (7, 5), "kernel_dim": 2}),
    Layer(SGConv2d, 4, {"size": 7, "form": "flattened"}),
]
