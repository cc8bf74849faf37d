from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import UnknownName
from convatlas.hooks import record, walk, watch


class Twice(nn.Module):
    """Calls one layer twice, under two names, and returns a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.act = nn.ReLU(inplace=True)
        self.second = self.first

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor | int]:
        hidden = self.first(x)
        return {"y": self.second(self.act(hidden)) * scale, "depth": 2}


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


class Careful(nn.Module):
    """Catches the exception of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = Failing()
        self.good = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.bad(x)
        except RuntimeError:
            return self.good(x)


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_walk_gives_shared_modules_once_parents_first():
    assert [name for name, _ in walk(Twice())] == ["", "first", "act"]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("?.*", ["0.0", "0.1"]),
        (nn.ReLU, ["0.1", "1"]),
        ((nn.Linear, nn.ReLU), ["0.0", "0.1", "1"]),
        (lambda name, module: not list(module.children()), ["0.0", "0.1", "1"]),
        ("", [""]),
    ],
)
def test_modules_are_chosen_by_name_class_or_predicate(select: object, names: list[str]):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
    assert [name for name, _ in walk(model, select)] == names  # type: ignore[arg-type]
    with record(model, select) as records:  # type: ignore[arg-type]
        model(torch.ones(1, 2))
    assert [entry.name for entry in records] == names


def test_choosing_nothing_is_an_error():
    with pytest.raises(UnknownName, match=r"unknown module 'frist'.*did you mean first"):
        walk(Twice(), "frist")
    with pytest.raises(ValueError, match="at least one of the 3 modules"), record(Twice(), nn.Conv2d):
        pass


def test_each_call_has_its_record():
    model, x = Twice(), torch.randn(2, 3)
    with record(model, nn.Linear) as records:
        y = model(x)["y"]
    assert [(entry.name, entry.call) for entry in records] == [("first", 0), ("first", 1)]
    assert records[0].args[0] is x
    assert torch.equal(records[1].output, y)
    torch.testing.assert_close(records[1].args[0], model.first(x).relu())


def test_arguments_and_outputs_of_any_structure():
    model = Twice()
    with record(model, "", keep=lambda tensor: tuple(tensor.shape)) as records:
        model(torch.zeros(2, 3), scale=0.5)
    (entry,) = records
    assert (entry.args, entry.kwargs) == (((2, 3),), {"scale": 0.5})
    assert entry.output == {"y": (2, 3), "depth": 2}


def test_clones_are_safe_from_operations_in_place():
    model, x = Twice(), torch.randn(4, 3)
    expected = model.first(x)
    with record(model, "first", keep=torch.clone) as records:
        model(x)
    torch.testing.assert_close(records[0].output, expected)
    assert records[0].output.min() < 0


def test_gradients_of_outputs():
    model, x = Twice(), torch.randn(2, 3)
    with record(model, gradients=True) as records:
        output = model(x)
        (output["y"] ** 2).sum().backward()
    whole, inner, _, outer = records
    torch.testing.assert_close(whole.gradient["y"], 2 * output["y"])
    assert whole.gradient["depth"] is None
    torch.testing.assert_close(outer.gradient, 2 * output["y"])
    weight = model.first.weight
    torch.testing.assert_close(inner.gradient, (2 * output["y"] @ weight) * (model.first(x) > 0))


def test_gradients_are_kept_as_asked_and_only_within_the_context():
    model, x = nn.Linear(3, 1), torch.randn(2, 3)
    with record(model, keep=lambda tensor: tensor.sum().item(), gradients=True) as records:
        y = model(x)
        y.sum().backward(retain_graph=True)
        assert records[0].gradient == 2.0
    (10 * y).sum().backward()
    assert records[0].gradient == 2.0


def test_without_a_backward_pass_there_is_no_gradient():
    model = nn.Linear(3, 1)
    with record(model, gradients=True) as records, torch.no_grad():
        model(torch.ones(2, 3))
    assert records[0].gradient is None
    with record(model) as records:
        model(torch.ones(2, 3)).sum().backward()
    assert records[0].gradient is None


def test_nothing_stays_in_the_model():
    model = Twice()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with record(model, gradients=True):
        model(torch.ones(1, 3))
        assert hooks_of(model) > 0
    assert hooks_of(model) == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_nothing_stays_after_an_exception():
    model = nn.Sequential(nn.Identity(), Failing())
    with pytest.raises(RuntimeError, match="broken"), record(model) as records:
        model(torch.ones(1))
    assert [entry.name for entry in records] == ["", "0", "1"]
    assert records[1].output is not None
    assert records[2].output is None
    assert hooks_of(model) == 0


def test_calls_nest_also_around_an_exception_that_is_caught():
    events: list[str] = []
    model = Careful()
    with watch(model, lambda name, *_: events.append(f"+{name}"), lambda name, _: events.append(f"-{name}")):
        model(torch.ones(1))
    assert events == ["+", "+bad", "-bad", "+good", "-good", "-"]
