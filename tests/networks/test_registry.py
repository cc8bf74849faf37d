"""Networks by name: what is offered, how it is built, what is answered when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from convatlas import create_model, list_models, save_weights
from convatlas.errors import CheckpointError, UnknownName, Unsupported
from convatlas.networks import FeatureExtractor, NetworkConfig, PublishedFile, model_config, published_files, registry
from convatlas.networks.inceptionnext import VARIANTS, InceptionNeXt

TINY = {"depths": (1, 1), "dims": (8, 16), "num_classes": 3}


class Lookup(nn.Module):
    """A network without a feature pyramid."""


class LookupConfig(NetworkConfig):
    def build(self) -> Lookup:
        return Lookup()


def test_names_can_be_filtered():
    assert list_models("inceptionnext*") == sorted(VARIANTS)
    assert list_models("*_tiny") == [name for name in list_models() if name.endswith("_tiny")] != []
    assert list_models("nothing*") == []
    assert list_models() == sorted(set(list_models()))


def test_models_are_built_with_overrides_from_python_and_from_files():
    model = create_model("inceptionnext_tiny", num_classes=10, in_channels=1, depths=[1, 1], dims=[8, 16])
    assert isinstance(model, InceptionNeXt)
    assert (model.config.depths, model.num_classes, model.in_channels) == ((1, 1), 10, 1)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    assert model.config.preprocess.size == 224
    changed = model_config("inceptionnext_tiny", preprocess={"size": [32, 48], "mean": [0.5]})
    assert (changed.preprocess.size, changed.preprocess.mean, changed.preprocess.crop) == ((32, 48), (0.5,), 0.875)
    (x,) = InceptionNeXt(changed.override(**TINY)).example_inputs(4)
    assert x.shape == (4, 3, 32, 48)
    assert model_config("inceptionnext_tiny") == VARIANTS["inceptionnext_tiny"], "the table itself is never changed"


def test_unknown_names_answer_with_the_nearest():
    with pytest.raises(UnknownName, match="unknown model 'inception_next_tiny': did you mean inceptionnext_tiny"):
        create_model("inception_next_tiny")
    with pytest.raises(UnknownName, match="unknown option of InceptionNeXtConfig 'in_chans': did you mean in_channels"):
        create_model("inceptionnext_tiny", in_chans=1)
    with pytest.raises(UnknownName, match="unknown model"):
        published_files("inceptionnext_giant")


def test_weights_are_loaded_from_a_file(tmp_path: Path):
    source = create_model("inceptionnext_tiny", **TINY).eval()
    path = save_weights(source, tmp_path / "tiny.safetensors")
    x = torch.randn(2, 3, 16, 16)
    loaded = create_model("inceptionnext_tiny", weights=str(path), **TINY).eval()
    assert torch.equal(loaded(x), source(x))
    features = create_model("inceptionnext_tiny", weights=str(path), out_indices=(1,), **TINY).eval()
    assert torch.equal(features(x)[0], source.forward_features(x)[1])
    with pytest.raises(CheckpointError, match="missing"):
        create_model("inceptionnext_tiny", weights=str(path), **{**TINY, "depths": (2, 1)})
    with pytest.raises(CheckpointError, match="absent"):
        create_model("inceptionnext_tiny", weights=str(tmp_path / "absent.pth"), **TINY)


def test_published_weights_come_from_the_first_file_of_the_manifest(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(registry, "load_weights", lambda model, source: asked.append(source))
    create_model("inceptionnext_tiny", weights="published", **TINY)
    checked = PublishedFile("https://example.org/a.pth", "MIT", {"top-1": 1.0}, sha256="0" * 64)
    monkeypatch.setattr(registry, "published_files", lambda name: (checked,))
    create_model("inceptionnext_tiny", weights="published", **TINY)
    assert asked == [
        "https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_tiny.pth",
        f"https://example.org/a.pth#sha256={'0' * 64}",
    ]


def test_published_weights_need_a_published_file(monkeypatch):
    with pytest.raises(Unsupported, match=r"by hand from https://github\.com/BangguWu/ECANet; give the file's path"):
        create_model("eca_resnet18", weights="published", depths=(1,), widths=(8,), eca_kernel_sizes="3")
    monkeypatch.setattr(registry, "published_files", lambda name: ())
    with pytest.raises(Unsupported, match="no published weights are known for convnext_tiny"):
        create_model("convnext_tiny", weights="published", depths=(1,), dims=(8,))


def test_feature_pyramids():
    pyramid = create_model("inceptionnext_tiny", out_indices=[-1, 0], **TINY)
    assert isinstance(pyramid, FeatureExtractor)
    assert pyramid.out_indices == (1, 0)
    deep, shallow = pyramid(torch.randn(1, 3, 24, 16))
    assert (deep.shape, shallow.shape) == ((1, 16, 3, 2), (1, 8, 6, 4))
    assert [tuple(info) for info in pyramid.feature_info] == [(16, 8), (8, 4)]
    assert not any("fc" in name for name, _ in pyramid.named_parameters() if "head" in name)


def test_only_backbones_have_feature_pyramids(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "model_config", lambda name, **overrides: LookupConfig())
    assert isinstance(create_model("lookup"), Lookup)
    with pytest.raises(Unsupported, match="lookup has no feature pyramid, so out_indices cannot be used"):
        create_model("lookup", out_indices=(0,))
