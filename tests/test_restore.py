"""Restoring one picture to another, and estimating its noise."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from tiny import CLASSES, noisy_picture, picture, tiny

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.joint import Corrector, HasPosterior
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image, Metadata
from cdnctl.models import REGISTRY
from cdnctl.restore import (
    Level,
    Settings,
    Stack,
    View,
    batch_size,
    classify,
    estimate_sigma,
    noise_level,
    restore,
    restore_batch,
)

SIGMA = 0.2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of little reach: its tiles may be small. It was trained on large crops, so that it
    takes the pictures of these tests for small."""
    return tiny(tmp_path_factory.mktemp("narrow"), widths=[8], blocks=[1], patch=512)


def exact(pixels: np.ndarray) -> Image:
    """A picture of float samples: nothing is rounded or clipped."""
    return Image.of(pixels, np.float32)


def change(model: Model, pixels: np.ndarray, **options: object) -> np.ndarray:
    """What restoring does to the pixels."""
    result = restore(exact(pixels), model, Settings(**({"sigma": SIGMA} | options)))
    return result.image.pixels - pixels


# -- one picture ----------------------------------------------------------------------------


def test_whole_picture_is_what_the_model_says(model: Model) -> None:
    y = noisy_picture()
    expected = model.denoise(torch.from_numpy(y.transpose(2, 0, 1).copy()), SIGMA)
    restored = restore(exact(y), model, Settings(SIGMA)).image.pixels
    np.testing.assert_allclose(restored, expected.permute(1, 2, 0), atol=1e-6)


def test_an_exact_denoiser_improves_a_noisy_picture(tmp_path: Path) -> None:
    best = tiny(tmp_path, gaussian=True)
    clean, noisy = picture(), noisy_picture()
    restored = noisy + change(best, noisy)
    assert np.square(restored - clean).mean() < 0.8 * np.square(noisy - clean).mean()


def test_strength_zero_is_the_input(model: Model) -> None:
    y = noisy_picture()
    restored = restore(exact(y), model, Settings(SIGMA, strength=0)).image.pixels
    np.testing.assert_array_equal(restored, y)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.9])
def test_change_is_linear_in_strength(model: Model, strength: float) -> None:
    y = noisy_picture()
    full = change(model, y)
    assert np.abs(full).max() > 0.01
    np.testing.assert_allclose(change(model, y, strength=strength), strength * full, atol=1e-6)


def test_guidance_leads_from_no_class_to_a_class_and_beyond(model: Model) -> None:
    y = noisy_picture()
    free = change(model, y)
    told = change(model, y, target={"dog": 1.0})
    assert np.abs(told - free).max() > 1e-3
    for guidance in (0.0, 0.5, 1.0, 3.0, -2.0):
        np.testing.assert_allclose(
            change(model, y, target={"dog": 1.0}, guidance=guidance),
            free + guidance * (told - free),
            atol=1e-5,
        )


