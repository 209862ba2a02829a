"""How good the repairs are: holes, scale, blur and JPEG blocks beside what else there is.

Each repair is the `Operation` that its command runs, with the settings that the command has by
default, on crops of clean pictures that are damaged here. All scores are means of the PSNR of the
clipped result. What is measured has no rounding (float samples) but in JPEG files.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.metrics import psnr
from cdnctl.errors import UsageError
from cdnctl.images import Image
from cdnctl.inverse.operators import BlockMean, Convolution, Mask, gaussian
from cdnctl.restore.deblock import Deblock
from cdnctl.restore.prior import Prior
from cdnctl.restore.repair import Repair, Repaired, Settings
from cdnctl.restore.repairs import Deblur, Inpaint, Upscale
from cdnctl.sampling import geometric

T = TypeVar("T")

MISSING = 0.5  # share of the pixels, where they are missing at random
SQUARE, DISTANCE = 16, 40  # pixels: the side of square holes, from one to the next
BLUR, NOISE = 1.6, 2 / images.PEAK  # of pictures to deblur
QUALITIES = (10, 20, 30, 40)  # of JPEG files
# The schedule of plug-and-play restoration by half-quadratic splitting that is in wide use (Zhang
# et al. 2021, DPIR): levels, their number, and the factor on the noise of the data.
DPIR_FIRST, DPIR_STEPS, DPIR_FACTOR = 49 / images.PEAK, 8, 0.23


@dataclass(frozen=True)
class Row:
    """A repair beside one other way, means over pictures."""

    repair: str
    psnr: float
    other: str
    other_psnr: float
    gain: float  # in dB
    worst: float  # the least gain of a picture
    better: int  # pictures with a gain above 0
    pictures: int
    denoisings: float | None  # processor time in units of one denoising of the result's size
    # In levels of 0..255, of JPEG files: how far the farthest coefficient is outside of its box.
    outside: float | None = None


@dataclass(frozen=True)
class _Trial:
    """One picture, repaired and otherwise."""

    psnr: float
    others: dict[str, float]
    denoisings: float | None
    outside: float | None = None


def crops(files: Sequence[Path], count: int, size: int) -> list[Tensor]:
    """The middle size x size pixels of ``count`` pictures, evenly spaced among those that are
    large enough, float32 (1, C, size, size) in [0, 1]. UsageError if there are none."""
    found = []
    for file in files:
        pixels = images.read(file).pixels
        top, left = ((n - size) // 2 for n in pixels.shape[:2])
        if min(top, left) >= 0:
            part = pixels[top : top + size, left : left + size].transpose(2, 0, 1)
            found.append(torch.from_numpy(part.astype(np.float32))[None])
    if not found:
        raise UsageError(f"no picture has {size} x {size} pixels: give a smaller --size")
    kept = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[i] for i in kept]


def measured(
    pictures: Sequence[Tensor],
    model: Model,
    names: Sequence[str],
    *,
    samples: int = 10,
    seed: int = 0,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Scores of the repairs with these names (of `REPAIRS`), on crops as of `crops`.

    samples: of "samples", the draws whose mean is compared with one. watch: called after each
    picture.
    """
    for name in names:
        trial = REPAIRS[name](pictures, model, samples)
        generator = torch.Generator().manual_seed(seed)
        trials = []
        for x in pictures:
            trials.append(trial(x, generator))
            watch()
        yield from _rows(name if name != "samples" else f"mean of {samples} samples", trials)


def _rows(name: str, trials: Sequence[_Trial]) -> Iterator[Row]:
    ours = np.array([t.psnr for t in trials])
    ratios = [t.denoisings for t in trials if t.denoisings is not None]
    outside = [t.outside for t in trials if t.outside is not None]
    for other in trials[0].others:
        theirs = np.array([t.others[other] for t in trials])
        gains = ours - theirs
        yield Row(
            name,
            float(ours.mean()),
            other,
            float(theirs.mean()),
            float(gains.mean()),
            float(gains.min()),
            int((gains > 0).sum()),
            len(trials),
            float(np.median(ratios)) if ratios else None,
            max(outside) if outside else None,
        )


# -- the repairs ----------------------------------------------------------------------

_Run = Callable[[Tensor, torch.Generator], _Trial]


