"""The task of operator learning: from the field that goes into an equation to the field that comes out of it."""

# No postponed annotations here: the command line is built from the real types of the fields.

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection

from convatlas.data.fields import FieldPairs, read_arrays, read_fields
from convatlas.data.simulators import SIMULATORS
from convatlas.errors import DataError, Unsupported
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.networks.registry import model_config
from convatlas.ops.field_losses import h1_error, lp_error
from convatlas.ops.relative_error import relative_l2
from convatlas.physics.operator_evaluation import Measured, coarser, in_batches, measure
from convatlas.report import Report
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights, read_checkpoint

__all__ = ["OperatorLearning"]


class _Samples(Dataset[dict[str, Tensor]]):
    """Pairs of one or several grids, one after the other: ``{"x": (C, *grid), "y": (C', *grid)}``."""

    def __init__(self, sets: Sequence[FieldPairs]) -> None:
        self.sets = sets
        self.ends = np.cumsum([len(pairs) for pairs in sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index = key[0] if isinstance(key, tuple | list) else key
        which = int(np.searchsorted(self.ends, index, side="right"))
        pairs, row = self.sets[which], index - (int(self.ends[which - 1]) if which else 0)
        return {key: torch.from_numpy(np.asarray(part)[row]).float() for key, part in (("x", pairs.x), ("y", pairs.y))}


def _collate(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Stack the samples of each grid: ``{"x": [(B, C, *grid), ...], "y": [...]}``."""
    groups: dict[torch.Size, list[dict[str, Tensor]]] = {}
    for sample in samples:
        groups.setdefault(sample["x"].shape, []).append(sample)
    return {name: [torch.stack([sample[name] for sample in group]) for group in groups.values()] for name in "xy"}


@dataclass(kw_only=True, eq=False)
class OperatorLearning(GradientTask):
    """Train a network on pairs of fields, on one resolution or several, and use it on any that it takes.

    Attributes:
        data: an ``.npz``, HDF5 or ``.pt`` file with inputs ``x`` and outputs ``y``, (N, *grid) or (N, C, *grid), or
            ``x_train``, ``y_train``, ``x_test`` and so on; a folder of such files, each with a resolution of its own;
            or a simulator: ``burgers``, ``darcy``, ``navier_stokes``, ``navier_stokes_forcing`` or ``poisson``.
        samples: how many the simulator makes, those held out included.
        resolution: points of each axis of the simulator's grid; of several, each has its share of the samples.
        dims: axes of position in a file; told from the shapes when left out.
        model: name of the network; ``convatlas list --models``.
        options: fields of the network's config to change, e.g. ``{"depth": 2}``.
        weights: where to start from: a checkpoint, ``hf://owner/name`` or ``https://...``.
        normalise: what the network sees with mean 0 and standard deviation 1 in each channel: ``inputs``, ``both`` (its
            answers as well), or ``none``.
        loss: ``relative_l2``, ``mse``, ``h1`` (relative, of values and gradients of periodic fields) or
            ``l2_sum_squared`` (the square of the sum of the L2 norms of a batch's errors).
        val_fraction: share of the training pairs held out to choose the best epoch, where the data have no split.
        test_fraction: share of all pairs held out to measure the quality, where the data have no split.
        split_seed: of the split, and of the simulator.
    """

    name: ClassVar[str] = "operator-learning"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_relative_l2", "min")
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "lr": 1e-3, "weight_decay": 1e-4, "warmup_epochs": 0.0}

    data: str = "darcy"
    samples: int = 300
    resolution: int | list[int] = 32
    dims: int | None = None
    model: str = "fno"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    normalise: Literal["none", "inputs", "both"] = "both"
    loss: Literal["relative_l2", "mse", "h1", "l2_sum_squared"] = "relative_l2"
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0

    network: FieldNetwork = field(init=False, repr=False)
    splits: dict[str, list[FieldPairs]] = field(init=False, default_factory=dict)
    #: Mean and standard deviation of each channel, of inputs and outputs: (C,) each.
    statistics: dict[str, tuple[list[float], list[float]]] = field(init=False, default_factory=dict)
    #: Points of each axis of the first grid of the training.
    grid: tuple[int, ...] = field(init=False, default=())
    started_from: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(model_config(self.model, **self.options), FieldNetworkConfig):
            raise Unsupported(f"{self.model} is not a network that maps fields to fields")
        for name in ("in_channels", "out_channels", "dims", "resolution"):
            if name in self.options:
                raise ValueError(f"options must not hold {name}: it follows from the data")
        for name, value, known in (
            ("normalise", self.normalise, ("none", "inputs", "both")),
            ("loss", self.loss, ("relative_l2", "mse", "h1", "l2_sum_squared")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.samples < 3:
            raise ValueError(f"samples must be at least 3, got {self.samples}")
        if not self.resolutions or min(self.resolutions) < 4:
            raise ValueError(f"resolution must be at least 4, got {self.resolution}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Points of each axis of the simulator's grids."""
        return (self.resolution,) if isinstance(self.resolution, int) else tuple(self.resolution)

    # Data and network

    def prepare(self) -> None:
        """Read or simulate the pairs and build the network for them.

        Raises:
            DataError: the data cannot be read or are too few.
            CheckpointError: ``weights`` do not fit.
        """
        self.splits = self._read()
        self.train_set, self.val_set = (_Samples(self.splits[name]) for name in ("train", "val"))
        first = self.splits["train"][0]
        self.grid = first.grid
        self.statistics = {"x": _statistics([pairs.x for pairs in self.splits["train"]])}
        self.statistics["y"] = _statistics([pairs.y for pairs in self.splits["train"] if pairs.y is not None])
        self.network = self._build()
        if self.weights is not None:
            self.started_from = f"{self.weights}: {load_weights(self.network, self.weights).summary()}"

    def _build(self) -> FieldNetwork:
        channels = {f"{way}_channels": len(self.statistics[key][0]) for way, key in (("in", "x"), ("out", "y"))}
        config = model_config(self.model, **self.options, **channels, dims=len(self.grid), resolution=list(self.grid))
        return cast(FieldNetwork, config.build())

    def _read(self) -> dict[str, list[FieldPairs]]:
        if self.data in SIMULATORS:
            return self._simulated()
        sets = self._files(self.data)
        random = np.random.default_rng(self.split_seed)
        if "all" in sets:
            sets = _divided(sets["all"], {"test": self.test_fraction}, random, self.data)
        if "train" not in sets:
            raise DataError(f"{self.data} has no part for training, only {', '.join(sets)}")
        if "val" not in sets:
            sets |= _divided(sets["train"], {"val": self.val_fraction}, random, self.data)
        return {**sets, "test": sets.get("test", sets["val"])}

    def _files(self, source: str | Path, *, paired: bool = True) -> dict[str, list[FieldPairs]]:
        return read_fields(source, dims=self.dims or len(self.grid) or None, paired=paired, read=_read_file)

    def _simulated(self) -> dict[str, list[FieldPairs]]:
        held_out = max(1, round(self.test_fraction * self.samples))
        val = max(1, round(self.val_fraction * (self.samples - held_out)))
        counts = {"train": self.samples - held_out - val, "val": val, "test": held_out}
        if counts["train"] < len(self.resolutions):
            raise DataError(f"samples must be more than {self.samples} to train on {len(self.resolutions)} grids")
        sets: dict[str, list[FieldPairs]] = {}
        with progress(f"simulating {self.data}", len(counts)) as advance:
            for split, count in counts.items():
                sizes = self.resolutions if split == "train" else self.resolutions[:1]
                shares = [count // len(sizes) + (number < count % len(sizes)) for number in range(len(sizes))]
                sets[split] = [
                    self.simulate(split, share, size, number)
                    for number, (share, size) in enumerate(zip(shares, sizes, strict=True))
                ]
                advance()
        return sets

    def simulate(self, split: str, samples: int, resolution: int, part: int = 0) -> FieldPairs:
        """Pairs of the task's simulator; the functions of a split are the same at every resolution."""
        seed = np.random.SeedSequence([self.split_seed, ("train", "val", "test").index(split), part])
        return SIMULATORS[self.data](samples, resolution, int(seed.generate_state(1)[0]))

    # Training

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Any]]:
        """Stack the samples of each grid."""
        return _collate

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The error of the network's answers, averaged over the samples but for ``l2_sum_squared``."""
        total, count = torch.zeros((), device=batch["x"][0].device), 0
        for x, y in zip(batch["x"], batch["y"], strict=True):
            answer, field = self.network(self._scaled(x, "x")), self._scaled(y, "y")
            if self.loss == "h1":
                errors = h1_error(self.network.as_field(answer, x.shape[2:]), field, relative=True)
            elif self.loss == "l2_sum_squared":
                errors = lp_error(self.network.as_field(answer, x.shape[2:]), field, lengths=2 * math.pi)
            elif self.loss == "mse":
                errors = (answer - self.network.as_answer(field)).abs().square().flatten(1).mean(1)
            else:
                errors = relative_l2(answer, self.network.as_answer(field))
            total, count = total + errors.float().sum(), count + len(x)
        # Berner et al., 2025, arXiv 2506.10973, square the sum of the batch, on a square of side 2 pi.
        return {"loss": total.square() if self.loss == "l2_sum_squared" else total / count}

    def metrics(self) -> nn.Module:
        """Mean relative L2 error of the validation fields, in their own units."""
        return MetricCollection({"val_relative_l2": MeanMetric()})

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with fields."""
        for x, y in zip(batch["x"], batch["y"], strict=True):
            metrics.update(relative_l2(self.forecast(x), y))

    def _scaled(self, fields: Tensor, kind: str, *, back: bool = False) -> Tensor:
        if self.normalise == "none" or (kind == "y" and self.normalise == "inputs"):
            return fields
        shape = (-1, *[1] * (fields.dim() - 2))
        mean, deviation = (
            torch.tensor(values, dtype=fields.dtype, device=fields.device).view(shape)
            for values in self.statistics[kind]
        )
        return fields * deviation + mean if back else (fields - mean) / deviation

    # Use

    def forecast(self, x: Tensor) -> Tensor:
        """The output (B, C', *grid) that the network expects of inputs (B, C, *grid), in the units of the data."""
        answer = self.network(self._scaled(x, "x"))
        return self._scaled(self.network.as_field(answer, x.shape[2:]).to(x.dtype), "y", back=True)

    def measure(self, sets: Sequence[FieldPairs]) -> list[Measured]:
        """Forecast and compare with the truth, grid by grid."""
        return [measure(self.forecast, self.network, pairs) for pairs in sets]

    def other_resolutions(self) -> list[FieldPairs]:
        """The test functions on other grids: simulated anew on half and on twice the points, or every second point."""
        tests = self.splits["test"]
        if self.data in SIMULATORS:
            size = self.resolutions[0]
            return [self.simulate("test", len(tests[0]), each) for each in (size // 2, 2 * size) if each >= 8]
        return [pairs for pairs in map(coarser, tests) if pairs is not None]

    def quality(self) -> dict[str, float]:
        """Mean relative L2 error of the test fields on the grid of the training."""
        errors = np.concatenate([each.errors for each in self.measure(self._held_out(None))])
        return {"relative L2": float(errors.mean())}

    def better(self, measure: str) -> Literal["max", "min"]:
        """Less error is better."""
        return "min"

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the error on the run's own test fields and on other grids, or on other data.

        Args:
            data: fields of any resolution, in any form that training reads.
            folder: where to write the report and ``errors.csv``.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.physics.operator_reports import evaluation_report, write_errors

        sets = self._held_out(data)
        measured = self.measure(sets)
        others = self.measure(self.other_resolutions()) if data is None else []
        report = evaluation_report(self, measured, others)
        if folder is not None:
            write_errors(Path(folder) / "errors.csv", measured)
            report.save(folder)
        return report

    def _held_out(self, data: str | Path | None) -> list[FieldPairs]:
        if data is None:
            if not self.splits:
                self.splits = self._read()
            return self.splits["test"]
        sets = self._files(data)
        return next(sets[name] for name in ("test", "val", "all", "train") if name in sets)

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Forecast the outputs of the fields in files; writes ``NAME_output.npz`` with ``y`` for each.

        Args:
            inputs: files with ``x`` in any form that training reads, or folders of them; with ``y`` as well the error
                is told.
            folder: where to write.

        Raises:
            DataError: a file cannot be read, or its channels are not those of the training.
        """
        from convatlas.physics.operator_reports import prediction_report, write_outputs

        done = []
        for source in inputs:
            for part, sets in self._files(source, paired=False).items():
                for number, pairs in enumerate(sets):
                    if pairs.x.shape[1] != len(self.statistics["x"][0]):
                        wanted = len(self.statistics["x"][0])
                        raise DataError(f"{source} has {pairs.x.shape[1]} channels, but the network takes {wanted}")
                    label = "_".join(
                        [Path(source).stem, *([] if part == "all" else [part]), *([str(number)] if number else [])]
                    )
                    done.append((label, pairs, in_batches(self.forecast, self.network, pairs.x)))
        written = write_outputs(Path(folder), done)
        report = prediction_report(self, done, written)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Curves, error on the test fields and on other grids, pictures and cost of a finished run."""
        from convatlas.physics.operator_reports import training_report

        return training_report(self, run)

    # Files

    def described(self) -> dict[str, Any]:
        """Grid and statistics of the training."""
        return {"grid": list(self.grid), "statistics": self.statistics}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.grid = tuple(described["grid"])
        self.statistics = {key: (list(mean), list(std)) for key, (mean, std) in described["statistics"].items()}
        self.network = self._build()


def _statistics(arrays: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of arrays (N, C, *grid); a constant channel keeps its size."""
    rows = np.concatenate([np.moveaxis(array, 1, 0).reshape(array.shape[1], -1) for array in arrays], 1)
    deviation = rows.std(1, dtype=np.float64)
    return rows.mean(1, dtype=np.float64).tolist(), np.where(deviation > 0, deviation, 1).tolist()


def _divided(
    sets: Sequence[FieldPairs], shares: Mapping[str, float], random: np.random.Generator, data: str
) -> dict[str, list[FieldPairs]]:
    """Take shares of the pairs of each grid at random; ``train`` is the rest."""
    parts: dict[str, list[FieldPairs]] = {"train": [], **{name: [] for name in shares}}
    for pairs in sets:
        if len(pairs) <= len(shares):
            raise DataError(f"{data} holds {len(pairs)} pairs on one grid, but a split needs more than {len(shares)}")
        order, start = random.permutation(len(pairs)), 0
        for name, share in shares.items():
            count = min(max(1, round(share * len(pairs))), len(pairs) - 1)
            parts[name].append(pairs.subset(np.sort(order[start : start + count])))
            start += count
        parts["train"].append(pairs.subset(np.sort(order[start:])))
    return parts


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() in (".pt", ".pth"):
        return {name: tensor.numpy() for name, tensor in read_checkpoint(path).parts.get("", {}).items()}
    return read_arrays(path)
