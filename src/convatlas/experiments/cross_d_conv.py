"""Do 3-D kernels that were learned from 2-D images serve volumes better than inflated 2-D kernels?

Yavuz, Yang: "Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting Operation", 2024, arXiv
2411.02441. It claims that features of volumes are as good as those of networks trained in the usual way, or better.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from convatlas.data.images import ImageSet, read_images
from convatlas.data.transforms import Preprocess
from convatlas.experiments.small_training import device, finished, one_thread, progress, train_by_recipe
from convatlas.networks.cross_d_resnet import CrossDResNetConfig
from convatlas.networks.registry import create_model
from convatlas.networks.resnet import ResNetConfig
from convatlas.nn.conv.cross_d_conv import convert_to_3d
from convatlas.report import Bars, Cell, Claim, Images, Report, Section, Table
from convatlas.training.sampling import seed_everything
from convatlas.weights import load_weights

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points of accuracy that count as no difference: two standard errors of a paired difference of three runs that are
#: 80 % right on 150 volumes each.
TOLERANCE = 4.0
#: Accuracy on slices in %, below which a network has not learned what could be transferred (chance is 33).
LEARNED = 60.0

SEEDS = (0, 1, 2)
SHAPES = ("ellipsoid", "box", "torus")
SIDE = 16
SLICES = 900
EPOCHS = 6
BATCH = 30
RATE = 1e-2
#: Volumes that the probe learns from, and volumes that it is tested on.
VOLUMES = (36, 150)
NOISE = 0.1
SIZES: dict[str, Any] = {
    "depths": (1, 1),
    "widths": (8, 16),
    "stem_width": 8,
    "small_stem": True,
    "in_channels": 1,
    "num_classes": len(SHAPES),
    "preprocess": Preprocess(size=SIDE, mean=(0.0,), std=(1.0,)),
}
#: Steps that are timed, in alternating pairs.
PAIRS = 7

# Full: RadImageNet, then labelled volumes.

RECIPE = "cross_d_resnet18"
NEIGHBOURS = 5


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claim of the paper.

    Args:
        budget: "quick" trains small ResNets on slices of generated solids and probes their features of the solids;
            "full" trains ResNet-18 by the recipe on images and looks for the nearest neighbours of volumes.
        data: for "full": a folder with ``images`` (RadImageNet: ``train`` and ``val``) and ``volumes`` (``train`` and
            ``test`` with a folder of volumes for each class).
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


# -- quick: solids and their slices ------------------------------------------------------------------------------------


class _Solids(NamedTuple):
    """Volumes (N, 1, D, H, W) and their shapes (N)."""

    volumes: Tensor
    labels: Tensor


class _Outcome(NamedTuple):
    """What one seed gave: accuracy on slices by network, accuracy of the probe on volumes by kernels, both in %."""

    slices: dict[str, float]
    volumes: dict[str, float]


def quick() -> Report:
    """Train on slices, probe on volumes, time a step."""
    with progress(len(SEEDS) * (2 * EPOCHS + 4) + 1) as advance, one_thread():
        outcomes = [_outcome(seed, advance) for seed in SEEDS]
        ratio = _step_ratio()
        advance("timing")
    return finished("Cross-D Conv: quick test of its claim", [_transfer_section(outcomes), _cost_section(ratio)])


def _solids(count: int, generator: np.random.Generator) -> _Solids:
    """Solids of random size and place, turned at random, under noise."""
    axis = np.linspace(-1, 1, SIDE)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    volumes, labels = [], np.arange(count) % len(SHAPES)
    for label in labels:
        turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        size = generator.uniform(0.4, 0.75, 3)
        points = (grid - generator.uniform(-0.2, 0.2, 3)) @ turn
        inside = _inside(SHAPES[label], points, size).reshape((SIDE,) * 3)
        volumes.append(inside + NOISE * generator.normal(size=inside.shape))
    return _Solids(torch.from_numpy(np.stack(volumes)).float()[:, None], torch.from_numpy(labels))


def _inside(shape: str, points: npt.NDArray[Any], size: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if shape == "ellipsoid":
        return ((points / size) ** 2).sum(1) < 1
    if shape == "box":
        return (np.abs(points) < 0.8 * size).all(1)
    ring = np.hypot(points[:, 0], points[:, 1]) - 0.8 * size[0]
    return np.hypot(ring, points[:, 2]) < 0.5 * size[1]


def _slices(solids: _Solids, generator: np.random.Generator) -> _Solids:
    """One slice near the middle of each solid, along a random axis, (N, 1, H, W)."""
    cuts = []
    for volume in solids.volumes[:, 0]:
        place = int(generator.integers(SIDE // 3, SIDE - SIDE // 3))
        cuts.append(volume.select(int(generator.integers(3)), place))
    return _Solids(torch.stack(cuts)[:, None], solids.labels)


def _outcome(seed: int, advance: Callable[..., None]) -> _Outcome:
    generator = np.random.default_rng(seed)
    train = _slices(_solids(SLICES, generator), generator)
    test = _slices(_solids(SLICES // 3, generator), generator)
    probed, held_out = (_solids(count, generator) for count in VOLUMES)
    networks: dict[str, nn.Module] = {}
    accuracy: dict[str, float] = {}
    for name, config in (("Cross-D", CrossDResNetConfig(**SIZES)), ("plain", ResNetConfig(**SIZES))):
        seed_everything(seed)
        networks[name] = config.build()
        _train(networks[name], train, seed, partial(advance, f"training {name}"))
        accuracy[name] = _accuracy(networks[name], test)
    seed_everything(seed)
    untrained = CrossDResNetConfig(**SIZES).build()
    forms: dict[str, tuple[nn.Module, Any]] = {
        "Cross-D kernels": (networks["Cross-D"], "centre"),
        "plain, centre": (networks["plain"], "centre"),
        "plain, mean": (networks["plain"], "mean"),
        "random kernels": (untrained, "centre"),
    }
    probes = {}
    for name, (network, inflation) in forms.items():
        solid = convert_to_3d(network, inflation=inflation).model
        probes[name] = _probe(solid, probed, held_out, seed)
        advance(f"probing {name}")
    return _Outcome(accuracy, probes)


def _train(network: nn.Module, data: _Solids, seed: int, advance: Callable[[], None]) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    # Down to zero, so that the statistics of the norms catch up with the weights.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-len(data.labels) // BATCH))
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(data.volumes[batch]), data.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        advance()


def _accuracy(network: nn.Module, data: _Solids) -> float:
    network.eval()
    with torch.inference_mode():
        return 100 * (network(data.volumes).argmax(1) == data.labels).double().mean().item()


def _probe(network: Any, train: _Solids, test: _Solids, seed: int) -> float:
    """Accuracy in % of a linear classifier on the pooled features of volumes."""
    network.reset_classifier(0)
    # Sums over K^3 taps have another scale than those over K^2: every network gets the statistics of the volumes.
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.reset_running_stats()
            part.momentum = None
    with torch.inference_mode():
        network.train()(train.volumes)
        network.eval()
        features, held_out = (_features(network, each.volumes) for each in (train, test))
    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(C=1.0, max_iter=500, random_state=seed)
    probe.fit(scaler.transform(features), train.labels.numpy())
    return 100 * float(probe.score(scaler.transform(held_out), test.labels.numpy()))


def _features(network: nn.Module, volumes: Tensor) -> npt.NDArray[Any]:
    return torch.cat([network(part) for part in volumes.split(50)]).numpy()


def _step_ratio() -> float:
    """Time of a training step of the Cross-D network over that of the plain one, median of alternating pairs."""
    seed_everything(0)
    networks = [config.build() for config in (CrossDResNetConfig(**SIZES), ResNetConfig(**SIZES))]
    x, y = torch.randn(BATCH, 1, SIDE, SIDE), torch.arange(BATCH) % len(SHAPES)

    def seconds(network: nn.Module) -> float:
        start = time.process_time()
        F.cross_entropy(network(x), y).backward()
        return time.process_time() - start

    ratios = [seconds(networks[0]) / seconds(networks[1]) for _ in range(PAIRS + 1)]
    return statistics.median(ratios[1:])


def _transfer_section(outcomes: Sequence[_Outcome]) -> Section:
    def differences(other: str) -> list[float]:
        return [each.volumes["Cross-D kernels"] - each.volumes[other] for each in outcomes]

    learned = min(statistics.mean(each.slices[name] for each in outcomes) for name in outcomes[0].slices) >= LEARNED
    judged: dict[str, Any] = {"seeds": len(outcomes), "scale_ok": learned, "unit": "points"}
    probe = "of a linear probe on the pooled features of volumes, its training volumes being few"
    claims = [
        Claim.judge(
            "3-D kernels learned from slices serve volumes at least as well as random ones",
            published="features of volumes comparable to or better than conventional ones",
            statistic=f"accuracy with the kernels of Cross-D less that with random kernels, {probe}",
            value=differences("random kernels"),
            at_least=0.0,
            **judged,
        ),
        *(
            Claim.judge(
                f"They serve volumes as well as 2-D kernels inflated by their {how}",
                published="comparable or better",
                statistic=f"accuracy with the kernels of Cross-D less that with inflated ones, {probe}",
                value=differences(f"plain, {how}"),
                at_least=-TOLERANCE,
                **judged,
            )
            for how in ("centre", "mean")
        ),
    ]
    rows: list[list[Cell]] = []
    found: dict[str, list[Mapping[str, float]]] = {
        "slices": [each.slices for each in outcomes],
        "volumes": [each.volumes for each in outcomes],
    }
    for kind, accuracies in found.items():
        for name in accuracies[0]:
            values = [each[name] for each in accuracies]
            rows.append([f"{kind}: {name}", *values, statistics.mean(values)])
    columns = ["", *(f"seed {seed} [%]" for seed in SEEDS), "mean [%]"]
    caption = (
        f"Networks see {SLICES} slices of {SIDE} x {SIDE} pixels; the probe sees {VOLUMES[0]} volumes and is tested on "
        f"{VOLUMES[1]} others. Batch norms take the statistics of the probe's volumes, for all kernels alike."
    )
    bars = {str(row[0]).removeprefix("volumes: "): float(row[-1] or 0) for row in rows if "volumes" in str(row[0])}
    shown = _solids(len(SHAPES), np.random.default_rng(0)).volumes[:, 0, ::2].clamp(0, 1)
    pictures = [
        ((255 * volume.transpose(0, 1).flatten(1)).numpy().astype(np.uint8).repeat(4, 0).repeat(4, 1), name)
        for volume, name in zip(shown, SHAPES, strict=True)
    ]
    parts: list[Any] = [
        *claims,
        Table("Accuracy", columns, rows, caption),
        Bars("Linear probe on volumes", "accuracy [%]", bars),
        Images("Every second slice of a solid", pictures),
    ]
    return Section("From slices to volumes", parts)


def _cost_section(ratio: float) -> Section:
    rows: list[list[Cell]] = [["time of a training step, Cross-D over plain", ratio]]
    caption = (
        f"One thread of the CPU by its processor time, float32, batch {BATCH}: median of {PAIRS} alternating pairs."
    )
    return Section("Cost", [Table("What the training on images costs", ["", "ratio"], rows, caption)])


# -- full: RadImageNet, then volumes -----------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train ResNet-18 on images with Cross-D convolutions and without, and find the neighbours of volumes.

    Args:
        data: holds ``images`` and ``volumes``.
        folder: where the runs lie, each in a folder of its own.
        changes: settings that differ from the recipe, e.g. ``batch_size=64``.
    """
    settings = {"data": str(Path(data) / "images"), **changes}
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, model=model, **settings)
        for model in ("cross_d_resnet18", "resnet18")
    }
    task = type(runs["resnet18"].task)
    sets = read_images(Path(data) / "volumes", kind=task(model="cross_d_resnet18_3d").files)
    weights = {model: done.run.folder / "checkpoints" / "best.safetensors" for model, done in runs.items()}
    classes = {model: len(done.task.classes) for model, done in runs.items()}
    options: dict[str, Any] = changes.get("options", {})
    networks: dict[str, Any] = {}
    cross = create_model("cross_d_resnet18_3d", num_classes=classes["cross_d_resnet18"], **options)
    load_weights(cross, weights["cross_d_resnet18"])
    networks["Cross-D kernels"] = cross
    plain = create_model("resnet18", num_classes=classes["resnet18"], **options)
    load_weights(plain, weights["resnet18"])
    for inflation in ("centre", "mean"):
        networks[f"plain, {inflation}"] = convert_to_3d(plain, inflation=inflation).model
    train, test = sets["train"], sets.get("test", sets.get("val", sets["train"]))
    accuracy = {name: _nearest(network, train, test) for name, network in networks.items()}
    claims = [
        Claim.judge(
            f"Volumes are recognised as well with Cross-D kernels as with 2-D ones inflated by their {how}",
            published="comparable or better",
            statistic=f"accuracy of the {NEIGHBOURS} nearest neighbours, Cross-D less inflated",
            value=accuracy["Cross-D kernels"] - accuracy[f"plain, {how}"],
            at_least=-TOLERANCE,
            seeds=1,
            scale_ok=not changes,
            unit="points",
        )
        for how in ("centre", "mean")
    ]
    rows: list[list[Cell]] = [[name, value] for name, value in accuracy.items()]
    images: list[list[Cell]] = [[model, done.top1] for model, done in runs.items()]
    parts: list[Any] = [
        *claims,
        Table("Nearest neighbours of volumes", ["kernels", "accuracy [%]"], rows),
        Bars("Nearest neighbours of volumes", "accuracy [%]", accuracy),
        Table("Training on images", ["network", "top-1 [%]"], images),
    ]
    return finished("Cross-D Conv: full test of its claim", [Section("Volumes", parts)], data=str(data))


def _nearest(network: Any, train: ImageSet, test: ImageSet) -> float:
    preprocess = network.config.preprocess
    network.reset_classifier(0)
    network.to(device()).eval()

    def features(volumes: ImageSet) -> Iterator[npt.NDArray[Any]]:
        for index in range(len(volumes)):
            x = preprocess(volumes.image(index)).expand(network.in_channels, -1, -1, -1)
            yield network(x[None].to(device()))[0].cpu().numpy()

    with torch.inference_mode():
        found = [np.stack(list(features(volumes))) for volumes in (train, test)]
    neighbours = KNeighborsClassifier(NEIGHBOURS, metric="cosine").fit(found[0], train.labels)
    return 100 * float(neighbours.score(found[1], test.labels))
