"""Options and settings that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if not os.path.exists("/dev/nvidiactl"):  # Triton reads this once, when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parent / "golden" / "cases"
    parser.addoption("--golden", type=Path, default=default, help="folder of reference cases to check against")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick the first case of every test that starts no process and trains nothing."""
    seen: set[tuple[Path, str]] = set()
    for item in items:
        test = (item.path, getattr(item, "originalname", item.name))
        long = item.get_closest_marker("slow") or {"cli", "experiments", "recognition"} & set(item.path.parts)
        if test not in seen and not long:
            item.add_marker("quick")
        seen.add(test)


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    """One thread, since the suite runs one process a core; and the same random numbers whatever ran before."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
