"""What every shape-keeping layer promises."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from battery.compare import assert_close, assert_near, assert_same, loss
from battery.subjects import Layer
from convatlas import load_weights, save_weights


def test_keeps_the_shape(layer: Layer):
    module = layer.build()
    for dims in layer.dims:
        for size in ((7, 5, 3), (1, 4, 6), (1, 1, 1)):
            for batch in (1, 3):
                x = torch.randn(batch, layer.channels, *size[:dims])
                y = module(x)
                assert y.shape == x.shape
                assert y.isfinite().all()


def test_gradients_reach_input_and_parameters(layer: Layer):
    module = layer.build().train()
    for x in layer.inputs():
        module.zero_grad()
        loss(module(x.requires_grad_())).backward()
        for name, tensor in [("x", x), *module.named_parameters()]:
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
            assert tensor.grad.any(), name


def test_gradients_are_those_of_finite_differences(layer: Layer):
    module = layer.build().double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    for dims in layer.dims:
        x = torch.randn(2, layer.channels, *(3, 2, 2)[:dims], dtype=torch.float64, requires_grad=True)

        def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return functional_call(module, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


def test_half_precision(layer: Layer):
    module = layer.build()
    for x in layer.inputs():
        exact = module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = module(x)
        assert_near(rough, exact)
        loss(rough).backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
        half = copy.deepcopy(module).bfloat16()
        rough = half(x.bfloat16())
        assert rough.dtype == torch.bfloat16
        assert_near(rough, exact)


def test_samples_are_independent_and_evaluation_repeats(layer: Layer):
    module = layer.build()
    for x in layer.inputs(batch=3):
        y = module(x)
        assert_same(module(x), y)
        changed = x.clone()
        changed[1:] = 10 * torch.randn_like(changed[1:])
        assert_close(module(changed)[0], y[0])
        assert_close(module(x[:1]), y[:1])


def test_memory_layout_does_not_matter(layer: Layer):
    module = layer.build()
    for x in layer.inputs():
        y = module(x)
        assert_close(module(x.movedim(1, -1).contiguous().movedim(-1, 1)), y)
        assert_close(module(x.repeat_interleave(2, dim=-1)[..., ::2]), y)


def test_state_survives_a_file_and_a_copy(layer: Layer, tmp_path: Path):
    module, other = layer.build(), layer.kind(layer.channels, **layer.options).eval()
    x = layer.inputs()[0]
    assert_same(copy.deepcopy(module)(x), module(x))
    save_weights(module, tmp_path / "layer.safetensors")
    load_weights(other, tmp_path / "layer.safetensors")
    assert_same(other(x), module(x))


def test_wrong_inputs_are_named(layer: Layer):
    module = layer.build()
    for x in layer.inputs():
        for wrong in (x[:, 1:], torch.cat([x, x[:, :1]], dim=1)):
            with pytest.raises(ValueError, match="x must be "):
                module(wrong)
    for dims in {0, 1, 2, 3} - set(layer.dims):
        with pytest.raises(ValueError, match="x must be "):
            module(torch.randn(2, layer.channels, *[3] * dims))


def test_device_and_dtype_arguments(layer: Layer):
    if not layer.takes_dtype:
        pytest.skip("the constructor takes no dtype")
    made = layer.kind(layer.channels, **layer.options, device="meta", dtype=torch.float64)
    plain = layer.kind(layer.channels, **layer.options)
    for name, parameter in made.named_parameters():
        assert parameter.is_meta, name
        assert parameter.dtype == torch.float64, name
        assert parameter.shape == plain.get_parameter(name).shape, name


def test_compiles_without_a_break(layer: Layer):
    module = layer.build()
    for x in layer.inputs():
        torch._dynamo.reset()
        compiled: nn.Module = torch.compile(module, fullgraph=True, backend="eager")
        assert_close(compiled(x), module(x))
