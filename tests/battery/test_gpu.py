"""The same numbers on a GPU as on the CPU, in float64, where no reduced precision can hide a mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from battery.compare import assert_close, leaves
from battery.subjects import Layer, Network, Operator
from convatlas.ops.backend import OPERATORS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def to_cpu(value: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in leaves(value)]


def test_networks_move_to_the_gpu(network: Network):
    model = network.build().double()
    inputs = tuple(x.double() for x in network.inputs(model, 2))
    with torch.no_grad():
        expected = model(*inputs)
        moved = model.cuda()(*(x.cuda() for x in inputs))
    assert all(leaf.is_cuda for leaf in leaves(moved))
    assert_close(to_cpu(moved), expected)


def test_layers_move_to_the_gpu(layer: Layer):
    for x in layer.inputs():
        module = layer.build().double()
        expected = module(x.double())
        assert_close(to_cpu(module.cuda()(x.double().cuda())), expected)


def test_backends_agree_on_the_gpu(operator: Operator):
    for arguments in operator.examples.values():
        example = arguments()
        moved = tuple(part.cuda() if isinstance(part, Tensor) else part for part in example)
        expected = operator.function(*example, backend="naive")
        for backend in ("auto", *OPERATORS[operator.name].names):
            if backend == "auto" or OPERATORS[operator.name].refusal(backend, *moved) is None:
                assert_close(to_cpu(operator.function(*moved, backend=backend)), expected, backend)
