"""Restoring: one picture to another, and many files to many files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, noisy_picture, picture, save_tiny, tiny

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError, UsageError, WeightsError
from cdnctl.images import Image, Metadata
from cdnctl.restore import (
    Job,
    Settings,
    classify,
    default_output,
    estimate_sigma,
    expand,
    plan,
    restore,
    run,
)
from cdnctl.selection import Models

SIGMA = 0.2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


def change(model: Model, pixels: np.ndarray, **options: object) -> np.ndarray:
    """What restoring does to the pixels."""
    result = restore(Image(pixels), model, Settings(**({"sigma": SIGMA} | options)))
    return result.image.pixels - pixels


# -- one picture ----------------------------------------------------------------------------


def test_whole_picture_is_what_the_model_says(model: Model) -> None:
    y = noisy_picture()
    expected = model.denoise(torch.from_numpy(y.transpose(2, 0, 1).copy()), SIGMA)
    restored = restore(Image(y), model, Settings(SIGMA)).image.pixels
    np.testing.assert_allclose(restored, expected.permute(1, 2, 0), atol=1e-6)


def test_an_exact_denoiser_improves_a_noisy_picture(tmp_path: Path) -> None:
    exact = tiny(tmp_path, gaussian=True)
    clean, noisy = picture(), noisy_picture()
    restored = noisy + change(exact, noisy)
    assert np.square(restored - clean).mean() < 0.8 * np.square(noisy - clean).mean()


def test_strength_zero_is_the_input(model: Model) -> None:
    y = noisy_picture()
    restored = restore(Image(y), model, Settings(SIGMA, strength=0)).image.pixels
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


def test_a_class_told_is_the_models_conditional_denoiser(model: Model) -> None:
    y = noisy_picture()
    batch = torch.from_numpy(y.transpose(2, 0, 1).copy())
    for name in CLASSES:
        expected = model.denoise(batch, SIGMA, name).permute(1, 2, 0).numpy() - y
        np.testing.assert_allclose(change(model, y, target={name: 1.0}), expected, atol=1e-6)


def test_auto_is_the_most_probable_class(model: Model) -> None:
    y = noisy_picture()
    best = next(iter(classify(Image(y), model, SIGMA).posterior))
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
    for result in (restore(Image(y), model, Settings(SIGMA)), classify(Image(y), model, SIGMA)):
        values = list(result.posterior.values())
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
        for name, p in zip(CLASSES, expected.tolist(), strict=True):
            assert result.posterior[name] == pytest.approx(p, abs=1e-4)


def test_gray_is_the_mean_of_the_replicated_picture(model: Model) -> None:
    """Replicated, its noise lies on the gray axis alone, where it is sqrt(3) times as strong."""
    y = noisy_picture(channels=1)
    result = restore(Image(y), model, Settings(SIGMA, target={"dog": 1.0}))
    assert result.image.pixels.shape == y.shape
    assert result.sigma == SIGMA and result.sigma_seen == pytest.approx(SIGMA * 3**0.5)
    rgb = change(model, y.repeat(3, -1), sigma=SIGMA * 3**0.5, target={"dog": 1.0})
    np.testing.assert_allclose(
        result.image.pixels - y, rgb.mean(-1, keepdims=True), atol=1e-6, rtol=0
    )


def test_exact_gray_denoiser(tmp_path: Path) -> None:
    """Each channel of the exact denoiser is Wiener's filter at the level that it is told."""
    exact = tiny(tmp_path, gaussian=True)
    y = noisy_picture(channels=1)
    wiener = 0.25**2 / (0.25**2 + 3 * SIGMA**2)
    np.testing.assert_allclose(y + change(exact, y), 0.5 + wiener * (y - 0.5), atol=1e-6)


def test_everything_but_the_pixels_is_carried(model: Model) -> None:
    y = noisy_picture()
    alpha = np.random.default_rng(0).integers(0, 2**16, y.shape[:2], np.uint16)
    image = Image(
        y, np.dtype(np.uint16), alpha, Metadata(icc=b"profile", dpi=(72, 72)), ("a note",)
    )
    result = restore(image, model, Settings(SIGMA)).image
    assert replace(result, pixels=image.pixels) == image
    assert result.alpha is alpha and result.pixels.dtype == np.float32


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]))
def test_any_size(model: Model, height: int, width: int, channels: int) -> None:
    y = noisy_picture(height, width, channels)
    result = restore(Image(y), model, Settings())
    assert result.image.pixels.shape == y.shape and np.isfinite(result.image.pixels).all()


def test_input_pixels_are_left_alone(model: Model) -> None:
    y = noisy_picture()
    before = y.copy()
    restore(Image(y), model, Settings(SIGMA))
    np.testing.assert_array_equal(y, before)


