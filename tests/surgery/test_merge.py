"""A merged model computes the same with fewer layers; what cannot be merged is named, the original stays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from battery.compare import leaves
from battery.entries import NETWORKS
from battery.subjects import Network
from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.mixers.inception import InceptionDWConv2d
from convatlas.nn.scale import LayerScale
from convatlas.surgery import Surgery, merge
from surgery.toys import (
    BATCH_NORMS,
    BOUNDS,
    DoubledConv2d,
    DynamicConv2d,
    Model,
    check_same,
    count,
    parameters,
    ready,
    triple,
)

networks = pytest.mark.parametrize(
    "network", [entry for entry in NETWORKS if entry.takes_tensors], ids=lambda network: network.name
)


class Branches(nn.Module):
    """Two convolutions with norms that merge into one convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.point(x)

    def merged(self) -> nn.Module:
        conv = copy.deepcopy(self.wide)
        conv.weight.data += F.pad(self.point.weight, (1, 1, 1, 1))
        conv.bias.data += self.point.bias
        return conv


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def merged(model: nn.Module, *inputs: Tensor) -> Surgery:
    """Merge and check all that is promised of every merge."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(part) for part in model.modules()]
    result = merge(model, inputs)
    assert kinds == [type(part) for part in model.modules()]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    check_same(model, result, *inputs)
    assert not any(part.training for part in result.model.modules())
    again = merge(result.model, inputs)
    assert again.changed == ()
    assert again.skipped == result.skipped
    return result


# Merge: the networks of the library

_DYNAMIC = "the kernels before these norms depend on the input or the position"
_SUM = "a norm of the sum of two branches, or whose result goes to two, has no layer of its own beside it"
_SUBSPACES = "the norms of ULSAM stand between operations that are no layers"
#: Network -> how many norms cannot be folded, and why; none where only other layers stay.
STAYING = {
    "local_no": (0, "finite differences follow the distance of the points"),
    "sgconv_text": (3, _SUM),
    "conv_tasnet_v1": (6, "these norms stand between a PReLU and a convolution that pads with zeros"),
    "disgan_discriminator": (3, _SUM),
    "disgan_2d_discriminator": (3, _SUM),
    "disgan_plain_discriminator": (1, _SUM),
    "cross_d_resnet18": (6, _DYNAMIC),
    "resnet50_fdconv": (4, _DYNAMIC),
    "tvconv_mobilenet_v2_x1_0": (5, _DYNAMIC),
    "mobilenet_v1_ulsam": (2, _SUBSPACES),
    "mobilenet_v2_ulsam": (2, _SUBSPACES),
    **dict.fromkeys(
        (
            *("face_mobilenet_v2_x1_0", "tvconv_shufflenet_v2_x1_0", "tvconv_deeplab_v3_plus_mobilenet_v2"),
            *("uniformer_small", "uniformer_small_plus_tl", "uniformer_xxs", "uniformer3d_small_split"),
            *("ffdnn", "wavemix_192_16_l3"),
        ),
        (1, _SUM),
    ),
}


@networks
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_networks_merge(network: Network, dtype: torch.dtype):
    model = network.build().to(dtype)
    inputs = tuple(x.to(dtype) for x in network.inputs(model, 2))
    result = merged(model, *inputs)
    staying, _ = STAYING.get(network.name, (0, ""))
    assert count(result.model, (*BATCH_NORMS, LayerScale)) == staying
    assert bool(result.skipped) == (network.name in STAYING)
    if count(model, (*BATCH_NORMS, LayerScale)) > staying:
        assert result.changed
    if not any(parametrize.is_parametrized(part) for part in model.modules()):  # whose weights have more elements
        fewer = parameters(model) - parameters(result.model)
        assert fewer > 0 or count(model, (*BATCH_NORMS, LayerScale)) <= staying
    with torch.no_grad():
        ours_theirs = [leaves(getattr(part, "forward_features", part)(*inputs)) for part in (result.model, model)]
    for ours, theirs in zip(*ours_theirs, strict=True):
        assert float((ours - theirs).abs().max()) <= BOUNDS[dtype] * float(theirs.abs().max())


@networks
def test_merged_networks_are_modules_like_others(network: Network):
    model = network.build()
    inputs = network.inputs(model, 2)
    result = merge(model, inputs).model
    with torch.no_grad():
        expected = result(*inputs)
        for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            torch.testing.assert_close(other(*inputs), expected, rtol=0, atol=0)
        blank = merge(network.build(), inputs).model
        blank.load_state_dict(result.state_dict())
        torch.testing.assert_close(blank(*inputs), expected, rtol=0, atol=0)
        exported = torch.export.export(result, inputs).module()
        torch.testing.assert_close(exported(*inputs), expected)
    scores = result.train()(*inputs)  # several where a network has further heads for training
    sum(each.sum() for each in (scores if isinstance(scores, tuple) else (scores,))).backward()
    assert all(parameter.grad is not None for parameter in result.parameters() if parameter.requires_grad)


def test_networks_offer_their_own_example():
    model = ready(create_model("resnet18", depths=(1,), widths=(4,), stem_width=4, num_classes=3), torch.float32)
    assert count(merge(model).model, BATCH_NORMS) == 0
    hollow = merge(model.to("meta")).model
    assert count(hollow, BATCH_NORMS) == 0
    assert all(parameter.is_meta for parameter in hollow.parameters())


def test_dilated_inceptionnext_keeps_the_norms_before_padding():
    options = {"depths": (1, 1, 1), "dims": (16, 24, 32), "num_classes": 0, "output_stride": 8}
    model = ready(create_model("inceptionnext_tiny", **options))
    result = merged(model, torch.randn(2, 3, 45, 61, dtype=torch.float64))
    assert [name for name, _ in result.skipped] == ["stages.2.downsample.0"]
    assert "does not go to one convolution" in result.skipped[0][1]


# Merge: neighbours of every kind


def _sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


FOLDED = {
    "conv1d": (lambda: _sequence(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (3, 9)),
    "conv2d": (lambda: _sequence(nn.Conv2d(3, 4, 3, 2, padding=1, bias=False), nn.BatchNorm2d(4)), (3, 9, 8)),
    "conv3d": (lambda: _sequence(nn.Conv3d(2, 4, 3, dilation=2), nn.BatchNorm3d(4)), (2, 7, 6, 5)),
    "groups": (lambda: _sequence(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 5, 5)),
    "depthwise": (lambda: _sequence(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (4, 5, 5)),
    "no_affine": (lambda: _sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (3, 5, 5)),
    "linear": (lambda: _sequence(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), (5,)),
    "transposed1d": (lambda: _sequence(nn.ConvTranspose1d(3, 4, 3, 2), nn.BatchNorm1d(4)), (3, 5)),
    "transposed2d": (
        lambda: _sequence(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), nn.BatchNorm2d(6)),
        (4, 5, 5),
    ),
    "transposed3d": (lambda: _sequence(nn.ConvTranspose3d(3, 4, 2, 2), nn.BatchNorm3d(4)), (3, 3, 3, 3)),
    "norm_conv1d": (lambda: _sequence(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 3, bias=False)), (3, 9)),
    "norm_conv2d": (lambda: _sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, 2, groups=2)), (4, 8, 8)),
    "norm_conv3d": (lambda: _sequence(nn.BatchNorm3d(3), nn.Conv3d(3, 4, 1, bias=False)), (3, 4, 4, 4)),
    "norm_valid": (lambda: _sequence(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="valid")), (3, 5, 5)),
    "norm_same_1x1": (lambda: _sequence(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, padding="same")), (3, 5, 5)),
    "norm_reflect": (
        lambda: _sequence(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        (3, 5, 5),
    ),
    "norm_linear": (lambda: _sequence(nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False)), (5,)),
    "scale_conv": (lambda: _sequence(nn.Conv2d(3, 4, 3, bias=False), LayerScale(4, 0.5)), (3, 5, 5)),
    "scale_linear": (lambda: _sequence(nn.Linear(5, 4), LayerScale(4, 0.5, channel_dim=-1)), (6, 4, 5)),
    "scale_padded_conv": (lambda: _sequence(LayerScale(3, 0.5), nn.Conv2d(3, 4, 3, padding=1)), (3, 5, 5)),
    "chain": (
        lambda: _sequence(
            nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LayerScale(4, 2.0), nn.BatchNorm2d(4)
        ),
        (3, 7, 7),
    ),
    "through_dropout": (lambda: _sequence(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)), (3, 5, 5)),
    "nested": (
        lambda: _sequence(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))),
        (3, 5, 5),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_neighbours_fold(name: str):
    make, shape = FOLDED[name]
    model = ready(make())
    result = merged(model, torch.randn(3, *shape, dtype=torch.float64))
    assert result.skipped == ()
    assert count(result.model, (*BATCH_NORMS, LayerScale)) == 0
    assert len(result.changed) == count(model, (*BATCH_NORMS, LayerScale))


def _pair() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3)}


def _kept() -> dict[str, tuple[nn.Module, str]]:
    def used_twice(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return y + m.norm(y)

    def returned(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.stack([m.norm(y), y])

    def changed_in_place(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.mul_(2)
        return m.norm(y)

    def through_a_view(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = m.norm(y)
        return z + y[:, :, :1, :1]

    def twice_with_relu(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(F.relu(m.conv(x))))

    def norm_twice(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + m.norm(x)

    def weight_read(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight)

    def data_read(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight.data)

    def norm_read(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) * m.norm.weight.mean()

    def looks(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) if y.sum() > -1e9 else y

    def hidden(m: Any, x: Tensor) -> Tensor:
        return m.conv(m.norm(x).relu_())

    def input_changed_in_place(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        y = m.norm(x)
        x[:, :, 0].mul_(1 + 1e-12)
        return m.conv(y)

    tied = Model(lambda m, x: m.norm(m.conv(x)) + m.other(x), **_pair(), other=nn.Conv2d(3, 3, 1))
    tied.other.weight = tied.conv.weight
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    hooked[0].register_forward_hook(triple)
    unused = Model(lambda m, x: m.conv(x), **_pair())
    elsewhere = "is used elsewhere too"
    return {
        "used_twice": (Model(used_twice, **_pair()), elsewhere),
        "returned": (Model(returned, **_pair()), elsewhere),
        "changed_in_place": (Model(changed_in_place, **_pair()), elsewhere),
        "through_a_view": (Model(through_a_view, **_pair()), elsewhere),
        "twice_with_relu": (Model(twice_with_relu, **_pair()), elsewhere),
        "norm_twice": (Model(norm_twice, **_pair()), "does not come from one convolution"),
        "weight_read": (Model(weight_read, **_pair()), "parameters are read by other parts"),
        "data_read": (Model(data_read, **_pair()), "parameters are read by other parts"),
        "norm_read": (Model(norm_read, **_pair()), "parameters are read by other parts"),
        "looks": (Model(looks, **_pair()), "looks at values"),
        "relu_in_place_between": (Model(hidden, **_pair()), "does not go to one convolution"),
        "input_changed_in_place": (Model(input_changed_in_place, **_pair()), "does not go to one convolution"),
        "tied": (tied, "tied to another module"),
        "hooks": (hooked, "forward hooks"),
        "unused": (unused, "does not call it"),
        "no_statistics": (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            "no running statistics",
        ),
        "zero_padding": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)), "pads with zeros"),
        "same_padding": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding="same")), "pads with zeros"),
        "before_transposed": (nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 3)), "borders would change"),
        "other_axis": (nn.Sequential(nn.Conv2d(3, 3, 1), LayerScale(6, 0.5, channel_dim=2)), "on another axis"),
        "linear_rows": (nn.Sequential(nn.Flatten(2), nn.Linear(36, 3), nn.BatchNorm1d(3)), "on another axis"),
    }


@pytest.mark.parametrize("name", list(_kept()))
def test_what_cannot_be_folded_is_kept_with_a_reason(name: str):
    model, reason = _kept()[name]
    ready(model)
    result = merged(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert result.changed == ()
    assert len(result.skipped) == 1
    assert reason in result.skipped[0][1]


def test_block_called_twice_folds_when_every_call_does():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    model = ready(Model(lambda m, x: m.block(F.relu(m.block(x))) + x, block=block, same=block))
    result = merged(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert result.changed == ("block.1",)
    assert isinstance(result.model.same[1], nn.Identity)
    assert result.model.same is result.model.block


def test_shared_convolution_with_own_norms_is_kept():
    modules = {"conv": nn.Conv2d(3, 3, 1), "first": nn.BatchNorm2d(3), "second": nn.BatchNorm2d(3)}
    model = ready(Model(lambda m, x: m.first(m.conv(x)) + m.second(m.conv(2 * x)), **modules))
    result = merged(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert result.changed == ()
    assert [name for name, _ in result.skipped] == ["first", "second"]


def test_features_are_results():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 4, 1)

        def forward_features(self, x: Tensor) -> list[Tensor]:
            return [self.norm(x)]

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.forward_features(x)[-1])

    model = ready(Network())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = merged(model, x)
    assert result.changed == ()
    torch.testing.assert_close(result.model.forward_features(x)[0], model.forward_features(x)[0])
    assert "forward_features" not in vars(result.model)


def test_odd_containers_and_dictionaries():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleDict(
                {name: nn.ModuleList([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)]) for name in "ab"}
            )

        def forward(self, x: Tensor) -> Tensor:
            outputs = {name: norm(input=conv(x)) for name, (conv, norm) in self.branches.items()}
            return torch.cat(list(outputs.values()), 1)

    result = merged(ready(Network()), torch.randn(2, 3, 9, dtype=torch.float64))
    assert result.changed == ("branches.a.1", "branches.b.1")


def test_training_model_is_merged_as_in_evaluation_and_stays_in_training():
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9)))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    model.train()
    torch.testing.assert_close(merge(model, x).model(x), expected)
    assert all(part.training for part in model.modules())


def test_merge_in_place_and_random_state():
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = model(x)
    state = torch.get_rng_state()
    assert merge(model, x, inplace=True).model is model
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), expected)


def test_short_types_and_frozen_weights():
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.bfloat16)
    model[0].requires_grad_(False)
    result = merge(model, torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)).model
    assert result[0].weight.dtype == result[0].bias.dtype == torch.bfloat16
    assert not result[0].weight.requires_grad


def test_conv_like_layers_branches_and_parametrizations_become_plain():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    model = nn.Sequential(
        DoubledConv2d.from_conv(conv, factor=2.0),
        nn.BatchNorm2d(4),
        Branches(4),
        nn.BatchNorm2d(4),
        parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
        nn.BatchNorm2d(4),
    )
    parametrize.register_parametrization(model[4], "bias", Doubling())
    ready(model)
    result = merged(model, torch.randn(2, 3, 9, 9, dtype=torch.float64))
    assert set(result.changed) == {"0", "1", "2", "3", "4", "5", "6"}
    assert [type(part) for part in result.model] == [nn.Conv2d, nn.Identity] * 2 + [nn.Conv2d] * 2 + [nn.Identity]
    assert sorted(result.model[4].state_dict()) == ["bias", "weight"]
    assert parametrize.is_parametrized(model[4])
    assert parametrize.is_parametrized(model[5])


def test_static_mixers_are_left_and_dynamic_layers_named():
    dynamic = DynamicConv2d(4, 4, 3)
    model = ready(nn.Sequential(InceptionDWConv2d(4, branch_ratio=0.25), dynamic))
    result = merged(model, torch.randn(2, 4, 9, 9, dtype=torch.float64))
    assert result.changed == ()
    assert result.skipped == (("1", "it depends on its input, so no plain layer does the same"),)


def test_merge_needs_an_example_only_where_there_is_something_to_fold():
    with pytest.raises(ValueError, match="example_input must be given"):
        merge(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert merge(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).changed == ()
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got int"):
        merge(3)  # type: ignore[arg-type]


def test_a_merge_that_would_change_the_function_is_refused():
    def unseen(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) * (2 if isinstance(m.norm, nn.Identity) else 1)

    def reads_attribute(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) * m.norm.eps

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(Unsupported, match="merging changes the output of this Model by 1 of its largest value"):
        merge(ready(Model(unseen, **_pair())), x)
    with pytest.raises(Unsupported, match="the merged Model does not run: 'Identity' object has no attribute 'eps'"):
        merge(ready(Model(reads_attribute, **_pair())), x)


def test_a_model_that_cannot_be_copied_says_so():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    with pytest.raises(Unsupported, match="inplace=True changes the model itself"):
        merge(model, torch.randn(1, 3, 4, 4))
