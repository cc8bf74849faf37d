"""Feature extractors from any frames, Lipschitz non-linearities and pooling: the general form of scattering.

Wiatowski, Boelcskei: "A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction", IEEE Trans.
Information Theory 2018, arXiv 1512.06293; in discrete time Wiatowski, Tschannen, Stanic, Grohs, Boelcskei: "Discrete
Deep Feature Extraction: A Theory and New Architectures", ICML 2016, arXiv 1605.08283. Signals are periodic.

Layer n maps a signal f to U_n[l] f = P_n(M_n(f * g_l)) for every atom l of its frame, subsampled by S_n. Along a path
q = (l_1, ..., l_n) these follow each other, and the features of layer n are U[q] f * chi_n for all paths of length n,
with chi_n the output-generating atom of frame n + 1. If max(B_n, B_n L_n^2 R_n^2) <= 1 in every layer, the features are
no further apart than the signals are, whatever the frames are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.frames import Frame

__all__ = [
    "NONLINEARITIES",
    "FrameMaker",
    "Nonlinearity",
    "Pooling",
    "ScatteringLayer",
    "ScatteringNetwork",
    "make_admissible",
]

#: Makes a frame on a grid: ``functools.partial(meyer, J=3)``.
FrameMaker = Callable[[tuple[int, ...]], Frame]
Pooling = Literal["none", "subsample", "average", "max"]


@dataclass(frozen=True)
class Nonlinearity:
    """A pointwise function M with M(0) = 0.

    Attributes:
        function: of a real or complex tensor.
        lipschitz: the smallest constant L with ||M f - M h|| <= L ||f - h||.
        paper: the constant in the paper's table, which is safe and may be larger.
    """

    function: Callable[[Tensor], Tensor]
    lipschitz: float
    paper: float


def _by_parts(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Real and imaginary part one by one."""

    def apply(x: Tensor) -> Tensor:
        return torch.view_as_complex(function(torch.view_as_real(x))) if x.is_complex() else function(x)

    return apply


#: The non-linearities of the paper, by name.
NONLINEARITIES: dict[str, Nonlinearity] = {
    "modulus": Nonlinearity(torch.abs, 1.0, 1.0),
    "relu": Nonlinearity(_by_parts(torch.relu), 1.0, 2.0),
    "tanh": Nonlinearity(_by_parts(torch.tanh), 1.0, 2.0),
    "sigmoid": Nonlinearity(_by_parts(lambda x: torch.sigmoid(x) - 0.5), 0.25, 0.5),
}


@dataclass(frozen=True)
class ScatteringLayer:
    """One layer (Psi_n, M_n, P_n) of the module sequence.

    Attributes:
        frame: makes the frame on the grid that reaches the layer.
        nonlinearity: a name of `NONLINEARITIES`, or one of your own.
        pooling: ``none``, ``subsample``, ``average`` (mean of blocks) or ``max`` (of blocks, for real maps).
        factor: S, side of the blocks; it divides the grid.

    Raises:
        ValueError: factor is smaller than 1, or not 1 without pooling.
        UnknownName: there is no such non-linearity or pooling.
    """

    frame: FrameMaker
    nonlinearity: str | Nonlinearity = "modulus"
    pooling: Pooling = "none"
    factor: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.nonlinearity, str) and self.nonlinearity not in NONLINEARITIES:
            raise unknown("nonlinearity", self.nonlinearity, NONLINEARITIES)
        if self.pooling not in ("none", "subsample", "average", "max"):
            raise unknown("pooling", self.pooling, ("none", "subsample", "average", "max"))
        if self.factor < 1 or (self.pooling == "none" and self.factor > 1):
            raise ValueError(f"factor must be at least 1, and 1 with pooling 'none', got {self.factor}")

    @property
    def function(self) -> Nonlinearity:
        """The non-linearity."""
        return NONLINEARITIES[self.nonlinearity] if isinstance(self.nonlinearity, str) else self.nonlinearity


