"""The separation task: what it learns, measures and reports, from every form of data; recipes; and bad settings."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from audio.tones import RATE, TINY, task, tone, write_mixtures, write_speakers
from convatlas.audio.separation import Separation
from convatlas.audio.separation_evaluation import ideal_estimates, measure_mixtures, separate_like
from convatlas.audio.separation_options import Measuring
from convatlas.cli.main import main
from convatlas.data.audio import read_audio, write_audio
from convatlas.data.mixing_voices import Given, Mixed, Mixing, Mixtures, Waveform
from convatlas.errors import DataError, Unsupported
from convatlas.networks.registry import create_model
from convatlas.ops.separation_quality import bss_eval_sources
from convatlas.ops.signal_ratios import si_snr
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.task import open_task, split_settings

pytest.importorskip("soundfile")


def test_a_run_separates_and_can_be_opened(trained: Path):
    with (trained / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    gains = [float(row["SI-SNRi"]) for row in rows]
    assert len(gains) == 3
    assert np.mean(gains) > 5
    opened = open_task(trained)
    assert isinstance(opened, Separation)
    assert opened.quality()["SI-SNRi [dB]"] == pytest.approx(np.mean(gains), abs=1e-3)
    page = (trained / "report.html").read_text()
    assert page.count("<audio controls") == 15
    assert page.count("data:image/png") >= 15
    kinds = {path.suffix for path in (trained / "samples").iterdir()}
    assert kinds == {".png", ".wav"}
    assert np.asarray(Image.open(trained / "samples" / "0_spectrograms.png")).std() > 20
    heard = read_audio(trained / "samples" / "0_mixture.wav")
    assert heard.sample_rate == RATE
    truth = sum(read_audio(trained / "samples" / f"0_speaker{n}_truth.wav").read() for n in (1, 2))
    np.testing.assert_allclose(truth, heard.read(), atol=2e-3)


def test_other_mixtures_can_be_evaluated(trained: Path, tmp_path: Path):
    data = write_mixtures(tmp_path / "data", 4)
    write_audio(data / "s1" / "1.wav", np.zeros(2000, np.float32), RATE)
    write_audio(data / "mix" / "2.wav", np.zeros(1000, np.float32), RATE)
    report = open_task(trained).evaluate(data, folder=tmp_path / "out", options=Measuring(sdr=True))  # type: ignore[call-arg]
    told = json.loads(report.to_json())
    table = told["sections"][0]["parts"][0]
    by_name = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert by_name["mixture as it is"]["SI-SNRi [dB]"] == 0
    assert by_name["ideal ratio mask"]["SI-SNRi [dB]"] > by_name["conv_tasnet_causal"]["SI-SNRi [dB]"] > 5
    assert by_name["conv_tasnet_causal"]["SDRi [dB]"] > 5
    left_out = {row[0]: row[1] for row in told["sections"][2]["parts"][0]["rows"]}
    assert left_out["1"] == "s1/1.wav is silent"
    assert left_out["mix/2.wav"].startswith("lengths differ")
    assert (tmp_path / "out" / "quality.csv").read_text().count("\n") == 3


def test_measures_are_those_of_their_definitions():
    one, two = tone("hum", 1), tone("whistle", 2)
    mixtures = Mixtures((Given("m", (Waveform("a", one), Waveform("b", two))),))
    network = create_model("conv_tasnet", **TINY).eval()
    (measured,), _ = measure_mixtures(network, mixtures, sdr=True)
    mixed = mixtures.entries[0].read()
    sources, estimates = torch.from_numpy(mixed.sources), network(torch.from_numpy(mixed.mixture)[None])[0].detach()
    before = si_snr(torch.from_numpy(mixed.mixture), sources).mean()
    ratios = [si_snr(estimates[list(order)], sources).mean() for order in ((0, 1), (1, 0))]
    assert measured.network.si_snr == pytest.approx(float(max(ratios)), abs=1e-3)
    assert measured.network.si_snri == pytest.approx(float(max(ratios) - before), abs=1e-3)
    assert measured.mixture.si_snr == pytest.approx(float(before), abs=1e-4)
    best = estimates if ratios[0] > ratios[1] else estimates.flip(0)
    assert measured.network.sdr == pytest.approx(
        float(bss_eval_sources(best, sources, permute=False).sdr.mean()), abs=1e-3
    )
    swapped = Mixed("m", mixed.mixture, mixed.sources[::-1].copy())
    torch.testing.assert_close(separate_like(network, swapped)[0], best.flip(0))
    torch.testing.assert_close(separate_like(network, swapped, fixed=True)[0], estimates)
    alone = Mixed("m", mixed.mixture, mixed.sources[:1])
    torch.testing.assert_close(ideal_estimates(alone, "ratio", RATE)[0], ideal_estimates(mixed, "ratio", RATE)[0])


def test_losses_know_whether_the_order_matters():
    batch = {
        "mixture": torch.randn(3, 400),
        "sources": torch.randn(3, 2, 400),
        "name": ["a"] * 3,
        "unreadable": [("x", "is silent")],
    }
    swapped = {**batch, "sources": batch["sources"].flip(1)}
    for loss in ("si_snr", "sd_sdr", "snr"):
        free, fixed = (task("voices", loss=loss, order=order) for order in ("any", "fixed"))
        fixed.network = free.network = create_model("conv_tasnet", **TINY)
        value = free.losses(batch)["loss"]
        torch.testing.assert_close(value, free.losses(swapped)["loss"])
        assert not torch.allclose(fixed.losses(batch)["loss"], fixed.losses(swapped)["loss"], atol=1e-3)
        assert value <= fixed.losses(batch)["loss"] + 1e-6
    assert free.unreadable == {"x": "is silent"}
    assert free.losses({**batch, "mixture": [], "sources": []}) == {}


def test_given_mixtures_are_learned_from(tmp_path: Path):
    for split, count in (("tr", 3), ("cv", 1), ("tt", 1)):
        write_mixtures(tmp_path / split, count)
    write_mixtures(tmp_path / "tr", 1, first=9, samples=500)
    own = task(tmp_path)
    own.prepare()
    assert [len(each) for each in (own.train_set, own.val_set, own.whole("test"))] == [3, 1, 1]
    assert own.unreadable == {"9": "is shorter than a segment of 0.25 s"}
    assert own.train_set[(0, 1)]["sources"].shape == (2, 1000)
    with pytest.raises(DataError, match=r"shorter than segment, 9 s; the longest has 0\.50 s"):
        task(tmp_path, segment=9).prepare()
    with pytest.raises(DataError, match="have 2 sources, but the network finds 3"):
        task(tmp_path, options={**TINY, "num_sources": 3}).prepare()
    with pytest.raises(DataError, match="is 4000 Hz, the model expects 8000 Hz"):
        task(tmp_path, options={**TINY, "sample_rate": 8000}, resample=False).prepare()
    doubled = task(tmp_path, options={**TINY, "sample_rate": 8000})
    doubled.prepare()
    assert doubled.notes == ("18 of 18 files are 4000 Hz, the model expects 8000 Hz: resampled",)
    assert len(doubled.val_set[0]["mixture"]) == 4000


@pytest.mark.parametrize("scenario", ["sep_noisy", "enh_single", "enh_both"])
def test_scenarios_with_noise(scenario: Any, tmp_path: Path):
    count = 2 if scenario == "sep_noisy" else 1
    write_audio(tmp_path / "noise" / "n.wav", np.random.default_rng(0).normal(0, 0.1, 9000).astype(np.float32), RATE)
    speakers = write_speakers(tmp_path / "speakers", 4)
    options = {**TINY, "num_sources": count}
    own = task(speakers, scenario=scenario, options=options, mixing=Mixing(noise=str(tmp_path / "noise")))
    own.prepare()
    sample = own.train_set[(0, 0)]
    assert sample["sources"].shape == (count, 1000)
    assert (len(sample["name"].split(" + "))) == (1 if scenario == "enh_single" else 2)
    with pytest.raises(DataError, match=f"the scenario {scenario} needs noise"):
        task(speakers, scenario=scenario, options=options).prepare()
    simulated = task("voices", scenario=scenario, options=options)
    simulated.prepare()  # with white noise
    assert simulated.train_set[(0, 0)]["sources"].shape == (count, 1000)


def test_changed_sounds_are_not_taken_for_those_of_the_run(trained: Path, tmp_path: Path):
    opened = open_task(trained)
    assert isinstance(opened, Separation)
    opened.data = str(write_speakers(tmp_path / "others", 7))
    with pytest.raises(DataError, match="are not those of the training"):
        opened.evaluate()


def test_bad_settings_are_told(tmp_path: Path):
    with pytest.raises(Unsupported, match="resnet18 is not a network for separation"):
        Separation(model="resnet18")
    for setting in (
        *({"loss": "l1"}, {"scenario": "music"}, {"order": "none"}, {"split_by": "days"}, {"segment": 0.0}),
        *({"epoch_mixtures": 0}, {"held_out_mixtures": 0}, {"val_fraction": 1.0}, {"test_fraction": 0.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(setting))):
            Separation(**setting)
    with pytest.raises(ValueError, match="the scenario enh_single finds one source: set num_sources to 1"):
        Separation(scenario="enh_single")
    with pytest.raises(DataError, match=r"mixtures of 2 need at least as many speakers, got 1 \(hum\)"):
        task(write_speakers(tmp_path, 4, ("hum",))).prepare()
    with pytest.raises(DataError, match="3 kinds of simulated speakers, 4 are needed"):
        task("voices", options={**TINY, "num_sources": 4}).prepare()


# -- recipes -----------------------------------------------------------------------------------------------------------

#: Epochs, seconds, samples of a batch, epochs until the rate is halved.
RECIPES = {
    "wsj0_2mix_paper": (100, 4, 4, 3),
    "wsj0_2mix_causal": (100, 4, 4, 3),
    "wsj0_3mix_paper": (100, 4, 4, 3),
    "wsj0_2mix_v1": (100, 4, 3, 3),
    "wham_sep_clean": (200, 3, 6, 6),
    "libri2mix_sep_clean": (200, 3, 12, 6),
    "libri2mix_sep_noisy": (200, 3, 12, 6),
    "libri1mix_enhancement": (200, 3, 6, 6),
}


def test_every_recipe_is_tested():
    assert set(Separation.recipes()) == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_the_published_numbers_and_take_a_step(recipe: str, tmp_path: Path):
    settings = yaml.safe_load(Separation.recipe(recipe).read_text(encoding="utf-8"))
    own, training = split_settings(Separation, settings)
    assert (training.epochs, own.segment, training.batch_size, training.plateau_epochs) == RECIPES[recipe]
    assert learning_rate(training, 9, 3, plateau=0.5**20) == 1e-3 * 0.5**20
    assert (training.clip, training.weight_decay, training.optimizer) == (5, 0, "adamw")
    count = own._config().num_sources
    for part in (own.part or "tr", "dev", "tt"):
        for name in ("mix_clean", "mix_both", "mix_single", *(f"s{n}" for n in range(1, count + 1))):
            write_audio(tmp_path / part / name / "a.wav", tone("hum", len(name)), RATE)
    small = dataclasses.replace(own, data=str(tmp_path), segment=0.1, options=TINY)
    small.prepare()
    optimizer = make_optimizer(small.network, training)
    batch = small.collate([small.train_set[(0, seed)] for seed in range(2)])
    before = small.losses(batch)["loss"]
    before.backward()
    optimizer.step()
    assert float(small.losses(batch)["loss"]) != float(before)


# -- the command line --------------------------------------------------------------------------------------------------


def test_compare_shows_networks_beside_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    data = write_speakers(tmp_path / "speakers", 4)
    models = {"plain": {"model": "conv_tasnet"}, "causal": {"model": "conv_tasnet_causal"}}
    words = [
        "compare",
        "separation",
        "--data",
        str(data),
        "--models",
        json.dumps(models),
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--options", json.dumps(TINY), "--segment", "0.25", "--epoch_mixtures", "8", "--held_out_mixtures", "3"]
    assert main([*words, "--epochs", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = told["sections"][0]["parts"][0]
    names = {row[0] for row in table["rows"]}
    assert {"mixture as it is", "ideal binary mask", "ideal ratio mask", "plain", "causal"} <= names
    sounds = next(part for part in told["sections"][1]["parts"] if part["kind"] == "sounds")["sounds"]
    assert [each["caption"] for each in sounds][:4] == [
        "mixture",
        "speaker 1: truth",
        "speaker 1: plain",
        "speaker 1: causal",
    ]
