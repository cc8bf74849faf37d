"""Everything that the battery tests, one short entry each. Who adds a network, layer or operator adds its line here.

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
from convatlas.nn.mixers.eca import ECA, ChannelGate
from convatlas.nn.mixers.inception import InceptionDWConv2d, PartialDWConv2d
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.ops.eca import eca
from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.inception import inception_dwconv2d
from convatlas.ops.shuffle import pixel_shuffle, pixel_unshuffle

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
    """

    model: str
    options: Mapping[str, Any]
    inputs: Inputs = IMAGE
    exempt: Mapping[str, str] = field(default_factory=dict)

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
class Operator:
    """A function with several backends.

    Attributes:
        function: the public function; its name is the operator's.
        examples: label -> maker of small arguments, floating tensors in float64: odd sizes, axes of size one, options.
        reaching: fast backend -> maker of arguments for which ``auto`` takes it.
        refused: backend -> maker of arguments that it cannot serve.
        exempt: tests that do not apply -> why.
    """

    function: Callable[..., Tensor]
    examples: Mapping[str, Arguments]
    reaching: Mapping[str, Arguments]
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


def _inception(
    size: tuple[int, int], channels: int = 7, groups: int = 2, square: int = 3, band: int = 5, dilation: int = 1
) -> Arguments:
    def arguments() -> tuple[Any, ...]:
        shapes = [(groups, 1, square, square), (groups, 1, 1, band), (groups, 1, band, 1)]
        weights = [tensor for shape in shapes for tensor in (random(*shape), random(groups))]
        return random(2, channels, *size), *weights, dilation

    return arguments


def _inception_large() -> tuple[Any, ...]:
    x, *rest = (part.float() if isinstance(part, Tensor) else part for part in _inception((29, 31))())
    return x.requires_grad_(), *rest


NETWORKS = [
    Network("inceptionnext_tiny", {"depths": (1, 2), "dims": (16, 24), "num_classes": 7}),
    Network("convnext_tiny", {"depths": (1, 2), "dims": (8, 12), "num_classes": 7}),
    Network("convnext_tiny_k3_par1_4", {"depths": (1, 2), "dims": (8, 12), "num_classes": 7}),
    Network("resnet18", {"depths": (1, 2), "widths": (8, 12), "stem_width": 8, "num_classes": 7}),
    Network(
        "eca_resnet50",
        {"depths": (1, 1), "widths": (4, 6), "stem_width": 8, "eca_kernel_sizes": (3, 5), "num_classes": 7},
    ),
    Network(
        "eca_mobilenet_v2",
        {
            "stages": ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 1, 2)),
            "stem_width": 8,
            "head_width": 24,
            "eca_kernel_sizes": (1, 3, 3),
            "num_classes": 7,
        },
    ),
]

LAYERS = [
    Layer(InceptionDWConv2d, 17),
    Layer(InceptionDWConv2d, 12, {"square_kernel_size": 5, "band_kernel_size": 3, "branch_ratio": 0.25, "dilation": 2}),
    Layer(PartialDWConv2d, 9, {"ratio": 0.5}),
    Layer(ECA, 9, dims=(1, 2, 3)),
    Layer(ECA, 9, {"shared": False, "padding": "circular"}, dims=(1, 2, 3)),
    Layer(ChannelGate, 9, {"groups": 3}, dims=(1, 2, 3)),
    Layer(SqueezeExcite, 9, {"reduction": 2}, dims=(1, 2, 3)),
]

