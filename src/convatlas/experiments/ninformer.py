"""Does a gate that a small MLP-Mixer makes do better than the Mixer itself, and than attention?

Abdullah, Aydin: "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", Neural
Computing and Applications 2025, arXiv 2403.02411. It claims higher accuracy than ViT, MLP-Mixer and Local-ViT on MNIST,
CIFAR-10 and CIFAR-100 under one recipe, at a cost that does not grow with the square of the tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import (
    FullRun,
    Samples,
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    progress,
    resolved,
    train_by_recipe,
)
from convatlas.networks.ninformer import MixerBlock, MixerConfig, NiNBlock, NiNformerClassifier, NiNformerConfig
from convatlas.nn.attention import SelfAttention
from convatlas.nn.mlp import Mlp
from convatlas.ops.tokens import map_to_tokens
from convatlas.report import Cell, Claim, Files, Images, Lines, Note, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points of accuracy by which NiNformer must be ahead.
GAIN = 0.0
#: Accuracy in %, below which NiNformer has not learned enough to be compared (chance is 10).
LEARNED = 80.0
#: Multiply-adds of a block on four times the tokens over those before, at most: linear.
GROWTH = 4.0

SEEDS = (0, 1, 2)
TRAIN_FRACTION = 2 / 3
#: Adam at a constant rate, as published; the dropout of 0.5 is for 100 epochs on 50,000 images.
TRAINING = Training(epochs=16, batch_size=64, lr=1e-3, weight_decay=0.0, schedule="constant", warmup_epochs=0)
SIDE = 8
SIZES: dict[str, Any] = {
    "dim": 32,
    "ffn_dim": 64,
    "patch_size": 2,
    "drop": 0.1,
    "num_classes": 10,
    "in_channels": 1,
    "preprocess": {"size": SIDE},
}
NETWORK = NiNformerConfig().override(depth=2, **SIZES)
MIXER = MixerConfig().override(depth=2, **SIZES)
#: Depths with about as many parameters as NiNformer of two blocks.
MIXER_DEPTH, VIT_DEPTH = 4, 3
#: Tokens at which the cost of blocks of the published width is counted.
TOKENS = (64, 256, 1024)

RECIPE = "ninformer_cifar"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on scikit-learn's digits; "full" trains NiNformer and MLP-Mixer of the
            published size by the recipe.
        data: for "full": CIFAR-10 or CIFAR-100, a folder with ``train`` and ``val`` and a folder for each class in
            them.
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


class _AttentionBlock(nn.Module):
    """The block of ViT, with a hidden width of its MLP like that of the others."""

    def __init__(self, channels: int, hidden_channels: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = SelfAttention(channels, 4, drop=drop)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, hidden_channels, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _ViT(nn.Module):
    """Patches, position embedding, `_AttentionBlock`, mean over the tokens, Linear."""

    def __init__(self, config: NiNformerConfig, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(torch.empty(1, config.num_tokens, config.dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        blocks = (_AttentionBlock(config.dim, config.ffn_dim, config.drop) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(map_to_tokens(self.stem(x)) + self.positions).mean(1))


def quick() -> Report:
    """NiNformer beside Mixers of equal depth and of equal size and a ViT of equal size on digits; counted costs."""
    built: list[NiNformerClassifier] = []

    def ninformer() -> nn.Module:
        built.append(NETWORK.build())
        return built[-1]

    networks: dict[str, Callable[[], nn.Module]] = {
        "NiNformer": ninformer,
        "MLP-Mixer of equal depth": MIXER.build,
        "MLP-Mixer of equal size": MIXER.override(depth=MIXER_DEPTH).build,
        "ViT of equal size": lambda: _ViT(NETWORK, VIT_DEPTH),
    }
    with progress(len(SEEDS) * len(networks) * TRAINING.epochs) as advance:
        trained = compare(networks, TRAINING, seeds=SEEDS, samples=_digits, advance=advance)
    ours, *others = trained.items()
    claims = [_ahead(ours[1], name, results) for name, results in others]
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"After the last of {TRAINING.epochs} epochs on two thirds of scikit-learn's 1797 digits of {SIDE} x "
        f"{SIDE} pixels; the others are the test images.",
    )
    note = Note(
        f"{NETWORK.depth} blocks of {NETWORK.dim} channels, hidden width {NETWORK.ffn_dim}, {NETWORK.num_tokens} "
        f"tokens, dropout {NETWORK.drop:g}, against {MIXER_DEPTH} Mixer blocks and {VIT_DEPTH} ViT blocks of the same "
        f"width. Adam, learning rate {TRAINING.lr:g}, batches of {TRAINING.batch_size}. A claim is judged where the "
        "mean difference is at least twice its standard error."
    )
    sections = [Section("Accuracy", [*claims, *parts, _gates(built[-1]), note]), _cost_section()]
    return finished("NiNformer: quick test of its claims", sections)


def _ahead(ours: Sequence[Trained], name: str, theirs: Sequence[Trained]) -> Claim:
    differences = accuracy_differences(ours, theirs)
    learned = statistics.mean(result.accuracy for result in ours) >= LEARNED
    return Claim.judge(
        f"NiNformer is more accurate than the {name}",
        published="more accurate than ViT, MLP-Mixer and Local-ViT on MNIST, CIFAR-10 and CIFAR-100",
        statistic=f"accuracy of NiNformer less accuracy of the {name}, on the same digits; judged if it is at least "
        "twice its standard error",
        value=differences,
        at_least=GAIN,
        seeds=len(SEEDS),
        scale_ok=learned and resolved(differences),
        unit="points",
    )


def _digits(seed: int) -> Samples:
    sets = stratified_split(read_images("digits")["all"], {"train": TRAIN_FRACTION, "test": 1 - TRAIN_FRACTION}, seed)
    tensors = []
    for images in sets.values():
        pixels = torch.stack([torch.tensor(images.image(index)[..., 0]) for index in range(len(images))])
        tensors += [(pixels[:, None].float() / 255 - 0.5) / 0.5, torch.from_numpy(images.labels)]
    return Samples(*tensors)


def _gates(model: NiNformerClassifier) -> Images:
    """Test digits, and beside each how large the gate of the first block is at each token."""
    images = _digits(SEEDS[-1]).test_images[:4]
    found: list[Tensor] = []
    block: Any = model.blocks[0]
    hook = block.mgu.mixer.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.inference_mode():
        model(images.to(next(model.parameters()).device))
    hook.remove()
    strength = found[0].abs().mean(2).unflatten(1, model.config.grid)
    pictures = []
    for image, gate in zip(images, strength, strict=True):
        pictures += [(_pixels((image[0] + 1) / 2), "digit"), (_pixels(gate / gate.max()), "gate")]
    return Images(
        "Where the gate opens", pictures, "Mean size of the first block's gate at each token, white the most."
    )


def _pixels(values: Tensor) -> Any:
    return (255 * values).round().to(torch.uint8).cpu().numpy()


def _cost_section() -> Section:
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "NiNformer": lambda tokens: NiNBlock(256, MixerBlock(256, tokens, 512, 512), 512),
        "MLP-Mixer": lambda tokens: MixerBlock(256, tokens, 512, 512),
        "ViT": lambda tokens: _AttentionBlock(256, 512, 0.0),
    }
    macs: dict[str, list[int]] = {name: [] for name in kinds}
    with torch.device("meta"):
        for name, make in kinds.items():
            for tokens in TOKENS:
                macs[name].append(cost(make(tokens), torch.empty(1, tokens, 256)).total.macs)
    claim = Claim.judge(
        "The cost of a block grows no faster than the number of tokens",
        published="without attention, whose cost grows with the square of the tokens",
        statistic=f"multiply-adds of a block on {TOKENS[-1]} tokens over those on {TOKENS[-2]}, of equal hidden width",
        value=macs["NiNformer"][-1] / macs["NiNformer"][-2],
        at_most=GROWTH,
        seeds=0,
    )
    rows: list[list[Cell]] = [[name, *(count / 1e6 for count in counts)] for name, counts in macs.items()]
    columns = ["block", *(f"{tokens} tokens [M multiply-adds]" for tokens in TOKENS)]
    curves = {name: (TOKENS, [count / 1e6 for count in counts]) for name, counts in macs.items()}
    caption = "Of width 256 and hidden width 512; a NiNformer block holds a whole Mixer block and more."
    lines = Lines("Multiply-adds of a block", "tokens", "millions", curves, log_y=True)
    return Section("Cost", [claim, Table("One block", columns, rows, caption), lines])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train NiNformer and MLP-Mixer of the published size by the recipe.

    Args:
        data: CIFAR-10 or CIFAR-100, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe; with any the verdict says that the setting is not the paper's.
    """
    classes = len(read_images(str(data))["train"].classes)
    suffix = "cifar100" if classes == 100 else "cifar10"
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in (f"ninformer_{suffix}", f"mixer_{suffix}")
    }
    ninformer, mixer = runs.values()
    claim = Claim.judge(
        "NiNformer is more accurate than the MLP-Mixer of equal width and depth",
        published="more accurate on MNIST, CIFAR-10 and CIFAR-100",
        statistic="difference of the top-1 accuracies of the best epochs on the validation images",
        value=ninformer.top1 - mixer.top1,
        at_least=GAIN,
        seeds=1,
        scale_ok=not changes and classes in (10, 100),
        unit="points",
    )
    sections = [Section("Accuracy", [claim, *_full_parts(runs)])]
    return finished("NiNformer: full test of its claims", sections, data=str(data))


def _full_parts(runs: dict[str, FullRun]) -> list[Table | Lines | Files]:
    rows: list[list[Cell]] = []
    curves = {}
    for model, (task, trained, top1) in runs.items():
        metrics = trained.read_metrics()
        rows.append([model, count_parameters(task.network), top1])
        curves[model] = ([row["epoch"] for row in metrics], [100 * row["val_accuracy"] for row in metrics])
    return [
        Table("Trained here", ["model", "parameters", "top-1 [%]"], rows),
        Lines("Validation accuracy", "epoch", "top-1 [%]", curves),
        Files("Runs", {f"report of {model}": f"{model}/report.html" for model in runs}),
    ]
