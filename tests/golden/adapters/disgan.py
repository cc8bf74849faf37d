"""DISGAN: generator, wavelet unit, discriminator and its blocks, feature extractor, losses and metrics."""

from __future__ import annotations

import math
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.disgan import DownBlock, LinearUpBlock, RRDBConfig, UNetDiscriminatorConfig, UpBlock
from convatlas.networks.med3d import MedicalResNetConfig
from convatlas.nn.wavelets import DWTConv
from convatlas.ops.adversarial import relativistic_discriminator_loss, relativistic_generator_loss
from convatlas.ops.volume_quality import nrmse, sharpness, volume_psnr, volume_ssim
from convatlas.ops.wavelets import dwt
from convatlas.weights import load_weights
from golden.cases import Case

_RULE = ("weights_rule", "gain", "input_rule")


def run(case: Case) -> dict[str, Tensor]:
    if "kind" in case.config:
        return _block(case)
    if "wavelet" in case.config:
        return _unit(case)
    if "lambda_adv" in case.config:
        return _losses(case)
    if "gt" in case.inputs:
        return _metrics(case)
    if "weights_rule" in case.config:
        return _by_rule(case)
    return _generator(case)


def _generator(case: Case) -> dict[str, Tensor]:
    case.only("channels", "filters", "num_res_blocks", "num_upsample", "size", "norm")
    config = case.config
    model = RRDBConfig(
        in_channels=config["channels"],
        filters=config["filters"],
        num_blocks=config["num_res_blocks"],
        scale=2 ** config["num_upsample"],
        norm=config.get("norm", False),
    ).build()
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    y = case.load(model)(x)
    return {"y": y, **(case.gradients(model, y, {"grad_input": x}) if "cotangent" in case.inputs else {})}


def _unit(case: Case) -> dict[str, Tensor]:
    case.only("in_channels", "out_channels", "wavelet")
    config, inputs = case.config, case.inputs
    unit = DWTConv(config["in_channels"], config["out_channels"], wavelet=config["wavelet"]).to(case.dtype)
    load_weights(unit, {key.removeprefix("conv1x1_"): tensor for key, tensor in case.weights.items()})
    x = inputs["x"].requires_grad_()
    low, high = unit(x)
    bands = dwt(x, config["wavelet"], "periodization").transpose(1, 2).flatten(1, 2)
    results = {"low": low, "high": high, "coefficients": bands}
    if "cotangent_low" in inputs:
        (low * inputs["cotangent_low"] + high * inputs["cotangent_high"]).sum().backward()
        results["grad_input"] = x.grad
        results |= {f"grad_weight_conv1x1_{name}": weight.grad for name, weight in unit.named_parameters()}
    return {name: results[name] for name in case.outputs}


def _block(case: Case) -> dict[str, Tensor]:
    """A block under one prefix. What the reference does to its input in place is what our caller does before."""
    case.only("kind", "in_channels", "out_channels", "relu", "bn", "prefix")
    config, x = case.config, case.inputs["x"]
    channels = config["in_channels"], config["out_channels"]
    if config["kind"] == "downsample":
        block: nn.Module = DownBlock(*channels, norm=config["bn"])
    else:
        block = (UpBlock if config["kind"] == "transpose" else LinearUpBlock)(*channels)
        if not config["bn"]:
            raise KeyError(f"{case.system}/{case.name}: ways up always have a norm")
    names = ((r"_t?conv\.0\.", ".conv."), (r"_t?conv\.1\.", ".dense."), (r"_bn\.", ".norm."))
    names += ((r"_linear\.1\.", ".dense."), (r"_linear\.2\.", ".conv."))
    state = {}
    for key, tensor in case.weights.items():
        for pattern, name in names:
            key = re.sub(rf"^{re.escape(config['prefix'])}{pattern}", name.lstrip("."), key)
        state[key] = tensor
    load_weights(block.to(case.dtype), state)
    active = F.relu(x) if config["relu"] else F.leaky_relu(x, 0.2)
    results = {"x_after_inplace_activation": active, "y": block.eval()(active)}
    return {name: results[name] for name in case.outputs}


