"""The recognition task: one class for each image, volume or short video."""

# No postponed annotations here: the command line is built from the real types of the fields.

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convatlas.catalog import LAYERS
from convatlas.data.dataset import Augmented, ImageDataset, Views, collate
from convatlas.data.image_files import IMAGES, FileKind
from convatlas.data.images import ImageSet, Skipped, Unreadable, check_trainable, read_images, stratified_split
from convatlas.data.mixing import mix, smooth_targets
from convatlas.data.transforms import Augment, Preprocess
from convatlas.data.volume_transforms import VolumeAugment, VolumePreprocess
from convatlas.data.volumes import CLIP_SUFFIXES, VolumeReading, volume_files
from convatlas.errors import DataError, Unsupported, unknown
from convatlas.networks.base import Backbone, BackboneConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.recognition.class_scores import balanced_weights
from convatlas.recognition.predictions import Predictions, joined
from convatlas.report import Report
from convatlas.robustness.screening import Screen, Screening
from convatlas.training.left_out import tell_skipped
from convatlas.training.run import Run, from_mapping, to_mapping
from convatlas.training.settings import Training
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Recognition"]

_NOT_OPTIONS = {
    "num_classes": "it follows from the data",
    "in_channels": "it follows from the images; convert them by channels",
    "preprocess": "it follows from the network and image_size or volume_size",
}
_FAILED = "could be opened at first, but not read later"


