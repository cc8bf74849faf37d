"""DISGAN's networks: sizes, what they compute, the authors' layout with its double names, what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.errors import CheckpointError
from convatlas.networks.disgan import DenseResidualBlock, RRDBConfig, UNetDiscriminatorConfig
from convatlas.networks.registry import create_model
from convatlas.ops.wavelets import dwt
from golden.adapters.disgan import _discriminator_key

TINY = {"filters": 3, "num_blocks": 1}


class _Silent(torch.nn.Conv3d):
    """Put in the place of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(super().forward(x))


@pytest.mark.parametrize(
    ("name", "count"),
    [("disgan_x2", 16_042_881), ("disgan_discriminator", 42_653_827), ("med3d_resnet10", 14_355_520)],
)
def test_published_sizes(name: str, count: int):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("scale", [2, 4])
def test_a_generator_enlarges_by_its_scale_and_sees_as_far_as_it_says(scale: int):
    model = RRDBConfig(**TINY, scale=scale).build().double().eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 0.2)
    size = 2 * model.reach + 3
    x = torch.zeros(1, 1, 1, 1, size, dtype=torch.float64)
    y = model(x)
    x[..., size // 2] = 1
    changed = (model(x) - y).abs()[0, 0, 0, 0] > 0
    assert y.shape == (1, 1, scale, scale, scale * size)
    seen = torch.arange(scale * size)[changed] // scale - size // 2
    assert seen.abs().max() == model.reach


def test_a_dense_block_without_its_last_convolution_is_the_identity():
    block = DenseResidualBlock(4)
    for parameter in block.blocks[-1].parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 3, 5, 4)
    assert torch.equal(block(x), x)


