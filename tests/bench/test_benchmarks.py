"""Every benchmark runs, in small, and reports ratios of results that were compared."""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import json
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from convatlas import catalog
from convatlas.bench import (
    atm_forecast,
    block_fusion,
    conv_tasnet,
    dcdm,
    decamouflage,
    deform_attention,
    deform_conv,
    depthwise,
    dilated_reparam,
    disgan,
    eca,
    fdconv,
    fft_conv,
    fourier_conv,
    hypercomplex,
    im2win,
    inception,
    log_chroma,
    networks,
    neural_operators,
    nnaudio,
    one_way,
    pixel_shuffle,
    ratio,
    scattering,
    sgconv,
    short_conv,
    simplex_fourier,
    spark,
    sparse,
    stdo,
    tract,
    transform_once,
    tvconv,
    wavelets,
    weighted_conv,
)
from convatlas.networks.registry import create_model
from convatlas.ops.im2win import ConvLayer
from convatlas.report import Report
from convatlas.restoration.video_chunks import PatchGrid

TINY = {"depths": (1, 1), "dims": (8, 16), "num_classes": 3, "preprocess": {"size": 64}}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {"WARM_UP": (0.0, 1), "SECONDS": (0.0, 0.0), "SAMPLE": (0.0, 0.0)}.items():
        monkeypatch.setattr(ratio, name, value)
    sizes = {
        fft_conv.LONG: [(1, 2, 64, 64)],
        fft_conv.BLOCKS: [(1, 2, 5000, 127)],
        fft_conv.MILLION: [(1, 1, 9000, 100)],
        fft_conv.GATED: [(1, 2, 64, 64)],
        fft_conv.CIRCULAR: [(1, 2, 64, 64)],
    }
    monkeypatch.setattr(fft_conv, "QUICK_SIZES", sizes)
    monkeypatch.setattr(neural_operators, "SPECTRAL", ((9, 3, 4),))
    monkeypatch.setattr(neural_operators, "LOCAL", ((16, 2, 0.25),))
    monkeypatch.setattr(neural_operators, "GRAPH", ((30, 2),))
    monkeypatch.setattr(neural_operators, "ATTENTION", ((12, 4),))
    monkeypatch.setattr(pixel_shuffle, "FACTORS", (2, 3))
    small = {"POINTS": (60, 60), "ROLLED": (1, 1), "SERIES": (2, 2), "ROWS": 32, "EPOCHS": 1, "DAYS": 120}
    for name, value in small.items():
        monkeypatch.setattr(atm_forecast, name, value)
    once = {"arima": {"order": [1, 0, 0]}, "rf": {"n_estimators": 2}, "unireplknet": {"epochs": 1, "length": 8}}
    once |= {name: {"epochs": 1} for name in ("lstm", "cnn", "cnn_lstm")}
    monkeypatch.setattr(atm_forecast, "QUICK", once)
    monkeypatch.setattr(block_fusion, "STAGES", ((8, 6),))
    monkeypatch.setattr(dcdm, "GRIDS", ((3, 4, 5),))
    monkeypatch.setattr(dcdm, "SIDES", (8,))
    monkeypatch.setattr(dcdm, "STEPS", 100)
    monkeypatch.setattr(dcdm, "LANCZOS_STEPS", 40)
    monkeypatch.setattr(dcdm, "VECTORS", 50)
    monkeypatch.setattr(conv_tasnet, "BLOCKS", (0.002, 0.01))
    monkeypatch.setattr(conv_tasnet, "SECONDS", 0.05)
    monkeypatch.setattr(conv_tasnet, "SIZE", (1, 4, 40))
    few = {"num_filters": 6, "bottleneck_channels": 4, "hidden_channels": 5, "skip_channels": 3, "num_blocks": 2}
    monkeypatch.setattr(conv_tasnet, "create_model", lambda name, **options: create_model(name, **few, **options))
    monkeypatch.setattr(deform_attention, "SIZES", (((3, 2), 2, 24),))
    monkeypatch.setattr(deform_conv, "SIZES", ((1, 4, 5), (1, 4, 4), (2, 6, 5)))
    monkeypatch.setattr(depthwise, "STAGES", ((4, 9), (3, 7)))
    monkeypatch.setattr(block_fusion, "SAMPLES", 1)
    monkeypatch.setattr(inception, "STAGES", ((24, 9), (16, 5), (8, 3)))
    monkeypatch.setattr(eca, "SIZES", ((1, 16, 9), (2, 8, 5), (1, 8, 4), (2, 16, 3), (2, 8, 3)))
    monkeypatch.setattr(fdconv, "SIZES", ((1, 8, 5, 4), (2, 8, 5, 2)))
    monkeypatch.setattr(fourier_conv, "SIZES", ((2, 1, 2, 9), (2, 2, 3, 11)))
    monkeypatch.setattr(dilated_reparam, "STAGES", ((8, 5), (4, 3)))
    for name in ("KERNEL_LENGTHS", "LAYER_LENGTHS"):
        monkeypatch.setattr(sgconv, name, (32, 64))
    monkeypatch.setattr(sgconv, "LONG", 64)
    monkeypatch.setattr(weighted_conv, "LAYERS", ((1, 4, 5), (2, 3, 4)))
    monkeypatch.setattr(weighted_conv, "NETWORKS", (("dncnn_weighted_k5", 1, 6), ("resnet18", 1, 32)))
    monkeypatch.setattr(tvconv, "SIZES", ((2, 4, 6), (1, 4, 5)))
    layers = {name: ConvLayer(2, 8, 3, 3, stride) for name, stride in (("Conv3", 2), ("Conv9", 1))}
    monkeypatch.setattr(im2win, "BENCHMARK_LAYERS", layers)
    monkeypatch.setattr(hypercomplex, "STAGES", ((8, 5), (4, 3)))
    monkeypatch.setattr(hypercomplex, "LAYER_BATCH", 2)
    monkeypatch.setattr(hypercomplex, "STEP_BATCH", 3)
    monkeypatch.setattr(
        hypercomplex, "create_model", lambda name, n: create_model(name, depths=(1, 1), widths=(12, 12), n=n)
    )
    monkeypatch.setattr(one_way, "SIZES", ((1, 4, 3, 6, 2, 1), (1, 64, 3, 4, 2, 1)))
    monkeypatch.setattr(one_way, "SURROGATE_BATCH", 1)
    monkeypatch.setattr(
        one_way, "create_model", lambda name, **options: create_model(name, widths=(4, 4), depth=1, **options)
    )
    small = {"depths": (1, 1), "widths": (4, 4), "stem_width": 4}
    monkeypatch.setattr(tract, "create_model", lambda name, **options: create_model(name, **options, **small))
    monkeypatch.setattr(tract, "BATCHES", (2,))
    monkeypatch.setattr(tract, "PATCH_BATCH", 1)
    thin = {"resnet50": {"widths": (8, 8)}, "convnext_tiny": {"dims": (8, 8)}}
    monkeypatch.setattr(
        spark, "create_model", lambda name, **options: create_model(name, depths=(1, 1), **options, **thin[name])
    )
    monkeypatch.setattr(spark, "SIDES", (64, 64))
    grids = {quick: (PatchGrid(1, 2), (6, 5)) for quick in (True, False)}
    monkeypatch.setattr(stdo, "GRIDS", grids)
    monkeypatch.setattr(stdo, "FOLDED", (1, 3, 6, 5))
    shallow = {"wdsr_x2": {"depth": 1, "dim": 4}, "espcn_x2": {"channels": 4}}
    monkeypatch.setattr(stdo, "create_model", lambda name, **options: create_model(name, **options, **shallow[name]))
    monkeypatch.setattr(sparse, "SIZES", ((8, 3, 0.2), (6, 2, 0.3)))
    monkeypatch.setattr(spark, "BATCH", 1)
    monkeypatch.setattr(decamouflage, "SIZES", ((24, 28), (20, 23)))
    monkeypatch.setattr(decamouflage, "WHOLE", ((24, 28),))
    monkeypatch.setattr(decamouflage, "NETWORK", 12)
    monkeypatch.setattr(log_chroma, "SIZES", ((9, 12), (8, 7)))
    monkeypatch.setattr(log_chroma, "BINS", (8, 16))
    monkeypatch.setattr(decamouflage, "COLUMNS", ((8, 3, 2), (9, 3, 2)))
    monkeypatch.setattr(disgan, "DENSE_SIZES", ((1, 2, 4), (2, 2, 3)))
    monkeypatch.setattr(disgan, "UNIT_SIZES", ((1, 2, 1, 4), (2, 1, 2, 6)))
    monkeypatch.setattr(wavelets, "SIZES", ((1, 2, 8), (2, 3, 6)))
    monkeypatch.setattr(wavelets, "LONG_SIZES", ((1, 2, 8), (2, 3, 6)))
    monkeypatch.setattr(scattering, "IMAGES", ((1, 1, 8, 1), (1, 1, 8, 2)))
    monkeypatch.setattr(scattering, "SIGNALS", ((1, 100, 1, 1), (2, 200, 2, 2)))
    monkeypatch.setattr(scattering, "VOLUMES", ((1, 4, 1, 1),))
    monkeypatch.setattr(short_conv, "TOKENS", ((1, 9, 6, 4), (2, 7, 4, 5)))
    monkeypatch.setattr(short_conv, "SIGNALS", ((1, 9, 6, 4),))
    monkeypatch.setattr(nnaudio, "CLIPS", (1, 0.5, 8000))
    octaves = {"hop_length": 64, "n_bins": 24, "fmin": 110}
    layers = {
        "STFT": {"n_fft": 128, "hop_length": 32, "output_format": "Magnitude"},
        "MelSpectrogram": {"n_fft": 256, "hop_length": 64, "n_mels": 16},
        **dict.fromkeys(("CQT1992v2", "CQT2010v2", "VQT"), octaves),
    }
    monkeypatch.setattr(nnaudio, "LAYERS", layers)
    monkeypatch.setattr(simplex_fourier, "TRIANGLES", ((3, 3, (4, 4, 4)), (5, 3, (4, 5))))
    monkeypatch.setattr(simplex_fourier, "POINTS", ((3, 1, (4, 4, 4)), (5, 1, (4, 5))))
    monkeypatch.setattr(transform_once, "SPECTRA", ((2, 3, 4), (1, 2, 3)))
    monkeypatch.setattr(transform_once, "NETWORKS", ((2, 8, 3, 4, 1), (1, 8, 3, 4, 1)))
    monkeypatch.setattr(transform_once, "GRIDS", ((1, 2, 8, 3), (1, 1, 9, 4)))
    monkeypatch.setattr(networks, "MODELS", ("inceptionnext_atto",))
    monkeypatch.setattr(networks, "create_model", lambda name: create_model(name, **TINY))


