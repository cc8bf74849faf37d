"""Checkpoints of Conv-TasNet by other codes: settings and weights are found, what does not belong is refused."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convatlas.errors import CheckpointError
from convatlas.networks.conv_tasnet.network import ConvTasNet, ConvTasNetConfig
from convatlas.weights import load_weights, save_weights

TINY: dict[str, Any] = {
    "num_filters": 12,
    "kernel_size": 10,
    "bottleneck_channels": 6,
    "hidden_channels": 8,
    "skip_channels": 4,
    "num_blocks": 3,
    "num_repeats": 2,
}


def tiny(**options: Any) -> ConvTasNet:
    torch.manual_seed(0)
    model = ConvTasNet(ConvTasNetConfig(**{**TINY, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def mixture(batch: int = 2, length: int = 403) -> Tensor:
    return torch.randn(batch, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _asteroid(model: ConvTasNet) -> dict[str, Tensor]:
    """The weights of a network under asteroid's keys."""
    state = {}
    layers = {"conv": 0, "act": 1, "norm": 2, "depthwise": 3, "depthwise_act": 4, "depthwise_norm": 5}
    for key, value in model.state_dict().items():
        if match := re.match(r"separator\.blocks\.(\d+)\.(\w+)\.(.*)", key):
            index, layer, rest = match.groups()
            if layer in layers:
                inner = "0." if layer == "depthwise" and model.config.causal else ""
                name = f"masker.TCN.{index}.shared_block.{layers[layer]}.{inner}{rest}"
            else:
                name = f"masker.TCN.{index}.{ {'residual': 'res_conv', 'skip': 'skip_conv'}[layer] }.{rest}"
        else:
            name = key
            for ours, theirs in (
                ("filterbank.weight", "filterbank._filters"),
                ("filterbank.low_hz", "filterbank.low_hz_"),
                ("filterbank.band_hz", "filterbank.band_hz_"),
                ("separator.input_norm.", "masker.bottleneck.0."),
                ("separator.bottleneck.", "masker.bottleneck.1."),
                ("separator.mask_prelu.", "masker.mask_net.0."),
                ("separator.mask.", "masker.mask_net.1."),
            ):
                name = name.replace(ours, theirs)
        normed = re.search(r"(shared_block\.[25]|bottleneck\.0)\.(weight|bias)$", name)
        if normed and model.config.norm != "batch":
            name = name.removesuffix(normed[2]) + {"weight": "gamma", "bias": "beta"}[normed[2]]
        state[name] = value
    return state


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"mask_act": "relu", "num_sources": 3}, {"norm_type": "gLN", "mask_act": "relu", "n_src": 3}),
        ({"causal": True, "norm": "cumulative"}, {"norm_type": "cgLN", "causal": True, "encoder_activation": None}),
        ({"causal": True, "norm": "frame"}, {"norm_type": "gLN", "causal": True, "in_chan": 12, "out_chan": 12}),
        ({"norm": "batch", "skip_channels": 0}, {"norm_type": "bN", "skip_chan": 0}),
        ({"norm": "feature", "encoder_act": "relu"}, {"norm_type": "fgLN", "encoder_activation": "relu"}),
        ({"filterbank": "stft"}, {"fb_name": "STFTFB"}),
        ({"filterbank": "param_sinc", "kernel_size": 11}, {"fb_name": "param_sinc", "kernel_size": 11}),
    ],
    ids=lambda value: str(value.get("norm_type", value.get("fb_name", ""))) if isinstance(value, dict) else "",
)
def test_files_of_asteroid(tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any]):
    model = tiny(stride=5, sample_rate=16000, **options)
    state = _asteroid(model)
    if options.get("filterbank") == "stft":
        state |= {f"{part}.filterbank._filters": torch.zeros(14, 1, 10) for part in ("encoder", "decoder")}
        state["encoder.filterbank.torch_window"] = torch.zeros(10)
    given = {
        "fb_name": "free", "n_filters": 12, "kernel_size": 10, "stride": 5, "bn_chan": 6, "hid_chan": 8,
        "skip_chan": 4, "conv_kernel_size": 3, "n_blocks": 3, "n_repeats": 2, "n_src": 2, "mask_act": "sigmoid",
        "sample_rate": 16000.0, **arguments,
    }  # fmt: skip
    path = tmp_path / "model.pth"
    torch.save({"model_name": "ConvTasNet", "state_dict": state, "model_args": given, "infos": {}}, path)
    found = ConvTasNet.from_pretrained(path)
    assert found.config == model.config
    x = mixture()
    torch.testing.assert_close(found.double()(x), model(x), rtol=1e-6, atol=1e-6)


