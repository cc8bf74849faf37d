"""Networks of structured global convolutions beyond what the battery tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.networks.registry import create_model
from convatlas.networks.sgconv import SGConvBlock, SGConvPixels, SGConvSequence, sgconv_parameter_groups
from convatlas.nn.norm import ScalarLayerNorm
from convatlas.nn.sgconv_kernel import SGConvKernel
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights

TINY = {"dim": 8, "depth": 2, "l_max": 32, "kernel_dim": 4}

#: Blocks, channels, length, values of a sub-kernel, whether the norm comes first, kind of norm, parameters of a layer.
ARENA: dict[str, tuple[Any, ...]] = {
    "sgconv_listops": (8, 128, 2048, 1, False, nn.BatchNorm1d, 36_224),
    "sgconv_text": (6, 256, 4096, 2, True, nn.BatchNorm1d, 144_128),
    "sgconv_retrieval": (6, 256, 4000, 1, True, nn.BatchNorm1d, 138_496),
    "sgconv_image": (6, 512, 1024, 32, False, ScalarLayerNorm, 722_944),
    "sgconv_pathfinder": (6, 256, 1024, 32, True, nn.BatchNorm1d, 230_144),
    "sgconv_pathx": (6, 256, 16384, 64, True, nn.BatchNorm1d, 393_984),
}


@pytest.mark.parametrize("name", ARENA)
def test_published_settings(name: str):
    depth, dim, length, kernel_dim, prenorm, norm, parameters = ARENA[name]
    with torch.device("meta"):
        model: Any = create_model(name)
    blocks = [part for part in model.modules() if isinstance(part, SGConvBlock)]
    assert len(blocks) == depth
    for block in blocks:
        layer: Any = block.layer
        assert (layer.channels, layer.l_max, layer.kernel.kernel_dim) == (dim, length, kernel_dim)
        assert (layer.bidirectional, layer.heads, layer.post_act, block.prenorm) == (True, 1, "glu", prenorm)
        assert isinstance(block.norm, norm)
        assert count_parameters(layer) == parameters
    if isinstance(model, SGConvPixels):
        assert model.config.preprocess.size**2 == length
        assert model.config.pool == ("mean" if name == "sgconv_image" else "last")
    dropout = 0.2 if name in ("sgconv_image", "sgconv_pathfinder") else 0.0
    assert {block.dropout for block in blocks} == {block.layer.dropout for block in blocks} == {dropout}


def test_path_x_has_the_kernels_of_the_paper():
    with torch.device("meta"):
        model = create_model("sgconv_pathx", trunk={"depth": 1})
    kernel = next(part for part in model.modules() if isinstance(part, SGConvKernel))
    assert (kernel.num_scales, kernel.init_scale, kernel.length) == (8, 1, 16384)


def authors_names(key: str) -> str:
    for ours, theirs in {
        "trunk.blocks.": "model.layers.",
        "trunk.norm.": "model.norm.norm.",
        ".layer.kernel.sub_kernels.": ".layer.kernel_list.",
        ".layer.kernel.": ".layer.",
        ".layer.output.": ".layer.output_linear.0.",
        ".norm.scale": ".norm.s",
        ".norm.shift": ".norm.m",
        "encoder.": "encoder.0.",
        "decoder.": "decoder.0.output_transform.",
    }.items():
        key = key.replace(ours, theirs)
    return key.replace("model.layers.0.norm.", "model.layers.0.norm.norm.").replace(
        "model.layers.1.norm.", "model.layers.1.norm.norm."
    )


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_authors_layout_loads(norm: str):
    source = create_model("sgconv_pathfinder", trunk={**TINY, "norm": norm}).eval()
    state = {authors_names(key): value for key, value in source.state_dict().items()}
    assert f"model.layers.1.norm.norm.{'weight' if norm == 'batch' else 's'}" in state
    assert {"encoder.0.weight", "decoder.0.output_transform.bias", "model.layers.0.layer.D"} <= set(state)
    target = create_model("sgconv_pathfinder", trunk={**TINY, "norm": norm}).eval()
    assert load_weights(target, state).layout == "authors"
    x = torch.randn(2, 1, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x))


def test_images_are_sequences_of_pixels():
    sequence = create_model("sgconv_text", vocabulary=0, in_channels=3, trunk=TINY).eval()
    pixels = create_model("sgconv_pathfinder", in_channels=3, pool="mean", trunk=TINY).eval()
    pixels.load_state_dict(sequence.state_dict())
    x = torch.randn(2, 3, 4, 7)
    torch.testing.assert_close(pixels(x), sequence(x.flatten(2).transpose(1, 2)))


def test_only_the_given_lengths_count():
    model = create_model("sgconv_listops", vocabulary=9, trunk={**TINY, "bidirectional": False}).eval()
    tokens = torch.randint(9, (2, 30))
    short = tokens[:, :21]
    lengths = torch.tensor([21, 30])
    torch.testing.assert_close(model(tokens, lengths)[0], model(short)[0])
    torch.testing.assert_close(model(tokens, lengths)[1], model(tokens)[1])
    model.config = model.config.override(pool="last")
    torch.testing.assert_close(model(tokens, lengths)[0], model(short)[0])


def test_pairs_are_compared():
    model: Any = create_model("sgconv_retrieval", vocabulary=9, num_classes=0, pairs=True, trunk=TINY).eval()
    assert model(torch.randint(9, (3, 2, 30))).shape == (3, 32)
    model = create_model("sgconv_retrieval", vocabulary=9, trunk=TINY).eval()
    a, b = torch.randint(9, (3, 30)), torch.randint(9, (3, 30))
    features = [model._pooled(x, None) for x in (a, b)]
    joined = torch.cat([*features, features[0] * features[1], features[0] - features[1]], dim=1)
    torch.testing.assert_close(model(torch.stack([a, b], dim=1)), model.decoder(joined))


def test_optimizer_groups_are_those_of_the_authors():
    model = create_model("sgconv_image", trunk=TINY)
    groups = sgconv_parameter_groups(model, lr=0.01, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others, kernels, biases = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.05), (0.001, 0.05), (0.01, 0.0)]
    assert kernels == {name for name in names.values() if ".sub_kernels." in name}
    assert biases == {f"trunk.blocks.{i}.layer.output.bias" for i in range(2)}
    fixed = {f"trunk.blocks.{i}.layer.kernel.decay" for i in range(2)}
    assert others | kernels | biases | fixed == set(names.values())


@pytest.mark.parametrize(("name", "options"), [("sgconv_pathfinder", {"trunk": TINY}), ("sgconvnext_tiny", {})])
def test_gradient_checkpointing_changes_nothing_but_memory(name: str, options: dict[str, Any]):
    if not options:
        options = {"depths": (1, 1), "dims": (8, 8), "preprocess": {"size": 32}}
    plain: Any = create_model(name, **options)
    saving: Any = copy.deepcopy(plain)
    saving.set_gradient_checkpointing()
    calls: dict[str, int] = {"plain": 0, "saving": 0}
    x = torch.randn(3, plain.in_channels, 32, 32) if name == "sgconvnext_tiny" else torch.randn(3, 1, 5, 6)
    for key, model in (("plain", plain), ("saving", saving)):
        for part in model.modules():
            if isinstance(part, SGConvKernel):
                part.register_forward_pre_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
        torch.manual_seed(1)
        model.train()(x).square().sum().backward()
    assert calls["saving"] == 2 * calls["plain"] > 0
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_wrong_sequences_are_named():
    tokens: SGConvSequence = create_model("sgconv_listops", vocabulary=9, trunk=TINY)  # type: ignore[assignment]
    values: SGConvSequence = create_model("sgconv_listops", vocabulary=0, trunk=TINY)  # type: ignore[assignment]
    wrong: list[tuple[nn.Module, Tensor, str]] = [
        (tokens, torch.randn(2, 30), r"x must be \(B, L\) of tokens, whole numbers, got \(2, 30\) torch.float32"),
        (values, torch.randn(2, 30, 2), r"x must be \(B, L, 1\) of floating-point values, got \(2, 30, 2\)"),
    ]
    for model, x, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(x)
    with pytest.raises(ValueError, match="lengths must have one number for each sequence"):
        tokens(torch.zeros(2, 30, dtype=torch.int64), torch.tensor([3]))
