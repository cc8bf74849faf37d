"""Do exact spectra of shapes serve a network better than binary images, and do they have useful and stable gradients?

Jiang, Wang, Huang, Marcus, Niessner: "Convolutional Neural Networks on non-uniform geometrical signals using Euclidean
spectral transformation", ICLR 2019, arXiv 1901.02070, which studies MNIST's digits as polygons. Gradients: Jiang,
Lansigan, Marcus, Niessner: "DDSL: Deep Differentiable Simplex Layer for Learning Geometric Signals", ICCV 2019, arXiv
1901.11082.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from skimage import measure
from torch import Tensor, nn

from convatlas.data.images import ImageSet, read_images
from convatlas.experiments.small_training import Samples, Trained, accuracy_differences, compare, finished, progress
from convatlas.nn.simplex_raster import SimplexRaster, SpectralShapeLoss
from convatlas.ops.resize import resize
from convatlas.ops.simplex_fourier import polygon_elements, simplex_fourier
from convatlas.report import Cell, Claim, Images, Lines, Note, Report, Section, Table
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

#: Its functions have no types.
_outlines: Any = measure

# Thresholds, fixed before anything was measured.

#: Points of accuracy by which exact rasters must be better, mean over the resolutions; and by which their lead at the
#: lowest resolution must be larger than at the highest.
GAIN, GROWTH = 0.0, 0.0
#: Accuracy in % of binary images at the highest resolution, below which the networks have not learned (chance is 10).
LEARNED = 70.0
#: Share of the first loss that is left when a polygon was drawn to its target.
LEFT = 0.05
#: Largest error of divided differences in float64.
EXACT = 1e-12

SEEDS = (0, 1, 2)
RESOLUTIONS = (8, 12, 16)
#: Digits for training and for testing.
COUNTS = (400, 300)
TRAINING = Training(epochs=20, batch_size=32, lr=3e-3, warmup_epochs=2)
#: Pixels that images are enlarged to before their outline is taken, and how far a polygon may be from it, in these.
ENLARGED, TOLERANCE = 32, 0.3
#: Largest change of place, as a share of the period, and of size, of a digit.
SHIFT, SCALE = 0.06, 0.15
#: Corners, steps and learning rate of the polygon that is drawn to its target.
CORNERS, STEPS, RATE, SIDE = 40, 150, 5e-3, 32

# Full: the study of the paper.

FULL_RESOLUTIONS = (8, 16, 28)
FULL_TRAINING = Training(epochs=20, batch_size=64, lr=1e-3, warmup_epochs=1)
MNIST = (60_000, 10)


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" takes scikit-learn's digits as polygons; "full" those of MNIST.
        data: for "full": MNIST, a folder of its idx files, or one with ``train`` and ``test``.
        folder: not needed.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None:
        raise ValueError("budget 'full' needs data, got None")
    return full(data)


def quick() -> Report:
    """Digits as polygons, a polygon that is drawn to its target, and the accuracy of the transform."""
    with progress(2 + len(SEEDS) * len(RESOLUTIONS) * (1 + 2 * TRAINING.epochs)) as advance:
        images = read_images("digits")["all"]
        sections = [_study(lambda seed: _chosen(images, seed), RESOLUTIONS, TRAINING, SEEDS, _small_network, advance)]
        sections.append(_drawn())
        advance("drawing a polygon")
        sections.append(_accuracy())
        advance("accuracy")
    return finished("Simplex Fourier transform: quick test of its claims", sections)


# -- digits as polygons ------------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """Closed polygons, counter-clockwise around what is inside and clockwise around holes."""

    vertices: Tensor
    elements: Tensor


#: Training and test shapes with their labels.
_Split = tuple[list[_Shape], Tensor, list[_Shape], Tensor]


def _outline(pixels: npt.NDArray[Any], move: npt.NDArray[Any], size: float) -> _Shape:
    """The level of half the largest value of an image, in the middle of the period."""
    image = torch.from_numpy(pixels.astype(np.float64))[None, None]
    large = resize(image, (ENLARGED, ENLARGED), convention="pillow")[0, 0].numpy()
    padded = np.pad(large, 1)
    vertices, elements, count = [], [], 0
    for contour in _outlines.find_contours(padded, padded.max() / 2, positive_orientation="high"):
        corners = _outlines.approximate_polygon(contour, TOLERANCE)[:-1]
        if len(corners) < 3:
            continue
        vertices.append(corners)
        elements.append(polygon_elements(len(corners)) + count)
        count += len(corners)
    places = (np.concatenate(vertices) - 0.5 - ENLARGED / 2) / ENLARGED  # -0.5 to 0.5
    inside = torch.from_numpy(0.5 + 0.7 * size * places) + torch.from_numpy(move)
    edges = torch.cat(elements)
    a, b = inside[edges[:, 0]], inside[edges[:, 1]]
    area = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()
    return _Shape(inside, edges if area > 0 else edges.flip(1))


def _chosen(images: ImageSet, seed: int) -> _Split:
    random = np.random.default_rng(seed)
    order = random.permutation(len(images))[: sum(COUNTS)]
    shapes = [_jittered(images, index, random) for index in order]
    labels = torch.from_numpy(images.labels[order])
    return shapes[: COUNTS[0]], labels[: COUNTS[0]], shapes[COUNTS[0] :], labels[COUNTS[0] :]


def _jittered(images: ImageSet, index: int, random: np.random.Generator) -> _Shape:
    pixels = images.image(int(index))
    return _outline(
        pixels.reshape(pixels.shape[:2]), random.uniform(-SHIFT, SHIFT, 2), 1 + random.uniform(-SCALE, SCALE)
    )


def _exact(shapes: Sequence[_Shape], resolution: int) -> Tensor:
    raster = SimplexRaster((resolution, resolution), boundary=True)
    return torch.stack([raster(*shape).float() for shape in shapes])


def _binary(shapes: Sequence[_Shape], resolution: int) -> Tensor:
    """Whether the sample is inside, at the same places: the samples inside an odd number of polygons."""
    pictures = []
    for vertices, elements in shapes:
        inside = np.zeros((resolution, resolution), dtype=bool)
        for corners in _loops(vertices, elements):
            inside ^= _outlines.grid_points_in_poly(inside.shape, resolution * corners.numpy())
        pictures.append(torch.from_numpy(inside.astype(np.float32))[None])
    return torch.stack(pictures)


def _loops(vertices: Tensor, elements: Tensor) -> list[Tensor]:
    """The polygons one by one: their corners follow each other."""
    ends = [index for index, (a, b) in enumerate(elements.tolist()) if abs(a - b) != 1]
    return [part for part in vertices.tensor_split([index + 1 for index in ends]) if len(part)]


def _small_network(resolution: int) -> nn.Module:
    """The paper's variant of LeNet-5 for small images."""
    side = resolution // 4
    return nn.Sequential(
        nn.Conv2d(1, 10, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 3, padding=1), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * side * side, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10),
    )  # fmt: skip


