"""SparK: sizes, masks, loss, pictures, any network, the authors' layout, a loop of one's own."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.training.method import Together, make_methods
from convatlas.training.optim import Lamb, make_optimizer
from convatlas.training.settings import Training
from convatlas.training.spark import (
    PUBLISHED,
    LightDecoder,
    SparK,
    SparKModel,
    feature_maps,
    patchify,
    schedule,
    unpatchify,
)
from convatlas.weights import load_weights

RESNET = {"num_classes": 0, "depths": (1, 1, 1, 1), "widths": (4, 4, 6, 8), "stem_width": 4}
CONVNEXT = {"num_classes": 0, "depths": (1, 1, 1, 1), "dims": (4, 4, 6, 8), "layer_scale_init": 0.5}


def tiny() -> nn.Module:
    return create_model("resnet18", **RESNET)


@pytest.mark.parametrize(
    ("name", "encoder", "whole"),
    [
        ("resnet50", 23_508_032, 52_921_835),
        ("resnet101", 42_500_160, 71_913_963),
        ("convnext_small", 49_453_152, 74_383_083),
    ],
)
def test_published_sizes(name: str, encoder: int, whole: int):
    with torch.device("meta"):
        network = create_model(name, num_classes=0)
        decoder = LightDecoder(32)
        channels = [feature.channels for feature in network.feature_info]
        network.norm = nn.Identity()
        spark = SparK()
        spark.dims, norms = 2, 0
        norms = sum(sum(p.numel() for p in spark._norm(network, count).parameters()) for count in channels)
        tokens = sum(channels)
        projections = [spark._projection(level, count) for level, count in enumerate(reversed(channels))]

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(decoder) == 23_183_115
    assert count(network) == encoder
    assert count(network, decoder, *projections) + norms + tokens == whole


def test_prepared_parts_have_the_authors_shapes():
    spark = SparK(decoder_width=32)
    spark.prepare(tiny())
    shapes = {name: tuple(value.shape) for name, value in spark.named_parameters()}
    assert shapes["densify_projs.0.weight"] == (32, 8, 1, 1)
    assert shapes["densify_projs.1.weight"] == (16, 6, 3, 3)
    assert shapes["mask_tokens.3"] == (1, 4, 1, 1)
    assert shapes["dense_decoder.dec.0.up_sample.weight"] == (32, 32, 4, 4)
    assert shapes["dense_decoder.proj.weight"] == (3, 1, 1, 1)
    same = SparK(decoder_width=32, densify_norm="ln")
    same.prepare(create_model("resnet18", **{**RESNET, "widths": (4, 4, 6, 32)}))
    assert isinstance(same.densify_projs[0], nn.Identity)
    assert max(token.abs().max() for token in same.mask_tokens) <= 0.02


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 2, 4, 8, 4)])
def test_cells_are_cut_in_rows_and_put_together_again(shape: tuple[int, ...]):
    x = torch.randn(shape)
    patches = patchify(x, 4)
    grid = [side // 4 for side in shape[2:]]
    assert patches.shape == (shape[0], torch.Size(grid).numel(), 4 ** len(grid) * shape[1])
    torch.testing.assert_close(unpatchify(patches, 4, grid), x)
    if len(grid) == 2:
        torch.testing.assert_close(patches[0, 1].reshape(4, 4, 3)[2, 1], x[0, :, 2, 5])
    with pytest.raises(ValueError, match="multiples of the stride 5"):
        patchify(x, 5)


def test_masks_hide_the_same_share_of_each_image():
    spark = SparK(0.6)
    cells = spark.mask(5, (7, 7), generator=torch.Generator().manual_seed(1))
    assert cells.shape == (5, 1, 7, 7)
    assert (cells.flatten(1).sum(1) == 20).all()  # of 49 x 0.4 = 19.6
    assert len({tuple(each.flatten().tolist()) for each in cells}) == 5
    half = SparK(0.5).mask(1, (1, 5))
    assert half.sum() == 2  # 2.5 is rounded to even
    assert torch.equal(cells, spark.mask(5, (7, 7), generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="hides all or none"):
        spark.mask(1, (1, 1))


def test_the_loss_is_that_of_hidden_cells_and_zero_for_their_normalised_pixels():
    model, spark = tiny().double(), SparK(decoder_width=32).double()
    spark.prepare(model)
    images, cells = torch.randn(2, 3, 64, 64).double(), spark.mask(2, (2, 2))
    target = spark._normalised(images)[0]
    torch.testing.assert_close(target.var(2), torch.ones(2, 4).double(), rtol=1e-4, atol=0)
    hidden = ~cells.flatten(1)[..., None]
    perfect = unpatchify(torch.where(hidden, target, torch.randn_like(target)), 32, (2, 2))
    assert spark._loss(images, perfect, cells) == 0
    off = unpatchify(torch.where(hidden, target + 2, target), 32, (2, 2))
    torch.testing.assert_close(spark._loss(images, off, cells), torch.tensor(4.0).double())
    # What hidden cells hold changes the target alone.
    other = unpatchify(torch.where(hidden, torch.randn_like(target), patchify(images, 32)), 32, (2, 2))
    with torch.no_grad():
        first, second = (spark.eval()(model.eval(), each, cells).prediction for each in (images, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_pictures_show_the_visible_cells_as_they_are():
    model, spark = tiny(), SparK(decoder_width=32)
    spark.prepare(model)
    images, cells = torch.randn(2, 3, 64, 64), spark.mask(2, (2, 2))
    shown, filled = spark.pictures(model, images, cells)
    visible = cells.flatten(1)
    assert torch.equal(patchify(filled, 32)[visible], patchify(images, 32)[visible])
    assert patchify(shown, 32)[~visible].abs().max() == 0
    assert model.training
    assert spark.training


class Plain(nn.Module):
    """A network of torch's own layers that returns scores."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 4, 6, 8)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(2, b), nn.SiLU())
                for a, b in itertools.pairwise(widths)
            )
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


