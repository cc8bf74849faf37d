"""Every network can be read as a linear system: y = A x0 + r, and A is the Jacobian where it is asked to be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from battery.compare import assert_close, assert_same, leaves
from battery.subjects import Network
from convatlas.analysis.linear_interpreter import Interpretation, LinearInterpreter, LinearScope
from convatlas.errors import Unsupported

#: Largest error of A x0 + r in float64, relative to the largest of y, A x0, r and 1.
TOLERANCE = 1e-12


def doubled(network: Network, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = network.build().double()
    return model, tuple(x.double() if x.is_floating_point() else x for x in network.inputs(model, batch))


def interpretations(model: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> Iterator[tuple[int, Interpretation]]:
    """The interpretation of each tensor of the output that is no softmax and no constant; there must be one."""
    with torch.no_grad():
        outputs = list(leaves(model(*inputs)))
    found, refusal = False, "none is a tensor of real numbers"
    for index, output in enumerate(outputs):
        if not output.is_floating_point():
            continue
        try:
            li = LinearInterpreter(model, mode, output=lambda result, i=index: list(leaves(result))[i])(*inputs)
        except Unsupported as error:
            refusal = str(error)
            continue
        found = True
        yield index, li
    assert found, f"no output can be interpreted: {refusal}"


def test_linear_interpretation_is_exact(network: Network):
    model, inputs = doubled(network, 2)
    for index, li in interpretations(model, inputs, "mask"):
        with torch.no_grad():
            y = list(leaves(model(*inputs)))[index]
            assert_close(li.output, y)
            scale = max(1.0, *(float(part.abs().max()) for part in (y, li.linear, li.residual)))
            assert li.error <= TOLERANCE * scale
            z, c = torch.randn_like(li.x0), torch.randn_like(li.output)
            left, right = (c * li.apply(z)).sum(), (li.apply_transpose(c) * z).sum()
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9 * scale)


def test_linear_scope_runs_beside_the_network(network: Network):
    model, inputs = doubled(network, 2)
    model.float()
    x0, *others = (x.float() if x.is_floating_point() else x for x in inputs)
    li = next(iter(interpretations(model, (x0, *others), "mask")))[1]
    with torch.no_grad():
        expected = list(leaves(model(x0, *others)))
        with LinearScope(model):
            both = list(leaves(model(torch.cat([x0, x0]), *others)))
        assert_same(list(leaves(model(x0, *others))), expected)
    index = next(i for i, leaf in enumerate(expected) if leaf.shape == li.output.shape and torch.equal(leaf, li.output))
    first, second = both[index].chunk(2)
    assert_same(first, expected[index])
    assert_close(second, li.linear)


def test_tangent_interpretation_is_the_jacobian(network: Network):
    model, inputs = doubled(network, 2)
    for index, li in interpretations(model, inputs, "tangent"):
        x0 = inputs[0].clone().requires_grad_()
        y = list(leaves(model(x0, *inputs[1:])))[index]
        c = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x0, c)
        assert_close(li.apply_transpose(c), gradient)
