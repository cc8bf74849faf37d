from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.linear_interpreter.nets import classifier, image, translator, upscaler
from convatlas.analysis.linear_interpreter import Interpretation, LinearInterpreter
from convatlas.errors import Unsupported


def interpretation() -> Interpretation:
    return LinearInterpreter(classifier())(image(1, 3, 8, 8))


def test_matrix_row_column_and_contribution_are_views_of_one_system():
    li = interpretation()
    a, x0 = li.matrix(), li.x0.flatten()
    assert a.shape == li.shape == (10, 192)
    torch.testing.assert_close(a @ x0, li.linear[0])
    torch.testing.assert_close(a @ x0 + li.residual[0], li.output[0])
    for k in (0, 7):
        torch.testing.assert_close(li.row(k).flatten(), a[k])
        torch.testing.assert_close(li.contribution(k).flatten(), a[k] * x0)
        assert li.votes(k).shape == (1, 8, 8)
        torch.testing.assert_close(li.votes(k).sum() + li.residual[0, k], li.output[0, k])
    for i, place in ((0, (0, 0, 0)), (77, (1, 1, 5))):
        torch.testing.assert_close(li.column(i)[0], a[:, i])
        assert torch.equal(li.column(place), li.column(i))
    assert repr(li).startswith("Interpretation(x0 (1, 3, 8, 8) -> (1, 10), ")


def test_relu_network_is_its_jacobian():
    model, x0 = classifier(), image(1, 3, 8, 8)
    jacobian = torch.func.jacrev(model)(x0).reshape(10, 192)
    for mode in ("mask", "tangent"):
        torch.testing.assert_close(LinearInterpreter(model, mode)(x0).matrix(), jacobian)


def test_without_biases_nothing_is_left_and_scale_does_not_matter():
    model, x0 = classifier(bias=False), image(1, 3, 8, 8)
    li = LinearInterpreter(model)(x0)
    assert li.residual.abs().max() == 0
    assert li.bias_share == 0
    torch.testing.assert_close(LinearInterpreter(model)(7 * x0).matrix(), li.matrix())


def test_secant_and_tangent_differ_where_units_bend():
    model, x0 = upscaler(), image(1, 1, 5, 6)
    mask, tangent = LinearInterpreter(model)(x0), LinearInterpreter(model, "tangent")(x0)
    torch.testing.assert_close(tangent.matrix(), torch.func.jacrev(model)(x0).reshape(120, 30))
    assert (mask.matrix() - tangent.matrix()).abs().max() > 0.01
    assert max(mask.error, tangent.error) < 1e-14


def test_samples_are_interpreted_each_by_itself():
    model, x0 = classifier(), image(3, 3, 8, 8)
    li = LinearInterpreter(model)(x0)
    ones = [LinearInterpreter(model)(x0[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(li.residual, torch.cat([one.residual for one in ones]))
    torch.testing.assert_close(li.row(4), torch.cat([one.row(4) for one in ones]))
    torch.testing.assert_close(li.column(4), torch.cat([one.column(4) for one in ones]))


def test_a_system_can_be_applied_to_another_image():
    model, x0, other = classifier(), image(1, 3, 8, 8), image(1, 3, 8, 8)
    li = LinearInterpreter(model)(x0)
    torch.testing.assert_close(li.apply(other, bias=True), li.apply(other) + li.residual)
    assert not torch.allclose(li.apply(other, bias=True), model(other))


def test_probes():
    li = LinearInterpreter(classifier(), chunk_size=2)(image(2, 3, 8, 8))
    z, c = torch.randn(5, 2, 3, 8, 8, dtype=torch.float64), torch.randn(5, 2, 10, dtype=torch.float64)
    torch.testing.assert_close(li.apply(z), torch.stack([li.apply(probe) for probe in z]))
    torch.testing.assert_close(li.apply(z, bias=True), li.apply(z) + li.residual)
    torch.testing.assert_close(li.apply_transpose(c), torch.stack([li.apply_transpose(probe) for probe in c]))


def test_gradients_flow_to_probes_only_where_asked():
    li = interpretation()
    z = torch.randn_like(li.x0).requires_grad_()
    with torch.no_grad():
        assert not li.apply(z).requires_grad
    y = li.apply(z)
    (gradient,) = torch.autograd.grad(y[0, 2], z)
    torch.testing.assert_close(gradient, li.row(2))
    assert not any(t.requires_grad for t in (li.row(2), li.column(2), li.residual, li.linear, li.output))


def test_inference_mode():
    model, x0 = classifier(), image(1, 3, 8, 8)
    expected = LinearInterpreter(model)(x0)
    with torch.inference_mode():
        li = LinearInterpreter(copy.deepcopy(model))(x0.clone())
        torch.testing.assert_close(li.residual, expected.residual)
        torch.testing.assert_close(li.row(2), expected.row(2))
    torch.testing.assert_close(li.row(2), expected.row(2))


def test_single_precision():
    model, x0 = classifier().float(), image(1, 3, 8, 8).float()
    li = LinearInterpreter(model)(x0)
    assert li.error < 1e-4 * li.output.abs().max()
    assert li.matrix().dtype == torch.float32


def test_the_model_and_the_input_stay_as_they_are():
    model, x0 = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    before, given = copy.deepcopy(model.state_dict()), x0.clone()
    LinearInterpreter(model)(x0).row(1)
    assert torch.equal(x0, given)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_part_of_the_output_can_be_picked():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, scale: float, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.body(x) * scale + shift, "probabilities": self.body(x).softmax(1)}

    model, x0 = Two().double().eval(), image(1, 4)
    li = LinearInterpreter(model, output=lambda result: result["logits"])(x0, 2.0, shift=torch.ones(3))
    torch.testing.assert_close(li.matrix(), 2 * model.body.weight.detach())
    torch.testing.assert_close(li.residual[0], 2 * model.body.bias.detach() + 1)
    with pytest.raises(Unsupported, match="the output comes from aten::_softmax"):
        LinearInterpreter(model, output=lambda result: result["probabilities"])(x0, 2.0, shift=torch.ones(3))


# -- the matrix


NETS = {
    "upscaler": (upscaler, (1, 1, 17, 16)),
    "strided and pooled": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)),
        (1, 2, 24, 17),
    ),
    "enlarging": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 1, 1)
        ),
        (1, 1, 24, 16),
    ),
    "signal": (lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3, dilation=2)), (1, 1, 60)),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU()), (1, 1, 7, 8, 9)),
    "flipped": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Unflatten(2, (20, 1)), nn.Flatten(2, 3)),
        (1, 1, 20, 20),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_combs_of_impulses_give_the_matrix(name: str):
    make, shape = NETS[name]
    li = LinearInterpreter(make().double().eval())(image(*shape))
    rows, columns = li.shape
    combs = li._combs()
    assert 0 < len(combs) * shape[1] < columns
    dense = li.apply(torch.eye(columns, dtype=torch.float64).view(-1, *shape)).reshape(columns, rows).mT
    torch.testing.assert_close(li._from_combs(combs), dense)
    torch.testing.assert_close(li.matrix(), dense)


