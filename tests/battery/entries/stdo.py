"""The networks that videos are delivered with, beside ESPCN and SRCNN."""

from __future__ import annotations

from battery.subjects import Network, image

_SMALL = image(9, 7)

NETWORKS = [
    Network(
        "wdsr_x2",
        {"dim": 4, "depth": 2, "expansion": 2},
        _SMALL,
        exempt={"pickles": "torch does not pickle modules with parametrizations, here weight normalisation"},
    ),
    Network("vdsr_x3", {"depth": 3, "dim": 8}, _SMALL),
    Network("edsr_baseline_x4", {"depth": 2, "dim": 8}, _SMALL),
]
