"""The task for LiDAR sweeps: boxes around the things in them."""

# No postponed annotations here: the command line is built from the real types of the fields.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric, MetricCollection

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.point_sets import CloudSet, cloud_files
from convatlas.data.sweeps import Sweep, SweepAugment, read_sweep, read_sweeps
from convatlas.errors import DataError, Unsupported
from convatlas.geometry.splits import digest, split_sets
from convatlas.networks.e3dsnn.detection import E3DSNNDetector, E3DSNNDetectorConfig
from convatlas.networks.registry import model_config
from convatlas.ops.boxes3d import average_precision_r40, iou_3d, iou_bev
from convatlas.ops.point_grid import voxel_means
from convatlas.ops.sparse import SparseTensor
from convatlas.report import Report
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Finding", "LidarDetection", "SweepDataset"]


class SweepDataset(Dataset[dict[str, Any]]):
    """Sweeps as voxels with their boxes, indexed by position or by (position, seed).

    A sample holds ``features`` (V, 4), ``cells`` (V, 3) in the order z, y, x, ``boxes`` (M, 7), ``labels`` (M),
    ``ignored`` (M) and ``index``; or ``unreadable``, the name of a file that fails.

    Args:
        sweeps: the set.
        config: of the network, whose grid decides the voxels.
        max_points: points of a voxel that count.
        augment: random changes, made where there is a seed; none when left out.
    """

    def __init__(
        self, sweeps: CloudSet, config: E3DSNNDetectorConfig, max_points: int, augment: SweepAugment | None = None
    ) -> None:
        self.sweeps, self.config, self.max_points, self.augment = sweeps, config, max_points, augment

    def __len__(self) -> int:
        return len(self.sweeps)

    def voxels(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """Features (V, 4) and cells (V, 3) of a sweep."""
        low, high = np.array(self.config.point_range[:3]), np.array(self.config.point_range[3:])
        z, y, x = self.config.spatial_shape
        sizes = (high - low) / np.array([x, y, z - 1])
        points = torch.from_numpy(sweep.points)
        return voxel_means(points, sizes.tolist(), self.config.point_range, max_points=self.max_points)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple | list) else (key, None)
        try:
            sweep: Sweep = self.sweeps.cloud(index)
        except Unreadable as error:
            return {"unreadable": error.name}
        if self.augment is not None and seed is not None:
            sweep = self.augment(sweep, torch.Generator().manual_seed(int(seed)))
        features, cells = self.voxels(sweep)
        low, high = np.array(self.config.point_range[:2]), np.array(self.config.point_range[3:5])
        inside = ((sweep.boxes[:, :2] >= low) & (sweep.boxes[:, :2] <= high)).all(1)
        return {
            "features": features,
            "cells": cells,
            "boxes": torch.from_numpy(sweep.boxes[inside]),
            "labels": torch.from_numpy(sweep.labels[inside]),
            "ignored": torch.from_numpy(sweep.ignored[inside]),
            "index": int(index),
        }


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The voxels of several sweeps in one list with the index of each; boxes stay a list."""
    read = [sample for sample in samples if "unreadable" not in sample]
    counts = torch.tensor([len(sample["cells"]) for sample in read], dtype=torch.int64)
    joined = {
        name: torch.cat([sample[name] for sample in read]) if read else torch.empty(0) for name in ("features", "cells")
    }
    lists = {name: [sample[name] for sample in read] for name in ("boxes", "labels", "ignored")}
    unreadable = [sample["unreadable"] for sample in samples if "unreadable" in sample]
    batch = torch.arange(len(read), dtype=torch.int32).repeat_interleave(counts)
    return {**joined, **lists, "batch": batch, "unreadable": unreadable}


@dataclass(frozen=True, eq=False)
class Finding:
    """What a network finds in a sweep.

    Attributes:
        name: of the sweep.
        sweep: it, with its true boxes where there are some.
        boxes: (N, 7), the best first.
        scores: (N).
        labels: (N), the class of each.
    """

    name: str
    sweep: Sweep
    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(kw_only=True, eq=False)
class LidarDetection(GradientTask):
    """Train a network to find things in LiDAR sweeps, as boxes.

    Attributes:
        data: KITTI's object data, a folder with ``training`` in it; or ``streets`` for simulated ones.
        model: name of the network.
        options: fields of the network's config to change: its grid, its anchors.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``.
        classes: kinds of things to find, by KITTI's names, one for each anchor of the network.
        max_points: points of a voxel that count, the first ones.
        augment: random changes of the training sweeps.
        score_threshold: least score of a box that is kept.
        overlap_threshold: overlap seen from above from which the worse of two boxes is left out.
        matched: least overlap with a true box to be right, when quality is measured; 0.7 for cars.
        val_fraction: share of the training sweeps held out to choose the best epoch, where the data have no split.
        test_fraction: share of all sweeps held out to measure the quality, where the data have no split.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "lidar-detection"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_ap", "max")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 4, "lr": 3e-3, "weight_decay": 0.01, "clip": 10.0}

    data: str = "streets"
    model: str = "e3dsnn_kitti_car"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    classes: tuple[str, ...] = ("Car",)
    max_points: int = 5
    augment: SweepAugment = field(default_factory=SweepAugment)
    score_threshold: float = 0.1
    overlap_threshold: float = 0.1
    matched: float = 0.7
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: E3DSNNDetector = field(init=False, repr=False)
    splits: dict[str, CloudSet] = field(init=False, default_factory=dict)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, E3DSNNDetectorConfig):
            raise Unsupported(f"{self.model} is not a network for {self.name}")
        if len(self.classes) != config.num_classes:
            raise ValueError(f"classes must be {config.num_classes}, as many as anchors, got {', '.join(self.classes)}")
        for name in ("score_threshold", "overlap_threshold", "matched", "val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {self.max_points}")

    # Data and network

    def _config(self) -> E3DSNNDetectorConfig:
        return cast(E3DSNNDetectorConfig, model_config(self.model, **self.options))

    def _read(self, data: str | Path) -> dict[str, CloudSet]:
        return read_sweeps(data, self.classes, self._config().point_range)

    def _split(self) -> dict[str, CloudSet]:
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        return split_sets(self._read(self.data), self.data, **fractions, seed=self.split_seed)

    def prepare(self) -> None:
        """Read and split the sweeps and build the network.

        Raises:
            DataError: the data cannot be read or are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._split()
        self.data_digest = digest(self.splits)
        self.network = self._config().build()
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"
        self.train_set: SweepDataset = self._dataset("train", self.augment)
        self.val_set: SweepDataset = self._dataset("val")

    def _dataset(self, split: str, augment: SweepAugment | None = None) -> SweepDataset:
        return SweepDataset(self.splits[split], self._config(), self.max_points, augment)

    def example_inputs(self, batch: int = 1) -> tuple[SparseTensor]:
        """Random voxels, on the device of the network."""
        device = next(self.network.parameters()).device
        return (self.network.example_inputs(batch)[0].to(device),)

    def _voxels(self, batch: dict[str, Any]) -> SparseTensor:
        indices = torch.cat([batch["batch"][:, None], batch["cells"]], 1)
        return SparseTensor(batch["features"], indices, self._config().spatial_shape, len(batch["boxes"]), check=False)

    # Training

    @property
    def collate(self) -> Any:
        """Join the voxels of a batch."""
        return _collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of scores, offsets and directions."""
        self._note(batch)
        if not len(batch["batch"]):
            return {}
        return self.network.losses(self.network(self._voxels(batch)), batch["boxes"], batch["labels"])

    def metrics(self) -> nn.Module:
        """Average precision of validation sweeps, mean of the classes."""
        return MetricCollection({"val_ap": _AveragePrecision(len(self.classes), self.matched)})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch of validation sweeps."""
        self._note(batch)
        if len(batch["batch"]):
            found = self._decoded(self._voxels(batch))
            metrics.update(found, batch["boxes"], batch["labels"], batch["ignored"])

    def _decoded(self, voxels: SparseTensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        thresholds = {"score_threshold": self.score_threshold, "overlap_threshold": self.overlap_threshold}
        return self.network.decode(self.network(voxels), **thresholds)

    def _note(self, batch: dict[str, Any]) -> None:
        self.unreadable.update(dict.fromkeys(batch["unreadable"], "it could not be read"))

    # Use

    @torch.inference_mode()
    def find(self, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 7), scores (N) and classes (N) in a sweep, the best first."""
        empty = CloudSet((), np.zeros(0, np.int64), self.classes, read_sweep)
        features, cells = SweepDataset(empty, self._config(), self.max_points).voxels(sweep)
        indices = torch.nn.functional.pad(cells, (1, 0))
        voxels = SparseTensor(features, indices, self._config().spatial_shape, 1, check=False)
        self.network.eval()
        ((boxes, scores, labels),) = self._decoded(voxels.to(next(self.network.parameters()).device))
        return boxes.cpu(), scores.cpu(), labels.cpu()

    def findings(self, sweeps: CloudSet) -> tuple[list[Finding], list[Skipped]]:
        """What the network finds in the sweeps of a set, and the sweeps that cannot be read.

        Raises:
            DataError: none can be read.
        """
        found, skipped = [], list(sweeps.skipped)
        with progress("finding", len(sweeps)) as advance:
            for index, name in enumerate(sweeps.names):
                try:
                    sweep: Sweep = sweeps.cloud(index)
                    found.append(Finding(name, sweep, *self.find(sweep)))
                except Unreadable as error:
                    skipped.append(Skipped(error.name, error.reason))
                advance()
        if not found:
            first = skipped[0] if skipped else Skipped("the set", "it is empty")
            raise DataError(f"none of the sweeps can be read; first: {first.path}: {first.reason}")
        return found, skipped

    def measures(self, findings: Sequence[Finding]) -> dict[str, float]:
        """Average precision at 40 recalls, of volumes and seen from above, mean of the classes that occur, in %."""
        results = {}
        for label, overlap in (("AP 3D [%]", iou_3d), ("AP from above [%]", iou_bev)):
            each = []
            for kind in range(len(self.classes)):
                found = [(entry.boxes[entry.labels == kind], entry.scores[entry.labels == kind]) for entry in findings]
                own = [entry.sweep.labels == kind for entry in findings]
                true = [torch.from_numpy(e.sweep.boxes[rows]) for e, rows in zip(findings, own, strict=True)]
                hard = [torch.from_numpy(e.sweep.ignored[rows]) for e, rows in zip(findings, own, strict=True)]
                each.append(average_precision_r40(found, true, self.matched, ignored=hard, overlap=overlap))
            known = [value for value in each if value == value]
            results[label] = 100 * float(np.mean(known)) if known else float("nan")
        return results

    def quality(self) -> dict[str, float]:
        """Average precision on the test sweeps."""
        return self.measures(self.findings(self._held_out(None))[0])

    def _held_out(self, data: str | Path | None) -> CloudSet:
        if data is None:
            if not self.splits:
                splits = self._split()
                if digest(splits) != self.data_digest:
                    raise DataError(
                        f"the sweeps of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the sweeps to evaluate on by --data"
                    )
                self.splits = splits
            return self.splits["test"]
        sets = self._read(data)
        return next(sets[name] for name in ("test", "val", "all", "train") if name in sets)

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test sweeps, or on others.

        Args:
            data: sweeps in any form that training reads.
            folder: where to write the report.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.geometry.lidar_reports import evaluation_report

        findings, skipped = self.findings(self._held_out(data))
        tell_skipped(skipped)
        report = evaluation_report(self, findings, skipped)
        if folder is not None:
            report.save(folder)
        return report

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Write the boxes of sweeps as ``boxes.csv``, and a page with pictures from above.

        Args:
            inputs: files of points with intensity, such as KITTI's BIN files, or folders of them.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.geometry.lidar_reports import prediction_report

        files: list[str] = []
        for given in map(Path, inputs):
            if not given.exists():
                raise DataError(f"{given} does not exist; expected a file of points or a folder of them")
            files += map(str, cloud_files(given) if given.is_dir() else [given])
        findings, skipped = self.findings(CloudSet(tuple(files), np.full(len(files), -1), self.classes, read_sweep))
        tell_skipped(skipped)
        report = prediction_report(self, findings, skipped, Path(folder))
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, quality on the test sweeps, pictures and cost of a finished run."""
        from convatlas.geometry.lidar_reports import training_report

        return training_report(self, run)

    # Files

    def described(self) -> dict[str, Any]:
        """What tells the sweeps of the training."""
        return {"data_digest": self.data_digest}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.data_digest = str(described["data_digest"])
        self.network = self._config().build()


class _AveragePrecision(Metric):
    """Average precision at 40 recalls, mean of the classes that occur; 0 where none does."""

    rows: list[Tensor]

    def __init__(self, num_classes: int, threshold: float) -> None:
        super().__init__()
        self.num_classes, self.threshold = num_classes, threshold
        # Boxes as rows: sample, class, score (or -1 for a true box, -2 for one that does not count), box.
        self.add_state("rows", [], dist_reduce_fx="cat")
        # Every process counts its own samples, far from those of the others.
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.sample = 1_000_000 * (torch.distributed.get_rank() if several else 0)

    def update(
        self,
        found: Sequence[tuple[Tensor, Tensor, Tensor]],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        ignored: Sequence[Tensor],
    ) -> None:
        """Add sweeps."""
        for (some, scores, kinds), true, names, hard in zip(found, boxes, labels, ignored, strict=True):
            for which, values, place in ((kinds, scores, some), (names, -1.0 - hard.double(), true)):
                first = torch.full((len(place), 1), float(self.sample), dtype=torch.float64, device=place.device)
                self.rows.append(torch.cat([first, which[:, None], values[:, None], place], 1))
            self.sample += 1

    def compute(self) -> Tensor:
        """The mean over the classes."""
        rows = torch.cat(list(self.rows)).cpu() if len(self.rows) else torch.zeros(0, 10)
        each = []
        for kind in range(self.num_classes):
            found, true, hard = [], [], []
            for sample in rows[:, 0].unique():
                own = rows[(rows[:, 0] == sample) & (rows[:, 1] == kind)]
                said, known = own[own[:, 2] >= 0], own[own[:, 2] < 0]
                found.append((said[:, 3:], said[:, 2]))
                true.append(known[:, 3:])
                hard.append(known[:, 2] < -1.5)
            each.append(average_precision_r40(found, true, self.threshold, ignored=hard))
        values = [value for value in each if value == value]
        return torch.tensor(sum(values) / len(values) if values else 0.0)