def ratios(report: Report) -> list[float]:
    document = json.loads(report.to_json())
    tables = [part for section in document["sections"] for part in section["parts"] if part["kind"] == "table"]
    return [
        row[table["columns"].index("ratio")] for table in tables if "ratio" in table["columns"] for row in table["rows"]
    ]


@pytest.mark.parametrize("name", catalog.benchmarks())
def test_it_runs_and_reports_ratios(name: str):
    module = importlib.import_module(catalog.bench_module(name))
    options: dict[str, Any] = {"models": networks.MODELS} if name == "networks" else {}
    report = module.run(threads=[1], quick=True, **options)
    assert ratios(report)
    assert all(value > 0 for value in ratios(report))
    assert [section.title for section in report.sections][-2:] == ["Memory", "How it was measured"]
    bars = getattr(module, "BARS", [])
    if bars:
        assert report.sections[0].title == "Bars"
        assert {claim.statement.removesuffix(" (1 thread)") for claim in report.claims} == {
            bar.statement for bar in bars
        }
    assert torch.cuda.is_available() or not any("GPU" in section.title for section in report.sections)
    assert "<html" in report.to_html()


@pytest.mark.parametrize("name", catalog.benchmarks())
def test_it_takes_threads_and_quick_by_name(name: str):
    signature = inspect.signature(importlib.import_module(catalog.bench_module(name)).run)
    assert {"threads", "quick"} <= set(signature.parameters)
    assert all(entry.kind is entry.KEYWORD_ONLY for entry in signature.parameters.values())
    assert catalog.benchmarks()[name].endswith(".")


