"""Long, partial, frequency-sparse and short convolution, their layouts and constants, and the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convatlas.networks.long_conv import LongConvConfig
from convatlas.nn.conv.short_conv import ShortConv1d
from convatlas.nn.long_conv import FFTConv1d, FrequencySparseFFTConv, PartialFFTConv
from convatlas.ops.frequency_sparse import frequency_mask
from convatlas.ops.monarch import permute_kernel_spectrum
from convatlas.ops.monarch_tables import authors_constants
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    config = case.config
    if "d_model" in config:
        return _network(case)
    if "mode" in config:
        return _sparse(case)
    if "keep" in config:
        return _blocks(case)
    if "channels" in config:
        return _short(case)
    if "factors" in config:
        return _layout(case)
    if not case.inputs:
        return _constants(case)
    return _convolution(case)


def _results(case: Case, y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    results = {"y": y}
    if "cotangent" in case.inputs:
        (y * case.inputs["cotangent"]).sum().backward()
        results |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: results[name] for name in case.outputs}


def _leaves(case: Case) -> dict[str, Tensor]:
    names = {"u": "grad_input", "x": "grad_input", "k": "grad_weight_k", "weight": "grad_weight_weight"}
    names |= {"bias": "grad_weight_bias", "pregate": "grad_pregate", "postgate": "grad_postgate"}
    return {names[name]: x.requires_grad_() for name, x in case.inputs.items() if name in names}


def _gates(case: Case) -> tuple[Tensor | None, Tensor | None]:
    return case.inputs.get("pregate"), case.inputs.get("postgate")


def _convolution(case: Case) -> dict[str, Tensor]:
    case.only("seqlen", "B", "H", "L", "k_len", "gated")
    leaves = _leaves(case)
    return _results(case, FFTConv1d(case.config["seqlen"])(case.inputs["u"], case.inputs["k"], *_gates(case)), leaves)


def _sparse(case: Case) -> dict[str, Tensor]:
    case.only("mode", "L", "N_partial", "fft_size")
    config, leaves = case.config, _leaves(case)
    if config["mode"] not in ("partial", "freq"):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know the mode {config['mode']}")
    signal = case.inputs["x"] if "x" in case.inputs else case.inputs["u"]
    layer: Any = PartialFFTConv(config["N_partial"])
    if config["mode"] == "freq":
        layer = FrequencySparseFFTConv(config["N_partial"] // 2, seqlen=config.get("fft_size", 2 * config["L"]))
    return _results(case, layer(signal, case.inputs["k"], *_gates(case)), leaves)


def _blocks(case: Case) -> dict[str, Tensor]:
    case.only("factors", "keep", "L", "fft_size")
    config, leaves = case.config, _leaves(case)
    y = FrequencySparseFFTConv(config["keep"], config["factors"])(case.inputs["u"], case.inputs["k"], *_gates(case))
    mask = frequency_mask(config["fft_size"], config["keep"], config["factors"])
    results = {"y": y, "mask_natural_order": mask}
    if "cotangent" in case.inputs:
        results |= _results(case, y, leaves)
    return {name: results[name] for name in case.outputs}


def _short(case: Case) -> dict[str, Tensor]:
    case.only("channels", "kernel_size", "padding", "bias", "layout", "is_bhl")
    config, given = case.config, {**case.weights, **case.inputs}
    tokens = not config.get("is_bhl", config.get("layout", "BHL").upper() in ("BHL", "BDL"))
    layer = ShortConv1d(
        config["channels"],
        config["channels"],
        config["kernel_size"],
        padding=config["padding"],
        groups=config["channels"],
        bias="bias" in given,
        channels_last=tokens,
    ).to(case.dtype)
    parameters = {name: given[name].reshape(p.shape) for name, p in layer.named_parameters()}
    layer.load_state_dict(parameters)
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    results = {"y": layer(x)}
    if "cotangent" in case.inputs:
        (results["y"] * case.inputs["cotangent"]).sum().backward()
        results["grad_input"] = x.grad
        for name, parameter in layer.named_parameters():
            results[f"grad_weight_{name}"] = parameter.grad.reshape(given[name].shape)
    return {name: results[name] for name in case.outputs}


def _layout(case: Case) -> dict[str, Tensor]:
    case.only("seqlen", "factors")
    k_f = torch.fft.fft(case.inputs["k"], case.config["seqlen"])
    permuted = torch.view_as_real(permute_kernel_spectrum(k_f, case.config["factors"]).contiguous())
    return {"k_f_permuted": permuted.reshape(case.outputs["k_f_permuted"].shape)}


def _constants(case: Case) -> dict[str, Tensor]:
    case.only("seqlen", "dtype", "use_32_butterfly")
    config = case.config
    dtype = getattr(torch, config.get("dtype", "float16"))
    found = authors_constants(config["seqlen"], dtype, config.get("use_32_butterfly", True))
    # The case has no outputs where the reference's constants are its state dict.
    assert not case.weights or set(found) == set(case.weights)
    for name, expected in case.weights.items():
        torch.testing.assert_close(found[name].to(expected.dtype), expected, rtol=0, atol=torch.finfo(dtype).eps / 2)
    return {name: found[name].to(case.dtype) for name in case.outputs}


def _network(case: Case) -> dict[str, Tensor]:
    case.only(
        *("d_input", "d_output", "d_model", "n_layers", "prenorm", "kernel_lam", "L", "fft_size", "channels", "dropout")
    )
    config = case.config
    if config.get("fft_size", 2 * config["L"]) != 2 * config["L"]:
        raise KeyError(f"{case.system}/{case.name}: the adapter knows transforms of twice the length only")
    model = LongConvConfig(
        in_channels=config["d_input"],
        num_classes=config.get("d_output", 10),
        channels=config["d_model"],
        depth=config["n_layers"],
        heads=config.get("channels", 1),
        prenorm=config.get("prenorm", False),
        lam=config.get("kernel_lam", 0.1),
        length=config["L"],
    ).build()
    case.load(model)
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    logits = model(x)
    results = {"logits": logits}
    if "cotangent" in case.inputs:
        results |= case.gradients(model, logits, {"grad_input": x})
    # Our encoder has an axis more.
    return {name: results[name].reshape(expected.shape) for name, expected in case.outputs.items()}
