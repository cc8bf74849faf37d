"""Do networks of one-way convolutions stand for a wave solver as well as dense ones, with far fewer weights?

Boukraichi, Akkari, Casenave, Ryckelynck: "A priori compression of convolutional neural networks for wave simulators",
2023, arXiv 2304.04964.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from convatlas.data.wave_fem import WaveSequences, wave_dataset
from convatlas.experiments.small_training import finished, one_thread, progress, resolved
from convatlas.networks.registry import model_config
from convatlas.networks.wave_surrogate import WaveSurrogate, WaveSurrogateConfig
from convatlas.nn.conv.one_way import decompose
from convatlas.physics.wave import Waves
from convatlas.physics.wave_evaluation import Windows, errors_of
from convatlas.report import Bars, Cell, Claim, Files, Lines, Note, Part, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.run import Run
from convatlas.training.sampling import seed_everything
from convatlas.training.task import split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Times the error of the dense network that still counts as equivalent.
EQUIVALENT = 1.2
#: Relative L2 error of a step of the dense network above which the networks have not learned enough to be compared.
LEARNED = 0.15
#: How many times fewer parameters "fewer" means at least.
FEWER = 5.0

SEEDS = (0, 1, 2)
TRAIN, TEST = 24, 6
SIZE, FRAMES, INTERVAL = 32, 24, 0.04
#: Fields that a rollout has, in the training and in the test.
TRAIN_ROLLOUT, ROLLOUT = 2, 10
STEPS, BATCH, RATE = 160, 8, 2e-3
NETWORK = WaveSurrogateConfig(widths=(16, 24), depth=1)
#: What is compared: the dense network first.
KERNELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "one-way, R = 1": {"kernel": "oneway"},
    "one-way, R = 2": {"kernel": "oneway", "rank": 2},
}
#: Networks of the usual size whose parameters are counted, and the dense ones beside them.
COUNTED = {
    "wave_surrogate_oneway": "wave_surrogate",
    "wave_surrogate_oneway_rank2": "wave_surrogate",
    "wave_field_oneway": "wave_field",
}

RECIPE = "wave_surrogate"
EQUAL = "performance equivalent to classical convolutional layers; no figure in the abstract"
LESS = "fewer trainable parameters and less memory"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small surrogates on simulated scenes of 32 x 32 nodes; "full" trains the networks of the
            usual size by the recipe.
        data: for "full": sequences as ``convatlas train waves`` reads them, or ``simulated``.
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


# Quick


class _Trained(NamedTuple):
    """A short training: errors of a step and of the rollout on test and training scenes, and bytes it held.

    Attributes:
        step, rollout: relative L2 errors on test scenes.
        train_step: relative L2 error of a step on the scenes of the training.
        each: relative L2 error of each field of the rollout.
        bytes: of parameters, gradients and the state of Adam.
        decomposed: error of a step when the trained kernels are decomposed to rank 1; of the dense network.
    """

    step: float
    rollout: float
    train_step: float
    each: list[float]
    bytes: int
    parameters: int
    decomposed: float | None


def quick() -> Report:
    """Train small surrogates, dense and one-way, on the same scenes; count parameters."""
    trained: dict[str, list[_Trained]] = {name: [] for name in KERNELS}
    with progress(len(SEEDS) * len(KERNELS)) as advance, one_thread():
        for seed in SEEDS:
            scenes = wave_dataset(TRAIN + TEST, SIZE, frames=FRAMES, interval=INTERVAL, seed=seed)
            for name, options in KERNELS.items():
                seed_everything(seed)
                network = NETWORK.override(**options).build()
                trained[name].append(_train(network, scenes, seed))
                advance(f"training {name}")
    return finished(
        "A priori compression: quick test of its claims", [_accuracy_section(trained), _memory_section(trained)]
    )


def _train(network: WaveSurrogate, scenes: WaveSequences, seed: int) -> _Trained:
    """Train by Adam along a cosine on the first scenes and measure on the others."""
    train, test = scenes.subset(list(range(TRAIN))), scenes.subset(list(range(TRAIN, TRAIN + TEST)))
    scale = float(train.fields.std())
    # The task knows the losses: a step, and a rollout.
    task = Waves(model="wave_surrogate", rollout=TRAIN_ROLLOUT)
    task.network, task.scale = network, scale
    windows = Windows(train, NETWORK.frames + TRAIN_ROLLOUT)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        items = [windows[index] for index in torch.randint(len(windows), (BATCH,), generator=order).tolist()]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        loss = task.losses(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in network.parameters())
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    network.eval()
    errors = {
        name: errors_of(network, part, ROLLOUT, scale, FRAMES) for name, part in (("test", test), ("train", train))
    }
    measured = {name: each.means() for name, each in errors.items()}
    decomposed = None
    if network.config.kernel == "dense":
        smaller: Any = decompose(network, 1).model
        decomposed = errors_of(smaller, test, ROLLOUT, scale, FRAMES).means()["relative L2 of a step"]
    return _Trained(
        measured["test"]["relative L2 of a step"],
        measured["test"]["relative L2 of the rollout"],
        measured["train"]["relative L2 of a step"],
        errors["test"].each.mean(0).tolist(),
        held,
        count_parameters(network),
        decomposed,
    )


def _accuracy_section(trained: dict[str, list[_Trained]]) -> Section:
    dense, *others = trained
    scale_ok = statistics.mean(result.step for result in trained[dense]) <= LEARNED
    claims: list[Part] = []
    for name in others:
        for what, attribute in (("a step", "step"), (f"a rollout of {ROLLOUT} steps", "rollout")):
            pairs = zip(trained[name], trained[dense], strict=True)
            claims.append(
                Claim.judge(
                    f"{name}: {what} is as good as with dense kernels",
                    published=EQUAL,
                    statistic=f"relative L2 error of {what} on test scenes, over that of the dense network",
                    value=[getattr(ours, attribute) / getattr(theirs, attribute) for ours, theirs in pairs],
                    at_most=EQUIVALENT,
                    seeds=len(SEEDS),
                    scale_ok=scale_ok,
                )
            )
    gaps = {name: [result.step - result.train_step for result in results] for name, results in trained.items()}
    differences = [ours - theirs for ours, theirs in zip(gaps[others[0]], gaps[dense], strict=True)]
    claims.append(
        Claim.judge(
            f"{others[0]}: it fits less to the scenes of the training alone",
            published="less over-fitting",
            statistic="error of a step on test scenes less that on training scenes, of the one-way network less that "
            "of the dense one; judged if it is at least twice its standard error",
            value=differences,
            at_most=0.0,
            seeds=len(SEEDS),
            scale_ok=scale_ok and resolved(differences),
        )
    )
    rows: list[list[Cell]] = []
    for name, results in trained.items():
        means = [
            statistics.mean(getattr(result, key) for result in results) for key in ("step", "train_step", "rollout")
        ]
        rows.append([name, results[0].parameters, *means])
    decomposed = [result.decomposed for result in trained[dense] if result.decomposed is not None]
    rows.append(["dense, decomposed to R = 1 after the training", None, statistics.mean(decomposed), None, None])
    columns = ["network", "parameters", "a step, test", "a step, training", f"{ROLLOUT} steps, test"]
    curves = {
        name: (
            range(1, 1 + ROLLOUT),
            [statistics.mean(values) for values in zip(*(result.each for result in results), strict=True)],
        )
        for name, results in trained.items()
    }
    note = Note(
        f"{TRAIN} scenes to learn from and {TEST} to test, with two random inclusions each, {FRAMES} fields on {SIZE} "
        f"x {SIZE} nodes by finite elements. {STEPS} steps of Adam along a cosine from {RATE:g}, batches of {BATCH}, "
        f"loss of a step and of {TRAIN_ROLLOUT}. Widths {NETWORK.widths}: the dense network is small as well."
    )
    return Section(
        "Accuracy",
        [
            *claims,
            Table("Relative L2 error, mean of the seeds", columns, rows),
            Lines("Error along the rollout, mean of the seeds", "step", "relative L2", curves, log_y=True),
            note,
        ],
    )


def _memory_section(trained: dict[str, list[_Trained]]) -> Section:
    rows: list[list[Cell]] = []
    for name, dense in COUNTED.items():
        ours, theirs = _parameters(name), _parameters(dense)
        rows.append([name, ours, theirs, theirs / ours])
    surrogate = next(row for row in rows if row[0] == next(iter(COUNTED)))
    held = {name: results[0].bytes / 2**10 for name, results in trained.items()}
    first, *others = held
    claims: list[Part] = [
        Claim.judge(
            f"The surrogate has at least {FEWER:g} times fewer parameters with one-way kernels",
            published=LESS,
            statistic="parameters of the dense network over those of the one-way network with R = 1, of the usual size",
            value=float(surrogate[3] or 0),
            at_least=FEWER,
            seeds=0,
        ),
        Claim.judge(
            f"Parameters, gradients and Adam's state take at least {FEWER:g} times less memory",
            published=LESS,
            statistic="their bytes after a step, of the small dense network over those of the one-way one with R = 1",
            value=held[first] / held[others[0]],
            at_least=FEWER,
            seeds=0,
        ),
    ]
    caption = "Activations do not shrink; convatlas bench one_way has the peak of whole passes, and their time."
    bars = Bars("Parameters, gradients and Adam's state", "memory [KiB]", held, caption)
    columns = ["network", "parameters", "with dense kernels", "times fewer"]
    return Section("Parameters and memory", [*claims, Table("Parameters", columns, rows), bars])


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return count_parameters(model_config(name).build())


# Full


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train the surrogates of the usual size by the recipe, dense and one-way.

    Args:
        data: sequences, or ``simulated``.
        folder: where the runs lie, each in a folder of its model's name.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, the verdicts say that the setting
            is another.
    """
    settings = yaml.safe_load(Waves.recipe(RECIPE).read_text(encoding="utf-8"))
    quality: dict[str, dict[str, float]] = {}
    parameters: dict[str, int] = {}
    models = ("wave_surrogate", "wave_surrogate_oneway", "wave_surrogate_oneway_rank2")
    for model in models:
        task, training = split_settings(Waves, {**settings, **changes, "data": str(data), "model": model})
        place = Path(folder) / model
        task.fit(place, training, resume=Run(place).config.is_file())
        quality[model], parameters[model] = task.quality(), count_parameters(task.network)
    measures = ("relative L2 of a step", "relative L2 of the rollout")
    claims = [
        Claim.judge(
            f"{model}: {measure.removeprefix('relative L2 of ')} is as good as with dense kernels",
            published=EQUAL,
            statistic=f"{measure} on test scenes, over that of the dense network",
            value=quality[model][measure] / quality[models[0]][measure],
            at_most=EQUIVALENT,
            seeds=1,
            scale_ok=not changes,
        )
        for model in models[1:]
        for measure in measures
    ]
    rows: list[list[Cell]] = [[model, parameters[model], *quality[model].values()] for model in models]
    table = Table("Trained here", ["network", "parameters", *quality[models[0]]], rows)
    links = Files("Runs", {f"report of {model}": f"{model}/report.html" for model in models})
    section = Section("Accuracy", [*claims, table, links])
    return finished("A priori compression: full test of its claims", [section], data=str(data))
