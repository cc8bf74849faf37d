"""Neural operators: their convolutions and integrals, resizing, FNO, LocalNO and U-Net."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.neural_operators.fno import FNOConfig, LocalNOConfig
from convatlas.networks.neural_operators.unet import ModernUNetConfig
from convatlas.nn.attention_integral import AttentionKernelIntegral
from convatlas.nn.conv.derived import originals
from convatlas.nn.conv.disco import DiscreteContinuousConv2d
from convatlas.nn.conv.finite_difference import (
    FiniteDifferenceConv1d,
    FiniteDifferenceConv2d,
    FiniteDifferenceConv3d,
)
from convatlas.nn.conv.spectral_conv import SpectralConv
from convatlas.nn.graph_integral import IntegralTransform
from convatlas.ops.fourier_resize import fourier_resize
from convatlas.ops.neighbours import Neighbours
from golden.cases import Case, renamed

_DIFFERENCES = {1: FiniteDifferenceConv1d, 2: FiniteDifferenceConv2d, 3: FiniteDifferenceConv3d}
_TRUE = {"circular": "periodic", "periodic": "periodic"}


def run(case: Case) -> dict[str, Tensor]:
    for key, make in (
        ("sizes", _resize),
        ("ch_mults", _unet),
        ("transform_type", _graph),
        ("n_heads", _attention),
        ("kernel_shape", _disco),
        ("grid_width", _difference),
        ("diff_layers", _operator),
        ("disco_layers", _operator),
        ("hidden_channels", _operator),
        ("n_modes", _spectral),
    ):
        if key in case.config:
            return make(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know this configuration")


def _is(case: Case, **values: Any) -> None:
    """Refuse options of the reference with another value than the one that is handled."""
    for key, allowed in values.items():
        if key in case.config and case.config[key] not in allowed:
            raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {key} {case.config[key]!r}")


def _results(case: Case, layer: nn.Module, y: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """The output and, where there is a cotangent, the gradients, complex where the reference has complex weights."""
    results = {"y": y, **others}
    if "cotangent" in case.inputs:
        inputs = {"grad_input": case.inputs["x"]} if "x" in case.inputs else {}
        for name, gradient in case.gradients(layer, y, inputs).items():
            key = name.removeprefix("grad_weight_")
            if key in case.weights and case.weights[key].is_complex():
                place, _, part = renamed(layer, key).rpartition(".")
                owner = layer.get_submodule(place)
                parts = (
                    owner.as_spectrum(gradient) if isinstance(owner, SpectralConv) and part == "weight" else gradient
                )
                gradient = torch.view_as_complex(parts.contiguous())
            results[name] = gradient
        for name in case.outputs:  # a kernel with two names has one gradient
            if name not in results and name.endswith(".conv.weight"):
                results[name] = results[name.replace(".conv.weight", ".weight")]
    return {name: results[name] for name in case.outputs}


def _x(case: Case) -> Tensor:
    return case.inputs["x"].requires_grad_("cotangent" in case.inputs)


def _spectral(case: Case) -> dict[str, Tensor]:
    case.only(
        *("in_channels", "out_channels", "n_modes", "grid", "bias", "separable", "max_n_modes", "factorization"),
        *("rank", "resolution_scaling_factor", "output_shape"),
    )
    config = case.config
    options: dict[str, Any] = {}
    if config.get("max_n_modes"):
        # Stored on the last axis as they are given, or half of them, as the tensor says.
        stored = next(value for key, value in case.weights.items() if key.endswith("weight.tensor")).shape[-1]
        options["max_modes"] = (*config["max_n_modes"][:-1], 2 * (stored - 1))
    layer = case.load(
        SpectralConv(
            config["in_channels"],
            config["out_channels"],
            config["n_modes"],
            bias="bias" in case.weights,
            separable=config.get("separable", False),
            factorization=None
            if (config.get("factorization") or "dense").lower() == "dense"
            else config["factorization"].lower(),
            rank=config.get("rank", 0.5),
            resolution_scaling=config.get("resolution_scaling_factor"),
            **options,
        )
    )
    x = _x(case)
    y = layer(x, config.get("output_shape"))
    others = {name: layer(case.inputs.get(f"x{name[1:]}", x[:1])) for name in case.outputs if name.startswith("y_")}
    return _results(case, layer, y, **others)


def _factorization(case: Case) -> Any:
    name = (case.config.get("factorization") or "dense").lower()
    return None if name == "dense" else name


def _difference(case: Case) -> dict[str, Tensor]:
    case.only("in_channels", "out_channels", "n_dim", "kernel_size", "padding", "grid_width", "groups")
    config = case.config
    mode = config.get("padding", "periodic")
    layer = _DIFFERENCES[config.get("n_dim", 2)](
        config["in_channels"],
        config["out_channels"],
        config.get("kernel_size", 3),
        padding=config.get("kernel_size", 3) // 2,
        groups=config.get("groups", 1),
        bias=False,
        padding_mode="circular" if mode == "periodic" else mode,
        grid_width=config["grid_width"],
    )
    case.load(layer)
    results = case.outputs.keys()
    y = layer(_x(case))
    found = _results_without_duplicates(case, layer, y)
    return {name: found[name] for name in results}


def _results_without_duplicates(case: Case, layer: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """The kernel has two names in the reference and one gradient."""
    found: dict[str, Tensor] = {"y": y}
    if "cotangent" in case.inputs:
        found |= case.gradients(layer, y, {"grad_input": case.inputs["x"]})
        (kernel,) = originals(layer)
        found |= dict.fromkeys(("grad_weight_weight", "grad_weight_conv.weight"), kernel.grad)
    return found


def _disco(case: Case) -> dict[str, Tensor]:
    case.only(
        *("in_channels", "out_channels", "in_shape", "out_shape", "kernel_shape", "radius_cutoff", "domain_length"),
        *("groups", "bias", "periodic"),
    )
    config = case.config
    shapes = config["in_shape"], config.get("out_shape", config["in_shape"])
    layer = DiscreteContinuousConv2d(
        config["in_channels"],
        config["out_channels"],
        config["kernel_shape"],
        config["radius_cutoff"],
        domain_length=config.get("domain_length", (2, 2)),
        stride=tuple(n // m for n, m in zip(*shapes, strict=True)),
        groups=config.get("groups", 1),
        bias="bias" in case.weights,
        # The reference pads with zeros whatever it is told.
        periodic=False,
        trim_even=True,
    )
    case.load(layer)
    y = layer(_x(case))
    others = {
        "filter_matrix": layer.filter_matrix(config["in_shape"]).to(y.dtype),
        "weight_shape": torch.tensor(layer.weight.shape),
    }
    return _results(case, layer, y, **others)


def _graph(case: Case) -> dict[str, Tensor]:
    case.only("transform_type", "radius", "channel_mlp_layers", "reduction")
    config = case.config
    layer = IntegralTransform(
        config["channel_mlp_layers"],
        transform_type=config["transform_type"],
        reduction=config.get("reduction", "mean"),
    )
    case.load(layer)
    inputs = case.inputs
    neighbours = Neighbours(inputs["neighbors_index"], inputs["neighbors_row_splits"])
    f = inputs["x"].requires_grad_("cotangent" in inputs) if "x" in inputs else None
    y = layer(inputs["points_in"], neighbours, inputs["points_out"], f, quadrature=inputs.get("weights"))
    return _results(case, layer, y)


def _attention(case: Case) -> dict[str, Tensor]:
    case.only(
        *("in_channels", "out_channels", "n_heads", "head_n_channels", "positional_embedding", "associative"),
        *("project_query",),
    )
    _is(case, positional_embedding=(None, "rotary"), project_query=(True,))
    config = case.config
    layer = AttentionKernelIntegral(
        config["in_channels"],
        config.get("out_channels", config["in_channels"]),
        config["n_heads"],
        config["head_n_channels"],
        position=config.get("positional_embedding"),
        position_dims=case.inputs["pos"].shape[-1],
    )
    case.load(layer)
    weights = case.inputs.get("weights")
    y = layer(_x(case), case.inputs["pos"], weights, associative=config.get("associative", True))
    return _results(case, layer, y)


def _resize(case: Case) -> dict[str, Tensor]:
    case.only("sizes")
    results = {}
    for name in case.outputs:
        kind, _, size = name.partition("_")
        wanted = tuple(int(n) for n in size.split("x"))
        if kind == "y":
            results[name] = fourier_resize(case.inputs["x"], wanted)
        else:
            results[name] = F.interpolate(case.inputs["x"], wanted, mode=kind, align_corners=False)
    return results


_FNO = (
    *("n_modes", "in_channels", "out_channels", "hidden_channels", "lifting_channel_ratio", "projection_channel_ratio"),
    *("n_layers", "positional_embedding", "channel_mlp_skip", "channel_mlp_expansion", "use_channel_mlp", "fno_skip"),
    *("separable", "factorization", "rank", "stabilizer", "norm", "default_in_shape", "diff_layers"),
    *("fin_diff_kernel_size", "mix_derivatives", "disco_layers", "conv_padding_mode", "radius_cutoff"),
    *("disco_kernel_shape", "domain_length", "disco_groups", "disco_bias", "local_no_skip"),
)


def _operator(case: Case) -> dict[str, Tensor]:
    """FNO, and LocalNO where the configuration speaks of its layers."""
    case.only(*_FNO)
    _is(case, positional_embedding=("grid", None), norm=(None,))
    config = case.config
    options: dict[str, Any] = {
        "n_modes": tuple(config["n_modes"]),
        "dims": len(config["n_modes"]),
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "dim": config["hidden_channels"],
        "depth": config.get("n_layers", 4),
        "lifting_ratio": config.get("lifting_channel_ratio", 2),
        "projection_ratio": config.get("projection_channel_ratio", 2),
        "embed_position": config.get("positional_embedding", "grid") is not None,
        "mlp": config.get("use_channel_mlp", True),
        "mlp_expansion": config.get("channel_mlp_expansion", 0.5),
        "mlp_skip": config.get("channel_mlp_skip") or "soft-gating",
        "skip": config.get("fno_skip") or config.get("local_no_skip") or "linear",
        "stabilizer": config.get("stabilizer"),
        "separable": config.get("separable", False),
        "factorization": _factorization(case),
        "rank": config.get("rank", 0.5),
    }
    if "default_in_shape" not in config:
        model = FNOConfig(**options).build()
    else:
        model = LocalNOConfig(
            **options,
            resolution=tuple(config["default_in_shape"]),
            disco_layers=_flags(config.get("disco_layers", True)),
            disco_kernel_shape=tuple(config.get("disco_kernel_shape", (2, 4))),
            radius_cutoff=config.get("radius_cutoff") or 0.03125,
            domain_length=tuple(config.get("domain_length", (2, 2))),
            disco_groups=config.get("disco_groups", 1),
            disco_bias=config.get("disco_bias", True),
            diff_layers=_flags(config.get("diff_layers", True)),
            diff_kernel_size=config.get("fin_diff_kernel_size", 3),
            diff_padding=_TRUE.get(mode := config.get("conv_padding_mode", "periodic"), mode),
            mix_derivatives=config.get("mix_derivatives", True),
        ).build()
    return _each_resolution(case, model)


def _flags(value: bool | list[bool]) -> bool | tuple[bool, ...]:
    return value if isinstance(value, bool) else tuple(value)


def _each_resolution(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """The network on every input; gradients, where there are any, on the one called x."""
    case.load(model)
    results = {f"y{name[1:]}": model(x) for name, x in case.inputs.items() if name.startswith("x")}
    if "cotangent" not in case.inputs:
        return {name: results[name] for name in case.outputs}
    y = model(_x(case))
    return _results(case, model, y, **{name: value for name, value in results.items() if name != "y"})


def _unet(case: Case) -> dict[str, Tensor]:
    case.only(
        *("base_res", "interpolation", "n_input_scalar_components", "n_input_vector_components"),
        *("n_output_scalar_components", "n_output_vector_components", "time_history", "time_future"),
        *("hidden_channels", "activation", "kernel_size", "ch_mults", "is_attn", "num_groups", "positional_embedding"),
        *("mid_attn", "n_blocks", "norm"),
    )
    config = case.config
    _is(case, activation=("gelu",), mid_attn=(False,), norm=(False, None), positional_embedding=("grid", None))
    if any(config.get("is_attn", ())):
        raise KeyError(f"{case.system}/{case.name}: the adapter handles no attention in the U-Net")
    channels = {
        way: config.get(f"n_{kind}_scalar_components", 1) + 2 * config.get(f"n_{kind}_vector_components", 0)
        for way, kind in (("in", "input"), ("out", "output"))
    }
    model = ModernUNetConfig(
        in_channels=channels["in"] * config.get("time_history", 1),
        out_channels=channels["out"] * config.get("time_future", 1),
        dim=config["hidden_channels"],
        dim_mults=tuple(config["ch_mults"]),
        depth=config.get("n_blocks", 2),
        kernel_size=config.get("kernel_size", 9),
        embed_position=config.get("positional_embedding", "grid") is not None,
        follow_grid="base_res" in config,
        resolution=config.get("base_res", 64),
        interpolation=config.get("interpolation", "bilinear"),
    ).build()
    return _each_resolution(case, model)
