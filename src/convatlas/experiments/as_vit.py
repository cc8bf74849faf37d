"""Do scores of untrained vision transformers tell which of them will be accurate, and can a search follow them?

Chen, Huang, Du, Song, Wang, Zhou: "Auto-scaling Vision Transformers without Training", ICLR 2022, arXiv 2202.11921. Its
abstract claims 83.5 % top-1 on ImageNet-1K for a network that was found and scaled within 12 hours on one GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convatlas.data.images import read_images
from convatlas.data.transforms import Preprocess
from convatlas.design.as_vit import Genotype, Scores, TrainingFreeSearch, score_genotype
from convatlas.design.as_vit.scaling import ranks
from convatlas.design.as_vit.scores import length_distortion, random_plane, raw_features, without_norms
from convatlas.design.as_vit.topology import TopologySpace
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    train_by_recipe,
)
from convatlas.networks.as_vit import AsViTConfig
from convatlas.networks.registry import create_model
from convatlas.report import Cell, Claim, Lines, Note, Part, Report, Scatter, Section, Table
from convatlas.training.progressive_tokens import TokenSchedule
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Rank correlation (Kendall's tau) of the length distortion with the accuracy that the paper publishes.
PUBLISHED_TAU = 0.49
#: Share of the random topologies whose scores a search has to beat.
BEATEN = 0.5
#: Share of the multiply-adds of a training that coarse tokens save, in %, as published.
PUBLISHED_SAVING = 56.0
#: Points of accuracy that count as no difference: two standard errors of a paired difference of three runs whose
#: accuracies spread by about one point.
TOLERANCE = 1.5

SEEDS = (0, 1, 2)
#: Random topologies, all of this width; between unrelated rankings of so many, tau has a standard error of 0.22.
TOPOLOGIES = 12
HIDDEN = 8
IMAGE_SIZE = 32
REPEATS = 3
BATCH = 16
TRAIN_FRACTION = 0.25
TRAINING = Training(epochs=2, batch_size=32, lr=3e-3, warmup_epochs=1)
#: Of the searches, which score one network of each topology on fewer images.
STEPS = 100
SEARCH_BATCH = 8
#: A short training with coarser tokens in the first quarter of its epochs, as in the paper's, which has them in 70 of
#: 300; tokens of 16 pixels would leave a single one for three of the stages.
SCHEDULED = f"8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,{HIDDEN}"
SCHEDULED_TRAINING = Training(epochs=8, batch_size=32, lr=3e-3, warmup_epochs=1)
SCHEDULE = TokenSchedule(phases=((2, 8, 2),))
#: Epochs of the paper's training and when its tokens change, by number or as a share of the training.
EPOCHS = 300
SCHEDULES = {"after 40 and 70 epochs": ((40, 16, 4), (70, 8, 2)), "after 40 % and 70 %": ((120, 16, 4), (210, 8, 2))}
PAIRS = 3

# Full: one training each, as the paper did.

RECIPE = "as_vit"
TOP1 = {"as_vit_small": 81.2, "as_vit_base": 82.5}
#: Points of top-1 by which two ImageNet trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" scores and trains tiny networks on digits; "full" trains As-ViT Small and Base by recipe.
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


def quick() -> Report:
    """Scores against accuracy of random topologies; searches; coarse tokens first; time of the scores."""
    topologies = _topologies()
    trainings = len(SEEDS) * (TOPOLOGIES * TRAINING.epochs + 2 * SCHEDULED_TRAINING.epochs)
    with progress(TOPOLOGIES + trainings + len(SEEDS) * STEPS + 1) as advance:
        images = _images()
        scores = {}
        for genotype in topologies:
            scores[genotype] = score_genotype(genotype, images, repeats=REPEATS, batch=BATCH)
            advance("scoring topologies")
        networks: dict[str, Callable[[], nn.Module]] = {
            str(genotype): partial(_build, genotype) for genotype in topologies
        }
        trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
        searches = [_search(seed, advance) for seed in SEEDS]
        ratios = _forward_over_backward()
        advance("timing")
        seed = Genotype.parse(SCHEDULED)
        tokens = {"fine tokens": lambda: _build(seed), "coarse tokens first": lambda: _Scheduled(_build(seed))}
        scheduled = compare(tokens, SCHEDULED_TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
    sections = [
        _score_section(scores, trained, ratios),
        _search_section(searches, scores, images),
        _token_section(scheduled),
    ]
    return finished("As-ViT: quick test of its claims", sections)


def _topologies() -> list[Genotype]:
    space, random = TopologySpace(), Random(0)
    found: dict[str, Genotype] = {}
    while len(found) < TOPOLOGIES:
        genotype = space.genotype([random.randrange(len(options)) for options in space.choices], hidden=HIDDEN)
        found.setdefault(str(genotype), genotype)
    return list(found.values())


def _images() -> Tensor:
    images = read_images("digits")["all"]
    preprocess = Preprocess(size=IMAGE_SIZE, mean=(0.5,), std=(0.25,), crop=1.0)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: REPEATS * BATCH].tolist()
    return torch.stack([preprocess(images.image(row)) for row in rows])


def _build(genotype: Genotype) -> nn.Module:
    return AsViTConfig(genotype=str(genotype), num_classes=10, in_channels=1).build()


def _search(seed: int, advance: Callable[[str], None]) -> dict[str, Any]:
    search = TrainingFreeSearch(
        image_size=IMAGE_SIZE,
        data="digits",
        steps=STEPS,
        hidden=HIDDEN,
        params=(0, 0),
        repeats=1,
        batch=SEARCH_BATCH,
        seed=seed,
    )
    state = search.start()
    while not search.progress(state).finished:
        state = search.step(state)
        advance("searching")
    return state


def _forward_over_backward() -> list[float]:
    """Time of the length distortion by a backward pass for each feature over that by one forward pass, side by side."""
    torch.manual_seed(0)
    network, shape = _build(_topologies()[0]).eval(), (1, IMAGE_SIZE, IMAGE_SIZE)
    plane = random_plane(IMAGE_SIZE**2)
    ratios = []
    for _ in range(PAIRS + 1):
        began = time.process_time()
        backward = _by_backward_passes(network, shape, plane)
        between = time.process_time()
        forward = length_distortion(network, shape, plane=plane)
        ratios.append((between - began) / (time.process_time() - between))
        if abs(forward - backward) > 1e-3 * abs(forward):
            raise RuntimeError(f"both ways must give the same, got {forward} and {backward}")
    return ratios[1:]


def _by_backward_passes(network: nn.Module, shape: tuple[int, int, int], plane: Tensor) -> float:
    bare, total = without_norms(network), 0.0
    for chunk in torch.linspace(0, 2 * torch.pi, 10).split(6):
        theta = chunk.clone().requires_grad_()
        points = torch.stack([theta.cos(), theta.sin()], 1) @ plane.T
        features = raw_features(bare, points.unflatten(1, shape))
        rows = [torch.autograd.grad(column.sum(), theta, retain_graph=True)[0] for column in features.unbind(1)]
        total += torch.stack(rows, 1).norm(dim=1).sum().item()
    return total


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's rank correlation."""
    from scipy.stats import kendalltau

    return float(kendalltau(first, second).statistic)


