"""The task of forecasting: any CSV with dates, one or many series, any model, measured by rolling origins.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self

import numpy as np
import torch

from convatlas.data.time_series import SeriesSet, read_series
from convatlas.errors import CheckpointError, DataError, Interrupted, Unsupported, unknown
from convatlas.files import atomic_path, write_text
from convatlas.report import Cell, Files, Lines, Report, Section, Table
from convatlas.series.metrics import smape
from convatlas.series.models import MODELS
from convatlas.series.pipeline import Embedding, ForecastPipeline
from convatlas.series.reports import SeriesResult, chaos_section, comparison_sections, quality_section
from convatlas.series.state_space import Calendar
from convatlas.training.measure import provenance
from convatlas.training.progress import progress
from convatlas.training.run import Run, check_same_settings, from_mapping, to_mapping
from convatlas.training.settings import Training
from convatlas.training.task import Task
from convatlas.weights import read_checkpoint

__all__ = ["Forecasting"]

#: Models that training settings apply to.
_NETWORKS = ("lstm", "cnn", "cnn_lstm", "unireplknet")
_USED = ("epochs", "batch_size", "lr", "patience", "seed")


@dataclass(kw_only=True, eq=False)
class Forecasting(Task):
    """Forecast series of a CSV file, each by a model of its own.

    Of the settings of the training only epochs, batch_size, lr, patience and seed are used, all but seed by networks.

    Attributes:
        data: CSV file, or ``cash_demand`` (simulated), ``sunspots``, ``co2`` or ``elnino``.
        model: ``naive``, ``seasonal_naive``, ``arima``, ``rf``, ``svr``, ``mlp``, ``grnn``, ``gmdh``, ``lstm``,
            ``cnn``, ``cnn_lstm`` or ``unireplknet``. The naive two are always measured beside it.
        options: of the model, e.g. ``{"n_estimators": 200}``; ``{"tune": true}`` searches a grid for a regressor.
        date_column, value_columns, id_column, date_format: of the file; the first column holds the dates and all others
            with numbers are series when left out.
        horizon: steps ahead.
        period: length of the season; from the grid of the dates when left out.
        calendar: features of the target's day: ``dow``, ``month``, ``month_start``, ``holidays``.
        holidays: days, e.g. ``[2026-11-08]``.
        embedding: lags by chaos test (``auto``), of the state space (``chaos``), plain (``lags``), the last (``none``).
        tau, m: delay and number of lags, instead of what is found.
        zeros: ``keep`` them, or ``impute`` them like missing values, as of a machine out of service.
        test_fraction: share of the times, the last ones, that is held out.
        test_points: how many times are held out, instead of a share.
        stride: steps from one origin to the next; the horizon when left out.
        val_fraction: share of the other times for early stopping, selection and the intervals.
        level: share of the values that should lie in their interval.
    """

    name: ClassVar[str] = "forecasting"
    verbs: ClassVar[tuple[str, ...]] = (*Task.verbs, "compare")
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 200, "batch_size": 32, "lr": 1e-3, "patience": 20}

    data: str
    model: str = "rf"
    options: dict[str, Any] = field(default_factory=dict)
    date_column: str = ""
    value_columns: tuple[str, ...] = ()
    id_column: str = ""
    date_format: str = ""
    horizon: int = 1
    period: int | None = None
    calendar: tuple[Calendar, ...] = ("dow",)
    holidays: tuple[str, ...] = ()
    embedding: Embedding = "auto"
    tau: int | None = None
    m: int | None = None
    zeros: Literal["keep", "impute"] = "keep"
    test_fraction: float = 0.2
    test_points: int | None = None
    stride: int | None = None
    val_fraction: float = 0.2
    level: float = 0.9

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise unknown("forecasting model", self.model, MODELS)
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")
        for name in ("test_points", "stride"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self._pipeline(0, {}, self.period or 1)  # its checks
        self.pipelines: dict[str, ForecastPipeline] = {}
        self.results: list[SeriesResult] = []

    def _pipeline(self, seed: int, options: Mapping[str, Any], period: int, model: str = "") -> ForecastPipeline:
        return ForecastPipeline(
            model or self.model,
            horizon=self.horizon,
            period=self.period or period,
            calendar=self.calendar,
            holidays=self.holidays,
            embedding=self.embedding,
            tau=self.tau,
            m=self.m,
            zeros=self.zeros,
            val_fraction=self.val_fraction,
            level=self.level,
            seed=seed,
            options=options,
        )

    @property
    def network(self) -> NoReturn:
        """There is none: a run holds one model for each series.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("a forecasting run holds a model for each series, no single network")

    def _read(self, source: str | Path) -> SeriesSet:
        columns = {"date_column": self.date_column, "value_columns": self.value_columns, "id_column": self.id_column}
        return read_series(source, **columns, date_format=self.date_format)  # type: ignore[arg-type]

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def fit(self, run: str | Path, training: Training | None = None, *, resume: bool = False) -> Report:
        """Fit a model for each series, forecast the held-out part, and write the run folder.

        A run that was stopped is done again from its beginning: the same seed gives the same.

        Raises:
            DataError: the data cannot be used.
            Unsupported: a training setting is given that no model here has a use for.
            FileExistsError: the folder is not empty and ``resume`` is off.
            Interrupted: the user stopped the run.
        """
        plain = Training(**self.defaults)
        training = training or plain
        idle = [name for name, value in vars(training).items() if name not in _USED and value != getattr(plain, name)]
        if idle:
            raise Unsupported(f"forecasting has no use for the settings {', '.join(idle)}; it uses {', '.join(_USED)}")
        settings = {**to_mapping(self), **to_mapping(training)}
        opened = Run.open(run) if resume else Run(run)
        if resume:
            check_same_settings(settings, opened.settings())
        else:
            opened.check_unused()
        data = self._read(self.data)
        if not resume:
            opened = Run.create(run, self.name, settings)
        try:
            self._fit_all(data, training)
            self.save(opened.best)
            report = self._report(data)
            report.save(opened.folder)
        except KeyboardInterrupt:
            how = f"go on with 'convatlas train {self.name} --resume {opened.folder}'"
            raise Interrupted(f"stopped; {how}", 130) from None
        except Exception:
            opened.withdraw()
            raise
        return report

    def _fit_all(self, data: SeriesSet, training: Training) -> None:
        options = dict(self.options)
        if self.model in _NETWORKS:
            how = {name: getattr(training, name) for name in ("epochs", "batch_size", "lr", "patience")}
            options = {**{name: value for name, value in how.items() if value is not None}, **options}
        self.pipelines, self.results = {}, []
        with progress("fitting", len(data.names)) as advance:
            for index, name in enumerate(data.names):
                times, values = data.one(index)
                first = self._first(len(values), name)
                pipeline = self._pipeline(training.seed, options, data.period)
                try:
                    pipeline.fit(values[:first], times[:first], data.step)
                except DataError as error:
                    raise DataError(f"series {name}: {error}") from None
                self.pipelines[name] = pipeline
                self.results.append(self._result(data, index, first))
                advance()

    def _first(self, count: int, name: str) -> int:
        held = self.test_points or round(self.test_fraction * count)
        if held < self.horizon or held >= count:
            raise DataError(f"series {name}: {held} of its {count} values held out do not fit horizon {self.horizon}")
        return count - held

    def _result(self, data: SeriesSet, index: int, first: int) -> SeriesResult:
        name, (times, values) = data.names[index], data.one(index)
        pipeline, stride = self.pipelines[name], self.stride or self.horizon
        forecast, actual = pipeline.rolling(values, times, first, stride)
        forecasts = {self.model: forecast}
        for naive in ("seasonal_naive", "naive"):
            if naive != self.model:
                other = self._pipeline(0, {}, data.period, naive).fit(values[:first], times[:first], data.step)
                forecasts[naive] = other.rolling(values, times, first, stride)[0]
        low, high = pipeline.interval(forecast)
        history = values[:first]
        return SeriesResult(name, history, actual, forecasts, low, high, stride, pipeline.analysis)

    def _report(self, data: SeriesSet) -> Report:
        error = float(np.mean([result.error(self.model) for result in self.results]))
        naive = float(np.mean([result.error("seasonal_naive") for result in self.results]))
        summary = f"{self.model}: SMAPE {error:.4g} %, seasonal naive {naive:.4g} %, {len(self.results)} series."
        gaps = data.gaps()
        if total := sum(gaps.values()):
            summary += f" {total} missing values were filled from the seasons before."
        sections = [quality_section(self.results, self.level), chaos_section(self.results, gaps)]
        return Report(f"Forecasting by {self.model}", summary, sections, provenance())

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure on the held-out part; of other data, with series of the same names, on all but the first values."""
        given = self._read(data if data is not None else self.data)
        self.results = []
        for index, name in enumerate(given.names):
            pipeline = self._trained(name)
            if given.step != pipeline.step:
                raise DataError(f"series {name} was trained on steps of {pipeline.step}, got {given.step}")
            count = len(given.one(index)[1])
            reach = max(pipeline.forecaster.reach, pipeline.period)
            self.results.append(self._result(given, index, self._first(count, name) if data is None else max(reach, 2)))
        report = self._report(given)
        if folder is not None:
            report.save(folder)
        return report

    def _trained(self, name: str) -> ForecastPipeline:
        if name in self.pipelines:
            return self.pipelines[name]
        if len(self.pipelines) == 1:
            return next(iter(self.pipelines.values()))
        raise DataError(f"no model was trained for the series: {unknown('series', name, self.pipelines)}")

    def predict(self, inputs: Sequence[str | Path], folder: str | Path) -> Report:
        """Foretell what comes after the series of each CSV file, and write ``FILE_forecast.csv`` for each."""
        target = Path(folder)
        paths: dict[str, str] = {}
        sections = []
        for source in inputs:
            data = self._read(source)
            rows: list[list[Cell]] = []
            curves: dict[str, Any] = {}
            for index, name in enumerate(data.names):
                pipeline, (times, values) = self._trained(name), data.one(index)
                if data.step != pipeline.step:
                    raise DataError(f"series {name} was trained on steps of {pipeline.step}, got {data.step}")
                foretold = pipeline.predict(series=values, dates=times)
                for row in zip(*foretold, strict=True):
                    time = str(row[0].astype("datetime64[D]") if not data.step.endswith("s") else row[0])
                    rows.append([name, time, *(float(value) for value in row[1:])])
                if index == 0:
                    known, ahead = range(max(0, len(values) - 60), len(values)), len(values) + np.arange(self.horizon)
                    curves = {"known": (known, values[known.start :]), self.model: (ahead, foretold.values)}
                    curves |= {"lower bound": (ahead, foretold.low), "upper bound": (ahead, foretold.high)}
            columns = ["series", "time", "forecast", "low", "high"]
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerows([columns, *rows])
            file = f"{Path(source).stem}_forecast.csv"
            if file in paths.values():
                raise DataError(f"two inputs would be written to {file}")
            write_text(target / file, text.getvalue())
            paths[f"forecast of {source}"] = file
            plot = Lines(f"What comes after {data.names[0]}", "position", "value", curves)
            sections.append(Section(str(source), [Table("Forecast", columns, rows), plot]))
        sections.append(Section("Files", [Files("Forecasts", paths)]))
        report = Report(f"Forecasts by {self.model}", f"{len(inputs)} files.", sections, provenance())
        report.save(target)
        return report

    @classmethod
    def compare(cls, tasks: Mapping[str, Self], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on models that were fitted to the same series, with tests of their differences."""
        results = {label: task.results for label, task in tasks.items()}
        best = min(results, key=lambda label: np.mean([smape(r.actual, r.forecasts[r.model]) for r in results[label]]))
        links = Files("Runs", {f"report of {label}": f"{label}/report.html" for label in runs})
        sections = [*comparison_sections(results), Section("Runs", [links])]
        return Report("Forecasting: models side by side", f"Least SMAPE: {best}.", sections, provenance())

    # -- save and load -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the settings, each training series and the weights of networks as safetensors; nothing is pickled."""
        from safetensors.torch import save_file

        if not self.pipelines:
            raise DataError("there is nothing to save: fit first")
        tensors = {
            f"{index}.{name}": tensor.contiguous()
            for index, pipeline in enumerate(self.pipelines.values())
            for name, tensor in pipeline.tensors().items()
        }
        described = {name: pipeline.described() for name, pipeline in self.pipelines.items()}
        told = {"task": self.name, "settings": to_mapping(self), "pipelines": described}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as part:
            save_file(tensors, part, metadata={"convatlas": json.dumps(told)})
        return target

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a fitted task back; models without weights are fitted again to their series, by the same seed.

        Raises:
            DataError: the folder is not a run, or the run was not finished.
            CheckpointError: the file was not written by this task.
        """
        path = Path(source)
        if path.is_dir():
            path = Run.open(path).best
            if not path.is_file():
                raise DataError(f"{source} is not finished; go on with 'convatlas train {cls.name} --resume {source}'")
        checkpoint = read_checkpoint(path)
        try:
            told = json.loads(checkpoint.metadata["convatlas"])
            task = from_mapping(cls, told["settings"])
            pipelines: Mapping[str, Any] = told["pipelines"]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} was not written by the task {cls.name}") from None
        tensors: Mapping[str, torch.Tensor] = next(iter(checkpoint.parts.values()))
        for index, (name, described) in enumerate(pipelines.items()):
            own = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == str(index)}
            task.pipelines[name] = ForecastPipeline.restore(described, own)
        return task
