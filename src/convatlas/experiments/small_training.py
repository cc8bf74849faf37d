"""What the experiments on image classifiers share: short trainings on real digits, full ones by published recipe."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from convatlas.data.images import ImageSet, read_images, stratified_split
from convatlas.data.transforms import Preprocess
from convatlas.errors import CheckpointError, Unsupported
from convatlas.networks.registry import create_model, published_files
from convatlas.recognition.reports import quality
from convatlas.recognition.task import Recognition
from convatlas.report import Cell, Files, Lines, Part, Report, Section, Table, Verdict
from convatlas.training.measure import count_parameters, provenance
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.progress import progress as bar
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything, split_settings

__all__ = [
    "IMAGENET_CLASSES",
    "FullRun",
    "Samples",
    "Trained",
    "accuracy_differences",
    "accuracy_parts",
    "compare",
    "device",
    "finished",
    "full_parts",
    "one_thread",
    "progress",
    "published_accuracy",
    "published_top1",
    "recipe_settings",
    "resolved",
    "train_by_recipe",
]

#: Classes of ImageNet-1K, which every published top-1 accuracy refers to.
IMAGENET_CLASSES = 1000


def device() -> torch.device:
    """Where the experiments run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def progress(total: int) -> AbstractContextManager[Callable[..., None]]:
    """A progress bar of an experiment; the function that it yields says what is under way and advances by one."""
    return bar("preparing", total)


# -- quick: short trainings on scikit-learn's digits -------------------------------------------------------------------


class Samples(NamedTuple):
    """Training and test samples with their labels, ready for a network: (N, C, ...) and (N)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Trained(NamedTuple):
    """A short training: parameters of the network, accuracy on the test images in %, mean loss of each epoch."""

    parameters: int
    accuracy: float
    losses: list[float]


def compare(
    networks: Mapping[str, Callable[[], nn.Module]],
    training: Training,
    *,
    seeds: Sequence[int],
    train_fraction: float = 0.5,
    samples: Callable[[int], Samples] | None = None,
    advance: Callable[[str], None],
    change: Callable[[Tensor, int], Tensor] | None = None,
) -> dict[str, list[Trained]]:
    """Train every network on the digits, or on other samples, with every seed; one result a seed.

    A seed decides the split, the order and the initialisation, so that results of one seed are pairs. The accuracy is
    that of the last epoch: nothing is chosen on the test images. On the CPU one thread does it all, so that the numbers
    do not depend on how many there are.

    Args:
        networks: what to build, by name; classes are 10.
        training: epochs, batch size, optimizer and learning rates.
        seeds: of the repetitions.
        train_fraction: share of the 1797 digits that is trained on; the others are the test images.
        samples: makes other samples than the digits from a seed.
        advance: called after every epoch.
        change: makes what the networks see of all images (N, 1, 32, 32), from 0 to 1, and a seed; nothing by default.
    """
    trained: dict[str, list[Trained]] = {name: [] for name in networks}
    with one_thread():
        for seed in seeds:
            data = samples(seed) if samples else _digits(train_fraction, seed, change)
            for name, build in networks.items():
                seed_everything(seed)
                settings = dataclasses.replace(training, seed=seed)
                trained[name].append(_train(build(), data, settings, partial(advance, f"training {name}")))
    return trained


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that numbers do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digits(train_fraction: float, seed: int, change: Callable[[Tensor, int], Tensor] | None = None) -> Samples:
    parts = {"train": train_fraction, "test": 1 - train_fraction}
    sets = stratified_split(read_images("digits")["all"], parts, seed)
    preprocess = Preprocess(size=32, mean=(0.0,), std=(1.0,), interpolation="bicubic", crop=1.0)
    tensors = []
    for place, images in enumerate(sets.values()):
        pictures = torch.stack([preprocess(images.image(index)) for index in range(len(images))])
        if change is not None:
            pictures = change(pictures, 2 * seed + place)
        tensors += [(pictures - 0.5) / 0.25, torch.from_numpy(images.labels)]
    return Samples(*(tensor.to(device()) for tensor in tensors))


def _train(network: nn.Module, data: Samples, training: Training, advance: Callable[[], None]) -> Trained:
    data = Samples(*(tensor.to(device()) for tensor in data))
    network, images = network.to(device()), data.images
    if images.dim() == 4:  # the format in which depthwise and 1x1 convolutions of this size are fastest
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, training)
    steps = -(-len(images) // training.batch_size)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(training, step, steps) / training.lr)
    order = torch.Generator().manual_seed(training.seed)
    losses = []
    for _ in range(training.epochs):
        total = 0.0
        for batch in torch.randperm(len(images), generator=order).split(training.batch_size):
            loss = F.cross_entropy(network(images[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
        advance()
    network.eval()
    with torch.inference_mode():
        right = network(data.test_images).argmax(1) == data.test_labels
    return Trained(count_parameters(network), 100 * right.double().mean().item(), losses)


def accuracy_differences(first: Sequence[Trained], second: Sequence[Trained]) -> list[float]:
    """Accuracy of the first less that of the second, in points, seed by seed."""
    return [a.accuracy - b.accuracy for a, b in zip(first, second, strict=True)]


def resolved(differences: Sequence[float]) -> bool:
    """Whether the mean of one difference a seed is at least twice its standard error."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return abs(statistics.mean(differences)) >= 2 * error


