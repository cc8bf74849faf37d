"""Masked (sparse) computation of any convolutional network: what a mask hides stays zero from layer to layer.

Tian, Jiang, Diao, Lin, Wang, Yuan: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", ICLR 2023, arXiv 2301.03580, section 3.1. Submanifold sparse convolution (Graham, van der Maaten, arXiv
1706.01307) is simulated by dense layers: after each of them the hidden positions are set back to zero, and statistics
are taken over the visible positions alone. Nothing of a hidden part reaches a visible one, and the mask keeps its
pattern through all layers ("mask pattern vanishing", paper, figure 2).

The layers of a network are not replaced: `masked` hooks into them and leaves them as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd
from torch.overrides import TorchFunctionMode

from convatlas.errors import Unsupported

__all__ = ["ActiveMap", "leaking_layers", "masked"]

#: Activations that turn zero into something else.
_LIFTING = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
_MEANS = (torch.mean, Tensor.mean, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


class ActiveMap:
    """Which parts of images are visible, at every resolution that divides into the cells of the mask.

    Masks and indices are made once for each resolution.

    Args:
        cells: bool (B, 1, f, ...), one axis of cells for each position axis; True is visible.

    Raises:
        ValueError: cells is not of that form, or hides a whole image.
    """

    def __init__(self, cells: Tensor) -> None:
        if cells.dim() < 3 or cells.shape[1] != 1 or cells.dtype != torch.bool:
            raise ValueError(f"cells must be bool (B, 1, f, ...), got {cells.dtype} {tuple(cells.shape)}")
        if not bool(cells.flatten(1).any(1).all()):
            raise ValueError("cells must show a part of each image, but one is hidden whole")
        self.cells = cells
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._typed: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        counts = cells.flatten(1).sum(1)
        self._even = bool((counts == counts[0]).all())

    @property
    def dims(self) -> int:
        """Number of position axes."""
        return self.cells.dim() - 2

    def at(self, size: tuple[int, ...]) -> Tensor:
        """The mask (B, 1, *size) of maps of that size.

        Raises:
            ValueError: the size is no multiple of the cells.
        """
        if size not in self._masks:
            grid = tuple(self.cells.shape[2:])
            if len(size) != len(grid) or any(side % cells for side, cells in zip(size, grid, strict=True)):
                raise ValueError(
                    f"maps of a masked network must be multiples of the {grid} cells of the mask, got {size}"
                )
            mask = self.cells
            for axis, (side, cells) in enumerate(zip(size, grid, strict=True), 2):
                mask = mask.repeat_interleave(side // cells, axis)
            self._masks[size] = mask
        return self._masks[size]

    def mask(self, x: Tensor, channel_axis: int = 1) -> Tensor:
        """Set the hidden positions of maps (B, C, ...), or with the channels last, to zero."""
        size = tuple(x.shape[2:] if channel_axis == 1 else x.shape[1:-1])
        key = size, x.dtype
        if key not in self._typed:
            self._typed[key] = self.at(size).to(x.dtype)
        mask = self._typed[key]
        return x * (mask if channel_axis == 1 else mask.movedim(1, -1))

    def gather(self, x: Tensor, *, each: bool = False) -> Tensor:
        """The visible positions of maps (B, C, ...), as (B, C, n, 1, ...), or (1, C, N, 1, ...) if images differ in n.

        Args:
            x: the maps.
            each: never put the positions of several images on one axis.

        Raises:
            ValueError: ``each`` is asked for and the images show different numbers of cells.
        """
        size = tuple(x.shape[2:])
        if not self._even:
            if each:
                raise ValueError("cells must show equally much of each image for norms that see one image at a time")
            rows = x.movedim(1, -1)[self.at(size)[:, 0]]
            return rows.T[None].unflatten(2, (-1, *[1] * (self.dims - 1)))
        chosen = x.flatten(2).gather(2, self._index(size).expand(-1, x.shape[1], -1))
        return chosen.unflatten(2, (-1, *[1] * (self.dims - 1)))

    def scatter(self, visible: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put what `gather` took back into maps (B, C, *size) of zeros."""
        channels, batch = visible.shape[1], len(self.cells)
        if not self._even:
            maps = visible.new_zeros(batch, *size, channels)
            maps[self.at(size)[:, 0]] = visible.flatten(2)[0].T
            return maps.movedim(-1, 1)
        zeros = visible.new_zeros(batch, channels, math.prod(size))
        filled = zeros.scatter(2, self._index(size).expand(-1, channels, -1), visible.flatten(2))
        return filled.unflatten(2, size)

    def rows(self, size: tuple[int, ...]) -> Tensor:
        """Numbers of the visible positions among those of all images, one image after the other."""
        if size not in self._rows:
            self._rows[size] = self.at(size).flatten().nonzero()[:, 0]
        return self._rows[size]

    def share(self) -> Tensor:
        """Visible positions over all positions, of each image (B)."""
        return self.cells.flatten(1).float().mean(1)

    def _index(self, size: tuple[int, ...]) -> Tensor:
        if size not in self._indices:
            mask = self.at(size).flatten(1)
            self._indices[size] = mask.nonzero()[:, 1].reshape(len(mask), 1, -1)
        return self._indices[size]


