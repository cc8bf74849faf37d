"""Spectral convolutions: transform, a matrix for each of the lowest modes, and back.

Li et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv 2010.08895; with
cosines and the initialisations of Poli et al.: "Transform Once", NeurIPS 2022, arXiv 2211.14453.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.nn.spectral_weights import SpectralInit, as_complex, spectral_deviation, spectral_weight
from convatlas.ops.dct import dct, idct
from convatlas.ops.mode_mixing import mix_modes, mode_major
from convatlas.ops.precision import without_autocast

__all__ = ["DCTConv", "DFTConv"]

Box = tuple[Any, ...]


class _TransformConv(nn.Module, ABC):
    """What both have in common: a block of weights for each corner of the spectrum.

    On all axes but the last a block holds either the first modes or the last ones, which are the negative frequencies
    of a Fourier transform.
    """

    complex_valued: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: Sequence[int],
        *,
        points: int,
        init: SpectralInit | None = None,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, points, *modes) < 1:
            raise ValueError(
                "in_channels, out_channels, modes and points must be at least 1, "
                f"got {in_channels}, {out_channels}, {tuple(modes)} and {points}"
            )
        self.in_channels, self.out_channels, self.modes = in_channels, out_channels, tuple(modes)
        shape = (in_channels, out_channels, *self.modes)
        if init is None:
            deviation = math.sqrt(points / (in_channels * self._counted))
        else:
            count = math.prod(self.modes)
            deviation = spectral_deviation(
                init, in_channels, out_channels, count, points, complex_valued=self.complex_valued
            )
        for number in range(1, self.blocks + 1):
            weight = spectral_weight(*shape, deviation=deviation, layout=mode_major, complex_valued=self.complex_valued)
            self.register_parameter(f"weights{number}", weight)

    @property
    def blocks(self) -> int:
        """How many corners have weights."""
        return int(2 ** (len(self.modes) - 1))

    @property
    @abstractmethod
    def _counted(self) -> float:
        """Modes that have weights, each as often as its variance reaches the field."""

    def _check(self, x: Tensor) -> None:
        if x.dim() != len(self.modes) + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have {self.in_channels} channels and {len(self.modes)} axes, got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"x must be real floating point, got {x.dtype}")

    def _mixed(self, low: Tensor, fits: Sequence[int]) -> Tensor:
        """Multiply the corners of a spectrum and leave the rest zero; a small one takes the weights nearest to 0.

        Args:
            low: the spectrum, its last axis cut to the modes that have weights.
            fits: most modes of each axis that a block can hold.
        """
        y = low.new_zeros(low.shape[0], self.out_channels, *low.shape[2:])
        for number, (place, part) in enumerate(self._corners(fits, low.shape[2:]), 1):
            weight: Tensor = getattr(self, f"weights{number}")
            weight = as_complex(weight) if self.complex_valued else weight.to(low.dtype)
            y[place] = mix_modes(low[place], weight[part])
        return y

    def _corners(self, fits: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[Box, Box]]:
        """Where each block lies in the spectrum, and which of its weights are used."""
        counts = [min(size, fit) for size, fit in zip(self.modes, fits, strict=True)]
        # The first leading axis changes fastest, as in the published three-dimensional FNO.
        for ends in itertools.product((False, True), repeat=len(counts) - 1):
            place: list[slice] = []
            part: list[slice] = []
            for last, count, size, kept in zip((*reversed(ends), False), counts, sizes, self.modes, strict=True):
                place.append(slice(size - count, size) if last else slice(count))
                part.append(slice(kept - count, kept) if last else slice(count))
            yield (..., *place), (..., *part)


class DFTConv(_TransformConv):
    """Convolution by Fourier transform with weights for the lowest frequencies, the layer of FNO.

    The code that was released with the paper writes into a real buffer and so drops the imaginary part of the product;
    this is what it was meant to be.

    Args:
        in_channels, out_channels: of the fields.
        modes: frequencies kept of each axis; of all but the last as many negative ones.
        points: of the grid that it is trained on, of all axes together.
        init: of the weights; preserves the variance of white fields when left out.
        legacy: take the published deviation, with which the variance nearly doubles: it counts one part of a weight.

    Raises:
        ValueError: a size is smaller than 1.
    """

    complex_valued = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: Sequence[int],
        *,
        points: int,
        init: SpectralInit | None = None,
        legacy: bool = False,
    ) -> None:
        self.legacy = legacy
        super().__init__(in_channels, out_channels, modes, points=points, init=init)

    @property
    def _counted(self) -> float:
        frequencies = self.blocks * 2 * math.prod(self.modes) + (4 if len(self.modes) == 2 else 0)
        return frequencies if self.legacy else 2 * frequencies

    def forward(self, x: Tensor) -> Tensor:
        """Fields (B, out_channels, *grid) of fields (B, in_channels, *grid).

        Raises:
            ValueError: x has a wrong number of channels or axes, or is not real.
        """
        self._check(x)
        grid, axes = x.shape[2:], tuple(range(2, x.dim()))
        with without_autocast(x):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            low = torch.fft.rfftn(wide, dim=axes, norm="ortho")[..., : self.modes[-1]]
            fits = [*(max(1, size // 2) for size in grid[:-1]), grid[-1] // 2 + 1]
            # The inverse fills the last axis up with zeros.
            return torch.fft.irfftn(self._mixed(low, fits), s=grid, dim=axes, norm="ortho").to(x.dtype)


class DCTConv(_TransformConv):
    """The same by cosine transform, with real weights at the lowest modes and in the opposite corners.

    Args:
        in_channels, out_channels: of the fields.
        modes: modes kept of each axis; of all but the last as many of the highest.
        points: of the grid that it is trained on, of all axes together.
        init: of the weights; preserves the variance of white fields when left out.

    Raises:
        ValueError: a size is smaller than 1.
    """

    complex_valued = False

    @property
    def _counted(self) -> float:
        return self.blocks * math.prod(self.modes)

    def forward(self, x: Tensor) -> Tensor:
        """Fields (B, out_channels, *grid) of fields (B, in_channels, *grid).

        Raises:
            ValueError: x has a wrong number of channels or axes, or is not real.
        """
        self._check(x)
        grid, axes = x.shape[2:], tuple(range(2, x.dim()))
        with without_autocast(x):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            low = dct(wide, axes, (*grid[:-1], min(self.modes[-1], grid[-1])))
            fits = [*(max(1, size // 2) for size in grid[:-1]), grid[-1]]
            return idct(self._mixed(low, fits), axes, grid).to(x.dtype)
