"""Do filters that are designed or learned without labels beat random ones, and does depth need a good start?

"On filter design in deep convolutional neural network", 2024. With few labels, filters that look like those of trained
networks are better than random ones; without normalisation, a deep network learns or not by how its filters are drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from convatlas.data.images import ImageSet, read_images, stratified_split
from convatlas.experiments.small_training import finished, one_thread, progress
from convatlas.nn.initialisers import initialise, lsuv_
from convatlas.ops.image_filters import dct_bank, gabor_bank
from convatlas.report import Cell, Claim, Images, Lines, Report, Section, Table
from convatlas.training.filter_learning import FilterBank, learn_filters
from convatlas.training.sampling import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points of accuracy by which a bank must beat random filters.
BETTER = 0.0
#: Factor by which the power of activations may change from the first layer to the last and still count as flat.
FLAT = 2.0
#: Points by which a deep network that learns is better than chance.
LEARNED = 10.0

SEEDS = (0, 1, 2)
#: Seeds of the fixed filters, their splits and their random filters.
SPLITS = (0, 1, 2, 3, 4)
COUNT = 24
SIDE = 5
LABELLED = (50, 200, 800)
TEST_IMAGES = 797
PATCHES = 5000
BANKS = ("random", "pca", "dct", "gabor", "zca_kmeans", "ica")

DEPTH = 24
WIDTH = 16
#: How a plain chain of convolutions begins; ``torch`` is what torch draws.
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "N(0, 0.01)": ("normal", {}),
    "torch": ("", {}),
    "Xavier": ("xavier_normal", {}),
    "He": ("he_normal", {}),
    "orthogonal": ("orthogonal", {"gain": 2**0.5}),
    "delta-orthogonal": ("delta_orthogonal", {}),
    "LSUV": ("lsuv", {}),
}
TRAINED_STARTS = ("N(0, 0.01)", "He", "orthogonal", "LSUV")
TRAINED_DEPTH = 12
EPOCHS = 3
IMAGES = 1000
BATCH = 50
RATE = 0.05

# Full: the user's images.

FULL_LABELLED = (10, 100, 1000, 5000)


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" compares fixed filters, the power of activations and short trainings on digits; "full" compares
            fixed filters on the user's images with 10 to 5000 labels for each class.
        data: for "full": CIFAR-10 or other labelled images in any form that ``convatlas train recognition`` reads.
        folder: for "full": where the banks are written.

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


def quick() -> Report:
    """Compare banks, activations and trainings."""
    with progress(len(SPLITS) * len(BANKS) + len(SEEDS) * (len(STARTS) + len(TRAINED_STARTS))) as advance, one_thread():
        images, labels = _pixels(read_images("digits")["all"], 1797, seed=0)
        found = {name: [_accuracies(name, images, labels, seed, advance) for seed in SPLITS] for name in BANKS}
        powers = {name: [_powers(name, seed, advance) for seed in SEEDS] for name in STARTS}
        trained = {
            name: [_deep_accuracy(name, images, labels, seed, advance) for seed in SEEDS] for name in TRAINED_STARTS
        }
    sections = [
        _banks_section(found, {name: _bank(name, images, 0) for name in BANKS}),
        _power_section(powers),
        _depth_section(trained),
    ]
    return finished("Filter design: quick test of its claims", sections)


def _pixels(source: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Grey images (N, 1, H, W) from 0 to 1 and their labels, in random order."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    images = torch.stack([torch.tensor(source.image(index)).float().mean(-1) for index in order])[:, None]
    return images / images.max(), torch.as_tensor(source.labels)[order]


def _bank(name: str, images: Tensor, seed: int) -> FilterBank:
    """Filters of one name: from formulas, or learned from the images, no labels needed."""
    if name == "dct":
        filters = dct_bank(SIDE, "zigzag")[1 : 1 + COUNT]  # without the mean
    elif name == "gabor":
        filters = gabor_bank(SIDE, (3.0, 5.0), orientations=6)[:COUNT]
    else:
        count = min(COUNT, SIDE**2 - 2) if name == "ica" else COUNT
        return learn_filters(list(images), name, SIDE, count, n_patches=PATCHES, seed=seed)
    return FilterBank(filters[:, None].float(), torch.zeros(len(filters)))


def _features(bank: FilterBank, images: Tensor) -> Any:
    """Responses and their opposites, cut at zero, then means over squares of 2 x 2."""
    with torch.no_grad():
        responses = bank.to_conv(padding=SIDE // 2)(images)
        both = torch.cat([responses.relu(), (-responses).relu()], 1)
        return F.avg_pool2d(both, 2).flatten(1).numpy()


def _accuracies(name: str, images: Tensor, labels: Tensor, seed: int, advance: Callable[..., None]) -> dict[int, float]:
    """Accuracy in % of a linear classifier on fixed filters, by how many labels it has."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:-TEST_IMAGES], order[-TEST_IMAGES:]
    bank = _bank(name, images[train], seed)
    features = _features(bank, images)
    results = {}
    for count in LABELLED:
        chosen = train[:count].numpy()
        classifier = LogisticRegression().fit(features[chosen], labels[chosen])
        results[count] = 100 * float(classifier.score(features[test.numpy()], labels[test]))
    advance(f"fixed filters, {name}")
    return results


