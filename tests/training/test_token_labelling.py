"""Token labelling: the loss, targets from a teacher, MixToken in a step, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.training.token_labelling import TokenLabelling, teacher_targets, token_label_loss

TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "head_dim": 4, "num_classes": 3}


def distributions(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


def test_loss_of_plain_targets_is_cross_entropy() -> None:
    scores, tokens = torch.randn(4, 3), torch.randn(4, 6, 3)
    labels = torch.tensor([0, 2, 1, 1])
    targets = F.one_hot(labels, 3).float()
    expected = 2 * F.cross_entropy(scores, labels) + 0.5 * F.cross_entropy(
        tokens.flatten(0, 1), labels.repeat_interleave(6)
    )
    loss = token_label_loss(scores, tokens, targets, class_weight=2, token_weight=0.5)
    torch.testing.assert_close(loss, expected)


def test_mixed_targets_follow_the_area_of_the_box() -> None:
    scores, tokens = torch.randn(2, 3), torch.randn(2, 6, 3)
    targets = torch.eye(3)[:2]
    mixed = token_label_loss(scores, tokens, targets, (0, 0, 1, 2), token_weight=0)
    torch.testing.assert_close(mixed, F.cross_entropy(scores, 2 / 3 * targets + 1 / 3 * targets.flip(0)))


def test_ground_truth_counts_half_where_the_teacher_agrees() -> None:
    scores, tokens = torch.zeros(2, 3), torch.zeros(2, 1, 3)
    scores[:, 0] = 2.0
    truth = torch.eye(3)[[0, 0]]
    teacher = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    targets = torch.stack([truth, teacher, teacher], dim=2)
    share = torch.tensor([[0.5], [0.9]])
    expected = F.cross_entropy(scores, share * teacher + (1 - share) * truth)
    torch.testing.assert_close(token_label_loss(scores, tokens, targets, token_weight=0, ground_truth=True), expected)
    torch.testing.assert_close(
        token_label_loss(scores, tokens, targets, token_weight=0), F.cross_entropy(scores, teacher)
    )


def test_wrong_targets_are_named() -> None:
    with pytest.raises(ValueError, match=r"targets must be \(2, 3\) or \(2, 3, 8\), got \(2, 3, 5\)"):
        token_label_loss(torch.ones(2, 3), torch.ones(2, 6, 3), torch.ones(2, 3, 5))


@pytest.mark.parametrize("grid", [(1, 2), (2, 4), (3, 5)])
def test_teacher_names_image_and_tokens(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    teacher: Any = create_model("uniformer_small", **TINY).eval()
    images, truth = torch.randn(2, 3, 64, 128), distributions(2, 3).float()
    targets = teacher_targets(teacher, images, truth, grid)
    assert targets.shape == (2, 3, 2 + grid[0] * grid[1])
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(1), torch.ones(2, targets.shape[2]))
    assert torch.equal(targets[:, :, 0], truth)
    torch.testing.assert_close(targets[:, :, 1], teacher(images).softmax(1))
    if grid == (2, 4):  # the teacher's own positions
        last = teacher.forward_features(images)[-1]
        each = teacher.head(last.movedim(1, -1)).softmax(-1).flatten(1, 2)
        torch.testing.assert_close(targets[:, :, 2:], each.transpose(1, 2))


class _Recorder(nn.Module):
    """A network that remembers the box it was given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.boxes = network, []  # type: ignore[var-annotated]
        self.feature_info = network.feature_info

    def forward(self, x: Tensor, box: Any) -> Any:
        self.boxes.append(box)
        return self.network(x, box)


def test_a_step_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model: Any = create_model("uniformer_small_tl", **TINY).train()
    batch = {"image": torch.randn(4, 3, 64, 64), "label": torch.tensor([0, 1, 2, 0])}

    def never(*_: Any) -> dict[str, Tensor]:
        raise AssertionError("the plain losses are not needed")

    method = TokenLabelling()
    assert method.prepare(model) is model
    recorder = _Recorder(model)
    for _ in range(8):
        loss = method.losses(recorder, batch, never)["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len({*recorder.boxes}) > 4
    assert all(0 <= top <= bottom <= 16 and 0 <= left <= right <= 16 for top, left, bottom, right in recorder.boxes)
    given = {**batch, "token_label": distributions(4, 3, 2 + 4).float()}
    plain = TokenLabelling(mix=False, class_weight=0.5)
    model.eval()
    output = model(batch["image"], (0, 0, 0, 0))
    expected = token_label_loss(output.image, output.tokens, given["token_label"], class_weight=0.5)
    torch.testing.assert_close(plain.losses(model, given, never)["loss"], expected)


def test_a_teacher_makes_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher: Any = create_model("uniformer_small", **TINY)
    monkeypatch.setattr("convatlas.training.token_labelling.create_model", lambda *_, **__: teacher)
    model: Any = create_model("uniformer_small_tl", **TINY).eval()
    method = TokenLabelling(teacher="uniformer_small", mix=False, ground_truth=True, label_smoothing=0.0)
    batch = {"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 2])}
    loss = method.losses(method.prepare(model), batch, lambda *_: {})["loss"]
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = model(batch["image"], (0, 0, 0, 0))
    targets = teacher_targets(teacher, batch["image"], F.one_hot(batch["label"], 3).float(), (2, 2))
    torch.testing.assert_close(loss, token_label_loss(output.image, output.tokens, targets, ground_truth=True))
    assert method.losses(model, {"image": torch.empty(0, 3, 64, 64), "unreadable": ["a"]}, lambda *_: {}) == {}


def test_teachers_of_other_classes_or_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("uniformer_small_tl", **TINY)
    for changes, message in (
        ({"num_classes": 4}, "teacher must name the 3 classes of the network"),
        ({"preprocess": {"mean": (0.5,)}}, r"teacher expects images with mean \(0\.5,\), the network gets"),
    ):
        other = create_model("uniformer_small", **{**TINY, **changes})
        monkeypatch.setattr("convatlas.training.token_labelling.create_model", lambda *_, other=other, **__: other)
        with pytest.raises(Unsupported, match=message):
            TokenLabelling(teacher="uniformer_small").prepare(model)


def test_networks_without_a_token_head_are_refused() -> None:
    with pytest.raises(Unsupported, match="UniFormer has no token head"):
        TokenLabelling().prepare(create_model("uniformer_small", **TINY))
    with pytest.raises(ValueError, match=r"must not be negative, got -1 and 1\.0"):
        TokenLabelling(class_weight=-1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        TokenLabelling(label_smoothing=1)