OPERATORS = [
    Operator(
        fft_conv,
        examples={
            "causal": lambda: (random(3, 2, 11), random(2, 5)),
            "gated": lambda: (random(2, 3, 9), random(3, 9), None, random(2, 3, 9), random(2, 3, 9)),
            "circular": lambda: (random(2, 2, 7), random(2, 7), 7),
            "wrapped_tail": lambda: (random(1, 2, 7), random(1, 2, 6), 9),
            "both_directions": lambda: (random(2, 2, 5), random(2, 10), 10),
            "kernel_longer_than_signal": lambda: (random(2, 2, 3), random(2, 8)),
            "one_sample": lambda: (random(1, 2, 1), random(2, 1)),
            "image": lambda: (random(2, 2, 5, 3), random(2, 3, 2), (5, 4)),
            "volume": lambda: (random(1, 2, 3, 1, 5), random(2, 2, 1, 3)),
        },
        reaching={
            "direct": lambda: (random(2, 2, 300), random(2, 7)),
            "fft": lambda: (random(2, 2, 300), random(2, 300)),
            "overlap_save": lambda: (random(1, 1, 4500), random(1, 130)),
        },
        refused={"overlap_save": lambda: (random(2, 2, 7), random(2, 7), 7)},
    ),
    Operator(
        inception_dwconv2d,
        examples={
            "odd": _inception((5, 7)),
            "row": _inception((1, 7)),
            "column": _inception((5, 1)),
            "pixel": _inception((1, 1)),
            "all_channels": _inception((3, 5), channels=6),
            "dilated": _inception((7, 5), square=5, band=3, dilation=2),
        },
        reaching={"turned": _inception_large},
    ),
    Operator(
        eca,
        examples={
            "odd": lambda: (random(2, 7, 3, 5), random(1, 1, 3)),
            "signal": lambda: (random(2, 7, 5), random(1, 1, 5)),
            "volume": lambda: (random(1, 6, 1, 3, 2), random(1, 1, 3)),
            "pixel": lambda: (random(3, 5, 1, 1), random(1, 1, 3)),
            "fewer_channels_than_taps": lambda: (random(2, 2, 3, 3), random(1, 1, 7)),
            "one_tap": lambda: (random(2, 4, 3, 3), random(1, 1, 1)),
            "own_kernels": lambda: (random(2, 7, 3, 5), random(7, 1, 3)),
            "circular": lambda: (random(2, 7, 3, 5), random(1, 1, 5), "circular"),
        },
        reaching={
            "shifts": lambda: (random(2, 7, 3, 5), random(1, 1, 3)),
            "conv1d": lambda: (random(1, 7, 3, 5), random(1, 1, 3)),
        },
        refused={"conv1d": lambda: (random(2, 7, 3, 5), random(7, 1, 3))},
    ),
    Operator(
        pixel_shuffle,
        examples={
            "odd": lambda: (random(2, 18, 3, 5), 3),
            "pixel": lambda: (random(1, 4, 1, 1), 2),
            "channel_last_in_block": lambda: (random(2, 8, 3, 5), 2, "DCR"),
            "factors": lambda: (random(2, 12, 3, 1), (2, 3)),
            "signal": lambda: (random(2, 6, 5), 3),
            "volume": lambda: (random(1, 8, 1, 3, 2), 2),
        },
        reaching={
            "view": lambda: (random(1, 9, 71, 67), (3, 3), "CRD"),
            "torch": lambda: (random(1, 9, 5, 7), (3, 3), "CRD"),
        },
        refused={"torch": lambda: (random(1, 8, 3, 5), 2, "DCR")},
    ),
    Operator(
        pixel_unshuffle,
        examples={
            "odd": lambda: (random(2, 2, 9, 15), 3),
            "pixel": lambda: (random(1, 1, 2, 2), 2),
            "channel_last_in_block": lambda: (random(2, 2, 6, 10), 2, "DCR"),
            "factors": lambda: (random(2, 2, 6, 3), (2, 3)),
            "signal": lambda: (random(2, 2, 15), 3),
            "volume": lambda: (random(1, 1, 2, 6, 4), 2),
        },
        reaching={
            "view": lambda: (random(1, 1, 213, 201), (3, 3), "CRD"),
            "torch": lambda: (random(1, 1, 15, 21), (3, 3), "CRD"),
        },
        refused={"torch": lambda: (random(1, 2, 6, 10), 2, "DCR")},
    ),
]
