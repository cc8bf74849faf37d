"""Playing delivered videos: packages and small clips become clips of full size, a few frames in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from convatlas.data.images import Skipped
from convatlas.data.video import Frame, Video, is_video_name, read_video, write_video
from convatlas.errors import CheckpointError, DataError
from convatlas.files import free_name
from convatlas.networks.base import Upscaler
from convatlas.restoration.delivery import LOW, Described, Playback, is_package, read_package
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.upscaling import upscale_video
from convatlas.training.progress import progress

__all__ = ["Played", "play_files"]


@dataclass(frozen=True, eq=False)
class Played:
    """A video that was enlarged.

    Attributes:
        name: of the input.
        path: of the result, relative to the output folder.
        before, after: height and width.
        frames: that were enlarged.
        networks: that took part.
        seconds: from reading to writing.
        shown: a frame by bicubic interpolation and by the networks, (H, W, 3) uint8 each.
    """

    name: str
    path: str
    before: tuple[int, int]
    after: tuple[int, int]
    frames: int
    networks: int
    seconds: float
    shown: tuple[Frame, Frame]


def play_files(
    playback: Playback, described: Described, inputs: Sequence[str | Path], folder: Path
) -> tuple[list[Played], list[Skipped]]:
    """Enlarge packages, and clips by given networks.

    Args:
        playback: networks for clips.
        described: what they are.
        inputs: packages, runs with a package in them, and clips of low resolution.
        folder: where to write.

    Returns:
        What was written, and what was left out with the reasons.

    Raises:
        DataError: an input does not exist, or nothing can be played.
        OSError: a file cannot be written.
    """
    done: list[Played] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for given in map(Path, inputs):
        if not given.exists():
            raise DataError(f"{given} does not exist; expected a package, a run or a clip")
        try:
            if given.is_dir():
                place = given if is_package(given) else given / "package"
                own, told = read_package(place)
                name = f"{Path(str(told.settings.get('data', given.name))).stem}.mp4"
                done.append(_played(own, read_video(place / LOW), str(given), name, folder, taken))
            elif not is_video_name(given):
                raise DataError("it is no clip")
            else:
                video = read_video(given)
                delivered = (video.height, video.width) == playback.low_size and video.count == described.frames
                player: Playback | Upscaler = playback if delivered else _only(playback, described)
                done.append(_played(player, video, str(given), given.name, folder, taken))
        except (DataError, CheckpointError) as error:
            skipped.append(Skipped(str(given), str(error)))
    if not done:
        raise DataError(f"{skipped[0].path} cannot be played: {skipped[0].reason}" if skipped else "nothing was given")
    return done, skipped


def _only(playback: Playback, described: Described) -> Upscaler:
    """The network for a clip of which it is not known where which network belongs."""
    if len(playback.networks) > 1:
        raise DataError(
            f"which of the {len(playback.networks)} networks its patches need is known only of the delivered clip "
            f"({described.frames} frames of {playback.low_size[1]} x {playback.low_size[0]} pixels)"
        )
    network = playback.networks[0]
    if not isinstance(network, Upscaler):
        raise DataError("the network enlarges patches only")
    return network


def _played(player: Playback | Upscaler, video: Video, name: str, result: str, folder: Path, taken: set[str]) -> Played:
    started = time.perf_counter()
    scale = player.scale
    written = free_name(Path(result).name, f"x{scale}", ".mp4", taken)
    kept: dict[str, Frame] = {}

    def watched(frames: Iterator[Frame], what: str) -> Iterator[Frame]:
        for number, frame in enumerate(frames):
            if number in (0, video.count // 3):
                kept[what] = frame
            yield frame

    with progress(name, video.count) as advance:
        small = watched(video.frames(), "before")
        large = player.play(small) if isinstance(player, Playback) else upscale_video(player, small)

        def counted() -> Iterator[Frame]:
            for frame in watched(iter(large), "after"):
                yield frame
                advance()

        frames = write_video(
            folder / written,
            counted(),
            video.fps,
            sound_from=video.path if video.has_sound else None,
            pixel_aspect=video.pixel_aspect,
        )
    after = kept["after"]
    bicubic = Protocol().bicubic(kept["before"], scale)[: after.shape[0], : after.shape[1]]
    count = len(player.networks) if isinstance(player, Playback) else 1
    seconds = time.perf_counter() - started
    return Played(name, written, kept["before"].shape[:2], after.shape[:2], frames, count, seconds, (bicubic, after))
