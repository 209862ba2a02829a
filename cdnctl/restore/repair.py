"""Holes, scale and blur: pictures from measurements, with the denoiser as what is known of
pictures (`cdnctl.inverse.guide`).

Each repair is an `Operation`: it says which linear operator has made the picture of the one that
is wanted. Without samples the result is the same every time: the picture that the measurement
and the denoiser agree on. With samples it is the mean of draws from the posterior, which is
nearer to the truth, and their spread tells how sure it is.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.inverse.guide import Guided, draw, reconstruct
from cdnctl.inverse.operators import BlockMean, Convolution, Mask, Operator
from cdnctl.restore.operation import Result
from cdnctl.restore.prior import Prior
from cdnctl.restore.samples import finer, is_gray, on_own_scale, on_unit_scale, sample_step
from cdnctl.restore.view import OutOfMemory, out_of_memory
from cdnctl.sampling import geometric

STIRS = 12  # steps at the first level, without which draws lack variance, see `sampling.stir`
FACTORS = (2, 3, 4)
ALPHA = "alpha"  # stands for a mask: what is wholly transparent is missing
ROUNDING = 1 / images.PEAK / math.sqrt(12)  # of 8 bits, as noise


@dataclass(frozen=True)
class Settings:
    """How to repair a picture."""

    noise: float = 0.0  # of the measurement: a standard deviation in [0, 1] pixel units
    steps: int = 20  # noise levels, from the first to the last
    samples: int = 0  # draws whose mean is the result; 0: nothing is random
    seed: int = 0  # of the draws
    target: Mapping[str, float] | None = None  # a mixture of classes, or all
    tile: int | None = None  # of at most tile x tile pixels; None: as large as ``memory`` allows
    memory: int | None = None  # bytes for all work; None: half of what is free
    range: tuple[float, float] | None = None  # black and white of float samples; None: 0 and 1
    finer: bool = False  # results of pictures of 8 bits are of 16

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise UsageError(f"noise is {self.noise:g}, but must lie in [0, 1] pixel units")
        if self.steps < 1:
            raise UsageError(f"{self.steps} steps: give 1 or more")
        if self.samples < 0:
            raise UsageError(f"{self.samples} samples: give 1 or more, or none for the mean")


@dataclass(frozen=True)
class Repaired(Result):
    """A repaired picture and what was found on the way."""

    noise: float  # of the measurement, as it was used, in [0, 1] pixel units
    # Root mean square of what the result, before it is rounded, misses of the measurement.
    missed: float
    draws: np.ndarray = field(repr=False)  # float32 (samples, H, W, C), in [0, 1], not clipped

    def spread(self) -> np.ndarray:
        """The standard deviation of the draws, float32 (H, W): the root of the mean variance of
        the channels. Needs two draws."""
        variance = self.draws.var(0, ddof=1, dtype=np.float32).mean(-1)
        return np.sqrt(variance)


@dataclass(frozen=True)
class _Problem:
    """What was measured of the picture that is wanted."""

    operator: Operator
    measured: Tensor  # (1, C, h, w)
    shape: tuple[int, int, int]  # C, H and W of what is solved for
    noise: float


@dataclass(frozen=True)
class Repair(ABC):
    """Repairing as an `Operation`, whatever the operator."""

    settings: Settings
    name: ClassVar[str]
    first: ClassVar[float]  # noise level of the first step without samples, in [0, 1] pixel units

    @property
    @abstractmethod
    def what(self) -> dict[str, Any]:
        """Parameters beside the settings, as JSON has them."""

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Operation`; noise is on the scale of 0..255, as people tell it."""
        s = self.settings
        values = {
            "noise": round(images.PEAK * s.noise, 6),
            "steps": s.steps,
            "samples": s.samples,
            "class": None if s.target is None else dict(s.target),
            "tile": s.tile,
            "range": None if s.range is None else list(s.range),
        }
        return self.what | values | ({"seed": s.seed} if s.samples else {})

    def prepare(self, image: Image, name: str, data: bytes) -> Image:
        """The picture on the scale of [0, 1], if it can be repaired."""
        if self.settings.range is not None and image.dtype.kind != "f":
            raise ImageError(
                f"{name!r}: --range is for float samples here, but these are {image.dtype.name}, "
                "whose range is known: leave it out"
            )
        image = on_unit_scale(image, self.settings.range, name)
        try:
            self.problem(image, torch.device("cpu"))
        except UsageError as error:  # of this picture; others may do
            raise ImageError(f"{name!r}: {error}") from None
        return image

    def together(self, height: int, width: int) -> int:
        """Each on its own: one takes as long as many denoisings."""
        return 1

    @abstractmethod
    def problem(self, image: Image, device: torch.device) -> _Problem:
        """What the picture says of the one that is wanted; UsageError if it does not suit."""

    @abstractmethod
    def finished(self, image: Image, pixels: np.ndarray) -> Image:
        """The result as a picture, from float32 (H, W, C) that was solved for."""

    def place(self, image: Image) -> tuple[slice, slice]:
        """Which part of what is solved for is the result."""
        return slice(None), slice(None)

    def run(
        self, ready: Sequence[Image], model: Model, watch: Callable[[float], None]
    ) -> list[Repaired]:
        """See `Operation`."""
        return [self._one(image, model, watch) for image in ready]

    def record(self, result: Repaired) -> dict[str, Any]:
        """See `Operation`; on the scale of 0..255."""
        return {"missed": round(images.PEAK * result.missed, 6)}

    def _one(self, image: Image, model: Model, watch: Callable[[float], None]) -> Repaired:
        settings = self.settings
        problem = self.problem(image, model.device)
        mixture = None if settings.target is None else model.mixture(settings.target)
        prior = Prior(
            model,
            problem.shape,
            mixture,
            tile=settings.tile,
            memory=settings.memory,
        )
        guided = Guided(prior, problem.operator, problem.measured, problem.noise)
        try:
            found = list(self._solved(guided, prior, watch))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemory(
                f"not enough memory for {prior.width} x {prior.height} pixels: give a smaller "
                "--tile, or cut the picture into parts"
            ) from None
        mean = torch.stack(found).mean(0)
        if not mean.isfinite().all():
            raise ImageError("the network gave numbers that are not finite; check --model")
        missed = problem.operator.apply(mean) - guided.measured
        rows, columns = self.place(image)
        shown = [x[0, :, rows, columns].permute(1, 2, 0).cpu().numpy() for x in (mean, *found)]
        channels = image.samples.shape[2]
        shown = [np.broadcast_to(x, (*x.shape[:2], channels)) for x in shown]
        deep = finer(image) if settings.finer else image
        result = on_own_scale(self.finished(deep, shown[0]), settings.range, image.dtype)
        draws = np.stack(shown[1:]) if settings.samples else np.empty((0, *shown[0].shape))
        rms = missed.square().mean().sqrt().item()
        return Repaired(result, model, problem.noise, rms, draws, ends=settings.range)

    def _solved(
        self, guided: Guided, prior: Prior, watch: Callable[[float], None]
    ) -> Iterator[Tensor]:
        """The draws, or what is found without."""
        settings = self.settings
        first = prior.highest if settings.samples else min(self.first, prior.highest)
        last = min(max(1 / images.PEAK, guided.noise), first / 2)
        sigmas = geometric(first, last, settings.steps)
        if not settings.samples:
            yield reconstruct(guided, sigmas, watch=watch)
            return
        device = guided.measured.device
        generator = torch.Generator(device).manual_seed(settings.seed)
        for i in range(settings.samples):

            def part(share: float, done: int = i) -> None:
                watch((done + share) / settings.samples)

            yield draw(guided, sigmas, stirs=STIRS, generator=generator, watch=part)


