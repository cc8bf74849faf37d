"""The Inception depthwise convolution as a function: what it computes, when it turns the map, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import chosen
from convatlas.ops.inception import inception_dwconv2d, inception_kernel


def arguments(channels: int = 10, groups: int = 2, square: int = 3, band: int = 5, size: tuple[int, int] = (7, 9)):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = random(2, channels, *size)
    w_hw, w_w, w_h = random(groups, 1, square, square), random(groups, 1, 1, band), random(groups, 1, band, 1)
    return x, w_hw, random(groups), w_w, random(groups), w_h, random(groups)


def test_first_channels_pass_bit_for_bit():
    x, *weights = arguments(channels=11, groups=3)
    y = inception_dwconv2d(x, *weights)
    assert torch.equal(y[:, :2], x[:, :2])
    assert not torch.isclose(y[:, 2:], x[:, 2:]).all(dim=(0, 2, 3)).any()


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(3, 11), (5, 3), (1, 1)])
def test_equals_one_dense_depthwise_convolution(sizes: tuple[int, int], dilation: int):
    x, *weights = arguments(square=sizes[0], band=sizes[1])
    kernel, bias = inception_kernel(x.shape[1], *weights)
    assert kernel.shape == (10, 1, max(sizes), max(sizes))
    padding = dilation * (max(sizes) // 2)
    dense = F.conv2d(x, kernel, bias, padding=padding, dilation=dilation, groups=10)
    torch.testing.assert_close(inception_dwconv2d(x, *weights, dilation), dense)


def test_the_branch_called_w_reads_along_the_width_and_the_one_called_h_along_the_height():
    x, w_hw, _, w_w, _, w_h, _ = arguments(channels=3, groups=1)
    for weight in (w_hw, w_w, w_h):
        weight.zero_()
    w_hw[0, 0, 0, 0] = w_w[0, 0, 0, 0] = w_h[0, 0, 0, 0] = 1  # the first tap: from above and left, left, above
    y = inception_dwconv2d(x, w_hw, None, w_w, None, w_h, None)
    assert torch.equal(y[:, 0], F.pad(x[:, 0], (1, 0, 1, 0))[:, :-1, :-1])
    assert torch.equal(y[:, 1], F.pad(x[:, 1], (2, 0))[:, :, :-2])
    assert torch.equal(y[:, 2], F.pad(x[:, 2], (0, 0, 2, 0))[:, :-2])


def test_auto_turns_only_large_contiguous_float32_maps_that_need_a_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    large, *weights = (tensor.float() for tensor in arguments(size=(28, 28)))
    small = large[:, :, :14, :14].contiguous()
    trained = large.clone().requires_grad_()
    assert chosen("inception_dwconv2d", trained, *weights, 1) == "turned"
    assert chosen("inception_dwconv2d", large, *weights, 1) == "naive"
    assert chosen("inception_dwconv2d", small.requires_grad_(), *weights, 1) == "naive"
    assert chosen("inception_dwconv2d", trained.double(), *weights, 1) == "naive"
    assert chosen("inception_dwconv2d", trained.to(memory_format=torch.channels_last), *weights, 1) == "naive"
    with torch.no_grad():
        assert chosen("inception_dwconv2d", trained, *weights, 1) == "naive"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert chosen("inception_dwconv2d", large, *weights, 1) == "turned"


def test_wrong_arguments_are_named():
    x, *weights = arguments()
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\), got 3 dimensions"):
        inception_dwconv2d(x[0], *weights)
    with pytest.raises(ValueError, match="same g channels with 3 g <= 5, got 2, 2 and 2"):
        inception_dwconv2d(x[:, :5], *weights)
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        inception_dwconv2d(x, *weights, 0)
    w_hw, b_hw, w_w, b_w, w_h, b_h = weights
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        inception_dwconv2d(x, w_hw, b_hw, w_w[:1], b_w, w_h, b_h)
    with pytest.raises(ValueError, match=r"must be odd to keep the resolution, got \(3, 3\), \(1, 4\) and \(5, 1\)"):
        inception_dwconv2d(x, w_hw, b_hw, w_w[..., 1:], b_w, w_h, b_h)
    with pytest.raises(ValueError, match=r"w_w must be \(g, 1, 1, k\) and w_h \(g, 1, k, 1\), got \(2, 1, 5, 1\)"):
        inception_dwconv2d(x, w_hw, b_hw, w_h, b_h, w_w, b_w)
