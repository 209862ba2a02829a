"""Where a picture is restored, and how strongly: a picture of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from cdnctl.errors import ImageError
from cdnctl.images import Image, to_unit


@dataclass(frozen=True, eq=False)
class Mask:
    """White: restored; black: left to the bit; grays lie between.

    weights: (H, W), float32 in [0, 1]. name: for messages.
    """

    weights: np.ndarray = field(repr=False)
    name: str

    @staticmethod
    def of(image: Image, name: str) -> Mask:
        """Of a picture in any colours, by their mean; what is transparent is black.

        ImageError for float samples beyond [0, 1].
        """
        weights = image.pixels.mean(2)
        if not (weights.min() >= 0 and weights.max() <= 1):
            raise ImageError(
                f"the mask {name!r} has samples from {weights.min():g} to {weights.max():g}, but "
                "black is 0 and white is 1: store it with 8 bits"
            )
        return Mask(weights if image.alpha is None else weights * to_unit(image.alpha), name)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, as hexadecimal digits."""
        return hashlib.sha256(self.weights.tobytes()).hexdigest()

    def check(self, samples: np.ndarray) -> None:
        """ImageError unless samples (H, W, C) are of its size."""
        if samples.shape[:2] != self.weights.shape:
            (height, width), own = samples.shape[:2], self.weights.shape
            raise ImageError(
                f"the mask {self.name!r} has {own[1]} x {own[0]} pixels, but the picture "
                f"{width} x {height}: give one of its size"
            )
