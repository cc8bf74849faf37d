"""HorNet: the recursive gated convolution, the global-local filter, the network and its feature pyramid."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor, nn

from convatlas.networks.hornet import GatedConvModule, HorFPN, HorNet, HorNetConfig
from convatlas.nn.mixers.gnconv import GlobalLocalFilter, RecursiveGatedConv
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    makers = {
        "gnconv": _gnconv,
        "GlobalLocalFilter": _filter,
        "HorNet": _network,
        "GNFPN": _pyramid,
        "GNConvModule": _module,
    }
    cls = case.config["cls"].split(".")[-1]
    if cls not in makers:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know {cls}")
    return makers[cls](case)


def _layer(case: Case, layer: nn.Module) -> dict[str, Tensor]:
    case.load(layer)
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    output = layer(x)
    results = {"output": output}
    if "cotangent" in case.inputs:
        results |= case.gradients(layer, output, {"grad_input": x})
    return {name: results[name] for name in case.outputs}


def _gnconv(case: Case) -> dict[str, Tensor]:
    case.only("cls", "dim", "order", "gflayer", "h", "w", "s")
    config = case.config
    grid = (config.get("h", 14), config.get("w", 8))
    make = partial(GlobalLocalFilter, grid=grid) if config.get("gflayer") else None
    scale = float(Fraction(config.get("s", 1)))
    return _layer(case, RecursiveGatedConv(config["dim"], order=config.get("order", 5), scale=scale, make_filter=make))


def _filter(case: Case) -> dict[str, Tensor]:
    case.only("cls", "dim", "h", "w")
    return _layer(case, GlobalLocalFilter(case.config["dim"], (case.config.get("h", 14), case.config.get("w", 8))))


def _network(case: Case) -> dict[str, Tensor]:
    case.only("cls", "orders", "gf_hw", "s", "depths", "base_dim", "num_classes", "in_chans", "layer_scale_init_value")
    config = case.config
    ours = HorNetConfig(
        depths=tuple(config["depths"]),
        base_dim=config["base_dim"],
        orders=tuple(config["orders"]),
        scale=float(Fraction(config.get("s", "1/3"))),
        filter_grids=tuple(None if grid is None else tuple(grid) for grid in config["gf_hw"]),
        in_channels=config.get("in_chans", 3),
        num_classes=config.get("num_classes", 1000),
        dense="norm0.weight" in case.weights,
    )
    model = case.load(HorNet(ours))
    features = model.forward_features(case.inputs["x"])
    results = {f"stage{index}": feature for index, feature in enumerate(features)}
    results["logits"] = model.forward_head(features[-1])
    return {name: results[name] for name in case.outputs}


def _options(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    known = {"kernel_size", "type", "proj_out", "order", "dim_ratio", "h", "w", "norm_cfg", "act_cfg"}
    if left := set(config) - known:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {sorted(left)}")
    if config.get("norm_cfg") or config.get("act_cfg"):
        raise KeyError(f"{case.system}/{case.name}: the adapter handles no norm and activation")
    options = {"kernel_size": config.get("kernel_size", 7), "order": config.get("order", 2)}
    options |= {"dim_ratio": config.get("dim_ratio", 1), "project_out": config.get("proj_out", True)}
    if config.get("type", "gnconv") == "gngf":
        height = config.get("h", 32)
        options["make_filter"] = partial(GlobalLocalFilter, grid=(height, config.get("w", height // 2 + 1)))
    return options


def _pyramid(case: Case) -> dict[str, Tensor]:
    case.only("cls", "in_channels", "out_channels", "num_outs", "gn_conv_cfg")
    config = case.config
    options = _options(case, config["gn_conv_cfg"])
    model = case.load(HorFPN(config["in_channels"], config["out_channels"], num_outs=config.get("num_outs"), **options))
    maps = [case.inputs[f"x{index}"] for index in range(len(config["in_channels"]))]
    return {f"p{index}": level for index, level in enumerate(model(maps))}


def _module(case: Case) -> dict[str, Tensor]:
    config = {key: value for key, value in case.config.items() if key not in ("cls", "in_channels", "out_channels")}
    options = _options(case, config)
    return _layer(case, GatedConvModule(case.config["in_channels"], case.config["out_channels"], **options))
