"""Frequency dynamic convolution: a weight for each sample, mixed from disjoint groups of the frequencies of one weight.

Chen, Gu, Li, Fu et al.: "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv 2503.18783.
Fourier disjoint weight (FDW) is its section 3.2; the modulations stand in `convatlas.nn.conv.frequency_modulation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from convatlas.errors import CheckpointError, Unsupported
from convatlas.nn.conv.frequency_modulation import (
    Act,
    FrequencyBandModulation,
    KernelSpatialModulation,
    LocalKernelModulation,
)
from convatlas.nn.conv.geometry import as_tuple, geometry
from convatlas.ops.per_sample_conv import per_sample_conv
from convatlas.ops.precision import without_autocast
from convatlas.surgery import Selector, Surgery, swap
from convatlas.surgery.selection import predicate
from convatlas.weights import Layout

__all__ = [
    "FDCONV_LAYOUT",
    "FDConv2d",
    "FDLinear",
    "convert_to_fdconv",
    "fix_kernels",
    "fourier_weight",
    "freeze_spectra",
    "frequency_groups",
    "inverse_fourier_weight",
]

# -- the weight and its spectrum ---------------------------------------------------------------------------------------


def fourier_weight(weight: Tensor) -> Tensor:
    """The spectrum of a weight (C', C, k, k) as FDConv stores it: (C' k, C k // 2 + 1, 2), over min(C', C) // 2.

    The weight is transformed as one matrix (C' k, C k).

    Raises:
        ValueError: it is not such a weight, C k is odd, or there are fewer than two channels.
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be (C', C, k, k), got {tuple(weight.shape)}")
    _check_sizes(weight.shape[1], weight.shape[0], weight.shape[2])
    matrix = weight.transpose(1, 2).flatten(2).flatten(0, 1)
    spectrum = torch.fft.rfft2(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    return torch.view_as_real(spectrum) / (min(weight.shape[:2]) // 2)


def inverse_fourier_weight(dft_weight: Tensor, kernel_size: int) -> Tensor:
    """The weight (C', C, k, k) whose spectrum `fourier_weight` gives."""
    if dft_weight.dim() != 3 or dft_weight.shape[2] != 2 or dft_weight.shape[0] % kernel_size:
        raise ValueError(f"dft_weight must be (C' k, C k // 2 + 1, 2) with k {kernel_size}, got {dft_weight.shape}")
    out_channels, in_channels = dft_weight.shape[0] // kernel_size, 2 * (dft_weight.shape[1] - 1) // kernel_size
    spectrum = torch.view_as_complex((dft_weight * (min(out_channels, in_channels) // 2)).contiguous())
    return _as_weight(torch.fft.irfft2(spectrum), kernel_size)


def _as_weight(matrix: Tensor, kernel_size: int) -> Tensor:
    """A matrix (..., C' k, C k) as the weight (..., C', C, k, k)."""
    return matrix.unflatten(-1, (-1, kernel_size)).unflatten(-3, (-1, kernel_size)).transpose(-3, -2)


def frequency_groups(
    out_channels: int, kernel_size: int, in_channels: int, kernel_num: int, *, share: float = 1.0
) -> Tensor:
    """Rows and columns of the frequencies of each group, (2, n, size), from low frequencies to high ones.

    The frequencies are sorted by their distance from 0, computed in float32; equal ones stay in the order of rows and
    columns. The authors' code leaves the order of equal ones to an unstable sort, so that groups may differ there.

    Args:
        out_channels, kernel_size, in_channels: of the weight.
        kernel_num: number of groups n.
        share: of the frequencies, the lowest ones, that are kept.

    Raises:
        ValueError: n does not divide the number of frequencies.
    """
    rows, columns = out_channels * kernel_size, in_channels * kernel_size
    distance = torch.hypot(
        torch.fft.fftfreq(rows, device="cpu")[:, None], torch.fft.rfftfreq(columns, device="cpu")[None]
    )
    count = int(distance.numel() * share)
    if kernel_num < 1 or count % kernel_num or count == 0:
        raise ValueError(f"kernel_num must divide the number of frequencies ({count}), got {kernel_num}")
    order = distance.flatten().argsort(stable=True)[:count]
    return torch.stack([order // distance.shape[1], order % distance.shape[1]]).unflatten(1, (kernel_num, -1))


def _check_sizes(in_channels: int, out_channels: int, kernel_size: int) -> None:
    if in_channels * kernel_size % 2:
        raise ValueError(f"in_channels * kernel_size must be even, got {in_channels} * {kernel_size}")
    if min(in_channels, out_channels) < 2:
        raise ValueError(f"in_channels and out_channels must be at least 2, got {in_channels} and {out_channels}")


# -- the layers --------------------------------------------------------------------------------------------------------

_RENAMES = (
    (r"(^|\.)KSM_Global\.", r"\1ksm_global."),
    (r"(^|\.)KSM_Local\.", r"\1ksm_local."),
    (r"(^|\.)FBM\.freq_weight_conv_list\.(\d+)\.", r"\1fbm.convs.\2."),
)


def _with_groups(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Say which group each frequency is in: by the checkpoint's indices if it has them, else by our rule."""
    known = dict(state)
    for name, layer in model.named_modules():
        if not isinstance(layer, FDConv2d):
            continue
        prefix = f"{name}." if name else ""
        indices = known.pop(f"{prefix}indices", None)
        if f"{prefix}dft_weight" in known and f"{prefix}groups" not in known:
            known[f"{prefix}groups"] = layer.groups_of(indices) if indices is not None else layer.groups.clone()
    if known.keys() == state.keys():
        raise CheckpointError("it has no weight in the Fourier domain")
    return known


#: Layout of the authors' checkpoints of networks with these layers.
FDCONV_LAYOUT = Layout(renames=_RENAMES, function=_with_groups)


class FDConv2d(nn.Module):
    """Convolution whose weight is mixed for each sample from groups of the frequencies of one weight.

    The weight is stored as its spectrum. The frequencies, sorted from low to high, are cut into n groups; each group
    alone is a kernel, and the mean of the sample says how much of each is taken (FDW). Further factors modulate every
    element of the weight (KSM) and, for kernels of more than one tap, the bands of the input at every position (FBM).
    A weight for each sample takes as much memory as the batch has samples; for small maps, the factors of channels and
    filters are put on the maps instead.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them; groups must be 1, the kernel square, and padding of zeros.
        kernel_num: number n of groups of frequencies; None for half the output channels, and a temperature that grows
            with it.
        param_ratio: copies of the spectrum.
        param_reduction: share of the frequencies, the lowest, that have parameters. Experimental: as in the authors'
            code their weight is not scaled up again, so that a new layer gives nearly nothing.
        ksm_local: whether every element of the weight has a factor.
        fbm: bands of the frequency band modulation of kernels with more than one tap; None for no modulation.
        fbm_groups, fbm_lowest: its ``groups`` and ``weigh_lowest``.
        reduction, factor, kernel_act, temperature, kernel_temperature, only_kernels, kaiming_filters: of
            `KernelSpatialModulation`.
        act, local_act, fbm_act: activation of the factors, ``sigmoid`` or ``tanh``.

    Raises:
        ValueError: groups is not 1, the kernel is not square, padding is not of zeros, in_channels * kernel_size is
            odd, or kernel_num does not divide the number of frequencies.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": FDCONV_LAYOUT}
    groups: Tensor
    kernels: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_num: int | None = 64,
        param_ratio: int = 1,
        param_reduction: float = 1.0,
        ksm_local: bool = True,
        fbm: Sequence[int] | None = (2, 4, 8),
        fbm_groups: int = 1,
        fbm_lowest: bool = False,
        reduction: float = 0.0625,
        factor: float = 2.0,
        act: Act = "sigmoid",
        local_act: Act = "sigmoid",
        fbm_act: Act = "sigmoid",
        kernel_act: Literal["sigmoid", "tanh", "softmax"] = "sigmoid",
        temperature: float | None = None,
        kernel_temperature: float = 1.0,
        only_kernels: bool = False,
        kaiming_filters: bool = False,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(f"FDConv2d supports groups=1, got {groups}")
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        if param_ratio < 1 or not 0 < param_reduction <= 1:
            raise ValueError(
                f"param_ratio must be at least 1 and param_reduction in (0, 1], got {param_ratio}, {param_reduction}"
            )
        size = _square(kernel_size, "kernel_size")
        _check_sizes(in_channels, out_channels, size)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, size
        self.stride, self.dilation = _square(stride, "stride"), _square(dilation, "dilation")
        if isinstance(padding, str):
            if padding not in ("valid", "same") or (padding == "same" and (self.stride != 1 or size % 2 == 0)):
                raise ValueError(
                    f"padding must be a number, or 'same' with stride 1 and an odd kernel, got {padding!r}"
                )
            padding = 0 if padding == "valid" else self.dilation * (size - 1) // 2
        self.padding = _square(padding, "padding")
        if kernel_num is None:
            kernel_num = out_channels // 2
            kernel_temperature = math.sqrt(kernel_num * param_ratio)
        self.kernel_num, self.param_ratio, self.param_reduction = kernel_num, param_ratio, param_reduction
        indices = frequency_groups(out_channels, size, in_channels, kernel_num, share=param_reduction)
        self._bins = (out_channels * size, in_channels * size // 2 + 1)
        shape = self._bins if param_reduction == 1 else (indices[0].numel(),)
        self.dft_weight = nn.Parameter(torch.empty(param_ratio, *shape, 2))
        of_bins = self.groups_of(indices.expand(param_ratio, -1, -1, -1))
        self.register_buffer("groups", of_bins.to(self.dft_weight.device))
        #: Kernels of the groups, where `fix_kernels` has put them in the place of the spectrum.
        self.register_buffer("kernels", None)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.ksm_global = KernelSpatialModulation(
            in_channels,
            out_channels,
            size,
            kernel_num * param_ratio,
            reduction=reduction,
            act=act,
            kernel_act=kernel_act,
            temperature=temperature,
            kernel_temperature=kernel_temperature,
            factor=factor,
            only_kernels=only_kernels,
            kaiming_filters=kaiming_filters,
        )
        self.ksm_local = (
            LocalKernelModulation(in_channels, out_channels, size, act=local_act, factor=factor) if ksm_local else None
        )
        self.fbm = (
            FrequencyBandModulation(in_channels, bands=fbm, groups=fbm_groups, weigh_lowest=fbm_lowest, act=fbm_act)
            if fbm is not None and size > 1
            else None
        )
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Take the spectrum and the bias of a fresh convolution of torch."""
        like = self.dft_weight
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, bias=self.bias is not None, device=like.device
        )
        self._take(conv.weight, conv.bias)

    def _take(self, weight: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            # The copies add up. The authors start with whole ones, so that several would not give the weight back.
            spectrum = fourier_weight(weight) / self.param_ratio
            if self.param_reduction == 1:
                self.dft_weight.copy_(spectrum)
            else:
                for copy, place in zip(self.dft_weight, self.groups, strict=True):
                    copy.copy_(spectrum.flatten(0, 1)[place])
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def groups_of(self, indices: Tensor) -> Tensor:
        """What the buffer ``groups`` holds for given indices (copies, 2, n, size), rows and columns of frequencies.

        Of all frequencies the group of each, (copies, rows, columns); of a share of them their places, in the order of
        the parameters.
        """
        flat = indices[:, 0].long() * self._bins[1] + indices[:, 1].long()
        if self.param_reduction < 1:
            return flat.flatten(1).int()
        groups = torch.empty(len(flat), math.prod(self._bins), dtype=torch.int16, device=indices.device)
        numbers = torch.arange(self.kernel_num, dtype=torch.int16, device=indices.device)
        groups.scatter_(1, flat.flatten(1), numbers[:, None].expand(flat.shape[1:]).flatten().expand(len(flat), -1))
        return groups.unflatten(1, self._bins)

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry, weight and bias of a convolution, which at first it computes nearly.

        Args:
            conv: a `torch.nn.Conv2d`.
            **options: of the layer.

        Raises:
            Unsupported: it is something else, or the layer cannot have its geometry.
        """
        try:
            layer = cls(**geometry(conv, 2), **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        plain: Any = conv
        layer._take(plain.weight, plain.bias)
        layer.dft_weight.requires_grad_(plain.weight.requires_grad)
        return layer.train(plain.training)

    def to_conv(self) -> None:
        """None: the weight depends on the input."""
        return None

    def spatial_kernels(self) -> Tensor:
        """The kernel of each group of frequencies of each copy, (n, C', C, k, k); their mean is the weight."""
        if self.kernels is not None:
            return self.kernels
        each = torch.eye(self.kernel_num * self.param_ratio, device=self.dft_weight.device, dtype=self.dft_weight.dtype)
        return torch.cat([self._mixed(one) for one in each.split(1)])

    def _mixed(self, kernels: Tensor) -> Tensor:
        """The weight (B, C', C, k, k) of shares (B, copies * n) of the groups."""
        if self.kernels is not None:
            return (kernels.to(self.kernels.dtype) @ self.kernels.flatten(1)).unflatten(1, self.kernels.shape[1:])
        dtype = torch.promote_types(self.dft_weight.dtype, torch.float32)
        shares = kernels.to(dtype).unflatten(1, (self.param_ratio, -1))
        parameters = self.dft_weight.to(dtype)
        if self.param_reduction < 1:
            spread = shares.repeat_interleave(parameters.shape[1] // self.kernel_num, 2)[..., None] * parameters
            spectrum = spread.new_zeros(len(kernels), math.prod(self._bins), 2)
            for copy, place in enumerate(self.groups):
                spectrum = spectrum.index_add(1, place, spread[:, copy])
            spectrum = spectrum.unflatten(1, self._bins)
        else:
            scale = min(self.in_channels, self.out_channels) // 2 * self.kernel_num * self.param_ratio
            spectrum = kernels.new_zeros(())
            for copy, group in enumerate(self.groups):
                share = shares[:, copy].index_select(1, group.flatten().int()).unflatten(1, self._bins)
                spectrum = spectrum + (scale * share)[..., None] * parameters[copy]
        return _as_weight(torch.fft.irfft2(torch.view_as_complex(spectrum.contiguous())), self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        mean = x.mean((2, 3))
        channels, filters, taps, kernels = self.ksm_global(mean)
        with without_autocast(x):
            weight = self._mixed(kernels).to(mean.dtype)
        if taps is not None:
            weight = weight * taps[:, None, None]
        if self.ksm_local is not None:
            weight = weight * self.ksm_local(mean)
        if self.fbm is not None:
            x = self.fbm(x)
        on_weight = weight[0].numel() < (self.in_channels + self.out_channels) * x.shape[2] * x.shape[3]
        if on_weight and channels is not None and filters is not None:
            weight = weight * (filters[:, :, None] * channels[:, None])[..., None, None]
        elif channels is not None:
            x = x * channels[:, :, None, None]
        scaled_after = not on_weight and filters is not None
        bias = None if scaled_after or self.bias is None else self.bias.to(x.dtype)
        y = per_sample_conv(x, weight.to(x.dtype), bias, self.stride, self.padding, self.dilation)
        if scaled_after:
            y = y * filters[:, :, None, None]
            y = y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)
        return y

    def extra_repr(self) -> str:
        """Show the geometry and the number of groups."""
        place = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, {place}, kernel_num={self.kernel_num}"


class FDLinear(nn.Module):
    """Linear layer on tokens whose weight is mixed for each sample: `FDConv2d` with one tap.

    Args:
        in_features, out_features, bias, device, dtype: as torch's linear layer takes them.
        **options: of `FDConv2d`.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"^", "conv."), *_RENAMES), function=_with_groups)
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.conv = FDConv2d(in_features, out_features, 1, bias=bias, device=device, dtype=dtype, **options)

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> Self:
        """A layer with the weight and bias of a linear layer, which at first it computes nearly.

        Raises:
            Unsupported: it is something else, or kernel_num does not divide the number of its frequencies.
        """
        if type(linear) is not nn.Linear:
            raise Unsupported(f"it must be a Linear, got {type(linear).__name__}")
        weight = linear.weight
        try:
            layer = cls(
                linear.in_features, linear.out_features, linear.bias is not None, weight.device, weight.dtype, **options
            )
        except ValueError as error:
            raise Unsupported(str(error)) from None
        layer.conv._take(weight[:, :, None, None], linear.bias)
        layer.conv.dft_weight.requires_grad_(weight.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, ..., in_features) to (B, ..., out_features); their mean decides the weight of a sample."""
        if x.dim() < 2 or x.shape[-1] != self.conv.in_channels:
            raise ValueError(f"x must be (B, ..., {self.conv.in_channels}), got {tuple(x.shape)}")
        y: Tensor = self.conv(x.reshape(x.shape[0], -1, 1, x.shape[-1]).movedim(-1, 1))
        return y.movedim(1, -1).reshape(*x.shape[:-1], y.shape[1])


def _square(value: int | tuple[int, ...], name: str) -> int:
    sizes = as_tuple(value, 2, name)
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name} must be the same on both axes, got {sizes}")
    return sizes[0]


# -- whole models ------------------------------------------------------------------------------------------------------


def convert_to_fdconv(
    model: nn.Module,
    *,
    min_channels: int = 17,
    kernel_sizes: Sequence[int] = (1, 3),
    linear: Selector | None = None,
    skip: Selector | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
    **options: Any,
) -> Surgery:
    """Replace the convolutions of a model by frequency dynamic ones with their weights.

    At first the model computes nearly the same. Convolutions that cannot be replaced stay; the result names them.

    Args:
        model: any model; left as it is.
        min_channels: smallest number of input and of output channels.
        kernel_sizes: sizes of the kernels that are replaced.
        linear: linear layers that are replaced too, e.g. ``"*.mlp.*"``; none by default.
        skip: layers that stay as they are, e.g. ``"*.downsample.*"``.
        example_input, inplace: as `convatlas.surgery.swap` takes them.
        **options: of `FDConv2d`.

    Raises:
        Unsupported: nothing was replaced.
    """
    kept = (lambda name, module: False) if skip is None else predicate(skip)
    dense = (lambda name, module: False) if linear is None else predicate(linear)

    def dynamic(module: nn.Module) -> nn.Module:
        part: Any = module
        if part.weight.dim() == 4 and (part.kernel_size[0] not in kernel_sizes or part.groups != 1):
            raise Unsupported(f"kernel_size must be one of {tuple(kernel_sizes)} and groups 1, got {part}")
        if min(part.weight.shape[:2]) < min_channels:
            raise Unsupported(f"channels must be at least {min_channels}, got {tuple(part.weight.shape[:2])}")
        return FDConv2d.from_conv(part, **options) if part.weight.dim() == 4 else FDLinear.from_linear(part, **options)

    def chosen(name: str, module: nn.Module) -> bool:
        return not kept(name, module) and (not isinstance(module, nn.Linear) or dense(name, module))

    kinds = (nn.Conv2d,) if linear is None else (nn.Conv2d, nn.Linear)
    return swap(model, kinds, dynamic, where=chosen, example_input=example_input, inplace=inplace)


def fix_kernels(model: nn.Module, *, max_bytes: int = 2**26, inplace: bool = False) -> Surgery:
    """Compute the kernels of all groups once, so that inference transforms nothing: the weight becomes a small product.

    A layer then holds n times its weight; larger layers than ``max_bytes`` stay as they are. The result cannot be
    trained further.

    Raises:
        Unsupported: nothing was changed.
    """

    def fixed(layer: nn.Module) -> nn.Module:
        part: Any = layer
        size = part.kernel_num * part.param_ratio * part.out_channels * part.in_channels * part.kernel_size**2
        if size * part.dft_weight.element_size() > max_bytes:
            raise Unsupported(f"its kernels take {size * part.dft_weight.element_size()} bytes, above {max_bytes}")
        with torch.no_grad():
            part.kernels = part.spatial_kernels()
        part.dft_weight = None
        return layer

    return swap(model, FDConv2d, fixed, inplace=inplace)


def freeze_spectra(module: nn.Module) -> None:
    """Freeze the weights of a stage but leave its modulations trainable, as the authors' detectors do in frozen stages.

    Batch norms outside the modulations are frozen with the rest; whether they update their statistics is their mode's.
    """
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, KernelSpatialModulation | LocalKernelModulation | FrequencyBandModulation):
            part.requires_grad_(True)