def test_impulses_of_a_receptive_field_are_enough():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)).double().eval()
    assert len(LinearInterpreter(model)(image(1, 1, 30, 30))._combs()) == 5 * 5
    # Statistics of the whole input are frozen, so that instance norm is local.
    assert len(LinearInterpreter(translator())(image(1, 2, 20, 20))._combs()) < 40
    everywhere = nn.Sequential(nn.Conv2d(1, 16, 12), nn.PixelShuffle(4)).double().eval()
    assert LinearInterpreter(everywhere)(image(1, 1, 12, 12))._combs() == []


def test_large_matrices_are_refused():
    li = interpretation()
    with pytest.raises(ValueError, match=r"A would have 1920 entries \(10 x 192\); use row, column or apply"):
        li.matrix(max_entries=1919)
    large = LinearInterpreter(nn.Conv2d(3, 3, 1).eval())(torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match=r"A would have 2.4e\+09 entries \(49152 x 49152\)"):
        large.matrix()


# -- singular vectors


def test_singular_triplets(monkeypatch: pytest.MonkeyPatch):
    li = LinearInterpreter(upscaler())(image(1, 1, 5, 6))
    a = li.matrix()
    left, sigma, _ = torch.linalg.svd(a, full_matrices=False)
    for exact in (True, False):
        if not exact:
            monkeypatch.setattr("convatlas.analysis.linear_interpreter.interpreter._SMALL_SIDE", 0)
        found = li.svd(3, steps=500, tolerance=1e-14, generator=torch.Generator().manual_seed(0))
        assert found.u.shape == (3, 1, 10, 12)
        assert found.v.shape == (3, 1, 5, 6)
        torch.testing.assert_close(found.sigma, sigma[:3])
        for i in range(3):
            u, v = found.u[i].flatten(), found.v[i].flatten()
            torch.testing.assert_close(u.outer(u), left[:, i].outer(left[:, i]), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a @ v, found.sigma[i] * u, rtol=1e-5, atol=1e-6)
            assert u[u.abs().argmax()] > 0
            torch.testing.assert_close(v.norm(), torch.ones((), dtype=v.dtype))
    z = torch.randn_like(li.x0)
    assert li.apply(z).norm() / z.norm() < sigma[0]
    # Fewer outputs than vectors that the iteration would like to have.
    assert interpretation().svd(10).sigma.shape == (10,)
    for n in (0, 31):
        with pytest.raises(ValueError, match=f"n must be from 1 to 30, got {n}"):
            li.svd(n)


def test_iteration_stops_when_values_settle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("convatlas.analysis.linear_interpreter.interpreter._SMALL_SIDE", 0)
    li = LinearInterpreter(upscaler())(image(1, 1, 5, 6))
    calls = []
    apply = li.apply
    monkeypatch.setattr(li, "apply", lambda z, **options: calls.append(z) or apply(z, **options))
    li.svd(2, tolerance=1e-3)
    assert 2 < len(calls) < 50
    calls.clear()
    li.svd(2, steps=4, tolerance=0)
    assert len(calls) == 4


