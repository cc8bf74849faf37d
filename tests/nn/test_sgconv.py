"""Structured global convolution beyond what the battery tests: the definition of its kernels, state, blocks, files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import UnknownName, Unsupported
from convatlas.nn.mixers.sgconv import SGConv1d, SGConv2d
from convatlas.nn.sgconv_kernel import SGConvKernel, both_directions
from convatlas.ops.fft_conv import fft_conv
from convatlas.surgery import merge
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights


def literal_tap(values: list[float], stretch: int, tap: int, interpolation: str) -> float:
    """Value of a stretched sub-kernel at one tap, by its definition."""
    if interpolation == "nearest":
        return values[tap // stretch]
    place = min(max((tap + 0.5) / stretch - 0.5, 0.0), len(values) - 1.0)
    left = math.floor(place)
    right = min(left + 1, len(values) - 1)
    return values[left] + (place - left) * (values[right] - values[left])


@pytest.mark.parametrize("mode", ["cat", "sum"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("init_scale", [0, 1])
@pytest.mark.parametrize("learnable_decay", [None, "fixed"])
def test_kernels_follow_the_definition(mode: Any, interpolation: Any, init_scale: int, learnable_decay: Any):
    d, alphas = 3, (1.5, 3.0)
    kernel = SGConvKernel(
        2, 24, kernel_dim=d, init_scale=init_scale, mode=mode, interpolation=interpolation, decay=alphas,
        learnable_decay=learnable_decay,
    ).double()  # fmt: skip
    kernel.reset_kernel_norm()
    scales = 1 + 3 - init_scale
    assert (kernel.num_scales, kernel.length) == (scales, d * 2 ** (scales - 1 + init_scale))
    for channel in range(2):
        k = [0.0] * kernel.length
        start = 0
        for i, weight in enumerate(kernel.sub_kernels):
            stretch = 2 ** (init_scale + (i if mode == "sum" else max(0, i - 1)))
            gain = 1.0 if learnable_decay else alphas[channel] ** (scales - 1 - i)
            for tap in range(d * stretch):
                k[start + tap] += gain * literal_tap(weight[0, channel].tolist(), stretch, tap, interpolation)
            start += d * stretch if mode == "cat" else 0
        if kernel.decay is not None:
            k = [value * (lag + 1) ** -kernel.decay[channel].item() for lag, value in enumerate(k)]
        norm = math.sqrt(sum(value**2 for value in k))
        expected = torch.tensor(k, dtype=torch.float64) / norm
        torch.testing.assert_close(kernel()[0, channel], expected)
        for length in (1, 7, kernel.length):
            with torch.no_grad():
                torch.testing.assert_close(kernel(length)[0, channel], expected[:length])


def test_scales_fall_by_alpha():
    kernel = SGConvKernel(1, 1024, kernel_dim=4, decay=(2.0, 2.0))
    with torch.no_grad():
        for weight in kernel.sub_kernels:
            weight.fill_(1.0)
    k = kernel()[0, 0]
    starts = [0, *(4 * 2**i for i in range(8))]
    torch.testing.assert_close(k[starts][:-1] / k[starts][1:], torch.full((8,), 2.0))


def test_norm_is_one_at_the_start_and_then_fixed():
    layer = SGConv1d(6, 64, kernel_dim=8, heads=2, bidirectional=True, decay=(1.0, 4.0))
    kernel: Any = layer.kernel
    torch.testing.assert_close(kernel().norm(dim=-1), torch.ones(4, 6))
    with torch.no_grad():
        kernel.sub_kernels[0] *= 3
    assert kernel().norm(dim=-1).min() > 1.05
    kernel.reset_kernel_norm()
    torch.testing.assert_close(kernel().norm(dim=-1), torch.ones(4, 6))


def test_cosines_are_permuted_alike_in_all_heads():
    kernel = SGConvKernel(5, 64, heads=3, kernel_dim=32, init="cos")
    waves = torch.stack([torch.cos(torch.linspace(0, 2 * math.pi * i, 32)) for i in range(5)])
    for weight in kernel.sub_kernels:
        assert torch.equal(weight[0], weight[2])
        distances = torch.cdist(weight[0].detach(), waves)
        assert sorted(distances.argmin(1).tolist()) == list(range(5))
        assert distances.min(1).values.max() < 1e-3


LAYERS: dict[str, tuple[dict[str, Any], int, int]] = {
    "ListOps": ({"channels": 128, "l_max": 2048, "kernel_dim": 1}, 12, 36_224),
    "Text": ({"channels": 256, "l_max": 4096, "kernel_dim": 2}, 12, 144_128),
    "Retrieval": ({"channels": 256, "l_max": 4000, "kernel_dim": 1}, 13, 138_496),
    "Image": ({"channels": 512, "l_max": 1024}, 6, 722_432),
    "Image, learnable": ({"channels": 512, "l_max": 1024, "learnable_decay": "fixed"}, 6, 722_432 + 512),
    "Pathfinder": ({"channels": 256, "l_max": 1024}, 6, 230_144),
    "Path-X": ({"channels": 256, "l_max": 16384, "kernel_dim": 64, "init_scale": 1}, 8, 393_984),
}


@pytest.mark.parametrize(("options", "scales", "parameters"), LAYERS.values(), ids=list(LAYERS))
def test_published_layers_have_their_parameters(options: dict[str, Any], scales: int, parameters: int):
    with torch.device("meta"):
        layer = SGConv1d(**options, bidirectional=True, post_act="glu")
    assert layer.kernel.num_scales == scales
    assert count_parameters(layer) == parameters


def test_a_million_tokens_take_sixteen_scales():
    with torch.device("meta"):
        short, kernel = SGConvKernel(256, 500_000), SGConvKernel(256, 1_000_000)
    assert (kernel.num_scales, kernel.length) == (16, 1_048_576)
    assert count_parameters(kernel) - count_parameters(short) == 256 * 32


@pytest.mark.parametrize("bidirectional", [False, True])
def test_layer_is_the_direct_sum(bidirectional: bool):
    layer = SGConv1d(2, 12, kernel_dim=3, heads=2, bidirectional=bidirectional, linear=True).double()
    u = torch.randn(1, 2, 9, dtype=torch.float64)
    k = layer.kernel(9)
    forwards, backwards = (k[:2], k[2:]) if bidirectional else (k, torch.zeros_like(k))
    expected = torch.zeros(1, 4, 9, dtype=torch.float64)
    for head in range(2):
        for channel in range(2):
            for t in range(9):
                terms = [forwards[head, channel, j] * u[0, channel, t - j] for j in range(t + 1)]
                terms += [backwards[head, channel, j] * u[0, channel, t + 1 + j] for j in range(8 - t)]
                expected[0, 2 * head + channel, t] = sum(terms) + layer.D[head, channel] * u[0, channel, t]
    torch.testing.assert_close(layer(u), expected)


def test_causal_layers_do_not_look_ahead():
    u = torch.randn(2, 4, 16, dtype=torch.float64)
    later = u.clone()
    later[..., 9:] += 1
    for bidirectional in (False, True):
        layer = SGConv1d(4, 16, kernel_dim=4, bidirectional=bidirectional, post_act="glu").double()
        assert torch.allclose(layer(later)[..., :9], layer(u)[..., :9]) is not bidirectional


def test_explicit_kernels_are_those_of_fft_conv():
    layer = SGConv1d(4, 16, kernel_dim=4, bidirectional=True, linear=True)
    u = torch.randn(2, 4, 11)
    y = fft_conv(u, layer.materialize(11)[0], 22) + layer.D[0][:, None] * u
    torch.testing.assert_close(layer(u), y)
    one = torch.zeros(4, 5)
    one[:, 0] = 1
    torch.testing.assert_close(fft_conv(u, both_directions(one, 0 * one, 11), 22), u)


@pytest.mark.parametrize("layout", ["bhl", "blh"])
def test_blocks_give_what_the_whole_sequence_gives(layout: Any):
    layer = SGConv1d(3, 16, kernel_dim=4, heads=2, post_act="glu", norm=True, layout=layout).double().eval()
    u = torch.randn(2, 3, 29, dtype=torch.float64)
    u = u if layout == "bhl" else u.transpose(1, 2)
    axis = u.shape.index(29)
    state, blocks = layer.initial_state(2), []
    for block in u.split([1, 3, 20, 5], dim=axis):
        y, state = layer.step(block, state)
        blocks.append(y)
    with pytest.warns(UserWarning, match="longer than l_max = 16"):
        torch.testing.assert_close(torch.cat(blocks, dim=axis), layer(u))
    with pytest.raises(Unsupported, match="both directions"):
        SGConv1d(3, 16, bidirectional=True, kernel_dim=4).initial_state()


def test_layouts_agree():
    torch.manual_seed(0)
    first = SGConv1d(4, 16, kernel_dim=4, post_act=F.silu)
    torch.manual_seed(0)
    second = SGConv1d(4, 16, kernel_dim=4, post_act=F.silu, layout="blh")
    u = torch.randn(2, 4, 16)
    torch.testing.assert_close(second(u.transpose(1, 2)), first(u).transpose(1, 2))


def test_dropout_drops_whole_channels():
    layer = SGConv1d(64, 16, kernel_dim=4, act=lambda y: torch.ones_like(y), dropout=0.5)
    nn.init.eye_(layer.output.weight)
    nn.init.zeros_(layer.output.bias)
    y = layer(torch.randn(3, 64, 16))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y.min(-1).values, y.max(-1).values)


def test_merged_kernels_do_the_same():
    model = nn.Sequential(SGConv1d(4, 16, kernel_dim=4, post_act="glu"), SGConv1d(4, 16, kernel_dim=4)).double()
    u = torch.randn(2, 4, 13, dtype=torch.float64)
    merged = merge(model, u).model
    assert not any(isinstance(part, SGConvKernel) for part in merged.modules())
    torch.testing.assert_close(merged(u), model(u))


def authors_state(layer: SGConv1d, glu: bool) -> dict[str, Tensor]:
    """The state in the authors' names, with norms that were never taken."""
    linear = "output_linear.0" if glu else "output_linear"
    names = {"kernel.sub_kernels": "kernel_list", "output": linear, "norm.shift": "norm.norm.m"}
    names |= {"norm.scale": "norm.norm.s", "kernel.": ""}
    state = {}
    for key, value in layer.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs) if key.startswith(ours) else key
        state[key] = value.clone()
    state["kernel_norm"] = torch.ones_like(state["kernel_norm"])
    state["kernel_norm_initialized"] = torch.tensor(False)
    return state


