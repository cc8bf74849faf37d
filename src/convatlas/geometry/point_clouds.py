"""The tasks for point clouds: one class for each cloud, or one for each of its points."""

# No postponed annotations here: the command line is built from the real types of the fields.

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.point_sets import CloudSet, cloud_files, read_clouds, read_scenes
from convatlas.data.point_transforms import CloudAugment, CloudPreprocess, turned
from convatlas.data.points import Cloud, read_cloud
from convatlas.errors import DataError, Unsupported
from convatlas.geometry.splits import digest, split_sets
from convatlas.geometry.voxel_data import VoxelDataset, collate, merge_pairs, point_features, thinned
from convatlas.networks.e3dsnn.points import E3DSNN, E3DSNNClassifierConfig, E3DSNNConfig, E3DSNNSegmenterConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.ops.point_grid import grid_sample
from convatlas.ops.sparse import SparseTensor
from convatlas.report import Report
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Answer", "PointRecognition", "PointSegmentation", "PointTask"]


@dataclass(kw_only=True, eq=False)
class PointTask(GradientTask):
    """What the tasks for point clouds share.

    Attributes:
        data: where the clouds are.
        model: name of the network.
        options: fields of the network's config to change, e.g. ``{"depths": [1, 1, 1, 1]}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        preprocess: of every cloud, with the size of a voxel.
        augment: random changes of the training clouds.
        max_points: larger clouds are thinned out by distances to so many points, once.
        val_fraction: share of the training clouds held out to choose the best epoch, where the data have no split.
        test_fraction: share of all clouds held out to measure the quality, where the data have no split.
        split_seed: of the random split.
        test_rotations: how many turns about z, evenly over the circle, evaluation and prediction average over.
    """

    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    config_kind: ClassVar[type[E3DSNNConfig]]
    #: Whether every point has a class of its own.
    names_points: ClassVar[bool] = False

    data: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    preprocess: CloudPreprocess = field(default_factory=CloudPreprocess)
    augment: CloudAugment = field(default_factory=CloudAugment)
    max_points: int | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    test_rotations: int = 1

    network: E3DSNN = field(init=False, repr=False)
    classes: tuple[str, ...] = field(init=False, default=())
    splits: dict[str, CloudSet] = field(init=False, default_factory=dict)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, self.config_kind):
            raise Unsupported(f"{self.model} is not a network for {self.name}")
        for name in ("num_classes", "in_channels"):
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("max_points", "test_rotations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    # Data and network

    @abstractmethod
    def _read(self, data: str | Path) -> dict[str, CloudSet]:
        """Find the clouds, in their splits or under ``all``."""

    def prepare(self) -> None:
        """Read and split the clouds and build the network.

        Raises:
            DataError: the data cannot be read or are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._split(self._read(self.data))
        self.data_digest = digest(self.splits)
        self.classes = self.splits["train"].classes
        first = self._first(self.splits["train"])
        self.network = self._build(3 + first.features.shape[1])
        if self.weights is not None:
            source = published_source(self.model) if self.weights == "published" else self.weights
            head = {key for key in self.network.state_dict() if key.startswith(self.network.classifier_modules)}
            self.started_from = f"{self.weights}: {load_weights(self.network, source, optional=head).summary()}"
        self.train_set: VoxelDataset = self._dataset("train", self.augment)
        self.val_set: VoxelDataset = self._dataset("val")

    def _dataset(self, split: str, augment: CloudAugment | None = None) -> VoxelDataset:
        return VoxelDataset(self.splits[split], self.preprocess, augment, self.max_points)

    def _first(self, clouds: CloudSet) -> Cloud:
        reason = "it is empty"
        for index in range(len(clouds)):
            try:
                return clouds.cloud(index)
            except Unreadable as error:
                reason = str(error)
        raise DataError(f"none of the clouds of {self.data} can be read: {reason}")

    def _split(self, sets: dict[str, CloudSet]) -> dict[str, CloudSet]:
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        return split_sets(sets, self.data, **fractions, seed=self.split_seed)

    def _build(self, in_channels: int) -> E3DSNN:
        config = model_config(self.model, **self.options, num_classes=len(self.classes), in_channels=in_channels)
        return cast(E3DSNN, config.build())

    def example_inputs(self, batch: int = 1) -> tuple[SparseTensor]:
        """Held-out clouds as the network takes them; simulated voxels where the data are not at hand."""
        device = next(self.network.parameters()).device
        if "test" not in self.splits:
            return (self.network.example_inputs(batch)[0].to(device),)
        samples = VoxelDataset(self.splits["test"], self.preprocess, None, self.max_points)
        found = (samples[index % len(samples)] for index in range(len(samples) + batch))
        read = [sample for sample in found if "unreadable" not in sample][:batch]
        return (self._voxels(collate(read)).to(device),)

    def _voxels(self, batch: dict[str, Any]) -> SparseTensor:
        return self.network.voxels(
            batch["cells"], batch["features"], batch["batch"], batch_size=max(len(batch["label"]), 1)
        )

    # Training

    @property
    def collate(self) -> Any:
        """Join the voxels of a batch."""
        return collate

    def _note(self, batch: dict[str, Any]) -> None:
        self.unreadable.update(dict.fromkeys(batch["unreadable"], "it cannot be read, or nothing of it is left"))

    # Use

    @torch.inference_mode()
    def point_probabilities(self, cloud: Cloud) -> Tensor:
        """Class probabilities (N, K) of the points of a prepared cloud, or (1, K) of all of it.

        The mean over all fragments, which take the points of full voxels in turn, and over the turns about z.
        """
        device = next(self.network.parameters()).device
        whole = not self.names_points
        total = torch.zeros(1 if whole else len(cloud), len(self.classes), dtype=torch.float64)
        self.network.eval()
        for turn in range(self.test_rotations):
            seen = turned(cloud, 2 * np.pi * turn / self.test_rotations) if turn else cloud
            features = point_features(seen)
            grid = grid_sample(torch.from_numpy(seen.coordinates), self.preprocess.grid_size)
            for rows in grid.fragments():
                x = self.network.voxels(grid.cells[rows], features[rows], torch.zeros_like(rows))
                scores = self.network(x.to(device)).float().softmax(1).cpu().double()
                total[0 if whole else rows] += scores[0] if whole else scores
        return (total / total.sum(1, keepdim=True)).float()

    def _prepared(self, cloud: Cloud, name: str) -> Cloud:
        """A cloud as the network was trained on.

        Raises:
            Unreadable: it has other features, or nothing of it is left.
        """
        if 3 + cloud.features.shape[1] != self.network.in_channels:
            wanted = self.network.in_channels - 3
            raise Unreadable(name, f"its points have {cloud.features.shape[1]} features, the network takes {wanted}")
        cloud = self.preprocess(thinned(cloud, self.max_points))
        if not len(cloud):
            raise Unreadable(name, "no point is inside of clip")
        return cloud

    def _held_out(self, data: str | Path | None) -> CloudSet:
        if data is None:
            if not self.splits:
                splits = self._split(self._read(self.data))
                if digest(splits) != self.data_digest:
                    raise DataError(
                        f"the clouds of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the clouds to evaluate on by --data"
                    )
                self.splits = splits
            return self.splits["test"]
        sets = self._read(data)
        found = next(sets[name] for name in ("test", "val", "all", "train") if name in sets)
        if found.classes != self.classes:
            raise DataError(f"{data} has other classes than the network: {', '.join(found.classes)}")
        return found

    def answers(self, clouds: CloudSet) -> tuple[list["Answer"], list[Skipped]]:
        """What the network says of the clouds of a set, and the clouds that cannot be read.

        Raises:
            DataError: none can be read.
        """
        found, skipped = [], list(clouds.skipped)
        with progress("classifying", len(clouds)) as advance:
            for index, name in enumerate(clouds.names):
                try:
                    cloud = self._prepared(clouds.cloud(index), name)
                    found.append(Answer(name, cloud, self.point_probabilities(cloud), int(clouds.labels[index])))
                except Unreadable as error:
                    skipped.append(Skipped(error.name, error.reason))
                advance()
        if not found:
            first = skipped[0] if skipped else Skipped("the set", "it is empty")
            raise DataError(f"none of the clouds can be read; first: {first.path}: {first.reason}")
        return found, skipped

    def _files(self, inputs: Sequence[str | Path]) -> CloudSet:
        files: list[Path] = []
        for given in map(Path, inputs):
            if not given.exists():
                raise DataError(f"{given} does not exist; expected a file of a cloud or a folder of them")
            files += cloud_files(given) if given.is_dir() else [given]
        if not files:
            raise DataError(f"no cloud was found in {', '.join(map(str, inputs)) or 'nothing'}")
        return CloudSet(tuple(map(str, files)), np.full(len(files), -1), self.classes, read_cloud)

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test clouds, or on other labelled ones.

        Args:
            data: clouds in any form that training reads, with the same classes.
            folder: where to write the report.

        Raises:
            DataError: the data cannot be read, or have other classes.
        """
        from convatlas.geometry.point_reports import evaluation_report

        answers, skipped = self.answers(self._held_out(data))
        tell_skipped(skipped)
        report = evaluation_report(self, answers, skipped)
        if folder is not None:
            report.save(folder)
        return report

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Write the classes of clouds as ``predictions.csv``, or a coloured PLY file for each whose points have some.

        Args:
            inputs: files of clouds, or folders of them.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.geometry.point_reports import prediction_report

        answers, skipped = self.answers(self._files(inputs))
        tell_skipped(skipped)
        report = prediction_report(self, answers, skipped, Path(folder))
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, quality on the test clouds, pictures and cost of a finished run."""
        from convatlas.geometry.point_reports import training_report

        return training_report(self, run)

    @abstractmethod
    def measures(self, answers: Sequence["Answer"]) -> dict[str, float]:
        """Measures of quality, the most important one first."""

    def confusion(self, answers: Sequence["Answer"]) -> npt.NDArray[np.int64]:
        """How often clouds, or points, of one class (rows) were taken for another (columns), (K, K)."""
        count = len(self.classes)
        matrix = np.zeros((count, count), dtype=np.int64)
        for answer in answers:
            known = answer.truth >= 0
            pairs = answer.truth[known] * count + answer.best[known]
            matrix += np.bincount(pairs, minlength=count**2).reshape(count, count)
        return matrix

    def quality(self) -> dict[str, float]:
        """Quality on the test clouds."""
        return self.measures(self.answers(self._held_out(None))[0])

    # Files

    def described(self) -> dict[str, Any]:
        """Classes and features of the network, and what tells the clouds of the training."""
        return {
            "classes": list(self.classes),
            "in_channels": self.network.in_channels,
            "data_digest": self.data_digest,
        }

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.classes = tuple(described["classes"])
        self.data_digest = str(described["data_digest"])
        self.network = self._build(int(described["in_channels"]))


@dataclass(frozen=True, eq=False)
class Answer:
    """What a network says of a cloud.

    Attributes:
        name: of the cloud.
        cloud: as the network saw it.
        probabilities: (N, K) of its points, or (1, K) of all of it.
        label: the true class of the cloud, -1 where it has none.
    """

    name: str
    cloud: Cloud
    probabilities: Tensor
    label: int

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """The most probable class of each point (N), or of the cloud (1)."""
        found: npt.NDArray[np.int64] = self.probabilities.argmax(1).numpy()
        return found

    @property
    def truth(self) -> npt.NDArray[np.int64]:
        """The true class of each point (N), or of the cloud (1); -1 where it is unknown."""
        if len(self.probabilities) == 1 and self.label >= 0:
            return np.array([self.label])
        labels = self.cloud.labels
        return np.full(len(self.probabilities), -1) if labels is None else labels


@dataclass(kw_only=True, eq=False)
class PointRecognition(PointTask):
    """Train a network to name what a point cloud shows.

    Attributes:
        data: a folder with one subfolder of clouds a class (or train/, val/, test/ with those), ModelNet with its lists
            of files or as meshes, or ``solids`` for simulated ones.
        label_smoothing: share of the target spread over all classes.
    """

    name: ClassVar[str] = "point-recognition"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_accuracy", "max")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "lr": 3e-3, "weight_decay": 0.01}
    config_kind: ClassVar[type[E3DSNNConfig]] = E3DSNNClassifierConfig

    data: str = "solids"
    model: str = "e3dsnn_t"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def _read(self, data: str | Path) -> dict[str, CloudSet]:
        return read_clouds(data)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the classes, with smoothed targets."""
        self._note(batch)
        if not len(batch["label"]):
            return {}
        scores = self.network(self._voxels(batch)).float()
        return {"loss": F.cross_entropy(scores, batch["label"], label_smoothing=self.label_smoothing)}

    def metrics(self) -> nn.Module:
        """Accuracy, and its mean over the classes, of the first point of each voxel."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        count = len(self.classes)
        return MetricCollection(
            {
                "val_accuracy": MulticlassAccuracy(count, average="micro"),
                "val_class_accuracy": MulticlassAccuracy(count, average="macro"),
            }
        )

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch of validation clouds."""
        self._note(batch)
        if len(batch["label"]):
            metrics.update(self.network(self._voxels(batch)).float(), batch["label"])

    def measures(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Accuracy, and its mean over the classes."""
        right = np.array([answer.best[0] == answer.label for answer in answers])
        labels = np.array([answer.label for answer in answers])
        each = [float(right[labels == label].mean()) for label in np.unique(labels)]
        return {"accuracy": float(right.mean()), "mean class accuracy": float(np.mean(each))}


@dataclass(kw_only=True, eq=False)
class PointSegmentation(PointTask):
    """Train a network to name what each point of a cloud belongs to.

    Attributes:
        data: a folder of PLY or NPZ files with labels (or train/, val/, test/ with those) and ``classes.txt``;
            SemanticKITTI, a folder with ``sequences``; or ``scenes`` for simulated ones.
        class_weights: weight of each class in the loss; all the same when left out.
        mix_prob: probability that the clouds of a batch are laid into one another in pairs (mix3d).
    """

    name: ClassVar[str] = "point-segmentation"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_iou", "max")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 4, "lr": 2e-3, "weight_decay": 5e-3}
    config_kind: ClassVar[type[E3DSNNConfig]] = E3DSNNSegmenterConfig
    names_points: ClassVar[bool] = True

    data: str = "scenes"
    model: str = "e3dsnn_seg"
    class_weights: tuple[float, ...] | None = None
    mix_prob: float = 0.0
    preprocess: CloudPreprocess = field(default_factory=lambda: CloudPreprocess(grid_size=0.1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mix_prob <= 1:
            raise ValueError(f"mix_prob must be in [0, 1], got {self.mix_prob}")

    def _read(self, data: str | Path) -> dict[str, CloudSet]:
        sets = read_scenes(data)
        classes = next(iter(sets.values())).classes
        if self.class_weights is not None and len(self.class_weights) != len(classes):
            raise DataError(f"class_weights must be {len(classes)}, one for each class, got {len(self.class_weights)}")
        return sets

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Weighted cross-entropy of the voxels; those without a class do not count."""
        self._note(batch)
        if not len(batch["label"]):
            return {}
        if self.mix_prob and float(torch.rand(())) < self.mix_prob:
            batch = merge_pairs(batch)
        if not (batch["labels"] >= 0).any():
            return {}
        scores = self.network(self._voxels(batch)).float()
        weight = None if self.class_weights is None else scores.new_tensor(self.class_weights)
        return {"loss": F.cross_entropy(scores, batch["labels"], weight=weight, ignore_index=-1)}

    def metrics(self) -> nn.Module:
        """Mean intersection over union, and accuracy, of voxels."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        count = len(self.classes)
        return MetricCollection(
            {
                "val_iou": MulticlassJaccardIndex(count, ignore_index=-1),
                "val_accuracy": MulticlassAccuracy(count, average="micro", ignore_index=-1),
            }
        )

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch of validation clouds."""
        self._note(batch)
        if len(batch["label"]):
            metrics.update(self.network(self._voxels(batch)).float(), batch["labels"])

    def measures(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Mean intersection over union of the classes that occur, and accuracy of points."""
        matrix = self.confusion(answers)
        hits, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        known = union > 0
        mean = float((hits[known] / union[known]).mean()) if known.any() else float("nan")
        return {"mean IoU": mean, "accuracy": float(hits.sum() / max(matrix.sum(), 1))}
