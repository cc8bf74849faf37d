"""Waterline, roofline and efficiency gap follow the formulas, for any module."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from convatlas.analysis import inspection
from convatlas.analysis.inspection import inspect
from convatlas.analysis.waterline import (
    MACHINES,
    Machine,
    efficiency_gap,
    find_machine,
    halo_overlap,
    layer_costs,
    machines,
    measure_machine,
    roofline,
    waterline,
    waterline_section,
)
from convatlas.errors import UnknownName
from convatlas.networks.convfirst import ConvFirstBlock, MBConvBlock
from convatlas.report import Lines, Section

#: Balance of 100 operations a byte.
MACHINE = Machine(1e14, 1e12, "a machine", 2)


def conv(**options: int) -> nn.Conv2d:
    return nn.Conv2d(64, 64, 3, padding=1, device="meta", **options)  # type: ignore[arg-type]


def test_a_convolution_is_counted_by_the_formulas():
    x = torch.empty(8, 64, 20, 10, device="meta")
    (layer,) = layer_costs(conv(stride=2, groups=8), x, bytes_per_element=2).layers
    assert layer.ops == 2 * 8 * 64 * 10 * 5 * 8 * 9
    assert layer.bytes == 2 * (8 * 64 * 200 + 8 * 64 * 50 + 64 * 8 * 9)
    assert layer.intensity == layer.ops / layer.bytes
    assert (layer.name, layer.kind) == ("(all)", "Conv2d")
    (own,) = layer_costs(conv(stride=2, groups=8), x).layers
    assert own.bytes == 2 * layer.bytes


@pytest.mark.parametrize(
    ("groups", "limit"), [(1, 64 * 9 / 2), (8, 8 * 9 / 2), (64, 9 / 2)], ids=["dense", "grouped", "depthwise"]
)
def test_intensity_of_many_pixels(groups: int, limit: float):
    x = torch.empty(64, 64, 512, 512, device="meta")
    (layer,) = layer_costs(conv(groups=groups), x, bytes_per_element=2).layers
    assert layer.intensity == pytest.approx(limit, rel=1e-3)


def test_times_and_efficiency():
    with torch.device("meta"):
        block = ConvFirstBlock(64, 64)
        x = torch.empty(128, 64, 56, 56)
    costs = layer_costs(block, x, bytes_per_element=2)
    bars = roofline(costs, MACHINE)
    assert [bar.layer.name for bar in bars] == ["layers.0", "layers.2", "layers.5"]
    assert [round(bar.layer.intensity, 1) for bar in bars] == [36.0, 51.2, 51.2]
    for bar in bars:
        assert bar.attainable == max(bar.layer.ops / 1e14, bar.layer.bytes / 1e12)
        assert bar.height == pytest.approx(bar.layer.intensity / MACHINE.balance)
        assert bar.efficiency == pytest.approx(min(1, bar.height))
    line = waterline(costs, MACHINE)
    width = sum(bar.ideal for bar in bars)
    assert line.efficiency == pytest.approx(width / sum(bar.ideal / min(1, bar.height) for bar in bars))
    assert line.efficiency == pytest.approx(0.487, abs=5e-4)
    assert (line.measured, line.measured_efficiency, line.quality) == (None, None, None)
    drowning = line.drowning()
    assert [bar.layer.name for bar, _ in drowning] == ["layers.2", "layers.5", "layers.0"]
    assert sum(share for _, share in drowning) == pytest.approx(1)
    fused = waterline(costs, MACHINE, fused=[ConvFirstBlock])
    assert len(fused.bars) == 1
    assert fused.efficiency == 1
    assert not fused.drowning()
    assert fused.bars[0].layer.intensity == pytest.approx(291.8, abs=0.05)


def test_units_by_name_and_by_class():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 16, 1), *(ConvFirstBlock(16, 16) for _ in range(2)), nn.Conv2d(16, 4, 1))
        x = torch.empty(2, 3, 8, 8)
    costs = layer_costs(model, x, bytes_per_element=2)
    names = [layer.name for layer in costs.fused(["ConvFirstBlock"])]
    assert names == ["0", "1", "2", "3"]
    assert [layer.name for layer in costs.fused(["2"])] == ["0", "1.layers.0", "1.layers.2", "1.layers.5", "2", "3"]
    assert [layer.name for layer in costs.fused([nn.Sequential])] == ["(all)"]
    assert sum(layer.ops for layer in costs.fused([ConvFirstBlock])) == sum(layer.ops for layer in costs.layers)
    with pytest.raises(
        UnknownName, match="unknown module or class of modules 'ConvFirst': did you mean ConvFirstBlock"
    ):
        costs.fused(["ConvFirst"])


def test_tiles_compute_the_border_again():
    assert halo_overlap((8, 8), 3) == pytest.approx(1.5625)
    assert halo_overlap((16, 16), 3) == pytest.approx(1.2656, abs=1e-4)
    assert halo_overlap((8, 8), 3, depth=2) == pytest.approx(144 / 64)
    assert halo_overlap((8, 8), 3, stride=2) == pytest.approx((17 / 16) ** 2)
    with torch.device("meta"):
        first, expanding = ConvFirstBlock(16, 16), MBConvBlock(16, 16)
        x = torch.empty(2, 16, 16, 16)
    costs = layer_costs(first, x)
    assert costs.fused([ConvFirstBlock], (8, 8))[0].ops == costs.fused([ConvFirstBlock])[0].ops
    costs = layer_costs(expanding, x)
    more = costs.fused([MBConvBlock], (8, 8))[0].ops - costs.fused([MBConvBlock])[0].ops
    assert more == pytest.approx(0.5625 * costs.layers[0].ops)
    two = nn.Sequential(first, first)
    costs = layer_costs(two, x)
    single = sum(layer.ops for layer in costs.layers) / 2
    (deep,) = costs.fused([""], (8, 8))
    assert deep.ops == pytest.approx(single * (1 + 1.5625))


class Attention(nn.Module):
    """Products that belong to no layer of their own, among layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).relu())


