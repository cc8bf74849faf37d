"""Conv-TasNet: networks of three codes with their gradients, and losses and measures of separation."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from convatlas.networks.conv_tasnet.checkpoints import asteroid_config, kaituoxu_config
from convatlas.networks.conv_tasnet.network import ConvTasNet, ConvTasNetConfig
from convatlas.nn.separation_losses import PITLoss, SignalRatioLoss
from convatlas.ops.separation_quality import bss_eval_sources, sdr_improvement
from convatlas.ops.signal_ratios import si_snr_improvement
from golden.cases import Case

#: What the codes call the output of the encoder, and the masks.
_FEATURES, _MASKS = ("encoded", "tf_rep", "mixture_w", "enc_output"), ("mask", "masks", "est_mask")
_RATIOS = {"sisdr": "si_snr", "sdsdr": "sd_sdr", "snr": "snr"}


def run(case: Case) -> dict[str, Tensor]:
    if "enc_dim" in case.config:
        results = _network(case, _naplab(case))
    elif "mask_nonlinear" in case.config:
        case.only("N", "L", "B", "H", "P", "X", "R", "C", "norm_type", "causal", "mask_nonlinear")
        results = _network(case, kaituoxu_config(case.config))
    elif "n_filters" in case.config:
        results = _network(case, asteroid_config(case.config))
    else:
        case.only("T", "n_src", "note")
        results = {name: _measure(case, name) for name in case.outputs}
    return results


def _naplab(case: Case) -> dict[str, Any]:
    case.only("enc_dim", "feature_dim", "sr", "win", "layer", "stack", "kernel", "num_spk", "causal")
    config = case.config
    size = config["sr"] * config["win"] // 1000
    return {
        "num_filters": config["enc_dim"],
        "kernel_size": size,
        "stride": size // 2,
        "bottleneck_channels": config["feature_dim"],
        "hidden_channels": 4 * config["feature_dim"],
        "skip_channels": config["feature_dim"],
        "num_blocks": config["layer"],
        "num_repeats": config["stack"],
        "conv_kernel_size": config["kernel"],
        "num_sources": config["num_spk"],
        "causal": config["causal"],
        "norm": "cumulative" if config["causal"] else "global",
        "ends": "padded",
        "sample_rate": config["sr"],
    }


def _network(case: Case, fields: dict[str, Any]) -> dict[str, Tensor]:
    model: nn.Module = ConvTasNet(ConvTasNetConfig(**fields))
    case.load(model)
    x = case.inputs["mixture"].requires_grad_("cotangent" in case.inputs)
    sources = model(x)
    results = {"sources": sources}
    if {*_FEATURES, *_MASKS} & case.outputs.keys():
        features = model.encode(x)
        results |= dict.fromkeys(_FEATURES, features) | dict.fromkeys(_MASKS, model.separator(features))
    if "cotangent" in case.inputs:
        results |= case.gradients(model, sources, dict.fromkeys(("grad_input", "grad_mixture"), x))
    return {name: results[name] for name in case.outputs}


def _measure(case: Case, name: str) -> Tensor:
    if name.startswith("masked"):
        padded = next(key for key in case.inputs if key.endswith("_padded"))
        estimates = case.inputs[padded.replace("ref", "est").removesuffix("_padded")]
        found = PITLoss().match(estimates, case.inputs[padded], case.inputs["lengths"])
        return found.loss if name == "masked_loss" else -found.losses[:, None]
    if match := re.fullmatch(r"(bss_(sdr|sir|sar|perm)|sdri)_(\d+)", name):
        few = min(case.config["n_src"])
        estimates, references = (case.inputs[f"{key}{few}"][int(match[3])] for key in ("est", "ref"))
        if match[1] == "sdri":
            return sdr_improvement(estimates, references, references.sum(0))
        quality = bss_eval_sources(estimates, references)
        return quality.order if match[2] == "perm" else getattr(quality, match[2])
    kind, count = name.rsplit("_", 1)
    estimates, references = case.inputs[f"est{count}"], case.inputs[f"ref{count}"]
    if kind == "sisnri":
        ordered = PITLoss().match(estimates, references).estimates
        return si_snr_improvement(ordered, references, references.sum(1))
    if kind == "reordered":
        return PITLoss().match(estimates, references).estimates
    what, ratio = kind.split("_", 1)
    zero_mean = not ratio.endswith("_nozeromean")
    loss = SignalRatioLoss(_RATIOS[ratio.removesuffix("_nozeromean")], zero_mean=zero_mean)
    if what == "pw":
        return loss(estimates, references)
    if what == "multisrc":
        return loss.in_order(estimates, references)
    return PITLoss(loss)(estimates, references)