@dataclass(frozen=True)
class Inpaint(Repair):
    """Fill holes; what is known, without noise, is kept to the bit."""

    hole: np.ndarray | None = field(default=None, repr=False)  # boolean (H, W); None: alpha is 0
    name: ClassVar[str] = "inpaint"
    first: ClassVar[float] = 100 / images.PEAK

    def __post_init__(self) -> None:
        if self.hole is not None:
            Mask(torch.from_numpy(~self.hole))  # refuses what is all hole
            _check_hole(self.hole)

    @property
    def what(self) -> dict[str, Any]:
        """The mask by its digest."""
        if self.hole is None:
            return {"mask": ALPHA}
        size = "x".join(map(str, self.hole.shape[::-1]))
        bits = np.packbits(self.hole).tobytes()
        return {"mask": f"{size} {hashlib.sha256(bits).hexdigest()}"}

    def problem(self, image: Image, device: torch.device) -> _Problem:
        """The pixels that are not in the hole."""
        pixels = _tensor(image, device)
        operator = Mask(torch.from_numpy(~self._hole(image)).to(device))
        operator.shape(pixels.shape)
        return _Problem(operator, operator.apply(pixels), _shape(pixels), self.settings.noise)

    def finished(self, image: Image, pixels: np.ndarray) -> Image:
        """What was filled can be seen, if it was missing for being transparent."""
        samples = images.from_unit(pixels, image.dtype)
        hole = self._hole(image)
        if not self.settings.noise:
            samples = np.where(hole[..., None], samples, image.samples)
        result = image.with_samples(samples)
        if self.hole is None and image.alpha is not None:
            full = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
            alpha = np.where(hole, full, image.alpha).astype(image.dtype)
            result = replace(result, alpha=alpha, hidden=None)
        return result

    def _hole(self, image: Image) -> np.ndarray:
        if self.hole is not None:
            return self.hole
        if image.alpha is None:
            raise UsageError("it has no alpha, which --mask alpha needs: give a mask file")
        _check_hole(image.alpha == 0)
        return image.alpha == 0


