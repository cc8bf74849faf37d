"""Do classifiers lean on the residual of their linear interpretation, and are the bases of super-resolution wavelets?

Navarrete Michelini, Liu, Lu, Jiang: "A Tour of Convolutional Networks Guided by Linear Interpreters", ICCV 2019,
arXiv 1908.05168. With the decisions for an image x0 frozen, a network is y = A x0 + r. The paper finds that image
classifiers vote pixel by pixel and rely heavily on r, and that networks for super-resolution use bases like wavelets.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.analysis.linear_interpreter import Interpretation, LinearInterpreter, study
from convatlas.analysis.linear_interpreter.pictures import signed_picture
from convatlas.data.images import ImageSet, read_images, stratified_split
from convatlas.data.transforms import Preprocess
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
    accuracy_parts,
    compare,
    device,
    finished,
    progress,
)
from convatlas.networks.registry import create_model
from convatlas.ops.image_quality import psnr
from convatlas.ops.resize import resize
from convatlas.report import Cell, Claim, Files, Images, Note, Part, Report, Section, Table
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run", "wavelet_likeness"]

# Thresholds, fixed before anything was measured.

#: Largest error of A x0 + r in float64, relative to the largest output.
EXACT = 1e-12
#: Accuracy in % below which a classifier has not learned enough to be looked at (chance is 10).
LEARNED = 90.0
#: Points of accuracy that are lost with A x0 alone where a classifier "relies heavily" on r.
LOSS_WITHOUT_BIAS = 10.0
#: Points above chance of r alone, which hears of the image only through the decisions.
GAIN_OF_BIAS = 20.0
#: A vector counts as wavelet-like if it oscillates, with at most this share of its energy further than 1/8 cycle a
#: pixel from its strongest frequency (of white noise, about 0.88), ...
OUTSIDE_BAND = 0.25
BAND = 1 / 8
#: ... and is localised, with 90 % of its energy on at most this share of the pixels (of white noise, about 0.45).
COVERED = 0.25
ENERGY = 0.9

SEEDS = (0, 1, 2)
TRAIN_FRACTION = 0.5
TRAINING = Training(epochs=12, batch_size=32, lr=3e-3, warmup_epochs=2)
WIDTHS = (16, 32)
#: Test images whose linear system is looked at, of each seed.
LOOKED_AT = 300

#: Super-resolution by 2: steps, patches of a step, and their side at low resolution. So many steps of so few patches
#: are what it takes to do better than bicubic interpolation, which was tried with another seed.
STEPS, PATCHES, SIDE = 2400, 4, 20
SR_WIDTHS = (32, 16)
#: Side of the low-resolution photograph that is interpreted, and how many singular vectors are judged.
PHOTO_SIDE, VECTORS = 24, 16

# Full: published weights on ImageNet-1K.

WEIGHTS = ("resnet50",)
FULL_LOOKED_AT = 500
FULL_SHOWN = 2
CHANCE = 100 / IMAGENET_CLASSES


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small classifiers on digits and small networks for super-resolution on a photograph;
            "full" interprets published classifiers on ImageNet-1K.
        data: for "full": ImageNet-1K, a folder with ``val`` and a folder for each class in it.
        folder: for "full": where the reports of single images go.

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
    """Classifiers of digits, and super-resolution of a photograph."""
    with progress(len(SEEDS) * (TRAINING.epochs + 1 + 2)) as advance:
        classification = _classification(advance)
        upscaling = _upscaling(advance)
    return finished("Linear interpreters: quick test of their claims", [classification, upscaling])


# -- classification ----------------------------------------------------------------------------------------------------


class _Halves(NamedTuple):
    """What a classifier says with both parts of its linear system, and with each alone."""

    both: float
    linear: float
    bias: float
    error: float
    #: Mean of r_k / y_k for the class that the network gives.
    share: float


def _classification(advance: Callable[[str], None]) -> Section:
    networks: list[nn.Module] = []
    tests: list[Samples] = []

    def build() -> nn.Module:
        networks.append(_classifier())
        return networks[-1]

    def samples(seed: int) -> Samples:
        tests.append(_digits(seed))
        return tests[-1]

    trained = compare({"classifier": build}, TRAINING, seeds=SEEDS, samples=samples, advance=advance)
    found = []
    for network, test in zip(networks, tests, strict=True):
        found.append(_halves(network, test.test_images[:LOOKED_AT], test.test_labels[:LOOKED_AT]))
        advance("interpreting digits")
    learned = statistics.mean(halves.both for halves in found) >= LEARNED
    claims = _classifier_claims(found, seeds=len(SEEDS), chance=10.0, scale_ok=learned)
    rows: list[list[Cell]] = [
        [seed, halves.both, halves.linear, halves.bias, halves.share] for seed, halves in zip(SEEDS, found, strict=True)
    ]
    columns = ["seed", "A x0 + r [%]", "A x0 alone [%]", "r alone [%]", "r / y of the class"]
    caption = f"Accuracy on {LOOKED_AT} test digits that the networks did not see."
    parts: list[Part] = [
        *claims,
        Table("Accuracy of the parts of the linear system", columns, rows, caption),
        _vote_pictures(networks[0], tests[0]),
        *accuracy_parts(trained, SEEDS, caption="Every test digit, after the last epoch."),
    ]
    return Section("Classification of digits", parts)


def _classifier() -> nn.Sequential:
    first, second = WIDTHS
    return nn.Sequential(
        *(nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(second, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * second, 10)),
    )


def _digits(seed: int) -> Samples:
    sets = stratified_split(read_images("digits")["all"], {"train": TRAIN_FRACTION, "test": 1 - TRAIN_FRACTION}, seed)
    preprocess = Preprocess(size=32, mean=(0.5,), std=(0.25,), interpolation="bicubic", crop=1.0)
    tensors = []
    for images in sets.values():
        tensors.append(torch.stack([preprocess(images.image(index)) for index in range(len(images))]))
        tensors.append(torch.from_numpy(images.labels))
    return Samples(*(tensor.to(device()) for tensor in tensors))


def _halves(network: nn.Module, images: Tensor, labels: Tensor) -> _Halves:
    interpreter = LinearInterpreter(network.double().eval())
    right, error, shares = [0, 0, 0], 0.0, []
    for x0, label in zip(images.double().split(20), labels.split(20), strict=True):
        li = interpreter(x0)
        bias = li.output - li.linear
        error = max(error, li.error / float(li.output.abs().max()))
        best = li.output.argmax(1)
        for index, scores in enumerate((li.output, li.linear, bias)):
            right[index] += int((scores.argmax(1) == label).sum())
        shares.append((bias / li.output).gather(1, best[:, None]).squeeze(1))
    network.float()
    both, linear, alone = (100 * count / len(labels) for count in right)
    return _Halves(both, linear, alone, error, float(torch.cat(shares).median()))


def _classifier_claims(found: Sequence[_Halves], *, seeds: int, chance: float, scale_ok: bool) -> list[Claim]:
    def each(value: Callable[[_Halves], float]) -> list[float]:
        return [value(halves) for halves in found]

    return [
        Claim.judge(
            "With its decisions frozen, a network is a linear map and a residual",
            published="y = A x + r holds exactly at the image (section 3)",
            statistic="largest abs(A x0 + r - y) over all images and classes, over the largest output, in float64",
            value=each(lambda halves: halves.error),
            at_most=EXACT,
            seeds=seeds,
        ),
        Claim.judge(
            "Without the residual a classifier is much less accurate",
            published="classifiers rely heavily on the residual (abstract, section 4.1); no figure",
            statistic="accuracy of A x0 + r less accuracy of A x0",
            value=each(lambda halves: halves.both - halves.linear),
            at_least=LOSS_WITHOUT_BIAS,
            seeds=seeds,
            scale_ok=scale_ok,
            unit="points",
        ),
        Claim.judge(
            "The residual alone tells classes apart",
            published="classifiers rely heavily on the residual (abstract, section 4.1); no figure",
            statistic="accuracy of r less chance",
            value=each(lambda halves: halves.bias - chance),
            at_least=GAIN_OF_BIAS,
            seeds=seeds,
            scale_ok=scale_ok,
            unit="points",
        ),
    ]


def _vote_pictures(network: nn.Module, test: Samples) -> Images:
    interpreter = LinearInterpreter(network.eval())
    pictures = []
    for label in range(10):
        images = test.test_images[test.test_labels == label][:LOOKED_AT]
        pictures.append((signed_picture(interpreter(images).votes(label).mean(0, keepdim=True)), f"class {label}"))
    caption = "Red pixels speak for the class, blue ones against it. Each picture has its own scale."
    return Images("Votes of the pixels for the right class, mean over the test digits of each class", pictures, caption)


# -- super-resolution --------------------------------------------------------------------------------------------------


class _Upscaled(NamedTuple):
    gain: float
    outside: float
    covered: float
    bias_share: float
    li: Interpretation


def _upscaling(advance: Callable[[str], None]) -> Section:
    found = []
    for seed in SEEDS:
        network = _train_upscaler(seed)
        advance("training super-resolution")
        found.append(_look_at_upscaler(network))
        advance("singular vectors")
    learned = statistics.mean(result.gain for result in found) >= 0
    published = "networks for super-resolution use bases like wavelets (abstract, section 4.2); no figure"
    claims = [
        Claim.judge(
            "The leading singular vectors of super-resolution oscillate",
            published=published,
            statistic=f"energy further than {BAND:g} cycles a pixel from the strongest frequency, mean of {VECTORS} v",
            value=[result.outside for result in found],
            at_most=OUTSIDE_BAND,
            seeds=len(SEEDS),
            scale_ok=learned,
        ),
        Claim.judge(
            "The leading singular vectors of super-resolution are localised",
            published=published,
            statistic=f"share of the pixels with {ENERGY:.0%} of the energy, mean of {VECTORS} v",
            value=[result.covered for result in found],
            at_most=COVERED,
            seeds=len(SEEDS),
            scale_ok=learned,
        ),
    ]
    rows: list[list[Cell]] = [
        [seed, result.gain, result.outside, result.covered, result.bias_share]
        for seed, result in zip(SEEDS, found, strict=True)
    ]
    columns = ["seed", "over bicubic [dB]", "energy outside the band", "share of the pixels", "|r| / |y|"]
    svd = found[0].li.svd(8)
    caption = f"Of the first seed; the input is {PHOTO_SIDE} x {PHOTO_SIDE} pixels. Each picture has its own scale."
    note = Note(
        f"Convolutions of 5 x 5 ({SR_WIDTHS[0]} channels), 3 x 3 ({SR_WIDTHS[1]}) and 3 x 3 with tanh between them, "
        f"and a pixel shuffle, as in ESPCN; trained for {STEPS} steps on {PATCHES} patches of a photograph each, and "
        "looked at on another one. tanh is frozen by its secant."
    )
    parts: list[Part] = [
        *claims,
        Table("Super-resolution by 2", columns, rows, "Gain in PSNR on the photograph that is interpreted."),
        Images("Right singular vectors v", [(signed_picture(v), f"v{i}") for i, v in enumerate(svd.v, 1)], caption),
        Images("Left singular vectors u", [(signed_picture(u), f"u{i}") for i, u in enumerate(svd.u, 1)], caption),
        note,
    ]
    return Section("Super-resolution", parts)


def _train_upscaler(seed: int) -> nn.Module:
    """Train on patches of one photograph and their halves."""
    seed_everything(seed)
    high = _photograph("camera")
    low = _halved(high)
    network = _upscaler().to(device())
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = np.random.default_rng(seed)
    for _ in range(STEPS):
        corners = order.integers(0, np.array(low.shape[2:]) - SIDE, (PATCHES, 2))
        x = torch.cat([low[..., i : i + SIDE, j : j + SIDE] for i, j in corners])
        y = torch.cat([high[..., 2 * i : 2 * (i + SIDE), 2 * j : 2 * (j + SIDE)] for i, j in corners])
        loss = F.mse_loss(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _upscaler() -> nn.Sequential:
    first, second = SR_WIDTHS
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=2), nn.Tanh(), nn.Conv2d(first, second, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(second, 4, 3, padding=1), nn.PixelShuffle(2)),
    )


def _look_at_upscaler(network: nn.Module) -> _Upscaled:
    high = _photograph("astronaut")[..., 60 : 60 + 2 * PHOTO_SIDE, 190 : 190 + 2 * PHOTO_SIDE]
    low = _halved(high)
    li = LinearInterpreter(network)(low)
    bicubic = resize(low, (2 * PHOTO_SIDE, 2 * PHOTO_SIDE), convention="matlab", interpolation="bicubic")
    quality = [float(psnr(image, high, data_range=1, shave=4)) for image in (li.output, bicubic)]
    outside, covered = wavelet_likeness(li.svd(VECTORS).v[:, 0])
    return _Upscaled(quality[0] - quality[1], outside, covered, li.bias_share, li)


def _photograph(name: str) -> Tensor:
    """One of scikit-image's photographs in grey, (1, 1, H, W) in [0, 1]."""
    import skimage.color
    import skimage.data

    pixels = getattr(skimage.data, name)()
    grey = skimage.color.rgb2gray(pixels) if pixels.ndim == 3 else pixels / 255
    return torch.from_numpy(grey).float()[None, None].to(device())


