"""Training steps with TrAct beside the same steps with the plain gradient of the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, report
from convatlas.networks.registry import create_model
from convatlas.report import Report
from convatlas.training.tract import TrAct, step_calls

__all__ = ["run"]

STEP, LAYER = "training step of ResNet-18", "training step of a patch embedding alone"

# The smallest ratio that counts, fixed before anything was measured: 10 % more time. The patch embedding alone has no
# bar: its second moment costs as much as its own backward pass, and in a network it is one layer of many.
BARS = [
    Bar(
        statement="A training step of ResNet-18 on images of 32 x 32 takes at most 10 % more time",
        published="a small overhead (arXiv 2410.23970)",
        theirs="plain",
        at_least=1 / 1.1,
        what=STEP,
    )
]

BATCHES = (32, 128)
PATCH_BATCH = 16


class _PatchEmbedding(nn.Module):
    """The first layer of a ViT-S, 16 x 16 patches to 384 channels, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 384, 16, stride=16)
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, 10) of images (B, 3, H, W)."""
        return self.head(self.proj(x).mean((2, 3)))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of training steps.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the smaller batch only.
    """
    cases = [
        Case(f"{batch} x 3 x 32 x 32", STEP, partial(_resnet, batch), tolerance=1e-4)
        for batch in (BATCHES[:1] if quick else BATCHES)
    ]
    cases.append(Case(f"{PATCH_BATCH} x 3 x 224 x 224", LAYER, _patches))
    note = (
        "A training step is forward, cross-entropy, backward and SGD with momentum, in training mode, at a learning "
        "rate of 0. The gradients differ by what TrAct is, so the losses are what is compared."
    )
    return report("tract", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _resnet(batch: int, device: torch.device) -> dict[str, Call]:
    model = create_model("resnet18", num_classes=10, small_stem=True, stem_pool=True)
    return _sides(model, (batch, 3, 32, 32), device)


def _patches(device: torch.device) -> dict[str, Call]:
    return _sides(_PatchEmbedding(), (PATCH_BATCH, 3, 224, 224), device)


def _sides(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> dict[str, Call]:
    images, labels = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
    return {**step_calls(model.to(device), images, labels, TrAct(lam=0.1))}
