"""Networks of hypercomplex layers: residual networks, VGG, and sound event detection.

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176. Their layers stand in `convatlas.nn.conv.hypercomplex`.

In all of them ``n`` is the number of components and ``algebra`` is ``learned``, a fixed one that
`convatlas.ops.hypercomplex.hypercomplex_algebra` knows (``quaternion`` with n = 4, ...), or ``real`` with n = 1 for the
ordinary network that the paper compares with.
"""
