"""The task of skeleton recognition: one action for each clip of moving joints, by one network or by the ensemble."""

# No postponed annotations here: the command line is built from the real types of the fields.

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convatlas.data.images import Skipped
from convatlas.data.skeleton_sets import (
    ClipDataset,
    ClipPreparation,
    SkeletonSet,
    divide_by_protocol,
    known_layout,
    read_skeletons,
    stratified,
)
from convatlas.data.skeletons import SkeletonAugment
from convatlas.errors import DataError, Unsupported
from convatlas.networks.registry import model_config
from convatlas.networks.skeleton_cnn import EnsemNN, EnsemNNConfig, SkeletonNet, SkeletonNetConfig
from convatlas.ops.score_fusion import Fusion, best_fusion_weights
from convatlas.report import Report
from convatlas.training.left_out import tell_skipped
from convatlas.training.run import Run, check_same_settings, to_mapping
from convatlas.training.settings import Training
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["MEMBERS", "Skeletons"]

#: The networks of the ensemble by their names there.
MEMBERS = {
    "two_stream": "skeleton_two_stream",
    "body_part": "skeleton_body_part",
    "attention": "skeleton_attention",
    "difference": "skeleton_difference",
}
_FROM_DATA = ("joints", "dim", "frames", "num_classes", "parts", "fusion", "weights")