def accuracy_parts(trained: Mapping[str, Sequence[Trained]], seeds: Sequence[int], *, caption: str) -> list[Part]:
    """A table of every accuracy, and the curves of the training loss."""
    rows: list[list[Cell]] = []
    for name, results in trained.items():
        accuracies = [result.accuracy for result in results]
        rows.append([name, results[0].parameters, *accuracies, statistics.mean(accuracies)])
    columns = ["network", "parameters", *(f"seed {seed} [%]" for seed in seeds), "mean [%]"]
    curves = {}
    for name, results in trained.items():
        losses = [statistics.mean(values) for values in zip(*(result.losses for result in results), strict=True)]
        curves[name] = (range(1, 1 + len(losses)), losses)
    return [
        Table("Accuracy on the test images", columns, rows, caption, {"mean [%]": "max"}),
        Lines("Training loss, mean of the seeds", "epoch", "cross-entropy [nats]", curves, log_y=True),
    ]


# -- full: the paper's recipe on the user's images ---------------------------------------------------------------------


class FullRun(NamedTuple):
    """A finished training by recipe: the task, its run folder, and the best validation accuracy in %."""

    task: Recognition
    run: Run
    top1: float


def recipe_settings(name: str) -> dict[str, Any]:
    """The settings of a published recipe, as ``convatlas train recognition --recipe NAME`` reads them.

    Raises:
        UnknownName: there is no such recipe.
    """
    settings: dict[str, Any] = yaml.safe_load(Recognition.recipe(name).read_text(encoding="utf-8"))
    return settings


def train_by_recipe(recipe: str, folder: str | Path, **settings: Any) -> FullRun:
    """Train a recognition task by a recipe into a run folder; goes on with the run that the folder holds.

    Args:
        recipe: name of the recipe.
        folder: of the run.
        settings: fields of `Recognition` and `Training` that differ from the recipe, at least ``data``.

    Raises:
        SettingsError: the folder holds a run with other settings.
        Interrupted: the user stopped the run; the same call goes on with it.
    """
    task, training = split_settings(Recognition, {**recipe_settings(recipe), **settings})
    task.fit(folder, training, resume=Run(folder).config.is_file())
    run = Run.open(folder)
    return FullRun(task, run, 100 * max(row["val_accuracy"] for row in run.read_metrics()))


def published_accuracy(model: str, images: ImageSet) -> float | str:
    """Top-1 accuracy of a model's published weights in %, or why it cannot be measured.

    Args:
        model: name of the network.
        images: labelled with the classes of ImageNet-1K in their usual order, that of the folders' names.
    """
    if len(images.classes) != IMAGENET_CLASSES:
        return f"the images have {len(images.classes)} classes, the weights {IMAGENET_CLASSES}"
    task = Recognition(model=model)
    try:
        network: Any = create_model(model, weights="published", in_channels=images.channels)
    except (CheckpointError, Unsupported, OSError) as error:
        return str(error)
    task.network = network.to(device())
    task.classes, task.preprocess = images.classes, network.config.preprocess
    return 100 * quality(task.probabilities(images))["accuracy"]


def full_parts(
    runs: Mapping[str, FullRun], published: Mapping[str, float | None], weights: Mapping[str, float | str]
) -> list[Part]:
    """Tables, curves and links of trainings by recipe, and a table of published weights.

    Args:
        runs: the trainings, by model; each lies in a folder of its model's name below the report's.
        published: top-1 accuracy on ImageNet-1K in %, by model of ``runs``; None where it is not known.
        weights: what `published_accuracy` gave, by model.
    """
    trained: list[list[Cell]] = []
    curves = {}
    for model, (task, run, top1) in runs.items():
        rows = run.read_metrics()
        curves[model] = ([row["epoch"] for row in rows], [100 * row["val_accuracy"] for row in rows])
        hours = sum(row["seconds"] for row in rows) / 3600
        trained.append([model, count_parameters(task.network), top1, published[model], hours])
    loaded: list[list[Cell]] = []
    for model, value in weights.items():
        measured = (value, "") if isinstance(value, float) else (None, value)
        loaded.append([model, published_top1(model), *measured])
    return [
        Table("Trained here", ["model", "parameters", "top-1 [%]", "published [%]", "training [h]"], trained),
        Lines("Validation accuracy", "epoch", "top-1 [%]", curves),
        Table("Published weights", ["model", "published [%]", "top-1 [%]", "why not measured"], loaded),
        Files("Runs", {f"report of {model}": f"{model}/report.html" for model in runs}),
    ]


def published_top1(model: str) -> float:
    """Top-1 accuracy on ImageNet-1K in % that the first published file of a model should give."""
    return published_files(model)[0].figures["ImageNet-1K top-1 [%]"]


# -- both --------------------------------------------------------------------------------------------------------------


def finished(title: str, sections: Sequence[Section], **more: str) -> Report:
    """The report of an experiment, whose summary counts the verdicts."""
    verdicts = [claim.verdict for claim in Report(title, "", sections).claims]
    counts = ", ".join(f"{verdicts.count(name)} x {name}" for name in get_args(Verdict) if name in verdicts)
    return Report(title, f"Verdicts on {len(verdicts)} claims: {counts}.", sections, provenance(**more))
