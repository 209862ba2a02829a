"""Tiles: a picture in pieces gives what the whole gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import noisy_picture, tiny
from torch import Tensor

from cdnctl.api import Model, load
from cdnctl.core.mirror import reflected
from cdnctl.images import Image, from_unit, to_unit
from cdnctl.restore import Settings, View, restore, tiles

CPU = torch.device("cpu")
SIGMA = 0.2

examples = settings(deadline=None)
cells = st.integers(1, 30)
sides = st.integers(1, 150)
margins = st.integers(0, 40)
multiples = st.sampled_from([1, 2, 3, 4, 8])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


def reader(x: Tensor) -> Callable[[tiles.Box], Tensor]:
    """Rows and columns of a picture (C, H, W)."""
    return lambda box: x[(..., *box)]


@examples
@given(cells, cells, sides, margins, multiples)
def test_plan_covers_every_pixel_once(
    rows: int, columns: int, tile: int, margin: int, multiple: int
) -> None:
    height, width = rows * multiple, columns * multiple
    hits = np.zeros((height, width), int)
    for t in tiles.plan(height, width, tile, margin, multiple):
        hits[t.place] += 1
    assert (hits == 1).all()


@examples
@given(cells, cells, sides, margins, multiples)
def test_plan_gives_every_kept_pixel_its_surroundings(
    rows: int, columns: int, tile: int, margin: int, multiple: int
) -> None:
    size = (rows * multiple, columns * multiple)
    planned = tiles.plan(*size, tile, margin, multiple)
    lengths = set()
    for t in planned:
        lengths.add(tuple(s.stop - s.start for s in t.read))
        for read, core, place, end in zip(t.read, t.core, t.place, size, strict=True):
            length = read.stop - read.start
            assert 0 <= read.start < read.stop <= end
            assert 0 <= core.start < core.stop <= length, "the core lies within what is read"
            assert (read.start + core.start, read.start + core.stop) == (place.start, place.stop)
            assert place.start - read.start >= margin or read.start == 0
            assert read.stop - place.stop >= margin or read.stop == end
            for edge in (read.start, read.stop, place.start, place.stop):
                assert edge % multiple == 0
    assert len(lengths) == 1, "all of one size, so that kernels are set up once"
    least = 2 * (margin + -margin % multiple) + multiple
    (length,) = lengths
    smallest = min(size[0], least) * min(size[1], least)
    assert length[0] * length[1] <= max(tile**2, smallest), "no larger than asked for"


@examples
@given(cells, cells, sides, margins, multiples)
def test_identity_over_tiles_is_identity(
    rows: int, columns: int, tile: int, margin: int, multiple: int
) -> None:
    height, width = rows * multiple, columns * multiple
    x = torch.arange(2.0 * height * width).reshape(2, height, width)
    planned = tiles.plan(height, width, tile, margin, multiple)
    again = torch.full_like(x, torch.nan)
    for place, part in tiles.run(lambda y: y, reader(x), planned, CPU):
        again[(..., *place)] = part
    assert torch.equal(again, x)


@examples
@given(cells, cells, sides, margins, multiples)
def test_mean_over_tiles_is_the_mean(
    rows: int, columns: int, tile: int, margin: int, multiple: int
) -> None:
    x = torch.rand(3, rows * multiple, columns * multiple, dtype=torch.float64)
    planned = tiles.plan(x.shape[1], x.shape[2], tile, margin, multiple)
    mean = tiles.mean_of_cells(
        lambda y: torch.nn.functional.avg_pool2d(y, multiple),
        reader(x),
        planned,
        CPU,
        multiple,
    )
    torch.testing.assert_close(mean, x.mean((1, 2)))


@examples
@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_reflection_is_numpys_symmetric_padding(size: int, start: int, more: int) -> None:
    """From anywhere to anywhere, over the edge as often as it takes."""
    stop = start + more
    wanted = np.pad(np.arange(size), (0, max(0, stop - size)), "symmetric")[start:stop]
    np.testing.assert_array_equal(reflected(start, stop, size), wanted)


@examples
@given(
    st.sampled_from(["uint8", "uint16", "uint32", "float16", "float32", "float64"]),
    st.sampled_from([1, 3]),
    st.integers(1, 30),
    st.integers(1, 30),
    st.data(),
)
def test_a_field_reads_parts_of_the_extended_picture(
    model: Model, dtype: str, channels: int, height: int, width: int, data: st.DataObject
) -> None:
    """Any rows and columns, as the mirrored picture of floats would give them."""
    samples = from_unit(np.random.default_rng(0).random((height, width, channels)), np.dtype(dtype))
    multiple = model.module.config.multiple
    edges = [(0, -height % multiple), (0, -width % multiple), (0, 0)]
    whole = np.pad(to_unit(samples), edges, "symmetric").transpose(2, 0, 1)
    box = []
    for size in whole.shape[1:]:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    before = samples.copy()
    part = View(model, samples, SIGMA).read((box[0], box[1]))
    np.testing.assert_array_equal(part.numpy(), whole[:, box[0], box[1]])
    assert part.dtype == torch.float32 and part.is_contiguous()
    part += 1  # is a copy
    np.testing.assert_array_equal(samples, before)


# -- networks -------------------------------------------------------------------------------

NETWORKS = [
    ("gradresnet", {"norm": "pixel"}),
    ("gradresnet", {"norm": "none", "down": 2}),
    ("gradresnet", {"norm": "pixel", "unshuffle": 1, "side": 0.0}),
    ("unet", {"norm": "pixel"}),
    ("unet", {"norm": "none", "unshuffle": 1}),
    ("hybrid", {"norm": "pixel", "constant": True, "decoder": [2, 0]}),
]


@pytest.mark.parametrize("arch, shape", NETWORKS)
def test_tiles_give_what_the_whole_gives(
    tmp_path: Path, arch: str, shape: dict[str, object]
) -> None:
    model = tiny(tmp_path, arch, **shape)
    height, width = 91, 137
    pixels = noisy_picture(height, width, sigma=SIGMA)
    multiple = model.module.config.multiple
    edges = [(0, -height % multiple), (0, -width % multiple), (0, 0)]
    y = torch.from_numpy(np.pad(pixels, edges, "symmetric").transpose(2, 0, 1).copy())[None]

    def whole(weights: Tensor) -> tuple[np.ndarray, Tensor]:
        with torch.no_grad():
            correction, logits = model.module.correction(y, SIGMA, weights)
        return correction[0, :, :height, :width].permute(1, 2, 0).numpy(), logits[0]

    for tile in (70, 101):
        view = View(model, pixels, SIGMA, tile)
        assert len(view.tiles) > 1
        for weights in (torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0.5, 1.5])):
            correction, logits = whole(weights)
            with torch.no_grad():
                np.testing.assert_allclose(view.correction(weights), correction, atol=1e-5)
                torch.testing.assert_close(view.logits(), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["pixel", "none"])
@torch.no_grad()
def test_the_test_above_can_see_the_classes(tmp_path: Path, norm: str) -> None:
    """Their part of a correction is far above its tolerance, and so is a mean over a tile."""
    model = tiny(tmp_path, norm=norm)
    view = View(model, noisy_picture(131, 157, sigma=SIGMA), SIGMA, 100)
    difference = view.correction(torch.tensor([1.0, -1, 0]))
    assert np.abs(difference).max() > 1e-3
    view.cells //= 2
    assert np.abs(view.correction(torch.tensor([1.0, -1, 0])) - difference).max() > 1e-3


@torch.no_grad()
def test_too_little_margin_is_seen(tmp_path: Path) -> None:
    """What the margin is good for: without it the edges of tiles show."""
    model = tiny(tmp_path)
    view = View(model, noisy_picture(131, 157, sigma=SIGMA), SIGMA, 100)
    weights = torch.tensor([1.0, 0, 0])
    right = view.correction(weights)
    multiple = model.module.config.multiple
    size = (n + -n % multiple for n in view.pixels.shape[:2])
    view.tiles = tiles.plan(*size, 48, 0, multiple)
    assert np.abs(view.correction(weights) - right).max() > 1e-3


def test_group_norm_needs_the_whole_picture(tmp_path: Path) -> None:
    model = tiny(tmp_path, norm="group", groups=4)
    assert len(View(model, noisy_picture(131, 157), SIGMA, 16).tiles) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [15 / 255, 50 / 255])
def test_the_bundled_photo_model_in_tiles_equals_the_whole(sigma: float) -> None:
    """The margin is a measured number, and what it must be depends on the weights."""
    model = load("photo")
    clean = skimage.data.astronaut()[:240, :512].astype(np.float32) / 255
    noise = np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    noisy = Image.of(clean + np.float32(sigma) * noise, np.float32)
    whole, parts = (
        restore(noisy, model, Settings(sigma, tile=side)).image.pixels for side in (1024, 256)
    )
    assert len(View(model, noisy.pixels, sigma, 256).tiles) > 1
    np.testing.assert_allclose(parts, whole, atol=1e-5)