@contextmanager
def masked(cells: Tensor | ActiveMap, *models: nn.Module) -> Iterator[ActiveMap]:
    """Within the context, the layers of the models compute on visible positions only.

    - Convolutions, layer norms, poolings and every other module with parameters of its own: computed as ever, then set
      to zero at the hidden positions. Max-pooling sees zeros there, as the authors' does.
    - Linear layers: computed at the visible positions alone, which saves time.
    - Batch norm in training, group and instance norm: statistics of the visible positions alone.
    - Means over all positions, as of squeeze-and-excitation: means over the visible ones (advice of the authors, whose
      code does not have it).
    - Activations and sums need nothing.

    Names, weights and hooks of the models are as before when it ends. The input must be masked as well; a backward pass
    may come later, unless activations are recomputed in it.

    Args:
        cells: bool (B, 1, f, ...), True is visible; or the map made of it.
        models: the networks. Their maps must be multiples of the cells.

    Raises:
        ValueError: the cells are not a mask; while computing: maps are no multiples of the cells.
    """
    active = cells if isinstance(cells, ActiveMap) else ActiveMap(cells)
    with ExitStack() as handles:
        for module in {part for model in models for part in model.modules()}:
            visible: _VisibleOnly | None = None
            if isinstance(module, _BatchNorm | nn.GroupNorm | _InstanceNorm):
                visible = _VisibleOnly(active, each=not isinstance(module, _BatchNorm))
            elif type(module) is nn.Linear:
                visible = _VisibleRows(active)
            if visible is not None:
                handles.callback(module.register_forward_pre_hook(visible.before).remove)
                handles.callback(module.register_forward_hook(visible.after).remove)
            elif _needs_mask(module):
                handles.callback(module.register_forward_hook(_zeroing(active)).remove)
        handles.enter_context(_VisibleMeans(active))
        yield active


def _needs_mask(module: nn.Module) -> bool:
    plain = isinstance(module, (_ConvNd, nn.Linear, _MaxPoolNd, _AvgPoolNd, *_LIFTING))
    return plain or any(True for _ in module.parameters(recurse=False))


def _zeroing(active: ActiveMap) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.dim() == active.dims + 2 and output.is_floating_point()):
            return output
        axis = _channel_axis(module, output)
        size = output.shape[2:] if axis == 1 else output.shape[1:-1]
        if all(side == 1 for side in size):  # a pooled vector
            return output
        return active.mask(output, axis)

    return hook


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    """1 or -1. Norms and scales of other libraries tell it by the number of their parameters."""
    if isinstance(module, _ConvNd | _MaxPoolNd | _AvgPoolNd):
        return 1
    if isinstance(module, nn.Linear) or type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return -1
    counts = {parameter.numel() for parameter in module.parameters(recurse=False)}
    return -1 if output.shape[-1] in counts and output.shape[1] not in counts else 1


class _VisibleOnly:
    """Gives a norm the visible positions and puts its output back."""

    def __init__(self, active: ActiveMap, *, each: bool = False) -> None:
        self.active, self.each = active, each
        self.size: tuple[int, ...] | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        size = tuple(x.shape[2:])
        fixed = isinstance(module, _BatchNorm) and not module.training and module.running_mean is not None
        self.size = None if fixed or len(size) != self.active.dims or max(size) == 1 else size
        return args if self.size is None else (self.active.gather(x, each=self.each), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.size is not None:
            return self.active.scatter(output, self.size)
        if output.dim() == self.active.dims + 2 and max(output.shape[2:]) > 1:
            return self.active.mask(output)
        return output


class _VisibleRows(_VisibleOnly):
    """The same for a linear layer, whose channels are last."""

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        size = tuple(x.shape[1:-1])
        self.size = None if len(size) != self.active.dims or max(size) == 1 else size
        return args if self.size is None else (x.flatten(0, -2)[self.active.rows(self.size)],)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.size is None:
            return output
        batch = len(self.active.cells)
        zeros = output.new_zeros(batch * math.prod(self.size), output.shape[-1])
        return zeros.index_copy(0, self.active.rows(self.size), output).unflatten(0, (batch, *self.size))


class _VisibleMeans(TorchFunctionMode):
    """Turns means over all positions of a map into means over its visible ones, whoever takes them."""

    def __init__(self, active: ActiveMap) -> None:
        super().__init__()
        self.active = active

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _MEANS or not args or not isinstance(args[0], Tensor):
            return result
        x, active = args[0], self.active
        if x.dim() != active.dims + 2 or len(x) != len(active.cells) or max(x.shape[2:]) == 1:
            return result
        if func in (torch.mean, Tensor.mean):
            axes = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            axes = (axes,) if isinstance(axes, int) else axes
            if axes is None or {axis % x.dim() for axis in axes} != set(range(2, x.dim())):
                return result
        elif max(result.shape[2:]) > 1:
            return result
        share = active.share().to(result.dtype)
        return result / share.reshape(-1, *[1] * (result.dim() - 1))


@torch.no_grad()
def leaking_layers(model: nn.Module, cells: Tensor, run: Callable[[], Any]) -> tuple[str, ...]:
    """Names of the convolutions that read something from hidden positions although the network is `masked`.

    They stand behind an operation that fills hidden positions and is no layer, such as adding a position embedding.

    Args:
        model: the network.
        cells: of the mask, bool (B, 1, f, ...).
        run: calls the network on a masked batch.

    Raises:
        Unsupported: a layer convolves other axes than the mask has.
    """
    active, found = ActiveMap(cells), []

    def reading(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if x.dim() != active.dims + 2:
                raise Unsupported(
                    f"{name} is a {type(module).__name__}, which a mask of {active.dims} axes cannot mask"
                )
            if max(x.shape[2:]) > 1 and not torch.equal(active.mask(x), x):
                found.append(name)

        return hook

    with ExitStack() as handles, masked(active, model):
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd):
                handles.callback(module.register_forward_pre_hook(reading(name), prepend=True).remove)
        run()
    return tuple(dict.fromkeys(found))
