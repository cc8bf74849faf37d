"""SparK: masked layers, the whole pre-training of ConvNeXt and of a plain network, LAMB, schedules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convatlas.networks.convnext import ConvNeXt, ConvNeXtConfig
from convatlas.networks.resnet import ResNet, ResNetConfig
from convatlas.nn.masked import masked
from convatlas.training.optim import Lamb
from convatlas.training.spark import SparK, SparKModel, schedule
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "op" in case.config:
        return _layers(case)
    if "kind" in case.config:
        return _pretraining(case)
    if "max_it" in case.config:
        return _schedule(case)
    if "betas" in case.config:
        return _lamb(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know {sorted(case.config)}")


def _layers(case: Case) -> dict[str, Tensor]:
    """The layers stand in the order of the keys: convolution, batch norm, poolings, layer norm."""
    case.only("op", "f", "ratio", "in_ch", "out_ch")
    channels, width = case.config["in_ch"], case.config["out_ch"]
    kernel_size = case.weights["0.weight"].shape[-1]
    model = nn.Sequential(
        nn.Conv2d(channels, width, kernel_size, stride=2, padding=kernel_size // 2, bias="0.bias" in case.weights),
        nn.BatchNorm2d(width),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.LayerNorm(width),
    )
    case.load(model)
    conv, norm, max_pool, average_pool, layer_norm = model
    with masked(case.inputs["active"], model) as active:
        x = conv(active.mask(case.inputs["x"]))
        norm.train()
        trained = norm(x)
        statistics = {name: getattr(norm, name).clone() for name in ("running_mean", "running_var")}
        found = {"conv_s2": x, "bn_train": trained, **statistics, "bn_eval": norm.eval()(x)}
        found["maxpool"] = pooled = max_pool(trained)
        found["avgpool"] = average_pool(pooled)
        found["layernorm_channels_last"] = layer_norm(trained.permute(0, 2, 3, 1))
    return {name: found[name] for name in case.outputs}


class _Plain(nn.Module):
    """Convolution, batch norm and ReLU in a stem and stages."""

    def __init__(self, dims: list[int], depths: list[int], in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(in_channels, dims[0], 2), nn.MaxPool2d(3, 2, 1))
        before = [dims[0], *dims[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *_conv(channels, width, 2 if stage else 1),
                *(layer for _ in range(depth - 1) for layer in _conv(width, width, 1)),
            )
            for stage, (channels, width, depth) in enumerate(zip(before, dims, depths, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


def _conv(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _encoder(case: Case) -> nn.Module:
    config, channels = case.config, case.inputs["images"].shape[1]
    dims, depths, kind = config["dims"], config["depths"], config["kind"]
    if kind == "convnext":
        ours = ConvNeXtConfig(drop_path=config.get("drop_path", 0), in_channels=channels, num_classes=0)
        model = ConvNeXt(ours.override(dims=dims, depths=depths))
        model.norm = nn.Identity()
        return model
    if kind == "cnn":
        return _Plain(dims, depths, channels)
    if kind == "resnet":
        block = "bottleneck" if any("conv3" in key for key in case.weights) else "basic"
        widths = [width // 4 if block == "bottleneck" else width for width in dims]
        stem = next(value for key, value in case.weights.items() if key.endswith("sp_cnn.conv1.weight"))
        ours = ResNetConfig(block=block, in_channels=channels, num_classes=0, stem_width=len(stem))
        return ResNet(ours.override(depths=depths, widths=widths))
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know the encoder {kind}")


def _pretraining(case: Case) -> dict[str, Tensor]:
    case.only(
        *("kind", "dims", "depths", "input_size", "decoder_width", "mask_ratio", "len_keep", "densify_norm", "mode"),
        "drop_path",
    )
    config = case.config
    norm = config["densify_norm"]
    spark = SparK(config["mask_ratio"], config["decoder_width"], norm if norm in ("bn", "ln") else "none")
    model = SparKModel(_encoder(case), spark)
    case.load(model).train(config["mode"] == "train")
    result = model(case.inputs["images"], case.inputs["active"])
    result.loss.backward()
    found = {"loss": result.loss, "rec": result.prediction}
    found |= {f"feat{index}": each for index, each in enumerate(result.features)}
    found |= {f"to_dec{level}": each for level, each in result.to_dec.items()}
    start = "sparse_encoder.sp_cnn."
    for name, parameter in model.named_parameters():
        part, _, key = name.partition(".")
        if parameter.grad is not None:
            theirs = key.replace(".layer_scale.gamma", ".gamma")
            found[f"grad_weight_{start + theirs if part == 'encoder' else key}"] = parameter.grad
    return {name: found[name] for name in case.outputs}


def _schedule(case: Case) -> dict[str, Tensor]:
    case.only("peak_lr", "wd", "wd_end", "warmup_it", "max_it")
    config = case.config
    rows = [
        schedule(
            int(step),
            peak_lr=config["peak_lr"],
            weight_decay=config["wd"],
            weight_decay_end=config["wd_end"],
            warmup_steps=config["warmup_it"],
            steps=config["max_it"],
        )
        for step in case.inputs["iteration"]
    ]
    return dict(zip(("lr", "wd"), torch.tensor(rows, dtype=case.dtype).T, strict=True))


def _lamb(case: Case) -> dict[str, Tensor]:
    case.only("lr", "betas", "eps", "max_grad_norm", "weight_decay")
    config = case.config
    decays = config["weight_decay"]
    parameters = {name: nn.Parameter(case.inputs[name].clone()) for name in decays}
    optimizer = Lamb(
        [{"params": [parameter], "weight_decay": decays[name]} for name, parameter in parameters.items()],
        lr=config["lr"],
        betas=tuple(config["betas"]),
        eps=config.get("eps", 1e-6),
        max_grad_norm=config["max_grad_norm"],
    )
    found = {}
    for step in range(sum(name.startswith("g1_") for name in case.inputs)):
        for name, parameter in parameters.items():
            parameter.grad = case.inputs[f"g{name.removeprefix('p')}_{step}"]
        optimizer.step()
        found |= {f"{name}_{step}": parameter.detach().clone() for name, parameter in parameters.items()}
    return found
