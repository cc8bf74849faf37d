"""Is the Monarch decomposition exact, how much memory does recomputation save, and do short and sparse kernels suffice?

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908. How fast the operators are, ``convatlas bench fft_conv`` and ``convatlas bench short_conv`` tell.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import (
    Samples,
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    train_by_recipe,
)
from convatlas.networks.long_conv import LongConvConfig
from convatlas.nn.mixers.long_conv import LongConv, squash
from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.frequency_sparse import frequency_sparse_kernel, sparsity
from convatlas.ops.monarch import choose_factors, monarch_dft, monarch_fft_conv, permute_kernel_spectrum
from convatlas.report import Cell, Claim, Lines, Note, Report, Section, Table
from convatlas.training.measure import kept_bytes
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Largest error of a transform in float32, and of a convolution whose products have operands in half precision, over
#: the largest value.
EXACT = 1e-5
ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
#: Bytes kept for the backward pass over those that the complex form keeps, at most.
KEPT = 0.26
#: Points of accuracy that kernels of a quarter of the sequence, and spectra of a quarter of the frequencies, may cost.
COST = 2.0
#: Accuracy in % below which the network has not learned enough to be compared.
LEARNED = 85.0

SEEDS = (0, 1, 2)
LENGTHS = (1024, 4096, 16384, 65536)
#: Of the convolutions whose memory is counted: batch, channels, length.
SIZE = (4, 16, 4096)

PIXELS = 64
TRAINING = Training(epochs=15, batch_size=32, lr=1e-2, weight_decay=0.01, warmup_epochs=1)
TRAIN_FRACTION = 0.5
NETWORK = LongConvConfig(channels=32, depth=2, lam=0.0, prenorm=True, dropout=0.0, in_channels=1, length=PIXELS)
#: How far kernels reach in either direction.
REACHES = (64, 16, 8)
#: The network whose kernels have the lowest quarter of the frequencies only.
LOWEST = "lowest quarter"
#: Frequencies below which all are kept afterwards, and blocks of the permuted spectrum of 8 x 16.
LOW_PASSES = (32, 16, 8)
FACTORS, BLOCKS = (8, 16), ((8, 8), (4, 8), (4, 5), (3, 4))

RECIPE = "long_conv"
PATH_512 = (512, 512)
PUBLISHED = 96.1
#: Points of accuracy above chance, at least; and that two runs may differ by.
BETTER, RUN_NOISE = 5.0, 1.0


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" checks the decomposition and memory, and classifies digits as sequences of pixels with whole,
            partial and sparse kernels; "full" classifies images as sequences.
        data: for "full": Path-512 or other images, a folder with ``train`` and ``val`` and a folder for each class.
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


def quick() -> Report:
    """Errors of the decomposition, bytes kept, and the accuracy of whole, partial and sparse kernels on digits."""
    with progress(2 + len(SEEDS) * (1 + len(REACHES)) * TRAINING.epochs) as advance:
        sections = [_decomposition()]
        advance("decomposition")
        sections.append(_memory())
        advance("memory")
        sections += _digits(advance)
    return finished("FlashFFTConv: quick test of its claims", sections)


# -- operators ---------------------------------------------------------------------------------------------------------


def _relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).abs().max() / exact.abs().max())


def _decomposition() -> Section:
    """Transforms of every order in float32 beside those of torch in float64, and convolutions in half precision."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[Cell]] = []
    errors: list[float] = []
    rounded: dict[torch.dtype, list[float]] = {dtype: [] for dtype in ROUNDED}
    for n in LENGTHS:
        u, k = (torch.randn(2, n, generator=generator) for _ in range(2))
        for order in (2, 3, 4):
            factors = choose_factors(n, order)
            exact = permute_kernel_spectrum(torch.fft.fft(u.double()), factors)
            errors.append(_relative(monarch_dft(u, factors), exact))
            rows.append([f"{n:,}", " x ".join(map(str, factors)), errors[-1]])
        signals, kernels = u[:, None], k[:1]
        exact = fft_conv(signals.double(), kernels.double(), n)
        for dtype, found in rounded.items():
            found.append(_relative(monarch_fft_conv(signals, kernels, n, operand=dtype), exact))
    claims = [
        Claim.judge(
            "The decomposition of order 2, 3 and 4 is a Fourier transform",
            published="an exact decomposition, of order 2 to 4 from 256 to 4M points (section 3.1)",
            statistic=f"largest error in float32 over the largest value, of {len(errors)} transforms",
            value=max(errors),
            at_most=EXACT,
            seeds=0,
        ),
        *(
            Claim.judge(
                f"Convolutions are accurate with operands in {str(dtype).removeprefix('torch.')}",
                published="fp16 and bf16 on the units for matrix products, within 1e-2 of values of about 1",
                statistic=f"largest error over the largest value, of circular convolutions of {len(LENGTHS)} lengths",
                value=max(values),
                at_most=ROUNDED[dtype],
                seeds=0,
            )
            for dtype, values in rounded.items()
        ),
    ]
    return Section("Decomposition", [*claims, Table("Errors in float32", ["points", "factors", "error"], rows)])


