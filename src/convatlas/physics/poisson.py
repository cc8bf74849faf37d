"""The task of solving Poisson systems on grids by a network that learned search directions without labels."""

# No postponed annotations here: the command line is built from the real types of the fields.

import csv
import dataclasses
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection

from convatlas.data.linear_systems import GridSystem, find_systems, random_system
from convatlas.data.smoke import SmokeSimulator, plume_past
from convatlas.errors import DataError, Unsupported
from convatlas.files import atomic_path, write_text
from convatlas.networks.dcdm import DCDMNet, DCDMNetConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.dcdm import dcdm, dcdm_loss, network_predictor, ritz_dataset
from convatlas.physics.linear_operators import LinearOperator, system_operator
from convatlas.physics.linear_solvers import Callback, SolveResult, pressure_solver
from convatlas.report import Report
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Poisson", "Vectors"]

#: What chooses the best epoch: iterations of so many solves.
_CHECKED, _CHECK_ITERATIONS = 4, 10
#: Of the held-out systems: seeds of the random ones, steps of smoke of which every third gives a system.
_SEEDS, _SMOKE_STEPS = (1000, 1001, 1002), 9


class Vectors(Dataset[dict[str, Tensor]]):
    """Right-hand sides (count, n) as samples ``{"b": (1, *shape), "index": ()}``, by position or (position, seed)."""

    def __init__(self, vectors: Any, shape: tuple[int, ...]) -> None:
        self.vectors, self.shape = vectors, shape

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index = key[0] if isinstance(key, tuple | list) else key
        b = torch.as_tensor(np.array(self.vectors[index])).reshape(1, *self.shape)
        return {"b": b, "index": torch.tensor(index)}


