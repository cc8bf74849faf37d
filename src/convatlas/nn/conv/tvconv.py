"""Translation variant convolution: a depthwise kernel for every position, made by a small network from learned maps.

Chen, He, Zhuo, Ma, Ha, Chan: "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
CVPR 2022, arXiv 2203.10489. For images of a fixed layout, such as aligned faces: kernels vary over positions, not over
images, so that after training they are constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import as_tuple, geometry
from convatlas.ops.per_pixel_conv import translation_variant_conv2d
from convatlas.surgery import Surgery, swap
from convatlas.weights import Layout

__all__ = ["TVCONV_LAYOUT", "StaticTVConv2d", "TVConv2d", "export_tvconv", "resize_position_maps"]

#: The authors keep the geometry in scalars beside the parameters, which a layer of ours knows from its constructor.
TVCONV_LAYOUT = Layout(
    renames=(
        (r"^(.*\.)?(TVConv_k|TVConv_k_square|stride|channels|h|w)$", ""),
        (r"(^|\.)posi_map$", r"\1position_maps"),
    )
)


class StaticTVConv2d(nn.Module):
    """Depthwise convolution with stored kernels at every position: the form of `TVConv2d` for inference.

    Args:
        weight_maps: V (C, k, k, h, w).
        stride, padding, dilation: in pixels, on both axes.
        bias_map: (C, h, w) or None.
    """

    weight_maps: Tensor
    bias_map: Tensor | None

    def __init__(
        self, weight_maps: Tensor, stride: int = 1, padding: int = 1, dilation: int = 1, bias_map: Tensor | None = None
    ) -> None:
        super().__init__()
        if weight_maps.dim() != 5 or weight_maps.shape[1] != weight_maps.shape[2]:
            raise ValueError(f"weight_maps must be (C, k, k, h, w), got {tuple(weight_maps.shape)}")
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.register_buffer("weight_maps", weight_maps)
        self.register_buffer("bias_map", bias_map)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C, h, w); the kernels may be stored in half the precision of x."""
        y = translation_variant_conv2d(x, self.weight_maps, self.stride, self.padding, self.dilation)
        return y if self.bias_map is None else y + self.bias_map.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the shape of the kernels and the geometry."""
        place = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"{tuple(self.weight_maps.shape)}, {place}, bias={self.bias_map is not None}"


class TVConv2d(nn.Module):
    """Depthwise convolution with its own kernel at every position (paper, section 3.2).

    Learned maps of the positions pass through 3x3 convolutions, each followed by a layer norm over channels and
    positions and a ReLU, and a last one gives k * k weights for each channel and position. The maps do not depend on
    the input, so they are computed once for a whole batch; `convatlas.surgery.merge` stores them for good. The layer
    works for inputs of one size.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them. Channels and groups are one number; the kernel is odd and square, and
            padding is half of it, of zeros. The bias differs by position, too, and comes from a generator of its own.
        output_size: height and width of the output.
        position_channels: number of learned maps; they start as ones.
        hidden_channels, hidden_layers: of the generator.

    Raises:
        ValueError: the convolution is not such a one, or a size is smaller than 1.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": TVCONV_LAYOUT}

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
        output_size: tuple[int, int],
        position_channels: int = 4,
        hidden_channels: int = 64,
        hidden_layers: int = 3,
    ) -> None:
        super().__init__()
        if not in_channels == out_channels == groups:
            raise ValueError(
                f"TVConv2d is depthwise: in_channels, out_channels and groups must be equal, got {in_channels}, "
                f"{out_channels} and {groups}"
            )
        sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        kernel_size, stride, dilation = (_square(value, name) for name, value in sizes.items())
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        half = dilation * (kernel_size - 1) // 2
        if padding_mode != "zeros" or padding not in ("same", half, (half, half)) or (padding == "same" and stride > 1):
            raise ValueError(f"padding must be {half} zeros, got {padding!r} ({padding_mode})")
        if min(*output_size, position_channels, hidden_channels) < 1 or hidden_layers < 0:
            raise ValueError(
                "output_size, position_channels and hidden_channels must be at least 1, hidden_layers 0, got "
                f"{output_size}, {position_channels}, {hidden_channels} and {hidden_layers}"
            )
        self.channels, self.kernel_size, self.stride, self.dilation = in_channels, kernel_size, stride, dilation
        self.padding, self.output_size = half, (output_size[0], output_size[1])
        self.position_maps = nn.Parameter(torch.ones(1, position_channels, *output_size))
        hidden = (position_channels, hidden_channels, hidden_layers, self.output_size)
        self.weight_layers = _generator(*hidden, in_channels * kernel_size**2)
        self.bias_layers = _generator(*hidden, in_channels) if bias else None
        self.to(device=device, dtype=dtype)

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry of a depthwise convolution and fresh kernels; they cannot be those of the layer.

        Args:
            conv: a `torch.nn.Conv2d`.
            **options: of the layer, at least ``output_size``.

        Raises:
            Unsupported: it is something else, or the layer cannot have its geometry.
        """
        try:
            layer = cls(**geometry(conv, 2), **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        return layer.train(conv.training)

    @property
    def weight_maps(self) -> Tensor:
        """The kernels V (C, k, k, h, w), computed anew."""
        maps: Tensor = self.weight_layers(self.position_maps)
        return maps[0].unflatten(0, (self.channels, self.kernel_size, self.kernel_size))

    @property
    def bias(self) -> Tensor | None:
        """The bias (C, h, w), computed anew, or None."""
        return None if self.bias_layers is None else self.bias_layers(self.position_maps)[0]

    def merged(self) -> StaticTVConv2d:
        """The form for inference, which computes the same with stored kernels."""
        with torch.no_grad():
            maps, bias = self.weight_maps.clone(), self.bias
        static = StaticTVConv2d(maps, self.stride, self.padding, self.dilation, None if bias is None else bias.clone())
        return static.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C, *output_size); H is stride h, or one less with stride 2, and so is W."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        size = tuple((side - 1) // self.stride + 1 for side in x.shape[2:])
        if size != self.output_size:
            wanted, got = (" x ".join(map(str, sides)) for sides in (self.output_size, size))
            raise ValueError(f"TVConv2d was built for an output of {wanted}, got one of {got} from x {tuple(x.shape)}")
        y = translation_variant_conv2d(x, self.weight_maps.to(x.dtype), self.stride, self.padding, self.dilation)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the geometry."""
        place = f"stride={self.stride}, dilation={self.dilation}, output_size={self.output_size}"
        return f"{self.channels}, kernel_size={self.kernel_size}, {place}, bias={self.bias_layers is not None}"


