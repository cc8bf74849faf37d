"""Do neural operators hold on grids that they were not trained on, and does a network that was turned into one?

Berner, Liu-Schiaffini, Kossaifi, Duruisseaux, Bonev, Azizzadenesheli, Anandkumar: "Principled Approaches for Extending
Neural Architectures to Function Spaces for Operator Learning", 2025, arXiv 2506.10973.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor, nn

from convatlas.analysis.resolution_sweep import layer_sweep
from convatlas.data.fields import read_fields
from convatlas.data.simulators.gaussian_fields import gaussian_field
from convatlas.errors import DataError
from convatlas.experiments.small_training import device, finished, one_thread, progress
from convatlas.networks.neural_operators.fno import FNOConfig
from convatlas.networks.neural_operators.unet import ModernUNetConfig
from convatlas.nn.fields import InputOutputInterpolate
from convatlas.ops.relative_error import relative_l2
from convatlas.physics.operator_learning import OperatorLearning
from convatlas.report import Cell, Claim, Files, Lines, Note, Part, Report, Section, Table
from convatlas.surgery.neural_operator import to_neural_operator
from convatlas.training.optim import learning_rate
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything, split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Largest error of an operator on another grid, over that on the grid of the training.
FLAT = 1.3
#: Growth of the plain network's error on twice the points.
GROWTH = 3.0
#: How many times smaller the converted network's error must be there.
SMALLER = 1.5
#: Relative error in %, above which the networks have not learned enough to be compared.
LEARNED = 30.0

SEEDS = (0, 1, 2)
GRID, GRIDS, FINEST = 32, (16, 32, 64, 128), 128
#: Pairs to learn from and to test on.
PAIRS, TESTS = 200, 20
FNO = FNOConfig(n_modes=8, dim=12, resolution=GRID)
UNET = ModernUNetConfig(dim=8, dim_mults=(1, 2), depth=1, kernel_size=5, resolution=GRID)
TRAINING = Training(epochs=15, batch_size=10, lr=5e-3, warmup_epochs=1)
NAMES = ("FNO", "U-Net", "U-Net, kernels interpolated", "U-Net, input and output interpolated")

# Full: the published training on 128 x 128 points.

RECIPES = {"FNO": "nns_to_nos_fno", "U-Net": "nns_to_nos_unet"}
BASE = 128


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains a small FNO and a small U-Net on solutions of Poisson's equation on 32 x 32 points, tests
            them on 16 to 128, and sweeps the layers over grids; "full" trains those of the paper by their recipes.
        data: for "full": a folder with the files ``nsforcing_*_train.pt`` and ``nsforcing_*_test.pt``.
        folder: for "full": where the runs lie. The same folder goes on with runs that were stopped.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data or folder.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None or folder is None:
        raise ValueError(f"budget 'full' needs data and folder, got {data} and {folder}")
    return full(data, folder)


def quick() -> Report:
    """Train on one grid, test on four; sweep the layers."""
    errors: dict[str, list[dict[int, float]]] = {name: [] for name in NAMES}
    losses: dict[str, list[float]] = {}
    with progress(2 + len(SEEDS) * 2 * TRAINING.epochs) as advance, one_thread():
        data = _pairs()
        advance("solving")
        for seed in SEEDS:
            fno, losses[f"FNO, seed {seed}"] = _train(FNO.build, data, seed, partial(advance, "training FNO"))
            unet, losses[f"U-Net, seed {seed}"] = _train(UNET.build, data, seed, partial(advance, "training U-Net"))
            networks = dict(zip(NAMES, (fno, unet, *_operators(unet)), strict=True))
            for name, network in networks.items():
                errors[name].append(_errors(network, data))
        layers = layer_sweep((16, 32, 64), points=(256, 1024, 4096))
        advance("sweeping layers")
    claims = _claims(errors, len(SEEDS), GRID)
    note = (
        f"Sources and solutions of Poisson's equation on a torus, {PAIRS} to learn from on {GRID} x {GRID} points and "
        f"{TESTS} to test; converted networks have the weights of the plain one. {TRAINING.epochs} epochs, "
        f"{len(SEEDS)} seeds."
    )
    curves = {name: (range(1, 1 + len(values)), values) for name, values in losses.items()}
    sections = [
        Section("Grids", [*claims, *_tables(errors, GRIDS), Note(note)]),
        Section("Training", [Lines("Loss", "epoch", "relative L2", curves, log_y=True)]),
        *layers.sections,
    ]
    return finished("Networks to neural operators: quick test of the claims", sections)


class _Pairs(NamedTuple):
    """Pairs to learn from (N, 1, *grid), and those to test by grid, all scaled to deviation 1."""

    x: Tensor
    y: Tensor
    tests: dict[int, tuple[Tensor, Tensor]]


def _pairs(pairs: int = PAIRS, tests: int = TESTS) -> _Pairs:
    train, fine = (
        [torch.from_numpy(each[:, None]).float().to(device()) for each in part]
        for part in (_poisson(pairs, GRID, 0), _poisson(tests, FINEST, 1))
    )
    shift, scales = train[0].mean(), (train[0].std(), train[1].std())
    x, y = train[0] - shift, train[1]
    held_out = {}
    for grid in GRIDS:
        a, b = (each[..., :: FINEST // grid, :: FINEST // grid] for each in fine)
        held_out[grid] = ((a - shift) / scales[0], b / scales[1])
    return _Pairs(x / scales[0], y / scales[1], held_out)


def _poisson(samples: int, points: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Random sources f on a torus of length 1 and the solutions of u - Laplacian(u) = f, (N, points, points) each."""
    places = np.arange(points) / points
    sources = gaussian_field(samples, 2, np.random.default_rng(seed), scale=1e4, shift=25, power=2, modes=7).on(
        places, places
    )
    rows, columns = np.fft.fftfreq(points, 1 / points)[:, None], np.fft.rfftfreq(points, 1 / points)
    spectrum = np.fft.rfft2(sources) / (1 + 4 * np.pi**2 * (rows**2 + columns**2))
    return sources, np.fft.irfft2(spectrum, s=(points, points))


