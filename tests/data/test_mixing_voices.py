"""Mixtures made of voices: levels, seeds, joining, silence and damage; and pieces of given ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.data.audio import read_audio, write_audio
from convatlas.data.image_files import Unreadable
from convatlas.data.mixing_voices import (
    Given,
    Made,
    Maker,
    MixedPieces,
    Mixing,
    Mixtures,
    Recording,
    Voices,
    Waveform,
    WholeMixtures,
    collate_mixtures,
)
from convatlas.errors import DataError


def noise(seed: int, samples: int, level: float = 0.1) -> Waveform:
    values = np.random.default_rng(seed).normal(0, level, samples).astype(np.float32)
    return Waveform(f"{seed}", values)


def voices(samples: int = 500, speakers: int = 3) -> Voices:
    return Voices({f"s{n}": [noise(10 * n + k, samples, 0.1 * (n + 1)) for k in range(4)] for n in range(speakers)})


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10((a**2).sum() / (b**2).sum()))


def test_a_mixture_is_the_sum_of_its_sources_at_the_levels_asked_for():
    maker = Maker(voices(), "sep_clean", 3, 400, Mixing(snr=(2.0, 2.0)))
    mixed = maker.make(np.random.default_rng(0))
    assert (mixed.mixture.shape, mixed.sources.shape, mixed.mixture.dtype) == ((400,), (3, 400), np.float32)
    np.testing.assert_allclose(mixed.sources.sum(0), mixed.mixture, atol=1e-6)
    for row in (1, 2):
        assert decibels(mixed.sources[0], mixed.sources[row]) == pytest.approx(2, abs=1e-3)
    assert np.abs(mixed.mixture).max() == pytest.approx(0.9)
    assert len(set(mixed.name.split(" + "))) == 3
    ratios = []
    for seed in range(60):
        one, two = Maker(voices(), "sep_clean", 2, 400, Mixing()).make(np.random.default_rng(seed)).sources
        ratios.append(decibels(one, two))
    assert -5.01 < min(ratios) < -3 < 3 < max(ratios) < 5.01


@pytest.mark.parametrize("task", ["sep_noisy", "enh_single", "enh_both"])
def test_scenarios_with_noise(task: Any):
    speakers = 1 if task == "enh_single" else 2
    mixing = Mixing(snr=(0.0, 0.0), noise_snr=(6.0, 6.0))
    maker = Maker(voices(), task, speakers, 400, mixing, [noise(99, 1000, 3.0)])
    mixed = maker.make(np.random.default_rng(1))
    assert mixed.sources.shape == (2 if task == "sep_noisy" else 1, 400)
    rest = mixed.mixture - mixed.sources.sum(0)
    speech = mixed.sources[0] if task != "enh_both" else mixed.sources[0] / np.sqrt(2)
    assert decibels(speech, rest) == pytest.approx(6, abs=0.5)
    with pytest.raises(DataError, match=f"the scenario {task} needs noise"):
        Maker(voices(), task, speakers, 400, mixing)


def test_short_recordings_are_joined_and_long_ones_cut():
    ramp = Waveform("ramp", np.arange(1, 101, dtype=np.float32))
    long = Maker(Voices({"a": [ramp]}), "sep_clean", 1, 30, Mixing())
    steps = np.diff(long.make(np.random.default_rng(0)).mixture)
    assert steps.min() > 0  # one piece of the ramp
    joined = Maker(Voices({"a": [ramp]}), "sep_clean", 1, 250, Mixing()).make(np.random.default_rng(0)).mixture
    assert len(joined) == 250
    assert (np.diff(joined) < 0).nonzero()[0].tolist() == [99, 199]
    both = Voices({"a": [ramp], "b": [noise(0, 130)]})
    lengths = {
        length: len(
            Maker(both, "sep_clean", 2, 10, Mixing(length=length)).make(np.random.default_rng(0), whole=True).mixture
        )
        for length in ("min", "max")
    }
    assert lengths == {"min": 100, "max": 130}


def test_everything_follows_from_the_seed():
    pieces = MixedPieces(Maker(voices(), "sep_clean", 2, 300, Mixing()), 300, count=5)
    assert len(pieces) == 5
    assert torch.equal(pieces[(0, 7)]["mixture"], pieces[(3, 7)]["mixture"])
    assert not torch.equal(pieces[(0, 7)]["mixture"], pieces[(0, 8)]["mixture"])
    made = Made("x", pieces.source, 3)
    np.testing.assert_array_equal(made.read().sources, made.read().sources)
    assert made.read().name == "x"


def test_silent_and_damaged_recordings_are_passed_over(tmp_path: Path):
    write_audio(tmp_path / "a.wav", np.array([0.1, np.float32(3e38)] * 200), 8000, subtype="FLOAT")
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    raw[-4:] = np.array([np.nan], "<f4").tobytes()
    (tmp_path / "a.wav").write_bytes(raw)
    bad = Recording("a.wav", read_audio(tmp_path / "a.wav"))
    with pytest.raises(Unreadable, match=r"a.wav cannot be read: holds a value that is not finite, at sample 399"):
        bad.read()
    silent = Waveform("silent", np.zeros(400, np.float32))
    maker = Maker(Voices({"a": [bad, silent, noise(1, 400)]}), "sep_clean", 1, 400, Mixing())
    for seed in range(5):
        assert np.isfinite(maker.make(np.random.default_rng(seed)).mixture).all()
    hopeless = MixedPieces(Maker(Voices({"a": [silent]}), "sep_clean", 1, 400, Mixing()), 400, 2)
    assert hopeless[(0, 1)] == {"unreadable": ("a", "is silent")}
    with pytest.raises(DataError, match=r"mixtures of 2 need at least as many speakers, got 1 \(a\)"):
        Maker(Voices({"a": [silent]}), "sep_clean", 2, 400, Mixing())


def test_given_mixtures_give_random_pieces_and_wholes():
    one, two = noise(0, 500), noise(1, 500)
    heard = Waveform("mix", one.values + two.values)
    mixtures = Mixtures((Given("m", (one, two), heard), Given("n", (one, two)), Given("o", (one, two), None, two)))
    pieces = MixedPieces(mixtures, 100)
    assert len(pieces) == 3
    samples = [pieces[(0, seed)] for seed in range(6)]
    starts = [int(np.flatnonzero(heard.values == float(sample["mixture"][0]))[0]) for sample in samples]
    assert len(set(starts)) == 6
    for sample, start in zip(samples, starts, strict=True):
        assert torch.equal(sample["sources"][1], torch.from_numpy(two.values[start : start + 100]))
    wholes = WholeMixtures(mixtures)
    np.testing.assert_allclose(wholes[1]["mixture"], heard.values, atol=1e-6)
    np.testing.assert_allclose(wholes[2]["mixture"], one.values + 2 * two.values, atol=1e-6)
    half = Given("h", (one, Waveform("s2", np.zeros(500, np.float32))), heard)
    assert WholeMixtures(Mixtures((half,)))[0] == {"unreadable": ("h", "s2 is silent")}
    assert half.read(0, 100).sources.shape == (2, 100)  # silence within a piece is speech's own
    assert mixtures.subset([2, 0]).names == ["o", "m"]


def test_batches_stack_or_list():
    mixtures = Mixtures((Given("m", (noise(0, 50),)), Given("n", (noise(1, 60),))))
    wholes = WholeMixtures(mixtures)
    batch = collate_mixtures([wholes[0], wholes[1], {"unreadable": ("x", "y")}])
    assert [x.shape for x in batch["mixture"]] == [(50,), (60,)]
    assert (batch["name"], batch["unreadable"]) == (["m", "n"], [("x", "y")])
    assert collate_mixtures([wholes[0], wholes[0]])["sources"].shape == (2, 1, 50)
    assert collate_mixtures([{"unreadable": ("x", "y")}])["mixture"] == []


@pytest.mark.parametrize("options", [{"snr": (3.0, 1.0)}, {"noise_snr": (0.0, float("nan"))}, {"length": "mean"}])
def test_bad_mixing_is_told(options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Mixing(**options)
