"""Scattering: frames, networks of frames, Morlet scattering in one and two dimensions, solid harmonics in three."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from convatlas.nn.frame_scattering import FrameMaker, ScatteringLayer, ScatteringNetwork
from convatlas.nn.scattering import HarmonicScattering3D, Scattering1D, Scattering2D
from convatlas.ops import frames
from golden.cases import Case

_KINDS = ("meyer", "weyl_heisenberg", "atrous", "tensor_atrous", "polar", "cone", "learned")
#: Other names of the shifted logistic sigmoid.
_NAMES = dict.fromkeys(("shifted_sigmoid", "logistic", "logistic_sigmoid"), "sigmoid")
#: What the reference tells of its own filters and results.
_TOLD = ("buffers", "meta", "out_shape", "psi1", "psi2", "N_padded", "pad_left", "pad_right")


def run(case: Case) -> dict[str, Tensor]:
    config = case.config
    if "layers" in config:
        return _extractor(case)
    if all(isinstance(value, dict) and "kind" in value for value in config.values()):
        return _frames(case)
    if "integral_powers" in config:
        return _harmonic(case)
    return _morlet_1d(case) if "N" in config else _morlet_2d(case)


def _frames(case: Case) -> dict[str, Tensor]:
    results = {}
    for name, config in case.config.items():
        options = dict(config)
        kind, shape = options.pop("kind"), options.pop("n") if "n" in options else options.pop("shape")
        if kind == "learned":
            options["weight"] = case.inputs.get(f"{name}.weight", case.inputs.get("weight"))
        frame = getattr(frames, _KINDS[_KINDS.index(kind)])(shape, **options)
        results |= {f"{name}.atom": frame.atom, f"{name}.filters": frame.filters, f"{name}.lp_sum": frame.lp_sum()}
    return {name: results[name] for name in case.outputs}


def _maker(text: str) -> FrameMaker:
    """The frame that a line such as "polar J=2 K0=4 alpha=.5 real" describes."""
    kind, *words = text.split()
    options: dict[str, Any] = {"analytic": False} if kind == "meyer" else {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            options[name] = float(value) if name == "alpha" else value if name == "wavelet" else int(value)
        elif name in ("analytic", "real"):
            options[name] = True
        else:
            options["wavelet"] = name
    return partial(getattr(frames, _KINDS[_KINDS.index(kind)]), **options)


def _extractor(case: Case) -> dict[str, Tensor]:
    case.only("n", "shape", "layers", "output_frame", "energy_ratio", "paths", "dilation_norm")
    config, layers = case.config, []
    for layer in config["layers"]:
        unknown = set(layer) - {"frame", "nonlinearity", "pooling"}
        if unknown:
            raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {sorted(unknown)}")
        pooling, _, factor = layer.get("pooling", "none").partition(" ")
        layers.append(
            ScatteringLayer(
                _maker(layer["frame"]),
                _NAMES.get(layer["nonlinearity"], layer["nonlinearity"]),
                pooling,
                int(factor) if factor else 1,
            )
        )
    shape = config["n"] if "n" in config else config["shape"]
    network = ScatteringNetwork(
        layers, _maker(config["output_frame"]), shape, dilation_norm=config.get("dilation_norm", False)
    )
    for depth, paths in enumerate(config.get("paths", {}).values()):
        assert [tuple(path) for path in paths] == network.paths(depth)
    results = {f"layer{depth}": part for depth, part in enumerate(network(case.inputs["x"]))}
    return {name: results[name] for name in case.outputs}


def _compare(case: Case, results: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    if "cotangent" in case.inputs:
        (results["S"] * case.inputs["cotangent"]).sum().backward()
        results["grad_input"] = x.grad
    return {name: results[name] for name in case.outputs}


def _morlet_1d(case: Case) -> dict[str, Tensor]:
    case.only("N", "J", "Q", "T", "stride", "max_order", "out_type", "legacy_energy", *_TOLD)
    config = case.config
    wavelets = config.get("Q", 1)
    module = Scattering1D(
        config["J"],
        config["N"],
        wavelets if isinstance(wavelets, int) else tuple(wavelets),
        config.get("T"),
        config.get("stride"),
        config.get("max_order", 2),
        "array" if config.get("out_type", "array") == "array" else "dict",
        legacy_energy=config.get("legacy_energy", False),
    )
    x = case.inputs["x"].requires_grad_()
    output = module(x)
    if isinstance(output, Tensor):
        return _compare(case, {"S": output}, x)
    return _compare(case, {"_".join(["S", *map(str, path)]): part for path, part in output.items()}, x)


def _morlet_2d(case: Case) -> dict[str, Tensor]:
    case.only("J", "shape", "L", "max_order", "pre_pad", "out_type", *_TOLD)
    config = case.config
    module = Scattering2D(
        config["J"],
        tuple(config["shape"]),
        config.get("L", 8),
        config.get("max_order", 2),
        config.get("pre_pad", False),
        "array" if config.get("out_type", "array") == "array" else "dict",
    )
    x = case.inputs["x"].requires_grad_()
    output = module(x)
    if isinstance(output, Tensor):
        return _compare(case, {"S": output}, x)
    return _compare(case, {"_".join(["S", *map(str, path)]): part for path, part in output.items()}, x)


def _harmonic(case: Case) -> dict[str, Tensor]:
    case.only("J", "shape", "L", "sigma_0", "integral_powers", "max_order", "method", "rotation_covariant", "out_shape")
    config = case.config
    module = HarmonicScattering3D(
        config["J"],
        tuple(config["shape"]),
        config.get("L", 3),
        config.get("sigma_0", 1),
        config.get("max_order", 2),
        config.get("rotation_covariant", True),
        config.get("method", "integral"),
        config.get("integral_powers", (0.5, 1.0, 2.0)),
        legacy_grid=True,
    )
    x = case.inputs["x"].requires_grad_()
    return _compare(case, {"S": module(x)}, x)
