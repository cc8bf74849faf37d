"""As-ViT: a vision transformer whose topology is found, and whose size is grown, by scores of untrained networks.

Chen, Huang, Du, Song, Wang, Zhou: "Auto-scaling Vision Transformers without Training", ICLR 2022, arXiv 2202.11921.
The scores are in `scores`, the search for a topology in `topology`, the scaling in `scaling`.
"""

# No postponed annotations here: the command line is built from the real types of the fields.

import dataclasses
import math
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import yaml
from torch import Tensor

from convatlas.data.images import read_images
from convatlas.data.transforms import Preprocess
from convatlas.design.as_vit.scaling import WIDTH_RATIOS, candidates, choose
from convatlas.design.as_vit.scores import (
    extrinsic_curvature,
    gauss_length,
    length_distortion,
    ntk_condition,
    ntk_gram,
    random_plane,
)
from convatlas.design.as_vit.topology import Policy, Rewards, ScoreName, TopologySpace
from convatlas.design.study import DesignStudy, Progress, ignore_signals
from convatlas.errors import DataError, unknown
from convatlas.files import write_text
from convatlas.networks.as_vit import AsViTConfig, Genotype
from convatlas.report import Cell, Files, Lines, Note, Part, Report, Section, Table
from convatlas.robustness.screening import Screen, Screening
from convatlas.training.left_out import tell_skipped
from convatlas.training.measure import provenance

__all__ = [
    "Genotype",
    "Scores",
    "TrainingFreeSearch",
    "extrinsic_curvature",
    "gauss_length",
    "length_distortion",
    "ntk_condition",
    "ntk_gram",
    "score_genotype",
]

#: The networks of the scaling are four times as wide as those that are scored for them.
_WIDENED = 4


class Scores(NamedTuple):
    """Condition of the neural tangent kernel, the lower the better, and length distortion, the higher the better."""

    ntk: float
    length: float


@dataclass(frozen=True)
class _Job:
    """One fresh network to score."""

    genotype: Genotype
    images: Tensor
    seed: int
    theta: int
    device: str

    def scores(self) -> Scores:
        channels, height, width = self.images.shape[1:]
        # The features that are scored lie before the classifier.
        config = AsViTConfig(genotype=str(self.genotype), in_channels=channels, num_classes=0)
        generator = torch.Generator().manual_seed(self.seed)
        plane = random_plane(channels * height * width, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = config.build().to(self.device)
        ntk = ntk_condition(network, self.images.to(self.device))
        return Scores(ntk, length_distortion(network, (channels, height, width), theta=self.theta, plane=plane))


def _jobs(
    genotype: Genotype, images: Tensor, seed: int, repeats: int, batch: int, theta: int, device: str
) -> Iterator[_Job]:
    for repeat in range(repeats):
        own = 1000 * seed + repeat
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(own))[:batch]
        yield _Job(genotype, images[rows], own, theta, device)


def _mean(found: Sequence[Scores]) -> Scores:
    ntk, length = zip(*found, strict=True)
    return Scores(statistics.fmean(ntk), statistics.fmean(length))


def score_genotype(
    genotype: Genotype,
    images: Tensor,
    *,
    seed: int = 0,
    repeats: int = 5,
    batch: int = 16,
    theta: int = 10,
    device: str = "cpu",
) -> Scores:
    """The two scores of a genotype, each the mean over fresh networks.

    Args:
        genotype: what is built.
        images: (N, C, H, W), from which each network gets its own ``batch``.
        seed: of weights, batches and circles.
        repeats: number of fresh networks.
        batch: images for the condition of the neural tangent kernel.
        theta: angles of the circle for the length distortion.
        device: where the networks are scored.
    """
    return _mean([job.scores() for job in _jobs(genotype, images, seed, repeats, batch, theta, device)])


