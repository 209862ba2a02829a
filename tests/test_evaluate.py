"""Scores: the protocol that the module promises, and nothing that depends on circumstances."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tiny import CLASSES, noisy_picture, picture, tiny
from torch import Tensor

from cdnctl import grouping, images, restore
from cdnctl.api import Model
from cdnctl.core.metrics import picture_psnr, ssim
from cdnctl.core.noise import noisy_version
from cdnctl.errors import UsageError
from cdnctl.grouping import batches
from cdnctl.images import Image
from cdnctl.measure.evaluate import Row, Sample, evaluate, find_samples, summarise

SIGMAS = [15 / 255, 50 / 255]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


def write(path: Path, pixels: np.ndarray | None = None) -> Path:
    """A float TIFF, so that what is read back is exactly what was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(Image.of(picture(20, 24) if pixels is None else pixels, np.float32), path)
    return path


def folder_of(tmp_path: Path, count: int = 5) -> Path:
    for i in range(count):
        write(tmp_path / "clean" / f"{i}.tif", picture(20, 24, top=20 * i))
    return tmp_path / "clean"


def rows(samples: list[Sample], model: Model, **options: object) -> dict[tuple[str, float], Row]:
    return {(r.file, r.sigma): r for r in evaluate(samples, model, SIGMAS, **options)}


# -- noise ----------------------------------------------------------------------------------


def test_noise_is_gaussian_and_not_clipped() -> None:
    clean = np.zeros((200, 200, 3), np.float32)
    noise = noisy_version(clean, 0.2, "a.png", 0)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=4 * 0.2 / noise.size**0.5)
    assert noise.std() == pytest.approx(0.2, rel=0.01)
    assert (np.abs(noise) > 0.4).mean() == pytest.approx(0.0455, abs=0.005), "beyond two sigma"
    np.testing.assert_array_equal(clean, 0)


def test_noise_depends_on_name_level_and_seed_alone() -> None:
    clean = picture()
    noises = {
        key: (noisy_version(clean, key[1], key[0], key[2]) - clean) / key[1]
        for key in [("a", 0.1, 0), ("b", 0.1, 0), ("a", 0.2, 0), ("a", 0.1, 1)]
    }
    flat = np.stack([n.ravel() for n in noises.values()])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.05
    np.testing.assert_array_equal(
        noisy_version(clean, 0.1, "a", 0), noisy_version(clean, 0.1, "a", 0)
    )


def test_scores_depend_on_no_order_and_no_number(tmp_path: Path, model: Model) -> None:
    samples = find_samples(folder_of(tmp_path), None, model)
    everything = rows(samples, model)
    assert len(everything) == len(samples) * len(SIGMAS)
    assert rows(samples[::-1], model) == everything
    for key, row in rows(samples[1:3], model).items():
        assert row == everything[key]
    other = rows(samples, model, seed=1)
    assert all(other[k].psnr_noisy != everything[k].psnr_noisy for k in everything)


# -- scores ---------------------------------------------------------------------------------


def test_rows_hold_scikit_images_scores(tmp_path: Path, model: Model) -> None:
    """Of what the model makes of the noisy picture, clipped; and not of anything else."""
    clean = picture(20, 24)
    file = write(tmp_path / "dog" / "a.tif", clean)
    seed, sigma = 3, SIGMAS[1]
    sample = Sample(file, "dog", place="dog")
    (row,) = evaluate([sample], model, [sigma], seed)
    noisy = noisy_version(clean, sigma, sample.key, seed)

    def restored(c: str | None) -> np.ndarray:
        y = torch.from_numpy(noisy.transpose(2, 0, 1).copy())
        return model.denoise(y, sigma, c).clamp(0, 1).permute(1, 2, 0).numpy()

    def psnr(result: np.ndarray) -> float:
        return pytest.approx(
            peak_signal_noise_ratio(clean.astype(float), result.astype(float), data_range=1),
            abs=1e-3,
        )

    assert noisy.min() < 0 and row.psnr_noisy == psnr(noisy)
    assert row.psnr == psnr(restored(None))
    assert row.psnr_class == psnr(restored("dog"))
    assert row.psnr_class != pytest.approx(row.psnr, abs=1e-3), "or the line above says nothing"
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(
        restored(None).astype(float), clean.astype(float), channel_axis=2, data_range=1, **options
    )
    assert row.ssim == pytest.approx(expected, abs=1e-5)
    assert (row.file, row.sigma, row.label, row.error) == (str(file), sigma, "dog", None)


