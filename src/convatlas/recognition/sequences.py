"""The task of time series: one class for each pixel's season, from a table of observations."""

# No postponed annotations here: the command line is built from the real types of the fields.

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from convatlas.data.sentinel2 import GridSeries, SentinelTimeSeries
from convatlas.data.series import SeriesSet, join_series, read_series, split_by_field
from convatlas.data.wheat_seasons import simulate_wheat_season
from convatlas.errors import DataError, Unsupported
from convatlas.networks.registry import model_config
from convatlas.networks.sequence_classifier import SequenceClassifier, SequenceConfig
from convatlas.report import Report
from convatlas.training.left_out import tell_skipped
from convatlas.training.run import Run, from_mapping, to_mapping
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Named", "SequenceRecognition"]

_NOT_OPTIONS = ("num_classes", "in_channels", "length")


class Named(NamedTuple):
    """What a network says of a set of series.

    Attributes:
        series: the pixels that could be used.
        grid: their series on the grid of days.
        probabilities: (N, K) float32; rows sum to 1.
    """

    series: SeriesSet
    grid: GridSeries
    probabilities: npt.NDArray[np.float32]

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """Index of the most probable class, (N)."""
        return self.probabilities.argmax(1)


class _Samples(Dataset[dict[str, Any]]):
    """Standardised series with their labels, by index or by (index, seed)."""

    def __init__(self, values: Tensor, labels: npt.NDArray[np.int64]) -> None:
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[0] if isinstance(key, tuple | list) else key
        return {"series": self.values[index], "label": int(self.labels[index])}


