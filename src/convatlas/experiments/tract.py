"""Does a step on the first layer's outputs train a network in fewer epochs than the plain gradient?

Petersen, Borgelt, Ermon: "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv 2410.23970. It
claims a training that is 1.25 to 4 times as fast at equal accuracy, with any optimizer, one setting, little overhead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import FullRun, device, finished, progress, resolved, train_by_recipe
from convatlas.networks.registry import create_model
from convatlas.report import Bars, Cell, Claim, Files, Images, Lines, Note, Report, Section, Table
from convatlas.training.sampling import seed_everything
from convatlas.training.tract import TrAct, step_calls

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Times fewer epochs that count as faster: the least of the paper's 1.25 to 4.
FASTER = 1.25
#: Points of accuracy that count as no difference: two standard errors of a paired difference of three runs that are
#: 96 % right on 900 images each.
TOLERANCE = 1.0
#: Step time with TrAct over that without it that still counts as little overhead.
OVERHEAD = 1.1
#: Largest distance between the quartiles of the ratio, over its median, with which a time counts: beyond it, other
#: processes were timed. Of the repetitions the median is held against it.
STEADY = 0.3

METHOD = TrAct(lam=0.1)
SEEDS = (0, 1, 2)
#: Each method has its learning rate chosen from the same grid with another seed: the one that is there first.
TUNING_SEED = 100
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
EPOCHS = 30
BATCH = 32
#: Accuracy in % that has to be reached.
TARGET = 95.0
#: The contrast of an image is drawn between this and 1, evenly on a logarithmic scale.
LOWEST_CONTRAST = 0.1
#: Images of a step that is timed, and how often both sides are.
STEP_BATCH = 8
PAIRS = 9

# Full: figure 1 of the paper, one training each.

RECIPE = "tract_cifar10"
LENGTHS = (100, 200, 400, 800)
#: Lengths with TrAct and without it that the paper calls equal.
EQUAL = ((100, 400), (200, 800))
CIFAR10 = (10, 50_000, 10_000)
#: Points of accuracy by which two trainings on CIFAR-10 differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains a perceptron and a small convolutional network on digits of varied contrast and
            brightness, and times a training step; "full" trains ResNet-18 on CIFAR-10 by the recipe, for 100 to 800
            epochs with TrAct and without it.
        data: for "full": CIFAR-10, a folder with ``train`` and ``val`` (the test images) and a folder for each class
            in them.
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


# -- quick: digits of varied contrast ----------------------------------------------------------------------------------


class _Digits(NamedTuple):
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class _Trained(NamedTuple):
    """A training: accuracy on the test images in % after each epoch, and the first epoch that reaches the target."""

    accuracies: list[float]

    @property
    def epochs(self) -> int:
        """One more than there were, if the target is not reached."""
        reached = (epoch for epoch, accuracy in enumerate(self.accuracies, 1) if accuracy >= TARGET)
        return next(reached, EPOCHS + 1)


class _Network(NamedTuple):
    """What was found for one network: the epochs that each rate needs when tuned, the chosen rates, the trainings."""

    tuned: dict[str, dict[float, int]]
    rates: dict[str, float]
    trained: dict[str, list[_Trained]]


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _conv_net() -> nn.Module:
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(32 * 4 * 4, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"perceptron": _perceptron, "convolutional network": _conv_net}
METHODS: dict[str, TrAct | None] = {"plain gradient": None, "TrAct": METHOD}


def quick() -> Report:
    """Epochs to an accuracy with TrAct and without it, and the time of a step."""
    total = len(NETWORKS) * len(METHODS) * (len(RATES) + len(SEEDS)) + len(SEEDS)
    with _one_thread(), progress(total) as advance:
        networks = {name: _measured(name, build, advance) for name, build in NETWORKS.items()}
        timings = [_step_time(seed, advance) for seed in SEEDS]
    sections = [_network_section(name, network) for name, network in networks.items()]
    return finished("TrAct: quick test of its claims", [_data_section(), *sections, _time_section(timings)])


@contextmanager
def _one_thread() -> Iterator[None]:
    # Results do not depend on the number of cores, and other work on the machine hardly touches processor time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _digits(seed: int) -> _Digits:
    """Half of the digits to train on and half to test with, each image of its own contrast and brightness."""
    random = np.random.default_rng(seed)
    tensors = []
    for images in stratified_split(read_images("digits")["all"], {"train": 0.5, "test": 0.5}, seed).values():
        pixels = np.stack([images.image(row)[..., 0] for row in range(len(images))]).astype(np.float32) / 255
        contrast = np.exp(random.uniform(math.log(LOWEST_CONTRAST), 0, (len(pixels), 1, 1)))
        darkest = random.uniform(0, 1 - contrast)
        tensors += [torch.from_numpy((darkest + contrast * pixels).astype(np.float32)), torch.from_numpy(images.labels)]
    mean, deviation = tensors[0].mean(), tensors[0].std()
    tensors[::2] = [((part - mean) / deviation).unsqueeze(1) for part in tensors[::2]]
    return _Digits(*(tensor.to(device()) for tensor in tensors))


def _measured(name: str, build: Callable[[], nn.Module], advance: Callable[[str], None]) -> _Network:
    tuned: dict[str, dict[float, int]] = {}
    for label, method in METHODS.items():
        tuned[label] = {}
        for rate in RATES:
            tuned[label][rate] = _train(build, method, rate, TUNING_SEED, stop=True).epochs
            advance(f"{name}: learning rates")
    rates = {label: min(found, key=lambda rate: found[rate]) for label, found in tuned.items()}
    trained: dict[str, list[_Trained]] = {label: [] for label in METHODS}
    for seed in SEEDS:
        for label, method in METHODS.items():
            trained[label].append(_train(build, method, rates[label], seed))
            advance(f"{name}: {label}")
    return _Network(tuned, rates, trained)


def _train(
    build: Callable[[], nn.Module], method: TrAct | None, rate: float, seed: int, *, stop: bool = False
) -> _Trained:
    """Train with SGD; the seed decides the split, contrasts, initialisation and order. May stop at the target."""
    data = _digits(seed)
    seed_everything(seed)
    network = build().to(device())
    if method is not None:
        network = method.prepare(network)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.images), generator=order).split(BATCH):
            loss = F.cross_entropy(network(data.images[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            right = network(data.test_images).argmax(1) == data.test_labels
        accuracies.append(100 * right.double().mean().item())
        if stop and accuracies[-1] >= TARGET:
            break
    return _Trained(accuracies)


def _data_section() -> Section:
    images = _digits(SEEDS[0]).images[:8, 0].cpu()
    low, high = images.min(), images.max()
    pixels = ((images - low) / (high - low) * 255).round().to(torch.uint8).numpy()
    shown = Images("Training images", [(image, f"range {image.min()} to {image.max()}") for image in pixels])
    note = Note(
        f"Half of scikit-learn's 1797 digits are trained on, the other half are the test images. Each has a contrast "
        f"of its own between {LOWEST_CONTRAST:g} and 1 and a brightness that fits in; all are standardised together, "
        f"as the setting lambda = {METHOD.lam:g} expects. SGD with momentum 0.9 and a constant learning rate, batches "
        f"of {BATCH}, {EPOCHS} epochs. Each method has its learning rate chosen from {', '.join(map(str, RATES))} with "
        "another seed than those of the verdicts: the one that reaches the accuracy first."
    )
    return Section("Data and training", [shown, note])


def _network_section(name: str, network: _Network) -> Section:
    plain, tract = network.trained.values()
    ratios = [a.epochs / b.epochs for a, b in zip(plain, tract, strict=True)]
    # The plain gradient may be late by more than can be seen here, TrAct may not.
    told = all(each.epochs <= EPOCHS for each in tract) or any(each.epochs <= EPOCHS for each in plain)
    differences = [b.accuracies[-1] - a.accuracies[-1] for a, b in zip(plain, tract, strict=True)]
    claims = [
        Claim.judge(
            f"With TrAct a {name} needs fewer epochs",
            published="1.25 to 4 times as fast at equal accuracy (ResNets on CIFAR-10, ViT, ImageNet)",
            statistic=f"first epoch with {TARGET:g} % of the test images right, without TrAct over with it; not "
            f"reached counts as epoch {EPOCHS + 1}; judged if the mean differs from 1 by twice its standard error",
            value=ratios,
            at_least=FASTER,
            seeds=len(SEEDS),
            scale_ok=told and resolved([ratio - 1 for ratio in ratios]),
            unit="times",
        ),
        Claim.judge(
            f"With TrAct a {name} is as accurate in the end",
            published="equal accuracy after fewer epochs, higher accuracy after as many",
            statistic=f"accuracy after {EPOCHS} epochs with TrAct less accuracy without it",
            value=differences,
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            unit="points",
        ),
    ]
    rows: list[list[Cell]] = []
    curves = {}
    for label, trained in network.trained.items():
        reached = [each.epochs if each.epochs <= EPOCHS else None for each in trained]
        final = statistics.mean(each.accuracies[-1] for each in trained)
        rows.append([label, network.rates[label], *reached, final])
        mean = [statistics.mean(values) for values in zip(*(each.accuracies for each in trained), strict=True)]
        curves[label] = (range(1, 1 + len(mean)), mean)
    columns = ["method", "learning rate", *(f"epochs, seed {seed}" for seed in SEEDS), "accuracy in the end [%]"]
    tuned: list[list[Cell]] = [
        [label, *(epochs if epochs <= EPOCHS else None for epochs in found.values())]
        for label, found in network.tuned.items()
    ]
    return Section(
        f"A {name}",
        [
            *claims,
            Table(f"Epochs to {TARGET:g} %", columns, rows, "Empty: not reached.", {columns[-1]: "max"}),
            Lines("Accuracy, mean of the seeds", "epoch", "test images right [%]", curves),
            Table(
                f"Choice of the learning rate: epochs to {TARGET:g} %, seed {TUNING_SEED}",
                ["method", *map(str, RATES)],
                tuned,
                "Empty: not reached.",
            ),
        ],
    )


class _StepTime(NamedTuple):
    """Medians of alternating pairs: seconds with TrAct and without it, their ratio, and its relative spread."""

    tract: float
    plain: float
    ratio: float
    spread: float


def _step_time(seed: int, advance: Callable[[str], None]) -> _StepTime:
    torch.manual_seed(seed)
    model = create_model("resnet18", num_classes=10, small_stem=True, stem_pool=True).to(device())
    images = torch.randn(STEP_BATCH, 3, 32, 32, device=device())
    labels = torch.randint(10, (STEP_BATCH,), device=device())
    calls = step_calls(model, images, labels, METHOD)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(PAIRS + 1):
        # Who comes first sees other caches than who comes next.
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            seconds = _seconds(calls[name])
            if turn:  # the first is a warm-up
                times[name].append(seconds)
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(*times.values(), strict=True)], n=4)
    advance("timing")
    tract, plain = (statistics.median(values) for values in times.values())
    return _StepTime(tract, plain, ratio, (high - low) / ratio)


def _seconds(call: Callable[[], object]) -> float:
    if device().type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _time_section(timings: Sequence[_StepTime]) -> Section:
    claim = Claim.judge(
        "TrAct adds little to the time of a training step",
        published="a small overhead",
        statistic="time of a training step of ResNet-18 on images of 32 x 32 with TrAct over that without it, median "
        "of alternating pairs",
        value=[timing.ratio for timing in timings],
        at_most=OVERHEAD,
        seeds=len(timings),
        scale_ok=statistics.median(timing.spread for timing in timings) <= STEADY,
        unit="times",
    )
    rows: list[list[Cell]] = [
        [seed, 1000 * timing.tract, 1000 * timing.plain, timing.ratio, timing.spread]
        for seed, timing in zip(SEEDS, timings, strict=True)
    ]
    where = "a GPU" if device().type == "cuda" else "one thread of the CPU, by its processor time"
    caption = (
        f"On {where}, float32, batches of {STEP_BATCH}: medians of {PAIRS} alternating pairs. The spread is the "
        f"distance between the quartiles of the ratio, over its median; where it is mostly beyond {STEADY:g}, the "
        "machine was too busy to tell."
    )
    bars = {
        name: statistics.median(1000 * getattr(timing, field) for timing in timings)
        for name, field in (("with TrAct", "tract"), ("without it", "plain"))
    }
    columns = ["seed", "with TrAct [ms]", "without [ms]", "ratio", "spread"]
    return Section("Time of a step", [claim, Table("Step time", columns, rows, caption), Bars("Step time", "ms", bars)])


# -- full: ResNet-18 on CIFAR-10 ---------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train ResNet-18 by the recipe with TrAct and without it, for each length of the paper's figure 1.

    Args:
        data: CIFAR-10, a folder with ``train`` and ``val`` (the test images).
        folder: where the runs lie, each in a folder of its own.
        changes: settings that differ from the recipe, e.g. ``batch_size=64``. With any, or with other data than
            CIFAR-10, the accuracies are not those of the paper's setting, and the verdicts say so.
    """
    runs: dict[str, dict[int, FullRun]] = {"with TrAct": {}, "without it": {}}
    for epochs in LENGTHS:
        for label, found in runs.items():
            methods: dict[str, Any] = {"methods": {}} if label == "without it" else {}
            name = f"{'plain' if methods else 'tract'}_{epochs}"
            settings = {"data": str(data), "epochs": epochs, **methods, **changes}
            found[epochs] = train_by_recipe(RECIPE, Path(folder) / name, **settings)
    splits = runs["with TrAct"][LENGTHS[0]].task.splits
    sizes = (len(splits["train"].classes), len(splits["train"]), len(splits["val"]))
    accuracy = {label: {epochs: _last(found[epochs]) for epochs in LENGTHS} for label, found in runs.items()}
    tract, plain = accuracy.values()
    judged: dict[str, Any] = {"seeds": 1, "scale_ok": not changes and sizes == CIFAR10, "unit": "points"}
    claims = [
        *(
            Claim.judge(
                f"{short} epochs with TrAct are as good as {long} without it",
                published="100 to 200 epochs are as good as 400 to 800 of the plain network",
                statistic=f"accuracy after {short} epochs with TrAct less accuracy after {long} without it",
                value=tract[short] - plain[long],
                at_least=-RUN_NOISE,
                **judged,
            )
            for short, long in EQUAL
        ),
        *(
            Claim.judge(
                f"After {epochs} epochs the network is more accurate with TrAct",
                published="figure 1 of the paper",
                statistic="accuracy with TrAct less accuracy without it",
                value=tract[epochs] - plain[epochs],
                at_least=0.0,
                **judged,
            )
            for epochs in LENGTHS
        ),
    ]
    rows: list[list[Cell]] = [
        [epochs, tract[epochs], plain[epochs], tract[epochs] - plain[epochs]] for epochs in LENGTHS
    ]
    table = Table(
        "Accuracy after the last epoch", ["epochs", "with TrAct [%]", "without [%]", "difference [points]"], rows
    )
    curves = {label: (list(found), list(found.values())) for label, found in accuracy.items()}
    files = Files("Runs", {f"report of {path}": f"{path}/report.html" for path in _folders(runs)})
    parts: list[Any] = [*claims, table, Lines("Accuracy", "epochs", "validation images right [%]", curves), files]
    return finished("TrAct: full test of its claims", [Section("ResNet-18 on CIFAR-10", parts)], data=str(data))


def _last(run: FullRun) -> float:
    """Accuracy of the validation images after the last epoch in %: nothing is chosen on them."""
    return 100 * run.run.read_metrics()[-1]["val_accuracy"]


def _folders(runs: Mapping[str, Mapping[int, FullRun]]) -> list[str]:
    return [each.run.folder.name for found in runs.values() for each in found.values()]