def _operators(unet: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A trained network as an operator, by its kernels and by its input and output."""
    return to_neural_operator(unet, GRID).model, InputOutputInterpolate(unet, GRID)


def _train(
    build: Callable[[], nn.Module], data: _Pairs, seed: int, advance: Callable[[], None]
) -> tuple[nn.Module, list[float]]:
    seed_everything(seed)
    network = build().to(device())
    optimizer = torch.optim.AdamW(network.parameters(), lr=TRAINING.lr, weight_decay=1e-4)
    order, steps = torch.Generator().manual_seed(seed), -(-len(data.x) // TRAINING.batch_size)
    losses, done = [], 0
    for _ in range(TRAINING.epochs):
        total = 0.0
        for batch in torch.randperm(len(data.x), generator=order).split(TRAINING.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(TRAINING, done, steps)
            loss = relative_l2(network(data.x[batch]), data.y[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, done = total + loss.item(), done + 1
        losses.append(total / steps)
        advance()
    return network.eval(), losses


@torch.inference_mode()
def _errors(network: nn.Module, data: _Pairs) -> dict[int, float]:
    """Mean relative error in % on every grid."""
    found = {}
    for grid, (x, y) in data.tests.items():
        outputs = torch.cat([network(part) for part in x.split(4)])
        found[grid] = 100 * relative_l2(outputs, y).mean().item()
    return found


# -- claims, for both budgets ------------------------------------------------------------------------------------------


def _claims(
    errors: Mapping[str, list[dict[int, float]]], seeds: int, base: int, *, scale_ok: bool = True
) -> list[Claim]:
    learned = all(statistics.mean(each[base] for each in errors[name]) <= LEARNED for name in ("FNO", "U-Net"))
    told = learned and scale_ok

    def growth(name: str, *grids: int) -> list[float]:
        return [max(each[grid] for grid in grids or each) / each[base] for each in errors[name]]

    twice = 2 * base
    pairs = zip(errors["U-Net"], errors["U-Net, kernels interpolated"], strict=True)
    return [
        Claim.judge(
            "FNO keeps its error on other grids",
            published="nearly constant from 64 x 64 to 1024 x 1024 points",
            statistic="largest mean error of all grids over that on the grid of the training",
            value=growth("FNO"),
            at_most=FLAT,
            seeds=seeds,
            scale_ok=told,
            unit="times",
        ),
        Claim.judge(
            "A plain U-Net does not",
            published="degrades strongly away from the grid of the training",
            statistic="mean error on twice the points over that on the grid of the training",
            value=growth("U-Net", twice),
            at_least=GROWTH,
            seeds=seeds,
            scale_ok=told,
            unit="times",
        ),
        Claim.judge(
            "The same U-Net with kernels that follow the grid errs less there",
            published="the converted U-Net holds up",
            statistic="mean error of the plain U-Net on twice the points over that of the converted one",
            value=[plain[twice] / converted[twice] for plain, converted in pairs],
            at_least=SMALLER,
            seeds=seeds,
            scale_ok=told,
            unit="times",
        ),
    ]


def _tables(errors: Mapping[str, list[dict[int, float]]], grids: tuple[int, ...]) -> list[Part]:
    means = {name: [statistics.mean(each[grid] for each in runs) for grid in grids] for name, runs in errors.items()}
    rows: list[list[Cell]] = [[name, *values] for name, values in means.items()]
    columns = ["network", *(f"{grid} x {grid} [%]" for grid in grids)]
    curves = {name: (grids, values) for name, values in means.items()}
    return [
        Table("Relative L2 error of the test fields", columns, rows, "Mean of the seeds."),
        Lines("Error by grid", "points of an axis", "relative L2 [%]", curves, log_x=True, log_y=True),
    ]


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train FNO and U-Net by their recipes on 128 x 128 points and test them on every grid that there is.

    Args:
        data: a folder with the published files.
        folder: where the runs lie.
        changes: settings that differ from the recipes, e.g. ``epochs=30``; with any, nothing can be told.

    Raises:
        DataError: files are missing.
    """
    files = sorted(Path(data).glob("nsforcing_*_*.pt"))
    training = [file for file in files if file.stem.split("_")[1] == str(BASE)]
    tests = {int(file.stem.split("_")[1]): file for file in files if file.stem.endswith("_test")}
    if len(training) < 2 or len(tests) < 2:
        raise DataError(
            f"{data} must hold nsforcing_{BASE}_train.pt, nsforcing_{BASE}_test.pt and tests of other grids"
        )
    base = Path(folder) / "data"
    base.mkdir(parents=True, exist_ok=True)
    for file in training:
        link = base / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    errors: dict[str, list[dict[int, float]]] = {}
    for name, recipe in RECIPES.items():
        place = Path(folder) / recipe
        settings = yaml.safe_load(OperatorLearning.recipe(recipe).read_text(encoding="utf-8"))
        task, schedule = split_settings(OperatorLearning, {**settings, "data": str(base), **changes})
        task.fit(place, schedule, resume=Run(place).config.is_file())
        best = OperatorLearning.load(place)
        errors[name] = [_measured(best, tests)]
        if name == "U-Net":
            plain = best.network
            best.network = to_neural_operator(plain, BASE).model  # type: ignore[assignment]
            errors["U-Net, kernels interpolated"] = [_measured(best, tests)]
    claims = _claims(errors, 1, BASE, scale_ok=not changes)
    runs = {recipe: f"{recipe}/report.html" for recipe in RECIPES.values()}
    parts = [*claims, *_tables(errors, tuple(sorted(tests))), Files("Runs", runs)]
    return finished("Networks to neural operators: full test of the claims", [Section("Grids", parts)], data=str(data))


def _measured(task: OperatorLearning, tests: Mapping[int, Path]) -> dict[int, float]:
    found = {}
    for grid, file in sorted(tests.items()):
        sets = read_fields(file, dims=2, read=_tensors)
        pairs = next(iter(sets.values()))
        found[grid] = 100 * float(task.measure(pairs)[0].errors.mean())
    return found


def _tensors(path: Path) -> Mapping[str, Any]:
    from convatlas.weights import read_checkpoint

    return {name: tensor.numpy() for name, tensor in read_checkpoint(path).parts.get("", {}).items()}
