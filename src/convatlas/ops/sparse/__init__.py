"""Sparse tensors on grids, the pairs of rows that a convolution joins, and the convolution itself."""

from convatlas.ops.sparse.conv import sparse_conv, sparse_max_pool, sparse_mean
from convatlas.ops.sparse.rulebook import (
    Kernel,
    Rulebook,
    conv_rulebook,
    submanifold_rulebook,
    transposed_rulebook,
)
from convatlas.ops.sparse.tensor import SparseTensor

__all__ = [
    "Kernel",
    "Rulebook",
    "SparseTensor",
    "conv_rulebook",
    "sparse_conv",
    "sparse_max_pool",
    "sparse_mean",
    "submanifold_rulebook",
    "transposed_rulebook",
]
