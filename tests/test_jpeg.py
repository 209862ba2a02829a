"""What a JPEG file says about its original, with files that Pillow makes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from skimage import data
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.inverse import jpeg
from cdnctl.inverse.jpeg import Box, box_of

QUALITIES = [10, 30, 50, 80, 95]
FULL, HALVES, QUARTER = 0, 1, 2  # Pillow's names of 4:4:4, 4:2:2 and 4:2:0


def original(name: str = "chelsea", height: int = 120, width: int = 200) -> np.ndarray:
    """Whole levels, (H, W) or (H, W, 3); sides that are no multiples of 16."""
    return getattr(data, name)()[40 : 40 + height, 60 : 60 + width]


def encoded(pixels: np.ndarray, quality: int, subsampling: int = FULL, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(file, "JPEG", quality=quality, subsampling=subsampling, **options)
    return file.getvalue()


def decoded(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


def tensor(pixels: np.ndarray) -> Tensor:
    """(1, C, H, W) in [0, 1], float64."""
    whole = torch.from_numpy(pixels.astype(np.float64) / 255)
    return whole[None, None] if whole.ndim == 2 else whole.permute(2, 0, 1)[None]


def coefficients(x: Tensor) -> list[np.ndarray]:
    """Of Y, Cb and Cr in levels, (rows, columns, 8, 8), by scipy, and Pillow's matrix."""
    red, green, blue = 255 * x[0].numpy()
    planes = [
        0.299 * red + 0.587 * green + 0.114 * blue - 128,
        -0.168736 * red - 0.331264 * green + 0.5 * blue,
        0.5 * red - 0.418688 * green - 0.081312 * blue,
    ]
    found = []
    for plane in planes:
        rows, columns = (n // 8 for n in plane.shape)
        blocks = plane[: 8 * rows, : 8 * columns].reshape(rows, 8, columns, 8).swapaxes(1, 2)
        found.append(dctn(blocks, axes=(2, 3), norm="ortho"))
    return found


# -- the box --------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [FULL, QUARTER])
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("name", ["chelsea", "astronaut", "coffee", "page", "gray"])
def test_the_original_is_in_the_box(name: str, quality: int, subsampling: int) -> None:
    """With the slack for the rounding of encoder and decoder, and a level or two where steps
    are so small that rounding hides some; without it, not where colours were mixed and rounded."""
    if name in ("page", "gray"):
        pixels = data.page()[:120, :200] if name == "page" else original("camera")
        subsampling = FULL
    else:
        pixels = original(name)
    file = encoded(pixels, quality, subsampling)
    box, x = box_of(file), tensor(pixels)
    assert float(box.outside(x)) < (1.0 if quality <= 80 else 2.5)
    known = [np.isfinite(p.half).all((2, 3)).mean() for p in box.planes]
    assert min(known) > (0.99 if name != "page" else 0.9) and len(known) == x.shape[1]
    if len(known) == 3:
        assert float(box_of(file, slack=0.0).outside(x)) > 0.2


def test_the_box_is_no_larger_than_its_steps() -> None:
    """The middles are multiples of the tables' steps, and off by one step is out."""
    pixels = original()
    file = encoded(pixels, 50)
    box, image = box_of(file), Image.open(io.BytesIO(file))
    x = tensor(decoded(file))
    for i, plane in enumerate(box.planes):
        steps = np.array(image.quantization[min(i, 1)], np.float64).reshape(8, 8)
        usual = plane.half == np.float32(steps / 2 + jpeg.SLACK)
        assert usual.mean() > 0.99  # the others are means of flat blocks
        whole = plane.middle / steps
        np.testing.assert_allclose(whole[usual], np.rint(whole)[usual], atol=1e-5)
        # Zigzag or row by row: only one of them puts what is decoded onto multiples.
        got = coefficients(x)[i]
        assert np.abs(got - plane.middle)[usual].max() < 8
        assert np.abs(got - plane.middle)[usual].std() < 0.5
    wave = np.zeros((8, 8))
    wave[1, 2] = 1.1 * 14  # a step of luma at quality 50, and some
    pattern = jpeg._inverse(wave) / 255
    moved = x.clone()
    moved[:, :, 16:24, 32:40] += torch.from_numpy(pattern)
    assert float(box.outside(x)) < 1e-3 < 5 < float(box.outside(moved))


@pytest.mark.parametrize("subsampling", [FULL, QUARTER])
@pytest.mark.parametrize("quality", [10, 50, 95])
def test_projection(quality: int, subsampling: int) -> None:
    """Into the box, twice is once, and what is inside stays; nearest: no point of the box makes
    an obtuse angle with the way."""
    pixels = original()
    box = box_of(encoded(pixels, quality, subsampling))
    noise = torch.randn(3, 3, 120, 200, generator=torch.Generator().manual_seed(0)).double()
    x = tensor(pixels) + 0.1 * noise
    there = box.project(x)
    assert box.outside(x).min() > 1
    assert box.outside(there).max() < 1e-9
    torch.testing.assert_close(box.project(there), there, rtol=0, atol=1e-12)
    other = box.project(x.flip(0))
    to_ycc = torch.from_numpy(jpeg._TO_YCC)
    way, onward = (torch.einsum("ij,bjhw->bihw", to_ycc, d) for d in (x - there, other - there))
    products = (way * onward).flatten(1).sum(1)
    assert (products < 1e-9).all() and (products < -1e-3).any()
    single = box.project(x.float())
    torch.testing.assert_close(single, there.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_decoded_file_is_left_alone(quality: int) -> None:
    """Colours that were stored whole; of quarters the luma, for decoders interpolate colour."""
    pixels = (original() * 0.8 + 25).astype(np.uint8)  # nothing is cut off at black or white
    file = encoded(pixels, quality)
    x = tensor(decoded(file))
    torch.testing.assert_close(box_of(file).project(x), x, rtol=0, atol=1e-12)
    file = encoded(pixels, quality, QUARTER)
    x = tensor(decoded(file))
    change = box_of(file).project(x) - x
    luma = torch.einsum("j,bjhw->bhw", torch.from_numpy(jpeg._TO_YCC[0]), change)
    assert luma.abs().max() < 1e-3
    # Stored and repeated instead of interpolated, they are.
    stored = Image.open(io.BytesIO(file))
    stored.draft("YCbCr", (100, 60))
    half = torch.from_numpy(np.asarray(stored).astype(np.float64)).permute(2, 0, 1)[None] - 128
    ycc = torch.einsum("ij,bjhw->bihw", torch.from_numpy(jpeg._TO_YCC), x)
    ycc[:, 1:] = half[:, 1:].repeat_interleave(2, 2).repeat_interleave(2, 3) / 255
    x = torch.einsum("ij,bjhw->bihw", torch.from_numpy(np.linalg.inv(jpeg._TO_YCC)), ycc)
    torch.testing.assert_close(box_of(file).project(x), x, rtol=0, atol=1e-4)


def test_projection_helps() -> None:
    """A picture that was smoothed, back in its box: nearer to the original than before, at every
    quality, as for every point of a convex set that holds the original."""
    pixels = original("coffee")
    smooth = torch.nn.functional.avg_pool2d(tensor(pixels), 5, 1, 2, count_include_pad=False)
    for quality in QUALITIES:
        there = box_of(encoded(pixels, quality)).project(smooth)
        before, after = ((t - tensor(pixels)).square().mean() for t in (smooth, there))
        assert after < 0.8 * before


# -- what it can make nothing of -------------------------------------------------------


def test_blocks_that_are_not_whole_are_free() -> None:
    pixels = original(height=61, width=75)
    for subsampling, height, width in ((FULL, 56, 72), (QUARTER, 56, 72)):
        box = box_of(encoded(pixels, 30, subsampling))
        x = torch.zeros(1, 3, 61, 75, dtype=torch.float64)
        change = box.project(x)
        assert (change[..., height:, :] == 0).all() and (change[..., :, width:] == 0).all()
        assert (change[..., :height, :width] != 0).any((1, 2)).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (8, 8), (15, 17)])