# -- warnings, errors, files


def test_cancellation_is_told():
    model = nn.Linear(1, 1).double().eval()
    nn.init.constant_(model.weight, 100.0)
    nn.init.constant_(model.bias, -99.0)
    li = LinearInterpreter(model)(torch.ones(1, 1, dtype=torch.float64))
    assert li.cancellation == pytest.approx(199)
    assert li.bias_share == pytest.approx(99)
    with pytest.warns(UserWarning, match=r"A x0 and r nearly cancel: .* is 199"):
        li.residual  # noqa: B018


def test_changed_weights_are_noticed():
    model = classifier()
    li = LinearInterpreter(model)(image(1, 3, 8, 8))
    li.row(0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="the weights of the model have changed since x0 was interpreted"):
        li.row(0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: classifier().train(), ValueError, r"call model\.eval\(\): BatchNorm and Dropout must be frozen"),
        (
            lambda: nn.Sequential(nn.Dropout(), nn.ReLU().eval()).eval().requires_grad_()[:1].train(),
            ValueError,
            r"call model\.eval\(\)",
        ),
        (lambda: F.relu, ValueError, r"model must be a torch\.nn\.Module, got function"),
        (lambda: torch.compile(classifier()), Unsupported, r"give the module inside, model\._orig_mod"),
        (lambda: nn.DataParallel(classifier()).eval(), Unsupported, r"give the model inside, model\.module"),
    ],
)
def test_models_that_cannot_be_interpreted(make, error, message):
    with pytest.raises(error, match=message):
        LinearInterpreter(make())


def test_part_in_training_mode_is_named():
    model = classifier()
    interpreter = LinearInterpreter(model)
    model[1].train()
    with pytest.raises(ValueError, match=r"must be frozen \('1' is in training mode\)"):
        interpreter(image(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.long),
            r"x0 must be a floating-point batch \(B, \.\.\.\), got \(1, 3, 8, 8\) of torch.int64",
        ),
        (torch.zeros(3), r"got \(3,\) of torch.float32"),
        (torch.zeros(0, 3), r"got \(0, 3\)"),
        ([1.0], "got list"),
    ],
)
def test_bad_inputs(x0, message):
    with pytest.raises(ValueError, match=message):
        LinearInterpreter(classifier())(x0)


def test_bad_arguments():
    li = interpretation()
    with pytest.raises(ValueError, match="mode must be 'mask' or 'tangent', got 'secant'"):
        LinearInterpreter(classifier(), "secant")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        LinearInterpreter(classifier(), chunk_size=0)
    with pytest.raises(
        ValueError, match=r"z must be \(1, 3, 8, 8\) or have an axis of probes before it, got \(3, 8, 8\)"
    ):
        li.apply(image(3, 8, 8))
    with pytest.raises(ValueError, match=r"c must be \(1, 10\) or have an axis of probes before it, got \(10,\)"):
        li.apply_transpose(image(10))
    with pytest.raises(ValueError, match=r"z must be torch\.float64, got torch\.float32"):
        li.apply(torch.zeros(1, 3, 8, 8))
    for k in (10, -1, (0, 0), (10,)):
        with pytest.raises(ValueError, match="k must be below 10 or an index into"):
            li.row(k)
    with pytest.raises(ValueError, match=r"i must be below 192 or an index into \(3, 8, 8\), got \(0, 8, 0\)"):
        li.column((0, 8, 0))
    batch = LinearInterpreter(classifier())(image(2, 3, 8, 8))
    for what in ("matrix", "svd"):
        with pytest.raises(ValueError, match=f"{what} needs x0 with one sample, got a batch of 2"):
            getattr(batch, what)()


def test_export(tmp_path: Path):
    li = LinearInterpreter(upscaler())(image(1, 1, 5, 6))
    path = li.export(tmp_path / "new" / "system.npz", rows=[3, (0, 9, 11)], columns=[(0, 2, 2)], singular=li.svd(2))
    arrays = dict(np.load(path))
    assert arrays["A"].shape == (120, 30)
    np.testing.assert_allclose(
        arrays["A"] @ arrays["x0"].ravel() + arrays["residual"].ravel(), arrays["output"].ravel()
    )
    np.testing.assert_allclose(arrays["rows"].reshape(2, -1), arrays["A"][arrays["row_index"]])
    np.testing.assert_allclose(arrays["columns"].ravel(), arrays["A"][:, arrays["column_index"][0]])
    assert arrays["row_index"].tolist() == [3, 119]
    assert (arrays["u"].shape, arrays["sigma"].shape, arrays["v"].shape) == ((2, 1, 10, 12), (2,), (2, 1, 5, 6))
    small = dict(np.load(li.export(path, max_entries=10)))
    assert small.keys() == {"x0", "output", "linear", "residual"}
