"""Noise, images that are learned from under it, and measuring how well a network takes it away."""

from __future__ import annotations

import csv
import io
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.image_pairs import Sample
from convatlas.files import write_text
from convatlas.networks.base import Denoiser
from convatlas.ops.image_quality import psnr, ssim
from convatlas.report import printable
from convatlas.restoration.evaluation import mean_quality
from convatlas.restoration.patches import LearningPair
from convatlas.restoration.protocol import Quality, as_pixels, as_tensor
from convatlas.restoration.upscaling import in_tiles

__all__ = [
    "Cleaned",
    "Noise",
    "NoisySet",
    "clean_pair",
    "denoise_image",
    "means",
    "measure_cleaned",
    "quality_of",
    "seen",
    "write_cleaned",
]

Array = npt.NDArray[Any]

#: Weights of red, green and blue in grey, as image files have it.
_GREY = (0.299, 0.587, 0.114)
_SHOWN = 96
_SSIM_WINDOW = 11


@dataclass(frozen=True, kw_only=True)
class Noise:
    """White Gaussian noise, the same for every pixel and channel.

    Attributes:
        sigma: standard deviation in levels of 255: what the quality is measured at.
        train_sigma: of the training: drawn evenly between two values for each patch, e.g. ``(0, 55)`` for a network
            that is to serve any noise; ``sigma`` when left out.
        cut: whether noisy values are cut to the range of an image and rounded, as in a file of 8 bits.

    Raises:
        ValueError: a value is out of range.
    """

    sigma: float = 25.0
    train_sigma: tuple[float, float] | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if self.train_sigma is not None and not 0 <= self.train_sigma[0] <= self.train_sigma[1] < math.inf:
            raise ValueError(f"train_sigma must be two rising numbers from 0, got {self.train_sigma}")

    def add(self, clean: Tensor, seed: int, *, training: bool = False) -> Tensor:
        """A noisy copy of an image in [0, 1]; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        low, high = self.train_sigma or (self.sigma, self.sigma) if training else (self.sigma, self.sigma)
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
        noisy = clean + sigma / 255 * torch.randn(clean.shape, generator=generator)
        return (noisy.clamp(0, 1) * 255).round() / 255 if self.cut else noisy

    def describe(self) -> str:
        """The noise in one sentence."""
        cut = ", cut and rounded to 8 bits" if self.cut else ""
        return (
            f"Gaussian noise of standard deviation {self.sigma:g} of 255{cut}, where none is given; PSNR and SSIM over "
            "all channels, the result cut to the range of an image and not rounded."
        )


def seen(image: Array, channels: int) -> Array:
    """An image (H, W, 1 or 3) as a network of 1 or 3 channels sees it: (channels, H, W), grey in float32."""
    if channels == 3:
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)).transpose(2, 0, 1))
    x = as_tensor(image)
    grey = x if x.shape[0] == 1 else torch.einsum("chw,c->hw", x, torch.tensor(_GREY, dtype=x.dtype))[None]
    return grey.float().numpy()


def clean_pair(sample: Sample, channels: int) -> LearningPair:
    """The clean image twice, or the noisy one that is given and the clean one."""
    clean = seen(sample.high[0], channels)
    return LearningPair(clean if sample.low is None else seen(sample.low[0], channels), clean)


@dataclass(eq=False)
class NoisySet(Dataset[dict[str, Tensor]]):
    """Samples ``{"low", "high"}`` of which those without noise of their own get some, by their seed.

    Attributes:
        clean: the samples, indexed by position or by (position, seed).
        noise: what is added.
        training: whether the noise is that of the training, new for each seed.
    """

    clean: Any
    noise: Noise
    training: bool = False

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key if isinstance(key, tuple | list) else (key, 0)
        sample = self.clean[key if self.training else index]
        if torch.equal(sample["low"], sample["high"]):
            number = 1_000_003 * seed + index
            sample["low"] = self.noise.add(sample["high"], number, training=self.training)
        return sample


@dataclass(frozen=True, eq=False)
class Cleaned:
    """One image cleaned by a network.

    Attributes:
        name: of the image.
        shape: height and width.
        noisy, network: quality before and after.
        shown: the square with most detail, (H, W, 3) uint8 each, noisy, cleaned and true.
    """

    name: str
    shape: tuple[int, int]
    noisy: Quality
    network: Quality
    shown: tuple[Array, Array, Array]


def measure_cleaned(model: Denoiser, name: str, sample: Sample, noise: Noise) -> Cleaned:
    """Add noise to an image, where it has none of its own, clean it, and compare; the noise follows from the name."""
    pair = clean_pair(sample, model.in_channels)
    truth, noisy = (as_tensor(np.moveaxis(image, 0, -1)) for image in (pair.high, pair.low))
    if sample.low is None:
        noisy = noise.add(truth, zlib.crc32(name.encode("utf-8", "surrogateescape")))
    weight = next(model.parameters())
    result = in_tiles(model, noisy[None].to(weight.device, weight.dtype))[0].float().cpu().clamp(0, 1)
    shown = _squares(noisy, result, truth)
    return Cleaned(name, (truth.shape[1], truth.shape[2]), quality_of(noisy, truth), quality_of(result, truth), shown)


def quality_of(result: Tensor, truth: Tensor) -> Quality:
    """PSNR and SSIM over all channels of an image (C, H, W) in [0, 1]."""
    large = min(truth.shape[1:]) >= _SSIM_WINDOW
    similarity = float(ssim(result.double(), truth.double(), data_range=1)) if large else math.nan
    return Quality(float(psnr(result.double(), truth.double(), data_range=1)), similarity)


def denoise_image(model: Denoiser, image: Array, *, progress: Callable[[int, int], None] | None = None) -> Array:
    """Clean a whole image, in tiles where it is large.

    A network for grey cleans each channel by itself; one for RGB sees grey as three equal channels.

    Args:
        model: the network, in evaluation mode, on any device.
        image: (H, W) or (H, W, 1 or 3); uint8, uint16, or floating point in [0, 1].
        progress: called with the tiles done and the number of all tiles.

    Returns:
        The shape and type of ``image``.

    Raises:
        ValueError: the image has another shape or type, is empty or holds NaN.
    """
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(f"image must be (H, W) or (H, W, 1 or 3) and not empty, got {image.shape}")
    if pixels.dtype.kind != "f" and pixels.dtype.name not in ("uint8", "uint16"):
        raise ValueError(f"image must be uint8, uint16 or floating point, got {pixels.dtype}")
    x = as_tensor(pixels).float()
    if x.isnan().any():
        raise ValueError("image must not hold NaN")
    channels, wanted = x.shape[0], model.in_channels
    batch = x[:, None] if wanted == 1 else x.expand(wanted, -1, -1)[None]
    weight = next(model.parameters())
    y = in_tiles(model, batch.to(weight.device, weight.dtype), progress=progress).float().cpu()
    y = y[:, 0] if wanted == 1 else y[0]
    y = y.mean(0, keepdim=True) if channels < len(y) else y
    result = as_pixels(y, pixels.dtype)
    return result[..., 0] if image.ndim == 2 else result


def write_cleaned(path: str | Path, measured: Sequence[Cleaned]) -> None:
    """One row an image: its name, size, and the quality before and after."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "height", "width", "PSNR", "SSIM", "noisy PSNR", "noisy SSIM"])
    for each in measured:
        writer.writerow(
            [printable(each.name), *each.shape, *(f"{value:.4f}" for value in (*each.network, *each.noisy))]
        )
    write_text(path, text.getvalue())


def means(measured: Iterable[Cleaned]) -> tuple[Quality, Quality]:
    """Mean quality before and after."""
    rows = list(measured)
    return mean_quality(each.noisy for each in rows), mean_quality(each.network for each in rows)


def _squares(noisy: Tensor, result: Tensor, truth: Tensor) -> tuple[Array, Array, Array]:
    """The same square of each, where the truth has most detail."""
    side = min(_SHOWN, *truth.shape[1:])
    grey = truth.double().mean(0)
    detail = torch.nn.functional.avg_pool2d((grey - grey.mean()).square()[None, None], side, 1)[0, 0]
    spread = detail - torch.nn.functional.avg_pool2d((grey - grey.mean())[None, None], side, 1)[0, 0].square()
    y, x = divmod(int(spread.argmax()), spread.shape[1])
    cuts = (image[:, y : y + side, x : x + side] for image in (noisy, result, truth))
    first, second, third = (np.broadcast_to(as_pixels(cut, np.uint8), (side, side, 3)) for cut in cuts)
    return first, second, third
