"""Small layers and models to operate on, and the checks of every change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from battery.subjects import stir
from convatlas.errors import Unsupported
from convatlas.surgery import Surgery

#: Largest error of a merged model, of the largest value.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class DoubledConv2d(nn.Conv2d):
    """Conv-like: weights scaled by a factor; only for square kernels."""

    def __init__(self, *args: Any, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, factor: float = 1.0) -> Self:
        if conv.kernel_size[0] != conv.kernel_size[1]:
            raise Unsupported("the kernel must be square")
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            factor=factor,
        )
        new.load_state_dict({key: value / factor for key, value in conv.state_dict().items()})
        return new

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor

    def to_conv(self) -> nn.Conv2d | None:
        conv = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            dtype=self.weight.dtype,
        )
        conv.load_state_dict({key: value * self.factor for key, value in self.state_dict().items()})
        return conv


class DynamicConv2d(DoubledConv2d):
    def to_conv(self) -> None:
        return None


class Model(nn.Module):
    """Modules and a forward given as a function of the model and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def ready(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In evaluation, with weights and statistics away from their initial values."""
    stir(model)
    return model.to(dtype).eval()


def count(model: nn.Module, kinds: Any) -> int:
    return sum(isinstance(part, kinds) for part in model.modules())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_same(model: nn.Module, result: Surgery, *inputs: Tensor) -> None:
    """Same function, original not touched, nothing shared."""
    with torch.no_grad():
        expected, actual = model(*inputs), result.model(*inputs)
    assert float((actual - expected).abs().max()) <= BOUNDS[expected.dtype] * float(expected.abs().max())
    ours = {t.untyped_storage().data_ptr() for t in (*result.model.parameters(), *result.model.buffers())}
    assert not ours & {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3 * output
