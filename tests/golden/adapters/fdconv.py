"""FDConv: the layer, frequency band modulation alone, and the conversion of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.nn.conv.fdconv import FDConv2d, fourier_weight
from convatlas.nn.conv.frequency_modulation import FrequencyBandModulation
from golden.cases import Case, renamed

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
#: Option of the reference -> ours.
_OPTIONS = {
    "kernel_num": "kernel_num",
    "param_ratio": "param_ratio",
    "param_reduction": "param_reduction",
    "use_ksm_local": "ksm_local",
    "reduction": "reduction",
    "att_multi": "factor",
    "ksm_global_act": "act",
    "ksm_local_act": "local_act",
    "act_type": "act",
    "kernel_temp": "kernel_temperature",
    "temp": "temperature",
    "ksm_only_kernel_att": "only_kernels",
}
_FBM = {"k_list": "bands", "lowfreq_att": "weigh_lowest", "spatial_group": "groups", "act": "act"}
#: Options of the frequency band modulation that have one value.
_FIXED_FBM = {"fs_feat": "feat", "spatial": "conv", "spatial_kernel": 3, "init": "zero", "global_selection": False}


def run(case: Case) -> dict[str, Tensor]:
    cls = case.config.get("cls", "")
    if cls == "FrequencyBandModulation":
        return _fbm(case)
    if cls == "FDConv":
        return _layer(case)
    if "weight" in case.inputs:
        case.only("op", "in_channels", "out_channels", "kernel_size", "param_ratio")
        spectrum = fourier_weight(case.inputs["weight"])
        return {"dft_weight": spectrum.expand(case.config.get("param_ratio", 1), *spectrum.shape)}
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know what this is")


def _bands(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    for key, value in config.items():
        if key not in _FBM and _FIXED_FBM.get(key) != value:
            raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {key} = {value!r}")
    return {_FBM[key]: value for key, value in config.items() if key in _FBM}


def _fbm(case: Case) -> dict[str, Tensor]:
    case.only("cls", "in_channels", *_FBM, *_FIXED_FBM)
    config = {key: value for key, value in case.config.items() if key not in ("cls", "in_channels")}
    return _compare(case, FrequencyBandModulation(case.config["in_channels"], **_bands(case, config)))


def _layer(case: Case) -> dict[str, Tensor]:
    names = ("cls", "branch", "use_fdconv_if_c_gt", "use_fdconv_if_k_in", "use_fbm_if_k_in", "fbm_cfg", "mode")
    case.only(*names, "convert_param", *_GEOMETRY, *_OPTIONS)
    config = case.config
    place = {key: config[key] for key in _GEOMETRY if key in config}
    size = place["kernel_size"] if isinstance(place["kernel_size"], int) else place["kernel_size"][0]
    smallest = min(place["in_channels"], place["out_channels"])
    if smallest <= config.get("use_fdconv_if_c_gt", 16) or size not in config.get("use_fdconv_if_k_in", (1, 3)):
        return _compare(case, nn.Conv2d(**place))
    options = {ours: config[name] for name, ours in _OPTIONS.items() if name in config}
    if options.get("act", "sigmoid") == "tanh":
        options.setdefault("kernel_act", "tanh")
    bands = {"bands": (2, 4, 8), **_bands(case, config.get("fbm_cfg", {}))}
    modulated = size in config.get("use_fbm_if_k_in", (3,))
    layer = FDConv2d(
        **place,
        **options,
        fbm=bands["bands"] if modulated else None,
        fbm_groups=bands.get("groups", 1),
        fbm_lowest=bands.get("weigh_lowest", False),
        fbm_act=bands.get("act", "sigmoid"),
    )
    if "indices" in case.outputs:  # which frequencies a kernel holds belongs to the checkpoint
        case.weights["indices"] = case.outputs["indices"]
    results = _compare(case, layer, training=config.get("mode") == "train")
    if "indices" in case.outputs:
        results["indices"] = _in_their_groups(layer, case.outputs["indices"])
    return results


def _in_their_groups(layer: FDConv2d, indices: Tensor) -> Tensor:
    """The given frequencies where they are in the group under whose number they stand, else -1."""
    found = torch.equal(layer.groups, layer.groups_of(indices).to(layer.groups.dtype))
    return indices if found else torch.full_like(indices, -1)


def _compare(case: Case, layer: nn.Module, *, training: bool = False) -> dict[str, Tensor]:
    case.load(layer).train(training)
    x = case.inputs["x"].requires_grad_()
    output = layer(x)
    results = {"output": output}
    if "cotangent" in case.inputs:
        (output * case.inputs["cotangent"]).sum().backward()
        results["grad_input"] = x.grad
        parameters = dict(layer.named_parameters())
        for key in case.weights:
            if (ours := renamed(layer, key)) in parameters:
                results[f"grad_weight_{key}"] = parameters[ours].grad
    return {name: results[name] for name in case.outputs if name in results}
