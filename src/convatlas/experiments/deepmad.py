"""Does mathematics alone find good networks, and does depth over width tell which of them can be trained?

Shen, Wang, Lin, Huang, Tang, Sun, Wang: "DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural
Network", CVPR 2023, arXiv 2303.02165. Its abstract claims networks that beat ConvNeXt and Swin on ImageNet-1K, designed
in minutes on a CPU; its section 3 that deep networks fail where depth over width, the effectiveness rho, is too large.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import torch

from convatlas.design.deepmad.evolution import Mutation, Population
from convatlas.design.deepmad.program import PUBLISHED_PROGRAMS, SPACES, Program
from convatlas.design.deepmad.relaxation import climb, relax
from convatlas.design.deepmad.scores import effectiveness
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    published_accuracy,
    published_top1,
    resolved,
    train_by_recipe,
)
from convatlas.networks.deepmad import Block, CnnNetConfig, make_structure
from convatlas.networks.registry import model_config
from convatlas.report import Cell, Claim, Lines, Note, Part, Report, Scatter, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

Structure = tuple[Block, ...]

# Thresholds, fixed before anything was measured.

#: A network of the paper whose program a search must solve at least as well as its authors did.
PUBLISHED = "r50"
#: Candidates of that search, a fraction of the authors' 500,000, and starts of the other solver.
PUBLISHED_CANDIDATES = 60_000
PUBLISHED_STARTS = 4
#: Time of one candidate in ms; 500,000 of them then take 8 minutes.
CANDIDATE_TIME = 1.0
#: Accuracy of the designed network in %, below which the networks have not learned enough to compare (chance is 10).
LEARNED = 80.0

SEEDS = (0, 1, 2)
CANDIDATES = 20_000
#: Budgets of the small networks, at 32 pixels, and the rho_0 that designs with depthwise convolutions have.
FLOPS, PARAMS, RHO = 5e6, 5e4, 0.5
#: Larger rho_0, for networks that are as large, but deeper and thinner.
DEEPER = (1.0, 2.0)
IMAGE_SIZE = 32
WEIGHTS = (1.0, 1.0, 1.0, 8.0)
INIT = make_structure(
    "SuperResK1KXK1", 16, ((32, 3, 2, 1, 16), (32, 3, 2, 1, 16), (48, 3, 1, 1, 16), (64, 3, 2, 1, 24))
)
#: A network as one would draw it: channels and depth grow with the stages, at 94 % of the parameters.
BY_HAND = make_structure(
    "SuperResK1KXK1", 16, ((24, 3, 2, 1, 16), (40, 3, 2, 2, 16), (64, 3, 1, 2, 24), (96, 3, 2, 1, 24))
)
#: Accepted changes of a random network, and the least share of a budget that it takes.
RANDOM_STEPS = 200
RANDOM_SHARE = 0.9
TRAIN_FRACTION = 0.25
TRAINING = Training(epochs=10, batch_size=32, lr=3e-3, warmup_epochs=2)
PAIRS = 5

# Full: one training each, as the paper did.

RECIPE = "deepmad_r"
TOP1 = {"deepmad_r18": 77.7, "resnet18": 69.758}
WEIGHTS_OF = (
    *("deepmad_r18", "deepmad_r34", "deepmad_r50"),
    *("deepmad_29m", "deepmad_29m_288", "deepmad_50m", "deepmad_89m"),
)
#: Points of top-1 by which two ImageNet trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" searches and trains small networks on digits; "full" trains DeepMAD-R18 and ResNet-18 by recipe.
        data: for "full": ImageNet-1K, a folder with ``train`` and ``val`` and a folder for each class in them.
        folder: for "full": where the runs lie. The same folder goes on with runs that were stopped.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data or folder.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None or folder is None:
        raise ValueError(f"budget 'full' needs data and folder, got {data} and {folder}")
    return full(data, folder)


# -- quick -------------------------------------------------------------------------------------------------------------


class _Searched(NamedTuple):
    """A search: the best structure, its score after each tenth of the candidates, time of a candidate in ms."""

    structure: Structure
    scores: list[float]
    milliseconds: float


def quick() -> Report:
    """Search under a published and under small budgets; train what is found beside random and hand-made networks."""
    rhos = (RHO, *DEEPER)
    trainings = len(SEEDS) * (len(rhos) + 2) * TRAINING.epochs
    with progress(len(SEEDS) + 1 + len(rhos) + 1 + trainings) as advance:
        published = [
            _search(_published_program(), _published_init(), PUBLISHED_CANDIDATES, seed, advance) for seed in SEEDS
        ]
        relaxed = _relaxed(advance)
        designed = {rho: _search(_program(rho), None, CANDIDATES, 0, advance) for rho in rhos}
        building = _time_of_building(designed[RHO].structure, advance)
        networks: dict[str, Callable[[], torch.nn.Module]] = {
            f"designed, rho_0 = {rho:g}": partial(_build, found.structure) for rho, found in designed.items()
        }
        random = iter([_random(seed) for seed in SEEDS])
        networks |= {"random": lambda: _build(next(random)), "by hand": lambda: _build(BY_HAND)}
        trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
    return finished(
        "DeepMAD: quick test of its claims",
        [_search_section(published, relaxed, designed, building), *_training_sections(trained, designed)],
    )


def _published_program() -> Program:
    found = PUBLISHED_PROGRAMS[PUBLISHED]
    return Program(image_size=found.image_size, flops=found.flops, params=found.params, rho=found.rho)


def _published_init() -> Structure:
    return SPACES[PUBLISHED_PROGRAMS[PUBLISHED].space].init


def _program(rho: float) -> Program:
    return Program(image_size=IMAGE_SIZE, flops=FLOPS, params=PARAMS, rho=rho, weights=WEIGHTS)


def _search(
    program: Program, init: Structure | None, candidates: int, seed: int, advance: Callable[[str], None]
) -> _Searched:
    space = SPACES["k1kxk1"]
    first = climb(init or INIT, program, space, until_feasible=True)
    scores = [program.objective(first)]
    population = Population([(scores[0], first)], 256, Random(f"{seed}/0"))
    mutation = Mutation(space=space, image_size=program.image_size)
    began = time.process_time()
    for _ in range(10):
        population.evolve(candidates // 10, program, mutation)
        scores.append(population.members[-1][0])
    milliseconds = 1000 * (time.process_time() - began) / population.evaluated
    advance("searching")
    structure = population.members[-1][1]
    if program.violation(structure) is not None:
        raise RuntimeError(f"a search left its budgets: {program.violation(structure)}")
    return _Searched(structure, scores, milliseconds)


def _relaxed(advance: Callable[[str], None]) -> float:
    program = _published_program()
    space = SPACES[PUBLISHED_PROGRAMS[PUBLISHED].space]
    found = [relax(program, space, _published_init(), (0, number)) for number in range(PUBLISHED_STARTS)]
    advance("searching")
    return max(map(program.objective, found))


def _random(seed: int) -> Structure:
    """The end of a random walk within the budgets that takes nearly all of one of them."""
    program, space, random = _program(RHO), SPACES["k1kxk1"], Random(seed)
    mutation = Mutation(space=space, image_size=IMAGE_SIZE)
    structure, accepted = climb(INIT, program, space, until_feasible=True), 0
    while True:
        candidate = mutation(structure, random)
        if program.evaluate(candidate) is None:
            continue
        structure, accepted = candidate, accepted + 1
        used = program.used(structure)
        if (
            accepted >= RANDOM_STEPS
            and max(used[name][0] / used[name][1] for name in ("flops", "params")) >= RANDOM_SHARE
        ):
            return structure


def _build(structure: Structure) -> torch.nn.Module:
    return CnnNetConfig(structure=structure, num_classes=10, in_channels=1).build()


def _time_of_building(structure: Structure, advance: Callable[[str], None]) -> list[float]:
    """Time to build the modules and count their parameters over that of the arithmetic, side by side."""
    program, ratios = _program(math.inf), []
    for _ in range(PAIRS):
        began = time.process_time()
        count_parameters(_build(structure))
        built = time.process_time() - began
        began = time.process_time()
        for _ in range(100):
            program.evaluate(structure)
        ratios.append(100 * built / (time.process_time() - began))
    advance("timing")
    return ratios


def _search_section(
    published: Sequence[_Searched], relaxed: float, designed: dict[float, _Searched], building: Sequence[float]
) -> Section:
    theirs = _published_program().objective(model_config(f"deepmad_{PUBLISHED}").structure)  # type: ignore[attr-defined]
    reached = [found.scores[-1] / theirs for found in published]
    times = [found.milliseconds for found in published]
    claims = [
        Claim.judge(
            "The search solves the published program at least as well as its authors did",
            published=f"DeepMAD-{PUBLISHED.upper()} has an objective of {theirs:.1f} (computed from its structure)",
            statistic=f"objective after {PUBLISHED_CANDIDATES:,} candidates under the same budgets over that of the "
            "published structure",
            value=reached,
            at_least=1.0,
            seeds=len(SEEDS),
        ),
        Claim.judge(
            "The continuous relaxation solves it as well",
            published="any solver of mathematical programs will do",
            statistic=f"best objective of {PUBLISHED_STARTS} starts over that of the published structure",
            value=relaxed / theirs,
            at_least=1.0,
            seeds=0,
        ),
        Claim.judge(
            "A search takes minutes on a CPU",
            published="a few minutes on a CPU",
            statistic="processor time of one candidate",
            value=times,
            at_most=CANDIDATE_TIME,
            seeds=len(SEEDS),
            unit="ms",
        ),
    ]
    steps = [PUBLISHED_CANDIDATES * step / 10 for step in range(11)]
    curves = {f"seed {seed}": (steps, found.scores) for seed, found in zip(SEEDS, published, strict=True)}
    curves["published structure"] = (steps, [theirs] * len(steps))
    small = [CANDIDATES * step / 10 for step in range(11)]
    rows: list[list[Cell]] = []
    for rho, found in designed.items():
        used = _program(rho).used(found.structure)
        values = [used[name][0] for name in ("flops", "params", "rho", "layers")]
        rows.append([f"{rho:g}", found.scores[0], found.scores[-1], *values])
    columns = ["rho_0", "objective at first", "at last", "FLOPs", "parameters", "rho", "layers"]
    caption = f"Budgets: {FLOPS:,.0f} FLOPs at {IMAGE_SIZE} pixels, {PARAMS:,.0f} parameters, without the classifier."
    ratio = statistics.median(building)
    parts: list[Part] = [
        Lines(f"Search under the budgets of DeepMAD-{PUBLISHED.upper()}", "candidates", "objective", curves),
        Lines(
            "Search for the small networks",
            "candidates",
            "objective",
            {f"rho_0 = {rho:g}": (small, found.scores) for rho, found in designed.items()},
        ),
        Table("What was found for the small networks", columns, rows, caption),
        Note(
            f"Building the modules of one candidate and counting their parameters takes {ratio:,.0f} times as long as "
            f"its score and budgets by arithmetic (median of {PAIRS} pairs of processor times, {min(building):,.0f} to "
            f"{max(building):,.0f})."
        ),
    ]
    return Section("Search", [*claims, *parts])


def _training_sections(trained: dict[str, list[Trained]], designed: dict[float, _Searched]) -> Iterator[Section]:
    *sweep, random, hand = trained.values()
    best = sweep[0]
    learned = statistics.mean(result.accuracy for result in best) >= LEARNED
    over_random, over_hand = accuracy_differences(best, random), accuracy_differences(best, hand)
    over_deepest = accuracy_differences(best, sweep[-1])

    def judged(statement: str, published: str, other: str, gains: list[float]) -> Claim:
        return Claim.judge(
            statement,
            published=published,
            statistic=f"accuracy of the designed network less that of {other}, on the same digits; judged if it is at "
            "least twice its standard error",
            value=gains,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(gains),
            unit="points",
        )

    claims = [
        judged(
            "A designed network is more accurate than a random one within the same budgets",
            "80.6 % top-1 on ImageNet-1K within the budgets of ResNet-50",
            "a random one of each seed",
            over_random,
        ),
        judged(
            "A designed network is more accurate than one drawn by hand",
            "82.5 % top-1 on ImageNet-1K against 82.1 % of ConvNeXt-T and 81.3 % of Swin-T, as large",
            "one drawn by hand",
            over_hand,
        ),
    ]
    caption = (
        f"Networks of at most {PARAMS:,.0f} parameters before the classifier, after the last of {TRAINING.epochs} "
        f"epochs on {TRAIN_FRACTION:.0%} of scikit-learn's 1797 digits at {IMAGE_SIZE} x {IMAGE_SIZE} pixels."
    )
    note = Note(
        f"AdamW, learning rate {TRAINING.lr:g}, {TRAINING.warmup_epochs:g} epochs of warm-up, cosine decay, batches of "
        f"{TRAINING.batch_size}, no augmentation. The paper's networks are trained for 480 epochs. "
        "What is published are accuracies on ImageNet-1K."
    )
    yield Section("Accuracy", [*claims, *accuracy_parts(trained, SEEDS, caption=caption), note])
    deep = judged(
        "Networks that are too deep for their width fail to train",
        "accuracy falls where rho is too large, although the entropy rises",
        f"the one that was designed for rho_0 = {DEEPER[-1]:g}",
        over_deepest,
    )
    points = {
        f"rho_0 = {rho:g}": (effectiveness(found.structure), statistics.mean(result.accuracy for result in results))
        for (rho, found), results in zip(designed.items(), sweep, strict=True)
    }
    points["by hand"] = (effectiveness(BY_HAND), statistics.mean(result.accuracy for result in hand))
    yield Section(
        "Effectiveness", [deep, Scatter("Accuracy and effectiveness", "rho, depth over width", "accuracy [%]", points)]
    )


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train DeepMAD-R18 and ResNet-18 by the recipe, and measure the published weights of every network.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the accuracies cannot be held against the published ones, and the verdicts say so.
    """
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in TOP1
    }
    designed, plain = runs.values()
    images = designed.task.splits["test"]
    same_setting = not changes and len(images.classes) == IMAGENET_CLASSES
    claims = [
        Claim.judge(
            "DeepMAD-R18 is more accurate than ResNet-18, which is as large",
            published="77.7 % against 69.8 % top-1 on ImageNet-1K (the latter with torchvision's recipe)",
            statistic="difference of the top-1 accuracies of the best epochs, both trained by the recipe",
            value=designed.top1 - plain.top1,
            at_least=0.0,
            seeds=1,
            scale_ok=same_setting,
            unit="points",
        ),
        Claim.judge(
            "DeepMAD-R18 trained by the recipe reaches its published accuracy",
            published="77.7 % top-1",
            statistic="top-1 accuracy of the best epoch on the validation images",
            value=designed.top1,
            at_least=published_top1("deepmad_r18") - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        ),
    ]
    weights = {model: published_accuracy(model, images) for model in WEIGHTS_OF}
    return finished(
        "DeepMAD: full test of its claims",
        [Section("Accuracy", [*claims, *full_parts(runs, TOP1, weights)])],
        data=str(data),
    )
