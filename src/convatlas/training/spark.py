"""SparK: pre-train any convolutional network without labels, by filling in what a mask hides of its images.

Tian, Jiang, Diao, Lin, Wang, Yuan: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", ICLR 2023, arXiv 2301.03580. The encoder computes on the visible cells alone (`convatlas.nn.masked`); its
maps of all scales, with learned embeddings in the hidden cells, go into a light U-shaped decoder; the loss compares its
output with the pixels of the hidden cells, normalised in each cell (section 3).

The network itself is trained and stays what it is: decoder and embeddings belong to the method and are left aside when
the network is saved.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from convatlas.errors import CheckpointError, Unsupported
from convatlas.hooks import watch
from convatlas.networks.base import Backbone, PublishedFile
from convatlas.nn.masked import ActiveMap, leaking_layers, masked
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.training.method import LossFn, Method
from convatlas.training.optim import make_optimizer, parameter_groups
from convatlas.training.settings import Training
from convatlas.weights import Layout

__all__ = [
    "PUBLISHED",
    "LightDecoder",
    "Reconstruction",
    "SparK",
    "SparKModel",
    "feature_maps",
    "patchify",
    "schedule",
    "unpatchify",
]

#: Scales that the decoder reads (paper, section 3.2).
_SCALES = 4
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def patchify(x: Tensor, stride: int) -> Tensor:
    """Cut images (B, C, H, W), or with other position axes, into cells (B, L, stride^2 C), rows before columns.

    Raises:
        ValueError: a side is no multiple of the stride.
    """
    if any(side % stride for side in x.shape[2:]):
        raise ValueError(f"the sides of images must be multiples of the stride {stride}, got {tuple(x.shape[2:])}")
    for axis in range(x.dim() - 2):
        x = x.unflatten(2 + 2 * axis, (-1, stride))
    dims = (x.dim() - 2) // 2
    cells, pixels = [2 + 2 * axis for axis in range(dims)], [3 + 2 * axis for axis in range(dims)]
    return x.permute(0, *cells, *pixels, 1).flatten(1, dims).flatten(2)


def unpatchify(patches: Tensor, stride: int, grid: Sequence[int]) -> Tensor:
    """Put the cells that `patchify` cut, ``grid`` of them, together to images (B, C, H, W)."""
    axes = range(len(grid))
    cells, pixels = (" ".join(f"{letter}{axis}" for axis in axes) for letter in "fp")
    image = " ".join(f"(f{axis} p{axis})" for axis in axes)
    sizes = {f"f{axis}": side for axis, side in enumerate(grid)} | {f"p{axis}": stride for axis in axes}
    return rearrange(patches, f"b ({cells}) ({pixels} c) -> b c {image}", **sizes)


def schedule(
    step: int,
    *,
    peak_lr: float,
    weight_decay: float,
    weight_decay_end: float,
    warmup_steps: int,
    steps: int,
) -> tuple[float, float]:
    """Learning rate and weight decay of the authors' pre-training at a step (from 0) of ``steps``.

    The rate rises linearly from 0.5 % of its peak, and falls by a cosine to 0.1 % of it; the decay follows a cosine.
    """
    if step < warmup_steps:
        lr = (0.005 + 0.995 * step / warmup_steps) * peak_lr
    else:
        passed = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
        lr = (0.001 + 0.999 * (0.5 + 0.5 * math.cos(math.pi * passed))) * peak_lr
    return lr, _cosine(weight_decay, weight_decay_end, step / max(steps - 1, 1))


def _cosine(start: float, end: float, passed: float) -> float:
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * passed))


# -- decoder -----------------------------------------------------------------------------------------------------------


class _UpBlock(nn.Module):
    """Twice the resolution by a transposed convolution, then two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        conv, norm = _CONV[dims], _BATCH_NORM[dims]
        self.up_sample = _UP[dims](in_channels, in_channels, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            conv(in_channels, in_channels, 3, padding=1, bias=False),
            norm(in_channels),
            nn.ReLU6(inplace=True),
            conv(in_channels, out_channels, 3, padding=1, bias=False),
            norm(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, 2 H, 2 W)."""
        return self.conv(self.up_sample(x))


class LightDecoder(nn.Module):
    """The decoder: one block for each factor of two of the stride, each half as wide as the one before (section 3.2).

    Args:
        stride: total stride of the encoder, a power of two.
        width: channels of the first block, a multiple of the stride.
        out_channels: of the images.
        dims: number of position axes.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, stride: int, width: int = 768, *, out_channels: int = 3, dims: int = 2) -> None:
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise ValueError(f"stride must be a power of two of at least 2, got {stride}")
        if width < 1 or width % stride:
            raise ValueError(f"width must be a multiple of the stride {stride}, got {width}")
        if dims not in _CONV:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        self.stride, self.width, self.blocks = stride, width, int(math.log2(stride))
        widths = [width // 2**level for level in range(self.blocks + 1)]
        self.dec = nn.ModuleList(_UpBlock(before, after, dims) for before, after in itertools.pairwise(widths))
        self.proj = _CONV[dims](widths[-1], out_channels, 1)
        self.apply(_init)

    def forward(self, to_dec: Mapping[int, Tensor]) -> Tensor:
        """An image (B, out_channels, H, W) from maps (B, width / 2^level, 2^level H / stride, ...) by level from 0."""
        x = to_dec[0]
        for level, block in enumerate(self.dec):
            if level in to_dec and level > 0:
                x = x + to_dec[level]
            x = block(x)
        return self.proj(x)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, _ConvNd) and module.bias is not None:
        nn.init.zeros_(module.bias)