@pytest.mark.parametrize("older", [False, True])
def test_authors_files_load(older: bool):
    source = SGConv1d(4, 64, kernel_dim=8, bidirectional=True, post_act="glu", norm=True)
    with torch.no_grad():
        for weight in source.kernel.sub_kernels:
            weight.add_(1.0)
    source.kernel.reset_kernel_norm()
    state = authors_state(source, glu=True)
    assert {key: tuple(value.shape) for key, value in state.items() if "norm.norm" not in key} == {
        "D": (1, 4),
        "multiplier": (1, 4, 1),
        "kernel_norm": (2, 4, 1),
        "kernel_norm_initialized": (),
        **{f"kernel_list.{i}": (2, 4, 8) for i in range(4)},
        "output_linear.0.weight": (8, 4),
        "output_linear.0.bias": (8,),
    }
    if older:
        state["kernel_norm"] = state["kernel_norm"][0]
    target = SGConv1d(4, 64, kernel_dim=8, bidirectional=True, post_act="glu", norm=True)
    load_weights(target, state)
    u = torch.randn(2, 4, 30)
    torch.testing.assert_close(target(u), source(u))
    assert target.kernel.kernel_norm_initialized
    torch.testing.assert_close(target.kernel.kernel_norm, source.kernel.kernel_norm)


