"""Training towards orthogonal convolutions: the regulariser of any model, as a method, and an orthogonal start.

Achour, Malgouyres, Mamalet: "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR
23, 2022, arXiv 2108.05623: loss = task + lambda sum_l L_orth(K_l), lambda from 1e-5 to 1e-1. Wang, Chen, Chakraborty,
Yu: "Orthogonal Convolutional Neural Networks", CVPR 2020, arXiv 1911.12207, add distances that are not squared.

The theory is that of circular padding; with zeros at the border a regularised layer is orthogonal up to that border.
Biases and batch norms change norms as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.ops.orthogonality import (
    Existence,
    deconv_orth_dist,
    l_orth,
    orth_dist,
    orthogonal_conv_exists,
    random_orthogonal_kernel,
)
from convatlas.training.method import LossFn, Method

__all__ = [
    "LorthRegularizer",
    "Orthogonality",
    "Penalty",
    "RegularizedLayer",
    "conv_existence",
    "orthogonal_conv_init_",
    "regularized_layers",
]

#: What is added for a layer: ``l_orth``, or the distances of Wang et al., whose code pads by 1.
Penalty = Literal["l_orth", "wang"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADDING = 1  # of Wang et al., whatever the kernel


class RegularizedLayer(NamedTuple):
    """A convolution and what is known of it.

    Attributes:
        name, conv: of the layer.
        existence: whether an orthogonal one of its shape exists; None where ``reason`` says why that cannot be told.
        reason: why the layer is not regularised; empty where it is.
    """

    name: str
    conv: nn.Module
    existence: Existence | None
    reason: str


def conv_existence(conv: Any) -> Existence:
    """Whether an orthogonal convolution of the shape of a layer exists, for circular padding.

    A transposed convolution is the transpose of the convolution with its weight, and orthogonal with it.

    Raises:
        Unsupported: it is no convolution of torch, or its kernel is even, its kernel or stride not cubic.
    """
    if not isinstance(conv, _CONVS):
        raise Unsupported(f"it must be a convolution, got {type(conv).__name__}")
    for name in ("kernel_size", "stride", "dilation"):
        if len(set(getattr(conv, name))) != 1:
            raise Unsupported(f"its {name} differs between axes: {getattr(conv, name)}")
    size, stride = conv.kernel_size[0], conv.stride[0]
    if size % 2 == 0:
        raise Unsupported(f"the theory requires odd kernels, received {size}")
    rows, columns = conv.in_channels, conv.out_channels
    if not conv.transposed:
        rows, columns = columns, rows
    return orthogonal_conv_exists(rows, columns, size, stride, dims=len(conv.kernel_size), groups=conv.groups)


def regularized_layers(
    model: nn.Module, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()
) -> Iterator[RegularizedLayer]:
    """Every convolution of a model, with the reason where it is left out.

    Args:
        model: any network.
        include, exclude: patterns of names, with ``*`` and ``?``.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _CONVS):
            continue
        existence, reason = None, ""
        try:
            existence = conv_existence(module)
            reason = "" if existence.exists else existence.reason
        except Unsupported as error:
            reason = str(error)
        wanted = any(fnmatchcase(name, each) for each in include)
        if not wanted or any(fnmatchcase(name, each) for each in exclude):
            reason = "its name is left out"
        yield RegularizedLayer(name, module, existence, reason)


