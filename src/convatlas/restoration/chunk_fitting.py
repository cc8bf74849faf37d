"""Fitting one network to patches of a video: what STDO does for each chunk, and JSTDO once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric, MetricCollection

from convatlas.errors import Unsupported
from convatlas.networks.base import Upscaler
from convatlas.networks.registry import model_config
from convatlas.report import Lines, Note, Report, Section
from convatlas.restoration.video_chunks import JointSampling, PatchGrid, patch_errors, patch_psnr
from convatlas.training.measure import count_parameters, provenance
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import save_weights

__all__ = ["ChunkFit", "FramePairs", "PatchPSNR", "PatchPairs", "without_halo"]

Array = npt.NDArray[Any]

#: Patches, evenly spread, that the best epoch is chosen by: the ones that are fitted, for a fit is what is wanted.
_CHECKED = 1024


def without_halo(x: Tensor, border: int) -> Tensor:
    """(..., H, W) without so many pixels along every border."""
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


@dataclass(eq=False)
class FramePairs:
    """Frames of low and high resolution, and their patches by number: frame by frame, row by row.

    Attributes:
        grid: of the patches.
        scale: of high over low resolution.
        halo: pixels of low resolution that a patch sees of its neighbours; zeros beyond the frame.
        low: (H, W, 3) uint8 each, divided by the grid.
        high: (scale H, scale W, 3) uint8 each.
    """

    grid: PatchGrid
    scale: int
    halo: int = 0
    low: list[Array] = field(default_factory=list)
    high: list[Array] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.low) * len(self.grid)

    def patch(self, number: int) -> dict[str, Tensor]:
        """``{"low": (3, h + 2 halo, w + 2 halo), "high": (3, scale h, scale w)}`` in [0, 1]."""
        frame, place = divmod(number, len(self.grid))
        row, column = divmod(place, self.grid.columns)
        low, high = self.low[frame], self.high[frame]
        height, width = self.grid.patch_size(*low.shape[:2])
        y, x, s = row * height, column * width, self.scale
        around = self.halo
        top, left = max(0, y - around), max(0, x - around)
        given = low[top : y + height + around, left : x + width + around]
        patch = np.zeros((height + 2 * around, width + 2 * around, 3), np.uint8)
        dy, dx = top - (y - around), left - (x - around)
        patch[dy : dy + given.shape[0], dx : dx + given.shape[1]] = given
        truth = high[s * y : s * (y + height), s * x : s * (x + width)]
        return {name: _as_tensor(pixels) for name, pixels in (("low", patch), ("high", truth))}


def _as_tensor(pixels: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


@dataclass(eq=False)
class PatchPairs(Dataset[dict[str, Tensor]]):
    """Some patches of frames, indexed by position or by (position, seed).

    Attributes:
        pairs: the frames.
        numbers: of the patches.
        sampling: which of them an epoch visits; all of them, each once, when left out.
    """

    pairs: FramePairs
    numbers: Sequence[int] | npt.NDArray[np.int64]
    sampling: JointSampling | None = None

    def __len__(self) -> int:
        return len(self.numbers) if self.sampling is None else len(self.sampling)

    @property
    def order(self) -> Any:
        """The method of the sampling that tells the positions of an epoch, or None."""
        return None if self.sampling is None else self.sampling.order

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        position = key[0] if isinstance(key, tuple | list) else key
        return self.pairs.patch(int(self.numbers[position]))


class PatchPSNR(Metric):
    """PSNR in dB of the mean of the patches' mean squared errors, after rounding to 8 bits; patches are (B, 3, h, w).

    Args:
        shave: pixels left out along the border of each patch.
    """

    total: Tensor
    count: Tensor

    def __init__(self, shave: int) -> None:
        super().__init__()
        self.shave = shave
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add patches."""
        errors = patch_errors(preds.float(), target, PatchGrid(1, 1), shave=self.shave)
        self.total += errors.sum()
        self.count += len(errors)

    def compute(self) -> Tensor:
        """The PSNR of all patches so far, at most 100 dB."""
        return patch_psnr(self.total / self.count).clamp(max=100).float()


@dataclass(kw_only=True, eq=False)
class ChunkFit(GradientTask):
    """One network that is fitted to patches of a video by the mean absolute error.

    The patches and the weights to begin with are given by `begin` before `fit`.

    Attributes:
        label: which of the fits of a delivery it is.
        model: name of the network.
        options: fields of the network's config.
        shave: pixels left out along the border of a large patch where the best epoch is chosen.
    """

    name: ClassVar[str] = "video-delivery"
    verbs: ClassVar[tuple[str, ...]] = ("train",)
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_psnr", "max")

    label: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    shave: int = 0

    network: Upscaler = field(init=False, repr=False)

    def begin(self, patches: PatchPairs, start: Mapping[str, Tensor] | None) -> None:
        """Give the patches, and the state dict of a network to start from or None for random weights."""
        self._patches, self._start = patches, start

    def prepare(self) -> None:
        """Build the network and set the patches out."""
        config: Any = model_config(self.model, **self.options)
        self.network = config.build()
        if self._start is not None:
            self.network.load_state_dict(dict(self._start))
        numbers = np.asarray(self._patches.numbers)
        step = max(1, -(-len(numbers) // _CHECKED))
        self.train_set: PatchPairs = self._patches
        self.val_set: PatchPairs = PatchPairs(self._patches.pairs, numbers[::step])

    def _enlarged(self, low: Tensor) -> Tensor:
        return without_halo(self.network(low), self.network.scale * self._patches.pairs.halo)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean absolute error of the enlarged patches."""
        return {"loss": F.l1_loss(self._enlarged(batch["low"]).float(), batch["high"])}

    def metrics(self) -> nn.Module:
        """PSNR of the fitted patches."""
        return MetricCollection({"val_psnr": PatchPSNR(self.shave)})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metric with patches."""
        metrics.update(self._enlarged(batch["low"]), batch["high"])

    def report(self, run: Run) -> Report:
        """Curves of a finished fit."""
        rows = run.read_metrics()
        epochs = [row["epoch"] for row in rows]
        best = max(rows, key=lambda row: (row["val_psnr"], row["epoch"]))
        curves = [
            Lines("PSNR of the fitted patches", "epoch", "dB", {self.label: (epochs, [r["val_psnr"] for r in rows])}),
            Lines("Loss", "epoch", "mean absolute error", {self.label: (epochs, [r["train_loss"] for r in rows])}),
        ]
        visits = f"{len(self.train_set):,} visits of {len(self.train_set.numbers):,} patches an epoch."
        size = f"{self.model} with {count_parameters(self.network):,} parameters."
        summary = f"{self.label}: {best['val_psnr']:.2f} dB at epoch {best['epoch']:.0f} of {len(rows)}."
        return Report(
            f"Fit of {self.label}", summary, [Section("Fit", [*curves, Note(f"{size} {visits}")])], provenance()
        )

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Refuse: a delivery is measured as a whole.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("one fit of a delivery is not measured by itself: evaluate the whole run")

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Refuse: a delivery is played as a whole.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("one fit of a delivery does not play by itself: predict with the whole run")

    def save(self, path: str | Path) -> Path:
        """Write the weights with the network's name and config, so that other verbs can use them."""
        return save_weights(self.network, path)
