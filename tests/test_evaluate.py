"""Scores: the protocol that the module promises, and nothing that depends on circumstances."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tiny import CLASSES, noisy_picture, picture, save_tiny, tiny
from torch import Tensor

import cdnctl.evaluate
from cdnctl import images, restore
from cdnctl.analysis.attacks import Attack, Budget, robustness
from cdnctl.api import Model, load
from cdnctl.cli import main
from cdnctl.cli.common import parse_levels
from cdnctl.cli.evaluate import parse_attacks
from cdnctl.errors import UsageError
from cdnctl.evaluate import (
    Row,
    Sample,
    batches,
    evaluate,
    find_samples,
    noisy_version,
    picture_psnr,
    ssim,
    summarise,
)
from cdnctl.images import Image

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
        for place in ("evaluate", "restore.stack"):
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
    for place in ("evaluate", "restore.stack"):
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

    monkeypatch.setattr(cdnctl.evaluate, "WAITING_PIXELS", limit)
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


# -- the command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("15,25,50", [15, 25, 50]),
        ("0:100:10", list(range(0, 101, 10))),
        ("0:5:2", [0, 2, 4]),
        ("7:7:1", [7]),
        ("10:12:0.5,100", [10, 10.5, 11, 11.5, 12, 100]),
        ("2:1:-0.2", [2, 1.8, 1.6, 1.4, 1.2, 1]),
    ],
)
def test_noise_levels(text: str, levels: list[float]) -> None:
    assert parse_levels(text) == pytest.approx([v / 255 for v in levels], abs=1e-12)


@pytest.mark.parametrize(
    "text", ["0:100", "0:10:0", "10:0:1", "a:b:c", "0:1:2:3", "0:100:0.01", "0:inf:1", "200:300:50"]
)
def test_noise_levels_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match=text if "200" not in text else "300"):
        parse_levels(text)


def test_attacks_by_norm_and_radius() -> None:
    found = parse_attacks(["linf:1,2, l2:0.25", "square:8"])
    expected = [("linf", 1 / 255), ("linf", 2 / 255), ("l2", 0.25), ("square", 8 / 255)]
    assert found == [Attack(kind, radius) for kind, radius in expected]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4", "'4'"),
        ("linf:", "'linf:'"),
        ("linf:x", "'linf:x'"),
        ("l1:4", "'l1'"),
        ("linf:-1", "-0.0"),
        ("l2:128", "l2:0.5"),  # for the other scale
        ("linf:0.0157", "linf:4"),
    ],
)
def test_attacks_that_make_no_sense(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_attacks([text])


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cdnctl_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command in a folder with class folders ``in`` and weights of three architectures:
    exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    for arch, name in [("gradresnet", "joint"), ("classifier", "alone"), ("unet", "unet")]:
        save_tiny(tmp_path / f"{name}.safetensors", arch, patch=16)
    for i in range(6):
        write(tmp_path / "in" / CLASSES[i % 3] / f"{i}.tif", picture(16, 16, top=25 * i))

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cdnctl", "evaluate", "in", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(stop.value.code or 0), out, err

    return run


MODELS = [part for n in ("joint", "alone", "unet") for part in ("--model", f"{n}.safetensors")]


def reports(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_models_side_by_side(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    options = ("--sigma", "0:50:25", "--limit", 4)
    code, out, _ = cdnctl_evaluate(*MODELS, *options, "--json", "--csv", "rows.csv")
    assert code == 0
    joint, alone, unet = reports(out)
    for report, can in [(joint, "both"), (alone, "accuracy"), (unet, "psnr")]:
        assert [row["sigma"] for row in report["scores"]] == [0, 25, 50]
        for row in report["scores"]:
            assert row["pictures"] == 4
            assert (row["accuracy"] is None) == (can == "psnr")
            assert (row["psnr"] is None) == (can == "accuracy" or row["sigma"] == 0)
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 3 and {row["model"] for row in rows} == {"joint", "alone", "unet"}
    for report in (joint, unet):
        for score in report["scores"][1:]:
            psnrs = [
                float(row["psnr"])
                for row in rows
                if (row["model"], float(row["sigma"]))
                == (report["protocol"]["model"], score["sigma"])
            ]
            assert np.mean(psnrs) == pytest.approx(score["psnr"])
    (single,) = reports(cdnctl_evaluate(*MODELS[2:4], *options, "--json")[1])
    assert single == alone, "company changes no score"
    table = cdnctl_evaluate(*MODELS, *options)[1]
    assert "joint" in table and "unet" in table and "PSNR" in table
    assert "model" not in cdnctl_evaluate(*MODELS[:2], *options, "-q")[1]


COLUMNS = ("sigma", "pictures", "PSNR noisy", "PSNR", "SSIM", "PSNR, class told", "accuracy")


def cells(table: str) -> list[list[str]]:
    """Rows of a printed table, the header first."""
    lines = [line for line in table.splitlines() if line[:1] in ("┃", "│")]
    return [[cell.strip() for cell in line[1:-1].split(line[0])] for line in lines]


@pytest.mark.parametrize(
    "options, gaps, notes",
    [
        ((*MODELS[:2], "--sigma", "25"), set(), []),
        ((*MODELS[:2], "--sigma", "0"), {2, 3, 4, 5}, ["at sigma 0"]),
        ((*MODELS[2:4], "--sigma", "25"), {2, 3, 4, 5}, ["'alone' (classifier)", "not denoise"]),
        ((*MODELS[4:], "--sigma", "25"), {5, 6}, ["'unet' (unet)", "does not classify"]),
        ((*MODELS[:2], "--noisy", "in"), set(), []),
    ],
    ids=["all", "no noise", "classifier", "denoiser", "pairs"],
)
def test_no_column_vanishes(
    cdnctl_evaluate: Run, options: Any, gaps: set[int], notes: list[str]
) -> None:
    code, out, err = cdnctl_evaluate(*options)
    header, row = cells(out)
    assert code == 0 and tuple(header) == COLUMNS
    assert {i for i, cell in enumerate(row) if cell == "-"} == gaps
    assert all(n in err for n in notes) and len(err.splitlines()) == bool(notes)
    assert cdnctl_evaluate(*options, "-q")[2] == ""


def test_why_there_is_no_accuracy(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    for i in range(4):
        write(tmp_path / "in" / f"strange {i}" / "1.tif", picture(16, 16))
    options = (*MODELS[:2], *MODELS[4:], "--sigma", "25")
    _, out, err = cdnctl_evaluate(*options)
    assert [row[-1] for row in cells(out)] == ["accuracy", "-", "-"]
    assert "strange 0, strange 1, strange 2 and 1 more" in err and "does not classify" in err
    for folder in [p for p in (tmp_path / "in").iterdir() if p.is_dir()]:
        for file in folder.iterdir():
            file.rename(tmp_path / "in" / f"{folder.name} {file.name}")
    assert "no accuracy, which takes folders named after classes" in cdnctl_evaluate(*options)[2]


def test_nothing_to_draw(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    code, out, err = cdnctl_evaluate(*MODELS[4:], "--sigma", "0", "--plot", "p.png")
    assert code == 0 and cells(out) and "'p.png' is not drawn" in err
    assert not (tmp_path / "p.png").exists()


def test_a_table_in_a_pipe_is_not_wrapped(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    name = "a model of a very long name " * 3
    (tmp_path / "joint.safetensors").rename(tmp_path / f"{name}.safetensors")
    save_tiny(tmp_path / f"{name}.safetensors", patch=16)
    models = ("--model", f"{name}.safetensors", *MODELS[4:])
    rows = cells(cdnctl_evaluate(*models, "--sigma", "25")[1])
    assert len(rows) == 3 and tuple(rows[0]) == ("model", *COLUMNS) and rows[1][0] == name.strip()


def test_a_broken_file_is_reported_once(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    (tmp_path / "in" / "cat" / "broken.png").write_text("no picture")
    for options in ([], ["--attack", "linf:1", "--steps", 1], ["--ood", "synthetic"]):
        chosen = MODELS[:4] if options else MODELS
        code, out, err = cdnctl_evaluate(*chosen, *options, "--json")
        assert code == 1 and err.count("broken.png") == 1
        assert len(reports(out)) == len(chosen) / 2


def test_nothing_but_broken_files(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    for file in (tmp_path / "in").rglob("*.tif"):
        file.write_text("no picture")
    for options in ([], ["--attack", "linf:1"], ["--ood", "synthetic"]):
        code, out, err = cdnctl_evaluate(*MODELS[:2], *options)
        assert code == 1 and err.count("cannot read") == 6 and "%" not in out


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_files_that_exist_are_kept(tmp_path: Path, cdnctl_evaluate: Run, option: str) -> None:
    path = tmp_path / ("rows.csv" if option == "--csv" else "curves.png")
    path.write_text("precious")
    options = (*MODELS[:2], "--sigma", "25", option, path)
    code, out, err = cdnctl_evaluate(*options)
    assert code == 2 and path.name in err and "--overwrite" in err and not out
    assert path.read_text() == "precious"
    assert cdnctl_evaluate(*options, "--overwrite")[0] == 0
    assert path.read_bytes()[:8] != b"precious"


def test_plot(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    options = (*MODELS, "--sigma", "0:50:25", "--plot")
    assert cdnctl_evaluate(*options, "curves.png")[0] == 0
    both = images.read(tmp_path / "curves.png").pixels
    assert cdnctl_evaluate(*MODELS[4:], *options[6:], "one.png")[0] == 0
    one = images.read(tmp_path / "one.png").pixels
    assert both.shape[0] == one.shape[0] and both.shape[1] == 2 * one.shape[1], "two axes and one"
    # The default colours of three lines are there.
    drawn = {tuple(c) for c in np.rint(255 * both.reshape(-1, 3)).astype(int)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= drawn
    assert cdnctl_evaluate(*options, "curves.xyz")[0] == 2
    assert cdnctl_evaluate(*options, "new.png", "--noisy", "in")[0] == 2
    assert not (tmp_path / "new.png").exists()


def test_attacks(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    options = ("--attack", "linf:0,2,l2:0.1", "--steps", 3, "--restarts", 2, "--json")
    code, out, _ = cdnctl_evaluate(*MODELS[:4], *options, "--sigma", "0,25", "--limit", 5)
    assert code == 0
    for report, name in zip(reports(out), ("joint", "alone"), strict=True):
        assert report["protocol"]["steps"] == 3 and report["protocol"]["restarts"] == 2
        model = load(tmp_path / f"{name}.safetensors")
        samples = find_samples(tmp_path / "in", None, model)
        chosen = [samples[i * 6 // 5] for i in range(5)]
        pictures = [(images.read(s.clean).pixels, str(s.label)) for s in chosen]
        attacks = [Attack("linf", 0.0), Attack("linf", 2 / 255), Attack("l2", 0.1)]
        expected = []
        for sigma in (0.0, 25 / 255):
            for r in robustness(pictures, model, attacks, sigma, budget=Budget(3, 2, 1000)):
                expected.append((round(sigma * 255, 4), r.accuracy, list(r.interval)))
        found = [(r["sigma"], r["robust_accuracy"], r["interval"]) for r in report["robustness"]]
        assert found == expected
        assert [(r["attack"], r["radius"]) for r in report["robustness"][:4]] == [
            ("none", 0), ("linf", 0), ("linf", 2), ("l2", 0.1),
        ]  # fmt: skip
    (transfer,) = reports(cdnctl_evaluate(*MODELS[:2], *options, "--attack-from", MODELS[3])[1])
    assert transfer["protocol"]["made_on"] == "alone"
    assert cdnctl_evaluate(*MODELS[4:], *options)[0] == 2, "it cannot classify"
    table = cdnctl_evaluate(*MODELS[:2], "--attack", "square:4", "--queries", 3)[1]
    assert "square" in table and "95 %" in table


def test_out_of_distribution(tmp_path: Path, cdnctl_evaluate: Run) -> None:
    for i in range(3):
        write(tmp_path / "other" / "deep" / f"{i}.tif", picture(40, 30, top=20 * i))
    options = ("--ood", "other", "--ood", "synthetic", "--sigma", "0,25", "--limit", 5)
    code, out, _ = cdnctl_evaluate(*MODELS, *options, "--json")
    assert code == 0
    joint, alone, unet = (report["ood"] for report in reports(out))
    for rows, count in [(joint, 2 * (1 + 4)), (alone, 2 * 2), (unet, 2 * 2)]:
        assert len(rows) == count
        for row in rows:
            assert row["pictures"] == 5 and 0 <= row["auroc"] <= 1
            assert row["others"] == (3 if row["ood"] == "other" else 5)
    assert "AUROC" in cdnctl_evaluate(*MODELS[:2], *options)[1]
    same = reports(cdnctl_evaluate(*MODELS[:2], "--ood", "in", "--sigma", 25, "--json")[1])
    assert all(abs(row["auroc"] - 0.5) < 0.26 for row in same[0]["ood"]), "its own pictures"


@pytest.mark.parametrize(
    "args",
    [
        ("--attack", "linf:1", "--ood", "synthetic"),
        ("--attack", "linf:1", "--csv", "a.csv"),
        ("--ood", "synthetic", "--plot", "a.png"),
        ("--ood", "synthetic", "--noisy", "in"),
        ("--ood", "nowhere"),
        ("--attack", "l3:1"),
        ("--attack-from", "joint.safetensors"),
        ("--sigma", "0:10:0"),
    ],
)
def test_the_command_refuses(tmp_path: Path, cdnctl_evaluate: Run, args: tuple[str, ...]) -> None:
    code, out, err = cdnctl_evaluate(*MODELS[:2], *args)
    assert code == 2 and err and not out
    assert not list(tmp_path.glob("a.*"))


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
