"""ESPCN: super-resolution with all layers at low resolution and a sub-pixel convolution as the last.

Shi, Caballero, Huszar, Totz, Aitken, Bishop, Rueckert, Wang: "Real-Time Single Image and Video Super-Resolution Using
an Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016, arXiv 1609.05158. There is no code of the authors; the
two well-known ones that this follows are yjn870/ESPCN-pytorch and Lornatang/ESPCN-PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from convatlas.errors import CheckpointError, unknown
from convatlas.networks.base import PublishedFile, Upscaler, UpscalerConfig
from convatlas.nn.sub_pixel import SubPixelConv2d, icnr_, reorder_depth_to_space
from convatlas.weights import Layout

__all__ = ["ESPCN", "PUBLISHED", "VARIANTS", "ESPCNConfig"]

Act = Literal["tanh", "relu"]
Clamp = Literal["never", "inference", "always"]
Init = Literal["small_last", "reference", "icnr"]
Last = Literal["sub_pixel", "conv_transpose"]


@dataclass(frozen=True, kw_only=True)
class ESPCNConfig(UpscalerConfig):
    """Config of `ESPCN`.

    Attributes:
        scale: r of the paper.
        in_channels: C of the paper: 1 for luma, 3 for RGB.
        frames: consecutive frames whose channels are joined as the input, an odd number (early fusion, Caballero et
            al.: "Real-Time Video Super-Resolution with Spatio-Temporal Networks and Motion Compensation", CVPR 2017,
            arXiv 1611.05250). The output is the middle frame.
        channels: n1 of the paper; n2 is half of it.
        kernel_sizes: f1, f2 and f3 of the paper.
        act: tanh, or relu, which the paper found worse.
        clamp: whether the output is cut to [0, 1]: ``always`` as Lornatang's (in training no gradient comes from
            pixels outside), ``inference`` in evaluation only, or ``never`` as yjn870's.
        init: ``small_last`` draws normal weights and those of the last layer nearly zero. ``reference`` does as both
            codes do, which take any layer of 32 input channels for the last one: the same at 64 channels only.
            ``icnr`` begins without a checkerboard (see `convatlas.nn.sub_pixel.icnr_`).
        last: the last layer as a sub-pixel convolution or as the transposed convolution that can compute the same.

    Raises:
        ValueError: a value is out of range.
    """

    frames: int = 1
    channels: int = 64
    kernel_sizes: tuple[int, int, int] = (5, 3, 3)
    act: Act = "tanh"
    clamp: Clamp = "never"
    init: Init = "small_last"
    last: Last = "sub_pixel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"channels must be even and at least 2, got {self.channels}")
        if self.frames < 1 or self.frames % 2 == 0:
            raise ValueError(f"frames must be odd, got {self.frames}")
        if len(self.kernel_sizes) != 3 or any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes must be three odd numbers, got {self.kernel_sizes}")
        for name, choices in (("act", Act), ("clamp", Clamp), ("init", Init), ("last", Last)):
            if getattr(self, name) not in get_args(choices):
                raise unknown(name, str(getattr(self, name)), get_args(choices))

    def build(self) -> ESPCN:
        return ESPCN(self)


_ACTS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_SMALL = 0.001  # standard deviation of the last layer's first weights


def _from_tensorflow(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Three kernels (k, k, I, O) and three biases under any names, the last in the order of depth_to_space."""
    if not isinstance(model, ESPCN) or model.config.last != "sub_pixel":
        raise ValueError("it has no sub-pixel convolution")
    kernels = [tensor for tensor in state.values() if tensor.dim() == 4]
    biases = [tensor for tensor in state.values() if tensor.dim() == 1]
    if len(kernels) != 3 or len(biases) != 3 or len(state) != 6:
        raise ValueError("these are not three kernels and three biases")
    converted: dict[str, Tensor] = {}
    for index, name in enumerate(("feature_maps.0", "feature_maps.2", "sub_pixel.conv")):
        own = model.get_parameter(f"{name}.weight")
        shape = (*own.shape[2:], own.shape[1], own.shape[0])
        (kernel,) = (tensor for tensor in kernels if tuple(tensor.shape) == shape)
        (bias,) = (tensor for tensor in biases if len(tensor) == own.shape[0])
        kernel = kernel.permute(3, 2, 0, 1)
        if index == 2:
            kernel, bias = (reorder_depth_to_space(tensor, model.scale) for tensor in (kernel, bias))
        converted |= {f"{name}.weight": kernel, f"{name}.bias": bias}
    return converted