@dataclass(kw_only=True, eq=False)
class Skeletons(GradientTask):
    """Train a network, or the ensemble of four, to name what a moving skeleton does.

    Attributes:
        data: ``stick_figures`` (simulated), a folder of ``.skeleton`` files as NTU RGB+D has them, or an ``.npz`` file
            with ``clips`` (N, T, J, dim) or (N, T, bodies, J, dim) and ``labels``; or ``clips_train`` and so on.
        skip: a text file with names of ``.skeleton`` files to leave out.
        protocol: how files of NTU RGB+D are split into training and test: ``cross_subject``, ``cross_view``, or
            ``random`` as all others.
        model: ``ensem_nn`` trains the four networks one after the other; or one of them.
        options: fields of the network's config to change, e.g. ``{"widths": [16, 32, 64], "depths": [1, 1, 1]}``.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``; not for the ensemble.
        frames: that clips are resampled to.
        view: root, spine, right hip and left hip, by which the view is normalised; those of NTU RGB+D and of the
            simulated figures are known, others are not normalised when left out.
        parts: joints of the parts of the body; those of the same two are known.
        bodies: bodies of a frame, whose joints lie one behind the other; told from the joints where they are known.
        fill: whether joints that were not seen are interpolated over time; else they are an error.
        augment: random changes of the training clips.
        fusion: of the ensemble: ``mean``, ``product``, ``max``, or ``weighted`` with the weights that are best on the
            validation clips.
        val_fraction: share of the training clips held out to choose the best epoch, where the data have no split.
        test_fraction: share of all clips held out to measure the quality, where the data have no split.
        split_seed: of the random split, and of the simulated figures.
    """

    name: ClassVar[str] = "skeletons"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_accuracy", "max")
    smaller_is_better: ClassVar[tuple[str, ...]] = ("cross-entropy [nats]",)
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 30, "weight_decay": 1e-4, "warmup_epochs": 0.0}

    data: str = "stick_figures"
    skip: str | None = None
    protocol: Literal["random", "cross_subject", "cross_view"] = "random"
    model: str = "ensem_nn"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    frames: int = 100
    view: tuple[int, int, int, int] | None = None
    parts: tuple[tuple[int, ...], ...] | None = None
    bodies: int | None = None
    fill: bool = True
    augment: SkeletonAugment = field(default_factory=SkeletonAugment)
    fusion: Fusion = "mean"
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: SkeletonNet | EnsemNN = field(init=False, repr=False)
    splits: dict[str, SkeletonSet] = field(init=False, default_factory=dict)
    classes: tuple[str, ...] = field(init=False, default=())
    #: Joints and coordinates of a clip.
    shape: tuple[int, int] = field(init=False, default=(0, 0))
    #: Of the networks of the ensemble, if its fusion is weighted.
    fusion_weights: tuple[float, ...] = field(init=False, default=(0.25,) * 4)
    data_digest: str = field(init=False, default="")
    started_from: str = field(init=False, default="")

    def __post_init__(self) -> None:
        for name in _FROM_DATA:
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data or is a setting of its own")
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, SkeletonNetConfig):
            raise Unsupported(f"{self.model} is not a network for skeletons")
        if self.weights is not None and self.is_ensemble:
            raise ValueError("weights must be left out for the ensemble: each of its networks is trained by itself")
        if self.protocol not in ("random", "cross_subject", "cross_view"):
            raise ValueError(f"protocol must be random, cross_subject or cross_view, got {self.protocol!r}")
        if self.frames < 2:
            raise ValueError(f"frames must be at least 2, got {self.frames}")
        if self.bodies is not None and self.bodies < 1:
            raise ValueError(f"bodies must be at least 1, got {self.bodies}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def is_ensemble(self) -> bool:
        """Whether the four networks are trained and fused."""
        return isinstance(model_config(self.model), EnsemNNConfig)

    # Data and network

    def prepare(self) -> None:
        """Read and split the clips and build the network for them.

        Raises:
            DataError: the data cannot be read or are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self._read_splits()
        self.network = self._build()
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"
        prepare = self.preparation()
        self.train_set = ClipDataset(self.splits["train"], prepare, self.augment)
        self.val_set = ClipDataset(self.splits["val"], prepare)

    def _read_splits(self) -> None:
        if not self.splits:  # the ensemble has read them for all its networks
            self.splits = self._split(read_skeletons(self.data, skip=self.skip, seed=self.split_seed))
            tell_skipped(Skipped(name, reason) for name, reason in self.splits["train"].skipped)
        train = self.splits["train"]
        if len(train.classes) < 2:
            raise DataError(f"{self.data} must have clips of at least 2 classes, got {len(train.classes)}")
        self.classes, self.shape = train.classes, (train.joints, train.dim)
        self.data_digest = _digest(self.splits)

    def _split(self, sets: dict[str, SkeletonSet]) -> dict[str, SkeletonSet]:
        if any((clips.labels < 0).any() for clips in sets.values()):
            raise DataError(f"{self.data} has clips without labels")
        val = self.val_fraction
        if "all" in sets and self.protocol == "random":
            held_out = {"test": self.test_fraction, "val": (1 - self.test_fraction) * val}
            return stratified(sets["all"], {"train": 1 - sum(held_out.values()), **held_out}, self.split_seed)
        if "all" in sets:
            sets = divide_by_protocol(sets["all"], self.protocol)
        if "train" not in sets:
            raise DataError(f"{self.data} has no clips for training, only {', '.join(sets)}")
        if "val" not in sets:
            sets = {**sets, **stratified(sets["train"], {"train": 1 - val, "val": val}, self.split_seed)}
        classes = sets["train"].classes
        sets = {name: clips.with_classes(classes) for name, clips in sets.items()}
        return {**sets, "test": sets.get("test", sets["val"])}

    def preparation(self) -> ClipPreparation:
        """How a clip becomes the input of the network."""
        known = known_layout(self.shape[0])
        view = self.view or (known[0].view if known else None)
        bodies = self.bodies or (known[1] if known else 1)
        if self.shape[0] % bodies:
            raise DataError(f"bodies must divide the {self.shape[0]} joints, got {bodies}")
        if view is not None and max(view) >= self.shape[0]:
            raise DataError(f"view must be joints below {self.shape[0]}, got {view}")
        return ClipPreparation(frames=self.frames, view=view, bodies=bodies, fill=self.fill)

    def _build(self) -> SkeletonNet | EnsemNN:
        joints, dim = self.shape
        fixed: dict[str, Any] = {"joints": joints, "dim": dim, "frames": self.frames, "num_classes": len(self.classes)}
        if self.is_ensemble or self.model == MEMBERS["body_part"]:
            fixed["parts"] = self._parts()
        if self.is_ensemble:
            fixed |= {"fusion": self.fusion, "weights": self.fusion_weights}
        network: Any = model_config(self.model, **self.options, **fixed).build()
        return network

    def _parts(self) -> tuple[tuple[int, ...], ...]:
        if self.parts is not None:
            return self.parts
        known = known_layout(self.shape[0])
        if known is None:
            raise DataError(f"parts must be given: the parts of a body with {self.shape[0]} joints are not known")
        layout, bodies = known
        every = len(layout.joints)
        return tuple(tuple(joint + body * every for body in range(bodies) for joint in part) for part in layout.parts)

    # Training

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Train as every gradient-trained task does; the ensemble trains its networks one after the other.

        Each is a run of its own in the folder of the run; ``resume`` goes on with the one that was stopped.
        """
        if not self.is_ensemble:
            return super().fit(run, training, resume=resume)
        training = training or Training(**self.defaults)
        if training.devices != 1 or training.nodes != 1:
            raise ValueError(
                "the networks of the ensemble are trained one after the other on one device, got devices "
                f"{training.devices} and nodes {training.nodes}: train each by itself"
            )
        settings = {**to_mapping(self), **to_mapping(training)}
        if resume:
            opened = Run.open(run)
            check_same_settings(settings, opened.settings())
        else:
            opened = Run(run)
            opened.check_unused()
        self._read_splits()
        if not resume:
            opened = Run.create(run, self.name, settings)
        ensemble: Any = self._build()
        for name, model in MEMBERS.items():
            known = {entry.name for entry in dataclasses.fields(model_config(model))}
            own = {key: value for key, value in self.options.items() if key in known}
            one = dataclasses.replace(self, model=model, options=own)
            one.splits = self.splits
            part = opened.folder / name
            one.fit(part, training, resume=Run(part).config.is_file())
            ensemble.members[name].load_state_dict(one.network.state_dict())
        self.network = ensemble
        if self.fusion == "weighted":
            val = self.splits["val"]
            scores = torch.from_numpy(self.member_probabilities(val))
            self.fusion_weights = best_fusion_weights(scores, torch.from_numpy(val.labels))
            self.network = self._build()
            self.network.load_state_dict(ensemble.state_dict())
        self.network.eval()
        self.save(opened.best)
        report = self.report(opened)
        report.save(opened.folder)
        return report

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the classes."""
        return {"loss": F.cross_entropy(self.network(batch["clip"]).float(), batch["label"])}

    def metrics(self) -> nn.Module:
        """Loss and accuracy of the validation clips."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        from convatlas.recognition.metrics import CrossEntropy

        accuracy = MulticlassAccuracy(len(self.classes), average="micro")
        return MetricCollection({"val_loss": CrossEntropy(), "val_accuracy": accuracy})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch of clips."""
        metrics.update(self.network(batch["clip"]).float(), batch["label"])

    # Use

    def probabilities(self, clips: SkeletonSet) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Class probabilities (N, K) of clips.

        Raises:
            DataError: the clips have other joints than those of the training.
        """
        return self._computed(clips, lambda clip: self.network(clip).float().softmax(1))

    def member_probabilities(self, clips: SkeletonSet) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Class probabilities (4, N, K) of each network of the ensemble."""
        ensemble: Any = self.network
        found = self._computed(clips, lambda clip: torch.stack([each.float() for each in ensemble.scores(clip)], dim=1))
        return found.swapaxes(0, 1)

    @torch.inference_mode()
    def _computed(self, clips: SkeletonSet, compute: Any) -> Any:
        if (clips.joints, clips.dim) != self.shape:
            raise DataError(
                f"the clips have {clips.joints} joints of {clips.dim} coordinates, the network was trained on "
                f"{self.shape[0]} of {self.shape[1]}"
            )
        device = next(self.network.parameters()).device
        self.network.eval()
        loader: DataLoader[Any] = DataLoader(ClipDataset(clips, self.preparation()), batch_size=64)
        return np.concatenate([compute(batch["clip"].to(device)).cpu().numpy() for batch in loader])

    def quality(self) -> dict[str, float]:
        """Accuracy and its relatives on the test clips."""
        from convatlas.recognition.skeleton_reports import quality

        clips = self._held_out(None)
        return quality(clips, self.probabilities(clips))

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Random clips."""
        device = next(self.network.parameters()).device
        return tuple(tensor.to(device) for tensor in self.network.example_inputs(batch))

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test clips, or on other labelled ones.

        Args:
            data: labelled clips in any form that training reads; their classes must be known to the network.
            folder: where to write the report and ``predictions.csv``.

        Raises:
            DataError: the data cannot be read, or have classes that the network does not know.
        """
        from convatlas.recognition.skeleton_reports import evaluation_report, write_predictions

        clips = self._held_out(data)
        found = self.probabilities(clips)
        report = evaluation_report(self, clips, found)
        if folder is not None:
            write_predictions(Path(folder) / "predictions.csv", clips, found, self.classes)
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> SkeletonSet:
        if data is None:
            if not self.splits:
                splits = self._split(read_skeletons(self.data, skip=self.skip, seed=self.split_seed))
                if _digest(splits) != self.data_digest:
                    raise DataError(
                        f"the clips of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the clips to evaluate on by --data"
                    )
                self.splits = splits
            return self.splits["test"]
        sets = read_skeletons(data, skip=self.skip, seed=self.split_seed)
        clips = next(sets[name] for name in ("test", "val", "all", "train") if name in sets)
        if (clips.labels < 0).any():
            raise DataError(f"{data} has clips without labels")
        return clips.with_classes(self.classes)

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Name what each clip shows; writes ``predictions.csv`` and a page with pictures.

        Args:
            inputs: ``.skeleton`` files, folders of them, or ``.npz`` files.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.recognition.skeleton_reports import prediction_report, write_predictions

        read = [clips for source in inputs for clips in read_skeletons(source, skip=self.skip).values()]
        if not read:
            raise DataError("inputs must be .skeleton or .npz files, got none")
        unlabelled = [SkeletonSet(s.clips, np.full(len(s), -1), (), s.names, s.skipped) for s in read]
        found = np.concatenate([self.probabilities(clips) for clips in unlabelled])
        clips = SkeletonSet(
            [clip for each in unlabelled for clip in each.clips],
            np.full(len(found), -1),
            (),
            tuple(name for each in unlabelled for name in each.names),
            tuple(entry for each in unlabelled for entry in each.skipped),
        )
        tell_skipped(Skipped(name, reason) for name, reason in clips.skipped)
        write_predictions(Path(folder) / "predictions.csv", clips, found, self.classes)
        report = prediction_report(self, clips, found)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Quality on the test clips, mistakes, curves and cost; of the ensemble what each subset of it reaches."""
        from convatlas.recognition.skeleton_reports import ensemble_report, training_report

        return ensemble_report(self, run) if self.is_ensemble else training_report(self, run)

    # Files

    def described(self) -> dict[str, Any]:
        """Classes and joints of the network, and what tells the clips of the training."""
        return {
            "classes": list(self.classes),
            "shape": list(self.shape),
            "fusion_weights": list(self.fusion_weights),
            "data_digest": self.data_digest,
        }

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.classes, self.data_digest = tuple(described["classes"]), str(described["data_digest"])
        self.shape = (int(described["shape"][0]), int(described["shape"][1]))
        self.fusion_weights = tuple(described["fusion_weights"])
        self.network = self._build()


def _digest(splits: Mapping[str, SkeletonSet]) -> str:
    """A short text that tells whether clips were split in the same way."""
    digest = hashlib.sha256()
    for name, clips in splits.items():
        digest.update(f"{name} {len(clips)}\n".encode())
        for clip, label in zip(clips.names, clips.labels, strict=True):
            digest.update(f"{clips.classes[label]}/{clip}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
