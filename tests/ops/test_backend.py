"""How an operator picks the implementation that runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops import backend
from convatlas.ops.backend import Backends, chosen, plainly


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Backends:
    """An operator whose fast implementation serves only even lengths."""
    monkeypatch.setattr(backend, "OPERATORS", {})
    backends = Backends("doubling", auto=lambda x: "fast" if len(x) % 2 == 0 else "naive")

    @backends.register("naive")
    def _naive(x: Tensor) -> Tensor:
        return x + x

    @backends.register("fast", refuses=lambda x: f"length {len(x)} is odd" if len(x) % 2 else None)
    def _fast(x: Tensor) -> Tensor:
        return 2 * x + 1e-9

    return backends


def test_auto_takes_what_it_can_and_tells_its_choice(doubling: Backends):
    even, odd = torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert doubling.names == ("naive", "fast")
    assert (chosen("doubling", even), chosen("doubling", odd)) == ("fast", "naive")
    assert doubling.run("auto", even)[0] == 2 + 1e-9
    assert doubling.run("auto", odd)[0] == 2
    assert doubling.run("naive", even)[0] == 2


def test_a_backend_asked_for_by_name_never_falls_back(doubling: Backends):
    assert doubling.refusal("fast", torch.ones(4)) is None
    assert doubling.refusal("fast", torch.ones(3)) == "length 3 is odd"
    message = "backend 'fast' of doubling cannot serve this call: length 3 is odd"
    with pytest.raises(Unsupported, match=message):
        doubling.run("fast", torch.ones(3))


def test_unknown_names_answer_with_the_nearest(doubling: Backends):
    with pytest.raises(UnknownName, match="unknown backend of doubling 'naiv': did you mean naive"):
        doubling.run("naiv", torch.ones(4))
    with pytest.raises(UnknownName, match="unknown operator 'doublin': did you mean doubling"):
        chosen("doublin", torch.ones(4))


def test_plainly_auto_takes_the_form_of_plain_torch(doubling: Backends):
    even = torch.ones(4, dtype=torch.float64)

    @doubling.register("torch", refuses=lambda x: "too long" if len(x) > 4 else None)
    def _torch(x: Tensor) -> Tensor:
        return torch.mul(x, 2) - 1e-9

    with plainly():
        assert chosen("doubling", even) == "torch"
        assert chosen("doubling", torch.ones(6)) == "naive"  # the form of torch refuses it
        assert doubling.run("auto", even)[0] == 2 - 1e-9
        assert doubling.run("fast", even)[0] == 2 + 1e-9
    assert chosen("doubling", even) == "fast"
    with pytest.raises(RuntimeError, match="on purpose"), plainly():
        raise RuntimeError("on purpose")
    assert chosen("doubling", even) == "fast"