class ScatteringNetwork(nn.Module):
    """A feature extractor of D layers, and a frame whose output-generating atom gives the features of the last one.

    Args:
        layers: its layers.
        output_frame: makes the last frame.
        shape: length of the signals, or size of the images.
        dilation_norm: multiply by S^(d/2) after pooling, as in continuous time; the pooled maps of the discrete theory
            are not multiplied.

    Raises:
        ValueError: there is no layer, or a factor does not divide the grid that reaches it.
    """

    def __init__(
        self,
        layers: Sequence[ScatteringLayer],
        output_frame: FrameMaker,
        shape: int | Sequence[int],
        *,
        dilation_norm: bool = False,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must hold at least one layer")
        self.layers = tuple(layers)
        self.dilation_norm = dilation_norm
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        grid, frames = self.shape, []
        for number, layer in enumerate(self.layers, start=1):
            frames.append(layer.frame(grid))
            if any(size % layer.factor for size in grid):
                raise ValueError(f"factor of layer {number} must divide the grid {grid}, got {layer.factor}")
            grid = tuple(size // layer.factor for size in grid)
        frames.append(output_frame(grid))
        self.frames = tuple(frames)
        self._real = tuple(frame.is_real for frame in frames)
        for number, frame in enumerate(frames):
            self.register_buffer(f"atom{number}", frame.atom, persistent=False)
            self.register_buffer(f"filters{number}", frame.filters, persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of signals (..., *shape), real or complex: of layer n (..., paths, *grid), complex, n = 0 to D.

        Paths are in lexicographic order of (l_1, ..., l_n). Half precision is transformed in float32.

        Raises:
            ValueError: x has another size or no signal, or max pooling meets complex maps.
        """
        features, _ = self._layers(x)
        return features

    def propagated(self, x: Tensor) -> list[Tensor]:
        """U[q] x for all paths: of layer n (..., paths, *grid), n = 0 to D; what the features of a layer are made of.

        Raises:
            ValueError: as `forward`.
        """
        _, maps = self._layers(x)
        return maps

    def _layers(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features and maps of every layer."""
        dims = len(self.shape)
        if x.dim() < dims or tuple(x.shape[x.dim() - dims :]) != self.shape:
            raise ValueError(f"x must be (..., {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if not x.numel():
            raise ValueError(f"x must hold at least one signal, got {tuple(x.shape)}")
        axes = tuple(range(-dims, 0))
        u = x if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.float32))
        u = u.unsqueeze(-1 - dims)
        features, maps = [], []
        for number, layer in enumerate((*self.layers, None)):
            maps.append(u)
            spectrum = torch.fft.fftn(u, dim=axes)
            features.append(torch.fft.ifftn(spectrum * self._filters("atom", number, spectrum), dim=axes))
            if layer is None:
                break
            filters = self._filters("filters", number, spectrum)
            y = torch.fft.ifftn(spectrum.unsqueeze(-1 - dims) * filters, dim=axes)
            if self._real[number] and not u.is_complex():
                y = y.real
            u = self._pooled(layer.function.function(y), layer, number, dims).flatten(-2 - dims, -1 - dims)
        return features, maps

    def _filters(self, name: str, number: int, like: Tensor) -> Tensor:
        """An atom or the filters of a frame where the signal is, rounded only to its own precision."""
        tensor: Tensor = getattr(self, f"{name}{number}")
        if tensor.dtype not in (torch.float64, torch.complex128):
            tensor = getattr(self.frames[number], name)
        return tensor.to(like.device, like.dtype if tensor.is_complex() else like.real.dtype)

    def _pooled(self, u: Tensor, layer: ScatteringLayer, number: int, dims: int) -> Tensor:
        step = layer.factor
        if layer.pooling == "max" and u.is_complex():
            raise ValueError(
                f"max pooling needs a real non-linearity such as modulus, got complex maps in layer {number + 1}"
            )
        if layer.pooling == "subsample":
            every: list[Any] = [..., *[slice(None, None, step)] * dims]
            u = u[tuple(every)]
        elif layer.pooling in ("average", "max"):
            for axis in range(-dims, 0):
                blocks = u.unflatten(axis, (u.shape[axis] // step, step))
                u = blocks.mean(axis) if layer.pooling == "average" else blocks.amax(axis)
        return u * step ** (dims / 2) if self.dilation_norm and step > 1 else u

    def norm(self, features: Sequence[Tensor]) -> Tensor:
        """|||Phi(f)|||: the root of the summed squares of all features, (...)."""
        dims = len(self.shape)
        return torch.stack([_energy(part, dims + 1) for part in features]).sum(0).sqrt()

    def paths(self, depth: int) -> list[tuple[int, ...]]:
        """The paths of one layer, 0 to D, in the order of its features."""
        found: list[tuple[int, ...]] = [()]
        for frame in self.frames[:depth]:
            found = [(*path, index) for path in found for index in range(len(frame.filters))]
        return found

    def extra_repr(self) -> str:
        """Show size, non-linearities and pooling."""
        steps = [f"{layer.nonlinearity} {layer.pooling} {layer.factor}" for layer in self.layers]
        return f"shape={self.shape}, layers={steps}"


def make_admissible(
    layers: Sequence[ScatteringLayer], output_frame: FrameMaker, *, lipschitz: Literal["tight", "paper"] = "tight"
) -> tuple[list[ScatteringLayer], FrameMaker]:
    """The same layers, admissible: where C = max(B, B L^2 R^2) is above 1, the atoms are multiplied by C^(-1/2).

    Args:
        layers: of a network.
        output_frame: its last frame.
        lipschitz: which constants of the non-linearities to take.
    """

    def scaled(maker: FrameMaker, factor: float) -> FrameMaker:
        def make(grid: tuple[int, ...]) -> Frame:
            frame = maker(grid)
            c = frame.bounds()[1] * max(1.0, factor)
            return frame.scaled(c) if c > 1 else frame

        return make

    changed = []
    for layer in layers:
        constant = layer.function.lipschitz if lipschitz == "tight" else layer.function.paper
        changed.append(dataclasses.replace(layer, frame=scaled(layer.frame, constant**2)))
    return changed, scaled(output_frame, 1.0)


def _energy(x: Tensor, dims: int) -> Tensor:
    return x.abs().square().sum(tuple(range(-dims, 0)))