def _score_section(
    scores: dict[Genotype, Scores], trained: dict[str, list[Trained]], ratios: Sequence[float]
) -> Section:
    accuracies = [[results[index].accuracy for results in trained.values()] for index in range(len(SEEDS))]
    length = [found.length for found in scores.values()]
    ntk = [-found.ntk for found in scores.values()]
    both = [float(a + b) for a, b in zip(ranks(length), ranks(ntk), strict=True)]
    taus = {
        "length distortion": [_tau(length, row) for row in accuracies],
        "minus the condition": [_tau(ntk, row) for row in accuracies],
        "both ranks": [_tau(both, row) for row in accuracies],
    }
    error = (2 * (2 * TOPOLOGIES + 5) / (9 * TOPOLOGIES * (TOPOLOGIES - 1))) ** 0.5

    def judged(statement: str, name: str) -> Claim:
        return Claim.judge(
            statement,
            published=f"Kendall's tau of the length distortion with ImageNet accuracy is about {PUBLISHED_TAU}",
            statistic=f"Kendall's tau of {name} with the accuracies of a seed; judged if their mean is at least twice "
            f"its standard error among unrelated rankings, {error:.2f}",
            value=taus[name],
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=abs(statistics.mean(taus[name])) >= 2 * error,
        )

    means = [statistics.mean(result.accuracy for result in results) for results in trained.values()]
    rows: list[list[Cell]] = []
    for (genotype, found), accuracy in zip(scores.items(), means, strict=True):
        size = genotype.parameters(num_classes=10, in_channels=1)
        rows.append([str(genotype), size, found.ntk, found.length, accuracy])
    columns = ["topology", "parameters", "condition", "length distortion", "mean accuracy [%]"]
    caption = (
        f"{TOPOLOGIES} random topologies of {HIDDEN} channels. Scores: means of {REPEATS} untrained networks. "
        f"Accuracy: after {TRAINING.epochs} epochs on {TRAIN_FRACTION:.0%} of scikit-learn's 1797 digits at "
        f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels, mean of {len(SEEDS)} seeds."
    )
    correlations: list[list[Cell]] = [[name, *values, statistics.mean(values)] for name, values in taus.items()]
    parts: list[Part] = [
        Table("Rank correlations with accuracy", ["score", *(f"seed {seed}" for seed in SEEDS), "mean"], correlations),
        Table("Topologies", columns, rows, caption, {"mean accuracy [%]": "max"}),
        Scatter(
            "Length distortion and accuracy",
            "length distortion",
            "accuracy [%]",
            {
                str(number): (found, accuracy)
                for number, (found, accuracy) in enumerate(zip(length, means, strict=True), 1)
            },
            caption="Points are numbered as the rows of the table.",
        ),
        Note(
            "A backward pass for each feature, as in the authors' code, takes "
            f"{statistics.median(ratios):.0f} times as long as one forward pass for the same length distortion (median "
            f"of {PAIRS} pairs of processor times, {min(ratios):.0f} to {max(ratios):.0f})."
        ),
    ]
    claims = [
        judged("The length distortion of untrained networks ranks them as their accuracy does", "length distortion"),
        judged("Both scores together rank networks as their accuracy does", "both ranks"),
    ]
    return Section("Scores", [*claims, *parts])


