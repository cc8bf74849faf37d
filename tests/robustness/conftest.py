"""A folder of small pictures and attacks, and thresholds that were calibrated on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from convatlas.cli.main import main
from robustness.pictures import attack, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for kind, make in (("benign", picture), ("attack", attack)):
        (root / kind).mkdir()
        for seed in range(10):
            Image.fromarray(make(seed)).save(root / kind / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    words = ["--data", str(folder / "benign"), "--attacks", str(folder / "attack"), "--size", "[12, 12]"]
    assert main(["train", "camouflage", *words, "--run", str(run)]) == 0
    return run
