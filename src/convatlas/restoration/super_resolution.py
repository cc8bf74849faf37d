"""The super-resolution task: enlarge images and clips by a network that learned it from examples."""

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
from convatlas.data.video import is_video_name, read_video
from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import DenoiserConfig, Upscaler, UpscalerConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.report import Report
from convatlas.restoration.evaluation import (
    ClipQuality,
    Measured,
    mean_quality,
    measure_clip,
    measure_image,
    write_qualities,
)
from convatlas.restoration.metrics import MeanLumaPSNR, MeanSquaredError
from convatlas.restoration.patches import LearningPair, PatchSet, Shelf, WholeSet, learning_pair
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.sets import collate, digest, train_val_test
from convatlas.restoration.upscaling import in_tiles
from convatlas.robustness.screening import Screen, Screening
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["SuperResolution"]


@dataclass(kw_only=True, eq=False)
class SuperResolution(GradientTask):
    """Train a network to enlarge images.

    Attributes:
        data: a folder of images of any size (or ``train``, ``val``, ``test`` with those), of pairs of low and high
            resolution, or of clips; a clip; an HDF5 or ``.npz`` file with ``lr`` and ``hr``; or ``photographs`` for
            some of scikit-image. Without low resolution it is made by the protocol.
        model: name of the network, which says how many times images are enlarged; ``convatlas list --models``.
        options: fields of the network's config to change, e.g. ``{"scale": 5}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        colour: what the network works on: ``y`` for luma, while chroma is enlarged by bicubic interpolation, or
            ``rgb``.
        protocol: what low resolution is, and how the quality is measured.
        camouflage: whether images that look crafted to become others when they are resized are looked for.
        patch_size: side of the squares that are learned from, in pixels of low resolution.
        patch_stride: distance of these squares in an image.
        turn: whether they are turned and mirrored at random.
        frames_per_clip: of a clip so many frames are learned from, evenly spread.
        val_fraction: share of the training images held out to choose the best epoch, where the data have no split.
        test_fraction: share of all images held out to measure the quality, where the data have no split.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "super-resolution"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_psnr", "max")
    #: Small batches: the networks are small, and steps are what they need.
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "lr": 3e-3, "weight_decay": 0.0, "warmup_epochs": 0.0}

    data: str = "photographs"
    model: str = "espcn_x3"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    colour: Literal["y", "rgb"] = "y"
    protocol: Protocol = field(default_factory=Protocol)
    camouflage: Screening = field(default_factory=Screening)
    patch_size: int = 17
    patch_stride: int = 13
    turn: bool = False
    frames_per_clip: int = 32
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: Upscaler = field(init=False, repr=False)
    splits: dict[str, Pairs] = field(init=False, default_factory=dict)
    screen: Screen = field(init=False, repr=False, default_factory=Screen)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, UpscalerConfig) or isinstance(config, DenoiserConfig):
            raise Unsupported(f"{self.model} is not a network for super-resolution")
        if config.spatial_dims != 2:
            raise Unsupported(f"{self.model} enlarges volumes: take the task volume-super-resolution")
        if "in_channels" in self.options:
            raise ValueError("options must not hold in_channels: it follows from colour")
        if self.colour not in ("y", "rgb"):
            raise ValueError(f"colour must be 'y' or 'rgb', got {self.colour!r}")
        for name in ("patch_size", "patch_stride", "frames_per_clip"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def scale(self) -> int:
        """How many times images are enlarged."""
        return self._config().scale

    def _config(self) -> UpscalerConfig:
        config = model_config(self.model, **self.options, in_channels=1 if self.colour == "y" else 3)
        return cast(UpscalerConfig, config)

    # Data and network

    def prepare(self) -> None:
        """Read and split the images, cut them into patches and build the network.

        Raises:
            DataError: the data cannot be read or are too few or too small.
            CheckpointError: ``weights`` do not fit.
        """
        self.network = self._config().build()
        if self.weights is not None:
            self._start_from(self.weights)
        self.splits = self._screened(self._split(self._read(self.data)))
        self.data_digest = digest(self.splits)
        self.unreadable = {each.path: each.reason for pairs in self.splits.values() for each in pairs.skipped}
        shelf = Shelf()
        train, val = (self._learning_pairs(self.splits[name], shelf) for name in ("train", "val"))
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
        self.train_set: PatchSet = PatchSet(train, self.scale, self.patch_size, self.patch_stride, self.turn)
        self.val_set: WholeSet = WholeSet(val)
        if not len(self.train_set) or not val:
            side = self.scale * self.patch_size
            raise DataError(f"{self.data} has too few images: training needs some of at least {side} x {side} pixels")

    def _read(self, data: str | Path) -> dict[str, Pairs]:
        frames = self.network.frames
        return read_pairs(data, scale=self.scale, frames=frames, frames_per_clip=self.frames_per_clip)

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
                    pair = learning_pair(
                        entry.read(), self.protocol, scale=self.scale, channels=self.network.in_channels
                    )
                    found.append(LearningPair(shelf.keep(pair.low), shelf.keep(pair.high)))
                except (Unreadable, ValueError) as error:
                    self.unreadable[entry.name] = error.reason if isinstance(error, Unreadable) else str(error)
                advance()
        return found

    def _start_from(self, source: str) -> None:
        report = load_weights(self.network, published_source(self.model) if source == "published" else source)
        self.started_from = f"{source}: {report.summary()}"

    # Training

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Any]]:
        """Stack patches; whole images, which differ in size, stay a list."""
        return collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean squared error of the enlarged patches (paper, equation 7)."""
        result, truth = self.network(batch["low"]).float(), batch["high"]
        return {"loss": F.mse_loss(result, truth), "result": result, "truth": truth}

    def metrics(self) -> nn.Module:
        """PSNR of luma and mean squared error of whole validation images."""
        is_luma = self.network.in_channels == 1
        return MetricCollection(
            {
                "val_psnr": MeanLumaPSNR(self.protocol, self.scale, is_luma=is_luma),
                "val_loss": MeanSquaredError(),
            }
        )

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with whole images."""
        for low, high in zip(batch["low"], batch["high"], strict=True):
            metrics.update(in_tiles(self.network, low[None])[0].float(), high)

    # Use

    def measure(self, pairs: Pairs, protocol: Protocol | None = None) -> tuple[list[Measured], list[Skipped]]:
        """Enlarge the images of a set and compare them with the truth.

        Args:
            pairs: the images.
            protocol: another one than the task's own.

        Returns:
            What was measured, and the images that could not be.

        Raises:
            DataError: no image can be measured.
        """
        measured, skipped = [], list(pairs.skipped)
        with progress("measuring", len(pairs)) as advance:
            for entry in pairs.entries:
                try:
                    sample = entry.read()
                    measured.append(measure_image(self.network, entry.name, sample, protocol or self.protocol))
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
        measured, _ = self.measure(self._held_out(None))
        psnr, ssim = mean_quality(each.network for each in measured)
        return {"PSNR [dB]": psnr, "SSIM": ssim}

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test images, or on others, or on every frame of a clip.

        Args:
            data: images in any form that training reads, or a clip.
            folder: where to write the report and ``quality.csv``.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.restoration.super_resolution_reports import clip_report, evaluation_report

        if data is not None and is_video_name(data):
            report = clip_report(self, Path(data), self.measure_clip(data))
        else:
            pairs = self._held_out(data)
            measured, skipped = self.measure(pairs)
            tell_skipped(skipped)
            report = self.screen.noted(evaluation_report(self, pairs, measured, skipped))
            if folder is not None:
                write_qualities(Path(folder) / "quality.csv", measured)
        if folder is not None:
            report.save(folder)
        return report

    def measure_clip(self, path: str | Path) -> ClipQuality:
        """Shrink and enlarge every frame of a clip and compare.

        Raises:
            DataError: the clip cannot be read.
        """
        video = read_video(path)
        with progress("measuring", video.count) as advance:
            return measure_clip(self.network, video, self.protocol, show=video.count // 2, advance=advance)

    def _held_out(self, data: str | Path | None) -> Pairs:
        if data is None:
            if not self.splits:
                splits = self._split(self._read(self.data))
                if digest(splits) != self.data_digest:
                    raise DataError(
                        f"the images of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the images to evaluate on by --data"
                    )
                self.splits = self._screened(splits)
            return self.splits["test"]
        sets = self._screened(self._read(data))
        return next(sets[name] for name in ("test", "val", "all", "train") if name in sets)

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Enlarge images and clips; writes them with the scale (``_x3``) behind their names, and a page with squares.

        Images keep depth, transparency and colour profile: JPEG stays JPEG, all others become PNG. Clips become H.264
        and keep their sound.

        Args:
            inputs: image files, clips, or folders of them.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.restoration.super_resolution_files import enlarge_files
        from convatlas.restoration.super_resolution_reports import prediction_report

        self.screen = Screen(self.camouflage)
        done, skipped = enlarge_files(self.network, self.protocol, inputs, Path(folder), self.screen.check)
        tell_skipped(skipped)
        report = self.screen.noted(prediction_report(self, done, skipped))
        report.save(folder)
        self.exit_code = self.screen.exit_code
        return report

    def report(self, run: Run) -> Report:
        """Curves, quality on the test images beside bicubic interpolation, pictures and cost of a finished run."""
        from convatlas.restoration.super_resolution_reports import training_report

        return self.screen.noted(training_report(self, run))

    @classmethod
    def compare(cls, tasks: Mapping[str, "SuperResolution"], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks that were trained on the same images: quality, parameters, operations, time.

        Raises:
            ValueError: the networks enlarge by different factors.
        """
        from convatlas.restoration.super_resolution_reports import comparison_report

        return comparison_report(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """What tells the images of the training."""
        return {"data_digest": self.data_digest}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.data_digest = str(described["data_digest"])
        self.network = self._config().build()
