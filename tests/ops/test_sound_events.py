"""Sound event detection: spectrogram against scipy, targets and events, loss, score in both ways of counting."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from convatlas.ops.sound_events import (
    EventScore,
    sound_event_loss,
    sound_event_score,
    sound_event_spectrogram,
    sound_event_targets,
    sound_events,
)


def rows(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def test_spectrogram_is_the_one_of_scipy():
    signal = torch.randn(2, 3, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, _, expected = scipy.signal.stft(signal.numpy(), window="hamming", nperseg=512, noverlap=112)
    expected = expected[:, :, 1:, :10] * scipy.signal.get_window("hamming", 512).sum() / 512
    both = sound_event_spectrogram(signal, phases=True)
    assert both.shape == (2, 6, 256, 10)
    torch.testing.assert_close(both[:, :3], torch.from_numpy(np.abs(expected)))
    torch.testing.assert_close(both[:, 3:], torch.from_numpy(np.angle(expected) / np.pi))
    assert torch.equal(sound_event_spectrogram(signal), both[:, :3])


def test_spectrogram_of_a_minute_has_the_published_size():
    with torch.device("meta"):
        assert sound_event_spectrogram(torch.empty(1, 4, 60 * 32_000)).shape == (1, 4, 256, 4800)


def test_spectrogram_is_in_float32_at_least():
    signal = torch.randn(1, 1, 2000)
    exact, rough = sound_event_spectrogram(signal), sound_event_spectrogram(signal.bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=1e-2)


def test_targets_and_events_are_inverse():
    events = rows((0, 1), (2, 0), (2, 0), (2, 3), (4, 1), (4, 1), (4, 1))
    targets = sound_event_targets(events, frames=6, num_classes=4)
    assert targets.shape == (6, 12)
    assert targets.nonzero().tolist() == [[0, 3], [2, 0], [2, 1], [2, 9], [4, 3], [4, 4], [4, 5]]
    assert torch.equal(sound_events(targets), events)
    assert sound_events(torch.zeros(3, 6)).shape == (0, 2)
    assert not sound_event_targets(rows(), frames=2, num_classes=3, overlaps=1).any()


def test_a_half_is_no_event():
    just_above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert sound_events(torch.tensor([[0.5, just_above, 1.0, 0.49]]), overlaps=2).tolist() == [[0, 0], [0, 1]]


def test_loss_is_the_mean_over_all_entries_and_exact_in_half_precision():
    probabilities, targets = torch.tensor([[0.9, 0.2], [0.5, 0.7]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = -torch.tensor([0.9, 0.8, 0.5, 0.7]).log().mean()
    torch.testing.assert_close(sound_event_loss(probabilities, targets), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sound_event_loss(probabilities.bfloat16(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("predicted", "true", "counts", "legacy"),
    [
        (rows((0, 1), (0, 2)), rows((0, 2), (0, 3)), (1, 1, 1), (1, 1, 1)),
        (rows((0, 1), (0, 1)), rows((0, 1)), (1, 1, 0), (1, 1, 0)),
        (rows((0, 1)), rows((0, 1), (0, 1)), (1, 0, 1), (2, -1, 0)),  # one predicted event finds both
        (rows((3, 1), (3, 0)), rows(), (0, 2, 0), (0, 4, 0)),  # wrong twice
        (rows(), rows((3, 1), (5, 0)), (0, 0, 2), (0, 0, 4)),  # missed twice
        (rows((1, 1)), rows((2, 1)), (0, 1, 1), (0, 2, 2)),
        (rows(), rows(), (0, 0, 0), (0, 0, 0)),
    ],
)
def test_events_are_counted_by_frame_and_class(
    predicted: Tensor, true: Tensor, counts: tuple[int, int, int], legacy: tuple[int, int, int]
):
    assert tuple(sound_event_score(predicted, true)) == counts
    assert tuple(sound_event_score(predicted, true, legacy=True)) == legacy


def test_counts_are_right_for_many_events():
    generator = torch.Generator().manual_seed(1)
    predicted, true = (torch.randint(0, 6, (200, 2), generator=generator) for _ in range(2))
    score = sound_event_score(predicted, true)
    assert score.true_positives + score.false_positives == score.true_positives + score.false_negatives == 200
    both = sum(
        min(int((predicted == pair).all(1).sum()), int((true == pair).all(1).sum()))
        for pair in torch.cartesian_prod(torch.arange(6), torch.arange(6))
    )
    assert score.true_positives == both


def test_f_score_is_the_harmonic_mean():
    score = EventScore(6, 2, 4)
    assert (score.precision, score.recall) == (0.75, 0.6)
    assert score.f_score == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert EventScore(0, 0, 0).f_score == 0
    assert EventScore(0, 3, 0).f_score == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sound_event_spectrogram(torch.zeros(4, 1000)), r"signal must be \(B, C, samples\), got \(4, 1000\)"),
        (
            lambda: sound_event_spectrogram(torch.zeros(1, 1, 900), n_fft=511),
            "n_fft must be even .* got 511",
        ),
        (lambda: sound_event_spectrogram(torch.zeros(1, 1, 300)), "hop must be from 1 to the 300 samples .* got 400"),
        (lambda: sound_event_targets(rows((4, 0)), 4, 2), "frames below 4 and classes below 2"),
        (lambda: sound_event_targets(rows((0, -1)), 4, 2), "frames below 4 and classes below 2"),
        (lambda: sound_event_targets(rows((0, 0), (0, 0)), 4, 2, overlaps=1), "at most overlaps = 1 .* got 2"),
        (lambda: sound_events(torch.zeros(2, 3, 6)), r"probabilities must be .* got \(2, 3, 6\)"),
        (lambda: sound_events(torch.zeros(3, 7)), "overlaps must divide the 7 columns, got 3"),
        (lambda: sound_event_score(torch.zeros(2, 3), rows()), r"predicted must have rows .* got the shape \(2, 3\)"),
        (lambda: sound_event_score(rows(), torch.zeros(2, 2)), "true must be integers, got torch.float32"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
