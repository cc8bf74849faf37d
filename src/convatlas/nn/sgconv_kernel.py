"""Kernels as long as the sequence from few parameters that decay with distance.

Li, Cai, Zhang, Chen, Dey: "What Makes Convolutional Models Great on Long Sequence Modeling?", ICLR 2023, arXiv
2210.09298. Sub-kernels w_0, w_1, ... of d values each are stretched to d, d, 2 d, 4 d, ... taps and put one behind
another, each alpha times smaller than the one before it (section 3.2): O(log L) parameters for L taps.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown

__all__ = ["Arrangement", "Init", "Interpolation", "LearnableDecay", "SGConvKernel", "StoredKernel", "both_directions"]

#: How sub-kernels are put together.
Arrangement = Literal["cat", "sum"]
#: Between the values of a sub-kernel.
Interpolation = Literal["linear", "nearest"]
#: Of the sub-kernels.
Init = Literal["randn", "cos"]
#: Whether the exponents of a decay by power law are trained.
LearnableDecay = Literal["fixed", "trained"]


class SGConvKernel(nn.Module):
    """Kernels of S sub-kernels at growing scales, with norm 1 at the start (paper, section 3.2).

    ``cat``: sub-kernel i is stretched 2^max(0, i - 1) times and stands behind the ones before it. ``sum``: it is
    stretched 2^i times, and all begin at lag 0. Sub-kernel i is multiplied by alpha^(S - 1 - i), and the kernel divided
    by the norm that it had with its first weights, for good. It has d 2^(S - 1 + init_scale) taps.

    The authors' code takes that norm in its first forward pass. Here it is taken at construction, and again when
    weights are loaded whose norm was never taken, so that a forward pass changes nothing; `reset_kernel_norm` takes it
    anew.

    Args:
        channels: number of channels H.
        l_max: length of the sequences, from which the number of scales follows.
        heads: kernels of each channel.
        kernel_dim: d, values of a sub-kernel.
        num_scales: S; 1 + ceil(log2(l_max / d)) - init_scale by default.
        init_scale: every sub-kernel is stretched by this many further powers of two.
        mode: ``cat`` or ``sum``.
        interpolation: ``linear`` between the centres of the values, or ``nearest``.
        init: of the sub-kernels: ``randn``, or ``cos``, cosines of 0 to H - 1 periods in random order.
        decay: alpha of the first and of the last channel, those between in equal steps; the range of the exponents with
            ``learnable_decay``.
        learnable_decay: instead of alpha, multiply tap t by (t + 1)^-decay, with a random exponent for each channel
            that is ``fixed`` or ``trained``.

    Raises:
        UnknownName: there is no such mode, interpolation, init or learnable_decay.
        ValueError: a size is smaller than 1, or kernel_dim is too large for a scale.
    """

    multiplier: Tensor
    kernel_norm: Tensor
    kernel_norm_initialized: Tensor

    def __init__(
        self,
        channels: int,
        l_max: int,
        *,
        heads: int = 1,
        kernel_dim: int = 32,
        num_scales: int | None = None,
        init_scale: int = 0,
        mode: Arrangement = "cat",
        interpolation: Interpolation = "linear",
        init: Init = "randn",
        decay: tuple[float, float] = (2.0, 2.0),
        learnable_decay: LearnableDecay | None = None,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "l_max": l_max, "heads": heads, "kernel_dim": kernel_dim}
        for name, least in (*((name, 1) for name in sizes), ("init_scale", 0)):
            if (value := sizes.get(name, init_scale)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, given, known in (
            ("mode", mode, Arrangement),
            ("interpolation", interpolation, Interpolation),
            ("init", init, Init),
            ("learnable_decay", learnable_decay, LearnableDecay),
        ):
            if given is not None and given not in get_args(known):
                raise unknown(name, given, get_args(known))
        if num_scales is None:
            num_scales = 1 + math.ceil(math.log2(l_max / kernel_dim)) - init_scale
            if num_scales < 1:
                raise ValueError(
                    f"kernel_dim must not exceed l_max, the less the larger init_scale is, got {kernel_dim} and {l_max}"
                    f" with init_scale {init_scale}"
                )
        if num_scales < 1:
            raise ValueError(f"num_scales must be at least 1, got {num_scales}")
        self.heads, self.channels, self.kernel_dim = heads, channels, kernel_dim
        self.init_scale, self.mode, self.interpolation = init_scale, mode, interpolation
        self.sub_kernels = nn.ParameterList(_random(init, heads, channels, kernel_dim) for _ in range(num_scales))
        self.decay: nn.Parameter | None = None
        if learnable_decay is None:
            multiplier = torch.linspace(decay[0], decay[1], channels).view(1, channels, 1)
        else:
            multiplier = torch.tensor(1.0)
            exponents = torch.rand(channels) * (decay[1] - decay[0]) + decay[0]
            self.decay = nn.Parameter(exponents, requires_grad=learnable_decay == "trained")
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("kernel_norm", torch.ones(heads, channels, 1))
        self.register_buffer("kernel_norm_initialized", torch.tensor(True))
        self.register_load_state_dict_post_hook(_take_norm_if_new)  # type: ignore[no-untyped-call]
        self.reset_kernel_norm()

    @property
    def num_scales(self) -> int:
        """S, the number of sub-kernels."""
        return len(self.sub_kernels)

    @property
    def length(self) -> int:
        """Number of taps."""
        return int(self.kernel_dim * 2 ** (self.num_scales - 1 + self.init_scale))

    @torch.no_grad()
    def reset_kernel_norm(self) -> None:
        """Make the present weights those whose kernels have norm 1."""
        self.kernel_norm = self._raw(self.length).norm(dim=-1, keepdim=True).to(self.kernel_norm.dtype)
        self.kernel_norm_initialized = torch.ones_like(self.kernel_norm_initialized)

    def forward(self, length: int | None = None) -> Tensor:
        """Kernels (heads, channels, K), the tap of lag 0 first; K is at most ``length``.

        In float32 at least: the factors of many scales are beyond half precision.
        """
        length = self.length if length is None else min(length, self.length)
        return self._raw(length) / self.kernel_norm

    def _raw(self, length: int) -> Tensor:
        parts: list[Tensor] = []
        start = 0
        for scale, weight in enumerate(self.sub_kernels):
            stretch = 2 ** (self.init_scale + (scale if self.mode == "sum" else max(0, scale - 1)))
            # Scales of which nothing is left after the crop get a gradient of zero, and are left out without gradients.
            if start >= length and not torch.is_grad_enabled():
                break
            part = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if stretch > 1:
                part = F.interpolate(part, size=stretch * self.kernel_dim, mode=self.interpolation)
            part = part[..., : length - start] * self.multiplier ** (self.num_scales - 1 - scale)
            if self.mode == "cat":
                start += part.shape[-1]
            parts.append(part)
        if self.mode == "cat":
            k = torch.cat(parts, dim=-1)
        else:
            k = torch.stack([F.pad(part, (0, length - part.shape[-1])) for part in parts]).sum(0)
        if self.decay is not None:
            lags = torch.arange(1, 1 + length, device=k.device, dtype=k.dtype)
            k = k * torch.exp(-self.decay[:, None] * torch.log(lags))
        return k

    def merged(self) -> StoredKernel:
        """The form for inference, which holds the kernels."""
        with torch.no_grad():
            return StoredKernel(self.forward())

    def extra_repr(self) -> str:
        """Show the sizes."""
        sizes = f"{self.channels}, heads={self.heads}, kernel_dim={self.kernel_dim}, num_scales={self.num_scales}"
        return f"{sizes}, mode={self.mode!r}, length={self.length}"


class StoredKernel(nn.Module):
    """Kernels that do not change: the form of `SGConvKernel` for inference.

    Args:
        values: (heads, channels, K).
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    @property
    def length(self) -> int:
        """Number of taps."""
        return self.values.shape[-1]

    def forward(self, length: int | None = None) -> Tensor:
        """Kernels (heads, channels, K), the tap of lag 0 first; K is at most ``length``."""
        return self.values[..., :length]


