"""Speed and memory of `fft_conv` on a CPU beside what one would write with torch.fft; above 1 where ours wins.

python benchmarks/fft_conv.py --threads 2 --pairs 15
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from convatlas.ops.backend import chosen
from convatlas.ops.fft_conv import fft_conv, kernel_spectrum
from convatlas.ops.fourier import fast_length

Form = Callable[[Tensor, Tensor], Tensor]


def complex_form(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return torch.fft.ifft(torch.fft.fft(u, n) * torch.fft.fft(k, n), n).real[..., : u.shape[-1]]


def power_of_two_form(u: Tensor, k: Tensor) -> Tensor:
    return real_form(u, k, 1 << (u.shape[-1] + k.shape[-1] - 2).bit_length())


def good_size_form(u: Tensor, k: Tensor) -> Tensor:
    return real_form(u, k, fast_length(u.shape[-1] + k.shape[-1] - 1))


def real_form(u: Tensor, k: Tensor, n: int) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(k, n), n)[..., : u.shape[-1]]


FORMS: dict[str, Form] = {"complex": complex_form, "rfft 2^n": power_of_two_form, "rfft good": good_size_form}


def set_allocator() -> None:
    """Keep large blocks instead of faulting fresh pages at each call; the same for both sides."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def forward(form: Form, u: Tensor, k: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return form(u, k)

    return run


def training(form: Form, u: Tensor, k: Tensor, g: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    u, k = u.clone().requires_grad_(), k.clone().requires_grad_()
    return lambda: torch.autograd.grad(form(u, k), (u, k), g)


def kept_bytes(form: Form, u: Tensor, k: Tensor) -> int:
    """Bytes of the distinct tensors that a call keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = form(u.requires_grad_(), k.requires_grad_())
    del y
    return sum(kept.values())


def ratio(
    theirs: Callable[[], object], ours: Callable[[], object], pairs: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Median over pairs of their time by ours, and the spread of the middle half."""
    theirs(), ours()
    ratios = []
    for pair in range(pairs):
        times = {}
        for side in (theirs, ours) if pair % 2 else (ours, theirs):
            start = clock()
            side()
            times[side] = clock() - start
        ratios.append(times[theirs] / times[ours])
    quarters = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quarters[2] - quarters[0]


def check_equal(ours: object, theirs: object) -> None:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for a, b in pairs:
        error = ((a - b).abs().max() / b.abs().max()).item()
        if error > 1e-5:
            raise SystemExit(f"outputs differ by {error:.1e} of the largest value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--cases", default="long,short,million", help="groups of cases, separated by commas")
    arguments = parser.parse_args()
    if arguments.pairs < 15:
        parser.error("--pairs must be at least 15")
    torch.set_num_threads(arguments.threads)
    set_allocator()
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    groups = {
        "long": [(4, 64, 1 << power, 1 << power) for power in (10, 11, 12, 13)]
        + [(2, 32, 1 << power, 1 << power) for power in (14, 15, 16)],
        "short": [(1, 64, 16384, taps) for taps in (31, 63, 127, 255, 511, 1023)],
        "million": [(1, 4, 1 << 20, 1024)],
    }
    cases = [case for name in arguments.cases.split(",") for case in groups[name]]
    print(f"float32, {arguments.threads} threads, {arguments.pairs} pairs, median ratio theirs / ours (middle half)")
    print(f"{'B, C, L, K':>22} {'backend':>12} {'against':>10} {'forward':>12} {'cached k':>12} {'training':>12} kept")
    generator = torch.Generator().manual_seed(0)
    for batch, channels, length, taps in cases:
        u = torch.randn(batch, channels, length, generator=generator)
        k = torch.randn(channels, taps, generator=generator)
        g = torch.randn(u.shape, generator=generator)
        cached = kernel_spectrum(k, length)
        backend = chosen("fft_conv", u, k)
        ours = (
            forward(fft_conv, u, k),
            forward(lambda u, _, s=cached: fft_conv(u, s), u, k),
            training(fft_conv, u, k, g),
        )
        for name, form in FORMS.items():
            theirs = forward(form, u, k), forward(form, u, k), training(form, u, k, g)
            columns = []
            for a, b in zip(ours, theirs, strict=True):
                check_equal(a(), b())
                median, spread = ratio(b, a, arguments.pairs, clock)
                columns.append(f"{median:6.2f} ({spread:.2f})")
            share = kept_bytes(fft_conv, u.clone(), k.clone()) / kept_bytes(form, u.clone(), k.clone())
            label = f"{batch}, {channels}, {length}, {taps}"
            print(
                f"{label:>22} {backend:>12} {name:>10} {columns[0]:>12} {columns[1]:>12} {columns[2]:>12} {share:.3f}"
            )


if __name__ == "__main__":
    main()
