"""Many small networks as one give what each gives alone, gradients included."""

from __future__ import annotations

import pytest
import torch

from convatlas.networks.forecasters import ForecasterStack
from convatlas.networks.registry import create_model


@pytest.mark.parametrize(
    ("kind", "options"),
    [("lstm", {}), ("lstm", {"num_layers": 2, "calendar": 0}), ("cnn", {"lags": 5}), ("cnn", {}), ("cnn_lstm", {})],
)
def test_a_stack_gives_what_its_networks_give(kind, options):
    networks = [create_model(f"forecast_{kind}", **options) for _ in range(3)]
    stack = ForecasterStack(networks)
    rows = torch.randn(3, 6, networks[0].config.lags + networks[0].config.calendar)
    expected = torch.stack([network(x) for network, x in zip(networks, rows, strict=True)])
    torch.testing.assert_close(stack(rows), expected)
    stack(rows).square().sum().backward()
    expected.square().sum().backward()
    for name, weight in zip(stack.names, stack.weights, strict=True):
        each = torch.stack([dict(network.named_parameters())[name].grad for network in networks])
        torch.testing.assert_close(weight.grad, each, rtol=1e-4, atol=1e-5)
    others = [create_model(f"forecast_{kind}", **options) for _ in range(3)]
    stack.unstack(others)
    torch.testing.assert_close(torch.stack([n(x) for n, x in zip(others, rows, strict=True)]), expected)


def test_unlike_networks_are_refused():
    with pytest.raises(ValueError, match="all of one config, got 2"):
        ForecasterStack([create_model("forecast_lstm"), create_model("forecast_lstm", lags=5)])
    with pytest.raises(ValueError, match="at least one"):
        ForecasterStack([])
