"""SGConv: the layer with its kernel, its norm and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from convatlas.nn.mixers.sgconv import SGConv1d
from convatlas.nn.sgconv_kernel import SGConvKernel
from golden.cases import Case

_ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((None, "id", "identity", "linear"), lambda x: x),
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "softplus": F.softplus,
    **dict.fromkeys(("silu", "swish"), F.silu),
}
_WORDS = {"cat", "sum", "randn", "cos", "learnable", "fixed", "nearest", "linear"}


def run(case: Case) -> dict[str, Tensor]:
    case.only(
        *("d_model", "l_max", "kernel_dim", "n_scales", "init_scale", "decay_min", "decay_max", "mode", "channels"),
        *("bidirectional", "activation", "postact", "ln", "linear", "dropout", "transposed", "hyper_act", "L"),
    )
    layer = SGConv1d(case.config["d_model"], case.config["l_max"], **_options(case))
    kernel = layer.kernel
    assert isinstance(kernel, SGConvKernel)
    case.load(layer)
    u = case.inputs["u"].requires_grad_("cotangent" in case.inputs)
    length = u.shape[-1 if layer.layout == "bhl" else 1]
    results = {"y": layer(u), "kernel_norm": kernel.kernel_norm}
    merged = layer.materialize(length)
    results["kernel"] = F.pad(merged, (0, max(length - merged.shape[-1], 0)))
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, results["y"], {"grad_input": u})
    if "u2" in case.inputs:
        results["y2"] = layer(case.inputs["u2"])
    return {name: results[name] for name in case.outputs}


def _options(case: Case) -> dict[str, Any]:
    config = case.config
    words = config.get("mode", "cat_randn").split("_")
    if set(words) - _WORDS or config.get("hyper_act"):
        raise KeyError(f"{case.system}/{case.name}: the adapter handles no mode {words}, nor hyper_act")
    glu = config.get("postact") == "glu"
    post_act = _ACTS[config["postact"]] if config.get("postact") and not glu else None
    options = {
        "num_scales": config.get("n_scales"),
        "init_scale": config.get("init_scale", 0),
        "decay": (config.get("decay_min", 2), config.get("decay_max", 2)),
        "mode": "sum" if "sum" in words else "cat",
        "init": "cos" if "cos" in words else "randn",
        "interpolation": "nearest" if "nearest" in words else "linear",
        "learnable_decay": ("fixed" if "fixed" in words else "trained") if "learnable" in words else None,
        "heads": config.get("channels", 1),
        "act": _ACTS[config.get("activation", "gelu")],
        "post_act": "glu" if glu else post_act,
        "norm": config.get("ln", False),
        "layout": "bhl" if config.get("transposed", True) else "blh",
    }
    same = ("kernel_dim", "bidirectional", "linear", "dropout")
    return options | {name: config[name] for name in same if config.get(name) is not None}
