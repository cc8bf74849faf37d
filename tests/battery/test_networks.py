"""What every network promises, whatever it takes and returns."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from battery.compare import assert_close, assert_near, assert_same, first, leaves, loss
from battery.entries import NETWORKS
from battery.subjects import Network
from convatlas import load_weights, save_weights
from convatlas.catalog import model_module
from convatlas.errors import UnknownName
from convatlas.networks.registry import create_model, list_models, model_config, published_files


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are not frozen, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_gradients_reach_every_parameter(network: Network):
    model = network.build().train()
    loss(model(*network.inputs(model, 3))).backward()
    some = 0.0
    for name, parameter in trained(model):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        some += float(parameter.grad.abs().sum())
    assert some > 0


def test_one_sample_is_enough_and_evaluation_repeats(network: Network):
    model = network.build().double()
    inputs = tuple(x.double() for x in network.inputs(model, 2))
    with torch.no_grad():
        both, one = model(*inputs), model(*(x[:1] for x in inputs))
        assert_same(model(*inputs), both)
    assert all(leaf.isfinite().all() for leaf in leaves(both))
    assert_close(one, first(both, 1))


def test_samples_are_independent(network: Network):
    model = network.build().double()
    inputs = tuple(x.double() for x in network.inputs(model, 2))
    others = tuple(torch.cat([x[:1], 3 * torch.randn_like(x[1:])]) for x in inputs)
    with torch.no_grad():
        before, after = model(*inputs), model(*others)
    assert_close(first(after, 1), first(before, 1))
    assert not all(torch.equal(a, b) for a, b in zip(leaves(after), leaves(before), strict=True))


def test_gradients_of_one_sample_are_those_of_it_in_a_batch(network: Network):
    model = network.build().double()
    inputs = tuple(x.double() for x in network.inputs(model, 2))
    parameters = [parameter for _, parameter in trained(model)]
    gradients = [
        torch.autograd.grad(loss(output), parameters, allow_unused=True, materialize_grads=True)
        for output in (model(*(x[:1] for x in inputs)), first(model(*inputs), 1))
    ]
    for (name, _), alone, among in zip(trained(model), *gradients, strict=True):
        assert_close(alone, among, name)


def test_half_precision(network: Network):
    model = network.build()
    inputs = network.inputs(model, 3)
    with torch.no_grad():
        exact = model(*inputs)
    half = copy.deepcopy(model).bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    half_inputs = tuple(x.bfloat16() for x in inputs)
    with torch.no_grad():
        assert_near(half(*half_inputs), exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(model(*inputs), exact)
    loss(half.train()(*half_inputs)).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(*inputs)
    loss(output).backward()
    for changed in (half, model):
        assert all(parameter.grad.isfinite().all() for _, parameter in trained(changed))


def test_meta_device(network: Network):
    model = network.build()
    with torch.device("meta"):
        hollow = create_model(network.model, **network.options).eval()
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in hollow.state_dict().items()} == described
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    inputs = network.inputs(model, 2)
    shapes = [leaf.shape for leaf in leaves(hollow(*(x.to("meta") for x in inputs)))]
    assert shapes == [leaf.shape for leaf in leaves(model(*inputs))]


def test_memory_layout_does_not_matter(network: Network):
    model = network.build()
    inputs = network.inputs(model, 2)
    with torch.no_grad():
        expected = model(*inputs)
        volumes = any(x.dim() == 5 for x in inputs)
        model.to(memory_format=torch.channels_last_3d if volumes else torch.channels_last)
        moved = tuple(x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x for x in inputs)
        assert_close(model(*moved), expected)


def test_weights_survive_a_file(network: Network, tmp_path: Path):
    model, other = network.build(), create_model(network.model, **network.options).eval()
    inputs = network.inputs(model, 2)
    save_weights(model, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    with torch.no_grad():
        assert_same(other(*inputs), model(*inputs))


def test_copies(network: Network):
    model = network.build()
    inputs = network.inputs(model, 2)
    with torch.no_grad():
        assert_same(copy.deepcopy(model)(*inputs), model(*inputs))


def test_pickles(network: Network):
    model = network.build()
    inputs = network.inputs(model, 2)
    with torch.no_grad():
        assert_same(pickle.loads(pickle.dumps(model))(*inputs), model(*inputs))


def test_config_is_frozen_data(network: Network):
    config = model_config(network.model, **network.options)
    plain = dataclasses.asdict(config)
    assert model_config(network.model, **plain) == config
    assert model_config(network.model, **json.loads(json.dumps(plain))) == config
    assert hash(config) == hash(model_config(network.model, **plain))
    assert config.build().config == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)
    with pytest.raises(UnknownName, match=f"unknown option of {type(config).__name__} 'no_such_option'"):
        config.override(no_such_option=1)


def test_export_with_any_batch(network: Network):
    model = network.build()
    batch = Dim("batch", min=1, max=64)
    inputs = network.inputs(model, 2)
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)
        for size in (1, 3):
            other = network.inputs(model, size)
            assert_close(program.module()(*other), model(*other))


def test_compiles_without_a_break(family: Network):
    model = family.build()
    inputs = family.inputs(model, 2)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), model(*inputs)
    assert_close(ours, expected)
    loss(ours).backward()
    loss(expected).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in compiled.named_parameters():
        assert_close(parameter.grad, gradients[name.removeprefix("_orig_mod.")], name)


def variants() -> list[Any]:
    """Every model by name; skipped where an entry of its file is exempt."""
    test = "every_variant_runs_on_the_meta_device"
    exempt = {model_module(entry.model): entry.exempt[test] for entry in NETWORKS if test in entry.exempt}
    reasons = {name: exempt.get(model_module(name)) for name in list_models()}
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=reason)) if reason else name
        for name, reason in reasons.items()
    ]


@pytest.mark.parametrize("name", variants())
def test_every_variant_runs_on_the_meta_device(name: str):
    with torch.device("meta"):
        model = create_model(name).eval()
        inputs = model.example_inputs(2)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    for leaf in leaves(model(*inputs)):
        assert leaf.shape[0] == 2
    for file in published_files(name):
        assert file.url.startswith(("https://", "hf://"))
        assert file.licence
        assert file.figures
        assert file.verified
        assert file.sha256 is None or len(file.sha256) == 64
