"""Linear interpreters: the frozen system of a plain chain of layers that the description spells out."""

from __future__ import annotations

import re
import warnings

from torch import Tensor, nn

from convatlas.analysis.linear_interpreter import LinearInterpreter
from golden.cases import Case

#: A word of the description: its name with a kernel size or factor, its options, and its sizes in brackets.
_WORD = re.compile(
    r"([A-Za-z][A-Za-z_]*?)(\d+(?:x\d+)*)?((?:\s+(?:[a-z]{1,2}\d+|\d*\.\d+))*)\s*(?:\(([^)]*)\))?(?=[\s,+;]|$)"
)
_OPTION = re.compile(r"([a-z]*)(\d*\.?\d+)")
_PLAIN = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "flatten": nn.Flatten,
    "identity": nn.Identity,
    "dropout": nn.Dropout,
}
_PADS = {"reflect": "ReflectionPad", "replicat": "ReplicationPad", "zero": "ZeroPad", "circular": "CircularPad"}
_MODES = {"mask": "mask", "secant": "mask", "affine": "tangent", "tangent": "tangent", "jacobian": "tangent"}


def run(case: Case) -> dict[str, Tensor]:
    case.only("seed", "layers", "mode")
    model = case.load(_chain(case))
    x, probe, c = case.inputs["x"], case.inputs["probe"], case.inputs["output_probe"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A x0 and r nearly cancel")
        li = LinearInterpreter(model, _MODES[case.config.get("mode", "mask")])(x)
        top = li.output.flatten().argmax()
        singular = li.svd(case.outputs["singular_values"].numel())
        u = singular.u[0].flatten()
        return {
            "y": li.output,
            "residual": li.residual,
            "Ax": li.linear,
            "A": li.matrix(),
            "row_top": li.row(int(top)),
            "contribution_top": li.contribution(int(top)),
            "top_index": top,
            "probe_response": li.apply(probe),
            "probe_affine": li.apply(probe, bias=True),
            "transposed_response": li.apply_transpose(c),
            "singular_values": singular.sigma,
            "projector_top_left": u.outer(u) if u.numel() <= 40 else u.abs(),
        }


def _chain(case: Case) -> nn.Sequential:
    text = case.config["layers"]
    rest = _WORD.sub("", text).strip(" ,+;")
    if rest:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not understand {rest!r} in {text!r}")
    layers: list[nn.Module] = []
    channels = case.inputs["x"].shape[1]
    for word in _WORD.finditer(text):
        layer, channels = _layer(case, len(layers), channels, *word.groups(default=""), after=layers[-1:])
        layers.append(layer)
    return nn.Sequential(*layers)


def _layer(
    case: Case, index: int, channels: int, name: str, number: str, options: str, brackets: str, after: list[nn.Module]
) -> tuple[nn.Module, int]:
    """A layer and the channels behind it; the weights say what the description leaves out."""
    kind, dims = name.lower(), case.inputs["x"].dim() - 2

    def spatial(layer: str) -> type[nn.Module]:
        return getattr(nn, f"{layer}{dims}d")

    sizes = [int(part) for part in number.split("x")] if number else []
    given = {key: float(value) if "." in value else int(value) for key, value in _OPTION.findall(options)}
    words = [word.strip() for word in brackets.split(",") if word.strip()]
    weight = case.weights.get(f"{index}.weight")
    bias = f"{index}.bias" in case.weights
    if kind in ("conv", "convt", "linear"):
        between = re.fullmatch(r"(\d+)\s*(?:-|->)\s*(\d+)", words[0]) if words else None
        if between is None:
            raise KeyError(f"{case.system}/{case.name}: {name} must say its channels, got {brackets!r}")
        channels, out = int(between[1]), int(between[2])
        if kind == "linear":
            return nn.Linear(channels, out, bias=bias), out
        transposed, kernel = kind == "convt", tuple(sizes) if len(sizes) > 1 else tuple(sizes) * dims
        padded = bool(after) and "Pad" in type(after[0]).__name__
        default = 0 if padded or transposed else tuple(size // 2 for size in kernel)
        arguments = {"stride": given.pop("s", 1), "padding": given.pop("p", default), "dilation": given.pop("d", 1)}
        arguments |= {"groups": given.pop("g", 1), "bias": bias}
        if transposed:
            arguments["output_padding"] = given.pop("op", 0)
        _all_used(case, name, given)
        return spatial("ConvTranspose" if transposed else "Conv")(channels, out, kernel, **arguments), out
    if kind == "bn":
        return spatial("BatchNorm")(channels, affine=weight is not None), channels
    if kind in ("in", "gn", "ln"):
        affine = weight is not None
        if kind == "in":
            return spatial("InstanceNorm")(channels, affine=affine), channels
        if kind == "gn":
            return nn.GroupNorm(sizes[0] if sizes else int(words[0]), channels, affine=affine), channels
        return nn.LayerNorm(tuple(weight.shape) if weight is not None else sizes, elementwise_affine=affine), channels
    if kind == "prelu":
        return nn.PReLU(1 if weight is None else weight.numel()), channels
    if kind == "relu" and sizes:
        return nn.ReLU6(), channels
    if kind == "leakyrelu":
        return nn.LeakyReLU(float(given.pop("", 0.01))), channels
    if kind == "elu":
        return nn.ELU(float(given.pop("", 1.0))), channels
    if kind in ("maxpool", "avgpool"):
        numbers = [int(word) for word in words if word.isdigit()] or sizes
        pool = spatial("MaxPool" if kind == "maxpool" else "AvgPool")
        return pool(*numbers[:3], ceil_mode="ceil" in brackets), channels
    if kind in ("gap", "globalavgpool"):
        return spatial("AdaptiveAvgPool")(1), channels
    if kind == "pixelshuffle":
        return nn.PixelShuffle(sizes[0]), channels // sizes[0] ** 2
    if kind == "pixelunshuffle":
        return nn.PixelUnshuffle(sizes[0]), channels * sizes[0] ** 2
    if kind.endswith("pad"):
        pad = next((pad for start, pad in _PADS.items() if kind.startswith(start)), None)
        if pad is not None:
            return spatial(pad)(sizes[0]), channels
    if kind in ("upsample", "nearest", "bilinear"):
        mode = "bilinear" if "bilinear" in (kind, *words) else "nearest"
        return nn.Upsample(scale_factor=sizes[0], mode=mode), channels
    if kind in _PLAIN and not sizes:
        return _PLAIN[kind](), channels
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know the layer {name}{number}")


def _all_used(case: Case, name: str, left: dict[str, float]) -> None:
    if left:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know {sorted(left)} of {name}")
