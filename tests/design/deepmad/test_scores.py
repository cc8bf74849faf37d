"""Scores and budgets of DeepMAD: published values, literal definitions, how they change."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import pytest
import torch

from convatlas.design.deepmad.scores import count, deepmad_score, depth_penalty, effectiveness, madnas_score, stages
from convatlas.networks import create_model, model_config
from convatlas.networks.deepmad import CONV, Block, make_structure, stage_ends

# Score, 10 Q, effectiveness, layers, FLOPs and size by the authors' code.
PUBLISHED = {
    "deepmad_r18": (32120.203, 34.807, 0.2991, 115, 1.837e9, 1.115e7),
    "deepmad_r34": (43142.673, 34.807, 0.3000, 148, 3.675e9, 2.107e7),
    "deepmad_r50": (48919.277, 34.807, 0.2998, 157, 4.087e9, 2.421e7),
    "deepmad_29m": (11915.370, 44.668, 0.4965, 71, 4.449e9, 2.688e7),
    "deepmad_29m_288": (11705.137, 22.255, 0.4966, 71, 4.435e9, 2.691e7),
    "deepmad_50m": (14833.203, 189.043, 0.4930, 83, 8.611e9, 4.736e7),
    "deepmad_89m": (18020.379, 274.013, 0.4951, 95, 1.526e10, 8.576e7),
    "madnas_r18": (21875.749, 299.445, 0.2002, 82, 1.705e9, 1.037e7),
    "madnas_r50": (27407.556, 78.053, 0.2171, 82, 3.675e9, 1.847e7),
    "madnas_r152": (45297.055, 34.807, 0.1981, 142, 1.051e10, 5.246e7),
}
KINDS = ("SuperResK1KXK1", "SuperResK1DWK1", "SuperResK1DWSEK1")
ROWS = ((16, 5, 2, 1, 8), (24, 3, 2, 2, 8), (24, 5, 1, 3, 16), (40, 3, 2, 2, 8))


def published(name: str) -> tuple[Block, ...]:
    structure: tuple[Block, ...] = model_config(name).structure  # type: ignore[attr-defined]
    return structure


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_of_published_structures(name: str):
    score, penalty, rho, layers, flops, size = PUBLISHED[name]
    structure, image_size = published(name), 288 if name.endswith("288") else 224
    assert round(deepmad_score(structure, image_size).total, 3) == score
    assert round(10 * depth_penalty(structure), 3) == penalty
    assert round(effectiveness(structure), 4) == rho
    counted = count(structure, image_size)
    assert counted.layers == layers
    assert counted.flops == pytest.approx(flops, rel=5e-4)
    assert counted.size == pytest.approx(size, rel=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_that_of_the_network_without_its_classifier(kind: str):
    structure = make_structure(kind, 8, ROWS, 32)
    with torch.device("meta"):
        model = create_model("deepmad", structure=structure, num_classes=0)
    assert count(structure, 64).size == sum(parameter.numel() for parameter in model.parameters())


# -- literal definitions -----------------------------------------------------------------------------------------------


def convolutions(block: Block) -> Iterator[tuple[int, int, int]]:
    """Input channels, kernel size and groups of each convolution."""
    if block.kind == CONV:
        yield block.in_channels, block.kernel_size, 1
        return
    for layer in range(block.depth):
        yield block.out_channels if layer else block.in_channels, 1, 1
        yield block.bottleneck, block.kernel_size, 1 if block.kind == "SuperResK1KXK1" else block.bottleneck
        yield block.bottleneck, 1, 1


def literal_score(
    structure: Sequence[Block], sides: Sequence[int], weights: Sequence[float], alpha1: float, alpha2: float
) -> float:
    total = 0.0
    for end, side, weight in zip(stage_ends(structure), sides, weights, strict=True):
        layers = [layer for block in structure[: end + 1] for layer in convolutions(block)]
        entropy = sum(
            math.log(k ** (2 * alpha2)) + (math.log(c**alpha1) if groups == 1 else 0.0) for c, k, groups in layers
        )
        total += weight * entropy / 2 * math.log(side**2 * structure[end].out_channels)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_its_definition(kind: str):
    structure, weights = make_structure(kind, 8, ROWS), (0.5, 1.0, 2.0, 5.0)
    ones = kind == "SuperResK1DWSEK1"
    for alpha1, alpha2 in ((1.0, 1.0), (0.8, 1.2)):
        for reference, sides in ((True, (48, 1, 1, 1) if ones else (48, 24, 12, 6)), (False, (48, 24, 12, 6))):
            score = deepmad_score(
                structure, 96, weights=weights, alpha1=alpha1, alpha2=alpha2, reference_resolution=reference
            )
            expected = literal_score(structure, sides, weights, alpha1, alpha2)
            assert score.total == pytest.approx(expected, rel=1e-12)
            assert sum(score.stages) == pytest.approx(score.total, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_effectiveness_is_its_definition(kind: str):
    structure = make_structure(kind, 8, ROWS)
    expected = []
    for end in stage_ends(structure):
        widths = [c * k**2 / groups for block in structure[: end + 1] for c, k, groups in convolutions(block)]
        expected.append(len(widths) / statistics.geometric_mean(widths))
    assert effectiveness(structure) == pytest.approx(max(expected), rel=1e-12)


def test_odd_sides_are_rounded_down_as_in_the_authors_code_or_up_as_in_the_network():
    structure = make_structure("SuperResK1KXK1", 8, ROWS)
    assert [stage.resolution for stage in stages(structure, 50)] == [25, 12, 6, 3]
    true = [stage.resolution for stage in stages(structure, 50, reference_resolution=False)]
    model = create_model("deepmad", structure=structure).eval()
    assert true == [feature.shape[-1] for feature in model.forward_features(torch.randn(1, 3, 50, 50))]


def test_depth_penalty():
    full, depthwise = (make_structure(kind, 8, ROWS) for kind in KINDS[:2])
    assert depth_penalty(full) == pytest.approx(math.exp(0.5))  # of the depths 3 and 2
    assert depth_penalty(depthwise) == pytest.approx(math.exp(math.sqrt(0.5)))
    assert depth_penalty(full, reference=False) == pytest.approx(math.exp(0.5))  # the variance of 1, 2, 3, 2
    assert depth_penalty(full[:4]) == depth_penalty(full[:1]) == 1.0


def test_madnas_score():
    structure = make_structure("SuperResK1KXK1", 8, ROWS)
    found = stages(structure)
    assert madnas_score(structure) == pytest.approx(found[-1].entropy + math.log(40))
    both = madnas_score(structure, weights=(0, 1, 0, 1))
    assert both == pytest.approx(madnas_score(structure) + found[1].entropy + math.log(16))


# -- how they change ---------------------------------------------------------------------------------------------------


def changed(structure: tuple[Block, ...], index: int, **changes: int) -> tuple[Block, ...]:
    blocks = list(structure)
    blocks[index] = blocks[index]._replace(**changes)
    if "out_channels" in changes and index + 1 < len(blocks):
        blocks[index + 1] = blocks[index + 1]._replace(in_channels=changes["out_channels"])
    return tuple(blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_grows_with_everything_and_rho_with_depth_only(kind: str):
    structure = make_structure(kind, 8, ROWS)

    def values(candidate: tuple[Block, ...]) -> tuple[float, float]:
        return deepmad_score(candidate, 96, weights=(1, 1, 1, 8)).total, effectiveness(candidate)

    score, rho = values(structure)
    for index in range(1, 5):
        block = structure[index]
        for changes in ({"out_channels": 48}, {"bottleneck": 24}, {"kernel_size": 7}):
            wider = values(changed(structure, index, **changes))
            assert wider[0] > score
            assert wider[1] <= rho
        deeper = values(changed(structure, index, depth=block.depth + 1))
        assert deeper[0] > score
        assert deeper[1] > rho


def test_wrong_weights_and_sizes_are_named():
    structure = make_structure("SuperResK1KXK1", 8, ROWS)
    for function in (
        lambda: deepmad_score(structure, 96),
        lambda: madnas_score(structure, weights=(1, 1, 1, 1, 8)),
    ):
        with pytest.raises(ValueError, match="one value for each stage: 4 stages but 5 weights"):
            function()
    with pytest.raises(ValueError, match="image_size must be at least the total stride, 16, got 15"):
        deepmad_score(structure, 15, weights=(1, 1, 1, 8))