def _complex_form(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return torch.fft.ifft(torch.fft.fft(u, n) * torch.fft.fft(k, n), n).real[..., : u.shape[-1]]


def _memory() -> Section:
    u, k = (torch.randn(size, requires_grad=True) for size in (SIZE, SIZE[1:]))
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"fft_conv": fft_conv, "complex FFT": _complex_form}
    kept = {name: kept_bytes(partial(form, u, k)) for name, form in forms.items()}
    claim = Claim.judge(
        "Recomputing in the backward pass saves memory",
        published="up to 8.21 times less memory than PyTorch, for a gated convolution in half precision",
        statistic="bytes that are kept for the backward pass over those that the complex form keeps",
        value=kept["fft_conv"] / kept["complex FFT"],
        at_most=KEPT,
        seeds=0,
    )
    rows: list[list[Cell]] = [[name, size / 2**20] for name, size in kept.items()]
    label = " x ".join(map(str, SIZE))
    return Section("Memory", [claim, Table(f"Kept for the backward pass, {label}", ["form", "MiB"], rows)])


# -- digits as sequences of pixels -------------------------------------------------------------------------------------


def _pixels(seed: int) -> Samples:
    """The digits as they are, 8 x 8 pixels."""
    parts = {"train": TRAIN_FRACTION, "test": 1 - TRAIN_FRACTION}
    tensors = []
    for images in stratified_split(read_images("digits")["all"], parts, seed).values():
        values = torch.stack([torch.tensor(images.image(index)).float() for index in range(len(images))])
        tensors += [(values.reshape(len(images), 1, 8, 8) / values.max() - 0.3) / 0.4, torch.from_numpy(images.labels)]
    return Samples(*tensors)