def _of_same_scale(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Refuse a checkpoint of another scale by name; the shapes alone tell it less plainly."""
    last = state["sub_pixel.conv.weight"]
    if isinstance(model, ESPCN) and model.config.last == "sub_pixel":
        theirs, ours = math.sqrt(len(last) / model.in_channels), model.scale
        if theirs != ours and theirs.is_integer() and last.shape[1] == model.config.channels // 2:
            raise CheckpointError(f"the checkpoint enlarges {theirs:g} times, the model {ours} times")
    return state


class ESPCN(Upscaler):
    """Two convolutions at low resolution, and a sub-pixel convolution (paper, equations 1 to 4, figure 1).

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "yjn870": Layout(
            renames=((r"^first_part\.", "feature_maps."), (r"^last_part\.0\.", "sub_pixel.conv.")),
            function=_of_same_scale,
        ),
        "lornatang": Layout(
            # The averaged copy lies in a wrapper that counts its updates.
            renames=((r"^module\.", ""), (r"^n_averaged$", ""), (r"^sub_pixel\.0\.", "sub_pixel.conv.")),
            function=_of_same_scale,
        ),
        "tensorflow": Layout(function=_from_tensorflow),
    }

    def __init__(self, config: ESPCNConfig) -> None:
        super().__init__(config)
        width, hidden = config.channels, config.channels // 2
        first, second, last = config.kernel_sizes
        act = _ACTS[config.act]
        self.feature_maps = nn.Sequential(
            nn.Conv2d(config.frames * config.in_channels, width, first, padding=first // 2),
            act(),
            nn.Conv2d(width, hidden, second, padding=second // 2),
            act(),
        )
        sub_pixel = SubPixelConv2d(hidden, config.in_channels, last, scale=config.scale)
        _init(self.feature_maps[0], config)
        _init(self.feature_maps[2], config)
        _init(sub_pixel.conv, config, last=True)
        self.sub_pixel = sub_pixel if config.last == "sub_pixel" else sub_pixel.to_conv_transpose()

    @property
    def frames(self) -> int:
        return int(self.config.frames)

    @property
    def reach(self) -> int:
        return sum(size // 2 for size in self.config.kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        y = self.sub_pixel(self.feature_maps(x))
        clamped = self.config.clamp == "always" or (self.config.clamp == "inference" and not self.training)
        return y.clamp(0, 1) if clamped else y


def _init(conv: nn.Module, config: ESPCNConfig, *, last: bool = False) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    kernels = conv.kernel_size[0] * conv.kernel_size[1]
    small = conv.in_channels == 32 if config.init == "reference" else last and config.init == "small_last"
    draw: Callable[[Tensor], object] = partial(nn.init.normal_, std=math.sqrt(2 / (conv.out_channels * kernels)))
    if small:
        nn.init.normal_(conv.weight, std=_SMALL)
    elif last and config.init == "icnr":
        icnr_(conv.weight, config.scale, draw)
    else:
        draw(conv.weight)


VARIANTS: dict[str, ESPCNConfig] = {
    "espcn_x2": ESPCNConfig(scale=2),
    "espcn_x3": ESPCNConfig(scale=3),
    "espcn_x4": ESPCNConfig(scale=4),
    "espcn_x8": ESPCNConfig(scale=8),
    # As Lornatang's checkpoints were made.
    "espcn_clamped_x2": ESPCNConfig(scale=2, clamp="always", init="reference"),
    "espcn_clamped_x3": ESPCNConfig(scale=3, clamp="always", init="reference"),
    "espcn_clamped_x4": ESPCNConfig(scale=4, clamp="always", init="reference"),
    # For comparison: the same network with a transposed convolution.
    "espcn_deconv_x2": ESPCNConfig(scale=2, last="conv_transpose"),
    "espcn_deconv_x3": ESPCNConfig(scale=3, last="conv_transpose"),
    "espcn_deconv_x4": ESPCNConfig(scale=4, last="conv_transpose"),
}


def _lornatang(set5: float, set14: float) -> tuple[PublishedFile, ...]:
    figures = {"Set5 PSNR-Y [dB]": set5, "Set14 PSNR-Y [dB]": set14}
    page = "https://github.com/Lornatang/ESPCN-PyTorch"
    return (PublishedFile(page, "see the page", figures, by_hand=True),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "espcn_x3": (
        PublishedFile(
            "https://github.com/yjn870/ESPCN-pytorch",
            "see the page",
            {"Set5 PSNR-Y [dB], low resolution by Pillow": 32.88},
            by_hand=True,
        ),
    ),
    "espcn_clamped_x2": _lornatang(36.64, 32.35),
    "espcn_clamped_x3": _lornatang(32.55, 29.20),
    "espcn_clamped_x4": _lornatang(30.26, 27.41),
}