def test_ssim_is_scikit_images_mean_over_channels() -> None:
    clean, noisy = picture(), noisy_picture()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    channels = [
        structural_similarity(
            noisy[..., c].astype(float), clean[..., c].astype(float), data_range=1, **options
        )
        for c in range(3)
    ]
    assert ssim(noisy, clean) == pytest.approx(np.mean(channels), abs=1e-9)
    assert ssim(clean, clean) == pytest.approx(1)
    assert ssim(clean[:10], clean[:10]) is None and ssim(clean[:11, :11], clean[:11, :11]) == 1


def test_an_exact_denoiser_gains(tmp_path: Path) -> None:
    exact = tiny(tmp_path, gaussian=True)
    samples = find_samples(folder_of(tmp_path), None, exact)
    for row in evaluate(samples, exact, [50 / 255]):
        assert row.psnr is not None and row.psnr_noisy is not None
        assert row.psnr > row.psnr_noisy + 1


def test_gray_pictures_are_scored_as_they_are_restored(tmp_path: Path, model: Model) -> None:
    clean = picture(20, 24, channels=1)
    sample = Sample(write(tmp_path / "a.tif", clean))
    for row in evaluate([sample], model, SIGMAS):
        noisy = noisy_version(clean, row.sigma, sample.key, 0)
        image = Image.of(noisy, np.float32)
        result = restore.restore(image, model, restore.Settings(row.sigma)).image.samples
        expected = peak_signal_noise_ratio(clean, np.clip(result, 0, 1), data_range=1)
        assert row.psnr == pytest.approx(expected, abs=1e-3) and row.ssim is not None


def test_without_noise_there_is_nothing_to_restore(tmp_path: Path, model: Model) -> None:
    file = write(tmp_path / "dog" / "a.tif")
    (row,) = evaluate([Sample(file, "dog")], model, [0.0])
    assert row.psnr is None and row.predicted in CLASSES


@pytest.mark.parametrize("arch, missing", [("unet", "predicted"), ("classifier", "psnr")])
def test_models_that_do_half(tmp_path: Path, arch: str, missing: str) -> None:
    half = tiny(tmp_path, arch)
    (row,) = evaluate([Sample(write(tmp_path / "a.tif"), "dog")], half, [0.1])
    assert getattr(row, missing) is None
    assert row.psnr is not None or row.predicted is not None


# -- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", "val"])
def test_class_folders_give_accuracy(tmp_path: Path, model: Model, split: str) -> None:
    for i, name in enumerate(CLASSES):
        for j in range(2):
            write(tmp_path / split / name / f"{j}.tif", picture(20, 24, top=30 * i + 7 * j))
    samples = find_samples(tmp_path, None, model)
    assert len(samples) == 6 and all(s.clean.parent.name == s.label for s in samples)
    for sigma, summary in zip(SIGMAS, summarise(evaluate(samples, model, SIGMAS)), strict=True):
        right = []
        for sample in samples:
            noisy = noisy_version(images.read(sample.clean).pixels, sigma, sample.key, 0)
            p = model.posterior(torch.from_numpy(noisy.transpose(2, 0, 1).copy()), sigma)
            right.append(CLASSES[int(p.argmax())] == sample.label)
        assert summary.accuracy == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1


def test_flat_folders_have_no_labels(tmp_path: Path, model: Model) -> None:
    samples = find_samples(folder_of(tmp_path), None, model)
    assert [s.label for s in samples] == [None] * 5
    (first, _) = summarise(evaluate(samples, model, SIGMAS))
    assert first.accuracy is None and first.psnr_class is None and first.psnr is not None


