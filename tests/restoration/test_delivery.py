"""Playing by networks for patches, packing of weights and chunks, packages, and the measuring of what was delivered."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from convatlas.data.footage import Footage
from convatlas.errors import CheckpointError, DataError, UnknownName
from convatlas.networks.espcn import ESPCNConfig
from convatlas.networks.wdsr import WDSRConfig
from convatlas.restoration.delivery import (
    Described,
    PackageBytes,
    Playback,
    network_bytes,
    pack_index,
    pack_weights,
    read_package,
    unpack_index,
    unpack_weights,
    write_package,
)
from convatlas.restoration.delivery_quality import (
    PlainVideo,
    bytes_for,
    encode_plainly,
    fill,
    frame_error,
    measure_delivery,
    to_psnr,
)
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.video_chunks import PatchGrid
from convatlas.surgery import merge
from restoration.scenes import scene

GRID = PatchGrid(2, 3)
SIZE = (38, 46)  # the grid adds two rows and columns at scale 2


def network(seed: int = 0, scale: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = ESPCNConfig(scale=scale, in_channels=3, channels=4, init="icnr").build().eval()
    nn.init.normal_(model.sub_pixel.conv.weight, std=0.2)
    return model


def low_frames(count: int = 3) -> list[np.ndarray[Any, Any]]:
    return [Protocol().shrink(fill(scene(number, SIZE), (40, 48)), 2) for number in range(count)]


def index(count: int = 3, networks: int = 2) -> np.ndarray[Any, Any]:
    return (np.arange(count * 6).reshape(count, 6) % networks).astype(np.uint8)


# -- playing -----------------------------------------------------------------------------------------------------------


def test_equal_networks_give_what_one_gives():
    low, model = low_frames(), network()
    one = Playback([model], index() * 0, GRID, SIZE)
    two = Playback([model, model], index(), GRID, SIZE)
    assert one.low_size == (20, 24)
    for number, frame in enumerate(low):
        played = two.enlarge(frame, number)
        assert played.shape == (*SIZE, 3)
        assert np.array_equal(played, one.enlarge(frame, number))


def test_each_patch_is_enlarged_by_its_network():
    low, models = low_frames(1)[0], [network(0), network(1)]
    played = Playback(models, index(1), GRID, SIZE).filled(low, 0)
    for number in range(6):
        y, x = 10 * (number // 3), 8 * (number % 3)
        patch = torch.from_numpy(low[y : y + 10, x : x + 8].copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            wanted = (models[number % 2](patch)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(played[2 * y : 2 * y + 20, 2 * x : 2 * x + 16] - wanted).max() <= 1


def test_a_halo_of_the_networks_reach_leaves_no_seams():
    low, model = low_frames(1)[0], network()
    with torch.no_grad():
        whole = model(torch.from_numpy(low).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1)
    wanted = (255 * whole).round().permute(1, 2, 0).numpy()
    seams = {}
    for halo in (0, 4):
        played = Playback([model], index(1) * 0, GRID, SIZE, halo=halo).filled(low, 0)
        inner = (slice(10, 30), slice(10, 38))  # beyond the frame a halo is zero, where layers pad what they made
        seams[halo] = np.abs(played.astype(int) - wanted)[inner].max()
    assert seams[4] <= 1 < seams[0]


def test_playing_refuses_what_does_not_belong_together():
    low, model = low_frames(), network()
    with pytest.raises(ValueError, match="index asks for network 1, but there are 1"):
        Playback([model], index(), GRID, SIZE)
    with pytest.raises(ValueError, match=r"networks must have one scale, got \[2, 3\]"):
        Playback([model, network(scale=3)], index(), GRID, SIZE)
    with pytest.raises(ValueError, match=r"index must be \(frames, 6\), got \(3, 5\)"):
        Playback([model], np.zeros((3, 5), np.uint8), GRID, SIZE)
    player = Playback([model], index() * 0, GRID, SIZE)
    with pytest.raises(ValueError, match=r"frames must be \(20, 24\) pixels of low resolution, got \(38, 46\)"):
        player.enlarge(scene(0, SIZE), 0)
    with pytest.raises(ValueError, match="there are networks for 3 frames, got frame 3"):
        player.enlarge(low[0], 3)
    for count, told in ((2, "2"), (4, "more")):
        with pytest.raises(DataError, match=f"the networks are for 3 frames, the video has {told}"):
            list(player.play(low_frames(count)))
    assert len(list(player.play(low))) == 3


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "error"), [("float32", 0.0), ("float16", 1e-3), ("int8", 1 / 254)])
def test_weights_come_back_within_the_steps_of_their_type(store: Any, error: float):
    source = merge(WDSRConfig(dim=4, depth=2).build()).model
    nn.init.normal_(source.get_parameter("body.0.bias"))
    other = merge(WDSRConfig(dim=4, depth=2).build()).model
    packed = pack_weights(source.state_dict(), store)
    unpack_weights(other, packed)
    count = sum(tensor.numel() for tensor in source.state_dict().values())
    assert packed["values"].nbytes <= network_bytes(count, store)
    assert sum(tensor.numel() for name, tensor in packed.items() if name != "scales") == count
    for name, tensor in source.state_dict().items():
        most = tensor.flatten(1).abs().amax(1, keepdim=True) if tensor.dim() > 1 else tensor.abs()
        off = (other.state_dict()[name] - tensor).abs()
        limit = (error if tensor.dim() > 1 or store != "int8" else 1e-3) * most
        assert (off.flatten(1) if tensor.dim() > 1 else off).le(limit + 1e-7).all()


def test_weights_of_another_network_are_refused():
    packed = pack_weights(network().state_dict(), "float16")
    for channels, told in ((6, "smaller"), (2, "larger")):
        with pytest.raises(CheckpointError, match=f"the weights are those of a {told} network"):
            unpack_weights(ESPCNConfig(scale=2, in_channels=3, channels=channels).build(), packed)
    with pytest.raises(UnknownName, match="unknown store 'int4'"):
        pack_weights(network().state_dict(), "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be finite and fit float16, those of a do not"):
        pack_weights({"a": torch.tensor([1e6])}, "float16")


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 200])
def test_chunks_come_back(k: int, compress: bool):
    given = np.random.default_rng(0).integers(0, k, (7, 11)).astype(np.uint8)
    data = pack_index(given, k, compress=compress)
    assert np.array_equal(unpack_index(data, (7, 11), k, compress=compress), given)
    if not compress:
        assert len(data) == -(-77 * math.ceil(math.log2(k)) // 8)


def test_chunks_that_stay_compress():
    given = np.tile(np.random.default_rng(0).integers(0, 2, (1, 200)), (450, 1)).astype(np.uint8)
    assert len(pack_index(given, 2, compress=False)) == 11_250  # the 90,000 patches of 15 s
    assert len(pack_index(given, 2)) < 500


def test_damaged_chunks_are_told():
    data = pack_index(index(), 2)
    with pytest.raises(DataError, match="cannot be read"):
        unpack_index(data[:-4], (3, 6), 2)
    for compress in (False, True):
        with pytest.raises(DataError, match="must be 30 numbers below 2, got others"):
            unpack_index(pack_index(index(), 2, compress=compress), (5, 6), 2, compress=compress)
    with pytest.raises(ValueError, match="index must be below 2, got 2"):
        pack_index(np.full((1, 1), 2, np.uint8), 2)
    with pytest.raises(ValueError, match="k must be from 1 to 256, got 300"):
        pack_index(index(), 300)


# -- packages ----------------------------------------------------------------------------------------------------------

OPTIONS = {"in_channels": 3, "channels": 4}


def describe(**changes: Any) -> Described:
    fixed: dict[str, Any] = {"model": "espcn_x2", "options": OPTIONS, "count": 2, "grid": (2, 3), "halo": 2}
    fixed |= {"size": SIZE, "frames": 3, "store": "float32", "compress": True, "settings": {"crf": 20}}
    return Described(**{**fixed, **changes})


def test_a_package_plays_as_the_networks_did(tmp_path: Path):
    models = [network(0), network(1)]
    write_package(tmp_path, models, index(), describe())
    player, told = read_package(tmp_path)
    assert told == describe()
    before = Playback(models, index(), GRID, SIZE, halo=2)
    for number, frame in enumerate(low_frames()):
        assert np.array_equal(player.enlarge(frame, number), before.enlarge(frame, number))
    (tmp_path / "low.mp4").write_bytes(b"x" * 50)
    sizes = PackageBytes.of(tmp_path)
    assert sizes.low == 50
    assert sizes.total == sum(path.stat().st_size for path in tmp_path.iterdir())
    parameters = sum(parameter.numel() for parameter in models[0].parameters())
    assert network_bytes(parameters, "float32", 2) == 8 * parameters < sizes.networks < 8 * parameters + 1000


def test_folded_weight_norm_is_what_is_delivered(tmp_path: Path):
    torch.manual_seed(0)
    model = WDSRConfig(dim=4, depth=1).build().eval()
    options = {"in_channels": 3, "dim": 4, "depth": 1}
    write_package(tmp_path, [model], index() * 0, describe(model="wdsr_x2", options=options, count=1))
    player, _ = read_package(tmp_path)
    assert "body.0.weight" in player.networks[0].state_dict()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(player.networks[0](x), model(x), rtol=1e-5, atol=1e-6)


def test_broken_packages_are_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"is no package: networks\.safetensors and chunks\.bin must lie in it"):
        read_package(tmp_path)
    write_package(tmp_path, [network(0), network(1)], index(), describe())
    path = tmp_path / "networks.safetensors"
    tensors = load_file(path)
    told = {"convatlas": json.dumps({**vars(describe()), "grid": [2, 3]})}
    save_file({name: value for name, value in tensors.items() if name[0] != "1"}, path, metadata=told)
    with pytest.raises(CheckpointError, match=r"networks\.safetensors lacks the network of chunk 1"):
        read_package(tmp_path)
    save_file(tensors, path, metadata={"convatlas": "{}"})
    with pytest.raises(CheckpointError, match="does not tell what its networks are"):
        read_package(tmp_path)


# -- quality -----------------------------------------------------------------------------------------------------------


def test_quality_is_that_of_the_frames_that_are_played():
    low, truth = low_frames(), [scene(number, SIZE) for number in range(3)]
    player = Playback([network(0), network(1)], index(), GRID, SIZE)
    quality = measure_delivery(player, low, truth, shave=2, show=1)
    played = list(player.play(low))
    errors = [((a.astype(float) - b) ** 2).mean() / 255**2 for a, b in zip(played, truth, strict=True)]
    assert quality.network == pytest.approx(errors)
    assert quality.psnr == pytest.approx(-10 * np.log10(np.mean(errors)))
    bicubic = [Protocol().bicubic(frame, 2)[:38, :46] for frame in low]
    assert quality.bicubic == pytest.approx([frame_error(*pair) for pair in zip(bicubic, truth, strict=True)])
    assert quality.bicubic_psnr > quality.psnr
    assert quality.patches.shape == (3, 6)
    inner = ((played[2].astype(float) - truth[2]) ** 2)[2:18, 2:14].mean() / 255**2
    assert quality.patches[2, 0] == pytest.approx(inner)
    assert quality.frames_per_second > 0
    assert np.array_equal(quality.shown[2], truth[1])
    assert np.array_equal(quality.shown[1], played[1])
    with pytest.raises(DataError, match="the video to compare with ends after 2 of 3 frames"):
        measure_delivery(player, low, truth[:2], shave=2)
    with pytest.raises(DataError, match="has more than the 3 frames that were delivered"):
        measure_delivery(player, low, [*truth, truth[0]], shave=2)


def test_the_plain_video_is_measured_and_interpolated():
    pytest.importorskip("av")
    frames = [scene(number, (48, 64)) for number in range(4)]
    footage = Footage("clip", lambda: iter(frames), 4, (48, 64), Fraction(25))
    good, bad = encode_plainly(footage, (45, 15))
    assert (good.crf, bad.crf) == (15, 45)
    assert good.psnr > bad.psnr + 5
    assert good.bytes > bad.bytes
    between = bytes_for((good.psnr + bad.psnr) / 2, [good, bad])
    assert between == pytest.approx(math.sqrt(good.bytes * bad.bytes))
    assert bytes_for(bad.psnr - 1, [good, bad]) is None
    assert bytes_for(30, []) is None
    assert bytes_for(30.0, [PlainVideo(20, 1000, 30.0)]) == pytest.approx(1000)
    assert to_psnr(0) == math.inf
