"""Training towards orthogonal convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.orthogonality import deconv_orth_dist, l_orth, orth_dist
from convatlas.training.method import make_methods
from convatlas.training.orthogonality import (
    LorthRegularizer,
    Orthogonality,
    orthogonal_conv_init_,
    regularized_layers,
)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, 2, padding=1, groups=2),
        nn.Conv2d(4, 6, 1, 2),
        nn.Conv2d(6, 6, 2),
        nn.ConvTranspose2d(6, 4, 3, 2),
    )


def test_layers_without_an_orthogonal_form_are_named():
    regularizer = LorthRegularizer(net(), 0.5, exclude=("0",))
    assert [each.name for each in regularizer.layers] == ["2", "5"]
    assert regularizer.skipped == {
        "0": "its name is left out",
        "3": "M (6) exceeds C*k^2 (4): no row-orthogonal convolution exists",
        "4": "the theory requires odd kernels, received 2",
    }
    assert {each.name for each in regularized_layers(net()) if each.existence} == {"0", "2", "3", "5"}


def test_penalty_is_the_sum_over_the_layers():
    model = net()
    expected = l_orth(model[0].weight) + l_orth(model[2].weight, 2, 2) + l_orth(model[5].weight, 2)
    torch.testing.assert_close(LorthRegularizer(model, 0.5)(), 0.5 * expected)
    wang = LorthRegularizer(model[:4], 1.0, penalty="wang", exclude=("2",))
    expected = deconv_orth_dist(model[0].weight, 1, 1) + orth_dist(model[3].weight)
    torch.testing.assert_close(wang(), expected)


def test_method_is_added_to_the_losses_and_reaches_orthogonality():
    torch.manual_seed(0)
    (method,) = make_methods({"orthogonality": {"weight": 1.0, "include": ["0"]}}).values()
    model = method.prepare(net()[:2])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": 0 * model(batch).sum()}

    for _ in range(150):
        losses = method.losses(model, torch.randn(1, 3, 4, 4), loss_fn)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["orthogonality"] < 1e-3
    torch.testing.assert_close(losses["loss"].detach(), losses["orthogonality"])


def test_starts_orthogonal(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 3, groups=2))
    Orthogonality(init=True).prepare(model)
    assert "hard to optimise; so are 1" in caplog.text
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(model[0](x).norm(), x.norm())
    assert l_orth(model[1].weight, groups=2) < 1e-10
    conv = nn.ConvTranspose1d(4, 2, 3)
    orthogonal_conv_init_(conv, torch.Generator().manual_seed(0))
    assert l_orth(conv.weight) < 1e-10
    with pytest.raises(Unsupported, match="exceeds"):
        orthogonal_conv_init_(nn.Conv2d(4, 6, 1, 2))


def test_half_precision_keeps_the_penalty_in_single():
    model = net()[:1].bfloat16()
    for penalty in ("l_orth", "wang"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = LorthRegularizer(model, 1.0, penalty=penalty)()
        assert loss.dtype == torch.float32
    exact = l_orth(model[0].weight.float())
    torch.testing.assert_close(LorthRegularizer(model, 1.0)(), exact)
    assert F.mse_loss(exact, exact) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        Orthogonality(weight=-1)
    with pytest.raises(UnknownName, match="penalty"):
        Orthogonality(penalty="lorth")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="no convolution to be regularised"):
        Orthogonality().prepare(nn.Linear(2, 2))
    with pytest.raises(Unsupported, match="2-D"):
        LorthRegularizer(nn.Conv1d(2, 2, 3), penalty="wang")
