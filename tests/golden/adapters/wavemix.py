"""WaveMix: wavelet transforms, the blocks of every level, classifier, segmenter, super-resolution."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from convatlas.networks.wavemix import (
    WaveMix,
    WaveMixConfig,
    WaveMixSegmenter,
    WaveMixSegmenterConfig,
    WaveMixSR,
    WaveMixSRConfig,
)
from convatlas.nn.mixers.wavemix import WaveMixBlock, WaveMixBlockV1, WaveMixBlockV3
from convatlas.ops.wavelets import wavedec, waverec
from golden.cases import Case

#: The bands of an image as the reference orders them: LH is smooth along the width, which is our third.
_ORDER = [1, 0, 2]
_NAMES = {
    "num_classes": "num_classes",
    "depth": "depth",
    "mult": "mult",
    "ff_channel": "ff_channels",
    "final_dim": "dim",
    "level": "level",
    "patch_size": "patch_size",
    "stride": "stride",
    "initial_conv": "stem",
}


def run(case: Case) -> dict[str, Tensor]:
    cls = case.config["cls"]
    if "DWT" in cls:
        return _transform(case)
    if re.search("block", cls, re.IGNORECASE):
        return _compare(case, _block(case))
    return _compare(case, _network(case))


def _compare(case: Case, model: nn.Module) -> dict[str, Tensor]:
    case.load(model)
    x = case.inputs["x"]
    if "cotangent" not in case.inputs:
        return {"output": model(x)}
    output = model(x.requires_grad_())
    found = {"output": output, **case.gradients(model, output, {"grad_input": x})}
    return {name: found[name] for name in case.outputs}


def _transform(case: Case) -> dict[str, Tensor]:
    case.only("cls", "J", "wave", "mode")
    config = case.config
    wavelet, mode, levels = config.get("wave", "db1"), config.get("mode", "zero"), config.get("J", 1)
    mode = {"replicate": "constant"}.get(mode, mode)
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs.items() if "cotangent" not in name}
    if "Inverse" in config["cls"]:
        highs = [_ours(inputs[f"high{level}"], inputs["low"].dim()) for level in range(levels)]
        results = {"output": waverec((inputs["low"], highs), wavelet, mode)}
        if "x" in case.outputs:
            results = {"x": results["output"]}
    else:
        low, bands = wavedec(inputs["x"], wavelet, mode, levels)
        results = {"low": low} | {f"high{level}": _theirs(high) for level, high in enumerate(bands)}
    cotangents = {name.removeprefix("cotangent_"): value for name, value in case.inputs.items() if "cotangent" in name}
    if cotangents:
        only = next(iter(results))
        total = sum((results[name if name in results else only] * value).sum() for name, value in cotangents.items())
        total.backward()
        for name, tensor in inputs.items():
            results["grad_input" if name == "x" else f"grad_{name}"] = tensor.grad
    return {name: results[name] for name in case.outputs}


def _theirs(high: Tensor) -> Tensor:
    return high[:, :, _ORDER] if high.dim() == 5 else high[:, :, 0]


def _ours(high: Tensor, dims: int) -> Tensor:
    return high[:, :, _ORDER] if dims == 4 else high.unsqueeze(2)


def _block(case: Case) -> nn.Module:
    case.only("cls", "final_dim", "ff_channel", "dropout", "mult", "level")
    config, kind = case.config, WaveMixBlock
    options: dict[str, Any] = {"mult": config.get("mult", 2)}
    if match := re.search(r"[Ll]evel(\d)", config["cls"]):
        options["level"] = int(match[1])
    elif "V3" in config["cls"]:
        kind = WaveMixBlockV3
    elif "V1" in config["cls"]:
        kind = WaveMixBlockV1
    else:
        options["level"] = config["level"]
    if "ff_channel" in config and kind is not WaveMixBlockV3:
        options["ff_channels"] = config["ff_channel"]
    return kind(config.get("final_dim", case.inputs["x"].shape[1]), **options)


def _network(case: Case) -> nn.Module:
    case.only("cls", *_NAMES, "dropout")
    cls, config = case.config["cls"], case.config
    options = {_NAMES[key]: value for key, value in config.items() if key in _NAMES}
    options["in_channels"] = case.inputs["x"].shape[1]
    if "sisr" in cls or "SR" in cls:
        return WaveMixSR(WaveMixSRConfig().override(**options))
    if "stem" not in options:
        strided = "conv.2.weight" not in case.weights
        options["stem"] = "strided" if strided else "patchify"
    if "Segment" in cls:
        options = {"dim": 256, "level": 4, "stride": 2, **options}
        names = [name for name in sorted(case.weights) if re.match(r"(expand|pool)\.[01]\.weight$", name)]
        heads = [case.weights[name].shape[1] for name in names]
        return WaveMixSegmenter(WaveMixSegmenterConfig().override(head_channels=heads, **options))
    return WaveMix(WaveMixConfig().override(**options))
