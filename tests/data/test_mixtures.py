"""Reading mixtures and voices: the forms of folders and tables, what is left out and said, and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.data.audio import write_audio
from convatlas.data.mixing_voices import Mixtures, Voices
from convatlas.data.mixtures import Reading, divide_mixtures, divide_voices, mixtures_digest, read_mixtures
from convatlas.errors import DataError

pytest.importorskip("soundfile")


def wave(
    path: Path, seed: int = 0, samples: int = 200, rate: int = 8000, channels: int = 1, **options: Any
) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)
    write_audio(path, values, rate, **options)
    return values


def mixture_folder(root: Path, count: int = 3, names: tuple[str, ...] = ("mix", "s1", "s2")) -> Path:
    for number in range(count):
        for row, name in enumerate(names):
            wave(root / name / f"{number}.wav", 10 * number + row)
    return root


def test_speakers_are_folders_at_any_depth(tmp_path: Path):
    wave(tmp_path / "anna" / "one.wav")
    wave(tmp_path / "anna" / "book" / "two.flac", 1)
    values = wave(tmp_path / "ben" / "loud.wav", 2, rate=16000, channels=2, samples=400, subtype="FLOAT")
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "DOUBLE"):
        wave(tmp_path / "carl" / f"{subtype}.wav", 3, subtype=subtype)
    (tmp_path / "ben" / "text.wav").write_text("no sound")
    (tmp_path / "ben" / "empty.wav").touch()
    reading = Reading()
    found = read_mixtures(tmp_path, reading)["all"]
    assert isinstance(found, Voices)
    assert {name: len(sounds) for name, sounds in found.speakers.items()} == {"anna": 2, "ben": 1, "carl": 5}
    assert {each.path: each.reason for each in found.skipped} == {
        "ben/text.wav": "Format not recognised.",
        "ben/empty.wav": "the file is empty",
    }
    assert reading.notes() == (
        "1 of 8 files are 16000 Hz, the model expects 8000 Hz: resampled",
        "1 of 8 files have several channels: their mean is taken",
    )
    (sound,) = found.speakers["ben"]
    assert (sound.name, sound.samples) == ("ben/loud.wav", 200)
    same = read_mixtures(tmp_path, Reading(sample_rate=16000))["all"].speakers["ben"][0]
    np.testing.assert_allclose(same.read(100, 110), values[:, 100:110].mean(0), atol=1e-6)
    carl = [each.read() for each in found.speakers["carl"]]
    for each in carl[1:]:
        np.testing.assert_allclose(each, carl[0], atol=0.01)
    with pytest.raises(DataError, match=r"loud.wav is 16000 Hz, the model expects 8000 Hz"):
        read_mixtures(tmp_path, Reading(resample=False))


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("tr", "cv", "tt"), ("train-clean-100", "dev-clean", "test")]
)
def test_splits_have_many_names(tmp_path: Path, names: tuple[str, ...]):
    for part in names:
        mixture_folder(tmp_path / "wav8k" / "min" / part, 2)
    found = read_mixtures(tmp_path, Reading())
    assert list(found) == ["train", "val", "test"]
    assert [len(part) for part in found.values()] == [2, 2, 2]
    mixed = found["test"].entries[1].read()
    assert mixed.name == "1"
    assert mixed.sources.shape == (2, 200)
    alone = read_mixtures(tmp_path / "wav8k" / "min" / names[2], Reading())
    assert alone["all"].names == ["0", "1"]


def test_several_training_parts_need_a_choice(tmp_path: Path):
    for part in ("train-100", "train-360", "test"):
        mixture_folder(tmp_path / part, 1 if part == "train-100" else 2)
    with pytest.raises(DataError, match="several parts to train on, train-100, train-360: choose one"):
        read_mixtures(tmp_path, Reading())
    assert len(read_mixtures(tmp_path, Reading(part="train-360"))["train"]) == 2
    (tmp_path / "notes").mkdir()
    assert list(read_mixtures(tmp_path, Reading(part="other", to_train=False))) == ["test"]
    with pytest.raises(DataError, match="part must be one of train-100, train-360, got train-3"):
        read_mixtures(tmp_path, Reading(part="train-3"))


def test_scenarios_choose_their_folders(tmp_path: Path):
    mixture_folder(tmp_path, 1, ("mix_clean", "mix_both", "mix_single", "s1", "s2", "noise"))
    expected = {
        "sep_clean": ("mix_clean", ["s1", "s2"]),
        "sep_noisy": ("mix_both", ["s1", "s2"]),
        "enh_single": ("mix_single", ["s1"]),
        "enh_both": ("mix_both", ["mix_clean"]),
    }
    for task, (heard, sources) in expected.items():
        (entry,) = read_mixtures(tmp_path, Reading(scenario=task))["all"].entries
        assert entry.mixture.name == f"{heard}/0.wav"
        assert [part.name for part in entry.parts] == [f"{name}/0.wav" for name in sources]
    named = read_mixtures(tmp_path, Reading(scenario="sep_noisy", sources=("s2", "noise")))["all"].entries[0]
    assert [part.name for part in named.parts] == ["s2/0.wav", "noise/0.wav"]
    with pytest.raises(DataError, match="has no folder bass; it has mix_both"):
        read_mixtures(tmp_path, Reading(sources=("bass",)))


def test_mixtures_that_do_not_fit_are_left_out(tmp_path: Path):
    mixture_folder(tmp_path, 4)
    wave(tmp_path / "s2" / "1.wav", samples=150)
    (tmp_path / "s1" / "2.wav").unlink()
    (tmp_path / "mix" / "3.wav").write_bytes(b"RIFF")
    found = read_mixtures(tmp_path, Reading())["all"]
    assert found.names == ["0"]
    reasons = {each.path: each.reason for each in found.skipped}
    assert reasons["mix/1.wav"] == "lengths differ: s1/1.wav has 200 samples, s2/1.wav has 150"
    assert "there is no such file" in reasons["mix/2.wav"]
    assert set(reasons) == {f"mix/{number}.wav" for number in (1, 2, 3)}
    (tmp_path / "mix" / "0.wav").unlink()
    with pytest.raises(DataError, match=r"none of the mixtures of .* can be used; first: mix/1.wav: lengths differ"):
        read_mixtures(tmp_path, Reading())


def table(
    path: Path, rows: list[list[str]], columns: str = "mixture_ID,mixture_path,source_1_path,source_2_path"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")
    return path


def test_tables_of_librimix(tmp_path: Path):
    root = tmp_path / "wav8k" / "min"
    for part in ("train-100", "dev", "test"):
        mixture_folder(root / part, 2, ("mix_clean", "mix_both", "s1", "s2", "noise"))
        for heard in ("mix_clean", "mix_both"):
            rows = [
                [f"id{n}", *(f"/elsewhere/Libri2Mix/wav8k/min/{part}/{name}/{n}.wav" for name in (heard, "s1", "s2"))]
                for n in range(2)
            ]
            table(root / "metadata" / f"mixture_{part}_{heard}.csv", rows)
        table(root / "metadata" / f"metrics_{part}_mix_clean.csv", [["x"]], "y")
    found = read_mixtures(tmp_path, Reading())
    assert {split: part.names for split, part in found.items()} == {
        split: ["id0", "id1"] for split in ("train", "val", "test")
    }
    noisy = read_mixtures(tmp_path, Reading(scenario="sep_noisy"))["test"].entries[1]
    assert noisy.mixture.audio.path == root / "test" / "mix_both" / "1.wav"
    (both, _) = read_mixtures(tmp_path, Reading(scenario="enh_both"))["test"].entries
    assert [part.audio.path for part in both.parts] == [root / "test" / "mix_clean" / "0.wav"]
    assert list(read_mixtures(tmp_path, Reading(to_train=False))) == ["val", "test"]
    with pytest.raises(DataError, match=r"no table mixture_.*_mix_single.csv, which the scenario enh_single needs"):
        read_mixtures(tmp_path, Reading(scenario="enh_single"))


def test_a_table_may_stand_alone_and_lack_the_mixture(tmp_path: Path):
    one, two, noise = (wave(tmp_path / f"{name}.wav", seed) for seed, name in enumerate(("a", "b", "n")))
    columns = "mixture_ID,source_1_path,source_2_path,noise_path"
    path = table(tmp_path / "own.csv", [["x", "a.wav", "b.wav", "n.wav"], ["y", "a.wav", "c.wav", ""]], columns)
    found = read_mixtures(path, Reading())["all"]
    assert [each.reason for each in found.skipped] == ["c.wav does not exist, nor is it found beside the table"]
    np.testing.assert_allclose(found.entries[0].read().mixture, (one + two + noise)[0], atol=1e-4)
    with pytest.raises(DataError, match="must have columns mixture_path and source_1_path"):
        read_mixtures(table(tmp_path / "bad.csv", [["1"]], "a"), Reading())
    with pytest.raises(DataError, match="has no rows"):
        read_mixtures(table(tmp_path / "bad.csv", []), Reading())


def test_what_is_no_data_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="nothing does not exist; expected a folder"):
        read_mixtures(tmp_path / "nothing", Reading())
    wave(tmp_path / "7_jackson_0.wav")
    with pytest.raises(DataError, match="has recordings, but no folder for each speaker"):
        read_mixtures(tmp_path, Reading())
    with pytest.raises(DataError, match="is a single file"):
        read_mixtures(tmp_path / "7_jackson_0.wav", Reading())
    mixture_folder(tmp_path, 1, ("mix_clean", "s1"))
    with pytest.raises(DataError, match="has mix_clean, but the scenario sep_noisy needs mix_both"):
        read_mixtures(tmp_path, Reading(scenario="sep_noisy"))
    with pytest.raises(ValueError, match="scenario must be one of sep_clean"):
        Reading(scenario="music")  # type: ignore[arg-type]


def test_splits_are_disjoint_and_repeatable(tmp_path: Path):
    for speaker in range(5):
        for take in range(4):
            wave(tmp_path / f"s{speaker}" / f"{take}.wav", samples=10)
    wave(tmp_path / "rare" / "one.wav", samples=10)
    voices = read_mixtures(tmp_path, Reading())["all"]
    fractions = {"test": 0.25, "val": 0.25}
    by_recordings = divide_voices(voices, fractions, 0, by="recordings")
    assert {split: len(part) for split, part in by_recordings.items()} == {"train": 11, "test": 5, "val": 5}
    names = [name for part in by_recordings.values() for name in part.names]
    assert sorted(names) == sorted(voices.names)
    by_speakers = divide_voices(voices, fractions, 0, by="speakers")
    assert sorted(name for part in by_speakers.values() for name in part.speakers) == sorted(voices.speakers)
    assert [len(part.speakers) for part in by_speakers.values()] == [2, 2, 2]
    digests = {mixtures_digest(divide_voices(voices, fractions, seed, by="speakers")) for seed in (0, 0, 1)}
    assert len(digests) == 2
    with pytest.raises(DataError, match="at least 3 speakers to split, got 2"):
        divide_voices(Voices(dict(list(voices.speakers.items())[:2])), fractions, 0, by="speakers")
    mixtures = read_mixtures(mixture_folder(tmp_path / "given", 7), Reading())["all"]
    assert isinstance(mixtures, Mixtures)
    parts = divide_mixtures(mixtures, {"train": 0.6, "test": 0.2, "val": 0.2}, 3)
    assert sorted(name for part in parts.values() for name in part.names) == mixtures.names
    assert {split: len(part) for split, part in parts.items()} == {"train": 5, "test": 1, "val": 1}