def _chain(name: str, depth: int, channels: int, seed: int, batch: Tensor, *, head: int = 0) -> nn.Sequential:
    seed_everything(seed)
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [nn.Conv2d(channels if number == 0 else WIDTH, WIDTH, 3, padding=1), nn.ReLU()]
    if head:
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTH, head)]
    model = nn.Sequential(*layers)
    kind, options = STARTS[name]
    if kind == "lsuv":
        lsuv_(model, batch, tol=0.01)
    elif kind:
        # The classifier is drawn like the rest, but a delta-orthogonal matrix must not be wide.
        skip = ("0", str(len(model) - 1)) if kind == "delta_orthogonal" and head else ()
        initialise(model, kind, skip=skip, **options)
    else:
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return model


def _powers(name: str, seed: int, advance: Callable[..., None]) -> list[float]:
    """Mean square of what each layer puts out behind its ReLU, for white noise."""
    x = torch.randn(16, WIDTH, 16, 16, generator=torch.Generator().manual_seed(seed))
    model = _chain(name, DEPTH, WIDTH, seed, x)
    powers = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                powers.append(float(x.double().square().mean()))
    advance(f"activations, {name}")
    return powers


def _deep_accuracy(name: str, images: Tensor, labels: Tensor, seed: int, advance: Callable[..., None]) -> float:
    """Accuracy in % on held-out digits of a deep plain network after a short training."""
    model = _chain(name, TRAINED_DEPTH, 1, seed, images[:64], head=10)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(IMAGES, generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        right = model(images[IMAGES:]).argmax(1) == labels[IMAGES:]
    advance(f"training, {name}")
    return 100 * right.double().mean().item()


def _banks_section(found: Mapping[str, Sequence[Mapping[int, float]]], banks: Mapping[str, FilterBank]) -> Section:
    fewest = LABELLED[0]
    claims = [
        Claim.judge(
            f"With {fewest} labels {name} filters are better than random ones",
            published="structured filters beat random ones where labels are few",
            statistic=f"accuracy of a linear classifier on {COUNT} fixed filters with {fewest} labels, less that on "
            "random ones",
            value=[a[fewest] - b[fewest] for a, b in zip(found[name], found["random"], strict=True)],
            at_least=BETTER,
            seeds=len(found[name]),
            unit="points",
        )
        for name in found
        if name in ("pca", "dct", "zca_kmeans")
    ]
    rows: list[list[Cell]] = [
        [name, *(statistics.mean(each[count] for each in results) for count in LABELLED)]
        for name, results in found.items()
    ]
    columns = ["filters", *(f"{count} labels [%]" for count in LABELLED)]
    highlight: Any = dict.fromkeys(columns[1:], "max")
    pictures = [(_sheet(bank), name) for name, bank in banks.items()]
    table = Table("Accuracy on held-out digits, means of the seeds", columns, rows, "", highlight)
    return Section("Fixed filters", [*claims, table, Images("The filters", pictures)])


def _sheet(bank: FilterBank) -> Any:
    tiles = bank.filters[:, 0]
    low, high = tiles.amin((1, 2), keepdim=True), tiles.amax((1, 2), keepdim=True)
    tiles = F.pad((tiles - low) / (high - low), (0, 1, 0, 1), value=1.0)
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, -len(tiles) % 6), value=1.0)
    sheet = tiles.unflatten(0, (-1, 6)).transpose(1, 2).flatten(2).flatten(0, 1)
    return (255 * sheet).round().numpy().astype(np.uint8).repeat(8, 0).repeat(8, 1)


