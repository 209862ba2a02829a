"""Scores on folders: a row per picture and noise level, then a summary.

Protocol: Gaussian noise from a fixed seed, one generator per picture and noise
level (seeded by both, so that no score depends on the order or number of pictures),
the noisy picture not clipped, the result clipped to [0, 1] but not rounded, PSNR for
the data range [0, 1], averaged over pictures.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.metrics import psnr
from cdnctl.errors import ImageError, UsageError
from cdnctl.restore import Field, estimate_sigma, find_pictures


@dataclass(frozen=True)
class Sample:
    """One picture to score: the clean one, its class if known, a noisy one if given."""

    clean: Path
    label: str | None = None
    noisy: Path | None = None

    @property
    def key(self) -> str:
        """What the picture's noise depends on: the same name in two classes gets its own."""
        return f"{self.label or ''}/{self.clean.name}"


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

    Class folders count if the model knows their names; UsageError if it knows only some.
    """
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a folder")
    if (folder / "val").is_dir() and not find_pictures(folder, recursive=False):
        folder = folder / "val"
    samples = [Sample(p) for p in find_pictures(folder, recursive=False)]
    if not samples:
        pictures = find_pictures(folder, recursive=True)
        names = {p.relative_to(folder).parts[0] for p in pictures}
        known = names & set(model.classes)
        if known and known != names:
            raise UsageError(
                f"{str(folder)!r} has class folders that model {model.name!r} does not know: "
                f"{', '.join(sorted(names - known))}; its classes: {', '.join(model.classes)}"
            )
        samples = [Sample(p, p.relative_to(folder).parts[0] if known else None) for p in pictures]
    if not samples:
        raise UsageError(f"no pictures in {str(folder)!r}")
    if noisy is None:
        return samples
    pairs = []
    for sample in samples:
        partner = noisy / sample.clean.relative_to(folder)
        if not partner.is_file():
            raise UsageError(f"{str(sample.clean)!r} has no noisy partner {str(partner)!r}")
        pairs.append(Sample(sample.clean, sample.label, partner))
    return pairs


def ssim(restored: np.ndarray, clean: np.ndarray) -> float | None:
    """Structural similarity (Wang et al. 2004: Gaussian window of 1.5 pixels, mean over channels)
    of (H, W, C) in [0, 1] by scikit-image; None for pictures smaller than its window of 11."""
    from skimage.metrics import structural_similarity

    if min(clean.shape[:2]) < 11:
        return None
    value = structural_similarity(
        restored.astype(np.float64),
        clean.astype(np.float64),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def noisy_version(clean: np.ndarray, sigma: float, name: str, seed: int) -> np.ndarray:
    """clean + sigma * noise, not clipped; the noise depends on name, sigma and seed alone."""
    key = zlib.crc32(f"{name} {sigma:.9f}".encode())
    noise = np.random.default_rng([seed, key]).standard_normal(clean.shape, np.float32)
    return clean + np.float32(sigma) * noise


def evaluate(
    samples: Sequence[Sample], model: Model, sigmas: Iterable[float], seed: int = 0
) -> Iterator[Row]:
    """Score every picture at every noise level (in [0, 1]); sample.noisy takes their place.

    A picture that cannot be read gives a row with its error, and the rest goes on.
    """
    for sample in samples:
        try:
            clean = images.read(sample.clean).pixels
            given = None if sample.noisy is None else images.read(sample.noisy).pixels
            if given is not None and given.shape != clean.shape:
                raise ImageError(
                    f"{str(sample.noisy)!r} is {given.shape}, but its clean partner {clean.shape}"
                )
        except ImageError as error:
            yield Row(str(sample.clean), 0.0, label=sample.label, error=str(error))
            continue
        if given is not None:
            yield _score(sample, clean, given, estimate_sigma(given), model)
        else:
            for sigma in sigmas:
                noisy = noisy_version(clean, sigma, sample.key, seed) if sigma else clean
                yield _score(sample, clean, noisy, sigma, model)


@torch.no_grad()
def _score(sample: Sample, clean: np.ndarray, noisy: np.ndarray, sigma: float, model: Model) -> Row:
    field = Field(model, noisy, sigma)
    correction, logits = field.solve(lambda scores: scores.softmax(0))
    values: dict[str, float | str | None] = {}
    if model.module.classifies and sample.label is not None:
        values["predicted"] = model.classes[int(logits.argmax())]
    if model.module.denoises and (sigma > 0 or sample.noisy is not None):
        restored = np.clip(noisy + correction, 0, 1)
        values["psnr_noisy"] = picture_psnr(noisy, clean)
        values["psnr"] = picture_psnr(restored, clean)
        values["ssim"] = ssim(restored, clean)
        if sample.label is not None and model.module.classifies:
            told = noisy + field.correction(_one_hot(model, sample.label))
            values["psnr_class"] = picture_psnr(np.clip(told, 0, 1), clean)
    return Row(str(sample.clean), sigma, label=sample.label, **values)  # type: ignore[arg-type]


def _one_hot(model: Model, label: str) -> Tensor:
    weights = model.weights(label)
    assert weights is not None
    return weights


def picture_psnr(restored: np.ndarray, clean: np.ndarray) -> float:
    """PSNR in dB of (H, W, C) in [0, 1]."""
    a, b = (torch.from_numpy(np.ascontiguousarray(v))[None] for v in (restored, clean))
    return float(psnr(a, b))


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
