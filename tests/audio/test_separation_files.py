"""Separating files of any form and length, and streams: levels, names, bounded memory, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audio.tones import RATE, TINY, tone
from convatlas.audio.live_separation import LiveLevel, separate_stream
from convatlas.audio.separation_files import separate_files
from convatlas.audio.separation_options import Separating
from convatlas.cli.main import main
from convatlas.data.audio import read_audio, resample, write_audio
from convatlas.data.sound_streams import PcmStream, encode_pcm
from convatlas.errors import DataError, Unsupported
from convatlas.networks.conv_tasnet.network import ConvTasNet
from convatlas.networks.registry import create_model
from convatlas.ops.source_level import match_level, mixture_consistent

pytest.importorskip("soundfile")


def network(model: str = "conv_tasnet", **options: Any) -> Any:
    return create_model(model, **{**TINY, **options}).eval()


def mixture(samples: int = 6000) -> np.ndarray:
    return tone("hum", 1, samples) + tone("whistle", 2, samples)


def results(folder: Path, name: str, count: int = 2) -> np.ndarray:
    return np.concatenate([read_audio(folder / f"{name}_speaker{n}.wav").read() for n in range(1, count + 1)])


@pytest.mark.parametrize("model", ["conv_tasnet", "conv_tasnet_causal"])
@pytest.mark.parametrize("level", ["peak", "consistent", "none"])
def test_files_hold_what_the_network_gives_at_the_level_asked_for(model: str, level: Any, tmp_path: Path):
    own, sound = network(model), 0.6 * mixture()
    write_audio(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    options = Separating(level=level, floats=True, chunk=0.5)
    (done,), skipped = separate_files(own, [tmp_path / "a.wav"], tmp_path / "out", options)
    assert (skipped, done.note, done.length) == ([], "", 1.5)
    found = results(tmp_path / "out", "a")
    assert found.shape == (2, 6000)
    x = torch.from_numpy(sound.astype(np.float32))
    raw = torch.from_numpy(found)
    if model == "conv_tasnet_causal":  # a stream is the whole
        assert done.how == "as a stream"
        with torch.no_grad():
            raw = own(x)
    else:
        assert done.how == "in chunks"
        options = Separating(level="none", floats=True, chunk=0.5)
        separate_files(own, [tmp_path / "a.wav"], tmp_path / "raw", options)
        raw = torch.from_numpy(results(tmp_path / "raw", "a"))
    expected = {"peak": match_level(raw, x), "consistent": mixture_consistent(raw, x), "none": raw}[level]
    if level == "consistent":
        expected = expected / max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
    assert done.shown.shape == (3, 6000)
    np.testing.assert_allclose(done.shown[1:], found, atol=1e-6)
    assert not list((tmp_path / "out").glob("*.part"))


def test_chunks_keep_the_speakers_in_their_places(trained: Path, tmp_path: Path):
    from convatlas.training.task import open_task

    own: Any = open_task(trained)
    own.network.config = own.network.config.override(causal=False)  # so that it is not streamed
    hum, whistle = tone("hum", 1, 12000), tone("whistle", 2, 12000)
    write_audio(tmp_path / "a.wav", hum + whistle, RATE, subtype="FLOAT")
    own.predict([tmp_path / "a.wav"], tmp_path / "out", Separating(chunk=0.6))
    found = results(tmp_path / "out", "a")
    thirds = [
        [[abs(np.corrcoef(x, y)[0, 1]) for y in (h, w)] for x in part]
        for part, h, w in (
            (found[:, s], hum[s], whistle[s]) for s in (slice(0, 4000), slice(4000, 8000), slice(8000, None))
        )
    ]
    first = np.argmax(thirds[0], 1).tolist()
    assert sorted(first) == [0, 1]
    assert all(np.argmax(part, 1).tolist() == first for part in thirds)


def test_any_form_of_file_is_brought_to_the_network(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    own, sound = network(), mixture()
    inputs = tmp_path / "in"
    doubled = resample(sound[None].astype(np.float32), RATE, 2 * RATE)[0]
    write_audio(inputs / "deep" / "b.flac", np.stack([1.5 * doubled, 0.5 * doubled]) / 2, 2 * RATE, subtype="PCM_24")
    write_audio(inputs / "b.wav", sound / 2, RATE, subtype="FLOAT")
    write_audio(inputs / "short.wav", sound[:5], RATE)
    write_audio(inputs / "silent.wav", 0 * sound, RATE)
    (inputs / "broken.wav").write_text("no sound")
    done, skipped = separate_files(own, [inputs, inputs / "b.wav"], tmp_path / "out", Separating())
    assert [each.name for each in done][:2] == ["b.wav", "deep/b.flac"]
    assert [each.paths[0] for each in done][:2] == ["b_speaker1.wav", "deep/b_speaker1.wav"]
    assert done[2].paths[0] == "b_speaker1_2.wav" or done[2].paths[0].endswith("_speaker1.wav")
    told = "file is 8000 Hz, model expects 4000 Hz: resampled; file has 2 channels: their mean is taken"
    assert done[1].note == told
    assert "deep/b.flac: file is 8000 Hz, model expects 4000 Hz: resampled" in caplog.text
    reasons = {each.path: each.reason for each in skipped}
    assert reasons == {
        "short.wav": "is shorter than a frame of the network, 16 samples",
        "silent.wav": "is silent",
        "broken.wav": "Format not recognised.",
    }
    plain, other = results(tmp_path / "out", "b"), results(tmp_path / "out" / "deep", "b")
    assert read_audio(tmp_path / "out" / "b_speaker1.wav").subtype == "PCM_16"
    np.testing.assert_allclose(np.abs(plain).max(1), np.abs(sound / 2).max(), atol=1e-3)
    np.testing.assert_allclose(other[:, 200:-200], plain[:, 200:-200], atol=0.02)
    with pytest.raises(DataError, match=r"short\.wav cannot be separated: is shorter than a frame"):
        separate_files(own, [inputs / "short.wav"], tmp_path / "none", Separating())
    with pytest.raises(DataError, match="expected a recording or a folder of them"):
        separate_files(own, [tmp_path / "missing.wav"], tmp_path / "none", Separating())


def test_whispers_are_separated_like_speech(tmp_path: Path):
    own, found = network(), {}
    for name, level in (("loud", 0.5), ("quiet", 1e-5)):
        write_audio(tmp_path / f"{name}.wav", level * mixture(), RATE, subtype="FLOAT")
        options = Separating(level="none", floats=True, chunk=0.5)
        separate_files(own, [tmp_path / f"{name}.wav"], tmp_path / "out", options)
        found[name] = results(tmp_path / "out", name) / level
    np.testing.assert_allclose(found["quiet"], found["loud"], atol=1e-3 * np.abs(found["loud"]).max())


def test_one_source_is_speech(tmp_path: Path):
    write_audio(tmp_path / "a.wav", mixture(), RATE)
    (done,), _ = separate_files(network(num_sources=1), [tmp_path / "a.wav"], tmp_path / "out", Separating())
    assert done.paths == ("a_speech.wav",)


# -- streams -----------------------------------------------------------------------------------------------------------


def stream(sound: np.ndarray, rate: int = RATE) -> PcmStream:
    return PcmStream(io.BytesIO(encode_pcm(sound.astype(np.float32), "f32le")), "f32le", rate)


@pytest.mark.parametrize("block", [37, 1000])
def test_a_stream_gives_what_the_whole_gives(block: int, tmp_path: Path):
    own, sound, out = network("conv_tasnet_causal"), 0.5 * mixture(), io.BytesIO()
    options = Separating(level="none", block=block, speaker=2, output="f32le")
    report = separate_stream("conv_tasnet_causal", own, stream(sound), tmp_path, options, output=out)
    with torch.no_grad():
        whole = own(torch.from_numpy(sound.astype(np.float32)))
    np.testing.assert_allclose(np.frombuffer(out.getvalue(), "<f4"), whole[1], atol=1e-5)
    kept = np.concatenate([read_audio(tmp_path / f"live_speaker{n}.wav").read() for n in (1, 2)])
    np.testing.assert_allclose(kept, whole.clamp(-1, 1), atol=1e-4)
    assert {part.title for section in report.sections for part in section.parts if hasattr(part, "title")} >= {
        *("The stream", "The beginning", "To listen to")
    }


def test_blocks_go_out_before_the_next_one_comes(tmp_path: Path):
    own, sound, out = network("conv_tasnet_causal"), mixture(800), io.BytesIO()
    data, behind = encode_pcm(sound.astype(np.float32), "f32le"), []

    class Slow(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            behind.append(self.tell() // 4 - len(out.getvalue()) // 2)
            return super().read(count)

    slow = PcmStream(Slow(data), "f32le", RATE)
    separate_stream("x", own, slow, tmp_path, Separating(block=50, speaker=1), output=out)
    assert len(behind) == 17
    assert max(behind) <= own.latency
    assert len(out.getvalue()) == 1600


def test_live_levels_end_where_the_whole_would_be():
    level = LiveLevel(2)
    sources, heard = np.random.default_rng(0).normal(size=(2, 400)).astype(np.float32), np.float32(0.25) * mixture(400)
    blocks = []
    for start in range(0, 400, 50):
        level.mixture(heard[start : start + 50])
        blocks.append(level(100 * sources[:, start : start + 50]))
    np.testing.assert_allclose(level.gain, np.abs(heard).max() / np.abs(100 * sources).max(1), rtol=1e-5)
    joined = np.concatenate(blocks, 1)
    assert 0.5 < np.abs(joined).max() / np.abs(heard).max() < 2.5
    assert level(np.zeros((2, 0), np.float32)).shape == (2, 0)


def test_streams_that_cannot_be_separated_are_refused(tmp_path: Path):
    sound = mixture(500)
    with pytest.raises(Unsupported, match="conv_tasnet cannot separate a stream: streaming needs a causal model"):
        separate_stream("conv_tasnet", network(), stream(sound), tmp_path, Separating())
    own = network("conv_tasnet_causal")
    with pytest.raises(DataError, match="the stream is 8000 Hz, the model expects 4000 Hz: resample it before"):
        separate_stream("x", own, stream(sound, 8000), tmp_path, Separating())
    with pytest.raises(ValueError, match="speaker must be from 1 to 2, got 3"):
        separate_stream("x", own, stream(sound), tmp_path, Separating(speaker=3))
    with pytest.raises(DataError, match="the stream has 0 samples, the network needs 16 at least"):
        separate_stream("x", own, stream(sound[:0]), tmp_path, Separating())
    for option in ({"chunk": 0.0}, {"block": 0}, {"speaker": 0}, {"rate": 0}, {"channels": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            Separating(**option)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_verb_separates_files_and_tells_its_options(trained: Path, tmp_path: Path, capsys: Any):
    write_audio(tmp_path / "a.wav", mixture() / 2, RATE)
    words = [str(trained), str(tmp_path / "a.wav"), "--level", "consistent", "--floats", "--out", str(tmp_path / "out")]
    assert main(["predict", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sections"][0]["parts"][0]["rows"][0][0].endswith("a.wav")
    total = results(tmp_path / "out", "a").sum(0)
    assert np.corrcoef(total, mixture())[0, 1] > 0.9
    assert "<audio controls" in (tmp_path / "out" / "report.html").read_text()
    assert main(["predict", *words[:2], "--levle", "peak"]) == 2
    assert "did you mean --level" in capsys.readouterr().err
    assert main(["predict", *words[:2], "--level", "loud"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--sdr", "--out", str(tmp_path / "e")]) == 0
    assert "SDRi" in capsys.readouterr().out


def test_the_verb_separates_a_pipe(trained: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    sound, out = encode_pcm((mixture() / 2).astype(np.float32), "s16le"), io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(sound)))
    monkeypatch.setattr(sys, "__stdout__", SimpleNamespace(buffer=out))
    words = ["predict", str(trained), "-", "--raw", "s16le", "--speaker", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert len(out.getvalue()) == len(sound)
    kept = (tmp_path / "out" / "live_speaker1.wav").read_bytes()[44:]
    assert kept == out.getvalue()
    told = capsys.readouterr()
    assert told.out == ""  # standard output is for the sound
    assert "real-time factor" in told.err
    sys.stdin.buffer.seek(0)
    assert main(["predict", str(trained), "-", "--out", str(tmp_path / "wav")]) == 1
    assert "no WAV; raw samples need to be told by raw" in capsys.readouterr().err


def test_a_published_checkpoint_needs_no_run(trained: Path, tmp_path: Path, capsys: Any):
    case = Path(__file__).parents[1] / "golden" / "cases" / "conv_tasnet" / "asteroid_gln_skip"
    args = {**json.loads(case.with_suffix(".json").read_text())["config"], "sample_rate": RATE}
    weights = load_file(case.with_suffix(".safetensors"))
    state = {key.removeprefix("weights."): value.float() for key, value in weights.items() if "weights." in key}
    torch.save({"model_name": "ConvTasNet", "model_args": args, "state_dict": state}, tmp_path / "model.bin")
    own = ConvTasNet.from_pretrained(tmp_path / "model.bin")
    write_audio(tmp_path / "mix.wav", mixture() / 2, RATE)
    words = ["separate", str(tmp_path / "mix.wav"), "--floats", "-o", str(tmp_path / "out"), "--checkpoint"]
    assert main([*words, str(tmp_path / "model.bin"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Predictions of model.bin"
    found = results(tmp_path / "out", "mix")
    expected = own.separate(torch.from_numpy(read_audio(tmp_path / "mix.wav").read()[0])).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for ours in (trained, trained / "checkpoints" / "best.safetensors"):
        assert main([*words, str(ours), "--level", "none"]) == 0
        assert "written: " in capsys.readouterr().out
    assert main([*words, str(trained), "--options", '{"sample_rate": 16000}']) == 2
    assert "--options cannot change a network of ours" in capsys.readouterr().err
    assert main([*words, str(trained), "--options", "{"]) == 2
    assert main([*words, str(tmp_path / "mix.wav")]) == 1
