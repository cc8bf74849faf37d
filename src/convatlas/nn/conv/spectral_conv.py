"""Spectral convolution layer, with dense or factorised weights.

Li et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv 2010.08895; the
factorised forms of Kossaifi et al.: "Multi-Grid Tensorized Fourier Neural Operator", TMLR 2024, arXiv 2310.00120.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.spectral_conv import Precision, spectral_conv
from convatlas.weights import Layout

__all__ = ["Factorization", "FactorizedSpectrum", "SpectralConv", "real_parts"]

#: How a weight is made of smaller tensors.
Factorization = Literal["tucker", "cp", "tt"]
_FACTORIZATIONS = ("tucker", "cp", "tt")


def real_parts(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the complex weights of spectral convolutions as these hold them."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpectralConv)}
    result = {}
    for key, value in state.items():
        place, _, name = key.rpartition(".")
        if value.is_complex():
            whole = name == "weight" and place in layers
            value = _stored(value, layers[place].separable) if whole else torch.view_as_real(value)
        result[key] = value
    return result


def _stored(spectrum: Tensor, separable: bool) -> Tensor:
    """Complex (I, O, *modes) as real (*modes, I, 2 O), or (C, *modes) as (*modes, 2 C)."""
    channels = 1 if separable else 2
    ordered = spectrum.permute(*range(channels, spectrum.dim()), *range(channels))
    return torch.view_as_real(ordered.contiguous()).flatten(-2)


class SpectralConv(nn.Module):
    """y = F^-1(R F(x)) + b on the lowest frequencies of a field with one to three axes.

    Args:
        in_channels, out_channels: of the fields.
        n_modes: frequencies of each axis, positive and negative ones together; of the last axis n_modes // 2 + 1 are
            computed.
        bias: whether b is added.
        separable: each channel on its own, like a depthwise convolution.
        factorization: make R of smaller tensors: ``tucker``, ``cp`` or ``tt`` (tensor train).
        rank: of the factorisation: its parameters as a share of those of R, or the ranks themselves.
        max_modes: frequencies that are stored, at least ``n_modes``, which may then be raised during training.
        resolution_scaling: points of the result for each point of the input, on each axis or on all.
        align, precision: see `convatlas.ops.spectral_conv.spectral_conv`.
        device, dtype: of the parameters.

    Raises:
        ValueError: a number is out of range, or channels differ in a separable layer.
        UnknownName: there is no such factorisation.
    """

    #: Complex tensors in the authors' files, pairs of numbers here.
    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"(^|\.)weight\.tensor$", r"\1weight"),
                (r"(^|\.)weight\.(core|weights)$", r"\1factorized.\2"),
                (r"(^|\.)weight\.factors\.factor_(\d+)$", r"\1factorized.factors.\2"),
                (r"(^|\.)_metadata$", ""),
            ),
            function=real_parts,
        )
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: Sequence[int],
        bias: bool = True,
        *,
        separable: bool = False,
        factorization: Factorization | None = None,
        rank: float | Sequence[int] = 0.5,
        max_modes: Sequence[int] | None = None,
        resolution_scaling: float | Sequence[float] | None = None,
        align: bool = False,
        precision: Precision = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}")
        if separable and in_channels != out_channels:
            raise ValueError(f"a separable layer must keep its channels, got {in_channels} and {out_channels}")
        if not 1 <= len(n_modes) <= 3 or min(n_modes) < 1:
            raise ValueError(f"n_modes must hold one to three positive numbers, got {tuple(n_modes)}")
        most = tuple(max_modes or n_modes)
        if len(most) != len(n_modes) or any(m < n for m, n in zip(most, n_modes, strict=True)):
            raise ValueError(f"max_modes must be at least n_modes {tuple(n_modes)}, got {most}")
        if factorization not in (None, *_FACTORIZATIONS):
            raise unknown("factorization", str(factorization), _FACTORIZATIONS)
        if separable and factorization:
            raise ValueError(f"a separable layer has no factorisation, got {factorization}")
        self.in_channels, self.out_channels, self.separable, self.align = in_channels, out_channels, separable, align
        self.precision: Precision = precision
        self.n_modes, self.max_modes = tuple(n_modes), most
        self.resolution_scaling = _each(resolution_scaling, len(most))
        stored = (*most[:-1], most[-1] // 2 + 1)
        channels = (in_channels,) if separable else (in_channels, out_channels)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if factorization is not None:
            self.factorized = FactorizedSpectrum((*channels, *stored), factorization, rank, **place)
        else:
            # One matrix of real and imaginary parts after the other, as the products read them.
            self.weight = nn.Parameter(torch.empty(*stored, *channels[:-1], 2 * channels[-1], **place))
        shape = (out_channels, *[1] * len(most))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias anew: (complex) normal with variance 2 / (in_channels + out_channels)."""
        deviation = math.sqrt(2 / (self.in_channels + self.out_channels))
        if hasattr(self, "factorized"):
            self.factorized.reset_parameters(deviation)
        else:
            nn.init.normal_(self.weight, std=deviation / math.sqrt(2))
        if self.bias is not None:
            nn.init.normal_(self.bias, std=deviation)

    def as_spectrum(self, weight: Tensor) -> Tensor:
        """A stored weight, or its gradient, as parts (I, O, *modes, 2), or (C, *modes, 2) of a separable layer."""
        dims = len(self.n_modes)
        return weight.unflatten(-1, (-1, 2)).permute(*range(dims, weight.dim()), *range(dims), -1)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map (B, in_channels, *grid) to (B, out_channels, *output_size); by default the grid times the scaling.

        A grid that holds fewer frequencies than ``n_modes`` uses those that it holds, with a warning.

        Raises:
            ValueError: x has a wrong number of axes or channels.
        """
        dims = len(self.n_modes)
        if x.dim() != dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, {', '.join('DHW'[-dims:])}), got {tuple(x.shape)}")
        grid = tuple(x.shape[2:])
        if any(points < modes for points, modes in zip(grid, self.n_modes, strict=True)):
            text = f"n_modes {self.n_modes} are more than the grid {grid} holds; using what it holds"
            warnings.warn(text, stacklevel=2)
        if output_size is None and self.resolution_scaling is not None:
            output_size = [round(n * factor) for n, factor in zip(grid, self.resolution_scaling, strict=True)]
        modes = (*self.n_modes[:-1], self.n_modes[-1] // 2 + 1)
        weight = self.factorized() if hasattr(self, "factorized") else self.as_spectrum(self.weight)
        y = spectral_conv(x, weight, output_size, modes, self.align, self.precision)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the channels and frequencies."""
        return f"{self.in_channels}, {self.out_channels}, n_modes={self.n_modes}, separable={self.separable}"


