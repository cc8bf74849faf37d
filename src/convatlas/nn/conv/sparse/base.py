"""What layers for sparse tensors share: the container, sizes for each axis, and the pairs of rows found before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convatlas.nn.conv.geometry import as_tuple
from convatlas.ops.sparse import Kernel, Rulebook, SparseTensor

__all__ = ["PlacedModule", "Sizes", "SparseModule", "SparseSequential", "on_features"]

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
    """Layers one after the other; those that are no `SparseModule` are applied to the features.

    Behind a layer that gives a plain tensor, such as `SparseGlobalPool` or `ToDense`, all layers take that tensor.
    """

    def forward(self, x: SparseTensor) -> Any:
        """Apply every layer; a sparse tensor, or what such a layer made of it."""
        y: Any = x
        for module in self:
            y = on_features(module, y) if isinstance(y, SparseTensor) else module(y)
        return y


class PlacedModule(SparseModule, ABC):
    """What convolution and pooling share: sizes for each axis, and the pairs of rows.

    Attributes:
        dims: number of axes.
        kind: of the pairs, as in `Rulebook`.
        kernel: the geometry.
        indice_key: name of the pairs, or None.
    """

    dims: ClassVar[int]
    kind: ClassVar[str]

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

    @abstractmethod
    def rulebook(self, x: SparseTensor) -> Rulebook:
        """The pairs for the places of x."""

    def _known_or(self, x: SparseTensor, search: Callable[[], Rulebook]) -> Rulebook:
        """The pairs that a layer of this geometry found before, or those of a search."""
        own = (id(x.indices), self.kind, self.kernel)
        known = x.rulebooks.get(self.indice_key) if self.indice_key is not None else None
        if known is None and own in x.rulebooks:
            known = x.rulebooks[own][1]
        elif known is None:
            known = search()
            # The places are kept with the pairs, so that no other tensor can get their identity.
            x.rulebooks[own] = (x.indices, known)
        elif (known.kind, known.kernel) != (self.kind, self.kernel) or known.input_indices is not x.indices:
            raise ValueError(
                f"indice_key {self.indice_key!r} belongs to a layer of another geometry or with other places: "
                f"that is {known.kind} with {known.kernel}, this {self.kind} with {self.kernel}"
            )
        if self.indice_key is not None:
            x.rulebooks[self.indice_key] = known
        return known

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
