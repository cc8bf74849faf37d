"""Resizing against Pillow itself, numbers of OpenCV and MATLAB, and what holds for all conventions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convatlas.errors import UnknownName
from convatlas.ops.resize import resize, resize_matrix

CASES = Path(__file__).parents[1] / "golden" / "cases"
PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pillow has decided by the sizes which axis comes first since version 13; before, it was always the width.
ORDERED = int(PIL.__version__.split(".")[0]) >= 13
EVERY = [
    *(("matlab", name) for name in ("nearest", "box", "bilinear", "bicubic", "lanczos")),
    *(("pillow", name) for name in PILLOW),
    *(("opencv", name) for name in ("nearest", "bilinear", "bicubic", "lanczos", "area")),
]

# From OpenCV 5.0 (opencv-python-headless, cv2.ipp.setUseIPP(False)): cv2.resize of x = arange(35) * 37 % 101 as (5, 7)
# in float64, and of x * 5 // 2 in uint8.
OPENCV = [
    (
        "nearest",
        (3, 4),
        [[0, 92, 25, 210], [142, 235, 167, 100], [175, 15, 200, 132]],
        [[0.0, 37.0, 10.0, 84.0], [57.0, 94.0, 67.0, 40.0], [70.0, 6.0, 80.0, 53.0]],
    ),
    (
        "nearest",
        (8, 5),
        [
            [0, 92, 185, 117, 210],
            [0, 92, 185, 117, 210],
            [142, 235, 75, 7, 100],
            [142, 235, 75, 7, 100],
            [32, 125, 217, 150, 242],
            [175, 15, 107, 40, 132],
            [175, 15, 107, 40, 132],
            [65, 157, 250, 182, 22],
        ],
        [
            [0.0, 37.0, 74.0, 47.0, 84.0],
            [0.0, 37.0, 74.0, 47.0, 84.0],
            [57.0, 94.0, 30.0, 3.0, 40.0],
            [57.0, 94.0, 30.0, 3.0, 40.0],
            [13.0, 50.0, 87.0, 60.0, 97.0],
            [70.0, 6.0, 43.0, 16.0, 53.0],
            [70.0, 6.0, 43.0, 16.0, 53.0],
            [26.0, 63.0, 100.0, 73.0, 9.0],
        ],
    ),
    (
        "bilinear",
        (3, 4),
        [[82, 139, 79, 126], [67, 197, 138, 142], [105, 193, 134, 117]],
        [[32.875, 55.5417, 31.9167, 50.375], [26.875, 79.0, 55.375, 57.0], [41.9167, 77.2083, 53.5833, 46.7917]],
    ),
    (
        "bilinear",
        (8, 5),
        [
            [18, 148, 25, 154, 82],
            [81, 144, 87, 106, 122],
            [154, 142, 160, 53, 170],
            [85, 167, 91, 142, 132],
            [79, 146, 102, 152, 143],
            [137, 77, 191, 83, 200],
            [109, 150, 138, 100, 144],
            [83, 213, 90, 118, 96],
        ],
        [
            [7.4, 59.2, 10.0, 61.8, 32.8],
            [32.3375, 57.625, 34.9375, 42.55, 48.9],
            [61.65, 56.6375, 64.25, 21.3625, 68.1125],
            [34.15, 67.0125, 36.75, 56.9875, 53.2375],
            [31.9, 58.45, 40.8125, 61.05, 57.3],
            [54.9, 30.95, 76.4375, 33.55, 80.3],
            [43.8125, 60.2625, 55.25, 40.1375, 57.85],
            [33.4, 85.2, 36.0, 47.4, 38.6],
        ],
    ),
    (
        "bicubic",
        (3, 4),
        [[84, 135, 67, 131], [59, 206, 132, 146], [101, 199, 136, 114]],
        [
            [33.7488, 54.1777, 27.0956, 52.4105],
            [23.894, 82.5889, 52.8218, 58.5015],
            [40.4327, 79.4923, 54.6925, 45.5407],
        ],
    ),
    (
        "bicubic",
        (8, 5),
        [
            [0, 176, 12, 189, 71],
            [87, 150, 95, 93, 128],
            [162, 136, 167, 23, 178],
            [77, 200, 80, 162, 126],
            [65, 158, 92, 179, 140],
            [142, 50, 197, 57, 211],
            [115, 144, 149, 80, 153],
            [73, 255, 80, 130, 84],
        ],
        [
            [0.1074, 70.6794, 4.7084, 75.7325, 28.5106],
            [34.9137, 60.1443, 38.0521, 37.1637, 51.1284],
            [65.082, 54.45, 67.0057, 9.1242, 71.5814],
            [30.8435, 79.9201, 32.4196, 64.7377, 50.4487],
            [26.2692, 63.4371, 37.0057, 71.6633, 56.052],
            [56.8521, 20.1108, 78.86, 22.8925, 84.2678],
            [46.0626, 57.8859, 59.5143, 32.1349, 61.0728],
            [29.1895, 102.1993, 31.9153, 52.1662, 33.6423],
        ],
    ),
    (
        "area",
        (3, 4),
        [[96, 125, 89, 132], [101, 144, 115, 158], [105, 163, 119, 119]],
        [[38.6571, 50.1429, 35.6571, 52.9143], [40.4, 57.6571, 46.0571, 63.3143], [42.1429, 65.1714, 47.8, 47.7429]],
    ),
    (
        "area",
        (8, 5),
        [
            [26, 145, 48, 157, 96],
            [83, 144, 90, 113, 124],
            [169, 144, 154, 47, 166],
            [80, 171, 95, 161, 135],
            [73, 156, 101, 167, 142],
            [129, 68, 187, 79, 198],
            [106, 153, 142, 100, 132],
            [91, 210, 113, 113, 88],
        ],
        [
            [10.5714, 58.1429, 19.1429, 62.8571, 38.2857],
            [33.3714, 57.8571, 36.1714, 45.2571, 49.5429],
            [67.5714, 57.4286, 61.7143, 18.8571, 66.4286],
            [32.3714, 68.4, 38.0571, 64.4571, 54.3143],
            [29.2, 62.3429, 40.6571, 67.0571, 56.9143],
            [51.7143, 27.1429, 74.7143, 31.8571, 79.4286],
            [42.6286, 61.3429, 56.9714, 40.0857, 53.0286],
            [36.5714, 84.1429, 45.1429, 45.5714, 35.4286],
        ],
    ),
    (
        "lanczos",
        (3, 4),
        [[87, 128, 58, 137], [49, 204, 125, 143], [104, 191, 131, 114]],
        [
            [34.8409, 51.3866, 23.5856, 54.7234],
            [19.7538, 81.8836, 49.8106, 57.2782],
            [41.5655, 76.4555, 52.4819, 45.642],
        ],
    ),
    (
        "lanczos",
        (8, 5),
        [
            [0, 193, 6, 217, 65],
            [95, 138, 105, 79, 138],
            [166, 131, 165, 12, 183],
            [73, 216, 77, 172, 122],
            [52, 159, 87, 199, 138],
            [141, 36, 195, 52, 216],
            [122, 134, 159, 63, 160],
            [60, 255, 73, 149, 72],
        ],
        [
            [-5.5612, 77.1963, 2.377, 86.8064, 26.0704],
            [38.223, 55.109, 42.1045, 31.7104, 55.4274],
            [66.7719, 52.332, 66.0882, 4.9776, 73.5059],
            [29.2354, 86.4879, 31.189, 68.8574, 48.9609],
            [21.1201, 63.8277, 34.8493, 79.4993, 55.401],
            [56.383, 14.5854, 78.088, 20.7545, 86.5107],
            [49.026, 53.8516, 63.5328, 25.2886, 63.9732],
            [23.9478, 111.4687, 29.3481, 59.9713, 28.871],
        ],
    ),
]


def steps() -> torch.Tensor:
    return (torch.arange(35) * 37 % 101).reshape(5, 7)


def pillow(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], PILLOW[interpolation]))


@pytest.mark.parametrize("interpolation", PILLOW)
def test_bytes_are_those_of_pillow(interpolation: str) -> None:
    numbers = np.random.default_rng(0)
    for number in range(60):
        height, width, *size = (int(part) for part in numbers.integers(1, 50, 4))
        if not ORDERED and height - size[0] > max(0, 2 * (width - size[1])):
            continue
        shape = (height, width, 3) if number % 2 else (height, width)
        image = numbers.integers(0, 256, shape, dtype=np.uint8)
        if number % 3 == 0:
            image = (image > 127).astype(np.uint8) * 255  # sharp edges overshoot and are clipped
        channels_first = torch.from_numpy(image.transpose(2, 0, 1) if number % 2 else image)
        result = resize(channels_first, size, convention="pillow", interpolation=interpolation).numpy()
        assert result.dtype == np.uint8
        expected = pillow(image, tuple(size), interpolation)
        np.testing.assert_array_equal(result.transpose(1, 2, 0) if number % 2 else result, expected)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("size", [(7, 11), (40, 9), (33, 64), (23, 31), (150, 140)])
def test_floats_are_those_of_pillow(interpolation: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).random((23, 31), dtype=np.float32)
    result = resize(torch.from_numpy(image), size, convention="pillow", interpolation=interpolation)
    np.testing.assert_allclose(result.numpy(), pillow(image, size, interpolation), atol=1e-6)


def test_nearest_rounds_as_pillow_on_every_boundary() -> None:
    for length in range(1, 60, 4):
        row = np.arange(length, dtype=np.uint8)[None]
        for size in range(1, 60):
            result = resize(torch.from_numpy(row), (1, size), convention="pillow", interpolation="nearest")
            np.testing.assert_array_equal(result.numpy(), pillow(row, (1, size), "nearest"))


@pytest.mark.parametrize(("interpolation", "size", "whole", "real"), OPENCV)
def test_opencv(interpolation: str, size: tuple[int, int], whole: list[list[int]], real: list[list[float]]) -> None:
    floats = resize(steps().double(), size, convention="opencv", interpolation=interpolation)
    torch.testing.assert_close(floats, torch.tensor(real, dtype=torch.float64), atol=2e-4, rtol=0)
    image = (steps() * 5 // 2).to(torch.uint8)
    result = resize(image, size, convention="opencv", interpolation=interpolation)
    assert torch.equal(result, torch.tensor(whole, dtype=torch.uint8))


def test_opencv_samples_by_the_factor_that_was_given() -> None:
    # cv2.resize(x, None, fx=0.4, fy=0.75, interpolation=cv2.INTER_CUBIC)
    expected = [
        [35.373, 17.3088, 41.0638],
        [73.3632, 39.2168, 59.3594],
        [15.718, 63.5743, 81.7826],
        [53.6764, 37.4333, 31.2395],
    ]
    result = resize(steps().double(), scale=(0.75, 0.4), convention="opencv")
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), atol=2e-4, rtol=0)
    by_size = resize(steps().double(), (4, 3), convention="opencv")
    assert (result - by_size).abs().max() > 0.1


def test_opencv_halves_of_area_go_up_only_for_two_by_two() -> None:
    halves = torch.tensor([[1, 2, 1, 2], [0, 3, 1, 6]], dtype=torch.uint8)
    assert resize(halves, (1, 2), convention="opencv", interpolation="area").tolist() == [[2, 3]]
    row = torch.tensor([[0, 0, 0, 2], [0, 0, 0, 2]], dtype=torch.uint8)  # the mean is 0.5, to the even 0
    assert resize(row, (1, 1), convention="opencv", interpolation="area").tolist() == [[0]]


@pytest.mark.parametrize("lengths", ["24to6", "21to8"])
def test_scaling_matrices(lengths: str) -> None:
    stored = load_file(CASES / "decamouflage" / "scaling_matrices.safetensors")
    long, short = map(int, lengths.split("to"))
    names = {"linear": "bilinear", "cubic": "bicubic"}
    seen = 0
    for key, expected in stored.items():
        if not key.endswith(lengths):
            continue
        library, name = key.removeprefix("output.").split("_")[:2]
        convention = {"cv2": "opencv", "pil": "pillow"}[library]
        matrix = resize_matrix(long, short, convention=convention, interpolation=names.get(name, name))
        assert matrix.dtype == torch.float64
        torch.testing.assert_close(matrix.float(), expected, atol=1e-6, rtol=0)
        seen += 1
    assert seen == 10


def test_matlab() -> None:
    stored = load_file(CASES / "espcn" / "image_pipeline.safetensors")
    image = stored["input.rgb_uint8"].permute(2, 0, 1).double() / 255
    small = resize(image, scale=1 / 3, convention="matlab")
    plain = resize(image, scale=1 / 3, convention="matlab", antialias=False)
    large = resize(small, scale=3, convention="matlab")
    for result, name in ((small, "down_matlab"), (plain, "down_noantialias"), (large, "up_matlab")):
        torch.testing.assert_close(result, stored[f"output.{name}"].permute(2, 0, 1).double(), atol=1e-6, rtol=0)


def test_matlab_known_numbers() -> None:
    # To twice the size a Keys kernel has the weights -3, 29, 111, -9 in 128 and their mirror image.
    row = torch.tensor([[0.0, 0.0, 128.0, 0.0, 0.0]], dtype=torch.float64)
    result = resize(row, (1, 10), convention="matlab")
    expected = [[0, -3, -9, 29, 111, 111, 29, -9, -3, 0]]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))
    whole = resize(row.to(torch.uint8), (1, 10), convention="matlab")
    assert whole.tolist() == [[0, 0, 0, 29, 111, 111, 29, 0, 0, 0]]
    halves = torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8)  # the height first, then 0.5 goes up: twice
    assert resize(halves, (1, 1), convention="matlab", interpolation="box").tolist() == [[1]]
    assert resize(torch.zeros(1, 10), scale=0.33, convention="matlab").shape == (1, 4)


@pytest.mark.parametrize(("convention", "interpolation"), EVERY)
def test_every_interpolation(convention: str, interpolation: str) -> None:
    options = {"convention": convention, "interpolation": interpolation}
    x = torch.randn(2, 3, 9, 13, dtype=torch.float64)
    for size in ((9, 13), (5, 4), (20, 31), (1, 1), (4, 30)):
        result = resize(x, size, **options)
        assert result.shape == (2, 3, *size)
        torch.testing.assert_close(resize(torch.ones(9, 13), size, **options), torch.ones(size), atol=2e-6, rtol=0)
        torch.testing.assert_close(resize(x[1, 2], size, **options), result[1, 2])
        torch.testing.assert_close(resize(x.float(), size, **options), result.float(), atol=1e-5, rtol=1e-5)
        assert resize(x.bfloat16(), size, **options).dtype == torch.bfloat16
        gray = resize(torch.full((9, 13), 77, dtype=torch.uint8), size, **options)
        assert (gray.int() - 77).abs().max() <= (convention == "opencv")
    torch.testing.assert_close(resize(x, (9, 13), **options), x)
    for length, size in ((9, 5), (13, 31)):
        matrix = resize_matrix(length, size, **options)
        torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64))
        column = torch.randn(length, 1, dtype=torch.float64)
        torch.testing.assert_close(matrix @ column, resize(column, (size, 1), **options))


@pytest.mark.parametrize(("convention", "interpolation"), EVERY)
def test_gradients(convention: str, interpolation: str) -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    for size in ((3, 4), (8, 9)):
        assert torch.autograd.gradcheck(
            lambda x, size=size: resize(x, size, convention=convention, interpolation=interpolation), (x,)
        )


@pytest.mark.parametrize("convention", ["matlab", "pillow", "opencv"])
def test_any_number_of_axes(convention: str) -> None:
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    volume = resize(x, (3, 9, 5), convention=convention)
    matrices = [
        resize_matrix(length, size, convention=convention) for length, size in zip((6, 7, 8), (3, 9, 5), strict=True)
    ]
    torch.testing.assert_close(volume, torch.einsum("bxyz,ix,jy,kz->bijk", x, *matrices))
    torch.testing.assert_close(resize(x, 5, convention=convention), x @ matrices[2].T)


def test_long_axes_are_cut_into_blocks() -> None:
    x = torch.randn(3, 700, dtype=torch.float64)
    for size in (300, 1500):
        expected = x @ resize_matrix(700, size, convention="matlab").T
        torch.testing.assert_close(resize(x, size, convention="matlab"), expected)
        torch.testing.assert_close(resize(x.T, (size, 3), convention="matlab"), expected.T)


@pytest.mark.parametrize("convention", ["matlab", "pillow", "opencv"])
def test_compiles_and_exports(convention: str) -> None:
    class Resize(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return resize(x, (7, 30), convention=convention)

    x = torch.rand(1, 3, 16, 16)
    expected = Resize()(x)
    if convention == "pillow":
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(Resize(), fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(Resize(), (x,)).module()(x), expected)


def test_autocast_does_not_lose_digits() -> None:
    x = torch.rand(1, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = resize(x, (5, 17), convention="pillow")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, resize(x, (5, 17), convention="pillow"))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 3), {"size": (2, 2), "convention": "mathlab"}, "did you mean matlab"),
        ((3, 3), {"size": (2, 2), "convention": "pillow", "interpolation": "area"}, "of convention 'pillow' 'area'"),
        ((3, 3), {"size": (2, 2), "convention": "opencv", "antialias": True}, "a choice of convention 'matlab' only"),
        ((3, 3), {"convention": "pillow"}, "give either size or scale, got size=None and scale=None"),
        ((3, 3), {"size": (2, 2), "scale": 2, "convention": "pillow"}, "give either size or scale"),
        ((3, 3), {"size": (0, 2), "convention": "pillow"}, r"size must be positive, got \(0, 2\)"),
        ((3, 3), {"scale": -1, "convention": "pillow"}, "scale must be positive, got -1"),
        ((3,), {"size": (2, 2), "convention": "pillow"}, r"x of shape \(3,\) must have an axis for each of the 2"),
        ((0, 3), {"size": (2, 2), "convention": "pillow"}, "x must not be empty"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(torch.zeros(shape), **options)


def test_bad_types_and_matrices() -> None:
    with pytest.raises(ValueError, match="x must be floating point or uint8, got"):
        resize(torch.zeros(3, 3).int(), (2, 2), convention="pillow")
    with pytest.raises(ValueError, match="needs a size for height and width, got 1"):
        resize(torch.zeros(3, 3).byte(), 2, convention="opencv")
    with pytest.raises(ValueError, match="length and size must be positive, got 0 and 3"):
        resize_matrix(0, 3, convention="matlab")
    with pytest.raises(UnknownName, match="interpolation"):
        resize_matrix(4, 3, convention="matlab", interpolation="cubic")