# -- encoder -----------------------------------------------------------------------------------------------------------


def feature_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps of a network at its scales, from high to low resolution.

    Those of a `Backbone` are its ``forward_features``. A network that returns a list of maps, such as timm's with
    ``features_only``, is taken at its word; of any other, the last output of a module at each resolution is the map.

    Args:
        model: the network.
        x: images (B, C, H, W).

    Raises:
        Unsupported: there are no maps.
    """
    if isinstance(model, Backbone):
        return model.forward_features(x)
    found: dict[int, Tensor] = {}

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == x.dim() and max(output.shape[2:]) > 1:
            strides = {side / size for side, size in zip(x.shape[2:], output.shape[2:], strict=True)}
            if len(strides) == 1 and (stride := strides.pop()) == int(stride):
                found[int(stride)] = output

    with watch(model, lambda name, args, kwargs: None, after):
        output = model(x)
    if isinstance(output, list | tuple) and all(isinstance(each, Tensor) and each.dim() == x.dim() for each in output):
        return list(output)
    if not found:
        raise Unsupported(
            f"{type(model).__name__} makes no maps of images {tuple(x.shape)}, so there is nothing to mask"
        )
    return [found[stride] for stride in sorted(found)]


# -- method ------------------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """What SparK makes of images.

    Attributes:
        features: maps of the encoder that the decoder reads, from high to low resolution; zero in hidden cells.
        to_dec: what goes into the decoder, by level: 0 is the smallest map, each further one has twice its resolution.
        prediction: (B, C, H, W), normalised in each cell.
        loss: mean squared error of the hidden cells.
    """

    features: list[Tensor]
    to_dec: dict[int, Tensor]
    prediction: Tensor
    loss: Tensor


class SparK(Method, nn.Module):
    """Train a convolutional network to fill in hidden cells of images, without labels.

    Args:
        mask_ratio: share of the cells that are hidden; 0.6, at 384 pixels 0.75. A cell is as large as the total stride.
        decoder_width: channels of the decoder's first block, a multiple of the total stride.
        densify_norm: norm of the maps before the hidden cells are filled: batch norm, layer norm or none; ``auto`` is
            batch norm for networks that have some, else layer norm.
        weight_decay_end: the weight decay of the settings goes to this by a cosine, epoch by epoch; it stays as it is
            when left out.

    Raises:
        ValueError: mask_ratio or decoder_width is out of range.
    """

    unused_parameters = True  # those of the classifier

    def __init__(
        self,
        mask_ratio: float = 0.6,
        decoder_width: int = 768,
        densify_norm: Literal["auto", "bn", "ln", "none"] = "auto",
        weight_decay_end: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        if decoder_width < 1:
            raise ValueError(f"decoder_width must be positive, got {decoder_width}")
        if weight_decay_end is not None and weight_decay_end < 0:
            raise ValueError(f"weight_decay_end must not be negative, got {weight_decay_end}")
        self.mask_ratio, self.decoder_width, self.densify_norm = mask_ratio, decoder_width, densify_norm
        self.weight_decay_end = weight_decay_end
        self.levels: dict[int, int] = {}
        self._decays: list[tuple[weakref.ref[Optimizer], float, int]] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make the decoder for the maps of ``model``, which stays as it is.

        Raises:
            Unsupported: the model has no maps, or its layers cannot be masked.
            ValueError: the decoder does not fit its stride.
        """
        if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
            raise Unsupported("masked pre-training cannot recompute activations: turn gradient checkpointing off")
        images, maps = _probed(model)
        strides = [images.shape[2] // each.shape[2] for each in maps]
        self.stride, self.dims = strides[-1], images.dim() - 2
        self.dense_decoder = LightDecoder(self.stride, self.decoder_width, out_channels=images.shape[1], dims=self.dims)
        by_level = {
            int(math.log2(self.stride // stride)): (index, each.shape[1])
            for index, (stride, each) in enumerate(zip(strides, maps, strict=True))
            if self.stride % stride == 0 and not (self.stride // stride) & (self.stride // stride - 1)
        }
        chosen = {level: by_level[level] for level in sorted(by_level) if level < self.dense_decoder.blocks}
        self.levels = {level: chosen[level][0] for level in list(chosen)[:_SCALES]}
        channels = {level: chosen[level][1] for level in self.levels}
        self.densify_norms = nn.ModuleList(self._norm(model, count) for count in channels.values())
        self.densify_projs = nn.ModuleList(self._projection(level, count) for level, count in channels.items())
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, *[1] * self.dims), std=0.02, a=-0.02, b=0.02))
            for count in channels.values()
        )
        self.to(images.device, images.dtype)
        self._check_layers(model, images)
        return model

    def _norm(self, model: nn.Module, channels: int) -> nn.Module:
        kind = self.densify_norm
        if kind == "auto":
            kind = "bn" if any(isinstance(part, _BatchNorm) for part in model.modules()) else "ln"
        if kind == "none":
            return nn.Identity()
        return _BATCH_NORM[self.dims](channels) if kind == "bn" else ChannelLayerNorm(channels)

    def _projection(self, level: int, channels: int) -> nn.Module:
        width = self.decoder_width // 2**level
        if level == 0 and channels == width:
            return nn.Identity()
        kernel_size = 3 if level else 1
        projection = _CONV[self.dims](channels, width, kernel_size, padding=kernel_size // 2)
        _init(projection)
        return projection

    def _check_layers(self, model: nn.Module, images: Tensor) -> None:
        cells = torch.zeros(len(images), 1, *[side // self.stride for side in images.shape[2:]], dtype=torch.bool)
        cells.flatten(1)[:, 0] = True
        cells = cells.to(images.device)
        hidden = ~ActiveMap(cells).at(tuple(images.shape[2:]))
        filled = torch.ones_like(images).masked_fill_(hidden, 0.0)
        with _evaluating(model):
            if leaking := leaking_layers(model, cells, lambda: feature_maps(model, filled)):
                raise Unsupported(
                    f"{type(model).__name__} fills hidden cells between its layers, which {', '.join(leaking[:4])} read"
                )

    def mask(
        self,
        batch: int,
        grid: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Random visible cells, bool (B, 1, *grid): as many of each image.

        Raises:
            ValueError: there are too few cells to hide some and show some.
        """
        count = math.prod(grid)
        visible = round(count * (1 - self.mask_ratio))
        if not 0 < visible < count:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} of {count} cells hides all or none: take larger images or another ratio"
            )
        order = torch.rand(batch, count, generator=generator, device=device if generator is None else None)
        chosen = order.argsort(1)[:, :visible].to(device)
        return (
            torch.zeros(batch, count, dtype=torch.bool, device=device).scatter_(1, chosen, True).view(batch, 1, *grid)
        )

    def forward(self, model: nn.Module, images: Tensor, cells: Tensor | None = None) -> Reconstruction:
        """Encode the visible cells, decode all, compare the hidden ones.

        Args:
            model: the network that was prepared.
            images: (B, C, H, W), or with other position axes.
            cells: which are visible, bool (B, 1, H / stride, ...); random ones when left out.

        Raises:
            ValueError: no network was prepared, or images and cells do not fit it.
        """
        grid = self.grid(images)
        if cells is None:
            cells = self.mask(len(images), grid, device=images.device)
        elif cells.shape != (len(images), 1, *grid):
            raise ValueError(f"cells must be {(len(images), 1, *grid)} for these images, got {tuple(cells.shape)}")
        with masked(cells, model, self.densify_norms) as active:
            maps = feature_maps(model, active.mask(images))
            features = {level: maps[index] for level, index in self.levels.items()}
            visible = {
                level: norm(features[level]) for level, norm in zip(self.levels, self.densify_norms, strict=True)
            }
        to_dec = {}
        for level, token, projection in zip(self.levels, self.mask_tokens, self.densify_projs, strict=True):
            shown = active.at(tuple(visible[level].shape[2:]))
            to_dec[level] = projection(torch.where(shown, visible[level], token.to(visible[level].dtype)))
        prediction = self.dense_decoder(to_dec)
        loss = self._loss(images, prediction, cells)
        return Reconstruction([features[level] for level in reversed(self.levels)], to_dec, prediction, loss)

    def grid(self, images: Tensor) -> list[int]:
        """Cells along each side of images (B, C, ...).

        Raises:
            ValueError: no network was prepared, or a side is no multiple of its total stride.
        """
        if not self.levels:
            raise ValueError("prepare(model) must be called before the method is used")
        if images.dim() != self.dims + 2 or any(side % self.stride for side in images.shape[2:]):
            raise ValueError(
                f"images must be (B, C, ...) with {self.dims} sides that are multiples of the total stride "
                f"{self.stride}, got {tuple(images.shape)}"
            )
        return [side // self.stride for side in images.shape[2:]]

    def _loss(self, images: Tensor, prediction: Tensor, cells: Tensor) -> Tensor:
        wide = torch.promote_types(images.dtype, torch.float32)
        target, _mean, _spread = self._normalised(images.to(wide))
        errors = (patchify(prediction.to(wide), self.stride) - target).square().mean(2)
        hidden = ~cells.flatten(1)
        return (errors * hidden).sum() / (hidden.sum() + 1e-8)

    def _normalised(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells less their mean over their deviation; the mean; the deviation (section 3.3)."""
        patches = patchify(images, self.stride)
        mean = patches.mean(2, keepdim=True)
        spread = (patches.var(2, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / spread, mean, spread

    @torch.no_grad()
    def pictures(self, model: nn.Module, images: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Images without the hidden cells, and with the hidden cells as they are predicted, both as ``images``.

        The prediction gets mean and deviation of the true cell back; network and method compute as in evaluation.
        """
        with _evaluating(model, self):
            prediction = self(model, images, cells).prediction.to(images.dtype)
        patches, shown = patchify(images, self.stride), cells.flatten(1)[..., None]
        _, mean, spread = self._normalised(images)
        filled = torch.where(shown, patches, patchify(prediction, self.stride) * spread + mean)
        grid = self.grid(images)
        return unpatchify(patches * shown, self.stride, grid), unpatchify(filled, self.stride, grid)

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        """The loss of the hidden cells of ``batch["image"]``; no other loss takes part."""
        images = batch["image"]
        return {"loss": self(model, images).loss} if len(images) else {}

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """The optimizer that the settings ask for, with the weights of the method; embeddings do not decay."""
        optimizer = make_optimizer(model, training)
        for group in parameter_groups(self, weight_decay=training.weight_decay, decay_all=training.decay_all):
            tokens = {id(token) for token in self.mask_tokens}
            for chosen, decay in ((False, group["weight_decay"]), (True, 0.0)):
                members = [each for each in group["params"] if (id(each) in tokens) == chosen]
                if members:
                    optimizer.add_param_group({**group, "params": members, "weight_decay": decay, "lr": training.lr})
        self._decays = [(weakref.ref(optimizer), training.weight_decay, training.epochs)]
        return (optimizer,)

    def start_epoch(self, model: nn.Module, epoch: int) -> None:
        """Set the weight decay of the epoch."""
        for reference, start, epochs in self._decays:
            optimizer = reference()
            if optimizer is not None and self.weight_decay_end is not None:
                decay = _cosine(start, self.weight_decay_end, epoch / max(epochs - 1, 1))
                for group in optimizer.param_groups:
                    if group["weight_decay"] > 0:
                        group["weight_decay"] = decay


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Within the context, networks are in evaluation mode; then each part is as before."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def _probed(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Two blank images that the network takes, and its maps of them."""
    first = next((part for part in model.modules() if isinstance(part, _ConvNd)), None)
    if first is None:
        raise Unsupported(f"{type(model).__name__} has no convolution, so its computation cannot be masked")
    channels, dims = first.in_channels, first.weight.dim() - 2
    sides: Sequence[int] = (224, 128, 64, 32) if dims < 3 else (64, 32, 128)
    if isinstance(model, Backbone):
        channels, dims, sides = (
            model.in_channels,
            len(model.config.preprocess.shape),
            (2 * model.feature_info[-1].stride,),
        )
    problem: Exception | None = None
    for side in sides:
        images = torch.zeros(2, channels, *[side] * dims, device=first.weight.device, dtype=first.weight.dtype)
        try:
            with _evaluating(model):
                maps = feature_maps(model, images)
        except (RuntimeError, ValueError) as error:
            problem = error
            continue
        uneven = [tuple(each.shape[2:]) for each in maps if len(set(each.shape[2:])) > 1]
        if uneven:
            raise Unsupported(
                f"{type(model).__name__} makes {uneven[-1]} of {side} pixels a side, so its cells are no cubes"
            )
        if all(side % each.shape[2] == 0 for each in maps):
            return images, maps
    raise Unsupported(f"{type(model).__name__} does not make maps of {list(sides)} pixels: {problem}")


# -- the authors' files ------------------------------------------------------------------------------------------------


def _authors(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Keys of a whole model of the authors; the encoder has those of its own library."""
    start, deprecated = "sparse_encoder.sp_cnn.", ("imn_m", "imn_s", "norm_black")
    encoder: Any = model.encoder
    theirs = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    own = encoder.state_dict()
    readings = []
    for layout in (Layout(), *getattr(encoder, "layouts", {}).values()):
        with suppress(CheckpointError):  # a layout of another variant
            readings.append(layout.apply(theirs, encoder))
    inner = max(readings, key=lambda found: len(own.keys() & found.keys()))
    rest = {key: value for key, value in state.items() if not key.startswith(start) and key not in deprecated}
    return {f"encoder.{key}": value for key, value in inner.items()} | {
        f"spark.{key}": value for key, value in rest.items()
    }


class SparKModel(nn.Module):
    """A network and the parts that pre-train it as one module, which loads the authors' ``withdecoder`` files.

    Args:
        encoder: the network, whose modules behind the last map must be gone where a file without them is to be loaded.
        spark: the method; it is prepared for the network.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(function=_authors)}

    def __init__(self, encoder: nn.Module, spark: SparK) -> None:
        super().__init__()
        self.encoder = spark.prepare(encoder)
        self.spark = spark

    def forward(self, images: Tensor, cells: Tensor | None = None) -> Reconstruction:
        """As `SparK.forward`."""
        result: Reconstruction = self.spark(self.encoder, images, cells)
        return result


_DRIVE = "https://github.com/keyu-tian/SparK#pretrained-model-weights"


def _published(top1: float, input_size: int = 224) -> tuple[PublishedFile, ...]:
    figures = {f"ImageNet-1K top-1 after fine-tuning at {input_size} [%]": top1}
    return (PublishedFile(_DRIVE, "MIT", figures, by_hand=True),)


#: Pre-trained encoders of the authors (Google Drive, from their page) and what they reach when fine-tuned.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "resnet50_1kpretrained_timm_style": _published(80.6),
    "resnet101_1kpretrained_timm_style": _published(82.2),
    "resnet152_1kpretrained_timm_style": _published(82.7),
    "resnet200_1kpretrained_timm_style": _published(83.1),
    "convnextS_1kpretrained_official_style": _published(84.1),
    "convnextB_1kpretrained_official_style": _published(84.8),
    "convnextL_1kpretrained_official_style": _published(85.4),
    "convnextL_384_1kpretrained_official_style": _published(86.0, 384),
}
