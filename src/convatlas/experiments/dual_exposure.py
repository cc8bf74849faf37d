"""Does a second exposure help to find the colour of the light, to networks of 354 and 6,156 parameters?

Afifi, Hu, Liang: "Optimizing Illuminant Estimation in Dual-Exposure HDR Imaging", ECCV 2024, arXiv 2403.02449. The
paper's pictures are not public: the quick test has made-up scenes, the full one takes a user's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.data.exposure_pairs import ExposurePair
from convatlas.data.linear_images import LinearImage
from convatlas.data.simulators.exposures import illuminant_exposures
from convatlas.experiments.small_training import finished, one_thread, progress
from convatlas.networks.colour_constancy.description import IlluminantNetwork
from convatlas.networks.registry import create_model
from convatlas.ops.illuminant import STATISTICAL, angular_error, error_statistics
from convatlas.report import Bars, Cell, Claim, Files, Part, Report, Section, Table
from convatlas.restoration.illuminant_estimation import IlluminantEstimation
from convatlas.restoration.illuminant_training import (
    DescribedScenes,
    LossSettings,
    Scene,
    collate_described,
    illuminant_losses,
    ready,
)
from convatlas.training.measure import count_parameters
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Degrees by which ECCC has to be better than CCC on scenes with much clipping.
GAIN = 0.05
#: Degrees by which EMLP has to be better than one light for all scenes.
EMLP_GAIN = 0.5
#: Largest mean error of the full test in degrees.
FULL_ERROR = 2.5

PARAMETERS = {"emlp": 354, "eccc": 6156}
MODELS = ("emlp", "ccc", "eccc")
SEEDS = (0, 1, 2)
TRAIN, TEST = 600, 200
#: EMLP, which is small, learns longer.
EPOCHS = {"emlp": 40, "ccc": 15, "eccc": 15}
TRAINING: dict[str, Any] = {"batch_size": 32, "lr": 1e-2, "weight_decay": 1e-5, "warmup_epochs": 0}
CONSTANT, ENSEMBLE = "mean of the training", "emlp and eccc"

FULL_MODELS = ("emlp", "ccc", "eccc", "emlp_eccc")
FULL_FOLDS, FULL_EPOCHS = 3, 200


class _Measured(NamedTuple):
    """One seed: the error of each test scene in degrees by estimate, and which scenes clip more than most."""

    errors: dict[str, Tensor]
    clipped: Tensor

    def mean(self, name: str, clipped: bool | None = None) -> float:
        """Mean error, of all scenes, of those that clip more than the median, or of the others."""
        kept = self.errors[name] if clipped is None else self.errors[name][self.clipped == clipped]
        return float(kept.mean())


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" makes scenes up; "full" takes a folder of scenes with known light.
        data: for "full": folders with ``long``, ``short`` and ``meta.json``.
        folder: for "full": where to write the runs.

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
    """Train EMLP, CCC and ECCC on 600 made-up scenes, measure on 200 others, with three seeds."""
    with progress(len(SEEDS) * (1 + sum(EPOCHS.values()))) as advance, one_thread():
        measured = [_measured(seed, advance) for seed in SEEDS]
    sections = [Section("Claims", _claims(measured)), _table(measured), _parameters()]
    return finished("Dual-exposure illuminant estimation: quick test of its claims", sections)


def _scene(seed: int) -> Scene:
    made = illuminant_exposures(seed)
    pair = ExposurePair(str(seed), LinearImage(made.long), LinearImage(made.short), made.illuminant, made.ratio)
    return ready(pair, max(made.long.shape))


def _measured(seed: int, advance: Callable[[str], None]) -> _Measured:
    first = seed * (TRAIN + TEST)
    scenes = [_scene(number) for number in range(first, first + TRAIN + TEST)]
    train, test = scenes[:TRAIN], scenes[TRAIN:]
    advance(f"seed {seed}: scenes")
    truth = torch.stack([scene.rgb for scene in test])
    mean = torch.stack([scene.rgb for scene in train]).mean(0)
    estimates = {CONSTANT: F.normalize(mean, dim=0).expand_as(truth)}
    for name, function in STATISTICAL.items():
        estimates[name] = torch.cat([function(scene.long) for scene in test])
    for name in MODELS:
        network = _trained(name, train, seed, advance)
        batch = collate_described(_samples(DescribedScenes(test, network)))
        with torch.inference_mode():
            estimates[name] = network(*batch["inputs"])
    estimates[ENSEMBLE] = F.normalize(estimates["emlp"] + estimates["eccc"], dim=1)
    share = torch.stack([(scene.long >= 1).any(1).float().mean() for scene in test])
    errors = {name: angular_error(rgb.double(), truth.double()) for name, rgb in estimates.items()}
    return _Measured(errors, share > share.median())


def _samples(described: DescribedScenes) -> list[dict[str, Any]]:
    return [described[row] for row in range(len(described))]


def _trained(name: str, scenes: list[Scene], seed: int, advance: Callable[[str], None]) -> IlluminantNetwork:
    seed_everything(seed)
    network = cast(IlluminantNetwork, create_model(name))
    data = collate_described(_samples(DescribedScenes(scenes, network)))
    training = Training(epochs=EPOCHS[name], seed=seed, **TRAINING)
    optimizer, settings = make_optimizer(network, training), LossSettings()
    steps = -(-len(scenes) // training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(training, step, steps) / training.lr
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(scenes), generator=order).split(training.batch_size):
            inputs = [part[rows] for part in data["inputs"]]
            loss = illuminant_losses(network, inputs, data["rgb"][rows], settings)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance(f"seed {seed}: {name}")
    return network.eval()


def _claims(measured: list[_Measured]) -> list[Claim]:
    best = [min(each.mean(name) for name in STATISTICAL) for each in measured]
    gains = [
        [each.mean(CONSTANT, clipped) - each.mean("emlp", clipped) for each in measured] for clipped in (True, False)
    ]
    return [
        Claim.judge(
            "EMLP has 354 and ECCC 6,156 parameters",
            published="354 and 6,156",
            statistic="largest difference from the published numbers",
            value=max(abs(count_parameters(create_model(name)) - count) for name, count in PARAMETERS.items()),
            at_most=0,
            seeds=0,
        ),
        Claim.judge(
            "Mixing biases by the two exposures helps where channels clip",
            published="ECCC beats convolutional colour constancy of one frame",
            statistic="mean error of CCC less that of ECCC, on the test scenes that clip more than the median",
            value=[each.mean("ccc", True) - each.mean("eccc", True) for each in measured],
            at_least=GAIN,
            seeds=len(measured),
            unit="degrees",
        ),
        Claim.judge(
            "What changes between two exposures tells the light by itself",
            published="EMLP rivals networks of 10^5 to 10^6 parameters",
            statistic="mean error of one light for all scenes less that of EMLP",
            value=[each.mean(CONSTANT) - each.mean("emlp") for each in measured],
            at_least=EMLP_GAIN,
            seeds=len(measured),
            unit="degrees",
        ),
        Claim.judge(
            "It does so because channels clip differently",
            published="colours change between exposures as channels clip or sink into noise",
            statistic="gain of EMLP over one light for all: on scenes that clip more than the median, less on others",
            value=[much - little for much, little in zip(*gains, strict=True)],
            at_least=0.0,
            seeds=len(measured),
            unit="degrees",
        ),
        Claim.judge(
            "ECCC beats all statistical estimates",
            published="it does on the authors' pictures",
            statistic="smallest mean error of gray world, shades of gray, white patch, gray edge, less that of ECCC",
            value=[other - each.mean("eccc") for other, each in zip(best, measured, strict=True)],
            at_least=0.0,
            seeds=len(measured),
            unit="degrees",
        ),
        Claim.judge(
            "Both together are better than each",
            published="ensembles are best",
            statistic="smaller mean error of EMLP and ECCC less that of their average",
            value=[min(each.mean("emlp"), each.mean("eccc")) - each.mean(ENSEMBLE) for each in measured],
            at_least=0.0,
            seeds=len(measured),
            unit="degrees",
        ),
    ]


def _table(measured: list[_Measured]) -> Section:
    rows: list[list[Cell]] = []
    means: dict[str, float] = {}
    for name in measured[0].errors:
        found = [error_statistics(each.errors[name]) for each in measured]
        numbers = [statistics.mean(each[key] for each in found) for key in ("mean", "median", "worst 25 %")]
        halves = [statistics.mean(each.mean(name, clipped) for each in measured) for clipped in (False, True)]
        means[name] = numbers[0]
        rows.append([name, *numbers, *halves])
    columns = ["", "mean", "median", "worst 25 %", "little clipping", "much clipping"]
    columns = [columns[0], *(f"{name} [deg]" for name in columns[1:])]
    caption = f"Means of {len(measured)} seeds, {TRAIN} scenes to learn from and {TEST} to measure on."
    highlight: Any = dict.fromkeys(columns[1:], "min")
    parts: list[Part] = [
        Table("Angular error", columns, rows, caption, highlight),
        Bars("Mean", "angular error [deg]", means),
    ]
    return Section("Errors", parts)


def _parameters() -> Section:
    rows: list[list[Cell]] = [[name, count_parameters(create_model(name))] for name in MODELS]
    return Section("Sizes", [Table("Parameters", ["network", "parameters"], rows)])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path) -> Report:
    """Cross-validate all networks on a user's scenes; goes on with the runs that the folder holds."""
    errors: dict[str, Tensor] = {}
    for model in FULL_MODELS:
        task = IlluminantEstimation(data=str(data), model=model, folds=FULL_FOLDS, augment=True)
        place = Run(Path(folder) / model)
        task.fit(
            place.folder,
            Training(**{**IlluminantEstimation.defaults, "epochs": FULL_EPOCHS}),
            resume=place.config.is_file(),
        )
        measured, _ = task.held_out()
        truth = torch.stack([each.truth for each in measured]).double()
        errors[model] = angular_error(torch.stack([each.rgb[model] for each in measured]).double(), truth)
    claims = [
        Claim.judge(
            f"{model} finds the light",
            published="about 2 degrees on the authors' pictures, which are not public",
            statistic=f"mean angular error of a cross-validation of {FULL_FOLDS} folds",
            value=float(errors[model].mean()),
            at_most=FULL_ERROR,
            seeds=0,
            unit="degrees",
        )
        for model in ("emlp", "eccc")
    ]
    claims.append(
        Claim.judge(
            "Mixing biases by the two exposures helps",
            published="ECCC beats convolutional colour constancy of one frame",
            statistic="mean error of CCC less that of ECCC",
            value=float(errors["ccc"].mean() - errors["eccc"].mean()),
            at_least=GAIN,
            seeds=0,
            unit="degrees",
        )
    )
    return finished(
        "Dual-exposure illuminant estimation: full test of its claims",
        [Section("Claims", claims), Section("Errors", [_statistics(errors), _links()])],
        data=str(data),
    )


def _statistics(errors: Mapping[str, Tensor]) -> Table:
    found = {name: error_statistics(each) for name, each in errors.items()}
    columns = [f"{name} [deg]" for name in next(iter(found.values()))]
    return Table("Angular error", ["", *columns], [[name, *each.values()] for name, each in found.items()])


def _links() -> Files:
    return Files("Runs", {f"report of {model}": f"{model}/report.html" for model in FULL_MODELS})