def test_folders_of_other_names_are_just_folders(tmp_path: Path, model: Model) -> None:
    write(tmp_path / "monday" / "a.tif")
    write(tmp_path / "tuesday" / "a.tif")
    assert [s.label for s in find_samples(tmp_path, None, model)] == [None, None]


def test_all_models_see_the_same_noise(tmp_path: Path, model: Model) -> None:
    """Whether they know the folders as classes or not; and every picture its own."""
    strange = tiny(tmp_path, classes=("lake", "truck"))
    for place in ("cat", "dog", "dog/deep"):
        write(tmp_path / "in" / place / "a.tif")
    both = [find_samples(tmp_path / "in", None, m) for m in (model, strange)]
    assert [[s.label for s in samples] for samples in both] == [["cat", "dog", "dog"], [None] * 3]
    one, other = (
        [r.psnr_noisy for r in evaluate(samples, m, SIGMAS)]
        for samples, m in zip(both, (model, strange), strict=True)
    )
    assert one == other and len(set(one)) == 6


def test_one_unknown_class_folder_and_there_is_no_accuracy(tmp_path: Path, model: Model) -> None:
    """Over the others it would look better than it is."""
    write(tmp_path / "cat" / "a.tif")
    write(tmp_path / "zebra" / "a.tif")
    assert [s.label for s in find_samples(tmp_path, None, model)] == [None, None]


def test_folders_that_hold_nothing(tmp_path: Path, model: Model) -> None:
    with pytest.raises(UsageError, match="no pictures"):
        find_samples(tmp_path, None, model)
    with pytest.raises(UsageError, match="not a folder"):
        find_samples(tmp_path / "none", None, model)


def test_noisy_partners(tmp_path: Path, model: Model) -> None:
    clean = folder_of(tmp_path, 3)
    for i in range(3):
        write(tmp_path / "noisy" / f"{i}.tif", noisy_picture(20, 24, seed=i))
    samples = find_samples(clean, tmp_path / "noisy", model)
    found = list(evaluate(samples, model, SIGMAS))
    assert len(found) == 3, "the noise is given: no levels"
    for i, row in enumerate(found):
        given = noisy_picture(20, 24, seed=i)
        expected = -10 * math.log10(np.square(given - picture(20, 24, top=20 * i)).mean())
        assert row.psnr_noisy == pytest.approx(expected, abs=1e-3)
        assert 0 < row.sigma != 0.2, "the network is told the estimate"
    (summary,) = summarise(found, paired=True)
    assert summary.sigma is None and summary.pictures == 3


def test_gray_partners_that_are_stored_as_rgb(tmp_path: Path, model: Model) -> None:
    """Measured as `restore` treats them, in one batch with those in colour."""
    clean = folder_of(tmp_path, 2)
    write(tmp_path / "noisy" / "0.tif", noisy_picture(20, 24))
    write(tmp_path / "noisy" / "1.tif", noisy_picture(20, 24, channels=1).repeat(3, -1))
    samples = find_samples(clean, tmp_path / "noisy", model)
    for row, sample in zip(evaluate(samples, model, SIGMAS), samples, strict=True):
        assert sample.noisy is not None
        result = restore.restore(images.read(sample.noisy), model, restore.Settings())
        off = result.image.pixels.clip(0, 1) - images.read(sample.clean).pixels
        assert row.psnr == pytest.approx(-10 * math.log10(np.square(off).mean()), abs=1e-4)


def test_a_partner_that_is_missing_or_of_another_size(tmp_path: Path, model: Model) -> None:
    clean = folder_of(tmp_path, 2)
    write(tmp_path / "noisy" / "0.tif", noisy_picture(21, 24))
    with pytest.raises(UsageError, match=r"1\.tif"):
        find_samples(clean, tmp_path / "noisy", model)
    write(tmp_path / "noisy" / "1.tif", noisy_picture(20, 24))
    bad, good = evaluate(find_samples(clean, tmp_path / "noisy", model), model, SIGMAS)
    assert bad.error is not None and "21" in bad.error
    assert good.error is None


