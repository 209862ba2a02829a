"""How good, how fast and how hungry: the bundled models beside the classical methods.

All methods see the same noise. Time and memory are taken in a fresh process per
method and size, so that no method inherits another's caches or high-water mark.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cdnctl import images
from cdnctl.api import Model, load
from cdnctl.batch import Batch, Job
from cdnctl.checkpoints import bundled
from cdnctl.evaluate import Sample, noisy_version, picture_psnr, ssim
from cdnctl.manifest import Manifest
from cdnctl.restore import Field, Settings, estimate_sigma, restore
from cdnctl.selection import Models

Method = Callable[[np.ndarray, float], np.ndarray]

REFERENCE = "CDnCNN-B (shape)"


def _nlm(noisy: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_nl_means

    return np.asarray(
        denoise_nl_means(
            noisy, patch_size=5, patch_distance=6, h=0.6 * sigma, sigma=sigma, channel_axis=-1
        )
    )


def _wavelet(noisy: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_wavelet

    color = noisy.shape[2] == 3
    return np.asarray(
        denoise_wavelet(
            noisy, sigma=sigma, channel_axis=-1, convert2ycbcr=color, rescale_sigma=True
        )
    )


def _tv(noisy: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_tv_chambolle

    return np.asarray(denoise_tv_chambolle(noisy, weight=1.2 * sigma, channel_axis=-1))


def _bm3d(noisy: np.ndarray, sigma: float) -> np.ndarray:
    import bm3d

    return np.asarray(bm3d.bm3d_rgb(noisy, sigma))


class PlainStack(nn.Module):
    """The shape of CDnCNN-B (Zhang et al. 2017): 20 convolutions of 64 channels, 0.67 million
    multiply-adds per pixel. Weights are random: it is a yardstick of time, not of quality."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
        for _ in range(18):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))

    def run(self, noisy: np.ndarray, sigma: float) -> np.ndarray:
        """A pass over tiles of 256 pixels with a margin of 20."""
        from cdnctl import tiles

        y = torch.from_numpy(noisy.transpose(2, 0, 1).copy())
        plan = tiles.plan(y.shape[1], y.shape[2], 296, 20, 1)
        with torch.no_grad():
            parts = tiles.run(self.layers, lambda box: y[(..., *box)], plan, torch.device("cpu"))
            out = torch.empty_like(y)
            for place, part in parts:
                out[(..., *place)] = part
        return out.permute(1, 2, 0).numpy()


def _with_model(model: Model) -> Method:
    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        return restore(images.Image(noisy), model, Settings(sigma)).image.pixels

    return run


CLASSICAL: Mapping[str, Method] = {
    "non-local means": _nlm,
    "wavelet": _wavelet,
    "total variation": _tv,
    "BM3D": _bm3d,
}


def available() -> list[str]:
    """Names of all methods: bundled models, classical methods, the yardstick of time.

    BM3D takes part if the package bm3d is there (its licence is for research only,
    so it is not a dependency).
    """
    classical = [name for name in CLASSICAL if name != "BM3D" or importlib.util.find_spec("bm3d")]
    return [*bundled(), *classical, REFERENCE]


def method(name: str) -> Method:
    """A method by name."""
    if name == REFERENCE:
        torch.manual_seed(0)
        return PlainStack().run
    return CLASSICAL[name] if name in CLASSICAL else _with_model(load(name))


@dataclass(frozen=True)
class Quality:
    """Mean scores of a method over a folder at one noise level."""

    method: str
    sigma: float  # in [0, 1]
    psnr: float
    ssim: float | None
    seconds_per_megapixel: float


@dataclass(frozen=True)
class Cost:
    """What a method needs for one picture."""

    method: str
    megapixels: float
    seconds_per_megapixel: float
    peak_mb: float  # picture and result included, above the interpreter with all loaded


def quality(
    files: Sequence[Path], names: Sequence[str], sigmas: Sequence[float], seed: int = 0
) -> Iterator[Quality]:
    """Score every method on the same noisy pictures; the yardstick of time is left out."""
    pictures = [(Sample(path).key, images.read(path).pixels) for path in files]
    for name in names:
        if name == REFERENCE:
            continue
        run = method(name)
        for sigma in sigmas:
            psnrs, ssims, seconds, pixels = [], [], 0.0, 0
            for file, clean in pictures:
                noisy = noisy_version(clean, sigma, file, seed)
                start = time.perf_counter()
                out = run(noisy, sigma)
                seconds += time.perf_counter() - start
                pixels += clean.shape[0] * clean.shape[1]
                out = np.clip(out, 0, 1)
                psnrs.append(picture_psnr(out, clean))
                ssims.append(ssim(out, clean))
            known = [s for s in ssims if s is not None]
            mean_ssim = float(np.mean(known)) if known else None
            yield Quality(name, sigma, float(np.mean(psnrs)), mean_ssim, seconds / pixels * 1e6)


