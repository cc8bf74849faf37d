"""Are the kernels of frequency dynamic convolution as different as their frequencies, and does that help to segment?

Chen, Gu, Li, Fu et al.: "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv 2503.18783. Its
claims: kernels of dynamic convolution (DY-Conv) have nearly the same frequency response, those of FDConv by
construction none in common; with 3.6 million more parameters in ResNet-50, against 75 and more, it gains 2.2 AP of
detection on COCO.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.experiments.small_training import finished, one_thread, progress, resolved
from convatlas.networks.registry import model_config
from convatlas.nn.conv.fdconv import FDConv2d, fourier_weight
from convatlas.ops.per_sample_conv import per_sample_conv
from convatlas.report import Bars, Cell, Claim, Heatmap, Images, Lines, Note, Report, Section, Table
from convatlas.training.measure import count_parameters

__all__ = ["quick", "run"]

# Thresholds, fixed before anything was measured.

#: Cosine of the spectra of two kernels that share no frequency, up to rounding.
APART = 1e-3
#: Cosine above which kernels count as alike.
ALIKE = 0.8
#: Points of mIoU that count as no difference between two small networks.
TOLERANCE = 1.0
#: mIoU of the plain network in %, below which the networks have not learned enough to be compared.
LEARNED = 40.0
#: Parameters that FDConv adds to ResNet-50, as published.
ADDED_TO_RESNET50 = 3_647_120
#: Millions of parameters that other dynamic convolutions add to it, as published.
OTHERS = {"ODConv": 65.1, "DY-Conv": 75.3, "KW": 76.5, "CondConv": 90.0}

SEEDS = (0, 1, 2)
STEPS = 120
BATCH = 8
SIDE = 32
WIDTH = 24
KERNELS = 4
LEARNING_RATE = 3e-3
TEST_IMAGES = 64
#: Wavelengths in pixels of the two kinds of texture, and how far the brightness of a picture wanders.
WAVELENGTHS = (3.0, 6.0)
PLAIN, DYNAMIC, FREQUENCY = "plain convolution", "DY-Conv", "FDConv"
PUBLISHED = "Faster R-CNN with ResNet-50: 39.4 AP against 37.2; UPerNet: +3.1 mIoU"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks with three kinds of convolution to segment textures by their frequency,
            and compares their kernels. The paper's own setting, detection on COCO, is not part of this library.
        data, folder: not used.

    Raises:
        ValueError: the budget is another one.
    """
    if budget != "quick":
        raise ValueError(f"budget must be 'quick', got {budget!r}: the paper's setting is detection on COCO")
    return quick()