def _halved(image: Tensor) -> Tensor:
    size = (image.shape[2] // 2, image.shape[3] // 2)
    return resize(image, size, convention="matlab", interpolation="bicubic")


def wavelet_likeness(vectors: Tensor) -> tuple[float, float]:
    """How little images oscillate, and how little they are localised: two means over images.

    Args:
        vectors: images (N, H, W).

    Returns:
        Share of the energy further than `BAND` from the strongest frequency, in cycles a pixel; smallest share of the
        pixels with a share `ENERGY` of the energy. Both are small for wavelets.
    """
    height, width = vectors.shape[1:]
    power = torch.fft.fft2(vectors).abs().square()
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    frequencies = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).to(power)
    peak = frequencies.view(-1, 2)[power.flatten(1).argmax(1)].view(-1, 1, 1, 2)

    def distance(centre: Tensor) -> Tensor:
        apart = frequencies - centre
        return (apart - apart.round()).norm(dim=-1)

    # Of a real image, the frequency and its mirror image are one.
    near = torch.minimum(distance(peak), distance(-peak)) <= BAND
    outside = 1 - (power * near).sum((1, 2)) / power.sum((1, 2))
    energy = vectors.flatten(1).square().sort(1, descending=True)[0].cumsum(1)
    covered = (energy < ENERGY * energy[:, -1:]).sum(1).add(1) / (height * width)
    return float(outside.mean()), float(covered.mean())


