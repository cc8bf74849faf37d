"""Evaluation preprocessing against Pillow, and training augmentation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from convatlas.data.dataset import Augmented
from convatlas.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    Preprocess,
    affine,
    resize,
)

RNG = np.random.default_rng(0)
PLAIN = Preprocess(size=16, mean=(0.0,), std=(1.0,), crop=1.0)
STILL = Augment(random_resized_crop=False, hflip=0.0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 30), (40, 11)])
def test_resize_is_pillows_bit_by_bit(interpolation: str, channels: int, size: tuple[int, int]) -> None:
    image = pixels(20, 17, channels)
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    expected = np.asarray(picture.resize((size[1], size[0]), Image.Resampling[interpolation.upper()]))
    resized = resize(image, size, interpolation)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, expected.reshape(*size, channels))


def test_resize_of_other_types_and_channels() -> None:
    image = RNG.random((12, 10, 5), np.float32)
    resized = resize(image, (7, 9), "bicubic")
    assert (resized.shape, resized.dtype) == ((7, 9, 5), np.float32)
    np.testing.assert_array_equal(
        resized[..., 3], np.asarray(Image.fromarray(image[..., 3].copy()).resize((9, 7), Image.Resampling.BICUBIC))
    )
    four = pixels(12, 10, 4)
    assert abs(resize(four, (7, 9))[..., :3].astype(int) - resize(four[..., :3].copy(), (7, 9))).max() <= 1
    assert resize(four, (7, 9)).dtype == np.uint8
    steep = np.zeros((4, 4, 2), np.uint8)
    steep[:2] = 255
    assert set(np.unique(resize(steep, (16, 16), "lanczos"))) >= {0, 255}  # overshoot is clipped, it does not wrap
    assert resize(steep, (16, 16), "lanczos")[0, 0, 0] > 200
    with pytest.raises(ValueError, match="unknown interpolation 'bicubik': did you mean bicubic"):
        resize(four, (7, 9), "bicubik")  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(50, 80), (80, 50), (50, 50), (9, 200), (32, 32), (3, 5)])
@pytest.mark.parametrize("crop", [0.875, 1.0, 0.9])
def test_preprocess_is_short_side_resize_and_centre_crop(height: int, width: int, crop: float) -> None:
    image = pixels(height, width, 3)
    short = math.floor(28 / crop)
    new = (short, short * width // height) if height <= width else (short * height // width, short)
    picture = Image.fromarray(image).resize((new[1], new[0]), Image.Resampling.BICUBIC)
    top, left = round((new[0] - 28) / 2), round((new[1] - 28) / 2)
    expected = np.asarray(picture.crop((left, top, left + 28, top + 28)))
    preprocess = Preprocess(28, crop=crop)
    np.testing.assert_array_equal(preprocess.view(image), expected)
    tensor = preprocess(image)
    assert (tensor.shape, tensor.dtype) == ((3, 28, 28), torch.float32)
    wanted = (expected.transpose(2, 0, 1) / 255 - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(
        IMAGENET_STD, (3, 1, 1)
    )
    np.testing.assert_allclose(tensor.numpy(), wanted, atol=2e-6)


def test_preprocess_of_a_rectangle() -> None:
    image = pixels(30, 40, 1)
    preprocess = Preprocess((16, 24), crop=0.8, mean=(0.5,), std=(0.5,))
    whole = resize(image, (22, 30), "bicubic")  # covers floor(16 / 0.8) = 20 by floor(24 / 0.8) = 30
    np.testing.assert_array_equal(preprocess.view(image), whole[3:19, 3:27])
    assert preprocess(image).shape == (1, 16, 24)


def test_stretching_takes_the_whole_image() -> None:
    image = pixels(30, 50, 3)
    view = Preprocess(size=(12, 16), crop=1.0, stretch=True).view(image)
    assert np.array_equal(view, resize(image, (12, 16)))
    with pytest.raises(ValueError, match=r"crop must be 1 where images are stretched, got 0\.875"):
        Preprocess(stretch=True)


def test_an_extremely_long_image_takes_little_memory() -> None:
    image = np.repeat(np.arange(0, 250, dtype=np.uint8), 40).reshape(1, 10_000, 1).repeat(2, 0)
    view = Preprocess(64, crop=0.875).view(image)  # enlarged as a whole it would be 73 by 365,000
    assert view.shape == (64, 64, 1)
    assert 120 <= view.min() <= view.max() <= 130
    moderate = pixels(20, 600, 3)
    preprocess = Preprocess(64, crop=0.875)
    wide = preprocess.view(moderate).astype(int)
    box = tuple(edge * 20 / 73 for edge in (1063, 4, 1063 + 64, 4 + 64))
    assert abs(wide - resize(moderate, (64, 64), "bicubic", box)).max() <= 1


def test_floats_keep_their_values_and_mean_and_std_broadcast() -> None:
    image = RNG.random((8, 8, 6), np.float32) * 3 - 1
    preprocess = Preprocess(8, mean=(0.5,), std=(2.0,), crop=1.0)
    np.testing.assert_allclose(preprocess(image).numpy(), (image.transpose(2, 0, 1) - 0.5) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="mean has 3 values for images of 6 channels"):
        Preprocess(8, crop=1.0)(image)
    grey = Preprocess(8, crop=1.0)(pixels(8, 8, 1) * 0 + np.uint8(255))
    np.testing.assert_allclose(grey.numpy(), (1 - sum(IMAGENET_MEAN) / 3) / (sum(IMAGENET_STD) / 3), rtol=1e-5)
    own = Preprocess(8, mean=tuple(range(6)), std=(1.0,) * 6, crop=1.0)
    np.testing.assert_allclose(own(image)[5].numpy(), image[..., 5] - 5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_denormalise_gives_the_pixels_back(channels: int) -> None:
    image = pixels(16, 16, channels)
    preprocess = Preprocess(16, crop=1.0)
    shown = preprocess.denormalise(preprocess(image))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, image[..., 0] if channels == 1 else image)


def test_denormalise_of_other_channels_and_out_of_range() -> None:
    image = RNG.random((16, 16, 5), np.float32)
    shown = PLAIN.denormalise(PLAIN(image))
    np.testing.assert_array_equal(shown, np.rint(image[..., :3] * 255))
    assert PLAIN.denormalise(PLAIN(image[..., :2])).shape == (16, 16)
    assert np.unique(PLAIN.denormalise(torch.tensor([[[-4.0, 9.0]]]))).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be positive, got 0"),
        ({"crop": 0.0}, "crop must be above 0 and at most 1, got 0"),
        ({"crop": 1.5}, "crop must be above 0 and at most 1, got 1.5"),
        ({"std": (0.0,)}, "std above 0"),
        ({"mean": ()}, "mean and std need a value for each channel"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': did you mean bicubic"),
    ],
)
def test_preprocess_checks_its_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


def test_affine() -> None:
    image = pixels(9, 9, 3)
    np.testing.assert_array_equal(affine(image), image)
    assert abs(affine(image, degrees=90).astype(int) - np.rot90(image)).max() <= 1  # cos(90 degrees) is not quite 0
    shifted = affine(image, translate=(2, -3))
    np.testing.assert_array_equal(shifted[2:, :-3], image[:-2, 3:])
    assert not shifted[:2].any()
    assert not shifted[:, -3:].any()
    disc = np.zeros((41, 41, 2), np.float32)
    disc[15:26, 15:26] = 1
    assert affine(disc, scale=2).sum() == pytest.approx(4 * disc.sum(), rel=0.02)
    assert affine(disc, degrees=30).sum() == pytest.approx(disc.sum(), rel=0.02)


FIELDS = {
    "random_resized_crop": Augment(hflip=0.0),
    "pad_crop": Augment(random_resized_crop=False, hflip=0.0, pad_crop=3),
    "degrees": Augment(random_resized_crop=False, hflip=0.0, degrees=30.0),
    "translate": Augment(random_resized_crop=False, hflip=0.0, translate=0.4),
    "zoom": Augment(random_resized_crop=False, hflip=0.0, zoom=0.4),
    "hflip": Augment(random_resized_crop=False, hflip=1.0),
    "vflip": Augment(random_resized_crop=False, hflip=0.0, vflip=1.0),
    "rand_augment": Augment(random_resized_crop=False, hflip=0.0, rand_augment="rand-m9-mstd0.5-inc1-n4"),
    "color_jitter": Augment(random_resized_crop=False, hflip=0.0, color_jitter=0.5),
    "random_erasing": Augment(random_resized_crop=False, hflip=0.0, random_erasing=1.0),
    "everything": Augment(
        pad_crop=2, degrees=9, translate=0.1, zoom=0.1, vflip=0.5, random_interpolation=True, color_jitter=0.4,
        random_erasing=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_the_image_and_depends_on_the_generator_alone(name: str, channels: int) -> None:
    image = pixels(24, 20, channels)
    image.flags.writeable = False
    before = PLAIN(image)
    np.random.seed(1)
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    changed = FIELDS[name](image, PLAIN, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert (changed.shape, changed.dtype) == ((channels, 16, 16), torch.float32)
    assert changed.isfinite().all()
    assert not torch.equal(changed, before)
    torch.manual_seed(2)
    assert torch.equal(changed, FIELDS[name](image, PLAIN, generator(5)))
    if not name.endswith("flip"):
        assert any(not torch.equal(changed, FIELDS[name](image, PLAIN, generator(seed))) for seed in (6, 7))


def test_without_augmentation_it_is_the_evaluation_view() -> None:
    image = pixels(24, 20, 3)
    preprocess = Preprocess(16)
    assert torch.equal(STILL(image, preprocess, generator()), preprocess(image))
    assert torch.equal(Augmented(STILL, preprocess)(image, generator()), preprocess(image))


def test_flips() -> None:
    image = pixels(24, 20, 3)
    before = PLAIN(image)
    assert torch.equal(FIELDS["hflip"](image, PLAIN, generator()), before.flip(2))
    assert torch.equal(FIELDS["vflip"](image, PLAIN, generator()), before.flip(1))
    half = Augment(random_resized_crop=False, hflip=0.5)
    flipped = sum(torch.equal(half(image, PLAIN, generator(seed)), before.flip(2)) for seed in range(200))
    assert 70 <= flipped <= 130


def test_pad_crop_shifts_over_zeros() -> None:
    image = pixels(16, 16, 1) | np.uint8(1)
    before = torch.nn.functional.pad(PLAIN(image), (2, 2, 2, 2))
    windows = {(y, x): before[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
    augment = Augment(random_resized_crop=False, hflip=0.0, pad_crop=2)
    seen = set()
    for seed in range(300):
        changed = augment(image, PLAIN, generator(seed))
        seen |= {place for place, window in windows.items() if torch.equal(window, changed)}
    assert seen == set(windows)


def test_random_resized_crop_takes_parts_of_the_given_scale_and_ratio() -> None:
    # A ramp in x and one in y tell where each pixel of the result came from.
    rows, columns = np.mgrid[0:200, 0:300].astype(np.float32)
    image = np.stack([rows, columns], 2)
    preprocess = Preprocess(20, mean=(0.0,), std=(1.0,), interpolation="bilinear")
    augment = Augment(scale=(0.2, 0.4), ratio=(0.5, 2.0), hflip=0.0)
    areas, ratios = [], []
    for seed in range(200):
        result = augment(image, preprocess, generator(seed))
        height = (result[0, -2, 0] - result[0, 1, 0]).item() / 17 * 20
        width = (result[1, 0, -2] - result[1, 0, 1]).item() / 17 * 20
        areas.append(height * width / (200 * 300))
        ratios.append(width / height)
    assert 0.19 <= min(areas) <= 0.22
    assert 0.38 <= max(areas) <= 0.42
    assert 0.47 <= min(ratios) <= 0.6
    assert 1.7 <= max(ratios) <= 2.1


def test_random_resized_crop_that_does_not_fit_takes_the_middle() -> None:
    image = np.zeros((4, 100, 1), np.uint8)
    image[:, 47:53] = 200
    augment = Augment(scale=(1.0, 1.0), hflip=0.0)
    result = augment(image, PLAIN, generator())
    assert result.max() == pytest.approx(200 / 255)
    assert result[:, :, 2:-2].min() > 0.7


def test_random_interpolation_uses_both() -> None:
    image = pixels(24, 20, 3)
    augment = Augment(random_resized_crop=False, hflip=0.0, random_interpolation=True)
    choices = [Preprocess(16, interpolation=name)(image) for name in ("bilinear", "bicubic")]
    seen = [
        [torch.equal(augment(image, Preprocess(16), generator(seed)), choice) for choice in choices]
        for seed in range(40)
    ]
    assert all(sum(row) == 1 for row in seen)
    assert 10 <= sum(row[0] for row in seen) <= 30


def test_color_jitter_by_its_definition() -> None:
    augment = Augment(random_resized_crop=False, hflip=0.0, color_jitter=0.4)
    flat = np.full((16, 16, 3), 0.5, np.float32)  # only brightness shows on a flat grey image
    factors = [augment(flat, PLAIN, generator(seed))[0, 0, 0].item() / 0.5 for seed in range(100)]
    assert 0.6 <= min(factors) < 0.65
    assert 1.35 < max(factors) <= 1.4
    colour = np.zeros((16, 16, 3), np.float32) + np.array([0.9, 0.2, 0.4], np.float32)
    spreads = [float(np.ptp(augment(colour, PLAIN, generator(seed))[:, 0, 0].numpy())) for seed in range(20)]
    assert min(spreads) < 0.5 < 0.9 < max(spreads)
    many = RNG.random((16, 16, 5), np.float32)
    assert not torch.equal(augment(many, PLAIN, generator()), PLAIN(many))
    beside = Augment(random_resized_crop=False, hflip=0.0, color_jitter=0.4, rand_augment="rand-m0-inc1-n1")
    alone = Augment(random_resized_crop=False, hflip=0.0, rand_augment="rand-m0-inc1-n1")
    image = pixels(16, 16, 3)
    assert torch.equal(beside(image, PLAIN, generator(3)), alone(image, PLAIN, generator(3)))


def test_random_erasing_puts_normal_noise_into_a_box() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    preprocess = Preprocess(64, mean=(0.0,), std=(1.0,), crop=1.0)
    shares, noise = [], []
    for seed in range(60):
        result = FIELDS["random_erasing"](image, preprocess, generator(seed))
        rows, columns = result[0].ne(0).any(1).nonzero().ravel(), result[0].ne(0).any(0).nonzero().ravel()
        box = result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert int(result.ne(0).sum()) == box.numel()
        shares.append(box[0].numel() / 64**2)
        noise.append(box.ravel())
    assert min(shares) >= 0.015
    assert max(shares) <= 0.35
    everything = torch.cat(noise)
    assert abs(everything.mean().item()) < 0.02
    assert everything.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 40, 1), (40, 1, 4), (1, 1, 3)])
def test_tiny_images_are_enlarged(shape: tuple[int, int, int]) -> None:
    image = pixels(*shape)
    for augment in (Augment(), FIELDS["everything"]):
        assert augment(image, PLAIN, generator()).shape == (shape[2], 16, 16)
    assert PLAIN(image).shape == (shape[2], 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, "hflip must be a probability between 0 and 1, got 1.5"),
        ({"random_erasing": -0.1}, "random_erasing must be a probability"),
        ({"pad_crop": -1}, "pad_crop must not be negative"),
        ({"zoom": 1.0}, "zoom must be at least 0 and below 1, got 1.0"),
        ({"scale": (0.5, 0.2)}, "scale must be a range within 0 and 1"),
        ({"ratio": (0.0, 1.0)}, "ratio must be a range above 0"),
        ({"rand_augment": "rand-q9"}, "unknown part 'q9'"),
    ],
)
def test_augment_checks_its_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**options)


def test_rand_augment_of_images_that_it_cannot_take() -> None:
    with pytest.raises(
        ValueError, match="RandAugment takes uint8 images of 1 or 3 channels, got float32 of 3 channels"
    ):
        FIELDS["rand_augment"](np.zeros((16, 16, 3), np.float32), PLAIN, generator())
