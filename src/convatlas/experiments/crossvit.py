"""Do two patch sizes see more than one, and do class tokens that visit the other branch add to that at a linear cost?

Chen, Fan, Panda: "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", ICCV 2021,
arXiv 2103.14899.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
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
from convatlas.networks.crossvit import VARIANTS, CrossViT, CrossViTConfig, MultiScaleBlock
from convatlas.nn.attention import SelfAttention
from convatlas.report import Bars, Cell, Claim, Images, Note, Report, Section, Table
from convatlas.surgery import merge
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Accuracy in %, below which a network has not learned enough to be compared (chance is 10).
LEARNED = 50.0
#: Four times the patches may take so many times the multiply-adds, if the cost is linear in them.
LINEAR = 4.0
#: Share of the attention among all tokens of both branches that the exchange by class tokens may cost.
SHARE = 0.1

SEEDS = (0, 1, 2)
#: An image is made of so many digits of 8 x 8 pixels along each side, of which so many are of its class.
TILES, SAME = 4, 5
SIDE = 8 * TILES
TRAIN_IMAGES, TEST_IMAGES = 1792, 500
TRAINING = Training(epochs=5, batch_size=32, lr=2e-3, warmup_epochs=1)
NETWORK = CrossViTConfig(
    image_sizes=(SIDE, SIDE),
    patch_sizes=(8, 16),
    dims=(32, 64),
    num_heads=(4, 4),
    mlp_ratios=(4, 4),
    depths=((1, 2, 0), (1, 2, 0)),
    drop_path=0.0,
    num_classes=10,
    in_channels=1,
)
#: Width of the coarse branch that alone has about as many parameters.
ALONE_WIDTH = 76
#: The network whose exchange is counted, and the sides of its grids of patches at 240 pixels.
COUNTED, GRIDS = "crossvit_15_224", (20, 14)

# Full: one training, as the paper did.

MODEL, RECIPE = "crossvit_9_dagger_224", "crossvit"
#: Points of top-1 by which two ImageNet trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on images of many digits and counts what the exchange costs; "full"
            trains CrossViT-9-dagger by the recipe.
        data: for "full": ImageNet-1K, a folder with ``train`` and ``val`` and a folder for each class in them.
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


class _Apart(nn.Module):
    """A multi-scale block without the exchange."""

    def __init__(self, block: MultiScaleBlock) -> None:
        super().__init__()
        self.blocks = block.blocks

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        return [blocks(own) for blocks, own in zip(self.blocks, tokens, strict=True)]


class _Alone(nn.Module):
    """The coarse branch of a network, its class token being the only one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding = model.embeddings[1]
        self.blocks = nn.Sequential(*(block.blocks[1] for block in model.blocks))
        self.norm, self.head = model.norm[1], model.head[1]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.embedding(x))[:, 0]))
        return y


def _apart() -> nn.Module:
    model = CrossViT(NETWORK)
    model.blocks = nn.ModuleList(_Apart(block) for block in model.blocks)  # type: ignore[arg-type]
    return model


def _alone() -> nn.Module:
    return _Alone(CrossViT(NETWORK.override(dims=(NETWORK.dims[0], ALONE_WIDTH))))


