"""Audio files: every kind of sample, parts and blocks, other rates, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convatlas.data.audio import find_audio, is_audio_name, read_audio, resample, write_audio
from convatlas.errors import DataError

pytest.importorskip("soundfile")


def tones(channels: int, samples: int, rate: int) -> np.ndarray:
    t = np.arange(samples) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (300 + 150 * c) * t) for c in range(channels)]).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "subtype", "error"),
    [
        *(("a.wav", "PCM_U8", 1 / 100), ("a.wav", "PCM_16", 1 / 30000), ("a.wav", "PCM_24", 1e-6)),
        *(("a.wav", "PCM_32", 1e-7), ("a.wav", "FLOAT", 0), ("a.wav", "DOUBLE", 0)),
        *(("a.flac", "PCM_16", 1 / 30000), ("a.flac", "PCM_24", 1e-6), ("a.ogg", None, 0.1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_of_sample(tmp_path: Path, name: str, subtype: str | None, error: float, channels: int):
    x = tones(channels, 5000, 11025)
    write_audio(tmp_path / name, x, 11025, subtype=subtype)
    audio = read_audio(tmp_path / name)
    assert (audio.sample_rate, audio.channels, audio.samples) == (11025, channels, 5000)
    assert audio.seconds == pytest.approx(5000 / 11025)
    y = audio.read()
    assert y.dtype == np.float32
    assert np.abs(y - x).max() <= error
    np.testing.assert_allclose(audio.read(mono=True), y.mean(0, keepdims=True), atol=1e-7)
    np.testing.assert_array_equal(audio.read(100, 200), y[:, 100:200])
    if name != "a.ogg":
        blocks = list(audio.blocks(1500, overlap=300))
        assert [block.shape[1] for block in blocks] == [1500, 1500, 1500, 1400]
        np.testing.assert_array_equal(np.concatenate([blocks[0], *(b[:, 300:] for b in blocks[1:])], 1), y)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_other_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int):
    x = tones(2, 8000, 16000)
    write_audio(tmp_path / "a.wav", x, 16000, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav", sample_rate=rate)
    y = audio.read()
    assert y.shape == (2, audio.samples) == (2, rate // 2)
    inside = slice(rate // 40, -rate // 40)
    assert np.abs(y - tones(2, rate // 2, rate))[:, inside].max() < 1e-3
    # Parts, blocks and pieces of other sizes hold the same numbers.
    monkeypatch.setattr("convatlas.data.audio._CHUNK", 1000)
    np.testing.assert_allclose(audio.read(777, 3001), y[:, 777:3001], atol=1e-6)
    np.testing.assert_allclose(np.concatenate(list(audio.blocks(999)), axis=1), y, atol=1e-6)
    np.testing.assert_allclose(resample(x, 16000, rate), y, atol=1e-6)


def test_resampling_suppresses_what_the_new_rate_cannot_hold():
    t = np.arange(16000) / 16000
    y = resample(np.sin(2 * np.pi * 6000 * t)[None].astype(np.float32), 16000, 8000)
    assert np.abs(y[:, 200:-200]).max() < 1e-3


def test_files_that_cannot_be_read(tmp_path: Path):
    write_audio(tmp_path / "good.wav", tones(1, 4000, 8000), 8000)
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no sound at all")
    write_audio(tmp_path / "none.wav", np.zeros((1, 0), np.float32), 8000)
    flac = tmp_path / "cut.flac"
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, (1, 40000)).astype(np.float32)
    write_audio(flac, noise, 8000)
    flac.write_bytes(flac.read_bytes()[:20000])
    for name, reason in (("missing", "no such file"), ("empty", "is empty"), ("text", "."), ("none", "no samples")):
        with pytest.raises(DataError, match=f"{name}.wav cannot be read: .*{reason}"):
            read_audio(tmp_path / f"{name}.wav")
    with pytest.raises(DataError, match=r"cut.flac is damaged"):
        read_audio(flac).read()
    bad = tones(1, 4000, 8000)
    import soundfile

    bad[0, 1234] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad.T, 8000, subtype="FLOAT")
    with pytest.raises(DataError, match="holds a value that is not finite, at sample 1234"):
        read_audio(tmp_path / "nan.wav").read()
    assert read_audio(tmp_path / "nan.wav").read(0, 1000).shape == (1, 1000)
    # libsndfile believes the length of a shortened WAV file, not its header.
    (tmp_path / "cut.wav").write_bytes(whole[:4044])
    assert read_audio(tmp_path / "cut.wav").samples == 2000
    (tmp_path / "header.wav").write_bytes(whole[:30])
    with pytest.raises(DataError, match=r"header.wav cannot be read"):
        read_audio(tmp_path / "header.wav")


def test_arguments(tmp_path: Path):
    path = tmp_path / "a.wav"
    write_audio(path, tones(1, 400, 8000), 8000)
    audio = read_audio(path)
    with pytest.raises(ValueError, match="start and stop must lie in order from 0 to 400, got 300 and 500"):
        audio.read(300, 500)
    with pytest.raises(ValueError, match="overlap must be from 0 to below size, got 9 and 9"):
        next(audio.blocks(9, overlap=9))
    with pytest.raises(ValueError, match="sample_rate must be positive, got 0"):
        read_audio(path, sample_rate=0)
    with pytest.raises(ValueError, match="samples must be finite"):
        write_audio(path, [np.nan], 8000)
    with pytest.raises(ValueError, match="samples must be floats"):
        write_audio(path, [1, 2], 8000)
    with pytest.raises(DataError, match="cannot be written"):
        write_audio(tmp_path / "a.xyz", [0.5], 8000)
    assert not (tmp_path / "a.xyz").exists()
    assert is_audio_name("x/Speech.WAV")
    assert not is_audio_name(".hidden.wav")
    assert find_audio(tmp_path) == [path]
    with pytest.raises(DataError, match="is no folder"):
        find_audio(tmp_path / "none")
    (tmp_path / "silent").mkdir()
    with pytest.raises(DataError, match="holds no audio file"):
        find_audio(tmp_path / "silent")
