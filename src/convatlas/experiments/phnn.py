"""Do networks of hypercomplex layers do as much as real ones with 1/n of the parameters, and learn how to multiply?

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.experiments.small_training import (
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    one_thread,
    progress,
    resolved,
    train_by_recipe,
)
from convatlas.networks.phnn.resnet import PHResNetConfig
from convatlas.networks.registry import model_config
from convatlas.nn.conv.derived import originals
from convatlas.nn.conv.hypercomplex import PHLinear
from convatlas.ops.hypercomplex import hypercomplex_algebra, ph_weight
from convatlas.report import Cell, Claim, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Mean squared error, on targets of variance 1, with which a rule counts as learned.
LEARNED_ERROR = 1e-4
#: Largest difference of an element of A from Hamilton's rules, whose elements are 0, 1 and -1.
SAME_RULES = 0.01
#: Points that a network which sees 360 images may lose; 1437 others are the test.
TOLERANCE = 2.0
#: Accuracy of the real network in %, below which the networks have not learned enough to be compared (chance is 10).
LEARNED = 90.0
#: n times the parameters over those of the real network that mean "1/n": A, biases, norms and classifier come on top.
ABOUT_ONE = 1.05

SEEDS = (0, 1, 2)
RULE_STEPS = 400
#: Quaternions that the layer reads and puts out.
RULE_FEATURES = 4
TRAIN_FRACTION = 0.2
TRAINING = Training(epochs=12, batch_size=32, lr=3e-3, warmup_epochs=2)
NETWORK = PHResNetConfig(depths=(1, 1, 1), widths=(24, 48, 96), n=3)
#: What is compared: the real network first.
ALGEBRAS: dict[str, dict[str, Any]] = {
    "real": {"n": 1, "algebra": "real"},
    "learned, n = 3": {"n": 3},
    "learned, n = 4": {"n": 4},
    "quaternion": {"n": 4, "algebra": "quaternion"},
}
#: The networks of the paper whose parameters are counted, and their n.
COUNTED = {
    "phresnet18": (2, 4),
    "phresnet50": (2, 4),
    "phresnet18_large": (3, 4),
    "phresnet50_large": (3, 4),
    "phresnet152_large": (3, 4),
    "phvgg16": (2, 4),
    "phvgg19_large": (3, 4),
}

# Full: one training each, as the paper did.

RECIPE = "phresnet_cifar"
MODEL = "phresnet18_large"
#: Points of accuracy by which two trainings of one recipe differ.
RUN_NOISE = 0.3
EQUAL_OR_BETTER = "equal or better accuracy than real and quaternion networks on SVHN, CIFAR-10 and CIFAR-100"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" learns Hamilton's rules from products and trains small ResNets on coloured digits; "full" trains
            the large PHResNet18 in its forms by the recipe for CIFAR.
        data: for "full": CIFAR-10 or CIFAR-100 in any form that ``convatlas train recognition`` reads.
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
    """Learn Hamilton's rules; train small ResNets on coloured digits; count parameters."""
    networks = {name: NETWORK.override(**options).build for name, options in ALGEBRAS.items()}
    with progress(len(SEEDS) * (1 + len(networks) * TRAINING.epochs)) as advance:
        with one_thread():
            learned = [_learn_rule(seed, advance) for seed in SEEDS]
        trained = compare(
            networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance, change=_coloured
        )
    sections = [_rule_section(learned), _accuracy_section(trained), _parameters_section()]
    return finished("PHNN: quick test of its claims", sections)


# The rule


class _Rule(NamedTuple):
    """What a layer has learned: its A, its error on new inputs, and its errors on the way."""

    algebra: Tensor
    error: float
    errors: list[float]


