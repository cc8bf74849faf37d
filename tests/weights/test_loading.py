"""Checkpoints as users have them go into models, or say exactly why not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convatlas.errors import CheckpointError, UnknownName, UnsafeCheckpoint
from convatlas.ops.position import resize_position_embedding
from convatlas.weights import Layout, LoadReport, PositionTable, convert, load_weights, read_checkpoint, save_weights


@dataclasses.dataclass(frozen=True)
class NetConfig:
    num_classes: int = 7
    dims: tuple[int, ...] = (8,)


def _split_gate(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    joined = state.pop("gate_and_value")
    state["gate"], state["value"] = joined.chunk(2)
    return state


class Net(nn.Module):
    """Convolutions, batch norm and two parameters that the authors keep in one tensor."""

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=((r"^conv1\.", "stem."), (r"^fc\.", "head."), (r"^aux_head\..*", "")), function=_split_gate
        ),
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stem",)

    def __init__(self, num_classes: int = 7, in_channels: int = 3) -> None:
        super().__init__()
        self.config = NetConfig(num_classes)
        self.stem = nn.Conv2d(in_channels, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.gate = nn.Parameter(torch.randn(8))
        self.value = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, num_classes) if num_classes else nn.Identity()
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.bn1.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.stem(x))).mean((2, 3))
        return self.head(x * self.gate + self.value)  # type: ignore[no-any-return]


class ViT(nn.Module):
    position_embeddings: ClassVar[Mapping[str, int]] = {"pos_embed": 1, "pos_map": 0}

    def __init__(self, tokens: int = 17, side: tuple[int, int] = (4, 4)) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, 6))
        self.pos_map = nn.Parameter(torch.randn(1, 6, *side))
        self.qkv = nn.Linear(6, 18)


def authors(net: Net) -> dict[str, Tensor]:
    """The state dict of a net as its authors' code names it."""
    state: dict[str, Tensor] = OrderedDict()
    for key, value in net.state_dict().items():
        state[key.replace("stem.", "conv1.").replace("head.", "fc.")] = value.clone()
    state["gate_and_value"] = torch.cat([state.pop("gate"), state.pop("value")])
    state["aux_head.weight"] = torch.zeros(3)
    return state


def equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


