"""Does one transform instead of two in every layer make operator learning faster, and no less accurate?

Poli, Massaroli, Berto, Park, Dao, Re, Ermon: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS
2022, arXiv 2211.14453. It claims training steps 3 to 10 times as fast as those of models that transform in every layer,
errors more than 20 % lower on average, and an initialisation that keeps the variance of fields.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from convatlas.data.fields import FieldPairs
from convatlas.data.simulators import burgers, navier_stokes
from convatlas.experiments.small_training import device, finished, one_thread, progress
from convatlas.networks.base import FieldNetwork
from convatlas.networks.registry import create_model
from convatlas.nn.spectral_weights import SpectralInit
from convatlas.nn.t1_layer import T1Layer
from convatlas.nn.transform_conv import DCTConv, DFTConv
from convatlas.ops.dct import dct, idct
from convatlas.ops.mode_selection import select_modes, truncation_error
from convatlas.ops.relative_error import relative_l2
from convatlas.physics.operator_learning import OperatorLearning
from convatlas.report import Cell, Claim, Files, Lines, Note, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything, split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Time of a training step of FNO over that of T1, at least: the paper's lowest figure.
SPEED = 3.0
#: Error of T1 over that of FNO after as many epochs, at most; the paper's figure counts in a full run.
ERROR, FULL_ERROR = 1.0, 0.8
#: Relative error of FNO above which too little was learned to compare.
LEARNED = 0.5
#: Variance that counts as kept, and how much is left at most where it collapses.
KEPT, COLLAPSED = (0.3, 3.0), 1e-4

SEEDS = (0, 1, 2)
TRAINING = Training(epochs=12, batch_size=20, lr=3e-3, weight_decay=1e-4, warmup_epochs=1)
SAMPLES, HELD_OUT = 320, 60
NETWORK = {"width": 24, "depth": 4}
MODELS = {"T1": "t1_navier_stokes", "FNO": "t1_fno_navier_stokes"}
#: Of the initialisation: channels, points and modes of an axis, layers, fields.
WIDTH, POINTS, MODES, DEPTH, FIELDS = 32, 64, 16, 4, 4

RECIPES = {"T1": "t1_navier_stokes", "FNO": "t1_fno_navier_stokes"}


class _Problem(NamedTuple):
    """An operator to learn: pairs of fields, and the modes that the networks keep of each axis."""

    name: str
    simulate: Callable[[int, int, int], FieldPairs]
    resolution: int
    modes: int


PROBLEMS = (
    _Problem("Burgers, 64", burgers, 64, 16),
    _Problem("Navier-Stokes, 32 x 32", lambda *sizes: navier_stokes(*sizes, time=1.0), 32, 12),
)


class _Trained(NamedTuple):
    """Errors on held-out fields and in the last epoch of training, median seconds of a step, curve of the training."""

    parameters: int
    error: float
    training_error: float
    seconds: float
    losses: list[float]


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on simulated fields; "full" trains T1 and FNO by the recipes.
        data: for "full": pairs of vorticities as `OperatorLearning` reads them; simulated when left out.
        folder: for "full": where the runs lie. The same folder goes on with runs that were stopped.

    Raises:
        ValueError: the budget is unknown, or "full" lacks the folder.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if folder is None:
        raise ValueError("budget 'full' needs a folder, got None")
    return full(folder, data)


def quick() -> Report:
    """Small networks on Burgers' equation and on flows; variance of fields through layers at their initial weights."""
    total = len(PROBLEMS) * (1 + len(SEEDS) * len(MODELS)) + 1
    with progress(total) as advance, one_thread():
        sections = [_learning_section(problem, advance) for problem in PROBLEMS]
        sections.append(_initialisation_section())
        advance("initialisation")
    return finished("Transform Once: quick test of its claims", sections)


# -- learning ----------------------------------------------------------------------------------------------------------