def _random(init: Init, heads: int, channels: int, kernel_dim: int) -> nn.Parameter:
    if init == "randn":
        return nn.Parameter(torch.randn(heads, channels, kernel_dim))
    periods = torch.randperm(channels).to(torch.get_default_dtype())
    angles = periods[:, None] * torch.linspace(0, 2 * math.pi, kernel_dim)
    return nn.Parameter(angles.cos().expand(heads, -1, -1).clone())


def _take_norm_if_new(kernel: nn.Module, _: object) -> None:
    if isinstance(kernel, SGConvKernel) and not kernel.kernel_norm.is_meta and not kernel.kernel_norm_initialized:
        kernel.reset_kernel_norm()


def both_directions(forwards: Tensor, backwards: Tensor, length: int) -> Tensor:
    """One kernel of 2 L taps for both directions, as `fft_conv` takes it with ``fft_size`` 2 L.

    y[t] = sum_j forwards[j] u[t - j] + sum_j backwards[j] u[t + 1 + j].

    Args:
        forwards, backwards: (..., K), K <= L.
        length: L, of the signals.
    """
    gap = forwards.new_zeros(*forwards.shape[:-1], 2 * length - forwards.shape[-1] - backwards.shape[-1])
    return torch.cat([forwards, gap, backwards.flip(-1)], dim=-1)