@dataclass(kw_only=True, eq=False)
class Poisson(GradientTask):
    """Train a network to give search directions for Poisson systems, and solve systems with it.

    Attributes:
        data: what it learns from: ``box``, a box of fluid of the given ``shape``; or files of systems (``.npz``, the
            published ``.bin``, or a folder), the first of which gives the operator.
        shape: cells of the box along each axis, even numbers.
        boundary: what is beyond the box: ``dirichlet`` (air) or ``neumann`` (a wall).
        model: name of the network; ``convatlas list --models``.
        options: fields of the network's config to change, e.g. ``{"width": 12}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        lanczos_steps: m, how many Ritz vectors the right-hand sides are mixed from.
        vectors: how many right-hand sides to learn from.
        theta: how many Ritz vectors beyond the half count as smooth; a twentieth of m when left out.
        vector_seed: of the right-hand sides.
        cache: ``.npy`` file for the right-hand sides: read if it is there, else written.
        val_fraction: share of the right-hand sides held out to choose the best epoch.
        tol: residual to reach in solves, over that of the start.
        max_iter: most iterations of a solve by the network.
    """

    name: ClassVar[str] = "poisson"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_residual", "min")
    smaller_is_better: ClassVar[tuple[str, ...]] = ("iterations", "against CG")
    defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 10,
        "epochs": 8,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "clip": 1.0,
    }

    data: str = "box"
    shape: tuple[int, ...] = (64, 64)
    boundary: Literal["dirichlet", "neumann"] = "dirichlet"
    model: str = "dcdm_2d_64"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    lanczos_steps: int = 1000
    vectors: int = 1000
    theta: int | None = None
    vector_seed: int = 0
    cache: str | None = None
    val_fraction: float = 0.1
    tol: float = 1e-4
    max_iter: int = 200

    network: DCDMNet = field(init=False, repr=False)
    operator: LinearOperator = field(init=False, repr=False)
    started_from: str = field(init=False, default="")

    def __post_init__(self) -> None:
        config = model_config(self.model, **self.options)  # unknown names are told before any data are read
        if not isinstance(config, DCDMNetConfig):
            raise Unsupported(f"{self.model} gives no search directions")
        self.shape = tuple(self.shape)
        if self.data == "box":
            self._check_shape(self.shape, config.ndim)
        for name, least in (("lanczos_steps", 1), ("vectors", 2), ("max_iter", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must be between 0 and 1, got {self.tol}")
        if self.cache is not None and not self.cache.endswith(".npy"):
            raise ValueError(f"cache must end in .npy, got {self.cache}")

    @staticmethod
    def _check_shape(shape: tuple[int, ...], ndim: int) -> None:
        if len(shape) != ndim:
            raise ValueError(f"shape must have {ndim} sizes for this network, got {shape}")
        if any(size < 2 or size % 2 for size in shape):
            raise ValueError(f"shape must be even, because the network pools by 2, got {shape}")

    # Data and network

    def prepare(self) -> None:
        """Make the right-hand sides and build the network.

        Raises:
            DataError: the data cannot be read, or their grid does not suit the network.
            CheckpointError: ``weights`` do not fit.
        """
        self._build()
        if self.weights is not None:
            source = published_source(self.model) if self.weights == "published" else self.weights
            self.started_from = f"{self.weights}: {load_weights(self.network, source).summary()}"
        if self.data == "box":
            self.operator = PoissonOperator(self.shape, boundary=self.boundary)
        else:
            system = find_systems([self.data])[0]
            if reason := self.refusal(system):
                raise DataError(f"{self.data}: {system.name} {reason}")
            self.shape, self.operator = system.shape, system_operator(system)
        vectors = self._right_hand_sides()
        held_out = min(max(1, round(self.val_fraction * len(vectors))), len(vectors) - 1)
        self.train_set: Vectors = Vectors(vectors[held_out:], self.shape)
        self.val_set: Vectors = Vectors(vectors[:held_out], self.shape)

    def _build(self) -> None:
        self.network = cast(DCDMNetConfig, model_config(self.model, **self.options)).build()

    def _right_hand_sides(self) -> Any:
        path = None if self.cache is None else Path(self.cache)
        if path is not None and path.is_file():
            try:
                kept = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
            if kept.shape != (self.vectors, self.operator.n):
                raise DataError(f"{path} must be {(self.vectors, self.operator.n)}, got {kept.shape}; or delete it")
            return kept
        generator = torch.Generator().manual_seed(self.vector_seed)
        with progress("Lanczos", min(self.lanczos_steps, self.operator.n)) as advance:
            made = ritz_dataset(
                self.operator,
                self.lanczos_steps,
                self.vectors,
                self.theta,
                generator=generator,
                progress=advance,
            ).numpy()
        if path is not None:
            with atomic_path(path) as part, open(part, "wb") as file:
                np.save(file, made)
        return made

    # Training

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """How far the best steps along the network's directions are from solving the systems."""
        b = batch["b"]
        return {"loss": dcdm_loss(self.network(b).float(), b, self.operator)}

    def metrics(self) -> nn.Module:
        """The loss, and log10 of the relative residual after ten iterations of a few solves, which the paper counts."""
        means = {"val_loss": MeanMetric(), "val_residual": MeanMetric()}
        return MetricCollection(means, compute_groups=False)  # type: ignore[arg-type]

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a batch, and solve the first few systems of the set."""
        b = batch["b"]
        metrics["val_loss"].update(dcdm_loss(self.network(b).float(), b, self.operator), weight=len(b))
        predictor = network_predictor(self.network, self.shape)
        for one in b[batch["index"] < _CHECKED]:
            with warnings.catch_warnings():
                # What a network says at the beginning of its training need not be a direction.
                warnings.filterwarnings("ignore", "search direction lost", RuntimeWarning)
                solved = dcdm(self.operator, one.reshape(-1), predictor, tol=0.0, max_iter=_CHECK_ITERATIONS)
            metrics["val_residual"].update(math.log10(max(solved.residuals[-1] / solved.residuals[0], 1e-30)))

    # Use

    def refusal(self, system: GridSystem) -> str | None:
        """Why the network cannot solve a system, or None if it can."""
        ndim = self.network.config.ndim
        if len(system.shape) != ndim:
            return f"has the grid {system.shape}, and the network is for {ndim} axes"
        if any(size % 2 for size in system.shape):
            return f"has the grid {system.shape}, and the network needs even sizes"
        return None

    def solve(self, system: GridSystem, callback: Callback | None = None) -> SolveResult:
        """Solve one system.

        Raises:
            DataError: the network is not for its grid.
        """
        if reason := self.refusal(system):
            raise DataError(f"{system.name} {reason}")
        device = next(self.network.parameters()).device
        predictor = network_predictor(self.network, system.shape, torch.from_numpy(system.fluid).to(device))
        # Apple's GPUs have no float64.
        b = torch.from_numpy(system.b).to(device, torch.float32 if device.type == "mps" else torch.float64)
        limits: Any = {"tol": self.tol, "max_iter": self.max_iter, "callback": callback}
        found = dcdm(system_operator(system), b, predictor, system.x0, **limits)
        return dataclasses.replace(found, x=found.x.cpu())

    def held_out(self) -> Iterator[GridSystem]:
        """Systems that nothing was learned from: a box and one with a hole, in 2-D also twice as large, and smoke."""
        sizes = [self.shape, tuple(2 * size for size in self.shape)] if len(self.shape) == 2 else [self.shape]
        for shape in sizes:
            for hole in (False, True):
                yield from (random_system(shape, seed, hole=hole) for seed in _SEEDS)
        yield from list(SmokeSimulator(plume_past(self.shape), pressure_solver()).run(_SMOKE_STEPS))[2::3]

    def quality(self) -> dict[str, float]:
        """Mean iterations of held-out solves, and their ratio to those of conjugate gradients."""
        from convatlas.physics.poisson_reports import means, measure

        return means(measure(self, self.held_out(), few=True))

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Solve held-out systems, or those in files, by the network and by the usual solvers.

        Args:
            data: systems, as `predict` takes them.
            folder: where to write the report and ``solves.csv``.

        Raises:
            DataError: the data cannot be read, or the network is for none of their grids.
        """
        from convatlas.physics.poisson_reports import evaluation_report, measure

        systems = self.held_out() if data is None else find_systems([data])
        measured = measure(self, systems)
        report = evaluation_report(self, measured)
        if folder is not None:
            rows = [[each.system.name, each.solver, each.result.iterations, each.seconds] for each in measured]
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([["system", "solver", "iterations", "seconds"], *rows])
            write_text(Path(folder) / "solves.csv", text.getvalue())
            report.save(folder)
        return report

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Solve systems; writes an NPZ file with ``x`` and ``residuals`` and a picture of each, and a page.

        Args:
            inputs: ``.npz`` files with ``b`` and ``mask`` or a matrix, published ``.bin`` files (a matrix and
                right-hand sides), or folders of these.
            folder: where to write.

        Raises:
            DataError: nothing can be read, or the network is for none of the grids.
        """
        from convatlas.physics.poisson_reports import prediction_report, solve_files

        solved, skipped = solve_files(self, find_systems(inputs), Path(folder))
        report = prediction_report(self, solved, skipped)
        report.save(folder)
        return report

    def report(self, run: Run) -> Report:
        """Solves beside the usual solvers, convergence, pictures, curves and cost of a finished run."""
        from convatlas.physics.poisson_reports import training_report

        return training_report(self, run)

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Random residuals on the grid of the training."""
        return (torch.randn(batch, 1, *self.shape, device=next(self.network.parameters()).device),)

    # Files

    def described(self) -> dict[str, Any]:
        """The grid of the training."""
        return {"shape": list(self.shape)}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.shape = tuple(described["shape"])
        self._build()
