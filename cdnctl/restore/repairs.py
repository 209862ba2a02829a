"""Holes, scale and blur, each a `Repair`."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cdnctl import images
from cdnctl.errors import UsageError
from cdnctl.images import Image
from cdnctl.inverse.fill import membrane
from cdnctl.inverse.operators import BlockMean, Convolution, Mask
from cdnctl.restore.repair import Problem, Repair
from cdnctl.restore.samples import is_gray, sample_step

FACTORS = (2, 3, 4)
ALPHA = "alpha"  # stands for a mask: what is wholly transparent is missing
ROUNDING = 1 / images.PEAK / math.sqrt(12)  # of 8 bits, as noise


@dataclass(frozen=True)
class Inpaint(Repair):
    """Fill holes; what is known, without noise, is kept to the bit."""

    hole: np.ndarray | None = field(default=None, repr=False)  # boolean (H, W); None: alpha is 0
    name: ClassVar[str] = "inpaint"
    first: ClassVar[float] = 25 / images.PEAK
    last: ClassVar[float] = 4 / images.PEAK
    pull: ClassVar[float] = 1.3
    drive: ClassVar[float] = 0.5

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

    def problem(self, image: Image, device: torch.device) -> Problem:
        """The pixels that are not in the hole."""
        pixels = _tensor(image, device)
        operator = Mask(torch.from_numpy(~self._hole(image)).to(device))
        operator.shape(pixels.shape)
        return Problem(operator, operator.apply(pixels), _shape(pixels), self.settings.noise)

    def begin(self, problem: Problem) -> Tensor:
        """Smooth from the edges of the hole."""
        assert isinstance(problem.operator, Mask)
        return membrane(problem.measured, problem.operator.known)

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
    first: ClassVar[float] = 25 / images.PEAK
    last: ClassVar[float] = 2 / images.PEAK
    pull: ClassVar[float] = 1.3
    drive: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if self.factor not in FACTORS:
            known = ", ".join(map(str, FACTORS))
            raise UsageError(f"a factor of {self.factor}: give one of {known}")

    @property
    def what(self) -> dict[str, Any]:
        """The factor."""
        return {"factor": self.factor}

    def problem(self, image: Image, device: torch.device) -> Problem:
        """Every pixel is the mean of a square."""
        pixels = _tensor(image, device)
        channels, height, width = _shape(pixels)
        shape = channels, height * self.factor, width * self.factor
        return Problem(BlockMean(self.factor), pixels, shape, self.settings.noise)

    def begin(self, problem: Problem) -> Tensor:
        """Bicubic, with the right means."""
        large = interpolate(
            problem.measured, size=problem.shape[1:], mode="bicubic", align_corners=False
        )
        return problem.operator.meet(large, problem.measured)

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
    first: ClassVar[float] = 49 / images.PEAK
    last: ClassVar[float] = 1 / images.PEAK
    trust: ClassVar[float] = 0.5**0.5

    def __post_init__(self) -> None:
        Convolution(self.kernel)  # refuses what is no kernel

    @property
    def what(self) -> dict[str, Any]:
        """The kernel by its title."""
        return {"kernel": self.title}

    def problem(self, image: Image, device: torch.device) -> Problem:
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
        return Problem(Convolution(kernel, valid=True), pixels, shape, noise)

    def begin(self, problem: Problem) -> Tensor:
        """The blurred picture, gone on with as at its edge."""
        (top, left), (h, w) = self._edge(), self.kernel.shape
        return pad(problem.measured, (left, w - 1 - left, top, h - 1 - top), mode="replicate")

    def place(self, image: Image) -> tuple[slice, slice]:
        """The scene without its unseen edge."""
        height, width = image.samples.shape[:2]
        top, left = self._edge()
        return slice(top, top + height), slice(left, left + width)

    def _edge(self) -> tuple[int, int]:
        """Unseen rows above and columns on the left."""
        # Convolution turns a kernel round: its centre from the other end.
        h, w = self.kernel.shape
        return h - 1 - h // 2, w - 1 - w // 2

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
