"""Whatever a user gets wrong is answered by one clear line and an exit code, and nothing already written is lost."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli.conftest import Ended, Run, training_words
from convatlas.networks.registry import create_model
from convatlas.weights import save_weights
from recognition.pictures import CLASSES, arrays, pixels, write_pictures


def assert_refused(ended: Ended, verb: str, *told: str, code: int = 1) -> None:
    """One line on standard error, nothing else, and the exit code."""
    assert ended.out == ""
    assert ended.err.startswith(f"convatlas {verb}: error: "), ended.err
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err
    for text in told:
        assert text in ended.err
    assert ended.code == code


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, pictures: Path, finished: Path) -> dict[str, str]:
    """What the words of a command may refer to by {name}."""
    tmp_path = tmp_path_factory.mktemp("places")
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "one", 3, classes=("cat",))
    write_pictures(tmp_path / "other", 3, classes=("cow", "hen"))
    (tmp_path / "flat").mkdir()
    Image.fromarray(pixels(0, 0)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "texts" / "a" / f"{number}.png").write_text("no picture")
    images, labels = arrays(12)
    floats = images.astype(np.float32)
    floats[5, 3, 2] = np.nan
    np.savez(tmp_path / "nan.npz", images=floats, labels=labels)
    np.savez(tmp_path / "unlabelled.npz", images=images)
    np.savez(tmp_path / "many.npz", images=np.zeros((4, 36, 36, 5), np.uint8))
    (tmp_path / "half.npz").write_bytes((tmp_path / "unlabelled.npz").read_bytes()[:2000])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("task: recognition\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("task: [\n")
    (tmp_path / "detection").mkdir()
    (tmp_path / "detection" / "config.yaml").write_text("task: detection\n")
    save_weights(create_model("resnet18", num_classes=3), tmp_path / "resnet.safetensors")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": print}))
    for name, text in {
        "unknown": "epoch: 3\n",
        "nested": "augment:\n  hflp: 0.5\n",
        "typed": "epochs: ten\n",
        "broken": "epochs: [\n",
        "list": "- 1\n",
        "task": "task: detection\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return {"data": str(pictures), "run": str(finished), "tmp": str(tmp_path)}


WRONG_WORDS = [
    ("", "name a task first: convatlas train "),
    ("recognition --epoch 3", "unknown setting 'epoch': did you mean epochs"),
    ("recognition --augment.hflp 0.5", "unknown setting 'augment.hflp': did you mean augment.hflip"),
    ("recognition --epochs ten", "epochs must be an integer, got ten"),
    ("recognition --augment.hflip much", "augment.hflip must be a number, got much"),
    ("recognition --augment.scale 3", "augment.scale must be a list of 2, got 3"),
    ("recognition --optimizer adam", "optimizer must be one of adamw, sgd, lion, lamb, got adam"),
    ("recognition --options [1]", "options must be a mapping, got [1]"),
    ("recognition --strategy fdsp", "strategy must be one of auto, ddp, fsdp, got fdsp"),
    ("recognition --methods tract", "methods must be a mapping, got tract"),
    ('recognition --methods {{"tract":{{"lamda":1}}}}', "methods: tract: unknown setting 'lamda': did you mean lam"),
    ('recognition --methods {{"tract":{{"lam":"much"}}}}', "methods: tract: lam must be a number, got much"),
    ("recognition photos", "'photos' is not expected here"),
    ("recognition --epochs", "--epochs: expected one argument"),
    ("recognition --config {tmp}/missing.yaml", "missing.yaml"),
    ("recognition --config {tmp}/unknown.yaml", "unknown setting 'epoch': did you mean epochs"),
    ("recognition --config {tmp}/nested.yaml", "unknown setting 'augment.hflp': did you mean augment.hflip"),
    ("recognition --config {tmp}/typed.yaml", "epochs must be an integer, got ten"),
    ("recognition --config {tmp}/broken.yaml", "Problems parsing config"),
    ("recognition --config {tmp}/list.yaml", "config"),
    ("recognition --config {tmp}/task.yaml", "these are settings of the task detection, not of recognition"),
    ("recognition --resume {run} --epochs 3", "checkpoint_minutes, got --epochs: a run goes on with those in its"),
    ("recognition --resume {run} --run {tmp}/x", "--resume takes no other settings than devices, nodes, strategy,"),
    ("recognition --resume {run} --devices many", "devices must be an integer or auto, got many"),
    ("recognition --resume {run} --strategy=fsdb", "strategy must be one of auto, ddp, fsdp, got fsdb"),
    ("recognition --resume", "--resume: expected one argument"),
    ("recognition --resume {tmp}/detection", "is a run of the task detection, not of recognition"),
]


@pytest.mark.parametrize(("words", "told"), WRONG_WORDS, ids=[words for words, _ in WRONG_WORDS])
def test_wrong_words_of_train(run: Run, places: dict[str, str], words: str, told: str):
    ended = run("train", *words.format(**places).split())
    assert_refused(ended, "train", told, "--help')", code=2)


WRONG_VALUES = [
    ("recogniton", "unknown task 'recogniton': did you mean recognition"),
    ("recognition --model resnet19", "unknown model 'resnet19': did you mean resnet18"),
    ('recognition --options {{"depth":[1]}}', "unknown option of InceptionNeXtConfig 'depth': did you mean depths"),
    ("recognition --recipe nothing", "unknown recipe of recognition 'nothing'"),
    ("recognition --epochs 0", "epochs must be at least 1, got 0"),
    ("recognition --nodes 0", "nodes must be at least 1, got 0"),
    ('recognition --methods {{"trcat":{{}}}}', "unknown method 'trcat': did you mean tract?"),
    ('recognition --methods {{"tract":{{"lam":0}}}}', "lam must be positive, got 0"),
    ('recognition --methods {{"json:JSONDecoder":{{}}}}', "must be a class below convatlas.training.method.Method"),
    ("recognition --strategy fsdp --precision 16", "precision must be 32 or bf16 with the strategy fsdp, got 16"),
    ("recognition --lr -1", "lr must be positive, got -1.0"),
    ("recognition --augment.hflip 3", "hflip must be a probability between 0 and 1, got 3.0"),
    ("recognition --channels 2", "channels must be 1 (grey) or 3 (RGB), or left out, got 2"),
    ("recognition --data {tmp}/missing", "missing does not exist; expected a folder"),
    ("recognition --data {tmp}/empty", "empty is empty: expected one subfolder of images for each class"),
    ("recognition --data {tmp}/one", "training needs at least two classes, got only 'cat'"),
    ("recognition --data {tmp}/flat", "holds 1 images, but no class subfolders"),
    ("recognition --data {tmp}/text.png", "text.png must be a folder with one subfolder for each class"),
    ("recognition --data {tmp}/texts", "none of the 2 image files"),
    ("recognition --data {tmp}/nan.npz", "images[5] holds NaN or infinite values"),
    ("recognition --data {tmp}/unlabelled.npz", "holds no labels"),
    ("recognition --data {tmp}/half.npz", "half.npz cannot be read"),
    ("recognition --data {data} --image_size 16", "image_size must be at least 32 for inceptionnext_atto, got 16"),
    ("recognition --data {data} --weights {tmp}/missing.pth", "missing.pth does not exist"),
    ("recognition --data {data} --weights {tmp}/text.png", "is a text file, not a checkpoint"),
    ("recognition --data {data} --weights {tmp}/code.pth", "code.pth"),
    ("recognition --data {data} --weights {tmp}/resnet.safetensors", "looks like a checkpoint of another model"),
    ("recognition --data {data} --run {run}", "already exists: choose another folder, or go on with it by --resume"),
    ("recognition --data {data} --run {tmp}/text.png", "text.png already exists"),
    ("recognition --data {data} --run {tmp}/text.png/below", "Not a directory"),
    ("recognition --data {data} --run /proc/nothing/run", "/proc/nothing"),
    ("recognition --resume {tmp}/missing", "missing is not a run: it does not exist"),
    ("recognition --resume {tmp}/empty", "empty is not a run: it has no config.yaml"),
    ("recognition --resume {tmp}/damaged", "config.yaml is not valid YAML"),
]


@pytest.mark.parametrize(("words", "told"), WRONG_VALUES, ids=[words for words, _ in WRONG_VALUES])
def test_wrong_values_of_train(run: Run, places: dict[str, str], words: str, told: str):
    before = contents(Path(places["run"]))
    ended = run("train", *words.format(**places).split())
    assert_refused(ended, "train", told)
    assert contents(Path(places["run"])) == before
    assert not Path("runs").exists()


OTHER_VERBS = [
    ("evaluate", "", 2, "the following arguments are required: run"),
    ("evaluate", "{run} --dat x", 2, "unknown option '--dat': did you mean --data"),
    ("evaluate", "{run} x", 2, "'x' is not expected here"),
    ("evaluate", "{tmp}/missing", 1, "missing is not a run: it does not exist"),
    ("evaluate", "{tmp}/empty", 1, "empty is not a run: it has no config.yaml"),
    ("evaluate", "{tmp}/damaged", 1, "config.yaml is not valid YAML"),
    ("evaluate", "{tmp}/detection", 1, "unknown task 'detection'"),
    ("evaluate", "{tmp}/unfinished", 1, "has no finished epoch yet; go on with 'convatlas train recognition --resume"),
    ("evaluate", "{run} --data {tmp}/other", 1, "1 classes that are not among the 3 expected ones: 'cow'"),
    ("evaluate", "{run} --data {tmp}/missing", 1, "missing does not exist"),
    ("evaluate", "{run} --data {tmp}/flat", 1, "but no class subfolders"),
    ("evaluate", "{run} --out {tmp}/text.png/below", 1, "Not a directory"),
    ("predict", "{run}", 2, "the following arguments are required: INPUT"),
    ("predict", "{tmp}/unfinished {data}", 1, "has no finished epoch yet"),
    ("predict", "{run} {tmp}/missing.png", 1, "missing.png does not exist"),
    ("predict", "{run} {tmp}/text.png", 1, "text.png cannot be read: not an image"),
    ("predict", "{run} {tmp}/texts", 1, "none of the 2 image files"),
    ("predict", "{run} {tmp}/empty", 1, "empty holds no image files"),
    ("predict", "{run} {tmp}/many.npz", 1, "many has images of 5 channels, which cannot be converted to 3"),
    ("predict", "{run} {tmp}/flat --out {tmp}/text.png/below", 1, "Not a directory"),
    ("compare", "", 2, "name a task first"),
    ("compare", "recognition", 2, "--models needs at least two different models, got none"),
    ("compare", "recognition --models resnet18", 2, "--models needs at least two different models, got resnet18"),
    ("compare", "recognition --models resnet18,resnet18", 2, "at least two different models"),
    ("compare", "recognition --models resnet18,resnet19", 1, "unknown model 'resnet19': did you mean resnet18"),
    (
        "compare",
        'recognition --models {{"a":{{"model":"resnet18"}},"b":{{"modl":"x"}}}}',
        2,
        "the entry 'b' of --models names no model",
    ),
    ("compare", 'recognition --models {{"a":{{"model":"resnet18"}},"b/":{{"model":"x"}}}}', 2, "letters, digits"),
    (
        "compare",
        'recognition --models {{"a":{{"model":"resnet18"}},"b":{{"model":"x","image_sice":3}}}}',
        2,
        "unknown setting 'image_sice': did you mean image_size",
    ),
    (
        "compare",
        "recognition --models resnet18,resnet34 --devices 2",
        2,
        "compare trains on one device, got devices 2 and",
    ),
    ("compare", "recognition --models {{a", 2, "--models is no valid mapping: {a"),
    ("compare", "recognition --models resnet18,resnet34 --resume", 2, "--resume needs --out"),
    ("compare", "recognition --models resnet18,resnet34 --out {run}", 1, "already exists"),
    ("list", "--kind networks", 1, "unknown kind 'networks': did you mean network"),
    ("list", "--avail", 2, "unknown option '--avail': did you mean --available?"),
    ("show", "", 2, "the following arguments are required: system"),
    ("show", "inceptionnet", 1, "unknown system 'inceptionnet': did you mean inceptionnext"),
    ("reproduce", "inceptionnet", 1, "unknown system 'inceptionnet': did you mean inceptionnext"),
    ("reproduce", "eca --budget full", 2, "--budget full needs --data"),
    ("reproduce", "eca --budget huge", 2, "--budget: invalid choice: 'huge' (choose from"),
    ("bench", "fft_con", 1, "unknown benchmark 'fft_con': did you mean fft_conv"),
    ("bench", "eca --threads 0", 2, "--threads must be positive numbers with commas between them, got 0"),
    ("bench", "eca --threads one", 2, "--threads must be positive numbers with commas between them, got one"),
    ("bench", "eca --models resnet18", 2, "the benchmark eca takes no --models"),
    ("bench", "networks --models resnet19", 1, "unknown model 'resnet19': did you mean resnet18"),
    ("bench", "networks --models ,", 1, "models must be one name or several, got none"),
    ("bench", "eca --quik", 2, "unknown option '--quik': did you mean --quick"),
    ("inspect", "", 2, "the following arguments are required: RUN|MODEL|CHECKPOINT"),
    ("inspect", "resnet19", 1, "unknown model 'resnet19': did you mean resnet18"),
    ("inspect", "{tmp}/empty", 1, "empty is not a run: it has no config.yaml"),
    ("inspect", "{tmp}/unfinished", 1, "has no finished epoch yet"),
    ("inspect", "{tmp}/missing.pth", 1, "missing.pth does not exist"),
    ("inspect", "{tmp}/text.png", 1, "is a text file, not a checkpoint"),
    ("inspect", "{tmp}/resnet.safetensors --model inceptionnext_atto", 1, "of another model"),
    ("inspect", "resnet18 --size big", 2, "--size must be positive numbers with commas between them"),
    ("inspect", "resnet18 --size 64", 1, "size must have a number for each position axis"),
    ("inspect", "{run} --out {tmp}/text.png/below", 1, "Not a directory"),
    ("inspect", "resnet18 --machine h20", 1, "unknown machine 'h20': did you mean h200_"),
    ("inspect", "resnet18 --batch 0", 2, "--batch must be at least 1, got 0"),
    ("export", "resnet18", 2, "the following arguments are required: --out"),
    ("export", "resnet19 --out {tmp}/a.onnx", 1, "unknown model 'resnet19': did you mean resnet18"),
    ("export", "resnet18 --out {tmp}/a.bin", 2, "--out must end in .onnx or .pt2, or --format be given, got a.bin"),
    ("export", "resnet18 --out {tmp}/a.onnx --format tf", 2, "--format: invalid choice: 'tf'"),
    ("export", "{run} --out {tmp}/a.pt2 --dynamic hight", 1, "unknown axis of the inputs 'hight': did you mean height"),
    ("export", "{run} --out {tmp}/text.png/a.pt2", 1, "text.png"),
    ("convert", "{tmp}/missing.pth {tmp}/a.safetensors", 1, "missing.pth does not exist"),
    ("convert", "{tmp}/text.png {tmp}/a.safetensors", 1, "is a text file, not a checkpoint"),
    ("convert", "{tmp}/resnet.safetensors {tmp}/a.txt", 1, "must end in .safetensors"),
    ("convert", "{tmp}/resnet.safetensors {tmp}/a.npz --model inceptionnext_atto", 1, "of another model"),
    ("convert", "{tmp}/resnet.safetensors {tmp}/text.png/a.npz", 1, "text.png"),
    ("convert", "{tmp}/code.pth {tmp}/a.safetensors", 1, "code.pth"),
]


@pytest.mark.parametrize(("verb", "words", "code", "told"), OTHER_VERBS, ids=[f"{v} {w}" for v, w, _, _ in OTHER_VERBS])
def test_wrong_words_of_other_verbs(run: Run, places: dict[str, str], verb: str, words: str, code: int, told: str):
    before = contents(Path(places["run"]))
    ended = run(verb, *words.format(**places).split())
    assert_refused(ended, verb, told, code=code)
    assert contents(Path(places["run"])) == before
    assert not (Path(places["tmp"]) / "a.safetensors").exists()


def test_a_missing_package_names_its_extra(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    ended = run("convert", tmp_path / "weights.h5", tmp_path / "a.safetensors")
    assert_refused(ended, "convert", "needs the package h5py: pip install 'convatlas[hdf5]'")


# -- a disk that is full -----------------------------------------------------------------------------------------------


class SmallFiles:
    """While this holds, no file can grow beyond so many bytes, as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_full_disk_in_the_middle_of_training_loses_nothing(
    run: Run, pictures: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save, calls = torch.save, []

    def second_is_too_large(content: Any, file: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            with SmallFiles(10_000):
                save(content, file, **options)
                file.flush()
        save(content, file, **options)

    monkeypatch.setattr(torch, "save", second_is_too_large)
    ended = run(*training_words(pictures, tmp_path / "run"))
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    how = f"go on with 'convatlas train recognition --resume {tmp_path / 'run'}'"
    assert_refused(ended, "train", str(file), os.strerror(27), how)
    assert torch.load(file, weights_only=True)["position"] == [1, 0]
    assert not list((tmp_path / "run").rglob("*.part"))
    assert run("train", "recognition", "--resume", tmp_path / "run").code == 0
    weights = [each / "checkpoints" / "best.safetensors" for each in (tmp_path / "run", finished)]
    one, other = (torch.load(each.parent / "last.ckpt", weights_only=True)["state_dict"] for each in weights)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("size", "written"), [(500, "config.yaml"), (20_000, "best.safetensors")])
def test_a_disk_that_is_full_from_the_start_is_told(run: Run, pictures: Path, tmp_path: Path, size: int, written: str):
    with SmallFiles(size):
        ended = run(*training_words(pictures, tmp_path / "run"))
    assert_refused(ended, "train")
    assert str(tmp_path / "run") in ended.err
    assert os.strerror(27) in ended.err
    for path in (tmp_path / "run").rglob("*"):
        assert path.name != written  # no half of it


def test_a_full_disk_keeps_earlier_predictions(run: Run, pictures: Path, finished: Path, tmp_path: Path):
    assert run("predict", finished, pictures / "cat", "--out", tmp_path / "out").code == 0
    before = contents(tmp_path / "out")
    with SmallFiles(500):
        ended = run("predict", finished, pictures, "--out", tmp_path / "out")
    assert_refused(ended, "predict", os.strerror(27))
    assert contents(tmp_path / "out") == before


def test_a_damaged_checkpoint_is_told_and_kept(run: Run, pictures: Path, tmp_path: Path):
    assert run(*training_words(pictures, tmp_path / "run", epochs=1)).code == 0
    for name, words in (
        ("last.ckpt", ["train", "recognition", "--resume", tmp_path / "run"]),
        ("best.safetensors", ["evaluate", tmp_path / "run"]),
    ):
        path = tmp_path / "run" / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:1000])
        before = contents(tmp_path / "run")
        assert_refused(run(*words), words[0], name)
        assert contents(tmp_path / "run") == before


def test_the_classes_of_the_data_are_named_where_they_differ(run: Run, finished: Path, tmp_path: Path):
    write_pictures(tmp_path / "data", 2, classes=("sheep", *CLASSES))
    ended = run("evaluate", finished, "--data", tmp_path / "data")
    assert_refused(ended, "evaluate", "'sheep'", "expected: 'cat', 'dog', 'hen'")
