"""Transform Once: the cosine transform, T1, T1+ and their baselines, losses among the modes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convatlas.networks.base import FieldNetworkConfig
from convatlas.networks.transform_once.fno import FNOConfig
from convatlas.networks.transform_once.t1 import T1Config
from convatlas.networks.transform_once.t1u import T1PlusConfig
from convatlas.ops.dct import dct, idct
from convatlas.ops.forecast_errors import spectral_mse, spectral_relative_l2
from convatlas.ops.relative_error import relative_l2
from golden.cases import Case

#: By the number of the reference.
INITIALISATIONS = {1: "naive", 2: "vp", 3: "zero", 4: "fan_in"}
SPECTRAL_LAYERS = {"DFTConv": "dft", "DCTConv": "dct"}


def run(case: Case) -> dict[str, Tensor]:
    if not case.weights:
        case.only()
        return _losses(case) if "pred" in case.inputs else _transforms(case)
    if any(key.startswith("dfpnet") for key in case.weights):
        return _network(case, _t1_plus(case))
    if "layers.0.ch_mixing_1" in case.weights:
        return _network(case, _t1(case))
    if any(key.startswith("layers.0.conv.weights") for key in case.weights):
        return _network(case, _fno(case))
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know these weights")


def _transforms(case: Case) -> dict[str, Tensor]:
    results = {}
    for name in case.outputs:
        kind, _, rest = name.partition("dct")
        axes, _, norm = rest.partition("_")
        if kind not in ("", "i") or axes not in ("1", "2", "3") or norm not in ("", "unnorm"):
            raise KeyError(f"{case.system}/{case.name}: the adapter does not know the output {name}")
        transform = idct if kind else dct
        places = range(-int(axes), 0)
        results[name] = transform(case.inputs[f"x{axes}"], tuple(places), norm=None if norm else "ortho")
    return results


def _losses(case: Case) -> dict[str, Tensor]:
    prediction, target = case.inputs["pred"], case.inputs["target"]
    modes, fields = prediction.unsqueeze(1), target.unsqueeze(1)
    known = {
        "rel_l2": lambda: relative_l2(prediction, target).mean(),
        "rel_l2_dct": lambda: spectral_relative_l2(modes, fields).mean(),
        "mse_dct": lambda: spectral_mse(modes, fields).mean(),
    }
    return {name: known[name]() for name in case.outputs}


def _network(case: Case, config: FieldNetworkConfig) -> dict[str, Tensor]:
    model = case.load(config.build())
    given = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    output = model(given if given.dim() == config.dims + 2 else given.unsqueeze(1))
    output = output.squeeze(1) if config.out_channels == 1 else output
    results = {"y": output}
    if "cotangent" in case.inputs:
        results |= case.gradients(model, output, {"grad_input": given})
    return {name: results[name] for name in case.outputs}


def _common(case: Case) -> dict[str, Any]:
    """Channels and grid; the grid is that of the input, as only initial values depend on the reference's setting."""
    config = case.config
    resolution = config["signal_resolution"]
    dims = len(resolution) if isinstance(resolution, list) else 1
    return {
        "in_channels": config.get("in_channels", 1),
        "out_channels": config.get("out_channels", 1),
        "dims": dims,
        "resolution": tuple(case.inputs["x"].shape[-dims:]),
    }


def _spectral(case: Case) -> dict[str, Any]:
    config = case.config
    return {
        **_common(case),
        "transform": config.get("transform", "dct"),
        "act": config.get("act", "gelu"),
        "residual": config.get("residual", True),
        "keep_high": config.get("keep_high", False),
        "padding": config.get("padding", 0),
        "init": INITIALISATIONS[config.get("weight_init", 2)],
        "output_space": "grid" if config.get("perform_inverse", True) else "modes",
        "crop": False,
    }


def _t1(case: Case) -> T1Config:
    known = ("modes", "modes1", "modes2", "modes3", "width", "signal_resolution", "in_channels", "out_channels")
    case.only(
        *(*known, "nlayers", "padding", "perform_inverse", "act", "keep_high", "residual", "transform", "weight_init")
    )
    weight = case.weights["layers.0.ch_mixing_1"]
    common = _spectral(case)
    return T1Config(
        **common,
        modes=tuple(weight.shape[2 : 2 + common["dims"]]),
        width=case.config["width"],
        depth=case.config["nlayers"],
    )


def _t1_plus(case: Case) -> T1PlusConfig:
    known = ("modes", "signal_resolution", "in_channels", "out_channels", "channel_exponent", "perform_inverse")
    case.only(*(*known, "act", "transform", "padding", "keep_high", "residual", "weight_init"))
    return T1PlusConfig(
        **_spectral(case),
        modes=case.config["modes"],
        channel_exponent=case.config["channel_exponent"],
        op_layer=any(key.startswith("op_layer") for key in case.weights),
    )


def _fno(case: Case) -> FNOConfig:
    known = ("modes", "modes1", "modes2", "modes3", "width", "signal_resolution", "in_channels", "out_channels")
    case.only(*(*known, "nlayers", "residual", "conv_residual", "act", "weight_init", "spectral_layer"))
    config, common = case.config, _common(case)
    layer = config.get("spectral_layer", "DFTConv").rpartition(".")[2].rstrip("123d")
    shape = case.weights["layers.0.conv.weights1"].shape
    return FNOConfig(
        **common,
        modes=tuple(shape[2 : 2 + common["dims"]]),
        width=config["width"],
        depth=config["nlayers"],
        transform=SPECTRAL_LAYERS[layer],
        act=config.get("act", "gelu"),
        residual=config.get("residual", True),
        conv_residual=config.get("conv_residual", True),
        init=INITIALISATIONS[config.get("weight_init", 1)],
    )
