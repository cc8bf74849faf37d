"""The experiment on FFT convolution, at a scale that only shows that it runs and that its parts are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convatlas.experiments import flashfftconv
from convatlas.experiments.small_training import recipe_settings
from convatlas.networks.registry import model_config
from convatlas.nn.mixers.long_conv import LongConv
from convatlas.ops.frequency_sparse import frequency_sparse_conv
from convatlas.recognition.task import Recognition
from convatlas.training.optim import make_optimizer
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

UNKNOWN = "cannot be told at this scale"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


@pytest.mark.slow
def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"SEEDS": (0, 1), "LENGTHS": (256,), "SIZE": (4, 2, 64), "TRAIN_FRACTION": 0.05}
    small |= {"TRAINING": Training(epochs=1, batch_size=32, warmup_epochs=0)}
    small |= {"NETWORK": flashfftconv.NETWORK.override(channels=4)}
    for name, value in small.items():
        monkeypatch.setattr(flashfftconv, name, value)
    report = flashfftconv.run("quick")
    assert [claim.verdict for claim in report.claims] == ["holds"] * 4 + [UNKNOWN] * 3
    assert "Frequencies left out afterwards" in report.to_html()


def test_kernels_are_made_sparse_as_they_were_trained() -> None:
    model = flashfftconv.NETWORK.override(channels=3, depth=1, lam=0.001).build()
    sparse = flashfftconv._sparsified(model, (4, 5), (8, 16))
    before, after = (next(m for m in net.modules() if isinstance(m, LongConv)) for net in (model, sparse))
    taps = before.kernel.sign() * (before.kernel.abs() - 0.001).clamp(min=0)
    u = torch.randn(1, 3, 64)
    expected = frequency_sparse_conv(u, taps[0], 128, (4, 5), (8, 16), backend="naive")
    torch.testing.assert_close(frequency_sparse_conv(u, after.kernel[0], 128, 65), expected)
    assert after.lam == 0


@pytest.mark.slow
def test_full_runs_by_the_recipe_on_other_images_and_says_so(pictures: Path, tmp_path: Path) -> None:
    options = {"channels": 4, "depth": 1, "length": 8}
    report = flashfftconv.full(pictures, tmp_path, options=options, epochs=1, batch_size=4, warmup_epochs=0)
    assert report.claims[1].verdict == UNKNOWN
    assert report.claims[0].values[0] == pytest.approx(report.claims[1].values[0] - 50)


def test_the_recipe_is_the_network_of_the_paper_with_a_threshold_that_trains() -> None:
    task, training = split_settings(Recognition, recipe_settings("long_conv"))
    config = model_config(task.model, **task.options)
    assert (config.depth, config.lam, config.length) == (6, 0.001, 4096)
    model = config.override(channels=4, length=8).build()
    kernels = {id(block.conv.kernel) for block in model.blocks}
    groups = make_optimizer(model, training).param_groups
    assert kernels <= {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}


def test_budgets_are_checked() -> None:
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        flashfftconv.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        flashfftconv.run("slow")  # type: ignore[arg-type]
