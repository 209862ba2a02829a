"""Pictures from measurements, with the denoiser as what is known of pictures
(`cdnctl.inverse.guide`): what holes, scale and blur, `repairs.py`, have in common.

Each repair is an `Operation`: it says which linear operator has made the picture of the one that
is wanted. Without samples the result is the same every time: the picture that the measurement
and the denoiser agree on. With samples it is the mean of draws from the posterior, which is
nearer to the truth, and their spread tells how sure it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.inverse.guide import Guided, draw, reconstruct
from cdnctl.inverse.operators import Operator
from cdnctl.restore.operation import Result
from cdnctl.restore.prior import Prior
from cdnctl.restore.samples import finer, on_own_scale, on_unit_scale
from cdnctl.restore.view import OutOfMemory, out_of_memory
from cdnctl.sampling import geometric

# Of draws: steps, how much noise they replace, see `sampling.sample`, and before them
DRAWING, BETA = 20, 0.8
STIRS = 3  # steps at the first level, without which draws lack variance, see `sampling.stir`


@dataclass(frozen=True)
class Settings:
    """How to repair a picture."""

    noise: float = 0.0  # of the measurement: a standard deviation in [0, 1] pixel units
    steps: int | None = None  # noise levels, from the first to the last; None: as many as suit
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
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"{self.steps} steps: give 1 or more")
        if self.samples < 0:
            raise UsageError(f"{self.samples} samples: give 1 or more, or none for the mean")


@dataclass(frozen=True)
class Repaired(Result):
    """A repaired picture and what was found on the way."""

    noise: float  # of the measurement, as it was used, in [0, 1] pixel units
    # Root mean square of what the result, before it is rounded, misses of the measurement.
    missed: float
    steps: int  # noise levels that were gone through
    draws: np.ndarray = field(repr=False)  # float32 (samples, H, W, C), in [0, 1], not clipped

    def spread(self) -> np.ndarray:
        """The standard deviation of the draws, float32 (H, W): the root of the mean variance of
        the channels. Needs two draws."""
        variance = self.draws.var(0, ddof=1, dtype=np.float32).mean(-1)
        return np.sqrt(variance)


@dataclass(frozen=True)
class Problem:
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
    # Without samples: noise levels of the first step and the last, in [0, 1] pixel units, how many,
    # and how they are gone through, see `sampling.settle`.
    first: ClassVar[float]
    last: ClassVar[float]
    levels: ClassVar[int] = 8
    pull: ClassVar[float] = 1.0
    drive: ClassVar[float] = 0.0
    trust: ClassVar[float] = 1.0  # factor on the noise of the measurement

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
            "steps": self.steps,
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

    def by_camera(self, ready: Any) -> bool:
        """A prior is told of white noise."""
        return False

    def together(self, height: int, width: int) -> int:
        """Each on its own: one takes as long as many denoisings."""
        return 1

    @abstractmethod
    def problem(self, image: Image, device: torch.device) -> Problem:
        """What the picture says of the one that is wanted; UsageError if it does not suit."""

    @property
    def steps(self) -> int:
        """How many noise levels are gone through."""
        return self.settings.steps or (DRAWING if self.settings.samples else self.levels)

    @abstractmethod
    def begin(self, problem: Problem) -> Tensor:
        """A first guess, (1, C, H, W): what can be told without the denoiser."""

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
        trusted = problem.noise * (1.0 if settings.samples else self.trust)
        guided = Guided(prior, problem.operator, problem.measured, trusted)
        try:
            start = self.begin(problem)
            found = list(self._solved(guided, prior, start, problem.noise, watch))
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
        return Repaired(result, model, problem.noise, rms, self.steps, draws, ends=settings.range)

    def _solved(
        self,
        guided: Guided,
        prior: Prior,
        start: Tensor,
        noise: float,
        watch: Callable[[float], None],
    ) -> Iterator[Tensor]:
        """The draws, or what is found without."""
        settings = self.settings
        if not settings.samples:
            first = min(self.first, prior.highest)
            last = min(max(self.last, noise), first / 2)
            sigmas = geometric(first, last, self.steps)
            yield reconstruct(guided, sigmas, start, watch, self.pull, self.drive)
            return
        first = prior.highest
        last = min(max(1 / images.PEAK, noise), first / 2)
        sigmas = geometric(first, last, self.steps)
        device = guided.measured.device
        generator = torch.Generator(device).manual_seed(settings.seed)
        for i in range(settings.samples):

            def part(share: float, done: int = i) -> None:
                watch((done + share) / settings.samples)

            yield draw(guided, sigmas, 1, start, BETA, stirs=STIRS, generator=generator, watch=part)
