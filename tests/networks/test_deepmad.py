"""DeepMAD's networks: sizes, structure files, blocks, checkpoint layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.errors import DataError
from convatlas.networks import create_model, model_config, published_files
from convatlas.networks.deepmad import (
    CONV,
    VARIANTS,
    Block,
    CnnNet,
    CnnNetConfig,
    ConvBN,
    ResK1DWK1,
    ResK1KXK1,
    load_structure,
    make_structure,
    parse_structure,
    save_structure,
    squeezed_channels,
    stage_ends,
)
from convatlas.nn.drop import DropPath

# Parameters with 1000 classes, multiply-adds in G at the network's size, ImageNet top-1 where weights are published.
SIZES: dict[str, tuple[int, float, float | None]] = {
    "deepmad_r18": (11_826_088, 1.812, 77.7),
    "deepmad_r34": (21_690_160, 3.635, 79.7),
    "deepmad_r50": (25_441_144, 4.043, 80.6),
    "deepmad_29m": (28_669_956, 4.324, 82.5),
    "deepmad_29m_288": (28_703_630, 4.322, 82.8),
    "deepmad_50m": (49_408_964, 8.450, 83.9),
    "deepmad_89m": (88_325_780, 15.026, 84.0),
    "madnas_r18": (10_882_384, 1.680, None),
    "madnas_r50": (21_371_592, 3.631, None),
    "madnas_r152": (53_484_936, 10.425, None),
}
KINDS = ("SuperResK1KXK1", "SuperResK1DWK1", "SuperResK1DWSEK1")
ROWS = ((12, 3, 2, 2, 8), (12, 5, 1, 1, 16), (16, 3, 2, 2, 8))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name: str):
    parameters, _, top1 = SIZES[name]
    with torch.device("meta"):
        model = create_model(name)
        (x,) = model.example_inputs()
    assert x.shape[-1] == (288 if name.endswith("288") else 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    figures = [file.figures["ImageNet-1K top-1 [%]"] for file in published_files(name)]
    assert figures == ([] if top1 is None else [top1])


@pytest.mark.parametrize("name", ["deepmad_r18", "deepmad_29m"])
def test_multiply_adds_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
        counted = cost(model, *model.example_inputs()).total
    assert round(counted.macs / 1e9, 3) == SIZES[name][1]


def test_every_variant_is_measured():
    assert set(SIZES) | {"deepmad"} == set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("deepmad_r18", (32, 96, 384, 1024, 672)), ("deepmad_29m", (40, 85, 134, 201, 1792))],
)
def test_features_at_the_ends_of_the_stages(name: str, channels: tuple[int, ...]):
    with torch.device("meta"):
        model = create_model(name).eval()
        features = model.forward_features(*model.example_inputs())
    assert tuple(info.channels for info in model.feature_info) == channels
    assert [info.stride for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert [feature.shape[1:] for feature in features] == [(c, 112 >> i, 112 >> i) for i, c in enumerate(channels)]


# -- structures --------------------------------------------------------------------------------------------------------


def test_a_structure_can_be_written_in_three_ways():
    structure = make_structure("SuperResK1KXK1", 8, ROWS, 24)
    theirs = [{**block.as_mapping(), "inner_class": "ResK1KXK1"} for block in structure]
    assert theirs[0] == {"class": CONV, "in": 3, "out": 8, "k": 3, "s": 2, "inner_class": "ResK1KXK1"}
    assert theirs[1] | {"L": 2, "btn": 8} == theirs[1]
    for entries in (theirs, [list(block) for block in structure], [block._asdict() for block in structure]):
        assert parse_structure(entries) == structure
        assert model_config("deepmad", structure=json.loads(json.dumps(entries))).structure == structure  # type: ignore[attr-defined]


def test_structure_files_survive_a_round_trip(tmp_path: Path):
    structure = model_config("deepmad_29m").structure  # type: ignore[attr-defined]
    save_structure(structure, tmp_path / "best.txt")
    assert load_structure(tmp_path / "best.txt") == structure
    text = (tmp_path / "best.txt").read_text()
    assert text.startswith("{'best_structures': [[")
    assert "'space_arch': 'CnnNet'" in text
    (tmp_path / "list.txt").write_text(str([block.as_mapping() for block in structure]))
    assert load_structure(tmp_path / "list.txt") == structure


@pytest.mark.parametrize(
    "text", ["__import__('os').getcwd()", "{'space_arch': 'CnnNet'}", "{'best_structures': []}", "[1, 2]", "[", "[[]]"]
)
def test_other_files_are_refused(text: str, tmp_path: Path):
    (tmp_path / "other.txt").write_text(text)
    with pytest.raises(DataError, match=r"other\.txt is not a structure file"):
        load_structure(tmp_path / "other.txt")


STEM = {"class": CONV, "in": 3, "out": 8, "k": 3, "s": 2}
SUPER = {"class": "SuperResK1KXK1", "in": 8, "out": 8, "k": 3, "s": 2, "L": 1, "btn": 8}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "a structure must begin with ConvKXBNRELU, got no block"),
        ([SUPER], "a structure must begin with ConvKXBNRELU, got SuperResK1KXK1"),
        ([STEM, {**SUPER, "in": 16}], "in_channels of block 1 must be out_channels of the block before, 8, got 16"),
        ([STEM, {**SUPER, "class": "SuperResK1KX"}], "unknown class of a block 'SuperResK1KX': did you mean"),
        ([STEM, {**SUPER, "k": 4}], "kernel_size of SuperResK1KXK1 must be odd, got 4"),
        ([STEM, {**SUPER, "s": 3}], "stride of SuperResK1KXK1 must be 1 or 2, got 3"),
        ([STEM, {**SUPER, "L": 0}], "depth of SuperResK1KXK1 must be an integer of at least 1, got 0"),
        ([STEM, {**SUPER, "out": 8.5}], "out_channels of SuperResK1KXK1 must be an integer of at least 1, got 8.5"),
        ([STEM, {**SUPER, "nbitsA": 8}], "unknown key of a block 'nbitsA'"),
        ([STEM, {"class": "SuperResK1KXK1", "in": 8}], "a block must have out_channels, kernel_size, stride, got"),
        ([{**STEM, "L": 2}], "ConvKXBNRELU has no depth and no bottleneck, got 2 and 0"),
    ],
)
def test_wrong_structures_are_named(entries: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("deepmad", structure=entries)


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_the_first_layer_of_a_super_block_projects_even_where_channels_agree():
    model = CnnNetConfig(structure=make_structure("SuperResK1KXK1", 8, ((8, 3, 1, 2, 8),))).build()
    first, second = model.blocks[1]
    assert isinstance(first.projection, ConvBN)
    assert isinstance(second.projection, nn.Identity)


@pytest.mark.parametrize("size", [8, 7, 1])
def test_shortcut_of_a_full_block(size: int):
    block = ResK1KXK1(6, 6, 3, bottleneck=4, stride=2).double().eval()
    nn.init.zeros_(block.conv3.bn.weight)
    x = images(2, 6, size, size)
    pooled = nn.functional.avg_pool2d(x, 2, ceil_mode=True)  # on even sizes the authors' pooling
    torch.testing.assert_close(block(x), pooled.relu())


def test_a_depthwise_block_has_a_shortcut_only_where_channels_agree():
    x = images(2, 6, 8, 8)
    for squeeze_excite, act in ((False, nn.ReLU()), (True, nn.SiLU())):
        options: dict[str, Any] = {"bottleneck": 12, "squeeze_excite": squeeze_excite}
        same = ResK1DWK1(6, 6, 3, stride=2, **options).double().eval()
        nn.init.zeros_(same.conv3.bn.weight)
        torch.testing.assert_close(same(x), act(nn.functional.avg_pool2d(x, 2)))
        other = ResK1DWK1(6, 9, 3, **options).double().eval()
        nn.init.zeros_(other.conv3.bn.weight)
        nn.init.constant_(other.conv3.bn.bias, -2.0)
        torch.testing.assert_close(other(x), act(torch.full((2, 9, 8, 8), -2.0, dtype=torch.float64)))


def test_squeezed_channels():
    widths = {1: 8, 16: 8, 32: 8, 61: 8, 62: 16, 66: 16, 240: 56, 1208: 296}
    assert {channels: squeezed_channels(channels) for channels in widths} == widths


def test_stage_ends():
    structure = make_structure("SuperResK1DWK1", 8, ((8, 3, 1, 1, 8), (8, 3, 2, 1, 8), (8, 3, 1, 1, 8)), 16)
    assert stage_ends(structure) == (1, 4)


def test_drop_path_rises_over_all_inner_layers():
    model = CnnNetConfig(structure=make_structure("SuperResK1KXK1", 8, ROWS), drop_path=0.4).build()
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_initial_classifier():
    torch.manual_seed(0)
    model = CnnNetConfig(structure=make_structure("SuperResK1KXK1", 8, ((512, 3, 2, 1, 8),)), num_classes=100).build()
    assert model.fc.weight.std().item() == pytest.approx(0.1, rel=0.02)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def theirs(model: CnnNet) -> dict[str, Tensor]:
    """The state dict of a network under the keys that the authors' code would give it."""
    state = {}
    for key, value in model.state_dict().items():
        name = key.replace(".conv.", ".conv1.").replace(".bn.", ".bn1.").replace(".se.", ".se2.")
        name = name.replace(".projection.", ".residual_proj.").replace("fc.", "fc_linear.")
        name = re.sub(r"^blocks\.(\d+)\.(?=\d)", r"block_list.\1.block_list.", name)
        state[f"module.{re.sub(r'^blocks', 'block_list', name)}"] = value + 1
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_layout_loads_completely(kind: str, tmp_path: Path):
    model = create_model("deepmad", structure=make_structure(kind, 8, ROWS, 24), num_classes=5)
    state = theirs(model)
    expected = {
        "module.block_list.0.conv1.weight",
        "module.block_list.1.block_list.1.conv2.conv1.weight",
        "module.block_list.1.block_list.1.conv3.bn1.running_var",
        "module.fc_linear.bias",
    }
    if kind == "SuperResK1KXK1":
        expected.add("module.block_list.3.block_list.0.residual_proj.bn1.num_batches_tracked")
    if kind == "SuperResK1DWSEK1":
        expected.add("module.block_list.3.block_list.1.se2.conv2.bn1.weight")
    assert expected <= set(state)
    torch.save({"state_dict": state, "epoch": 480}, tmp_path / "theirs.pth.tar")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_weights(model, tmp_path / "theirs.pth.tar")
    assert not report.missing
    assert not report.unexpected
    assert all(torch.equal(value, before[key] + 1) for key, value in model.state_dict().items())


def test_grey_images_and_other_classes():
    model = create_model("deepmad", structure=make_structure("SuperResK1KXK1", 8, ROWS), in_channels=1, num_classes=3)
    assert model.config.structure[0] == Block(CONV, 1, 8, 3, 2)
    assert model(torch.randn(2, 1, 33, 47)).shape == (2, 3)
