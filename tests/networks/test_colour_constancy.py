"""EMLP, ECCC, CCC, FFCC and ensembles: sizes, what zeros give, shifts, features of one's own, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convatlas import load_weights, save_weights
from convatlas.errors import UnknownName
from convatlas.networks.colour_constancy.description import estimate_illuminant
from convatlas.networks.colour_constancy.ensembles import Committee, DualExposureEnsemble, EnsembleConfig
from convatlas.networks.colour_constancy.histograms import CCC, ECCC, CCCConfig, ECCCConfig
from convatlas.networks.colour_constancy.perceptron import EMLP, EMLPConfig
from convatlas.networks.registry import create_model
from convatlas.ops.log_chroma import BOUNDARY, rgb_to_log_chroma
from convatlas.training.measure import count_parameters

PARAMETERS = {
    **{"emlp": 354, "emlp_matrix": 354, "eccc": 6156, "eccc_64": 24588, "eccc_short": 6156, "eccc_both": 8204},
    **{"ccc": 3072, "ccc_64": 12288, "ffcc": 12288, "eccc_ffcc": 24588, "emlp_eccc": 6510},
}


def pair(batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    short = 0.02 + 0.2 * torch.rand(batch, 3, 8, 10, generator=generator)
    return (4 * short).clamp(max=0.6), short


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str):
    with torch.device("meta"):
        assert count_parameters(create_model(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["ccc", "eccc", "eccc_both"])
def test_zeros_give_white(name: str):
    model = create_model(name, bins=8)
    found = model(*model.describe(*pair(2)))
    torch.testing.assert_close(found, torch.full((2, 3), 3**-0.5))


def test_the_centre_of_the_torus_is_its_start_and_half_its_length():
    model = CCC(CCCConfig(form="ffcc", bins=8, bin_size=0.25, start=(-0.5, 0.25)))
    with torch.no_grad():
        model.biases[0, 4, 4] = 50
    found = model.heat_map(*model.describe(*pair()))
    assert found.uv[0].tolist() == pytest.approx([0.5, 1.25], abs=1e-4)
    assert float(found.confidence.detach()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(found.covariance[0], 0.25**2 * torch.eye(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("around", "v"), [("gray", -0.75), ("centre", 1.25), ("gray_world", 1.25)])
def test_where_the_light_is_sought_on_the_torus(around: str, v: float):
    model = CCC(CCCConfig(form="ffcc", bins=8, bin_size=0.25, start=(-1.0, 0.0), around=around))
    with torch.no_grad():
        model.biases[0, 4, 5] = 50
    tint = torch.tensor([1.0, 1.0, math.exp(-1.25)]).view(1, 3, 1, 1)
    grey = 0.4 * torch.ones(1, 3, 6, 6) * tint
    found = model.heat_map(*_for_heat_map(model, grey))
    assert found.uv[0].tolist() == pytest.approx([0.0, v], abs=1e-4)


def _for_heat_map(model: CCC, x: Tensor) -> tuple[Tensor, None, Tensor | None]:
    histograms, *gray = model.describe(x, x)
    return histograms, None, gray[0] if gray else None


def test_a_tint_moves_the_estimate_by_whole_bins():
    """With filters alone, a histogram that is moved by a bin moves the heat map by a bin."""
    model = CCC(CCCConfig(bins=16))
    with torch.no_grad():
        model.filters[0, 0, 0] = 40
    histograms = torch.zeros(1, 2, 16, 16)
    histograms[0, 0, 6:8, 5:7] = 0.5
    moved = histograms.roll((-1, 2), (2, 3))
    step = 2 * BOUNDARY / 16
    change = model.heat_map(moved).uv - model.heat_map(histograms).uv
    assert change[0].tolist() == pytest.approx([2 * step, step], abs=1e-2)


def test_the_estimate_is_where_the_bias_is_and_the_gate_chooses():
    model = ECCC(ECCCConfig(bins=8, biases=2))
    with torch.no_grad():
        model.biases[0, 2, 6], model.biases[1, 6, 1] = 60, 60
        model.gate.weight.zero_()
        model.gate.bias.copy_(torch.tensor([30.0, 0.0]))
    inputs = model.describe(*pair())
    found = model.heat_map(*inputs)
    step = 2 * BOUNDARY / 8
    assert found.uv[0].tolist() == pytest.approx([2.5 * step, 1.5 * step], abs=1e-3)
    assert found.gate is not None
    assert found.gate.sum(1).tolist() == pytest.approx([1])
    with torch.no_grad():
        model.gate.bias.copy_(torch.tensor([0.0, 30.0]))
    assert model.heat_map(*inputs).uv[0].tolist() == pytest.approx([-2.5 * step, -2.5 * step], abs=1e-3)


def test_heat_sums_up_to_one_and_is_held():
    model = CCC(CCCConfig(bins=8, init_std=1e4))
    found = model.heat_map(*model.describe(*pair(3)))
    torch.testing.assert_close(found.heat.sum((1, 2)), torch.ones(3))
    scores = model.scores(*model.describe(*pair(3)))[0]
    assert scores.abs().max() == 100


def test_gradients_of_the_gate():
    model = ECCC(ECCCConfig(bins=4, init_std=1.0)).double()
    histograms, feature = (part.double() for part in model.describe(*(each.double() for each in pair(2))))

    def call(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"gate.weight": weight, "gate.bias": bias}, (histograms, feature))

    assert torch.autograd.gradcheck(call, (model.gate.weight, model.gate.bias), fast_mode=True)


def test_features_of_any_length():
    def brightness(long: Tensor, short: Tensor) -> Tensor:
        return torch.stack([long.mean((1, 2, 3)), short.mean((1, 2, 3)), (long >= 0.6).float().mean((1, 2, 3))], 1)

    for model in (
        EMLP(EMLPConfig(feature_channels=3), brightness),
        ECCC(ECCCConfig(bins=8, feature_channels=3, init_std=0.1), brightness),
    ):
        assert estimate_illuminant(*pair(2), model).shape == (2, 3)
        with pytest.raises(ValueError, match="feature must be"):
            type(model)(model.config, lambda long, short: long.mean((2, 3))[:, :2]).describe(*pair(2))
    with pytest.raises(ValueError, match="function must be given for a feature of 3 numbers"):
        EMLP(EMLPConfig(feature_channels=3)).describe(*pair())
    matrix = create_model("emlp_matrix")
    assert bool((estimate_illuminant(*pair(2), matrix, ratio=4.0) > 0).all())


def test_frames_are_used_as_named():
    long, short = pair()
    for frames, count in (("long", 2), ("short", 2), ("both", 4)):
        model = ECCC(ECCCConfig(bins=8, frames=frames))
        assert model.describe(long, short)[0].shape == (1, count, 8, 8)
    ours, theirs = (ECCC(ECCCConfig(bins=8, frames=name)).describe(long, short)[0] for name in ("both", "short"))
    torch.testing.assert_close(ours[:, 2:], theirs)


def test_ensembles_average_directions():
    model = DualExposureEnsemble(EnsembleConfig(eccc=ECCCConfig(bins=8, init_std=1.0), weights=(0.25, 0.75)))
    inputs = model.describe(*pair(2))
    emlp, eccc = model.emlp(inputs[0]), model.eccc(*inputs[1:])
    expected = torch.nn.functional.normalize(0.25 * emlp + 0.75 * eccc, dim=1)
    torch.testing.assert_close(model(*inputs), expected)
    committee = Committee([model.emlp, model.eccc, model.emlp])
    third = torch.nn.functional.normalize(2 * emlp + eccc, dim=1)
    torch.testing.assert_close(estimate_illuminant(*pair(2), committee), third)
    with pytest.raises(ValueError, match="inputs must be 3 tensors, got 2"):
        model.averaged(inputs[:2])
    with pytest.raises(ValueError, match="members"):
        Committee([])


def test_one_checkpoint_holds_both_and_serves_each(tmp_path: Path):
    both = DualExposureEnsemble(EnsembleConfig(eccc=ECCCConfig(bins=8, init_std=1.0)))
    assert set(both.state_dict()) == {
        *(f"emlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        *("eccc.filters", "eccc.biases", "eccc.gate.weight", "eccc.gate.bias"),
    }
    save_weights(both, tmp_path / "both.safetensors")
    for single, member in ((EMLP(EMLPConfig()), both.emlp), (ECCC(ECCCConfig(bins=8)), both.eccc)):
        load_weights(single, tmp_path / "both.safetensors")
        for name, value in member.state_dict().items():
            assert torch.equal(single.state_dict()[name], value)


def test_the_estimate_of_one_picture_is_that_in_a_batch():
    model = create_model("emlp_eccc", eccc={"bins": 8, "init_std": 1.0})
    long, short = pair(3)
    both = estimate_illuminant(long, short, model)
    torch.testing.assert_close(estimate_illuminant(long[1:2], short[1:2], model), both[1:2])
    assert rgb_to_log_chroma(both).isfinite().all()


def test_bad_configs_and_inputs():
    for bad, match in (
        (lambda: CCCConfig(bins=9), "bins must be an even number"),
        (lambda: CCCConfig(form="ffcc", bins=48), "power of two"),
        (lambda: CCCConfig(around="gray"), "around must be 'centre'"),
        (lambda: CCCConfig(epsilon=0.0), "epsilon must be positive"),
        (lambda: ECCCConfig(biases=0), "biases must be at least 1"),
        (lambda: EMLPConfig(hidden=(0,)), "hidden must be at least 1"),
        (lambda: EnsembleConfig(weights=(0.0, 0.0)), "weights must not be negative"),
        (lambda: create_model("emlp")(torch.zeros(1, 3)), r"feature must be \(B, 2\)"),
        (lambda: create_model("ccc")(torch.zeros(1, 2, 8, 8)), r"histograms must be \(B, 2, 32, 32\)"),
        (lambda: create_model("eccc").heat_map(torch.zeros(1, 2, 32, 32)), "feature must be"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    for options in ({"form": "c6"}, {"frames": "middle"}, {"around": "white"}):
        with pytest.raises(UnknownName):
            CCCConfig(**options)