def _holes(known_of: Callable[[int, torch.Generator], Tensor]) -> Callable[..., _Run]:
    def of(pictures: Sequence[Tensor], model: Model, samples: int) -> _Run:
        def run(x: Tensor, generator: torch.Generator) -> _Trial:
            from skimage.restoration import inpaint_biharmonic

            known = known_of(x.shape[-1], generator)
            hole = ~known.numpy()
            damaged = Mask(known).apply(x)
            done, ratio = _timed(Inpaint(Settings(), hole), _image(damaged), model, x.shape)
            smooth = inpaint_biharmonic(_image(damaged).samples, hole, channel_axis=2)
            return _Trial(
                _score(done.image, x), {"biharmonic": _score(Image(_float(smooth)), x)}, ratio
            )

        return run

    return of


def _random_pixels(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, size, generator=generator) >= MISSING


def _squares(size: int, generator: torch.Generator) -> Tensor:
    """Squares with a margin of their own side to the edge and DISTANCE from one to the next."""
    known = torch.ones(size, size, dtype=torch.bool)
    places = range(SQUARE, size - 2 * SQUARE + 1, DISTANCE)
    for top in places:
        for left in places:
            known[top : top + SQUARE, left : left + SQUARE] = False
    return known


def _upscaled(pictures: Sequence[Tensor], model: Model, samples: int) -> _Run:
    def run(x: Tensor, generator: torch.Generator) -> _Trial:
        small = BlockMean(2).apply(x)
        done, ratio = _timed(Upscale(Settings(), factor=2), _image(small), model, x.shape)
        bicubic = interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
        return _Trial(_score(done.image, x), {"bicubic": _score(_image(bicubic), x)}, ratio)

    return run


def _deblurred(pictures: Sequence[Tensor], model: Model, samples: int) -> _Run:
    """The best Wiener filter knows the mean power spectrum of these very pictures, and has a
    factor on the noise that is best for them; plug-and-play has the same network."""
    kernel = gaussian(BLUR)
    blur = Convolution(kernel, valid=True)
    edge = kernel.shape[0] // 2  # that is not seen, and again as much that depends on what is not

    def inside(x: Tensor) -> Tensor:
        return x[..., 2 * edge : -2 * edge, 2 * edge : -2 * edge]

    def blurred(x: Tensor, generator: torch.Generator) -> Tensor:
        m = blur.apply(x)
        return m + NOISE * torch.randn(m.shape, generator=generator)

    spectrum = torch.stack([_power(x) for x in pictures]).mean(0)
    trial = torch.Generator().manual_seed(0)
    pairs = [(x, blurred(x, trial)) for x in pictures]

    def total(factor: float) -> float:
        found = ((inside(_wiener(m, kernel, spectrum, factor)), inside(x)) for x, m in pairs)
        return sum(float(psnr(a.clamp(0, 1), b).mean()) for a, b in found)

    factor = max((0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0), key=total)
    settings = Settings(noise=NOISE)

    def run(x: Tensor, generator: torch.Generator) -> _Trial:
        m = blurred(x, generator)
        done, ratio = _timed(Deblur(settings, kernel), _image(m), model, x.shape)
        ours = pad(_tensor(done.image), (edge,) * 4)
        found = {
            "best Wiener filter": _wiener(m, kernel, spectrum, factor),
            "plug-and-play, DPIR's schedule": _plug_and_play(m, blur, x.shape, model),
        }
        scores = {k: _of(inside(v), inside(x)) for k, v in found.items()}
        return _Trial(_of(inside(ours), inside(x)), scores, ratio)

    return run


def _power(x: Tensor) -> Tensor:
    """Power spectrum, (H, W / 2 + 1), without the mean, of a picture under a smooth window."""
    window = torch.hann_window(x.shape[-1]).outer(torch.hann_window(x.shape[-1])).sqrt()
    flat = (x - x.mean((-2, -1), keepdim=True)) * window / window.square().mean().sqrt()
    return torch.fft.rfft2(flat, norm="ortho").abs().square().mean((0, 1))


def _wiener(m: Tensor, kernel: Tensor, spectrum: Tensor, factor: float) -> Tensor:
    """The Wiener filter of blur and noise for pictures with this power spectrum; the picture is
    continued by its mirror image to the size of the scene."""
    edge = kernel.shape[0] // 2
    extended = pad(m, (edge,) * 4, mode="reflect")
    mean = extended.mean((-2, -1), keepdim=True)
    blur = Convolution(kernel)
    transfer = torch.fft.rfft2(blur.apply(_point(extended)))[0, 0]
    gain = transfer.conj() * spectrum / (transfer.abs() ** 2 * spectrum + factor * NOISE**2)
    return mean + torch.fft.irfft2(torch.fft.rfft2(extended - mean) * gain, s=extended.shape[-2:])