def _learning_section(problem: _Problem, advance: Callable[[str], None]) -> Section:
    pairs = problem.simulate(SAMPLES, problem.resolution, 0)
    x, y = (_standardised(torch.as_tensor(each)) for each in (pairs.x, pairs.y))
    advance(f"simulating {problem.name}")
    trained: dict[str, list[_Trained]] = {name: [] for name in MODELS}
    for seed in SEEDS:
        for name, model in MODELS.items():
            seed_everything(seed)
            options: dict[str, Any] = {
                "dims": x.dim() - 2,
                "resolution": problem.resolution,
                "modes": problem.modes,
                **NETWORK,
            }
            network: Any = create_model(model, **options)
            trained[name].append(_train(network, x, y, dataclasses.replace(TRAINING, seed=seed)))
            advance(f"{problem.name}, {name}")
    ours, theirs = trained["T1"], trained["FNO"]
    learned = statistics.mean(each.error for each in theirs) <= LEARNED
    claims = [
        Claim.judge(
            f"T1 is as accurate as an FNO of its width on {problem.name}",
            published="errors more than 20 % lower on average than those of frequency-domain models",
            statistic="relative L2 error of T1 over that of FNO on held-out fields, after as many epochs",
            value=[a.error / b.error for a, b in zip(ours, theirs, strict=True)],
            at_most=ERROR,
            seeds=len(SEEDS),
            scale_ok=learned,
        ),
        Claim.judge(
            f"A training step of T1 is {SPEED:g} times as fast as that of FNO on {problem.name}",
            published="3 to 10 times",
            statistic="median time of a step of FNO over that of T1, on one thread",
            value=[b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)],
            at_least=SPEED,
            seeds=len(SEEDS),
        ),
    ]
    rows: list[list[Cell]] = [
        [
            name,
            results[0].parameters,
            1 if name == "T1" else 2 * NETWORK["depth"],
            *(
                statistics.mean(getattr(each, field) for each in results)
                for field in ("training_error", "error", "seconds")
            ),
        ]
        for name, results in trained.items()
    ]
    columns = ["network", "parameters", "transforms", "error in training", "error held out", "step [s]"]
    caption = f"Means of {len(SEEDS)} seeds, {SAMPLES - HELD_OUT} pairs, {TRAINING.epochs} epochs; relative L2 errors."
    curves = {
        name: (
            range(1, 1 + TRAINING.epochs),
            [statistics.mean(values) for values in zip(*(each.losses for each in results), strict=True)],
        )
        for name, results in trained.items()
    }
    kept = (problem.modes,) * (x.dim() - 2)
    needed = " x ".join(map(str, select_modes(y)))
    note = Note(
        f"{needed} modes hold 99 % of the energy of the targets. The {problem.modes} that T1 keeps of each axis leave "
        f"it an error of {truncation_error(y, kept).mean():.2%} at least."
    )
    return Section(
        problem.name,
        [
            *claims,
            Table("Networks", columns, rows, caption),
            Lines("Training error", "epoch", "relative L2", curves, log_y=True),
            note,
        ],
    )


def _standardised(fields: Tensor) -> Tensor:
    fields = fields.float().to(device())
    seen = fields[HELD_OUT:]
    return (fields - seen.mean()) / seen.std()


