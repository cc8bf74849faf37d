"""Large blocks of memory stay in the process where the command line runs, unless they are not to."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from convatlas import allocator

GLIBC = platform.libc_ver()[0] == "glibc"
# Page faults of writing 64 MiB that were freed before, after the heap has settled.
FAULTS = """
import resource, sys
import numpy as np
from convatlas.allocator import allocator, keep_large_blocks
took = keep_large_blocks()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(took, faults, allocator(), "torch" in sys.modules)
"""


def measured(switch: str) -> list[str]:
    source = str(Path(allocator.__file__).parents[1])
    environment = {**os.environ, "CONVATLAS_ALLOCATOR": switch, "PYTHONPATH": source}
    ended = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.split(maxsplit=2)


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_pages_are_kept_unless_it_is_switched_off():
    took, faults, rest = measured("1")
    assert (took, rest.strip()) == ("True", "large blocks are kept False")
    assert int(faults) < 100
    took, faults, rest = measured("0")
    assert (took, rest.strip()) == ("False", "as the system sets it False")
    assert int(faults) > 1000 or int(faults) >= 2**26 / 2**21  # of 4 KiB, or of 2 MiB where pages are huge


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator, "_kept", False)
    monkeypatch.delenv("CONVATLAS_ALLOCATOR", raising=False)
    for library in (OSError("no such file"), type("Musl", (), {})()):

        def load(name: str, library: object = library) -> object:
            if isinstance(library, OSError):
                raise library
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        assert allocator.keep_large_blocks() is False
        assert allocator.allocator() == "as the system sets it"


def test_what_the_library_refuses_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator, "_kept", False)
    monkeypatch.delenv("CONVATLAS_ALLOCATOR", raising=False)
    asked: list[tuple[int, int]] = []

    class Old:
        gnu_get_libc_version = None

        @staticmethod
        def mallopt(name: int, value: int) -> int:
            asked.append((name, value))
            return 0 if name == -3 else 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Old)
    assert allocator.keep_large_blocks() is False
    assert asked[0] == (-3, 2**30)
    monkeypatch.setattr(Old, "mallopt", staticmethod(lambda name, value: 1))
    assert allocator.keep_large_blocks() is True
    assert allocator.allocator() == "large blocks are kept"
