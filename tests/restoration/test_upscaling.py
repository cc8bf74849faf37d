"""Whole images and clips: every depth and kind of channels, the same in tiles as in one piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convatlas.networks.base import Upscaler, UpscalerConfig
from convatlas.networks.espcn import ESPCNConfig
from convatlas.networks.srcnn import SRCNNConfig
from convatlas.ops.colour import rgb_to_ycbcr, ycbcr_to_rgb
from convatlas.ops.resize import resize
from convatlas.restoration.upscaling import in_tiles, upscale_image, upscale_video
from restoration.scenes import scene


def network(**changes: Any) -> Upscaler:
    """ESPCN with a sensible output: the image by nearest neighbours, and a little noise."""
    model = ESPCNConfig(scale=2, channels=8).override(**changes).build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


class Nearest(Upscaler):
    """Every pixel becomes a block; of several frames the middle one does."""

    def __init__(self, channels: int = 1, frames: int = 1) -> None:
        super().__init__(UpscalerConfig.__new__(ESPCNConfig))
        object.__setattr__(self, "config", ESPCNConfig(scale=2, in_channels=channels, frames=frames))
        self.unused = nn.Parameter(torch.zeros(1))

    @property
    def frames(self) -> int:
        return int(self.config.frames)

    @property
    def reach(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        channels = self.in_channels
        middle = x[:, channels * (self.frames // 2) : channels * (self.frames // 2 + 1)]
        return middle.repeat_interleave(2, 2).repeat_interleave(2, 3)


KINDS = {
    "grey": lambda image: image[..., 0],
    "grey with axis": lambda image: image[..., :1],
    "grey and alpha": lambda image: image[..., :2],
    "rgb": lambda image: image,
    "rgba": lambda image: np.dstack([image, 255 - image[..., :1]]),
    "16 bits": lambda image: image.astype(np.uint16) * 257,
    "float": lambda image: image.astype(np.float32) / 255,
    "double": lambda image: image.astype(np.float64) / 255,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_tiles(kind: str, channels: int):
    image = KINDS[kind](scene(0)[:37, :51])
    model = network(in_channels=channels)
    whole = upscale_image(model, image, tile=100)
    assert whole.shape == (74, 102, *image.shape[2:])
    assert whole.dtype == image.dtype
    calls = []
    tiled = upscale_image(model, image, tile=16, progress=lambda done, total: calls.append((done, total)))
    # In tiles oneDNN may round differently, by less than a level of 8 bits.
    assert np.abs(tiled.astype(float) - whole).max() <= (2e-6 if image.dtype.kind == "f" else 1)
    assert calls[-1] == (6, 6)


@pytest.mark.parametrize("luma", ["matlab", "studio256"])
def test_luma_goes_through_the_network_and_chroma_is_interpolated(luma: Any):
    image = scene(0)[:20, :30].astype(np.float64) / 255
    model = network().double()
    x = torch.from_numpy(image).movedim(-1, 0)[None].float().double()
    ycbcr = rgb_to_ycbcr(x) if luma == "matlab" else rgb_to_ycbcr(255 * x, luma) / 255
    with torch.no_grad():
        y = model(ycbcr[:, :1]).clamp(0, 1)
    both = torch.cat([y, resize(ycbcr[:, 1:], scale=2, convention="pillow")], 1)
    rgb = ycbcr_to_rgb(both) if luma == "matlab" else ycbcr_to_rgb(255 * both, luma) / 255
    result = upscale_image(model, image, luma=luma, convention="pillow")
    assert np.abs(result - rgb.clamp(0, 1)[0].movedim(0, -1).numpy()).max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_grey_and_transparency_are_kept(channels: int):
    image = scene(1)
    expected = image.repeat(2, 0).repeat(2, 1)
    flat = np.broadcast_to(np.array([200, 60, 20], np.uint8), (16, 16, 3))
    assert np.abs(upscale_image(Nearest(channels), flat).astype(int) - flat[0, 0]).max() <= 1
    grey = upscale_image(Nearest(channels), image[..., 1])
    assert np.abs(grey.astype(int) - expected[..., 1]).max() <= 1
    alpha = np.dstack([image, np.full(image.shape[:2], 9, np.uint8)])
    assert (upscale_image(Nearest(channels), alpha)[..., 3] == 9).all()
    deep = np.full((8, 8, 1), 12345, np.uint16)
    assert np.abs(upscale_image(Nearest(channels), deep).astype(int) - 12345).max() <= 2


def test_a_network_at_high_resolution_is_tiled_as_well():
    model = SRCNNConfig(scale=3, dims=(4, 3)).build().double().eval()
    x = torch.rand(1, 1, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(in_tiles(model, x, tile=9), model(x))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"image must be \(H, W\) or \(H, W, 1 to 4\) and not empty, got \(4, 4, 5\)"),
        (np.zeros((0, 4), np.uint8), "not empty"),
        (np.zeros((4, 4), np.int64), "image must be uint8, uint16 or floating point, got int64"),
        (np.full((4, 4), np.nan), "image must not hold NaN"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str):
    with pytest.raises(ValueError, match=message):
        upscale_image(network(), image)


def test_tiles_and_frames_are_checked():
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        upscale_image(network(), scene(0), tile=0)
    with pytest.raises(ValueError, match="takes 3 frames: use upscale_video"):
        upscale_image(network(frames=3), scene(0))


# -- clips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_frames_are_enlarged_as_images_are(channels: int, batch_size: int):
    frames = [scene(seed)[:24, :20] for seed in range(5)]
    model = network(in_channels=channels)
    result = list(upscale_video(model, iter(frames), batch_size=batch_size, tile=7))
    assert len(result) == 5
    for frame, enlarged in zip(frames, result, strict=True):
        assert enlarged.dtype == np.uint8
        assert np.abs(enlarged.astype(int) - upscale_image(model, frame)).max() <= 1


def test_luma_of_a_file_goes_through_as_it_is():
    frames = [scene(seed)[:10, :12] for seed in range(2)]
    for frame, enlarged in zip(frames, upscale_video(Nearest(), frames, colour="ycbcr"), strict=True):
        assert np.array_equal(enlarged[..., 0], frame[..., 0].repeat(2, 0).repeat(2, 1))
        chroma = resize(torch.from_numpy(frame[..., 1:]).movedim(-1, 0).float(), scale=2, convention="matlab")
        assert np.abs(enlarged[..., 1:] - chroma.clamp(0, 255).movedim(0, -1).numpy()).max() <= 0.51
    with pytest.raises(ValueError, match="colour must be 'rgb' for a network of 3 channels, got 'ycbcr'"):
        upscale_video(Nearest(3), frames, colour="ycbcr")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_windows_of_frames_give_the_middle_one(channels: int, count: int):
    frames = [np.full((6, 6, 3), 40 + 30 * number, np.uint8) for number in range(count)]
    result = list(upscale_video(Nearest(channels, frames=5), frames))
    assert [round(float(frame.mean())) for frame in result] == [40 + 30 * number for number in range(count)]


def test_no_more_frames_are_read_than_are_needed():
    read = []

    def frames():
        for number in range(10):
            read.append(number)
            yield np.zeros((6, 6, 3), np.uint8)

    result = upscale_video(Nearest(frames=3), frames())
    assert read == []
    next(result)
    assert len(read) == 2
    next(result)
    assert len(read) == 3
    assert list(upscale_video(Nearest(), [])) == []


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([np.zeros((4, 4), np.uint8)], {}, r"frames must be \(H, W, 3\) uint8, got uint8 \(4, 4\)"),
        (
            [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)],
            {},
            r"one size and pixels, got \(4, 5\) after",
        ),
        ([], {"colour": "yuv"}, "unknown colour 'yuv'"),
        ([], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_are_no_frames_is_refused(frames: list, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        list(upscale_video(Nearest(), frames, **options))