def test_a_dense_block_is_the_same_watched_swapped_or_not():
    block = DenseResidualBlock(4).eval()
    x = torch.randn(1, 4, 3, 5, 4)
    y = block(x)
    seen: list[int] = []
    handle = block.blocks[2][0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    torch.testing.assert_close(block(x), y)
    assert seen == [4]
    handle.remove()
    assert torch.equal(block(x), y)
    block.blocks[4][0] = _Silent(20, 4, 3, padding=1)
    assert torch.equal(block(x), x)


def test_its_operations_are_counted():
    block = DenseResidualBlock(4)
    x = torch.randn(1, 4, 3, 5, 4)
    assert cost(block, x).total.macs == 60 * 27 * 4 * 4 * (1 + 2 + 3 + 4 + 5)


def test_what_goes_down_and_across_in_the_discriminator_is_activated():
    """The authors' activations work in place, so that the wavelet units of all levels but the first see them."""
    model = UNetDiscriminatorConfig(filters=4, levels=3).build().eval()
    x = torch.randn(1, 1, 8, 8, 8)
    seen: list[Tensor] = []
    for unit in model.wavelets:
        unit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    got: list[Tensor] = []
    model.last.register_forward_pre_hook(lambda module, inputs: got.append(inputs[0]))
    model(x)
    assert torch.equal(seen[0], x)
    bands = dwt(x, "haar").transpose(1, 2).flatten(1, 2)
    first = torch.cat([model.first(model.stem_norm(model.stem(x))), model.wavelets[0].low(bands[:, :1])], 1)
    torch.testing.assert_close(seen[1], F.leaky_relu(first, 0.2))
    torch.testing.assert_close(got[0][:, 4:8], seen[1])
    torch.testing.assert_close(got[0][:, 8:], model.wavelets[0].high(bands[:, 1:]))


def _lightning(generator: torch.nn.Module, discriminator: torch.nn.Module, features: torch.nn.Module) -> dict:
    """A checkpoint in the authors' form: three networks, each dense layer under two names, norms of weights."""
    state = {f"FE.{name}": tensor for name, tensor in features.state_dict().items()}
    for name, tensor in generator.state_dict().items():
        name = name.replace("shallow.", "conv1.module.").replace("fusion.", "conv2.module.")
        name = name.replace("reconstruction.0.", "conv3.0.module.").replace("reconstruction.2.", "conv3.2.module.")
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[0] = "res_blocks1"
        if parts[0] == "upsampling":
            parts = ["upsampling", str(3 * int(parts[1]) // 2), parts[3]]
        state[f"generator.{'.'.join(parts)}"] = tensor
        if "blocks" in parts:
            place = parts.index("blocks")
            second = [*parts[:place], f"b{int(parts[place + 1]) + 1}", *parts[place + 2 :]]
            state[f"generator.{'.'.join(second)}"] = tensor
    state["generator.conv1.module.weight_sv"] = torch.ones(1)
    for name, tensor in discriminator.state_dict().items():
        key = _discriminator_key(name)
        state[f"discriminator.{key}"] = tensor
        if ".blocks." in key:
            head, _, tail = key.partition(".blocks.")
            state[f"discriminator.{head}.b{int(tail[0]) + 1}{tail[1:]}"] = tensor
    state["discriminator.initial_conv.module.weight_sv"] = torch.ones(1)
    return {"state_dict": state, "epoch": 20}


def test_the_authors_checkpoint_gives_all_three_networks():
    def build() -> tuple[torch.nn.Module, ...]:
        return (
            RRDBConfig(filters=3, num_blocks=2, scale=4).build(),
            UNetDiscriminatorConfig(filters=4, levels=3).build(),
            create_model("med3d_resnet10", width=2),
        )

    trained, fresh = build(), build()
    checkpoint = _lightning(*trained)
    for ours, theirs in zip(fresh, trained, strict=True):
        report = load_weights(ours, checkpoint)
        assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_file_may_hold_either_of_two_names():
    model, other = RRDBConfig(**TINY).build(), RRDBConfig(**TINY).build()
    state = _lightning(model, torch.nn.Module(), torch.nn.Module())["state_dict"]
    kept = {name: tensor for name, tensor in state.items() if ".blocks." not in name.replace("res_blocks1", "")}
    load_weights(other, kept)
    x = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(other(x), model(x))


def test_a_checkpoint_for_other_channels_is_refused():
    state = _lightning(RRDBConfig(**TINY).build(), torch.nn.Module(), torch.nn.Module())
    with pytest.raises(CheckpointError, match=r"of another shape"):
        load_weights(RRDBConfig(**TINY, in_channels=2).build(), state)


def test_convolutions_of_the_discriminator_begin_with_a_deviation_of_one():
    model = UNetDiscriminatorConfig(filters=8, levels=3).build()
    assert float(model.stem.weight.std()) == pytest.approx(1, rel=0.1)
    assert float(model.downs[0].dense.blocks[4][0].weight.std()) == pytest.approx(1, rel=0.05)
    assert float(model.ups[0].conv.weight.std()) < 0.1
    assert not model.stem.bias.any()
    assert float(UNetDiscriminatorConfig(filters=8, levels=3, init_std=None).build().stem.weight.std()) < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RRDBConfig(scale=3), "scale must be a power of two, got 3"),
        (lambda: RRDBConfig(dims=1), "dims must be 2 or 3, got 1"),
        (lambda: RRDBConfig(filters=0), "filters must be at least 1, got 0"),
        (lambda: UNetDiscriminatorConfig(levels=1), "levels must be at least 2, got 1"),
        (lambda: UNetDiscriminatorConfig(filters=1), "filters must be more than 1"),
        (lambda: UNetDiscriminatorConfig(init_std=-1), "init_std must not be negative"),
        (lambda: RRDBConfig(**TINY).build()(torch.zeros(1, 1, 4, 4)), r"x must be \(B, 1, D, H, W\)"),
        (
            lambda: UNetDiscriminatorConfig(filters=4).build()(torch.zeros(1, 1, 64, 64, 32)),
            r"sizes of x must be multiples of 64, got \(64, 64, 32\)",
        ),
        (lambda: create_model("med3d_resnet10", shortcut="none"), "unknown shortcut 'none'"),
        (lambda: create_model("med3d_resnet10", depths=(1, 1, 1, 0)), "depths must be four"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_stages_of_medicalnet_dilate_instead_of_striding():
    model = create_model("med3d_resnet10", width=2).eval()
    shapes = [tuple(map_.shape) for map_ in model.forward_features(torch.randn(1, 1, 33, 32, 40))]
    assert shapes == [(1, 2, 9, 8, 10), (1, 4, 5, 4, 5), (1, 8, 5, 4, 5), (1, 16, 5, 4, 5)]
    assert [info.stride for info in model.feature_info] == [4, 8, 8, 8]
    assert [model.layer3[0].conv1.dilation, model.layer4[0].conv2.dilation] == [(2, 2, 2), (4, 4, 4)]
