"""What the battery tests: the forms of an entry. The entries themselves stand in `battery.entries`, a file a system.

An entry builds its subject small enough that one test of it takes about a second. `exempt` names the tests of the
battery that cannot apply (without ``test_``), each with the reason; the reason is shown where the test is skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.networks.registry import create_model
from convatlas.nn.conv.geometry import PLAIN, TRANSPOSED

Inputs = Callable[[nn.Module, int], tuple[Tensor, ...]]
Arguments = Callable[[], tuple[Any, ...]]


def image(height: int = 45, width: int = 61) -> Inputs:
    """Input of a network for images; the size is odd and no multiple of a stride on purpose."""
    return lambda model, batch: (torch.randn(batch, model.in_channels, height, width),)


IMAGE = image()


@dataclass(frozen=True)
class Network:
    """A network by one of its names.

    Attributes:
        model: name for `create_model`.
        options: overrides of its config that make it tiny.
        inputs: makes the inputs of a batch of a given size for the built network.
        exempt: tests that do not apply -> why.
        takes_tensors: whether the inputs are tensors; others, such as sparse ones, pass through no dense layer, so that
            there is nothing to place, insert or fold.
    """

    model: str
    options: Mapping[str, Any]
    inputs: Inputs = IMAGE
    exempt: Mapping[str, str] = field(default_factory=dict)
    takes_tensors: bool = True

    @property
    def name(self) -> str:
        return self.model

    def build(self, **changes: Any) -> nn.Module:
        """The tiny network in evaluation mode, every weight far enough from its initial value to matter."""
        model = create_model(self.model, **{**self.options, **changes})
        stir(model)
        return model.eval()


@dataclass(frozen=True)
class Layer:
    """A layer that keeps the shape of its input.

    Attributes:
        kind: its class.
        channels: first argument of its constructor.
        options: other arguments.
        dims: numbers of position axes that it declares to take: 1 for (B, C, L) up to 3 for (B, C, D, H, W).
        exempt: tests that do not apply -> why.
    """

    kind: type[nn.Module]
    channels: int
    options: Mapping[str, Any] = field(default_factory=dict)
    dims: tuple[int, ...] = (2,)
    exempt: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.kind.__name__}({options})" if options else self.kind.__name__

    @property
    def takes_dtype(self) -> bool:
        return "dtype" in inspect.signature(self.kind).parameters

    def build(self, **changes: Any) -> nn.Module:
        """The layer in evaluation mode with random weights."""
        layer = self.kind(self.channels, **{**self.options, **changes})
        stir(layer)
        return layer.eval()

    def inputs(self, batch: int = 2) -> list[Tensor]:
        """An input of odd sizes for each number of position axes."""
        return [torch.randn(batch, self.channels, *(7, 5, 3)[:dims]) for dims in self.dims]


@dataclass(frozen=True)
class Conv:
    """A conv-like layer: it takes the arguments of `torch.nn.Conv1d`, `Conv2d` or `Conv3d` and options of its own.

    Attributes:
        kind: its class.
        dims: number of position axes.
        options: its own options.
        transposed: whether it stands for a transposed convolution.
        channels: input and output channels that the options allow.
        geometries: label -> further arguments of torch's convolution that it takes.
        refused: label -> arguments of torch's convolution that its ``from_conv`` refuses.
        exempt: tests that do not apply -> why.
    """

    kind: type[nn.Module]
    dims: int
    options: Mapping[str, Any] = field(default_factory=dict)
    transposed: bool = False
    channels: tuple[int, int] = (8, 12)
    geometries: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "plain": {"kernel_size": 3},
            "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
            "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
            "pointwise": {"kernel_size": 1},
        }
    )
    refused: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.kind.__name__}({options})" if options else self.kind.__name__

    @property
    def plain(self) -> type[nn.Module]:
        """Torch's convolution of as many axes."""
        return (TRANSPOSED if self.transposed else PLAIN)[self.dims]

    def build(self, geometry: str | None = None, **changes: Any) -> nn.Module:
        """The layer in evaluation mode with random weights, in one of its geometries or in the first."""
        arguments = self.geometries[geometry or next(iter(self.geometries))]
        layer = self.kind(*self.channels, **{**arguments, **self.options, **changes})
        stir(layer)
        return layer.eval()

    def inputs(self, batch: int = 2) -> Tensor:
        """An input of odd sizes."""
        return torch.randn(batch, self.channels[0], *(9, 7, 5)[: self.dims])


@dataclass(frozen=True)
class Operator:
    """A function with several backends.

    Attributes:
        function: the public function; its name is the operator's.
        examples: label -> maker of small arguments, floating tensors in float64: odd sizes, axes of size one, options.
        reaching: fast backend -> maker of arguments for which ``auto`` takes it.
        reaching_on_gpu: the same for backends that ``auto`` takes on a GPU only.
        refused: backend -> maker of arguments that it cannot serve.
        exempt: tests that do not apply -> why.
    """

    function: Callable[..., Tensor]
    examples: Mapping[str, Arguments]
    reaching: Mapping[str, Arguments]
    reaching_on_gpu: Mapping[str, Arguments] = field(default_factory=dict)
    refused: Mapping[str, Arguments] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.function.__name__


def stir(model: nn.Module) -> None:
    """Move all parameters and running statistics off their initial values: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() < 2 else 0.5 * (parameter.shape[0] / parameter.numel()) ** 0.5
            parameter += scale * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=generator)
                module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)