def test_an_unreadable_picture_gives_a_row_with_its_error(tmp_path: Path, model: Model) -> None:
    folder = folder_of(tmp_path, 2)
    good = rows(find_samples(folder, None, model), model)
    (folder / "0a.png").write_text("no picture")
    found = list(evaluate(find_samples(folder, None, model), model, SIGMAS))
    (bad,) = [r for r in found if r.error is not None]
    assert "0a.png" in str(bad.error) and bad.psnr is None
    assert {(r.file, r.sigma): r for r in found if r.error is None} == good
    assert [s.pictures for s in summarise(found)] == [2, 2]


# -- batches --------------------------------------------------------------------------------


def mixed_folder(tmp_path: Path) -> list[Sample]:
    """Pictures of three shapes by turns, colour and gray, and one that cannot be read."""
    shapes = [(20, 24, 3), (24, 20, 3), (20, 24, 1), (20, 24, 3), (17, 9, 3)]
    samples = []
    for i, shape in enumerate(2 * shapes):
        path = write(tmp_path / f"{i}.tif", picture(*shape, top=20 * i))
        samples.append(Sample(path, CLASSES[i % 3] if i % 4 else None))
    samples[3].clean.write_text("no picture")
    samples[-1].clean.write_text("nor this")
    return samples


def test_rows_come_in_order(tmp_path: Path, model: Model) -> None:
    samples = mixed_folder(tmp_path)
    found = [(row.file, row.sigma, row.error is None) for row in evaluate(samples, model, SIGMAS)]
    expected = []
    for sample in samples:
        good = sample not in (samples[3], samples[-1])
        expected += [(str(sample.clean), s, good) for s in (SIGMAS if good else [0.0])]
    assert found == expected


@pytest.mark.parametrize("arch", ["gradresnet", "classifier", "unet"])
@pytest.mark.parametrize("norm", ["pixel", "group"])
def test_a_batch_gives_what_each_picture_gives_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, norm: str
) -> None:
    network = tiny(tmp_path, arch, norm=norm)
    samples, levels = mixed_folder(tmp_path / "in"), [0.0, *SIGMAS]
    assert restore.batch_size(20, 24) > len(samples)
    together = list(evaluate(samples, network, levels))
    with monkeypatch.context() as patch:
        for place in ("measure.evaluate", "restore.stack"):
            patch.setattr(f"cdnctl.{place}.batch_size", lambda height, width: 1)
        alone = list(evaluate(samples, network, levels))
    assert [r.error for r in together] == [r.error for r in alone]
    for a, b in zip(together, alone, strict=True):
        assert (a.file, a.sigma, a.predicted) == (b.file, b.sigma, b.predicted)
        for name in ("psnr_noisy", "psnr", "ssim", "psnr_class"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-4), name
        good = a.error is None
        assert (a.psnr is not None) == (good and arch != "classifier" and a.sigma > 0)
        assert (a.predicted is not None) == (good and arch != "unet" and a.label is not None)
        assert (a.psnr_class is None) == (a.psnr is None or a.predicted is None)


