"""Filters learned from patches of images without labels, for the first layer of any network.

"On filter design in deep convolutional neural network", 2024, and the methods that it surveys: PCA and PCANet, ZCA with
spherical k-means, ICA and reconstruction ICA, sparse coding, denoising autoencoders, restricted Boltzmann machines,
self-organising maps, slow features, linear discriminants and random projections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convatlas.data.images import read_images
from convatlas.errors import CheckpointError, DataError, Unsupported, unknown
from convatlas.files import atomic_path
from convatlas.ops.patch_statistics import (
    contrast_normalised,
    decorrelated,
    fast_ica,
    pcanet_components,
    principal_components,
    spherical_kmeans,
)
from convatlas.training.method import Method

__all__ = [
    "LEARNERS",
    "FilterBank",
    "LearnedFilters",
    "Patches",
    "extract_patches",
    "filters_from",
    "learn_filters",
    "replace_first_layer",
]


class Patches(NamedTuple):
    """Patches of images.

    Attributes:
        values: (n, D) in float64, the channel changing slowest.
        neighbours: the patches one pixel beside, (n, D), for slow features.
        labels: of the images (n), where they are given.
    """

    values: Tensor
    neighbours: Tensor
    labels: Tensor | None = None


class _Learned(NamedTuple):
    filters: Tensor  # (m, D), for raw patches
    bias: Tensor  # (m)
    whitening: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FilterBank:
    """Filters and how they came about.

    Attributes:
        filters: (m, C, k, k).
        bias: (m).
        whitening: (D, D) of the patches, where the filters hold one; they are for raw patches all the same.
        recipe: method and settings.
    """

    filters: Tensor
    bias: Tensor
    whitening: Tensor | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def to_conv(self, *, trainable: bool = False, stride: int = 1, padding: int = 0) -> nn.Conv2d:
        """A convolution with these filters and biases, in float32."""
        count, channels, side, _ = self.filters.shape
        conv = nn.Conv2d(channels, count, side, stride, padding)
        with torch.no_grad():
            conv.weight.copy_(self.filters)
            conv.bias.copy_(self.bias)  # type: ignore[union-attr]
        return conv.requires_grad_(trainable)

    def save(self, path: str | Path) -> None:
        """Write filters, bias and whitening as safetensors, with the recipe as JSON."""
        tensors = {"filters": self.filters.contiguous(), "bias": self.bias.contiguous()}
        if self.whitening is not None:
            tensors["whitening"] = self.whitening.contiguous()
        with atomic_path(Path(path)) as part:
            save_file(tensors, part, metadata={"recipe": json.dumps(dict(self.recipe))})

    @classmethod
    def load(cls, path: str | Path) -> FilterBank:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file holds no filters.
        """
        try:
            with safe_open(str(path), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                recipe = json.loads((file.metadata() or {}).get("recipe", "{}"))
            return cls(tensors["filters"], tensors["bias"], tensors.get("whitening"), recipe)
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} holds no filter bank: {error}") from None
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(f"{path} holds no filter bank: {error}") from None


def extract_patches(
    images: Sequence[Tensor],
    k: int,
    count: int = 10_000,
    *,
    generator: torch.Generator | None = None,
    labels: Sequence[int] | Tensor | None = None,
) -> Patches:
    """Squares at random places of random images.

    Args:
        images: (C, H, W) each, of any sizes, or (N, C, H, W).
        k: side of the squares.
        count: how many.
        generator: of the random numbers.
        labels: of the images.

    Raises:
        ValueError: there is no image, or one is smaller than k + 1 pixels.
    """
    if not len(images) or k < 1 or count < 1:
        raise ValueError(f"images, k and count must not be empty or 0, got {len(images)}, {k} and {count}")
    if any(image.dim() != 3 or min(image.shape[1:]) <= k for image in images):
        smallest = min(tuple(image.shape) for image in images)
        raise ValueError(f"images must be (C, H, W) and larger than k = {k}, got {smallest}")
    chosen = torch.randint(len(images), (count,), generator=generator).tolist()
    places = torch.rand(count, 2, generator=generator).tolist()
    found, beside = [], []
    for index, (down, right) in zip(chosen, places, strict=True):
        image = images[index]
        y, x = int(down * (image.shape[1] - k + 1)), int(right * (image.shape[2] - k))
        found.append(image[:, y : y + k, x : x + k].reshape(-1))
        beside.append(image[:, y : y + k, x + 1 : x + 1 + k].reshape(-1))
    marks = None if labels is None else torch.as_tensor(labels)[chosen]
    return Patches(torch.stack(found).double(), torch.stack(beside).double(), marks)


