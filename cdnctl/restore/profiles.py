"""The noise of a camera: of several pictures that it took, to denoise others by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cdnctl.errors import ImageError, UsageError
from cdnctl.images import PEAK
from cdnctl.restore.levels import KINDS, Kind
from cdnctl.restore.noise import Noise

SURE = 0.5  # confidence from which a picture has a say
LEAST = 0.3 / PEAK  # level from which there is noise to speak of
NODES = 17
_NOTHING = 1e-5  # stands for a level of 0 in logarithms
_FAINT = 1e-4  # what is less is no level


@dataclass(frozen=True)
class Profile:
    """The noise of several pictures, and of how many."""

    noise: Noise
    pictures: int


def profile(found: Sequence[Noise]) -> Profile:
    """What the noise measured in several pictures has in common: medians over those that are
    sure, of its level at each tone that a picture has, and of octaves and axes over their sum.

    Of colour pictures, if there are any: a gray one tells nothing of chroma. ImageError if none
    is sure.
    """
    sure = [n for n in found if n.measured and n.confidence >= SURE and n.sigma >= LEAST]
    axes = max((len(noise.levels) for noise in sure), default=0)
    sure = [noise for noise in sure if len(noise.levels) == axes]
    if not sure:
        raise ImageError(
            f"none of {len(found)} pictures shows surely what its noise is: take some of plain "
            "things, such as walls, a little out of focus"
        )
    low, high = min(n.tones[0] for n in sure), max(n.tones[-1] for n in sure)
    tones = np.linspace(low, high, NODES)
    # Each picture speaks of its own tones only; half a step beyond, so that each has a node.
    reach = (high - low) / (NODES - 1) / 2
    curves = np.full((len(sure), NODES), np.nan)
    for row, noise in zip(curves, sure, strict=True):
        inside = (tones >= noise.tones[0] - reach) & (tones <= noise.tones[-1] + reach)
        row[inside] = np.log(np.maximum(noise.sigma * noise.curve(tones[inside]), _NOTHING))
    known = np.isfinite(curves).any(0)
    curve = np.exp(np.nanmedian(curves[:, known], 0))
    shares = [np.log(np.maximum(n.octaves, _NOTHING) / n.sigma) for n in sure]
    levels = np.exp(np.median(shares, 0))
    # Levels for a curve of mean square 1; `sigma` is linear in them.
    sigma = float(np.sqrt(np.mean(curve**2)))
    noise = Noise(tuple(tones[known].tolist()), tuple((curve / sigma).tolist()), _rows(levels), 1.0)
    levels *= sigma / noise.sigma
    levels[levels < _FAINT] = 0
    return Profile(replace(noise, levels=_rows(levels)), len(sure))


def _rows(levels: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in levels.tolist())


def known_noise(text: str) -> Kind:
    """What is known of noise, as users say it: one of `KINDS`, or a file with a profile.

    UsageError if it is neither.
    """
    path = Path(text)
    if text in KINDS:
        return text
    if not path.is_file():
        raise UsageError(
            f"--noise is {text!r}, but must be auto, white, camera, or a file that "
            "cdnctl noise FOLDER --save FILE.json wrote"
        )
    try:
        return replace(Noise.from_json(path.read_text("utf-8")), confidence=1.0)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"--noise {text!r} is {error}: make one with cdnctl noise FOLDER --save FILE.json"
        ) from None
