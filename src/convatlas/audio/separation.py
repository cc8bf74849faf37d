"""The separation task: a network that learns to take the voices of a recording apart."""

# No postponed annotations here: the command line is built from the real types of the fields.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from convatlas.audio.separation_evaluation import Measured, mean_quality, measure_mixtures
from convatlas.audio.separation_options import Measuring, Separating
from convatlas.data.audio import find_audio
from convatlas.data.images import Skipped
from convatlas.data.mixing_voices import (
    Made,
    Maker,
    MixedPieces,
    Mixing,
    Mixtures,
    Scenario,
    Sound,
    Voices,
    Waveform,
    WholeMixtures,
    collate_mixtures,
)
from convatlas.data.mixtures import Reading, divide_mixtures, divide_voices, mixtures_digest, read_mixtures
from convatlas.data.voices import SPEAKERS, voices
from convatlas.errors import DataError, Unsupported
from convatlas.networks.conv_tasnet.network import ConvTasNet, ConvTasNetConfig
from convatlas.networks.registry import model_config, published_source
from convatlas.nn.separation_losses import PITLoss, SignalRatioLoss
from convatlas.ops.signal_ratios import Ratio, si_snr_improvement
from convatlas.report import Report
from convatlas.training.left_out import tell_skipped
from convatlas.training.progress import progress
from convatlas.training.run import Run
from convatlas.training.sampling import mixed_seed
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["Separation"]

#: Simulated voices of each kind of speaker: to learn from, to choose the best epoch by, and for the end.
_SIMULATED = {"train": 200, "val": 24, "test": 24}