@pytest.mark.parametrize("size", [(48, 64), (21, 30), (200, 231)], ids=["even", "odd", "alone"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_the_class_changes(model: Model, size: tuple[int, int], channels: int) -> None:
    """Against the two results themselves: for small pictures together, and for one alone."""
    y = noisy_picture(*size, channels)
    options = {"target": {"dog": 3.0, "cat": 1.0}, "guidance": 2.0, "strength": 0.5}
    told = restore(exact(y), model, Settings(SIGMA, **options))  # type: ignore[arg-type]
    free = restore(exact(y), model, Settings(SIGMA, strength=0.5))
    difference = told.image.pixels - free.image.pixels
    assert free.class_change is None and told.class_change is not None
    # The guard may weaken the two results by not quite the same.
    assert told.class_change == pytest.approx(np.sqrt(np.mean(difference**2)), rel=5e-3)
    assert told.class_change > 1e-5


def test_what_the_class_changes_in_a_company(model: Model) -> None:
    """Each its own, whoever shares the batch."""
    pictures = [exact(noisy_picture(seed=i)) for i in range(3)]
    told = Settings(SIGMA, target="auto")
    together = [r.class_change for r in restore_batch(pictures, model, told)]
    assert together == [restore(p, model, told).class_change for p in pictures]
    assert len(set(together)) == 3


def test_what_the_class_changes_in_a_large_picture(narrow: Model) -> None:
    """Measured in the middle: here a picture that repeats itself, so it is like the rest."""
    y = np.tile(noisy_picture(64, 64), (12, 12, 1))
    told = restore(exact(y), narrow, Settings(SIGMA, target={"dog": 1.0}))
    free = restore(exact(y), narrow, Settings(SIGMA))
    difference = (told.image.pixels - free.image.pixels)[64:-64, 64:-64]
    assert told.class_change == pytest.approx(np.sqrt(np.mean(difference**2)), rel=0.05)


@pytest.mark.parametrize(
    "arch", [a for a, line in REGISTRY.items() if issubclass(line.module, Corrector)]
)
@pytest.mark.parametrize("target", ["auto", {"dog": 1.0}], ids=str)
def test_a_class_is_told_to_models_that_know_classes(
    tmp_path: Path, arch: str, target: object
) -> None:
    some = tiny(tmp_path, arch)
    told = Settings(SIGMA, target=target)  # type: ignore[arg-type]
    for size in ((20, 24), (200, 231)):
        if isinstance(some.module, HasPosterior):
            assert restore(exact(noisy_picture(*size)), some, told).class_change
        else:
            with pytest.raises(UsageError, match="knows no classes: leave --class out"):
                restore(exact(noisy_picture(*size)), some, told)


def test_a_class_told_is_the_models_conditional_denoiser(model: Model) -> None:
    y = noisy_picture()
    batch = torch.from_numpy(y.transpose(2, 0, 1).copy())
    for name in CLASSES:
        expected = model.denoise(batch, SIGMA, name).permute(1, 2, 0).numpy() - y
        np.testing.assert_allclose(change(model, y, target={name: 1.0}), expected, atol=1e-6)


def test_auto_is_the_most_probable_class(model: Model) -> None:
    y = noisy_picture()
    best = next(iter(classify(exact(y), model, SIGMA).posterior))
    auto = change(model, y, target="auto")
    for name in CLASSES:
        difference = np.abs(change(model, y, target={name: 1.0}) - auto).max()
        assert (difference < 1e-6) == (name == best)


def test_mixtures_are_normalised(model: Model) -> None:
    y = noisy_picture()
    mixed = change(model, y, target={"cat": 7.0, "dog": 3.0})
    parts = [change(model, y, target={name: 1.0}) for name in ("cat", "dog")]
    np.testing.assert_allclose(mixed, 0.7 * parts[0] + 0.3 * parts[1], atol=1e-6)


def test_posterior_is_the_models_most_probable_first(model: Model) -> None:
    y = noisy_picture()
    expected = model.posterior(torch.from_numpy(y.transpose(2, 0, 1).copy()), SIGMA)
    for result in (restore(exact(y), model, Settings(SIGMA)), classify(exact(y), model, SIGMA)):
        values = list(result.posterior.values())
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
        for name, p in zip(CLASSES, expected.tolist(), strict=True):
            assert result.posterior[name] == pytest.approx(p, abs=1e-4)


def test_gray_is_the_mean_of_the_replicated_picture(model: Model) -> None:
    """Replicated, its noise lies on the gray axis alone, where it is sqrt(3) times as strong."""
    y = noisy_picture(channels=1)
    result = restore(exact(y), model, Settings(SIGMA, target={"dog": 1.0}))
    assert result.image.pixels.shape == y.shape
    assert result.sigma == SIGMA and result.told == pytest.approx(SIGMA * 3**0.5)
    rgb = torch.from_numpy(y.transpose(2, 0, 1).repeat(3, 0))
    expected = model.denoise(rgb, SIGMA * 3**0.5, "dog").mean(0)
    np.testing.assert_allclose(result.image.pixels[:, :, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(48, 64), (270, 260)])  # in a batch, and in tiles
def test_gray_stored_as_rgb_is_gray(narrow: Model, size: tuple[int, int]) -> None:
    """As WebP and palettes have it, and most JPEG files."""
    y = noisy_picture(*size, channels=1)
    options = Settings(SIGMA, target={"dog": 1.0}, tile=100)
    gray, rgb = (restore(exact(pixels), narrow, options) for pixels in (y, y.repeat(3, -1)))
    np.testing.assert_array_equal(rgb.image.pixels, gray.image.pixels.repeat(3, -1))
    assert rgb.told == gray.told and rgb.posterior == gray.posterior


def test_gray_need_not_be_equal_in_its_last_bit(model: Model) -> None:
    y = images.from_unit(noisy_picture(channels=1), np.dtype(np.uint8)) // 2
    off = np.random.default_rng(0).integers(0, 2, (*y.shape[:2], 3), np.uint8)
    for factor, seen in ((1, SIGMA * 3**0.5), (2, SIGMA)):
        restored = restore(Image(y + factor * off), model, Settings(SIGMA))
        assert restored.told == pytest.approx(seen)


def test_gray_and_colour_in_one_batch(model: Model) -> None:
    pictures = [exact(noisy_picture(channels=1).repeat(3, -1)), exact(noisy_picture(seed=1))]
    together = restore_batch(pictures, model, Settings(SIGMA))
    for result, image in zip(together, pictures, strict=True):
        alone = restore(image, model, Settings(SIGMA))
        np.testing.assert_array_equal(result.image.samples, alone.image.samples)
        assert (result.told, result.posterior) == (alone.told, alone.posterior)


def test_exact_gray_denoiser(tmp_path: Path) -> None:
    """Each channel of the exact denoiser is Wiener's filter at the level that it is told."""
    best = tiny(tmp_path, gaussian=True)
    y = noisy_picture(channels=1)
    wiener = 0.25**2 / (0.25**2 + 3 * SIGMA**2)
    np.testing.assert_allclose(y + change(best, y), 0.5 + wiener * (y - 0.5), atol=1e-6)


def test_everything_but_the_pixels_is_carried(model: Model) -> None:
    rng = np.random.default_rng(0)
    samples, alpha = (rng.integers(0, 2**16, (20, 24, c), np.uint16) for c in (3, 1))
    image = Image(samples, alpha[:, :, 0], Metadata(icc=b"profile", dpi=(72, 72)), ("a note",))
    result = restore(image, model, Settings(SIGMA)).image
    assert replace(result, samples=image.samples) == image
    assert result.alpha is image.alpha and result.dtype == np.uint16
    assert (result.samples != samples).any()


def turned(samples: np.ndarray, orientation: int) -> bytes:
    """A TIFF file that says how its samples (H, W, C) are to be turned."""
    out, channels = io.BytesIO(), samples.shape[2]
    tifffile.imwrite(
        out,
        samples if channels > 1 else samples[:, :, 0],
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        metadata=None,
        extratags=[(274, "H", 1, orientation, True)],
    )
    return out.getvalue()


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF defines its orientations: where row 0 and column 0 are to be seen."""
    if orientation in (5, 6, 7, 8):  # row 0 is a side
        samples = samples.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return samples[::rows, ::columns]


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["uint8", "uint16", "uint32", "float16", "float32", "float64"]),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 21),
    st.integers(1, 21),
    st.integers(1, 8),
    st.sampled_from([".tif", ".png", ".webp", ".bmp"]),
    st.integers(0, 999),
)
def test_strength_zero_gives_every_sample_of_a_file_back(
    model: Model,
    dtype: str,
    channels: int,
    height: int,
    width: int,
    orientation: int,
    suffix: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        samples = (3 * rng.standard_normal((height, width, channels))).astype(dtype)
    else:
        top = np.iinfo(dtype).max
        samples = rng.integers(0, top, (height, width, channels), dtype, endpoint=True)
    if channels in (2, 4):
        samples[:, :, -1] *= rng.random((height, width)) < 0.7  # what is hidden counts as well
    image = images.decode(turned(samples, orientation), "a.tif")
    same = restore(image, model, Settings(SIGMA, strength=0)).image
    # Into its own format, or another that can hold it.
    holds = {
        ".png": dtype in ("uint8", "uint16"),
        ".webp": dtype == "uint8" and channels > 2,
        ".bmp": dtype == "uint8" and channels in (1, 3),
    }
    suffix = suffix if holds.get(suffix) else ".tif"
    data = images.encode(same, suffix)
    again = images.decode(data, f"a{suffix}")
    assert again.dtype == image.dtype and again.samples.flags.c_contiguous
    with tifffile.TiffFile(io.BytesIO(images.encode(again, ".tif"))) as file:
        found = file.asarray().reshape(*again.samples.shape[:2], channels)
    np.testing.assert_array_equal(found, upright(samples, orientation))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([2, 4]), st.floats(0.05, 0.95))
def test_what_is_transparent_draws_no_fringe(
    model: Model, seed: int, channels: int, share: float
) -> None:
    """Black under alpha 0, which is how programs save cut-outs, is not seen by the network."""
    rng = np.random.default_rng(seed)
    colours = images.from_unit(noisy_picture(20, 24, channels - 1, seed=seed), np.dtype(np.uint8))
    hole = rng.random((20, 24)) < share
    hole[0, 0], hole[0, 1] = True, False
    alpha = np.where(hole, 0, 255).astype(np.uint8)[:, :, None]
    rows, columns = distance_transform_edt(hole, return_distances=False, return_indices=True)
    files = {
        "cut out": np.where(hole[:, :, None], np.uint8(0), colours),
        "filled": colours[rows, columns],
    }
    results = {}
    for name, content in files.items():
        image = images.decode(turned(np.dstack([content, alpha]), 1), "a.tif")
        done = restore(image, model, Settings(SIGMA)).image
        with tifffile.TiffFile(io.BytesIO(images.encode(done, ".tif"))) as file:
            results[name] = file.asarray()
        np.testing.assert_array_equal(results[name][hole], np.dstack([content, alpha])[hole])
    np.testing.assert_array_equal(results["cut out"][~hole], results["filled"][~hole])
    opaque = restore(Image(files["cut out"]), model, Settings(SIGMA)).image.samples
    seen = results["cut out"][~hole][:, :-1] != opaque[~hole]
    assert seen.any(), "or black would make no difference"


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]))
def test_any_size(model: Model, height: int, width: int, channels: int) -> None:
    y = noisy_picture(height, width, channels)
    result = restore(exact(y), model, Settings())
    assert result.image.pixels.shape == y.shape and np.isfinite(result.image.pixels).all()


def test_a_notebook_shows_a_result_on_one_line(model: Model, tmp_path: Path) -> None:
    y = exact(noisy_picture())
    result = restore(y, model, Settings(SIGMA))
    best, p = next(iter(result.posterior.items()))
    assert repr(result) == f"Restored({result.image!r}, sigma 0.2, {best} {p:.1%})"
    assert repr(restore(y, tiny(tmp_path, "unet"), Settings(SIGMA))).endswith("sigma 0.2)")


def test_input_pixels_are_left_alone(model: Model) -> None:
    y = noisy_picture()
    before = y.copy()
    restore(exact(y), model, Settings(SIGMA))
    np.testing.assert_array_equal(y, before)


def test_models_that_cannot(tmp_path: Path) -> None:
    y = noisy_picture()
    classifier, unet = tiny(tmp_path, "classifier"), tiny(tmp_path, "unet")
    with pytest.raises(UsageError, match="cannot denoise"):
        restore(exact(y), classifier, Settings(SIGMA))
    with pytest.raises(UsageError, match="cannot classify"):
        classify(exact(y), unet, SIGMA)
    assert restore(exact(y), unet, Settings(SIGMA)).posterior == {}
    assert sum(classify(exact(y), classifier, SIGMA).posterior.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": 1.5},
        {"strength": -0.1},
        {"strength": float("nan")},
        {"guidance": float("inf")},
        {"guidance": float("nan")},
        {"sigma": -0.1},
        {"sigma": 25.0},
        {"sigma": float("nan")},
    ],
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)


# -- pictures in the network together ---------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 24), (210, 240)], ids=["small", "large"])
@pytest.mark.parametrize("tile", [None, 100], ids=["whole", "tiles"])
def test_a_stack_gives_what_each_view_gives(
    narrow: Model, size: tuple[int, int], tile: int | None
) -> None:
    """Small pictures, gray ones among them, each with noise and a class of its own; or one."""
    kinds = [(3, 0.1), (1, 0.2), (3, 0.3)][: 3 if batch_size(*size) > 2 else 1]
    pictures = [noisy_picture(*size, c, sigma, seed=c) for c, sigma in kinds]
    levels = [Level(sigma) for _, sigma in kinds]

    def views() -> list[View]:
        samples = [p.repeat(4 - p.shape[2], -1)[..., :3] for p in pictures]
        return [View(narrow, s, level, tile) for s, level in zip(samples, levels, strict=True)]

    assert (len(views()[0].tiles) > 1) == (tile is not None and len(kinds) == 1)
    one_hot = torch.eye(3)[: len(kinds)]
    for mixture in (None, one_hot, lambda logits: logits.softmax(1).square()):
        stack = Stack(views())
        steps = stack.solve(mixture)
        assert len(steps) == len(kinds) and stack.logits.shape == (len(kinds), 3)
        for i, view in enumerate(views()):

            def chosen(logits: torch.Tensor, i: int = i, mixture: Any = mixture) -> torch.Tensor:
                return mixture[i] if mixture is one_hot else mixture(logits[None])[0]

            expected, logits = view.solve(None if mixture is None else chosen)
            np.testing.assert_allclose(steps[i], expected, atol=1e-6)
            torch.testing.assert_close(stack.logits[i], logits, atol=1e-4, rtol=1e-4)
            assert np.abs(expected).max() > 1e-3


def test_class_scores_and_differences_of_a_stack(model: Model) -> None:
    """Scores asked for first are those that come with the corrections."""
    views = [View(model, noisy_picture(20, 24, seed=i), SIGMA) for i in range(2)]
    asked, found = Stack(views), Stack(views)
    found.solve()
    torch.testing.assert_close(asked.logits, found.logits, atol=1e-5, rtol=1e-5)
    zero = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    first, second = found.corrections(zero)
    assert first.shape == (1, 3, 20, 24) and first.abs().max() > 1e-3
    assert second.abs().max() < 1e-6, "linear in the mixture"


# -- the noise level ------------------------------------------------------------------------


def test_the_noise_level_of_an_image_is_that_of_its_samples() -> None:
    samples = images.from_unit(noisy_picture(80, 90), np.dtype(np.uint8))
    alpha = np.full((80, 90), 255, np.uint8)
    alpha[:, 30:] = 0
    samples[:, 30:] = 99
    image = Image(samples, alpha)
    assert noise_level(image) == noise_level(samples, alpha) != noise_level(samples)
    assert noise_level(image, sigma=0.3) == Level(0.3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [5 / 255, 25 / 255, 100 / 255])
def test_estimate_of_synthetic_noise(sigma: float, channels: int) -> None:
    smooth = np.broadcast_to(np.linspace(0.2, 0.8, 256)[:, None, None], (256, 256, channels))
    noise = np.random.default_rng(0).normal(0, sigma, smooth.shape)
    assert estimate_sigma((smooth + noise).astype(np.float32)) == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize("hidden", [0.3, 0.9])
def test_estimate_of_what_is_visible(hidden: float) -> None:
    """What alpha hides is filled from what it shows, and does not count."""
    y = 0.5 + np.random.default_rng(0).normal(0, 0.1, (600, 600, 3))
    alpha = np.full(y.shape[:2], 255, np.uint8)
    alpha[: int(hidden * 600)] = 0
    y[alpha == 0] = 0.5
    assert estimate_sigma(y, alpha) == pytest.approx(0.1, rel=0.05)
    assert estimate_sigma(y, np.zeros_like(alpha)) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 3), (2, 50)])
def test_estimate_of_tiny_pictures_is_zero(size: tuple[int, int]) -> None:
    assert estimate_sigma(noisy_picture(*size)) == 0


def test_estimate_of_flat_pictures_is_zero(recwarn: pytest.WarningsRecorder) -> None:
    for value in (0, 0.3, 1):
        assert estimate_sigma(np.full((32, 32, 3), value, np.float32)) == pytest.approx(0, abs=1e-6)
    assert not recwarn.list


def test_estimate_of_a_pattern_of_single_pixels_is_a_noise_level(tmp_path: Path) -> None:
    """As in a dithered fax: of 0 and 255 it would be 378, and end a whole run."""
    board = np.indices((270, 260)).sum(0)[..., None] % 2
    assert estimate_sigma(board.astype(np.float32)) == 1
    restore(exact(board), tiny(tmp_path), Settings())


def test_no_sigma_means_the_estimate(model: Model) -> None:
    y = noisy_picture(sigma=0.1)
    result = restore(exact(y), model, Settings())
    assert result.sigma == estimate_sigma(y) > 0
    np.testing.assert_array_equal(result.image.pixels - y, change(model, y, sigma=result.sigma))


# -- too little memory ----------------------------------------------------------------------

OUT_OF_MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.13 GB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


def shrink(
    model: Model, monkeypatch: pytest.MonkeyPatch, pixels: int, error: Exception
) -> list[int]:
    """Let passes over more than that many pixels fail; the sizes of those that did not."""
    kind, sizes = type(model.module), []

    def limited(name: str) -> None:
        method = getattr(kind, name)

        def run(self: object, y: torch.Tensor, *args: object) -> object:
            if y[:, 0].numel() > pixels:
                raise error
            sizes.append(y[:, 0].numel())
            return method(self, y, *args)

        monkeypatch.setattr(kind, name, run)

    limited("correction")
    limited("class_features")
    return sizes


@pytest.mark.parametrize(
    "error, share",
    list(zip(OUT_OF_MEMORY, (0.9, 0.3, 0.1, 0.9, 0.9), strict=True)),
    ids=lambda x: str(x)[:5],
)
def test_out_of_memory_means_smaller_tiles(
    narrow: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, share: float
) -> None:
    y = noisy_picture(210, 240)
    settings = Settings(SIGMA, target={"dog": 1.0})
    whole = restore(exact(y), narrow, settings)
    sizes = shrink(narrow, monkeypatch, int(share * 210 * 240), error)
    parts = restore(exact(y), narrow, settings)
    assert sizes and max(sizes) <= share * 210 * 240
    np.testing.assert_allclose(parts.image.samples, whole.image.samples, atol=1e-4)
    assert parts.posterior == pytest.approx(whole.posterior, abs=1e-4)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_a_tile_that_was_asked_for_is_the_tile(
    narrow: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    y = noisy_picture(210, 240)
    sizes = shrink(narrow, monkeypatch, 150**2, error)
    with pytest.raises(ImageError, match=r"240 x 210 pixels in tiles of \d+ x \d+: give a smaller"):
        restore(exact(y), narrow, Settings(SIGMA, tile=205))
    assert not sizes, "nothing else is tried"
    restore(exact(y), narrow, Settings(SIGMA, tile=150))
    assert max(sizes) <= 150**2


def test_the_smallest_tile_is_tried(narrow: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever just suffices for it is enough."""
    y = noisy_picture(70, 60)
    monkeypatch.setattr(
        "cdnctl.restore.denoise.batch_size", lambda height, width: 1
    )  # it is so small
    margin, multiple = narrow.needs.margin, narrow.needs.multiple
    assert margin is not None
    least = 2 * (margin + -margin % multiple) + multiple
    assert least < 60
    sizes = shrink(narrow, monkeypatch, least**2, OUT_OF_MEMORY[0])
    restore(exact(y), narrow, Settings(SIGMA))
    assert sizes and max(sizes) <= least**2


def test_too_little_for_any_tile(narrow: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and says so."""
    sizes = shrink(narrow, monkeypatch, 0, OUT_OF_MEMORY[0])
    with pytest.raises(ImageError, match="not enough memory"):
        restore(exact(noisy_picture(210, 240)), narrow, Settings(SIGMA))
    assert not sizes


def test_numbers_that_are_not_finite_are_no_lack_of_memory(
    narrow: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller tiles would not help."""
    y = noisy_picture(210, 240)
    y[200, 200] = 3e38
    sizes = shrink(narrow, monkeypatch, y.size, OUT_OF_MEMORY[0])
    with pytest.raises(ImageError, match="not finite"):
        restore(exact(y), narrow, Settings(SIGMA))
    assert len(sizes) == 1


def test_memory_bounds_the_tiles(narrow: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.tile(noisy_picture(240, 300), (3, 1, 1))
    whole = restore(exact(y), narrow, Settings(SIGMA))
    sizes = shrink(narrow, monkeypatch, y.size, OUT_OF_MEMORY[0])
    need = narrow.needs.bytes_per_pixel
    for memory in (512**2 * need, 256**2 * need):
        sizes.clear()
        bounded = restore(exact(y), narrow, Settings(SIGMA, memory=memory))
        assert max(sizes) * need <= memory
        np.testing.assert_allclose(bounded.image.samples, whole.image.samples, atol=1e-4)


@pytest.mark.slow
def test_memory_that_no_tile_fits_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is said, and tiles that are nearly all margin are not tried."""
    model = tiny(tmp_path, norm="pixel", widths=[8, 8, 8, 8], blocks=[1, 1, 1, 1])
    margin, need = model.needs.margin, model.needs.bytes_per_pixel
    assert margin is not None
    y = np.zeros((5 * margin, 6 * margin, 3), np.float32)
    sizes = shrink(model, monkeypatch, y.size, OUT_OF_MEMORY[0])
    with pytest.raises(ImageError, match="smallest tiles"):
        restore(exact(y), model, Settings(SIGMA, memory=(2 * margin) ** 2 * need))
    assert not sizes
    memory = 3 * max(3 * margin, 256) ** 2 * need // 2
    restore(exact(y), model, Settings(SIGMA, memory=memory))
    assert sizes and max(sizes) * need <= memory


@pytest.mark.parametrize("message", ["can't allocate memory: 9 bytes", "something else"])
def test_out_of_memory_is_an_error_that_says_what_helps(
    narrow: Model, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(type(narrow.module), "correction", fail)
    expected = ImageError if "memory" in message else RuntimeError
    with pytest.raises(expected, match="--tile" if "memory" in message else message):
        restore(exact(picture()), narrow, Settings(SIGMA))


@pytest.mark.parametrize("size", [(40, 50), (200, 300)])
def test_black_and_white_alone_are_left_as_they_are(tmp_path: Path, size: tuple[int, int]) -> None:
    letters = Image.of((picture(*size) > 0.4).astype(np.float32), np.uint8)
    result = restore(letters, tiny(tmp_path), Settings(0.1))
    assert np.array_equal(result.image.samples, letters.samples)
    assert "left as it is" in result.image.notes[-1]
    letters.samples[-1, -1] = 7
    assert "left" not in "".join(restore(letters, tiny(tmp_path), Settings(0.1)).image.notes)