def quick() -> Report:
    """Small networks with and without exchange, and of one branch, on crowds of digits; cost of the exchange."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "two branches, exchange": lambda: CrossViT(NETWORK),
        "two branches apart": _apart,
        "coarse branch alone": _alone,
    }
    with progress(len(SEEDS) * len(networks) * TRAINING.epochs) as advance:
        trained = compare(networks, TRAINING, seeds=SEEDS, samples=_crowds, advance=advance)
    crossing, apart, alone = trained.values()
    learned, apart_learned = (
        statistics.mean(result.accuracy for result in results) >= LEARNED for results in (crossing, apart)
    )
    by_exchange, by_scales = accuracy_differences(crossing, apart), accuracy_differences(apart, alone)
    claims = [
        Claim.judge(
            "Class tokens that visit the other branch make two branches better",
            published="81.0 % top-1 with CrossViT-S, against 79.8 % with DeiT-S of one branch",
            statistic="accuracy with the exchange less accuracy of the same branches without it; judged if the mean is "
            "at least twice its standard error",
            value=by_exchange,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(by_exchange),
            unit="points",
        ),
        Claim.judge(
            "Two branches of fine and coarse patches are better than a coarse one of as many parameters",
            published="multi-scale features benefit image classification",
            statistic="accuracy of two branches without exchange less that of the coarse branch alone; judged if the "
            "mean is at least twice its standard error",
            value=by_scales,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=apart_learned and resolved(by_scales),
            unit="points",
        ),
    ]
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"After the last of {TRAINING.epochs} epochs on {TRAIN_IMAGES} images made of one half of the 1797 "
        f"digits of scikit-learn; the {TEST_IMAGES} test images are made of the other half. Without the exchange "
        "there are fewer parameters.",
    )
    shown = _crowds(SEEDS[0])
    pictures = [(255 * (0.25 * image[0] + 0.5)).round().to(torch.uint8).numpy() for image in shown.test_images[:8]]
    example = Images("Test images", list(zip(pictures, map(str, shown.test_labels.tolist()), strict=False)))
    note = Note(
        f"{TILES**2} digits of 8 x 8 pixels an image, {SAME} of them of its class, all in any place. Patches of "
        f"{NETWORK.patch_sizes[0]} and {NETWORK.patch_sizes[1]} pixels, widths {NETWORK.dims}, two multi-scale blocks; "
        f"AdamW, learning rate {TRAINING.lr:g}, cosine decay, batches of {TRAINING.batch_size}. Small networks on "
        "small images: they test the mechanism, not the accuracy on ImageNet."
    )
    sections = [Section("Accuracy", [*claims, *parts, example, note]), _cost_section()]
    return finished("CrossViT: quick test of its claims", sections)


def _crowds(seed: int) -> Samples:
    """Images of many digits and the class that more of them have than any other, with few exceptions.

    What a digit is shows in its pixels, which class is frequent in all of the image.
    """
    sets = stratified_split(read_images("digits")["all"], {"train": 0.5, "test": 0.5}, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for digits, count in zip(sets.values(), (TRAIN_IMAGES, TEST_IMAGES), strict=True):
        pixels = torch.stack([torch.tensor(digits.image(index)[..., 0]) for index in range(len(digits))]).float() / 255
        by_class = [torch.from_numpy(np.flatnonzero(digits.labels == label)) for label in range(10)]
        labels = torch.randint(10, (count,), generator=generator)
        images = []
        for label in labels.tolist():
            others = (label + torch.randint(1, 10, (TILES**2 - SAME,), generator=generator)) % 10
            classes = torch.cat([torch.full((SAME,), label), others])[torch.randperm(TILES**2, generator=generator)]
            rows = [by_class[each] for each in classes.tolist()]
            chosen = [int(own[torch.randint(len(own), (), generator=generator)]) for own in rows]
            images.append(rearrange(pixels[chosen], "(r c) h w -> 1 (r h) (c w)", r=TILES))
        tensors += [(torch.stack(images) - 0.5) / 0.25, labels]
    return Samples(*tensors)


class _Among(nn.Module):
    """Attention among the tokens of both branches in the width of the coarse one (all-attention, figure 3 a)."""

    def __init__(self, dims: tuple[int, ...], num_heads: int) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(dims[0], dims[1]), nn.Linear(dims[1], dims[0])
        self.attn = SelfAttention(dims[1], num_heads)

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        count = tokens[0].shape[1]
        y = self.attn(torch.cat([self.there(tokens[0]), tokens[1]], 1))
        return [self.back(y[:, :count]), y[:, count:]]


def _multiply_adds(factor: int) -> dict[str, int]:
    """Those of one exchange, with so many times the patches that 240 pixels have."""
    config = VARIANTS[COUNTED]
    with torch.device("meta"):
        exchange = MultiScaleBlock(config.dims, (1, 1, 0), config.num_heads, config.mlp_ratios)
        exchange.blocks = nn.ModuleList([nn.Sequential(), nn.Sequential()])
        modules = {
            "class tokens": exchange,
            "class tokens, merged": merge(exchange).model,
            "all tokens": _Among(config.dims, config.num_heads[1]),
        }
        sizes = zip(GRIDS, config.dims, strict=True)
        tokens = [torch.empty(1, 1 + factor * side**2, channels) for side, channels in sizes]
        return {name: cost(module, tokens).total.macs for name, module in modules.items()}


def _cost_section() -> Section:
    small, large = _multiply_adds(1), _multiply_adds(4)
    growth = {name: large[name] / small[name] for name in small}
    share = small["class tokens"] / small["all tokens"]
    claims = [
        Claim.judge(
            "The exchange by class tokens is linear in the number of patches",
            published="linear instead of quadratic in computation and memory",
            statistic="multiply-adds of one exchange with four times the patches over those at 240 pixels",
            value=growth["class tokens"],
            at_most=LINEAR,
            seeds=0,
            unit="times",
        ),
        Claim.judge(
            "The exchange costs less than a tenth of attention among all tokens",
            published="more efficient than attention among all tokens of both branches",
            statistic="multiply-adds of one exchange, projections included, over those of all-attention fusion",
            value=share,
            at_most=SHARE,
            seeds=0,
        ),
    ]
    rows: list[list[Cell]] = [[name, small[name] / 1e6, large[name] / 1e6, growth[name]] for name in small]
    table = Table(
        f"One exchange of {COUNTED}",
        ["exchange by", "at 240 pixels [M]", "four times the patches [M]", "growth"],
        rows,
        "Multiply-adds of linear layers and attention. Nearly all that the class tokens cost are keys and values of "
        "the patches; merged for deployment, the products with the one query come first, and no patch has any.",
    )
    bars = Bars("Multiply-adds at 240 pixels", "millions", {name: macs / 1e6 for name, macs in small.items()})
    return Section("Cost", [*claims, table, bars])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train CrossViT-9-dagger by the recipe, and measure the published weights.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the run lies, below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the accuracy cannot be held against the published one, and the verdict says so.
    """
    trained = train_by_recipe(RECIPE, Path(folder) / MODEL, **{"data": str(data), "model": MODEL, **changes})
    images = trained.task.splits["test"]
    top1 = published_top1(MODEL)
    claim = Claim.judge(
        f"{MODEL} trained by the recipe reaches its published accuracy",
        published=f"{top1} % top-1 on ImageNet-1K",
        statistic="top-1 accuracy of the best epoch on the validation images",
        value=trained.top1,
        at_least=top1 - RUN_NOISE,
        seeds=1,
        scale_ok=not changes and len(images.classes) == IMAGENET_CLASSES,
        unit="%",
    )
    weights = {model: published_accuracy(model, images) for model in VARIANTS}
    sections = [Section("Accuracy", [claim, *full_parts({MODEL: trained}, {MODEL: top1}, weights)])]
    return finished("CrossViT: full test of its claims", sections, data=str(data))
