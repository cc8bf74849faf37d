"""Clips are read upright and in step, and written whole with their sound."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convatlas.data.video import ColourTags, is_video_name, read_video, write_video
from convatlas.errors import DataError, MissingExtra
from data.clips import SIZE, frames_of, sound_packets, write_clip

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames_of())


def brightness(path: Path) -> list[int]:
    """The upper left pixel of every frame; it rises by 15."""
    return [int(frame[0, -1].mean().round()) for frame in read_video(path)]


def test_a_clip_is_described_and_gives_its_frames(clip: Path):
    video = read_video(clip)
    assert (video.height, video.width) == SIZE
    assert (video.fps, video.count, video.pixel_aspect, video.has_sound) == (25, 12, 1, True)
    frames = list(video)
    assert len(frames) == 12
    for frame, expected in zip(frames, frames_of(), strict=True):
        assert frame.dtype == np.uint8
        assert frame.flags.c_contiguous
        assert np.abs(frame[:, -8:].astype(int) - expected[:, -8:]).max() <= 2
    assert next(int(frame[0, 0, 0]) for frame in video) > 200  # and again from the start


def test_luma_is_given_as_it_lies_in_the_file(clip: Path):
    with av.open(str(clip)) as container:
        planes = [frame.to_ndarray()[: SIZE[0]] for frame in container.decode(video=0)]
    for frame, luma in zip(read_video(clip).frames("ycbcr"), planes, strict=True):
        assert np.array_equal(frame[..., 0], luma)
    full = write_clip(clip.with_name("full.mp4"), [np.full((32, 32, 3), 255, np.uint8)] * 2, form="yuvj420p")
    frame = next(read_video(full).frames("ycbcr"))
    assert frame[0, 0].tolist() == [235, 128, 128]
    assert next(read_video(full).frames())[0, 0].tolist() == [255, 255, 255]


def test_turned_clips_come_upright(clip: Path):
    data = bytearray(clip.read_bytes())
    header = data.index(b"tkhd")
    place = header + 8 + (20 if data[header + 4] == 0 else 32) + 16  # the matrix of the first track, in ISO 14496-12
    assert struct.unpack(">9i", data[place : place + 36])[0] == 65536
    data[place : place + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)  # 90 degrees clockwise
    turned = clip.with_name("turned.mp4")
    turned.write_bytes(data)
    video = read_video(turned)
    assert (video.height, video.width) == SIZE[::-1]
    for frame, upright in zip(video, read_video(clip), strict=True):
        assert np.array_equal(frame, np.rot90(upright, -1))


def test_varying_times_become_constant(tmp_path: Path):
    frames = frames_of(7, (32, 32))
    times = [0, 40, 80, 200, 240, 245, 280]
    path = write_clip(tmp_path / "clip.mkv", frames, sound=None, times=times)
    shown = [round((value - 20) / 15) for value in brightness(path)]
    assert shown == [0, 1, 2, 2, 2, 3, 5, 6]  # the gap is filled, the one too many left out


def test_what_is_written_is_read_again(tmp_path: Path):
    frames = frames_of(5)
    assert write_video(tmp_path / "a.mp4", iter(frames), Fraction(30000, 1001), pixel_aspect=Fraction(4, 3)) == 5
    video = read_video(tmp_path / "a.mp4")
    assert (video.fps, video.count, video.pixel_aspect) == (Fraction(30000, 1001), 5, Fraction(4, 3))
    assert not video.has_sound
    assert video.tags == ColourTags(1, 1, 1)
    for frame, expected in zip(video, frames, strict=True):
        assert np.abs(frame[:, -8:].astype(int) - expected[:, -8:]).max() <= 6


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (48, 63)])
def test_luma_without_loss_at_any_size(tmp_path: Path, size: tuple[int, int]):
    random = np.random.default_rng(0)
    frames = [random.integers(16, 236, (*size, 3), dtype=np.uint8) for _ in range(3)]
    tags = ColourTags(5, 5, 6)
    write_video(tmp_path / "a.mkv", frames, 24, colour="ycbcr", tags=tags, crf=0)
    video = read_video(tmp_path / "a.mkv")
    assert (video.height, video.width) == size
    assert video.tags == tags
    for frame, expected in zip(video.frames("ycbcr"), frames, strict=True):
        assert np.array_equal(frame[..., 0], expected[..., 0])
        if size[1] % 2:  # the chroma lies in full then
            assert np.array_equal(frame, expected)


@pytest.mark.parametrize(("suffix", "sound"), [(".mp4", "aac"), (".mkv", "aac"), (".mkv", "ac3")])
def test_the_sound_is_copied_packet_by_packet(tmp_path: Path, suffix: str, sound: str):
    # Matroska takes any sound, so the source is one.
    source = write_clip(tmp_path / "clip.mkv", frames_of(), sound=sound, delay=0.1)
    before = sound_packets(source)
    write_video(tmp_path / f"copy{suffix}", read_video(source), 25, sound_from=source)
    after = sound_packets(tmp_path / f"copy{suffix}")
    begun = [packet for packet in before if packet[0] < 12 / 25]
    assert len(after) >= len(begun) > 5
    for (time, content), (expected, original) in zip(after, before, strict=False):
        assert content == original
        assert time == pytest.approx(expected, abs=0.002)


def test_the_sound_ends_with_the_frames(tmp_path: Path, clip: Path):
    write_video(tmp_path / "short.mp4", list(read_video(clip))[:3], 25, sound_from=clip)
    packets = sound_packets(tmp_path / "short.mp4")
    assert packets
    assert max(time for time, _ in packets) < 3 / 25
    silent = write_clip(tmp_path / "silent.mp4", frames_of(2), sound=None)
    write_video(tmp_path / "none.mp4", frames_of(2), 25, sound_from=silent)
    assert not read_video(tmp_path / "none.mp4").has_sound


def test_few_frames_are_held_at_a_time(tmp_path: Path):
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def frames():
        nonlocal alive, most
        for frame in frames_of(40, (32, 32)):
            alive += 1
            most = max(most, alive)
            counted = frame.view(Counted)
            del frame
            yield counted
            del counted

    write_video(tmp_path / "long.mp4", frames(), 25)
    assert most < 6


def test_a_clip_that_fails_leaves_nothing(tmp_path: Path, clip: Path):
    def failing():
        yield from frames_of(3)
        raise RuntimeError("stop")

    (tmp_path / "old.mp4").write_bytes(clip.read_bytes())
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises(RuntimeError, match="stop"):
            write_video(tmp_path / name, failing(), 25)
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]
    assert len(list(read_video(tmp_path / "old.mp4"))) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"no video" * 100, "damaged or no video"),
        (None, "does not exist; expected a video file"),
    ],
)
def test_files_that_are_no_clips_are_told(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_video(path)


def test_pictures_texts_and_sounds_are_no_clips(tmp_path: Path, clip: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    with av.open(str(clip)) as source, av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as out:
        track = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = track
                out.mux(packet)
    for name in ("a.png", "a.txt", "a.m4a"):
        with pytest.raises(DataError, match=f"{name} cannot be read: it holds no video"):
            read_video(tmp_path / name)
    with pytest.raises(DataError, match="is a folder; expected a video file"):
        read_video(tmp_path)


def test_damage_is_told_with_its_place(clip: Path, tmp_path: Path):
    path = write_clip(
        tmp_path / "clip.mp4", [np.random.default_rng(n).integers(0, 255, (64, 64, 3), np.uint8) for n in range(9)]
    )
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged after \d+ frames"):
        list(read_video(path))
    path.write_bytes(bytes(data[:2000]))
    with pytest.raises(DataError, match="cannot be read: it is damaged or no video"):
        read_video(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "a.webm"}, "path must end in .mp4, .m4v, .mov, .mkv, got 'a.webm'"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"crf": 52}, "crf must be from 0 to 51, got 52"),
        ({"colour": "yuv"}, "unknown colour 'yuv'"),
        ({"frames": []}, "frames must not be empty"),
        ({"frames": [np.zeros((4, 4), np.uint8)]}, r"frames must be \(H, W, 3\) uint8, got uint8 \(4, 4\)"),
        ({"frames": [np.zeros((4, 4, 3))]}, r"frames must be \(H, W, 3\) uint8, got float64"),
        ({"frames": [np.zeros((4, 4, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]}, r"one size, got \(6, 4\) after"),
        ({"sound_from": "missing.wav"}, "the sound of missing.wav cannot be read"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
):
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "a.mp4", "frames": frames_of(2), "fps": 25, **changes}
    with pytest.raises(ValueError, match=message):
        write_video(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_names():
    assert is_video_name("a/clip.MP4")
    assert is_video_name(Path("clip.webm"))
    assert not is_video_name(".clip.mp4")
    assert not is_video_name("clip.png")


def test_without_av_the_extra_is_named(clip: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"reading a video needs the package av: pip install 'convatlas\[video\]'"):
        read_video(clip)
    with pytest.raises(MissingExtra, match="writing a video needs the package av"):
        write_video(clip.with_name("b.mp4"), frames_of(1), 25)
