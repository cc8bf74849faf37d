"""The illuminant task: the colour of the light from long and short exposures, by very small networks."""

# No postponed annotations here: the command line is built from the real types of the fields.

import dataclasses
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from convatlas.data.exposure_pairs import ExposureSet, read_exposure_pairs
from convatlas.data.images import Skipped
from convatlas.data.linear_images import Levels
from convatlas.data.simulators.exposures import Camera
from convatlas.errors import DataError, Interrupted, Unsupported
from convatlas.networks.base import NetworkConfig
from convatlas.networks.colour_constancy.description import IlluminantNetwork
from convatlas.networks.colour_constancy.ensembles import Committee, DualExposureEnsemble, EnsembleConfig
from convatlas.networks.colour_constancy.histograms import CCC, ECCC
from convatlas.networks.registry import model_config
from convatlas.ops.heat_maps import histogram_start
from convatlas.ops.illuminant import angular_error
from convatlas.ops.log_chroma import rgb_to_log_chroma
from convatlas.report import Report
from convatlas.restoration.illuminant_evaluation import MeasuredScene, errors_of, measure_scenes, read_scenes
from convatlas.restoration.illuminant_training import (
    DescribedScenes,
    LossSettings,
    Scene,
    collate_described,
    fit_lbfgs,
    illuminant_losses,
)
from convatlas.restoration.metrics import MeanAngularError
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run, to_mapping
from convatlas.training.sampling import seed_everything
from convatlas.training.settings import Training
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["IlluminantEstimation"]

#: Scenes that training needs at least: one to learn from, one to choose by, one to measure on.
_FEWEST = 3


