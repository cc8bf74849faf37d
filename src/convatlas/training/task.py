"""What every task can do, and the template of those that are trained by gradients."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from convatlas.catalog import TASKS
from convatlas.errors import CheckpointError, DataError, Interrupted, Unsupported, unknown
from convatlas.report import Report
from convatlas.surgery import place_layer
from convatlas.training.method import Together, make_methods
from convatlas.training.run import Run, check_same_settings, from_mapping, to_mapping
from convatlas.training.sampling import seed_everything
from convatlas.training.settings import MOVABLE, Training
from convatlas.weights import load_weights, read_checkpoint, save_weights

__all__ = ["GradientTask", "Task", "is_helper", "open_task", "seed_everything", "split_settings"]


class Task(ABC):
    """A job on a user's data: fit, evaluate, predict, save, load.

    A concrete task is a dataclass whose fields are its settings.
    """

    #: The name on the command line.
    name: ClassVar[str]
    #: Verbs of the command line that the task serves.
    verbs: ClassVar[tuple[str, ...]] = ("train", "evaluate", "predict")
    #: Settings of the training that suit the task better than the general ones.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: By verb, the dataclass of what ``evaluate`` and ``predict`` may be told as ``options``, on the command line too.
    verb_options: ClassVar[Mapping[str, type[Any]]] = {}
    #: What ``convatlas predict`` ends with: not 0 where what was found is an alarm.
    exit_code: int = 0

    @abstractmethod
    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Learn from the training data, write a run folder and report on it."""

    @abstractmethod
    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure the quality on held-out data, or on ``data``; write the report to ``folder`` if it is given."""

    @abstractmethod
    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Predict for the user's files and write the results to ``folder``."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write what `load` needs into one file."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path) -> Self:
        """Read a trained task back from a run folder or from the file that `save` wrote."""

    @classmethod
    def recipes(cls) -> dict[str, Path]:
        """Published training recipes by name: YAML files of settings in the folder ``recipes`` beside the task.

        A task that shares its room with others may have a folder of its name in there.
        """
        folder = Path(str(resources.files(cls.__module__.rpartition(".")[0]))) / "recipes"
        folder = folder / cls.name if (folder / cls.name).is_dir() else folder
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

    @classmethod
    def recipe(cls, name: str) -> Path:
        """The file of one recipe.

        Raises:
            UnknownName: there is no such recipe.
        """
        recipes = cls.recipes()
        if name not in recipes:
            raise unknown(f"recipe of {cls.name}", name, recipes)
        return recipes[name]

    @classmethod
    def require(cls, verb: str) -> None:
        """Refuse a verb that the task does not serve.

        Raises:
            Unsupported: in one sentence.
        """
        if verb not in cls.verbs:
            raise Unsupported(f"the task {cls.name} has no verb {verb!r}; it has {', '.join(cls.verbs)}")


class GradientTask(Task):
    """A task whose network is trained by gradient descent.

    A subclass gives the data, the losses and the metrics; `fit` does the rest through Lightning: precision,
    accumulation, clipping, averaging, checkpoints, resuming.
    """

    verbs: ClassVar[tuple[str, ...]] = (*Task.verbs, "compare")
    #: The validation metric that chooses the best epoch, and whether more or less of it is better.
    monitor: ClassVar[tuple[str, Literal["max", "min"]]]
    #: Whether a step may leave parameters without a gradient, as those of a branch that it skips.
    unused_parameters: ClassVar[bool] = False
    #: Those measures of `quality` of which less is better.
    smaller_is_better: ClassVar[tuple[str, ...]] = ()

    #: Name of a layer of the library to put into the network, and options of it; settings of the tasks that offer it.
    layer: str = ""
    layer_options: Mapping[str, Any] = MappingProxyType({})
    #: Where it was put, in words.
    placed: str = ""

    network: nn.Module
    #: Items are read by (index, seed) pairs. A method ``order(epoch, generator)``, where there is one, gives the
    #: indices of an epoch, as many as the set's length says.
    train_set: Dataset[Any]
    #: Items are read by index.
    val_set: Dataset[Any]

    @abstractmethod
    def prepare(self) -> None:
        """Read the data and build the network: sets ``train_set``, ``val_set`` and ``network``."""

    @abstractmethod
    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a training batch; ``"loss"`` is the one that is minimised. Empty for a batch without samples."""

    @abstractmethod
    def metrics(self) -> nn.Module:
        """A fresh torchmetrics ``MetricCollection`` for validation."""

    @abstractmethod
    def score(self, batch: dict[str, Any], metrics: Any) -> None:
        """Update the metrics with a validation batch."""

    @abstractmethod
    def report(self, run: Run) -> Report:
        """What a user wants to see of a finished run."""

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, Any]] | None:
        """How samples become a batch; None is torch's own way."""
        return None

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """What the network takes for a batch of samples, on its device; by default what the network itself tells.

        Raises:
            Unsupported: it tells nothing.
        """
        if not callable(getattr(self.network, "example_inputs", None)):
            raise Unsupported(f"{type(self.network).__name__} tells no example input, and neither does {self.name}")
        device = next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))
        inputs: tuple[Any, ...] = self.network.example_inputs(batch)  # type: ignore[operator]
        moved: tuple[Any, ...] = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
        return moved

    @torch.inference_mode()
    def quality(self) -> dict[str, float]:
        """How good the trained network is on held-out data; the first measure ranks when networks are compared.

        By default the validation metric that chooses the best epoch. Units stand in brackets: ``"PSNR [dB]"``.
        """
        device = next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))
        self.network.eval()
        metrics: Any = self.metrics().to(device)
        for batch in DataLoader(self.val_set, batch_size=64, collate_fn=self.collate):
            self.score(tree_map_only(Tensor, lambda tensor: tensor.to(device), batch), metrics)
        return {self.monitor[0].removeprefix("val_"): float(metrics.compute()[self.monitor[0]])}

    def better(self, measure: str) -> Literal["max", "min"]:
        """Whether more or less of a measure of `quality` is better."""
        monitored, mode = self.monitor
        if measure == monitored.removeprefix("val_"):
            return mode
        return "min" if measure in self.smaller_is_better else "max"

    @classmethod
    def compare(cls, tasks: Mapping[str, Self], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on several networks that were trained on the same data under the same budget."""
        from convatlas.training.comparison import comparison_report

        return comparison_report(tasks, runs, folder)

    def described(self) -> dict[str, Any]:
        """What is needed beside the settings to use the trained network, as plain data; stored with the weights."""
        return {}

    def restore(self, described: Mapping[str, Any]) -> None:
        """Put back what `described` gave and build ``network``, whose weights are loaded next.

        Raises:
            Unsupported: the task does not say how.
        """
        raise Unsupported(f"the task {self.name} cannot be read back")

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Train, keep the best epoch in the network, and write the run folder.

        Args:
            run: folder of the run; new, unless ``resume``.
            training: settings of the training; the task's ``defaults`` when left out.
            resume: go on with an interrupted run; the settings must be those it was started with, but for those of
                where it runs (`MOVABLE`). A finished run gets its report again.

        Returns:
            The report, also written as ``report.html`` and ``report.json``.

        Raises:
            DataError: the data cannot be used, or ``resume`` is asked of a folder that is not a run.
            SettingsError: ``resume`` is asked with other settings than those of the run.
            FileExistsError: the folder is not empty and ``resume`` is off.
            Interrupted: the user stopped the run; its state is saved.
            OSError: a file cannot be written; what was written before is whole.
        """
        from convatlas.training.fit import fit

        training = training or Training(**self.defaults)
        seed_everything(training.seed)
        method = Together(make_methods(training.methods))
        settings = {**to_mapping(self), **to_mapping(training)}
        if is_helper():  # the first process sees to the folder and to the report
            self._follow(Run(run), training, method)
        if resume:
            opened = Run.open(run)
            earlier = opened.settings()
            check_same_settings({name: settings[name] for name in settings.keys() - set(MOVABLE)}, earlier)
            if any(earlier.get(name) != settings[name] for name in MOVABLE):
                opened.write_settings(self.name, settings)
        else:
            opened = Run(run)
            opened.check_unused()  # before the data are read, which may take long
        self._make_ready(training, method)
        how = f"go on with 'convatlas train {self.name} --resume {opened.folder}'"
        try:
            if not resume:
                opened = Run.create(run, self.name, settings)
            fit(self, opened, training, method)
            report = self.report(opened)
            report.save(opened.folder)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {how}", 130) from None
        except Interrupted:
            raise
        except OSError as error:
            opened.withdraw()
            what = f"{error.strerror or error}; {how}" if opened.config.exists() else error.strerror or str(error)
            raise OSError(error.errno, what, error.filename or str(opened.folder)) from error
        except Exception:
            opened.withdraw()
            raise
        return report

    def _make_ready(self, training: Training, method: Together) -> None:
        seed_everything(training.seed)  # again: whether methods have drawn numbers does not change the network
        self.prepare()
        self._place_layer()
        self.network = method.prepare(self.network)

    def _place_layer(self) -> None:
        if not self.layer:
            return
        placed = place_layer(self.network, self.layer, inplace=True, **self.layer_options)
        self.network = placed.model
        self.placed = f"{self.layer} at {len(placed.changed)} places: {', '.join(placed.changed)}"
        if placed.skipped:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in placed.skipped)
            self.placed += f". Left as they are: {reasons}"

    def _follow(self, run: Run, training: Training, method: Together) -> NoReturn:
        """Do the part of a further process of a run, and end."""
        from convatlas.training.devices import end_with_parent
        from convatlas.training.fit import fit

        end_with_parent()
        logging.getLogger("convatlas").setLevel(logging.ERROR)  # the first process tells what all of them see
        try:
            self._make_ready(training, method)
            fit(self, run, training, method)
        except (Interrupted, KeyboardInterrupt) as stopped:
            raise SystemExit(getattr(stopped, "exit_code", 130)) from None
        except Exception:
            time.sleep(3)  # the first process, if it has met the same, tells it and ends this one
            raise
        raise SystemExit(0)

    def save(self, path: str | Path) -> Path:
        """Write the weights with everything that is needed to use them, as safetensors."""
        described = {"task": self.name, "settings": to_mapping(self), **self.described()}
        return save_weights(self.network, path, metadata={"convatlas": json.dumps(described)})

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a trained task back from a run folder or from the file that `save` wrote.

        Raises:
            DataError: the folder is not a run, or has no finished epoch yet.
            CheckpointError: the file was not written by this task.
        """
        path = Path(source)
        if path.is_dir():
            path = Run.open(path).best
            if not path.is_file():
                raise DataError(
                    f"{source} has no finished epoch yet; go on with 'convatlas train {cls.name} --resume {source}'"
                )
        try:
            described: Mapping[str, Any] = json.loads(read_checkpoint(path).metadata["convatlas"])
            task = from_mapping(cls, described["settings"])
            task.restore(described)
            task._place_layer()
        except (KeyError, TypeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} was not written by the task {cls.name}") from None
        load_weights(task.network, path)
        task.network.eval()
        return task


def is_helper() -> bool:
    """Whether Lightning (or torchrun) has started this process for one more device of a run."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("LOCAL_RANK", "NODE_RANK", "RANK"))


def open_task(source: str | Path) -> Task:
    """Load the trained task of a run folder."""
    from convatlas.catalog import resolve

    name = Run.open(source).settings()["task"]
    if name not in TASKS:
        raise unknown("task", str(name), TASKS)
    task: Task = resolve(TASKS[name]).load(source)
    return task


def split_settings(cls: type[Any], values: Mapping[str, Any]) -> tuple[Any, Training]:
    """Build a task and its training settings from the flat mapping in a run's ``config.yaml``."""
    training = {entry.name for entry in dataclasses.fields(Training)}
    task = {key: value for key, value in values.items() if key not in training and key != "task"}
    return from_mapping(cls, task), from_mapping(Training, {key: values[key] for key in training if key in values})
