"""Ensem-NN: sizes, what each of its networks sees, bad options."""

from __future__ import annotations

import pytest
import torch

from convatlas.networks.registry import create_model, model_config
from convatlas.networks.skeleton_cnn import SkeletonBase
from convatlas.ops.score_fusion import fuse_scores
from convatlas.training.measure import count_parameters

#: For 60 classes, 100 frames and two bodies of 25 joints.
PARAMETERS = {
    "skeleton_two_stream": 7_796_412,
    "skeleton_attention": 3_936_799,
    "skeleton_difference": 3_903_036,
}
SMALL = {"joints": 5, "frames": 12, "num_classes": 4, "widths": (6, 8), "depths": (1, 1)}


def _clips() -> torch.Tensor:
    return torch.randn(3, 15, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_parameters():
    with torch.device("meta"):
        for name, count in PARAMETERS.items():
            assert count_parameters(create_model(name)) == count, name
        assert count_parameters(SkeletonBase(150, (64, 128, 256, 512), (2, 2, 2, 2))) == 3_872_256
        parts = [range(12)] * 4 + [range(10)]  # two bodies with parts of 6, 6, 6, 6 and 5 joints
        assert count_parameters(create_model("skeleton_body_part", parts=[list(part) for part in parts])) == 19_404_348
        whole = count_parameters(create_model("ensem_nn"))
        assert whole == sum(PARAMETERS.values()) + count_parameters(create_model("skeleton_body_part"))


def test_streams_see_the_clip_and_the_transposed_clip():
    model = create_model("skeleton_two_stream", **SMALL).double().eval()
    x = _clips()
    features = torch.cat([model.temporal(x), model.spatial(x.mT)], dim=1)
    torch.testing.assert_close(model(x), model.fc(features))
    with pytest.raises(ValueError, match="this network was built for 12 frames, got 9: resample first"):
        model(x[..., :9])


def test_parts_see_their_joints_only():
    model = create_model("skeleton_body_part", **SMALL, parts=((0, 1), (1, 4))).double().eval()
    x, other = _clips(), _clips()
    other[:, 6:12] += 1  # joints 2 and 3 are in no part
    torch.testing.assert_close(model(other), model(x))
    other[:, 12] += 1
    assert not torch.allclose(model(other), model(x))


def test_attention_to_frames_has_the_mean_one():
    model = create_model("skeleton_attention", **SMALL, reduction=4).double().eval()
    x = _clips()
    weights = model.frame_weights(x)
    torch.testing.assert_close(weights.sum(2), torch.full((3, 1), 12.0, dtype=torch.float64))
    features = model.base.features(x * weights)
    gates = model.channel_weights(features)
    assert ((gates > 0) & (gates < 1)).all()
    torch.testing.assert_close(model(x), model.fc((features * gates[..., None]).mean(2)))


def test_differences_see_no_pose():
    model = create_model("skeleton_difference", **SMALL).double().eval()
    x = _clips()
    torch.testing.assert_close(model(x + torch.randn(3, 15, 1, dtype=torch.float64)), model(x))
    still = x[..., :1].expand(-1, -1, 12)
    torch.testing.assert_close(model(still), model(torch.zeros_like(x)))
    with pytest.raises(ValueError, match="x must have at least 2 frames, got 1"):
        model(x[..., :1])


@pytest.mark.parametrize("fusion", ["mean", "product", "max", "weighted"])
def test_the_ensemble_is_the_fusion_of_its_members(fusion: str):
    options = {**SMALL, "parts": ((0, 1), (2, 3, 4)), "reduction": 4, "fusion": fusion}
    config = model_config("ensem_nn", **options).override(weights=(0.4, 0.3, 0.2, 0.1))
    ensemble = config.build().double().eval()
    x = _clips()
    scores = [member(x).softmax(1) for member in ensemble.members.values()]
    fused = fuse_scores(scores, fusion, (0.4, 0.3, 0.2, 0.1) if fusion == "weighted" else None)  # type: ignore[arg-type]
    torch.testing.assert_close(ensemble(x).exp(), fused / fused.sum(1, keepdim=True), rtol=1e-6, atol=1e-7)
    assert list(ensemble.members) == ["two_stream", "body_part", "attention", "difference"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("skeleton_body_part", {"parts": ((0, 50),)}, "parts must be joints below 50, got 50"),
        ("skeleton_body_part", {"parts": ((),)}, "parts must each have a joint"),
        ("skeleton_attention", {"reduction": 600}, r"reduction must be from 1 to the last of widths \(512\), got 600"),
        ("skeleton_difference", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ("skeleton_difference", {"depths": (1,)}, "widths and depths must be as many"),
        ("ensem_nn", {"fusion": "median"}, "unknown fusion 'median'"),
    ],
)
def test_bad_options_are_told(name: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)  # type: ignore[arg-type]


def test_bad_inputs_are_told():
    model = create_model("skeleton_difference", **SMALL)
    with pytest.raises(ValueError, match=r"x must be \(B, 15, T\), 5 joints of 3 coordinates, got \(2, 14, 12\)"):
        model(torch.zeros(2, 14, 12))
