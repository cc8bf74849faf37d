"""Scaling MLPs: counts, no prior about space, layouts, names, weights folded into the first layer, refusals."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.data.transforms import Preprocess
from convatlas.errors import CheckpointError, UnknownName
from convatlas.networks.registry import create_model, model_config, published_files
from convatlas.networks.scaling_mlps import (
    VARIANTS,
    BottleneckMLP,
    BottleneckMLPConfig,
    PixelLinear,
    StandardMLP,
    StandardMLPConfig,
    first_layer_images,
    flatten_images,
    for_image_size,
    mlp_from_name,
    with_normalisation,
)
from convatlas.ops.resize import resize

COUNTS = {
    "B_6-Wi_512": {11230: 24_657_374, 1000: 19_409_384, 100: 18_947_684, 10: 18_901_514},
    "B_12-Wi_512": {11230: 37_261_790, 1000: 32_013_800, 100: 31_552_100, 10: 31_505_930},
    "B_6-Wi_1024": {11230: 74_469_342, 1000: 63_983_592, 100: 63_061_092, 10: 62_968_842},
    "B_12-Wi_1024": {11230: 124_843_998, 1000: 114_358_248, 100: 113_435_748, 10: 113_343_498},
}
BOTTLENECK = BottleneckMLPConfig().override(block_dims=[[16, 8], [12, 8]], num_classes=5, preprocess={"size": (4, 6)})
STANDARD = StandardMLPConfig().override(widths=[8, 8, 8], num_classes=5, preprocess={"size": (4, 6)})
each_kind = pytest.mark.parametrize("config", [BOTTLENECK, STANDARD], ids=["bottleneck", "standard"])


def stirred(model: Any) -> Any:
    """The model in float64 and evaluation mode, with weights that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    for classes, count in COUNTS[name].items():
        with torch.device("meta"):
            assert parameters(create_model(name, num_classes=classes)) == count
            assert parameters(mlp_from_name(name, num_classes=classes)) == count
    with torch.device("meta"):
        model = create_model(name)
        macs = cost(model, *model.example_inputs()).total.macs
    assert model.num_classes == 11230
    assert macs == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert name != "B_12-Wi_1024" or macs == 124_745_728


def test_other_counts_and_the_formula() -> None:
    with torch.device("meta"):
        assert parameters(mlp_from_name("B_6-Wi_1024", resolution=32, num_classes=10)) == 53_531_658
        assert parameters(create_model("MLP_6-Wi_1024", num_classes=10)) == 17_852_426
    for name, m, e, depth in (("B_3-Wi_20", 20, 4, 3), ("B_2-Wi_6-exp_2", 6, 2, 2)):
        model = mlp_from_name(name, resolution=5, num_classes=7, in_channels=2)
        inputs = 2 * 25
        expected = (inputs * m + m) + depth * (2 * e * m**2 + e * m + m + 2 * m) + (m * 7 + 7)
        assert parameters(model) == expected


@each_kind
def test_network_is_the_equations(config: Any) -> None:
    model, x = stirred(config.build()), images(3, 3, 4, 6)

    def norm(layer: Any, h: Tensor) -> Tensor:
        return F.layer_norm(h, (8,), layer.weight, layer.bias, 1e-5)

    def linear(layer: Any, h: Tensor) -> Tensor:
        return h @ layer.weight.flatten(1).T + layer.bias

    h = linear(model.linear_in, flatten_images(x))
    for block in model.blocks:
        if config is BOTTLENECK:
            h = h + linear(block.mlp.fc2, F.gelu(linear(block.mlp.fc1, norm(block.norm, h))))
        else:
            h = linear(block.linear, F.gelu(norm(block.norm, h)))
    torch.testing.assert_close(model(x), linear(model.linear_out, h))
    torch.testing.assert_close(model(flatten_images(x)), model(x))


def test_pixels_run_channel_by_channel_and_row_by_row() -> None:
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(flatten_images(x), torch.arange(24.0)[None])
    layer = PixelLinear(2, 5, (3, 4))
    expected = F.linear(flatten_images(x), layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(layer(x).flatten(1), expected)
    torch.testing.assert_close(nn.Conv2d.forward(layer, x).flatten(1), expected)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)).flatten(1), expected)


@each_kind
def test_there_is_no_prior_about_space(config: Any) -> None:
    model, x = stirred(config.build()), images(3, 3, 4, 6)
    before, order = model(x), torch.randperm(model.dim_in)
    with torch.no_grad():
        permuted = model.linear_in.weight.flatten(1)[:, order].reshape(model.linear_in.weight.shape)
        model.linear_in.weight.copy_(permuted)
    torch.testing.assert_close(model(flatten_images(x)[:, order]), before)


