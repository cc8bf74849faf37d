"""Are four 1-D networks with different views of a skeleton better together than the best of them?

Xu, Wang, et al.: "Ensemble One-dimensional Convolution Neural Networks for Skeleton-based Action Recognition", IEEE
Signal Processing Letters 2018.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from convatlas.data.skeleton_sets import ClipPreparation
from convatlas.data.skeletons import LAYOUTS, SkeletonAugment
from convatlas.data.stick_figures import ACTIONS, stick_figures
from convatlas.experiments.small_training import finished, one_thread, progress
from convatlas.networks.skeleton_cnn import EnsemNNConfig
from convatlas.ops.score_fusion import disagreement, fuse_scores, q_statistic
from convatlas.recognition.skeletons import Skeletons
from convatlas.report import Cell, Claim, Files, Heatmap, Lines, Note, Part, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.sampling import seed_everything
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Share of the test clips on which the networks of a pair differ, above which they count as diverse.
DIVERSE = 0.01
#: Accuracy of the best network in %, between which the networks have learned enough and an ensemble can still gain.
LEARNED = (50.0, 99.0)

SEEDS = (0, 1, 2)
TRAIN, TEST, FRAMES = 300, 300, 48
#: Of the positions in metres, and share of the joints that are not seen: enough that single networks make mistakes.
NOISE, HIDDEN = 0.08, 0.1
NETWORK = EnsemNNConfig(
    joints=15,
    frames=FRAMES,
    num_classes=len(ACTIONS),
    widths=(16, 32, 64),
    depths=(1, 1, 1),
    reduction=4,
    parts=LAYOUTS["stick"].parts,
)
TRAINING = Training(epochs=10, batch_size=32, lr=3e-3, weight_decay=1e-4, warmup_epochs=1)
#: Share of the frames that is kept, angles and sizes of the training clips.
AUGMENT = SkeletonAugment()

RECIPE = "ensem_nn"
PUBLISHED = "the ensemble is better than its networks and than the state of the art of 2018; no figure at hand"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on simulated stick figures; "full" trains the ensemble by the recipe.
        data: for "full": clips as ``convatlas train skeletons`` reads them, such as NTU RGB+D.
        folder: for "full": where the run lies. The same folder goes on with a run that was stopped.

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


class _Clips(NamedTuple):
    """Inputs (N, D, T) to learn from, others for each epoch, and to test, with their labels (N)."""

    epochs: list[Tensor]
    labels: Tensor
    test: Tensor
    test_labels: Tensor


class _Trained(NamedTuple):
    """Class probabilities (N, K) of test clips, and the loss of each epoch."""

    scores: Tensor
    losses: list[float]


def quick() -> Report:
    """Train the four networks on simulated figures with every seed, and fuse them."""
    members = NETWORK.members
    trained: list[dict[str, _Trained]] = []
    truths = []
    with progress(len(SEEDS) * len(members) * TRAINING.epochs) as advance, one_thread():
        for seed in SEEDS:
            clips = _figures(seed)
            truths.append(clips.test_labels)
            results = {}
            for name, config in members.items():
                seed_everything(seed)
                results[name] = _train(config.build(), clips, seed, partial(advance, f"training {name}"))
            trained.append(results)
    return finished("Ensem-NN: quick test of its claims", [_section(trained, truths), _sides_section(trained, truths)])


def _figures(seed: int) -> _Clips:
    clips, labels = stick_figures(TRAIN + TEST, noise=NOISE, hidden=HIDDEN, seed=seed)
    prepare = ClipPreparation(frames=FRAMES, view=LAYOUTS["stick"].view)

    epochs = []
    for number in range(TRAINING.epochs):
        random = np.random.default_rng([seed, number])
        epochs.append(torch.from_numpy(np.stack([prepare(clip, AUGMENT, random) for clip in clips[:TRAIN]])))
    test = torch.from_numpy(np.stack([prepare(clip) for clip in clips[TRAIN:]]))
    truth = torch.from_numpy(labels)
    return _Clips(epochs, truth[:TRAIN], test, truth[TRAIN:])


def _train(network: nn.Module, clips: _Clips, seed: int, advance: Callable[[], None]) -> _Trained:
    optimizer = make_optimizer(network, TRAINING)
    steps = -(-len(clips.labels) // TRAINING.batch_size)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(TRAINING, step, steps) / TRAINING.lr)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for inputs in clips.epochs:
        total = 0.0
        for batch in torch.randperm(len(inputs), generator=order).split(TRAINING.batch_size):
            loss = F.cross_entropy(network(inputs[batch]), clips.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
        advance()
    network.eval()
    with torch.inference_mode():
        return _Trained(network(clips.test).softmax(1), losses)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return 100 * float((scores.argmax(1) == labels).double().mean())


def _section(trained: list[dict[str, _Trained]], truths: list[Tensor]) -> Section:
    names = list(trained[0])
    accuracies = {
        name: [_accuracy(r[name].scores, truth) for r, truth in zip(trained, truths, strict=True)] for name in names
    }
    fused = {
        method: [
            _accuracy(fuse_scores([each.scores for each in results.values()], method), truth)
            for results, truth in zip(trained, truths, strict=True)
        ]
        for method in ("mean", "product", "max")
    }
    singles = [max(values) for values in zip(*accuracies.values(), strict=True)]
    differs = [
        statistics.mean(
            disagreement(a.scores.argmax(1), b.scores.argmax(1), truth)
            for a, b in itertools.combinations(results.values(), 2)
        )
        for results, truth in zip(trained, truths, strict=True)
    ]
    low, high = LEARNED
    claims: list[Part] = [
        Claim.judge(
            "The ensemble is at least as accurate as the best of its networks",
            published=PUBLISHED,
            statistic="accuracy of the mean of the four scores less that of the network that is best on the test "
            f"clips; judged if the latter is from {low:g} to {high:g} %",
            value=[ours - best for ours, best in zip(fused["mean"], singles, strict=True)],
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=low <= statistics.mean(singles) <= high,
            unit="points",
        ),
        Claim.judge(
            "The four views make the networks diverse",
            published="diversity by four views of the skeleton",
            statistic="share of the test clips that exactly one of two networks names rightly, mean of the pairs",
            value=differs,
            at_least=DIVERSE,
            seeds=len(SEEDS),
            scale_ok=statistics.mean(singles) >= low,
        ),
    ]
    members = NETWORK.members
    rows: list[list[Cell]] = [
        [name, count_parameters(members[name].build()), *values, statistics.mean(values)]
        for name, values in accuracies.items()
    ]
    rows += [[f"ensemble, {method}", None, *values, statistics.mean(values)] for method, values in fused.items()]
    columns = ["network", "parameters", *(f"seed {seed} [%]" for seed in SEEDS), "mean [%]"]
    pairs: list[list[Cell]] = []
    answers = {name: trained[0][name].scores.argmax(1) for name in names}
    for a, b in itertools.combinations(names, 2):
        pair = (answers[a], answers[b], truths[0])
        pairs.append([a, b, disagreement(*pair), q_statistic(*pair)])
    curves = {
        name: (
            range(1, 1 + TRAINING.epochs),
            [statistics.mean(v) for v in zip(*(results[name].losses for results in trained), strict=True)],
        )
        for name in names
    }
    note = Note(
        f"{TRAIN} simulated clips to learn from and {TEST} to test, of {len(ACTIONS)} actions by a figure of 15 "
        f"joints, resampled to {FRAMES} frames; noise of {NOISE:g} m, {HIDDEN:.0%} of the joints hidden. Widths "
        f"{NETWORK.widths}; AdamW, learning rate {TRAINING.lr:g}, {TRAINING.epochs} epochs, batches of "
        f"{TRAINING.batch_size}. A simulation tests the mechanism, not the accuracy on people."
    )
    return Section(
        "Accuracy",
        [
            *claims,
            Table("Accuracy on the test clips", columns, rows, highlight={"mean [%]": "max"}),
            Table("Diversity, first seed", ["network", "and", "disagreement", "Q"], pairs),
            Lines("Training loss, mean of the seeds", "epoch", "cross-entropy [nats]", curves, log_y=True),
            note,
        ],
    )


def _sides_section(trained: list[dict[str, _Trained]], truths: list[Tensor]) -> Section:
    """How often a network takes a wave of one hand for one of the other."""
    left, right = ACTIONS.index("wave left"), ACTIONS.index("wave right")
    rows: list[list[Cell]] = []
    for name in trained[0]:
        shares = []
        for results, truth in zip(trained, truths, strict=True):
            answers = results[name].scores.argmax(1)
            waves = (truth == left) | (truth == right)
            swapped = ((truth == left) & (answers == right)) | ((truth == right) & (answers == left))
            shares.append(100 * float(swapped.sum()) / max(1, int(waves.sum())))
        rows.append([name, *shares, statistics.mean(shares)])
    columns = ["network", *(f"seed {seed} [%]" for seed in SEEDS), "mean [%]"]
    fused = fuse_scores([each.scores for each in trained[0].values()]).argmax(1)
    matrix = torch.bincount(truths[0] * len(ACTIONS) + fused, minlength=len(ACTIONS) ** 2).view(len(ACTIONS), -1)
    heatmap = Heatmap(
        "Confusion matrix of the ensemble, first seed", matrix.numpy(), ACTIONS, ACTIONS, "predicted", "true"
    )
    return Section("Left and right", [Table("Waves taken for those of the other hand", columns, rows), heatmap])


# Full


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train the ensemble by the recipe.

    Args:
        data: clips, such as the folder of NTU RGB+D.
        folder: where the run lies.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, the verdict says that the setting
            is another.
    """
    settings = yaml.safe_load(Skeletons.recipe(RECIPE).read_text(encoding="utf-8"))
    task, training = split_settings(Skeletons, {**settings, **changes, "data": str(data)})
    place = Path(folder) / RECIPE
    task.fit(place, training, resume=Run(place).config.is_file())
    test = task.splits["test"]
    scores, truth = torch.from_numpy(task.member_probabilities(test).copy()), torch.from_numpy(test.labels)
    ensemble: Any = task.network
    accuracies = {name: _accuracy(each, truth) for name, each in zip(ensemble.members, scores, strict=True)}
    whole = _accuracy(fuse_scores(scores), truth)
    claim = Claim.judge(
        "The ensemble is at least as accurate as the best of its networks",
        published=PUBLISHED,
        statistic="accuracy of the mean of the four scores less that of the network that is best on the test clips",
        value=whole - max(accuracies.values()),
        at_least=0.0,
        seeds=1,
        scale_ok=not changes,
        unit="points",
    )
    rows: list[list[Cell]] = [*([name, value] for name, value in accuracies.items()), ["ensemble, mean", whole]]
    parts: list[Part] = [
        claim,
        Table("Accuracy on the test clips", ["network", "accuracy [%]"], rows),
        Files("Runs", {"report of the ensemble": f"{RECIPE}/report.html"}),
    ]
    return finished("Ensem-NN: full test of its claims", [Section("Accuracy", parts)], data=str(data))
