"""The task of wave surrogates: networks that stand for a solver of the wave equation, and go on by themselves."""

# No postponed annotations here: the command line is built from the real types of the fields.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from convatlas.data.wave_fem import Boundary, WaveSequences, wave_dataset
from convatlas.data.wave_files import read_sequences, sequences_digest
from convatlas.errors import DataError, Unsupported
from convatlas.networks.registry import model_config
from convatlas.networks.wave_surrogate import (
    WaveFieldConfig,
    WaveFieldDecoder,
    WaveSurrogate,
    WaveSurrogateConfig,
)
from convatlas.physics.wave_evaluation import (
    ForecastErrors,
    Windows,
    bounded_error,
    errors_of,
    forecast,
    shuffled,
)
from convatlas.report import Report
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Simulation", "Waves"]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Scenes that are simulated by finite elements.

    Attributes:
        scenes: how many.
        size: nodes along each side of the unit square.
        frames: fields of each scene.
        inclusions: ellipses of another speed in each scene; 0 for one speed a scene, which ``wave_field`` needs.
        boundary: ``dirichlet``, ``neumann`` or ``absorbing``.
        source: an initial ``bump``, or a ``ricker`` force.
        interval: time between two fields; waves of speed 1 cross the square in the time 1.
        seed: of the scenes.
    """

    scenes: int = 60
    size: int = 32
    frames: int = 24
    inclusions: int = 2
    boundary: Boundary = "dirichlet"
    source: Literal["bump", "ricker"] = "bump"
    interval: float = 0.05
    seed: int = 0

    def solve(self) -> WaveSequences:
        """The fields of all scenes."""
        return wave_dataset(
            self.scenes,
            self.size,
            frames=self.frames,
            inclusions=self.inclusions,
            boundary=self.boundary,
            source=self.source,
            interval=self.interval,
            seed=self.seed,
        )


@dataclass(kw_only=True, eq=False)
class Waves(GradientTask):
    """Train a network to go on with waves from their last fields, or to make them of the parameters of a scene.

    Attributes:
        data: ``simulated``, or an ``.npz`` file with ``fields`` (scenes, times, H, W) and ``speed`` (scenes, H, W); if
            they are known, with ``interval``, ``spacing`` and ``parameters`` (scenes, P).
        simulation: of the simulated scenes.
        model: name of the network: ``wave_surrogate`` and its compressed forms, or ``wave_field``.
        options: fields of the network's config to change, e.g. ``{"widths": [16, 32]}``.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``.
        rollout: steps of the training, each on what the one before has given.
        rollout_weight: of the error of all these steps beside that of the first.
        horizon: steps that validation, evaluation and predictions make, if there are so many fields.
        val_fraction: share of the scenes held out to choose the best epoch.
        test_fraction: share of the scenes held out to measure the quality.
        split_seed: of the random split.
    """

    name: ClassVar[str] = "waves"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_rollout", "min")
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"batch_size": 16, "lr": 1e-3, "weight_decay": 0.0, "warmup_epochs": 0.0, "min_lr": 0.0, "clip": 1.0},
    }
    smaller_is_better: ClassVar[tuple[str, ...]] = (
        *("relative L2 of the rollout", "relative L2 of the last field", "relative L2 of a step"),
        *("energy drift", "spectrum error"),
    )

    data: str = "simulated"
    simulation: Simulation = field(default_factory=Simulation)
    model: str = "wave_surrogate_oneway"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    rollout: int = 4
    rollout_weight: float = 1.0
    horizon: int = 20
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: WaveSurrogate | WaveFieldDecoder = field(init=False, repr=False)
    splits: dict[str, WaveSequences] = field(init=False, default_factory=dict)
    #: Standard deviation of the fields of the training, fields that last the time 1, side of a field, parameters.
    scale: float = field(init=False, default=1.0)
    duration: int = field(init=False, default=1)
    size: int = field(init=False, default=0)
    parameters: int = field(init=False, default=0)
    data_digest: str = field(init=False, default="")
    started_from: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, WaveSurrogateConfig | WaveFieldConfig):
            raise Unsupported(f"{self.model} is not a network for waves")
        if isinstance(config, WaveSurrogateConfig) and (config.in_channels < 2 or config.out_channels != 1):
            raise ValueError(
                "in_channels must be at least 2 and out_channels 1: past fields and speed, and the next field"
            )
        for name in ("size", "parameters"):
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data")
        for name in ("rollout", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rollout_weight < 0:
            raise ValueError(f"rollout_weight must not be negative, got {self.rollout_weight}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    # Data and network

    def prepare(self) -> None:
        """Read or simulate the scenes, split them, and build the network.

        Raises:
            DataError: the data cannot be read or are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._split(self._read(self.data))
        train = self.splits["train"]
        self.scale = max(float(train.fields.double().std()), 1e-12)
        self.duration, self.size = train.fields.shape[1], train.fields.shape[2]
        self.parameters = 0 if train.parameters is None else train.parameters.shape[1]
        self.data_digest = sequences_digest(train)
        self.network = self._build()
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"
        frames = self.network.config.frames
        if isinstance(self.network, WaveSurrogate):
            windows = Windows(train, frames + self.rollout)
        else:
            self._check_parameters(train, self.data)
            windows = Windows(train, frames, self.duration)
        if not len(windows):
            wanted = frames + self.rollout if isinstance(self.network, WaveSurrogate) else frames
            raise DataError(f"{self.data} has {self.duration} fields a scene, but training needs at least {wanted}")
        self.train_set = windows
        self.val_set = Windows(self.splits["val"], self.duration, self.duration)

    def _build(self) -> WaveSurrogate | WaveFieldDecoder:
        config = model_config(self.model, **self.options)
        if isinstance(config, WaveFieldConfig):
            return config.override(size=self.size, parameters=self.parameters + 1).build()
        return cast(WaveSurrogateConfig, config).override(resolution=self.size).build()

    def _read(self, source: str | Path) -> WaveSequences:
        return self.simulation.solve() if str(source) == "simulated" else read_sequences(source)

    def _split(self, sequences: WaveSequences) -> dict[str, WaveSequences]:
        if len(sequences) < 3:
            raise DataError(f"{self.data} holds {len(sequences)} scenes, but training needs at least 3")
        shares = (self.test_fraction, (1 - self.test_fraction) * self.val_fraction)
        test, val, train = shuffled(len(sequences), shares, self.split_seed)
        if not train:
            raise DataError(f"val_fraction and test_fraction leave none of {len(sequences)} scenes to train on")
        return {name: sequences.subset(rows) for name, rows in (("train", train), ("val", val), ("test", test))}

    def _check_parameters(self, sequences: WaveSequences, source: str | Path) -> None:
        """Refuse scenes of which a network that makes fields of parameters cannot tell enough."""
        height, width = sequences.fields.shape[2:]
        if sequences.parameters is None:
            raise DataError(
                f"{self.model} needs the parameters of each scene; {source} has none (scenes are simulated with them "
                "if simulation.inclusions is 0)"
            )
        if sequences.parameters.shape[1] != self.parameters or (height, width) != (self.size, self.size):
            raise DataError(
                f"{source} must have {self.parameters} parameters and fields of {self.size} x {self.size}, got "
                f"{sequences.parameters.shape[1]} and {height} x {width}"
            )

    # Training

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Relative L2 error of the next field, and of a rollout; of fields made of parameters, of all of them."""
        fields = batch["fields"] / self.scale
        network: Any = self.network
        if "parameters" in batch:
            return {"loss": bounded_error(network(batch["parameters"]), fields, 1.0).mean()}
        seen = fields.shape[1] - self.rollout
        past, speed = list(fields[:, :seen].unbind(1)), batch["speed"]
        for _ in range(self.rollout):  # through the network as it is wrapped, for several devices
            past.append(past[-1] + network(torch.stack([*past[-seen:], speed], dim=1))[:, 0])
        made, truth = torch.stack(past[seen:], dim=1), fields[:, seen:]
        step = bounded_error(made[:, :1], truth[:, :1], 1.0).mean()
        rollout = bounded_error(made, truth, 1.0).mean()
        return {"loss": step + self.rollout_weight * rollout, "step": step.detach(), "rollout": rollout.detach()}

    def metrics(self) -> nn.Module:
        """Relative L2 error of rollouts over whole validation scenes, and of their first step."""
        return MetricCollection({"val_rollout": MeanMetric(), "val_step": MeanMetric()}, compute_groups=False)

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with whole scenes."""
        given = {name: tensor.cpu() for name, tensor in batch.items()}
        parameters = given["parameters"][:, :-1] if "parameters" in given else None  # the last is the time
        scenes = WaveSequences(given["fields"], given["speed"], parameters=parameters)
        errors = errors_of(self.network, scenes, self.horizon, self.scale, self.duration)
        device = batch["fields"].device
        metrics["val_rollout"].update(errors.whole.to(device))
        metrics["val_step"].update(errors.each[:, 0].to(device))

    # Use

    def measure(self, sequences: WaveSequences) -> ForecastErrors:
        """Forecast scenes and compare with the truth.

        Raises:
            DataError: the scenes have too few fields, or lack the parameters that the network takes.
        """
        self._check_scenes(sequences, self.data, 1)
        return errors_of(self.network.eval(), sequences, self.horizon, self.scale, self.duration)

    def _check_scenes(self, sequences: WaveSequences, source: str | Path, more: int) -> None:
        if not isinstance(self.network, WaveSurrogate):
            self._check_parameters(sequences, source)
        elif sequences.fields.shape[1] < self.network.config.frames + more:
            least = self.network.config.frames + more
            raise DataError(f"{source} has {sequences.fields.shape[1]} fields a scene, but {self.model} needs {least}")

    def quality(self) -> dict[str, float]:
        """Mean errors of the rollouts of the test scenes."""
        return self.measure(self._held_out(None)).means()

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure rollouts on the run's own test scenes, or on others.

        Args:
            data: an ``.npz`` file as training reads it.
            folder: where to write the report and ``errors.csv``.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.physics.wave_reports import evaluation_report, write_errors

        errors = self.measure(self._held_out(data))
        report = evaluation_report(self, errors)
        if folder is not None:
            write_errors(Path(folder) / "errors.csv", errors)
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> WaveSequences:
        if data is not None:
            return self._read(data)
        if not self.splits:
            splits = self._split(self._read(self.data))
            if sequences_digest(splits["train"]) != self.data_digest:
                raise DataError(
                    f"the scenes of {self.data} are not those of the training, so which of them were held out cannot "
                    "be told; give the scenes to evaluate on by --data"
                )
            self.splits = splits
        return self.splits["test"]

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Go on with the scenes of files; writes ``NAME_rollout.npz`` with the fields, a strip of pictures and a film.

        Args:
            inputs: ``.npz`` files with ``fields`` and ``speed`` as training reads them, of which the first fields are
                seen; if there are more, they are the truth that the rollout is compared with.
            folder: where to write.

        Raises:
            DataError: a file cannot be read or has too few fields.
        """
        from convatlas.physics.wave_reports import Rollout, prediction_report, write_rollouts

        done = []
        for source in inputs:
            sequences = read_sequences(source)
            self._check_scenes(sequences, source, 0)
            first = self.network.config.frames if isinstance(self.network, WaveSurrogate) else 0
            made = forecast(self.network.eval(), sequences, self.horizon, self.scale, self.duration)
            done.append(Rollout(Path(source).stem, sequences, made, first))
        if not done:
            raise DataError("inputs must be .npz files, got none")
        written = write_rollouts(Path(folder), done)
        report = prediction_report(self, done, written)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, errors of the test scenes, pictures and cost of a finished run."""
        from convatlas.physics.wave_reports import training_report

        return training_report(self, run)

    # Files

    def described(self) -> dict[str, Any]:
        """What was learned from the data beside the weights."""
        names = ("scale", "duration", "size", "parameters", "data_digest")
        return {name: getattr(self, name) for name in names}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.scale, self.data_digest = float(described["scale"]), str(described["data_digest"])
        self.duration, self.size, self.parameters = (int(described[n]) for n in ("duration", "size", "parameters"))
        self.network = self._build()
