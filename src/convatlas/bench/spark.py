"""Training steps of masked encoders beside dense ones, and beside masks that every layer makes anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, report
from convatlas.networks.registry import create_model
from convatlas.nn.drop import DropPath
from convatlas.nn.masked import ActiveMap, masked
from convatlas.report import Report
from convatlas.training.spark import SparK, feature_maps

__all__ = ["run"]

STEP, MASKS = "masked step beside a dense step", "masked step beside one whose layers make their masks anew"

# The smallest ratios that count, fixed before anything was measured. Linear layers compute at the visible 40 % alone;
# convolutions do all that dense ones do and are set to zero then. Sparse kernels for all could be 2.5 times as fast.
BARS = [
    Bar(
        statement="A masked step of an encoder takes at most 25 % more time than a dense one",
        published="the authors simulate sparse convolution by dense layers, without a figure for the cost",
        theirs="dense",
        at_least=1 / 1.25,
        what=STEP,
    ),
    Bar(
        statement="Masks and indices that are made once for a step save time",
        published="the authors' code makes them in every layer",
        theirs="anew",
        at_least=1.0,
        what=MASKS,
    ),
]

MODELS, RATIO = ("resnet50", "convnext_tiny"), 0.6
BATCH, SIDES = 4, (224, 128)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of training steps at 60 % masking.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the smaller images only.
    """
    cases = []
    for side in SIDES[1:] if quick else SIDES:
        label = f"{BATCH} x 3 x {side} x {side}"
        for model in MODELS:
            cases.append(Case(f"{model}, {label}", STEP, partial(_against_dense, model, side)))
            cases.append(Case(f"{model}, {label}", MASKS, partial(_against_anew, model, side), tolerance=1e-3))
    note = (
        "A step is forward through all stages of the encoder, the mean square of its maps, and backward, in training "
        "mode. Dense and masked steps compute different maps, so only the shapes of these are checked there."
    )
    return report("spark", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


class _Anew(ActiveMap):
    """Makes masks and indices anew for every layer and takes positions by boolean masks, as the authors' code does."""

    def __init__(self, cells: Tensor) -> None:
        super().__init__(cells)
        self._even = False

    def at(self, size: tuple[int, ...]) -> Tensor:
        """The mask, made anew."""
        self._masks.clear()
        self._typed.clear()
        return super().at(size)

    def rows(self, size: tuple[int, ...]) -> Tensor:
        """The numbers, made anew."""
        self._rows.clear()
        return super().rows(size)

    def mask(self, x: Tensor, channel_axis: int = 1) -> Tensor:
        """Masked with a mask made anew."""
        self._typed.clear()
        return super().mask(x, channel_axis)


def _given(name: str, side: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    model = create_model(name, num_classes=0).to(device).train()
    cells = SparK(RATIO).mask(BATCH, (side // 32, side // 32), device=device)
    return model, torch.randn(BATCH, 3, side, side, device=device), cells


def _step(model: nn.Module, images: Tensor, active: Callable[[], ActiveMap] | None) -> list[Tensor]:
    model.zero_grad()
    if active is None:
        maps = feature_maps(model, images)
    else:
        with masked(active(), model) as mask:
            maps = feature_maps(model, mask.mask(images))
    torch.stack([each.square().mean() for each in maps]).sum().backward()
    return [each.detach() for each in maps]


def _against_dense(name: str, side: int, device: torch.device) -> dict[str, Call]:
    model, images, cells = _given(name, side, device)

    def shapes(active: Callable[[], ActiveMap] | None) -> Tensor:
        return torch.tensor([each.shape for each in _step(model, images, active)], dtype=torch.float32)

    return {"masked": lambda: shapes(lambda: ActiveMap(cells)), "dense": lambda: shapes(None)}


def _against_anew(name: str, side: int, device: torch.device) -> dict[str, Call]:
    model, images, cells = _given(name, side, device)
    for part in model.modules():  # random, and not the same for both sides
        if isinstance(part, DropPath):
            part.rate = 0.0
    other = copy.deepcopy(model)
    return {
        "masked": lambda: _step(model, images, lambda: ActiveMap(cells)),
        "anew": lambda: _step(other, images, lambda: _Anew(cells)),
    }
