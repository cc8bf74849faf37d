"""Ceilings of machines, published and measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from convatlas.errors import unknown

__all__ = ["MACHINES", "Machine", "find_machine", "measure_machine"]

#: Sides of the square matrices whose product gives the peak, and times that each is multiplied.
_GEMM_SIDES, _GEMM_REPEATS = (256, 512, 1024, 2048), 3
#: Seconds of a product beyond which no larger one is tried; half precision is slow on many CPUs.
_LONGEST = 0.5
#: Least and most bytes of the array whose copy gives the bandwidth, how many last-level caches it is between them.
_COPIED, _CACHES, _COPIES = (2**26, 2**30), 8, 3


@dataclass(frozen=True)
class Machine:
    """Ceilings of a machine in one precision.

    Attributes:
        peak_ops: operations a second at most, two for a multiply-add.
        bandwidth: bytes a second between memory and chip, reads and writes together.
        name: what it is called.
        bytes_per_element: size of an element in that precision; None leaves it to the tensors of a model.

    Raises:
        ValueError: a ceiling is not positive.
    """

    peak_ops: float
    bandwidth: float
    name: str = "machine"
    bytes_per_element: float | None = None

    def __post_init__(self) -> None:
        for name in ("peak_ops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def balance(self) -> float:
        """Operations that it can do in the time that it moves one byte in."""
        return self.peak_ops / self.bandwidth


# Published in the makers' data sheets, without sparsity: 10^12 operations a second, 10^12 bytes a second.
_PUBLISHED = {
    "a100": ({"fp16": 312.0, "tf32": 156.0, "fp32": 19.5}, 2.039),
    "h100": ({"fp16": 989.4, "tf32": 494.7, "fp32": 66.9}, 3.35),
    "h200": ({"fp16": 989.4, "tf32": 494.7, "fp32": 66.9}, 4.8),
    "a5000": ({"fp16": 111.1, "tf32": 55.6, "fp32": 27.8}, 0.768),
}

#: GPUs by name and precision, e.g. ``"h200_fp16"``; the numbers are those of the data sheets (SXM forms, A100 80 GB).
MACHINES: dict[str, Machine] = {
    f"{card}_{precision}": Machine(
        1e12 * peak, 1e12 * bandwidth, f"{card.upper()}, {precision}", 2 if precision == "fp16" else 4
    )
    for card, (peaks, bandwidth) in _PUBLISHED.items()
    for precision, peak in peaks.items()
}


def find_machine(name: str) -> Machine:
    """One of `MACHINES`; a card's name alone means half precision.

    Raises:
        UnknownName: there is no such machine; the message offers the nearest names.
    """
    full = name if name in MACHINES else f"{name}_fp16"
    if full not in MACHINES:
        raise unknown("machine", name, MACHINES)
    return MACHINES[full]


def measure_machine(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Machine:
    """Measure the ceilings of this machine, with as many threads as torch uses; once for each dtype and device.

    The peak is the best of square matrix products with sides from 256 to 2048. The bandwidth is that of a copy of an
    array of eight times the last-level cache, at most 1 GiB, two bytes for each byte copied.
    """
    return _measured_machine(dtype, str(torch.device(device)), torch.get_num_threads())


@functools.cache
def _measured_machine(dtype: torch.dtype, device: str, threads: int) -> Machine:
    best = 0.0
    for side in _GEMM_SIDES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(functools.partial(torch.mm, a, b), device, _GEMM_REPEATS)
        best = max(best, 2 * side**3 / seconds)
        if seconds > _LONGEST:
            break
    least, most = _COPIED
    source = torch.ones(min(max(least, _CACHES * _last_level_cache()), most), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(functools.partial(target.copy_, source), device, _COPIES)
    number = "1 thread" if threads == 1 else f"{threads} threads"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"this machine, {number}"
    return Machine(best, 2 * source.numel() / seconds, f"{name}, {str(dtype).removeprefix('torch.')}")


def _fastest(call: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def _last_level_cache() -> int:
    """Bytes, where the system tells."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()
        return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
    except (OSError, ValueError):
        return 0
