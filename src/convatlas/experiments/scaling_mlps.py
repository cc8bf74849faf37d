"""Does what an MLP lacks for want of a prior about space come back with data?

Bachmann, Anagnostidis, Hofmann: "Scaling MLPs: A Tale of Inductive Bias", NeurIPS 2023, arXiv 2306.13575. It finds that
MLPs of inverted bottlenecks do better than standard ones, that they come near convolutional networks with enough data
and compute, and that their error falls as a power of compute.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.analysis.scaling_laws import ScalingLaw, fit_scaling_law, law_parts, pareto_front, training_compute
from convatlas.cost import cost
from convatlas.data.images import read_images
from convatlas.experiments.small_training import (
    device,
    finished,
    full_parts,
    one_thread,
    progress,
    resolved,
    train_by_recipe,
)
from convatlas.networks.scaling_mlps import (
    BottleneckMLP,
    BottleneckMLPConfig,
    StandardMLPConfig,
    first_layer_images,
)
from convatlas.report import Cell, Claim, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.optim import make_optimizer
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["SHAPES", "draw_shapes", "full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Accuracy in %, below which the convolutional network has not learned enough with the least data for its lead to be
#: compared (chance is 12.5).
LEARNED = 50.0
#: R^2 of the logarithm of the error along the Pareto front.
R_SQUARED = 0.9
#: Points of accuracy that a permutation of the pixels costs the convolutional network at least, and the MLP at most.
#: The latter count as no loss: single differences spread by more than that in trial runs with other seeds.
LOSS_OF_CNN, LOSS_OF_MLP = 5.0, 3.0

SEEDS = (0, 1, 2)
SIDE = 16
NOISE = 0.3
BATCH = 64
#: Steps after which the test images are classified.
STEPS = (20, 40, 80, 160, 320, 640, 1280)
#: Steps with 1, 4 and 16 times the data. The networks that the lead is measured of are trained to the last, the others
#: to the middle.
BUDGETS = (80, 320, 1280)
TEST_IMAGES = 2000
TRAINING = Training(optimizer="lion", lr=1e-3, weight_decay=0.0, schedule="constant", warmup_epochs=0)

SHAPES = ("disk", "ring", "square", "frame", "diamond", "plus", "cross", "triangle")
_SIZES: dict[str, Any] = {"num_classes": len(SHAPES), "in_channels": 1, "preprocess": {"size": SIDE}}
#: Widths of the bottleneck MLPs whose runs make the scaling law; the last is the one that is compared.
WIDTHS = (16, 32, 64)
DEPTH = 2
#: A standard MLP of as many parameters.
STANDARD = StandardMLPConfig().override(widths=(128,) * 4, **_SIZES)

# Full: from scratch on CIFAR for 1000 epochs, with augmentation.

RECIPE = "scaling_mlps_pretrain"
SCRATCH: dict[str, Any] = {"epochs": 1000, "batch_size": 4096}
TOP1 = {10: ("B_6-Wi_1024_cifar10", 70.1), 100: ("B_6-Wi_1024_cifar100", 48.3)}
RUN_NOISE = 1.0


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on synthetic shapes; "full" trains B_6-Wi_1024 from scratch.
        data: for "full": CIFAR-10 or CIFAR-100, a folder with ``train`` and ``val`` and a folder for each class in
            them.
        folder: for "full": where the run lies. The same folder goes on with a run that was stopped.

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


def draw_shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy pictures of shapes anywhere in the image, (count, 1, 16, 16), and their classes, see `SHAPES`."""
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    place = 0.9 * torch.rand(count, 2, 1, 1, generator=generator) - 0.45
    size = 0.35 + 0.2 * torch.rand(count, 1, 1, generator=generator)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    u, v = (axis - place[:, 0]) / size, (axis[:, None] - place[:, 1]) / size
    left, above = u.abs(), v.abs()
    inside = torch.stack(
        [
            u.square() + v.square() < 1,
            (u.square() + v.square() < 1.1) & (u.square() + v.square() > 0.35),
            torch.maximum(left, above) < 0.85,
            (torch.maximum(left, above) < 0.95) & (torch.maximum(left, above) > 0.5),
            left + above < 1.15,
            (torch.minimum(left, above) < 0.3) & (torch.maximum(left, above) < 1),
            (torch.minimum((u - v).abs(), (u + v).abs()) < 0.4) & (torch.maximum(left, above) < 0.9),
            (v < 0.8) & (left < (v + 1) / 1.8) & (v > -1),
        ],
        dim=1,
    )
    shape = inside[torch.arange(count), labels].float()
    contrast = torch.where(torch.rand(count, 1, 1, generator=generator) < 0.5, -1.0, 1.0)
    images = contrast * (2 * shape - 0.5) + NOISE * torch.randn(count, SIDE, SIDE, generator=generator)
    return images[:, None], labels


