"""Convolution and pooling layers for sparse tensors, with the semantics and the weights of spconv 2.

A layer takes a `SparseTensor` and returns one. The pairs of rows that it joins are kept with the tensor, so that the
layers of one stage look for them once. Layers that know nothing of places (norms, activations, linear layers) stand
between them in a `SparseSequential` and see the features (N, C) of all active places of all samples together.

These layers do not take the place of a dense convolution in `convatlas.surgery`: what they take is no tensor.
"""

from convatlas.nn.conv.sparse.base import SparseModule, SparseSequential, on_features
from convatlas.nn.conv.sparse.conv import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConv4d,
    SparseConvolution,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseInverseConv1d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
    SubMConv4d,
)
from convatlas.nn.conv.sparse.pool import (
    SparseGlobalPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
    ToDense,
)
from convatlas.nn.conv.sparse.weights import fold_norms, from_spconv, to_spconv

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConv4d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseConvolution",
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
    "fold_norms",
    "from_spconv",
    "on_features",
    "to_spconv",
]
