"""Speed of `dwt` and `idwt` on a CPU beside grouped convolutions, one for each axis; above 1 where ours wins.

That is how wavelet layers are usually written in torch. python benchmarks/wavelets.py --threads 1 --pairs 15
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import chosen
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet
from convatlas.ops.wavelets import dwt, idwt

SIZES = [(8, 64, 56, 56), (16, 48, 28, 28), (1, 16, 256, 256), (1, 3, 512, 512)]
WAVELETS = ["haar", "db2", "db4", "db10"]


def grouped(x: Tensor, wavelet: Wavelet) -> Tensor:
    """Zero padding, columns first, then rows."""
    taps = x.new_tensor([wavelet.dec_lo[::-1], wavelet.dec_hi[::-1]])
    pad, (channels, height, width) = wavelet.length - 2, x.shape[1:]
    y = F.pad(x, (pad, pad + width % 2, pad, pad + height % 2))
    y = F.conv2d(y, taps.repeat(channels, 1).view(-1, 1, 1, wavelet.length), stride=(1, 2), groups=channels)
    y = F.conv2d(y, taps.repeat(2 * channels, 1).view(-1, 1, wavelet.length, 1), stride=(2, 1), groups=2 * channels)
    return y.unflatten(1, (channels, 2, 2)).transpose(2, 3).flatten(2, 3)


def grouped_inverse(y: Tensor, wavelet: Wavelet) -> Tensor:
    taps = y.new_tensor([wavelet.rec_lo, wavelet.rec_hi])
    channels, drop = y.shape[1], wavelet.length - 2
    x = y.unflatten(2, (2, 2)).transpose(2, 3).flatten(1, 3)
    kernel = taps.repeat(2 * channels, 1).view(-1, 1, wavelet.length, 1)
    x = F.conv_transpose2d(x, kernel, stride=(2, 1), padding=(drop, 0), groups=2 * channels)
    kernel = taps.repeat(channels, 1).view(-1, 1, 1, wavelet.length)
    return F.conv_transpose2d(x, kernel, stride=(1, 2), padding=(0, drop), groups=channels)


def ratio(theirs: Callable[[], object], ours: Callable[[], object], pairs: int) -> float:
    """Median over pairs of their time over ours, the two alternating; process time, so that others do not count."""
    ratios = []
    for pair in range(pairs + 2):
        times = []
        for run in (theirs, ours):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        if pair >= 2:
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def trained(form: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(form(x), x, g)


def measured(size: tuple[int, ...], name: str, pairs: int) -> str:
    """One line of the table."""
    wavelet, x = find_wavelet(name), torch.randn(size)
    y = dwt(x, wavelet, "zero")
    torch.testing.assert_close(grouped(x, wavelet), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grouped_inverse(y, wavelet), idwt(y, wavelet, "zero"), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        forward = ratio(lambda: grouped(x, wavelet), lambda: dwt(x, wavelet, "zero"), pairs)
        inverse = ratio(lambda: grouped_inverse(y, wavelet), lambda: idwt(y, wavelet, "zero"), pairs)
    g = torch.randn_like(y)
    theirs, ours = trained(lambda x: grouped(x, wavelet), x, g), trained(lambda x: dwt(x, wavelet, "zero"), x, g)
    both, backend = ratio(theirs, ours, pairs), chosen("dwt", x, wavelet, "zero")
    return f"{size!s:>18} {name:>8} {backend:>8} {forward:8.2f} {inverse:8.2f} {both:17.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"float32, {arguments.threads} threads, median of {arguments.pairs} ratios of grouped convolutions over ours")
    print(f"{'size':>18} {'wavelet':>8} {'backend':>8} {'forward':>8} {'inverse':>8} {'forward+backward':>17}")
    for size in SIZES:
        for name in WAVELETS:
            print(measured(size, name, arguments.pairs), flush=True)


if __name__ == "__main__":
    main()
