"""What every conv-like layer promises."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call

from battery.compare import assert_close, assert_near, assert_same, loss
from battery.subjects import Conv
from convatlas import load_weights, save_weights
from convatlas.errors import Unsupported
from convatlas.surgery import merge, swap


def test_takes_the_arguments_of_a_plain_convolution(conv: Conv):
    ours, plain = (inspect.signature(kind).parameters for kind in (conv.kind, conv.plain))
    theirs = [name for name in plain if name in ours]
    assert list(ours)[: len(theirs)] == theirs, "the arguments of torch come first and in torch's order"
    assert {"in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"} <= set(theirs)
    for name in theirs:
        assert ours[name].default == plain[name].default, name
    for name in list(ours)[len(theirs) :]:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, name


def test_makes_the_shape_of_a_plain_convolution(conv: Conv):
    for label, arguments in conv.geometries.items():
        for batch in (1, 3):
            x = conv.inputs(batch)
            y = conv.build(label)(x)
            assert y.shape == conv.plain(*conv.channels, **arguments)(x).shape, label
            assert y.isfinite().all(), label


def test_gradients_reach_input_and_parameters(conv: Conv):
    for label in conv.geometries:
        module, x = conv.build(label).train(), conv.inputs().requires_grad_()
        loss(module(x)).backward()
        for name, tensor in [("x", x), *module.named_parameters()]:
            if tensor.requires_grad:
                assert tensor.grad is not None, (label, name)
                assert tensor.grad.isfinite().all(), (label, name)
                assert tensor.grad.any(), (label, name)


def test_gradients_are_those_of_finite_differences(conv: Conv):
    module, x = conv.build().double(), conv.inputs(1).double()
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters), fast_mode=True)


def test_takes_the_place_of_a_plain_convolution(conv: Conv):
    for label, arguments in conv.geometries.items():
        plain = conv.plain(*conv.channels, **arguments).double()
        layer = conv.kind.from_conv(plain, **conv.options)
        assert isinstance(layer, conv.kind)
        assert {tensor.dtype for tensor in layer.parameters()} == {torch.float64}
        x = conv.inputs().double()
        assert layer(x).shape == plain(x).shape, label
        assert (layer.bias is None) == (plain.bias is None)
        net = nn.Sequential(plain, nn.ReLU())
        changed = swap(net, conv.plain, conv.kind, example_input=x, **conv.options)
        assert changed.changed == ("0",)
        assert type(net[0]) is conv.plain


def test_refuses_what_it_cannot_represent(conv: Conv):
    for arguments in conv.refused.values():
        plain = conv.plain(*conv.channels, **arguments)
        with pytest.raises(Unsupported):
            conv.kind.from_conv(plain, **conv.options)
        with pytest.raises(ValueError, match=r"\w"):
            conv.kind(*conv.channels, **{**arguments, **conv.options})
    with pytest.raises(Unsupported, match="Linear"):
        conv.kind.from_conv(nn.Linear(8, 8), **conv.options)


def test_gives_back_a_plain_convolution_and_merges(conv: Conv):
    for label in conv.geometries:
        module, x = conv.build(label).double(), conv.inputs().double()
        plain = module.to_conv()
        if plain is None:
            continue
        assert type(plain) is conv.plain, label
        with torch.no_grad():
            assert_close(plain(x), module(x), label)
            merged = merge(nn.Sequential(module, nn.ReLU()), example_input=x).model
            assert type(merged[0]) is conv.plain
            assert_close(merged(x), module(x).relu(), label)


def test_half_precision(conv: Conv):
    module, x = conv.build(), conv.inputs()
    with torch.no_grad():
        exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(x)
    assert_near(rough, exact)
    loss(rough).backward()
    half = copy.deepcopy(module).bfloat16()
    rough = half(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert_near(rough, exact)


def test_samples_are_independent_and_evaluation_repeats(conv: Conv):
    module, x = conv.build().double(), conv.inputs(3).double()
    with torch.no_grad():
        y = module(x)
        assert_same(module(x), y)
        assert_close(module(x[:1]), y[:1])


def test_memory_layout_does_not_matter(conv: Conv):
    module, x = conv.build(), conv.inputs()
    with torch.no_grad():
        assert_close(module(x.movedim(1, -1).contiguous().movedim(-1, 1)), module(x))


def test_weights_survive_a_file_and_a_copy(conv: Conv, tmp_path: Path):
    module, x = conv.build(), conv.inputs()
    other = conv.kind(*conv.channels, **{**next(iter(conv.geometries.values())), **conv.options}).eval()
    save_weights(module, tmp_path / "layer.safetensors")
    load_weights(other, tmp_path / "layer.safetensors")
    with torch.no_grad():
        expected = module(x)
        assert_same(other(x), expected)
        assert_same(copy.deepcopy(module)(x), expected)


def test_export_with_any_batch(conv: Conv):
    module, x = conv.build(), conv.inputs()
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},), strict=False)
        other = conv.inputs(3)
        assert_close(program.module()(other), module(other))


def test_compiles_without_a_break(conv: Conv):
    module, x = conv.build(), conv.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), module(x))


def test_says_what_is_wrong_with_its_input(conv: Conv):
    module = conv.build()
    with pytest.raises((ValueError, RuntimeError), match=str(conv.channels[0])):
        module(torch.randn(2, conv.channels[0] + 1, *(9, 7, 5)[: conv.dims]))
