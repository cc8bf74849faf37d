"""What every network for images with a classifier promises."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from battery.compare import assert_close, assert_same, loss
from battery.subjects import Network
from convatlas import load_weights
from convatlas.export import export
from convatlas.networks.base import Backbone
from convatlas.networks.registry import create_model


def test_features_are_as_described(backbone: Network):
    model = backbone.build()
    assert isinstance(model, Backbone)
    strides = [info.stride for info in model.feature_info]
    assert strides == sorted(strides)
    with torch.no_grad():
        for size in ((64, 96), (45, 61)):
            depth = (6,) * (dims(model) - 2)
            features = model.forward_features(torch.randn(1, model.in_channels, *depth, *size))
            assert len(features) == len(model.feature_info)
            for feature, info in zip(features, model.feature_info, strict=True):
                assert feature.shape[:2] == (1, info.channels)
                for side, whole in zip(feature.shape[-2:], size, strict=True):
                    assert math.floor(whole / info.stride) <= side <= math.ceil(whole / info.stride)


def test_logits_come_from_the_last_feature(backbone: Network):
    model = backbone.build()
    (x,) = backbone.inputs(model, 2)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, model.num_classes) == (2, backbone.options["num_classes"])
        assert_same(model.forward_head(model.forward_features(x)[-1]), logits)


def test_chosen_features(backbone: Network):
    model = backbone.build()
    (x,) = backbone.inputs(model, 2)
    extractor = create_model(backbone.model, out_indices=(0, -1), **backbone.options).eval()
    count = len(model.feature_info)
    assert extractor.feature_info == (model.feature_info[0], model.feature_info[-1])
    missing, unexpected = extractor.backbone.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith(model.classifier_modules) or key.startswith("head") for key in unexpected)
    with torch.no_grad():
        features = model.forward_features(x)
        assert_same(extractor(x), [features[0], features[-1]])
    for wrong in ((), (count,), (-count - 1,)):
        with pytest.raises(ValueError, match=f"out_indices must be indices below {count}, got {re.escape(str(wrong))}"):
            create_model(backbone.model, out_indices=wrong, **backbone.options)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_input_channels(backbone: Network, channels: int):
    model = backbone.build(in_channels=channels)
    (x,) = backbone.inputs(model, 2)
    assert x.shape[1] == model.in_channels == channels
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_classifier_can_be_replaced_or_left_out(backbone: Network):
    model = backbone.build().double()
    (x,) = (tensor.double() for tensor in backbone.inputs(model, 2))
    body = dict(model.state_dict())
    with torch.no_grad():
        features = model.forward_features(x)
        model.reset_classifier(5)
        assert (model.num_classes, model.config.num_classes) == (5, 5)
        assert model(x).shape == (2, 5)
        assert_same(model(x), model(x))  # the new classifier, too, is in evaluation mode
        model.reset_classifier(0)
        assert model.num_classes == 0
        pooled = model(x)
        assert pooled.dim() == 2
        headless = create_model(backbone.model, **{**backbone.options, "num_classes": 0}).double().eval()
        headless.load_state_dict(model.state_dict())
        assert_same(headless(x), pooled)
        model.reset_classifier(4)
        assert model(x).shape == (2, 4)
        assert_same(model.forward_features(x), features)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert body.keys() & model.state_dict().keys()
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize(("option", "value"), [("num_classes", -1), ("in_channels", 0)])
def test_impossible_sizes_are_refused(backbone: Network, option: str, value: int):
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        create_model(backbone.model, **{**backbone.options, option: value})


def test_weights_of_another_task_are_adapted(backbone: Network):
    source = backbone.build(num_classes=11)
    target = create_model(backbone.model, **{**backbone.options, "num_classes": 3, "in_channels": 1}).eval()
    load_weights(target, source.state_dict())
    assert (target.num_classes, target.in_channels) == (3, 1)
    stem, classifier = (
        {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        for names in (source.stem_modules, source.classifier_modules)
    )
    theirs = target.state_dict()
    for name, tensor in source.state_dict().items():
        if name not in classifier and name not in stem:
            assert_same(theirs[name], tensor)
    for name in source.stem_modules:
        assert target.get_submodule(name).weight.shape[1] == 1
        assert_close(target.get_submodule(name).weight, source.get_submodule(name).weight.sum(1, keepdim=True))
    for name in source.classifier_modules:
        assert target.get_submodule(name).weight.shape[0] == 3


def test_gradient_checkpointing_changes_nothing_but_memory(backbone: Network):
    plain = backbone.build().train()
    (x,) = backbone.inputs(plain, 3)
    saving = copy.deepcopy(plain)
    saving.set_gradient_checkpointing()
    passes = {name: count_passes(model) for name, model in (("plain", plain), ("saving", saving))}
    for model in (plain, saving):
        torch.manual_seed(3)
        loss(model(x)).backward()
    assert sum(passes["saving"]) > 1.5 * sum(passes["plain"]), "nothing was recomputed"
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, name)
    assert_close(list(saving.buffers()), list(plain.buffers()))
    saving.set_gradient_checkpointing(False)
    before = sum(passes["saving"])
    saving(x)
    assert sum(passes["saving"]) - before == sum(passes["plain"])


def count_passes(model: nn.Module) -> list[int]:
    passes: list[int] = []
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    if len(layers) <= 1:  # no other convolutions than the stem of a transformer
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in layers:
        module.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def dims(model: nn.Module) -> int:
    return len(model.config.preprocess.shape)


def test_wrong_inputs_are_named(backbone: Network):
    model = backbone.build()
    channels, axes = model.in_channels, (64,) * dims(model)
    wanted = re.escape(f"(B, {channels}, {'D, ' if dims(model) == 3 else ''}H, W)")
    for shape in [(2, channels + 1, *axes), (channels, *axes), (2, channels, *axes[1:]), (2, channels, 8, *axes)]:
        with pytest.raises(ValueError, match=f"x must be {wanted}, got {re.escape(str(shape))}"):
            model(torch.empty(shape))


def test_small_inputs_work_or_are_named(backbone: Network):
    model = backbone.build()

    def run(*size: int) -> Tensor:
        with torch.no_grad():
            return model(torch.randn(2, model.in_channels, *size))

    smallest, refusal = [1] * dims(model), ""
    try:
        run(*smallest)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        found = re.search(r"x must be at least ([\d x]+) (pixels|voxels), got 1 x 1", refusal)
        assert found, refusal
        smallest = [int(side) for side in found[1].split(" x ")]
        for axis, side in enumerate(smallest):
            if side > 1:
                with pytest.raises(ValueError, match=f"x must be at least {found[1]} {found[2]}"):
                    run(*(side - 1 if axis == index else 64 for index in range(dims(model))))
    assert run(*smallest).isfinite().all()


def test_named_modules_exist(backbone: Network):
    model = backbone.build(num_classes=11, in_channels=2)
    assert model.stem_modules
    assert model.classifier_modules
    for name in model.stem_modules:
        assert model.get_submodule(name).weight.shape[1] == 2
    for name in model.classifier_modules:
        assert model.get_submodule(name).weight.shape[0] == 11


@pytest.mark.slow
def test_onnx_gives_the_same(backbone_family: Network, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    model = backbone_family.build()
    inputs = backbone_family.inputs(model, 2)
    done = export(model, inputs, tmp_path / "model.onnx")
    assert {check.shapes[0][0] for check in done.checks} == {1, 2, 3}
    for check in done.checks:
        assert check.error <= 1e-4 * max(check.largest, 1)
    assert (tmp_path / "model.onnx").stat().st_size > sum(tensor.nbytes for tensor in model.state_dict().values()) / 2
