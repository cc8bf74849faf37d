"""Multi-scale deformable attention and the sampling beneath it, beyond what the battery tests."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from battery.compare import assert_near
from convatlas.nn.deform_attention import MultiScaleDeformableAttention
from convatlas.ops.backend import OPERATORS
from convatlas.ops.deform_attention import deform_attention, level_starts, pixel_centres
from golden.cases import read

CASE = Path(__file__).parents[1] / "golden" / "cases" / "vit_comer" / "msdeformattn_grad.json"
BACKENDS = OPERATORS["deform_attention"].names
SHAPES = ((3, 4), (1, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
def test_reference_results_and_their_gradients(dtype: torch.dtype, tolerance: float):
    case = read(CASE, dtype)
    config, inputs = case.config, case.inputs
    layer = MultiScaleDeformableAttention(
        config["d_model"], len(config["spatial_shapes"]), config["n_heads"], config["n_points"], ratio=config["ratio"]
    )
    case.load(layer)
    query, value = inputs["query"].requires_grad_(), inputs["value_input"].requires_grad_()
    y = layer(query, inputs["reference_points"], value, config["spatial_shapes"])
    found = {"y": y, **case.gradients(layer, y, {})}
    found |= {"grad_query": query.grad, "grad_value_input": value.grad}
    assert set(found) == set(case.outputs)
    for name, expected in case.outputs.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_new_layer_averages_rays():
    layer = MultiScaleDeformableAttention(12, 3, num_heads=4, num_points=2).double()
    rays = layer.sampling_offsets.bias.view(4, 3, 2, 2)
    for head in range(4):
        direction = torch.tensor([math.cos(head * math.pi / 2), math.sin(head * math.pi / 2)])
        direction = (direction / direction.abs().max()).double()
        torch.testing.assert_close(
            rays[head], torch.stack([direction, 2 * direction]).expand(3, -1, -1), atol=1e-6, rtol=0
        )
    # Values that are the columns of their pixels, kept by the projections: each head sees the mean of two columns.
    with torch.no_grad():
        for projection in (layer.value_proj, layer.output_proj):
            projection.weight.copy_(torch.eye(12))
    columns = (pixel_centres([(5, 9)]) * 9 - 0.5)[:, :1].double().expand(-1, 12)[None]
    single = MultiScaleDeformableAttention(12, 1, num_heads=4, num_points=2).double()
    single.load_state_dict(
        layer.state_dict()
        | {name: value for name, value in single.state_dict().items() if name.startswith(("sampling", "attention"))}
    )
    y = single(torch.randn(1, 1, 12).double(), torch.full((1, 1, 1, 2), 0.5).double(), columns, [(5, 9)])
    torch.testing.assert_close(y[0, 0, ::3], torch.tensor([5.5, 4.0, 2.5, 4.0], dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_centres_read_the_pixels(backend: str):
    value = torch.randn(2, 14, 2, 4)
    places = pixel_centres(SHAPES)
    for level, start in enumerate(level_starts(SHAPES)):
        count = math.prod(SHAPES[level])
        weights = torch.zeros(2, count, 2, 2, 1)
        weights[:, :, :, level] = 1.0
        here = places[start : start + count, None, None, None].expand(2, count, 2, 2, 1, 2)
        y = deform_attention(value, SHAPES, here, weights, backend=backend)
        torch.testing.assert_close(y, value[:, start : start + count].flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_and_places_outside(backend: str):
    value = torch.randn(1, 14, 2, 3, requires_grad=True)
    y = deform_attention(value, SHAPES, torch.zeros(1, 0, 2, 2, 1, 2), torch.zeros(1, 0, 2, 2, 1), backend=backend)
    assert y.shape == (1, 0, 6)
    far = torch.full((1, 1, 2, 2, 1, 2), 3.0)
    y = deform_attention(value, SHAPES, far, torch.ones(1, 1, 2, 2, 1), backend=backend)
    y.sum().backward()
    assert not y.any()
    assert not value.grad.any()


def test_padding_counts_as_zero():
    layer = MultiScaleDeformableAttention(8, 2, num_heads=2, ratio=0.5)
    shapes, query, value = ((3, 2), (2, 1)), torch.randn(1, 4, 8), torch.randn(1, 8, 8)
    reference = torch.rand(1, 4, 2, 2)
    padding = torch.zeros(1, 8, dtype=torch.bool)
    torch.testing.assert_close(layer(query, reference, value, shapes, padding), layer(query, reference, value, shapes))
    alone: Tensor = layer(query, reference, value, shapes, ~padding)
    torch.testing.assert_close(alone, layer.output_proj.bias.expand(1, 4, 8))


def test_wrong_numbers_and_shapes_are_named():
    with pytest.raises(ValueError, match="value dim 96 is not divisible by 5 heads"):
        MultiScaleDeformableAttention(192, 3, 5, ratio=0.5)
    layer = MultiScaleDeformableAttention(8, 2, 2)
    query, reference, value, shapes = (
        torch.zeros(2, 3, 8),
        torch.zeros(1, 3, 1, 2),
        torch.zeros(2, 7, 8),
        [(3, 2), (1, 1)],
    )
    layer(query, reference, value, shapes)
    with pytest.raises(ValueError, match=r"query must be \(B, N, 8\), got \(2, 3, 7\)"):
        layer(query[..., :7], reference, value, shapes)
    with pytest.raises(ValueError, match="shapes must be those of 2 levels, got 1"):
        layer(query, reference, value, shapes[:1])
    with pytest.raises(ValueError, match=r"reference must be \(2 or 1, 3, 2 or 1, 2\), got \(1, 3, 1, 4\)"):
        layer(query, torch.zeros(1, 3, 1, 4), value, shapes)
    with pytest.raises(ValueError, match=r"value must have the 7 pixels of the levels \(\(3, 2\), \(1, 1\)\), got 6"):
        layer(query, reference, value[:, :6], shapes)
    with pytest.raises(ValueError, match=r"weights must be \(1, Q, 2, 1, P\) .* got \(1, 3, 2, 2, 1\)"):
        deform_attention(torch.zeros(1, 4, 2, 1), [(2, 2)], torch.zeros(1, 3, 2, 2, 1, 2), torch.zeros(1, 3, 2, 2, 1))


def test_half_precision_and_an_exported_program_of_any_batch():
    layer = MultiScaleDeformableAttention(8, 2, num_heads=2, num_points=2).eval()
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.2)

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, query: Tensor, reference: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, reference, value, SHAPES)

    model = Fixed()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 5, 8), torch.rand(batch, 5, 2, 2), torch.randn(batch, 14, 8)

    example = inputs(2)
    exact = model(*example)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(model(*example), exact)
    rough = copy.deepcopy(model).bfloat16()(*(x.bfloat16() for x in example))
    assert rough.dtype == torch.bfloat16
    assert_near(rough, exact)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, example, dynamic_shapes=tuple({0: batch} for _ in example), strict=False)
    other = inputs(3)
    torch.testing.assert_close(program.module()(*other), model(*other), rtol=1e-4, atol=1e-5)
