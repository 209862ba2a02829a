"""Scores on folders: a row per picture and noise level, then a summary.

Protocol: Gaussian noise from a fixed seed, one generator per picture and noise
level (seeded by both, so that no score depends on the order or number of pictures),
the noisy picture not clipped (or, where that is asked for, clipped and rounded as in a file
of 8 bits), the result clipped to [0, 1] but not rounded, PSNR for the data range [0, 1],
averaged over pictures.

Small pictures of one size go through the network together, in batches that are always
filled up (see ``restore.batch_size``): so no score depends on who shares the batch, either.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.joint import Corrector, HasPosterior
from cdnctl.core.metrics import picture_psnr, ssim
from cdnctl.core.noise import noisy_version
from cdnctl.errors import ImageError, UsageError
from cdnctl.grouping import batches
from cdnctl.restore import (
    Level,
    Stack,
    View,
    batch_size,
    check_channels,
    most_probable,
    moved,
    noise_level,
    whole_place,
)
from cdnctl.restore.plan import find_pictures


@dataclass(frozen=True)
class Sample:
    """One picture to score: the clean one, its class if known, a noisy one if given."""

    clean: Path
    label: str | None = None
    noisy: Path | None = None
    place: str = ""  # of the picture below the folder, which may be a class or not

    @property
    def key(self) -> str:
        """What the picture's noise depends on. Equal names in two places get different noise; all
        models get the same, whichever classes they know."""
        return f"{self.place}/{self.clean.name}"


@dataclass(frozen=True)
class Row:
    """Scores of one picture at one noise level. PSNR in dB, SSIM in [0, 1]."""

    file: str
    sigma: float  # on [0, 1]; of a given noisy picture, the estimate
    psnr_noisy: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    psnr_class: float | None = None  # with the true class
    label: str | None = None
    predicted: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """Means over the pictures of one noise level; None where nothing was to be measured."""

    sigma: float | None  # None: pairs, with the noise that they have
    pictures: int
    psnr_noisy: float | None
    psnr: float | None
    ssim: float | None
    psnr_class: float | None
    accuracy: float | None


def find_samples(folder: Path, noisy: Path | None, model: Model) -> list[Sample]:
    """Pictures of a flat folder, or of class folders (folder/CLASS/*, folder/val/CLASS/*).

    Class folders count if the model knows all of their names: an accuracy over some of the
    classes would look better than it is.
    """
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a folder")
    if (folder / "val").is_dir() and not find_pictures(folder, recursive=False):
        folder = folder / "val"
    samples = [Sample(p) for p in find_pictures(folder, recursive=False)]
    if not samples:
        pictures = find_pictures(folder, recursive=True)
        names = {p.relative_to(folder).parts[0] for p in pictures}
        known = names <= set(model.classes)
        for path in pictures:
            place = path.relative_to(folder).parent
            samples.append(Sample(path, place.parts[0] if known else None, None, place.as_posix()))
    if not samples:
        raise UsageError(f"no pictures in {str(folder)!r}")
    if noisy is None:
        return samples
    pairs = []
    for sample in samples:
        partner = noisy / sample.clean.relative_to(folder)
        if not partner.is_file():
            raise UsageError(f"{str(sample.clean)!r} has no noisy partner {str(partner)!r}")
        pairs.append(replace(sample, noisy=partner))
    return pairs


@dataclass(frozen=True)
class _Job:
    """A noisy picture to score, and the place of its row among all rows."""

    place: int
    sample: Sample
    clean: np.ndarray
    noisy: np.ndarray  # floats in [0, 1] plus noise, or whole numbers as of a file
    level: Level

    @property
    def by_camera(self) -> bool:
        """Whether it came with the noise of a camera."""
        return self.level.noise is not None and self.level.noise.by_camera

    @property
    def kind(self) -> tuple[int, ...]:
        """Shape, whether there is anything to restore, whether there is a class to tell, and
        whether the noise is that of a camera."""
        has_noise = self.level.sigma > 0 or self.sample.noisy is not None
        return (*self.clean.shape, has_noise, self.sample.label is not None, self.by_camera)

    def restored(self, correction: np.ndarray) -> np.ndarray:
        """The picture moved along its correction, (H, W, C), clipped to [0, 1]."""
        return np.clip(
            moved(self.noisy, whole_place(self.noisy), correction, self.level.sigma), 0, 1
        )


def evaluate(
    samples: Sequence[Sample],
    model: Model,
    sigmas: Iterable[float],
    seed: int = 0,
    clip: bool = False,
    camera: Model | None = None,
) -> Iterator[Row]:
    """Score every picture at every noise level (in [0, 1]); sample.noisy takes their place.

    camera: stands in for the model where a given picture has the noise of a camera.
    clip: noisy pictures are clipped and rounded to 8 bits, as files hold them. Rows come in the
    order of samples and levels. A picture that cannot be read gives a row with its error, and
    the rest goes on.
    """
    levels = list(sigmas)
    places = itertools.count()
    ready: dict[int, Row] = {}

    def jobs() -> Iterator[_Job]:
        for sample in samples:
            try:
                clean, given = _read(sample)
                check_channels(model, clean.shape[2])
            except ImageError as error:
                row = Row(str(sample.clean), 0.0, label=sample.label, error=str(error))
                ready[next(places)] = row
                continue
            if given is not None:
                yield _Job(next(places), sample, clean, given, noise_level(given))
                continue
            for sigma in levels:
                noisy = noisy_version(clean, sigma, sample.key, seed) if sigma else clean
                if clip:
                    noisy = images.from_unit(noisy, np.dtype(np.uint8))
                yield _Job(next(places), sample, clean, noisy, Level(sigma))

    due = 0
    for group in batches(jobs(), lambda job: job.kind, batch_size):
        suited = camera if camera is not None and group[0].by_camera else model
        ready |= zip((job.place for job in group), _score(group, suited), strict=True)
        while due in ready:
            yield ready.pop(due)
            due += 1
    yield from (ready[place] for place in sorted(ready))


def read_pictures(
    samples: Iterable[Sample], failed: Callable[[str], None]
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples with their clean pixels, float32 (H, W, C); unreadable ones go to ``failed``."""
    for sample in samples:
        try:
            yield sample, images.read(sample.clean).pixels
        except ImageError as error:
            failed(str(error))


def _read(sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """The clean picture in [0, 1], and the samples of the noisy one if it is given."""
    clean = images.read(sample.clean).pixels
    given = None if sample.noisy is None else images.read(sample.noisy).samples
    if given is not None and given.shape != clean.shape:
        raise ImageError(
            f"{str(sample.noisy)!r} is {given.shape}, but its clean partner {clean.shape}"
        )
    return clean, given


@torch.no_grad()
def _score(jobs: Sequence[_Job], model: Model) -> list[Row]:
    """Rows of noisy pictures of one kind."""
    *_, has_noise, has_label, _ = jobs[0].kind
    classifies = isinstance(model.module, HasPosterior) and has_label
    stack = Stack([View(model, job.noisy, job.level) for job in jobs])
    corrections = told = predicted = None
    if isinstance(model.module, Corrector) and has_noise:
        corrections = stack.solve()
        if classifies:
            predicted = most_probable(stack)
            one_hot = torch.stack([_one_hot(model, str(job.sample.label)) for job in jobs])
            told = stack.solve(one_hot)
    elif classifies:
        predicted = most_probable(stack)
    rows = []
    for i, job in enumerate(jobs):
        values: dict[str, float | str | None] = {}
        if predicted is not None:
            values["predicted"] = model.classes[int(predicted[i])]
        if corrections is not None:
            clipped = job.restored(corrections[i])
            values["psnr_noisy"] = picture_psnr(images.to_unit(job.noisy), job.clean)
            values["psnr"] = picture_psnr(clipped, job.clean)
            values["ssim"] = ssim(clipped, job.clean)
        if told is not None:
            values["psnr_class"] = picture_psnr(job.restored(told[i]), job.clean)
        rows.append(
            Row(str(job.sample.clean), job.level.sigma, label=job.sample.label, **values)  # type: ignore[arg-type]
        )
    return rows


def _one_hot(model: Model, label: str) -> Tensor:
    mixture = model.mixture(label)
    assert mixture is not None
    return mixture


def summarise(rows: Iterable[Row], paired: bool = False) -> list[Summary]:
    """Means per noise level over the rows without an error; infinite PSNR counts as 100 dB."""
    groups: dict[float | None, list[Row]] = defaultdict(list)
    for row in rows:
        if row.error is None:
            groups[None if paired else row.sigma].append(row)

    def mean(values: Iterable[float | None]) -> float | None:
        known = [min(v, 100.0) for v in values if v is not None]
        return float(np.mean(known)) if known else None

    return [
        Summary(
            sigma=sigma,
            pictures=len(group),
            psnr_noisy=mean(r.psnr_noisy for r in group),
            psnr=mean(r.psnr for r in group),
            ssim=mean(r.ssim for r in group),
            psnr_class=mean(r.psnr_class for r in group),
            accuracy=mean(float(r.predicted == r.label) for r in group if r.predicted is not None),
        )
        for sigma, group in groups.items()
    ]
