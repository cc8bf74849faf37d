"""What every operator promises: all backends compute the same, `auto` finds the fast ones, a name is never ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from battery.compare import assert_close, assert_near, loss
from battery.subjects import Arguments, Operator
from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.backend import OPERATORS, chosen

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


def cast(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(part) if isinstance(part, Tensor) and part.is_floating_point() else part for part in arguments)


def served(operator: Operator, backend: str) -> Iterator[tuple[str, Arguments]]:
    """The examples that a backend takes."""
    for label, arguments in operator.examples.items():
        try:
            operator.function(*arguments(), backend=backend)
        except Unsupported:
            continue
        yield label, arguments


def trained(arguments: tuple[Any, ...]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The floating tensors of some arguments as leaves that get gradients, and the arguments with them."""
    fresh = cast(arguments, lambda x: x.detach().clone().requires_grad_())
    return [part for part in fresh if isinstance(part, Tensor) and part.requires_grad], fresh


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_backends_agree(operator: Operator, dtype: torch.dtype, layout: str):
    for backend in OPERATORS[operator.name].names:
        examples = list(served(operator, backend))
        assert examples, f"{backend} serves no example"
        for _, arguments in examples:
            plain = cast(arguments(), lambda x: x.to(dtype))
            moved = cast(plain, LAYOUTS[layout])
            result = operator.function(*moved, backend=backend)
            assert result.dtype == dtype
            assert_close(result, operator.function(*plain, backend="naive"))


def test_gradients_agree(operator: Operator):
    for backend in OPERATORS[operator.name].names[1:]:
        for _, arguments in served(operator, backend):
            (tensors, ours), (twins, theirs) = trained(example := arguments()), trained(example)
            loss(operator.function(*ours, backend=backend)).backward()
            loss(operator.function(*theirs, backend="naive")).backward()
            assert_close([x.grad for x in tensors], [x.grad for x in twins])


def test_gradients_are_those_of_finite_differences(operator: Operator):
    for backend in OPERATORS[operator.name].names:
        for label, arguments in served(operator, backend):
            tensors, fixed = trained(arguments())

            def call(*values: Tensor, fixed: tuple[Any, ...] = fixed, backend: str = backend) -> Tensor:
                left = iter(values)
                parts = [next(left) if isinstance(part, Tensor) and part.requires_grad else part for part in fixed]
                return operator.function(*parts, backend=backend)

            assert torch.autograd.gradcheck(call, tensors, fast_mode=True), (backend, label)


def test_auto_reaches_every_fast_backend(operator: Operator):
    for backend, arguments in operator.reaching.items():
        example = arguments()
        assert chosen(operator.name, *example) == backend
        assert_close(operator.function(*example), operator.function(*example, backend="naive"))


def test_auto_reaches_the_backends_of_a_gpu(operator: Operator):
    # Nothing is computed, so no GPU is needed.
    for backend, arguments in operator.reaching_on_gpu.items():
        example = arguments()
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_gpu = cast(example, lambda x: torch.empty_like(x, device="cuda"))
            assert chosen(operator.name, *on_gpu) == backend


def test_auto_takes_a_backend_that_serves(operator: Operator):
    backends = OPERATORS[operator.name]
    for dtype in (torch.float64, torch.float32):
        for arguments in operator.examples.values():
            example = cast(arguments(), lambda x, dtype=dtype: x.to(dtype))
            assert backends.refusal(chosen(operator.name, *example), *example) is None
            assert_close(operator.function(*example), operator.function(*example, backend="naive"))


def test_unknown_backends_answer_with_the_nearest(operator: Operator):
    arguments = next(iter(operator.examples.values()))()
    with pytest.raises(UnknownName, match=f"unknown backend of {operator.name} 'naiv': did you mean naive"):
        operator.function(*arguments, backend="naiv")


def test_backends_refuse_what_they_cannot_serve(operator: Operator):
    for backend, arguments in operator.refused.items():
        example = arguments()
        with pytest.raises(Unsupported, match=f"backend '{backend}' of {operator.name} cannot serve this call: "):
            operator.function(*example, backend=backend)
        assert_close(operator.function(*example), operator.function(*example, backend="naive"))


def test_bfloat16(operator: Operator):
    for backend in OPERATORS[operator.name].names:
        for _, arguments in served(operator, backend):
            example = cast(arguments(), lambda x: x.to(torch.bfloat16))
            exact = operator.function(*cast(example, Tensor.float), backend="naive")
            result = operator.function(*example, backend=backend)
            assert result.dtype == torch.bfloat16
            assert_near(result, exact)


def test_autocast(operator: Operator):
    for backend in ("auto", *OPERATORS[operator.name].names):
        for _, arguments in served(operator, backend):
            example = cast(arguments(), Tensor.float)
            tensors, leaf_example = trained(example)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = operator.function(*leaf_example, backend=backend)
            assert_near(result, operator.function(*example, backend="naive"))
            loss(result).backward()
            assert all(x.grad.isfinite().all() for x in tensors if x.grad is not None)


def test_compiles_without_a_break(operator: Operator):
    for backend in ("auto", *OPERATORS[operator.name].names):
        _, arguments = next(served(operator, backend))
        torch._dynamo.reset()
        compiled = torch.compile(operator.function, fullgraph=True, backend="eager")
        example = arguments()
        assert_close(compiled(*example, backend=backend), operator.function(*example, backend=backend))
