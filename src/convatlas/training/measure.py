"""What a model or a call costs on this machine, and where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.allocator import allocator

__all__ = ["count_parameters", "kept_bytes", "latency", "peak_bytes", "provenance"]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def latency(model: nn.Module, *inputs: Any, repeats: int = 20, warm_up: int = 3) -> float:
    """Median time of one forward pass in evaluation mode, in milliseconds, after passes to warm up."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    times = []
    for _ in range(repeats + warm_up):
        start = time.perf_counter()
        model(*inputs)
        if isinstance(inputs[0], Tensor) and inputs[0].is_cuda:
            torch.cuda.synchronize(inputs[0].device)
        times.append(1000 * (time.perf_counter() - start))
    for module, mode in modes:
        module.training = mode
    return statistics.median(times[warm_up:])


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most memory that torch's tensors took during a call beyond what they took before, what it returns included.

    Counted is what is asked of torch's allocators, whatever operators or their backends ask it for; oneDNN's and MKL's
    own buffers are not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    events = recorded.profiler.kineto_results.events()
    taken = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        taken += size
        most = max(most, taken)
    return most


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    # Torch's profiler tells on standard error that it starts and stops, unless it is told not to at its first use.
    name = "KINETO_LOG_LEVEL"
    added = name not in os.environ
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if added:
            del os.environ[name]


def kept_bytes(call: Callable[[], Any], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct tensors that a call keeps for its backward pass; views of one tensor count once.

    Args:
        call: runs with gradients; what it returns is let go of.
        without: tensors that do not count, such as the parameters.
    """
    other = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in other:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(kept.values())


def provenance(**more: str) -> Mapping[str, str]:
    """Versions, command, date and device, for the footer of a report."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "convatlas": version("convatlas"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "allocator": allocator(),
        **more,
    }
