"""DCDM's networks: their size, the authors' layout, and volumes that are passed in pairs."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch
from torch import nn

from convatlas import create_model, load_weights
from convatlas.errors import CheckpointError
from convatlas.networks import dcdm
from convatlas.networks.dcdm import DCDMNetConfig
from convatlas.networks.registry import model_config


@pytest.mark.parametrize(("name", "parameters"), [("dcdm_64", 97_457), ("dcdm_128", 152_881)])
def test_parameters_are_as_published(name: str, parameters: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == parameters
        flat = create_model(name.replace("dcdm_", "dcdm_2d_"))
    assert len(list(flat.parameters())) == len(list(create_model(name).parameters()))


def write_keras(path: Path, model: nn.Module, *, first: int = 0, nested: bool = True, root: str = "") -> None:
    """As Keras writes the weights of layers that were made in the order of the model's."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    with h5py.File(path, "w") as file:
        for number, layer in enumerate(layers, first):
            name = f"conv{layer.weight.dim() - 2}d" + (f"_{number}" if number else "")
            kernel = layer.weight.detach().movedim((0, 1), (-1, -2)).numpy()
            for part, values in (("kernel", kernel), ("bias", layer.bias.detach().numpy())):
                file[f"{root}{name}/{name}/{part}:0" if nested else f"{root}{name}/{part}"] = values
        kernel, bias = model.out.weight.detach().T.numpy(), model.out.bias.detach().numpy()
        for part, values in (("kernel", kernel), ("bias", bias)):
            file[f"{root}dense/dense/{part}:0" if nested else f"{root}dense/{part}"] = values


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("dcdm_64", {}),
        ("dcdm_128", {"nested": False}),  # more than ten layers: conv3d_10 comes after conv3d_2
        ("dcdm_2d_64", {"first": 17, "root": "model_weights/"}),
    ],
)
def test_authors_layout(tmp_path: Path, name: str, form: dict):
    torch.manual_seed(0)
    theirs, ours = (create_model(name, width=4) for _ in range(2))
    write_keras(tmp_path / "model.h5", theirs, **form)
    report = load_weights(ours, tmp_path / "model.h5")
    assert report.layout == "keras"
    assert not report.missing
    assert not report.unexpected
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_another_variant_is_told(tmp_path: Path):
    write_keras(tmp_path / "model.h5", create_model("dcdm_64", width=4))
    with pytest.raises(CheckpointError, match="it has 15 convolutions, the model 23: another variant fits"):
        load_weights(create_model("dcdm_128", width=4), tmp_path / "model.h5")


@pytest.mark.parametrize("below", [0, 200, 10**6], ids=["never", "half resolution", "everywhere"])
def test_single_volumes_passed_in_pairs_are_the_same(below: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = create_model("dcdm_64", width=4, depths=(1, 2, 1)).double().eval()
    two = torch.randn(2, 1, 8, 8, 6, dtype=torch.float64)
    with torch.inference_mode():
        monkeypatch.setattr(dcdm, "_SLOW_BELOW", 0)
        expected = model(two)[:1]
        monkeypatch.setattr(dcdm, "_SLOW_BELOW", below)
        torch.testing.assert_close(model(two[:1]), expected)


def test_structure_is_that_of_the_figure():
    torch.manual_seed(0)
    model = DCDMNetConfig(ndim=2, width=3, depths=(1, 1, 1)).build().double()
    x = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    a = model.a0(model.first(x)).relu()
    b = model.top[0][0](a).relu()
    a = model.top[0][1](b).relu() + a
    b = model.b_last(a).relu()
    p = b.reshape(1, 3, 2, 2, 3, 2).mean((3, 5))
    p = model.mid[0][1](model.mid[0][0](p).relu()).relu() + p
    u = p.repeat_interleave(2, 2).repeat_interleave(2, 3) + b
    u = model.up[0][1](model.up[0][0](u).relu()).relu() + u
    torch.testing.assert_close(model(x), model.out(u.movedim(1, -1)).movedim(-1, 1))


def test_mistakes_are_told():
    model = create_model("dcdm_2d_64", width=2)
    with pytest.raises(ValueError, match=r"r must have even sizes, because it is pooled by 2, got \(5, 4\)"):
        model(torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match=r"r must be \(B, 1, H, W\), got \(1, 2, 4, 4\)"):
        model(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="ndim must be 2 or 3, got 1"):
        DCDMNetConfig(ndim=1)
    with pytest.raises(ValueError, match="depths must be three numbers of at least 0"):
        model_config("dcdm_64", depths=(1, 2))
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        DCDMNetConfig(width=0)
