"""WDSR: sizes, what it computes, initial weights, checkpoints of the authors, folding of its weight normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convatlas import create_model, load_weights
from convatlas.errors import CheckpointError, Unsupported
from convatlas.networks.registry import published_source
from convatlas.networks.wdsr import WDSR, WDSRConfig
from convatlas.restoration.upscaling import in_tiles
from convatlas.surgery import merge
from convatlas.training.measure import count_parameters

#: With the lengths of the weights, and without them: as they are delivered.
PARAMETERS = {2: (1_190_100, 1_187_484), 3: (1_195_605, 1_192_959), 4: (1_203_312, 1_200_624)}


def filled(**changes: object) -> WDSR:
    model = WDSR(WDSRConfig(dim=4, depth=2, expansion=3).override(**changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("scale", PARAMETERS)
def test_parameter_counts_are_the_published_ones(scale: int):
    with torch.device("meta"):
        model = create_model(f"wdsr_x{scale}")
        assert count_parameters(model) == PARAMETERS[scale][0]
    lengths = sum(value.numel() for name, value in model.named_parameters() if name.endswith("original0"))
    assert PARAMETERS[scale][0] - lengths == PARAMETERS[scale][1]


def test_folding_changes_nothing():
    model = filled().double().eval()
    folded = merge(model).model
    assert count_parameters(folded) == count_parameters(model) - (4 + 2 * (12 + 4) + 12 + 12)
    x = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_first_weights_have_their_lengths():
    model = WDSR(WDSRConfig(depth=4))
    lengths = {name: value for name, value in model.named_parameters() if name.endswith("original0")}
    wanted = {"body.0": 1.0, "body.2.body.0": 2.0, "body.2.body.2": 0.5, "body.5": 1.0, "skip.0": 1.0}
    for layer, length in wanted.items():
        assert (lengths[f"{layer}.parametrizations.weight.original0"] == length).all()
    assert not any(value.any() for name, value in model.named_parameters() if name.endswith("bias"))


def test_the_image_is_centred_and_left_as_it_was():
    model = filled()
    x = torch.full((1, 3, 6, 6), 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    torch.testing.assert_close(model(x), torch.full((1, 3, 12, 12), 0.5))
    assert (x == 0.5).all()
    leaf = torch.rand(1, 3, 5, 5, requires_grad=True)
    model(leaf).sum().backward()
    assert leaf.grad is not None


def test_an_image_that_keeps_its_size_is_added_as_it_is():
    model = filled(scale=1)
    assert not len(model.skip)
    nn.init.zeros_(model.body[-1].parametrizations.weight.original0)
    nn.init.zeros_(model.body[-1].bias)
    x = torch.rand(1, 3, 6, 5)
    torch.testing.assert_close(model(x), x)


def test_it_works_in_tiles_and_on_several_frames():
    model = filled(scale=3, depth=1, dim=3).double().eval()
    assert model.reach == 4
    x = torch.rand(1, 3, 21, 17, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(in_tiles(model, x, tile=6), model(x))
    burst = filled(frames=3)
    assert burst(*burst.example_inputs(2)).shape == (2, 3, 128, 128)


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def test_checkpoints_of_the_authors_load_completely():
    source, model = filled(), filled()
    state = authors(source.state_dict())
    shapes = {
        "body.0.weight_g": (4, 1, 1, 1),
        "body.2.body.2.weight_v": (4, 12, 3, 3),
        "skip.0.weight_v": (12, 3, 5, 5),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    optimizer = {"state": {0: {"exp_avg": torch.zeros(4)}}}
    file = {"model_state_dict": state, "optimizer_state_dict": optimizer, "lr_scheduler_state_dict": {}, "epoch": 30}
    report = load_weights(model, file)
    assert report.differences() == []
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"enlarges 3 times, the model 2 times|body\.3"):
        load_weights(filled(), authors(filled(scale=3).state_dict()))
    with pytest.raises(Unsupported, match="must be downloaded by hand"):
        published_source("wdsr_x2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"expansion": 0}, "expansion must be at least 1, got 0"),
        ({"frames": 2}, "frames must be odd, got 2"),
        ({"scale": 0}, "scale must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_networks_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WDSRConfig().override(**changes)
