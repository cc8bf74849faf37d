"""ConvFirst beyond what the battery tests: sizes of blocks and networks, the author's keys, folding, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from battery.subjects import stir
from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.convfirst import (
    BLOCKS,
    VARIANTS,
    ConvFirstBlock,
    FoldedConvFirst,
    FoldedMBConv,
    FusedMBConvBlock,
    MBConvBlock,
    MLPBlock,
    fold_block,
)
from convatlas.networks.registry import create_model
from convatlas.surgery import merge
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights


@pytest.mark.parametrize(("channels", "out", "width", "kernel_size", "expansion"), [(16, 24, 8, 5, 3), (8, 8, 1, 3, 4)])
def test_parameters_of_blocks(channels: int, out: int, width: int, kernel_size: int, expansion: int):
    options = {"kernel_size": kernel_size, "expansion": expansion}
    hidden, taps = expansion * channels, kernel_size**2
    pointwise, norms = channels * hidden + hidden * out, 2 * (hidden + out)
    block = ConvFirstBlock(channels, out, group_width=width, **options)
    assert count_parameters(block) == channels * width * taps + pointwise + norms + 2 * channels
    block = MBConvBlock(channels, out, group_width=width, **options)
    assert count_parameters(block) == hidden * width * taps + pointwise + norms + 2 * hidden
    assert (
        count_parameters(FusedMBConvBlock(channels, out, **options)) == taps * channels * hidden + hidden * out + norms
    )
    assert count_parameters(MLPBlock(channels, out, expansion=expansion)) == pointwise + norms


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_of_networks(name: str):
    config = VARIANTS[name]
    with torch.device("meta"):
        model = create_model(name)
    expected = 27 * 32 + 2 * 32 + 512 * 1280 + 2 * 1280 + 1281 * 1000
    channels = 32
    for depth, dim, kind in zip(config.depths, config.dims, config.block_types, strict=True):
        for _ in range(depth):
            hidden = 4 * channels
            spatial = channels if kind == "convfirst" else hidden
            expected += spatial * 8 * 9 + channels * hidden + hidden * dim + 2 * (spatial + hidden + dim)
            channels = dim
    assert count_parameters(model) == expected
    assert sum(config.depths) == {"tiny": 12, "small": 18}[name.rpartition("_")[2]]
    assert [tuple(info) for info in model.feature_info] == [(64, 4), (128, 8), (256, 16), (512, 32)]  # type: ignore[union-attr]


def test_keys_are_those_of_the_author():
    assert {
        key: tuple(value.shape) for key, value in ConvFirstBlock(16, 24).state_dict().items() if "weight" in key
    } == {
        "layers.0.weight": (16, 8, 3, 3),
        "layers.1.weight": (16,),
        "layers.2.weight": (64, 16, 1, 1),
        "layers.3.weight": (64,),
        "layers.5.weight": (24, 64, 1, 1),
        "layers.6.weight": (24,),
    }
    convs = [key for key, value in MBConvBlock(16, 16).state_dict().items() if value.dim() == 4]
    assert convs == ["layers.0.weight", "layers.3.weight", "layers.6.weight"]
    source = ConvFirstBlock(16, 16)
    stir(source)
    block = ConvFirstBlock(16, 16)
    report = load_weights(block, {f"module.{key}": value for key, value in source.state_dict().items()})
    assert not report.missing
    assert not report.unexpected
    assert torch.equal(block.layers[6].running_mean, source.layers[6].running_mean)


@pytest.mark.parametrize("tile", [None, (3, 2)])
@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (ConvFirstBlock(16, 16), FoldedConvFirst),
        (ConvFirstBlock(16, 8, stride=2, kernel_size=5, expansion=3), FoldedConvFirst),
        (MLPBlock(8, 8), FoldedConvFirst),
        (MBConvBlock(8, 8), FoldedMBConv),
        (MBConvBlock(8, 12, stride=2, group_width=1), FoldedMBConv),
        (FusedMBConvBlock(8, 8), FoldedMBConv),
    ],
)
def test_folding_changes_nothing(block: Any, kind: type[nn.Module], tile: tuple[int, int] | None):
    block = block.double()
    stir(block)
    block.eval()
    x = torch.randn(2, block.layers[0].in_channels, 13, 9, dtype=torch.float64)
    folded = fold_block(block, tile=tile)
    assert type(folded) is kind
    torch.testing.assert_close(folded(x), block(x), rtol=0, atol=1e-10)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    half = fold_block(block.float()).to(torch.float16)
    torch.testing.assert_close(half(x.half()).float(), block(x.float()), rtol=2e-2, atol=2e-2)


def test_merging_a_network_fuses_its_blocks():
    options = {"depths": (1, 2), "dims": (8, 12), "stem_width": 8, "head_width": 16, "group_width": 4, "num_classes": 3}
    model = create_model("convfirst_tiny", block_types=("convfirst", "mbconv"), **options)
    stir(model)
    x = torch.randn(2, 3, 21, 18)
    merged = merge(model.eval(), x).model
    kinds = [type(block) for stage in merged.stages for block in stage]  # type: ignore[union-attr]
    assert kinds == [FoldedConvFirst, FoldedMBConv, FoldedMBConv]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in merged.modules())
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)


def test_other_activations():
    block = ConvFirstBlock(8, 8, act=nn.ReLU).eval()
    assert isinstance(block.layers[4], nn.ReLU)
    assert block.merged() is None
    with pytest.raises(Unsupported, match="the fused operator has SiLU as its activation, the block has another"):
        fold_block(block)


def test_the_classifier_can_be_replaced():
    model = create_model("convfirst_tiny", depths=(1,), dims=(8,), block_types=("convfirst",), head_width=6)
    x = torch.randn(1, 3, 9, 9)
    model.eval().reset_classifier(0)  # type: ignore[operator]
    assert model(x).shape == (1, 6)
    model.reset_classifier(4)  # type: ignore[operator]
    assert model(x).shape == (1, 4)


def test_wrong_options_are_named():
    for kind in (ConvFirstBlock, MBConvBlock):
        with pytest.raises(ValueError, match="channels must be divisible by group_width, got"):
            kind(9, 9, expansion=1)
    for kind in BLOCKS.values():
        with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
            kind(8, 8, kernel_size=4)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        ConvFirstBlock(8, 8, stride=0)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        MLPBlock(8, 0)
    with pytest.raises(ValueError, match=r"call eval\(\) and fold_block, got a block in training mode"):
        fold_block(ConvFirstBlock(8, 8))
    with pytest.raises(Unsupported, match="only ConvFirst, MBConv, fused MBConv and MLP blocks fold, got Linear"):
        fold_block(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must name the same stages, got \(1, 1\)"):
        create_model("convfirst_tiny", depths=(1, 1))
    with pytest.raises(UnknownName, match="unknown block type 'convfrist': did you mean convfirst"):
        create_model("convfirst_tiny", block_types=("convfrist",) * 4)
