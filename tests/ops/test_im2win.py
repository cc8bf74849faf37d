"""Convolution by window tensors beyond what the battery tests: torch's numbers, definitions, the papers' table."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.backend import OPERATORS
from convatlas.ops.im2win import (
    BENCHMARK_LAYERS,
    conv2d_im2win,
    conv_memory,
    im2col_numel,
    im2win,
    im2win_filter,
    im2win_numel,
)

INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 9, 11), (4, 3, 3, 3), {}),
    "rectangular": ((1, 2, 10, 7), (3, 2, 5, 2), {"stride": (2, 3)}),
    "padded": ((2, 3, 4, 5), (2, 3, 4, 3), {"padding": (2, 1)}),
    "dilated": ((1, 4, 9, 13), (4, 2, 3, 3), {"dilation": (2, 3), "groups": 2, "padding": 1, "stride": 2}),
    "no_overlap": ((1, 2, 9, 6), (3, 2, 3, 3), {"stride": 3}),
    "gaps": ((1, 2, 9, 11), (3, 2, 2, 2), {"stride": 4, "dilation": 2}),
    "depthwise": ((2, 5, 6, 6), (10, 1, 3, 3), {"groups": 5, "padding": "same"}),
    "even_same": ((1, 2, 5, 6), (3, 2, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    "one_tap": ((2, 3, 1, 4), (2, 3, 1, 1), {}),
    "one_output": ((1, 2, 3, 3), (3, 2, 3, 3), {}),
    "no_images": ((0, 2, 5, 5), (3, 2, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("backend", OPERATORS["conv2d_im2win"].names)
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_torch(case: str, backend: str):
    if backend.startswith("triton") and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    shape, filters, options = CASES[case]
    x, weight, bias = random(*shape), random(*filters), random(filters[0])
    y = conv2d_im2win(x, weight, bias, **options, backend=backend)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case != "no_images"])
def test_gradients_are_those_of_torch(case: str):
    shape, filters, options = CASES[case]
    ours, theirs = ([t.requires_grad_() for t in (random(*shape), random(*filters))] for _ in range(2))
    conv2d_im2win(*ours, **options).sin().sum().backward()
    F.conv2d(*theirs, **options).sin().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_second_gradients():
    x, weight = random(1, 2, 5, 4).requires_grad_(), random(3, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: conv2d_im2win(a, b, None, 2, 1), (x, weight))


def test_windows_follow_the_definition():
    x = random(2, 3, 8, 7)
    windows = im2win(x, (3, 2), (2, 1), (1, 0), (2, 1))
    wide = F.pad(x, (0, 0, 1, 1))
    assert windows.shape == (2, 3, 3, 7, 3)
    for i in range(3):
        for w in range(7):
            for h in range(3):
                assert torch.equal(windows[:, :, i, w, h], wide[:, :, 2 * i + 2 * h, w])
    assert torch.equal(im2win(x, (3, 2), (2, 1), (1, 0), (2, 1), "nhwc"), windows.permute(0, 2, 3, 4, 1))
    weight = random(4, 3, 3, 2)
    assert torch.equal(im2win_filter(weight), weight.transpose(2, 3))
    assert torch.equal(im2win_filter(weight, "nhwc"), weight.permute(0, 3, 2, 1))


def test_windows_are_contiguous_slices():
    x, weight = random(1, 2, 7, 9), random(1, 2, 3, 3)
    flat, filters = im2win(x, 3, 2)[0].flatten(2), im2win_filter(weight)[0].flatten(1)
    y = F.conv2d(x, weight, stride=2)[0, 0]
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close((flat[:, i, 6 * j : 6 * j + 9] * filters).sum(), y[i, j])


def test_without_overlap_windows_are_the_image():
    x = random(1, 2, 9, 6)
    assert torch.equal(im2win(x, 3, 3).flatten().sort().values, x.flatten().sort().values)
    assert torch.equal(im2win(x, 1)[..., 0], x)


#: GFLOP for one image, elements of window tensor and of im2col over those of the image, as published.
TABLE = {
    "Conv1": (0.2108, 2.67, 7.10),
    "Conv2": (0.2186, 2.67, 7.11),
    "Conv3": (0.2318, 3.42, 11.72),
    "Conv4": (2.3846, 3.41, 11.60),
    "Conv5": (0.4915, 4.17, 17.36),
    "Conv6": (0.2359, 2.50, 6.25),
    "Conv7": (0.1703, 2.97, 8.84),
    "Conv8": (1.7842, 2.95, 8.68),
    "Conv9": (0.2150, 2.89, 8.37),
    "Conv10": (0.1994, 2.79, 7.76),
    "Conv11": (0.1699, 2.57, 6.61),
    "Conv12": (0.1180, 2.14, 4.59),
}


@pytest.mark.parametrize("name", TABLE)
def test_memory_is_that_of_the_published_table(name: str):
    layer = BENCHMARK_LAYERS[name]
    flops, windows, columns = TABLE[name]
    image = layer.in_channels * layer.size**2
    assert layer.flops / 1e9 == pytest.approx(flops, abs=6e-5)
    assert im2win_numel(layer.shape, layer.kernel_size, layer.stride) / image == pytest.approx(windows, abs=6e-3)
    assert im2col_numel(layer.shape, layer.kernel_size, layer.stride) / image == pytest.approx(columns, abs=6e-3)


def test_counts_are_those_of_the_tensors():
    x = random(2, 3, 9, 8)
    place: Any = ((3, 2), (2, 1), (1, 2), (1, 3))
    assert im2win_numel(x.shape, *place) == im2win(x, *place).numel()
    kernel, stride, padding, dilation = place
    assert im2col_numel(x.shape, *place) == F.unfold(x, kernel, dilation, padding, stride).numel()
    bytes_ = [conv_memory(x.shape, *place, algorithm=name, dtype=torch.float16) for name in ("im2win", "direct")]
    assert bytes_ == [2 * im2win_numel(x.shape, *place), 0]
    with pytest.raises(UnknownName, match="unknown algorithm 'fft'"):
        conv_memory(x.shape, 3, algorithm="fft")  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_keeps_windows_only_when_asked(recompute: bool):
    x, weight = random(1, 4, 20, 20).requires_grad_(), random(2, 4, 3, 3).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = conv2d_im2win(x, weight, recompute=recompute)
    windows = 0 if recompute else im2win_numel(x.shape, 3) * 8
    assert sum(kept.values()) == x.nbytes + weight.nbytes + windows
    y.sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, weight).sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": random(3, 5, 5)}, r"x and weight must be \(B, C, H, W\)"),
        ({"x": random(1, 3, 5, 5)}, "x must have 2 channels for weight"),
        ({"weight": random(3, 2, 6, 3)}, r"kernel size \(6, 3\) can't be greater than padded input \(5, 5\)"),
        ({"x": random(1, 2, 5, 5).long()}, "must have one floating-point type, got torch.int64"),
        ({"x": random(1, 4, 5, 5), "groups": 2}, "groups must be at least 1 and divide the 3 filters, got 2"),
        ({"padding": "same", "stride": 2}, "padding 'same' needs a stride of 1"),
        ({"stride": 0}, "kernel_size, stride and dilation must be at least 1, padding 0"),
        ({"bias": random(2)}, r"bias must be \(3\), got \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        conv2d_im2win(**{"x": random(1, 2, 5, 5), "weight": random(3, 2, 3, 3), **arguments})


def test_kept_windows_need_their_layout():
    x, weight = random(1, 2, 5, 5), random(2, 1, 3, 3)
    with pytest.raises(Unsupported, match="one group only, got 2"):
        conv2d_im2win(x, weight, groups=2, recompute=False, backend="nhwc")
    with pytest.raises(Unsupported, match="no window tensor that could be kept"):
        conv2d_im2win(x, weight, groups=2, recompute=False, backend="nchw")