@dataclass(kw_only=True, eq=False)
class SequenceRecognition(GradientTask):
    """Train a network to name what a pixel's time series shows, such as the stress of a crop.

    Attributes:
        data: a CSV file with a row for each pixel and date: ``id``, ``date``, a column for each band (``B2`` to ``B12``
            of Sentinel-2, or any other measurements) and ``label``, with ``field`` for pixels that belong together; or
            ``wheat`` for simulated seasons.
        model: name of a network for time series, e.g. ``ffdnn``, ``sequence_cnn``, ``sequence_gru``.
        options: fields of the network's config to change, e.g. ``{"widths": [8, 8]}``.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``.
        season_start: month and day from which days are counted, e.g. ``10-01`` for winter wheat.
        grid: the features and the regular days that they are brought to.
        val_fraction: share of the training fields held out to choose the best epoch.
        test_fraction: share of all fields held out to measure the quality.
        split_seed: of the random split by fields.
    """

    name: ClassVar[str] = "sequences"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_accuracy", "max")
    smaller_is_better: ClassVar[tuple[str, ...]] = ("cross-entropy [nats]",)
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 60, "weight_decay": 0.0, "schedule": "constant", "patience": 30}

    data: str = "wheat"
    model: str = "ffdnn"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    season_start: str = "01-01"
    grid: SentinelTimeSeries = field(default_factory=SentinelTimeSeries)
    val_fraction: float = 0.2
    test_fraction: float = 0.3
    split_seed: int = 0

    network: SequenceClassifier = field(init=False, repr=False)
    classes: tuple[str, ...] = field(init=False, default=())
    features: tuple[str, ...] = field(init=False, default=())
    transform: SentinelTimeSeries = field(init=False, default_factory=SentinelTimeSeries)
    mean: tuple[float, ...] = field(init=False, default=())
    std: tuple[float, ...] = field(init=False, default=())
    splits: dict[str, SeriesSet] = field(init=False, default_factory=dict)
    unusable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(model_config(self.model, **self.options), SequenceConfig):
            raise Unsupported(f"{self.model} is not a network for time series")
        for name in _NOT_OPTIONS:
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    # Data and network

    def prepare(self) -> None:
        """Read the table, split it by fields, bring it to the grid and build the network.

        Raises:
            DataError: the table cannot be read or cannot be used for training.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._split(self._read(self.data))
        self.data_digest = _digest(self.splits)
        train = self.splits["train"]
        self.classes = train.classes
        try:
            self.transform = self.grid.fitted(train)
        except ValueError as error:
            raise DataError(f"{self.data}: {error}") from None
        grids = {name: self.transform(self.splits[name]) for name in ("train", "val")}
        self.unusable = {each.path: each.reason for grid in grids.values() for each in grid.skipped}
        tell_skipped(each for grid in grids.values() for each in grid.skipped)
        values, self.features = grids["train"].values, grids["train"].features
        self.mean = tuple(float(value) for value in values.mean((0, 2)))
        self.std = tuple(max(float(value), 1e-6) for value in values.std((0, 2)))
        self.network = self._build()
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"
        self.train_set, self.val_set = (
            _Samples(self.standardised(grid), self.splits[name].labels[grid.rows]) for name, grid in grids.items()
        )

    def _read(self, data: str | Path) -> SeriesSet:
        if str(data) == "wheat":
            return simulate_wheat_season().series
        return read_series(data, season_start=self.season_start)

    def _split(self, series: SeriesSet) -> dict[str, SeriesSet]:
        if len(series.classes) < 2:
            raise DataError(f"{self.data} must have at least two labels, got {', '.join(series.classes) or 'none'}")
        held_out = {"test": self.test_fraction, "val": (1 - self.test_fraction) * self.val_fraction}
        return split_by_field(series, {"train": 1 - sum(held_out.values()), **held_out}, self.split_seed)

    def _build(self) -> SequenceClassifier:
        sizes = {
            "num_classes": len(self.classes),
            "in_channels": len(self.features),
            "length": len(self.transform.grid),
        }
        return cast(SequenceClassifier, model_config(self.model, **self.options, **sizes).build())

    def standardised(self, grid: GridSeries) -> Tensor:
        """Series (N, C, T) with the mean 0 and the deviation 1 of the training data in every feature."""
        mean, std = (torch.tensor(values)[:, None] for values in (self.mean, self.std))
        return (torch.from_numpy(grid.values) - mean) / std

    # Training

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss that the network is trained with: of margins for capsules, else cross-entropy."""
        network: Any = self.network
        return {"loss": network.training_loss(batch["series"], batch["label"])}

    def metrics(self) -> nn.Module:
        """Accuracy and macro F1 of the validation series."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        count = len(self.classes)
        return MetricCollection(
            {
                "val_accuracy": MulticlassAccuracy(count, average="micro"),
                "val_f1": MulticlassF1Score(count, average="macro"),
            }
        )

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch of validation series."""
        metrics.update(self.network(batch["series"]).float(), batch["label"])

    # Use

    def named(self, series: SeriesSet) -> Named:
        """Class probabilities of a set of pixels; those that cannot be used are left out.

        Raises:
            DataError: bands are missing, or no pixel can be used.
        """
        grid = self.transform(series)
        if grid.features != self.features:
            raise DataError(
                f"the network was trained on {', '.join(self.features)}, the table has {', '.join(grid.features)}"
            )
        return Named(series.subset(grid.rows), grid, self.probabilities(self.standardised(grid)))

    @torch.inference_mode()
    def probabilities(self, values: Tensor) -> npt.NDArray[np.float32]:
        """Class probabilities (N, K) of standardised series (N, C, T)."""
        device = next(self.network.parameters()).device
        self.network.eval()
        rows = [self.network.probabilities(self.network(part.to(device)).float()).cpu() for part in values.split(1024)]
        found: npt.NDArray[np.float32] = torch.cat(rows).numpy()
        return found

    def quality(self) -> dict[str, float]:
        """Accuracy, kappa, macro F1 and cross-entropy on the test fields."""
        from convatlas.recognition.sequence_reports import quality

        return quality(self.named(self._held_out(None)))

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test fields, or on another labelled table.

        Args:
            data: a table as for training; its labels must be known to the network.
            folder: where to write the report and ``predictions.csv``.

        Raises:
            DataError: the table cannot be read, or has labels that the network does not know.
        """
        from convatlas.recognition.sequence_reports import evaluation_report, write_predictions

        named = self.named(self._held_out(data))
        tell_skipped(named.grid.skipped)
        report = evaluation_report(self, named)
        if folder is not None:
            write_predictions(self, named, Path(folder) / "predictions.csv")
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> SeriesSet:
        if data is None:
            if not self.splits:
                splits = self._split(self._read(self.data))
                if _digest(splits) != self.data_digest:
                    raise DataError(
                        f"the pixels of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the table to evaluate on by --data"
                    )
                self.splits = splits
            return self.splits["test"].with_classes(self.classes)
        series = self._read(data).with_classes(self.classes)
        if (series.labels < 0).any():
            raise DataError(f"{data}: {series.names[int(np.argmin(series.labels))]} has no label; use predict")
        return series

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Name what each pixel of tables shows; writes ``predictions.csv``.

        Args:
            inputs: CSV files as for training; labels are not needed.
            folder: where to write.

        Raises:
            DataError: a table cannot be read, or no pixel can be used.
        """
        from convatlas.recognition.sequence_reports import prediction_report, write_predictions

        named = self.named(join_series([self._read(path) for path in inputs]))
        tell_skipped(named.grid.skipped)
        write_predictions(self, named, Path(folder) / "predictions.csv")
        report = prediction_report(self, named)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, quality on the test fields, what decides, and simple methods beside it."""
        from convatlas.recognition.sequence_reports import training_report

        return training_report(self, run)

    @classmethod
    def compare(cls, tasks: Mapping[str, "SequenceRecognition"], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks that were trained on the same pixels, with a forest and an SVM beside them."""
        from convatlas.recognition.sequence_reports import comparison_report

        return comparison_report(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """Classes, features, grid and statistics of the training, and what tells its pixels."""
        return {
            "classes": list(self.classes),
            "features": list(self.features),
            "transform": to_mapping(self.transform),
            "mean": list(self.mean),
            "std": list(self.std),
            "data_digest": self.data_digest,
        }

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.classes, self.features = tuple(described["classes"]), tuple(described["features"])
        self.transform = from_mapping(SentinelTimeSeries, described["transform"])
        self.mean, self.std = tuple(described["mean"]), tuple(described["std"])
        self.data_digest = str(described["data_digest"])
        self.network = self._build()


def _digest(splits: Mapping[str, SeriesSet]) -> str:
    """A short text that tells whether pixels were split in the same way."""
    digest = hashlib.sha256()
    for name, series in splits.items():
        for pixel, label in zip(series.names, series.labels, strict=True):
            digest.update(f"{name}/{series.classes[label]}/{pixel}\n".encode())
    return digest.hexdigest()[:16]
