"""The task of video delivery: a clip becomes a small clip and networks that are fitted to enlarge it (STDO, JSTDO).

Li, Ji, Qin et al.: "Towards High-Quality and Efficient Video Super-Resolution via Spatial-Temporal Data Overfitting",
CVPR 2023, arXiv 2303.08331. The division by time is that of NAS and awDNN, which it is compared with.
"""

# No postponed annotations here: the command line is built from the real types of the fields.

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

import numpy as np
import torch
from torch import Tensor

from convatlas.data.footage import Footage, read_footage
from convatlas.data.video import Frame, read_video, write_video
from convatlas.errors import DataError, Interrupted, Unsupported, unknown
from convatlas.files import atomic_path, write_text
from convatlas.networks.base import DenoiserConfig, Upscaler, UpscalerConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.report import Report
from convatlas.restoration.chunk_fitting import ChunkFit, FramePairs, PatchPairs
from convatlas.restoration.delivery import (
    LOW,
    Described,
    PackageBytes,
    Playback,
    Store,
    is_package,
    read_package,
    write_package,
)
from convatlas.restoration.delivery_quality import (
    DeliveryQuality,
    PlainVideo,
    encode_plainly,
    fill,
    measure_delivery,
    write_frame_quality,
)
from convatlas.restoration.patches import Shelf
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.video_chunks import (
    Chunks,
    Division,
    JointSampling,
    PatchGrid,
    chunk_by_psnr,
    chunk_by_time,
    chunk_randomly,
    complexity,
    patch_errors,
    patch_psnr,
)
from convatlas.training.progress import progress
from convatlas.training.run import Run, check_same_settings, from_mapping, to_mapping
from convatlas.training.settings import MOVABLE, Training
from convatlas.training.task import Task, is_helper
from convatlas.weights import load_weights

__all__ = ["VideoDelivery"]

#: Height and width of a patch at low resolution that grids are made for where none is given: 10 x 20 patches of a frame
#: of 1080 x 1920 pixels at scale 2, 5 x 10 at scale 4, as the paper has them. Small frames get a few patches more.
_PATCH, _LEAST_GRID = (54, 48), 4
_GENERAL = "general"
_MOST_CHUNKS = 256  # their numbers have 8 bits


