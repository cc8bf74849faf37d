"""The Dilated Reparam Block beyond what the battery tests: its branches, and that it merges into one convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from battery.subjects import stir
from convatlas.nn.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from convatlas.nn.mixers.dilated_reparam import BRANCHES, DilatedReparamBlock, merge_dilated_into_large_kernel
from convatlas.surgery import merge


@pytest.mark.parametrize("kernel_size", sorted(BRANCHES))
def test_published_branches_merge_into_one_kernel(kernel_size: int):
    block = DilatedReparamBlock(3, kernel_size).double()
    stir(block)
    block.eval()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)
    surgery = merge(block, x)
    conv = surgery.model
    assert type(conv) is DepthwiseConv2d
    assert conv.kernel_size == (kernel_size, kernel_size)
    assert not surgery.skipped
    torch.testing.assert_close(conv(x), block(x), rtol=1e-12, atol=1e-12)
    for size, rate in BRANCHES[kernel_size]:
        assert rate * (size - 1) + 1 <= kernel_size


@pytest.mark.parametrize(("dims", "kind"), [(1, DepthwiseConv1d), (3, DepthwiseConv3d)])
def test_signals_and_volumes_merge_too(dims: int, kind: type[torch.nn.Module]):
    block = DilatedReparamBlock(2, 7, kernel_sizes=(3, 1), dilations=(3, 2), dims=dims).double()
    stir(block)
    x = torch.randn(2, 2, *(9, 8, 7)[:dims], dtype=torch.float64)
    conv = merge(block, x).model
    assert type(conv) is kind
    torch.testing.assert_close(conv(x), block.eval()(x), rtol=1e-12, atol=1e-12)


def test_the_merged_kernel_is_the_sum_of_both():
    large, small = torch.randn(4, 1, 7, 7), torch.randn(4, 1, 3, 3)
    x = torch.randn(1, 4, 11, 9)
    kernel = merge_dilated_into_large_kernel(large, small, 2)
    separate = F.conv2d(x, large, padding=3, groups=4) + F.conv2d(x, small, padding=2, dilation=2, groups=4)
    torch.testing.assert_close(F.conv2d(x, kernel, padding=3, groups=4), separate)
    with pytest.raises(ValueError, match="the dilated kernel must lie in the middle of the large one"):
        merge_dilated_into_large_kernel(large, small, 4)


def test_merging_before_any_training_warns():
    block = DilatedReparamBlock(2, 5)
    with pytest.warns(UserWarning, match="merged before its batch norms have seen any data"):
        block.merged()
    block(torch.randn(2, 2, 6, 6))
    assert block.merged().weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 19}, "no default dilated branches for kernel 19; pass kernel_sizes and dilations"),
        ({"kernel_size": 6}, "kernel_size must be odd, got 6"),
        ({"dims": 4}, "dims must be 1, 2 or 3, got 4"),
        ({"kernel_sizes": (3,)}, "kernel_sizes and dilations must have as many entries"),
        ({"kernel_sizes": (3, 5), "dilations": (1,)}, "kernel_sizes and dilations must have as many entries"),
        ({"kernel_sizes": (5,), "dilations": (4,)}, "got kernel 5 with dilation 4"),
        ({"kernel_sizes": (3, 3), "dilations": (2, 2)}, "branches must differ from each other"),
    ],
)
def test_impossible_settings_are_named(options, message: str):
    with pytest.raises(ValueError, match=message):
        DilatedReparamBlock(4, **options)
