"""Scattering as layers: results in three forms, what they tell of themselves, types, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from convatlas import load_weights
from convatlas.nn.scattering import KYMATIO_LAYOUT, HarmonicScattering3D, Scattering1D, Scattering2D

LAYERS = {
    "1-D": lambda **options: Scattering1D(2, 64, 2, **options),
    "2-D": lambda **options: Scattering2D(2, (9, 12), 3, **options),
    "3-D": lambda **options: HarmonicScattering3D(1, (5, 4, 4), 1, **options),
}


@pytest.fixture(autouse=True)
def _short_signals():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "J=.* reach beyond what reflection can put", UserWarning)
        yield


@pytest.mark.parametrize("name", ["1-D", "2-D"])
def test_results_in_three_forms(name: str):
    layer = LAYERS[name]()
    x = torch.randn(2, 3, *layer.shape)
    y, meta = layer(x), layer.meta()
    assert y.shape == (2, 3, *layer.output_size())
    listed, named = LAYERS[name](out_type="list")(x), LAYERS[name](out_type="dict")(x)
    assert list(named) == meta["key"] == meta["n"]
    for number, (entry, key) in enumerate(zip(listed, named, strict=True)):
        torch.testing.assert_close(entry["coef"], y.select(2, number))
        torch.testing.assert_close(named[key], entry["coef"])
        assert {name: entry[name] for name in meta} == {name: values[number] for name, values in meta.items()}
        assert entry["order"] == len(key) == len(entry["j"])
    assert all(path[1] > path[0] for path in meta["j"] if len(path) == 2)


def test_without_average_every_path_has_its_stride():
    x = torch.randn(3, 40)
    layer = Scattering1D(3, 40, 2, T=0, out_type="dict")
    parts, meta = layer(x), layer.meta()
    torch.testing.assert_close(parts[()], x)
    for key, scales in zip(meta["key"][1:], meta["j"][1:], strict=True):
        assert parts[key].shape == (3, -(-40 // 2 ** scales[-1]))
    assert sum(part.shape[-1] for part in parts.values()) == layer.output_size()[0]


def test_global_average_is_the_sum():
    x = torch.rand(64, dtype=torch.float64)
    layer = Scattering1D(3, 64, T="global")
    assert layer(x).shape == layer.output_size() == (len(layer.meta()["key"]), 1)
    torch.testing.assert_close(layer(x)[0], torch.nn.functional.pad(x[None, None], (32, 32), "reflect")[0].sum(1))


def test_stride_keeps_more_samples():
    x = torch.randn(64, dtype=torch.float64)
    fine, coarse = Scattering1D(4, 64, stride=4)(x), Scattering1D(4, 64)(x)
    assert fine.shape[-1] == 16
    torch.testing.assert_close(fine[0, ::4], coarse[0])
    torch.testing.assert_close(fine[1:, ::4], coarse[1:], rtol=0.05, atol=0.02)  # moduli are kept at another stride


def test_images_with_margins_of_their_own():
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    layer, ready = Scattering2D(2, (9, 12), 2), Scattering2D(2, (9, 12), 2, pre_pad=True)
    height, width = ready.padded
    margins = ((width - 12) // 2, (width - 12 + 1) // 2, (height - 9) // 2, (height - 9 + 1) // 2)
    torch.testing.assert_close(ready(nn.functional.pad(x, margins, "reflect")), layer(x))


def test_scale_of_the_whole_image():
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    assert Scattering2D(3, (8, 8), 2)(x).shape == (1, 1 + 6 + 12, 1, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_types(name: str):
    layer = LAYERS[name]()
    x = torch.rand(2, *layer.shape, dtype=torch.float64)
    exact = layer(x)
    assert exact.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02)):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert (y.double() - exact).norm() < tolerance * exact.norm()
    assert not layer.state_dict()
    assert not list(layer.parameters())
    # Filters are cast from the exact ones, whatever was done to the layer.
    torch.testing.assert_close(copy.deepcopy(layer).half()(x), exact)
    torch.testing.assert_close(layer.half()(x.float()), LAYERS[name]()(x.float()))
    torch.testing.assert_close(layer.double()(x), exact)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_go_through_disk_and_export(name: str, tmp_path: Path):
    layer = Scattering1D(1, 16) if name == "1-D" else LAYERS[name]()
    x = torch.rand(2, *layer.shape)
    torch.save(layer, tmp_path / "layer.pt")
    torch.testing.assert_close(torch.load(tmp_path / "layer.pt", weights_only=False)(x), layer(x))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_filters_of_kymatio_are_dropped_from_checkpoints():
    class Hybrid(nn.Module):
        layouts = {"kymatio": KYMATIO_LAYOUT}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.scattering = Scattering2D(1, (4, 4), 2)
            self.head = nn.Linear(12, 2)

    weights = {"head.weight": torch.randn(2, 12), "head.bias": torch.randn(2)}
    filters = {f"scattering.tensor{k}": torch.randn(8, 8, 1) for k in range(3)}
    filters["scattering.tensor_gaussian_filter"] = torch.randn(2)
    model = Hybrid()
    load_weights(model, {**weights, **filters})
    torch.testing.assert_close(model.head.weight.data, weights["head.weight"])


def test_odd_volumes_on_the_grid_of_kymatio():
    x = torch.rand(5, 4, 3, dtype=torch.float64)
    ours, theirs = (HarmonicScattering3D(1, (5, 4, 3), 1, legacy_grid=legacy)(x) for legacy in (False, True))
    assert (ours - theirs).norm() > 0.01 * ours.norm()
    even = torch.rand(4, 4, 4)
    torch.testing.assert_close(
        HarmonicScattering3D(1, (4, 4, 4), 1, legacy_grid=True)(even), HarmonicScattering3D(1, (4, 4, 4), 1)(even)
    )


def test_trains_in_front_of_a_classifier():
    model = nn.Sequential(Scattering2D(1, (8, 8), 2), nn.Flatten(), nn.Linear(5 * 16 - 32, 3))
    x = torch.randn(4, 8, 8, requires_grad=True)
    assert LAYERS["2-D"]().output_size() == (1 + 6 + 9, 2, 3)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_they_show_their_options():
    assert repr(LAYERS["1-D"]()) == "Scattering1D(J=2, shape=(64,), Q=(2, 1), T=None)"
    assert repr(LAYERS["2-D"]()) == "Scattering2D(J=2, shape=(9, 12), L=3)"
    assert repr(LAYERS["3-D"]()) == "HarmonicScattering3D(J=1, shape=(5, 4, 4), L=1)"
    assert LAYERS["3-D"]().meta() == {"order": [1, 1, 2], "j": [(0,), (1,), (0, 1)], "key": [(0,), (1,), (0, 1)]}


def test_short_signals_are_warned_of():
    with pytest.warns(UserWarning, match="J=4 and T=16 reach beyond what reflection can put around 64 samples"):
        Scattering1D(4, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scattering1D(5, 31), r"the smallest dimension must be at least 2\^J = 32, got 31"),
        (lambda: Scattering1D(0, 31), "J must be at least 1, got 0"),
        (lambda: Scattering1D(2, (8, 8)), r"shape must be 1 positive sizes, got \(8, 8\)"),
        (lambda: Scattering1D(2, 64, 0), "Q must be at least 1, got 0"),
        (lambda: Scattering1D(2, 64, (4, 0)), r"Q must be at least 1, got \(4, 0\)"),
        (lambda: Scattering1D(2, 64, T=65), "T must be from 1 to the length 64, 0 or 'global' for a global average"),
        (lambda: Scattering1D(2, 64, stride=3), "stride must be a power of two, got 3"),
        (lambda: Scattering1D(2, 64, stride=8), "stride must be at most T = 4, got 8"),
        (lambda: Scattering1D(2, 64, T="global", stride=2), "stride belongs to a local average"),
        (lambda: Scattering1D(2, 64, max_order=3), "max_order must be 1 or 2, got 3"),
        (lambda: Scattering1D(2, 64, T=0), r"out_type must be 'list' or 'dict' without average \(T=0\), got 'array'"),
        (lambda: Scattering1D(2, 64, out_type="tuple"), "out_type must be 'array', 'list' or 'dict', got 'tuple'"),
        (lambda: Scattering2D(4, (16, 15)), r"the smallest dimension must be at least 2\^J = 16, got 15"),
        (lambda: Scattering2D(1, (4, 4), 0), "L must be at least 1, got 0"),
        (lambda: HarmonicScattering3D(1, (4, 4, 4), sigma_0=0), "sigma_0 positive, got 1, 3 and 0"),
        (lambda: HarmonicScattering3D(1, (4, 4, 4), method="local"), "method must be 'integral', got 'local'"),
        (lambda: HarmonicScattering3D(1, (4, 4, 4), integral_powers=()), r"integral_powers must be positive, got \(\)"),
    ],
)
def test_bad_arguments_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
