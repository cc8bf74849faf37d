"""Parts of Triton kernels that read between pixels: interpolation, its derivatives, and the way back.

Maps lie with channels last; ``first`` is the index of the pixel at the top left of the map that a position reads.
Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util

__all__: list[str] = []

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _place(  # type: ignore[no-untyped-def]
        first, row, column, height, width, there, channels, channel, has_channel,
    ):  # fmt: skip
        inside = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = (first + row * width + column) * channels
        return pixel[:, None] + channel[None, :], inside[:, None] & has_channel[None, :]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def interpolate(  # type: ignore[no-untyped-def]
        x, first, y_at, x_at, height, width, there, channels, channel, has_channel, work: tl.constexpr,
    ):  # fmt: skip
        """Values (positions, channels) at positions, and their derivatives by y and x."""
        top = tl.floor(y_at)
        left = tl.floor(x_at)
        down = (y_at - top)[:, None]
        right = (x_at - left)[:, None]
        row = top.to(tl.int64)
        column = left.to(tl.int64)
        place, seen = _place(first, row, column, height, width, there, channels, channel, has_channel)
        a = tl.load(x + place, mask=seen, other=0).to(work)
        place, seen = _place(first, row, column + 1, height, width, there, channels, channel, has_channel)
        b = tl.load(x + place, mask=seen, other=0).to(work)
        place, seen = _place(first, row + 1, column, height, width, there, channels, channel, has_channel)
        c = tl.load(x + place, mask=seen, other=0).to(work)
        place, seen = _place(first, row + 1, column + 1, height, width, there, channels, channel, has_channel)
        d = tl.load(x + place, mask=seen, other=0).to(work)
        value = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
        by_y = (1 - right) * (c - a) + right * (d - b)
        by_x = (1 - down) * (b - a) + down * (d - c)
        return value, by_y, by_x

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def scatter(  # type: ignore[no-untyped-def]
        dx, gradient, first, y_at, x_at, height, width, there, channels, channel, has_channel,
    ):  # fmt: skip
        """Add a gradient (positions, channels) of interpolated values to those of the pixels."""
        row = tl.floor(y_at).to(tl.int64)
        column = tl.floor(x_at).to(tl.int64)
        down = (y_at - tl.floor(y_at))[:, None]
        right = (x_at - tl.floor(x_at))[:, None]
        for corner in range(4):
            below = corner // 2
            beside = corner % 2
            share = tl.where(below == 1, down, 1 - down) * tl.where(beside == 1, right, 1 - right)
            place, seen = _place(
                first, row + below, column + beside, height, width, there, channels, channel, has_channel
            )
            tl.atomic_add(dx + place, gradient * share, mask=seen)
