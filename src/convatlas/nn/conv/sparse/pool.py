"""Pooling of sparse tensors, and the way to a dense one."""

from __future__ import annotations

from torch import Tensor

from convatlas.nn.conv.sparse.base import PlacedModule, Sizes, SparseModule
from convatlas.ops.sparse import Rulebook, SparseTensor, conv_rulebook, sparse_max_pool, sparse_mean

__all__ = ["SparseGlobalPool", "SparseMaxPool1d", "SparseMaxPool2d", "SparseMaxPool3d", "ToDense"]


class _MaxPool(PlacedModule):
    kind = "conv"

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

    def rulebook(self, x: SparseTensor) -> Rulebook:
        return self._known_or(x, lambda: conv_rulebook(x.indices, x.spatial_shape, x.batch_size, self.kernel))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The largest of the active features below each place of the output.

        Raises:
            ValueError: x has other axes.
        """
        self._check(x)
        rulebook = self.rulebook(x)
        return self._placed(x, sparse_max_pool(x.features, rulebook), rulebook)

    def extra_repr(self) -> str:
        """The geometry."""
        kernel = self.kernel
        return f"kernel_size={kernel.size}, stride={kernel.stride}, padding={kernel.padding}"


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
