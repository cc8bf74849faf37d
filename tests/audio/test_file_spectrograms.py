"""Spectrograms of files: blocks give the numbers of the whole, files that are written can be opened, the verb works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