def _network(resolution: int) -> nn.Module:
    """The paper's variant of LeNet-5, 320 features before its linear layers at 28 x 28."""
    if resolution != 28:
        return _small_network(resolution)
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 250), nn.ReLU(), nn.Dropout(), nn.Linear(250, 10),
    )  # fmt: skip


def _study(
    split: Callable[[int], _Split],
    resolutions: Sequence[int],
    training: Training,
    seeds: Sequence[int],
    network: Callable[[int], nn.Module],
    advance: Callable[..., None],
    *,
    scale_ok: bool = True,
) -> Section:
    kinds = {"binary": _binary, "exact": _exact}
    trained: dict[tuple[str, int], list[Trained]] = {(kind, n): [] for kind in kinds for n in resolutions}
    shown = []
    for seed in seeds:
        train, labels, test, test_labels = split(seed)
        for n in resolutions:
            for kind, draw in kinds.items():
                images, test_images = draw(train, n), draw(test, n)
                mean, std = images.mean(), images.std()
                samples = Samples((images - mean) / std, labels, (test_images - mean) / std, test_labels)
                made = compare(
                    {kind: partial(network, n)},
                    training,
                    seeds=(seed,),
                    samples=lambda _, samples=samples: samples,  # type: ignore[misc]
                    advance=lambda _, n=n: advance(f"training at {n} x {n}"),  # type: ignore[misc]
                )
                trained[kind, n] += made[kind]
                if seed == seeds[0]:
                    shown += [(_grey(images[k, 0]), f"{kind}, {n} x {n}") for k in range(2)]
            advance(f"shapes at {n} x {n}")
    gaps = {n: accuracy_differences(trained["exact", n], trained["binary", n]) for n in resolutions}
    low, high = resolutions[0], resolutions[-1]
    learned = statistics.mean(result.accuracy for result in trained["binary", high]) >= LEARNED
    claims = [
        Claim.judge(
            "Networks classify shapes from exact rasters at least as well as from binary images",
            published="NUFT keeps its accuracy at low resolutions (MNIST's digits as polygons)",
            statistic="difference of the accuracies, mean over the resolutions",
            value=[statistics.mean(gap[k] for gap in gaps.values()) for k in range(len(seeds))],
            at_least=GAIN,
            seeds=len(seeds),
            scale_ok=learned and scale_ok,
            unit="points",
        ),
        Claim.judge(
            "Their lead grows where the resolution is low",
            published="NUFT keeps its accuracy at low resolutions (MNIST's digits as polygons)",
            statistic=f"lead at {low} x {low} less that at {high} x {high}",
            value=[a - b for a, b in zip(gaps[low], gaps[high], strict=True)],
            at_least=GROWTH,
            seeds=len(seeds),
            scale_ok=learned and scale_ok,
            unit="points",
        ),
    ]
    rows: list[list[Cell]] = []
    for n, kind in itertools.product(resolutions, kinds):
        accuracies = [result.accuracy for result in trained[kind, n]]
        rows.append([f"{n} x {n}, {kind}", *accuracies, statistics.mean(accuracies)])
    columns = ["raster", *(f"seed {seed} [%]" for seed in seeds), "mean [%]"]
    curves = {
        kind: (resolutions, [statistics.mean(r.accuracy for r in trained[kind, n]) for n in resolutions])
        for kind in kinds
    }
    lines = Lines("Accuracy against resolution", "samples along an axis", "accuracy [%]", curves)
    note = Note(
        "Outlines of digits at half their largest value, moved and scaled at random; both rasters sample the same "
        f"points of the same polygons. {training.epochs} epochs, the same small convolutional network."
    )
    return Section(
        "Digits as polygons",
        [*claims, Table("Accuracy on the test shapes", columns, rows), lines, Images("Rasters", shown), note],
    )


