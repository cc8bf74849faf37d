"""As-ViT."""

from __future__ import annotations

from battery.subjects import Network

NETWORKS = [
    Network("as_vit", {"genotype": "6,2,2,2|3,2,2,1|4,1,2,1|2,1,3,1|16,8", "num_classes": 7}),
    Network(
        "as_vit_small",
        {
            "genotype": "4,8,2,1|2,4,2,1|3,2,2,1|4,1,3,1|24,10",
            "num_classes": 7,
            "num_mlps": 2,
            "absolute_position": True,
            "preprocess": {"size": 48},
        },
    ),
]
