"""E-3DSNN: the networks for point clouds and the sparse convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from battery.subjects import Network, Operator, random
from convatlas.ops.sparse import (
    Kernel,
    Rulebook,
    SparseTensor,
    conv_rulebook,
    sparse_conv,
    submanifold_rulebook,
)

TINY: dict[str, Any] = {"embed_dim": 6, "dims": (6, 8), "depths": (1, 0), "num_classes": 5}
DETECTOR: dict[str, Any] = {
    **{"embed_dim": 4, "dims": (4, 6), "depths": (1, 0), "out_dim": 5, "spatial_shape": (11, 12, 8)},
    "refinement": None,
    **{"map_depths": (1,), "map_strides": (1,), "map_dims": (6,), "up_strides": (1,), "up_dims": (4,)},
}
_PLACES = "which places are active depends on the data, so shapes are not known without them"
_EXEMPT = {
    "samples_are_independent": "a sample is a set of rows, which the test of the network changes",
    "half_precision": "a potential beside a threshold is rounded to another spike",
    "meta_device": _PLACES,
    "every_variant_runs_on_the_meta_device": _PLACES,
    "export_with_any_batch": _PLACES,
    "compiles_without_a_break": _PLACES,
    "memory_layout_does_not_matter": "voxels are rows, which have one layout",
    **dict.fromkeys(
        (
            "linear_interpretation_is_exact",
            "linear_scope_runs_beside_the_network",
            "tangent_interpretation_is_the_jacobian",
        ),
        "it takes no tensor, and spikes have no derivative",
    ),
}


def voxels(model: nn.Module, batch: int) -> tuple[Any, ...]:
    """A few dozen voxels a sample, in a grid of odd sizes or that of the network."""
    shape = getattr(model.config, "spatial_shape", (9, 7, 11))
    active = (torch.rand(batch, *shape, generator=torch.Generator().manual_seed(3)) < 0.1).nonzero().int()
    return (SparseTensor(torch.randn(len(active), model.in_channels), active, shape, batch),)


NETWORKS = [
    Network("e3dsnn_t", TINY, voxels, _EXEMPT, takes_tensors=False),
    Network(
        "e3dsnn_seg",
        {**TINY, "decoder_dims": (7, 6)},
        voxels,
        {
            **_EXEMPT,
            **dict.fromkeys(
                ("one_sample_is_enough_and_evaluation_repeats", "gradients_of_one_sample_are_those_of_it_in_a_batch"),
                "a score belongs to a voxel, not to a sample",
            ),
        },
        takes_tensors=False,
    ),
    Network(
        "e3dsnn_kitti_car",
        DETECTOR,
        voxels,
        {**_EXEMPT, "one_sample_is_enough_and_evaluation_repeats": "all samples have the same anchors"},
        takes_tensors=False,
    ),
]


def _places(shape: tuple[int, ...], share: float, batch: int = 2) -> Tensor:
    drawn = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(4))
    return (drawn < share).nonzero().int()


def _kernel(dims: int, size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Kernel:
    return Kernel(*((number,) * dims for number in (size, stride, padding, dilation)))


def _arguments(rulebook: Rulebook, c_in: int = 3, c_out: int = 5, *, bias: bool = True) -> tuple[Any, ...]:
    features = random(rulebook.num_inputs, c_in)
    return features, rulebook, random(c_out, *rulebook.kernel.size, c_in), random(c_out) if bias else None


def _submanifold(shape: tuple[int, ...], share: float = 0.3) -> Rulebook:
    ones = (1,) * len(shape)
    return submanifold_rulebook(_places(shape, share), shape, 2, tuple(3 * one for one in ones), ones)


def _strided(shape: tuple[int, ...], *numbers: int) -> Rulebook:
    return conv_rulebook(_places(shape, 0.3), shape, 2, _kernel(len(shape), *numbers))


OPERATORS = [
    Operator(
        sparse_conv,
        # Few offsets: Triton's interpreter takes its time for each.
        examples={
            "submanifold": lambda: _arguments(_submanifold((5, 4)), 17, 2),
            "strided": lambda: _arguments(_strided((7, 5, 3), 2, 2), bias=False),
            "inverse": lambda: _arguments(_strided((7, 6), 2, 2).inverse),
            "padded": lambda: _arguments(_strided((13,), 3, 2, 1)),
        },
        reaching={
            "pairs": lambda: _arguments(_submanifold((5, 4, 3))),
            "dense": lambda: _arguments(_submanifold((5, 4, 3), share=1.0)),
        },
        reaching_on_gpu={
            "triton": lambda: tuple(
                part.float() if isinstance(part, Tensor) else part for part in _arguments(_submanifold((5, 4, 3)))
            )
        },
        refused={"dense": lambda: _arguments(_submanifold((3, 2, 3, 2)), bias=False)},
    ),
]
