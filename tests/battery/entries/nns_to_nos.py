"""Neural operators: networks on fields, their layers and operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from battery.subjects import Conv, Layer, Network, Operator, random
from convatlas.nn.conv.finite_difference import (
    FiniteDifferenceConv1d,
    FiniteDifferenceConv2d,
    FiniteDifferenceConv3d,
)
from convatlas.nn.conv.kernel_interpolation import (
    KernelInterpolatedConv1d,
    KernelInterpolatedConv2d,
    KernelInterpolatedConv3d,
    KernelInterpolatedConvTranspose2d,
)
from convatlas.nn.conv.spectral_conv import SpectralConv
from convatlas.ops.finite_difference import finite_difference
from convatlas.ops.segment_sum import segment_sum
from convatlas.ops.spectral_conv import spectral_conv


def field(*grid: int):
    def inputs(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, model.config.in_channels, *grid),)

    return inputs


TINY = {"dim": 4, "depth": 1, "n_modes": 4, "in_channels": 2}

NETWORKS = [
    Network("fno", TINY, field(9, 11)),
    Network(
        "local_no",
        {**TINY, "resolution": 9, "radius_cutoff": 0.3, "diff_layers": True},
        field(9, 11),
        exempt={"pickles": "torch refuses to pickle parametrized modules"},
    ),
    Network("modern_unet", {"dim": 4, "dim_mults": (1, 2), "depth": 1, "in_channels": 2}, field(9, 11)),
    Network("field_vit", {"dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8, "resolution": 8}, field(12, 8)),
    Network("oformer", {"dim": 8, "depth": 1, "num_heads": 2, "n_modes": 3}, field(7, 6)),
]

_SMALL_GRID = "a grid with fewer points than modes warns, which the test of the layer checks"

LAYERS = [
    Layer(
        SpectralConv,
        4,
        {"out_channels": 4, "n_modes": (3, 2)},
        exempt={"keeps_the_shape": _SMALL_GRID, "gradients_are_those_of_finite_differences": _SMALL_GRID},
    ),
]

_GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 5, "stride": 2, "padding": 2, "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
}
_SHORT = {"plain": {"kernel_size": 3, "padding": 1}}
_EVEN = {"even": {"kernel_size": 2}}

CONVS = [
    Conv(FiniteDifferenceConv2d, 2, {"grid_width": 0.5}, geometries=_GEOMETRIES, refused=_EVEN),
    Conv(FiniteDifferenceConv1d, 1, geometries=_SHORT, refused=_EVEN),
    Conv(FiniteDifferenceConv3d, 3, geometries=_SHORT),
    Conv(
        KernelInterpolatedConv2d,
        2,
        {"base_resolution": (3, 4)},
        geometries={"plain": {"kernel_size": 3, "padding": 1}, "grouped": _GEOMETRIES["grouped"]},
        refused={"dilated": {"kernel_size": 3, "dilation": 2}},
    ),
    Conv(KernelInterpolatedConv1d, 1, {"interpolation": "fourier"}, geometries=_SHORT),
    Conv(KernelInterpolatedConv3d, 3, {"base_resolution": 5}, geometries=_SHORT),
    Conv(
        KernelInterpolatedConvTranspose2d,
        2,
        geometries={"plain": {"kernel_size": 4, "stride": 2, "padding": 1}},
        transposed=True,
    ),
]

OPERATORS = [
    Operator(
        spectral_conv,
        examples={
            "line": lambda: (random(2, 3, 9), random(3, 2, 3, 2)),
            "image": lambda: (random(2, 2, 9, 8), random(2, 3, 6, 3, 2)),
            "volume": lambda: (random(1, 2, 5, 4, 3), random(2, 2, 3, 2, 2, 2)),
            "separable": lambda: (random(2, 3, 7, 5), random(3, 4, 2, 2)),
            "finer": lambda: (random(1, 2, 6, 5), random(2, 2, 4, 3, 2), (9, 12)),
            "coarser": lambda: (random(1, 2, 8, 9), random(2, 2, 6, 5, 2), (4, 3)),
            "fewer_modes": lambda: (random(1, 2, 8, 9), random(2, 2, 6, 5, 2), None, (3, 2)),
            "more_modes_than_points": lambda: (random(1, 2, 5, 3), random(2, 2, 8, 6, 2), None, None, True),
            "one_point": lambda: (random(1, 1, 1, 1), random(1, 2, 2, 1, 2)),
        },
        reaching={"fft": lambda: (random(1, 2, 8, 8), random(2, 2, 4, 3, 2))},
    ),
    Operator(
        finite_difference,
        examples={
            "periodic": lambda: (random(2, 2, 5, 7), random(3, 2, 3, 3), 0.5),
            "replicate": lambda: (random(1, 2, 6), random(2, 2, 5), 1.0, "replicate"),
            "reflect": lambda: (random(1, 2, 3, 4, 3), random(2, 2, 3, 1, 3), 2.0, "reflect"),
            "depthwise": lambda: (random(1, 3, 4, 5), random(3, 1, 3, 3), 0.1, "zeros", 3),
            "one_point": lambda: (random(1, 2, 1, 1), random(2, 2, 3, 3), 1.0, "zeros"),
        },
        reaching={"single": lambda: (random(1, 2, 5, 5), random(2, 2, 3, 3))},
    ),
    Operator(
        segment_sum,
        examples={
            "sum": lambda: (random(7, 2), torch.tensor([0, 3, 3, 7])),
            "mean": lambda: (random(2, 7, 3), torch.tensor([0, 1, 5, 7]), True),
            "one": lambda: (random(1, 1), torch.tensor([0, 1])),
            "empty_rows": lambda: (random(2, 1), torch.tensor([0, 0, 2, 2]), True),
        },
        reaching={"index_add": lambda: (random(4, 2), torch.tensor([0, 4]))},
    ),
]