def test_a_batch_always_has_its_size(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few there are: kernels may round differently for another number."""
    seen: set[tuple[int, ...]] = set()
    correction = model.module.correction

    def watched(y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        seen.add(tuple(y.shape))
        return correction(y, *args)

    monkeypatch.setattr(model.module, "correction", watched)
    samples = find_samples(folder_of(tmp_path, 5), None, model)
    for few in (samples, samples[:1]):
        list(evaluate(few, model, SIGMAS))
    assert seen == {(restore.batch_size(20, 24), 3, 20, 24)}


def test_tiles_give_what_the_whole_gives(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Big pictures go alone and in tiles; class scores are those of the whole picture."""
    sample = Sample(write(tmp_path / "a.tif", picture(130, 70)), "dog")
    (whole,) = evaluate([sample], model, SIGMAS[1:])
    for name in ("view.DEFAULT_TILE", "view.MIN_TILE"):
        monkeypatch.setattr(f"cdnctl.restore.{name}", 64)
    for place in ("measure.evaluate", "restore.stack"):
        monkeypatch.setattr(f"cdnctl.{place}.batch_size", lambda height, width: 1)
    assert len(restore.View(model, picture(130, 70), 0.1).tiles) > 1
    (tiled,) = evaluate([sample], model, SIGMAS[1:])
    assert tiled.predicted == whole.predicted
    assert tiled.psnr == pytest.approx(whole.psnr, abs=1e-3)
    assert tiled.psnr_class == pytest.approx(whole.psnr_class, abs=1e-3)


@pytest.mark.parametrize("limit", [0, 2000, 10**9])
def test_batches_lose_nothing_and_hold_little(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    def count(height: int, width: int) -> int:
        return max(1, 3000 // (height * width))

    monkeypatch.setattr(grouping, "WAITING_PIXELS", limit)
    rng = np.random.default_rng(0)
    kinds = [(20, 24, 0), (20, 24, 1), (24, 20, 0), (10, 10, 0), (100, 100, 0)]
    items = [(i, kinds[k]) for i, k in enumerate(rng.integers(0, len(kinds), 200))]
    taken: list[tuple[int, tuple[int, ...]]] = []
    given: list[tuple[int, tuple[int, ...]]] = []

    def take():
        for item in items:
            taken.append(item)
            yield item

    for group in batches(take(), lambda item: item[1], count):
        if len(taken) < len(items):
            held = {item for item in taken if item not in given}
            assert sum(h * w for _, (h, w, _) in held - {taken[-1]}) <= limit
        given += group
        ((height, width, _),) = {item[1] for item in group}
        assert len(group) <= count(height, width)
    assert sorted(given) == items


# -- summaries ------------------------------------------------------------------------------


def test_summaries_are_means_per_level() -> None:
    summary = summarise(
        [
            Row("a", 0.1, 20.0, 30.0, 0.8, 31.0, "cat", "cat"),
            Row("b", 0.1, 22.0, 33.0, None, None, "dog", "cat"),
            Row("c", 0.1, error="unreadable"),
            Row("a", 0.2, 15.0, math.inf),
            Row("b", 0.2, 15.0, 50.0),
        ]
    )
    low, high = sorted(summary, key=lambda s: s.sigma or 0)
    assert (low.pictures, low.psnr_noisy, low.psnr, low.ssim) == (2, 21.0, 31.5, 0.8)
    assert (low.psnr_class, low.accuracy) == (31.0, 0.5)
    assert (high.pictures, high.psnr, high.ssim, high.accuracy) == (2, 75.0, None, None)


def test_nothing_has_no_summary() -> None:
    assert summarise([]) == summarise([Row("a", 0.1, error="unreadable")]) == []


def test_clipped_noise_is_measured_as_denoise_meets_it(tmp_path: Path) -> None:
    """--clip: the scores are those of a file of 8 bits that is restored with the sigma told."""
    clean = write(tmp_path / "clean" / "a.tif", np.clip(picture(40, 50) * 3 - 1, 0, 1))
    model = tiny(tmp_path, gaussian=True)
    sigma = 40 / 255
    sample = Sample(clean)
    (row,) = evaluate([sample], model, [sigma], seed=3, clip=True)
    pixels = images.read(clean).pixels
    noisy = Image.of(noisy_version(pixels, sigma, sample.key, 3), np.uint8)
    assert ((noisy.samples == 0) | (noisy.samples == 255)).mean() > 0.1
    by_hand = restore.restore(noisy, model, restore.Settings(sigma)).image.pixels
    assert row.psnr == pytest.approx(picture_psnr(by_hand, pixels), abs=0.02)
    assert row.psnr_noisy == pytest.approx(picture_psnr(noisy.pixels, pixels), abs=1e-4)
    (plain,) = evaluate([sample], model, [sigma], seed=3)
    assert plain.psnr != pytest.approx(row.psnr, abs=0.1)