@dataclass(kw_only=True, eq=False)
class VideoDelivery(Task):
    """Deliver a clip as a small clip with networks that are fitted to enlarge it.

    Attributes:
        data: a clip; a folder of numbered pictures, 30 a second; or ``photographs`` for a clip made of two.
        model: name of the network, which says how many times the clip is shrunk; ``convatlas list --models``.
        options: fields of the network's config to change, e.g. ``{"channels": 16}``.
        weights: a general network of that kind to begin with: a checkpoint, ``hf://owner/name``, or ``https://...``.
        general_epochs: without ``weights``, epochs of a network for all patches, which tells how hard each patch is;
            0 asks bicubic interpolation instead.
        start: whether the networks start from the ``general`` one or from ``scratch``.
        division: what patches are grouped by: ``psnr`` of the general network (STDO); ``time`` (NAS; awDNN with one
            chunk); or, for comparison, ``variance``, ``dct`` energy, or at ``random``.
        chunks: how many groups; each has a network of its own.
        segment_seconds: length of the chunks by time, instead of their number.
        joint: one network for all chunks (JSTDO), which visits the easier ones less: a ``fraction`` of them in each
            epoch, or by a ``curriculum`` that leaves them out one after the other; ``uniform`` visits all alike.
        fraction: share of the patches of the second hardest chunk in an epoch, its square of the third, and so on.
        drops: epochs of the curriculum after which the easiest chunk that is left is dropped; evenly spread when left
            out.
        grid: rows and columns of patches; of about 54 x 48 pixels of low resolution when left out.
        halo: pixels of low resolution that a patch sees of its neighbours, against seams between them; the network's
            reach leaves none. The paper has 0.
        shave: pixels left out along the border of a patch when its PSNR is measured; scale + 4 when left out.
        crf: rate factor of the small clip: 0 loses nothing but chroma, 51 nearly everything.
        store: how weights are delivered.
        compress: whether the numbers of the patches' networks are compressed.
        plain_crfs: rate factors by which the clip itself is encoded, to compare bytes with.
    """

    name: ClassVar[str] = "video-delivery"
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict", "compare")
    #: As the reference trains: Adam, cosine to nearly nothing, batches of 16 patches.
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"epochs": 50, "batch_size": 16, "lr": 1e-3, "min_lr": 4e-8, "weight_decay": 0.0, "warmup_epochs": 0.0}
    }

    data: str = "photographs"
    model: str = "espcn_x2"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    general_epochs: int = 10
    start: Literal["general", "scratch"] = "general"
    division: Division = "psnr"
    chunks: int = 2
    segment_seconds: float | None = None
    joint: Literal["no", "fraction", "curriculum", "uniform"] = "no"
    fraction: float = 0.5
    drops: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    halo: int = 4
    shave: int | None = None
    crf: int = 18
    store: Store = "float16"
    compress: bool = True
    plain_crfs: tuple[int, ...] = (23, 28, 33, 38)

    playback: Playback = field(init=False, repr=False)
    described: Described = field(init=False, repr=False)
    folder: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._config()  # unknown names are told before any data are read
        if "in_channels" in self.options:
            raise ValueError("options must not hold in_channels: videos are RGB")
        for name, choices in (("division", Division), ("store", Store)):
            if getattr(self, name) not in get_args(choices):
                raise unknown(name, str(getattr(self, name)), get_args(choices))
        for name, least in (("chunks", 1), ("general_epochs", 0), ("halo", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.chunks > _MOST_CHUNKS:
            raise ValueError(f"chunks must be at most {_MOST_CHUNKS}, got {self.chunks}")
        if self.start not in ("general", "scratch"):
            raise ValueError(f"start must be 'general' or 'scratch', got {self.start!r}")
        if self.start == "general" and self.weights is None and not self.general_epochs:
            raise ValueError("start must be 'scratch' without weights and with general_epochs 0: there is no other")
        if self.segment_seconds is not None and (self.division != "time" or not self.segment_seconds > 0):
            raise ValueError(
                f"segment_seconds must be positive and is for the division by time, got {self.segment_seconds} with "
                f"the division {self.division}"
            )
        if self.joint == "no" and self.drops:
            raise ValueError(f"drops are for the joint training by curriculum, got {self.drops} with joint no")
        if self.joint != "no":
            JointSampling(np.zeros(1, np.int64), self.joint, self.fraction, self.drops)  # its checks
        if self.grid is not None:
            PatchGrid(*self.grid)
        for crf in (self.crf, *self.plain_crfs):
            if not 0 <= crf <= 51:
                raise ValueError(f"crf and plain_crfs must be from 0 to 51, got {crf}")

    def _config(self) -> UpscalerConfig:
        config = model_config(self.model, **self.options)
        if not isinstance(config, UpscalerConfig) or isinstance(config, DenoiserConfig):
            raise Unsupported(f"{self.model} is not a network for super-resolution")
        if getattr(config, "frames", 1) != 1:
            raise Unsupported(f"{self.model} must take one frame at a time, got frames {config.frames}")  # type: ignore[attr-defined]
        return config.override(in_channels=3)

    @property
    def _network_options(self) -> dict[str, Any]:
        return {**self.options, "in_channels": 3}

    @property
    def scale(self) -> int:
        """How many times the clip is shrunk and enlarged."""
        return self._config().scale

    @property
    def border(self) -> int:
        """Pixels left out along the border of a patch when its PSNR is measured."""
        return self.scale + 4 if self.shave is None else self.shave

    @property
    def network(self) -> Upscaler:
        """The network of a finished run that has only one.

        Raises:
            Unsupported: it has several.
        """
        if len(self.playback.networks) != 1:
            raise Unsupported(
                f"this run holds {len(self.playback.networks)} networks; take one of the files "
                "fits/*/checkpoints/best.safetensors"
            )
        return cast(Upscaler, self.playback.networks[0])

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """What a network takes for a batch of patches."""
        height, width = self.playback.grid.patch_size(*self.playback.low_size)
        around = 2 * self.playback.halo
        return (torch.rand(batch, 3, height + around, width + around),)

    # Fitting

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Shrink the clip, tell its patches apart, fit the networks one after the other, and write the package.

        Each fit is a run of its own below ``fits``: what was stopped goes on within the fit that was under way.

        Args:
            run: folder of the run; new, unless ``resume``.
            training: of each fit; the task's ``defaults`` when left out.
            resume: go on with an interrupted run; a finished one gets its report again.

        Returns:
            The report, also written as ``report.html`` and ``report.json``.

        Raises:
            DataError: the clip cannot be used, or is not the one that the run began with.
            SettingsError: ``resume`` is asked with other settings than those of the run.
            FileExistsError: the folder is not empty and ``resume`` is off.
            Interrupted: the user stopped the run; its state is saved.
            MissingExtra: the package av is not installed.
        """
        training = training or Training(**self.defaults)
        if training.devices != 1 or training.nodes != 1 or is_helper():
            raise ValueError(f"devices and nodes must be 1: fits follow each other, got {training.devices} devices")
        settings = {**to_mapping(self), **to_mapping(training)}
        opened = Run.open(run) if resume else Run(run)
        if resume:
            check_same_settings({n: settings[n] for n in settings.keys() - set(MOVABLE)}, opened.settings())
        else:
            opened.check_unused()
        footage = read_footage(self.data)
        try:
            if not resume:
                opened = Run.create(run, self.name, settings)
            report = self._fit_all(opened, footage, training)
            report.save(opened.folder)
        except (KeyboardInterrupt, Interrupted) as stopped:
            how = f"go on with 'convatlas train {self.name} --resume {opened.folder}'"
            raise Interrupted(f"stopped; {how}", getattr(stopped, "exit_code", 130)) from None
        except Exception:
            opened.withdraw()
            raise
        return report

    def _fit_all(self, run: Run, footage: Footage, training: Training) -> Report:
        from convatlas.restoration.stdo_reports import training_report

        self.folder = run.folder / "package"
        pairs, digest = self._read(run, footage)
        chunks, labels, general = self._divide(run, pairs, footage, training)
        fits = self._plan(chunks, training)
        networks = [
            self._fitted(run, pairs, label, numbers, training, sampling=sampling, start=general)
            for label, numbers, sampling in fits
        ]
        index = np.zeros_like(chunks.index) if self.joint != "no" else chunks.index
        described = self._describe(len(networks), footage, len(pairs.low), pairs.grid, digest)
        shape = (len(pairs.low), len(pairs.grid))
        write_package(self.folder, networks, index.reshape(shape).astype(np.uint8), described)
        self.playback, self.described = read_package(self.folder)  # what a client has
        names = [_GENERAL] if self._fits_general() else []
        self._write_metrics(run, [*names, *(label for label, _, _ in fits)])
        quality = self._measure(footage)
        write_frame_quality(run.folder / "quality.csv", quality)
        return training_report(self, run, footage, quality, self._plain(footage), chunks, labels)

    # -- frames

    def _read(self, run: Run, footage: Footage) -> tuple[FramePairs, str]:
        """Shrink and encode the clip, and read what a client will see of it."""
        grid = self._grid(footage.size)
        pairs, shelf, known = FramePairs(grid, self.scale, self.halo), Shelf(), run.folder / "clip.json"
        filled, low = grid.filled(*footage.size, self.scale), self.folder / LOW
        height, width = grid.patch_size(*filled)
        if 2 * self.border >= min(height, width):
            raise DataError(
                f"patches of {height} x {width} pixels are too small to leave out {self.border} along every border: "
                "choose a smaller grid or shave"
            )
        hashed, protocol = hashlib.sha256(), Protocol()

        def shrunk() -> Iterator[Frame]:
            with progress("reading the clip", footage.count) as advance:
                for frame in footage.frames():
                    if frame.shape[:2] != footage.size:
                        raise DataError(f"frames must have one size, got {frame.shape[:2]} after {footage.size}")
                    hashed.update(np.ascontiguousarray(frame).data)
                    pairs.high.append(shelf.keep(fill(frame, filled)))
                    yield protocol.shrink(pairs.high[-1], self.scale)
                    advance()

        if low.is_file():
            for _ in shrunk():
                pass
        else:
            sound = footage.sound_from
            write_video(low, shrunk(), footage.fps, sound_from=sound, pixel_aspect=footage.pixel_aspect, crf=self.crf)
        pairs.low = [shelf.keep(frame) for frame in read_video(low)]
        digest = hashed.hexdigest()[:16]
        told = {"digest": digest, "frames": len(pairs.high), "size": list(footage.size)}
        if not known.is_file():
            write_text(known, json.dumps(told) + "\n")
        elif json.loads(known.read_text(encoding="utf-8")) != told:
            raise DataError(f"{footage.name} has changed since the run began")
        if len(pairs.low) != len(pairs.high):
            raise DataError(f"{low} holds {len(pairs.low)} frames, {footage.name} {len(pairs.high)}")
        return pairs, digest

    def _grid(self, size: tuple[int, int]) -> PatchGrid:
        if self.grid is not None:
            return PatchGrid(*self.grid)
        counts = (round(length / self.scale / patch) for length, patch in zip(size, _PATCH, strict=True))
        return PatchGrid(*(max(_LEAST_GRID, count) for count in counts))

    # -- chunks

    def _fits_general(self) -> bool:
        needed = self.division == "psnr" or self.start == "general"
        return needed and self.weights is None and self.general_epochs > 0

    def _divide(
        self, run: Run, pairs: FramePairs, footage: Footage, training: Training
    ) -> tuple[Chunks, np.ndarray[Any, Any] | None, Upscaler | None]:
        """The chunks, the labels they follow from, and the network to start from."""
        most = len(pairs.low) if self.division == "time" else len(pairs)
        if self.segment_seconds is None and self.chunks > most:
            what = "frames" if self.division == "time" else "patches"
            raise DataError(f"chunks must be at most the {most} {what} of the clip, got {self.chunks}")
        general: Upscaler | None = None
        if self._fits_general():
            short = dataclasses.replace(
                training, epochs=self.general_epochs, warmup_epochs=0.0, cooldown_epochs=0.0, patience=None
            )
            general = self._fitted(run, pairs, _GENERAL, np.arange(len(pairs)), short)
        elif self.weights is not None and (self.division == "psnr" or self.start == "general"):
            general = self._config().build()
            load_weights(general, published_source(self.model) if self.weights == "published" else self.weights)
            general.eval()
        frames, patches = len(pairs.low), len(pairs.grid)
        labels: np.ndarray[Any, Any] | None = None
        if self.division == "time":
            seconds = float(frames / footage.fps)
            count = self.chunks if self.segment_seconds is None else math.ceil(seconds / self.segment_seconds)
            chunks = chunk_by_time(frames, patches, count)
        elif self.division == "random":
            chunks = chunk_randomly(len(pairs), self.chunks, training.seed)
        else:
            labels = self._labels(run, pairs, general)
            chunks = chunk_by_psnr(labels, self.chunks)
        _, index = np.unique(chunks.index, return_inverse=True)  # equal labels may leave a chunk empty
        if int(index.max()) > _MOST_CHUNKS - 1:
            raise DataError(f"there must be at most {_MOST_CHUNKS} chunks, got {int(index.max()) + 1}")
        chunks = Chunks(index.astype(np.int64), chunks.thresholds)
        self._write_array(run.folder / "assignment.npy", index.reshape(frames, pairs.grid.rows, -1).astype(np.uint8))
        bounds = [float(value) if np.isfinite(value) else str(value) for value in chunks.thresholds]
        write_text(run.folder / "thresholds.json", json.dumps(bounds) + "\n")
        return chunks, labels, general if self.start == "general" else None

    def _labels(self, run: Run, pairs: FramePairs, general: Upscaler | None) -> np.ndarray[Any, Any]:
        path = run.folder / "labels.npy"
        if path.is_file():
            return cast(np.ndarray[Any, Any], np.load(path, allow_pickle=False))
        found, zeros = [], np.zeros((len(pairs.low), len(pairs.grid)), np.uint8)
        player = None
        if general is not None and self.division == "psnr":
            size = pairs.high[0].shape[:2]
            player = Playback([general], zeros, pairs.grid, size, halo=self.halo)
        with progress("telling the patches apart", len(pairs.low)) as advance:
            for number, (low, high) in enumerate(zip(pairs.low, pairs.high, strict=True)):
                truth = torch.from_numpy(np.array(high)).permute(2, 0, 1)
                if self.division in ("variance", "dct"):
                    found.append(complexity(truth, pairs.grid, self.division))
                else:
                    large = Protocol().bicubic(low, self.scale) if player is None else player.filled(low, number)
                    enlarged = torch.from_numpy(large).permute(2, 0, 1)[None].double() / 255
                    found.append(patch_psnr(patch_errors(enlarged, truth[None], pairs.grid, shave=self.border)))
                advance()
        labels = torch.cat(found).numpy()
        self._write_array(path, labels)
        return labels

    @staticmethod
    def _write_array(path: Path, values: np.ndarray[Any, Any]) -> None:
        with atomic_path(path) as part, part.open("wb") as file:
            np.save(file, values, allow_pickle=False)

    def _plan(self, chunks: Chunks, training: Training) -> list[tuple[str, np.ndarray[Any, Any], JointSampling | None]]:
        """The fits in order: their names, the patches and which of them an epoch visits."""
        count = int(chunks.index.max()) + 1
        if self.joint == "no":
            return [(f"chunk{chunk}", np.flatnonzero(chunks.index == chunk), None) for chunk in range(count)]
        drops = self.drops
        if self.joint == "curriculum" and not drops:
            drops = tuple(sorted({max(1, round(training.epochs * step / count)) for step in range(1, count)}))
        sampling = JointSampling(chunks.index, self.joint, self.fraction, drops)
        return [("joint", np.arange(len(chunks.index)), sampling)]

    def _fitted(
        self,
        run: Run,
        pairs: FramePairs,
        label: str,
        numbers: np.ndarray[Any, Any],
        training: Training,
        *,
        sampling: JointSampling | None = None,
        start: Upscaler | None = None,
    ) -> Upscaler:
        """A network fitted to some patches; one that was finished before is read, one that was stopped goes on."""
        own = Run(run.folder / "fits" / label)
        task = ChunkFit(label=label, model=self.model, options=self._network_options, shave=self.border)
        task.begin(PatchPairs(pairs, numbers, sampling), None if start is None else start.state_dict())
        if (own.folder / "report.html").is_file():
            network = self._config().build()
            load_weights(network, own.best)
            return network.eval()
        task.fit(own.folder, training, resume=own.config.is_file())
        return task.network.cpu().eval()

    def _write_metrics(self, run: Run, labels: Sequence[str]) -> None:
        rows = [
            {"fit": number, **row}
            for number, label in enumerate(labels)
            for row in Run(run.folder / "fits" / label).read_metrics()
        ]
        run.write_metrics(rows)

    def _describe(self, count: int, footage: Footage, frames: int, grid: PatchGrid, digest: str) -> Described:
        settings = {**to_mapping(self), "data": Path(self.data).name, "weights": None}
        if self.start == "general" and not self.general_epochs:
            settings["start"] = "scratch"  # the weights stay with the server
        return Described(
            model=self.model,
            options=self._network_options,
            count=count,
            grid=(grid.rows, grid.columns),
            halo=self.halo,
            size=footage.size,
            frames=frames,
            store=self.store,
            compress=self.compress,
            digest=digest,
            settings=settings,
        )

    # Use

    def _measure(self, footage: Footage) -> DeliveryQuality:
        with progress("measuring", self.described.frames) as advance:
            show = self.described.frames // 3
            low = read_video(self.folder / LOW)
            return measure_delivery(self.playback, low, footage.frames(), shave=self.border, show=show, advance=advance)

    def _plain(self, footage: Footage) -> list[PlainVideo]:
        if not self.plain_crfs:
            return []
        with progress("encoding the clip plainly", len(self.plain_crfs)) as advance:
            return encode_plainly(footage, self.plain_crfs, advance)

    def quality(self) -> dict[str, float]:
        """PSNR of the whole clip and bytes of the package of a finished run."""
        psnr = self._measure(read_footage(self.data)).psnr
        return {"PSNR [dB]": psnr, "bytes [kB]": PackageBytes.of(self.folder).total / 1000}

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Play the delivered video and compare it with the clip that it was made of, in quality and bytes.

        Args:
            data: that clip, where it is not at its old place any more.
            folder: where to write the report and ``quality.csv``.

        Raises:
            DataError: the clip cannot be read, or has other frames than those delivered.
        """
        from convatlas.restoration.stdo_reports import evaluation_report

        footage = read_footage(self.data if data is None else data)
        if footage.size != self.described.size:
            raise DataError(
                f"{footage.name} has frames of {footage.size} pixels, the networks are for a clip of "
                f"{self.described.size}: they were fitted to that clip and serve no other"
            )
        quality = self._measure(footage)
        report = evaluation_report(self, footage, quality, self._plain(footage))
        if folder is not None:
            write_frame_quality(Path(folder) / "quality.csv", quality)
            report.save(folder)
        return report

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Play packages, or small clips by the networks of this run: writes an MP4 of full size for each, with sound.

        Args:
            inputs: packages or runs; or clips of low resolution. A clip that is not the delivered one can be enlarged
                if there is only one network.
            folder: where to write.

        Raises:
            DataError: nothing can be played.
        """
        from convatlas.restoration.playing import play_files
        from convatlas.restoration.stdo_reports import playing_report
        from convatlas.training.left_out import tell_skipped

        done, skipped = play_files(self.playback, self.described, inputs, Path(folder))
        tell_skipped(skipped)
        report = playing_report(self.described, done, skipped)
        report.save(folder)
        return report

    @classmethod
    def compare(cls, tasks: Mapping[str, Self], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several ways to deliver the same clip: quality, bytes, speed.

        Raises:
            ValueError: the tasks deliver different clips.
        """
        from convatlas.restoration.stdo_reports import comparison_report

        if len({task.described.digest for task in tasks.values()}) > 1:
            raise ValueError("all must deliver the same clip to be compared")
        footage = read_footage(next(iter(tasks.values())).data)
        qualities = {name: task._measure(footage) for name, task in tasks.items()}
        return comparison_report(tasks, runs, footage, qualities, next(iter(tasks.values()))._plain(footage))

    # Files

    def save(self, path: str | Path) -> Path:
        """Copy the package: all that a client needs to play, evaluate and predict.

        Raises:
            FileExistsError: there is something at ``path``.
        """
        target = Path(path)
        if target.exists():
            raise FileExistsError(f"{target} already exists: choose another folder")
        shutil.copytree(self.folder, target)
        return target

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a finished run, or a package of one, ready to play.

        Raises:
            DataError: it is neither, or the run is not finished.
            CheckpointError: the networks cannot be read.
        """
        folder = Path(source)
        place = folder if is_package(folder) else folder / "package"
        if not is_package(place):
            Run.open(folder)
            raise DataError(f"{folder} is not finished; go on with 'convatlas train {cls.name} --resume {folder}'")
        playback, described = read_package(place)
        settings: dict[str, Any] = dict(described.settings)
        if place != folder and (folder / "config.yaml").is_file():
            known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
            settings = {name: value for name, value in Run.open(folder).settings().items() if name in known}
        task = from_mapping(cls, settings)
        task.playback, task.described, task.folder = playback, described, place
        return task
