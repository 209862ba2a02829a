"""A model of the noise that a picture holds: by tone, by colour and by scale.

Colours are turned to axes at right angles, luma (1, 1, 1) and two of chroma, so that white noise
has the same level on each. Levels are standard deviations in [0, 1] pixel units.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdnctl.images import PEAK

Array = NDArray[np.floating[Any]]

AXES: Array = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
"""Rows: the axes of luma and chroma, of length 1."""

OCTAVES = 4

# Told the level of two pixels, a denoiser of white noise still takes part of the grain for
# texture. The factor that did best on simulated cameras, at one pixel of scene a pixel and at two.
_GRAINY = 1.5
_SURE = 1.25  # of colour, from a confidence of 1 / 1.25 on, what was measured is taken as it is

_STRONGEST = 40 / PEAK  # of a camera's noise
# Confidence up to which a denoiser that hears takes nothing, and from which it takes all.
_HEARD = (0.2, 0.6)


@dataclass(frozen=True)
class Noise:
    """A noise model. Noise of tone t on axis c has the level ``curve(t) * levels[c][0]``.

    tones, shape: a curve over tones in [0, 1], relative: its mean square over the picture is 1.
    levels: by axis (one for gray, three for colour) and octave: the level that white noise would
    have that is as strong in this octave; equal for white noise. Octave j holds what squares of
    2^j pixels still show and of 2^(j+1) no longer.
    confidence: 0 (cannot be told from texture) to 1.
    """

    tones: tuple[float, ...]
    shape: tuple[float, ...]
    levels: tuple[tuple[float, ...], ...]
    confidence: float
    measured: bool = True  # False: there was too little to measure by

    @staticmethod
    def white(sigma: float, channels: int = 3) -> Noise:
        """White noise of one level."""
        return Noise((0.0, 1.0), (1.0, 1.0), ((sigma,) * OCTAVES,) * channels, 1.0)

    @property
    def octaves(self) -> Array:
        """``levels`` as an array (axes, octaves)."""
        return np.array(self.levels)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of a pixel, mean square over tones and channels."""
        return float(np.sqrt(np.mean(_total(self.octaves) ** 2)))

    @property
    def grain(self) -> float:
        """Width of the grain of luma in pixels: 1 for white noise.

        The square root of the area over which noise is alike: averaging over n x n pixels
        with n much greater than ``grain`` leaves grain / n of the noise.
        """
        luma = self.octaves[0]
        total = float(_total(luma[None])[0])
        # The coarsest octave is the least certain; a grain of four pixels is in the third.
        return max(1.0, float(luma[-2]) / total) if total > 0 else 1.0

    @property
    def chroma(self) -> float:
        """Level of chroma over that of luma, 1 for white noise and for gray pictures."""
        total = _total(self.octaves)
        if len(total) == 1 or total[0] == 0:
            return 1.0
        return float(np.sqrt(np.mean(total[1:] ** 2)) / total[0])

    @property
    def told(self) -> float:
        """Level to tell a denoiser of white noise, whatever the confidence.

        That is sigma for white noise. Grain hides from it unless it is told more than luma has in
        the octave of two pixels, where cameras leave most of their noise. In gray pictures there
        is no colour to tell grain from texture by, and it is told as it is.
        """
        grainy = len(self.levels) == 3 and not self.is_white
        return float(self.octaves[0, 1]) * (_GRAINY if grainy else 1)

    def curve(self, tone: Array | float) -> Array:
        """Relative level at tones in [0, 1], like ``tone``; constant beyond the ends."""
        relative: Array = np.asarray(np.interp(tone, self.tones, self.shape))
        return relative

    @property
    def share(self) -> float:
        """Of the level, what is taken for noise, 0 to 1: less where it may be texture."""
        return min(1.0, _SURE * self.confidence) if len(self.levels) == 3 else self.confidence

    @property
    def safe(self) -> float:
        """Level to tell a denoiser of white noise: less where it may be texture."""
        return self.share * self.told

    @property
    def heard(self) -> float:
        """Level to tell a denoiser that hears what the noise is like: it was trained with levels
        as mistaken as these, but not with textures that look like noise."""
        least, most = _HEARD
        return float(np.clip((self.confidence - least) / (most - least), 0, 1)) * self.sigma

    @property
    def whitened(self) -> Noise:
        """White noise of the level that is told of it."""
        return Noise.white(self.told, len(self.levels))

    def within(self, tones: Array) -> Noise:
        """The same noise in a picture of other tones, an array in [0, 1]: no tone has another
        level than before, but ``shape`` and ``levels`` are relative to this picture."""
        scale = float(np.sqrt(np.mean(self.curve(tones) ** 2)))
        if scale == 0:
            return self
        return replace(
            self,
            shape=tuple(s / scale for s in self.shape),
            levels=tuple(tuple(level * scale for level in row) for row in self.levels),
        )

    @property
    def camera(self) -> bool:
        """Whether it is noise, of colour pictures, that differs from white noise of one level."""
        uneven = max(self.shape) > 1.05 * min(self.shape)
        return len(self.levels) == 3 and self.safe > 0 and (uneven or not self.is_white)

    @property
    def by_camera(self) -> bool:
        """Whether its octaves differ as well: it has come through demosaicing or a filter. No
        camera's is stronger than a bound, but stripes may be."""
        return self.camera and not self.is_white and self.sigma <= _STRONGEST

    @property
    def is_white(self) -> bool:
        """Whether white noise of one level describes it well enough."""
        return bool(self.octaves.max() <= 1.01 * self.octaves.min())

    def summary(self) -> str:
        """In words, on the scale up to 255."""
        if PEAK * self.sigma < 0.3:
            return "no noise to speak of"
        dark, light = (PEAK * self.sigma * self.shape[end] for end in (0, -1))
        unsure = "" if self.confidence >= 0.5 else ", unsure: may be texture"
        if self.is_white:
            return f"white noise, sigma {PEAK * self.sigma:.3g}{unsure}"
        words = [
            f"sigma {dark:.2g} in shadows to {light:.2g} in lights",
            f"grain {self.grain:.2g} px",
        ]
        if len(self.levels) > 1:
            words.append(f"chroma {self.chroma:.2g} x luma")
        return "camera noise: " + ", ".join(words) + unsure

    def record(self) -> dict[str, Any]:
        """For programs: the model, and what is told by it, as JSON has it."""
        return asdict(self) | {"grain": self.grain, "chroma": self.chroma}

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Noise:
        """What `to_json` wrote. ValueError, in a sentence, if it is anything else."""
        try:
            fields = json.loads(text)
            numbers = {k: tuple(float(x) for x in fields[k]) for k in ("tones", "shape")}
            levels = tuple(tuple(float(x) for x in row) for row in fields["levels"])
            sure = float(fields["confidence"])
            noise = Noise(numbers["tones"], numbers["shape"], levels, sure)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"not a noise profile: {error}") from None
        values = [*noise.tones, *noise.shape, *(x for row in levels for x in row)]
        if (
            not np.isfinite([*values, noise.confidence]).all()
            or min(values) < 0
            or len(noise.tones) != len(noise.shape)
            or len({len(row) for row in levels}) != 1
            or len(levels) not in (1, 3)
            or list(noise.tones) != sorted(set(noise.tones))
        ):
            raise ValueError("not a noise profile: its numbers do not fit together")
        return noise


def _total(octaves: Array) -> Array:
    """Level of a pixel's noise from those of its octaves, (axes, octaves) to (axes,): an octave
    of white noise holds three quarters of what is left, the last one all."""
    share = 0.75 * 0.25 ** np.arange(octaves.shape[-1])
    share[-1] /= 0.75
    return np.sqrt((octaves**2 * share).sum(-1))
