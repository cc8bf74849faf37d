"""Convolution and pooling layers for sparse tensors, with the semantics and the weights of spconv 2.

A layer takes a `SparseTensor` and returns one. The pairs of rows that it joins are kept with the tensor, so that the
layers of one stage look for them once. Layers that know nothing of places (norms, activations, linear layers) stand
between them in a `SparseSequential` and see the features (N, C) of all active places of all samples together.

These layers do not take the place of a dense convolution in `convatlas.surgery`: what they take is no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convatlas.errors import CheckpointError
from convatlas.nn.conv.geometry import as_tuple
from convatlas.ops.sparse import (
    Kernel,
    Rulebook,
    SparseTensor,
    conv_rulebook,
    sparse_conv,
    sparse_max_pool,
    sparse_mean,
    submanifold_rulebook,
    transposed_rulebook,
)

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConv4d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseGlobalPool",
    "SparseInverseConv1d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseMaxPool1d",
    "SparseMaxPool2d",
    "SparseMaxPool3d",
    "SparseModule",
    "SparseSequential",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "SubMConv4d",
    "ToDense",
    "from_spconv",
    "on_features",
    "to_spconv",
]

Sizes = int | tuple[int, ...]


class SparseModule(nn.Module):
    """A layer that takes a sparse tensor whole; a `SparseSequential` gives all others the features only."""


def on_features(module: nn.Module, x: SparseTensor) -> SparseTensor:
    """A sparse tensor after a layer: one that knows places gets it whole, any other the features.

    Batch normalisation, which cannot learn from nothing, is left out where there is no active place.
    """
    if isinstance(module, SparseModule):
        after: SparseTensor = module(x)
        return after
    if isinstance(module, _BatchNorm) and module.training and not len(x.features):
        return x
    return x.replace_feature(module(x.features))


class SparseSequential(nn.Sequential, SparseModule):
    """Layers one after the other; those that are no `SparseModule` are applied to the features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply every layer."""
        for module in self:
            x = on_features(module, x)
        return x


class _Placed(SparseModule):
    """What convolution and pooling share: sizes for each axis, and the pairs of rows."""

    dims: ClassVar[int]

    def __init__(
        self, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, indice_key: str | None
    ) -> None:
        super().__init__()
        values = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        sizes = {name: as_tuple(value, self.dims, name) for name, value in values.items()}
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if min(sizes[name]) < least:
                raise ValueError(f"{name} must be at least {least}, got {values[name]}")
        self.kernel = Kernel(sizes["kernel_size"], sizes["stride"], sizes["padding"], sizes["dilation"])
        self.indice_key = indice_key

    def _rulebook(self, x: SparseTensor) -> Rulebook:
        """The pairs for the places of x: those found before by a layer of this geometry, or new ones."""
        geometry = (type(self)._search.__qualname__, self.kernel)
        own = (id(x.indices), *geometry)
        known = x.rulebooks.get(self.indice_key) if self.indice_key is not None else None
        if known is None and own in x.rulebooks:
            known = x.rulebooks[own][1]
        elif known is None:
            known = self._search(x)
            # The places are kept with the pairs, so that no other tensor can get their identity.
            x.rulebooks[own] = (x.indices, known)
        elif known.kernel != self._searched() or known.input_indices is not x.indices:
            raise ValueError(
                f"indice_key {self.indice_key!r} belongs to a layer of another geometry, or with other places: "
                f"it has {known.kernel}, this one {self._searched()}"
            )
        if self.indice_key is not None:
            x.rulebooks[self.indice_key] = known
        return known

    def _searched(self) -> Kernel:
        return self.kernel

    def _search(self, x: SparseTensor) -> Rulebook:
        raise NotImplementedError

    def _check(self, x: SparseTensor, channels: int | None = None) -> None:
        if not isinstance(x, SparseTensor):
            raise ValueError(f"x must be a SparseTensor, got {type(x).__name__}")
        if x.dims != self.dims:
            raise ValueError(f"x must have {self.dims} spatial axes, got {x.dims}")
        if channels is not None and x.channels != channels:
            raise ValueError(f"x must have {channels} channels, got {x.channels}")

    def _placed(self, x: SparseTensor, features: Tensor, rulebook: Rulebook) -> SparseTensor:
        return SparseTensor(
            features, rulebook.output_indices, rulebook.output_shape, x.batch_size, x.rulebooks, check=False
        )


class _SparseConv(_Placed):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        indice_key: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, indice_key)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if groups != 1:
            raise ValueError(f"groups must be 1 in a sparse convolution, got {groups}")
        self.in_channels, self.out_channels = in_channels, out_channels
        shape = (out_channels, *self.kernel.size, in_channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from +-1 / sqrt(C_in K), as torch and spconv do."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve; C_out features at the places of the output.

        Raises:
            ValueError: x has other axes or channels.
        """
        self._check(x, self.in_channels)
        rulebook = self._rulebook(x)
        return self._placed(x, sparse_conv(x.features, rulebook, self.weight, self.bias), rulebook)

    def extra_repr(self) -> str:
        """The geometry."""
        kernel = self.kernel
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={kernel.size}, stride={kernel.stride}"
        text += f", padding={kernel.padding}, dilation={kernel.dilation}, bias={self.bias is not None}"
        return text if self.indice_key is None else f"{text}, indice_key={self.indice_key!r}"


