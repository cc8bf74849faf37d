"""PNG files of 16 bits a channel, which Pillow reduces to 8: reading every colour type, writing without loss.

ISO/IEC 15948 (PNG), sections 7 to 10.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["is_png16", "read_png16", "write_png16"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Colour type -> channels: grey, RGB, grey with alpha, RGB with alpha.
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
_TYPES = {channels: kind for kind, channels in _CHANNELS.items()}
#: Adam7: first column, first row, and the steps of both, for each pass.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_MOST_PIXELS = 2**28
_UP, _PAETH = 2, 4
#: Compression from 1 to 9: 3 takes about a quarter of the time of the usual 6 and a few percent more space.
_LEVEL = 3
#: Rows that are compressed at a time.
_STRIP = 64


def is_png16(data: bytes) -> bool:
    """Whether a file with this content (its first 26 bytes suffice) is a PNG of 16 bits a channel."""
    return data[:8] == _SIGNATURE and data[12:16] == b"IHDR" and data[24:25] == b"\x10"


def read_png16(data: bytes) -> npt.NDArray[np.uint16]:
    """The pixels of a 16-bit PNG, (H, W, C) with C from 1 to 4: grey or RGB, and alpha if there is one.

    Args:
        data: content of the file.

    Raises:
        ValueError: the file is damaged, too large or has another depth.
    """
    if not is_png16(data):
        raise ValueError("not a PNG of 16 bits a channel")
    width, height, _, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if kind not in _CHANNELS or interlaced > 1 or not width or not height:
        raise ValueError("the header is damaged")
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many")
    channels, key = _CHANNELS[kind], None
    compressed = []
    for name, content in _chunks(data):
        if name == b"IDAT":
            compressed.append(content)
        elif name == b"tRNS" and kind in (0, 2):
            key = np.frombuffer(content, ">u2", channels)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    shapes = [(-(-(height - y) // down), -(-(width - x) // across)) for x, y, across, down in passes]
    sizes = [rows * (1 + 2 * channels * columns) if columns > 0 < rows else 0 for rows, columns in shapes]
    try:
        raw = np.frombuffer(zlib.decompressobj().decompress(b"".join(compressed), sum(sizes)), np.uint8)
    except zlib.error as error:
        raise ValueError(f"the pixels are damaged: {error}") from None
    if len(raw) < sum(sizes):
        raise ValueError("the file is truncated")
    pixels = np.zeros((height, width, channels), np.uint16)
    for (x, y, across, down), (rows, columns), size in zip(passes, shapes, sizes, strict=True):
        if size:
            lines, raw = raw[:size].reshape(rows, -1), raw[size:]
            values = _unfiltered(lines, 2 * channels).reshape(rows, columns, channels, 2)
            pixels[y::down, x::across] = values.view(">u2")[..., 0]
    if key is not None:
        alpha = np.where((pixels == key).all(2, keepdims=True), 0, 65535).astype(np.uint16)
        pixels = np.concatenate([pixels, alpha], 2)
    return pixels


def write_png16(pixels: npt.NDArray[np.uint16], icc: bytes | None = None) -> bytes:
    """The content of a 16-bit PNG.

    Args:
        pixels: (H, W, C) uint16, C from 1 to 4: grey or RGB, and alpha.
        icc: colour profile to store.

    Raises:
        ValueError: pixels are no such array.
    """
    if pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] not in _TYPES or not pixels.size:
        raise ValueError(f"pixels must be (H, W, 1 to 4) uint16, got {pixels.shape} {pixels.dtype}")
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _TYPES[channels], 0, 0, 0)
    profile = [(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))] if icc else []
    chunks = [(b"IHDR", header), *profile, (b"IDAT", _compressed(pixels)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def _compressed(pixels: npt.NDArray[np.uint16]) -> bytes:
    """The rows, each less the one above it, compressed by strips: little memory, and fast to read again."""
    height, width, channels = pixels.shape
    above = np.zeros((1, 2 * channels * width), np.uint8)
    packer, parts = zlib.compressobj(_LEVEL), []
    for start in range(0, height, _STRIP):
        lines = pixels[start : start + _STRIP].astype(">u2").view(np.uint8).reshape(-1, 2 * channels * width)
        filtered = np.full((len(lines), 1 + lines.shape[1]), _UP, np.uint8)
        filtered[:, 1:] = lines - np.concatenate([above, lines[:-1]])
        parts.append(packer.compress(filtered.tobytes()))
        above = lines[-1:]
    return b"".join([*parts, packer.flush()])


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_SIGNATURE)
    while place + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + 8 + length]
        if name == b"IEND":
            return
        yield name, content
        place += 12 + length


def _unfiltered(lines: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """Undo the prediction of each byte from its neighbours to the left, above and above left.

    Where all rows are predicted from the left or from above alone, they are sums. Else the bytes along a falling
    diagonal depend on earlier diagonals only, so that one is computed at a time.
    """
    height, width = len(lines), (lines.shape[1] - 1) // step
    kinds = lines[:, 0]
    if kinds.max(initial=0) > _PAETH:
        raise ValueError("the pixels are damaged: unknown filter")
    if kinds.max(initial=0) <= _UP:
        plain = np.ascontiguousarray(lines[:, 1:]).reshape(height, width, step)
        for row in range(height):
            if kinds[row] == 1:
                np.add.accumulate(plain[row], 0, np.uint8, plain[row])
            elif kinds[row] == _UP and row:
                plain[row] += plain[row - 1]
        return plain
    left_of = lines[:, 1:].reshape(height, width, step).astype(np.int16)
    result = np.zeros((height + 1, width + 1, step), np.int16)
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        left, above, corner = result[y + 1, x], result[y, x + 1], result[y, x]
        guesses = (np.zeros_like(left), left, above, (left + above) >> 1, _paeth(left, above, corner))
        predicted = np.choose(kinds[y][:, None], guesses)
        result[y + 1, x + 1] = (left_of[y, x] + predicted) & 255
    return np.ascontiguousarray(result[1:, 1:].astype(np.uint8))


def _paeth(
    left: npt.NDArray[np.int16], above: npt.NDArray[np.int16], corner: npt.NDArray[np.int16]
) -> npt.NDArray[np.int16]:
    """Whichever of three neighbours is nearest to left + above - corner."""
    to_left, to_above = np.abs(above - corner), np.abs(left - corner)
    to_corner = np.abs(left + above - 2 * corner)
    nearest: npt.NDArray[np.int16] = np.where(
        (to_left <= to_above) & (to_left <= to_corner), left, np.where(to_above <= to_corner, above, corner)
    )
    return nearest
