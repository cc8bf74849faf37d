from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from analysis.linear_interpreter.nets import classifier, image, translator, upscaler
from convatlas.analysis.linear_interpreter import LinearInterpreter, LinearScope
from convatlas.analysis.linear_interpreter.cost import ScopeMemory, scope_memory
from convatlas.errors import Unsupported


@pytest.mark.parametrize(
    ("make", "shape"), [(classifier, (2, 3, 8, 8)), (upscaler, (2, 1, 5, 6)), (translator, (2, 2, 6, 6))]
)
@pytest.mark.parametrize("mode", ["mask", "tangent"])
def test_two_batches_at_once(make, shape: tuple[int, ...], mode: str):
    model, x0, z = make().float(), image(*shape).float(), torch.randn(shape)
    li = LinearInterpreter(model, mode)(x0)
    with torch.no_grad():
        alone = model(x0)
    with LinearScope(model, mode):
        y, response = model(torch.cat([x0, z])).chunk(2)
    assert torch.equal(y, alone)
    torch.testing.assert_close(response, li.apply(z))
    with LinearScope(model, mode, bias=True):
        affine = model(torch.cat([x0, z]))[2:]
        residual = model(torch.cat([x0, torch.zeros_like(z)]))[2:]
    torch.testing.assert_close(affine, li.apply(z, bias=True))
    torch.testing.assert_close(residual, li.apply(torch.zeros_like(z), bias=True))


def test_several_probes_for_each_input():
    model, x0, z = classifier(), image(2, 3, 8, 8), torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    with LinearScope(model, probes=3):
        y, *responses = model(torch.cat([x0, *z])).chunk(4)
    assert torch.equal(y, model(x0))
    torch.testing.assert_close(torch.stack(responses), LinearInterpreter(model)(x0).apply(z))


def test_attach_and_detach_leave_the_model_as_it_was():
    model, x0 = classifier(), image(1, 3, 8, 8)
    before = {name: module.__dict__.keys() for name, module in model.named_modules()}
    expected = model(x0)
    scope = LinearScope(model)
    assert scope.attach() is scope
    assert len(model(torch.cat([x0, x0]))) == 2
    with pytest.raises(RuntimeError, match=r"this LinearScope is attached already; detach\(\) it first"):
        scope.attach()
    scope.detach()
    scope.detach()
    assert torch.equal(model(x0), expected)
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_exception_leaves_the_model_as_it_was():
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Linear(2, 2), Failing()).eval()
    with pytest.raises(RuntimeError, match="broken"), LinearScope(model):
        model(torch.randn(2, 2))
    assert "forward" not in model.__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_of_the_instance_comes_back():
    model = nn.Linear(2, 2).eval()
    own = model.forward
    model.forward = own
    with LinearScope(model):
        assert model.forward is not own
    assert model.__dict__["forward"] is own


def test_nested_outputs_and_further_arguments():
    class Pyramid(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> dict[str, list[Tensor]]:
            return {"maps": [x.relu() * scale, x[:, :1] + 1]}

    x0, scale = torch.randn(2, 3), torch.tensor([[2.0], [3.0]])
    model = Pyramid().eval()
    with LinearScope(model):
        first, second = model(torch.cat([x0, x0]), scale)["maps"]
    assert len(first) == len(second) == 4
    torch.testing.assert_close(first[2:], x0.relu() * scale)
    torch.testing.assert_close(second[2:], x0[:, :1])


def test_nothing_is_stored_however_deep_the_network():
    def memory(depth: int) -> ScopeMemory:
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
        return scope_memory(nn.Sequential(*layers).eval(), torch.randn(2, 4, 16, 16))

    shallow, deep = memory(4), memory(16)
    assert deep.scope == shallow.scope < 2.5  # of a forward pass on both parts
    assert deep.autograd > 2 * shallow.autograd
    assert shallow.tape < deep.tape < deep.autograd


def test_bad_input():
    model = classifier()
    with LinearScope(model, probes=2):
        for wrong in (image(4, 3, 8, 8), torch.zeros(3, 3, 8, 8, dtype=torch.long), [1]):
            with pytest.raises(ValueError, match="the input must be 3 floating-point batches of one length, got"):
                model(wrong)
        model.train()
        with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
            model(image(3, 3, 8, 8))
    model.eval()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        LinearScope(model, probes=0)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        LinearScope(classifier().train())

    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    total = Total().eval()
    with LinearScope(total), pytest.raises(Unsupported, match="LinearScope needs outputs with a batch axis, got a num"):
        total(torch.randn(2, 3))
