"""Validation metrics of networks that restore images: means over images of different sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from convatlas.ops.illuminant import angular_error
from convatlas.ops.image_quality import psnr
from convatlas.restoration.protocol import Protocol

__all__ = ["MeanAngularError", "MeanLumaPSNR", "MeanPSNR", "MeanSquaredError"]


class _Mean(Metric):
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        self.total += value
        self.count += 1

    def compute(self) -> Tensor:
        """The mean over all images so far."""
        return (self.total / self.count).float()


class MeanSquaredError(_Mean):
    """Mean over images of their mean squared error; images are (C, H, W)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add an image."""
        self._add((preds.double() - target.double()).square().mean())


class MeanAngularError(_Mean):
    """Mean angular error in degrees of colours (B, 3)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        for error in angular_error(preds.double(), target.double()):
            self._add(error)


class MeanPSNR(_Mean):
    """Mean over images of their PSNR in dB over all channels, cut to [0, 1]; images are (C, H, W)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add an image."""
        value = psnr(preds.double().clamp(0, 1), target.double(), data_range=1)
        self._add(value.clamp(max=100))  # of equal images it is infinite


class MeanLumaPSNR(_Mean):
    """Mean over images of the PSNR of their luma in dB, without rounding; images are (1 or 3, H, W) in [0, 1].

    Args:
        protocol: form of luma and border.
        scale: border where the protocol names none.
        is_luma: whether images of one channel are luma, not grey.
    """

    def __init__(self, protocol: Protocol, scale: int, *, is_luma: bool) -> None:
        super().__init__()
        self.protocol, self.is_luma = protocol, is_luma
        self.shave = scale if protocol.shave is None else protocol.shave

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add an image."""
        x, y = (self.protocol.luma_of(image.double().clamp(0, 1), is_luma=self.is_luma) for image in (preds, target))
        self._add(psnr(x, y, data_range=1, shave=self.shave).clamp(max=100))  # of equal images it is infinite
