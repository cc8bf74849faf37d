"""A network is found by its name, its run or its checkpoint, and comes with what is known of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convatlas.errors import CheckpointError, DataError, UnknownName
from convatlas.networks.registry import create_model
from convatlas.training.opening import open_network, sized
from convatlas.weights import save_weights
from recognition.pictures import CLASSES, TINY, short, write_pictures

OPTIONS = {"depths": (1, 1), "dims": (8, 16), "num_classes": 3, "in_channels": 1, "preprocess": {"size": 40}}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_name_gives_random_weights():
    opened = open_network("resnet18", num_classes=4, size=(64, 96))
    assert (opened.name, opened.weights, opened.classes) == ("resnet18", "random", ())
    assert not opened.network.training
    assert [tuple(x.shape) for x in opened.inputs] == [(1, 3, 64, 96)]
    assert opened.preprocess is not None
    assert opened.preprocess["size"] == [64, 96]
    assert opened.network(*opened.inputs).shape == (1, 4)
    assert set(opened.description()) == {"model", "weights", "preprocess"}


def test_our_checkpoint_tells_its_model(tmp_path: Path):
    model = create_model("inceptionnext_tiny", **OPTIONS)
    save_weights(model, tmp_path / "tiny.safetensors")
    opened = open_network(str(tmp_path / "tiny.safetensors"))
    assert same(opened.network, model)
    assert opened.network.config == model.config
    assert opened.name == "InceptionNeXt"  # changed, so none of the published ones
    assert opened.inputs[0].shape == (1, 1, 40, 40)
    whole = create_model("inceptionnext_atto")
    save_weights(whole, tmp_path / "atto.safetensors")
    assert open_network(str(tmp_path / "atto.safetensors")).name == "inceptionnext_atto"


def test_a_foreign_checkpoint_needs_the_name_of_its_model(tmp_path: Path):
    model = create_model("inceptionnext_atto", num_classes=7)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="does not tell which model it belongs to: give its name as model"):
        open_network(str(tmp_path / "a.pth"))
    opened = open_network(str(tmp_path / "a.pth"), model="inceptionnext_atto", num_classes=7)
    assert same(opened.network, model)
    assert opened.name == "inceptionnext_atto"
    assert "loaded" in opened.weights
    with pytest.raises(CheckpointError, match="does not fit"):
        open_network(str(tmp_path / "a.pth"), model="resnet18")


def test_a_run_and_its_checkpoint_tell_classes_and_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from convatlas.recognition.task import Recognition

    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    task = Recognition(data=str(write_pictures(tmp_path / "data")), options=TINY)
    task.fit(tmp_path / "run", short(epochs=1))
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "best.safetensors"):
        opened = open_network(str(source))
        assert same(opened.network, task.network)
        assert (opened.name, opened.classes) == ("inceptionnext_atto", CLASSES)
        assert opened.preprocess is not None
        assert opened.preprocess["size"] == task.preprocess.size
        assert opened.inputs[0].shape[2:] == task.preprocess.shape
        assert opened.description()["classes"] == list(CLASSES)
    with pytest.raises(ValueError, match="a run tells its model itself, so model must not be given, got resnet18"):
        open_network(str(tmp_path / "run"), model="resnet18")


def test_what_is_not_there_is_told(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownName, match="unknown model 'resnt18': did you mean resnet18"):
        open_network("resnt18")
    with pytest.raises(DataError, match="is not a run: it has no config"):
        open_network(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_network(str(tmp_path / "missing.pth"))


def test_sizes_fit_the_axes():
    x, index = torch.zeros(2, 3, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    larger, kept = sized((x, index), (5, 7))
    assert (larger.shape, larger.dtype) == ((2, 3, 5, 7), torch.float64)
    assert kept is index
    with pytest.raises(
        ValueError, match=r"size must have a number for each position axis of the input \[\(2, 3, 8, 8\)"
    ):
        sized((x, index), (5,))
