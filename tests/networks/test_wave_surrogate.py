"""Wave surrogates: sizes, the switch of the kernels, rollouts."""

from __future__ import annotations

import pytest
import torch

from convatlas.networks.registry import create_model
from convatlas.nn.conv.one_way import OneWayConv2d, OneWayConvTranspose2d
from convatlas.training.measure import count_parameters

#: Of this library's definition; the paper publishes none.
PARAMETERS = {
    "wave_surrogate": 1_700_225,
    "wave_surrogate_oneway": 196_423,
    "wave_surrogate_oneway_rank2": 390_605,
    "wave_field": 2_363_201,
    "wave_field_oneway": 2_129_351,
}
SMALL = {"widths": (4, 8), "depth": 1}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str):
    with torch.device("meta"):
        assert count_parameters(create_model(name)) == PARAMETERS[name]


def test_one_switch_compresses_every_convolution():
    dense = create_model("wave_surrogate", **SMALL)
    for kernel in ("oneway", "separable", "cp_shared", "tucker2"):
        model = create_model("wave_surrogate", kernel=kernel, rank=2, **SMALL)
        convs = [part for part in model.modules() if hasattr(part, "kernel_size")]
        assert all(isinstance(part, OneWayConv2d | OneWayConvTranspose2d) for part in convs)
        assert len(convs) == sum(hasattr(part, "kernel_size") for part in dense.modules())
    assert count_parameters(create_model("wave_surrogate", kernel="oneway", **SMALL)) < count_parameters(dense) / 2


def test_rollout_steps_on_its_own_fields():
    model = create_model("wave_surrogate", **SMALL).double().eval()
    fields, speed = torch.randn(2, 6, 9, 7, dtype=torch.float64), torch.rand(2, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        made = model.rollout(fields, speed, 3)
        past = fields[:, 2:]
        for step in range(3):
            after = past[:, -1:] + model(torch.cat([past, speed[:, None]], dim=1))
            torch.testing.assert_close(made[:, step], after[:, 0])
            past = torch.cat([past[:, 1:], after], dim=1)
    with pytest.raises(ValueError, match=r"T of at least 4, got \(2, 3, 9, 7\)"):
        model.rollout(fields[:, :3], speed, 1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        model.rollout(fields, speed, 0)


def test_a_step_begins_small():
    torch.manual_seed(0)
    for kernel in ("dense", "oneway"):
        model = create_model("wave_surrogate", kernel=kernel)
        with torch.no_grad():
            assert float(model(*model.example_inputs(2)).std()) < 0.3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wave_surrogate", {"kernel": "thin"}, "kernel must be one of dense, oneway"),
        ("wave_surrogate", {"rank": 0}, "rank must be at least 1, got 0"),
        ("wave_surrogate", {"widths": ()}, "depth and widths must be at least 1"),
        ("wave_surrogate", {"dims": 3}, "dims must be 2, got 3"),
        ("wave_field", {"hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_options_are_told(name: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_bad_inputs_are_told():
    with pytest.raises(ValueError, match=r"x must be \(B, 5, H, W\), got \(1, 4, 8, 8\)"):
        create_model("wave_surrogate", **SMALL)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"x must be \(B, 4\), got \(1, 3\)"):
        create_model("wave_field", size=8, widths=(4, 4), hidden=4)(torch.zeros(1, 3))