def _learn_rule(seed: int, advance: Callable[[str], None]) -> _Rule:
    """Fit the A of a linear layer with given filters to Hamilton products of random quaternions."""
    generator = torch.Generator().manual_seed(seed)
    features = 4 * RULE_FEATURES
    filters = torch.randn(4, RULE_FEATURES, RULE_FEATURES, generator=generator) / features**0.5
    target = ph_weight(hypercomplex_algebra("quaternion"), filters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = PHLinear(features, features, bias=False, n=4)
    algebra, given = originals(layer)
    with torch.no_grad():
        given.copy_(filters.flatten(0, 1)).requires_grad_(False)
    optimizer = torch.optim.Adam([algebra], lr=0.05)
    errors = []
    for _ in range(RULE_STEPS):
        x = torch.randn(64, features, generator=generator)
        loss = F.mse_loss(layer(x), F.linear(x, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    x = torch.randn(4096, features, generator=generator)
    with torch.no_grad():
        error = F.mse_loss(layer(x), F.linear(x, target)).item()
    advance("learning to multiply")
    return _Rule(algebra.detach(), error, errors)


def _rule_section(learned: list[_Rule]) -> Section:
    hamilton = hypercomplex_algebra("quaternion")
    claims: list[Part] = [
        Claim.judge(
            "A hypercomplex layer learns from data how quaternions are multiplied",
            published="the authors' tutorial learns the Hamilton product",
            statistic="mean squared error on new inputs of a linear layer with n = 4 whose A was learned from products",
            value=[rule.error for rule in learned],
            at_most=LEARNED_ERROR,
            seeds=len(learned),
        ),
        Claim.judge(
            "What it learns are Hamilton's rules",
            published="the rules of the algebra are learned from data, without a given algebra",
            statistic="largest difference of an element of the learned A from Hamilton's rules",
            value=[(rule.algebra - hamilton).abs().max().item() for rule in learned],
            at_most=SAME_RULES,
            seeds=len(learned),
        ),
    ]
    pictures = [(_picture(learned[0].algebra), "learned"), (_picture(hamilton), "Hamilton's rules")]
    steps = range(1, 1 + len(learned[0].errors))
    curves = {f"seed {seed}": (steps, rule.errors) for seed, rule in zip(SEEDS, learned, strict=True)}
    return Section(
        "The rule is learned",
        [
            *claims,
            Images("The four matrices of A", pictures, "Red is 1, white 0, blue -1; of the first seed."),
            Lines("Error on the way", "step", "mean squared error", curves, log_y=True),
            Note(
                f"A linear layer from {RULE_FEATURES} to {RULE_FEATURES} quaternions with given filters; A starts at "
                f"random and is learned by Adam in {RULE_STEPS} steps from batches of 64 random inputs."
            ),
        ],
    )


def _picture(algebra: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The matrices side by side, (4, 19, 3), with a grey column between them."""
    values = algebra.clamp(-1, 1)
    colours = torch.stack([1 + values.clamp(max=0), 1 - values.abs(), 1 - values.clamp(min=0)], dim=-1)
    grey = torch.full((4, 1, 3), 0.5)
    parts = [part for matrix in colours for part in (grey, matrix)][1:]
    return (255 * torch.cat(parts, dim=1)).round().to(torch.uint8).numpy()


# Accuracy


def _coloured(pictures: Tensor, seed: int) -> Tensor:
    """Grey pictures (N, 1, H, W) at half the resolution, each in a random colour."""
    generator = torch.Generator().manual_seed(seed)
    colours = 0.2 + 0.8 * torch.rand(len(pictures), 3, 1, 1, generator=generator)
    return F.avg_pool2d(pictures, 2) * colours


def _accuracy_claim(statement: str, first: list[Trained], second: list[Trained], scale_ok: bool) -> Claim:
    differences = accuracy_differences(first, second)
    return Claim.judge(
        statement,
        published=EQUAL_OR_BETTER,
        statistic="accuracy of the former less accuracy of the latter, on the same digits; judged if it is at least "
        "twice its standard error",
        value=differences,
        at_least=0.0,
        seeds=len(SEEDS),
        scale_ok=scale_ok and resolved(differences),
        unit="points",
    )


def _accuracy_section(trained: dict[str, list[Trained]]) -> Section:
    real, three, four, quaternion = trained.values()
    scale_ok = statistics.mean(result.accuracy for result in real) >= LEARNED
    claims = [
        _accuracy_claim(
            "A network with n = 3 is at least as accurate on RGB images as the real one", three, real, scale_ok
        ),
        Claim.judge(
            f"A network with n = 3 loses at most {TOLERANCE:g} points to the real one",
            published=EQUAL_OR_BETTER,
            statistic="accuracy of the former less accuracy of the latter, on the same digits",
            value=accuracy_differences(three, real),
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            scale_ok=scale_ok,
            unit="points",
        ),
        _accuracy_claim(
            "A network with n = 3 is at least as accurate as the quaternion one", three, quaternion, scale_ok
        ),
        _accuracy_claim(
            "A learned algebra with n = 4 is at least as good as the quaternions", four, quaternion, scale_ok
        ),
    ]
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"ResNets that differ in their numbers only, after the last of {TRAINING.epochs} epochs on "
        f"{TRAIN_FRACTION:.0%} of scikit-learn's 1797 digits at 16 x 16 pixels, each in a random colour.",
    )
    note = Note(
        f"Basic blocks {NETWORK.depths}, widths {NETWORK.widths}; AdamW, learning rate {TRAINING.lr:g}, "
        f"{TRAINING.warmup_epochs:g} epochs of warm-up, cosine decay, batches of {TRAINING.batch_size}, no "
        "augmentation. With n = 4 a channel of zeros stands before RGB. Small networks on small images: they test the "
        "mechanism, not the accuracy on CIFAR."
    )
    return Section("Accuracy", [*claims, *parts, note])


# Parameters


def _parameters_section() -> Section:
    rows: list[list[Cell]] = []
    for name, dimensions in COUNTED.items():
        real = _parameters(name, n=1, algebra="real")
        for n in dimensions:
            count = _parameters(name, n=n)
            rows.append([name, n, count, real, count / real, n * count / real])
    largest = max(float(row[-1] or 0) for row in rows)
    claim = Claim.judge(
        "A hypercomplex network has about 1/n of the parameters of the real one",
        published="about 1/n of the parameters",
        statistic="n times the parameters over those of the real network; largest of the networks and n of the paper",
        value=largest,
        at_most=ABOUT_ONE,
        seeds=0,
    )
    columns = ["network", "n", "parameters", "of the real one", "share", "n times the share"]
    caption = (
        "With the biases that the authors' convolutions hold and never add. A checkpoint and the state of an optimizer "
        "shrink by the same share."
    )
    return Section("Parameters", [claim, Table("Parameters", columns, rows, caption)])


def _parameters(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return count_parameters(model_config(name, **options).build())


# Full


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train the large PHResNet18 with real, hypercomplex and quaternion convolutions by the recipe.

    Args:
        data: CIFAR-10 or CIFAR-100.
        folder: where the runs lie.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, the verdicts say that the setting
            is another.
    """
    options = changes.pop("options", {})
    runs = {}
    for name, own in ALGEBRAS.items():
        place = Path(folder) / name.replace(", n = ", "_")
        settings = {"data": str(data), "model": MODEL, **changes, "options": {**options, **own}}
        runs[name] = train_by_recipe(RECIPE, place, **settings)
    real, three, four, quaternion = runs.values()
    claims = [
        Claim.judge(
            f"{MODEL} with {ours} is as accurate as the {theirs} network",
            published=EQUAL_OR_BETTER,
            statistic="difference of the accuracies of the best epochs on the validation images",
            value=first.top1 - second.top1,
            at_least=-RUN_NOISE,
            seeds=1,
            scale_ok=not changes and not options,
            unit="points",
        )
        for first, second, ours, theirs in (
            (three, real, "n = 3", "real"),
            (three, quaternion, "n = 3", "quaternion"),
            (four, quaternion, "n = 4", "quaternion"),
        )
    ]
    rows: list[list[Cell]] = []
    curves = {}
    for name, (task, finished_run, top1) in runs.items():
        metrics = finished_run.read_metrics()
        hours = sum(row["seconds"] for row in metrics) / 3600
        rows.append([name, count_parameters(task.network), top1, hours])
        curves[name] = ([row["epoch"] for row in metrics], [100 * row["val_accuracy"] for row in metrics])
    parts: list[Part] = [
        Table("Trained here", ["network", "parameters", "accuracy [%]", "training [h]"], rows),
        Lines("Validation accuracy", "epoch", "accuracy [%]", curves),
        Files("Runs", {f"report of {name}": f"{name.replace(', n = ', '_')}/report.html" for name in runs}),
    ]
    return finished("PHNN: full test of its claims", [Section("Accuracy", [*claims, *parts])], data=str(data))