def _by_rule(case: Case) -> dict[str, Tensor]:
    """A whole network whose weights follow from the reference's names for them."""
    case.only(*_RULE, "eval", "nf", "in_channels", "layers", "shortcut_type")
    config = case.config
    if case.name.startswith("feature_extractor"):
        options = {"shortcut": {"A": "pad", "B": "conv"}[config.get("shortcut_type", "B")]}
        options |= {"depths": tuple(config["layers"])} if "layers" in config else {}
        model: nn.Module = MedicalResNetConfig(in_channels=config.get("in_channels", 1), **options).build()
    else:
        model = UNetDiscriminatorConfig(in_channels=config.get("in_channels", 1), filters=config.get("nf", 16)).build()
    rename = _discriminator_key if case.name.startswith("discriminator") else str
    state = {}
    for name, tensor in model.state_dict().items():
        key = rename(name)
        filled = tensor if not tensor.is_floating_point() else _filled(key, tensor.shape, config["gain"])
        state[key] = filled.to(case.dtype) if filled.is_floating_point() else filled
    x = _input(config["input_rule"]).to(case.dtype)
    load_weights(model.to(case.dtype), state)
    model.eval()
    with torch.no_grad():
        y = model.forward_features(x)[-1] if rename is str else model(x)
    results = {"y": y, "mean": y.mean(), "std": y.std()}
    results |= {f"y_sub{step}": y[:, :, ::step, ::step, ::step] for step in (2, 4, 8)}
    torch.testing.assert_close(x[:, :, :2, :2, :4], case.inputs["x_corner"])
    return {name: results[name] for name in case.outputs}


def _filled(key: str, shape: torch.Size, gain: float) -> Tensor:
    random = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    if len(shape) > 1:
        values = random.standard_normal(shape) * gain / math.sqrt(math.prod(shape[1:]))
    elif key.endswith(("weight", "running_var")):
        values = 0.5 + random.random_sample(shape)
    else:
        values = 0.1 * random.standard_normal(shape)
    return torch.from_numpy(values).half()


def _input(rule: str) -> Tensor:
    seed, shape = re.search(r"RandomState\((\d+)\)\.standard_normal\(\(([\d, ]+)\)\)", rule).groups()
    size = [int(length) for length in shape.split(",")]
    return torch.from_numpy(np.random.RandomState(int(seed)).standard_normal(size)).half().float()


def _discriminator_key(name: str) -> str:
    """The reference's name of one of our tensors; ways up are called by the level above."""
    for pattern, key in (
        (r"^stem\.", "initial_conv.module."),
        (r"^stem_norm\.", "bn1."),
        (r"^first\.", "layer1.layer1."),
        (r"^wavelets\.(\d+)\.", r"DWT_down_\1.conv1x1_"),
        (r"^mix\.", "tail_conv1."),
        (r"^mix_norm\.", "bn2."),
        (r"^head\.", "tail_conv2."),
    ):
        name = re.sub(pattern, key, name)
    parts = {"conv": "conv.0", "dense": "conv.1", "norm": "bn"}
    if found := re.match(r"(downs|ups)\.(\d+)\.(conv|dense|norm)\.(.*)", name):
        way, level, part, rest = found[1], int(found[2]) + 2, parts[found[3]], found[4]
        layer, inner = (f"layer{level}",) * 2 if way == "downs" else (f"dlayer{level}", f"dlayer{level - 1}")
        return f"{layer}.{inner}_{part.replace('conv', 'tconv') if way == 'ups' else part}.{rest}"
    if found := re.match(r"last\.(conv|dense|norm)\.(.*)", name):
        part = {"dense": "linear.1", "conv": "linear.2", "norm": "bn"}[found[1]]
        return f"dlayer1.dlayer0_{part}.{found[2]}"
    return name


def _losses(case: Case) -> dict[str, Tensor]:
    case.only("lambda_adv", "lambda_feat")
    config, inputs = case.config, case.inputs
    real, fake = inputs["pred_real"], inputs["pred_fake"].requires_grad_()
    adversarial = relativistic_generator_loss(real, fake)
    pixels, features = F.l1_loss(inputs["sr"], inputs["hr"]), F.l1_loss(inputs["feat_sr"], inputs["feat_hr"])
    judged = relativistic_discriminator_loss(real, fake)
    (gradient,) = torch.autograd.grad(judged, fake)
    results = {
        "g_adv": adversarial,
        "g_loss": pixels + config["lambda_adv"] * adversarial + config["lambda_feat"] * features,
        "d_loss": judged,
        "grad_d_wrt_pred_fake": gradient,
    }
    return {name: results[name] for name in case.outputs}


def _metrics(case: Case) -> dict[str, Tensor]:
    case.only()
    truth, x = case.inputs["gt"], case.inputs["image"]
    results = {
        "psnr": volume_psnr(x, truth),
        "ssim_3d": volume_ssim(x, truth),
        "ssim_ref_channel_last": volume_ssim(x, truth, dims=2),
        "nrmse": nrmse(x, truth),
        "sharpness": sharpness(x),
    }
    return {name: results[name] for name in case.outputs}
