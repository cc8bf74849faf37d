"""Spectrograms of files: blocks give the numbers of the whole, files that are written can be opened, the verb works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.audio.pictures import spectrogram_picture
from convatlas.audio.spectrogram import (
    KINDS,
    make_layer,
    save_spectrogram,
    spectrogram,
    spectrogram_blocks,
)
from convatlas.cli import spectrogram as verb
from convatlas.cli.main import main
from convatlas.data.audio import read_audio, write_audio
from convatlas.errors import UnknownName, Unsupported
from convatlas.nn.spectrogram import STFT, CQT2010v2

pytest.importorskip("soundfile")
RATE = 4000
OPTIONS = {
    **{"stft": {"n_fft": 128, "hop_length": 32}, "mel": {"n_fft": 256, "hop_length": 64, "n_mels": 16}},
    **{"gammatone": {"n_fft": 256, "hop_length": 64, "n_bins": 12}},
    "mfcc": {"n_fft": 256, "hop_length": 64, "n_mels": 16, "n_mfcc": 8},
    **{kind: {"hop_length": 64, "fmin": 110.0, "n_bins": 36} for kind in ("cqt", "cqt2010", "vqt")},
}


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    samples = np.random.default_rng(0).normal(size=(2, 20_123)) * 0.1
    samples[:, 9000:12000] *= 5
    write_audio(tmp_path / "in.wav", samples.astype(np.float32), RATE, subtype="FLOAT")
    return tmp_path / "in.wav"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_the_numbers_of_the_whole(recording: Path, kind: str):
    audio, layer = read_audio(recording), make_layer(kind, RATE, **OPTIONS[kind])
    local = layer.melspec_layer if kind == "mfcc" else layer
    whole = local(torch.from_numpy(audio.read()))
    blocks = list(spectrogram_blocks(audio, local, mono=False, block=100))
    assert len(blocks) > 2
    joined = torch.cat(blocks, dim=2)
    assert joined.shape == whole.shape
    assert float((joined - whole).abs().max() / whole.abs().max()) < 1e-5
    mono = layer(torch.from_numpy(audio.read(mono=True)))
    torch.testing.assert_close(spectrogram(recording, kind, **OPTIONS[kind]), mono, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mel", "mfcc"])
def test_files_hold_the_spectrogram(recording: Path, kind: str):
    out = recording.with_suffix(".npy")
    shape = save_spectrogram(recording, out, kind, sample_rate=2000, mono=False, **OPTIONS[kind])
    values = np.load(out)
    assert values.shape == shape == (2, OPTIONS[kind].get("n_mfcc", 16), 1 + 10_062 // 64)
    expected = spectrogram(recording, kind, sample_rate=2000, mono=False, **OPTIONS[kind])
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    save_spectrogram(recording, recording.with_suffix(".png"), kind, **OPTIONS[kind])
    pixels = np.asarray(Image.open(recording.with_suffix(".png")))
    assert pixels.shape == (OPTIONS[kind].get("n_mfcc", 16), 1 + 20_123 // 64, 3)
    assert pixels.std() > 5


@pytest.mark.parametrize("kind", ["mel", "mfcc", "cqt"])
def test_what_is_written_in_blocks_is_the_whole(recording: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    expected = spectrogram(recording, kind, mono=False, **OPTIONS[kind]).numpy()
    blocks = spectrogram_blocks
    small = lambda *args, **options: blocks(*args, **options, block=1000)  # noqa: E731
    monkeypatch.setattr("convatlas.audio.spectrogram.spectrogram_blocks", small)
    out = recording.with_suffix(".npy")
    assert save_spectrogram(recording, out, kind, mono=False, **OPTIONS[kind]) == expected.shape
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("convatlas.audio.spectrogram._MOST_COLUMNS", 100)
    picture = recording.with_suffix(".png")
    assert save_spectrogram(recording, picture, kind, mono=False, **OPTIONS[kind]) == expected.shape
    pixels = np.asarray(Image.open(picture))
    frames = expected.shape[2]
    columns = [expected[0, :, i : i + 4].mean(1) for i in range(0, frames, 4)]  # 4 is the least that gives 100 or fewer
    assert np.abs(pixels.astype(int) - spectrogram_picture(np.stack(columns, 1), decibels=kind != "mfcc")).max() <= 2


@pytest.mark.parametrize("rate", [11025, 12345, 44101])
def test_odd_rates(tmp_path: Path, rate: int):
    samples = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    write_audio(tmp_path / "a.wav", np.stack([samples, samples]), rate, subtype="PCM_24")
    values = spectrogram(tmp_path / "a.wav", "cqt", sample_rate=8000, fmin=220.0, n_bins=36)[0, :, 10:-10]
    assert values.argmax(0).unique().tolist() == [12]


def test_what_no_spectrogram_can_be_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_audio(tmp_path / "short.wav", np.full(500, 0.1), 8000)
    write_audio(tmp_path / "good.wav", np.full(9000, 0.1), 8000)
    (tmp_path / "text.wav").write_text("no sound")
    import soundfile

    soundfile.write(tmp_path / "nan.wav", np.full(9000, np.nan), 8000, subtype="FLOAT")
    (tmp_path / "cut.flac").write_bytes(b"fLaC" + bytes(200))
    out = tmp_path / "o.npy"
    for words, reason in (
        (["short.wav"], "shorter than reflect padding length"),
        (["text.wav"], "text.wav cannot be read"),
        (["cut.flac"], "cut.flac cannot be read"),
        (["nan.wav"], "holds a value that is not finite, at sample 0"),
        (["good.wav", "--options", '{"n_mel": 8}'], "n_mel"),
        (["good.wav", "--kind", "cqt", "--options", '{"n_bins": 96}'], "exceeded the Nyquist frequency"),
        (["good.wav", "--rate", "0"], "sample_rate must be positive, got 0"),
    ):
        code = main(["spectrogram", str(tmp_path / words[0]), *words[1:], "-o", str(out)])
        error = capsys.readouterr().err
        assert code in (1, 2)
        assert reason in error
        assert "Traceback" not in error
        assert not out.exists()
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


def test_a_picture_has_low_frequencies_at_the_bottom():
    values = np.zeros((4, 3))
    values[0, 1] = 1.0
    pixels = spectrogram_picture(values)
    assert pixels.sum(2).argmax() == 3 * 3 + 1
    with pytest.raises(ValueError, match=r"values must be \(F, T\) and not empty"):
        spectrogram_picture(np.zeros((0, 3)))


def test_what_cannot_be_done_in_blocks(recording: Path):
    audio = read_audio(recording)
    with pytest.raises(Unsupported, match="STFT does not centre its frames"):
        next(spectrogram_blocks(audio, STFT(128, center=False)))
    options = {"sr": RATE, "hop_length": 50, "fmin": 110.0, "n_bins": 36, "earlydownsample": False}
    with pytest.raises(Unsupported, match="blocks need a hop_length that is a multiple of 4, got 50"):
        next(spectrogram_blocks(audio, CQT2010v2(**options)))
    with pytest.raises(UnknownName, match="unknown kind of spectrogram 'mell': did you mean mel"):
        make_layer("mell", RATE)
    with pytest.raises(ValueError, match=r"path must end in .npy or .png, got a.txt"):
        save_spectrogram(recording, "a.txt")


def test_the_verb(recording: Path, capsys: pytest.CaptureFixture[str]):
    assert set(verb._KINDS) == set(KINDS)
    out = recording.with_name("out.npy")
    words = ["spectrogram", str(recording), "--kind", "cqt", "-o", str(out), "--options", json.dumps(OPTIONS["cqt"])]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [1, 36, 1 + 20_123 // 64]
    assert np.load(out).std() > 0
    assert main(["spectrogram", str(recording.with_name("none.wav")), "-o", str(out)]) == 1
    assert "there is no such file" in capsys.readouterr().err
    assert main(["spectrogram", str(recording), "-o", "out.txt"]) == 2
    assert main(["spectrogram", str(recording), "-o", str(out), "--options", "[1"]) == 2
