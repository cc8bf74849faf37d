"""Long-convolution networks: their equations, sizes, sequences and images, checkpoints, parameter groups."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from convatlas import create_model, load_weights
from convatlas.networks.long_conv import LongConvConfig, LongConvNet, kernel_groups
from convatlas.ops.monarch_tables import authors_constants
from convatlas.training.measure import count_parameters
from convatlas.training.optim import parameter_groups

SMALL = LongConvConfig(channels=8, depth=2, heads=2, num_classes=5, length=24, lam=0.001)


def sequences(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_parameter_counts_follow_from_the_layout():
    with torch.device("meta"):
        assert count_parameters(create_model("long_conv")) == 6 * (512 * 2048 + 512 + 512 * 1024 + 1024 + 1024) + (
            3 * 512 + 512 + 512 * 10 + 10
        )


@pytest.mark.parametrize("prenorm", [True, False])
def test_the_network_is_its_equations(prenorm: bool):
    model = SMALL.override(prenorm=prenorm).build().eval()
    x = sequences(2, 24, 3)
    h = x @ model.encoder.weight[..., 0].T + model.encoder.bias
    for block in model.blocks:
        z = block.conv((block.norm(h) if prenorm else h).mT).mT + h
        h = z if prenorm else block.norm(z)
    expected = h.mean(1) @ model.decoder.weight.T + model.decoder.bias
    torch.testing.assert_close(model(x), expected)


def test_the_pixels_of_an_image_are_a_sequence():
    model = SMALL.build().eval()
    images = sequences(2, 3, 4, 6)
    torch.testing.assert_close(model(images), model(images.flatten(2).mT))
    assert model.forward_features(images)[0].shape == (2, 8, 4, 6)
    assert SMALL.override(length=None, preprocess={"size": (4, 5)}).build().blocks[0].conv.length == 20
    with pytest.raises(ValueError, match=re.escape("x must be (B, 3, H, W), got (2, 24, 4)")):
        model(sequences(2, 24, 4))


def authors(model: LongConvNet) -> dict[str, Tensor]:
    """Its weights as the authors' code names them."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"blocks\.(\d+)\.norm", r"norms.\1", key)
        key = re.sub(r"blocks\.(\d+)\.conv", r"conv_layers.\1", key)
        key = key.replace(".skip", ".D").replace("output_linear", "output_linear.0")
        state[key] = value[..., 0] if key == "encoder.weight" else value
    return state


def test_authors_checkpoints_load_without_their_constants():
    source, target = SMALL.build(), SMALL.build()
    state = authors(source)
    assert {"conv_layers.1.D", "conv_layers.0.kernel", "conv_layers.0.output_linear.0.bias", "norms.1.weight"} <= set(
        state
    )
    for layer in range(2):
        state |= {f"conv_layers.{layer}.flashfftconv.{name}": x for name, x in authors_constants(512).items()}
    report = load_weights(target, state)
    assert (report.layout, report.differences()) == ("authors", [])
    assert all(
        torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_kernels_have_a_learning_rate_of_their_own_and_do_not_decay():
    model = SMALL.build()
    groups = kernel_groups(nn.Sequential(model), kernel_lr=5e-4, weight_decay=0.05)
    assert [(len(g["params"]), g.get("lr"), g["weight_decay"]) for g in groups] == [(14, None, 0.05), (2, 5e-4, 0.0)]
    torch.optim.AdamW(groups, lr=1e-3)
    undecayed = next(g for g in parameter_groups(model, weight_decay=0.1) if g["weight_decay"] == 0)
    assert any(p is model.blocks[0].conv.kernel for p in undecayed["params"])


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="channels and depth must be at least 1, got 8 and 0"):
        SMALL.override(depth=0).build()
