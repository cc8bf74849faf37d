"""Mixup and CutMix by their arithmetic."""

from __future__ import annotations

import pytest
import torch

from convatlas.data import mixing
from convatlas.data.mixing import mix, smooth_targets

TARGETS = torch.tensor([0, 2, 1, 2])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramps(batch: int = 4, height: int = 12, width: int = 10) -> torch.Tensor:
    """Image i is the constant i + 1 everywhere."""
    return torch.arange(1.0, batch + 1).reshape(-1, 1, 1, 1).expand(batch, 2, height, width).clone()


def test_smooth_targets() -> None:
    soft = smooth_targets(TARGETS, 4, 0.1)
    assert soft[1].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert torch.equal(smooth_targets(TARGETS, 3), torch.eye(3)[TARGETS])
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1, got 1.5"):
        smooth_targets(TARGETS, 3, 1.5)


def test_mixup_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "mixing_ratio", lambda alpha, source: 0.75 if alpha == 0.8 else None)
    images, before = ramps(), ramps()
    mixed, soft = mix(images, TARGETS, 3, mixup=0.8, cutmix=0.0, label_smoothing=0.3, generator=generator())
    assert torch.equal(images, before)
    assert mixed[:, 0, 0, 0].tolist() == [0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 3, 0.75 * 3 + 0.25 * 2, 3.25]
    assert soft[0].tolist() == pytest.approx([0.1 + 0.7 * 0.75, 0.1, 0.1 + 0.7 * 0.25])
    torch.testing.assert_close(soft.sum(1), torch.ones(4))


def test_cutmix_targets_follow_the_true_area() -> None:
    areas = set()
    for seed in range(40):
        images, before = ramps(), ramps()
        mixed, soft = mix(images, TARGETS, 3, mixup=0.0, cutmix=1.0, generator=generator(seed))
        assert torch.equal(images, before)
        pasted = mixed[0, 0] == 4
        assert set(mixed[0].unique().tolist()) <= {1.0, 4.0}
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert pasted.sum() == rows * columns  # one box
        share = pasted.float().mean().item()
        assert soft[0].tolist() == pytest.approx([1 - share, 0, share])
        assert torch.equal(mixed[3, 1] == 1, pasted)
        areas.add(round(share, 3))
    assert len(areas) > 15


def test_the_box_covers_its_share_and_is_clipped_at_the_border() -> None:
    boxes = [mixing.cut_box(100, 60, 0.75, generator(seed)) for seed in range(200)]
    assert all(0 <= top <= bottom <= 100 and 0 <= left <= right <= 60 for top, bottom, left, right in boxes)
    assert max(bottom - top for top, bottom, _, _ in boxes) == 50
    assert max(right - left for _, _, left, right in boxes) == 30
    assert min(bottom - top for top, bottom, _, _ in boxes) < 35


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_ratio_is_beta_distributed(alpha: float) -> None:
    source = generator(1)
    draws = torch.tensor([mixing.mixing_ratio(alpha, source) for _ in range(4000)])
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_switching_and_probability() -> None:
    kinds = []
    for seed in range(300):
        mixed, _ = mix(ramps(), TARGETS, 3, mixup=0.8, cutmix=1.0, switch_prob=0.3, prob=0.6, generator=generator(seed))
        if torch.equal(mixed, ramps()):
            kinds.append("none")
        else:
            kinds.append("mixup" if len(mixed[0].unique()) == 1 and mixed[0, 0, 0, 0] not in (1, 4) else "cutmix")
    shares = {kind: kinds.count(kind) / 300 for kind in ("none", "mixup", "cutmix")}
    assert shares["none"] == pytest.approx(0.4, abs=0.1)
    assert shares["mixup"] == pytest.approx(0.42, abs=0.1)
    assert shares["cutmix"] == pytest.approx(0.18, abs=0.08)
    for options in ({"mixup": 0.0, "cutmix": 0.0}, {"mixup": 1.0, "cutmix": 1.0, "prob": 0.0}):
        images, soft = mix(ramps(), TARGETS, 3, label_smoothing=0.1, generator=generator(), **options)
        assert torch.equal(images, ramps())
        assert torch.equal(soft, smooth_targets(TARGETS, 3, 0.1))


def test_the_generator_decides_everything() -> None:
    options = {"mixup": 0.8, "cutmix": 1.0}
    state = torch.get_rng_state()
    first = mix(ramps(), TARGETS, 3, generator=generator(7), **options)
    assert torch.equal(torch.get_rng_state(), state)
    again = mix(ramps(), TARGETS, 3, generator=generator(7), **options)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    torch.manual_seed(3)
    default = mix(ramps(), TARGETS, 3, **options)
    torch.manual_seed(3)
    assert torch.equal(default[0], mix(ramps(), TARGETS, 3, **options)[0])


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match=r"images must be .* floating point, got \(4, 12\)"):
        mix(torch.zeros(4, 12), TARGETS, 3, mixup=1.0, cutmix=0.0)
    with pytest.raises(ValueError, match=r"floating point, got .* torch.uint8"):
        mix(ramps().byte(), TARGETS, 3, mixup=1.0, cutmix=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        mix(ramps(), TARGETS, 3, mixup=-1.0, cutmix=0.0)


def test_half_precision_and_odd_batches() -> None:
    mixed, soft = mix(ramps(3).bfloat16(), TARGETS[:3], 3, mixup=1.0, cutmix=0.0, generator=generator())
    assert (mixed.dtype, soft.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(soft[1], torch.tensor([0.0, 0.0, 1.0]))


def test_clips_are_mixed_in_every_frame_alike() -> None:
    clips = torch.arange(2.0).reshape(2, 1, 1, 1, 1).expand(2, 1, 3, 10, 10)
    for seed in range(5):
        mixed, targets = mixing.mix(clips, torch.tensor([0, 1]), 2, mixup=0.0, cutmix=1.0, generator=generator(seed))
        assert torch.equal(mixed, mixed[:, :, :1].expand_as(mixed))
        torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), targets[:, 1])