class _Regular(_SparseConv):
    def _search(self, x: SparseTensor) -> Rulebook:
        return conv_rulebook(x.indices, x.spatial_shape, x.batch_size, self.kernel)


class _Submanifold(_SparseConv):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        size, stride, padding, dilation = (
            getattr(self.kernel, name) for name in ("size", "stride", "padding", "dilation")
        )
        if any(taps % 2 == 0 for taps in size):
            raise ValueError(f"submanifold convolution needs odd kernel sizes, got {_shortest(size)}")
        if max(stride) > 1:
            raise ValueError(f"submanifold convolution keeps its places, so stride must be 1, got {_shortest(stride)}")
        centred = tuple(taps // 2 * step for taps, step in zip(size, dilation, strict=True))
        if max(padding) > 0 and padding != centred:
            raise ValueError(
                f"submanifold convolution is centred, so padding must be {_shortest(centred)} or left out, "
                f"got {_shortest(padding)}"
            )
        self.kernel = Kernel(size, stride, centred, dilation)

    def _search(self, x: SparseTensor) -> Rulebook:
        kernel = self.kernel
        return submanifold_rulebook(x.indices, x.spatial_shape, x.batch_size, kernel.size, kernel.dilation)


class _Transposed(_SparseConv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
        more = as_tuple(output_padding, self.dims, "output_padding")
        kernel = self.kernel
        if any(
            not 0 <= extra < max(step, gap) for extra, step, gap in zip(more, kernel.stride, kernel.dilation, strict=True)
        ):
            raise ValueError(f"output_padding must be smaller than stride or dilation, got {output_padding}")
        self.kernel = Kernel(kernel.size, kernel.stride, kernel.padding, kernel.dilation, more)

    def _search(self, x: SparseTensor) -> Rulebook:
        return transposed_rulebook(x.indices, x.spatial_shape, x.batch_size, self.kernel)


class _Inverse(_SparseConv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        indice_key: str,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, indice_key=indice_key, **options)

    def _rulebook(self, x: SparseTensor) -> Rulebook:
        known = x.rulebooks.get(self.indice_key)
        if known is None:
            names = ", ".join(repr(key) for key in x.rulebooks if isinstance(key, str)) or "none"
            raise ValueError(
                f"indice_key must be that of an earlier convolution, got {self.indice_key!r}; known are: {names}"
            )
        if known.kind == "submanifold":
            raise ValueError(
                f"indice_key {self.indice_key!r} belongs to a submanifold convolution, which has no inverse: use another"
            )
        if known.kernel.size != self.kernel.size:
            raise ValueError(
                f"kernel_size must be that of the convolution {self.indice_key!r}, {_shortest(known.kernel.size)}, "
                f"got {_shortest(self.kernel.size)}"
            )
        if known.output_indices is not x.indices:
            raise ValueError(f"x must have the places that the convolution {self.indice_key!r} gave")
        inverse: Rulebook = known.inverse
        return inverse


class _MaxPool(_Placed):
    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        *,
        indice_key: str | None = None,
    ) -> None:
        super().__init__(kernel_size, kernel_size if stride is None else stride, padding, dilation, indice_key)

    def _search(self, x: SparseTensor) -> Rulebook:
        return conv_rulebook(x.indices, x.spatial_shape, x.batch_size, self.kernel)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The largest of the active features below each place of the output.

        Raises:
            ValueError: x has other axes.
        """
        self._check(x)
        rulebook = self._rulebook(x)
        return self._placed(x, sparse_max_pool(x.features, rulebook), rulebook)

    def extra_repr(self) -> str:
        """The geometry."""
        kernel = self.kernel
        return f"kernel_size={kernel.size}, stride={kernel.stride}, padding={kernel.padding}"


class SparseConv1d(_Regular):
    """Convolution along one axis whose output has every place that an active input reaches."""

    dims = 1


class SparseConv2d(_Regular):
    """Convolution along two axes whose output has every place that an active input reaches."""

    dims = 2


class SparseConv3d(_Regular):
    """Convolution along three axes whose output has every place that an active input reaches.

    At those places it is the dense convolution of the grid; the places come in the order of their coordinates.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `torch.nn.Conv3d`; groups
            must be 1.
        indice_key: name by which an inverse convolution finds the way back.

    Raises:
        ValueError: a size is out of range.
    """

    dims = 3


class SparseConv4d(_Regular):
    """Convolution along four axes whose output has every place that an active input reaches."""

    dims = 4


class SubMConv1d(_Submanifold):
    """Submanifold convolution along one axis: the output has the places of the input."""

    dims = 1


class SubMConv2d(_Submanifold):
    """Submanifold convolution along two axes: the output has the places of the input."""

    dims = 2


class SubMConv3d(_Submanifold):
    """Submanifold convolution along three axes: the output has the places of the input, in the same order.

    There it is the dense convolution with a centred kernel.

    Args:
        in_channels, out_channels, kernel_size, dilation, bias: as of `torch.nn.Conv3d`; sizes must be odd.
        stride, padding, groups: must be 1, centred or left out, and 1.
        indice_key: name of the pairs; without one they are found by places and geometry.

    Raises:
        ValueError: a size is even or out of range.
    """

    dims = 3


class SubMConv4d(_Submanifold):
    """Submanifold convolution along four axes: the output has the places of the input."""

    dims = 4


class SparseConvTranspose1d(_Transposed):
    """Transposed convolution along one axis, to every place that an active input reaches."""

    dims = 1


class SparseConvTranspose2d(_Transposed):
    """Transposed convolution along two axes, to every place that an active input reaches."""

    dims = 2


class SparseConvTranspose3d(_Transposed):
    """Transposed convolution along three axes, to every place that an active input reaches.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as of
            `torch.nn.ConvTranspose3d`; groups must be 1. The weight is (C_out, *kernel_size, C_in) all the same.
        indice_key: name of the pairs.

    Raises:
        ValueError: a size is out of range.
    """

    dims = 3


class SparseInverseConv1d(_Inverse):
    """Back along one axis to the places and rows that an earlier convolution began with."""

    dims = 1


class SparseInverseConv2d(_Inverse):
    """Back along two axes to the places and rows that an earlier convolution began with."""

    dims = 2


class SparseInverseConv3d(_Inverse):
    """Back along three axes to the places, and the order of rows, that an earlier convolution began with.

    A place that had no pair on the way down gets the bias only.

    Args:
        in_channels, out_channels: of the features.
        kernel_size: that of the earlier convolution.
        indice_key: its name.
        bias: whether there is one.

    Raises:
        ValueError: a size is out of range; in `forward`, the name is unknown or of a submanifold convolution.
    """

    dims = 3


class SparseMaxPool1d(_MaxPool):
    """Largest active feature in windows along one axis."""

    dims = 1


class SparseMaxPool2d(_MaxPool):
    """Largest active feature in windows along two axes."""

    dims = 2


class SparseMaxPool3d(_MaxPool):
    """Largest active feature in windows along three axes; a true maximum, of negative values too.

    Args:
        kernel_size, stride, padding, dilation: as of `torch.nn.MaxPool3d`.
        indice_key: name of the pairs.
    """

    dims = 3


class SparseGlobalPool(SparseModule):
    """Mean (B, C) of the active places of each sample."""

    def forward(self, x: SparseTensor) -> Tensor:
        """The mean of each sample; 0 where there is no place."""
        return sparse_mean(x)


class ToDense(SparseModule):
    """The whole grid (B, C, *sizes), zero at inactive places."""

    def forward(self, x: SparseTensor) -> Tensor:
        """The grid."""
        return x.dense()


# -- weights of spconv -------------------------------------------------------------------------------------------------


def from_spconv(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of spconv with the same names, in our layout.

    Weights of spconv 2.2 and later have our shape (C_out, *k, C_in); older ones, (*k, C_in, C_out) of 1.x or
    (*k, C_out, C_in) of 2.1, are told by their shapes. A convolution of one tap is another matter: spconv 2 multiplies
    by its memory read as (C_in, C_out), which is not the transpose that its shape promises. Checkpoints were trained
    so, and are converted to what was computed.

    Raises:
        CheckpointError: old weights are all square, so that their layout cannot be told.
    """
    converted = dict(state)
    weights = {key: layer for key, layer in _weights(model) if key in state}
    layout = _layout({key: (state[key].shape, layer) for key, layer in weights.items()})
    for key, layer in weights.items():
        weight = state[key]
        channels_out, channels_in = layer.out_channels, layer.in_channels
        if weight.dim() != layer.weight.dim():
            continue
        if _one_tap(layer) and layout != "in_out":
            matrix = weight.reshape(channels_in, channels_out).T
        elif layout == "native":
            continue
        else:
            matrix = weight.movedim(-1, 0) if layout == "in_out" else weight.movedim(-2, 0)
        converted[key] = matrix.reshape(layer.weight.shape)
    return converted


def to_spconv(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours, or gradients by the same names, in the layout of spconv 2.2 and later."""
    converted = dict(state)
    for key, layer in _weights(model):
        if key in state and _one_tap(layer):
            matrix = state[key].reshape(layer.out_channels, layer.in_channels)
            converted[key] = matrix.T.reshape(layer.weight.shape)
    return converted


def _weights(model: nn.Module) -> Iterator[tuple[str, _SparseConv]]:
    for name, module in model.named_modules():
        if isinstance(module, _SparseConv):
            yield f"{name}.weight".removeprefix("."), module


def _one_tap(layer: _SparseConv) -> bool:
    """Whether spconv takes its short cut, a matrix product."""
    single = math.prod(layer.kernel.size) == 1 and not isinstance(layer, _Inverse)
    return single and (isinstance(layer, _Submanifold) or max(layer.kernel.stride) == 1)


def _old_shape(layer: _SparseConv, layout: str) -> tuple[int, ...]:
    last = (layer.in_channels, layer.out_channels)
    return (*layer.kernel.size, *(last if layout == "in_out" else reversed(last)))


def _layout(weights: Mapping[str, tuple[torch.Size, _SparseConv]]) -> str:
    """``native``, ``in_out`` (1.x) or ``out_in`` (2.1): the one whose shapes are found."""
    fits: dict[str, Callable[[_SparseConv], tuple[int, ...]]] = {
        "native": lambda layer: tuple(layer.weight.shape),
        "in_out": lambda layer: _old_shape(layer, "in_out"),
        "out_in": lambda layer: _old_shape(layer, "out_in"),
    }
    found = [
        name for name, wanted in fits.items() if all(tuple(shape) == wanted(layer) for shape, layer in weights.values())
    ]
    if found == ["in_out", "out_in"]:
        raise CheckpointError("weights of an old spconv are all square: whether C_in or C_out is last cannot be told")
    return found[0] if found else "native"


def _shortest(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes
