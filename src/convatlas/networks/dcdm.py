"""DCDM: the network that answers a residual on a grid with a search direction.

Kaneda, Akar, Chen, Kala, Hyde, Teran: "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems", ICML
2023 (PMLR 202), arXiv 2205.10763. The 3-D networks are the authors'; those for 2-D have the same structure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import CheckpointError
from convatlas.networks.base import NetworkConfig, PublishedFile
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "DCDMNet", "DCDMNetConfig"]

#: Torch calls oneDNN for one volume only where channels x depth x height exceed this.
_SLOW_BELOW = 20480
_CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, kw_only=True)
class DCDMNetConfig(NetworkConfig):
    """Config of `DCDMNet`.

    Attributes:
        ndim: axes of the grid, 2 or 3.
        width: channels.
        depths: residual pairs before the pooling, at half resolution, and after the upsampling.

    Raises:
        ValueError: a value is out of range.
    """

    ndim: int = 3
    width: int = 16
    depths: tuple[int, int, int] = (1, 3, 2)

    def __post_init__(self) -> None:
        if self.ndim not in _CONVS:
            raise ValueError(f"ndim must be 2 or 3, got {self.ndim}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if len(self.depths) != 3 or min(self.depths) < 0:
            raise ValueError(f"depths must be three numbers of at least 0, got {self.depths}")

    def build(self) -> DCDMNet:
        return DCDMNet(self)


def _from_keras(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Layers of Keras in the order in which they were made; kernels (taps, in, out)."""
    layers: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.search(r"(?:^|\.)(conv\dd|dense)(?:_(\d+))?\.(?:.*\.)?(kernel|bias)(?::0)?$", key)
        if found is None:
            raise CheckpointError(f"{key} is no weight of the published networks")
        kind, number, part = found.groups()
        layers.setdefault((kind, int(number or 0)), {})[part] = value
    convs = [layers[key] for key in sorted(layers) if key[0] != "dense"]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    if len(convs) != len(names):
        raise CheckpointError(f"it has {len(convs)} convolutions, the model {len(names)}: another variant fits")
    dense = [layers[key] for key in layers if key[0] == "dense"]
    ours = {}
    for name, layer in zip(names, convs, strict=True):
        taps = range(layer["kernel"].dim() - 2)
        ours[f"{name}.weight"] = layer["kernel"].permute(-1, -2, *taps)
        ours[f"{name}.bias"] = layer["bias"]
    for layer in dense:
        ours["out.weight"], ours["out.bias"] = layer["kernel"].T, layer["bias"]
    return ours


class DCDMNet(nn.Module):
    """Residual pairs at full resolution, at half resolution, and again at full resolution behind a skip connection.

    Activations stand inside the convolutions, before what is added; there is no normalisation, so that the answer grows
    with the residual.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"keras": Layout(function=_from_keras)}

    def __init__(self, config: DCDMNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        before, middle, after = config.depths
        self.first = self._conv(1)
        self.a0 = self._conv(width)
        self.top = self._pairs(before)
        self.b_last = self._conv(width)
        self.mid = self._pairs(middle)
        self.up = self._pairs(after)
        self.out = nn.Linear(width, 1)
        self.in_channels = 1

    def _conv(self, in_channels: int) -> nn.Module:
        conv: nn.Module = _CONVS[self.config.ndim](in_channels, self.config.width, 3, padding=1)
        return conv

    def _pairs(self, count: int) -> nn.ModuleList:
        width = self.config.width
        return nn.ModuleList(nn.ModuleList([self._conv(width), self._conv(width)]) for _ in range(count))

    def forward(self, r: Tensor) -> Tensor:
        """The search direction (B, 1, *grid) for a residual (B, 1, *grid), whose sizes are even.

        Raises:
            ValueError: r has another number of axes or channels, or an odd size.
        """
        ndim = self.config.ndim
        if r.dim() != ndim + 2 or r.shape[1] != 1:
            raise ValueError(f"r must be (B, 1, {', '.join('DHW'[-ndim:])}), got {tuple(r.shape)}")
        if any(size % 2 for size in r.shape[2:]) or min(r.shape[2:]) < 2:
            raise ValueError(f"r must have even sizes, because it is pooled by 2, got {tuple(r.shape[2:])}")
        if _faster_in_pairs(r, self.config.width):
            return self.forward(r.expand(2, *r.shape[1:]))[:1]
        # Channels last is twice as fast on a CPU, in training too.
        layout = torch.channels_last if ndim == 2 else torch.channels_last_3d
        a = F.relu(self.a0(self.first(r).contiguous(memory_format=layout)), inplace=True)
        a = _residual_pairs(self.top, a)
        b = F.relu(self.b_last(a), inplace=True)
        p = _halved(b)
        alone = _faster_in_pairs(p, self.config.width)
        p = p.expand(2, *p.shape[1:]) if alone else p
        p = _residual_pairs(self.mid, p)
        p = p[:1] if alone else p
        u = F.interpolate(p, scale_factor=2, mode="nearest") + b
        u = _residual_pairs(self.up, u)
        # A dense layer on channels is a convolution of one tap.
        weight = self.out.weight.reshape(1, -1, *(1,) * ndim)
        return (F.conv2d if ndim == 2 else F.conv3d)(u, weight, self.out.bias)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random residual on a small grid, for tracing and timing."""
        sizes = (64, 64) if self.config.ndim == 2 else (16, 16, 16)
        return (self.out.weight.new_empty(batch, 1, *sizes).normal_(),)


def _residual_pairs(pairs: nn.ModuleList, x: Tensor) -> Tensor:
    for pair in pairs:
        forth, back = pair.children()
        x = F.relu(back(F.relu(forth(x), inplace=True)), inplace=True) + x
    return x


def _faster_in_pairs(x: Tensor, width: int) -> bool:
    """Whether two copies of a volume take less time than one: torch leaves small single ones to a slow convolution.

    Only in inference mode, in which systems are solved, so that operations are counted as they are.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return False
    return x.device.type == "cpu" and x.dim() == 5 and len(x) == 1 and width * x[0, 0, :, :, 0].numel() <= _SLOW_BELOW


def _halved(x: Tensor) -> Tensor:
    """Averages of 2 x 2 (x 2) cells."""
    if x.dim() == 4:
        return F.avg_pool2d(x, 2)
    # Torch cannot average volumes in bfloat16 on the CPU.
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.avg_pool3d(x.to(wide), 2).to(x.dtype)


VARIANTS: dict[str, DCDMNetConfig] = {
    "dcdm_64": DCDMNetConfig(),
    "dcdm_128": DCDMNetConfig(depths=(2, 5, 3)),
    "dcdm_2d_64": DCDMNetConfig(ndim=2),
    "dcdm_2d_128": DCDMNetConfig(ndim=2, depths=(2, 5, 3)),
}

#: The archive that the authors' page links holds ``trained_models/model_N64_...`` and ``model_N128_...`` with a
#: ``model.h5`` in each, and the systems that they are measured on.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    name: (
        PublishedFile(
            "https://github.com/ayano721/2023_DCDM",
            "see the page",
            {"iterations of conjugate gradients over its own, about": 10.0},
            verified="layer names and kernel shapes follow the authors' code; not tried on the file itself",
            by_hand=True,
        ),
    )
    for name in ("dcdm_64", "dcdm_128")
}
