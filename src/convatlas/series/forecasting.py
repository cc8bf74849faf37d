"""The task of forecasting: any CSV with dates, one or many series, any model, measured by rolling origins.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self

import numpy as np
import torch

from convatlas.data.time_series import Decimal, SeriesSet, read_series
from convatlas.errors import CheckpointError, DataError, Interrupted, Unsupported, unknown
from convatlas.files import atomic_path, write_text
from convatlas.report import Cell, Files, Lines, Report, Section, Table
from convatlas.series.metrics import coverage, smape
from convatlas.series.models import MODELS
from convatlas.series.pipeline import Embedding, ForecastPipeline, MultiStep, fit_all
from convatlas.series.reports import (
    LEVELS,
    SeriesResult,
    chaos_section,
    comparison_sections,
    quality_sections,
    stock_section,
)
from convatlas.series.state_space import Calendar, natural_calendar
from convatlas.training.measure import provenance
from convatlas.training.run import Run, check_same_settings, from_mapping, to_mapping
from convatlas.training.settings import Training
from convatlas.training.task import Task
from convatlas.weights import read_checkpoint

__all__ = ["Forecasting"]

#: Models that training settings apply to.
_NETWORKS = ("lstm", "cnn", "cnn_lstm", "unireplknet")
#: Origins of one series at which it is tested, about and at most, unless the stride is given.
_ORIGINS = 2000
#: Shares of times at which a stock meets the demand, beside the one that is asked for.
_SERVICES = (0.5, 0.8, 0.9, 0.95, 0.99)
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
        date_column, value_columns, id_column, date_format, decimal: of the file; the first column holds the dates and
            all others with numbers are series when left out, and decimals follow a point.
        horizon: steps ahead.
        multi_step: how a model on a table of lags foretells more than one step: ``recursive``, by its own forecasts, or
            ``direct``, by a model for each step.
        period: length of the season; from the grid of the dates when left out.
        calendar: features of the target's time: ``dow``, ``hour``, ``month``, ``month_start``, ``holidays``; when left
            out, the weekday of days, the hour too of shorter steps, the month of longer ones.
        holidays: days, e.g. ``[2026-11-08]``.
        embedding: lags by chaos test (``auto``), of the state space (``chaos``), plain (``lags``), the last (``none``).
        tau, m: delay and number of lags, instead of what is found.
        zeros: ``keep`` them, or ``impute`` them like missing values, as of a machine out of service.
        test_fraction: share of the times, the last ones, that is held out.
        test_points: how many times are held out, instead of a share.
        stride: steps from one origin to the next; when left out 1, or as many as make some 2,000 origins of a long
            series. A multiple of the season would show each step ahead at one place of it alone.
        val_fraction: share of the other times for early stopping, selection and the intervals.
        level: share of the values that should lie in their interval.
        service: share of the times at which a stock is to meet the demand, e.g. 0.95: forecasts then come with that
            stock, and the report with what it leaves over and lacks.
        max_points: of a longer series the last values are learned from.
        unfit: what to do with a series that cannot be forecast, e.g. a constant one: ``refuse`` the file, or
            ``leave_out`` that series and say so.
        jobs: processes that fit series; -1 for one on each core. Small networks train as one instead.
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
    decimal: Decimal = "."
    horizon: int = 1
    multi_step: MultiStep = "recursive"
    period: int | None = None
    calendar: tuple[Calendar, ...] | None = None
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
    service: float | None = None
    max_points: int = 10_000
    unfit: Literal["refuse", "leave_out"] = "refuse"
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise unknown("forecasting model", self.model, MODELS)
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")
        if self.service is not None and not 0 < self.service < 1:
            raise ValueError(f"service must be between 0 and 1, got {self.service}")
        for name in ("test_points", "stride"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.jobs < 1 and self.jobs != -1:
            raise ValueError(f"jobs must be at least 1, or -1 for all cores, got {self.jobs}")
        self._pipeline(0, {}, 1, "1 D")  # its checks
        self.pipelines: dict[str, ForecastPipeline] = {}
        self.results: list[SeriesResult] = []
        self.unusable: dict[str, str] = {}

    def _pipeline(self, seed: int, options: Mapping[str, Any], period: int, step: str) -> ForecastPipeline:
        return ForecastPipeline(
            self.model,
            horizon=self.horizon,
            multi_step=self.multi_step,
            period=self.period or period,
            calendar=natural_calendar(step) if self.calendar is None else self.calendar,
            holidays=self.holidays,
            embedding=self.embedding,
            tau=self.tau,
            m=self.m,
            zeros=self.zeros,
            max_points=self.max_points,
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
        form = {"date_format": self.date_format, "decimal": self.decimal}
        return read_series(source, **columns, **form)  # type: ignore[arg-type]

    def _one(self, data: SeriesSet, index: int) -> tuple[Any, Any]:
        """Times and values of a series from its first known value to its last; missing ones are NaN."""
        times, values = data.one(index)
        if self.zeros == "impute":
            known = np.flatnonzero(np.nan_to_num(values))
            if not len(known):
                raise DataError("all values are zero or missing")
            times, values = times[known[0] :], values[known[0] :]
        return times, values

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
            report = self._report()
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
        self.pipelines, self.results, self.unusable = {}, [], {}
        fresh: dict[str, ForecastPipeline] = {}
        train: dict[str, Any] = {}
        for index, name in enumerate(data.names):
            try:
                times, values = self._one(data, index)
                first = self._first(len(values))
            except DataError as error:
                self._refuse(name, error)
                continue
            fresh[name] = self._pipeline(training.seed, options, data.period, data.step)
            train[name] = values[:first], times[:first]
        with _negative_allowed():
            found = fit_all(fresh, train, data.step, self.jobs)
        for name, fitted in found.items():
            try:
                if isinstance(fitted, DataError):
                    raise fitted
                index = data.names.index(name)
                result = self._result(data, index, self._first(len(self._one(data, index)[1])), fitted)
            except DataError as error:
                self._refuse(name, error)
                continue
            self.pipelines[name] = fitted
            self.results.append(result)
        if not self.results:
            raise self._nothing()

    def _refuse(self, name: str, error: DataError) -> None:
        if self.unfit == "refuse":
            raise DataError(f"series {name}: {error} (unfit: leave_out goes on without it)") from None
        self.unusable[name] = str(error)

    def _nothing(self) -> DataError:
        name, reason = next(iter(self.unusable.items()))
        return DataError(f"no series can be forecast; {name}: {reason}")

    def _first(self, count: int) -> int:
        held = self.test_points or round(self.test_fraction * count)
        if held < self.horizon or held >= count:
            raise DataError(f"{held} of {count} values held out do not fit horizon {self.horizon}")
        return count - held

    def _result(self, data: SeriesSet, index: int, first: int, pipeline: ForecastPipeline) -> SeriesResult:
        name, (times, values) = data.names[index], self._one(data, index)
        stride = self.stride or _stride(len(values) - self.horizon + 1 - first, data.period)
        with _negative_allowed():
            forecast, actual = pipeline.rolling(values, times, first, stride)
            forecasts = {self.model: forecast}
            for naive in [name for name in ("seasonal_naive", "naive") if name != self.model]:
                forecasts[naive] = pipeline.naive(naive, values, times, first, stride)
        if np.isnan(actual).all():
            raise DataError("none of its held-out values is known")
        unknown_values = np.isnan(values) | ((values == 0) & (self.zeros == "impute"))
        end = first + stride * (len(actual) - 1) + self.horizon
        low, high = pipeline.interval(forecast)
        services = () if self.service is None else sorted({*_SERVICES, self.service})
        return SeriesResult(
            name,
            values[:first],
            actual,
            forecasts,
            low,
            high,
            stride,
            calibration=[coverage(actual, *pipeline.interval(forecast, level)) for level in LEVELS],
            stock={share: forecast + pipeline.quantile(share) for share in services},
            filled=int(unknown_values.sum()),
            imputed=int(unknown_values[first:end].sum()),
            negative=int((values < 0).sum()),
            unused=max(0, first - self.max_points),
            analysis=pipeline.analysis,
        )

    def _report(self) -> Report:
        error = float(np.mean([result.error(self.model) for result in self.results]))
        naive = float(np.mean([result.error("seasonal_naive") for result in self.results]))
        summary = f"{self.model}: SMAPE {error:.4g} %, seasonal naive {naive:.4g} %, {len(self.results)} series."
        if total := sum(result.filled for result in self.results):
            held = sum(result.imputed for result in self.results)
            summary += f" {total} missing values were filled from the seasons before; {held} held-out ones of them"
            summary += " are left out of all measures."
        if self.unusable:
            summary += f" {len(self.unusable)} series were left out."
        sections = quality_sections(self.results, self.level)
        if self.service is not None:
            sections.append(stock_section(self.results))
        sections.append(chaos_section(self.results))
        if self.unusable:
            rows: list[list[Cell]] = [[name, reason] for name, reason in self.unusable.items()]
            sections.append(Section("Left out", [Table("Series that cannot be forecast", ["series", "why"], rows)]))
        return Report(f"Forecasting by {self.model}", summary, sections, provenance())

    def evaluate(self, data: str | Path | None = None, *, folder: str | Path | None = None) -> Report:
        """Measure on the held-out part; of other data, with series of the same names, on all but the first values."""
        given = self._read(data if data is not None else self.data)
        self.results, self.unusable = [], {}
        for index, name in enumerate(given.names):
            try:
                values = self._one(given, index)[1]
                pipeline = self._trained(name, given.step)
                reach = max(pipeline.forecaster.reach, pipeline.period, 2)
                first = self._first(len(values)) if data is None else reach
                self.results.append(self._result(given, index, first, pipeline))
            except DataError as error:
                self._refuse(name, error)
        if not self.results:
            raise self._nothing()
        report = self._report()
        if folder is not None:
            report.save(folder)
        return report

    def _trained(self, name: str, step: str) -> ForecastPipeline:
        if name in self.pipelines:
            pipeline = self.pipelines[name]
        elif len(self.pipelines) == 1:
            pipeline = next(iter(self.pipelines.values()))
        else:
            raise DataError(f"no model was trained for it: {unknown('series', name, self.pipelines)}")
        if step != pipeline.step:
            raise DataError(f"the model was trained on steps of {pipeline.step}, got {step}")
        return pipeline

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
                try:
                    pipeline, (times, values) = self._trained(name, data.step), self._one(data, index)
                    with _negative_allowed():
                        foretold = pipeline.predict(series=values, dates=times)
                except DataError as error:
                    self._refuse(name, error)
                    continue
                stock = [] if self.service is None else [foretold.values + pipeline.quantile(self.service)]
                for row in zip(*foretold, *stock, strict=True):
                    time = str(row[0].astype("datetime64[D]") if not data.step.endswith("s") else row[0])
                    rows.append([name, time, *(float(value) for value in row[1:])])
                if not curves:
                    known, ahead = range(max(0, len(values) - 60), len(values)), len(values) + np.arange(self.horizon)
                    shown = name
                    curves = {"known": (known, values[known.start :]), self.model: (ahead, foretold.values)}
                    band = {self.model: (ahead.tolist(), foretold.low.tolist(), foretold.high.tolist())}
            if not rows:
                raise self._nothing()
            columns = ["series", "time", "forecast", "low", "high", *([] if self.service is None else ["stock"])]
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerows([columns, *rows])
            file = f"{Path(source).stem}_forecast.csv"
            if file in paths.values():
                raise DataError(f"two inputs would be written to {file}")
            write_text(target / file, text.getvalue())
            paths[f"forecast of {source}"] = file
            plot = Lines(f"What comes after {shown}", "position", "value", curves, bands=band)
            sections.append(Section(str(source), [Table("Forecast", columns, rows), plot]))
        sections.append(Section("Files", [Files("Forecasts", paths)]))
        report = Report(f"Forecasts by {self.model}", f"{len(inputs)} files.", sections, provenance())
        report.save(target)
        return report

    @classmethod
    def compare(cls, tasks: Mapping[str, Self], runs: Mapping[str, Run], folder: Path) -> Report:
        """One report on models that were fitted to the same series, with tests of their differences."""
        names = set.intersection(*({result.name for result in task.results} for task in tasks.values()))
        results = {label: [r for r in task.results if r.name in names] for label, task in tasks.items()}
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


@contextmanager
def _negative_allowed() -> Iterator[None]:
    """No warning for each series that holds values below 0: only demand has none, and its report counts them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ values are negative")
        yield


def _stride(origins: int, period: int) -> int:
    """The least stride that leaves at most `_ORIGINS` and meets every place of the season."""
    stride = max(1, -(-origins // _ORIGINS))
    while math.gcd(stride, period) > 1:
        stride += 1
    return stride
