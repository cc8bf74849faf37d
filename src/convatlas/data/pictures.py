"""Single pictures with all that is in them: 8 or 16 bits, grey or RGB, transparency, colour profile."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from convatlas.data.image_files import opened
from convatlas.data.png16 import is_png16, read_png16, write_png16
from convatlas.files import write_bytes

__all__ = ["Picture", "read_picture", "write_picture"]

_JPEG = (".jpg", ".jpeg", ".jfif")
_JPEG_QUALITY = 95
_BITS_PER_SAMPLE = 258  # tag of TIFF


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels of a picture file.

    Attributes:
        pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8 or uint16; not multiplied by the alpha.
        alpha: (H, W, 1) in the type of the pixels, 0 where nothing is seen, or None.
        icc: the colour profile, if there is one.
    """

    pixels: npt.NDArray[Any]
    alpha: npt.NDArray[Any] | None = None
    icc: bytes | None = None


def read_picture(path: str | Path, *, name: str | None = None) -> Picture:
    """Read a picture as it is stored, upright: palettes become RGB, black and white becomes grey.

    Args:
        path: the file.
        name: what to call the file in an error; by default its path.

    Raises:
        Unreadable: the file is missing, damaged, too large or no picture.
    """
    label = str(path) if name is None else name
    with opened(str(path), label) as image:
        icc = image.info.get("icc_profile") or None
        deep = _deep(path, image)
        pixels = deep if deep is not None else _shallow(image)
    channels = pixels.shape[2]
    if channels in (2, 4):
        return Picture(pixels[..., : channels - 1], pixels[..., channels - 1 :], icc)
    return Picture(pixels, None, icc)


def write_picture(path: str | Path, picture: Picture) -> None:
    """Write a picture as PNG, or as JPEG (quality 95, chroma in full) if its name ends so.

    Raises:
        ValueError: the name ends otherwise, or JPEG cannot hold the picture: it has alpha or 16 bits.
        OSError: the file cannot be written.
    """
    path = Path(path)
    parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha]
    pixels = np.ascontiguousarray(np.concatenate(parts, 2))
    suffix = path.suffix.lower()
    if suffix not in (".png", *_JPEG):
        raise ValueError(f"path must end in .png or {', '.join(_JPEG)}, got {path.name!r}")
    if pixels.dtype == np.uint16:
        if suffix != ".png":
            raise ValueError(f"16 bits a channel need a .png file, got {path.name!r}")
        write_bytes(path, write_png16(pixels, picture.icc))
        return
    if suffix != ".png" and picture.alpha is not None:
        raise ValueError(f"transparency needs a .png file, got {path.name!r}")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"icc_profile": picture.icc} if picture.icc else {}
    if suffix == ".png":
        image.save(buffer, "PNG", **options)
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, **options)
    write_bytes(path, buffer.getvalue())


def _deep(path: str | Path, image: Image.Image) -> npt.NDArray[Any] | None:
    """The pixels of a file with 16 bits a channel, (H, W, C) uint16; None for others."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            if is_png16(file.read(26)):
                file.seek(0)
                return read_png16(file.read())
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA") and 16 in image.tag_v2.get(_BITS_PER_SAMPLE, ()):  # type: ignore[attr-defined]
        from skimage.io import imread

        pixels = np.asarray(imread(path))
        if pixels.ndim != 3 or pixels.dtype != np.uint16 or pixels.shape[2] not in (3, 4):
            raise ValueError(f"pixels of shape {pixels.shape} and type {pixels.dtype}")
        return pixels
    if image.mode == "F":
        raise ValueError("floating-point pixels; save them as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}; expected at most 16 bit")
        return values.astype(np.uint16)[..., None]
    return None


def _shallow(image: Image.Image) -> npt.NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if grey else "RGBA") if image.has_transparency_data else ("L" if grey else "RGB")
    pixels = np.asarray(image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)
