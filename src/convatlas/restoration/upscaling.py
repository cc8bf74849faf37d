"""Enlarging whole images and clips with a super-resolution network: colours, transparency, depth, tiles, frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.networks.base import Upscaler
from convatlas.ops.colour import rgb_to_ycbcr, ycbcr_to_rgb
from convatlas.ops.resize import Convention, resize
from convatlas.ops.tiling import tiled

__all__ = ["TILE", "in_tiles", "upscale_image", "upscale_video"]

Array = npt.NDArray[Any]
Luma = Literal["matlab", "studio256"]
Colour = Literal["rgb", "ycbcr"]

#: Side in pixels of the tiles in which large images are enlarged; a larger one takes more memory and hardly less time.
TILE = 256
_BICUBIC_REACH = 3


@torch.inference_mode()
def in_tiles(
    model: Upscaler,
    x: Tensor,
    *,
    function: Callable[[Tensor], Tensor] | None = None,
    tile: int = TILE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run a network in overlapping tiles, which gives what it gives on the whole, with bounded memory.

    Args:
        model: the network.
        x: (N, frames * C, H, W).
        function: what to run instead of the network itself; it may add bicubic interpolation by the same scale.
        tile: side of a tile in pixels of x, before the overlap.
        progress: called with the tiles done and the number of all tiles.

    Raises:
        ValueError: tile is smaller than 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    overlap = 2 * max(model.reach, _BICUBIC_REACH)
    run = model if function is None else function
    return tiled(run, x, tile=tile + overlap, overlap=overlap, scale=model.scale, progress=progress)


def upscale_image(
    model: Upscaler,
    image: Array,
    *,
    luma: Luma = "matlab",
    convention: Convention = "matlab",
    tile: int = TILE,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Enlarge an image with a network for luma or RGB.

    A network of one channel gets luma; chroma and alpha are enlarged by bicubic interpolation. Large images are
    enlarged in tiles that overlap so far that the result is the same as without.

    Args:
        model: the network, in evaluation mode, on any device.
        image: (H, W), or (H, W, C) with C of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha); uint8, uint16, or
            floating point in [0, 1].
        luma: form of luma that the network was trained on.
        convention: whose bicubic interpolation.
        tile: side of a tile in pixels of ``image``.
        progress: called with the tiles done and the number of all tiles.

    Returns:
        (scale H, scale W[, C]) in the type of ``image``.

    Raises:
        ValueError: the image has another shape or type, is empty or holds NaN; or the network takes several frames.
    """
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not pixels.size:
        raise ValueError(f"image must be (H, W) or (H, W, 1 to 4) and not empty, got {image.shape}")
    if model.frames != 1:
        raise ValueError(f"model must take one image, this one takes {model.frames} frames: use upscale_video")
    levels = {"uint8": 255, "uint16": 65535}.get(pixels.dtype.name, 0)
    if pixels.dtype.kind == "f":
        if np.isnan(pixels).any():
            raise ValueError("image must not hold NaN")
        tensor = torch.from_numpy(pixels.astype(np.float32, order="C"))
    elif levels:
        tensor = torch.from_numpy(pixels.astype(np.int32 if levels > 255 else np.uint8, order="C"))
    else:
        raise ValueError(f"image must be uint8, uint16 or floating point, got {pixels.dtype}")

    def enlarge(x: Tensor) -> Tensor:
        weight = next(model.parameters())
        x = x.to(weight.device, weight.dtype) / (levels or 1)
        colours = x.shape[1] - 1 if x.shape[1] % 2 == 0 else x.shape[1]
        y = _enlarged(model, x[:, :colours], luma, convention)
        if colours < x.shape[1]:
            y = torch.cat([y, resize(x[:, colours:], scale=model.scale, convention=convention)], 1)
        y = y.clamp(0, 1)
        return (y * levels).round().to(tensor.dtype) if levels else y

    y = in_tiles(model, tensor.movedim(-1, 0)[None], function=enlarge, tile=tile, progress=progress)
    result = y[0].movedim(0, -1).cpu().numpy().astype(image.dtype)
    return result[..., 0] if image.ndim == 2 else result


