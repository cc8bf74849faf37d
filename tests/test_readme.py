"""The commands that the README and the guide show run as they stand there, on small data of the same form."""

from __future__ import annotations

import re
import shlex
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas import catalog
from convatlas.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


EVERY = [(page, line) for page in PAGES for line in commands(page)]
#: Pages whose commands need other data and are run by the tests of their task, but for those of `ANYWHERE`.
ELSEWHERE = {
    *("audio.md", "denoising.md", "forecasting.md", "physics.md", "points.md", "super_resolution.md"),
    *("video_delivery.md", "volumes.md", "white_balance.md"),
}
ANYWHERE = ("convatlas spectrogram",)
SHOWN = [
    pytest.param(line, id=f"{page.name}: {line}")
    for page, line in EVERY
    if page.name not in ELSEWHERE or line.startswith(ANYWHERE)
]


def test_the_readme_shows_commands():
    words = [shlex.split(line) for _, line in EVERY]
    assert {verb for command, verb, *_ in words if command == "convatlas"} == set(VERBS)


@pytest.mark.parametrize("line", [line for line in SHOWN if line.values[0].startswith("make")])
def test_make_targets_exist(line):
    target = shlex.split(line)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A folder with what the commands name: photographs of two classes, new pictures, a checkpoint, a trained run."""
    folder = tmp_path_factory.mktemp("user")
    random = np.random.default_rng(0)

    def picture(path: Path, level: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = random.integers(0, 60, (36, 40, 3))
        Image.fromarray((noise + level).astype(np.uint8)).save(path)

    for kind, level in (("bright", 180), ("dark", 10)):
        for name in ("photos", "more_photos", "imagenet", "trusted", "uploads"):
            for number in range(20):
                picture(folder / name / kind / f"{number}.png", level)
    for name in ("new_pictures/a.png", "new/b.png", "one_more.jpg", "picture.jpg"):
        picture(folder / name, 180)
    torch.save(_authors_state(), folder / "inceptionnext_tiny.pth")
    return folder


def _authors_state() -> dict[str, torch.Tensor]:
    from convatlas import create_model

    state = create_model("inceptionnext_tiny").state_dict()
    return {key.replace(".layer_scale.gamma", ".gamma"): value for key, value in state.items()}


# What makes a command of the README small: other settings follow, and the last one counts.
SMALL = ["--epochs", "2", "--image_size", "32", "--batch_size", "8", "--workers", "0", "--warmup_epochs", "0"]
SMALLER = ["--cooldown_epochs", "0", "--accumulate", "1", "--precision", "32"]
SHORT_DESIGN = {"deepmad": ["--params", "1e6", "--flops", "1e8", "--rho", "1", "--candidates", "50"]}
TINY = ["--options", '{"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "branch_ratio": 0.125}']


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in SHOWN if line.values[0].startswith("convatlas")])
def test_commands_run(line, small_world, monkeypatch, capsys):
    monkeypatch.chdir(small_world)
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    _, verb, *words = shlex.split(line)
    if verb == "reproduce":
        assert catalog.card(words[0]).available
        return
    if verb == "bench" and words:
        assert words[0] in catalog.benchmarks()
        return
    if verb in ("inspect", "export") and "runs/photos" not in words:
        words += ["--size", "64,64"]  # the last one counts
    if verb == "compare":
        words = [word.replace("digits", "photos/") for word in words] + SMALL
    if verb == "spectrogram":
        _write_sound(small_world / words[0])
    if verb == "train" and words[0] == "camouflage":
        words += ["--size", "[12, 12]", "--run", f"runs/{uuid.uuid4().hex}"]
    elif verb == "train" and "--resume" not in words and "--config" not in words:
        words = [word for word in words if word != "published"]
        words = [word for word in words if word != "--weights"] + SMALL + SMALLER + TINY
        if "--run" in words:
            words[words.index("--run") + 1] = f"runs/{uuid.uuid4().hex}"
    if verb == "pretrain":
        words += [*SMALL, "--image_size", "64", "--options", '{"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}']
        words += ["--methods", '{"spark": {"decoder_width": 32}}', "--run", f"runs/{uuid.uuid4().hex}"]
    if verb == "design" and "--out" in words:
        words += SHORT_DESIGN[words[0]]
        words[words.index("--out") + 1] = f"runs/{uuid.uuid4().hex}"
    for word in words:
        if word.startswith("designs/"):
            _design_once(small_world / Path(*Path(word).parts[:2]))
    if verb == "train" and any(word.endswith("train.yaml") for word in words):
        words += [*SMALL, "--run", f"runs/{uuid.uuid4().hex}"]
    words = [word.replace("runs/x", "runs/photos") for word in words]
    if "runs/photos" in " ".join(words):
        _train_once(small_world)
    if verb != "train" or words[0] != "camouflage":
        _calibrate_once(small_world, words)
    # What looks like an attack ends a prediction with 3.
    expected = (0, 3) if "camouflage" in line and verb == "predict" else (0,)
    assert main([verb, *words]) in expected, capsys.readouterr().err


def _design_once(folder: Path) -> None:
    method = {"small": "deepmad"}[folder.name]
    if not (folder / "report.html").is_file():
        assert main(["design", method, "--out", str(folder), *SHORT_DESIGN[method]]) == 0


def _calibrate_once(folder: Path, words: list[str]) -> None:
    if any("runs/camouflage" in word for word in words) and not (folder / "runs" / "camouflage").is_dir():
        options = ["--data", "trusted/", "--size", "[12, 12]", "--run", "runs/camouflage"]
        assert main(["train", "camouflage", *options]) == 0


def _write_sound(path: Path) -> None:
    pytest.importorskip("soundfile")
    from convatlas.data.audio import write_audio

    write_audio(path, 0.1 * np.sin(np.arange(44100) / 20), 22050)


def _train_once(folder: Path) -> None:
    if not (folder / "runs" / "photos" / "report.html").is_file():
        assert main(["train", "recognition", "--data", "photos/", "--run", "runs/photos", *SMALL, *TINY]) == 0
