"""Pictures keep their depth, transparency and profile; 16-bit PNG of every kind is read exactly."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from convatlas.data.image_files import Unreadable
from convatlas.data.pictures import Picture, read_picture, write_picture
from convatlas.data.png16 import is_png16, read_png16, write_png16


def noise(*shape: int, kind: Any = np.uint8) -> npt.NDArray[Any]:
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, shape).astype(kind)


# -- 16-bit PNG --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (20, 31)])
def test_sixteen_bits_survive(channels: int, size: tuple[int, int]):
    pixels = noise(*size, channels, kind=np.uint16)
    content = write_png16(pixels)
    assert is_png16(content)
    assert np.array_equal(read_png16(content), pixels)
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == size[::-1]


def test_pillow_sees_the_same_high_bytes():
    smooth = (np.arange(32)[:, None, None] * 1500 + np.arange(24)[:, None] * 300 + [0, 100, 999]).astype(np.uint16)
    with Image.open(io.BytesIO(write_png16(smooth))) as image:
        assert np.array_equal(np.asarray(image), (smooth >> 8).astype(np.uint8))


@pytest.mark.parametrize("prediction", ["none", "sub", "up", "avg", "paeth", "mixed"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_files_of_another_encoder_are_read(prediction: str, interlaced: bool):
    av = pytest.importorskip("av")
    pixels = noise(21, 13, 4, kind=np.uint16)
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 13, 21, "rgba64be", Fraction(1, 25)
    context.options = {"pred": prediction}
    if interlaced:
        context.flags |= av.codec.context.Flags.interlaced_dct
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba64be")
    frame.pts = 0
    content = b"".join(bytes(packet) for packet in context.encode(frame))
    assert content[28] == interlaced
    assert np.array_equal(read_png16(content), pixels)


def test_a_colour_that_stands_for_nothing_becomes_alpha():
    pixels = noise(4, 3, 3, kind=np.uint16)
    content = write_png16(pixels)
    key = pixels[2, 1].astype(">u2").tobytes()
    chunk = struct.pack(">I", 6) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    read = read_png16(content[:33] + chunk + content[33:])
    assert np.array_equal(read[..., :3], pixels)
    assert (read[..., 3] == 0).sum() == 1
    assert read[2, 1, 3] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:60], "the pixels are damaged|the file is truncated"),
        (lambda data: data[:24] + b"\x08" + data[25:], "not a PNG of 16 bits"),
        (lambda data: data[:25] + b"\x05" + data[26:], "the header is damaged"),
        (lambda data: data[:16] + struct.pack(">I", 2**30) + data[20:], "pixels are too many"),
        (lambda data: data[:16] + struct.pack(">I", 8) + data[20:], "the file is truncated"),
    ],
)
def test_damage_is_told(spoil: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read_png16(spoil(write_png16(noise(6, 5, 3, kind=np.uint16))))


def test_other_arrays_are_refused():
    for pixels in (noise(4, 4, 3), noise(4, 4, 5, kind=np.uint16), noise(4, 4, kind=np.uint16)):
        with pytest.raises(ValueError, match=r"pixels must be \(H, W, 1 to 4\) uint16"):
            write_png16(pixels)


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transparent", [False, True])
def test_pictures_survive_with_everything_in_them(tmp_path: Path, kind: Any, channels: int, transparent: bool):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = noise(6, 5, 1, kind=kind) if transparent else None
    picture = Picture(noise(6, 5, channels, kind=kind), alpha, profile)
    write_picture(tmp_path / "a.png", picture)
    read = read_picture(tmp_path / "a.png")
    assert read.pixels.dtype == kind
    assert np.array_equal(read.pixels, picture.pixels)
    assert (read.alpha is None) == (alpha is None)
    assert alpha is None or np.array_equal(read.alpha, alpha)
    assert read.icc == profile


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_colour_in_full_and_the_profile(tmp_path: Path, channels: int):
    smooth = (np.add.outer(np.arange(40), np.arange(48))[..., None] * [1, 2, 0][:channels]).astype(np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_picture(tmp_path / "a.jpg", Picture(smooth, None, profile))
    read = read_picture(tmp_path / "a.jpg")
    assert read.pixels.shape == smooth.shape
    assert np.abs(read.pixels.astype(int) - smooth).max() < 8
    assert read.icc == profile


def test_every_mode_is_brought_to_grey_or_rgb(tmp_path: Path):
    rgb = noise(6, 5, 3)
    images = {
        "1": (Image.fromarray(rgb[..., 0] > 99), 1, False),
        "L": (Image.fromarray(rgb[..., 0]), 1, False),
        "P": (Image.fromarray(rgb).quantize(8), 3, False),
        "LA": (Image.fromarray(rgb[..., 0]).convert("LA"), 1, True),
        "RGBA": (Image.fromarray(rgb).convert("RGBA"), 3, True),
        "CMYK": (Image.fromarray(rgb).convert("CMYK"), 3, False),
    }
    for mode, (image, channels, transparent) in images.items():
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image.save(path)
        read = read_picture(path)
        assert read.pixels.shape == (6, 5, channels), mode
        assert (read.alpha is not None) == transparent, mode


def test_tiff_of_16_bits(tmp_path: Path):
    from skimage.io import imsave

    for name, pixels in (("rgb", noise(8, 6, 3, kind=np.uint16)), ("grey", noise(8, 6, kind=np.uint16))):
        imsave(tmp_path / f"{name}.tif", pixels, check_contrast=False)
        read = read_picture(tmp_path / f"{name}.tif").pixels
        assert read.dtype == np.uint16
        assert np.array_equal(read, pixels if name == "rgb" else pixels[..., None])


def test_orientation_is_applied(tmp_path: Path):
    pixels = noise(4, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, np.rot90(pixels, -1))


@pytest.mark.parametrize(("content", "message"), [(b"", "the file is empty"), (b"no picture", "not an image")])
def test_files_that_are_no_pictures_are_told(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Unreadable, match=f"photo cannot be read: {message}"):
        read_picture(tmp_path / "a.png", name="photo")
    (tmp_path / "a.png").write_bytes(write_png16(noise(9, 9, 3, kind=np.uint16))[:-60])
    with pytest.raises(Unreadable, match=r"truncated|damaged"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "picture", "message"),
    [
        ("a.gif", Picture(noise(4, 4, 3)), "path must end in .png or .jpg, .jpeg, .jfif, got 'a.gif'"),
        ("a.jpg", Picture(noise(4, 4, 3), noise(4, 4, 1)), "transparency needs a .png file"),
        ("a.jpg", Picture(noise(4, 4, 3, kind=np.uint16)), "16 bits a channel need a .png file"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, name: str, picture: Picture, message: str):
    with pytest.raises(ValueError, match=message):
        write_picture(tmp_path / name, picture)
    assert list(tmp_path.iterdir()) == []
