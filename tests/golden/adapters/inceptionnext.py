"""InceptionNeXt: the operator, the MetaNeXt network and ConvNeXt with a partial depthwise convolution."""

from __future__ import annotations

from torch import Tensor

from convatlas.networks.convnext import ConvNeXt, ConvNeXtConfig
from convatlas.networks.inceptionnext import InceptionNeXt, InceptionNeXtConfig
from convatlas.nn.mixers.inception import InceptionDWConv2d, PartialDWConv2d
from golden.cases import Case

#: Fields of our configs by the reference's names.
_NETWORK = {"depths": "depths", "dims": "dims", "num_classes": "num_classes", "in_chans": "in_channels"}
_MIXER = {
    "square_kernel_size": "square_kernel_size",
    "band_kernel_size": "band_kernel_size",
    "branch_ratio": "branch_ratio",
}


def run(case: Case) -> dict[str, Tensor]:
    kind = case.config["cls"].partition(" ")[0]
    return {"InceptionDWConv2d": _operator, "PartialDWConv2d": _partial, "MetaNeXt": _metanext, "ConvNeXt": _convnext}[
        kind
    ](case)


def _operator(case: Case) -> dict[str, Tensor]:
    case.only("cls", "in_channels", "dilation", *_MIXER)
    options = {key: value for key, value in case.config.items() if key != "cls"}
    return _forward_backward(case, InceptionDWConv2d(**options))


def _partial(case: Case) -> dict[str, Tensor]:
    case.only("cls", "channels", "dim", "kernel_size", "conv_ratio")
    channels = case.config.get("channels", case.config.get("dim"))
    return _forward_backward(case, PartialDWConv2d(channels, case.config["kernel_size"], case.config["conv_ratio"]))


def _forward_backward(case: Case, layer: InceptionDWConv2d | PartialDWConv2d) -> dict[str, Tensor]:
    case.load(layer)
    x = case.inputs["x"].requires_grad_()
    output = layer(x)
    if "cotangent" not in case.inputs:
        return {"output": output}
    return {"output": output, **case.gradients(layer, output, {"grad_input": x})}


def _metanext(case: Case) -> dict[str, Tensor]:
    case.only("cls", "token_mixer", "ls_init_value", "mlp_ratios", "drop_path_rate", "drop_rate", *_NETWORK)
    config = InceptionNeXtConfig().override(**_fields(case, _NETWORK), drop_path=0.0)
    mixer = case.config.get("token_mixer") or {}
    config = config.override(**{_MIXER[key]: value for key, value in mixer.items()})
    if "mlp_ratios" in case.config:
        config = config.override(mlp_ratios=case.config["mlp_ratios"])
    if not any(key.endswith(".gamma") for key in case.weights):
        config = config.override(layer_scale_init=None)
    model = case.load(InceptionNeXt(config))
    x = case.inputs["x"]
    features = model.forward_features(x)
    results = {f"stage{index}": feature for index, feature in enumerate(features)}
    results |= {"stem": model.stem(x), "logits": model(x)}
    return {name: results[name] for name in case.outputs}


def _convnext(case: Case) -> dict[str, Tensor]:
    case.only("cls", "conv_ratio", "kernel_sizes", "kernel_size", "ls_init_value", "layer_scale_init_value", *_NETWORK)
    config = ConvNeXtConfig().override(**_fields(case, _NETWORK), drop_path=0.0)
    config = config.override(conv_ratio=case.config.get("conv_ratio", 1.0))
    for key in ("kernel_sizes", "kernel_size"):
        if key in case.config:
            config = config.override(kernel_size=case.config[key])
    if not any(key.endswith(".gamma") for key in case.weights):
        config = config.override(layer_scale_init=None)
    model = case.load(ConvNeXt(config))
    x = case.inputs["x"]
    results = {f"stage{index}": feature for index, feature in enumerate(model.forward_features(x))}
    results["logits"] = model(x)
    return {name: results[name] for name in case.outputs}


def _fields(case: Case, names: dict[str, str]) -> dict[str, object]:
    return {ours: case.config[theirs] for theirs, ours in names.items() if theirs in case.config}