@pytest.mark.parametrize("subsampling", [FULL, QUARTER])
def test_small_pictures(size: tuple[int, int], subsampling: int) -> None:
    pixels = original()[: size[0], : size[1]]
    box, x = box_of(encoded(pixels, 50, subsampling)), tensor(pixels)
    assert box.project(x).shape == x.shape and float(box.outside(x)) < 1


def test_other_subsampling_leaves_colour_free() -> None:
    pixels = original()
    box = box_of(encoded(pixels, 50, HALVES))
    assert len(box.planes) == 1 and float(box.outside(tensor(pixels))) < 1
    ycc = torch.zeros(1, 3, 120, 200, dtype=torch.float64)
    ycc[:, 1] = 0.1
    colour = torch.einsum("ij,bjhw->bihw", torch.from_numpy(np.linalg.inv(jpeg._TO_YCC)), ycc)
    x = tensor(pixels)
    moved = box.project(x + colour) - colour
    torch.testing.assert_close(moved, box.project(x), rtol=0, atol=1e-9)


def test_progressive_and_optimised_files_are_the_same() -> None:
    pixels = original()
    x = torch.rand(1, 3, 120, 200, generator=torch.Generator().manual_seed(1)).double()
    plain = box_of(encoded(pixels, 40, QUARTER)).project(x)
    other = box_of(encoded(pixels, 40, QUARTER, progressive=True, optimize=True)).project(x)
    torch.testing.assert_close(plain, other)


def test_blacks_and_whites_that_were_cut_off() -> None:
    """Letters in pure black and white: every block that is not flat rings beyond the range. What
    cannot be told from the decoded file is left free, and what can is right."""
    pixels = np.where(data.page()[:120, :200] > 128, 255, 0).astype(np.uint8)
    for quality in (10, 30, 50, 70):
        box = box_of(encoded(pixels, quality))
        known = np.isfinite(box.planes[0].half).all((2, 3))
        assert 0.4 < known.mean() < 1 and float(box.outside(tensor(pixels))) < 0.5
        cut = jpeg._blocks(decoded(encoded(pixels, quality)))
        ends = ((cut == 0) | (cut == 255)).any((2, 3)) & (cut.std((2, 3)) > 1)
        assert (ends & known).sum() > 0.05 * ends.sum(), "the cut ones are told from none"
        assert known[~((cut == 0) | (cut == 255)).any((2, 3))].all()


def test_refusals() -> None:
    image = Image.fromarray(original()).convert("CMYK")
    file = io.BytesIO()
    image.save(file, "JPEG")
    with pytest.raises(UsageError, match="CMYK"):
        box_of(file.getvalue())
    box = box_of(encoded(original(), 50))
    for shape in ((1, 3, 120, 201), (1, 1, 120, 200), (1, 2, 120, 200)):
        with pytest.raises(UsageError, match="not one of the file"):
            box.project(torch.zeros(shape))
    gray = Box(box.planes[:1], 120, 200)
    assert gray.project(torch.zeros(1, 1, 120, 200)).shape == (1, 1, 120, 200)
