"""Volumes and short videos are read, brought upright, prepared and augmented."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from convatlas.data.image_files import Unreadable
from convatlas.data.images import read_images
from convatlas.data.volume_transforms import VolumeAugment, VolumePreprocess, resize_volume
from convatlas.data.volumes import VolumeReading, montage, read_volume, volume_files
from convatlas.errors import DataError, UnknownName

nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed: NIfTI files cannot be written")


def body() -> npt.NDArray[np.float32]:
    """A volume with axes left-right, back-front, feet-head, whose values tell the place: x + 10 y + 100 z."""
    x, y, z = np.meshgrid(range(4), range(5), range(6), indexing="ij")
    return (x + 10 * y + 100 * z).astype(np.float32)


def write(path: Path, values: npt.NDArray[np.float32], affine: npt.NDArray[np.float64] | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def clip(path: Path, frames: int, size: tuple[int, int] = (32, 48)) -> Path:
    av = pytest.importorskip("av", reason="PyAV is not installed: videos cannot be written")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            grey = np.full((*size, 3), round(255 * index / max(frames - 1, 1)), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("plane", "corner", "shape"),
    [
        # the first voxel of the first slice: at the lowest place of its axis, then front or head, then the right side
        ("axial", 3 + 10 * 4 + 100 * 0, (6, 5, 4)),
        ("coronal", 3 + 10 * 0 + 100 * 5, (5, 6, 4)),
        ("sagittal", 0 + 10 * 4 + 100 * 5, (4, 6, 5)),
    ],
)
def test_slices_stand_upright_whatever_the_order_in_the_file(tmp_path: Path, plane, corner, shape):
    path = write(tmp_path / "a.nii.gz", body())
    expected = read_volume(path, VolumeReading(plane=plane))
    assert expected.shape == (*shape, 1)
    assert expected[0, 0, 0, 0] == corner
    turned = body().transpose(2, 0, 1)[:, ::-1]  # other axes first, and left and right exchanged
    affine = np.array([[0, -1, 0, 3], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    again = read_volume(write(tmp_path / "b.nii", turned, affine), VolumeReading(plane=plane))
    np.testing.assert_array_equal(again, expected)


def test_spacing_is_brought_to_what_is_asked(tmp_path: Path):
    path = write(tmp_path / "a.nii", body(), np.diag([2.0, 1.0, 3.0, 1.0]))
    assert read_volume(path).shape == (6, 5, 8, 1), "rows and columns have the same spacing"
    resampled = read_volume(path, VolumeReading(spacing=(1, 1, 1)))
    assert resampled.shape == (18, 5, 8, 1)
    assert resampled.min() >= 0
    assert resampled.max() <= body().max()
    np.testing.assert_allclose(resampled.mean(), body().mean(), rtol=0.02)


def test_modalities_become_channels_and_a_long_series_is_refused(tmp_path: Path):
    several = np.stack([body(), 2 * body()], axis=3)
    assert read_volume(write(tmp_path / "a.nii", several)).shape == (6, 5, 4, 2)
    series = write(tmp_path / "b.nii", np.zeros((2, 2, 2, 40), np.float32))
    with pytest.raises(Unreadable, match="a series of 40 volumes"):
        read_volume(series)


def test_videos_become_frames_spread_over_their_length(tmp_path: Path):
    path = clip(tmp_path / "a.mp4", 23)
    frames = read_volume(path, VolumeReading(frames=5))
    assert frames.shape == (5, 32, 48, 3)
    assert frames.dtype == np.uint8
    light = frames.mean((1, 2, 3))
    assert (np.diff(light) > 20).all()
    assert light[0] < 30
    assert light[-1] > 200
    assert len(read_volume(path, VolumeReading(frames=100))) == 23


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.nii", b"", "the file is empty"),
        ("a.nii.gz", b"not a volume", ""),
        ("a.npy", b"junk", ""),
        ("a.mp4", b"junk", ""),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=f"{name} cannot be read: .*{reason}"):
        read_volume(tmp_path / name)
    with pytest.raises(Unreadable, match="there is no such file"):
        read_volume(tmp_path / "missing.nii")


def test_pickled_arrays_are_not_opened(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Unreadable):
        read_volume(tmp_path / "a.npy")


def test_folders_of_volumes_are_sets(tmp_path: Path):
    for index, (name, label) in enumerate(
        [("a.nii.gz", "well"), ("b.nii", "ill"), ("c.npy", "ill"), ("bad.nii", "ill")]
    ):
        path = tmp_path / label / name
        path.parent.mkdir(exist_ok=True)
        if name == "bad.nii":
            path.write_bytes(b"junk")
        elif name == "c.npy":
            np.save(path, body().transpose(2, 1, 0))
        else:
            write(path, body() + index)
    volumes = read_images(tmp_path, kind=volume_files())["all"]
    assert (volumes.classes, volumes.channels, len(volumes)) == (("ill", "well"), 1, 3)
    assert [each.path for each in volumes.skipped] == ["ill/bad.nii"]
    assert all(volumes.image(index).shape == (6, 5, 4, 1) for index in range(3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="holds no volume files: expected one subfolder of volumes for each class"):
        read_images(tmp_path / "other", kind=volume_files())


def test_arrays_of_volumes(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 8, 9), np.float32), y=np.arange(4) % 2)
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 3, 5, 8, 9), np.uint8), y=np.arange(4) % 2)
    for name, shape in (("a", (3, 8, 9, 1)), ("b", (5, 8, 9, 3))):
        assert read_images(tmp_path / f"{name}.npz", kind=volume_files())["all"].image(0).shape == shape


def test_preprocessing_scales_resizes_and_normalises():
    volume = np.random.default_rng(0).normal(100, 20, (7, 20, 30, 1)).astype(np.float32)
    volume[:, :5] = 0
    preprocess = VolumePreprocess(size=(4, 10, 10), mean=(0.5,), std=(0.25,))
    tensor = preprocess(volume)
    assert tensor.shape == (1, 4, 10, 10)
    scaled = preprocess.scaled(volume)
    assert (scaled.min(), scaled.max()) == (0, 1)
    torch.testing.assert_close(preprocess.scaled(3 * volume - 5), scaled)
    standard = VolumePreprocess(intensity="standardise").scaled(volume)[0]
    inside = standard[standard > standard.min()]
    torch.testing.assert_close(inside.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert VolumePreprocess(intensity="none").scaled(volume)[0, 6, 10, 10] == volume[6, 10, 10, 0]
    assert preprocess.denormalise(tensor).shape == (20, 20)


def test_frames_are_taken_not_mixed():
    video = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((10, 4, 4, 3), np.uint8)
    taken = VolumePreprocess(size=(4, 4, 4), mean=(0.0,), std=(1.0,), depth="sample")(video)
    assert (255 * taken[0, :, 0, 0]).round().tolist() == [0, 3, 6, 9]
    repeated = VolumePreprocess(size=(4, 4, 4), mean=(0.0,), std=(1.0,), depth="sample")(video[:2])
    assert (255 * repeated[0, :, 0, 0]).round().tolist() == [0, 0, 1, 1]


def test_resizing_keeps_a_constant_and_a_slope():
    assert torch.allclose(resize_volume(torch.ones(2, 5, 6, 7), (3, 9, 4)), torch.ones(2, 3, 9, 4))
    slope = torch.arange(16.0)[None, :, None, None].expand(1, 16, 4, 4)
    half = resize_volume(slope, (8, 4, 4))[0, :, 0, 0]
    torch.testing.assert_close(half[1:-1], 2 * torch.arange(1.0, 7) + 0.5)


@pytest.mark.parametrize("depth", ["resize", "sample"])
def test_augmentation_follows_its_generator(depth):
    volume = np.random.default_rng(0).integers(0, 255, (6, 20, 24, 3)).astype(np.uint8)
    preprocess = VolumePreprocess(size=(4, 12, 12), depth=depth)
    augment = VolumeAugment(tilt=5, dflip=0.5, vflip=0.5, noise=0.1)
    results = [augment(volume, preprocess, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == (3, 4, 12, 12)
    still = VolumeAugment(scale=(1, 1), degrees=0, translate=0, zoom=0, hflip=0, jitter=0, brightness=0)
    assert torch.equal(still(volume, preprocess, torch.Generator()), preprocess(volume))


def test_a_turn_by_a_right_angle_is_exact_on_a_cube():
    volume = np.random.default_rng(0).random((5, 5, 5, 1)).astype(np.float32)
    preprocess = VolumePreprocess(size=(5, 5, 5), mean=(0.0,), std=(1.0,), intensity="none")
    from convatlas.data import volume_transforms

    turned = volume_transforms._moved(preprocess(volume), [0, 0, 90], [0, 0, 0], 1.0, plane_only=False)
    torch.testing.assert_close(turned, torch.rot90(preprocess(volume), 1, (2, 3)), rtol=0, atol=1e-5)


def test_montage_shows_every_slice_once():
    volume = np.arange(5)[:, None, None, None] * np.ones((5, 2, 3, 1), np.int64)
    image = montage(volume)
    assert image.shape == (4, 9, 1)
    assert [int(image[2 * (k // 3), 3 * (k % 3), 0]) for k in range(6)] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VolumeReading(frames=0), "frames must be at least 1, got 0"),
        (lambda: VolumeReading(spacing=(1, 0, 1)), "spacing must be positive"),
        (lambda: VolumePreprocess(size=(0, 4, 4)), "size must be depth, height and width, all positive"),
        (lambda: VolumePreprocess(crop=0), "crop must be above 0"),
        (lambda: VolumeAugment(hflip=2), "hflip must be a probability"),
        (lambda: VolumeAugment(jitter=0.5), "jitter must be at least 0 and below 0.5"),
    ],
)
def test_impossible_settings_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(UnknownName, match="did you mean axial"):
        VolumeReading(plane="axia")  # type: ignore[arg-type]


def test_frames_of_a_video_are_augmented_alike() -> None:
    still = VolumeAugment(scale=(1, 1), degrees=0, translate=0, zoom=0, hflip=0, jitter=0, brightness=0)
    changing = dataclasses.replace(still, rand_augment="rand-m9-n4-inc1", random_erasing=0.5)
    preprocess = VolumePreprocess(size=(4, 16, 16), mean=(0.5,), std=(0.5,), depth="sample")
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    clip = np.stack([frame] * 4)
    expected = still(clip, preprocess, torch.Generator().manual_seed(0))
    changed = erased = 0
    for seed in range(12):
        result = changing(clip, preprocess, torch.Generator().manual_seed(seed))
        changed += not torch.equal(result[:, 0], expected[:, 0])
        noise = (result != result[:, :1]).any(1).any(0)  # where frames differ
        if noise.any():
            erased += 1
            rows, columns = (noise.any(axis).nonzero().flatten() for axis in (1, 0))
            assert noise.sum() == len(rows) * len(columns)
            assert len(rows) * len(columns) < 16 * 16 / 2
    assert changed > 6
    assert 2 < erased < 12
    with pytest.raises(ValueError, match="rand_augment takes videos of uint8, got float32"):
        changing(clip.astype(np.float32), preprocess, torch.Generator())
    with pytest.raises(ValueError, match="random_erasing must be a probability"):
        VolumeAugment(random_erasing=2)