def test_every_bar_names_cases_that_exist():
    for name in catalog.benchmarks():
        module = importlib.import_module(catalog.bench_module(name))
        for bar in getattr(module, "BARS", []):
            assert (bar.at_least is None) != (bar.kept_at_most is None), bar.statement


def test_both_sides_of_the_networks_are_seen():
    report = networks.run(threads=[1], models=["inceptionnext_atto"], batch=2)
    document = json.loads(report.to_json())
    tables = {part["title"]: part for section in document["sections"] for part in section["parts"] if "rows" in part}
    for what in ("Forward", "Forward and backward"):
        pairs = [tuple(row[1:3]) for row in tables[what]["rows"]]
        assert pairs == [pair for pair in networks.PAIRS if networks.THEIRS not in pair]
    with pytest.raises(ValueError, match="models must be one name or several, got none"):
        networks.run(models=[])
    with pytest.raises(ValueError, match="unknown model 'resnet19'"):
        networks.run(models=["resnet19"])


@pytest.mark.parametrize("fits", [True, False])
def test_timm_is_compared_with_where_its_weights_fit(monkeypatch: pytest.MonkeyPatch, fits: bool):
    fake = types.ModuleType("timm")
    fake.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    other = create_model("inceptionnext_atto", **TINY)
    fake.is_model = lambda name: name == "inception_next_atto"  # type: ignore[attr-defined]
    fake.create_model = lambda name: other if fits else nn.Linear(2, 2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    report = networks.run(threads=[1], quick=True, models=["inceptionnext_atto"])
    text = report.to_json()
    assert ('"timm"' in text) is fits
    assert "timm is not installed" not in text