def test_without_the_second_layers_it_is_linear() -> None:
    model = stirred(BOTTLENECK.build())
    for block in model.blocks:
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
    x, y = images(2, 3, 4, 6), images(2, 3, 4, 6).flip(0)
    zero = model(torch.zeros_like(x))
    torch.testing.assert_close(model(2 * x - y) - zero, 2 * (model(x) - zero) - (model(y) - zero))


@pytest.mark.parametrize(("norm", "kind"), [("layer", nn.LayerNorm), ("batch", nn.BatchNorm1d), ("none", nn.Identity)])
def test_norms(norm: str, kind: type[nn.Module]) -> None:
    model = BOTTLENECK.override(norm=norm).build()
    assert all(type(block.norm) is kind for block in model.blocks)
    assert all(getattr(block.norm, "eps", 1e-5) == 1e-5 for block in model.blocks)
    foreign = theirs(model.state_dict())
    assert any(key.startswith("layernorms") for key in foreign) == (norm != "none")
    other = BOTTLENECK.override(norm=norm).build()
    assert load_weights(other, foreign).differences() == []
    if norm == "batch":
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model.train()(torch.randn(1, 3, 4, 6))


def test_initial_weights_are_those_of_linear_layers() -> None:
    model = mlp_from_name("B_1-Wi_64", resolution=16, num_classes=10)
    for layer, inputs in ((model.linear_in, 768), (model.blocks[0].mlp.fc1, 64), (model.linear_out, 64)):
        bound = inputs**-0.5
        for tensor in (layer.weight, layer.bias):
            assert 0.85 * bound < tensor.abs().max() <= bound


# Names and published files


def test_names() -> None:
    for name in ("B_12-Wi_1024", "B-12_Wi-1024", "B_12-Wi_1024-exp_4"):
        with torch.device("meta"):
            model = mlp_from_name(name)
        assert model.config.block_dims == ((4096, 1024),) * 12
        assert (model.num_classes, model.config.preprocess.shape) == (1000, (64, 64))
    with torch.device("meta"):
        model = mlp_from_name("B-6_Wi-512_res_64_cifar100_epochs_20")
        assert model.config == model_config("B_6-Wi_512_cifar100")
        assert mlp_from_name("B-6_Wi-512_res_32_imagenet21_epochs_800", num_classes=3, in_channels=1).dim_in == 32 * 32
    for wrong in ("B_12-Wi_", "B12-Wi1024", "B_6-Wi_512-x", "MLP"):
        with pytest.raises(UnknownName, match=f"must be like B_12-Wi_1024 .*, got '{wrong}'"):
            mlp_from_name(wrong)


def test_variants_carry_what_their_checkpoints_need() -> None:
    assert len(VARIANTS) == 17
    cifar, imagenet = (model_config(f"B_12-Wi_1024_{data}") for data in ("cifar10", "imagenet"))
    assert (cifar.num_classes, cifar.preprocess.mean, cifar.preprocess.std[2]) == (10, (0.4914, 0.4822, 0.4465), 0.2616)
    assert (imagenet.num_classes, imagenet.preprocess.mean[0], imagenet.preprocess.crop) == (1000, 0.485, 1.0)
    assert published_files("B_12-Wi_1024_cifar100")[0].figures == {"CIFAR-100 top-1 [%]": 80.0}
    assert published_files("B_6-Wi_512_imagenet")[0].figures == {
        "ImageNet-1K top-1 [%]": 33.3,
        "ImageNet-ReaL top-1 [%]": 38.2,
    }
    assert published_files("B_6-Wi_1024")[0].figures["fine-tuned on STL-10 top-1 [%]"] == 86.5
    assert all(file.by_hand for name in VARIANTS for file in published_files(name))


def test_images_are_resized_by_the_mean_of_areas() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    preprocess: Preprocess = BOTTLENECK.override(preprocess={"size": 4}).preprocess
    expected = pixels.reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    assert np.abs(preprocess.view(pixels) - expected).max() <= 1  # rounded after each axis
    larger = BOTTLENECK.override(preprocess={"size": 16}).preprocess.view(pixels)
    assert np.array_equal(larger, pixels.repeat(2, 0).repeat(2, 1))


# Checkpoints


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as the authors' code names it."""
    foreign = {}
    for key, value in state.items():
        key = re.sub(r"blocks\.(\d+)\.norm", r"layernorms.\1", key)
        key = re.sub(r"blocks\.(\d+)\.linear", r"layers.\1", key)
        key = key.replace("mlp.fc1", "block.0").replace("mlp.fc2", "block.2")
        foreign[key] = value.flatten(1) if key == "linear_in.weight" else value
    return foreign


