"""UniFormer for video: 3-D local blocks, then attention over all frames at once, or over time and space in turn.

Li, Wang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation
Learning", ICLR 2022, arXiv 2201.04676.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.networks.base import PublishedFile
from convatlas.networks.uniformer.blocks import GlobalBlock, LocalBlock, SplitBlock, patch_embed
from convatlas.networks.uniformer.inflation import VIDEO_LAYOUTS, kinetics_preprocess
from convatlas.networks.uniformer.trunk import STRIDE, Trunk, TrunkConfig
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "UniFormer3d", "UniFormer3dConfig"]


@dataclass(frozen=True, kw_only=True)
class UniFormer3dConfig(TrunkConfig):
    """Config of `UniFormer3d`; ``preprocess.size`` says frames, height and width.

    Attributes:
        split: attend over time and over space in turn, instead of over both at once.
        overlapping_time: embed three frames at a time, one by one, in stages 2 to 4 instead of each frame on its own.
    """

    num_classes: int = 400
    split: bool = False
    overlapping_time: bool = False
    preprocess: VolumePreprocess = field(default_factory=lambda: kinetics_preprocess(16))

    def build(self) -> UniFormer3d:
        return UniFormer3d(self)


class UniFormer3d(Trunk):
    """The network for clips (B, C, T, H, W): the stem takes every second frame, so that ceil(T / 2) are left.

    Any number of frames works, since no weight depends on it. `convatlas.load_weights` takes weights of `UniFormer` as
    well and inflates them (`inflate_state_dict`).

    Args:
        config: what to build.

    Raises:
        ValueError: a tuple does not name four stages, or head_dim does not divide dims.
    """

    layouts: ClassVar[Mapping[str, Layout]] = VIDEO_LAYOUTS
    stem_modules: ClassVar[tuple[str, ...]] = ("stages.0.patch_embed.proj",)
    min_size: int | tuple[int, ...] | None = (1, STRIDE, STRIDE)

    config: UniFormer3dConfig

    def __init__(self, config: UniFormer3dConfig) -> None:
        super().__init__(config)
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        for module in self.modules():
            if isinstance(module, SplitBlock):
                module.init_time()

    def _embedding(self, stage: int) -> nn.Module:
        before, width = self._before(stage), self.config.dims[stage]
        if stage == 0:
            return patch_embed(before, width, (3, 4, 4), (2, 4, 4), (1, 0, 0))
        time = 3 if self.config.overlapping_time else 1
        return patch_embed(before, width, (time, 2, 2), (1, 2, 2), (time // 2, 0, 0))

    def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        options = self._options(stage)
        if stage < 2:
            return LocalBlock(options, drop_path)
        return (SplitBlock if self.config.split else GlobalBlock)(options, drop_path)


def _frames(frames: int) -> dict[str, VolumePreprocess]:
    return {"preprocess": kinetics_preprocess(frames)}


_SMALL = UniFormer3dConfig()
_BASE = UniFormer3dConfig(depths=(5, 8, 20, 7), drop_path=0.3)

#: For Kinetics-400 unless the name says otherwise (ss: Something-Something, V1 and V2), and for 16 frames unless it
#: says f8 or f32.
VARIANTS: dict[str, UniFormer3dConfig] = {
    "uniformer3d_small": _SMALL,
    "uniformer3d_small_f8": _SMALL.override(**_frames(8)),
    "uniformer3d_small_f32": _SMALL.override(**_frames(32)),
    "uniformer3d_base": _BASE,
    "uniformer3d_base_f8": _BASE.override(**_frames(8)),
    "uniformer3d_base_f32": _BASE.override(**_frames(32)),
    "uniformer3d_small_split": _SMALL.override(split=True),
    "uniformer3d_small_k600": _SMALL.override(num_classes=600),
    "uniformer3d_base_k600": _BASE.override(num_classes=600),
    "uniformer3d_base_f32_k600": _BASE.override(num_classes=600, **_frames(32)),
    "uniformer3d_small_ss": _SMALL.override(num_classes=174, drop_path=0.3),
    "uniformer3d_base_f32_ss": _BASE.override(num_classes=174, drop_path=0.5, **_frames(32)),
    "uniformer3d_small_ucf101": _SMALL.override(num_classes=101),
    "uniformer3d_small_hmdb51": _SMALL.override(num_classes=51),
}


def _published(data: str, top1: float) -> tuple[PublishedFile, ...]:
    page = "https://github.com/Sense-X/UniFormer/tree/main/video_classification"
    return (PublishedFile(page, "MIT", {f"{data} top-1 of a video [%]": top1}, by_hand=True),)


#: The authors' page links the files to a drive. Views of a video: Kinetics 4 clips, Something-Something 3 crops, UCF101
#: and HMDB51 5 clips of 3 crops.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "uniformer3d_small": _published("Kinetics-400", 80.8),
    "uniformer3d_small_f8": _published("Kinetics-400", 78.4),
    "uniformer3d_small_f32": _published("Kinetics-400", 82.0),
    "uniformer3d_base": _published("Kinetics-400", 82.0),
    "uniformer3d_base_f8": _published("Kinetics-400", 79.8),
    "uniformer3d_base_f32": _published("Kinetics-400", 82.9),
    "uniformer3d_small_k600": _published("Kinetics-600", 82.8),
    "uniformer3d_base_k600": _published("Kinetics-600", 84.0),
    "uniformer3d_base_f32_k600": _published("Kinetics-600", 84.5),
    "uniformer3d_small_ss": _published("Something-Something V1", 57.6) + _published("Something-Something V2", 69.4),
    "uniformer3d_base_f32_ss": _published("Something-Something V1", 61.0) + _published("Something-Something V2", 71.2),
    "uniformer3d_small_ucf101": _published("UCF101", 98.3),
    "uniformer3d_small_hmdb51": _published("HMDB51", 77.5),
}