def _generator(maps: int, hidden: int, layers: int, size: tuple[int, int], out_channels: int) -> nn.Sequential:
    """3x3 convolutions with layer norm over channels and positions and ReLU, and a last one without."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(maps if index == 0 else hidden, hidden, 3, padding=1, bias=False),
            nn.LayerNorm([hidden, *size]),
            nn.ReLU(inplace=True),
        )
        for index in range(layers + 1)
    ]
    return nn.Sequential(*blocks, nn.Conv2d(hidden, out_channels, 3, padding=1, bias=False))


def _square(value: int | tuple[int, ...], name: str) -> int:
    sizes = as_tuple(value, 2, name)
    if sizes[0] != sizes[1] or sizes[0] < 1:
        raise ValueError(f"{name} must be one positive number for both axes, got {sizes}")
    return sizes[0]


def export_tvconv(
    model: nn.Module, *, dtype: torch.dtype | None = None, max_bytes: int | None = None, inplace: bool = False
) -> Surgery:
    """Store the kernels of every `TVConv2d` of a model, for inference.

    Args:
        model: any model; left as it is.
        dtype: in which kernels are stored, e.g. ``torch.float16``; by default that of the model.
        max_bytes: layers whose kernels take more stay as they are, and the result names them.
        inplace: as `convatlas.surgery.swap` takes it.

    Raises:
        Unsupported: nothing was changed.
    """

    def stored(layer: nn.Module) -> nn.Module:
        part: Any = layer
        height, width = part.output_size
        size = (dtype or part.position_maps.dtype).itemsize * part.channels * part.kernel_size**2 * height * width
        if max_bytes is not None and size > max_bytes:
            raise Unsupported(f"its kernels take {size} bytes, above {max_bytes}")
        static: StaticTVConv2d = part.merged()
        return static

    result = swap(model, TVConv2d, stored, inplace=inplace)
    for name in result.changed if dtype is not None else ():
        static: Any = result.model.get_submodule(name)
        static.weight_maps = static.weight_maps.to(dtype)
    return result


def resize_position_maps(layer: TVConv2d, output_size: tuple[int, int]) -> TVConv2d:
    """A layer for another size, with maps and the parameters of the norms resized bilinearly; no part of the paper."""
    hidden = layer.weight_layers[0][0]  # type: ignore[index]
    other = TVConv2d(
        layer.channels,
        layer.channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.channels,
        layer.bias_layers is not None,
        device=layer.position_maps.device,
        dtype=layer.position_maps.dtype,
        output_size=output_size,
        position_channels=layer.position_maps.shape[1],
        hidden_channels=hidden.out_channels,
        hidden_layers=len(layer.weight_layers) - 2,
    )
    shapes = other.state_dict()
    state = {}
    for name, value in layer.state_dict().items():
        maps = value if value.dim() == 4 else value[None]
        resized = value.shape != shapes[name].shape
        state[name] = (
            F.interpolate(maps, size=output_size, mode="bilinear", align_corners=False).reshape(shapes[name].shape)
            if resized
            else value
        )
    other.load_state_dict(state)
    return other.train(layer.training)