@each_kind
def test_authors_layout_loads_completely(config: Any) -> None:
    source, target = config.build(), config.build()
    foreign = theirs(source.state_dict())
    assert foreign["linear_in.weight"].shape == (8, 72)
    keys = ("blocks.1.block.0.weight", "layernorms.1.bias") if config is BOTTLENECK else ("layers.1.weight",)
    assert all(key in foreign for key in keys)
    report = load_weights(target, foreign)
    assert (report.layout, report.loaded, report.differences()) == ("authors", len(foreign), [])
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_checkpoints_of_other_classes_and_channels_are_adapted_and_of_other_sizes_refused() -> None:
    foreign = theirs(BOTTLENECK.build().state_dict())
    report = load_weights(BOTTLENECK.override(num_classes=3).build(), foreign)
    assert ("linear_out.weight", "5 classes in the checkpoint, 3 in the model, which keeps its own") in report.adapted
    grey = BOTTLENECK.override(in_channels=1).build()
    load_weights(grey, foreign)
    expected = foreign["linear_in.weight"].reshape(8, 3, 4, 6).sum(1, keepdim=True)
    torch.testing.assert_close(grey.linear_in.weight, expected)
    with pytest.raises(CheckpointError, match=re.escape("linear_in.weight (8, 72) for (8, 3, 5, 6)")):
        load_weights(BOTTLENECK.override(preprocess={"size": (5, 6)}).build(), foreign)


# What goes into the first layer


@each_kind
def test_normalisation_goes_into_the_first_layer(config: Any) -> None:
    model = stirred(config.build())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = model(model.config.preprocess(pixels)[None].double())
    raw = with_normalisation(model, (0.0,), (1 / 255,))
    torch.testing.assert_close(
        raw(torch.tensor(pixels).permute(2, 0, 1)[None].double()), expected, rtol=1e-5, atol=1e-6
    )
    assert raw.config.preprocess.normalise(pixels).max() == pytest.approx(pixels.max())
    back = with_normalisation(raw, model.config.preprocess.mean, model.config.preprocess.std)
    torch.testing.assert_close(back.linear_in.weight, model.linear_in.weight)
    torch.testing.assert_close(back.linear_in.bias, model.linear_in.bias)
    grey = stirred(config.override(in_channels=1).build())
    x = grey.config.preprocess(pixels[..., :1])[None].double()
    unit = with_normalisation(grey, (0.0,), (1.0,))
    torch.testing.assert_close(
        unit(torch.tensor(pixels[None, None, ..., 0]).double() / 255), grey(x), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="mean and std must have one value or 3, got 2"):
        with_normalisation(model, (0.0, 0.0), (1.0,))


@each_kind
@pytest.mark.parametrize("interpolation", ["box", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2, 3), (8, 5), (4, 6)])
def test_another_image_size_goes_into_the_first_layer(config: Any, interpolation: Any, size: tuple[int, int]) -> None:
    model = stirred(config.override(preprocess={"interpolation": interpolation}).build())
    other = for_image_size(model, size)
    x = images(2, 3, *size)
    resized = resize(x, (4, 6), convention="pillow", interpolation=interpolation)
    torch.testing.assert_close(other(x), model(resized))
    assert other.config.preprocess.shape == other.linear_in.kernel_size == size
    assert other.config == config.override(preprocess={"interpolation": interpolation, "size": size})
    assert load_weights(other.config.build().double(), other.state_dict()).differences() == []


def test_first_layer_as_pictures() -> None:
    model = BOTTLENECK.build()
    with torch.no_grad():
        model.linear_in.weight.zero_()
        model.linear_in.weight[5, 0, 1, 2], model.linear_in.weight[5, 2, 3, 0] = 2.0, -1.0
        model.linear_in.weight[2, 1, 0, 0] = 0.5
    first, second, third = first_layer_images(model, 3)
    assert first.shape == (4, 6, 3)
    assert (first[1, 2, 0], first[3, 0, 2], first[0, 0, 0]) == (255, 64, 128)
    assert second[0, 0, 1] == 255
    assert (third == 128).all()
    grey = BOTTLENECK.override(in_channels=1).build()
    assert [picture.shape for picture in first_layer_images(grey)] == [(4, 6)] * 8


@each_kind
def test_wrong_inputs_are_refused(config: Any) -> None:
    model = config.build()
    with pytest.raises(ValueError, match="expected 4x6x3 = 72 inputs, got 24"):
        model(torch.empty(2, 24))
    with pytest.raises(ValueError, match="expected 4x6x3 = 72 inputs, got 84"):
        model(torch.empty(2, 3, 4, 7))
    with torch.device("meta"), pytest.raises(ValueError, match="expected 64x64x3 = 12288 inputs, got 3072"):
        mlp_from_name("B_1-Wi_8")(torch.empty(1, 3072))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_dims": [[16, 8], [16, 9]]}, "the thin widths of block_dims must be equal"),
        ({"block_dims": []}, "must hold a wide and a thin width for each block"),
        ({"block_dims": [[16, 0]]}, "must hold a wide and a thin width for each block"),
        ({"norm": "group"}, "unknown norm 'group'"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckMLP(BOTTLENECK.override(**changes))


def test_unequal_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("widths must be equal and positive, got (8, 9)")):
        StandardMLP(STANDARD.override(widths=[8, 9]))
