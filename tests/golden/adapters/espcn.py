"""ESPCN: the network of both re-implementations, sub-pixel convolution, and the image pipeline around them."""

from __future__ import annotations

import re

from torch import Tensor, nn

from convatlas.networks.espcn import ESPCNConfig
from convatlas.nn.sub_pixel import SubPixelConv2d, conv_transpose_weight, icnr_
from convatlas.ops.colour import YCbCr, rgb_to_ycbcr, ycbcr_to_rgb
from convatlas.ops.image_quality import psnr, ssim
from convatlas.ops.resize import resize
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "repo" in case.config or case.weights:
        return _network(case)
    if "weight" in case.inputs or "C_in" in case.config:
        return _sub_pixel(case)
    if any(name.startswith("rgb") for name in case.inputs):
        return _image_pipeline(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know such a case")


def _network(case: Case) -> dict[str, Tensor]:
    case.only(
        *("repo", "scale_factor", "upscale_factor", "num_channels", "in_channels", "out_channels", "channels"),
        *("act", "clamp"),
    )
    config, weights = case.config, case.weights
    channels = config.get("num_channels", config.get("in_channels", 1))
    if config.get("out_channels", channels) != channels:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {config['out_channels']} outputs")
    first = next(tensor for name, tensor in weights.items() if re.search(r"(first_part|feature_maps)\.0\.weight", name))
    clamp = config.get("clamp", "lornatang" in config.get("repo", "").lower() or "clamped" in case.name.split("_"))
    model = ESPCNConfig(
        scale=config.get("scale_factor", config.get("upscale_factor", 3)),
        in_channels=channels,
        channels=config.get("channels", first.shape[0]),
        act=config.get("act", "tanh"),
        clamp="always" if clamp else "never",
    ).build()
    case.load(model)
    x = case.inputs["x"]
    if "cotangent" not in case.inputs:
        return {"y": model(x)}
    y = model(x.requires_grad_())
    return {"y": y, **case.gradients(model, y, {"grad_input": x})}


def _sub_pixel(case: Case) -> dict[str, Tensor]:
    case.only("C_in", "C_out", "r", "k")
    config, inputs = case.config, case.inputs
    scale, weight = config["r"], inputs["weight"]
    layer = SubPixelConv2d(
        config.get("C_in", weight.shape[1]),
        config.get("C_out", weight.shape[0] // scale**2),
        config.get("k", weight.shape[2]),
        scale=scale,
        bias="bias" in inputs,
    ).to(case.dtype)
    layer.load_state_dict({f"conv.{name}": inputs[name] for name in ("weight", "bias") if name in inputs})
    results = {
        "y": layer(inputs["x"]),
        "unshuffled": layer.conv(inputs["x"]),
        "transposed_weight": conv_transpose_weight(weight, scale),
    }
    if "icnr_base" in inputs:
        icnr_(layer.conv.weight, scale, lambda kernels: kernels.copy_(inputs["icnr_base"]))
        nn.init.zeros_(layer.conv.bias)
        results |= {"icnr_weight": layer.conv.weight, "icnr_y": layer(inputs["x"])}
    return {name: results[name] for name in case.outputs}


def _image_pipeline(case: Case) -> dict[str, Tensor]:
    """Images are (H, W, 3) there, (3, H, W) here; "256form" and "pil" are yjn870's, who computes in float32."""
    case.only("scale", "source")
    scale, given = case.config["scale"], case.inputs["rgb_uint8"].movedim(-1, 0)
    unit, levels = given.to(case.dtype) / 255, given.float()
    down_pil = resize(given, [length // scale for length in given.shape[1:]], convention="pillow")
    up_pil = resize(down_pil, given.shape[1:], convention="pillow")
    down_matlab = resize(unit, scale=1 / scale, convention="matlab")
    images: dict[str, Tensor] = {
        "down_pil": down_pil,
        "up_pil": up_pil,
        "down_matlab": down_matlab,
        "up_matlab": resize(down_matlab, scale=scale, convention="matlab"),
        "down_noantialias": resize(unit, scale=1 / scale, convention="matlab", antialias=False),
    }
    numbers: dict[str, Tensor] = {}
    luma: dict[YCbCr, tuple[Tensor, Tensor]] = {}
    for name, form, x in (("matlab01", "matlab", unit), ("256form", "studio256", levels)):
        converted = rgb_to_ycbcr(x, form)
        images |= {f"ycbcr_{name}": converted, f"rgb_back_{name}": ycbcr_to_rgb(converted, form)}
        enlarged = up_pil.to(case.dtype) / 255 if form == "matlab" else up_pil.float()
        luma[form] = (converted[:1], rgb_to_ycbcr(enlarged, form)[:1])
        numbers[f"y_{name}"] = converted[0]
    numbers |= {
        "psnr_y_crop": psnr(*luma["matlab"], data_range=1, shave=scale),
        "psnr_y_256form": psnr(*luma["studio256"], data_range=255),
        "psnr_rgb_crop": psnr(given, up_pil, data_range=255, shave=scale),
        "psnr_rgb_crop0": psnr(given, up_pil, data_range=255),
        "ssim_y_crop": ssim(*luma["matlab"], data_range=1, shave=scale),
        "ssim_rgb_crop": ssim(given, up_pil, data_range=255, shave=scale),
    }
    results = {name: image.movedim(0, -1) for name, image in images.items()}
    results |= {name: number.reshape(1) if number.dim() == 0 else number for name, number in numbers.items()}
    return {name: results[name] for name in case.outputs}
