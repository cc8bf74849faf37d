"""Filters learned from patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convatlas.errors import CheckpointError, UnknownName, Unsupported
from convatlas.ops.patch_statistics import principal_components, spherical_kmeans
from convatlas.training.filter_learning import (
    LEARNERS,
    FilterBank,
    LearnedFilters,
    extract_patches,
    filters_from,
    learn_filters,
    replace_first_layer,
)


def images(count: int = 12, channels: int = 1) -> torch.Tensor:
    """Smooth noise."""
    noise = torch.randn(count, channels, 20, 20, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise, 3, 1)


@pytest.mark.parametrize("method", LEARNERS)
def test_every_method_gives_filters_for_raw_patches(method: str):
    labels = torch.arange(12) % 6 if method == "lda" else None
    fast = {"steps": 20} if method in ("rica", "autoencoder", "rbm") else {}
    call = lambda: learn_filters(images(channels=2), method, 3, 4, n_patches=300, labels=labels, **fast)  # noqa: E731
    bank = call()
    assert bank.filters.shape == (4, 2, 3, 3)
    assert bank.filters.isfinite().all()
    assert bank.filters.flatten(1).norm(dim=1).min() > 0
    assert torch.equal(bank.filters, call().filters)
    assert bank.recipe["method"] == method


def test_whitened_responses_are_white():
    bank = learn_filters(images(), "ica", 3, 5, n_patches=2000)
    patches = extract_patches(images(), 3, 2000, generator=torch.Generator().manual_seed(0)).values.float()
    responses = patches @ bank.filters.flatten(1).T + bank.bias
    torch.testing.assert_close(responses.T @ responses / 2000, torch.eye(5), atol=1e-3, rtol=0)
    found = principal_components(patches.double())
    white = (patches - found.mean) @ found.zca()
    covariance = white.T @ white / 2000
    expected = found.vectors.T @ (found.values / (found.values + 0.1)).diag() @ found.vectors
    torch.testing.assert_close(covariance, expected)


def test_clusters_are_found():
    generator = torch.Generator().manual_seed(1)
    directions = torch.eye(3, dtype=torch.float64)
    signs = 2 * torch.randint(2, (300,), generator=generator) - 1
    data = directions[torch.arange(300) % 3] * signs[:, None] + 0.05 * torch.randn(300, 3, generator=generator)
    found = spherical_kmeans(data, data[:3], 10)
    assert (found @ directions.T).abs().max(1).values.min() > 0.99
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_a_bank_is_a_layer_a_file_and_a_start(tmp_path: Path):
    bank = learn_filters(images(), "zca_kmeans", 3, 4, n_patches=200)
    conv = bank.to_conv(padding=1)
    assert conv(images()).shape == (12, 4, 18, 18)
    assert not any(parameter.requires_grad for parameter in conv.parameters())
    bank.save(tmp_path / "bank.safetensors")
    again = FilterBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.filters, bank.filters)
    assert torch.equal(again.whitening, bank.whitening)
    assert again.recipe == bank.recipe
    (tmp_path / "other").write_text("no bank")
    with pytest.raises(CheckpointError, match="holds no filter bank"):
        FilterBank.load(tmp_path / "other")
    model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Conv2d(6, 2, 3))
    mean, rest = model[0].weight.flatten(1).norm(dim=1).mean(), model[0].weight[4:].clone()
    assert replace_first_layer(model, bank) == "0"
    found = filters_from(model).filters
    torch.testing.assert_close(found[:4].flatten(1).norm(dim=1), mean.expand(4))
    torch.testing.assert_close(found[0, 0, 1:4, 1:4] / found[0].norm(), bank.filters[0, 0] / bank.filters[0].norm())
    assert torch.equal(found[4:], rest)
    with pytest.raises(Unsupported, match="2 needs filters"):
        replace_first_layer(model, bank, layer="2")
    with pytest.raises(Unsupported, match="no convolution 9"):
        filters_from(model, "9")


def test_method_learns_from_a_folder(tmp_path: Path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            pixels = random.integers(0, 255, (16, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU())
    before = model[0].weight.detach().clone()
    LearnedFilters(images=str(tmp_path), filters="pca", patches=100, trainable=False).prepare(model)
    assert not model[0].weight.requires_grad
    changed = (model[0].weight != before).flatten(1).any(1)
    assert changed[:26].all()
    assert not changed[26:].any()
    with pytest.raises(UnknownName, match="filters"):
        LearnedFilters(images="digits", filters="kmeans")


def test_bad_input():
    for call, message in (
        (lambda: learn_filters(images(), "pca", 3, 10), "cannot take 10 filters from 9-dimensional patches"),
        (lambda: learn_filters(images(), "ica", 3, 10), "cannot take 10 filters"),
        (lambda: learn_filters(images(), "pca", 18, 2), "larger than k = 18"),
        (lambda: learn_filters(torch.ones(2, 1, 9, 9)), "constant"),
        (lambda: learn_filters(torch.full((2, 1, 9, 9), torch.nan)), "NaN"),
        (lambda: learn_filters(images(), "lda"), "labels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnknownName, match="method"):
        learn_filters(images(), "k-means")
