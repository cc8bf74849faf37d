"""Short convolutions of signals and tokens: what they compute and keep, and their kernel for GPUs."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.cost import cost
from convatlas.errors import Unsupported
from convatlas.ops import short_conv as module
from convatlas.ops.short_conv import short_conv1d
from convatlas.training.measure import kept_bytes

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the triton package and TRITON_INTERPRET=1",
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("taps", [1, 3, 4, 7])
@pytest.mark.parametrize("padding", [0, 3, 9])
def test_it_is_a_depthwise_convolution_in_either_layout(taps: int, padding: int):
    x, weight, bias = random(2, 3, 10), random(3, 1, taps), random(3)
    expected = F.conv1d(x, weight, bias, padding=padding, groups=3)
    torch.testing.assert_close(short_conv1d(x, weight, bias, padding), expected)
    torch.testing.assert_close(short_conv1d(x, weight[:, 0], None, padding), expected - bias[:, None])
    torch.testing.assert_close(short_conv1d(x.mT.contiguous(), weight, bias, padding, True), expected.mT)
    torch.testing.assert_close(short_conv1d(x.mT, weight, bias, padding, True), expected.mT)


@pytest.mark.parametrize(("batch", "length", "padding"), [(5, 4, 2), (2, 23, 0), (1, 9, 7), (2, 3, 1)])
def test_gradients_of_tokens_are_summed_in_pieces(
    batch: int, length: int, padding: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_CACHED", 3 * 8)
    tensors = [t.requires_grad_() for t in (random(batch, length, 3), random(3, 4), random(3))]
    results = [short_conv1d(*tensors, padding, True, backend=backend) for backend in ("view", "naive")]
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), tensors) for y in results))
    assert torch.autograd.gradgradcheck(lambda *t: short_conv1d(*t, padding, True), tensors, fast_mode=True)


def test_tokens_are_neither_moved_nor_copied():
    x, weight = torch.randn(2, 9, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = short_conv1d(x, weight, None, 2, True)
    assert y.is_contiguous()
    assert kept_bytes(lambda: short_conv1d(x, weight, None, 2, True)) == x.nbytes + weight.nbytes
    half = x.detach().bfloat16().requires_grad_()
    assert kept_bytes(lambda: short_conv1d(half, weight, None, 2, True)) == half.nbytes + weight.nbytes


@interpreted
@pytest.mark.parametrize(("channels_last", "padding"), [(False, 0), (True, 4), (False, 8), (True, 1)])
def test_the_kernel_in_the_interpreter(channels_last: bool, padding: int):
    shape = (2, 40, 70) if channels_last else (2, 5, 600)
    channels = 70 if channels_last else 5
    tensors = [t.requires_grad_() for t in (random(*shape), random(channels, 5), random(channels))]
    results = [short_conv1d(*tensors, padding, channels_last, backend=backend) for backend in ("triton", "naive")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), tensors) for y in results))


@interpreted
def test_the_operator_keeps_the_rules_of_torch_library():
    from convatlas.ops.kernels.short_conv import short_conv

    tensors = [t.requires_grad_() for t in (random(1, 6, 3), random(3, 4), random(3))]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(short_conv, (*tensors, 3, True), test_utils=checks)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return short_conv(x, weight, None, 2, True)

    counted = cost(Model(), torch.empty(2, 7, 3, device="meta"), torch.empty(3, 5, device="meta")).total.macs
    assert counted == 2 * 3 * 5 * 7


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch):
    x, weight = random(2, 3, 5), random(3, 4)
    for arguments, message in [
        ((x, weight, None, 0, True), r"x and weight must be \(B, L, D\) and \(D, K\), got \(2, 3, 5\) and \(3, 4\)"),
        ((x[0], weight), r"x and weight must be \(B, D, L\) and \(D, K\), got \(3, 5\) and \(3, 4\)"),
        ((x, weight, weight), r"bias must be \(3,\), got \(3, 4\)"),
        ((x, weight, None, -1), "padding must not be negative, got -1"),
        ((x[..., :3], weight), "kernels must have from 1 to 3 taps, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_conv1d(*arguments)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unsupported, match="triton"):
        short_conv1d(x, weight, backend="triton")