# -- published classifiers ---------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, *, models: Mapping[str, Any] | None = None) -> Report:
    """Interpret published classifiers on images that they have not seen.

    Args:
        data: labelled images, ImageNet-1K: a folder with ``val`` or ``test``, or with a folder for each class.
        folder: where the reports of single images go, each in a folder of its model's name and a number.
        models: networks by name, to be looked at instead of the published ones. The verdicts then say that they cannot
            be held against the paper.

    Raises:
        CheckpointError: the published weights cannot be loaded.
    """
    sets = read_images(data)
    images = next(sets[name] for name in ("val", "test", "all") if name in sets)
    networks = models or {name: create_model(name, weights="published") for name in WEIGHTS}
    count = min(FULL_LOOKED_AT, len(images))
    with progress(len(networks) * (count + FULL_SHOWN)) as advance:
        sections = []
        for name, network in networks.items():
            same = models is None and len(images.classes) == IMAGENET_CLASSES
            sections.append(_published(name, network.to(device()).eval(), images, count, Path(folder), same, advance))
    note = Note(
        "The paper also looks at EDSR and CycleGAN. convatlas.analysis.linear_interpreter.study makes the same "
        "pictures of them, or of any other network."
    )
    return finished(
        "Linear interpreters: full test of their claims", [*sections, Section("Others", [note])], data=str(data)
    )


