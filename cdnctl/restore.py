"""Restoring pictures: one Image to another, and many files to many files."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdnctl import images, tiles
from cdnctl.api import Model
from cdnctl.errors import CdnctlError, ImageError, UsageError
from cdnctl.images import Image
from cdnctl.models import Weights
from cdnctl.selection import Models

AUTO = "auto"

# A tile of this many pixels a side needs about 1 GB with the compact models.
DEFAULT_TILE = 1024


@dataclass(frozen=True)
class Settings:
    """How to restore a picture."""

    sigma: float | None = None  # in [0, 1] pixel units; None: estimated
    target: str | Mapping[str, float] | None = None  # "auto", a mixture of classes, or none
    strength: float = 1.0  # 0 gives the input back, 1 the denoised picture
    guidance: float = 1.0  # D + guidance (D_c - D)
    tile: int | None = None  # side in pixels; None: DEFAULT_TILE

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UsageError(f"strength is {self.strength:g}, but must lie between 0 and 1")
        if not math.isfinite(self.guidance):
            raise UsageError(f"guidance is {self.guidance:g}, but must be a finite number")
        if self.sigma is not None and not 0 <= self.sigma <= 1:
            raise UsageError(f"sigma is {self.sigma:g}, but must lie in [0, 1] pixel units")


@dataclass(frozen=True)
class Restored:
    """A restored picture and what was found on the way."""

    image: Image
    sigma: float  # noise level used, in [0, 1] pixel units
    sigma_seen: float  # what the network was told: more than sigma for gray pictures
    posterior: Mapping[str, float]  # p(c | picture), most probable class first


class Field:
    """A picture as the network sees it: (C, H, W) on the host, in planned tiles.

    Grayscale pictures are repeated over the network's channels. Their noise is then
    the same in all of them, so it lies on the gray axis alone, where it is sqrt(C)
    times as strong as in one channel: the network is told ``seen``, which is sigma
    times that factor, the noise level at which it would see as much noise on that axis.
    """

    def __init__(self, model: Model, pixels: np.ndarray, sigma: float, tile: int | None = None):
        config = model.module.config
        self.model = model
        self.sigma = sigma
        self.height, self.width, channels = pixels.shape
        self.repeat = config.channels if channels == 1 else 1
        self.seen = sigma * self.repeat**0.5
        y = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        self.picture = tiles.pad_to_multiple(y, config.multiple)
        height, width = self.picture.shape[1:]
        # Group norm needs the whole picture at once; everything else goes tile by tile.
        whole = config.norm == "group"
        side = max(height, width) if whole else (tile or DEFAULT_TILE)
        self.tiles = tiles.plan(height, width, side, config.margin, config.multiple)
        self.cells = height * width // config.multiple**2

    def logits(self) -> Tensor:
        """Class scores of the whole picture, (K,)."""
        module = self.model.module
        if not module.classifies:
            return torch.zeros(module.num_classes)
        mean = tiles.mean_of_cells(
            lambda y: module.class_features(self.repeated(y), self.seen),
            self.picture,
            self.tiles,
            self.model.device,
            module.config.multiple,
        )
        scores: Tensor = module.head.linear(mean.to(self.model.device)).cpu()
        return scores

    def repeated(self, y: Tensor) -> Tensor:
        """(B, C, h, w) of the picture with the network's number of channels."""
        return y.repeat(1, self.repeat, 1, 1)

    def correct(self, y: Tensor, weights: Weights) -> Tensor:
        """sigma^2 sum_c w_c s_c(y) for tiles (B, C, h, w) of the picture, differentiable."""
        if isinstance(weights, Tensor):
            weights = weights.to(y.device)
        correction, _ = self.model.module.correction(
            self.repeated(y), self.seen, weights, self.cells
        )
        return correction.mean(1, keepdim=True) if self.repeat > 1 else correction

    def over_tiles(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Apply a function of tiles, (B, C, h, w) to the same, to the picture: (H, W, C)."""
        out = tiles.run(function, self.picture, self.tiles, self.model.device)
        return out[:, : self.height, : self.width].permute(1, 2, 0).contiguous().numpy()

    def solve(self, choose: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, Tensor]:
        """Correction, (H, W, C), for the class weights that ``choose`` makes of the class
        scores, (K,) to (K,), and the scores. A picture of one tile takes a single pass."""
        if len(self.tiles) > 1:
            logits = self.logits()
            return self.correction(choose(logits)), logits
        seen: list[Tensor] = []

        def weights(logits: Tensor) -> Tensor:
            seen.append(logits[0].cpu())
            return choose(seen[0]).to(logits.device)

        return self.over_tiles(lambda y: self.correct(y, weights)), seen[0]

    def correction(self, weights: Tensor) -> np.ndarray:
        """sigma^2 sum_c w_c s_c(y) as float32 (H, W, C)."""
        return self.over_tiles(lambda y: self.correct(y, weights))


def estimate_sigma(pixels: np.ndarray) -> float:
    """Standard deviation of the noise in float pixels (H, W, C), in their unit, by
    scikit-image's wavelet estimator (Donoho and Johnstone 1994), averaged over channels.

    0 for pictures too small or too flat to tell.
    """
    from skimage.restoration import estimate_sigma as estimate

    if min(pixels.shape[:2]) < 4:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flat pictures: the mean of nothing
        sigma = float(estimate(pixels, channel_axis=-1, average_sigmas=True))
    return sigma if math.isfinite(sigma) else 0.0


def class_weights(model: Model, logits: Tensor, settings: Settings) -> Tensor:
    """Weights w with D_w = D + guidance (D_target - D), (K,): the whole choice of classes
    is one mixture, because D = sum_c p(c | y) D_c."""
    p = logits.softmax(0)
    if settings.target is None:
        return p
    if settings.target == AUTO:
        target: Tensor | None = torch.nn.functional.one_hot(p.argmax(), len(p)).to(p.dtype)
    else:
        target = model.weights(settings.target)
    assert target is not None
    return p + settings.guidance * (target - p)


def ranked(model: Model, logits: Tensor) -> dict[str, float]:
    """Posterior by class name, most probable first; empty if the model does not classify."""
    if not model.module.classifies:
        return {}
    p = logits.double().softmax(0)
    return {model.classes[i]: float(p[i]) for i in p.argsort(descending=True).tolist()}


@contextmanager
def memory_errors(field: Field) -> Iterator[None]:
    """Turn running out of memory, of any device, into an ImageError that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out and "allocate memory" not in str(error):
            raise
        tile = field.tiles[0].read
        raise ImageError(
            f"not enough memory for {field.width} x {field.height} pixels in tiles of "
            f"{tile[1].stop - tile[1].start} x {tile[0].stop - tile[0].start}: "
            "give a smaller --tile (or --model photo, if the model needs the whole picture)"
        ) from None


@torch.no_grad()
def restore(image: Image, model: Model, settings: Settings) -> Restored:
    """Denoise one picture. Size, depth, alpha and metadata are those of ``image``."""
    if not model.module.denoises:
        raise UsageError(f"model {model.name!r} ({model.header.arch}) cannot denoise")
    sigma = estimate_sigma(image.pixels) if settings.sigma is None else settings.sigma
    field = Field(model, image.pixels, sigma, settings.tile)
    with memory_errors(field):
        correction, logits = field.solve(lambda scores: class_weights(model, scores, settings))
    pixels = image.pixels + np.float32(settings.strength) * correction
    return Restored(image.with_pixels(pixels), sigma, field.seen, ranked(model, logits))


@torch.no_grad()
def classify(image: Image, model: Model, sigma: float | None = None) -> Restored:
    """Posterior over classes of one picture, and the noise level used."""
    if not model.module.classifies:
        raise UsageError(f"model {model.name!r} ({model.header.arch}) cannot classify")
    sigma = estimate_sigma(image.pixels) if sigma is None else sigma
    field = Field(model, image.pixels, sigma)
    return Restored(image, sigma, field.seen, ranked(model, field.logits()))


@dataclass(frozen=True)
class Job:
    """One file to restore and where it goes."""

    source: Path
    output: Path


def find_pictures(folder: Path, recursive: bool) -> list[Path]:
    """Picture files of a folder, sorted; hidden files are left out."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        p
        for p in found
        if images.is_image_path(p)
        and not p.is_dir()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def expand(inputs: Sequence[Path], recursive: bool) -> list[Path]:
    """Files, and the pictures of folders, in order. UsageError for what is not there."""
    files: list[Path] = []
    for source in inputs:
        if not source.exists():
            raise UsageError(f"no such file or folder: {str(source)!r}")
        found = find_pictures(source, recursive) if source.is_dir() else [source]
        if not found:
            hint = "" if recursive else " (-r looks into its folders)"
            raise UsageError(f"no pictures in {str(source)!r}{hint}")
        files += found
    return files


def default_output(source: Path) -> Path:
    """photo.png -> photo_denoised.png, beside it; formats that cannot be written become PNG."""
    suffix = source.suffix if source.suffix.lower() in images.WRITE_SUFFIXES else ".png"
    return source.with_name(f"{source.stem}_denoised{suffix}")


def plan(sources: Sequence[Path], output: Path | None, recursive: bool) -> list[Job]:
    """Map inputs to outputs before any work is done.

    A single file goes to ``output`` (a file, or into it if it is a folder) or beside
    itself; a folder needs an ``output`` folder and is mirrored there. UsageError if an
    input is missing, two would share an output, or one would be overwritten.
    """
    jobs: list[Job] = []
    for source in sources:
        if source.is_dir():
            if output is None:
                raise UsageError(f"{str(source)!r} is a folder: say where to with -o FOLDER")
            found = _without(expand([source], recursive), source, output)
            jobs += [Job(p, _writable(output / p.relative_to(source))) for p in found]
        elif not source.exists():
            raise UsageError(f"no such file or folder: {str(source)!r}")
        elif output is None:
            jobs.append(Job(source, default_output(source)))
        elif output.is_dir() or len(sources) > 1:
            jobs.append(Job(source, _writable(output / source.name)))
        else:
            if output.suffix.lower() not in images.WRITE_SUFFIXES:
                known = ", ".join(sorted(images.WRITE_SUFFIXES))
                raise UsageError(f"cannot write {str(output)!r}: its suffix must be one of {known}")
            jobs.append(Job(source, output))
    _check_clashes(jobs)
    return jobs


def _writable(path: Path) -> Path:
    if path.suffix.lower() in images.WRITE_SUFFIXES:
        return path
    return path.with_name(path.name + ".png")


def _without(files: list[Path], source: Path, output: Path) -> list[Path]:
    """The files of a folder, but for what an earlier run wrote into a folder inside of it."""
    place = output.resolve()
    if source.resolve() not in place.parents:
        return files
    rest = [p for p in files if not p.parent.resolve().is_relative_to(place)]
    if not rest:
        raise UsageError(f"no pictures in {str(source)!r} but those in {str(output)!r}")
    return rest


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, there or not."""
    return _key(a) == _key(b) or (a.exists() and b.exists() and a.samefile(b))


def _key(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def _check_clashes(jobs: Sequence[Job]) -> None:
    sources = {_key(job.source): job.source for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        key = _key(job.output)
        if same_file(job.output, job.source):
            raise UsageError(f"{str(job.source)!r} would overwrite itself: choose another output")
        if key in sources:
            raise UsageError(
                f"{str(job.source)!r} would overwrite the input {str(sources[key])!r}: "
                "choose another output, or leave one of them out"
            )
        if key in taken:
            raise UsageError(
                f"{str(taken[key])!r} and {str(job.source)!r} would both be written to "
                f"{str(job.output)!r}: rename one, or run them separately"
            )
        taken[key] = job.source


@dataclass(frozen=True)
class Done:
    """How one job ended: with what was found, or with an error."""

    job: Job
    restored: Restored | None = None
    error: str | None = None


def run(
    jobs: Iterable[Job],
    models: Models,
    settings: Settings,
    *,
    strip_metadata: bool = False,
) -> Iterator[Done]:
    """Restore file after file. A bad file is reported in its ``Done`` and the rest goes on."""
    for job in jobs:
        try:
            image = images.read(job.source)
            restored = restore(image, models.pick(*image.pixels.shape[:2]), settings)
            job.output.parent.mkdir(parents=True, exist_ok=True)
            written = images.write(restored.image, job.output, strip_metadata=strip_metadata)
            noted = replace(restored.image, notes=restored.image.notes + written)
        except OSError as error:
            yield Done(job, error=f"cannot write {str(job.output)!r}: {error.strerror or error}")
        except CdnctlError as error:
            if not isinstance(error, ImageError):
                raise
            yield Done(job, error=str(error))
        else:
            yield Done(job, replace(restored, image=noted))
