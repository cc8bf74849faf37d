"""A priori compression: one-way convolutions, plain and transposed, and the finite-element solver."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from convatlas.data.wave_fem import RickerSource, WaveFEM2d
from convatlas.nn.conv import one_way
from golden.cases import Case

_PLACE = ("stride", "padding", "dilation", "output_padding")


def run(case: Case) -> dict[str, Tensor]:
    if {"nx", "ny"} <= set(case.config):
        return _solver(case)
    if "rank" in case.config:
        return _layer(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know what this is")


def _layer(case: Case) -> dict[str, Tensor]:
    case.only("ndim", "in_channels", "out_channels", "kernel", "groups", "rank", *_PLACE)
    config = case.config
    dims = config.get("ndim", len(config["kernel"]))
    transposed = "Transpose" if "output_padding" in config or case.name.startswith("conv_transpose") else ""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value := config[key], list) else value for key in _PLACE if key in config
    }
    options |= {"groups": config.get("groups", 1), "bias": "bias" in case.weights, "rank": config["rank"]}
    kind = getattr(one_way, f"OneWayConv{transposed}{dims}d")
    layer = case.load(kind(config["in_channels"], config["out_channels"], tuple(config["kernel"]), **options))
    x = case.inputs["x"].requires_grad_()
    y = layer(x)
    results = {"y": y, "dense_kernel": layer.weight}
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, y, {"grad_input": x})
    return {name: results[name] for name in case.outputs}


def _solver(case: Case) -> dict[str, Tensor]:
    case.only("nx", "ny", "lx", "ly", "dt", "steps", "boundary", "source")
    config = case.config
    nx, ny = config["nx"], config["ny"]
    solver = WaveFEM2d(
        nx,
        ny,
        config["lx"],
        config["ly"],
        c2=case.inputs["c2"],
        boundary=config["boundary"],
        dt=config["dt"],
        source=_source(config.get("source"), nx, ny),
    )
    grid = (ny + 1, nx + 1)
    given = {name: case.inputs[name].view(grid) for name in ("u0", "v0") if name in case.inputs}
    results = {
        "element_stiffness": solver.element_stiffness,
        "lumped_mass": solver.mass.flatten(),
        "Ku0": solver.apply_stiffness(given["u0"]).flatten(),
        "u": solver.run(config["steps"], **given).flatten(1),
    }
    return {name: results[name] for name in case.outputs}


def _source(text: str | None, nx: int, ny: int) -> RickerSource | None:
    """The source as the description words it."""
    if text is None or text == "none":
        return None
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    found = re.match(rf"Ricker amplitude {number} at node \((.+?), (.+?)\), f={number}, t0={number}", text)
    if found is None:
        raise KeyError(f"the adapter does not handle the source {text!r}")
    amplitude, frequency, delay = (float(found[index]) for index in (1, 4, 5))
    return RickerSource(amplitude, frequency, delay, (_node(found[3], ny), _node(found[2], nx)))


def _node(text: str, elements: int) -> int:
    """A number of a node, or a share of the elements along its axis such as ``nx//2``."""
    if text.isdigit():
        return int(text)
    found = re.fullmatch(r"n[xy](?://(\d+))?", text)
    if found is None:
        raise KeyError(f"the adapter does not handle the node {text!r}")
    return elements // int(found[1] or 1)