def learn_filters(
    images: Sequence[Tensor] | str | Path,
    method: str = "zca_kmeans",
    k: int = 5,
    m: int = 24,
    *,
    n_patches: int = 10_000,
    seed: int = 0,
    labels: Sequence[int] | Tensor | None = None,
    **options: Any,
) -> FilterBank:
    """Learn m filters of k x k taps.

    Args:
        images: (C, H, W) each, or (N, C, H, W), or a folder of images (values from 0 to 1 then).
        method: of `LEARNERS`.
        k: side of the filters.
        m: how many.
        n_patches: squares to learn from.
        seed: of the patches and of what is random in the method.
        labels: of the images, which ``lda`` needs; those of the folder otherwise.
        **options: of the method.

    Raises:
        UnknownName: there is no such method.
        ValueError: the images are too small, are constant or hold NaN; or the method cannot give so many filters.
        DataError: the folder cannot be read.
    """
    if method not in LEARNERS:
        raise unknown("method", method, LEARNERS)
    if isinstance(images, str | Path):
        images, labels = _read(images)
    generator = torch.Generator().manual_seed(seed)
    patches = extract_patches(images, k, n_patches, generator=generator, labels=labels)
    if not bool(patches.values.isfinite().all()):
        raise ValueError("images must be finite, but some hold NaN or infinity")
    if float(patches.values.std()) == 0:
        raise ValueError("patches must differ, but the images are constant")
    found = LEARNERS[method](patches, m, generator, **options)
    channels = images[0].shape[0]
    recipe = {"method": method, "k": k, "m": m, "n_patches": n_patches, "seed": seed, **options}
    filters = found.filters.reshape(len(found.filters), channels, k, k).float()
    whitening = None if found.whitening is None else found.whitening.float()
    return FilterBank(filters, found.bias.float(), whitening, recipe)


def _read(source: str | Path) -> tuple[list[Tensor], Tensor | None]:
    sets = read_images(source)
    chosen = sets.get("train", next(iter(sets.values())))
    if not len(chosen):
        raise DataError(f"{source} holds no image")
    images = []
    for index in range(len(chosen)):
        pixels = torch.tensor(chosen.image(index))
        images.append(pixels.movedim(-1, 0).float() / (255 if pixels.dtype == torch.uint8 else 1))
    return images, torch.as_tensor(chosen.labels) if chosen.labels is not None else None


# -- learners ----------------------------------------------------------------------------------------------------------


def _at_most(m: int, most: int) -> None:
    if not 1 <= m <= most:
        raise ValueError(f"cannot take {m} filters from {most}-dimensional patches")


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)


def _pca(patches: Patches, m: int, _: torch.Generator) -> _Learned:
    _at_most(m, patches.values.shape[1])
    found = principal_components(patches.values)
    return _Learned(found.vectors[:m], -found.vectors[:m] @ found.mean)


def _pcanet(patches: Patches, m: int, _: torch.Generator) -> _Learned:
    _at_most(m, patches.values.shape[1])
    return _Learned(pcanet_components(patches.values)[:m], patches.values.new_zeros(m))


def _random(patches: Patches, m: int, generator: torch.Generator) -> _Learned:
    """Random projections of the patches less their means."""
    rows = torch.randn(m, patches.values.shape[1], dtype=torch.float64, generator=generator)
    return _Learned(_unit(rows - rows.mean(1, keepdim=True)), patches.values.new_zeros(m))


def _zca_kmeans(
    patches: Patches,
    m: int,
    generator: torch.Generator,
    *,
    eps: float = 0.1,
    contrast_eps: float = 0.01,
    iterations: int = 10,
) -> _Learned:
    normalised = contrast_normalised(patches.values, contrast_eps)
    found = principal_components(normalised)
    zca = found.zca(eps)
    data = (normalised - found.mean) @ zca
    start = data[torch.randperm(len(data), generator=generator)[:m]]
    if len(start) < m:
        raise ValueError(f"k-means needs at least {m} patches, got {len(data)}")
    filters = spherical_kmeans(data, start, iterations) @ zca
    filters = filters - filters.mean(1, keepdim=True)  # as the contrast normalisation takes means off
    return _Learned(filters, -filters @ found.mean, zca)


