"""Wavelet scattering beside one wavelet after the other, as its definition says and as Kymatio does it.

Kymatio itself is measured where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.nn.scattering import HarmonicScattering3D, Scattering1D, Scattering2D
from convatlas.ops.scattering import harmonic_scattering_3d, scattering_1d, scattering_2d
from convatlas.report import Report

__all__ = ["run"]

PATHS = "path by path"
# The smallest ratio that counts.
BARS = [
    Bar(
        statement=f"Scattering of {name} is at least {at_least:g} times as fast as path by path, {what}",
        published="no figure; Kymatio goes path by path",
        theirs=PATHS,
        at_least=at_least,
        what=what,
        group=group,
    )
    for group, name, at_least in (("images", "images", 1.7), ("signals", "signals", 2.0))
    for what in ("forward", "forward and backward")
]

#: Images: batch, channels, side, J; 8 orientations.
IMAGES = ((16, 3, 64, 3), (16, 3, 32, 2))
#: Signals: batch, length, J, Q.
SIGNALS = ((8, 65_536, 8, 12), (32, 4_096, 6, 8))
#: Volumes: batch, side, J, L.
VOLUMES = ((2, 32, 2, 3),)
#: Sums of moduli in float32.
TOLERANCE = 1e-4


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory, for images, signals and volumes.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the smaller size of each.
    """
    chosen: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for batch, channels, side, J in IMAGES[1:] if quick else IMAGES:
        label = f"{batch} x {channels} x {side} x {side}, J={J}, L=8"
        chosen.append(("images", label, partial(_images, batch, channels, side, J)))
    for batch, length, J, Q in SIGNALS[1:] if quick else SIGNALS:
        chosen.append(("signals", f"{batch} x {length:,}, J={J}, Q={Q}", partial(_signals, batch, length, J, Q)))
    for batch, side, J, L in VOLUMES:
        chosen.append(("volumes", f"{batch} x {side}^3, J={J}, L={L}", partial(_volumes, batch, side, J, L)))
    cases = [
        Case(label, what, partial(_sides, what, make), group=group, tolerance=TOLERANCE)
        for what in ("forward", "forward and backward")
        for group, label, make in chosen
    ]
    return report("scattering", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, make: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Call]:
    parts = make()
    x = parts["x"].to(device)
    layer, operator = parts["layer"].to(device), parts["operator"]
    bank = layer.bank(x)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "convatlas": layer,
        PATHS: lambda x: operator(x, bank, backend="naive"),
    }
    if parts["kymatio"] is not None:
        functions["kymatio"] = parts["kymatio"].to(device)
    measured = forward if what == "forward" else backward
    return {name: measured(function, x) for name, function in functions.items()}


def _images(batch: int, channels: int, side: int, J: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, channels, side, side),
        "layer": Scattering2D(J, (side, side)),
        "operator": scattering_2d,
        "kymatio": _kymatio("Scattering2D", J=J, shape=(side, side)),
    }


def _signals(batch: int, length: int, J: int, Q: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, length),
        "layer": Scattering1D(J, length, Q, legacy_energy=True),  # as in Kymatio's release
        "operator": scattering_1d,
        "kymatio": _kymatio("Scattering1D", J=J, shape=length, Q=Q),
    }


def _volumes(batch: int, side: int, J: int, L: int) -> dict[str, Any]:
    return {
        "x": torch.rand(batch, side, side, side),
        "layer": HarmonicScattering3D(J, (side, side, side), L),
        "operator": harmonic_scattering_3d,
        "kymatio": _kymatio("HarmonicScattering3D", J=J, shape=(side, side, side), L=L),
    }


def _kymatio(name: str, **options: Any) -> Any:
    """A layer of Kymatio; None where it is not installed, or does not work with the installed SciPy."""
    if importlib.util.find_spec("kymatio") is None:
        return None
    try:
        layers = importlib.import_module("kymatio.torch")
    except ImportError:
        return None
    return getattr(layers, name)(**options)
