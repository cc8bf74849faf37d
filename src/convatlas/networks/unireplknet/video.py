"""UniRepLKNet for videos: a clip becomes one large image.

Ding et al.: "UniRepLKNet", CVPR 2024, arXiv 2311.15599, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from einops import rearrange
from torch import Tensor

from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import unknown
from convatlas.networks.unireplknet.backbone import UniRepLKNet, UniRepLKNetConfig, stage_kernels

__all__ = ["VARIANTS", "UniRepLKNetVideo", "UniRepLKNetVideoConfig", "average_views", "video_to_image"]

FrameLayout = Literal["flat", "mosaic"]


def video_to_image(clip: Tensor, layout: FrameLayout = "flat") -> Tensor:
    """Turn a clip (B, C, T, H, W) into an image (B, C, r H, T / r W): r is the largest divisor of T up to its root.

    16 frames become an image of four times the height and width.

    Args:
        clip: T frames.
        layout: ``flat`` reads the values of a channel in their order in memory, as the published code does, so that
            rows of frames lie side by side; ``mosaic`` lays out whole frames in r rows, as the paper says.

    Raises:
        UnknownName: there is no such layout.
        ValueError: clip has another number of dimensions.
    """
    if clip.dim() != 5:
        raise ValueError(f"clip must be (B, C, T, H, W), got {tuple(clip.shape)}")
    if layout not in get_args(FrameLayout):
        raise unknown("layout", layout, get_args(FrameLayout))
    frames = clip.shape[2]
    rows = next(count for count in range(math.isqrt(frames), 0, -1) if frames % count == 0)
    if layout == "mosaic":
        return rearrange(clip, "b c (r k) h w -> b c (r h) (k w)", r=rows)
    height, width = clip.shape[3] * rows, clip.shape[4] * (frames // rows)
    return clip.flatten(2).unflatten(2, (height, width))


def average_views(scores: Tensor, views: int) -> Tensor:
    """Class probabilities of videos, averaged over their views: (B views, classes) to (B, classes).

    The published test takes 5 segments with 3 crops each; the views of a video stand beside each other.

    Raises:
        ValueError: views does not divide the number of scores.
    """
    if scores.dim() != 2 or views < 1 or len(scores) % views:
        raise ValueError(f"scores must be (B views, classes) for {views} views, got {tuple(scores.shape)}")
    return scores.softmax(1).unflatten(0, (-1, views)).mean(1)


_B = UniRepLKNetConfig(
    depths=(3, 3, 27, 3),
    dims=(128, 256, 512, 1024),
    kernel_sizes=stage_kernels((3, 3, 27, 3), period=3, last=11),
    drop_path=0.4,
)


@dataclass(frozen=True, kw_only=True)
class UniRepLKNetVideoConfig(UniRepLKNetConfig):
    """Config of `UniRepLKNetVideo`: that of the network and how the frames are laid out.

    Attributes:
        frame_layout: ``flat`` or ``mosaic``, see `video_to_image`.
    """

    depths: tuple[int, ...] = _B.depths
    dims: tuple[int, ...] = _B.dims
    kernel_sizes: tuple[tuple[int, ...], ...] = _B.kernel_sizes
    drop_path: float = _B.drop_path
    num_classes: int = 400
    frame_layout: FrameLayout = "flat"
    preprocess: VolumePreprocess = field(
        default_factory=lambda: VolumePreprocess(
            size=(16, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), depth="sample"
        )
    )

    def build(self) -> UniRepLKNetVideo:
        return UniRepLKNetVideo(self)


class UniRepLKNetVideo(UniRepLKNet):
    """`UniRepLKNet` on clips (B, C, T, H, W) that become images; its maps are those of the large image.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such frame layout.
        ValueError: as of `UniRepLKNet`.
    """

    def __init__(self, config: UniRepLKNetVideoConfig) -> None:
        super().__init__(config)
        if config.frame_layout not in get_args(FrameLayout):
            raise unknown("frame_layout", config.frame_layout, get_args(FrameLayout))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the image (B, C, r H, T / r W) that a clip (B, C, T, H, W) becomes."""
        self._check_input(x)
        return self.forward_maps(video_to_image(x, self.config.frame_layout))


VARIANTS: dict[str, UniRepLKNetVideoConfig] = {"unireplknet_b_video": UniRepLKNetVideoConfig()}