def test_products_outside_of_layers_are_kernels():
    costs = layer_costs(Attention(), torch.randn(2, 1, 5, 8))
    assert costs.layers[0].name == "qkv"
    assert costs.layers[1].ops == 2 * 2 * (5 * 5 * 8) * 2
    assert costs.layers[1].name.startswith("(all) (")
    assert costs.layers[-1].name == "proj"
    single = layer_costs(Attention(), torch.randn(2, 1, 5, 8), folded=False).layers
    assert {"norm (native_layer_norm)", "(all) (relu)"} <= {layer.name for layer in single}
    assert sum(layer.ops for layer in single) == sum(layer.ops for layer in costs.layers)
    assert sum(layer.bytes for layer in single) > sum(layer.bytes for layer in costs.layers)


def test_measured_times_add_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).train()
    before = model[2].running_mean.clone()
    line = waterline(layer_costs(model, torch.randn(2, 3, 9, 9), measure=True), MACHINE)
    assert model.training
    assert torch.equal(model[2].running_mean, before)
    assert [bar.layer.name for bar in line.bars] == ["1", "3"]
    assert line.measured == pytest.approx(sum(bar.layer.seconds or 0 for bar in line.bars))
    assert line.measured > 0
    assert line.measured_efficiency == pytest.approx(line.ideal / line.measured)
    assert line.quality == pytest.approx(line.attainable / line.measured)


def test_machines(monkeypatch: pytest.MonkeyPatch):
    assert find_machine("h200") is MACHINES["h200_fp16"]
    assert find_machine("a100_fp32").bytes_per_element == 4
    assert find_machine("a5000").balance == pytest.approx(144.7, abs=0.1)
    with pytest.raises(UnknownName, match="unknown machine 'h20': did you mean h200_"):
        find_machine("h20")
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        Machine(1.0, 0)
    monkeypatch.setattr(machines, "_GEMM_SIDES", (64,))
    monkeypatch.setattr(machines, "_CACHES", 0)
    here = measure_machine(torch.float64)
    assert here is measure_machine(torch.float64)
    assert here.name == "this machine, 1 thread, float64"
    assert 1e8 < here.peak_ops < 1e13
    assert 1e7 < here.bandwidth < 1e13


def test_a_section_shows_both_curves():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), *(ConvFirstBlock(16, 16) for _ in range(2)))
        x = torch.empty(4, 3, 33, 33)
    section = waterline_section(model, (x,), machine=MACHINE, fused=["ConvFirstBlock"])
    assert section is not None
    picture = next(part for part in section.parts if isinstance(part, Lines))
    assert list(picture.series) == ["layer by layer", "fused", "waterline"]
    for name, count in (("layer by layer", 7), ("fused", 3)):
        along, heights = picture.series[name]
        assert len(along) == len(heights) == 2 * count
        assert along[0] == 0
        assert along[-1] == pytest.approx(100)
        assert list(along) == sorted(along)
    assert waterline_section(nn.ReLU(), (torch.randn(2),)) is None


def test_inspection_holds_the_model_against_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval()
    report = inspect(model, torch.randn(1, 3, 9, 9), sections=[inspection._waterline], machine=MACHINE, samples=16)
    section: Section = report.sections[0]
    assert section.title == "Efficiency"
    tables = {part["title"]: part for part in json.loads(report.to_json())["sections"][0]["parts"] if "rows" in part}
    (row,) = tables["Efficiency"]["rows"]
    assert row[:3] == ["layer by layer", 2, 2 * 16 * (49 * 8 * 27 + 25 * 8 * 9)]
    assert {entry[0] for entry in tables["Drowning kernels"]["rows"]} == {"0", "2"}
    assert [entry[0] for entry in tables["Efficiency of the stages"]["rows"]] == ["0", "2"]
    assert "<svg" in report.to_html()


def test_efficiency_gap():
    models = {"small": nn.Conv2d(3, 4, 3), "large": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))}
    x = torch.randn(1, 3, 9, 9)
    gap = efficiency_gap(models, MACHINE, inputs=x, accuracies={"small": 70.0, "large": 75.0}, repeats=2)
    small, large = gap.rows
    assert small.ops == 2 * 49 * 4 * 27 < large.ops
    assert small.ideal == small.ops / 1e14
    assert small.measured is not None
    assert small.efficiency == small.ideal / small.measured < 1
    figure = gap.figure()
    assert figure.series["large"] == ((1000 * large.ideal, 1000 * (large.measured or 0)), (75.0, 75.0))
    assert figure.log_x
    assert gap.table().rows[0][-1] == 70.0
    unmeasured = efficiency_gap(models, MACHINE, inputs=x, measure=False)
    assert unmeasured.rows[0].measured is None
    assert unmeasured.rows[0].efficiency == unmeasured.rows[0].ideal / unmeasured.rows[0].attainable
    assert unmeasured.figure().series["large"][1] == (2.0, 2.0)
    with pytest.raises(ValueError, match="models must be one or several, got none"):
        efficiency_gap({}, MACHINE)
    with pytest.raises(ValueError, match=r"inputs must be given: small has no example_inputs\(\)"):
        efficiency_gap(models, MACHINE)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got function"):
        layer_costs(lambda x: x, torch.randn(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bytes_per_element must be positive, got 0"):
        layer_costs(nn.ReLU(), torch.randn(1), bytes_per_element=0)
