"""The denoising task: clean images by a network that learned it from examples."""

# No postponed annotations here: the command line is built from the real types of the fields.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from convatlas.data.image_pairs import Pairs, read_pairs
from convatlas.data.images import Skipped, Unreadable
from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import Denoiser, DenoiserConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.report import Report
from convatlas.restoration.denoising_evaluation import (
    Cleaned,
    Noise,
    NoisySet,
    clean_pair,
    means,
    measure_cleaned,
    write_cleaned,
)
from convatlas.restoration.metrics import MeanPSNR, MeanSquaredError
from convatlas.restoration.patches import LearningPair, PatchSet, Shelf, WholeSet
from convatlas.restoration.sets import collate, digest, train_val_test
from convatlas.restoration.upscaling import in_tiles
from convatlas.robustness.screening import Screen, Screening
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Denoising"]


@dataclass(kw_only=True, eq=False)
class Denoising(GradientTask):
    """Train a network to take the noise away from images.

    Attributes:
        data: a folder of clean images of any size (or ``train``, ``val``, ``test`` with those), to which noise is
            added; a folder of pairs, the noisy ones under ``LR`` (``low``, ``input``) and the clean ones under ``HR``
            (``GT``, ``target``); an HDF5 or ``.npz`` file with ``lr`` and ``hr``; or ``photographs`` for some of
            scikit-image.
        model: name of the network; ``convatlas list --models``.
        options: fields of the network's config to change, e.g. ``{"depth": 20}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        colour: what the network works on: ``grey``, or ``rgb``.
        noise: what is added to clean images.
        loss: ``mse``, ``l1``, or ``psnr`` (the logarithm of the mean squared error of each patch).
        camouflage: whether images that look crafted to become others when they are resized are looked for.
        patch_size: side of the squares that are learned from, in pixels.
        patch_stride: distance of these squares in an image.
        turn: whether they are turned and mirrored at random.
        val_fraction: share of the training images held out to choose the best epoch, where the data have no split.
        test_fraction: share of all images held out to measure the quality, where the data have no split.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "denoising"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_psnr", "max")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32, "lr": 1e-3, "weight_decay": 0.0, "warmup_epochs": 0.0}

    data: str = "photographs"
    model: str = "dncnn"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    colour: Literal["grey", "rgb"] = "grey"
    noise: Noise = field(default_factory=Noise)
    loss: Literal["mse", "l1", "psnr"] = "mse"
    camouflage: Screening = field(default_factory=Screening)
    patch_size: int = 32
    patch_stride: int = 32
    turn: bool = True
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: Denoiser = field(init=False, repr=False)
    splits: dict[str, Pairs] = field(init=False, default_factory=dict)
    screen: Screen = field(init=False, repr=False, default_factory=Screen)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, DenoiserConfig):
            raise Unsupported(f"{self.model} is not a network for denoising")
        if "in_channels" in self.options:
            raise ValueError("options must not hold in_channels: it follows from colour")
        for name, value, known in (
            ("colour", self.colour, ("grey", "rgb")),
            ("loss", self.loss, ("mse", "l1", "psnr")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("patch_size", "patch_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def scale(self) -> int:
        """1: the image keeps its size."""
        return 1

    def _config(self) -> DenoiserConfig:
        config = model_config(self.model, **self.options, in_channels=1 if self.colour == "grey" else 3)
        return cast(DenoiserConfig, config)

    # Data and network

    def prepare(self) -> None:
        """Read and split the images, cut them into patches and build the network.

        Raises:
            DataError: the data cannot be read or are too few or too small.
            CheckpointError: ``weights`` do not fit.
        """
        self.network = self._config().build()
        if self.weights is not None:
            source = published_source(self.model) if self.weights == "published" else self.weights
            self.started_from = f"{self.weights}: {load_weights(self.network, source).summary()}"
        self.splits = self._screened(self._split(read_pairs(self.data, scale=1)))
        self.data_digest = digest(self.splits)
        self.unreadable = {each.path: each.reason for pairs in self.splits.values() for each in pairs.skipped}
        shelf = Shelf()
        train, val = (self._learning_pairs(self.splits[name], shelf) for name in ("train", "val"))
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
        patches = PatchSet(train, 1, self.patch_size, self.patch_stride, self.turn)
        self.train_set: NoisySet = NoisySet(patches, self.noise, training=True)
        self.val_set: NoisySet = NoisySet(WholeSet(val), self.noise)
        if not len(patches) or not val:
            side = self.patch_size
            raise DataError(f"{self.data} has too few images: training needs some of at least {side} x {side} pixels")

    def _screened(self, sets: Mapping[str, Pairs]) -> dict[str, Pairs]:
        self.screen = Screen(self.camouflage)
        return self.screen.pairs(sets)

    def _split(self, sets: dict[str, Pairs]) -> dict[str, Pairs]:
        return train_val_test(sets, self.val_fraction, self.test_fraction, self.split_seed, self.data)

    def _learning_pairs(self, pairs: Pairs, shelf: Shelf) -> list[LearningPair]:
        found = []
        with progress("reading images", len(pairs)) as advance:
            for entry in pairs.entries:
                try:
                    sample = entry.read()
                    pair = clean_pair(sample, self.network.in_channels)
                    high = shelf.keep(pair.high)
                    found.append(LearningPair(high if sample.low is None else shelf.keep(pair.low), high))
                except (Unreadable, ValueError) as error:
                    self.unreadable[entry.name] = error.reason if isinstance(error, Unreadable) else str(error)
                advance()
        return found

    # Training

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Any]]:
        """Stack patches; whole images, which differ in size, stay a list."""
        return collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The distance of the cleaned patches from the true ones."""
        result, truth = self.network(batch["low"]).float(), batch["high"]
        if self.loss == "l1":
            loss = F.l1_loss(result, truth)
        elif self.loss == "mse":
            loss = F.mse_loss(result, truth)
        else:  # as NAFNet is trained: 10 log10 of the error of each patch; 1e-8 keeps it finite
            loss = 10 * ((result - truth).square().mean((1, 2, 3)) + 1e-8).log10().mean()
        return {"loss": loss, "result": result, "truth": truth}

    def metrics(self) -> nn.Module:
        """PSNR and mean squared error of whole validation images."""
        return MetricCollection({"val_psnr": MeanPSNR(), "val_loss": MeanSquaredError()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with whole images."""
        for low, high in zip(batch["low"], batch["high"], strict=True):
            metrics.update(in_tiles(self.network, low[None])[0].float(), high)

    # Use

    def measure(self, pairs: Pairs) -> tuple[list[Cleaned], list[Skipped]]:
        """Clean the images of a set and compare them with the truth.

        Returns:
            What was measured, and the images that could not be.

        Raises:
            DataError: no image can be measured.
        """
        measured, skipped = [], list(pairs.skipped)
        with progress("measuring", len(pairs)) as advance:
            for entry in pairs.entries:
                try:
                    measured.append(measure_cleaned(self.network, entry.name, entry.read(), self.noise))
                except (Unreadable, ValueError) as error:
                    reason = error.reason if isinstance(error, Unreadable) else str(error)
                    skipped.append(Skipped(entry.name, reason))
                advance()
        if not measured:
            first = skipped[0] if skipped else Skipped("the set", "it is empty")
            raise DataError(f"none of the images can be measured; first: {first.path}: {first.reason}")
        return measured, skipped

    def quality(self) -> dict[str, float]:
        """Mean PSNR and SSIM of the test images."""
        _, network = means(self.measure(self._held_out(None))[0])
        return {"PSNR [dB]": network.psnr, "SSIM": network.ssim}

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test images, or on others.

        Args:
            data: images in any form that training reads.
            folder: where to write the report and ``quality.csv``.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.restoration.denoising_reports import evaluation_report

        measured, skipped = self.measure(self._held_out(data))
        tell_skipped(skipped)
        report = self.screen.noted(evaluation_report(self, measured, skipped))
        if folder is not None:
            write_cleaned(Path(folder) / "quality.csv", measured)
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> Pairs:
        if data is None:
            if not self.splits:
                splits = self._split(read_pairs(self.data, scale=1))
                if digest(splits) != self.data_digest:
                    raise DataError(
                        f"the images of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the images to evaluate on by --data"
                    )
                self.splits = self._screened(splits)
            return self.splits["test"]
        sets = self._screened(read_pairs(data, scale=1))
        return next(sets[name] for name in ("test", "val", "all", "train") if name in sets)

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Clean images; writes them with ``_clean`` behind their names, and a page with squares.

        Images keep depth, transparency and colour profile: JPEG stays JPEG, all others become PNG.

        Args:
            inputs: image files, or folders of them.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.restoration.denoising_reports import clean_files, prediction_report

        self.screen = Screen(self.camouflage)
        done, skipped = clean_files(self.network, inputs, Path(folder), self.screen.check)
        tell_skipped(skipped)
        report = self.screen.noted(prediction_report(self, done, skipped))
        report.save(folder)
        self.exit_code = self.screen.exit_code
        return report

    def report(self, run: Run) -> Report:
        """Curves, quality on the test images before and after, pictures and cost of a finished run."""
        from convatlas.restoration.denoising_reports import training_report

        return self.screen.noted(training_report(self, run))

    @classmethod
    def compare(cls, tasks: Mapping[str, "Denoising"], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks that were trained on the same images: quality, parameters, operations, time.

        Raises:
            ValueError: the networks clean different noise or colours.
        """
        from convatlas.restoration.denoising_reports import comparison_report

        return comparison_report(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """What tells the images of the training."""
        return {"data_digest": self.data_digest}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.data_digest = str(described["data_digest"])
        self.network = self._config().build()
