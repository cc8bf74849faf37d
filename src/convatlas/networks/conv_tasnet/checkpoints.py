"""How checkpoints of Conv-TasNet by several codes map to this library's, and which network each belongs to.

Layouts of asteroid (Pariente et al., Interspeech 2020), of the first author's group (naplab), of kaituoxu's code for
the first version of the paper, and of torchaudio. The last one was not tried on a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.errors import CheckpointError
from convatlas.weights import Checkpoint, Layout

__all__ = ["LAYOUTS", "asteroid_config", "describe", "kaituoxu_config"]

#: asteroid's names of norms.
_ASTEROID_NORMS = {
    "gLN": "global",
    "cgLN": "cumulative",
    "cLN": "frame",
    "fgLN": "feature",
    "bN": "batch",
    "BN": "batch",
}
#: kaituoxu's; cLN is frame by frame there, too.
_KAITUOXU_NORMS = {"gLN": "global", "cLN": "frame", "BN": "batch"}
_FILTERBANKS = {
    "free": "free",
    "FreeFB": "free",
    "analytic_free": "analytic_free",
    "AnalyticFreeFB": "analytic_free",
    "param_sinc": "param_sinc",
    "ParamSincFB": "param_sinc",
    "stft": "stft",
    "STFTFB": "stft",
}
_ASTEROID_NAMES = {
    "n_src": "num_sources",
    "n_filters": "num_filters",
    "kernel_size": "kernel_size",
    "stride": "stride",
    "bn_chan": "bottleneck_channels",
    "hid_chan": "hidden_channels",
    "skip_chan": "skip_channels",
    "conv_kernel_size": "conv_kernel_size",
    "n_blocks": "num_blocks",
    "n_repeats": "num_repeats",
    "causal": "causal",
}
#: Its arguments where a file leaves them out; elsewhere its defaults are those here.
_ASTEROID_DEFAULTS: dict[str, Any] = {"stride": 8}


# Keys


def _flat_norms(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gains and biases that are (1, C, 1)."""
    del model
    norm = re.compile(r"norm\.(weight|bias)$")
    return {key: value.flatten() if norm.search(key) else value for key, value in state.items()}