def _bottleneck(width: int) -> BottleneckMLP:
    return BottleneckMLPConfig().override(block_dims=((4 * width, width),) * DEPTH, **_SIZES).build()


class _ConvNet(nn.Sequential):
    """Three 3x3 convolutions of stride 2 with batch norm, mean, Linear."""

    def __init__(self) -> None:
        channels = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.GELU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], len(SHAPES)))


class _Curve(NamedTuple):
    """A training: parameters, and accuracy in % after each of `STEPS` that it came to."""

    parameters: int
    accuracies: list[float]

    def after(self, steps: int) -> float:
        return self.accuracies[STEPS.index(steps)]


def quick() -> Report:
    """MLPs beside a convolutional network on synthetic shapes with more and more data, also with permuted pixels."""
    widest = f"bottleneck MLP {WIDTHS[-1]}"
    built: list[nn.Module] = []

    def compared() -> nn.Module:
        built.append(_bottleneck(WIDTHS[-1]))
        return built[-1]

    networks: dict[str, Callable[[], nn.Module]] = {
        **{f"bottleneck MLP {width}": lambda width=width: _bottleneck(width) for width in WIDTHS[:-1]},  # type: ignore[misc]
        widest: compared,
        "standard MLP": STANDARD.build,
        "convolutional": _ConvNet,
    }
    curves: dict[str, list[_Curve]] = {}
    with progress(len(SEEDS) * (len(networks) + 2)) as advance, one_thread():
        for name, build in networks.items():
            steps = BUDGETS[-1] if name in (widest, "convolutional") else BUDGETS[1]
            curves[name] = [_train(build, seed, steps, permuted=False, advance=advance) for seed in SEEDS]
        for name in (widest, "convolutional"):
            label = f"{name}, permuted"
            curves[label] = [_train(networks[name], seed, BUDGETS[1], permuted=True, advance=advance) for seed in SEEDS]
    mlp, standard, conv = curves[widest], curves["standard MLP"], curves["convolutional"]
    with torch.device("meta"):
        macs = {name: cost(build(), torch.empty(1, 1, SIDE, SIDE)).total.macs for name, build in networks.items()}
    law_section = _law_section({name: curves[name] for name in list(networks)[: len(WIDTHS)]}, macs)
    accuracy = Section(
        "Accuracy",
        [
            *_claims(mlp, standard, conv),
            *_permutation_claims(mlp, curves[f"{widest}, permuted"], conv, curves["convolutional, permuted"]),
            *_accuracy_parts(curves, macs),
            _pictures(),
            Images("First layer of the bottleneck MLP", _first_layer(built[0]), "Its 8 largest weights."),
            Note(
                f"Every image is new; batches of {BATCH}, Lion with the constant learning rate {TRAINING.lr:g} for all "
                f"networks. {TEST_IMAGES} test images a seed. The networks with permuted pixels see one fixed "
                "permutation in training and test. Differences are judged where their mean is at least twice its "
                "standard error."
            ),
        ],
    )
    return finished("Scaling MLPs: quick test of their claims", [accuracy, law_section])


