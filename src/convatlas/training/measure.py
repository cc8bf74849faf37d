"""What a model costs on this machine, and where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

__all__ = ["count_parameters", "latency", "provenance"]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def latency(model: nn.Module, *inputs: Tensor, repeats: int = 20) -> float:
    """Median time of one forward pass in evaluation mode, in milliseconds, after a warm-up."""
    training = model.training
    model.eval()
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        model(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize(inputs[0].device)
        times.append(1000 * (time.perf_counter() - start))
    model.train(training)
    return statistics.median(times[3:])


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
        **more,
    }
