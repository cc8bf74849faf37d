"""The task of enlarging volumes: MRI and CT at twice the resolution, with the noise taken away where it can be."""

# No postponed annotations here: the command line is built from the real types of the fields.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.volume_sets import Volumes, read_volumes
from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import Upscaler, UpscalerConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.ops.volume_resize import Degradation, is_centred
from convatlas.report import Report
from convatlas.restoration.metrics import MeanPSNR, MeanSquaredError
from convatlas.restoration.sets import collate, digest, train_val_test
from convatlas.restoration.volume_evaluation import (
    MeasuredVolume,
    VolumePair,
    VolumePatches,
    WholeVolumes,
    mean_volume_quality,
    measure_volume,
    volume_pair,
    write_measured,
)
from convatlas.restoration.volume_upscaling import Intensities, Patches, enlarge_scans, super_resolve
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["VolumeSuperResolution"]


@dataclass(kw_only=True, eq=False)
class VolumeSuperResolution(GradientTask):
    """Train a network to enlarge volumes, such as MRI.

    By itself it learns from the mean absolute difference; with the method ``adversarial`` also from a discriminator.

    Attributes:
        data: a folder of volumes (NIfTI, ``.npy``, ``.npz``) of any size, or ``train``, ``val``, ``test`` with those; a
            file of many volumes (N, X, Y, Z); or ``phantoms`` for simulated heads.
        model: name of the network; ``convatlas list --models``.
        options: fields of the network's config to change, e.g. ``{"filters": 16}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        degradation: how low resolution is made: by ``linear`` interpolation, the ``nearest`` voxel or a cropped
            ``kspace``.
        patch_size: side of the cubes that are learned from, in voxels at high resolution.
        patch_stride: distance of these cubes in a volume.
        foreground: share of the voxels of a cube that must not be background.
        flip: whether the cubes are mirrored at random.
        noise: standard deviation of the noise under which the quality is measured a second time, as a share of the
            range of a volume; the training sees none of it.
        patches: how whole volumes are cut to go through the network.
        val_fraction: share of the training volumes held out to choose the best epoch, where the data have no split.
        test_fraction: share of all volumes held out to measure the quality, where the data have no split.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "volume-super-resolution"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_psnr", "max")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 4, "lr": 1e-4, "weight_decay": 0.0, "warmup_epochs": 0.0}
    smaller_is_better: ClassVar[tuple[str, ...]] = ("NRMSE",)

    data: str = "phantoms"
    model: str = "disgan_x2"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    degradation: Degradation = "linear"
    patch_size: int = 64
    patch_stride: int = 16
    foreground: float = 0.1
    flip: bool = False
    noise: float = 0.05
    patches: Patches = field(default_factory=Patches)
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: Upscaler = field(init=False, repr=False)
    splits: dict[str, Volumes] = field(init=False, default_factory=dict)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        scale = self._config().scale  # unknown names are told before any data are read
        is_centred(self.degradation)
        for name in ("patch_size", "patch_stride"):
            if getattr(self, name) < scale or getattr(self, name) % scale:
                raise ValueError(f"{name} must be a positive multiple of {scale}, got {getattr(self, name)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground must be between 0 and 1, got {self.foreground}")
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")

    @property
    def scale(self) -> int:
        """How many times each axis is enlarged."""
        return self._config().scale

    def _config(self) -> UpscalerConfig:
        config = model_config(self.model, **self.options)
        if not isinstance(config, UpscalerConfig) or config.spatial_dims != 3:
            raise Unsupported(f"{self.model} is not a network that enlarges volumes")
        if config.in_channels != 1:
            raise ValueError(f"options must leave in_channels at 1, got {config.in_channels}")
        return config

    def _build(self) -> Upscaler:
        return self._config().build()

    # Data and network

    def prepare(self) -> None:
        """Read and split the volumes, cut them into patches and build the network.

        Raises:
            DataError: the data cannot be read or are too few or too small.
            CheckpointError: ``weights`` do not fit.
        """
        self.network = self._build()
        if self.weights is not None:
            source = published_source(self.model) if self.weights == "published" else self.weights
            self.started_from = f"{self.weights}: {load_weights(self.network, source).summary()}"
        self.splits = self._split(read_volumes(self.data))
        self.data_digest = digest(self.splits)
        self.unreadable = {each.path: each.reason for volumes in self.splits.values() for each in volumes.skipped}
        train, val = (self._pairs(self.splits[name]) for name in ("train", "val"))
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
        self.train_set: VolumePatches = VolumePatches(
            train, self.scale, self.patch_size, self.patch_stride, self.foreground, self.flip
        )
        self.val_set: WholeVolumes = WholeVolumes(val)
        if not len(self.train_set) or not val:
            left_out = "".join(f"; {name} was left out: {why}" for name, why in list(self.unreadable.items())[:1])
            raise DataError(
                f"{self.data} has too few volumes: training needs some of at least {self.patch_size} voxels a side "
                f"that show something, and one to choose the best epoch by{left_out}"
            )

    def _split(self, sets: dict[str, Volumes]) -> dict[str, Volumes]:
        return train_val_test(sets, self.val_fraction, self.test_fraction, self.split_seed, self.data, what="volumes")

    def _pairs(self, volumes: Volumes) -> list[VolumePair]:
        found = []
        with progress("reading volumes", len(volumes)) as advance:
            for entry in volumes.entries:
                try:
                    found.append(volume_pair(entry.read(), self.scale, self.degradation))
                except (Unreadable, ValueError) as error:
                    self.unreadable[entry.name] = error.reason if isinstance(error, Unreadable) else str(error)
                advance()
        return found

    # Training

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Any]]:
        """Stack patches; whole volumes, which differ in size, stay a list."""
        return collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean absolute difference of the enlarged patches from the true ones."""
        result, truth = self.network(batch["low"]).float(), batch["high"]
        return {"loss": F.l1_loss(result, truth), "result": result, "truth": truth}

    def metrics(self) -> nn.Module:
        """PSNR and mean squared error of whole validation volumes, cut to [0, 1]."""
        return MetricCollection({"val_psnr": MeanPSNR(), "val_loss": MeanSquaredError()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with whole volumes."""
        plain = Intensities(0.0, 1.0)
        for low, high in zip(batch["low"], batch["high"], strict=True):
            result = super_resolve(self.network, low[0].cpu().numpy(), patches=self.patches, intensities=plain)
            metrics.update(torch.from_numpy(result).to(high.device), high[0])

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Random patches of the size that whole volumes are cut to."""
        weight = next(self.network.parameters())
        return (torch.rand(batch, 1, *[self.patches.tile] * 3, device=weight.device),)

    # Use

    def measure(self, volumes: Volumes) -> tuple[list[MeasuredVolume], list[Skipped]]:
        """Lower the resolution of the volumes of a set, enlarge them again, without and with noise, and compare.

        Returns:
            What was measured, and the volumes that could not be.

        Raises:
            DataError: no volume can be measured.
        """
        measured, skipped = [], list(volumes.skipped)
        with progress("measuring", len(volumes)) as advance:
            for entry in volumes.entries:
                try:
                    options = {"degradation": self.degradation, "sigma": self.noise, "patches": self.patches}
                    measured.append(measure_volume(self.network, entry.name, entry.read(), **options))  # type: ignore[arg-type]
                except (Unreadable, ValueError) as error:
                    reason = error.reason if isinstance(error, Unreadable) else str(error)
                    skipped.append(Skipped(entry.name, reason))
                advance()
        if not measured:
            first = skipped[0] if skipped else Skipped("the set", "it is empty")
            raise DataError(f"none of the volumes can be measured; first: {first.path}: {first.reason}")
        return measured, skipped

    def quality(self) -> dict[str, float]:
        """Mean PSNR, SSIM and NRMSE of the test volumes, and the PSNR where low resolution is noisy."""
        measured = self.measure(self._held_out(None))[0]
        clean = mean_volume_quality(each.network for each in measured)
        noisy = mean_volume_quality(each.noisy_network for each in measured)
        return {
            "PSNR [dB]": clean.psnr,
            "SSIM": clean.ssim,
            "NRMSE": clean.nrmse,
            "PSNR from noisy [dB]": noisy.psnr,
        }

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on the run's own test volumes, or on others.

        Args:
            data: volumes in any form that training reads.
            folder: where to write the report and ``quality.csv``.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.restoration.volume_reports import evaluation_report

        measured, skipped = self.measure(self._held_out(data))
        tell_skipped(skipped)
        report = evaluation_report(self, measured, skipped)
        if folder is not None:
            write_measured(Path(folder) / "quality.csv", measured)
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> Volumes:
        if data is None:
            if not self.splits:
                splits = self._split(read_volumes(self.data))
                if digest(splits) != self.data_digest:
                    raise DataError(
                        f"the volumes of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the volumes to evaluate on by --data"
                    )
                self.splits = splits
            return self.splits["test"]
        sets = read_volumes(data)
        return next(sets[name] for name in ("test", "val", "all", "train") if name in sets)

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Enlarge volumes; writes them with ``_x2`` behind their names in the form that they have, and a page.

        NIfTI files keep their header, and their voxels lie where they lay.

        Args:
            inputs: NIfTI, ``.npy`` and ``.npz`` files, or folders of them.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.restoration.volume_reports import prediction_report

        done, skipped = enlarge_scans(
            self.network, inputs, Path(folder), patches=self.patches, degradation=self.degradation
        )
        tell_skipped(skipped)
        report = prediction_report(self, done, skipped)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, quality beside trilinear interpolation, with and without noise, slices and cost of a finished run."""
        from convatlas.restoration.volume_reports import training_report

        return training_report(self, run)

    @classmethod
    def compare(cls, tasks: Mapping[str, "VolumeSuperResolution"], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks, or ways to train them, on the same volumes.

        Raises:
            ValueError: they enlarge by different factors, or undo different degradations.
        """
        from convatlas.restoration.volume_reports import comparison_report

        return comparison_report(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """What tells the volumes of the training."""
        return {"data_digest": self.data_digest}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.data_digest = str(described["data_digest"])
        self.network = self._build()
