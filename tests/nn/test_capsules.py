"""Capsules: their lengths, their order, their routing and their loss."""

from __future__ import annotations

import pytest
import torch

from convatlas.nn.capsules import CapsuleRouting, MarginLoss, capsule_length, primary_capsules, squash


def test_squashed_vectors_keep_their_direction_and_are_shorter_than_one():
    s = torch.randn(5, 4, dtype=torch.float64) * torch.tensor([[1e-3], [0.1], [1.0], [10.0], [1e3]])
    v, size = squash(s), s.norm(dim=-1)
    torch.testing.assert_close(v / v.norm(dim=-1, keepdim=True), s / size[:, None])
    torch.testing.assert_close(v.norm(dim=-1), size**2 / (1 + size**2), rtol=1e-2, atol=0)
    assert v.norm(dim=-1).max() < 1
    zero = torch.zeros(1, 3, requires_grad=True)
    capsule_length(squash(zero)).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_capsules_go_time_by_time():
    x = torch.arange(24.0).reshape(1, 4, 6)
    expected = torch.stack([x[0, 2 * group : 2 * group + 2, time] for time in range(6) for group in range(2)])
    torch.testing.assert_close(primary_capsules(x, 2)[0], squash(expected))
    with pytest.raises(ValueError, match=r"C divisible by capsule_dim 3, got \(1, 4, 6\)"):
        primary_capsules(x, 3)


def test_routing_agrees():
    u = torch.randn(2, 7, 3, dtype=torch.float64)
    routing = CapsuleRouting(7, 3, 4, 5).double()
    v, coupling = routing(u)
    torch.testing.assert_close(coupling.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    predictions = torch.einsum("nkoi,bni->bnko", routing.W, u)
    torch.testing.assert_close(v, squash((coupling[..., None] * predictions).sum(1)))
    # The last coupling follows what two rounds have agreed on.
    logits = torch.zeros(2, 7, 4, dtype=torch.float64)
    for _ in range(2):
        found = squash((logits.softmax(-1)[..., None] * predictions).sum(1))
        logits = logits + (predictions * found[:, None]).sum(-1)
    torch.testing.assert_close(coupling, logits.softmax(-1))
    routing.iterations = 1
    v, coupling = routing(u)
    torch.testing.assert_close(coupling, torch.full((2, 7, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(v, squash(predictions.sum(1) / 4))


def test_gradients_are_those_of_finite_differences():
    routing = CapsuleRouting(3, 2, 2, 2).double()
    u = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def loss(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        v = torch.func.functional_call(routing, {"W": weight}, (u,)).vectors
        return MarginLoss()(capsule_length(v), torch.tensor([0, 1]))

    assert torch.autograd.gradcheck(loss, (u, routing.W.detach().requires_grad_()))


def test_margins():
    labels = torch.tensor([0, 2])
    right = torch.tensor([[0.95, 0.1, 0.02], [0.05, 0.0, 0.9]])
    assert MarginLoss()(right, labels) == 0
    wrong = torch.tensor([[0.5, 0.1, 0.3], [0.05, 0.0, 0.9]])
    assert MarginLoss()(wrong, labels).item() == pytest.approx((0.4**2 + 0.5 * 0.2**2) / 2)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="must be at least 1, got 2, 3, 4, 5 and 0"):
        CapsuleRouting(2, 3, 4, 5, 0)
    with pytest.raises(ValueError, match=r"u must be \(B, 2, 3\), got \(1, 3, 3\)"):
        CapsuleRouting(2, 3, 4, 5)(torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"must be \(B, K\) and \(B\), got \(2, 3\), \(3,\)"):
        MarginLoss()(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
