"""DeepMAD: a convolutional network for a budget of operations and parameters, designed by mathematics on a CPU.

Shen, Wang, Lin, Huang, Tang, Sun, Wang: "DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural
Network", CVPR 2023, arXiv 2303.02165. A network's expressiveness is the entropy of its feature maps, its trainability
the ratio of depth to width; both follow from channels, kernels, depths and resolution. The scores are in `scores`, the
program in `program`, its two solvers in `evolution` and `relaxation`.
"""

# No postponed annotations here: the command line is built from the real types of the fields.

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

import yaml

from convatlas.design.deepmad.evolution import Mutation, Population
from convatlas.design.deepmad.program import PUBLISHED_PROGRAMS, SPACES, Program, Space, repair
from convatlas.design.deepmad.relaxation import climb, relax
from convatlas.design.deepmad.scores import (
    Score,
    count,
    deepmad_score,
    depth_penalty,
    effectiveness,
    madnas_score,
    stages,
)
from convatlas.design.study import DesignStudy, Progress, ignore_signals
from convatlas.errors import unknown
from convatlas.files import write_text
from convatlas.networks.deepmad import CONV, Block, load_structure, save_structure
from convatlas.report import Cell, Files, Lines, Note, Part, Report, Section, Table
from convatlas.training.measure import provenance

__all__ = [
    "ArchitectureSearch",
    "Program",
    "Score",
    "count",
    "deepmad_score",
    "depth_penalty",
    "effectiveness",
    "madnas_score",
]

Structure = tuple[Block, ...]

#: Candidates of one island between two exchanges of populations.
_EXCHANGE = 5000
#: Channels below which a convolution at the end is not narrowed.
_NARROWEST = 64
_BUDGETS = {"flops": "FLOPs F", "params": "parameters P", "rho": "effectiveness rho_0", "layers": "layers D"}


