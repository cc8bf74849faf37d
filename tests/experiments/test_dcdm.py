"""The experiment on DCDM, at a scale that only shows that it runs."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch
from torch import nn

from convatlas import create_model
from convatlas.data.linear_systems import random_system, write_binary_matrix, write_binary_vector
from convatlas.errors import DataError
from convatlas.experiments import dcdm
from convatlas.networks.dcdm import DCDMNetConfig
from convatlas.ops.poisson import PoissonOperator


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    small = {"SEEDS": (5, 6), "SMALL": 8, "LARGE": 12, "LANCZOS_STEPS": 40, "VECTORS": 40, "STEPS": 20, "MAX_ITER": 20}
    for name, value in {**small, "RIGHT_HAND_SIDES": (1,), "NETWORK": DCDMNetConfig(ndim=2, width=3)}.items():
        monkeypatch.setattr(dcdm, name, value)
    report = dcdm.run("quick")
    assert len(report.claims) == 3
    assert all(claim.seeds == 2 for claim in report.claims)
    assert "ended after 20 iterations" in report.to_json()
    assert len(report.to_html()) > 10_000


def test_means_are_of_the_systems_that_are_meant():
    systems = [random_system((side, side), 0, hole=hole) for side in (4, 6) for hole in (False, True)]
    solves = [dcdm._timed(system, "CG", dcdm.cg) for system in systems]
    counts = [each.result.iterations for each in solves]
    assert dcdm._mean_iterations(solves, solver="CG") == sum(counts) / 4
    assert dcdm._mean_iterations(solves, solver="CG", side=4) == sum(counts[:2]) / 2
    assert dcdm._mean_iterations(solves, solver="CG", side=6, kind="hole") == counts[3]


def test_full_test_reads_the_published_files(tmp_path: Path):
    torch.manual_seed(0)
    folder = tmp_path / "trained_models" / "model_N64_from64_F32"
    folder.mkdir(parents=True)
    layers = [module for module in create_model("dcdm_64").modules() if isinstance(module, nn.Conv3d)]
    with h5py.File(folder / "model.h5", "w") as file:
        for number, layer in enumerate(layers):
            name = "conv3d" + (f"_{number}" if number else "")
            file[f"{name}/{name}/kernel:0"] = layer.weight.detach().permute(2, 3, 4, 1, 0).numpy()
            file[f"{name}/{name}/bias:0"] = layer.bias.detach().numpy()
        file["dense/dense/kernel:0"], file["dense/dense/bias:0"] = torch.ones(16, 1).numpy(), torch.zeros(1).numpy()
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(DataError, match=r"must hold model_N64.../model\.h5 or model_N128.../model\.h5, and \.bin"):
        dcdm.run("full", data=tmp_path)
    write_binary_matrix(data / "A_1.bin", PoissonOperator((4, 4, 4)).to_csr())
    write_binary_vector(data / "b_1.bin", random_system((4, 4, 4), 1).b)
    report = dcdm.run("full", data=tmp_path)
    assert len(report.claims) == 2
    assert "model_N64_from64_F32 needs about an order of magnitude fewer" in report.claims[0].statement
    assert torch.cuda.is_available() or report.claims[1].verdict == "cannot be told at this scale"
    text = report.to_json()
    assert all(solver in text for solver in ("IC CG", "deflated CG", "b_1"))


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data"):
        dcdm.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        dcdm.run("slow")  # type: ignore[arg-type]
