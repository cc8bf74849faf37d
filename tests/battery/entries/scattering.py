"""Scattering of signals, images and volumes."""

from __future__ import annotations

from battery.subjects import Operator, random
from convatlas.ops.morlet import harmonics, morlet_1d, morlet_2d
from convatlas.ops.scattering import harmonic_scattering_3d, scattering_1d, scattering_2d

_OPTIONS = {"average": "local", "log2_stride": 3, "max_order": 2}
_SIGNALS = {
    "smallest": morlet_1d(8, 2, (1, 1), 4, **{**_OPTIONS, "log2_stride": 2}),
    "local": morlet_1d(40, 3, (2, 1), 8, **_OPTIONS),
    "two_wavelets_in_order_2": morlet_1d(33, 4, (3, 2), 11, **{**_OPTIONS, "log2_stride": 1}),
    "order_1": morlet_1d(16, 4, (1, 1), 16, **{**_OPTIONS, "log2_stride": 4, "max_order": 1}),
    "no_average": morlet_1d(24, 3, (2, 1), 8, **{**_OPTIONS, "average": "none", "log2_stride": None}),
    "whole_average": morlet_1d(24, 2, (1, 1), 24, **{**_OPTIONS, "average": "global", "log2_stride": None}),
}
_IMAGES = {
    "smallest": morlet_2d((4, 4), 2, 1, max_order=2),
    "odd": morlet_2d((9, 7), 2, 3, max_order=2),
    "order_1": morlet_2d((8, 5), 1, 4, max_order=1),
    "with_margins": morlet_2d((8, 8), 3, 1, max_order=2, pre_pad=True),
}
_POWERS = {"powers": (0.5, 1.0, 2.0), "rotation_covariant": True, "max_order": 2}
_VOLUMES = {
    "one_order": harmonics((4, 4, 4), 0, 1, 1.0, **{**_POWERS, "rotation_covariant": False, "max_order": 1}),
    "odd": harmonics((5, 4, 3), 1, 2, 0.8, **_POWERS),
    "legacy_grid": harmonics((3, 3, 2), 1, 1, 1.0, **_POWERS, legacy_grid=True),
}

OPERATORS = [
    Operator(
        scattering_1d,
        examples={
            label: lambda bank=bank, lead=lead: (random(*lead, bank.length), bank)
            for (label, bank), lead in zip(_SIGNALS.items(), [(2,), (2,), (), (2, 1), (1,), (2,)], strict=True)
        },
        reaching={"grouped": lambda: (random(2, 40), _SIGNALS["local"])},
    ),
    Operator(
        scattering_2d,
        examples={
            label: lambda bank=bank, lead=lead: (random(*lead, *(bank.padded if bank.pre_pad else bank.shape)), bank)
            for (label, bank), lead in zip(_IMAGES.items(), [(2, 1), (2,), (), (1,)], strict=True)
        },
        reaching={"grouped": lambda: (random(2, 9, 7), _IMAGES["odd"])},
    ),
    Operator(
        harmonic_scattering_3d,
        examples={
            label: lambda bank=bank, lead=lead: (random(*lead, *bank.shape), bank)
            for (label, bank), lead in zip(_VOLUMES.items(), [(2,), (), (1, 2)], strict=True)
        },
        reaching={"grouped": lambda: (random(2, 5, 4, 3), _VOLUMES["odd"])},
    ),
]
