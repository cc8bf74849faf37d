"""From images to video: weights of 2-D convolutions made 3-D, and how clips are prepared.

Li, Wang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation
Learning", ICLR 2022, arXiv 2201.04676, section 4.1; after Carreira, Zisserman, CVPR 2017, arXiv 1705.07750.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor, nn

from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import unknown
from convatlas.networks.uniformer.trunk import LAYOUTS, RENAMES
from convatlas.weights import Layout

__all__ = ["VIDEO_LAYOUTS", "Inflation", "inflate_state_dict", "inflate_weight", "kinetics_preprocess"]

#: ``mean``: the weight in every slice, divided by their number; ``center``: in the middle slice, zero in the others.
Inflation = Literal["mean", "center"]


def inflate_weight(weight: Tensor, frames: int, mode: Inflation = "mean") -> Tensor:
    """The weight (O, I, kH, kW) of a convolution of images as one of clips, (O, I, frames, kH, kW).

    On a clip that stands still both modes give, away from its ends, what the images give.

    Raises:
        ValueError: the weight has other dimensions, or frames is smaller than 1.
        UnknownName: there is no such mode.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be (O, I, kH, kW), got {tuple(weight.shape)}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if mode not in get_args(Inflation):
        raise unknown("mode", mode, get_args(Inflation))
    if mode == "mean":
        return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


def inflate_state_dict(state: Mapping[str, Tensor], model: nn.Module, mode: Inflation = "mean") -> dict[str, Tensor]:
    """Weights of a UniFormer for images as those of a network for video, for `convatlas.load_weights`.

    `load_weights` does this by itself, in the mode ``mean``, where it is given weights of a network for images.

    Args:
        state: in the authors' layout or in ours.
        model: the network for video; it is not changed.
        mode: of the inflation.

    Returns:
        The weights in our layout; what is not a convolution's stays as it is.
    """
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    inflated = LAYOUTS["authors"].apply(state, model)
    for key, value in inflated.items():
        shape = wanted.get(key, value.shape)
        if value.dim() == 4 and len(shape) == 5:
            inflated[key] = inflate_weight(value, shape[2], mode)
    return inflated


def _from_images(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return inflate_state_dict(state, model)


#: Layouts of networks for video, which start from weights of images.
VIDEO_LAYOUTS: Mapping[str, Layout] = {**LAYOUTS, "images": Layout(renames=RENAMES, function=_from_images)}


def kinetics_preprocess(frames: int, side: int = 224) -> VolumePreprocess:
    """How the published weights for video expect a clip: frames scaled to [0, 1], mean 0.45, deviation 0.225."""
    return VolumePreprocess(size=(frames, side, side), mean=(0.45,) * 3, std=(0.225,) * 3, depth="sample")
