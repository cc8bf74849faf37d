"""FFDNN and the plain networks for time series beyond what the battery tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convatlas.errors import Unsupported
from convatlas.networks.ffdnn import FFDNN, FFDNNConfig, explain
from convatlas.networks.registry import create_model
from convatlas.nn.capsules import capsule_length, primary_capsules
from convatlas.training.measure import count_parameters

SMALL: dict[str, Any] = {"length": 9, "widths": (4, 8), "capsule_dim": 4, "class_dim": 3}


def test_parameters_and_names():
    with torch.device("meta"):
        model = create_model("ffdnn_small")
    assert count_parameters(model) == 5840
    block = {"bn.bias", "bn.num_batches_tracked", "bn.running_mean", "bn.running_var", "bn.weight"}
    block |= {"fourier.bias", "fourier.weight", "local.bias", "local.weight"}
    assert set(model.state_dict()) == {f"blocks.{i}.{name}" for i in (0, 1) for name in block} | {"caps.W"}
    assert model.caps.W.shape == (48, 3, 6, 4)
    assert model.blocks[1].fourier.weight.shape == (8, 8, 13, 2)


def test_the_importance_of_dates_is_the_coupling_of_their_capsules():
    model, x = create_model("ffdnn", **SMALL).double().eval(), torch.randn(2, 2, 9, dtype=torch.float64)
    found = explain(model, x)
    v, coupling = model.caps(primary_capsules(model.blocks(x), 4))
    assert found.importance.shape == (2, 3, 9, 2)
    torch.testing.assert_close(found.importance[1, 2, 5, 1], coupling[1, 5 * 2 + 1, 2])
    torch.testing.assert_close(found.importance.sum(1), torch.ones(2, 9, 2, dtype=torch.float64))
    torch.testing.assert_close(found.over_time, found.importance.mean(-1))
    torch.testing.assert_close(found.scores, model(x))
    torch.testing.assert_close(found.vectors, v)
    torch.testing.assert_close(model.probabilities(model(x)).sum(1), torch.ones(2, dtype=torch.float64))


def test_the_decoder_is_trained_with_the_right_capsule_and_can_be_traversed():
    model = create_model("ffdnn", **SMALL, decoder=True).eval()
    x, labels = torch.randn(3, 2, 9), torch.tensor([2, 0, 1])
    v = model.capsules(x).vectors
    margin = model.margin(capsule_length(v), labels)
    error = (model.reconstruct(v, labels) - x.sigmoid()).square().sum((1, 2)).mean()
    torch.testing.assert_close(model.training_loss(x, labels), margin + 0.0005 * error)
    model.training_loss(x, labels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    made = model.traverse(x, (-0.5, 0.0))
    assert made.shape == (3, 3, 2, 2, 9)
    best = model(x).argmax(1)
    torch.testing.assert_close(made[:, 0, 1].sigmoid(), model.reconstruct(v, best))
    moved = v.clone()
    moved[torch.arange(3), best, 2] -= 0.5
    torch.testing.assert_close(made[:, 2, 0].sigmoid(), model.reconstruct(moved, best))
    with pytest.raises(Unsupported, match="decoder=True"):
        create_model("ffdnn", **SMALL).traverse(x)


@pytest.mark.parametrize("name", ["ffdnn_small", "sequence_cnn", "sequence_capsnet", "sequence_gru", "sequence_lstm"])
def test_a_few_steps_learn_which_half_of_a_series_is_high(name: str):
    torch.manual_seed(0)
    labels = torch.arange(24) % 2
    x = 0.3 * torch.randn(24, 1, 8)
    x[labels == 0, :, :4] += 1.5
    x[labels == 1, :, 4:] += 1.5
    options = {} if name in ("sequence_gru", "sequence_lstm") else {"widths": (4, 8)}
    model = create_model(name, in_channels=1, num_classes=2, length=8, **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model.training_loss(x, labels).backward()
        optimizer.step()
    assert (model.eval()(x).argmax(1) == labels).double().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": ()}, r"widths must be at least one number of at least 1, got \(\)"),
        ({"capsule_dim": 5}, "channels 8 must be divisible by capsule_dim, got 5"),
        ({"length": 7}, "length must be at least 8 steps, got 7"),
        ({"num_classes": 0}, "in_channels and num_classes must be at least 1, got 2 and 0"),
        ({"modes": 9}, "frequencies must be from 0 to 4 for length 9, got modes 9"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FFDNN(FFDNNConfig(**{**SMALL, **arguments}))
    with pytest.raises(ValueError, match=r"x must be \(B, 2, 9\), got \(1, 2, 10\)"):
        create_model("ffdnn", **SMALL)(torch.zeros(1, 2, 10))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sequence_cnn", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ("sequence_gru", {"cell": "rnn"}, "cell must be 'gru' or 'lstm', got 'rnn'"),
        ("sequence_gru", {"hidden": 0}, "hidden and depth must be at least 1, got 0 and 1"),
    ],
)
def test_impossible_settings_of_plain_networks_are_named(name: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, **arguments)
