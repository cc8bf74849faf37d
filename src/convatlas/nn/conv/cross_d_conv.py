"""Cross-D convolution: 2-D convolutions whose kernels are slices of learned 3-D ones, and their way to 3-D networks.

Yavuz, Yang: "Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting Operation", 2024, arXiv
2411.02441. A small controller looks at each image and turns the frequencies of the 3-D kernel W by an angle theta about
an axis k; the middle slice convolves the image. Training on images so reaches every tap of W, and a network for volumes
takes W as it is. The turn is the linear one, R = I + theta [k]x, by which frequencies f become R f and W is multiplied
by the phases exp(-2 pi i (1, 1, 1).R f): a shift of W by s = R^T (1, 1, 1) taps, see `convatlas.ops.fourier_shift`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import Unsupported, unknown
from convatlas.nn.conv.geometry import as_tuple, geometry
from convatlas.ops.fourier_shift import shifted_slices
from convatlas.ops.per_sample_conv import per_sample_conv
from convatlas.surgery import Selector, Surgery, swap
from convatlas.surgery.selection import has_hooks, like, place, slots, working_copy

__all__ = ["CrossDConv2d", "Inflation", "convert_to_3d", "convert_to_cross_d", "inflate_weight"]

#: How a 2-D kernel becomes a 3-D one: it is the middle slice, or all slices at 1/K of its values.
Inflation = Literal["centre", "mean"]

_CONTROLLER_WIDTH = 16
_LARGEST_ANGLE = math.pi / 4
#: Side in voxels of the volumes that a converted network expects at most; those of an image would not fit into memory.
_LARGEST_SIDE = 64
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class CrossDConv2d(nn.Module):
    """Convolve each image with a slice of a 3-D kernel that is turned as the image asks for.

    The shift is (1, 1, 1) where the angle is 0, so that the 2-D kernel is then the slice before the middle one, rolled
    by one tap along both axes; the authors' checkpoints need that. Kernels wrap around circularly. In training the
    batch norm of the controller makes the kernels of a batch depend on each other.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them; kernels must be square. The authors' layer has no bias and ignores dilation.
        centered: take (1, 1, 1) off the shift, so that the 2-D kernel is the middle slice where the angle is 0.

    Raises:
        ValueError: the kernel is not square, groups do not divide the channels, or another argument is out of range.
    """

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
        centered: bool = False,
    ) -> None:
        super().__init__()
        size = as_tuple(kernel_size, 2, "kernel_size")
        if len(set(size)) != 1 or size[0] < 1:
            raise ValueError(f"kernel_size must be that of a square: Cross-D Conv needs cubic kernels, got {size}")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide in_channels and out_channels, got {groups}")
        if padding_mode not in _PADDING_MODES:
            raise unknown("padding_mode", padding_mode, _PADDING_MODES)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = size, as_tuple(stride, 2, "stride")
        self.dilation, self.padding_mode = as_tuple(dilation, 2, "dilation"), padding_mode
        self.padding: str | tuple[int, ...] = padding if isinstance(padding, str) else as_tuple(padding, 2, "padding")
        self.centered = centered
        self._sides = _sides(self.padding, self.kernel_size, self.stride, self.dilation)
        factory: Any = {"device": device, "dtype": dtype}
        self.weights_3d = nn.Parameter(torch.empty(out_channels, in_channels // groups, *(size[0],) * 3, **factory))
        self.rotation_params = nn.Sequential(
            nn.Conv2d(in_channels, _CONTROLLER_WIDTH, 1, **factory),
            nn.BatchNorm2d(_CONTROLLER_WIDTH, **factory),
            nn.ReLU(),
            nn.Conv2d(_CONTROLLER_WIDTH, 4, 1, **factory),
        )
        self.bias = nn.Parameter(torch.zeros(out_channels, **factory)) if bias else None
        nn.init.kaiming_normal_(self.weights_3d, mode="fan_out", nonlinearity="relu")

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry of a convolution that computes the same until it is trained.

        The kernel of the convolution is the slice that the angle 0 takes, the others are zero, and the angle is 0 for
        every image.

        Args:
            conv: a `torch.nn.Conv2d` with square kernels.
            **options: of the layer.

        Raises:
            Unsupported: it is something else, or its kernels are not square.
        """
        layer = _like_conv(cls, conv, options)
        weight, size = conv.get_parameter("weight").detach(), layer.kernel_size[0]
        with torch.no_grad():
            layer.weights_3d.zero_()
            layer.weights_3d[:, :, size // 2] = weight
            if not layer.centered:
                layer.weights_3d.copy_(layer.weights_3d.roll((-1, -1, -1), (2, 3, 4)))
            last = layer.rotation_params.get_submodule("3")
            for parameter in last.parameters():
                parameter[3] = 0
            if layer.bias is not None:
                layer.bias.copy_(conv.get_parameter("bias"))
        return layer

    def to_conv(self) -> None:
        """None: every image has another kernel."""

    def axis_angle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Axis k (B, 3) and angle theta (B, 1) in radians, between -pi/4 and pi/4, about which kernels turn for x."""
        maps = self.rotation_params(x).flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        scores = (maps * maps.softmax(2)).sum(2)
        axis = scores[:, :3] / (torch.linalg.vector_norm(scores[:, :3], dim=1, keepdim=True) + 1e-8)
        return axis, scores[:, 3:].tanh() * _LARGEST_ANGLE

    def shift(self, x: Tensor) -> Tensor:
        """By how many taps along depth, height and width the kernels are shifted for x, (B, 3)."""
        axis, angle = self.axis_angle(x)
        # Column sums of the matrix of the cross product with k: (kz - ky, kx - kz, ky - kx).
        turned = angle * (axis.roll(1, 1) - axis.roll(-1, 1))
        return turned if self.centered else 1 + turned

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels of every image of x, (B, out_channels, in_channels / groups, K, K)."""
        return shifted_slices(self.weights_3d, self.shift(x))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images (B, in_channels, H, W) with their kernels.

        Raises:
            ValueError: x has a wrong number of dimensions or channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        kernels = self.kernels(x).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        (top, bottom), (left, right) = self._sides
        padding = (top, left)
        if self.padding_mode != "zeros" or top != bottom or left != right:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, (left, right, top, bottom), mode), (0, 0)
        return per_sample_conv(x, kernels, bias, self.stride, padding, self.dilation, self.groups)

    def to_conv3d(self) -> nn.Conv3d:
        """The convolution of volumes by W, with the geometry on all three axes: what the 2-D training was for.

        Raises:
            Unsupported: stride, padding or dilation differ between height and width, so that no depth follows.
        """
        conv = nn.Conv3d(self.in_channels, self.out_channels, self.kernel_size[0], **_geometry_3d(self), device="meta")
        return _filled(conv, self.weights_3d, self.bias)

    def extra_repr(self) -> str:
        """Show the geometry."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, centered={self.centered}"
        )


def convert_to_cross_d(
    model: nn.Module,
    *,
    keep_weights: bool = False,
    where: Selector | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
    **options: Any,
) -> Surgery:
    """Replace the 2-D convolutions of a network by Cross-D ones, as the paper does to ResNet-18.

    Args:
        model: any model; left as it is.
        keep_weights: start from the kernels of the convolutions, as `CrossDConv2d.from_conv` does, so that the network
            computes what it did; by default the 3-D kernels are drawn anew, for a training from scratch.
        where, example_input, inplace: as `convatlas.surgery.swap` takes them.
        **options: of the layer.

    Raises:
        Unsupported: nothing was replaced.
    """

    def fresh(conv: nn.Module, **options: Any) -> nn.Module:
        return _like_conv(CrossDConv2d, conv, options)

    layer: Any = CrossDConv2d if keep_weights else fresh
    return swap(model, nn.Conv2d, layer, where=where, example_input=example_input, inplace=inplace, **options)


def convert_to_3d(model: nn.Module, *, inflation: Inflation = "centre", inplace: bool = False) -> Surgery:
    """Make a network for volumes of a network for images, with the 3-D kernels of its Cross-D convolutions.

    Plain 2-D convolutions are inflated; batch norms keep weights and statistics, pooling gets a third axis, and the
    controllers are dropped. Whatever else the forward of the network does to maps must not depend on their number of
    axes. The ``preprocess`` of a convatlas network becomes that of volumes.

    Args:
        model: any model; left as it is.
        inflation: what becomes of plain 2-D convolutions: ``centre`` or ``mean``, see `inflate_weight`.
        inplace: change the model itself instead of a copy.

    Returns:
        The network with all names that changed. A module that has no 3-D form is named as skipped with the reason.

    Raises:
        Unsupported: the model has nothing that could be changed.
    """
    if inflation not in get_args(Inflation):
        raise unknown("inflation", str(inflation), get_args(Inflation))
    holder = working_copy(model, inplace)
    changed: list[str] = []
    skipped: list[tuple[str, str]] = []
    meant = []
    within: set[nn.Module] = set()
    made: dict[nn.Module, nn.Module] = {}
    for slot in list(slots(holder)):
        old = slot.module
        if old in within or not (isinstance(old, CrossDConv2d) or type(old) in _FORMS):
            continue
        within.update(part for part in old.modules() if part is not old)
        try:
            if has_hooks(old):
                raise Unsupported("it has forward hooks, which would be lost")
            if old not in made:
                made[old] = like(_in_3d(old, inflation), old, holder)
            meant.append((slot, made[old]))
            changed.append(slot.names[0])
        except Unsupported as error:
            skipped.append((slot.names[0], str(error)))
    if not changed:
        raise Unsupported("nothing was changed: the model has no 2-D convolution, norm or pooling")
    place(meant)
    result = holder.get_submodule("model")
    _expect_volumes(result)
    return Surgery(result, tuple(changed), tuple(skipped))


def inflate_weight(weight: Tensor, inflation: Inflation = "centre") -> Tensor:
    """A cubic kernel (out, in, K, K, K) of a square one (out, in, K, K).

    ``centre`` puts it into the middle slice, so that each slice of a volume is convolved alone; ``mean`` puts 1/K of it
    into every slice, so that a volume of equal slices gives what its slice gives (Carreira and Zisserman, 2017).

    Raises:
        ValueError: the kernel is not square.
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be (out, in, K, K), got {tuple(weight.shape)}")
    if inflation not in get_args(Inflation):
        raise unknown("inflation", str(inflation), get_args(Inflation))
    size = weight.shape[2]
    if inflation == "mean":
        return (weight / size)[:, :, None].expand(-1, -1, size, -1, -1).contiguous()
    cube = weight.new_zeros(*weight.shape[:2], size, size, size)
    cube[:, :, size // 2] = weight
    return cube


def _like_conv(cls: type[Any], conv: nn.Module, options: dict[str, Any]) -> Any:
    arguments = geometry(conv, 2)
    try:
        layer = cls(**arguments, **options)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    return layer.train(conv.training)


def _sides(
    padding: str | tuple[int, ...], kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Zeros before and behind each axis, as torch's convolution puts them."""
    if not isinstance(padding, str):
        return [(pad, pad) for pad in padding]
    if padding not in ("same", "valid"):
        raise unknown("padding", padding, ("same", "valid"))
    if padding == "valid":
        return [(0, 0) for _ in kernel_size]
    if max(stride) > 1:
        raise ValueError(f"padding 'same' needs a stride of 1, got {stride}")
    totals = [step * (size - 1) for size, step in zip(kernel_size, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


# -- the 3-D forms of layers -------------------------------------------------------------------------------------------


def _in_3d(layer: nn.Module, inflation: Inflation) -> nn.Module:
    return layer.to_conv3d() if isinstance(layer, CrossDConv2d) else _FORMS[type(layer)](layer, inflation)


def _conv(conv: Any, inflation: Inflation) -> nn.Module:
    if conv.kernel_size[0] != conv.kernel_size[1]:
        raise Unsupported(f"its kernels are not square: {conv.kernel_size}")
    cube = nn.Conv3d(conv.in_channels, conv.out_channels, conv.kernel_size[0], **_geometry_3d(conv), device="meta")
    return _filled(cube, inflate_weight(conv.weight.detach(), inflation), conv.bias)


def _norm(kind: type[nn.Module]) -> Any:
    def make(norm: Any, _: Inflation) -> nn.Module:
        new: Any = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.load_state_dict(norm.state_dict())
        return new

    return make


def _pool(kind: type[nn.Module], *names: str) -> Any:
    def make(pool: Any, _: Inflation) -> nn.Module:
        return kind(**{name: _cube(getattr(pool, name), name) for name in names})

    return make


_FORMS: dict[type[nn.Module], Any] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm(nn.BatchNorm3d),
    nn.InstanceNorm2d: _norm(nn.InstanceNorm3d),
    nn.MaxPool2d: _pool(nn.MaxPool3d, "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: _pool(
        nn.AvgPool3d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    nn.AdaptiveAvgPool2d: _pool(nn.AdaptiveAvgPool3d, "output_size"),
    nn.AdaptiveMaxPool2d: _pool(nn.AdaptiveMaxPool3d, "output_size", "return_indices"),
    nn.Dropout2d: lambda drop, _: nn.Dropout3d(drop.p, drop.inplace),
}


def _cube(value: Any, name: str) -> Any:
    """One number for three axes of the one, or the two equal ones, for two axes."""
    if not isinstance(value, tuple | list):
        return value
    if len(set(value)) != 1:
        raise Unsupported(f"its {name} differs between height and width: {tuple(value)}")
    return value[0]


def _geometry_3d(layer: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation")
    sizes = {name: _cube(getattr(layer, name), name) for name in names}
    return {**sizes, "groups": layer.groups, "bias": layer.bias is not None, "padding_mode": layer.padding_mode}


def _filled(conv: nn.Conv3d, weight: Tensor, bias: Tensor | None) -> nn.Conv3d:
    conv.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def _expect_volumes(model: nn.Module) -> None:
    """Let the networks of convatlas in a model say that they take volumes."""
    for part in _configured(model):
        old = part.config.preprocess
        side = min(*old.shape, _LARGEST_SIDE)
        new = VolumePreprocess(size=(side,) * 3, mean=old.mean, std=old.std)
        part.config = part.config.override(preprocess=new)


def _configured(model: nn.Module) -> Iterator[Any]:
    for part in model.modules():
        if isinstance(getattr(getattr(part, "config", None), "preprocess", None), Preprocess):
            yield part
