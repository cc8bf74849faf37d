"""A task that trains in a tenth of a second: a small network without normalisation on made-up points."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection

from convatlas.report import Note, Report, Section
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import save_weights


class Net(nn.Sequential):
    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        middle = [nn.BatchNorm1d(8) if norm else nn.GELU(), nn.Dropout(dropout)]
        super().__init__(nn.Linear(4, 8), *middle, nn.Linear(8, 3))

    def layers(self) -> list[nn.Module]:
        return [self[0], self[3]]


class Points(Dataset[dict[str, Any]]):
    """Point i; read by (i, seed) it is moved a little by that seed."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 4, generator=generator)
        self.y = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(key, int):
            return {"x": self.x[key], "y": self.y[key]}
        index, seed = key
        noise = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return {"x": self.x[index] + 0.1 * noise, "y": self.y[index]}


@dataclass(kw_only=True, eq=False)
class Toy(GradientTask):
    """Name the largest of three numbers.

    Attributes:
        samples: how many to learn from.
        dropout: rate.
        norm: batch normalisation in place of the non-linearity.
        spare: one layer more, which nothing uses.
        explode_at: batch whose loss is no number.
        stop_at: batch in which a signal comes.
        signal: that signal.
    """

    name: ClassVar[str] = "toy"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_loss", "min")

    samples: int = 41
    dropout: float = 0.0
    norm: bool = False
    spare: bool = False
    explode_at: int | None = field(init=False, default=None)
    stop_at: int | None = field(init=False, default=None)
    signal: int = field(init=False, default=signal.SIGTERM)
    seen: list[list[int]] = field(init=False, default_factory=list)

    def prepare(self) -> None:
        self.network = Net(self.dropout, self.norm)
        if self.spare:
            self.network.spare = nn.Linear(2, 2)
            self.network.forward = lambda x: nn.Sequential(*list(self.network)[:4])(x)
        self.train_set: Points = Points(self.samples, 0)
        self.val_set: Points = Points(7, 1)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.seen.append(batch["y"].tolist())
        if len(self.seen) == self.stop_at:
            os.kill(os.getpid(), self.signal)
        loss = F.cross_entropy(self.network(batch["x"]).float(), batch["y"])
        return {"loss": loss * float("nan") if len(self.seen) == self.explode_at else loss}

    def metrics(self) -> nn.Module:
        return MetricCollection({"val_loss": MeanMetric()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        metrics.update(F.cross_entropy(self.network(batch["x"]).float(), batch["y"], reduction="none"))

    def report(self, run: Run) -> Report:
        return Report("Toy", "", [Section("Rows", [Note(str(run.read_metrics()))])])

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        raise NotImplementedError

    def predict(self, inputs: Any, folder: str | Path) -> Report:
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        return save_weights(self.network, path)

    @classmethod
    def load(cls, source: str | Path) -> Self:
        raise NotImplementedError
