"""The task of forecasting: from the last frames of a field that changes in time to those that follow."""

# No postponed annotations here: the command line is built from the real types of the fields.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection

from convatlas.data.fields import read_fields
from convatlas.data.simulators.flow_frames import flow_frames
from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.networks.registry import model_config
from convatlas.ops.relative_error import relative_l2
from convatlas.physics.rollout import rollout
from convatlas.report import Report
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["FieldForecasting", "Forecasts"]

Array = npt.NDArray[Any]


class Forecasts(NamedTuple):
    """Forecasts of windows beside the truth: start (N, C, *grid), outputs and truth (N, steps, C, *grid)."""

    start: Array
    outputs: Array
    truth: Array


class _Windows(Dataset[dict[str, Tensor]]):
    """Stretches of so many frames, from every place of every sequence or from some: ``{"frames": (T, C, *grid)}``."""

    def __init__(self, sequences: Sequence[Array], length: int, every: int) -> None:
        self.sequences, self.length = sequences, length
        self.places = [
            (number, start)
            for number, sequence in enumerate(sequences)
            for start in range(0, len(sequence) - length + 1, every)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        number, start = self.places[key[0] if isinstance(key, tuple | list) else key]
        frames = np.ascontiguousarray(self.sequences[number][start : start + self.length])
        return {"frames": torch.from_numpy(frames).float()}


@dataclass(kw_only=True, eq=False)
class FieldForecasting(GradientTask):
    """Train a network on its own forecasts over some steps, and let it go on for more.

    Attributes:
        data: an ``.npz`` or HDF5 file with frames ``x``, (T, *grid) or (T, C, *grid), or with ``x_train``, ``x_test``;
            a folder of such files, a sequence each; or ``flow`` for simulated ones. Up to two sequences are divided in
            time, more by sequences.
        samples, frames, resolution: of simulated flows: how many, frames of each, points of each axis.
        dims: axes of position in a file; told from the shapes when left out.
        model: name of a network for fields.
        options: fields of the network's config to change.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``.
        context: frames that the network sees.
        train_steps: steps that are forecast, one from the other, in training.
        test_steps: steps that are forecast where the quality is measured.
        order: what the network answers: the next frame (0), its difference from the last one (1), or the change of that
            difference (2).
        normalise: whether the network sees frames with mean 0 and standard deviation 1 in each channel.
        val_fraction, test_fraction: shares held out where the data have no split.
        split_seed: of the split, and of the simulator.
    """

    name: ClassVar[str] = "field-forecasting"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_relative_l2", "min")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "lr": 1e-3, "weight_decay": 1e-4, "warmup_epochs": 0.0}

    data: str = "flow"
    samples: int = 24
    frames: int = 16
    resolution: int = 32
    dims: int | None = None
    model: str = "t1_navier_stokes"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    context: int = 2
    train_steps: int = 3
    test_steps: int = 10
    order: Literal[0, 1, 2] = 2
    normalise: bool = True
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    split_seed: int = 0

    network: FieldNetwork = field(init=False, repr=False)
    splits: dict[str, list[Array]] = field(init=False, default_factory=dict)
    #: Mean and standard deviation of each channel: (C,) each.
    statistics: tuple[list[float], list[float]] = field(init=False, default=([], []))
    #: Points of each axis.
    grid: tuple[int, ...] = field(init=False, default=())
    started_from: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(model_config(self.model, **self.options), FieldNetworkConfig):
            raise Unsupported(f"{self.model} is not a network that maps fields to fields")
        for name in ("in_channels", "out_channels", "dims", "resolution"):
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data")
        for name in ("samples", "frames", "context", "train_steps", "test_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {self.order}")
        if self.order == 2 and self.context < 2:
            raise ValueError(f"context must be at least 2 with order 2, got {self.context}")
        if self.resolution < 4:
            raise ValueError(f"resolution must be at least 4, got {self.resolution}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    # Data and network

    def prepare(self) -> None:
        """Read or simulate the sequences and build the network for them.

        Raises:
            DataError: the data cannot be read or are too short.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._read()
        self.train_set = self._windows(self.splits["train"], self.train_steps, 1)
        self.val_set = self._windows(self.splits["val"], self.test_steps, self.test_steps)
        first = self.splits["train"][0]
        self.grid = first.shape[2:]
        rows = np.concatenate([np.moveaxis(each, 1, 0).reshape(first.shape[1], -1) for each in self.splits["train"]], 1)
        deviation = rows.std(1, dtype=np.float64)
        self.statistics = (rows.mean(1, dtype=np.float64).tolist(), np.where(deviation > 0, deviation, 1).tolist())
        self.network = self._build()
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"

    def _build(self) -> FieldNetwork:
        channels = len(self.statistics[0])
        config = model_config(
            self.model,
            **self.options,
            in_channels=self.context * channels,
            out_channels=channels,
            dims=len(self.grid),
            resolution=list(self.grid),
        )
        return cast(FieldNetwork, config.build())

    def _windows(self, sequences: Sequence[Array], steps: int, every: int) -> _Windows:
        windows = _Windows(sequences, self.context + steps, every)
        if not len(windows):
            longest = max(map(len, sequences), default=0)
            raise DataError(f"a part of the data needs {windows.length} frames in a row, its longest has {longest}")
        return windows

    def _read(self) -> dict[str, list[Array]]:
        if self.data == "flow":
            with progress("simulating flows", 1) as advance:
                flows = flow_frames(self.samples, self.frames, self.resolution, self.split_seed)
                advance()
            return self._divided(list(flows))
        sets = self._sequences(self.data)
        if "all" in sets:
            return self._divided(sets["all"])
        if "train" not in sets:
            raise DataError(f"{self.data} has no part for training, only {', '.join(sets)}")
        if "val" not in sets:
            sets |= self._divided(sets["train"], test=False)
        return {**sets, "test": sets.get("test", sets["val"])}

    def _sequences(self, source: str | Path) -> dict[str, list[Array]]:
        read = read_fields(source, dims=self.dims or len(self.grid) or None, paired=False)
        sets = {split: [pairs.x for pairs in parts] for split, parts in read.items()}
        if len({each.shape[1:] for parts in sets.values() for each in parts}) > 1:
            raise DataError(f"the sequences of {source} must have the same grid and channels")
        return sets

    def _divided(self, sequences: list[Array], *, test: bool = True) -> dict[str, list[Array]]:
        """Hold out whole sequences, or the ends of one or two."""
        held = self.test_fraction if test else 0.0
        if len(sequences) < 3:
            parts: dict[str, list[Array]] = {"train": [], "val": [], "test": []}
            for each in sequences:
                last = len(each) - round(held * len(each))
                first = last - round(self.val_fraction * len(each))
                for name, part in zip(parts, (each[:first], each[first:last], each[last:]), strict=True):
                    parts[name].append(part)
            return parts if test else {name: parts[name] for name in ("train", "val")}
        order = np.random.default_rng(self.split_seed).permutation(len(sequences))
        tests = max(1, round(held * len(sequences))) if test else 0
        vals = max(1, round(self.val_fraction * len(sequences)))
        shares = {"test": order[:tests], "val": order[tests : tests + vals], "train": order[tests + vals :]}
        if not len(shares["train"]):
            raise DataError(f"{self.data} holds {len(sequences)} sequences, too few for the parts held out")
        return {name: [sequences[row] for row in sorted(rows)] for name, rows in shares.items() if len(rows)}

    # Training

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Relative L2 error of the frames that the network forecasts from its own, averaged over steps and samples."""
        frames = self._scaled(batch["frames"])
        start, truth = frames[:, : self.context], frames[:, self.context :]
        forecast = rollout(self.network, start, truth.shape[1], self.order)
        return {"loss": relative_l2(forecast.flatten(0, 1), truth.flatten(0, 1)).float().mean()}

    def metrics(self) -> nn.Module:
        """Mean relative L2 error of the validation frames, in their own units."""
        return MetricCollection({"val_relative_l2": MeanMetric()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with windows of frames."""
        frames = batch["frames"]
        start, truth = frames[:, : self.context], frames[:, self.context :]
        metrics.update(relative_l2(self.forecast(start, truth.shape[1]).flatten(0, 1), truth.flatten(0, 1)))

    def _scaled(self, frames: Tensor, *, back: bool = False) -> Tensor:
        if not self.normalise:
            return frames
        shape = (-1, *[1] * len(self.grid))
        mean, deviation = (
            torch.tensor(values, dtype=frames.dtype, device=frames.device).view(shape) for values in self.statistics
        )
        return frames * deviation + mean if back else (frames - mean) / deviation

    # Use

    def forecast(self, start: Tensor, steps: int) -> Tensor:
        """The frames (B, steps, C, *grid) that follow some (B, context, C, *grid), in the units of the data."""
        return self._scaled(rollout(self.network, self._scaled(start), steps, self.order), back=True)

    @torch.inference_mode()
    def measure(self, sequences: Sequence[Array]) -> Forecasts:
        """Forecast ``test_steps`` frames in one window of each sequence after the other.

        Raises:
            DataError: no sequence is long enough.
        """
        windows = self._windows(sequences, self.test_steps, self.test_steps)
        self.network.eval()
        device = next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))
        found: list[Forecasts] = []
        with progress("forecasting", len(windows)) as advance:
            for number in range(len(windows)):
                frames = windows[number]["frames"].to(device)[None]
                start, truth = frames[:, : self.context], frames[:, self.context :]
                outputs = self.forecast(start, self.test_steps)
                found.append(Forecasts(start[:, -1].cpu().numpy(), outputs.cpu().numpy(), truth.cpu().numpy()))
                advance()
        return Forecasts(
            np.concatenate([each.start for each in found]),
            np.concatenate([each.outputs for each in found]),
            np.concatenate([each.truth for each in found]),
        )

    def quality(self) -> dict[str, float]:
        """Mean relative L2 error of the test frames over all steps."""
        self.splits = self.splits or self._read()
        _, outputs, truth = (torch.from_numpy(each) for each in self.measure(self.splits["test"]))
        return {"relative L2": float(relative_l2(outputs.flatten(0, 1), truth.flatten(0, 1)).mean())}

    def better(self, measure: str) -> Literal["max", "min"]:
        """Less error is better."""
        return "min"

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the errors at every step on the run's own test frames, or on other data.

        Args:
            data: frames in any form that training reads.
            folder: where to write the report and ``errors.csv``.

        Raises:
            DataError: the data cannot be read or are too short.
        """
        from convatlas.physics.forecast_reports import evaluation_report, write_errors

        if data is not None:
            sets = self._sequences(data)
            sequences = next(sets[name] for name in ("test", "val", "all", "train") if name in sets)
        else:
            self.splits = self.splits or self._read()
            sequences = self.splits["test"]
        measured = self.measure(sequences)
        report = evaluation_report(self, measured)
        if folder is not None:
            write_errors(Path(folder) / "errors.csv", measured)
            report.save(folder)
        return report

    @torch.inference_mode()
    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Forecast what follows the last frames of each sequence; writes ``NAME_forecast.npz`` with ``y`` (steps, ...).

        Args:
            inputs: files or folders of frames in any form that training reads.
            folder: where to write.

        Raises:
            DataError: a file cannot be read, has other channels than the training, or too few frames.
        """
        from convatlas.physics.forecast_reports import prediction_report, write_forecasts

        self.network.eval()
        device = next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))
        done: list[tuple[str, Array, Array]] = []
        for source in inputs:
            for sequences in self._sequences(source).values():
                for number, frames in enumerate(sequences):
                    channels = len(self.statistics[0])
                    if frames.shape[1] != channels or len(frames) < self.context:
                        raise DataError(
                            f"{source} must have {self.context} frames of {channels} channels at least, got "
                            f"{len(frames)} of {frames.shape[1]}"
                        )
                    start = torch.from_numpy(np.ascontiguousarray(frames[-self.context :])).float().to(device)[None]
                    label = "_".join([Path(source).stem, *([str(number)] if number else [])])
                    done.append((label, frames[-1], self.forecast(start, self.test_steps)[0].cpu().numpy()))
        written = write_forecasts(Path(folder), done)
        report = prediction_report(self, done, written)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, errors at every step, pictures and cost of a finished run."""
        from convatlas.physics.forecast_reports import training_report

        return training_report(self, run)

    # Files

    def described(self) -> dict[str, Any]:
        """Grid and statistics of the training."""
        return {"grid": list(self.grid), "statistics": [list(values) for values in self.statistics]}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.grid = tuple(described["grid"])
        mean, deviation = described["statistics"]
        self.statistics = (list(mean), list(deviation))
        self.network = self._build()
