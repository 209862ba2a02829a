"""Pictures for people: the colours say what the numbers say, and nothing is cut off."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import noisy_picture, picture

from cdnctl.figures import (
    LEAST,
    MOST,
    Scale,
    before_and_after,
    evidence_colours,
    fitted,
    heat_colours,
    resized,
    size_of_map,
    with_scale,
)
from cdnctl.images import Image, Metadata

SIZES = [(1, 1), (1, 3000), (9, 7), (48, 64), (300, 451), (500, 3000), (5000, 4000)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e6])
def test_evidence_is_red_or_blue(channels: int, scale: float) -> None:
    pixels = noisy_picture(channels=channels, sigma=1.0)  # reaches far out of [0, 1]
    amount = scale * np.random.default_rng(0).standard_normal(pixels.shape[:2])
    amount[:, :20] = 0
    shown = evidence_colours(pixels, amount)
    assert shown.shape == (48, 64, 3) and 0 <= shown.min() <= shown.max() <= 1
    red, green, blue = np.moveaxis(shown, 2, 0)
    np.testing.assert_array_equal(red[amount == 0], blue[amount == 0])
    np.testing.assert_array_equal(red[amount == 0], green[amount == 0])
    if scale >= 1:
        assert (red[amount > 0] > blue[amount > 0]).all()
        assert (red[amount < 0] < blue[amount < 0]).all()


def test_the_picture_shows_where_nothing_speaks() -> None:
    pixels = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64, 1)
    shown = evidence_colours(pixels, np.zeros((48, 64)))
    assert (np.diff(shown[..., 0].ravel()) > 0).all(), "in the order of its brightness"


def test_more_is_brighter() -> None:
    brightness = heat_colours(np.linspace(0, 1, 100)[None])[0] @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_maps_are_neither_tiny_nor_huge(size: tuple[int, int]) -> None:
    height, width = size_of_map(*size)
    assert min(LEAST // 2, max(size)) <= max(height, width) <= MOST
    assert height / size[0] == pytest.approx(width / size[1], abs=max(1 / size[0], 1 / size[1]))


@pytest.mark.parametrize("size", SIZES[:-1])
def test_a_map_keeps_its_pixels_above_its_scale(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).random((*size, 3))
    scale = Scale("title " * 30, np.full((1, 9, 3), 0.25), ["-1", "0", "1"], "unit " * 50)
    sheet = with_scale(pixels, scale).samples
    assert sheet.dtype == np.uint8 and sheet.shape[1] == max(size[1], LEAST)
    left = (sheet.shape[1] - size[1]) // 2
    drawn = sheet[: size[0], left : left + size[1]]
    np.testing.assert_array_equal(drawn, np.rint(pixels * 255).astype(np.uint8))
    below = sheet[size[0] :]
    assert (below == 64).all(2).sum() > 0.5 * sheet.shape[1], "the bar"
    assert (below < 60).all(2).sum() > 100, "the text"
    for edge in (below[:, 0], below[:, -1], below[-1]):
        assert (edge == 255).all(), "nothing is cut off"


@pytest.mark.parametrize("ticks", [["a", "b"], ["0", "4.8", "9.6"]])
def test_the_ends_of_the_bar_have_their_colours(ticks: list[str]) -> None:
    bar = heat_colours(np.linspace(0, 1, 255)[None])
    sheet = with_scale(np.ones((40, 600, 3)), Scale("", bar, ticks, "")).samples.astype(int)
    row = next(row for row in sheet[40:] if (row.max(1) < 30).any() and (row != 255).sum() > 900)
    inside = row[(row != 255).any(1)]
    np.testing.assert_allclose(inside[0], bar[0, 0] * 255, atol=4)
    np.testing.assert_allclose(inside[-1], bar[0, -1] * 255, atol=4)


def test_a_smooth_map_keeps_its_values() -> None:
    y, x = np.mgrid[:40, :60]
    smooth = np.sin(x / 12) + np.cos(y / 9)
    assert np.array_equal(resized(smooth, 40, 60), smooth.astype(np.float32))
    large = resized(smooth, 120, 180)
    np.testing.assert_allclose(large[1::3, 1::3], smooth, atol=0.02)


def test_enlarged_pixels_stay_squares() -> None:
    image = Image.of(picture(8, 9, 1))
    large = fitted(image, 24, 27)
    expected = np.kron(image.pixels[..., 0], np.ones((3, 3)))
    np.testing.assert_allclose(large, np.dstack([expected] * 3), atol=1e-6)


# -- before and after -----------------------------------------------------------------------


def placed(sheet: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Where a picture lies in a larger one, pixel by pixel."""
    height, width = part.shape[:2]
    for top, left in zip(*np.nonzero((sheet == part[0, 0]).all(2)), strict=True):
        if np.array_equal(sheet[top : top + height, left : left + width], part):
            return int(top), int(left)
    raise AssertionError("it is not there")


@pytest.mark.parametrize("size", [(48, 64), (30, 90), (1, 5), (200, 100)])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_pictures_are_there_as_they_are(size: tuple[int, int], channels: int) -> None:
    before, after = (Image.of(noisy_picture(*size, channels, seed=s)) for s in (0, 1))
    sheet = before_and_after(before, after).samples
    first, second = (placed(sheet, np.repeat(i.samples, 3 // channels, 2)) for i in (before, after))
    beside = size[1] <= 2 * size[0]
    assert first[not beside] == second[not beside] or not beside
    assert (second[1] >= first[1] + size[1]) if beside else (second[0] >= first[0] + size[0])
    assert first[0] > 0, "there is room for the names"
    if size[1] > 60:
        assert (sheet[: first[0]] < 100).any()


def test_before_and_after_of_other_kinds() -> None:
    """16 bits, with alpha: transparent is white; the profile of the colours is kept."""
    deep = Image.of(picture(20, 24), np.uint16)
    alpha = np.zeros((20, 24), np.uint16)
    alpha[:10] = 65535
    first = Image(deep.samples, alpha, Metadata(icc=b"profile", dpi=(72, 72)))
    both = before_and_after(first, deep)
    expected = np.rint(deep.pixels * 255).astype(np.uint8)
    shown = expected.copy()
    shown[10:] = 255
    assert both.metadata == Metadata(icc=b"profile") and both.dtype == np.uint8
    placed(both.samples, expected)
    placed(both.samples, shown)
    gray = Image(deep.samples[:, :, :1], metadata=first.metadata)
    assert before_and_after(gray, gray).metadata == Metadata(), "the sheet is not gray"
