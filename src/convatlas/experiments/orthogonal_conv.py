"""Does the regulariser make convolutions orthogonal wherever that can be, and networks more robust?

Achour, Malgouyres, Mamalet: "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR
23, 2022, arXiv 2108.05623. It tells which convolutions can be orthogonal, that L_orth finds them but if square,
that the error does not grow with the input, and that the weight of the regulariser trades accuracy for robustness.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.analysis.orthogonality import measure_orthogonality
from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import FullRun, device, finished, one_thread, progress, train_by_recipe
from convatlas.ops.orthogonality import (
    conv_singular_values,
    l_orth,
    orthogonal_conv_exists,
    orthogonality_errors,
    spectral_bound_factor,
)
from convatlas.report import Cell, Claim, Files, Lines, Report, Section, Table
from convatlas.training.orthogonality import Orthogonality
from convatlas.training.sampling import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: L_orth that counts as zero; random kernels begin above 1.
ZERO = 1e-3
#: L_orth that is not zero: where M exceeds C k^2 it cannot fall below M - C k^2, which is at least 1.
NOT_ZERO = 0.1
#: Points of accuracy on clean images that robustness may cost.
CLEAN_LOSS = 2.0

SEEDS = (0, 1, 2)
#: M, C, k, S of 2-D kernels: rows, columns, square, and none.
SHAPES = (
    *((4, 8, 3, 1), (8, 16, 3, 1), (8, 3, 3, 2), (12, 4, 5, 2)),
    *((16, 6, 3, 1), (9, 2, 3, 2), (40, 4, 3, 3), (12, 2, 5, 2)),
    *((6, 6, 3, 1), (8, 2, 3, 2)),
    *((28, 3, 3, 4), (12, 3, 1, 2)),
)
STEPS = 400
RATE = 0.02
#: Outputs along each axis whose spectral errors are compared.
OUTPUTS = (8, 16, 32, 64)
SCALING_SHAPE = (4, 3, 3, 1)

#: lambda of the trainings on digits, none first; the last is held against none.
LAMBDAS = (0.0, 1e-3, 1e-2, 1e-1)
EPOCHS = 12
BATCH = 32
NETWORK_RATE = 3e-3
#: Largest change of a pixel, of values from 0 to 1.
FGSM = 0.1

# Full: CIFAR-10.

RECIPE = "tract_cifar10"
FULL_LAMBDAS = (0.0, 1e-5, 1e-3, 1e-1)
FULL_FGSM = 2 / 255
#: Images that are attacked.
ATTACKED = 1000
CIFAR_IMAGES = 50_000


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" minimises L_orth alone for twelve shapes and trains a small network on digits; "full" trains
            ResNet-18 on CIFAR-10 with several weights of the regulariser.
        data: for "full": CIFAR-10 in any form that ``convatlas train recognition`` reads.
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


# -- quick -------------------------------------------------------------------------------------------------------------


class _Trained(NamedTuple):
    """A training: accuracy on test images and on attacked ones in %, mean of the extreme singular values."""

    clean: float
    attacked: float
    smallest: float
    largest: float


def quick() -> Report:
    """Minimise L_orth alone; compare sizes; train on digits."""
    with progress(len(SEEDS) * (len(SHAPES) + len(LAMBDAS) + 1)) as advance, one_thread():
        minimised = [[_minimised(shape, seed, advance) for shape in SHAPES] for seed in SEEDS]
        scaled = [_scaled(seed, advance) for seed in SEEDS]
        trained = {weight: [_trained(weight, seed, advance) for seed in SEEDS] for weight in LAMBDAS}
    sections = [_existence_section(minimised), _scaling_section(scaled), _robustness_section(trained)]
    return finished("Orthogonal convolutions: quick test of their claims", sections)


def _minimised(shape: tuple[int, int, int, int], seed: int, advance: Callable[..., None]) -> tuple[float, Tensor]:
    """L_orth after its minimisation from a random kernel, and the singular values."""
    m, c, k, s = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, c, k, k, generator=generator) / math.sqrt(c * k * k)
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        l_orth(weight, s).backward()
        optimizer.step()
        schedule.step()
    advance("minimising L_orth")
    found = weight.detach().double()
    return float(l_orth(found, s)), conv_singular_values(found, s * max(k, 4), s)


def _scaled(seed: int, advance: Callable[..., None]) -> list[float]:
    """err_s over its bound, for each number of outputs."""
    m, c, k, s = SCALING_SHAPE
    weight = 0.2 * torch.randn(m, c, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bound = math.sqrt(spectral_bound_factor(m, c, k, s) * float(l_orth(weight, s)))
    advance("comparing sizes")
    return [float(orthogonality_errors(conv_singular_values(weight, s * n, s))[1]) / bound for n in OUTPUTS]


def _network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


def _trained(weight: float, seed: int, advance: Callable[..., None]) -> _Trained:
    parts = stratified_split(read_images("digits")["all"], {"train": 0.5, "test": 0.5}, seed)
    images, labels = [], []
    for part in parts.values():
        pixels = torch.stack([torch.tensor(part.image(index)[..., 0]) for index in range(len(part))])
        images.append(pixels[:, None].float() / pixels.max())
        labels.append(torch.from_numpy(part.labels))
    seed_everything(seed)
    model = _network()
    method = Orthogonality(weight=weight)
    optimizer = torch.optim.Adam(model.parameters(), NETWORK_RATE)
    order = torch.Generator().manual_seed(seed)

    def loss_fn(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(images[0][batch]), labels[0][batch])}

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images[0]), generator=order).split(BATCH):
            losses = method.losses(model, batch, loss_fn) if weight else loss_fn(model, batch)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
    advance(f"training with lambda = {weight:g}")
    clean, attacked = _accuracies(model.eval(), images[1], labels[1], FGSM)
    measured, _ = measure_orthogonality(model, images[1][:1])
    extremes = [(float(each.singular_values[-1]), float(each.singular_values[0])) for each in measured]
    smallest, largest = (statistics.mean(values) for values in zip(*extremes, strict=True))
    return _Trained(clean, attacked, smallest, largest)


def _accuracies(model: nn.Module, images: Tensor, labels: Tensor, step: float) -> tuple[float, float]:
    """Accuracy in % on images, and on those moved by one step along the sign of the gradient of the loss (FGSM)."""
    x = images.clone().requires_grad_()
    scores = model(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, labels), x)
    moved = images + step * gradient.sign()
    with torch.no_grad():
        pairs = (scores, model(moved))
    clean, attacked = (100 * (each.argmax(1) == labels).double().mean().item() for each in pairs)
    return clean, attacked


def _existence_section(minimised: Sequence[Sequence[tuple[float, Tensor]]]) -> Section:
    kinds = [orthogonal_conv_exists(*shape) for shape in SHAPES]

    def values(choose: Callable[[Any], bool], pick: Callable[[list[float]], float]) -> list[float]:
        return [
            pick([loss for (loss, _), kind in zip(found, kinds, strict=True) if choose(kind)]) for found in minimised
        ]

    claims = [
        Claim.judge(
            "Where an orthogonal convolution exists, minimising L_orth finds one (but in the square case)",
            published="L_orth falls to 0 in all cases but M = C S^2",
            statistic=f"largest L_orth of these shapes after {STEPS} steps of Adam",
            value=values(lambda kind: kind.exists and not kind.square, max),
            at_most=ZERO,
            seeds=len(minimised),
        ),
        Claim.judge(
            "Where none exists, L_orth stays above zero",
            published="necessary and sufficient conditions: M <= C k^2 for rows, S <= k for columns",
            statistic=f"smallest L_orth of these shapes after {STEPS} steps of Adam",
            value=values(lambda kind: not kind.exists, min),
            at_least=NOT_ZERO,
            seeds=len(minimised),
        ),
    ]
    rows: list[list[Cell]] = []
    for index, (shape, kind) in enumerate(zip(SHAPES, kinds, strict=True)):
        losses = [found[index][0] for found in minimised]
        spectra = torch.cat([found[index][1] for found in minimised])
        extremes = (float(spectra.min()), float(spectra.max()))
        rows.append([", ".join(map(str, shape)), kind.case, kind.reason, statistics.mean(losses), *extremes])
    columns = ["M, C, k, S", "case", "existence", "L_orth, mean", "smallest singular value", "largest"]
    curves = {}
    for index, shape in enumerate(SHAPES):
        spectrum = minimised[0][index][1]
        curves[str(shape)] = ([i / (len(spectrum) - 1) for i in range(len(spectrum))], spectrum.tolist())
    lines = Lines("Singular values after the minimisation, first seed", "share of all", "singular value", curves)
    return Section("Existence", [*claims, Table("Twelve shapes", columns, rows), lines])


def _scaling_section(scaled: Sequence[Sequence[float]]) -> Section:
    claim = Claim.judge(
        "The spectral error stays below sqrt(alpha L_orth), whatever the size of the input",
        published="theorem: err_s^2 <= alpha L_orth, with alpha independent of N",
        statistic=f"largest err_s over the bound for {OUTPUTS[0]} to {OUTPUTS[-1]} outputs along an axis",
        value=[max(each) for each in scaled],
        at_most=1.0,
        seeds=len(scaled),
    )
    rows: list[list[Cell]] = [[n, *(each[index] for each in scaled)] for index, n in enumerate(OUTPUTS)]
    table = Table("err_s over its bound", ["outputs", *(f"seed {seed}" for seed in SEEDS)], rows)
    return Section("Scalability", [claim, table])


def _robustness_section(trained: Mapping[float, Sequence[_Trained]]) -> Section:
    without, strongest = trained[LAMBDAS[0]], trained[LAMBDAS[-1]]
    judged: dict[str, Any] = {"seeds": len(without), "unit": "points"}
    attack = f"images changed by {FGSM:g} of 1 along the sign of the gradient"
    claims = [
        Claim.judge(
            f"With lambda = {LAMBDAS[-1]:g} the network is more robust",
            published="robustness grows with lambda",
            statistic=f"accuracy on {attack}, with the regulariser less without",
            value=[a.attacked - b.attacked for a, b in zip(strongest, without, strict=True)],
            at_least=0.0,
            **judged,
        ),
        Claim.judge(
            "That costs little accuracy",
            published="accuracy falls slightly as lambda grows",
            statistic="accuracy on clean images, without the regulariser less with it",
            value=[b.clean - a.clean for a, b in zip(strongest, without, strict=True)],
            at_most=CLEAN_LOSS,
            **judged,
        ),
    ]
    rows: list[list[Cell]] = []
    for weight, results in trained.items():
        means = [statistics.mean(getattr(each, name) for each in results) for name in _Trained._fields]
        rows.append([f"{weight:g}", *means])
    columns = ["lambda", "clean [%]", "attacked [%]", "smallest singular value", "largest"]
    highlight: Any = {"clean [%]": "max", "attacked [%]": "max"}
    table = Table("Digits, means of the seeds", columns, rows, "Singular values: means over the layers.", highlight)
    places = list(range(len(trained)))
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        name: (places, [float(row[column] or 0) for row in rows]) for name, column in (("clean", 1), ("attacked", 2))
    }
    lines = Lines("Accuracy", f"lambda: {', '.join(f'{weight:g}' for weight in trained)}", "right [%]", series)
    return Section("Robustness", [*claims, table, lines])


# -- full: CIFAR-10 ----------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train ResNet-18 on CIFAR-10 with several weights of the regulariser, and attack it.

    Args:
        data: CIFAR-10, a folder with ``train`` and ``val`` (the test images).
        folder: where the runs lie, each in a folder of its own.
        changes: settings that differ from the recipe, e.g. ``batch_size=64``.
    """
    runs: dict[float, FullRun] = {}
    for weight in FULL_LAMBDAS:
        methods = {"orthogonality": {"weight": weight}} if weight else {}
        settings = {"data": str(data), "methods": methods, **changes}
        runs[weight] = train_by_recipe(RECIPE, Path(folder) / f"lambda_{weight:g}", **settings)
    rows: list[list[Cell]] = []
    found: dict[float, tuple[float, float]] = {}
    for weight, done in runs.items():
        found[weight] = _attacked(done)
        size = (1, done.task.network.in_channels, 32, 32)
        measured, _ = measure_orthogonality(done.task.network.cpu(), torch.zeros(size))
        spectral = statistics.median(each.spectral for each in measured)
        rows.append([f"{weight:g}", done.top1, *found[weight], spectral])
    images = len(next(iter(runs.values())).task.splits["train"])
    strongest = FULL_LAMBDAS[-1]
    claim = Claim.judge(
        f"With lambda = {strongest:g} the network is more robust",
        published="robustness grows with lambda",
        statistic=f"accuracy on {ATTACKED} attacked images, with the regulariser less without",
        value=found[strongest][1] - found[0.0][1],
        at_least=0.0,
        seeds=1,
        scale_ok=not changes and images == CIFAR_IMAGES,
        unit="points",
    )
    columns = ["lambda", "top-1 [%]", "clean, of the attacked [%]", "attacked [%]", "median err_s"]
    files = Files("Runs", {f"lambda = {weight:g}": f"lambda_{weight:g}/report.html" for weight in runs})
    section = Section("ResNet-18 on CIFAR-10", [claim, Table("Trade", columns, rows), files])
    return finished("Orthogonal convolutions: full test of their claims", [section], data=str(data))


def _attacked(done: FullRun) -> tuple[float, float]:
    task = done.task
    images = task.splits["val"]
    count = min(ATTACKED, len(images))
    network = task.network.to(device()).eval()
    scale = min(task.preprocess.std)
    results = []
    for start in range(0, count, 100):
        places = range(start, min(start + 100, count))
        x = torch.stack([task.preprocess(images.image(index)) for index in places]).to(device())
        labels = torch.from_numpy(images.labels[places.start : places.stop]).to(device())
        results += [(len(places), *_accuracies(network, x, labels, FULL_FGSM / scale))]
    return tuple(sum(each[0] * each[i] for each in results) / count for i in (1, 2))  # type: ignore[return-value]