def test_files_of_torchaudio_lack_the_last_residual(tmp_path: Path):
    options = {**TINY, "num_blocks": 8, "ends": "aligned", "mask_act": "relu"}
    model = tiny(**options)
    names = {
        "filterbank.weight": "weight", "separator.input_norm": "mask_generator.input_norm",
        "separator.bottleneck": "mask_generator.input_conv", "separator.mask_prelu": "mask_generator.output_prelu",
        "separator.mask.": "mask_generator.output_conv.",
    }  # fmt: skip
    layers = ["conv", "act", "norm", "depthwise", "depthwise_act", "depthwise_norm"]
    state = {}
    for key, value in model.state_dict().items():
        if ".15.residual" in key:
            continue
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if match := re.match(r"separator\.blocks\.(\d+)\.(\w+)\.(.*)", key):
            index, layer, rest = match.groups()
            place = f"conv_layers.{layers.index(layer)}" if layer in layers else {"residual": "res_out"}.get(layer)
            key = f"mask_generator.conv_layers.{index}.{place or 'skip_out'}.{rest}"
        state[key] = value
    torch.save(state, tmp_path / "conv_tasnet.pt")
    found = ConvTasNet.from_pretrained(tmp_path / "conv_tasnet.pt")
    assert found.config == model.config
    x = mixture()
    torch.testing.assert_close(found.double()(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_files_of_the_first_author_tell_their_settings(tmp_path: Path, causal: bool):
    norm = "cumulative" if causal else "global"
    model = tiny(num_blocks=8, ends="padded", causal=causal, norm=norm, sample_rate=5000)
    names = {
        "conv": "conv1d", "act": "nonlinearity1", "norm": "reg1", "depthwise": "dconv1d",
        "depthwise_act": "nonlinearity2", "depthwise_norm": "reg2", "residual": "res_out", "skip": "skip_out",
    }  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("filterbank.weight", "weight").replace("separator.input_norm", "TCN.LN")
        key = key.replace("separator.bottleneck", "TCN.BN").replace("separator.mask_prelu", "TCN.output.0")
        key = key.replace("separator.mask.", "TCN.output.1.")
        if match := re.match(r"separator\.blocks\.(\d+)\.(\w+)\.(.*)", key):
            key = f"TCN.TCN.{match[1]}.{names[match[2]]}.{match[3]}"
        if causal and re.search(r"(LN|reg\d)\.(weight|bias)$", key):
            key, value = key.replace("weight", "gain"), value.view(1, -1, 1)
        state[key] = value
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "naplab.pt")
    found = ConvTasNet.from_pretrained(tmp_path / "naplab.pt")
    assert found.config == model.config
    x = mixture()
    torch.testing.assert_close(found.double()(x), model(x), rtol=1e-6, atol=1e-6)


def test_packages_of_kaituoxu_count_layers_by_causality(tmp_path: Path):
    for causal, norm in itertools.product((False, True), ("gLN", "cLN")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = tiny(
                skip_channels=0, bias=False, mask_prelu=False, input_norm="frame", encoder_act="relu",
                mask_act="relu", causal=causal, norm={"gLN": "global", "cLN": "frame"}[norm],
            )  # fmt: skip
        layers = {"depthwise": 0, "depthwise_act": 1 + causal, "depthwise_norm": 2 + causal, "residual": 3 + causal}
        state = {}
        for key, value in model.state_dict().items():
            key = key.replace("encoder.filterbank", "encoder.conv1d_U")
            if key == "decoder.filterbank.weight":
                key, value = "decoder.basis_signals.weight", value[:, 0].T
            for ours, theirs in (("input_norm", 0), ("bottleneck", 1), ("mask", 3)):
                key = key.replace(f"separator.{ours}.", f"separator.network.{theirs}.")
            if match := re.match(r"separator\.blocks\.(\d+)\.(\w+)\.(.*)", key):
                index, layer, rest = int(match[1]), match[2], match[3]
                outer = {"conv": "0", "act": "1", "norm": "2"}.get(layer) or f"3.net.{layers[layer]}"
                key = f"separator.network.2.{index // 3}.{index % 3}.net.{outer}.{rest}"
            if re.search(rf"(network\.0|\d\.\d\.net\.2|net\.3\.net\.{2 + causal})\.(weight|bias)$", key):
                key, value = key.replace("weight", "gamma").replace("bias", "beta"), value.view(1, -1, 1)
            state[key] = value
        package = {"N": 12, "L": 10, "B": 6, "H": 8, "P": 3, "X": 3, "R": 2, "C": 2, "norm_type": norm}
        package |= {"causal": causal, "mask_nonlinear": "relu", "state_dict": state, "epoch": 3}
        torch.save(package, tmp_path / "package.pth.tar")
        found = ConvTasNet.from_pretrained(tmp_path / "package.pth.tar")
        assert found.config == model.config
        x = mixture()
        torch.testing.assert_close(found.double()(x), model(x), rtol=1e-6, atol=1e-6)


def test_own_files_tell_their_settings(tmp_path: Path):
    model = tiny(norm="cumulative", causal=True, ends="padded", stride=3)
    found = ConvTasNet.from_pretrained(save_weights(model, tmp_path / "own.safetensors"))
    assert found.config == model.config
    torch.testing.assert_close(found.double()(mixture()), model(mixture()))


def test_files_that_do_not_belong_are_refused(tmp_path: Path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not tell its settings"):
        ConvTasNet.from_pretrained(tmp_path / "other.pth")
    state = _asteroid(tiny())
    torch.save({"state_dict": state, "model_args": {"n_blocks": 3, "depth": 2}}, tmp_path / "unknown.pth")
    with pytest.raises(CheckpointError, match="unknown settings of asteroid's ConvTasNet: depth"):
        ConvTasNet.from_pretrained(tmp_path / "unknown.pth")
    torch.save({"state_dict": state, "model_args": {"norm_type": "LN"}}, tmp_path / "norm.pth")
    with pytest.raises(CheckpointError, match="norm_type must be one of gLN, cgLN"):
        ConvTasNet.from_pretrained(tmp_path / "norm.pth")
    del state["masker.mask_net.1.bias"]
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: separator\.mask\.bias"):
        load_weights(tiny(), state)