class Snapshot:
    """Tells whether a model was changed since."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {key: value.clone() for key, value in model.state_dict().items()}

    def same(self) -> bool:
        return all(torch.equal(value, self.before[key]) for key, value in self.model.state_dict().items())


# Layouts, wrappers, prefixes

PREFIXES = ("", "module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.net.encoder.", "any.thing.")
NESTS: dict[str, Callable[[Any], Any]] = {
    "flat": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": {"lr": 0.1}},
    "state_dict": lambda state: {"state_dict": state, "best_acc1": torch.tensor(76.0), "arch": "net"},
    "model_state": lambda state: {"model_state": state, "cfg": "yaml text"},
    "params_ema": lambda state: {"params_ema": state},
    "deep": lambda state: {"checkpoint": {"nets": [{"params": state}]}},
    "with optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 1},
    },
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("layout", ["convatlas", "authors"])
def test_layout_wrapper_and_prefix_are_recognised(prefix: str, nest: str, layout: str) -> None:
    source, model = Net(), Net()
    state = source.state_dict() if layout == "convatlas" else authors(source)
    report = load_weights(model, NESTS[nest](under(prefix, state)))
    assert equal(model, source)
    assert report.layout == layout
    assert report.prefix == prefix.replace("_orig_mod.", "")
    assert report.loaded == len(source.state_dict())
    assert (report.missing, report.unexpected, report.mismatched, report.adapted) == ((), (), (), ())


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save(zipped: bool, tmp_path: Path) -> None:
    source, model = Net(), Net()
    content = {"state_dict": under("module.", authors(source)), "args": argparse.Namespace(lr=1), "epoch": 90}
    torch.save(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=zipped)
    report = load_weights(model, tmp_path / "x.pth.tar")
    assert equal(model, source)
    assert report.part == "state_dict"
    assert report.summary() == "loaded 20 tensors (layout authors, part state_dict, keys under module.)"


def test_lightning_checkpoint_with_other_networks(tmp_path: Path) -> None:
    source, model = Net(), Net()
    state = {**under("model.", source.state_dict()), "loss.weight": torch.ones(3), "loss.vgg.weight": torch.ones(2)}
    content = {
        "state_dict": state,
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "pytorch-lightning_version": "2.6",
    }
    torch.save(content, tmp_path / "x.ckpt")
    report = load_weights(model, tmp_path / "x.ckpt")
    assert equal(model, source)
    assert report.ignored == ("loss.weight", "loss.vgg.weight")
    assert "2 left aside: loss.weight, loss.vgg.weight" in report.summary()


def test_backbone_of_a_detector() -> None:
    source, model = Net(0), Net(0)
    state = under("backbone.", source.state_dict()) | {
        "neck.0.weight": torch.ones(2),
        "bbox_head.weight": torch.ones(2),
    }
    assert load_weights(model, {"state_dict": state, "meta": {}}).prefix == "backbone."
    assert equal(model, source)


def test_our_own_layout_wins_a_tie() -> None:
    class Twin(Net):
        layouts: ClassVar[Mapping[str, Layout]] = {"same": Layout(), "again": Layout()}

    assert load_weights(Twin(), Net().state_dict()).layout == "convatlas"


def test_layout_errors() -> None:
    def refuse(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        raise CheckpointError("the copies of the router differ")

    class Clash(Net):
        layouts: ClassVar[Mapping[str, Layout]] = {
            "clash": Layout(renames=((r"^(conv1|bn1)\.", "stem."),)),
            "router": Layout(function=refuse),
        }

    with pytest.raises(CheckpointError, match=r"layout router: the copies of the router differ"):
        load_weights(Clash(), authors(Net()))
    with pytest.raises(ValueError, match=r"two tensors of the checkpoint map to stem\.weight"):
        Clash.layouts["clash"].apply(authors(Net()), Net())


@pytest.mark.parametrize("new_to_old", [True, False])
def test_names_of_weight_norm(new_to_old: bool) -> None:
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.warns(FutureWarning):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    source, model = (new, old) if new_to_old else (old, new)
    load_weights(model, source.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(model(x), source(x))


# Parts


def test_averaged_copy_goes_first() -> None:
    plain, averaged, model = Net(), Net(), Net()
    content = {"model": plain.state_dict(), "model_ema": averaged.state_dict()}
    report = load_weights(model, content)
    assert report.part == "model_ema"
    assert equal(model, averaged)
    assert "model would fit as well (part=)" in report.summary()
    assert load_weights(model, content, part="model").part == "model"
    assert equal(model, plain)


def test_lightning_keeps_the_average_as_the_state(tmp_path: Path) -> None:
    plain, averaged, model = Net(), Net(), Net()
    content = {
        "state_dict": under("network.", averaged.state_dict()),
        "current_model_state": under("network.", plain.state_dict()),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    torch.save(content, tmp_path / "last.ckpt")
    report = load_weights(model, tmp_path / "last.ckpt")
    assert (report.part, report.prefix) == ("state_dict", "network.")
    assert equal(model, averaged)
    assert "current_model_state.network would fit as well" in report.summary()


def test_two_networks_of_different_shape(tmp_path: Path) -> None:
    generator, discriminator = Net(5), ViT()
    torch.save({"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}, tmp_path / "gan.pt")
    model = ViT()
    assert load_weights(model, tmp_path / "gan.pt").part == "discriminator"
    assert equal(model, discriminator)
    assert list(read_checkpoint(tmp_path / "gan.pt").parts) == ["generator", "discriminator"]


@pytest.mark.parametrize("nested", [True, False])
def test_two_networks_of_one_shape_must_be_named(nested: bool) -> None:
    first, second, model = Net(), Net(), Net()
    if nested:
        content: Any = {"student": first.state_dict(), "teacher": second.state_dict()}
    else:
        content = {**under("student.net.", first.state_dict()), **under("teacher.net.", second.state_dict())}
    with pytest.raises(CheckpointError, match=r"fits in several places: student(\.net)?, teacher(\.net)?; choose by"):
        load_weights(model, content)
    load_weights(model, content, part="teacher")
    assert equal(model, second)


def test_two_names_for_one_state_are_no_question() -> None:
    state = Net().state_dict()
    assert load_weights(Net(), {"model": state, "state_dict": state}).part == "model"


def test_parts_side_by_side_are_one_model() -> None:
    source = nn.ModuleDict({"encoder": nn.Linear(2, 3), "decoder": nn.Linear(3, 2)})
    model = nn.ModuleDict({"encoder": nn.Linear(2, 3), "decoder": nn.Linear(3, 2)})
    nets = {name: module.state_dict() for name, module in source.items()}
    load_weights(model, {"epoch": 1, "nets": nets})
    assert equal(model, source)


def test_unknown_part() -> None:
    content = {"model": Net().state_dict(), "model_ema": Net().state_dict()}
    with pytest.raises(UnknownName, match="did you mean model_ema or model"):
        load_weights(Net(), content, part="model_emma")


# Adaptation


def test_classifier_of_other_size_keeps_its_own() -> None:
    source, model = Net(10), Net(4)
    weight, bias = model.head.weight.clone(), model.head.bias.clone()  # type: ignore[operator, union-attr]
    report = load_weights(model, authors(source))
    assert torch.equal(model.head.weight, weight)  # type: ignore[arg-type]
    assert torch.equal(model.head.bias, bias)  # type: ignore[arg-type]
    assert torch.equal(model.stem.weight, source.stem.weight)
    text = "10 classes in the checkpoint, 4 in the model, which keeps its own"
    assert report.adapted == (("head.weight", text), ("head.bias", text))
    assert report.loaded == len(source.state_dict()) - 2


def test_model_without_classifier() -> None:
    source, model = Net(10), Net(0)
    report = load_weights(model, source.state_dict())
    assert {key for key, _ in report.adapted} == {"head.weight", "head.bias"}
    assert torch.equal(model.gate, source.gate)


def test_checkpoint_without_classifier_is_incomplete() -> None:
    with pytest.raises(CheckpointError, match=r"2 missing in the checkpoint: head\.weight, head\.bias"):
        load_weights(Net(10), Net(0).state_dict())


def test_grey_image_gives_what_three_equal_channels_gave() -> None:
    source, model = Net().double().eval(), Net(in_channels=1).double().eval()
    report = load_weights(model, source.state_dict())
    image = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(model(image), source(image.expand(-1, 3, -1, -1)))
    assert report.adapted == (("stem.weight", "from 3 to 1 input channels"),)


@pytest.mark.parametrize("given", [1, 2, 3])
@pytest.mark.parametrize("wanted", [2, 3, 4, 6, 13])
def test_more_channels_keep_the_scale(given: int, wanted: int) -> None:
    source, model = Net(in_channels=given), Net(in_channels=wanted)
    load_weights(model, source.state_dict())
    for channel in range(wanted):
        expected = source.stem.weight[:, channel % given] * given / wanted
        torch.testing.assert_close(model.stem.weight[:, channel], expected)


def test_channels_of_half_precision_are_summed_in_float32() -> None:
    source, model = Net().half(), Net(in_channels=1)
    load_weights(model, source.state_dict())
    expected = source.stem.weight.float().sum(1, keepdim=True).half().float()
    assert torch.equal(model.stem.weight, expected)


def test_a_stem_that_is_not_declared_is_not_adapted() -> None:
    with pytest.raises(CheckpointError, match=r"1 of another shape: 0\.weight \(8, 3, 3, 3\) for \(8, 1, 3, 3\)"):
        load_weights(nn.Sequential(nn.Conv2d(1, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 3)).state_dict())


def test_position_embeddings_are_resized() -> None:
    source, model = ViT(), ViT(tokens=26, side=(3, 6))
    report = load_weights(model, source.state_dict())
    resized = resize_position_embedding(source.pos_embed, (5, 5), num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, resized)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.pos_map, resize_position_embedding(source.pos_map, (3, 6)))
    assert report.adapted[0] == ("pos_embed", "resized from (1, 17, 6) to (1, 26, 6)")


def test_position_tables_tell_grid_and_interpolation() -> None:
    source, model = ViT(), ViT(tokens=1 + 2 * 7)
    model.position_embeddings = {"pos_embed": PositionTable(1, (2, 7), "bilinear"), "pos_map": 0}  # type: ignore[misc]
    load_weights(model, source.state_dict())
    expected = resize_position_embedding(source.pos_embed, (2, 7), num_prefix_tokens=1, mode="bilinear")
    assert torch.equal(model.pos_embed, expected)


def test_position_embeddings_without_a_square_grid_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"1 of another shape: pos_embed \(1, 17, 6\) for \(1, 25, 6\)"):
        load_weights(ViT(tokens=25), ViT().state_dict())


# Strictness


def test_strict_loading_leaves_the_model_untouched() -> None:
    model = Net()
    state = {key: value for key, value in Net().state_dict().items() if key != "blocks.0.bias"}
    state |= {"extra.weight": torch.ones(2), "gate": torch.ones(9)}
    before = Snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state)
    assert str(caught.value) == (
        "the state dict does not fit: 18 of 20 tensors of the model do; 1 missing in the checkpoint: blocks.0.bias; "
        "1 unknown to the model: extra.weight; 1 of another shape: gate (9,) for (8,)"
    )
    assert before.same()


def test_lenient_loading_takes_what_fits() -> None:
    source, model = Net(), Net()
    gate = model.gate.clone()
    state = {**source.state_dict(), "extra.weight": torch.ones(2), "gate": torch.ones(9)}
    del state["value"]
    report = load_weights(model, state, strict=False)
    assert report.missing == ("value",)
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched == (("gate", (9,), (8,)),)
    assert torch.equal(model.gate, gate)
    assert torch.equal(model.blocks[2].weight, source.blocks[2].weight)
    assert "1 missing in the checkpoint: value" in report.summary()


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_of_another_model(strict: bool) -> None:
    model = Net()
    before = Snapshot(model)
    with pytest.raises(
        CheckpointError, match=r"0 of 20 tensors of the model do, so this looks like a checkpoint of an"
    ):
        load_weights(model, {"model": ViT().state_dict()}, strict=strict)
    assert before.same()


def test_same_names_with_other_widths_look_like_another_model() -> None:
    first = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    second = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8))
    with pytest.raises(CheckpointError, match="looks like a checkpoint of another model"):
        load_weights(first, second.state_dict())


def test_absent_counters_and_tied_weights_are_not_missing() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.bn = nn.BatchNorm1d(3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.embed.weight

    source, model = Tied(), Tied()
    state = {
        key: value for key, value in source.state_dict().items() if key not in ("out.weight", "bn.num_batches_tracked")
    }
    report = load_weights(model, state)
    assert report.missing == ()
    assert torch.equal(model.out.weight, source.embed.weight)


def test_empty_sources() -> None:
    for empty in ({}, {"epoch": 3}, {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}):
        with pytest.raises(CheckpointError, match="the state dict holds no weights"):
            load_weights(Net(), empty)


# Types and kinds of tensors and models


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_model_stays(dtype: torch.dtype) -> None:
    source, model = Net().to(dtype), Net()
    load_weights(model, source.state_dict())
    assert model.stem.weight.dtype == torch.float32
    assert torch.equal(model.stem.weight, source.stem.weight.float())
    half = Net().to(dtype)
    load_weights(half, Net().state_dict())
    assert half.stem.weight.dtype == dtype


def test_channels_last_stays() -> None:
    source = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_weights(model, Net().state_dict())
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    load_weights(plain := Net(), source.state_dict())
    assert equal(plain, source)


def test_complex_weights(tmp_path: Path) -> None:
    source, model, real = (
        nn.ParameterDict({"a": torch.randn(3, dtype=dtype), "b": torch.randn(2, 3, dtype=dtype)})
        for dtype in (torch.complex64, torch.complex64, torch.float32)
    )
    save_weights(source, tmp_path / "x.safetensors")
    load_weights(model, tmp_path / "x.safetensors")
    assert equal(model, source)
    with pytest.raises(CheckpointError, match="2 complex for real parameters: a, b"):
        load_weights(real, source.state_dict())


def test_nan_is_noted() -> None:
    state = Net().state_dict()
    state["gate"][1] = float("nan")
    report = load_weights(Net(), state)
    assert "1 with NaN or infinity: gate" in report.summary()


def test_wrapped_models() -> None:
    source = Net()
    inside, compiled = Net(), torch.compile(Net(), backend="eager")
    inside.blocks = torch.compile(inside.blocks, backend="eager")  # type: ignore[assignment]
    for model in (nn.DataParallel(Net()), compiled, inside):
        assert load_weights(model, source.state_dict()).loaded == 20  # type: ignore[arg-type]
    assert equal(compiled._orig_mod, source)  # type: ignore[attr-defined]
    assert torch.equal(inside.state_dict()["blocks._orig_mod.0.weight"], source.blocks[0].weight)


def test_models_without_memory() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"gate is on the meta device: build it on a real device"):
        load_weights(model, Net().state_dict())
    with pytest.raises(ValueError, match="has no shape yet: run one batch through it first"):
        load_weights(nn.LazyLinear(3), nn.Linear(2, 3).state_dict())


# Saving


def test_save_and_load(tmp_path: Path) -> None:
    source, model = Net(), Net()
    path = save_weights(source, tmp_path / "new" / "x.safetensors", metadata={"note": "first run"})
    assert path == tmp_path / "new" / "x.safetensors"
    report = load_weights(model, path)
    assert equal(model, source)
    assert report.layout == "convatlas"
    metadata = read_checkpoint(path).metadata
    assert json.loads(metadata.pop("config")) == {"num_classes": 7, "dims": [8]}
    assert metadata == {"format": "pt", "library": "convatlas", "model": "Net", "note": "first run"}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.safetensors"]


def test_saved_tensors_stand_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.data = torch.arange(6.0)[::2]
    saved = load_file(save_weights(nn.DataParallel(model), tmp_path / "x.safetensors"))
    assert set(saved) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(saved["1.weight"], model[0].weight)
    assert saved["0.bias"].tolist() == [0, 2, 4]
    compiled = torch.compile(model, backend="eager")
    assert set(load_file(save_weights(compiled, tmp_path / "y.safetensors"))) == set(saved)  # type: ignore[arg-type]


def test_saving_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got 'x\.pth'"):
        save_weights(Net(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="metadata must map text to text"):
        save_weights(Net(), tmp_path / "x.safetensors", metadata={"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"cannot hold complex128 \(a\)"):
        save_weights(nn.ParameterDict({"a": torch.zeros(1, dtype=torch.complex128)}), tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_weights(Net(), tmp_path / "file" / "x.safetensors")


def test_failed_saving_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_weights(Net(), tmp_path / "x.safetensors")
    before = path.read_bytes()

    def full_disk(state: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(Net(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


# Converting


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".npz"])
def test_convert_with_a_model(suffix: str, tmp_path: Path) -> None:
    source, model, again = Net(), Net(), Net()
    torch.save({"state_dict": under("module.", authors(source))}, tmp_path / "theirs.pth")
    report = convert(tmp_path / "theirs.pth", tmp_path / f"ours{suffix}", model=model)
    assert isinstance(report, LoadReport)
    assert report.layout == "authors"
    assert load_weights(again, tmp_path / f"ours{suffix}").layout == "convatlas"
    assert equal(again, source)


def test_convert_without_a_model(tmp_path: Path) -> None:
    state = under("module.model.", Net().bfloat16().state_dict())
    torch.save({"model": state, "optimizer": {"state": {0: torch.zeros(2)}}}, tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", tmp_path / "y.safetensors") == 20
    assert load_file(tmp_path / "y.safetensors")["stem.weight"].dtype == torch.bfloat16
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "library": "convatlas"}
    assert convert(tmp_path / "y.safetensors", tmp_path / "z.npz") == 20
    with np.load(tmp_path / "z.npz") as arrays:
        assert arrays["stem.weight"].dtype == np.float32
        assert np.array_equal(arrays["stem.weight"], state["module.model.stem.weight"].float().numpy())


def test_convert_onto_itself(tmp_path: Path) -> None:
    save_file(under("module.", {"a": torch.arange(3.0)}), tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]


def test_convert_asks_for_the_part(tmp_path: Path) -> None:
    torch.save({"g": {"a": torch.ones(1)}, "d": {"b": torch.ones(2)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"several parts: g \(1 tensors\), d \(1 tensors\); choose one by part="):
        convert(tmp_path / "x.pth", tmp_path / "y.npz")
    convert(tmp_path / "x.pth", tmp_path / "y.npz", part="d")
    assert list(read_checkpoint(tmp_path / "y.npz").parts[""]) == ["b"]
    with pytest.raises(UnknownName, match="unknown part 'e'"):
        convert(tmp_path / "x.pth", tmp_path / "y.npz", part="e")
    with pytest.raises(ValueError, match=r"destination must end in \.safetensors, \.pth, \.pt or \.npz, got 'y\.onnx'"):
        convert(tmp_path / "x.pth", tmp_path / "y.onnx")


def test_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    model = Net()
    before = Snapshot(model)
    for zipped in (True, False):
        torch.save({"model": Net().state_dict(), "x": Evil()}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UnsafeCheckpoint, match=r"x asks to call posix\.system; refused, nothing of it was run"):
            load_weights(model, tmp_path / "x")
    assert not (tmp_path / "marker").exists()
    assert before.same()