def _grey(x: Tensor) -> npt.NDArray[np.uint8]:
    return np.asarray((255 * x.clamp(0, 1)).round().to(torch.uint8).numpy())


# -- gradients and accuracy --------------------------------------------------------------------------------------------


def _drawn() -> Section:
    """A circle becomes a star by the gradient of the loss; binary images have none."""
    angles = 2 * math.pi * torch.arange(CORNERS, dtype=torch.float64) / CORNERS
    directions = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    target = 0.5 + (0.28 + 0.08 * torch.cos(5 * angles)).unsqueeze(1) * directions
    elements = polygon_elements(CORNERS)
    loss = SpectralShapeLoss((SIDE, SIDE))
    wanted = loss.raster(target, elements)
    shape = (0.5 + 0.2 * directions).requires_grad_()
    first = loss.raster(shape.detach(), elements)
    optimizer = torch.optim.Adam([shape], lr=RATE)
    losses = []
    for _ in range(STEPS):
        value = loss(shape, elements, wanted)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    start = 0.5 + 0.2 * directions
    before = _binary([_Shape(start, elements)], SIDE)
    changed = 0
    for corner in range(CORNERS):
        moved = start.clone()
        moved[corner] += 1e-6
        changed += int((_binary([_Shape(moved, elements)], SIDE) != before).any())
    claims = [
        Claim.judge(
            "The gradient of the raster loss draws a polygon to its target",
            published="shapes are optimised through the layer (DDSL)",
            statistic=f"loss after {STEPS} steps over the first",
            value=losses[-1] / losses[0],
            at_most=LEFT,
            seeds=0,
        ),
        Claim.judge(
            "A binary image tells nothing of a small move",
            published="binary voxels have no gradient",
            statistic="share of the corners whose move by a millionth of the period changes the image",
            value=changed / CORNERS,
            at_most=0.0,
            seeds=0,
        ),
    ]
    pictures = [(first, "first"), (loss.raster(shape.detach(), elements), "last"), (wanted, "target")]
    lines = Lines("Loss", "step", "mean squared difference", {"loss": (range(STEPS), losses)}, log_y=True)
    shown = Images("The polygon", [(_grey(picture[0]), name) for picture, name in pictures])
    return Section("A polygon drawn to its target", [*claims, lines, shown])