class LorthRegularizer:
    """lambda times the sum of the penalties of a model's convolutions.

    With ``l_orth`` layers of which no orthogonal form exists are left out; ``skipped`` names them with the reason. With
    ``wang`` all are in: pointwise ones by `orth_dist`, the others by `deconv_orth_dist` with a padding of 1.

    Args:
        model: any network; its weights are read when the penalty is computed.
        weight: lambda.
        penalty: ``l_orth`` or ``wang``.
        include, exclude: patterns of names of layers, with ``*`` and ``?``.

    Raises:
        ValueError: weight is negative.
        Unsupported: the model has no convolution to be regularised.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 0.01,
        *,
        penalty: Penalty = "l_orth",
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
    ) -> None:
        _check(weight, penalty)
        self.weight, self.penalty = weight, penalty
        found = list(regularized_layers(model, include, exclude))
        theory = penalty == "l_orth"
        left_out = [each for each in found if each.reason and (theory or each.reason == "its name is left out")]
        self.layers: tuple[RegularizedLayer, ...] = tuple(each for each in found if each not in left_out)
        #: Convolutions that are left out -> why.
        self.skipped: dict[str, str] = {each.name: each.reason for each in left_out}
        if penalty == "wang":
            wrong = [each.name for each in self.layers if not isinstance(each.conv, nn.Conv2d)]
            if wrong:
                raise Unsupported(f"the distances of Wang et al. are those of 2-D convolutions, {wrong[0]} is none")
        if not self.layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])
            raise Unsupported(f"the model has no convolution to be regularised{f': {reasons}' if reasons else ''}")

    @property
    def hard(self) -> tuple[str, ...]:
        """Names of the layers with M = C S^d, on which optimisation may stall above zero."""
        return tuple(each.name for each in self.layers if each.existence and each.existence.square)

    def __call__(self) -> Tensor:
        """The penalty of the present weights, a scalar."""
        return self.weight * torch.stack([self._of(each.conv) for each in self.layers]).sum()

    def _of(self, conv: Any) -> Tensor:
        if self.penalty == "l_orth":
            return l_orth(conv.weight, conv.stride[0], conv.groups, conv.dilation[0])
        kernels = conv.weight.float() if conv.weight.dtype in (torch.float16, torch.bfloat16) else conv.weight
        with torch.autocast(kernels.device.type, enabled=False):
            if set(conv.kernel_size) == {1}:
                return orth_dist(kernels)
            parts = [deconv_orth_dist(each, conv.stride[0], _PADDING) for each in kernels.chunk(conv.groups)]
            return torch.stack(parts).sum()


@dataclass(frozen=True, kw_only=True)
class Orthogonality(Method):
    """The method with its settings: `LorthRegularizer` is added to the losses of every step.

    Attributes:
        weight: lambda.
        penalty: ``l_orth`` or ``wang``.
        include, exclude: patterns of names of layers, with ``*`` and ``?``.
        init: whether training starts from orthogonal kernels, where they exist.
    """

    weight: float = 0.01
    penalty: Penalty = "l_orth"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    init: bool = False

    def __post_init__(self) -> None:
        _check(self.weight, self.penalty)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Look for the layers, start them orthogonal if asked for, and tell of those that are hard to optimise.

        Raises:
            Unsupported: the model has no convolution to be regularised.
        """
        regularizer = self._regularizer(model)
        if self.init:
            for each in regularizer.layers:
                if each.existence and each.existence.exists:
                    orthogonal_conv_init_(each.conv)
        if regularizer.hard and self.penalty == "l_orth":
            names = ", ".join(regularizer.hard[:4])
            logging.getLogger(__name__).warning("M = C*S^d is hard to optimise; so are %s", names)
        return model

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        """The losses without it, the penalty, and their sum as what is minimised."""
        losses = loss_fn(model, batch)
        penalty = self._regularizer(model)()
        return {**losses, "loss": losses["loss"] + penalty, "orthogonality": penalty.detach()}

    def _regularizer(self, model: nn.Module) -> LorthRegularizer:
        patterns = {"include": self.include, "exclude": self.exclude}
        return LorthRegularizer(model, self.weight, penalty=self.penalty, **patterns)


def orthogonal_conv_init_(conv: nn.Module, generator: torch.Generator | None = None) -> None:
    """Give a convolution a random orthogonal kernel and no bias, group by group; see `random_orthogonal_kernel`.

    Raises:
        Unsupported: no orthogonal convolution of its shape exists, or it is none of torch.
    """
    existence = conv_existence(conv)
    if not existence.exists:
        raise Unsupported(existence.reason)
    layer: Any = conv
    groups = layer.groups
    rows, columns, *kernel = layer.weight.shape
    with torch.no_grad():
        for part in layer.weight.chunk(groups):
            shape = (rows // groups, columns, kernel[0], layer.stride[0])
            part.copy_(random_orthogonal_kernel(*shape, dims=len(kernel), generator=generator))
        if layer.bias is not None:
            layer.bias.zero_()


def _check(weight: float, penalty: Penalty) -> None:
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    if penalty not in get_args(Penalty):
        raise unknown("penalty", str(penalty), get_args(Penalty))