def _train(
    build: Callable[[], nn.Module], seed: int, steps: int, *, permuted: bool, advance: Callable[[str], None]
) -> _Curve:
    seed_everything(seed)
    model = build().to(device())
    order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(100 + seed))
    generator = torch.Generator().manual_seed(seed)
    test = torch.Generator().manual_seed(1000 + seed)

    def draw(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = draw_shapes(count, source)
        if permuted:
            images = images.flatten(2)[..., order].unflatten(2, (SIDE, SIDE))
        return images.to(device()), labels.to(device())

    test_images, test_labels = draw(TEST_IMAGES, test)
    optimizer = make_optimizer(model, TRAINING)
    accuracies = []
    for step in range(1, steps + 1):
        images, labels = draw(BATCH, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS:
            model.eval()
            with torch.inference_mode():
                right = model(test_images).argmax(1) == test_labels
            accuracies.append(100 * right.double().mean().item())
            model.train()
    advance("training")
    return _Curve(count_parameters(model), accuracies)


def _claims(mlp: Sequence[_Curve], standard: Sequence[_Curve], conv: Sequence[_Curve]) -> list[Claim]:
    least, middle, most = BUDGETS
    learned = statistics.mean(curve.after(least) for curve in conv) >= LEARNED
    over_standard = [a.after(middle) - b.after(middle) for a, b in zip(mlp, standard, strict=True)]

    def gaps(steps: int) -> list[float]:
        return [a.after(steps) - b.after(steps) for a, b in zip(conv, mlp, strict=True)]

    closing = [first - last for first, last in zip(gaps(least), gaps(most), strict=True)]
    return [
        Claim.judge(
            "Inverted bottlenecks are more accurate than a standard MLP of as many parameters",
            published="CIFAR-10 from scratch with augmentation, 1000 epochs: 70.1 % against 68.9 %",
            statistic=f"accuracy of the bottleneck MLP less that of the standard MLP after {middle} batches; judged if "
            "it is at least twice its standard error",
            value=over_standard,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=resolved(over_standard),
            unit="points",
        ),
        Claim.judge(
            "The lead of a convolutional network shrinks with data",
            published="the lack of inductive bias can be made up for by scale",
            statistic=f"lead of the convolutional network over the MLP after {least} batches less that after {most}; "
            "judged if it is at least twice its standard error",
            value=closing,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(closing),
            unit="points",
        ),
    ]


def _permutation_claims(
    mlp: Sequence[_Curve], mlp_permuted: Sequence[_Curve], conv: Sequence[_Curve], conv_permuted: Sequence[_Curve]
) -> list[Claim]:
    middle = BUDGETS[1]

    def losses(plain: Sequence[_Curve], permuted: Sequence[_Curve]) -> list[float]:
        return [a.after(middle) - b.after(middle) for a, b in zip(plain, permuted, strict=True)]

    published = "an MLP treats the pixels alike, whatever their order (section 3)"
    return [
        Claim.judge(
            "A permutation of the pixels costs the convolutional network accuracy",
            published=published,
            statistic=f"accuracy of the convolutional network after {middle} batches less that with permuted pixels",
            value=losses(conv, conv_permuted),
            at_least=LOSS_OF_CNN,
            seeds=len(SEEDS),
            unit="points",
        ),
        Claim.judge(
            "A permutation of the pixels costs the MLP nothing",
            published=published,
            statistic=f"accuracy of the MLP after {middle} batches less that with permuted pixels",
            value=losses(mlp, mlp_permuted),
            at_most=LOSS_OF_MLP,
            seeds=len(SEEDS),
            unit="points",
        ),
    ]


def _accuracy_parts(curves: dict[str, list[_Curve]], macs: dict[str, int]) -> list[Part]:
    means = {
        name: [statistics.mean(values) for values in zip(*(each.accuracies for each in results), strict=True)]
        for name, results in curves.items()
    }
    rows: list[list[Cell]] = [
        [
            name,
            curves[name][0].parameters,
            macs[name.removesuffix(", permuted")],
            *(dict(zip(STEPS, values, strict=False)).get(steps) for steps in BUDGETS),
        ]
        for name, values in means.items()
    ]
    columns = ["network", "parameters", "multiply-adds", *(f"{steps} batches [%]" for steps in BUDGETS)]
    lines = {name: (np.log2(STEPS[: len(values)]).tolist(), values) for name, values in means.items()}
    return [
        Table("Accuracy on new shapes, mean of the seeds", columns, rows, "", {columns[-1]: "max"}),
        Lines("Accuracy and data", "log2 of batches", "accuracy [%]", lines),
    ]


def _pictures() -> Images:
    images, labels = draw_shapes(64, torch.Generator().manual_seed(0))
    first = [int((labels == label).nonzero()[0, 0]) for label in range(len(SHAPES))]
    pixels = ((images.clamp(-2, 2) + 2) * 63.75).round().to(torch.uint8).numpy()
    return Images("One image of each class", [(pixels[index, 0], SHAPES[labels[index]]) for index in first])


def _first_layer(model: nn.Module) -> list[tuple[Any, str]]:
    pictures = first_layer_images(model, 8) if isinstance(model, BottleneckMLP) else []
    return [(picture, str(index + 1)) for index, picture in enumerate(pictures)]


def _law_section(curves: dict[str, list[_Curve]], macs: dict[str, int]) -> Section:
    names, computes, errors = [], [], []
    for name, results in curves.items():
        for index, steps in enumerate(STEPS[: len(results[0].accuracies)]):
            names.append(f"{name.removeprefix('bottleneck ')}, {steps}")
            computes.append(training_compute(macs[name], BATCH * steps))
            errors.append(1 - statistics.mean(each.accuracies[index] for each in results) / 100)
    front = pareto_front(computes, errors)
    x, y = np.asarray(computes)[front], np.asarray(errors)[front]
    enough = len(front) >= 5 and min(errors) > 0
    law: ScalingLaw | None = fit_scaling_law(x, y, resamples=50) if enough else None
    claim = Claim.judge(
        "The error falls as a power of compute, to a floor",
        published="E(C) = a (b + C)^(-alpha) + E_inf fits the front",
        statistic="R^2 of the logarithm of the error along the Pareto front of the bottleneck MLPs",
        value=float("nan") if law is None else law.r_squared,
        at_least=R_SQUARED,
        seeds=0,
    )
    parts = [] if law is None else law_parts(law, computes, errors, front, names)
    note = Note(
        "Of the runs the width and the batches are named. The error is a share of the test images, the mean of the "
        "seeds; compute in multiply-adds."
    )
    return Section("Error and compute", [claim, *parts, note])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train B_6-Wi_1024 on CIFAR from scratch for 1000 epochs.

    The recipe is that of the pre-training, with the authors' default batch of 4,096.

    Args:
        data: CIFAR-10 or CIFAR-100, a folder with ``train`` and ``val``.
        folder: where the run lies, below the name of its model.
        changes: settings that differ; with any, or with other data, the verdict says that the setting is not the
            paper's.
    """
    classes = len(read_images(str(data))["train"].classes)
    model, published = TOP1.get(classes, TOP1[10])
    settings = {**SCRATCH, "data": str(data), "model": model, **changes}
    trained = train_by_recipe(RECIPE, Path(folder) / model, **settings)
    claim = Claim.judge(
        "A bottleneck MLP from scratch reaches its published accuracy",
        published=f"{published} % after 1000 epochs with augmentation",
        statistic="top-1 accuracy of the best epoch on the validation images",
        value=trained.top1,
        at_least=published - RUN_NOISE,
        seeds=1,
        scale_ok=not changes and classes in TOP1,
        unit="%",
    )
    sections = [Section("Accuracy", [claim, *full_parts({model: trained}, {model: published}, {})])]
    return finished("Scaling MLPs: full test of their claims", sections, data=str(data))