@pytest.mark.parametrize("form", ["separable", "flattened"])
def test_images_are_convolved_in_all_directions(form: Any):
    layer = SGConv2d(2, (3, 4), form=form, kernel_dim=2).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    ks = [kernel() for kernel in layer.kernels]

    def tap(k: Tensor, channel: int, lag: int) -> Tensor:
        return k[0, channel, lag] if lag >= 0 else k[1, channel, -lag - 1]

    expected = torch.zeros_like(x)
    places = [(i, j) for i in range(3) for j in range(4)]
    for channel in range(2):
        for i, j in places:
            for a, b in places:
                if form == "separable":
                    weight = tap(ks[0], channel, i - a) * tap(ks[1], channel, j - b)
                else:
                    weight = tap(ks[0], channel, 4 * (i - a) + j - b)
                expected[0, channel, i, j] += weight * x[0, channel, a, b]
    torch.testing.assert_close(layer(x), expected + layer.D[:, None, None] * x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l_max": 0}, "l_max must be at least 1, got 0"),
        ({"kernel_dim": 33}, "kernel_dim must not exceed l_max, the less the larger init_scale is, got 33 and 16"),
        ({"init_scale": 3, "kernel_dim": 4}, "got 4 and 16 with init_scale 3"),
        ({"num_scales": 0}, "num_scales must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_sizes_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SGConv1d(4, **{"l_max": 16, "kernel_dim": 4, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"mode": "dog"}, {"interpolation": "cubic"}, {"init": "sin"}, {"learnable_decay": "no"}, {"layout": "lbh"}],
    ids=str,
)
def test_unknown_names_answer_with_the_known(arguments: dict[str, Any]):
    with pytest.raises(UnknownName, match=f"unknown {next(iter(arguments))}"):
        SGConv1d(4, 16, kernel_dim=4, **arguments)