@dataclass(kw_only=True, eq=False)
class IlluminantEstimation(GradientTask):
    """Train a network to find the colour of the light in pairs of exposures.

    Attributes:
        data: a folder with a folder for each scene that holds ``long``, ``short`` and ``meta.json``; a folder of linear
            frames with known light, from which both exposures are simulated; either below ``train``, ``val`` and
            ``test``; an ``.npz`` file; or ``simulated`` for made-up scenes.
        model: name of the network: ``emlp``, ``eccc``, ``emlp_eccc``, ``ccc``, ``ffcc`` and others.
        options: fields of the network's config to change, e.g. ``{"bins": 64}``.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``.
        levels: black and white level of the files, and whether they are encoded as sRGB; a scene's ``meta.json`` comes
            first.
        camera: how exposures are simulated where they are.
        longest: longest side of the image that the network sees, in pixels; files are reduced by means.
        loss: what is minimised.
        solver: ``adam``, by batches with the settings of the training; ``lbfgs``, all scenes at once, for networks of
            the form ffcc.
        augment: whether each scene is shown under the light of another scene in each epoch.
        weighting: of the members of an ensemble: ``equal``, or by the inverse of the ``validation`` error.
        drift: variance of log-chroma from frame to frame; given, the scenes of a folder count as consecutive frames and
            estimates are smoothed over them in ``predict``.
        folds: of a cross-validation, which trains as many networks and measures every scene once; 0 for one split.
        fold: which of the folds is held out, from 1 on; 0 for all of them in turn.
        val_fraction: share of the training scenes held out to choose the best epoch, where the data have no split.
        test_fraction: share of all scenes held out to measure the quality, where the data have no split.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "illuminant"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_error", "min")
    smaller_is_better: ClassVar[tuple[str, ...]] = ("error [deg]", "median [deg]", "worst 25 % [deg]")
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"epochs": 60, "batch_size": 16, "lr": 1e-2, "weight_decay": 1e-5, "warmup_epochs": 0.0},
    }

    data: str = "simulated"
    model: str = "eccc"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    levels: Levels = field(default_factory=Levels)
    camera: Camera = field(default_factory=Camera)
    longest: int = 384
    loss: LossSettings = field(default_factory=LossSettings)
    solver: Literal["adam", "lbfgs"] = "adam"
    augment: bool = False
    weighting: Literal["equal", "validation"] = "equal"
    drift: float | None = None
    folds: int = 0
    fold: int = 0
    val_fraction: float = 0.15
    test_fraction: float = 0.2
    split_seed: int = 0

    network: IlluminantNetwork = field(init=False, repr=False)
    splits: dict[str, ExposureSet] = field(init=False, default_factory=dict)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")
    #: What differs from the model's config in each network: found in the training data.
    changes: list[dict[str, Any]] = field(init=False, default_factory=list)
    #: Mean light of the training scenes.
    constant: list[float] = field(init=False, default_factory=list)
    #: Variance of the error in log-chroma on the validation scenes.
    spread: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        config = self._config()  # unknown names are told before any data are read
        for name, value, known in (
            ("solver", self.solver, ("adam", "lbfgs")),
            ("weighting", self.weighting, ("equal", "validation")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.longest < 8:
            raise ValueError(f"longest must be at least 8, got {self.longest}")
        if self.solver == "lbfgs" and getattr(config, "form", "") != "ffcc":
            raise ValueError(f"solver must be 'adam' for {self.model}: 'lbfgs' is for networks of the form ffcc")
        if self.solver == "lbfgs" and self.augment:
            raise ValueError("augment must be false with the solver lbfgs, which sees all scenes at once")
        if self.weighting != "equal" and not isinstance(config, EnsembleConfig):
            raise ValueError(f"weighting must be 'equal' for {self.model}, which is no ensemble")
        if self.drift is not None and self.drift < 0:
            raise ValueError(f"drift must not be negative, got {self.drift}")
        if self.folds == 1 or self.folds < 0:
            raise ValueError(f"folds must be 0 or at least 2, got {self.folds}")
        if not 0 <= self.fold <= self.folds:
            raise ValueError(f"fold must be from 0 to {self.folds}, got {self.fold}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def _config(self, **changes: Any) -> NetworkConfig:
        config = model_config(self.model, **{**self.options, **changes})
        with torch.device("meta"):
            network = config.build()
        if not isinstance(network, IlluminantNetwork):
            raise Unsupported(f"{self.model} is not a network that finds the light")
        return config

    @property
    def crosses(self) -> bool:
        """Whether the task is a whole cross-validation."""
        return self.folds > 0 and self.fold == 0

    # Data and network

    def prepare(self) -> None:
        """Read and split the scenes and build the network.

        Raises:
            DataError: the data cannot be read or are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._split(self._read(self.data))
        self.data_digest = _digest(self.splits)
        parts: dict[str, list[Scene]] = {}
        for name in ("train", "val"):
            parts[name], skipped = read_scenes(self.splits[name], self.longest)
            self.unreadable |= {each.path: each.reason for each in skipped}
        if not parts["train"] or not parts["val"]:
            tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
            raise DataError(f"{self.data} has too few scenes that can be read")
        lights = torch.stack([scene.rgb for scene in parts["train"]])
        mean = nn.functional.normalize(lights.mean(0), dim=0)
        self.constant = mean.tolist()
        self.changes = [self._fitted(lights)]
        self.network = cast(IlluminantNetwork, self._config(**self.changes[0]).build())
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"
        self.train_set: DescribedScenes = DescribedScenes(
            parts["train"], self.network, lights if self.augment else None
        )
        self.val_set: DescribedScenes = DescribedScenes(parts["val"], self.network)
        self.unreadable |= self.train_set.failed | self.val_set.failed
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())
        if not len(self.train_set) or not len(self.val_set):
            raise DataError(f"{self.data} has too few scenes with pixels that are neither dark nor left out")

    def _fitted(self, lights: Tensor) -> dict[str, Any]:
        """What the training lights decide of the config: where the range of a torus begins."""
        config: Any = self._config()
        if isinstance(config, EnsembleConfig) or getattr(config, "form", "") != "ffcc" or "start" in self.options:
            return {}
        return {"start": histogram_start(rgb_to_log_chroma(lights.double()), config.bins, config.bin_size)}

    def _read(self, data: str | Path) -> dict[str, ExposureSet]:
        return read_exposure_pairs(data, self.levels, self.camera)

    def _split(self, sets: dict[str, ExposureSet]) -> dict[str, ExposureSet]:
        if "all" not in sets and not self.folds:
            if "train" not in sets:
                raise DataError(f"{self.data} has no train folder, only {', '.join(sets)}")
            if "val" not in sets:
                sets = {**sets, **self._divided(sets["train"], {"val": self.val_fraction})}
            return {**sets, "test": sets.get("test", sets["val"])}
        if "all" not in sets:
            raise DataError(f"{self.data} is split already: folds need scenes without train, val and test")
        if not self.folds:
            held_out = {"test": self.test_fraction, "val": (1 - self.test_fraction) * self.val_fraction}
            return self._divided(sets["all"], held_out)
        order = self._order(sets["all"])
        if len(order) < max(_FEWEST, self.folds):
            raise DataError(f"{self.data} holds {len(order)} scenes, but {self.folds} folds need more")
        test = sorted(order[max(self.fold, 1) - 1 :: self.folds])
        rest = sets["all"].subset(sorted(set(order) - set(test)))
        return {**self._divided(rest, {"val": self.val_fraction}), "test": sets["all"].subset(test)}

    def _order(self, found: ExposureSet) -> list[int]:
        order = sorted(range(len(found)), key=lambda row: found.entries[row].name)
        random.Random(self.split_seed).shuffle(order)
        return order

    def _divided(self, found: ExposureSet, held_out: Mapping[str, float]) -> dict[str, ExposureSet]:
        order = self._order(found)
        if len(order) < len(held_out) + 1:
            raise DataError(f"{self.data} holds {len(order)} scenes, but training needs at least {len(held_out) + 1}")
        parts = {}
        for name, share in held_out.items():
            count = min(max(1, round(share * len(found))), len(order) - 1)
            parts[name], order = found.subset(sorted(order[:count])), order[count:]
        return {"train": found.subset(sorted(order)), **parts}

    # Training

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        """Stack the descriptions of scenes."""
        return collate_described

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Angular error and roughness, or what else suits the network."""
        return illuminant_losses(self.network, batch["inputs"], batch["rgb"], self.loss)

    def metrics(self) -> nn.Module:
        """Mean angular error of the validation scenes in degrees."""
        return MetricCollection({"val_error": MeanAngularError()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metric with a validation batch."""
        metrics.update(self.network(*batch["inputs"]).float(), batch["rgb"])

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Train by batches, by L-BFGS, or all networks of a cross-validation; see `GradientTask.fit`."""
        training = training or Training(**self.defaults)
        if self.crosses:
            return self._cross_validate(Run(run), training, resume)
        if self.solver == "adam":
            return super().fit(run, training, resume=resume)
        opened = Run(run)
        if not resume:
            opened.check_unused()
        seed_everything(training.seed)
        self.prepare()
        if not resume:
            Run.create(run, self.name, {**to_mapping(self), **to_mapping(training)})
        if not (resume and opened.best.is_file()):  # it is short: a stopped fit is done again
            self._fit_lbfgs(opened)
        load_weights(self.network, opened.best)
        self.network.eval()
        report = self.report(opened)
        report.save(opened.folder)
        return report

    def _fit_lbfgs(self, run: Run) -> None:
        rows: list[dict[str, float]] = []
        network = cast(CCC | ECCC, self.network)
        with progress("fitting", None) as advance:

            def told(row: dict[str, float]) -> None:
                rows.append({"epoch": len(rows) + 1, **row})
                advance()

            fit_lbfgs(network, [self.train_set[row] for row in range(len(self.train_set))], self.loss, told=told)
        metrics: Any = self.metrics()
        self.score(collate_described([self.val_set[row] for row in range(len(self.val_set))]), metrics)
        if rows:
            rows[-1]["val_error"] = float(metrics.compute()["val_error"])
        run.write_metrics(rows)
        self._finish()
        self.save(run.best)

    def _cross_validate(self, run: Run, training: Training, resume: bool) -> Report:
        from convatlas.restoration.illuminant_reports import cross_validation_report

        if resume:
            run = Run.open(run.folder)
        else:
            run.check_unused()
            Run.create(run.folder, self.name, {**to_mapping(self), **to_mapping(training)})
        parts = []
        try:
            for number in range(1, self.folds + 1):
                part = dataclasses.replace(self, fold=number)
                place = Run(run.folder / f"fold_{number}")
                part.fit(place.folder, training, resume=place.config.is_file())
                parts.append(part)
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"stopped; go on with 'convatlas train {self.name} --resume {run.folder}'", 130) from None
        self.network = Committee([part.network for part in parts])
        self.network.eval()
        self.changes = [part.changes[0] for part in parts]
        self.constant = torch.tensor([part.constant for part in parts]).mean(0).tolist()
        self.spread = sum(part.spread for part in parts) / len(parts)
        self.data_digest = parts[0].data_digest
        self.save(run.best)
        report = cross_validation_report(self, [part.held_out() for part in parts], run)
        report.save(run.folder)
        return report

    def _finish(self) -> None:
        """What the validation scenes tell once the network has learned: weights of members, spread of the errors."""
        batch = collate_described([self.val_set[row] for row in range(len(self.val_set))])
        device = next(self.network.parameters()).device
        inputs, truth = [part.to(device) for part in batch["inputs"]], batch["rgb"]
        self.network.eval()
        with torch.inference_mode():
            if self.weighting == "validation" and isinstance(self.network, DualExposureEnsemble):
                network = self.network
                parts = zip(network.members, network.parted(inputs), strict=True)
                errors = [float(angular_error(member(*part).cpu(), truth).mean()) for member, part in parts]
                shares = [1 / max(error, 1e-3) for error in errors]
                network.weights = (shares[0] / sum(shares), shares[1] / sum(shares))
                self.changes = [{**self.changes[0], "weights": network.weights}]
            away = rgb_to_log_chroma(self.network(*inputs).cpu()) - rgb_to_log_chroma(truth)
            self.spread = float(away.square().mean())

    # Use

    def measure(self, found: ExposureSet) -> tuple[list[MeasuredScene], list[Skipped]]:
        """Estimate the light of scenes with the network and with the baselines.

        Raises:
            DataError: no scene can be measured.
        """
        scenes, skipped = read_scenes(found, self.longest)
        constant = torch.tensor(self.constant) if self.constant else None
        measured, failed = measure_scenes(self.network, self.model, scenes, constant)
        skipped += failed
        if not measured:
            first = skipped[0] if skipped else Skipped("the set", "it is empty")
            raise DataError(f"none of the scenes can be measured; first: {first.path}: {first.reason}")
        return measured, skipped

    def held_out(self, data: str | Path | None = None) -> tuple[list[MeasuredScene], list[Skipped]]:
        """Measure the scenes that training has not seen, or others.

        Raises:
            DataError: the data cannot be read, or are not those of the training.
        """
        if data is not None:
            sets = self._read(data)
            return self.measure(next(sets[name] for name in ("test", "val", "all", "train") if name in sets))
        if not self.crosses:
            return self.measure(self._own_splits()["test"])
        measured: list[MeasuredScene] = []
        skipped: list[Skipped] = []
        for number, member in enumerate(cast(Committee, self.network).members, 1):
            part = dataclasses.replace(self, fold=number)
            part.network, part.constant = member, self.constant
            part.data_digest = self.data_digest if number == 1 else ""
            found, failed = part.measure(part._own_splits()["test"])
            measured += found
            skipped += failed
        return measured, skipped

    def _own_splits(self) -> dict[str, ExposureSet]:
        if not self.splits:
            splits = self._split(self._read(self.data))
            if self.data_digest and _digest(splits) != self.data_digest:
                raise DataError(
                    f"the scenes of {self.data} are not those of the training, so which of them were held out cannot "
                    "be told; give the scenes to evaluate on by --data"
                )
            self.splits = splits
        return self.splits

    def quality(self) -> dict[str, float]:
        """Mean, median and worst quarter of the angular errors of the held-out scenes in degrees."""
        from convatlas.ops.illuminant import error_statistics

        measured, _ = self.held_out()
        found = error_statistics(errors_of(measured, self.model)[0])
        return {
            "error [deg]": found["mean"],
            "median [deg]": found["median"],
            "worst 25 % [deg]": found["worst 25 %"],
        }

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the errors on the run's own held-out scenes, or on others.

        Args:
            data: scenes in any form that training reads.
            folder: where to write the report and ``errors.csv``.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.restoration.illuminant_evaluation import write_errors
        from convatlas.restoration.illuminant_reports import evaluation_report

        measured, skipped = self.held_out(data)
        tell_skipped(skipped)
        report = evaluation_report(self, measured, skipped)
        if folder is not None:
            write_errors(Path(folder) / "errors.csv", measured)
            report.save(folder)
        return report

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Find the light in a user's scenes and take its colour away.

        Writes each long exposure white-balanced, linear in 16 bits (``NAME_white_balanced.png``) and as it is looked at
        (``NAME_view.jpg``), and ``illuminants.csv``.

        Args:
            inputs: a long and a short exposure, folders of scenes, or single frames for a network that takes no more.
            folder: where to write.

        Raises:
            DataError: nothing can be read.
        """
        from convatlas.restoration.illuminant_files import balance_files
        from convatlas.restoration.illuminant_reports import prediction_report

        done, skipped = balance_files(self, inputs, Path(folder))
        tell_skipped(skipped)
        report = prediction_report(self, done, skipped)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Errors on the held-out scenes beside those of baselines, pictures, heat maps and curves of a finished run."""
        from convatlas.restoration.illuminant_reports import training_report

        if self.solver == "adam":
            self._finish()
            self.save(run.best)
        return training_report(self, run)

    @classmethod
    def compare(cls, tasks: Mapping[str, Self], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks that were trained on the same scenes: errors, parameters, time."""
        from convatlas.restoration.illuminant_reports import comparison

        return comparison(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """What the training found, beside the weights."""
        names = ("data_digest", "changes", "constant", "spread")
        return {name: getattr(self, name) for name in names}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.data_digest, self.spread = str(described["data_digest"]), float(described["spread"])
        self.changes = [dict(each) for each in described["changes"]]
        self.constant = [float(value) for value in described["constant"]]
        members = [cast(IlluminantNetwork, self._config(**each).build()) for each in self.changes]
        self.network = Committee(members) if self.crosses else members[0]


def _digest(splits: Mapping[str, ExposureSet]) -> str:
    """A short text that tells whether scenes were split in the same way."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name} {len(splits[name])}\n".encode())
        digest.update("".join(f"{each.name}\n" for each in splits[name].entries).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