def _each(scaling: float | Sequence[float] | None, dims: int) -> tuple[float, ...] | None:
    if scaling is None:
        return None
    each = (float(scaling),) * dims if isinstance(scaling, int | float) else tuple(scaling)
    if len(each) != dims or min(each) <= 0:
        raise ValueError(f"resolution_scaling must be one positive number or {dims}, got {scaling}")
    return each


class FactorizedSpectrum(nn.Module):
    """A complex tensor made of smaller ones.

    Args:
        shape: of the tensor.
        factorization: ``tucker`` (a core with a matrix on each axis), ``cp`` (a sum of outer products) or ``tt`` (a
            train of cores).
        rank: parameters as a share of those of the whole tensor, or the ranks: one for each axis of ``tucker``, one of
            ``cp``, one between each two axes of ``tt``.
        device, dtype: of the parameters.

    Raises:
        ValueError: there are not as many ranks as needed, or one is smaller than 1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        factorization: Factorization,
        rank: float | Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.factorization, self.shape = factorization, tuple(shape)
        self.ranks = ranks = _ranks(self.shape, factorization, rank)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*sizes, 2, device=device, dtype=dtype))

        if factorization == "tucker":
            self.core = parameter(*ranks)
            sizes = list(zip(self.shape, ranks, strict=True))
        elif factorization == "cp":
            self.weights = parameter(*ranks)
            sizes = [(length, ranks[0]) for length in self.shape]
        else:
            ends = (1, *ranks, 1)
            sizes = list(zip(ends[:-1], self.shape, ends[1:], strict=True))  # type: ignore[arg-type]
        self.factors = nn.ParameterList([parameter(*each) for each in sizes])

    def reset_parameters(self, deviation: float) -> None:
        """Draw all factors such that the whole tensor has entries of this standard deviation."""
        order = len(self.shape)
        terms = math.prod(self.ranks)
        parts = order + (self.factorization == "tucker")
        each = (deviation / math.sqrt(terms)) ** (1 / parts)
        for factor in self.factors:
            nn.init.normal_(factor, std=each / math.sqrt(2))
        if self.factorization == "tucker":
            nn.init.normal_(self.core, std=each / math.sqrt(2))
        elif self.factorization == "cp":
            with torch.no_grad():
                self.weights.copy_(torch.tensor([1.0, 0.0]))

    def forward(self) -> Tensor:
        """Real and imaginary part of the whole tensor, (*shape, 2)."""
        factors = [torch.view_as_complex(factor.to(_exact(factor))) for factor in self.factors]
        if self.factorization == "tt":
            whole = factors[0]
            for factor in factors[1:]:
                whole = torch.tensordot(whole, factor, dims=1)
            return torch.view_as_real(whole.reshape(self.shape))
        if self.factorization == "tucker":
            whole = torch.view_as_complex(self.core.to(_exact(self.core)))
            for factor in factors:  # the axis in front goes to the end
                whole = torch.tensordot(whole, factor, dims=([0], [1]))
            return torch.view_as_real(whole)
        whole = torch.view_as_complex(self.weights.to(_exact(self.weights)))
        for factor in factors[:-1]:
            whole = whole.unsqueeze(-2) * factor
        return torch.view_as_real(whole @ factors[-1].t())


def _exact(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _ranks(shape: tuple[int, ...], factorization: str, rank: float | Sequence[int]) -> tuple[int, ...]:
    needed = {"tucker": len(shape), "cp": 1, "tt": len(shape) - 1}[factorization]
    if not isinstance(rank, int | float):
        ranks = tuple(rank)
        if len(ranks) != needed or min(ranks) < 1:
            raise ValueError(f"rank must hold {needed} positive numbers for {factorization}, got {ranks}")
        return ranks
    if not rank > 0:
        raise ValueError(f"rank must be positive, got {rank}")
    wanted = rank * math.prod(shape)
    if factorization == "cp":
        return (max(1, round(wanted / sum(shape))),)

    def size(share: float) -> float:
        if factorization == "tucker":
            return math.prod(share * n for n in shape) + sum(share * n * n for n in shape)
        ends = (1.0, *[share] * needed, 1.0)
        return sum(a * n * b for a, n, b in zip(ends[:-1], shape, ends[1:], strict=True))

    low, high = 0.0, 2.0 if factorization == "tucker" else float(max(wanted, 1))
    for _ in range(100):  # by halves: the number of parameters grows with the share
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    if factorization == "tucker":
        return tuple(min(n, max(1, round(low * n))) for n in shape)
    return (max(1, round(low)),) * needed