def _published(
    name: str,
    network: Any,
    images: ImageSet,
    count: int,
    folder: Path,
    same: bool,
    advance: Callable[[str], None],
) -> Section:
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    preprocess = network.config.preprocess

    def prepared() -> Iterator[tuple[Tensor, int]]:
        for index in chosen:
            yield preprocess(images.image(int(index)))[None].to(device()), int(images.labels[index])
            advance(f"interpreting {name}")

    x, labels = zip(*prepared(), strict=True)
    halves = _halves(network, torch.cat(x), torch.tensor(labels, device=device()))
    reports = []
    for number in range(min(FULL_SHOWN, count)):
        report = study(
            network, x[number], singular=3, names=_names(images, network), folder=folder / f"{name}-{number}"
        )
        report.save(folder / f"{name}-{number}")
        reports.append(f"{name}-{number}/report.html")
        advance(f"pictures of {name}")
    row: list[Cell] = [count, halves.both, halves.linear, halves.bias, halves.share]
    columns = ["images", "A x0 + r [%]", "A x0 alone [%]", "r alone [%]", "r / y of the class"]
    parts: list[Part] = [
        *_classifier_claims([halves], seeds=1, chance=CHANCE, scale_ok=same),
        Table("Accuracy of the parts of the linear system", columns, [row]),
        Files("Single images", {f"image {number}": path for number, path in enumerate(reports)}),
    ]
    return Section(name, parts)


def _names(images: ImageSet, network: Any) -> Sequence[str] | None:
    return images.classes if len(images.classes) == network.num_classes else None