def test_models_that_cannot(tmp_path: Path) -> None:
    y = noisy_picture()
    classifier, unet = tiny(tmp_path, "classifier"), tiny(tmp_path, "unet")
    with pytest.raises(UsageError, match="cannot denoise"):
        restore(Image(y), classifier, Settings(SIGMA))
    with pytest.raises(UsageError, match="cannot classify"):
        classify(Image(y), unet, SIGMA)
    assert restore(Image(y), unet, Settings(SIGMA)).posterior == {}
    assert sum(classify(Image(y), classifier, SIGMA).posterior.values()) == pytest.approx(1)


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


# -- the noise level ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [5 / 255, 25 / 255, 100 / 255])
def test_estimate_of_synthetic_noise(sigma: float, channels: int) -> None:
    smooth = np.broadcast_to(np.linspace(0.2, 0.8, 256)[:, None, None], (256, 256, channels))
    noise = np.random.default_rng(0).normal(0, sigma, smooth.shape)
    assert estimate_sigma((smooth + noise).astype(np.float32)) == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 3), (2, 50)])
def test_estimate_of_tiny_pictures_is_zero(size: tuple[int, int]) -> None:
    assert estimate_sigma(noisy_picture(*size)) == 0


def test_estimate_of_flat_pictures_is_zero(recwarn: pytest.WarningsRecorder) -> None:
    for value in (0, 0.3, 1):
        assert estimate_sigma(np.full((32, 32, 3), value, np.float32)) == pytest.approx(0, abs=1e-6)
    assert not recwarn.list


def test_no_sigma_means_the_estimate(model: Model) -> None:
    y = noisy_picture(sigma=0.1)
    result = restore(Image(y), model, Settings())
    assert result.sigma == estimate_sigma(y) > 0
    np.testing.assert_array_equal(result.image.pixels - y, change(model, y, sigma=result.sigma))


# -- where to -------------------------------------------------------------------------------

NAMES = ["a b.png", "ä ö ü.png", "x[1].png", "{y}*?.png", "日本.jpg", "'q\"uote.PNG", "-dash.tif"]


def touch(folder: Path, *names: str) -> list[Path]:
    """Empty files: plans look at names alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_a_file_goes_beside_itself(tmp_path: Path) -> None:
    for source in touch(tmp_path, *NAMES):
        (job,) = plan([source], None, False)
        assert job.output == tmp_path / f"{source.stem}_denoised{source.suffix}"


def test_formats_that_cannot_be_written_become_png(tmp_path: Path) -> None:
    gif, raw = touch(tmp_path, "a.gif", "b.nef")
    assert default_output(gif).name == "a_denoised.png"
    assert [j.output.name for j in plan([gif, raw], tmp_path / "out", False)] == [
        "a.gif.png",
        "b.nef.png",
    ]


def test_a_folder_is_mirrored(tmp_path: Path) -> None:
    names = [*NAMES, "a.jpg", "a.png", "sub/a.png", "sub/deep er/[b].png"]
    touch(tmp_path / "in", *names)
    touch(tmp_path / "in", "notes.txt", ".hidden.png", ".git/c.png", "sub/Thumbs.db")
    out = tmp_path / "out"
    jobs = plan([tmp_path / "in"], out, True)
    assert {j.output for j in jobs} == {out / n for n in names}
    assert all(j.source.relative_to(tmp_path / "in") == j.output.relative_to(out) for j in jobs)
    flat = plan([tmp_path / "in"], out, False)
    assert {j.output for j in flat} == {out / n for n in names if "/" not in n}


def test_a_folder_named_like_a_picture_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "folder.png/a.png", "b.png")
    found = {j.source.name for j in plan([tmp_path], tmp_path / "out", True)}
    assert found == {"a.png", "b.png"}


def test_a_folder_needs_an_output(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(UsageError, match="-o FOLDER"):
        plan([tmp_path], None, False)


def test_output_is_a_file_or_a_folder(tmp_path: Path) -> None:
    (source,) = touch(tmp_path, "a.png")
    (tmp_path / "there").mkdir()
    assert plan([source], tmp_path / "b.tif", False)[0].output == tmp_path / "b.tif"
    assert plan([source], tmp_path / "there", False)[0].output == tmp_path / "there/a.png"
    with pytest.raises(UsageError, match="suffix"):
        plan([source], tmp_path / "b.xyz", False)


def test_two_inputs_cannot_share_an_output(tmp_path: Path) -> None:
    gif, png = touch(tmp_path, "a.gif", "a.png")
    with pytest.raises(UsageError, match=r"a\.gif.*a\.png"):
        plan([gif, png], None, False)
    twins = touch(tmp_path, "x/a.png", "y/a.png")
    with pytest.raises(UsageError, match="would both be written"):
        plan(twins, tmp_path / "out", False)


def test_nothing_is_written_over_its_source(tmp_path: Path) -> None:
    (source,) = touch(tmp_path, "a.png")
    (tmp_path / "link.png").symlink_to(source)
    (tmp_path / "hard.png").hardlink_to(source)
    for output in ("a.png", "link.png", "hard.png", "x/../a.png"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="overwrite"):
            plan([source], tmp_path / output, False)


def test_nothing_is_written_over_another_source(tmp_path: Path) -> None:
    """Not even with permission to overwrite: the originals are never touched."""
    with pytest.raises(UsageError, match="overwrite"):
        plan(touch(tmp_path, "a.png", "a_denoised.png"), None, False)
    with pytest.raises(UsageError, match="overwrite"):
        plan([*touch(tmp_path, "x/b.png", "y/b.png")], tmp_path / "y", False)


def test_a_folder_may_go_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in", "a.png")
    monkeypatch.chdir(tmp_path)
    assert plan([Path("in")], Path("."), False) == [Job(Path("in/a.png"), Path("a.png"))]


def test_a_folder_is_not_written_into_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "in", "a.png")
    monkeypatch.chdir(tmp_path)
    for output in (Path("in"), tmp_path / "in", Path("in/../in")):
        with pytest.raises(UsageError, match="overwrite"):
            plan([Path("in")], output, False)


def test_earlier_output_inside_the_input_is_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "in", "a.png", "out/a.png", "other/b.png")
    monkeypatch.chdir(tmp_path)
    for output in (Path("in/out"), tmp_path / "in/out"):
        jobs = plan([Path("in")], output, True)
        assert {j.source for j in jobs} == {Path("in/a.png"), Path("in/other/b.png")}
    touch(tmp_path / "full", "out/a.png")
    with pytest.raises(UsageError, match="no pictures"):
        plan([Path("full")], Path("full/out"), True)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        plan([tmp_path / "none.png"], None, False)
    with pytest.raises(UsageError, match="no such file"):
        expand([tmp_path / "none"], False)
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "deep/er/a.png")
    for folder in ("empty", "deep"):
        with pytest.raises(UsageError, match="no pictures"):
            plan([tmp_path / folder], tmp_path / "out", False)
    assert len(plan([tmp_path / "deep"], tmp_path / "out", True)) == 1


# -- many files -----------------------------------------------------------------------------


def write_pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images.write(Image(noisy_picture(20, 24, seed=i)), folder / name)


def files(folder: Path) -> dict[str, str]:
    """Hash of every file, hidden ones too."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_bad_file_costs_that_file_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_pictures(source, "a.png", "c d.jpg", "sub/ü.tif")
    (source / "b.png").write_text("no picture")
    (source / "e.png").write_bytes(b"")
    (source / "f.png").write_bytes((source / "a.png").read_bytes()[:200])
    before = files(source)
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    done = list(run(plan([source], out, True), models, Settings(SIGMA)))

    bad = {d.job.source.name: d.error for d in done if d.error is not None}
    assert bad.keys() == {"b.png", "e.png", "f.png"}
    assert all(name in error for name, error in bad.items())
    assert all((d.restored is None) == (d.error is not None) for d in done)
    assert files(source) == before
    assert files(out).keys() == {"a.png", "c d.jpg", "sub/ü.tif"}, "no temporary file is left"
    for name in files(out):
        expected = restore(images.read(source / name), models.pick(20, 24), Settings(SIGMA)).image
        assert (out / name).read_bytes() == images.encode(expected, Path(name).suffix)