@dataclass(kw_only=True, eq=False)
class ArchitectureSearch(DesignStudy):
    """Find the structure of largest entropy within budgets; at least flops or params must be limited.

    Attributes:
        like: take the budgets, the space, the image size and the first structure of a published network where they are
            left out: r18, r34, r50, 29m, 29m_288, 50m or 89m.
        flops: budget F; a multiply-add is one, the classifier is not counted.
        params: budget P of parameters, the classifier not counted.
        rho: budget of effectiveness, depth over width; 0.3 for full and 0.5 for depthwise convolutions when left out.
        layers: budget D of convolutions.
        space: blocks to choose from: k1kxk1 (full convolutions), k1dwk1 (depthwise) or k1dwsek1 (depthwise with
            squeeze-excitation).
        image_size: side of the image.
        init: structure file to begin with, which must be within the budgets; the authors' first structure when left
            out, made to fit.
        weights: of the entropy of each stage; 1, and 8 for the last, when left out.
        penalty: beta, the weight of unequal depths.
        alpha1: exponent of channels in the entropy.
        alpha2: exponent of kernel areas in the entropy.
        reference_resolution: count a map behind squeeze-excitation as one position, as in the authors' code.
        solver: evolution (the authors') or relaxation (continuous, then rounded).
        candidates: of the evolution: structures to try.
        population: of the evolution: structures to keep.
        minor_after: of the evolution: after so many candidates only channels and bottlenecks change.
        adaptive_rounding: of the evolution: multiples of 32 channels above 256 and of 16 above 128, instead of 8.
        mutate_last: of the evolution: let the last super block change, where no convolution follows it.
        starts: of the relaxation: points to start from; the best end is taken.
        seed: of all random choices.
        workers: processes of the evolution, each with a population of its own, which they exchange; candidates are
            shared among them.
    """

    name: ClassVar[str] = "deepmad"

    like: str | None = None
    flops: float | None = None
    params: float | None = None
    rho: float | None = None
    layers: int | None = None
    space: Literal["k1kxk1", "k1dwk1", "k1dwsek1"] | None = None
    image_size: int | None = None
    init: str | None = None
    weights: tuple[float, ...] | None = None
    penalty: float = 10.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    reference_resolution: bool = True
    solver: Literal["evolution", "relaxation"] = "evolution"
    candidates: int = 500_000
    population: int = 256
    minor_after: int | None = None
    adaptive_rounding: bool = False
    mutate_last: bool = True
    starts: int = 16
    seed: int = 0
    workers: int = 1

    _pool: Executor | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.like is not None and self.like not in PUBLISHED_PROGRAMS:
            raise unknown("published network", self.like, PUBLISHED_PROGRAMS)
        if self.space is not None and self.space not in SPACES:
            raise unknown("space", self.space, SPACES)
        if self.solver not in ("evolution", "relaxation"):
            raise unknown("solver", self.solver, ("evolution", "relaxation"))
        for name in ("flops", "params", "rho", "layers"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, least in (("candidates", 0), ("population", 1), ("starts", 1), ("workers", 1), ("minor_after", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.weights is not None and (not self.weights or not all(map(math.isfinite, self.weights))):
            raise ValueError(f"weights must be finite numbers, one for each stage, got {self.weights}")

    # The program

    def chosen_space(self) -> Space:
        """The blocks to choose from."""
        published = PUBLISHED_PROGRAMS[self.like].space if self.like is not None else "k1kxk1"
        return SPACES[self.space or published]

    def program(self, structure: Structure | None = None) -> Program:
        """Objective and constraints.

        Args:
            structure: one with as many stages as what is searched; by default the one to begin with.
        """
        published = PUBLISHED_PROGRAMS[self.like] if self.like is not None else None
        limits = {"flops": self.flops, "params": self.params, "layers": self.layers}
        budgets = {name: value or getattr(published, name, None) or math.inf for name, value in limits.items()}
        rho = self.rho or (published.rho if published and self.space is None else self.chosen_space().rho)
        number = len(stages(structure or self._authors_init()))
        return Program(
            image_size=self.image_size or (published.image_size if published else 224),
            rho=rho,
            weights=self.weights or (1.0,) * (number - 1) + (8.0,),
            penalty=self.penalty,
            alpha1=self.alpha1,
            alpha2=self.alpha2,
            reference_resolution=self.reference_resolution,
            **budgets,
        )

    def _authors_init(self) -> Structure:
        init = self.chosen_space().init
        last = PUBLISHED_PROGRAMS[self.like].last if self.like is not None else None
        return init if last is None else (*init[:-1], init[-1]._replace(out_channels=last))

    def first(self) -> Structure:
        """The structure to begin with.

        Raises:
            ValueError: it is not within the budgets, or is not made of the blocks of the space.
            DataError: ``init`` cannot be read.
        """
        if self.init is None:
            return self._fitted(self._authors_init())
        structure, kind = load_structure(self.init), self.chosen_space().kind
        other = [block.kind for block in structure if block.kind not in (CONV, kind)]
        if other:
            raise ValueError(f"init must be made of {kind}, got {other[0]}; choose its space")
        structure = repair(structure, self.program(structure).image_size)
        violation = self.program(structure).violation(structure)
        if violation is not None:
            raise ValueError(f"init must be within the budgets: {violation}")
        return structure

    def _fitted(self, structure: Structure) -> Structure:
        """A structure near the given one that is within the budgets."""
        program, space = self.program(), self.chosen_space()
        while True:
            try:
                return climb(repair(structure, program.image_size), program, space, until_feasible=True)
            except ValueError:
                last = structure[-1]
                if last.kind != CONV or last.out_channels <= _NARROWEST:
                    raise
                # The convolution at the end is no matter of the search, but with small budgets it would take them all.
                structure = (*structure[:-1], last._replace(out_channels=last.out_channels // 2))

    # The search

    def start(self) -> dict[str, Any]:
        """The first structure and its score; checks that the settings make a program."""
        program = self.program()
        if math.isinf(program.flops) and math.isinf(program.params):
            raise ValueError("give a budget: flops, params or like")
        first = self.first()
        program = self.program(first)
        deepmad_score(first, program.image_size, weights=program.weights)  # refuses weights and sizes that do not fit
        score = program.objective(first)
        state: dict[str, Any] = {"first": [score, _rows(first)], "trace": [[0, score]]}
        if self.solver == "evolution":
            members = [(score, first)]
            islands = [
                Population(members, self.population, Random(f"{self.seed}/{island}")).state()
                for island in range(self.workers)
            ]
            return {**state, "islands": islands}
        return {**state, "start": 0, "best": [score, _rows(first)]}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        """Some thousand candidates on every island and an exchange of their populations, or one start of the solver."""
        first = _structure(state["first"][1])
        program, space = self.program(first), self.chosen_space()
        if self.solver == "relaxation":
            return self._relaxed(state, program, space, first)
        mutation = Mutation(
            space=space,
            image_size=program.image_size,
            layers=program.layers,
            adaptive_rounding=self.adaptive_rounding,
            mutate_last=self.mutate_last,
        )
        done = state["islands"][0]["evaluated"]
        number = min(_EXCHANGE, self._share(self.candidates) - done)
        minor = self.minor_after is not None and done >= self._share(self.minor_after)
        if self.minor_after is not None and not minor:
            number = min(number, self._share(self.minor_after) - done)
        jobs = [(island, number, program, mutation, minor) for island in state["islands"]]
        islands = list(self._pool.map(_evolved, jobs)) if self._pool is not None else list(map(_evolved, jobs))
        if len(islands) > 1:
            best = Population([], self.population, Random(0))
            for island in islands:
                for score, blocks in island["members"]:
                    best.insert(score, _structure(blocks))
            islands = [{**island, "members": best.state()["members"]} for island in islands]
        evaluated = sum(island["evaluated"] for island in islands)
        trace = [*state["trace"], [evaluated, islands[0]["members"][-1][0]]]
        return {**state, "islands": islands, "trace": trace}

    def _share(self, candidates: int) -> int:
        return -(-candidates // self.workers)

    def _relaxed(self, state: dict[str, Any], program: Program, space: Space, first: Structure) -> dict[str, Any]:
        number, best = state["start"], state["best"]
        structure = relax(program, space, first, (self.seed, number))
        score = program.objective(structure)
        if score > best[0]:
            best = [score, _rows(structure)]
        return {**state, "start": number + 1, "best": best, "trace": [*state["trace"], [number + 1, best[0]]]}

    @contextmanager
    def workplace(self) -> Iterator[None]:
        """The processes of the islands."""
        if self.workers == 1 or self.solver != "evolution":
            yield
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, initializer=ignore_signals) as self._pool:
            try:
                yield
            finally:
                self._pool = None

    def progress(self, state: dict[str, Any]) -> Progress:
        """Candidates tried, or starts of the solver."""
        done, score = state["trace"][-1]
        total = self._share(self.candidates) * self.workers if self.solver == "evolution" else self.starts
        return Progress(done, total, f"best score {score:.1f}")

    def found(self, state: dict[str, Any]) -> Structure:
        """The best structure of a state."""
        best = state["islands"][0]["members"][-1] if self.solver == "evolution" else state["best"]
        return _structure(best[1])

    # What comes out

    def write(self, state: dict[str, Any], folder: Path) -> None:
        """Write ``structure.txt`` as the authors do, and ``train.yaml``."""
        structure = self.found(state)
        save_structure(structure, folder / "structure.txt")
        settings = {
            "model": "deepmad",
            "image_size": self.program(structure).image_size,
            "options": {"structure": [block.as_mapping() for block in structure]},
        }
        header = f"# convatlas train recognition --config {folder / 'train.yaml'} --data FOLDER\n"
        text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120)
        write_text(folder / "train.yaml", header + text)

    def report(self, state: dict[str, Any]) -> Report:
        """The structure that was found, what it takes of each budget, and how its score rose."""
        structure = self.found(state)
        program = self.program(structure)
        flops, size, layers = count(structure, program.image_size)
        first, last = state["first"][0], state["trace"][-1]
        tried = f"{last[0]:,} candidates" if self.solver == "evolution" else f"{last[0]} starts of the solver"
        unit = "candidates" if self.solver == "evolution" else "starts"
        x, y = zip(*state["trace"], strict=True)
        search: list[Part] = [Lines("Best score", unit, "score", {"best": (x, y)})]
        if self.solver == "evolution":
            islands = state["islands"]
            feasible = sum(island["feasible"] for island in islands)
            members = [member[0] for member in islands[0]["members"]]
            search.append(
                Note(
                    f"{feasible:,} of {last[0]:,} candidates were within the budgets; the {len(members)} structures "
                    f"that were kept score from {members[0]:.1f} to {members[-1]:.1f}."
                )
            )
        summary = (
            f"{size / 1e6:.4g} M parameters, {flops / 1e9:.4g} G multiply-adds at {program.image_size} pixels, "
            f"{layers} convolutions; score {last[1]:.1f} after {tried}, {first:.1f} at first."
        )
        files = {
            "settings for convatlas train recognition --config": "train.yaml",
            "structure as the authors write it": "structure.txt",
            "settings of this search": "config.yaml",
        }
        sections = [
            Section("Structure", self._structure_parts(structure, program)),
            Section("Search", search),
            Section("Files", [Files("Files", files)]),
        ]
        return Report("A network designed by DeepMAD", summary, sections, provenance(seed=str(self.seed)))

    def score(self, subject: str) -> Report:
        """The scores of the structure in a file.

        Raises:
            DataError: the file holds no structure.
            ValueError: weights or image_size do not fit it.
        """
        structure = load_structure(subject)
        program = self.program(structure)
        parts = self._structure_parts(structure, program)
        verdict = program.violation(structure)
        summary = f"Objective {program.objective(structure):.3f}; "
        summary += "within the budgets." if verdict is None else f"not within the budgets: {verdict}."
        return Report(f"Scores of {Path(subject).name}", summary, [Section("Structure", parts)], provenance())

    def _structure_parts(self, structure: Structure, program: Program) -> list[Part]:
        budgets: list[list[Cell]] = []
        for name, (value, limit) in program.used(structure).items():
            bound, share = (limit, 100 * value / limit) if math.isfinite(limit) else (None, None)
            budgets.append([_BUDGETS[name], value, bound, share])
        score = deepmad_score(
            structure,
            program.image_size,
            weights=program.weights,
            alpha1=program.alpha1,
            alpha2=program.alpha2,
            reference_resolution=program.reference_resolution,
        )
        penalty = program.penalty * depth_penalty(structure)
        rows: list[list[Cell]] = []
        found = stages(structure, program.image_size, reference_resolution=program.reference_resolution)
        for index, (stage, value) in enumerate(zip(found, score.stages, strict=True), 1):
            rho = stage.layers / math.exp(stage.log_width / stage.layers)
            rows.append(
                [index, stage.channels, stage.resolution, int(stage.layers), rho, program.weights[index - 1], value]
            )
        columns = ["stage", "channels", "resolution", "convolutions", "depth over width", "weight", "weighted entropy"]
        caption = (
            f"Their sum is {score.total:.3f}; less {program.penalty:g} Q = {penalty:.3f} for unequal depths it is the "
            f"objective, {score.total - penalty:.3f}."
        )
        blocks: list[list[Cell]] = []
        for number, (kind, *sizes) in enumerate(structure):
            short = "conv" if kind == CONV else kind.removeprefix("SuperRes")
            blocks.append([str(number), short, *sizes[:4], *(sizes[4:] if kind != CONV else (None, None))])
        names = ["block", "class", "in", "out", "k", "s", "L", "btn"]
        return [
            Table("Blocks", names, blocks, "Kernel size k, stride s, inner layers L, channels of the bottleneck btn."),
            Table("Budgets", ["budget", "used", "limit", "used [%]"], budgets),
            Table("Entropy by stage", columns, rows, caption),
        ]


def _evolved(job: tuple[dict[str, Any], int, Program, Mutation, bool]) -> dict[str, Any]:
    state, candidates, program, mutation, minor = job
    population = Population.restored(state)
    population.evolve(candidates, program, mutation, minor=minor)
    return population.state()


def _rows(structure: Structure) -> list[list[Any]]:
    return [list(block) for block in structure]


def _structure(rows: Sequence[Sequence[Any]]) -> Structure:
    return tuple(Block(*row) for row in rows)