def _point(like: Tensor) -> Tensor:
    point = torch.zeros(1, 1, *like.shape[-2:])
    point[..., 0, 0] = 1
    return point


@torch.no_grad()
def _plug_and_play(m: Tensor, blur: Convolution, shape: Sequence[int], model: Model) -> Tensor:
    """Data and denoiser in turns, as published by Zhang et al. 2021 (DPIR, section 4.2): the
    last step is a denoising at the noise level of the data."""
    prior = Prior(model, (shape[1], shape[2], shape[3]))
    edge = blur.kernel.shape[0] // 2
    x = pad(m, (edge,) * 4, mode="replicate")
    for sigma in geometric(DPIR_FIRST, NOISE, DPIR_STEPS):
        x = prior(blur.meet(x, m, DPIR_FACTOR * (NOISE / sigma) ** 2), sigma)
    return x


def _deblocked(quality: int) -> Callable[..., _Run]:
    def of(pictures: Sequence[Tensor], model: Model, samples: int) -> _Run:
        def run(x: Tensor, generator: torch.Generator) -> _Trial:
            from PIL import Image as Pillow

            data = io.BytesIO()
            levels = images.from_unit(_image(x).samples, np.dtype(np.uint8))
            Pillow.fromarray(levels).save(data, "JPEG", quality=quality)
            file = images.decode(data.getvalue(), "crop.jpg")
            operation = Deblock()
            ready = operation.prepare(file, "crop.jpg", data.getvalue())
            (done,), seconds = _clocked(lambda: operation.run([ready], model, lambda share: None))
            scores = {"the file": _score(file, x)}
            ratio = seconds / _one_denoising(model, x.shape)
            return _Trial(_score(done.image, x), scores, ratio, done.outside)

        return run

    return of


def _samples(pictures: Sequence[Tensor], model: Model, samples: int) -> _Run:
    """Random pixels are missing; the mean of the draws against each of them."""

    def run(x: Tensor, generator: torch.Generator) -> _Trial:
        known = _random_pixels(x.shape[-1], generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        operation = Inpaint(Settings(samples=samples, seed=seed), ~known.numpy())
        done, ratio = _timed(operation, _image(Mask(known).apply(x)), model, x.shape)
        each = [_score(Image(_float(one)), x) for one in done.draws]
        mean = _score(Image(_float(done.draws.mean(0))), x)
        return _Trial(mean, {"one sample": float(np.mean(each))}, ratio)

    return run


REPAIRS: dict[str, Callable[[Sequence[Tensor], Model, int], _Run]] = {
    "random pixels": _holes(_random_pixels),
    "squares": _holes(_squares),
    "upscale x2": _upscaled,
    "deblur": _deblurred,
    **{f"JPEG {q}": _deblocked(q) for q in QUALITIES},
    "samples": _samples,
}


# -- helpers --------------------------------------------------------------------------


def _timed(
    operation: Repair, image: Image, model: Model, shape: Sequence[int]
) -> tuple[Repaired, float]:
    """What an operation makes of a picture, and its time in denoisings of that shape."""
    ready = operation.prepare(image, "crop", b"")
    (done,), seconds = _clocked(lambda: operation.run([ready], model, lambda share: None))
    return done, seconds / _one_denoising(model, shape)


@torch.no_grad()
def _one_denoising(model: Model, shape: Sequence[int]) -> float:
    """Processor seconds; the middle of three."""
    prior = Prior(model, (shape[1], shape[2], shape[3]))
    y = torch.full(tuple(shape), 0.5, device=model.device)
    return sorted(_clocked(lambda: prior(y, 0.1))[1] for _ in range(3))[1]


def _clocked(work: Callable[[], T]) -> tuple[T, float]:
    started = time.process_time()
    done = work()
    return done, time.process_time() - started


def _float(samples: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(samples, np.float32)


def _image(x: Tensor) -> Image:
    return Image(_float(x[0].permute(1, 2, 0).numpy()))


def _tensor(image: Image) -> Tensor:
    return torch.from_numpy(images.to_unit(image.samples)).permute(2, 0, 1)[None]


def _score(image: Image, x: Tensor) -> float:
    return _of(_tensor(image), x)


def _of(found: Tensor, x: Tensor) -> float:
    return float(psnr(found.clamp(0, 1), x))
