"""Depthwise convolution."""

from __future__ import annotations

from battery.subjects import Arguments, Operator, random
from convatlas.ops.depthwise import depthwise_conv


def _example(
    size: tuple[int, ...], kernel: tuple[int, ...], outputs: int = 3, stride: int = 1, dilation: int = 1
) -> Arguments:
    padding = tuple(dilation * (side // 2) for side in kernel)
    axes = (1,) * len(size)
    return lambda: (
        random(2, 3, *size),
        random(outputs, 1, *kernel),
        random(outputs),
        tuple(stride * one for one in axes),
        padding,
        tuple(dilation * one for one in axes),
    )


def _single(example: Arguments, *, trained: bool = False) -> Arguments:
    def arguments() -> tuple[object, ...]:
        x, weight, bias, *rest = example()
        return x.float().requires_grad_(trained), weight.float(), bias.float(), *rest

    return arguments


OPERATORS = [
    Operator(
        depthwise_conv,
        examples={
            "odd": _example((7, 5), (3, 5)),
            "strided_with_multiplier": _example((7, 6), (3, 3), outputs=6, stride=2),
            "dilated": _example((9, 5), (3, 2), dilation=2),
            "pixel": _example((1, 1), (3, 3)),
            "kernel_larger_than_map": _example((3, 4), (11, 13)),
            "signal": _example((9,), (4,), stride=2),
            "dilated_signal": _example((11,), (3,), dilation=4),
            "signal_shorter_than_the_kernel": _example((3,), (5,), dilation=2),
            "volume": _example((3, 1, 5), (3, 3, 2)),
        },
        reaching={
            "torch": _single(_example((7, 5), (3, 3))),
            "channels_last": _single(_example((7, 5), (5, 5)), trained=True),
            "filled": _single(_example((9, 7), (7, 9), dilation=2)),
            "turned": _single(_example((3, 19), (1, 17))),
            "shifted": _single(_example((40,), (3,), dilation=8)),
        },
        refused={
            "channels_last": _example((9,), (3,)),
            "filled": _example((9,), (3,)),
            "turned": _example((3, 4, 5), (3, 3, 3)),
            "shifted": _example((9,), (4,), stride=2),
        },
    ),
]