class Listing(Plain):
    """Returns its maps, as timm's networks with ``features_only`` do."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


@pytest.mark.parametrize("kind", [Plain, Listing])
def test_any_network_of_convolutions_learns(kind: type[nn.Module]):
    torch.manual_seed(0)
    model, spark = kind(), SparK(0.5, decoder_width=16)
    before = copy.deepcopy(model.state_dict())
    assert spark.prepare(model) is model
    assert spark.stride == 8
    assert list(spark.levels) == [0, 1, 2]
    assert [tuple(each.shape[1:]) for each in feature_maps(model, torch.zeros(1, 1, 32, 32))] == [
        (4, 16, 16),
        (6, 8, 8),
        (8, 4, 4),
    ]
    images = torch.nn.functional.interpolate(torch.randn(8, 1, 4, 4), size=(32, 32), mode="bilinear")
    optimizer = torch.optim.AdamW([*model.parameters(), *spark.parameters()], 0.02)
    losses = []
    for step in range(30):
        cells = spark.mask(8, (4, 4), generator=torch.Generator().manual_seed(step % 3))
        loss = spark(model, images, cells).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    kind().load_state_dict(model.state_dict())  # the plain network, by the same keys
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(not part._forward_hooks for part in model.modules())


@pytest.mark.parametrize(("dims", "conv", "norm"), [(1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)])
def test_networks_for_signals_and_volumes(dims: int, conv: type[nn.Module], norm: type[nn.Module]):
    layers = nn.Sequential(*(nn.Sequential(conv(a, 4, 3, 2, 1), norm(4), nn.ReLU()) for a in (1, 4)))
    spark = SparK(0.5, decoder_width=8)
    spark.prepare(layers)
    assert spark.dims == dims
    images = torch.randn(2, 1, *[8] * dims)
    result = spark(layers, images)
    result.loss.backward()
    assert result.prediction.shape == images.shape
    assert all(parameter.grad is not None for parameter in [*layers.parameters(), *spark.parameters()])


@pytest.mark.parametrize(("name", "options"), [("resnet18", RESNET), ("convnext_tiny", CONVNEXT)])
def test_whole_models_of_the_authors_load_and_encoders_go_on(name: str, options: dict[str, object]):
    encoder = create_model(name, **options)
    if name == "convnext_tiny":
        encoder.norm = nn.Identity()
    whole = SparKModel(encoder, SparK(decoder_width=32))
    theirs = {}
    for key, value in whole.state_dict().items():
        part, _, rest = key.partition(".")
        rest = rest.replace("layer_scale.gamma", "gamma")
        theirs[f"sparse_encoder.sp_cnn.{rest}" if part == "encoder" else rest] = torch.full_like(value, 0.25)
    deprecated = {"imn_m": torch.full((1, 3, 1, 1), float("nan")), "norm_black": torch.zeros(1, 3, 8, 8)}
    report = load_weights(whole, {**theirs, **deprecated})
    assert report.layout == "authors"
    assert not report.missing
    assert not report.unexpected
    assert all(bool((value == 0.25).all()) for value in whole.state_dict().values() if value.is_floating_point())
    # Files of the encoder alone have no classifier and, of ConvNeXt, no last norm.
    flat = {key.removeprefix("sparse_encoder.sp_cnn."): value for key, value in theirs.items() if key[0] == "s"}
    plain = create_model(name, **{**options, "num_classes": 7})
    with pytest.raises(ValueError, match="missing"):
        load_weights(plain, flat)
    behind = [key for key in plain.state_dict() if key.startswith(("fc.", "head.", "norm."))]
    kept = plain.state_dict()[behind[0]].clone()
    report = load_weights(plain, flat, optional=behind)
    assert not report.missing
    report = load_weights(plain, {"module": theirs, "epoch": 3}, optional=behind)  # decoder and all
    assert not report.missing
    assert any("keeps its own" in done for _, done in report.adapted)
    assert torch.equal(plain.state_dict()[behind[0]], kept)


@pytest.mark.parametrize(("name", "options"), [("resnet18", RESNET), ("convnext_tiny", CONVNEXT)])
def test_mixed_precision(name: str, options: dict[str, object]):
    model, spark = create_model(name, **options), SparK(decoder_width=32)
    spark.prepare(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = spark(model, torch.randn(2, 3, 64, 64)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_networks_that_fill_hidden_cells_are_refused():
    tokens = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}
    with pytest.raises(Unsupported, match=r"fills hidden cells between its layers, which stages\.0"):
        SparK(decoder_width=32).prepare(create_model("pvt_tiny", **tokens))


def test_published_files_are_named():
    assert len(PUBLISHED) == 8
    assert all(files[0].by_hand and files[0].licence == "MIT" for files in PUBLISHED.values())


def test_its_optimizer_holds_everything_and_its_decay_rises():
    spark, model = SparK(decoder_width=32, weight_decay_end=0.2), tiny()
    spark.prepare(model)
    training = Training(epochs=11, optimizer="lamb", lr=0.1, weight_decay=0.04, beta2=0.95)
    (optimizer,) = spark.optimizers(model, training)
    assert isinstance(optimizer, Lamb)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in [*model.parameters(), *spark.parameters()]}
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(token) in free for token in spark.mask_tokens)
    found = []
    for epoch in (0, 5, 10):
        spark.start_epoch(model, epoch)
        found += {group["weight_decay"] for group in optimizer.param_groups} - {0.0}
    assert found == pytest.approx([0.04, 0.12, 0.2])


def test_schedule_ends():
    settings = {"peak_lr": 2.0, "weight_decay": 0.04, "weight_decay_end": 0.2, "warmup_steps": 10, "steps": 101}
    assert schedule(0, **settings) == (pytest.approx(0.01), pytest.approx(0.04))
    assert schedule(10, **settings)[0] == pytest.approx(2.0)
    assert schedule(100, **settings) == (pytest.approx(0.002), pytest.approx(0.2))


def test_lamb_steps_are_as_long_as_the_weights():
    decayed, free = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lamb([{"params": [decayed], "weight_decay": 0.1}, {"params": [free]}], lr=0.1)
    decayed.grad, free.grad = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])
    before = decayed.detach().clone()
    optimizer.step()
    assert (decayed - before).norm().item() == pytest.approx(0.1 * 5)
    torch.testing.assert_close(free.detach(), torch.tensor([2.9, 4.1]))
    assert isinstance(make_optimizer(nn.Linear(2, 2), Training(optimizer="lamb")), Lamb)
    for settings in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match="must"):
            Lamb([free], **settings)


def test_bad_input_is_told():
    for settings in ({"mask_ratio": 1.0}, {"decoder_width": 0}, {"weight_decay_end": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SparK(**settings)
    with pytest.raises(ValueError, match="multiple of the stride"):
        SparK(decoder_width=48).prepare(tiny())
    with pytest.raises(ValueError, match="power of two"):
        LightDecoder(12)
    with pytest.raises(ValueError, match="dims"):
        LightDecoder(8, dims=4)
    spark = SparK(decoder_width=32)
    with pytest.raises(ValueError, match="prepare"):
        spark(tiny(), torch.zeros(1, 3, 64, 64))
    model = spark.prepare(tiny())
    with pytest.raises(ValueError, match="multiples of the total stride 32"):
        spark(model, torch.zeros(1, 3, 64, 65))
    with pytest.raises(ValueError, match="cells must be"):
        spark(model, torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 3, 3, dtype=torch.bool))
    model.set_gradient_checkpointing()
    with pytest.raises(Unsupported, match="recompute"):
        SparK(decoder_width=32).prepare(model)
    with pytest.raises(Unsupported, match="no cubes"):
        SparK().prepare(create_model("r3d_18", num_classes=0))
    with pytest.raises(Unsupported, match="no convolution"):
        SparK().prepare(nn.Linear(2, 2))


def test_it_is_made_from_settings():
    together = Together(make_methods({"spark": {"mask_ratio": 0.75, "decoder_width": 32}}))
    assert [type(part) for part in together.parts()] == [SparK]
    model = together.prepare(tiny())
    assert together.losses(model, {"image": torch.randn(2, 3, 128, 128)}, lambda m, b: {})["loss"].requires_grad
    assert together.losses(model, {"image": torch.empty(0)}, lambda m, b: {}) == {}