@dataclass(kw_only=True, eq=False)
class Separation(GradientTask):
    """Train a network to separate the speakers of a recording, or speech from noise.

    Attributes:
        data: a folder with a folder of recordings for each speaker, of which mixtures are made on the fly; a folder
            with ``mix``, ``s1``, ``s2``, ... (WSJ0-2mix, WHAM), or a table or folder of LibriMix; each may be split
            into ``train``, ``val`` and ``test`` (``tr``, ``cv``, ``tt``; ``dev``); or ``voices`` for simulated ones.
        model: name of a separating network, e.g. ``conv_tasnet`` or ``conv_tasnet_causal``.
        options: fields of the network's config to change, e.g. ``{"num_sources": 3, "sample_rate": 16000}``.
        weights: where to start from: a checkpoint, ``hf://owner/name``, ``https://...``, or ``published``.
        scenario: what is heard and to be found: ``sep_clean`` (speakers), ``sep_noisy`` (speakers in noise),
            ``enh_single`` (one speaker in noise, without the noise) or ``enh_both`` (the same of several at once).
        segment: length of the pieces to learn from, in seconds. Given mixtures that are shorter are left out; shorter
            recordings of a speaker are put one after the other.
        mixing: levels of mixtures that are made on the fly, and noise.
        sources: names of the folders of the sources, where they are not ``s1``, ``s2``, ...
        part: which training folder or table, where there are several, e.g. ``train-360``.
        resample: whether files of another sample rate than the network's are resampled; they are an error otherwise.
        loss: signal ratio that is maximised: ``si_snr``, ``sd_sdr`` or ``snr``.
        order: ``any`` for permutation-invariant training, or ``fixed`` where the first source is always to come first.
        epoch_mixtures: mixtures of an epoch, where they are made on the fly.
        held_out_mixtures: mixtures to choose the best epoch by, and as many for the end, where they are made.
        split_by: what is held out of recordings without a split: ``recordings`` or whole ``speakers``.
        val_fraction: share held out to choose the best epoch, where the data have no split.
        test_fraction: share held out to measure the quality, where the data have no split.
        split_seed: of the random split and of the held-out mixtures.
    """

    name: ClassVar[str] = "separation"
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val_si_snri", "max")
    verb_options: ClassVar[Mapping[str, type[Any]]] = {"evaluate": Measuring, "predict": Separating}
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"epochs": 50, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.0, "warmup_epochs": 0.0, "clip": 5.0},
        **{"schedule": "plateau", "decay_rate": 0.5, "plateau_epochs": 3, "patience": 30},
    }

    data: str = "voices"
    model: str = "conv_tasnet"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    scenario: Scenario = "sep_clean"
    segment: float = 3.0
    mixing: Mixing = field(default_factory=Mixing)
    sources: tuple[str, ...] = ()
    part: str | None = None
    resample: bool = True
    loss: Ratio = "si_snr"
    order: Literal["any", "fixed"] = "any"
    epoch_mixtures: int = 1000
    held_out_mixtures: int = 50
    split_by: Literal["recordings", "speakers"] = "recordings"
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0

    network: ConvTasNet = field(init=False, repr=False)
    splits: dict[str, Voices | Mixtures] = field(init=False, default_factory=dict)
    unreadable: dict[str, str] = field(init=False, default_factory=dict)
    notes: tuple[str, ...] = field(init=False, default=())
    started_from: str = field(init=False, default="")
    data_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._config()  # unknown names are told before any data are read
        for name, known in (("loss", Ratio), ("scenario", Scenario)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        for name, words in (("order", ("any", "fixed")), ("split_by", ("recordings", "speakers"))):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        if not 0 < self.segment < float("inf"):
            raise ValueError(f"segment must be positive, got {self.segment}")
        for name in ("epoch_mixtures", "held_out_mixtures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.scenario.startswith("enh") and self._config().num_sources != 1:
            raise ValueError(
                f"the scenario {self.scenario} finds one source: set num_sources to 1 in options, "
                f"it is {self._config().num_sources}"
            )

    def _config(self) -> ConvTasNetConfig:
        config = model_config(self.model, **self.options)
        if not isinstance(config, ConvTasNetConfig):
            raise Unsupported(f"{self.model} is not a network for separation")
        return config

    # Data and network

    def prepare(self) -> None:
        """Find and split the sounds and build the network.

        Raises:
            DataError: the data cannot be read, are too few, or do not suit the network.
            CheckpointError: ``weights`` do not fit.
        """
        config = self._config()
        self.network = config.build()
        if self.weights is not None:
            source = published_source(self.model) if self.weights == "published" else self.weights
            self.started_from = f"{self.weights}: {load_weights(self.network, source).summary()}"
        self.splits = self._split(self._read(self.data))
        self.data_digest = mixtures_digest(self.splits)
        self.unreadable = {each.path: each.reason for part in self.splits.values() for each in part.skipped}
        train, length = self.splits["train"], round(self.segment * config.sample_rate)
        if isinstance(train, Mixtures):
            long = [row for row, entry in enumerate(train.given) if entry.samples >= length]
            for row in set(range(len(train))) - set(long):
                self.unreadable[train.names[row]] = f"is shorter than a segment of {self.segment:g} s"
            if not long:
                longest = max(entry.samples for entry in train.given) / config.sample_rate
                raise DataError(
                    f"all training mixtures of {self.data} are shorter than segment, {self.segment:g} s; the longest "
                    f"has {longest:.2f} s"
                )
            self.train_set: MixedPieces = MixedPieces(train.subset(long), length)
        else:
            self.train_set = MixedPieces(self._maker(train), length, self.epoch_mixtures)
        self.val_set: WholeMixtures = WholeMixtures(self.whole("val"))
        tell_skipped(Skipped(name, reason) for name, reason in self.unreadable.items())

    def _read(self, data: str | Path, *, to_train: bool = True) -> dict[str, Voices | Mixtures]:
        """Sets by split."""
        config = self._config()
        if str(data) == "voices":
            return dict(_simulated(self._speakers(), self.segment, config.sample_rate))
        reading = Reading(
            sample_rate=config.sample_rate,
            scenario=self.scenario,
            resample=self.resample,
            sources=self.sources,
            part=self.part,
            to_train=to_train,
        )
        with progress("looking at files", None):
            found = read_mixtures(data, reading)
        for part in found.values():
            have = len(part.given[0].parts) if isinstance(part, Mixtures) else config.num_sources
            if have != config.num_sources:
                raise DataError(
                    f"the mixtures of {data} have {have} sources, but the network finds {config.num_sources}: set "
                    "num_sources in options"
                )
        self.notes = reading.notes()
        return found

    def _speakers(self) -> int:
        """Speakers of a mixture that is made."""
        return 2 if self.scenario == "enh_both" else self._config().num_sources

    def _split(self, sets: dict[str, Voices | Mixtures]) -> dict[str, Voices | Mixtures]:
        held_out = {"test": self.test_fraction, "val": (1 - self.test_fraction) * self.val_fraction}
        if "all" in sets:
            return self._divided(sets["all"], held_out)
        if "train" not in sets:
            raise DataError(f"{self.data} has no train folder, only {', '.join(sets)}")
        if "val" not in sets:
            sets = {**sets, **self._divided(sets["train"], {"val": self.val_fraction})}
        return {**sets, "test": sets.get("test", sets["val"])}

    def _divided(self, part: Voices | Mixtures, fractions: dict[str, float]) -> dict[str, Voices | Mixtures]:
        if isinstance(part, Mixtures):
            return dict(divide_mixtures(part, fractions, self.split_seed))
        return dict(divide_voices(part, fractions, self.split_seed, by=self.split_by))

    def _maker(self, part: Voices) -> Maker:
        config = self._config()
        return Maker(
            part, self.scenario, self._speakers(), round(self.segment * config.sample_rate), self.mixing, self._noises()
        )

    def _noises(self) -> tuple[Sound, ...]:
        if self.scenario == "sep_clean":
            return ()
        rate = self._config().sample_rate
        if self.mixing.noise is None:
            if self.data != "voices":
                return ()  # the maker tells that they are missing
            hiss = torch.randn(60 * rate, generator=torch.Generator().manual_seed(self.split_seed))
            return (Waveform("white noise", hiss.numpy()),)
        root = Path(self.mixing.noise)
        found, skipped = Reading(sample_rate=rate, resample=self.resample).recordings(find_audio(root), root)
        if not found:
            raise DataError(f"none of the recordings of {root} can be used: {skipped[0].path}: {skipped[0].reason}")
        self.unreadable |= {each.path: each.reason for each in skipped}
        return found

    def whole(self, split: str) -> Mixtures:
        """The mixtures of a held-out split: those that are given, or made ones that are always the same."""
        return self._whole(self.splits[split], split)

    def _whole(self, part: Voices | Mixtures, split: str) -> Mixtures:
        if isinstance(part, Mixtures):
            return part
        maker, offset = self._maker(part), {"val": 1, "test": 2}.get(split, 3)
        seeds = [mixed_seed(self.split_seed, offset, row) for row in range(self.held_out_mixtures)]
        return Mixtures(
            tuple(Made(f"{split} {row + 1:03d}", maker, seed) for row, seed in enumerate(seeds)), part.skipped
        )

    # Training

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Stack pieces; whole mixtures, which differ in length, stay a list."""
        return collate_mixtures

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The negative signal ratio of the best order, or of the given one."""
        self._note(batch)
        if not len(batch["mixture"]):
            return {}
        return {"loss": self._loss(self.network(batch["mixture"]), batch["sources"])}

    def _loss(self, estimates: Tensor, sources: Tensor) -> Tensor:
        ratio = SignalRatioLoss(self.loss)
        loss: Tensor = (
            ratio.in_order(estimates, sources).mean() if self.order == "fixed" else PITLoss(ratio)(estimates, sources)
        )
        return loss

    def metrics(self) -> nn.Module:
        """Improvement of the SI-SNR of whole validation mixtures, and their loss."""
        return MetricCollection({"val_si_snri": MeanMetric(), "val_loss": MeanMetric()}, compute_groups=False)

    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with whole mixtures."""
        self._note(batch)
        ratio = SignalRatioLoss("si_snr")
        for mixture, sources in zip(batch["mixture"], batch["sources"], strict=True):
            estimates = self.network(mixture[None]).float()
            metrics["val_loss"].update(self._loss(estimates, sources[None]))
            if self.order == "any":
                estimates = PITLoss(ratio).match(estimates, sources[None]).estimates
            metrics["val_si_snri"].update(si_snr_improvement(estimates, sources[None], mixture[None])[0])

    def _note(self, batch: dict[str, Any]) -> None:
        self.unreadable.update(batch["unreadable"])

    # Use

    def measure(self, mixtures: Mixtures, *, sdr: bool = False) -> tuple[list[Measured], list[Skipped]]:
        """Separate whole mixtures and compare them with the truth; also those that could not be read.

        Raises:
            DataError: nothing could be measured.
        """
        return measure_mixtures(self.network.eval(), mixtures, fixed=self.order == "fixed", sdr=sdr)

    def quality(self) -> dict[str, float]:
        """Mean SI-SNRi of the test mixtures."""
        measured, _ = self.measure(self.held_out(None))
        return {"SI-SNRi [dB]": mean_quality(measured, lambda each: each.network).si_snri}

    def evaluate(
        self, data: str | Path | None = None, *, folder: str | Path | None = None, options: Measuring | None = None
    ) -> Report:
        """Measure the quality on whole mixtures of the run's own test part, or on others.

        Args:
            data: mixtures or voices in any form that training reads.
            folder: where to write the report, ``quality.csv`` and sounds to listen to.
            options: what to measure beside the SI-SNR.

        Raises:
            DataError: the data cannot be read.
        """
        from convatlas.audio.separation_evaluation import write_qualities
        from convatlas.audio.separation_reports import evaluation_report

        mixtures = self.held_out(data)
        measured, skipped = self.measure(mixtures, sdr=(options or Measuring()).sdr)
        tell_skipped(skipped)
        report = evaluation_report(self, mixtures, measured, skipped, None if folder is None else Path(folder))
        if folder is not None:
            write_qualities(Path(folder) / "quality.csv", measured)
            report.save(folder)
        return report

    def held_out(self, data: str | Path | None) -> Mixtures:
        """The test mixtures of the run, or the mixtures of ``data``.

        Raises:
            DataError: the data cannot be read, or those of the run have changed.
        """
        if data is None:
            if not self.splits:
                splits = self._split(self._read(self.data))
                if mixtures_digest(splits) != self.data_digest:
                    raise DataError(
                        f"the sounds of {self.data} are not those of the training, so which of them were held out "
                        "cannot be told; give the sounds to evaluate on by --data"
                    )
                self.splits = splits
            return self.whole("test")
        sets = self._read(data, to_train=False)
        return self._whole(next(sets[name] for name in ("test", "val", "all", "train") if name in sets), "test")

    def predict(self, inputs: Sequence[str | Path], folder: str | Path, options: Separating | None = None) -> Report:
        """Write one WAV file a source for each recording, as loud as the recording; and a page to listen to.

        Recordings of any length, sample rate and number of channels are read; hours take no more memory than minutes.

        Args:
            inputs: audio files, or folders of them; or ``-`` alone for a stream from standard input.
            folder: where to write.
            options: levels, chunks, and the form of a stream.

        Raises:
            DataError: nothing can be read.
            Unsupported: a stream is asked of a network that needs the future.
        """
        from convatlas.audio.separation_inputs import separate_inputs

        return separate_inputs(self.model, self.network, inputs, Path(folder), options or Separating())

    def report(self, run: Run) -> Report:
        """Curves, quality on test mixtures beside ideal masks, pictures and sounds of a finished run."""
        from convatlas.audio.separation_reports import training_report

        return training_report(self, run)

    @classmethod
    def compare(cls, tasks: Mapping[str, "Separation"], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks, with the mixture and ideal masks beside them.

        Raises:
            ValueError: the networks find different sources, or their sample rates differ.
        """
        from convatlas.audio.separation_reports import comparison_report

        return comparison_report(tasks, runs, folder)

    # Files

    def described(self) -> dict[str, Any]:
        """What tells the sounds of the training."""
        return {"data_digest": self.data_digest}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build the network."""
        self.data_digest = str(described["data_digest"])
        self.network = self._config().build()


def _simulated(count: int, seconds: float, sample_rate: int) -> dict[str, Voices]:
    """Simulated voices of the deepest kinds of speakers, others for each split."""
    if count > len(SPEAKERS):
        raise DataError(f"there are {len(SPEAKERS)} kinds of simulated speakers, {count} are needed")
    found = {}
    for number, (split, voices_each) in enumerate(_SIMULATED.items()):
        speakers: dict[str, Sequence[Sound]] = {}
        for row, kind in enumerate(list(SPEAKERS)[: max(count, 2)]):
            spoken = voices(kind, voices_each, seconds=seconds, sample_rate=sample_rate, seed=mixed_seed(number, row))
            speakers[kind] = [Waveform(f"{kind} {place:03d}", voice) for place, voice in enumerate(spoken)]
        found[split] = Voices(speakers)
    return found
