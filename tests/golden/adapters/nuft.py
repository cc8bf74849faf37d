"""Transforms of simplex meshes and their rasters."""

from __future__ import annotations

import torch
from torch import Tensor

from convatlas.ops.simplex_fourier import as_real_pairs, rasterize, simplex_fourier
from golden.cases import Case

#: The reference scales by the resolution of the first axis.
_MODES = {"mass": "mass", "density": "first_axis_density"}


def run(case: Case) -> dict[str, Tensor]:
    case.only("res", "t", "j", "mode", "smoothing_sigma", "boundary")
    config = case.config
    elements = case.inputs["E"]
    vertices, densities = case.inputs["V"].requires_grad_(), case.inputs["D"].requires_grad_()
    boundary = config.get("boundary", elements.shape[1] == config["j"])
    period = config.get("t", 1)
    spectrum = simplex_fourier(
        vertices,
        elements,
        densities,
        config["res"],
        period,
        _MODES[config.get("mode", "density")],
        boundary,
        None if case.dtype == torch.float64 else torch.float32,
    )
    results = {"F": as_real_pairs(spectrum)}
    if config.get("smoothing_sigma") is not None:
        results["raster"] = rasterize(spectrum, config["res"], sigma=config["smoothing_sigma"]).movedim(0, -1)
    elif "raster" in case.outputs:
        results["raster"] = rasterize(spectrum, config["res"], "none").movedim(0, -1)
    if "cotangent" in case.inputs:
        (results["F"] * case.inputs["cotangent"]).sum().backward()
        results |= {"grad_V": vertices.grad, "grad_D": densities.grad}
    return {name: results[name] for name in case.outputs}