def _power_section(powers: Mapping[str, Sequence[Sequence[float]]]) -> Section:
    claim = Claim.judge(
        "LSUV keeps the power of activations through a deep plain network",
        published="the variance of every layer's output is 1",
        statistic=f"the larger of the two powers behind layers 1 and {DEPTH}, over the smaller",
        value=[max(each[0], each[-1]) / max(min(each[0], each[-1]), 1e-300) for each in powers["LSUV"]],
        at_most=FLAT,
        seeds=len(powers["LSUV"]),
        unit="times",
    )
    curves = {name: (range(1, 1 + DEPTH), _geometric(found)) for name, found in powers.items()}
    rows: list[list[Cell]] = [[name, f"{values[0]:.2g}", f"{values[-1]:.2g}"] for name, (_, values) in curves.items()]
    table = Table("Mean square of the activations", ["start", "layer 1", f"layer {DEPTH}"], rows)
    lines = Lines(f"{DEPTH} layers of {WIDTH} channels", "layer", "mean square behind the ReLU", curves, log_y=True)
    return Section("Activations", [claim, table, lines])


def _geometric(found: Sequence[Sequence[float]]) -> list[float]:
    logs = np.log(np.maximum(np.asarray(found), 1e-300))
    return [float(value) for value in np.exp(logs.mean(0))]


def _depth_section(trained: Mapping[str, Sequence[float]]) -> Section:
    judged: dict[str, Any] = {"at_least": LEARNED, "unit": "points", "seeds": len(SEEDS)}
    layers = f"{TRAINED_DEPTH} layers without normalisation after {EPOCHS} epochs"
    statistic = f"accuracy of {layers}, less that from N(0, 0.01)"
    claims = [
        Claim.judge(
            f"From {name} a deep plain network learns where from N(0, 0.01) it does not",
            published="the initialiser decides whether depth works without normalisation",
            statistic=statistic,
            value=[a - b for a, b in zip(trained[name], trained["N(0, 0.01)"], strict=True)],
            **judged,
        )
        for name in ("He", "LSUV")
    ]
    rows: list[list[Cell]] = [[name, *values, statistics.mean(values)] for name, values in trained.items()]
    columns = ["start", *(f"seed {seed} [%]" for seed in SEEDS), "mean [%]"]
    return Section("Depth", [*claims, Table("Accuracy on held-out digits", columns, rows)])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path) -> Report:
    """Learning curves of fixed filters on the user's images, by the labels of each class.

    Args:
        data: labelled images; those of ``train`` are learned from, those of ``val`` or ``test`` are tested on.
        folder: where the banks are written, one safetensors file each.
    """
    sets = read_images(data)
    if "train" not in sets:
        sets = stratified_split(next(iter(sets.values())), {"train": 0.8, "test": 0.2}, 0)
    train, test = sets["train"], sets.get("test", sets.get("val", sets["train"]))
    images, labels = _pixels(train, len(train), 0)
    held_out, answers = _pixels(test, len(test), 0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows: list[list[Cell]] = []
    found: dict[str, list[float]] = {}
    counts = [count for count in FULL_LABELLED if count * len(train.classes) <= len(train)] or [1]
    for name in BANKS:
        bank = _bank(name, images, 0)
        bank.save(Path(folder) / f"{name}.safetensors")
        tested = _features(bank, held_out)
        found[name] = []
        for count in counts:
            chosen = torch.cat([(labels == each).nonzero()[:count, 0] for each in labels.unique()])
            features = _features(bank, images[chosen])
            classifier = LogisticRegression(max_iter=1000).fit(features, labels[chosen])
            found[name].append(100 * float(classifier.score(tested, answers)))
        rows.append([name, *found[name]])
    claim = Claim.judge(
        f"With {counts[0]} labels of each class learned filters are better than random ones",
        published="structured filters beat random ones where labels are few",
        statistic="accuracy with k-means filters less that with random ones",
        value=found["zca_kmeans"][0] - found["random"][0],
        at_least=BETTER,
        seeds=1,
        scale_ok=len(test) >= 1000,
        unit="points",
    )
    columns = ["filters", *(f"{count} labels a class [%]" for count in counts)]
    curves = {name: (counts, values) for name, values in found.items()}
    parts: list[Any] = [
        claim,
        Table("Accuracy", columns, rows),
        Lines("Accuracy", "labels of each class", "right [%]", curves),
    ]
    return finished("Filter design: full test of its claims", [Section("Fixed filters", parts)], data=str(data))
