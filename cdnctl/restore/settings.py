"""How to restore a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cdnctl.errors import UsageError
from cdnctl.restore.levels import Kind
from cdnctl.restore.masks import Mask
from cdnctl.restore.samples import Range

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """How to restore a picture."""

    sigma: float | None = None  # in [0, 1] pixel units; None: estimated
    target: str | Mapping[str, float] | None = None  # "auto", a mixture of classes, or none
    # 0 gives the input back, 1 the denoised picture; two numbers are for luma and for chroma.
    strength: float | tuple[float, float] = 1.0
    guidance: float = 1.0  # D + guidance (D_c - D)
    tile: int | None = None  # of at most tile x tile pixels; None: as large as ``memory`` allows
    memory: int | None = None  # bytes for the network's work; None: half of what is free
    range: Range | None = None  # black and white; None: 0 and 1, or all that whole numbers hold
    noise: Kind = "auto"  # what is known of it, where sigma is not told; see `levels.KINDS`
    mask: Mask | None = None  # weighs ``strength`` in each place; None: alike in all
    finer: bool = False  # results of pictures of 8 bits are of 16

    def __post_init__(self) -> None:
        for part in self.strengths:
            if not 0 <= part <= 1:
                raise UsageError(f"strength is {part:g}, but must lie between 0 and 1")
        if not math.isfinite(self.guidance):
            raise UsageError(f"guidance is {self.guidance:g}, but must be a finite number")
        if self.sigma is not None and not 0 <= self.sigma <= 1:
            raise UsageError(f"sigma is {self.sigma:g}, but must lie in [0, 1] pixel units")

    @property
    def strengths(self) -> tuple[float, float]:
        """Of luma and of chroma."""
        return self.strength if isinstance(self.strength, tuple) else (self.strength,) * 2
