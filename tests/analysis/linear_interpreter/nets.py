"""Small networks of the three kinds that the paper looks at, in float64 and evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def classifier(*, bias: bool = True) -> nn.Sequential:
    """10 classes from (B, 3, 8, 8): convolutions, batch norm, ReLU, max-pooling."""
    norm = nn.BatchNorm2d(4) if bias else nn.Identity()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=bias),
        norm,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=bias),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(24, 10, bias=bias),
    )
    return _ready(model)


def upscaler() -> nn.Sequential:
    """(B, 1, H, W) to twice the size."""
    return _ready(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1), nn.PixelShuffle(2))
    )


def translator() -> nn.Sequential:
    """(B, 2, H, W) to (B, 2, H, W), with instance norm."""
    return _ready(
        nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    )


def image(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def _ready(model: nn.Sequential) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn(4, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(4, generator=generator))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()
