"""Pre-training: learn from images without labels; recognition goes on from the weights."""

# No postponed annotations here: the command line is built from the real types of the fields.

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.data.dataset import Augmented, ImageDataset, collate
from convatlas.data.images import ImageSet, Skipped, Unreadable, read_images
from convatlas.data.transforms import Augment, Preprocess
from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import Backbone, BackboneConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.report import Report
from convatlas.robustness.screening import Screen, Screening
from convatlas.training.left_out import tell_skipped
from convatlas.training.method import Together
from convatlas.training.run import Run, from_mapping, to_mapping
from convatlas.training.settings import Training
from convatlas.training.spark import SparK
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Pretraining"]

_GO_ON = "pre-training {} nothing: go on with convatlas train recognition --weights RUN"
_FAILED = "could be opened at first, but not read later"


@dataclass(kw_only=True, eq=False)
class Pretraining(GradientTask):
    """Train a convolutional network without labels, by filling in what a mask hides of its images.

    Attributes:
        data: a folder of images, in subfolders or not (of one with train/ those are taken, and val/ where it is there),
            an ``.npz`` file, a folder of MNIST-format idx files, or ``digits``.
        model: name of the network; ``convatlas list --models`` shows them.
        options: fields of the network's config to change, e.g. ``{"drop_path": 0.05}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        image_size: side of the square the network sees, in pixels, a multiple of its total stride; chosen from the
            images when left out.
        channels: 1 (grey) or 3 (RGB) to convert the images; as they are when left out.
        mean: of the normalisation, for each channel; that of the published weights when left out.
        std: of the normalisation, in the same way.
        camouflage: whether images that look crafted to become others when they are resized are looked for.
        augment: random changes of the images.
        val_fraction: share of the images on which the loss is measured to choose the best epoch.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "pretraining"
    verbs: ClassVar[tuple[str, ...]] = ("train",)
    defaults: ClassVar[Mapping[str, Any]] = {"methods": {"spark": {}}}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_loss", "min")

    data: str = "digits"
    model: str = "resnet18"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    image_size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    camouflage: Screening = field(default_factory=Screening)
    augment: Augment = field(default_factory=lambda: Augment(scale=(0.67, 1.0)))
    val_fraction: float = 0.05
    split_seed: int = 0

    network: Backbone = field(init=False, repr=False)
    method: SparK = field(init=False, repr=False)
    preprocess: Preprocess = field(init=False, default_factory=Preprocess)
    splits: dict[str, ImageSet] = field(init=False, default_factory=dict)
    screen: Screen = field(init=False, repr=False, default_factory=Screen)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)
        if not isinstance(config, BackboneConfig) or not isinstance(config.preprocess, Preprocess):
            raise Unsupported(f"{self.model} is not a network for images")
        for name in ("num_classes", "in_channels", "preprocess"):
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), or left out, got {self.channels}")

    # Data and network

    def _make_ready(self, training: Training, method: Together) -> None:
        own = [each for each in method.methods.values() if isinstance(each, SparK)]
        if len(own) != 1 or len(method.methods) != 1:
            raise Unsupported(f"pre-training needs the method spark alone, got {', '.join(method.methods) or 'none'}")
        self.method = own[0]
        super()._make_ready(training, method)
        self.method.grid(torch.empty(1, 1, *self.preprocess.shape))  # refuse a wrong size before the first batch

    def prepare(self) -> None:
        """Read and split the images, choose the preprocessing and build the network without its classifier.

        Raises:
            DataError: the data cannot be read, or there are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self.screen = Screen(self.camouflage)
        self.splits = self.screen.sets(self._read())
        train = self.splits["train"]
        self.unreadable = {each.path: each.reason for images in self.splits.values() for each in images.skipped}
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
        self.preprocess = self._choose_preprocess(train)
        self.network = self._build(train.channels)
        if self.weights is not None:
            source = published_source(self.model) if self.weights == "published" else self.weights
            self.started_from = f"{source}: {load_weights(self.network, source).summary()}"
        self.train_set = ImageDataset(train, Augmented(self.augment, self.preprocess))
        self.val_set = ImageDataset(self.splits["val"], self.preprocess)

    def _read(self) -> dict[str, ImageSet]:
        folders = {name: Path(self.data) / name for name in ("train", "val")}
        if folders["train"].is_dir():
            found = {name: self._images(path) for name, path in folders.items() if path.is_dir()}
        else:
            found = {"train": self._images(self.data)}
        if "val" not in found:
            images = found["train"]
            count = max(1, round(self.val_fraction * len(images)))
            if count >= len(images):
                raise DataError(f"{self.data} holds {len(images)} image, pre-training needs at least 2")
            order = np.random.default_rng(self.split_seed).permutation(len(images))
            found = {"train": images.subset(order[count:]), "val": images.subset(order[:count])}
        return found

    def _images(self, source: str | Path) -> ImageSet:
        sets = read_images(source, channels=self.channels, labelled=False)
        return sets["train"] if "train" in sets else next(iter(sets.values()))

    def _choose_preprocess(self, train: ImageSet) -> Preprocess:
        with torch.device("meta"):
            config: Any = model_config(self.model, **self.options)
            stride = config.build().feature_info[-1].stride
        published: Preprocess = config.preprocess
        chosen: dict[str, Any] = {name: value for name in ("mean", "std") if (value := getattr(self, name)) is not None}
        if train.channels not in (1, len(published.mean)):
            chosen = {"mean": (0.5,), "std": (0.25,), **chosen}
        size = self.image_size
        if size is None:
            rows = np.linspace(0, len(train) - 1, min(len(train), 64)).astype(int)
            side = np.clip(np.median([_side(train, int(row)) for row in rows]), 2 * stride, max(published.shape))
            size = max(2, round(float(side) / stride)) * stride
        return dataclasses.replace(published, size=size, crop=1.0, **chosen)

    def _build(self, channels: int) -> Backbone:
        fixed: dict[str, Any] = {"num_classes": 0, "in_channels": channels, "preprocess": self.preprocess}
        return cast(Backbone, model_config(self.model, **self.options, **fixed).build())

    # Training

    @property
    def collate(self) -> Any:
        """Stack the readable samples of a batch."""
        return collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """None of its own: the method has the loss."""
        return {}

    def metrics(self) -> nn.Module:
        """Mean loss of the hidden cells of the validation images."""
        from torchmetrics import MeanMetric, MetricCollection

        return MetricCollection({"val_loss": MeanMetric()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with the loss of a batch of validation images, each time under the same masks."""
        self.unreadable.update(dict.fromkeys(batch["unreadable"], _FAILED))
        images = batch["image"]
        if len(images):
            metrics.update(self.method(self.network, images, self.fixed_cells(images, int(batch["index"][0]))).loss)

    def fixed_cells(self, images: Tensor, seed: int) -> Tensor:
        """The same visible cells for a batch each time."""
        generator = torch.Generator().manual_seed(seed)
        return self.method.mask(len(images), self.method.grid(images), generator=generator, device=images.device)

    def report(self, run: Run) -> Report:
        """The loss on the way, originals beside masked images and reconstructions, and how to go on."""
        from convatlas.recognition.pretraining_report import pretraining_report

        return self.screen.noted(pretraining_report(self, run))

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Refuse: what was learned shows when recognition goes on with it."""
        raise Unsupported(_GO_ON.format("evaluates"))

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Refuse, as `evaluate` does."""
        raise Unsupported(_GO_ON.format("predicts"))

    # Files

    def described(self) -> dict[str, Any]:
        """Channels and preprocessing of the network."""
        return {"channels": self.network.in_channels, "preprocess": to_mapping(self.preprocess)}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.preprocess = from_mapping(Preprocess, described["preprocess"])
        self.network = self._build(int(described["channels"]))


def _side(images: ImageSet, row: int) -> int:
    try:
        return min(images.image(row).shape[:2])
    except Unreadable:  # the epoch that needs it leaves it out
        return 0