def test_an_output_that_cannot_be_written_costs_that_file_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    touch(tmp_path, "file")
    jobs = [
        Job(tmp_path / "in/a.png", tmp_path / "out/a.png"),
        Job(tmp_path / "in/b.png", tmp_path / "file/b.png"),  # below a file
        Job(tmp_path / "in/c.png", tmp_path / "in"),  # a folder
    ]
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    first, second, third = run(jobs, models, Settings(SIGMA))
    assert first.error is None and (tmp_path / "out/a.png").is_file()
    assert second.error is not None and "b.png" in second.error
    assert third.error is not None
    assert not [n for n in os.listdir(tmp_path / "in") if n.endswith(".tmp")]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png")
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    results = run(plan([tmp_path / "in"], tmp_path / "out", False), models, Settings(SIGMA))
    next(results)
    finished = files(tmp_path / "out")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert finished.keys() == {"a.png"} and files(tmp_path / "out") == finished


def test_a_model_that_is_not_there_stops_everything(tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        Models(str(tmp_path / "none.safetensors"), CPU)


def test_metadata_is_stripped_if_wanted(tmp_path: Path) -> None:
    image = Image(noisy_picture(20, 24), metadata=Metadata(xmp=b"<secret/>", dpi=(300, 300)))
    images.write(image, tmp_path / "a.png")
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    for strip in (False, True):
        job = Job(tmp_path / "a.png", tmp_path / f"{strip}.png")
        list(run([job], models, Settings(SIGMA), strip_metadata=strip))
        assert (b"secret" in job.output.read_bytes()) == (not strip)
        assert (images.read(job.output).metadata == Metadata()) == strip


@pytest.mark.parametrize("message", ["can't allocate memory: 9 bytes", "something else"])
def test_out_of_memory_is_an_error_that_says_what_helps(
    model: Model, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(type(model.module), "correction", fail)
    expected = ImageError if "memory" in message else RuntimeError
    with pytest.raises(expected, match="--tile" if "memory" in message else message):
        restore(Image(picture()), model, Settings(SIGMA))
