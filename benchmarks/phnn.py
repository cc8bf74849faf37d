"""What hypercomplex convolutions cost beside plain ones: a training step, and evaluation before and after merging.

Process time of one thread, both sides in turn in one process, median of the ratios of the pairs; above 1 the
hypercomplex side is slower.

python benchmarks/phnn.py --pairs 15
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.phnn.resnet import PHResNetConfig
from convatlas.nn.conv.hypercomplex import PHConv2d
from convatlas.surgery import merge

Call = Callable[[], object]


def pair(ours: Call, theirs: Call, pairs: int) -> tuple[float, float]:
    """Median of ours over theirs, and of theirs over itself, which tells the noise."""
    ratios, noise = [], []
    for call in (ours, theirs):
        call()
    for _ in range(pairs):
        first, second, third = (_timed(call) for call in (theirs, ours, theirs))
        ratios.append(second / ((first + third) / 2))
        noise.append(third / first)
    spread = statistics.quantiles(noise, n=4)
    return statistics.median(ratios), spread[2] - spread[0]


def _timed(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def both_passes(layer: nn.Module, x: Tensor, gradient: Tensor) -> Call:
    return lambda: torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def evaluation(model: nn.Module, x: Tensor) -> Call:
    model = model.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def layers(pairs: int, batch: int) -> None:
    print(f"\nlayer: forward and backward of one 3x3 convolution, batch {batch}")
    for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4)):
        x = torch.randn(batch, channels, side, side, requires_grad=True)
        plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        gradient = torch.randn_like(x)
        for n in (2, 4):
            layer = PHConv2d.from_conv(plain, n=n)
            ratio, noise = pair(both_passes(layer, x, gradient), both_passes(plain, x, gradient), pairs)
            print(f"  {channels} channels at {side} x {side}, n = {n}: {ratio:.3f} (noise {noise:.3f})")


def networks(pairs: int, batch: int) -> None:
    widths = (60, 120, 240, 516)
    real = PHResNetConfig(widths=widths, n=1, algebra="real")
    x, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    print(f"\nPHResNet18, widths {widths}, batch {batch}")
    for n in (3, 4):
        ours, theirs = real.override(n=n, algebra="learned").build(), real.build()
        sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
        ratio, noise = pair(step(ours, x, labels), step(theirs, x, labels), pairs)
        print(f"  n = {n}: {sizes[0]:,} of {sizes[1]:,} parameters")
        print(f"    training step: {ratio:.3f} (noise {noise:.3f})")
        for count in (batch, 1):
            small = x[:count]
            merged, plain = merge(ours, x[:1]).model, merge(theirs, x[:1]).model
            forms = {"as it is": (ours, theirs), "merged": (merged, plain)}
            for name, (left, right) in forms.items():
                ratio, noise = pair(evaluation(left, small), evaluation(right, small), pairs)
                print(f"    evaluation {name}, batch {count}: {ratio:.3f} (noise {noise:.3f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, process time, {options.pairs} pairs")
    layers(options.pairs, options.batch)
    networks(options.pairs, options.batch)