def _asteroid(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fixed filters are a buffer there and are made anew here."""
    if getattr(getattr(model, "config", None), "filterbank", None) == "stft":
        state = {key: value for key, value in state.items() if not key.endswith("coder.filterbank.weight")}
    return state


def _kaituoxu(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Blocks counted by repeat, layers counted with the cut of causal padding, and a decoder that is a linear layer."""
    blocks: int = model.config.num_blocks  # type: ignore[union-attr, assignment]
    cut = any(re.search(r"\.net\.3\.net\.4\.", key) for key in state)
    inner = ("depthwise", "", "depthwise_act", "depthwise_norm", "residual")
    layers = inner if cut else (inner[0], *inner[2:])
    mapped = {}
    for key, value in state.items():
        if match := re.fullmatch(r"separator\.network\.2\.(\d+)\.(\d+)\.net\.(\d)\.(.*)", key):
            index = int(match[1]) * blocks + int(match[2])
            layer, rest = ("conv", "act", "norm", "")[int(match[3])], match[4]
            if not layer:
                _, place, rest = rest.split(".", 2)
                layer = layers[int(place)]
            key = f"separator.blocks.{index}.{layer}.{rest}"
        if key == "decoder.filterbank.weight":
            value = value.T.unsqueeze(1).contiguous()
        mapped[key] = value
    return _flat_norms(mapped, model)


def _torchaudio(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The last block has no residual convolution there; here it is one whose output goes nowhere."""
    last = len(model.separator.blocks) - 1  # type: ignore[union-attr, arg-type]
    if not any(key.startswith(f"separator.blocks.{last}.conv.") for key in state):
        raise ValueError("another number of blocks")
    missing = {
        key: torch.zeros(value.shape, dtype=value.dtype)
        for key, value in model.state_dict().items()
        if key.startswith(f"separator.blocks.{last}.residual.")
    }
    return missing | state


_TCN = r"separator.blocks.\1."

LAYOUTS: dict[str, Layout] = {
    "asteroid": Layout(
        renames=(
            (r"^(encoder|decoder)\.filterbank\.(torch_window|window_|n_)$", ""),
            (r"^(encoder|decoder)\.filterbank\._filters$", r"\1.filterbank.weight"),
            (r"^(encoder|decoder)\.filterbank\.(low|band)_hz_$", r"\1.filterbank.\2_hz"),
            (r"^masker\.bottleneck\.0\.", "separator.input_norm."),
            (r"^masker\.bottleneck\.1\.", "separator.bottleneck."),
            (r"^masker\.TCN\.(\d+)\.shared_block\.0\.", rf"{_TCN}conv."),
            (r"^masker\.TCN\.(\d+)\.shared_block\.1\.", rf"{_TCN}act."),
            (r"^masker\.TCN\.(\d+)\.shared_block\.2\.", rf"{_TCN}norm."),
            (r"^masker\.TCN\.(\d+)\.shared_block\.3\.(0\.)?", rf"{_TCN}depthwise."),
            (r"^masker\.TCN\.(\d+)\.shared_block\.4\.", rf"{_TCN}depthwise_act."),
            (r"^masker\.TCN\.(\d+)\.shared_block\.5\.", rf"{_TCN}depthwise_norm."),
            (r"^masker\.TCN\.(\d+)\.res_conv\.", rf"{_TCN}residual."),
            (r"^masker\.TCN\.(\d+)\.skip_conv\.", rf"{_TCN}skip."),
            (r"^masker\.mask_net\.0\.", "separator.mask_prelu."),
            (r"^masker\.mask_net\.1\.", "separator.mask."),
            (r"norm\.gamma$", "norm.weight"),
            (r"norm\.beta$", "norm.bias"),
        ),
        function=_asteroid,
    ),
    "naplab": Layout(
        renames=(
            (r"^(encoder|decoder)\.weight$", r"\1.filterbank.weight"),
            (r"^TCN\.LN\.", "separator.input_norm."),
            (r"^TCN\.BN\.", "separator.bottleneck."),
            (r"^TCN\.TCN\.(\d+)\.conv1d\.", rf"{_TCN}conv."),
            (r"^TCN\.TCN\.(\d+)\.nonlinearity1\.", rf"{_TCN}act."),
            (r"^TCN\.TCN\.(\d+)\.reg1\.", rf"{_TCN}norm."),
            (r"^TCN\.TCN\.(\d+)\.dconv1d\.", rf"{_TCN}depthwise."),
            (r"^TCN\.TCN\.(\d+)\.nonlinearity2\.", rf"{_TCN}depthwise_act."),
            (r"^TCN\.TCN\.(\d+)\.reg2\.", rf"{_TCN}depthwise_norm."),
            (r"^TCN\.TCN\.(\d+)\.res_out\.", rf"{_TCN}residual."),
            (r"^TCN\.TCN\.(\d+)\.skip_out\.", rf"{_TCN}skip."),
            (r"^TCN\.output\.0\.", "separator.mask_prelu."),
            (r"^TCN\.output\.1\.", "separator.mask."),
            (r"norm\.gain$", "norm.weight"),
        ),
        function=_flat_norms,
    ),
    "kaituoxu": Layout(
        renames=(
            (r"^encoder\.conv1d_U\.weight$", "encoder.filterbank.weight"),
            (r"^decoder\.basis_signals\.weight$", "decoder.filterbank.weight"),
            (r"^separator\.network\.0\.", "separator.input_norm."),
            (r"^separator\.network\.1\.", "separator.bottleneck."),
            (r"^separator\.network\.3\.", "separator.mask."),
            (r"\.gamma$", ".weight"),
            (r"\.beta$", ".bias"),
        ),
        function=_kaituoxu,
    ),
    "torchaudio": Layout(
        renames=(
            (r"^(encoder|decoder)\.weight$", r"\1.filterbank.weight"),
            (r"^mask_generator\.input_norm\.", "separator.input_norm."),
            (r"^mask_generator\.input_conv\.", "separator.bottleneck."),
            (r"^mask_generator\.conv_layers\.(\d+)\.conv_layers\.0\.", rf"{_TCN}conv."),
            (r"^mask_generator\.conv_layers\.(\d+)\.conv_layers\.1\.", rf"{_TCN}act."),
            (r"^mask_generator\.conv_layers\.(\d+)\.conv_layers\.2\.", rf"{_TCN}norm."),
            (r"^mask_generator\.conv_layers\.(\d+)\.conv_layers\.3\.", rf"{_TCN}depthwise."),
            (r"^mask_generator\.conv_layers\.(\d+)\.conv_layers\.4\.", rf"{_TCN}depthwise_act."),
            (r"^mask_generator\.conv_layers\.(\d+)\.conv_layers\.5\.", rf"{_TCN}depthwise_norm."),
            (r"^mask_generator\.conv_layers\.(\d+)\.res_out\.", rf"{_TCN}residual."),
            (r"^mask_generator\.conv_layers\.(\d+)\.skip_out\.", rf"{_TCN}skip."),
            (r"^mask_generator\.output_prelu\.", "separator.mask_prelu."),
            (r"^mask_generator\.output_conv\.", "separator.mask."),
        ),
        function=_torchaudio,
    ),
}


# What network a file belongs to


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `ConvTasNetConfig` that a checkpoint tells: by its metadata, else by keys and shapes.

    This library, asteroid and kaituoxu's code store all settings. The others do not: blocks are taken to come in
    repeats of eight, and activations, stride and sample rate are those of the code's defaults.

    Raises:
        CheckpointError: it is none of the known layouts, or its settings are unknown.
    """
    if checkpoint.metadata.get("model") == "ConvTasNet" and "config" in checkpoint.metadata:
        own: dict[str, Any] = json.loads(checkpoint.metadata["config"])
        return own
    content = checkpoint.content if isinstance(checkpoint.content, Mapping) else {}
    if isinstance(arguments := content.get("model_args"), Mapping):
        return asteroid_config(arguments)
    if {"N", "L", "B", "H", "P", "X", "R", "C"} <= content.keys():
        return kaituoxu_config(content)
    for state in checkpoint.parts.values():
        shapes = {re.sub(r"^(module|model)\.", "", key): tuple(value.shape) for key, value in state.items()}
        if "TCN.LN.bias" in shapes:
            return _naplab_config(shapes)
        if "mask_generator.input_conv.weight" in shapes:
            return _torchaudio_config(shapes)
    raise CheckpointError(
        f"{checkpoint.source} does not tell its settings: build the network by its config and use load_weights"
    )


def asteroid_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ConvTasNetConfig` for the ``model_args`` of asteroid.

    As there, a causal network whose norm looks ahead gets the frame-wise one.

    Raises:
        CheckpointError: an argument is unknown.
    """
    known = {*_ASTEROID_NAMES, "norm_type", "mask_act", "encoder_activation", "fb_name", "sample_rate"}
    if left := set(arguments) - known - {"in_chan", "out_chan", "fb_type"}:
        raise CheckpointError(f"unknown settings of asteroid's ConvTasNet: {', '.join(sorted(left))}")
    found = {ours: arguments[name] for name, ours in _ASTEROID_NAMES.items() if arguments.get(name) is not None}
    norm = _named(_ASTEROID_NORMS, "norm_type", arguments.get("norm_type", "gLN"))
    if found.get("causal") and norm not in ("cumulative", "frame"):
        norm = "frame"
    bank = _named(_FILTERBANKS, "fb_name", arguments.get("fb_name", "free"))
    return (
        _ASTEROID_DEFAULTS
        | found
        | {
            "norm": norm,
            "filterbank": bank,
            "mask_act": arguments.get("mask_act", "sigmoid"),
            "encoder_act": arguments.get("encoder_activation") or "linear",
            "sample_rate": int(arguments.get("sample_rate") or 8000),
        }
    )


def kaituoxu_config(package: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ConvTasNetConfig` for the package of kaituoxu's code.

    Raises:
        CheckpointError: there is no such norm.
    """
    letters = {
        "N": "num_filters",
        "L": "kernel_size",
        "B": "bottleneck_channels",
        "H": "hidden_channels",
        "P": "conv_kernel_size",
        "X": "num_blocks",
        "R": "num_repeats",
        "C": "num_sources",
    }
    return {ours: int(package[letter]) for letter, ours in letters.items()} | {
        "norm": _named(_KAITUOXU_NORMS, "norm_type", package.get("norm_type", "gLN")),
        "input_norm": "frame",
        "causal": bool(package.get("causal", False)),
        "mask_act": package.get("mask_nonlinear", "relu"),
        "encoder_act": "relu",
        "skip_channels": 0,
        "bias": False,
        "mask_prelu": False,
    }


def _naplab_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    causal = "TCN.LN.gain" in shapes
    found = _sizes(shapes, "encoder.weight", "TCN.BN.weight", "TCN.output.1.weight", r"TCN\.TCN\.(\d+)\.", "dconv1d")
    # Its windows are given in milliseconds: 2 of them, whatever the sample rate.
    return found | {
        "norm": "cumulative" if causal else "global",
        "causal": causal,
        "ends": "padded",
        "skip_channels": shapes["TCN.TCN.0.skip_out.weight"][0],
        "sample_rate": 500 * found["kernel_size"],
    }


def _torchaudio_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    start = "mask_generator"
    block = rf"{start}\.conv_layers\.(\d+)\."
    found = _sizes(
        shapes, "encoder.weight", f"{start}.input_conv.weight", f"{start}.output_conv.weight", block, "conv_layers.3"
    )
    skip = shapes[f"{start}.conv_layers.0.skip_out.weight"][0]
    return found | {"ends": "aligned", "mask_act": "relu", "skip_channels": skip}


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], encoder: str, bottleneck: str, mask: str, block: str, depthwise: str
) -> dict[str, Any]:
    filters, _, size = shapes[encoder]
    count = 1 + max(int(match[1]) for key in shapes if (match := re.match(block, key)))
    first = next(key for key in shapes if key.endswith(f"0.{depthwise}.weight"))
    repeats, left = divmod(count, 8)
    return {
        "num_filters": filters,
        "kernel_size": size,
        "bottleneck_channels": shapes[bottleneck][0],
        "hidden_channels": shapes[first][0],
        "conv_kernel_size": shapes[first][2],
        "num_blocks": count if left else 8,
        "num_repeats": 1 if left else repeats,
        "num_sources": shapes[mask][0] // filters,
    }


def _named(table: Mapping[str, str], key: str, name: Any) -> str:
    if name not in table:
        raise CheckpointError(f"{key} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