def _whitened(patches: Patches, components: int | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened data, the whitening and the mean."""
    found = principal_components(patches.values)
    rank = int((found.values > 1e-10 * found.values[0]).sum())
    whitening = found.whitening(eps)[: min(components or rank, rank)]
    return (patches.values - found.mean) @ whitening.T, whitening, found.mean


def _folded(rows: Tensor, whitening: Tensor, mean: Tensor) -> _Learned:
    filters = rows @ whitening
    return _Learned(filters, -filters @ mean, whitening)


def _ica(patches: Patches, m: int, generator: torch.Generator, *, iterations: int = 200) -> _Learned:
    _at_most(m, patches.values.shape[1])
    data, whitening, mean = _whitened(patches, m)
    _at_most(m, data.shape[1])
    start = decorrelated(torch.randn(m, m, dtype=torch.float64, generator=generator))
    return _folded(fast_ica(data, start, iterations), whitening, mean)


def _descend(parameters: Sequence[Tensor], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _rica(
    patches: Patches, m: int, generator: torch.Generator, *, sparsity: float = 0.1, steps: int = 300, rate: float = 0.02
) -> _Learned:
    """Reconstruction ICA (Le et al., 2011): |W^T W x - x|^2 / 2 + sparsity sum log cosh W x."""
    data, whitening, mean = _whitened(patches, eps=0.1)
    w = _unit(torch.randn(m, data.shape[1], dtype=torch.float64, generator=generator)).requires_grad_()

    def loss() -> Tensor:
        batch = data[torch.randint(len(data), (min(1000, len(data)),), generator=generator)]
        codes = batch @ w.T
        smooth = codes.abs() + torch.log1p(torch.exp(-2 * codes.abs()))  # log cosh, up to a constant
        return 0.5 * (codes @ w - batch).square().sum(1).mean() + sparsity * smooth.sum(1).mean()

    _descend([w], loss, steps, rate)
    return _folded(w.detach(), whitening, mean)


def _sparse_coding(
    patches: Patches,
    m: int,
    generator: torch.Generator,
    *,
    codes: str = "ista",
    penalty: float = 0.2,
    nonzero: int = 5,
    iterations: int = 10,
) -> _Learned:
    """Dictionary learning: codes by ISTA or by orthogonal matching pursuit, atoms by least squares, in turn."""
    if codes not in ("ista", "omp"):
        raise unknown("codes", codes, ("ista", "omp"))
    data, whitening, mean = _whitened(patches, eps=0.1)
    atoms = _unit(data[torch.randperm(len(data), generator=generator)[:m]])
    if len(atoms) < m:
        raise ValueError(f"sparse coding needs at least {m} patches, got {len(data)}")
    for _ in range(iterations):
        found = _ista(data, atoms, penalty) if codes == "ista" else _omp(data, atoms, nonzero)
        gram = found.T @ found + 1e-6 * len(data) * torch.eye(m, dtype=data.dtype)
        fresh = torch.linalg.solve(gram, found.T @ data)
        used = torch.linalg.vector_norm(fresh, dim=1, keepdim=True) > 1e-8
        atoms = _unit(torch.where(used, fresh, atoms))
    return _folded(atoms, whitening, mean)


def _ista(data: Tensor, atoms: Tensor, penalty: float, steps: int = 30) -> Tensor:
    gram = atoms @ atoms.T
    size = 1 / float(torch.linalg.matrix_norm(gram, 2))
    target, codes = data @ atoms.T, data.new_zeros(len(data), len(atoms))
    for _ in range(steps):
        codes = F.softshrink(codes - size * (codes @ gram - target), size * penalty)
    return codes


def _omp(data: Tensor, atoms: Tensor, nonzero: int) -> Tensor:
    rows = torch.arange(len(data))[:, None]
    chosen = torch.empty(len(data), 0, dtype=torch.long)
    residual, values = data, data.new_empty(len(data), 0)
    for _ in range(min(nonzero, len(atoms))):
        score = (residual @ atoms.T).abs()
        score[rows, chosen] = -1
        chosen = torch.cat([chosen, score.argmax(1, keepdim=True)], 1)
        picked = atoms[chosen]  # (n, s, q)
        gram = picked @ picked.mT + 1e-9 * torch.eye(picked.shape[1], dtype=data.dtype)
        values = torch.linalg.solve(gram, picked @ data[..., None])[..., 0]
        residual = data - torch.einsum("ns,nsq->nq", values, picked)
    return data.new_zeros(len(data), len(atoms)).scatter_(1, chosen, values)


def _autoencoder(
    patches: Patches, m: int, generator: torch.Generator, *, noise: float = 0.3, steps: int = 300, rate: float = 0.02
) -> _Learned:
    """Denoising autoencoder with tied weights: W^T sigmoid(W (x + noise) + b) + c."""
    data, whitening, mean = _whitened(patches, eps=0.1)
    w = (0.1 * torch.randn(m, data.shape[1], dtype=torch.float64, generator=generator)).requires_grad_()
    hidden, visible = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (m, data.shape[1]))

    def loss() -> Tensor:
        batch = data[torch.randint(len(data), (min(1000, len(data)),), generator=generator)]
        noisy = batch + noise * torch.randn(batch.shape, dtype=batch.dtype, generator=generator)
        return ((noisy @ w.T + hidden).sigmoid() @ w + visible - batch).square().sum(1).mean()

    _descend([w, hidden, visible], loss, steps, rate)
    return _with_bias(_folded(w.detach(), whitening, mean), hidden.detach())


def _rbm(patches: Patches, m: int, generator: torch.Generator, *, steps: int = 300, rate: float = 0.01) -> _Learned:
    """Restricted Boltzmann machine with Gaussian visible and binary hidden units, by contrastive divergence (CD-1)."""
    data, whitening, mean = _whitened(patches, eps=0.1)
    w = 0.1 * torch.randn(m, data.shape[1], dtype=torch.float64, generator=generator)
    hidden = data.new_zeros(m)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (min(200, len(data)),), generator=generator)]
        up = (batch @ w.T + hidden).sigmoid()
        state = (torch.rand(up.shape, dtype=up.dtype, generator=generator) < up).double()
        down = state @ w  # the mean of the visible units
        again = (down @ w.T + hidden).sigmoid()
        w = w + rate * (up.T @ batch - again.T @ down) / len(batch)
        hidden = hidden + rate * (up - again).mean(0)
    return _with_bias(_folded(w, whitening, mean), hidden)


def _som(
    patches: Patches, m: int, generator: torch.Generator, *, iterations: int = 20, radius: float | None = None
) -> _Learned:
    """Self-organising map on a line, in batches: neighbours on the line become alike."""
    normalised = contrast_normalised(patches.values)
    found = principal_components(normalised)
    zca = found.zca()
    data = (normalised - found.mean) @ zca
    units = data[torch.randint(len(data), (m,), generator=generator)].clone()
    first = radius or max(1.0, m / 4)
    places = torch.arange(m, dtype=data.dtype)
    for step in range(iterations):
        width = first * (0.5 / first) ** (step / max(1, iterations - 1))
        winner = torch.cdist(data, units).argmin(1)
        near = torch.exp(-((places[:, None] - places) ** 2) / (2 * width**2))
        sums = torch.zeros_like(units).index_add_(0, winner, data)
        counts = torch.bincount(winner, minlength=m).to(data.dtype)
        units = (near @ sums) / (near @ counts)[:, None].clamp_min(1e-12)
    filters = _unit(units) @ zca
    filters = filters - filters.mean(1, keepdim=True)
    return _Learned(filters, -filters @ found.mean, zca)


def _sfa(patches: Patches, m: int, _: torch.Generator) -> _Learned:
    """Slow feature analysis: directions of variance 1 that change least from a patch to the one beside it."""
    data, whitening, mean = _whitened(patches)
    _at_most(m, data.shape[1])
    change = (patches.neighbours - patches.values) @ whitening.T
    _, vectors = torch.linalg.eigh(change.T @ change / len(change))
    return _folded(vectors.T[:m], whitening, mean)


def _lda(patches: Patches, m: int, _: torch.Generator, *, eps: float = 1e-3) -> _Learned:
    """LDANet: directions in which the means of the classes differ most, over the spread within; needs labels."""
    if patches.labels is None:
        raise ValueError("lda needs the labels of the images")
    data = patches.values - patches.values.mean(1, keepdim=True)
    classes = patches.labels.unique()
    _at_most(m, min(data.shape[1], len(classes) - 1))
    means = torch.stack([data[patches.labels == each].mean(0) for each in classes])
    spread = torch.cat([data[patches.labels == each] - mean for each, mean in zip(classes, means, strict=True)])
    within = spread.T @ spread / len(spread)
    within = within + eps * within.diagonal().mean() * torch.eye(len(within), dtype=data.dtype)
    lower = torch.linalg.inv(torch.linalg.cholesky(within))
    centred = (means - means.mean(0)) @ lower.T
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    filters = _unit(vectors.flip(1).T[:m] @ lower)
    filters = filters - filters.mean(1, keepdim=True)
    return _Learned(filters, data.new_zeros(m))


def _with_bias(found: _Learned, bias: Tensor) -> _Learned:
    return found._replace(bias=found.bias + bias)


#: Methods by name: each takes patches, the number of filters and a generator.
LEARNERS: dict[str, Callable[..., _Learned]] = {
    "pca": _pca,
    "pcanet": _pcanet,
    "zca_kmeans": _zca_kmeans,
    "ica": _ica,
    "rica": _rica,
    "sparse_coding": _sparse_coding,
    "autoencoder": _autoencoder,
    "rbm": _rbm,
    "som": _som,
    "sfa": _sfa,
    "lda": _lda,
    "random": _random,
}


# -- networks ----------------------------------------------------------------------------------------------------------


def filters_from(model: nn.Module, layer: str | None = None) -> FilterBank:
    """The filters of a trained network's first convolution, or of another, as a bank.

    Raises:
        Unsupported: there is no such convolution of images.
    """
    name, conv = _first(model, layer)
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    return FilterBank(conv.weight.detach().clone(), bias.detach().clone(), None, {"layer": name})


def replace_first_layer(
    model: nn.Module, bank: FilterBank, *, layer: str | None = None, trainable: bool = True, scale: bool = True
) -> str:
    """Give the first convolution of a network the filters of a bank, in place; geometry and names stay.

    Where the layer has more filters than the bank, the others stay as they are; where it has fewer, the first are
    taken. Kernels of other sizes are filled up with zeros around them, or refused where they are smaller.

    Args:
        model: any network.
        bank: filters for as many channels.
        layer: name of the convolution; the first in the network when left out.
        trainable: whether the layer is trained on.
        scale: give each filter the norm that the layer's own filters have on average, so that training goes on as if it
            were drawn; the bias is set to zero then if the layer has one.

    Returns:
        The name of the layer.

    Raises:
        Unsupported: there is no such convolution, or the channels or sizes do not fit.
    """
    name, conv = _first(model, layer)
    filters, side = bank.filters, conv.kernel_size[0]
    if conv.weight.shape[1] != filters.shape[1] or conv.kernel_size[0] != conv.kernel_size[1]:
        wanted, given = tuple(conv.weight.shape[1:]), tuple(filters.shape[1:])
        raise Unsupported(f"{name} needs filters of {wanted}, the bank has those of {given}")
    margin = side - filters.shape[2]
    if margin < 0:
        raise Unsupported(f"{name} has {side} x {side} taps, the filters {filters.shape[2]} x {filters.shape[3]}")
    before = margin // 2
    count = min(len(filters), conv.out_channels)
    with torch.no_grad():
        fresh = F.pad(filters[:count], (before, margin - before, before, margin - before)).to(conv.weight)
        if scale:
            norms = torch.linalg.vector_norm(conv.weight.flatten(1), dim=1)
            fresh = (
                fresh
                * (norms.mean() / torch.linalg.vector_norm(fresh.flatten(1), dim=1).clamp_min(1e-12))[
                    :, None, None, None
                ]
            )
        conv.weight[:count] = fresh
        if conv.bias is not None:
            conv.bias[:count] = 0 if scale else bank.bias[:count].to(conv.bias)
    conv.weight.requires_grad_(trainable)
    return name


def _first(model: nn.Module, layer: str | None) -> tuple[str, nn.Conv2d]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and layer in (None, name):
            return name, module
    what = f"convolution {layer}" if layer else "convolution of images"
    raise Unsupported(f"this {type(model).__name__} has no {what}")


@dataclass(frozen=True, kw_only=True)
class LearnedFilters(Method):
    """The method with its settings: a network's first convolution begins with filters that were learned from images.

    Attributes:
        images: a folder of images, or ``digits``, as `convatlas.data.images.read_images` reads them.
        filters: of `LEARNERS`.
        patches: squares to learn from.
        layer: name of the convolution; the first when left out.
        trainable: whether it is trained on.
        seed: of the patches and of the method.
    """

    images: str
    filters: str = "zca_kmeans"
    patches: int = 10_000
    layer: str | None = None
    trainable: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.filters not in LEARNERS:
            raise unknown("filters", self.filters, LEARNERS)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Learn as many filters as the layer has, or as the method can give, and put them in.

        Raises:
            DataError: the images cannot be read.
            Unsupported: there is no such convolution, or it reads other channels.
        """
        _, conv = _first(model, self.layer)
        most = conv.out_channels
        if self.filters in ("pca", "pcanet", "ica", "sfa"):
            most = min(most, conv.weight[0].numel() - 1)
        side = conv.kernel_size[0]
        bank = learn_filters(self.images, self.filters, side, most, n_patches=self.patches, seed=self.seed)
        replace_first_layer(model, bank, layer=self.layer, trainable=self.trainable)
        return model