class _DynamicConv2d(nn.Module):
    """DY-Conv (Chen et al., 2020): a sum of n kernels, weighted by a softmax of the means of a sample."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, kernel_num: int) -> None:
        super().__init__()
        hidden = max(in_channels // 4, 4)
        self.padding = kernel_size // 2
        self.attention = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, kernel_num))
        # One kernel to start from, as where a trained layer is converted; they part as they learn.
        one = nn.Conv2d(in_channels, out_channels, kernel_size).weight.detach()
        noise = 0.1 * one.std() * torch.randn(kernel_num, *one.shape)
        self.kernels = nn.Parameter(one + noise)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        #: Falls to 1 in training, so that at first every kernel learns.
        self.temperature = 30.0

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.attention(x.mean((2, 3))) / self.temperature).softmax(1)
        weight = torch.einsum("bn,noihw->boihw", shares, self.kernels)
        return per_sample_conv(x, weight, None, 1, self.padding) + self.bias[:, None, None]


def _network(kind: str) -> nn.Module:
    """Three convolutions at full resolution and a classifier of pixels; the second and the third are of a kind."""

    def conv() -> nn.Module:
        if kind == DYNAMIC:
            return _DynamicConv2d(WIDTH, WIDTH, 3, kernel_num=KERNELS)
        plain = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        return plain if kind == PLAIN else FDConv2d.from_conv(plain, kernel_num=KERNELS)

    def block(layer: nn.Module) -> list[nn.Module]:
        return [layer, nn.BatchNorm2d(WIDTH), nn.ReLU()]

    stem = nn.Conv2d(1, WIDTH, 3, padding=1)
    return nn.Sequential(*block(stem), *block(conv()), *block(conv()), nn.Conv2d(WIDTH, 3, 1))


def _textures(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, SIDE, SIDE) with patches of waves of two lengths, and the class of each pixel; 0 is none."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pictures = rng.normal(0, 0.5, (count, SIDE, SIDE)) + rng.normal(0, 0.5, (count, 1, 1))
    labels = np.zeros((count, SIDE, SIDE), np.int64)
    for picture, label in zip(pictures, labels, strict=True):
        for kind in rng.integers(1, 3, 3):
            centre, radius = rng.integers(4, SIDE - 4, 2), rng.uniform(5, 9)
            inside = np.hypot(y - centre[0], x - centre[1]) < radius
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            along = np.cos(angle) * x + np.sin(angle) * y
            wave = np.sin(2 * np.pi * along / WAVELENGTHS[kind - 1] + phase)
            picture[inside] += wave[inside]
            label[inside] = kind
    return torch.from_numpy(pictures).float()[:, None], torch.from_numpy(labels)


class _Result(NamedTuple):
    network: nn.Module
    quality: float
    losses: list[float]


def _train(kind: str, seed: int, advance: Callable[[str], None]) -> _Result:
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(kind)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for step in range(STEPS):
        for part in network.modules():
            if isinstance(part, _DynamicConv2d):
                part.temperature = max(1.0, 30.0 - 60.0 * step / STEPS)
        pictures, labels = _textures(BATCH, rng)
        loss = F.cross_entropy(network(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    advance(f"training {kind}")
    pictures, labels = _textures(TEST_IMAGES, np.random.default_rng(1000 + seed))
    with torch.inference_mode():
        found = network.eval()(pictures).argmax(1)
    shares = [((found == k) & (labels == k)).sum() / ((found == k) | (labels == k)).sum() for k in range(3)]
    return _Result(network, 100 * float(torch.stack(shares).mean()), losses)


def quick() -> Report:
    """Segment textures with three kinds of convolution; compare the spectra of their kernels; count parameters."""
    kinds = (PLAIN, DYNAMIC, FREQUENCY)
    results: dict[str, list[_Result]] = {kind: [] for kind in kinds}
    with progress(len(SEEDS) * len(kinds)) as advance, one_thread():
        for seed in SEEDS:
            for kind in kinds:
                results[kind].append(_train(kind, seed, advance))
    sections = [_quality_section(results), _kernels_section(results), _parameters_section()]
    return finished("FDConv: quick test of its claims", sections)


def _quality_section(results: dict[str, list[_Result]]) -> Section:
    plain, dynamic, frequency = ([result.quality for result in runs] for runs in results.values())
    learned = statistics.mean(plain) >= LEARNED
    gains = [ours - theirs for ours, theirs in zip(frequency, plain, strict=True)]
    claims = [
        Claim.judge(
            "FDConv segments better than plain convolution",
            published=PUBLISHED,
            statistic="mIoU of the network with FDConv less that of the plain one; judged if it is at least twice its "
            "standard error",
            value=gains,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(gains),
            unit="points",
        ),
        Claim.judge(
            "FDConv segments as well as DY-Conv, which has more parameters",
            published="39.4 AP with 3.6 million more parameters; DY-Conv adds 75.3 million",
            statistic="mIoU of the network with FDConv less that of the one with DY-Conv",
            value=[ours - theirs for ours, theirs in zip(frequency, dynamic, strict=True)],
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        ),
    ]
    rows: list[list[Cell]] = []
    curves = {}
    for kind, runs in results.items():
        qualities = [result.quality for result in runs]
        rows.append([kind, count_parameters(runs[0].network), *qualities, statistics.mean(qualities)])
        means = [statistics.mean(values) for values in zip(*(result.losses for result in runs), strict=True)]
        curves[kind] = (range(1, 1 + STEPS), means)
    columns = ["network", "parameters", *(f"seed {seed} [%]" for seed in SEEDS), "mean [%]"]
    pictures, labels = _textures(3, np.random.default_rng(1000))
    with torch.inference_mode():
        found = results[FREQUENCY][0].network(pictures).argmax(1)
    images = []
    for picture, label, own in zip(pictures[:, 0], labels, found, strict=True):
        grey = (255 * ((picture + 2.5) / 5).clamp(0, 1)).to(torch.uint8).numpy()
        images += [
            (grey, "picture"),
            ((127 * label).to(torch.uint8).numpy(), "classes"),
            ((127 * own).to(torch.uint8).numpy(), FREQUENCY),
        ]
    note = Note(
        f"Pictures of {SIDE} x {SIDE} pixels with patches of waves of {WAVELENGTHS[0]:g} and {WAVELENGTHS[1]:g} pixels "
        f"in any direction, and noise; networks of three convolutions with {WIDTH} channels, n = {KERNELS}; AdamW, "
        f"learning rate {LEARNING_RATE:g} with cosine decay, {STEPS} batches of {BATCH} new pictures. Small networks: "
        "they test the mechanism, not the accuracy on COCO."
    )
    table = Table("Segmentation of textures, mIoU on test pictures", columns, rows, "", {"mean [%]": "max"})
    lines = Lines("Training loss, mean of the seeds", "step", "cross-entropy [nats]", curves)
    return Section("Segmentation", [*claims, table, lines, Images("Textures", images), note])


def _similarity(kernels: Tensor) -> Tensor:
    """Cosines (n, n) of the magnitudes of the spectra of kernels (n, C', C, k, k), as FDConv transforms them."""
    with torch.no_grad():
        spectra = torch.stack([torch.view_as_complex(fourier_weight(each).contiguous()).abs() for each in kernels])
    # Bins of the first and the last column stand for conjugate pairs, which a real kernel shares between two groups.
    flat = F.normalize(spectra[..., 1:-1].flatten(1), dim=1)
    return flat @ flat.T


def _kernels_section(results: dict[str, list[_Result]]) -> Section:
    matrices: dict[str, list[Tensor]] = {DYNAMIC: [], FREQUENCY: []}
    for kind, found in matrices.items():
        for result in results[kind]:
            layer = next(part for part in result.network.modules() if isinstance(part, _DynamicConv2d | FDConv2d))
            kernels = layer.kernels if isinstance(layer, _DynamicConv2d) else layer.spatial_kernels()
            found.append(_similarity(kernels))
    others = ~torch.eye(KERNELS, dtype=torch.bool)
    claims = [
        Claim.judge(
            "The kernels of FDConv have no frequency in common",
            published="disjoint groups of frequencies",
            statistic="largest cosine of the spectra of two kernels of a trained layer",
            value=[float(matrix[others].max()) for matrix in matrices[FREQUENCY]],
            at_most=APART,
            seeds=len(SEEDS),
        ),
        Claim.judge(
            "The kernels of DY-Conv have nearly the same frequency response",
            published="the kernels of dynamic convolution are alike in their frequency response",
            statistic="mean cosine of the spectra of two kernels of a trained layer",
            value=[float(matrix[others].mean()) for matrix in matrices[DYNAMIC]],
            at_least=ALIKE,
            seeds=len(SEEDS),
        ),
    ]
    labels = [f"kernel {index + 1}" for index in range(KERNELS)]
    maps = [
        Heatmap(f"Similarity of the kernels of {kind}", found[0].numpy(), labels, labels, "kernel", "kernel")
        for kind, found in matrices.items()
    ]
    note = Note(
        "Magnitudes of the spectrum of the weight as a matrix of filters times rows and channels times columns. The "
        "kernels of DY-Conv start from one weight with a tenth of its spread as noise."
    )
    return Section("Frequencies of the kernels", [*claims, *maps, note])


def _parameters_section() -> Section:
    with torch.device("meta"):
        plain, dynamic = (count_parameters(model_config(name).build()) for name in ("resnet50", "resnet50_fdconv"))
    claim = Claim.judge(
        "FDConv adds 3.6 million parameters to ResNet-50",
        published="3.6 million",
        statistic="parameters of resnet50_fdconv less those of resnet50",
        value=dynamic - plain,
        at_most=ADDED_TO_RESNET50,
        seeds=0,
    )
    bars = Bars(
        "Parameters added to ResNet-50",
        "millions",
        {
            "FDConv (measured here)": (dynamic - plain) / 1e6,
            **OTHERS,
        },
        "Those of the others as the paper publishes them.",
    )
    return Section("Parameters", [claim, bars])
