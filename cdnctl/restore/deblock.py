"""JPEG files without their blocks: denoised, and never to what the file could not be made of.

The file's quantisation leaves a box around every coefficient, `cdnctl.inverse.jpeg`. The
denoiser, which knows how pictures look, and the nearest picture in the box take turns while the
noise level falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.inverse.jpeg import SLACK, Box, box_of
from cdnctl.restore.operation import Result
from cdnctl.restore.prior import Prior
from cdnctl.sampling import geometric, settle

# On six photographs kept out of training, at qualities 10 to 35, two steps within these bounds
# gained as much as three or four from 1.0 on, or 0.04 dB more; the mean with what is found in the
# mirror adds 0.02 dB.
STEPS = 2
FIRST, LAST = 1.2, 0.6  # noise levels, in units of the error of the quantisation
# In levels: the box that is met is tighter by 1.2, which rounding the result to whole levels may
# put a coefficient off by (4 standard deviations), so that no file's box is left by that.
TIGHT = SLACK - 1.2
MEETINGS = 10  # at the end, of the box and of what is no blacker than black, nor whiter than white
START = b"\xff\xd8\xff"  # of every JPEG file


@dataclass(frozen=True)
class Deblocked(Result):
    """A picture without blocks."""

    sigma: float  # what was taken for the error of the quantisation, in [0, 1] pixel units
    # In levels of 0..255: how far the farthest coefficient is outside of its box, after rounding.
    outside: float


@dataclass(frozen=True)
class _Ready:
    image: Image
    box: Box
    inner: Box  # that the result has before it is rounded
    orientation: int  # of the picture; the box is that of the file as it is stored


@dataclass(frozen=True)
class Deblock:
    """Taking out the blocks of JPEG files as an `Operation`."""

    sigma: float | None = None  # of the quantisation, in [0, 1] pixel units; None: estimated
    target: Mapping[str, float] | None = None  # a mixture of classes, or all
    tile: int | None = None
    memory: int | None = None
    name: ClassVar[str] = "denoise --jpeg"

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Operation`; the noise level is on the scale of 0..255."""
        return {
            "sigma": None if self.sigma is None else round(images.PEAK * self.sigma, 6),
            "class": None if self.target is None else dict(self.target),
            "tile": self.tile,
        }

    def prepare(self, image: Image, name: str, data: bytes) -> _Ready:
        """The picture, with its box."""
        if not data.startswith(START):
            raise ImageError(f"{name!r} is no JPEG file, and has no blocks: leave --jpeg out")
        try:
            boxes = box_of(data), box_of(data, TIGHT)
            return _Ready(image, *boxes, images.jpeg_orientation(data))
        except UsageError as error:
            raise ImageError(f"{name!r}: {error}") from None

    def by_camera(self, ready: Any) -> bool:
        """Blocks are no such noise."""
        return False

    def together(self, height: int, width: int) -> int:
        """Each has a box of its own."""
        return 1

    def run(
        self, ready: Sequence[_Ready], model: Model, watch: Callable[[float], None]
    ) -> list[Deblocked]:
        """See `Operation`."""
        return [self._one(one, model, watch) for one in ready]

    def record(self, result: Deblocked) -> dict[str, Any]:
        """See `Operation`; on the scale of 0..255."""
        return {
            "sigma": round(images.PEAK * result.sigma, 3),
            "outside": round(result.outside, 4),
        }

    def _one(self, ready: _Ready, model: Model, watch: Callable[[float], None]) -> Deblocked:
        box, inner, image = ready.box, ready.inner, ready.image
        y = _tensor(images.as_stored(image.samples, ready.orientation)).to(model.device)
        channels, height, width = y.shape[1:]
        mixture = None if self.target is None else model.mixture(self.target)
        prior = Prior(model, (channels, height, width), mixture, tile=self.tile, memory=self.memory)
        sigma = box.error() if self.sigma is None else self.sigma
        if sigma > 0:
            first = min(FIRST * sigma, prior.highest)
            sigmas = geometric(first, first * LAST / FIRST, STEPS)

            def within(y: Tensor, sigma: Tensor | float) -> Tensor:
                mirrored = prior(y.flip(-1), sigma).flip(-1)
                return inner.project((prior(y, sigma) + mirrored) / 2)

            y = settle(within, y, sigmas, watch)
            for _ in range(MEETINGS):
                y = inner.project(y.clamp(0, 1))
        if not y.isfinite().all():
            raise ImageError("the network gave numbers that are not finite; check --model")
        stored = images.from_unit(y[0].permute(1, 2, 0).cpu().numpy(), image.dtype)
        outside = box.outside(_tensor(stored)).item()
        upright = images.upright(stored, ready.orientation)
        return Deblocked(replace(image, samples=upright), model, sigma, outside)


def _tensor(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(images.to_unit(samples)).permute(2, 0, 1)[None]
