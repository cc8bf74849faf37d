"""Structured global convolution: kernels as long as the sequence, from few parameters that decay with distance.

Li, Cai, Zhang, Chen, Dey: "What Makes Convolutional Models Great on Long Sequence Modeling?", ICLR 2023, arXiv
2210.09298. Sub-kernels w_0, w_1, ... of d values each are stretched to d, d, 2 d, 4 d, ... taps and put one behind
another, each alpha times smaller than the one before it (section 3.2): O(log L) parameters for L taps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.nn.norm import ScalarLayerNorm
from convatlas.ops.fft_conv import fft_conv
from convatlas.weights import Layout

__all__ = ["SGCONV_LAYOUT", "LearnableDecay", "SGConv1d", "SGConv2d", "SGConvKernel", "StoredKernel", "both_directions"]

Arrangement = Literal["cat", "sum"]
Interpolation = Literal["linear", "nearest"]
Init = Literal["randn", "cos"]
#: Whether the exponents of a decay by power law are trained.
LearnableDecay = Literal["fixed", "trained"]
Activation = Callable[[Tensor], Tensor]


def _whole_norms(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Norms that were never computed have one value a channel in the older of the authors' files."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return {
        key: value.expand(shapes[key]) if key.endswith("kernel_norm") and value.dim() == 2 and key in shapes else value
        for key, value in state.items()
    }


#: How the keys of the authors' layer map to ours, wherever in a network it stands.
SGCONV_LAYOUT = Layout(
    renames=(
        (r"(^|\.)kernel_list\.(\d+)$", r"\1kernel.sub_kernels.\2"),
        (r"(^|\.)(multiplier|kernel_norm|kernel_norm_initialized|decay)$", r"\1kernel.\2"),
        (r"(^|\.)output_linear(\.0)?\.(weight|bias)$", r"\1output.\3"),
        (r"(^|\.)norm\.norm\.m$", r"\1norm.shift"),
        (r"(^|\.)norm\.norm\.s$", r"\1norm.scale"),
        (r"(^|\.)norm\.norm\.", r"\1norm."),
    ),
    function=_whole_norms,
)


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


class SGConv1d(nn.Module):
    """Structured global convolution of sequences, and a map of the channels at every position.

    y = k * u + D u for each channel and head, then the activation, dropout, norm and a linear map of all heads to the
    channels. Sequences longer than ``l_max`` are taken; nothing beyond the length of the kernel is seen.

    Args:
        channels: number of channels H.
        l_max: length of the sequences.
        kernel_dim, num_scales, init_scale, mode, interpolation, init, decay, learnable_decay: as `SGConvKernel` takes
            them.
        bidirectional: whether a second kernel looks ahead; otherwise the layer is causal.
        heads: kernels of each channel (the authors' ``channels``).
        act: activation behind the convolution.
        post_act: behind the linear map: ``glu`` (a map to 2 H channels, one half the gate of the other), a function, or
            nothing.
        dropout: probability to drop a channel of a sequence; with the layout ``blh``, a single value.
        norm: whether the activations are normalised over the channels: by one scale and one shift, or as
            `torch.nn.LayerNorm` with the layout ``blh``.
        linear: leave everything behind D u out, so that heads * H channels come out, head by head.
        layout: ``bhl`` for (B, H, L), ``blh`` for (B, L, H).

    Raises:
        UnknownName: there is no such layout or option of the kernel.
        ValueError: a size is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": SGCONV_LAYOUT}

    def __init__(
        self,
        channels: int,
        l_max: int,
        *,
        kernel_dim: int = 32,
        num_scales: int | None = None,
        init_scale: int = 0,
        mode: Arrangement = "cat",
        interpolation: Interpolation = "linear",
        init: Init = "randn",
        decay: tuple[float, float] = (2.0, 2.0),
        learnable_decay: LearnableDecay | None = None,
        bidirectional: bool = False,
        heads: int = 1,
        act: Activation = F.gelu,
        post_act: Literal["glu"] | Activation | None = None,
        dropout: float = 0.0,
        norm: bool = False,
        linear: bool = False,
        layout: Literal["bhl", "blh"] = "bhl",
    ) -> None:
        super().__init__()
        if layout not in ("bhl", "blh"):
            raise unknown("layout", layout, ("bhl", "blh"))
        if isinstance(post_act, str) and post_act != "glu":
            raise unknown("post_act", post_act, ("glu",))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.kernel: nn.Module = SGConvKernel(
            channels, l_max, heads=2 * heads if bidirectional else heads, kernel_dim=kernel_dim, num_scales=num_scales,
            init_scale=init_scale, mode=mode, interpolation=interpolation, init=init, decay=decay,
            learnable_decay=learnable_decay,
        )  # fmt: skip
        self.channels, self.heads, self.l_max = channels, heads, l_max
        self.bidirectional, self.layout, self.dropout = bidirectional, layout, dropout
        self.act, self.post_act = act, post_act
        self.D = nn.Parameter(torch.randn(heads, channels))
        width = heads * channels
        self.norm: nn.Module = nn.Identity()
        if norm and not linear:
            self.norm = ScalarLayerNorm() if layout == "bhl" else nn.LayerNorm(width)
        self.output = None if linear else nn.Linear(width, 2 * channels if post_act == "glu" else channels)

    def materialize(self, length: int) -> Tensor:
        """The explicit kernels for sequences of a length, as `fft_conv` takes those of one head.

        Returns:
            (heads, H, K) with K at most ``length``, for a causal layer; (heads, H, 2 * length), for ``fft_size`` twice
            the length, for one of both directions.
        """
        k: Tensor = self.kernel(length)
        if not self.bidirectional:
            return k
        # The authors keep the kernels of the second direction behind those of the first.
        forwards, backwards = k.unflatten(0, (2, self.heads)).unbind(0)
        return both_directions(forwards, backwards, length)

    def forward(self, u: Tensor) -> Tensor:
        """Map (B, H, L), or (B, L, H) with the layout ``blh``, to the same shape."""
        u = self._checked(u)
        length = u.shape[-1]
        if not torch.compiler.is_compiling() and length > self.l_max:
            warnings.warn(f"a sequence is longer than l_max = {self.l_max}; the kernel ends before it", stacklevel=2)
        k = self.materialize(length).flatten(0, 1)
        wide = u if self.heads == 1 else u.repeat(1, self.heads, 1)
        return self._mixed(fft_conv(wide, k, 2 * length if self.bidirectional else None), wide)

    def initial_state(self, batch: int = 1) -> Tensor:
        """What `step` needs before the first block: (batch, heads * H, K - 1), no contribution of the past.

        Raises:
            Unsupported: the layer looks ahead.
        """
        if self.bidirectional:
            raise Unsupported("a layer of both directions needs the whole sequence at once")
        taps: Any = self.kernel.length
        return self.D.new_zeros(batch, self.heads * self.channels, max(taps - 1, 0))

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map the next block of a long sequence by overlap-add; blocks about as long as the kernel are fastest.

        Args:
            u: (B, H, T), or (B, T, H) with the layout ``blh``, T of any size.
            state: what the blocks so far contribute to the next K - 1 positions, from `initial_state` or a step.

        Returns:
            The block and the next state.
        """
        u = self._checked(u)
        k: Tensor = self.kernel(None).flatten(0, 1)
        wide = u if self.heads == 1 else u.repeat(1, self.heads, 1)
        length, tail = u.shape[-1], state.shape[-1]
        whole = fft_conv(F.pad(wide, (0, tail)), k) + F.pad(state, (0, length))
        return self._mixed(whole[..., :length], wide), whole[..., length:]

    def _checked(self, u: Tensor) -> Tensor:
        if u.dim() == 3 and self.layout == "blh":
            u = u.transpose(1, 2)
        if u.dim() != 3 or u.shape[1] != self.channels or u.shape[2] < 1:
            shape = f"(B, {self.channels}, L)" if self.layout == "bhl" else f"(B, L, {self.channels})"
            given = tuple(u.transpose(1, 2).shape) if u.dim() == 3 and self.layout == "blh" else tuple(u.shape)
            raise ValueError(f"x must be {shape}, got {given}")
        return u

    def _mixed(self, y: Tensor, u: Tensor) -> Tensor:
        y = y + self.D.flatten()[:, None].to(y.dtype) * u
        if self.output is None:
            return y if self.layout == "bhl" else y.transpose(1, 2)
        y = self.act(y)
        if self.layout == "blh":
            y = self.norm(F.dropout(y, self.dropout, self.training).transpose(1, 2))
            y = self.output(y)
        else:
            y = self.norm(F.dropout1d(y, self.dropout, self.training))
            y = torch.matmul(self.output.weight, y) + self.output.bias[:, None]
        if self.post_act == "glu":
            return F.glu(y, dim=1 if self.layout == "bhl" else 2)
        return y if self.post_act is None else self.post_act(y)

    def extra_repr(self) -> str:
        """Show the geometry."""
        return f"{self.channels}, l_max={self.l_max}, bidirectional={self.bidirectional}, layout={self.layout!r}"


class SGConv2d(nn.Module):
    """Structured global convolution of images, in all directions: y = k * x + D x for each channel.

    Args:
        channels: number of channels.
        size: height and width of the images, or one number for both.
        form: ``separable``: a kernel for the rows times one for the columns; ``flattened``: one kernel along the pixels
            of the image, row behind row.
        kernel_dim: values of a sub-kernel; at most the size.
        decay: alpha of the first and of the last channel.

    Raises:
        UnknownName: there is no such form.
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        *,
        form: Literal["separable", "flattened"] = "separable",
        kernel_dim: int = 4,
        decay: tuple[float, float] = (2.0, 2.0),
    ) -> None:
        super().__init__()
        if form not in ("separable", "flattened"):
            raise unknown("form", form, ("separable", "flattened"))
        height, width = (size, size) if isinstance(size, int) else size
        lengths = (height, width) if form == "separable" else (height * width,)
        self.channels, self.form = channels, form
        self.kernels = nn.ModuleList(
            SGConvKernel(channels, length, heads=2, kernel_dim=kernel_dim, decay=decay) for length in lengths
        )
        self.D = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        signal = x if self.form == "separable" else x.flatten(2)
        lengths = signal.shape[2:]
        whole = []
        for kernel, length in zip(self.kernels, lengths, strict=True):
            forwards, backwards = kernel(length)
            whole.append(both_directions(forwards, backwards, length))
        k = whole[0] if self.form == "flattened" else whole[0][:, :, None] * whole[1][:, None, :]
        y = fft_conv(signal, k, [2 * length for length in lengths]).reshape(x.shape)
        return y + self.D[:, None, None].to(y.dtype) * x
