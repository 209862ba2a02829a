"""How good, how fast and how hungry: the bundled models beside the classical methods.

All methods see the same noise. Each runs alone in a process of its own, so that neither the caches
nor the peak memory of another method, or of computing the scores, count as its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from cdnctl import images
from cdnctl.core.metrics import picture_psnr, ssim
from cdnctl.core.noise import noisy_version
from cdnctl.errors import CdnctlError
from cdnctl.measure.evaluate import Sample
from cdnctl.measure.methods import is_model, method
from cdnctl.restore import Denoise, Settings, View, estimate_sigma
from cdnctl.restore.batch import Batch
from cdnctl.restore.manifest import Manifest
from cdnctl.restore.plan import Job
from cdnctl.selection import Models


@dataclass(frozen=True)
class Quality:
    """Mean scores of a method over a folder at one noise level."""

    method: str
    sigma: float  # in [0, 1]
    psnr: float
    ssim: float | None
    seconds_per_megapixel: float
    peak_mb: float  # as of `Cost`, over all pictures and noise levels


@dataclass(frozen=True)
class Cost:
    """What a method needs for one picture."""

    method: str
    megapixels: float
    seconds_per_megapixel: float
    peak_mb: float  # picture and result included, above the interpreter with all loaded


def quality(
    files: Sequence[Path],
    names: Sequence[str],
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    threads: int | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[Quality]:
    """Score methods on the same noisy pictures. watch: called after each restored picture."""
    pictures = [(Sample(path).key, images.read(path).pixels) for path in files]
    pixels = sum(clean.shape[0] * clean.shape[1] for _, clean in pictures)
    for name in names:
        rows: list[Quality] = []
        with _worker(name, threads) as run:
            for sigma in sigmas:
                psnrs, ssims, seconds = [], [], 0.0
                for file, clean in pictures:
                    done = run(noisy_version(clean, sigma, file, seed), sigma)
                    out = np.clip(done.result, 0, 1)
                    psnrs.append(picture_psnr(out, clean))
                    ssims.append(ssim(out, clean))
                    seconds += done.seconds
                    watch()
                known = [s for s in ssims if s is not None]
                mean_ssim = float(np.mean(known)) if known else None
                each = seconds / pixels * 1e6
                row = Quality(name, sigma, float(np.mean(psnrs)), mean_ssim, each, done.peak_mb)
                rows.append(row)
        yield from (replace(row, peak_mb=done.peak_mb) for row in rows)


def cost(
    names: Sequence[str], megapixels: Sequence[float], threads: int | None = None
) -> Iterator[Cost]:
    """Time and peak memory of every method on a synthetic noisy picture of each size."""
    for size in megapixels:
        side = round((size * 1e6 / 1.5) ** 0.5)
        shape = (side, round(side * 1.5), 3)
        for name in names:
            rng = np.random.default_rng(0)
            if is_model(name):  # these take pictures as files have them
                noisy = rng.integers(64, 192, shape, np.uint8)
            else:
                noisy = rng.random(shape, np.float32)
            with _worker(name, threads) as run:
                done = run(noisy, 0.1)
            yield Cost(name, size, done.seconds / size, done.peak_mb)


@dataclass(frozen=True)
class _Done:
    """What a method made of a picture, its time, and the highest memory so far."""

    result: np.ndarray
    seconds: float
    peak_mb: float


@contextmanager
def _worker(name: str, threads: int | None) -> Iterator[Callable[[np.ndarray, float], _Done]]:
    """A method in a process of its own, as a function of a noisy picture and sigma.

    Pictures go there and back as files: their passage costs no memory there. CdnctlError if
    the method fails, or its process dies.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        process = context.Process(target=_work, args=(there, name, threads, place), daemon=True)
        process.start()
        there.close()

        def run(noisy: np.ndarray, sigma: float) -> _Done:
            np.save(place / "noisy.npy", noisy)
            about = f"{name!r}, {noisy.shape[1]} x {noisy.shape[0]} pixels"
            try:
                here.send(sigma)
                answer = here.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                process.join()
                raise CdnctlError(
                    f"{about}: the process died (exit code {process.exitcode}; -9 is mostly too "
                    "little memory); leave the method out with --methods"
                ) from None
            if isinstance(answer, str):
                raise CdnctlError(f"{about}: {answer}; leave the method out with --methods")
            return _Done(np.load(place / "result.npy"), *answer)

        try:
            yield run
        finally:
            process.kill()
            process.join()


def _work(connection: Connection, name: str, threads: int | None, place: Path) -> None:
    """What the process of a `_worker` does: for every sigma it is sent, (seconds, peak MB)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        run = method(name)
        # What is loaded on first use does not count.
        run(np.random.default_rng(0).random((64, 64, 3), np.float32), 0.1)
        before = _peak_mb()
        while True:
            sigma = connection.recv()
            noisy = np.load(place / "noisy.npy")
            start = time.perf_counter()
            result = run(noisy, sigma)
            answer = time.perf_counter() - start, _peak_mb() - before
            np.save(place / "result.npy", result)
            connection.send(answer)
            del noisy, result
    except EOFError:
        pass
    except Exception as error:  # whatever a foreign method raises
        connection.send(f"{type(error).__name__}: {error}")


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
            correction, _ = View(model, image.samples, sigma).solve()
        restored = images.from_unit(image.pixels + correction, image.dtype)
        images.write(image.with_samples(restored), job.output)


def _batch(folder: Path, jobs: Sequence[Job], models: Models) -> None:
    with Manifest(folder) as manifest:
        for done in Batch(models, Denoise(Settings()), manifest=manifest, overwrite=True).run(jobs):
            assert done.restored is not None, done.error


def _peak_mb() -> float:
    """Highest resident memory of this process so far."""
    try:
        # Linux lets getrusage begin with the memory of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e6 if sys.platform == "darwin" else 1e3)
