"""The wavelet transform and its inverse."""

from __future__ import annotations

from battery.subjects import Operator, random
from convatlas.ops.wavelet_filters import find_wavelet
from convatlas.ops.wavelets import dwt, idwt

_HAAR, _DB4 = find_wavelet("haar"), find_wavelet("db4")

OPERATORS = [
    Operator(
        dwt,
        examples={
            "odd": lambda: (random(2, 3, 5, 7), _HAAR, "symmetric"),
            "even": lambda: (random(2, 3, 4, 6), _HAAR, "zero"),
            "signal": lambda: (random(2, 2, 9), _DB4, "reflect"),
            "volume": lambda: (random(1, 2, 3, 2, 5), find_wavelet("bior2.2"), "periodization"),
            "volume_haar": lambda: (random(1, 2, 4, 1, 6), _HAAR, "periodic"),
            "one_sample": lambda: (random(1, 2, 1), _DB4, "constant"),
            "shorter_than_the_filter": lambda: (random(2, 1, 3, 4), _DB4, "antireflect"),
            "smooth": lambda: (random(1, 2, 7, 3), find_wavelet("sym3"), "smooth"),
            "antisymmetric": lambda: (random(1, 2, 5), find_wavelet("coif1"), "antisymmetric"),
        },
        reaching={
            "matrix": lambda: (random(2, 2, 9, 8), _DB4, "zero"),
            "conv": lambda: (random(1, 2, 300), _DB4, "zero"),
            "patches": lambda: (random(2, 2, 4, 6), _HAAR, "zero"),
        },
        reaching_on_gpu={"slices": lambda: (random(2, 2, 4, 6), _HAAR, "zero")},
        refused={
            "slices": lambda: (random(2, 2, 8), _DB4, "zero"),
            "patches": lambda: (random(2, 2, 8), _DB4, "zero"),
        },
    ),
    Operator(
        idwt,
        examples={
            "image": lambda: (random(2, 3, 4, 3, 5), _HAAR, "symmetric"),
            "signal": lambda: (random(2, 2, 2, 6), _DB4, "reflect"),
            "volume": lambda: (random(1, 2, 8, 3, 2, 1), find_wavelet("bior2.2"), "periodization"),
            "volume_haar": lambda: (random(1, 2, 8, 2, 1, 3), _HAAR, "periodic"),
            "one_sample": lambda: (random(1, 2, 2, 1), _DB4, "periodization"),
            "cropped": lambda: (random(2, 1, 4, 5, 6), _DB4, "zero", (3, 6)),
        },
        reaching={
            "matrix": lambda: (random(2, 2, 4, 9, 8), _DB4, "zero"),
            "conv": lambda: (random(1, 2, 2, 300), _DB4, "zero"),
            "patches": lambda: (random(2, 2, 4, 4, 6), _HAAR, "zero"),
        },
        reaching_on_gpu={"slices": lambda: (random(2, 2, 4, 4, 6), _HAAR, "zero")},
        refused={
            "slices": lambda: (random(2, 2, 2, 8), _DB4, "zero"),
            "patches": lambda: (random(2, 2, 2, 8), _DB4, "zero"),
        },
    ),
]
