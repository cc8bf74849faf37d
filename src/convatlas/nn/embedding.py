"""From an image or a map to a coarser map of tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from convatlas.nn.norm import ChannelLayerNorm

__all__ = ["PatchEmbed"]


def _token_norm(channels: int) -> nn.Module:
    return ChannelLayerNorm(channels, eps=1e-5)


class PatchEmbed(nn.Sequential):
    """A convolution whose positions become tokens, each normalised on its own: (B, C, H, W) to (B, D, H', W').

    Patches overlap where the kernel is larger than the stride. The children are called ``proj`` and ``norm``.

    Args:
        in_channels: channels C of the image or map.
        channels: channels D of a token.
        kernel_size: side of a patch.
        stride: distance of the patches; the side of a patch when left out.
        padding: zeros on each side.
        norm: makes the normalisation of a map from its channels; by default layer normalisation of each token with
            eps 1e-5. None leaves it out.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        *,
        stride: int | None = None,
        padding: int = 0,
        norm: Callable[[int], nn.Module] | None = _token_norm,
    ) -> None:
        proj = nn.Conv2d(in_channels, channels, kernel_size, stride=stride or kernel_size, padding=padding)
        parts: OrderedDict[str, nn.Module] = OrderedDict(proj=proj)
        if norm is not None:
            parts["norm"] = norm(channels)
        super().__init__(parts)
