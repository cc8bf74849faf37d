"""E-3DSNN: sparse convolutions, the integer neuron, grid sampling, the classifier and the segmenter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.networks.e3dsnn.points import E3DSNN, E3DSNNClassifierConfig, E3DSNNSegmenterConfig
from convatlas.nn.conv import sparse as layers
from convatlas.nn.conv.sparse import SparseSequential, from_spconv, to_spconv
from convatlas.nn.spiking import IntegerLIF, firing_rates
from convatlas.ops.point_grid import fnv_keys, grid_sample, ravel_keys
from convatlas.ops.sparse import SparseTensor
from convatlas.weights import load_weights
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "stem.0.weight" in case.weights:
        return _network(case)
    kinds = {"op": _operator, "D": _neuron, "grid_size": _grid}
    for key, kind in kinds.items():
        if key in case.config:
            return kind(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know what to build")


# -- operators ---------------------------------------------------------------------------------------------------------

_KEYS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "bias", "mid_channels")


def _operator(case: Case) -> dict[str, Tensor]:
    case.only("op", "spatial_shape", "batch_size", "output_padding", *_KEYS)
    model = _layers(case.config).to(case.dtype)
    if case.weights:
        load_weights(model, from_spconv(model, case.weights))
    config, inputs = case.config, case.inputs
    features = inputs["features"].requires_grad_()
    x = SparseTensor(features, inputs["indices"], tuple(config["spatial_shape"]), config["batch_size"])
    y = model(x)
    expected = case.outputs["indices"]
    order = _in_order_of(y.indices, expected)
    output = y.features[order]
    results = {"features": output, "indices": y.indices[order], "spatial_shape": torch.tensor(y.spatial_shape)}
    if "cotangent" in inputs:
        (output * inputs["cotangent"]).sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = to_spconv(model, {name: grad for name, grad in found.items() if grad is not None})
        results |= {f"grad_weight_{name.replace('.', '_')}": grad for name, grad in gradients.items()}
        results["grad_features"] = features.grad
    return results


def _layers(config: dict[str, Any]) -> SparseSequential:
    dims = len(config["spatial_shape"])
    sizes = {key: _size(config[key]) for key in ("kernel_size", "stride", "padding", "dilation") if key in config}
    kind, bias, last = config["op"], config.get("bias", True), config["out_channels"]
    made: list[nn.Module]
    if kind == "inverse":
        first = config["mid_channels"]
        made = [
            _kind("SparseConv", dims)(config["in_channels"], first, **sizes, bias=bias, indice_key="down"),
            _kind("SparseInverseConv", dims)(first, last, sizes["kernel_size"], "down", bias=bias),
        ]
        return SparseSequential(*made)
    if config.get("mid_channels") is not None:
        raise KeyError(f"mid_channels belongs to an inverse convolution, not to {kind}")
    if kind == "maxpool":
        return SparseSequential(_kind("SparseMaxPool", dims)(**sizes))
    names = {"subm": "SubMConv", "sparse": "SparseConv", "transpose": "SparseConvTranspose"}
    if kind == "subm":
        sizes.pop("padding", None)  # the reference centres the kernel whatever is asked for
    if "output_padding" in config:
        sizes["output_padding"] = _size(config["output_padding"])
    return SparseSequential(_kind(names[kind], dims)(config["in_channels"], last, **sizes, bias=bias))


def _kind(name: str, dims: int) -> Any:
    return getattr(layers, f"{name}{dims}d")


def _size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _in_order_of(indices: Tensor, expected: Tensor) -> Tensor:
    """Where each expected place stands among the found ones; all of these where they are others."""
    rows = {tuple(place): row for row, place in enumerate(indices.tolist())}
    wanted = [tuple(place) for place in expected.tolist()]
    same = len(wanted) == len(rows) and all(place in rows for place in wanted)
    return torch.tensor([rows[place] for place in wanted] if same else range(len(indices)))


# -- neuron and grid ---------------------------------------------------------------------------------------------------


def _neuron(case: Case) -> dict[str, Tensor]:
    case.only("D")
    x = case.inputs["x"].requires_grad_()
    spikes = IntegerLIF(max_spikes=case.config["D"])(x)
    (spikes * case.inputs["cotangent"]).sum().backward()
    return {"spike": spikes, "grad_x": x.grad}


def _grid(case: Case) -> dict[str, Tensor]:
    case.only("grid_size", "hash_type", "mode")
    if case.config["mode"] != "test":
        raise KeyError(f"{case.system}/{case.name}: random points of a training cannot be compared")
    sampled = grid_sample(case.inputs["coord"], case.config["grid_size"], keys=case.config["hash_type"])
    fragments = list(sampled.fragments())
    return {
        "fnv_hash_bits_int64": fnv_keys(sampled.cells),
        "ravel_hash": ravel_keys(sampled.cells),
        "grid_coord_all": sampled.cells,
        "n_voxels": torch.tensor(len(sampled.counts)),
        "parts": torch.tensor(len(fragments)),
        "part0_index_sorted": fragments[0].sort().values,
    }


# -- networks ----------------------------------------------------------------------------------------------------------

#: Options of the reference that change nothing.
_IDLE = ("groups", "dec_depth", "point_grid_size", "enc_num_ref")


def _network(case: Case) -> dict[str, Tensor]:
    case.only("in_channels", "num_classes", "embed_channels", "enc_channels", "enc_depth", "dec_channels", *_IDLE)
    config, inputs = case.config, case.inputs
    common = {
        "in_channels": config["in_channels"],
        "num_classes": config["num_classes"],
        "embed_dim": config["embed_channels"],
        "dims": tuple(config["enc_channels"]),
        "depths": tuple(config["enc_depth"]),
    }
    if "dec.0.up.1.weight" in case.weights:
        made: Any = E3DSNNSegmenterConfig(**common, decoder_dims=tuple(config["dec_channels"]))
    else:
        made = E3DSNNClassifierConfig(**common)
    model = case.load(made.build())
    assert isinstance(model, E3DSNN)
    x = model.voxels(inputs["grid_coord"], inputs["feat"], inputs["batch"])
    rates = firing_rates(model, x)
    return {"logits": model(x), "firing": torch.tensor(list(rates.values()), dtype=torch.float64)}
