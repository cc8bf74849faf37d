"""Structured global convolution: kernels as long as the sequence, from few parameters that decay with distance.

Li, Cai, Zhang, Chen, Dey: "What Makes Convolutional Models Great on Long Sequence Modeling?", ICLR 2023, arXiv
2210.09298. The kernels are those of `SGConvKernel`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.nn.norm import ScalarLayerNorm
from convatlas.nn.sgconv_kernel import (
    Arrangement,
    Init,
    Interpolation,
    LearnableDecay,
    SGConvKernel,
    both_directions,
)
from convatlas.ops.fft_conv import fft_conv
from convatlas.weights import Layout

__all__ = ["SGCONV_LAYOUT", "SGConv1d", "SGConv2d"]

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