@dataclass(kw_only=True, eq=False)
class Recognition(GradientTask):
    """Train a network to name what an image, a volume or a short video shows.

    Attributes:
        data: a folder with one subfolder a class (or train/, val/, test/ with those), an ``.npz`` file, a folder of
            MNIST-format idx files, or ``digits`` for scikit-learn's handwritten digits. A network for volumes takes
            NIfTI, ``.npy`` and video files instead of images.
        model: name of the network; ``convatlas list --models`` shows them.
        options: fields of the network's config to change, e.g. ``{"depths": [1, 1, 2, 1]}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, ``published``, or the folder
            of a run, such as one of ``convatlas pretrain``; a classifier for other classes is left out.
        layer: name of a layer of the library to put wherever it belongs in the network, e.g. ``eca`` or
            ``hypercomplex``; the weights that the network starts from are loaded before.
        layer_options: of this layer, e.g. ``{"kernel_size": 5}``.
        image_size: side of the square the network sees, in pixels; chosen from the images when left out.
        volume_size: depth, height and width that a network for volumes sees; the published ones when left out.
        channels: 1 (grey) or 3 (RGB) to convert the images; as they are when left out.
        volumes: how the files of volumes and videos are read.
        camouflage: whether images that look crafted to become others when they are resized are looked for.
        mean: of the normalisation, for each channel; that of the published weights when left out.
        std: of the normalisation, in the same way.
        augment: random changes of the training images.
        volume_augment: random changes of the training volumes.
        loss: ``cross_entropy`` of the classes, or ``binary``: the mean cross-entropy of a yes or no to each class.
        class_weights: whether the loss counts a class the more, the fewer samples it has: N / (K N_c) for N_c of
            N samples in one of K classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        mix_switch: probability of CutMix where both are on.
        label_smoothing: share of the target spread over all classes.
        test_augmentations: how many random augmentations of an image evaluation and prediction average the class
            probabilities of (test-time augmentation); 0 takes the image as it is, once.
        val_fraction: share of the training images held out to choose the best epoch, where the data have no split.
        test_fraction: share of all images held out to measure the quality, where the data have no split.
        split_seed: of the random split.
        folds: at least 2 to train so many times, each time with another part of the training images held out to
            choose the best epoch (cross-validation); every fold is a run of its own in the folder of the run.
        fold: which of them this run is, from 1; 0 for all.
    """

    name: ClassVar[str] = "recognition"
    smaller_is_better: ClassVar[tuple[str, ...]] = ("cross-entropy [nats]",)
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_accuracy", "max")

    data: str = "digits"
    model: str = "inceptionnext_atto"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    layer: str = ""
    layer_options: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    volume_size: tuple[int, int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    volumes: VolumeReading = field(default_factory=VolumeReading)
    camouflage: Screening = field(default_factory=Screening)
    augment: Augment = field(default_factory=Augment)
    volume_augment: VolumeAugment = field(default_factory=VolumeAugment)
    loss: Literal["cross_entropy", "binary"] = "cross_entropy"
    class_weights: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.0
    test_augmentations: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    folds: int = 1
    fold: int = 0

    network: Backbone = field(init=False, repr=False)
    classes: tuple[str, ...] = field(init=False, default=())
    preprocess: Preprocess | VolumePreprocess = field(init=False, default_factory=Preprocess)
    splits: dict[str, ImageSet] = field(init=False, default_factory=dict)
    screen: Screen = field(init=False, repr=False, default_factory=Screen)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, BackboneConfig):
            raise Unsupported(f"{self.model} is not a network for images")
        for name, instead in _NOT_OPTIONS.items():
            if name in self.options:
                raise ValueError(f"options must not hold {name}: {instead}")
        if self.layer not in ("", *LAYERS):
            raise unknown("layer", self.layer, LAYERS)
        if self.layer_options and not self.layer:
            raise ValueError(f"layer_options need a layer, got {self.layer_options}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), or left out, got {self.channels}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        given, other = ("image_size", self.image_size) if self.takes_volumes else ("volume_size", self.volume_size)
        if other is not None:
            kind = "volumes" if self.takes_volumes else "images"
            raise ValueError(f"{given} must be left out for {self.model}, which is a network for {kind}, got {other}")
        if self.camouflage.thresholds is not None and self.takes_volumes:
            raise ValueError(f"camouflage.thresholds must be left out for {self.model}, which is a network for volumes")
        if self.folds < 1 or not 0 <= self.fold <= self.folds or (self.folds == 1 and self.fold):
            raise ValueError(f"fold must be from 0 to folds, and folds at least 1, got {self.fold} and {self.folds}")
        if not 0 <= self.mix_switch <= 1:
            raise ValueError(f"mix_switch must be from 0 to 1, got {self.mix_switch}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.loss not in ("cross_entropy", "binary"):
            raise unknown("loss", self.loss, ("cross_entropy", "binary"))
        if self.test_augmentations < 0:
            raise ValueError(f"test_augmentations must not be negative, got {self.test_augmentations}")
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"mixup and cutmix must not be negative, got {self.mixup} and {self.cutmix}")

    @property
    def takes_volumes(self) -> bool:
        """Whether the network takes volumes or videos (B, C, D, H, W)."""
        config: Any = model_config(self.model, **self.options)
        return isinstance(config.preprocess, VolumePreprocess)

    @property
    def files(self) -> FileKind:
        """The kind of files that the network is for."""
        return volume_files(self.volumes) if self.takes_volumes else IMAGES

    # Data and network

    def _read(
        self, source: str | Path | Sequence[str | Path], channels: int | None, *, labelled: bool = True
    ) -> dict[str, ImageSet]:
        return read_images(source, channels=channels, labelled=labelled, kind=self.files)

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Train as every gradient-trained task does, or, with ``folds``, once for each fold."""
        if self.folds > 1 and self.fold == 0:
            from convatlas.recognition.cross_validation import cross_validate

            if training is not None and (training.devices != 1 or training.nodes != 1):
                raise ValueError(
                    f"folds are trained one after the other on one device, got devices {training.devices} and nodes "
                    f"{training.nodes}: train a single fold by fold"
                )
            return cross_validate(self, run, training or Training(), resume=resume)
        return super().fit(run, training, resume=resume)

    def prepare(self) -> None:
        """Read and split the data, choose the preprocessing and build the network.

        Raises:
            DataError: the data cannot be read or cannot be used for training.
            CheckpointError: ``weights`` do not fit.
        """
        splits = self._split(self._read(self.data, self.channels))
        self.data_digest = _digest(splits)
        self.splits = self._screened(splits)
        self.unreadable = {each.path: each.reason for images in self.splits.values() for each in images.skipped}
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
        train = self.splits["train"]
        check_trainable(train)
        self.classes = train.classes
        config = model_config(self.model, **self.options)
        self.preprocess = self._choose_preprocess(train, config)
        self.network = self._build(train.channels)
        self._check_size()
        if self.weights is not None:
            self._start_from(self.weights)
        self.train_set = ImageDataset(train, self._augmented())
        self.val_set = ImageDataset(self.splits["val"], self.preprocess)

    def _augmented(self) -> Augmented:
        return Augmented(self.volume_augment if self.takes_volumes else self.augment, self.preprocess)

    def _check_size(self) -> None:
        """Refuse a size that the network cannot take, before the first batch does."""
        if self.takes_volumes:
            with torch.device("meta"):
                probe = model_config(self.model, **self._fixed_options(self.network.in_channels)).build().eval()
                probe(torch.empty(1, self.network.in_channels, *self.preprocess.shape))
            return
        stride = self.network.feature_info[-1].stride
        if min(self.preprocess.shape) < stride:
            raise ValueError(f"image_size must be at least {stride} for {self.model}, got {min(self.preprocess.shape)}")

    def _split(self, sets: dict[str, ImageSet]) -> dict[str, ImageSet]:
        held_out = {"test": self.test_fraction, "val": (1 - self.test_fraction) * self.val_fraction}
        if "all" in sets and self.fold:
            check_trainable(sets["all"])
            sets = self._stratified(sets["all"], {"train": 1 - self.test_fraction, "test": self.test_fraction})
        if "all" in sets:
            check_trainable(sets["all"])
            return self._stratified(sets["all"], {"train": 1 - sum(held_out.values()), **held_out})
        if "train" not in sets:
            raise DataError(f"{self.data} has no train folder, only {', '.join(sets)}")
        if self.fold:
            sets = {**sets, **self._folded(sets["train"])}
        elif "val" not in sets:
            fractions = {"train": 1 - self.val_fraction, "val": self.val_fraction}
            sets = {**sets, **self._stratified(sets["train"], fractions)}
        classes = sets["train"].classes
        sets = {name: images.with_classes(classes) for name, images in sets.items()}
        return {**sets, "test": sets.get("test", sets["val"])}

    def _stratified(self, images: ImageSet, fractions: Mapping[str, float]) -> dict[str, ImageSet]:
        try:
            return stratified_split(images, fractions, self.split_seed)
        except DataError as error:
            raise DataError(f"{error}; raise val_fraction or test_fraction, or give more images") from None

    def _folded(self, train: ImageSet) -> dict[str, ImageSet]:
        from sklearn.model_selection import StratifiedKFold

        if int(train.counts.min()) < self.folds:
            raise DataError(f"{self.folds} folds need as many training samples of each class, got {train.counts.min()}")
        parts = StratifiedKFold(self.folds, shuffle=True, random_state=self.split_seed).split(
            train.labels, train.labels
        )
        rest, held_out = list(parts)[self.fold - 1]
        return {"train": train.subset(rest), "val": train.subset(held_out)}

    def _choose_preprocess(self, train: ImageSet, config: Any) -> Preprocess | VolumePreprocess:
        published = config.preprocess
        if isinstance(published, VolumePreprocess):
            videos = all(name.lower().endswith(tuple(CLIP_SUFFIXES)) for name in train.names)
            chosen: dict[str, Any] = {"depth": "sample" if videos else "resize"}
            chosen |= self._normalisation(train, published.mean)
            if self.volume_size is not None:
                chosen["size"] = self.volume_size
            return dataclasses.replace(published, **chosen)
        size = self.image_size
        if size is None:
            rows = np.linspace(0, len(train) - 1, min(len(train), 64)).astype(int)
            sides = [min(shape) for row in rows if (shape := _shape(train, int(row)))]
            size = int(np.clip(np.median(sides or [0]), 32, max(published.shape)))
        crop = published.crop if size == max(published.shape) else 1.0
        normalisation = self._normalisation(train, published.mean)
        return dataclasses.replace(published, size=size, crop=crop, **normalisation)

    def _normalisation(self, train: ImageSet, published: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
        """What differs from the published normalisation."""
        fits = train.channels in (1, len(published))
        values = {} if fits else {"mean": (0.5,), "std": (0.25,)}
        asked = {name: value for name in ("mean", "std") if (value := getattr(self, name)) is not None}
        if train.channels > 1 and any(len(value) not in (1, train.channels) for value in asked.values()):
            raise ValueError(f"mean and std need one value, or one for each of {train.channels} channels, got {asked}")
        return {**values, **asked}

    def _build(self, channels: int) -> Backbone:
        return cast(Backbone, model_config(self.model, **self._fixed_options(channels)).build())

    def _fixed_options(self, channels: int) -> dict[str, Any]:
        fixed = {"num_classes": len(self.classes), "in_channels": channels, "preprocess": self.preprocess}
        return {**self.options, **fixed}

    def _start_from(self, source: str) -> None:
        origin: str | Path = published_source(self.model) if source == "published" else source
        if Path(source).is_dir():
            origin = Run.open(source).best
        report = load_weights(self.network, origin, optional=self._head_keys())
        self.started_from = f"{source}: {report.summary()}"

    def _head_keys(self) -> set[str]:
        """Weights that a network trained without labels lacks."""
        with torch.device("meta"):
            options = {**self._fixed_options(self.network.in_channels), "num_classes": 0}
            headless = model_config(self.model, **options).build().state_dict()
        behind = tuple(f"{name}." for name in self.network.head_modules)
        return {key for key in self.network.state_dict() if key not in headless or key.startswith(behind)}

    # Training

    @property
    def collate(self) -> Any:
        """Stack the readable samples of a batch."""
        return collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss with the mixed and smoothed targets; its mean where a network has several heads in training."""
        self._note(batch)
        images, labels = batch["image"], batch["label"]
        if len(images) < 2 and batch["unreadable"]:  # batch normalisation cannot learn from the one that is left
            return {}
        if self.mixup or self.cutmix:
            images, targets = mix(
                images,
                labels,
                len(self.classes),
                mixup=self.mixup,
                cutmix=self.cutmix,
                switch_prob=self.mix_switch,
                label_smoothing=self.label_smoothing,
            )
        else:
            targets = smooth_targets(labels, len(self.classes), self.label_smoothing)
        scores = self.network(images)
        heads = scores if isinstance(scores, tuple) else (scores,)
        weight = self._class_weights(images.device)
        if self.loss == "binary":
            losses = [F.binary_cross_entropy_with_logits(each.float(), targets.float(), weight) for each in heads]
        else:
            losses = [F.cross_entropy(each.float(), targets, weight=weight) for each in heads]
        return {"loss": torch.stack(losses).mean()}

    def _class_weights(self, device: torch.device) -> Tensor | None:
        if not self.class_weights:
            return None
        counts = self.splits["train"].counts
        return balanced_weights(torch.from_numpy(counts)).to(device, torch.float32)

    def metrics(self) -> nn.Module:
        """Loss, accuracy and macro F1 of the validation images."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        from convatlas.recognition.metrics import CrossEntropy

        count = len(self.classes)
        return MetricCollection(
            {
                "val_loss": CrossEntropy(),
                "val_accuracy": MulticlassAccuracy(count, average="micro"),
                "val_f1": MulticlassF1Score(count, average="macro"),
            }
        )

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch of validation images."""
        self._note(batch)
        if len(batch["image"]):
            metrics.update(self.network(batch["image"]).float(), batch["label"])

    def _note(self, batch: dict[str, Any]) -> None:
        self.unreadable.update(dict.fromkeys(batch["unreadable"], _FAILED))

    # Use

    @torch.inference_mode()
    def probabilities(self, images: ImageSet, *, batch_size: int = 64) -> Predictions:
        """Class probabilities of a set of images; files that fail are left out and listed.

        Raises:
            DataError: the images have other channels than the network, or none can be read.
        """
        from rich.console import Console
        from rich.progress import track

        if images.channels != self.network.in_channels:
            raise DataError(
                f"the images have {images.channels} channels, the network was trained on {self.network.in_channels}"
            )
        device = next(self.network.parameters()).device
        self.network.eval()
        count = self.test_augmentations or 1
        views = Views(self._augmented(), count) if self.test_augmentations else self.preprocess
        loader: DataLoader[Any] = DataLoader(
            ImageDataset(images, views), batch_size=-(-batch_size // count), collate_fn=collate
        )
        rows, indices, failed = [], [], list(images.skipped)
        shown = track(loader, "reading", console=Console(stderr=True), disable=len(loader) < 20, transient=True)
        for batch in shown:
            failed += [Skipped(name, _FAILED) for name in batch["unreadable"]]
            if len(batch["image"]):
                seen = batch["image"].flatten(0, 1) if self.test_augmentations else batch["image"]
                found = self.network(seen.to(device)).float().softmax(1)
                rows.append(found.unflatten(0, (-1, count)).mean(1).cpu().numpy())
                indices.append(batch["index"].numpy())
        if not rows:
            raise DataError("none of the images can be read")
        kept = images.subset(np.concatenate(indices))
        return Predictions(kept, np.concatenate(rows), self.classes, tuple(dict.fromkeys(failed)))

    def quality(self) -> dict[str, float]:
        """Accuracy and its relatives on the test images."""
        from convatlas.recognition.reports import quality

        return quality(self.probabilities(self._held_out(None)))

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test images, or on other labelled ones.

        Args:
            data: labelled images in any form that training reads; their classes must be known to the network.
            folder: where to write the report and ``predictions.csv``.

        Raises:
            DataError: the data cannot be read, or have classes that the network does not know.
        """
        from convatlas.recognition.reports import evaluation_report

        predictions = self.probabilities(self._held_out(data))
        tell_skipped(predictions.skipped)
        report = self.screen.noted(evaluation_report(self, predictions))
        if folder is not None:
            predictions.write_csv(Path(folder) / "predictions.csv")
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> ImageSet:
        if data is None:
            if not self.splits:
                splits = self._split(self._read(self.data, self._channels()))
                if _digest(splits) != self.data_digest:
                    raise DataError(
                        f"the images of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the images to evaluate on by --data"
                    )
                self.splits = {**splits, **self._screened({"test": splits["test"]})}
            return self.splits["test"].with_classes(self.classes)
        sets = self._read(data, self._channels())
        name = next(name for name in ("test", "val", "all", "train") if name in sets)
        return self._screened({name: sets[name]})[name].with_classes(self.classes)

    def _screened(self, sets: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
        self.screen = Screen(self.camouflage)
        return self.screen.sets(sets)

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Name what each image shows; writes ``predictions.csv`` and a page with the pictures.

        Args:
            inputs: image files, folders of images or ``.npz`` files.
            folder: where to write.

        Raises:
            DataError: no image can be read.
        """
        from convatlas.recognition.reports import prediction_report

        sets = self._screened(self._read(list(inputs), self._channels(), labelled=False))
        predictions = self.probabilities(joined(list(sets.values())))
        tell_skipped(predictions.skipped)
        predictions.write_csv(Path(folder) / "predictions.csv")
        report = self.screen.noted(prediction_report(self, predictions))
        report.save(folder)
        self.exit_code = self.screen.exit_code
        return report

    def _channels(self) -> int | None:
        channels = self.network.in_channels
        return channels if channels in (1, 3) else None

    def report(self, run: Run) -> Report:
        """Curves, quality on the test images, worst mistakes and cost of a finished run; writes sample pictures."""
        from convatlas.recognition.reports import training_report

        return self.screen.noted(training_report(self, run))

    @classmethod
    def compare(cls, tasks: Mapping[str, "Recognition"], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks that were trained on the same images."""
        from convatlas.recognition.reports import comparison_report

        return comparison_report(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """Classes, channels and preprocessing of the network, and what tells the images of the training."""
        return {
            "classes": list(self.classes),
            "channels": self.network.in_channels,
            "preprocess": to_mapping(self.preprocess),
            "data_digest": self.data_digest,
        }

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.classes = tuple(described["classes"])
        kind: Any = VolumePreprocess if self.takes_volumes else Preprocess
        self.preprocess = from_mapping(kind, described["preprocess"])
        self.data_digest = str(described["data_digest"])
        self.network = self._build(int(described["channels"]))


def _shape(images: ImageSet, row: int) -> tuple[int, ...]:
    try:
        return images.image(row).shape[:2]
    except Unreadable:  # the epoch that needs it leaves it out
        return ()


def _digest(splits: Mapping[str, ImageSet]) -> str:
    """A short text that tells whether images were split in the same way."""
    digest = hashlib.sha256()
    for name, images in splits.items():
        digest.update(f"{name} {len(images)}\n".encode())
        for image, label in zip(images.names, images.labels, strict=True):
            digest.update(f"{images.classes[label]}/{image}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