def _digits(advance: Callable[[str], None]) -> list[Section]:
    kept: dict[str, list[nn.Module]] = {}

    def build(name: str, reach: int) -> nn.Module:
        kept.setdefault(name, []).append(model := NETWORK.override(length=reach).build())
        return model

    def low_pass() -> nn.Module:
        model = NETWORK.build()
        for layer in model.modules():
            if isinstance(layer, LongConv):
                parametrize.register_parametrization(layer, "kernel", _LowPass(PIXELS // 4))
        return model

    names = {reach: "whole" if reach >= PIXELS else f"reach {reach}" for reach in REACHES}
    networks: dict[str, Callable[[], nn.Module]] = {name: partial(build, name, reach) for reach, name in names.items()}
    networks[LOWEST] = low_pass
    trained = compare(networks, TRAINING, seeds=SEEDS, samples=_pixels, advance=advance)
    whole = trained["whole"]
    learned = statistics.mean(result.accuracy for result in whole) >= LEARNED
    partial_claim = Claim.judge(
        "Kernels of a quarter of the sequence are as good as whole ones",
        published="Hyena-s-8K on the PILE: perplexity 13.8 with kernels of 8K, 4K, 2K and 1K",
        statistic=f"accuracy with reach {PIXELS // 4} less that with whole kernels, on the same digits",
        value=accuracy_differences(trained[names[PIXELS // 4]], whole),
        at_least=-COST,
        seeds=len(SEEDS),
        scale_ok=learned,
        unit="points",
    )
    sparse_claim = Claim.judge(
        "Kernels that are trained with a quarter of the frequencies are as good as whole ones",
        published="frequency-sparse convolutions of HyenaDNA keep or improve its perplexity",
        statistic="accuracy with the lowest quarter of the frequencies less that with all, on the same digits",
        value=accuracy_differences(trained[LOWEST], whole),
        at_least=-COST,
        seeds=len(SEEDS),
        scale_ok=learned,
        unit="points",
    )
    caption = f"Networks on {PIXELS} pixels in a row that differ in their kernels, {TRAINING.epochs} epochs."
    parts = [partial_claim, sparse_claim, *accuracy_parts(trained, SEEDS, caption=caption)]
    return [Section("Partial and sparse kernels", parts), _sparse(kept["whole"], whole, learned)]


class _LowPass(nn.Module):
    """Kernels (heads, C, K) without the frequencies from ``keep`` on."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, kernel: Tensor) -> Tensor:
        return frequency_sparse_kernel(kernel.flatten(0, 1), kernel.shape[-1], self.keep).view_as(kernel)


def _sparse(models: list[nn.Module], whole: list[Trained], learned: bool) -> Section:
    """The trained networks with whole kernels, of which parts of the spectrum are taken away afterwards."""
    cases: list[tuple[str, float, Any, tuple[int, ...] | None]] = [
        (f"below {keep}", 1 - keep / PIXELS, keep, None) for keep in LOW_PASSES
    ]
    cases += [(f"block {' x '.join(map(str, keep))}", sparsity(FACTORS, keep), keep, FACTORS) for keep in BLOCKS]
    samples = [_pixels(seed) for seed in SEEDS]
    drops: dict[str, list[float]] = {}
    rows: list[list[Cell]] = []
    for name, share, keep, factors in cases:
        accuracies = [
            _accuracy(_sparsified(model, keep, factors), each) for model, each in zip(models, samples, strict=True)
        ]
        drops[name] = [after - result.accuracy for after, result in zip(accuracies, whole, strict=True)]
        rows.append([name, 100 * share, *accuracies, statistics.mean(accuracies)])
    chosen = next(name for name, share, *_ in cases if share >= 0.75)
    claim = Claim.judge(
        "Three quarters of the frequencies can be left out of trained kernels afterwards",
        published="HyenaDNA-1M without training: perplexity 2.91 with 0 %, 2.90 with 75 %, 2.98 with 91 % left out",
        statistic="accuracy with the lowest quarter of the frequencies less that with all, of the same networks",
        value=drops[chosen],
        at_least=-COST,
        seeds=len(SEEDS),
        scale_ok=learned,
        unit="points",
    )
    columns = ["kept", "left out [%]", *(f"seed {seed} [%]" for seed in SEEDS), "mean [%]"]
    shares = {name: 100 * share for name, share, *_ in cases}
    means = {
        name: statistics.mean(result.accuracy for result in whole) + statistics.mean(drops[name]) for name in drops
    }
    kinds = {"low-pass": list(drops)[: len(LOW_PASSES)], "blocks": list(drops)[len(LOW_PASSES) :]}
    curve = {kind: ([shares[name] for name in names], [means[name] for name in names]) for kind, names in kinds.items()}
    note = Note(
        "Blocks of the permuted spectrum are not symmetric: of most of what they keep, the real part of the result has "
        "half the size. Nothing is trained after frequencies were left out."
    )
    lines = Lines("Accuracy by what is left out", "left out [%]", "accuracy [%]", curve)
    return Section("Frequencies left out afterwards", [claim, Table("Accuracy", columns, rows), lines, note])


@torch.no_grad()
def _sparsified(model: nn.Module, keep: Any, factors: tuple[int, ...] | None) -> nn.Module:
    sparse = copy.deepcopy(model)
    for layer in sparse.modules():
        if isinstance(layer, LongConv):
            taps = squash(layer.kernel, layer.lam).flatten(0, 1)
            layer.kernel.copy_(frequency_sparse_kernel(taps, 2 * layer.length, keep, factors).view_as(layer.kernel))
            layer.lam = 0.0  # the taps are thresholded already
    return sparse.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, samples: Samples) -> float:
    where = next(model.parameters()).device
    right = model(samples.test_images.to(where)).argmax(1).cpu() == samples.test_labels
    return 100 * right.double().mean().item()


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Classify images as sequences of their pixels, by the recipe.

    Args:
        data: Path-512, a folder with ``train`` and ``val``.
        folder: of the run.
        changes: settings that differ from the recipe; with any, or with other images, the accuracy cannot be held
            against the published one, and the verdict says so.
    """
    done = train_by_recipe(RECIPE, folder, **{"data": str(data), "channels": 1, **changes})
    task = done.task
    chance = 100 / len(task.classes)
    same = not changes and task.preprocess.shape == PATH_512 and len(task.classes) == 2
    claims = [
        Claim.judge(
            "Long convolutions classify images as sequences of pixels better than chance",
            published="96.1 % on Path-512, sequences of 262,144; models before it are at chance",
            statistic=f"accuracy of the best epoch on the validation images less {chance:g} %",
            value=done.top1 - chance,
            at_least=BETTER,
            seeds=1,
            unit="points",
        ),
        Claim.judge(
            "The published accuracy on Path-512 is reached",
            published=f"{PUBLISHED} %",
            statistic="accuracy of the best epoch on the validation images",
            value=done.top1,
            at_least=PUBLISHED - RUN_NOISE,
            seeds=1,
            scale_ok=same,
            unit="%",
        ),
    ]
    parts = full_parts({"long_conv": done}, {"long_conv": None}, {})
    note = Note("The paper does not give the network of its result; this one has kernels that reach 4,096 pixels.")
    return finished(
        "FlashFFTConv: full test of its claims", [Section("Accuracy", [*claims, *parts, note])], data=str(data)
    )