def _train(network: FieldNetwork, x: Tensor, y: Tensor, training: Training) -> _Trained:
    network = network.to(device())
    optimizer = make_optimizer(network, training)
    train_x, train_y = x[HELD_OUT:], y[HELD_OUT:]
    steps = math.ceil(len(train_x) / training.batch_size)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(training, step, steps) / training.lr)
    order = torch.Generator().manual_seed(training.seed)
    losses, seconds = [], []
    for _ in range(training.epochs):
        total = 0.0
        for rows in torch.randperm(len(train_x), generator=order).split(training.batch_size):
            start = time.perf_counter()
            loss = relative_l2(network(train_x[rows]), network.as_answer(train_y[rows])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
            seconds.append(time.perf_counter() - start)
            schedule.step()
        losses.append(total / len(train_x))
    network.eval()
    with torch.inference_mode():
        forecast = network.as_field(network(x[:HELD_OUT]), x.shape[2:])
        error = relative_l2(forecast, y[:HELD_OUT]).mean().item()
    return _Trained(count_parameters(network), error, losses[-1], statistics.median(seconds), losses)


# -- initialisation ----------------------------------------------------------------------------------------------------


def _initialisation_section() -> Section:
    curves: dict[str, tuple[range, list[float]]] = {}
    first: dict[str, list[float]] = {"vp": [], "naive": []}
    deep: list[float] = []
    seed_everything(SEEDS[0])
    for dims in (1, 2):
        white = torch.randn(FIELDS, WIDTH, *[POINTS] * dims)
        for kind in (DCTConv, DFTConv):
            for init in (None, "naive"):
                variances = _variances(partial(_convolution, kind, dims, init), white)
                rule = init or "vp"
                curves[f"{kind.__name__}, {dims}-D, {rule}"] = (range(1, 1 + DEPTH), variances)
                first[rule].append(variances[0])
                if rule == "vp":
                    deep += variances
        rules: tuple[SpectralInit, ...] = ("vp", "naive")
        for init in rules:
            layers = [T1Layer(WIDTH, [MODES] * dims, points=POINTS**dims, init=init) for _ in range(DEPTH)]
            axes = tuple(range(2, 2 + dims))
            modes, variances = dct(white, axes), []
            for layer in layers:
                modes = layer(modes).detach()
                variances.append(idct(modes, axes).var().item())
            curves[f"T1Layer, {dims}-D, {init}"] = (range(1, 1 + DEPTH), variances)
    claims = [
        Claim.judge(
            "A variance-preserving spectral convolution keeps the variance of a white field",
            published="unit variance at each point after truncation (section 3.4)",
            statistic="largest factor by which one layer, by cosines or Fourier, in 1-D or 2-D, changes the variance",
            value=max(max(value, 1 / value) for value in first["vp"]),
            at_most=KEPT[1],
            seeds=1,
        ),
        Claim.judge(
            "With the naive initialisation of FNO the field collapses in one layer",
            published="its variance vanishes (section 3.4)",
            statistic="largest variance that one layer leaves of a white field of variance 1",
            value=max(first["naive"]),
            at_most=COLLAPSED,
            seeds=1,
        ),
        Claim.judge(
            f"The variance stays within [{KEPT[0]}, {KEPT[1]:g}] through {DEPTH} such convolutions in a row",
            published="not claimed; a stack begins from a field that is no longer white",
            statistic="largest factor by which up to so many layers change the variance",
            value=max(max(value, 1 / value) for value in deep),
            at_most=KEPT[1],
            seeds=1,
        ),
    ]
    figure = Lines(
        "Variance after each layer at its initial weights",
        "layers",
        "variance",
        curves,
        log_y=True,
        caption=f"White fields of {POINTS} points an axis, {MODES} modes, {WIDTH} channels.",
    )
    return Section("Initialisation", [*claims, figure])


def _convolution(kind: type[DCTConv] | type[DFTConv], dims: int, init: Any) -> nn.Module:
    return kind(WIDTH, WIDTH, [MODES] * dims, points=POINTS**dims, init=init)


def _variances(make: Callable[[], nn.Module], x: Tensor) -> list[float]:
    variances = []
    with torch.inference_mode():
        for _ in range(DEPTH):
            x = make()(x)
            variances.append(x.var().item())
    return variances


# -- full --------------------------------------------------------------------------------------------------------------


def full(folder: str | Path, data: str | Path | None = None, **changes: Any) -> Report:
    """Train T1 and FNO by the recipes for flows on 64 x 64 points.

    Args:
        folder: where the runs lie, each below the name of its recipe.
        data: pairs of vorticities; simulated by the recipe when left out.
        changes: settings that differ from the recipe; with any, the verdicts say that the scale is another.
    """
    given = {} if data is None else {"data": str(data)}
    runs = {}
    for name, recipe in RECIPES.items():
        settings = yaml.safe_load(OperatorLearning.recipe(recipe).read_text(encoding="utf-8"))
        task, training = split_settings(OperatorLearning, {**settings, **given, **changes})
        place = Path(folder) / recipe
        task.fit(place, training, resume=Run(place).config.is_file())
        runs[name] = task, Run.open(place)
    errors = {name: task.quality()["relative L2"] for name, (task, _) in runs.items()}
    seconds = {
        name: statistics.median(row["seconds"] for row in opened.read_metrics()) for name, (_, opened) in runs.items()
    }
    claims = [
        Claim.judge(
            "T1 has a fifth less error than FNO on flows",
            published="errors more than 20 % lower on average",
            statistic="relative L2 error of T1 over that of FNO on the test fields",
            value=errors["T1"] / errors["FNO"],
            at_most=FULL_ERROR,
            seeds=1,
            scale_ok=not changes,
        ),
        Claim.judge(
            f"T1 trains {SPEED:g} times as fast as FNO",
            published="3 to 10 times",
            statistic="median time of an epoch of FNO over that of T1",
            value=seconds["FNO"] / seconds["T1"],
            at_least=SPEED,
            seeds=1,
            scale_ok=not changes,
        ),
    ]
    rows: list[list[Cell]] = [
        [name, count_parameters(task.network), errors[name], seconds[name]] for name, (task, _) in runs.items()
    ]
    table = Table("Trained by the recipes", ["network", "parameters", "relative L2", "epoch [s]"], rows)
    reports = Files("Runs", {f"report of {name}": f"{recipe}/report.html" for name, recipe in RECIPES.items()})
    return finished("Transform Once: full test of its claims", [Section("Flows", [*claims, table, reports])])