@dataclass(frozen=True)
class Upscale(Repair):
    """A picture of ``factor`` times the size, whose means over squares are the given pixels."""

    factor: int = 2
    name: ClassVar[str] = "upscale"
    first: ClassVar[float] = 50 / images.PEAK

    def __post_init__(self) -> None:
        if self.factor not in FACTORS:
            known = ", ".join(map(str, FACTORS))
            raise UsageError(f"a factor of {self.factor}: give one of {known}")

    @property
    def what(self) -> dict[str, Any]:
        """The factor."""
        return {"factor": self.factor}

    def problem(self, image: Image, device: torch.device) -> _Problem:
        """Every pixel is the mean of a square."""
        pixels = _tensor(image, device)
        channels, height, width = _shape(pixels)
        shape = channels, height * self.factor, width * self.factor
        return _Problem(BlockMean(self.factor), pixels, shape, self.settings.noise)

    def finished(self, image: Image, pixels: np.ndarray) -> Image:
        """Alpha grows with it, smoothly."""
        alpha = image.alpha
        if alpha is not None:
            small = torch.from_numpy(images.to_unit(alpha))[None, None]
            large = interpolate(small, scale_factor=self.factor, mode="bilinear")
            alpha = images.from_unit(large[0, 0].numpy(), image.dtype)
        samples = images.from_unit(pixels, image.dtype)
        return replace(image, samples=samples, alpha=alpha, hidden=None)


@dataclass(frozen=True)
class Deblur(Repair):
    """Undo a blur by a known kernel; the scene goes on beyond the picture, unseen."""

    kernel: Tensor = field(default_factory=lambda: torch.ones(1, 1), repr=False)  # (h, w)
    title: str = ""  # of the kernel, for the manifest: it must tell it from others
    name: ClassVar[str] = "deblur"
    first: ClassVar[float] = 50 / images.PEAK

    def __post_init__(self) -> None:
        Convolution(self.kernel)  # refuses what is no kernel

    @property
    def what(self) -> dict[str, Any]:
        """The kernel by its title."""
        return {"kernel": self.title}

    def problem(self, image: Image, device: torch.device) -> _Problem:
        """Convolution of a scene that is larger by what the kernel looks at."""
        pixels = _tensor(image, device)
        kernel = self.kernel / self.kernel.sum()
        Convolution(kernel).shape(pixels.shape)  # refuses a kernel that is larger
        channels, height, width = _shape(pixels)
        h, w = kernel.shape
        shape = channels, height + h - 1, width + w - 1
        # Rounding is noise, which no kernel must amplify without limit.
        noise = max(self.settings.noise, sample_step(image.dtype) / math.sqrt(12))
        if image.dtype.kind == "f":
            noise = max(noise, ROUNDING)
        return _Problem(Convolution(kernel, valid=True), pixels, shape, noise)

    def place(self, image: Image) -> tuple[slice, slice]:
        """The scene without its unseen edge."""
        height, width = image.samples.shape[:2]
        # Convolution turns a kernel round: its centre from the other end.
        top, left = (n - 1 - n // 2 for n in self.kernel.shape)
        return slice(top, top + height), slice(left, left + width)

    def finished(self, image: Image, pixels: np.ndarray) -> Image:
        """All of it is new."""
        return image.with_samples(images.from_unit(pixels, image.dtype))


def _check_hole(hole: np.ndarray) -> None:
    if not hole.any():
        raise UsageError("no pixel is missing: white, or alpha 0, marks what is to be filled")


def _tensor(image: Image, device: torch.device) -> Tensor:
    """Pixels, float32 (1, C, H, W); one channel of a gray picture."""
    samples = image.samples[:, :, :1] if is_gray(image.samples) else image.samples
    return torch.from_numpy(images.to_unit(samples)).permute(2, 0, 1)[None].to(device)


def _shape(pixels: Tensor) -> tuple[int, int, int]:
    channels, height, width = pixels.shape[1:]
    return channels, height, width