def _search_section(searches: Sequence[dict[str, Any]], scores: dict[Genotype, Scores], images: Tensor) -> Section:
    beaten = []
    rows: list[list[Cell]] = []
    for seed, state in zip(SEEDS, searches, strict=True):
        found = score_genotype(Genotype.parse(state["seed"]), images, repeats=REPEATS, batch=BATCH)
        every = [*scores.values(), found]
        sums = [
            a + b
            for a, b in zip(
                ranks([each.ntk for each in every]),
                ranks([each.length for each in every], descending=True),
                strict=True,
            )
        ]
        beaten.append(sum(sums[-1] < other for other in sums[:-1]) / len(scores))
        entropies = [entry["entropy"] for entry in state["trace"]]
        rows.append([seed, state["seed"], found.ntk, found.length, entropies[0], entropies[-1], beaten[-1]])
    claim = Claim.judge(
        "The search finds topologies with better scores than random ones",
        published="the search finds the seed topology of As-ViT",
        statistic=f"share of the {TOPOLOGIES} random topologies with a worse sum of ranks of both scores than the one "
        f"found in {STEPS} steps",
        value=beaten,
        at_least=BEATEN,
        seeds=len(SEEDS),
    )
    curves = {
        f"seed {seed}": (range(1, 1 + STEPS), [entry["entropy"] for entry in state["trace"]])
        for seed, state in zip(SEEDS, searches, strict=True)
    }
    window = max(1, STEPS // 5)
    rewards = {}
    for seed, state in zip(SEEDS, searches, strict=True):
        values = [entry["reward"] for entry in state["trace"]]
        means = [statistics.mean(values[max(0, i - window) : i]) for i in range(1, 1 + STEPS)]
        rewards[f"seed {seed}"] = (range(1, 1 + STEPS), means)
    columns = ["seed", "found", "condition", "length distortion", "entropy at first", "at last", "share beaten"]
    parts: list[Part] = [
        Table("Searches", columns, rows),
        Lines("Entropy of the policy", "step", "nats", curves),
        Lines("Reward", "step", f"mean of {window} steps", rewards),
    ]
    return Section("Search", [claim, *parts])


class _Scheduled(nn.Module):
    """A network whose tokens follow the schedule, the epochs counted by its training steps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.steps = 0
        self.steps_of_epoch = -(-int(1797 * TRAIN_FRACTION) // SCHEDULED_TRAINING.batch_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            SCHEDULE.start_epoch(self.network, self.steps // self.steps_of_epoch)
            self.steps += 1
        return self.network(x)


def _token_section(scheduled: dict[str, list[Trained]]) -> Section:
    fine, coarse = scheduled.values()
    saved: dict[str, dict[str, float]] = {}
    with torch.device("meta"):
        for model in ("as_vit_small", "as_vit_base", "as_vit_large"):
            network = create_model(model)
            inputs = network.example_inputs()  # type: ignore[operator]
            saved[model] = {
                name: 100 * (1 - TokenSchedule(phases=phases).share_of_macs(network, inputs, EPOCHS))
                for name, phases in SCHEDULES.items()
            }
    published, later = SCHEDULES
    claims = [
        Claim.judge(
            "Coarse tokens at the beginning save more than half of the multiply-adds",
            published=f"about {PUBLISHED_SAVING:g} % of the multiply-adds and 41 % of the time, with changes early in "
            f"{EPOCHS} epochs",
            statistic=f"multiply-adds saved by As-ViT Base at 224 pixels with tokens that change {published}, counted",
            value=saved["as_vit_base"][published],
            at_least=PUBLISHED_SAVING,
            seeds=0,
            unit="%",
        ),
        Claim.judge(
            "Coarse tokens at the beginning cost hardly any accuracy",
            published="nearly equal accuracy on ImageNet-1K",
            statistic="accuracy with coarse tokens in the first quarter of the epochs less accuracy without, on the "
            "same digits",
            value=accuracy_differences(coarse, fine),
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            unit="points",
        ),
    ]
    rows: list[list[Cell]] = [[model, *values.values()] for model, values in saved.items()]
    columns = ["network", *(f"saved, changes {name} [%]" for name in SCHEDULES)]
    caption = f"The authors' seed with {HIDDEN} channels, {SCHEDULED_TRAINING.epochs} epochs, otherwise as above."
    parts = [
        Table(
            "Multiply-adds saved in 300 epochs",
            columns,
            rows,
            f"Which epochs the paper means is not certain: {later} saves more than is published, the other less.",
        ),
        *accuracy_parts(scheduled, SEEDS, caption=caption),
    ]
    return Section("Coarse tokens first", [*claims, *parts])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train As-ViT Small and Base by the recipe.

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
    images = next(iter(runs.values())).task.splits["test"]
    same_setting = not changes and len(images.classes) == IMAGENET_CLASSES
    claims = [
        Claim.judge(
            f"{model} trained by the recipe reaches its published accuracy",
            published=f"{TOP1[model]} % top-1",
            statistic="top-1 accuracy of the best epoch on the validation images",
            value=found.top1,
            at_least=TOP1[model] - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        )
        for model, found in runs.items()
    ]
    note = Note("The authors published no weights. The search and the scaling at full size: convatlas design as_vit.")
    return finished(
        "As-ViT: full test of its claims",
        [Section("Accuracy", [*claims, *full_parts(runs, TOP1, {}), note])],
        data=str(data),
    )