def upscale_video(
    model: Upscaler,
    frames: Iterable[Array],
    *,
    colour: Colour = "rgb",
    luma: Luma = "matlab",
    convention: Convention = "matlab",
    tile: int = TILE,
    batch_size: int = 1,
) -> Iterator[Array]:
    """Enlarge a clip frame by frame, holding no more of it than the network takes at once.

    A network for luma that gets "ycbcr" works on the luma of the file as it is. One of several frames sees the first
    and the last frame again beyond the ends of the clip.

    Args:
        model: the network, in evaluation mode, on any device.
        frames: (H, W, 3) uint8, all of one size.
        colour: what the channels are, see `convatlas.data.video.Video.frames`.
        luma: form of luma that the network was trained on.
        convention: whose bicubic interpolation enlarges the chroma.
        tile: side of a tile in pixels of a frame.
        batch_size: frames that go through the network together.

    Returns:
        (scale H, scale W, 3) uint8, as many as there are ``frames``.

    Raises:
        ValueError: a frame has another shape or type, or a network for RGB gets "ycbcr".
    """
    if colour not in ("rgb", "ycbcr"):
        raise unknown("colour", colour, ("rgb", "ycbcr"))
    if colour == "ycbcr" and model.in_channels != 1:
        raise ValueError("colour must be 'rgb' for a network of 3 channels, got 'ycbcr'")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return _upscaled(model, frames, colour, luma, convention, tile, batch_size)


def _upscaled(
    model: Upscaler,
    frames: Iterable[Array],
    colour: Colour,
    luma: Luma,
    convention: Convention,
    tile: int,
    batch_size: int,
) -> Iterator[Array]:
    middle = model.frames // 2

    def enlarge(x: Tensor) -> Tensor:
        weight = next(model.parameters())
        windows = x.to(weight.device, weight.dtype).unflatten(1, (model.frames, 3)) / 255
        if colour == "ycbcr":
            y = torch.cat([_y(model, windows[:, :, 0]), _bicubic(model, windows[:, middle, 1:], convention)], 1)
        elif model.frames == 1:
            y = _enlarged(model, windows[:, 0], luma, convention)
        elif model.in_channels == 1:
            every = _to_ycbcr(windows, luma)
            chroma = _bicubic(model, every[:, middle, 1:], convention)
            y = _to_rgb(torch.cat([_y(model, every[:, :, 0]), chroma], 1), luma)
        else:
            y = model(windows.flatten(1, 2))
        return (y.clamp(0, 1) * 255).round().to(torch.uint8)

    for group in _groups(_windows(frames, model.frames), batch_size):
        x = torch.from_numpy(np.stack(group)).movedim(-1, 1)
        y = in_tiles(model, x, function=enlarge, tile=tile)
        yield from y.movedim(1, -1).contiguous().cpu().numpy()


def _enlarged(model: Upscaler, x: Tensor, luma: Luma, convention: Convention) -> Tensor:
    """Grey or RGB (N, 1 or 3, H, W) in [0, 1] enlarged by a network for luma or RGB."""
    grey = x.shape[1] == 1
    colours = x.expand(-1, 3, -1, -1)
    if model.in_channels != 1:
        y = model(colours)
    else:
        ycbcr = _to_ycbcr(colours, luma)
        chroma = ycbcr[:, 1:, :1, :1] if grey else _bicubic(model, ycbcr[:, 1:], convention)
        enlarged = _y(model, ycbcr[:, :1])
        y = _to_rgb(torch.cat([enlarged, chroma.expand(-1, -1, *enlarged.shape[2:])], 1), luma)
    return y.mean(1, keepdim=True) if grey else y


def _y(model: Upscaler, x: Tensor) -> Tensor:
    return model(x).clamp(0, 1)


def _bicubic(model: Upscaler, x: Tensor, convention: Convention) -> Tensor:
    return resize(x, scale=model.scale, convention=convention)


def _to_ycbcr(x: Tensor, luma: Luma) -> Tensor:
    return rgb_to_ycbcr(x, "matlab") if luma == "matlab" else rgb_to_ycbcr(x * 255, "studio256") / 255


def _to_rgb(x: Tensor, luma: Luma) -> Tensor:
    return ycbcr_to_rgb(x, "matlab") if luma == "matlab" else ycbcr_to_rgb(x * 255, "studio256") / 255


def _windows(frames: Iterable[Array], length: int) -> Iterator[Array]:
    """For each frame the ``length`` around it, joined along their channels: (H, W, 3 length)."""
    window: deque[Array] = deque(maxlen=length)
    for frame in _extended(frames, length // 2):
        window.append(frame)
        if len(window) == length:
            yield np.concatenate(window, 2)


def _extended(frames: Iterable[Array], by: int) -> Iterator[Array]:
    """The frames, the first and the last so many times more."""
    first = last = None
    for frame in frames:
        if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"frames must be (H, W, 3) uint8, got {given}")
        if first is None:
            first = frame
            yield from [frame] * by
        if frame.shape != first.shape or not frame.size:
            raise ValueError(f"frames must have one size and pixels, got {frame.shape[:2]} after {first.shape[:2]}")
        yield frame
        last = frame
    if last is not None:
        yield from [last] * by


def _groups(windows: Iterator[Array], size: int) -> Iterator[list[Array]]:
    while group := list(islice(windows, size)):
        yield group