@dataclass(kw_only=True, eq=False)
class TrainingFreeSearch(DesignStudy):
    """Find a vision transformer's topology by policy gradients, then scale it, with untrained networks only.

    Attributes:
        genotype: seed to scale, as 8,2,3|4,1,2|4,1,4|4,1,6|32; the topology is searched for when left out.
        image_size: side of the images that networks are scored on, in pixels.
        data: images to score on: a folder, an npz file or digits, as training reads them; or noise.
        camouflage: whether images that look crafted to become others when they are resized are looked for.
        steps: of the search: topologies to try.
        lr: of the search: learning rate of the policy.
        buffer_size: of the search: last scores whose range the changes are compared with.
        scores: of the search: what is rewarded: ntk (condition of the neural tangent kernel), length, or both.
        hidden: of the search: channels of the first stage.
        params: of the scaling: parameters at which it ends, and the most that a network may have, with 1000 classes;
            0 for the first leaves the topology as it is.
        scaling_hidden: of the scaling: channels with which it begins; the networks get four times as many.
        width_ratios: of the scaling: by which shares the width may grow in a step.
        consistent: of the scaling: let the larger length distortion win a draw; the authors' code takes the smaller.
        repeats: fresh networks whose scores are averaged.
        batch: images for the condition of the neural tangent kernel.
        theta: angles for the length distortion.
        device: where the networks are scored.
        seed: of all random choices.
        workers: processes that score side by side.
    """

    name: ClassVar[str] = "as_vit"

    genotype: str | None = None
    image_size: int = 224
    data: str = "noise"
    camouflage: Screening = field(default_factory=Screening)
    steps: int = 500
    lr: float = 0.08
    buffer_size: int = 20
    scores: tuple[ScoreName, ...] = ("ntk", "length")
    hidden: int = 32
    params: tuple[float, float] = (80e6, 110e6)
    scaling_hidden: int = 8
    width_ratios: tuple[float, ...] = WIDTH_RATIOS
    consistent: bool = False
    repeats: int = 5
    batch: int = 16
    theta: int = 10
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    workers: int = 1

    screen: Screen = field(init=False, default_factory=Screen, repr=False)
    _pool: Executor | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        least = {"image_size": 32, "steps": 1, "repeats": 1, "batch": 2, "theta": 1, "workers": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.params[0] <= self.params[1]:
            raise ValueError(f"params must be two numbers that do not fall, got {self.params}")
        if not self.width_ratios or min(self.width_ratios) <= 0:
            raise ValueError(f"width_ratios must be positive, got {self.width_ratios}")
        if self.device not in ("cpu", "cuda"):
            raise unknown("device", self.device, ("cpu", "cuda"))
        Rewards(self.buffer_size, self.scores)
        # The widest heads that may come up must leave each a channel.
        space = TopologySpace()
        if self.genotype is None:
            widest = space.genotype([len(options) - 1 for options in space.choices], hidden=self.hidden)
        else:
            widest = Genotype.parse(self.genotype)
        if self.params[0]:
            self._smallest(widest)

    # The search

    @cached_property
    def images(self) -> Tensor:
        """What networks are scored on, (N, C, H, W).

        Raises:
            DataError: the data cannot be read, or hold fewer images than ``batch``.
        """
        side, number = self.image_size, self.batch * self.repeats
        generator = torch.Generator().manual_seed(self.seed)
        if self.data == "noise":
            return torch.randn(number, 3, side, side, generator=generator)
        self.screen = Screen(self.camouflage)
        images = self.screen.sets({"all": next(iter(read_images(self.data).values()))})["all"]
        tell_skipped(images.skipped)
        if len(images) < self.batch:
            raise DataError(f"{self.data} must hold at least {self.batch} images, got {len(images)}")
        preprocess = Preprocess(size=side, crop=1.0)
        rows = torch.randperm(len(images), generator=generator)[:number].tolist()
        return torch.stack([preprocess(images.image(row)) for row in rows])

    def start(self) -> dict[str, Any]:
        """Before the first topology, or before the first step of the scaling where the seed is given."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where there is no GPU, got cuda")
        _ = self.images  # tells at once what is wrong with the data
        policy = self._policy().state() if self.genotype is None else None
        return {"scores": {}, "policy": policy, "trace": [], "seed": self.genotype, "growth": [], "grown": False}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        """One topology of the search, or one step of the scaling."""
        return self._searched(state) if state["seed"] is None else self._grown(state)

    def _policy(self) -> Policy:
        return Policy([len(options) for options in TopologySpace().choices], lr=self.lr, seed=self.seed)

    def _searched(self, state: dict[str, Any]) -> dict[str, Any]:
        space, policy = TopologySpace(), self._policy()
        policy.restore(state["policy"])
        actions = policy.sample()
        text = str(space.genotype(actions, hidden=self.hidden))
        scores = self._with_scores_of([text], state["scores"])
        rewards = Rewards(self.buffer_size, self.scores)
        tried = [*(entry["genotype"] for entry in state["trace"]), text]
        reward = [rewards(Scores(*scores[each])._asdict()) for each in tried][-1]
        policy.learn(actions, reward)
        entry = {"genotype": text, "reward": reward, "entropy": policy.entropy()}
        found = str(space.genotype(policy.best(), hidden=self.hidden)) if len(tried) == self.steps else None
        return {**state, "scores": scores, "policy": policy.state(), "trace": [*state["trace"], entry], "seed": found}

    def _grown(self, state: dict[str, Any]) -> dict[str, Any]:
        growth = state["growth"]
        now = Genotype.parse(growth[-1]["scored"] if growth else state["seed"])
        if not growth:
            now = self._smallest(now)
        near = [each for each in candidates(now, self.width_ratios) if _widened(each).parameters() <= self.params[1]]
        scores = self._with_scores_of([str(each) for each in near], state["scores"])
        near = [each for each in near if all(map(math.isfinite, scores[str(each)]))]
        if not near:
            return {**state, "scores": scores, "grown": True}
        ntk, length = zip(*(scores[str(each)] for each in near), strict=True)
        best = near[choose(ntk, length, consistent=self.consistent)]
        row: dict[str, Any] = {
            "scored": str(best),
            "genotype": str(_widened(best)),
            "parameters": _widened(best).parameters(),
            "candidates": len(near),
        }
        return {**state, "scores": scores, "growth": [*growth, row], "grown": row["parameters"] >= self.params[0]}

    def _smallest(self, seed: Genotype) -> Genotype:
        return dataclasses.replace(seed, depths=(1, 1, 1, 1), hidden=self.scaling_hidden)

    def _with_scores_of(self, texts: Sequence[str], known: dict[str, list[float]]) -> dict[str, list[float]]:
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        options = (self.seed, self.repeats, self.batch, self.theta, self.device)
        jobs = [job for text in missing for job in _jobs(Genotype.parse(text), self.images, *options)]
        found = list(self._pool.map(_Job.scores, jobs) if self._pool is not None else map(_Job.scores, jobs))
        new = {
            text: list(_mean(found[index * self.repeats : (index + 1) * self.repeats]))
            for index, text in enumerate(missing)
        }
        return {**known, **new}

    @contextmanager
    def workplace(self) -> Iterator[None]:
        """The processes that score."""
        if self.workers == 1:
            yield
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, initializer=_one_thread) as self._pool:
            try:
                yield
            finally:
                self._pool = None

    def progress(self, state: dict[str, Any]) -> Progress:
        """Topologies tried; then how near the network is to the size at which the scaling ends."""
        searched, steps = len(state["trace"]), self.steps if self.genotype is None else 0
        if state["seed"] is None:
            return Progress(searched, steps + 1, "searching")
        if state["grown"] or not self.params[0]:
            return Progress(steps + 1, steps + 1, self.found(state))
        if not state["growth"]:
            return Progress(steps, steps + 1, f"scaling {state['seed']}")
        size, first = state["growth"][-1]["parameters"], state["growth"][0]["parameters"]
        share = math.log(size / first) / max(math.log(self.params[0] / first), 1e-9)
        return Progress(steps + min(share, 0.99), steps + 1, f"{size / 1e6:.1f} M parameters")

    def found(self, state: dict[str, Any]) -> str:
        """The genotype that a finished state ends with."""
        return str(state["growth"][-1]["genotype"] if state["growth"] else state["seed"])

    # What comes out

    def write(self, state: dict[str, Any], folder: Path) -> None:
        """Write ``genotype.txt`` and ``train.yaml``."""
        genotype = self.found(state)
        write_text(folder / "genotype.txt", f"{genotype}\n")
        settings = {"model": "as_vit", "image_size": self.image_size, "options": {"genotype": genotype}}
        header = f"# convatlas train recognition --config {folder / 'train.yaml'} --data FOLDER\n"
        write_text(folder / "train.yaml", header + yaml.safe_dump(settings, sort_keys=False))

    def report(self, state: dict[str, Any]) -> Report:
        """The topology, the networks on the way to the last one, and how the search went."""
        found = Genotype.parse(self.found(state))
        sections = [Section("Network", [self._stages(found)])]
        if state["growth"]:
            sections.append(Section("Scaling", self._growth_parts(state)))
        if state["trace"]:
            sections.append(Section("Search", self._search_parts(state)))
        files = {
            "settings for convatlas train recognition --config": "train.yaml",
            "genotype": "genotype.txt",
            "settings of this search": "config.yaml",
        }
        sections.append(Section("Files", [Files("Files", files)]))
        summary = (
            f"{found}: {found.parameters() / 1e6:.4g} M parameters with 1000 classes, found by the scores of "
            f"{len(state['scores'])} topologies and sizes, {self.repeats} untrained networks each."
        )
        title = "A vision transformer designed by As-ViT"
        return self.screen.noted(Report(title, summary, sections, provenance(seed=str(self.seed))))

    def score(self, subject: str) -> Report:
        """The scores of a genotype.

        Raises:
            ValueError: it is malformed.
            DataError: ``data`` cannot be read.
        """
        genotype = Genotype.parse(subject)
        found = score_genotype(
            genotype,
            self.images,
            seed=self.seed,
            repeats=self.repeats,
            batch=self.batch,
            theta=self.theta,
            device=self.device,
        )
        rows: list[list[Cell]] = [
            ["condition of the neural tangent kernel", found.ntk, "the lower, the easier to train"],
            ["length distortion", found.length, "the higher, the more expressive"],
            ["parameters with 1000 classes", genotype.parameters(), ""],
        ]
        caption = f"Means of {self.repeats} untrained networks at {self.image_size} pixels on {self.data}."
        parts = [Table("Scores", ["score", "value", "meaning"], rows, caption), self._stages(genotype)]
        summary = f"Condition {found.ntk:.4g}, length distortion {found.length:.4g}."
        sections = [Section("Scores", parts)]
        return self.screen.noted(Report(f"Scores of {genotype}", summary, sections, provenance(seed=str(self.seed))))

    @staticmethod
    def _stages(genotype: Genotype) -> Table:
        columns = ["stage", "kernel K", "split S", "expansion E", "blocks L", "channels", "heads"]
        values = (genotype.kernels, genotype.splits, genotype.expansions, genotype.depths)
        rows = zip(range(1, 5), *values, genotype.dims, genotype.num_heads, strict=True)
        return Table(str(genotype), columns, [list(row) for row in rows])

    def _growth_parts(self, state: dict[str, Any]) -> list[Part]:
        rows: list[list[Cell]] = []
        for number, row in enumerate(state["growth"], 1):
            ntk, length = state["scores"][row["scored"]]
            rows.append([number, row["genotype"], row["parameters"], ntk, length, row["candidates"]])
        columns = ["step", "network", "parameters", "condition", "length distortion", "candidates"]
        sizes = [row["parameters"] for row in state["growth"]]
        caption = "Every row is a network that can be trained: --options '{genotype: ...}' with the model as_vit."
        return [
            Table("Networks on the way", columns, rows, caption),
            Lines("Size", "step", "parameters", {"network": (range(1, 1 + len(sizes)), sizes)}, log_y=True),
        ]

    def _search_parts(self, state: dict[str, Any]) -> list[Part]:
        trace = state["trace"]
        steps = range(1, 1 + len(trace))
        window = max(1, len(trace) // 10)
        rewards = [entry["reward"] for entry in trace]
        means = [statistics.fmean(rewards[max(0, i - window) : i]) for i in steps]
        visits: dict[str, int] = {}
        for entry in trace:
            visits[entry["genotype"]] = visits.get(entry["genotype"], 0) + 1
        often = sorted(visits.items(), key=lambda item: -item[1])[:10]
        rows: list[list[Cell]] = [[text, count, *state["scores"][text]] for text, count in often]
        return [
            Lines("Reward", "step", f"mean of {window} steps", {"reward": (steps, means)}),
            Lines("Entropy of the policy", "step", "nats", {"policy": (steps, [entry["entropy"] for entry in trace])}),
            Table("Topologies that came up most", ["topology", "times", "condition", "length distortion"], rows),
            Note(f"Of {TopologySpace().size:,} topologies {len(visits):,} were scored."),
        ]


def _widened(genotype: Genotype) -> Genotype:
    return dataclasses.replace(genotype, hidden=_WIDENED * genotype.hidden)


def _one_thread() -> None:
    ignore_signals()
    torch.set_num_threads(1)