def _accuracy() -> Section:
    """A cube along the axes, whose phases are equal across most edges, and one that is turned."""
    corners = torch.tensor(list(itertools.product([0.25, 0.75], repeat=3)), dtype=torch.float64)
    paths = [
        [0, *(sum(2 ** (2 - axis) for axis in order[:k]) for k in (1, 2)), 7]
        for order in itertools.permutations(range(3))
    ]
    elements, weights, resolution = torch.tensor(paths), torch.ones(6, 1, dtype=torch.float64), (8, 8, 8)
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.3, 0.2], [0.3, 0, -0.1], [-0.2, 0.1, 0]], dtype=torch.float64))
    rows: list[list[Cell]] = []
    worst = 0.0
    for name, vertices in (("along the axes", corners), ("turned", (corners - 0.5) @ turn.T + 0.5)):
        make = partial(simplex_fourier, vertices, elements, weights, resolution, mode="mass")
        exact, stable = make(backend="naive"), make(backend="stable")
        formula = _formula(vertices[elements], resolution)
        finite = formula.isfinite()
        error = float((stable - exact).abs().max())
        worst = max(worst, error)
        lost = float((formula - exact)[finite].abs().max()) if bool(finite.any()) else math.nan
        rows.append([name, error, lost, int((~finite).sum()), formula.numel()])
    claim = Claim.judge(
        "The transform is exact for all frequencies",
        published="an exact transform without sampling error; the closed form divides by zero at equal phases",
        statistic="largest error in float64, of a cube of volume 1/8 along the axes and turned",
        value=worst,
        at_most=EXACT,
        seeds=0,
    )
    columns = ["cube", "error", "error of the closed form where finite", "frequencies where it is not", "of"]
    return Section("Accuracy", [claim, Table("Errors in float64", columns, rows)])


def _formula(corners: Tensor, resolution: tuple[int, int, int]) -> Tensor:
    """The closed form i^j sum_a exp(-i s_a) / prod_b (s_a - s_b), summed over tetrahedra."""
    axes = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in resolution]
    axes[-1] = axes[-1][: resolution[-1] // 2 + 1].abs()
    waves = 2 * math.pi * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    phases = torch.einsum("nad,xyzd->naxyz", corners, waves)
    total: Tensor | float = 0.0
    for a in range(4):
        others = [phases[:, a] - phases[:, b] for b in range(4) if b != a]
        total = total + torch.exp(-1j * phases[:, a]) / (others[0] * others[1] * others[2])
    volumes = torch.linalg.det(corners[:, 1:] - corners[:, :1]).abs()
    return torch.einsum("n,nxyz->xyz", volumes.to(torch.complex128), -1j * torch.as_tensor(total))[None]


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path) -> Report:
    """The study of the paper: its network on rasters of MNIST's digits as polygons, exact and binary.

    Args:
        data: MNIST; with other images the verdicts say that they are others.
    """
    sets = read_images(data, channels=1)
    if "train" not in sets or len(sets) < 2:
        raise ValueError(f"data must have the splits train and test, got {', '.join(sets)}")
    train, test = sets["train"], sets.get("test") or sets["val"]

    def split(seed: int) -> _Split:
        random = np.random.default_rng(seed)
        shapes = [[_jittered(part, index, random) for index in range(len(part))] for part in (train, test)]
        return shapes[0], torch.from_numpy(train.labels), shapes[1], torch.from_numpy(test.labels)

    steps = len(SEEDS) * len(FULL_RESOLUTIONS) * (1 + 2 * FULL_TRAINING.epochs)
    known = (len(train), len(train.classes)) == MNIST
    with progress(steps) as advance:
        section = _study(split, FULL_RESOLUTIONS, FULL_TRAINING, SEEDS, _network, advance, scale_ok=known)
    return finished("Simplex Fourier transform: full test of its claims", [section], data=str(data))