def cost(
    names: Sequence[str], megapixels: Sequence[float], threads: int | None = None
) -> Iterator[Cost]:
    """Time and peak memory of every method on a synthetic noisy picture of each size."""
    context = multiprocessing.get_context("spawn")
    for size in megapixels:
        for name in names:
            with context.Pool(1) as pool:
                seconds, peak = pool.apply(_measure, (name, size, threads))
            yield Cost(name, size, seconds / size, peak)


def _measure(name: str, megapixels: float, threads: int | None) -> tuple[float, float]:
    """(seconds, peak MB) of one run in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    run = method(name)
    side = round((megapixels * 1e6 / 1.5) ** 0.5)
    shape = (side, round(side * 1.5), 3)
    rng = np.random.default_rng(0)
    run(rng.random((64, 64, 3), np.float32), 0.1)  # what is loaded on first use does not count
    before = _peak_mb()
    if name in bundled():  # these take pictures as files have them
        noisy = rng.integers(64, 192, shape, np.uint8)
    else:
        noisy = rng.random(shape, np.float32)
    start = time.perf_counter()
    run(noisy, 0.1)
    return time.perf_counter() - start, _peak_mb() - before


@dataclass(frozen=True)
class Throughput:
    """Pictures per second of a folder of files, read, restored and written."""

    pictures: str
    count: int
    plain: float  # one after the other, each alone
    batch: float  # as `cdnctl denoise FOLDER` does it

    @property
    def ratio(self) -> float:
        """How many times as fast as the plain loop."""
        return self.batch / self.plain


def throughput(
    small: int = 2000, photographs: int = 50, threads: int | None = None
) -> Iterator[Throughput]:
    """Time folders of noisy pictures against the plain loop, in turns of a tenth of the files.

    The pictures are crops of those in scikit-image: 64 x 64 PNG, and 600 x 400 JPEG.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    models = Models("photo", torch.device("cpu"))
    kinds = (
        ("64 x 64 PNG", 64, 64, ".png", small),
        ("600 x 400 JPEG", 400, 600, ".jpg", photographs),
    )
    for name, height, width, suffix, count in kinds:
        with tempfile.TemporaryDirectory() as place:
            sources = _crops(Path(place), height, width, suffix, count)
            seconds = {"plain": 0.0, "batch": 0.0}
            turns = [sources[i::10] for i in range(10)]
            for number, turn in enumerate([turns[0][:2], *turns]):
                for way, work in (("plain", _plain), ("batch", _batch)):
                    folder = Path(place) / way
                    jobs = [Job(p, folder / p.name) for p in turn]
                    start = time.perf_counter()
                    work(folder, jobs, models)
                    if number:  # the first few only warm up
                        seconds[way] += time.perf_counter() - start
            name = f"{width} x {height} {suffix}"
            yield Throughput(name, count, count / seconds["plain"], count / seconds["batch"])


def _crops(folder: Path, height: int, width: int, suffix: str, count: int) -> list[Path]:
    from skimage import data

    originals = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        picture = np.tile(originals[i % len(originals)], (2, 2, 1))
        top, left = (
            int(rng.integers(n - m + 1))
            for n, m in zip(picture.shape, (height, width), strict=False)
        )
        crop = images.to_unit(picture[top : top + height, left : left + width])
        noisy = crop + 0.1 * rng.standard_normal(crop.shape)
        paths.append(folder / f"{i:05}{suffix}")
        images.write(images.Image.of(noisy), paths[-1])
    return paths


def _plain(folder: Path, jobs: Sequence[Job], models: Models) -> None:
    """Read, denoise, write; one picture at a time, at its own size."""
    folder.mkdir(exist_ok=True)
    for job in jobs:
        image = images.read(job.source)
        model = models.pick(*image.samples.shape[:2])
        sigma = estimate_sigma(image.samples)
        with torch.no_grad():
            correction, _ = Field(model, image.samples, sigma).solve(lambda found: found.softmax(0))
        restored = images.from_unit(image.pixels + correction, image.dtype)
        images.write(image.with_samples(restored), job.output)


def _batch(folder: Path, jobs: Sequence[Job], models: Models) -> None:
    with Manifest(folder) as manifest:
        for done in Batch(models, Settings(), manifest=manifest, overwrite=True).run(jobs):
            assert done.restored is not None, done.error


def _peak_mb() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
