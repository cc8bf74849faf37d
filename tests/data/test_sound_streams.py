"""Streams of samples: every format, headers of pipes, and WAV files that are whole at any time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from convatlas.data.audio import read_audio, write_audio
from convatlas.data.sound_streams import GrowingWav, PcmKind, PcmStream, encode_pcm, read_wav_header
from convatlas.errors import DataError

SOUND = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
STEP = {"u8": 2**-6, "s16le": 2**-14, "s24le": 2**-22, "s32le": 1e-6, "f32le": 0, "f64le": 0}


class Pipe(io.BytesIO):
    """Gives a few bytes at a time."""

    def read(self, count: int | None = -1) -> bytes:
        return super().read(min(7, count or 0) if count is not None and count >= 0 else 7)


def joined(stream: PcmStream, size: int) -> np.ndarray:
    return np.concatenate(list(stream.blocks(size)))


@pytest.mark.parametrize("kind", get_args(PcmKind))
def test_samples_come_back(kind: Any):
    stream = PcmStream(Pipe(encode_pcm(SOUND, kind)), kind, 8000)
    blocks = list(stream.blocks(300))
    assert [len(block) for block in blocks] == [300, 300, 300, 100]
    np.testing.assert_allclose(np.concatenate(blocks), SOUND, rtol=0, atol=STEP[kind])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_streams_are_those_of_files(tmp_path: Path, subtype: str):
    pytest.importorskip("soundfile")
    write_audio(tmp_path / "a.wav", np.stack([SOUND, -0.5 * SOUND]), 11025, subtype=subtype)
    stream = read_wav_header(Pipe((tmp_path / "a.wav").read_bytes()))
    assert (stream.sample_rate, stream.channels) == (11025, 2)
    np.testing.assert_allclose(joined(stream, 64), read_audio(tmp_path / "a.wav").read(mono=True)[0], atol=1e-6)


def test_a_pipe_does_not_know_its_length_and_may_end_anywhere(tmp_path: Path):
    with GrowingWav(tmp_path / "a.wav", 8000) as file:
        file.add(SOUND)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    after = bytes(data) + b"LISTxxxx"
    assert len(joined(read_wav_header(io.BytesIO(after)), 64)) == 1000
    data[40:44] = b"\xff" * 4
    assert len(joined(read_wav_header(io.BytesIO(bytes(data[:-1]))), 64)) == 999
    assert list(PcmStream(io.BytesIO(), "f32le", 8000).blocks(5)) == []


def test_a_growing_wav_can_be_read_while_it_grows(tmp_path: Path):
    pytest.importorskip("soundfile")
    path = tmp_path / "deep" / "a.wav"
    with GrowingWav(path, 16000) as file:
        for end in (100, 400, 1000):
            file.add(SOUND[file.samples : end])
            audio = read_audio(path)
            assert (audio.sample_rate, audio.samples, audio.subtype) == (16000, end, "PCM_16")
            np.testing.assert_allclose(audio.read()[0], SOUND[:end], atol=1e-4)
        file.add(np.array([3.0, -3.0], np.float32))
    np.testing.assert_allclose(read_audio(path).read(1000)[0], [1, -1], atol=1e-4)


def test_bad_streams_are_told():
    with pytest.raises(DataError, match="no WAV; raw samples need to be told by raw"):
        read_wav_header(io.BytesIO(b"x" * 100))
    with pytest.raises(DataError, match="ends within its header"):
        read_wav_header(io.BytesIO(b"RIFF"))
    header = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + np.array([6, 1], "<u2").tobytes() + b"\x40\x1f\0\0" * 2 + b"\1\0\x08\0"
    with pytest.raises(DataError, match="format 6 of 8 bits, which is no plain PCM"):
        read_wav_header(io.BytesIO(header + b"data\0\0\0\0"))
    with pytest.raises(DataError, match="before it tells their format"):
        read_wav_header(io.BytesIO(header[:12] + b"data\0\0\0\0"))
    with pytest.raises(DataError, match="not finite, at sample 5"):
        joined(PcmStream(io.BytesIO(np.array([0, 0, 0, 0, 0, np.nan], "<f4").tobytes()), "f32le", 8000), 4)
    for build in (
        lambda: PcmStream(io.BytesIO(), "s8", 8000),  # type: ignore[arg-type]
        lambda: PcmStream(io.BytesIO(), "u8", 0),
        lambda: encode_pcm(SOUND, "s8"),  # type: ignore[arg-type]
        lambda: next(PcmStream(io.BytesIO(), "u8", 1).blocks(0)),
        lambda: GrowingWav("x.wav", 0),
    ):
        with pytest.raises(ValueError, match="must be"):
            build()
