"""What noise a picture holds, measured from the picture alone: by tone, by colour and by scale.

The noise of cameras is stronger in some tones than in others, differs between luma and chroma,
and is some pixels wide. Three facts tell it from what the picture shows:

- Every picture has blocks that are nearly flat. They are found by one half of their cosine
  coefficients and measured by the other half, which noise does not tie to the first: choosing
  the flattest does not bias the measure. This is done for the picture and for the picture
  averaged over squares of 2, 4 and 8 pixels, whose finest octave is measured each time.
- Texture only adds. So one curve over tones is laid along the lower edge of what the tones say.
- Texture grows faster from octave to octave than noise, and is mostly without colour. What
  exceeds the growth that noise has, and in chroma the level of luma, is left out: where the
  picture does not tell, the level comes out too low rather than too high.

Colours are turned to axes at right angles, luma (1, 1, 1) and two of chroma, so that white noise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cdnctl.core.noise import unclipped_gain
from cdnctl.images import PEAK
from cdnctl.restore.noise import AXES, OCTAVES, Array, Noise

_BLOCK = 8
_NODES = 9  # of the curve over tones
# Shares of clipped pixels from which a block is not measured: each of the others where those
# before leave less than a tenth of the blocks, as strong noise does.
_CLIPPED = (0.05, 0.25, 0.6)
_QUANTILE = 0.05  # share of a tone's blocks that is taken to be flat
_BINS = 6
_LEAST = 24  # blocks that a tone needs
_TEXTURE = 0.1  # weight of what lies above the curve against what lies below
# Most that noise grows from octave to octave, as level of white noise: luma from the second
# on, and chroma, of which cameras and JPEG take the fine octaves.
_GROWTH = ((1.25, 1.1), (3.0, 3.0, 2.0))
_CHANCE = 0.1  # logarithm of variance that noise differs by from block to block by chance
_WHITE = 1.25  # most by which two octaves, or axes, of white noise seem to differ


def halved(pixels: Array) -> Array:
    """(H, W, C) averaged over squares of 2 x 2; an odd last row or column is left out."""
    height, width = (n // 2 * 2 for n in pixels.shape[:2])
    y = pixels[:height, :width]
    return (y[::2, ::2] + y[1::2, ::2] + y[::2, 1::2] + y[1::2, 1::2]) / 4


def _cosines() -> tuple[Array, Array]:
    """The finest octave of cosines on a block, in two halves: each (64, 24)."""
    k, x = np.mgrid[:_BLOCK, :_BLOCK]
    rows = np.cos(np.pi * (2 * x + 1) * k / (2 * _BLOCK)) * np.sqrt(2 / _BLOCK)
    rows[0] /= np.sqrt(2)
    basis = np.kron(rows, rows).T.astype(np.float32)
    u, v = np.divmod(np.arange(_BLOCK**2), _BLOCK)
    fine, even = np.maximum(u, v) >= _BLOCK // 2, (u + v) % 2 == 0
    return basis[:, fine & even], basis[:, fine & ~even]


_EVEN, _ODD = _cosines()


def _blocks(pixels: Array, stride: int) -> Array:
    """(H, W, C) to (blocks, C, 64)."""
    view = np.lib.stride_tricks.sliding_window_view(pixels, (_BLOCK, _BLOCK), axis=(0, 1))
    return view[::stride, ::stride].reshape(-1, pixels.shape[2], _BLOCK**2)


@dataclass(frozen=True)
class _Octave:
    """What one octave says: (bins,) tones, (bins, axes) variances, and how much blocks taken
    for flat differ, 1 if they do by chance only."""

    tones: Array
    variances: Array
    slopes: Array


def _octave(pixels: Array, clipped: Array, stride: int) -> _Octave | None:
    """Measure the finest octave of a picture on its axes, (H, W, C); clipped: (H, W, 1)."""
    blocks = _blocks(pixels, stride)
    even, odd = (((blocks @ basis) ** 2).mean(2) for basis in (_EVEN, _ODD))
    tones = blocks[:, 0].mean(1)
    share = _blocks(clipped, stride).mean((1, 2))
    usable = next((u for most in _CLIPPED if (u := share < most).mean() > 0.1), share < 1)
    usable &= share < _CLIPPED[-1]
    # Blocks without any variation are borders and areas that were drawn, not photographed;
    # where they make up most of the picture it is a drawing, and they say so: no noise.
    blank = (even + odd).sum(1) < 1e-9
    if (usable & ~blank).sum() > 0.25 * len(blank):
        usable &= ~blank
    if usable.sum() < _LEAST:
        return None
    tones, even, odd = tones[usable], even[usable], odd[usable]
    count = int(np.clip(len(tones) // (5 * _LEAST), 1, _BINS))
    bins = np.array_split(np.argsort(tones, kind="stable"), count)
    variances, slopes = np.empty((2, count, pixels.shape[2]))
    for i, members in enumerate(bins):
        flat = max(_LEAST // 2, int(_QUANTILE * len(members)))
        for axis in range(pixels.shape[2]):
            sorted_by = [
                other[members[np.argsort(one[members, axis], kind="stable")[:flat]], axis]
                for one, other in ((even, odd), (odd, even))
            ]
            values = np.mean(sorted_by, 0)
            low, high = values[: flat // 2].mean(), values[flat // 2 :].mean()
            variances[i, axis], slopes[i, axis] = values.mean(), (high + 1e-12) / (low + 1e-12)
    return _Octave(np.array([np.median(tones[b]) for b in bins]), variances, slopes)


def sampled(pixels: Array) -> Array:
    """At most 4 x 4 evenly spaced squares of 256 pixels of a picture, (H, W, C), as a mosaic."""
    side, count = 256, 4
    for axis in (0, 1):
        size = pixels.shape[axis]
        if size > side * count:
            # At multiples of 8: JPEG works on such squares, and coarse octaves see whole ones.
            starts = np.linspace(0, size - side, count).astype(int) // 8 * 8
            pixels = np.take(pixels, (starts[:, None] + np.arange(side)).ravel(), axis)
    return pixels


def _emptied(pixels: Array) -> float:
    """Share of the squares of JPEG whose fine octave of luma it has set to zero: (H, W, C),
    which starts at a corner of a square. Drawings and other formats have no more such squares
    there than elsewhere, and get 0."""
    luma = (
        pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        if pixels.shape[2] == 3
        else pixels[:, :, 0]
    )

    def share(part: Array) -> float:
        squares = _blocks(part[:, :, None], _BLOCK)[:, 0]
        energy = [((squares @ basis) ** 2).mean(1) for basis in (_EVEN, _ODD)]
        return float((np.mean(energy, 0) < (0.45 / PEAK) ** 2).mean())  # more than rounding leaves

    half = _BLOCK // 2
    if min(luma.shape) < 2 * _BLOCK:
        return 0.0
    return share(luma) - share(luma[half:, half:])


def measure(pixels: Array, alpha: Array | None = None, camera: bool = False) -> Noise:
    """The noise of a picture (H, W, 1 or 3) in [0, 1]; alpha: (H, W), 0 where it is hidden.

    camera: it is known not to be white, and is not taken for white noise where it looks so.
    Large pictures are judged by a sample of them. Confidence is 0 for pictures too small to tell.
    """
    y = np.asarray(sampled(pixels), np.float32)
    # Exactly black or white: values beyond were not clipped.
    clipped = (np.abs(np.abs(y - 0.5) - 0.5) < 0.5 / PEAK).any(2, keepdims=True)
    if alpha is not None:
        clipped |= sampled(alpha[:, :, None]) == 0
    clipped = clipped.astype(np.float32)
    cut = y.min() >= 0 and y.max() <= 1  # floats may go beyond black and white
    channels = y.shape[2]
    axes = AXES if channels == 3 else np.eye(1)
    emptied = _emptied(y)
    y = y @ axes.T.astype(np.float32)
    pattern = _is_pattern(y)
    found = []
    for j in range(OCTAVES):
        if min(y.shape[:2]) < 2 * _BLOCK:
            break
        part = _octave(y, clipped, max(1, 4 >> j))
        if part is None:
            break
        found.append(part)
        y, clipped = halved(y), halved(clipped)
    if not found:
        nothing = ((0.0,) * OCTAVES,) * channels
        return Noise((0.0, 1.0), (1.0, 1.0), nothing, 0.0, measured=False)
    found = _unclipped(found, channels) if cut else found
    model = _model(found, channels, emptied, camera)
    return replace(model, confidence=0.0) if pattern else model


def _unclipped(found: Sequence[_Octave], channels: int) -> list[_Octave]:
    """The octaves as they would be if no value had been cut off at black and white, which takes as
    much from each: by what the finest says of the noise of a pixel, white noise most of all."""
    scale = np.sqrt(channels)
    fine = found[0]
    gain = unclipped_gain(fine.tones / scale, fine.variances.mean(1))
    order = np.argsort(fine.tones)
    return [
        replace(
            part,
            variances=part.variances
            * np.interp(part.tones, fine.tones[order], gain[order])[:, None],
        )
        for part in found
    ]


def _is_pattern(pixels: Array) -> bool:
    """Whether the fine octave of luma, the first of (H, W, C), is of few cosines, as of a
    checkerboard: noise has them all. Below 0.1 there; above 0.25 for photographs, noisy or not."""
    if min(pixels.shape[:2]) < 4 * _BLOCK:
        return False
    blocks = _blocks(pixels[:, :, :1], _BLOCK)[:, 0]
    power = ((blocks @ _EVEN) ** 2).mean(0) + 1e-12
    # JPEG leaves few cosines, too, but weak ones.
    strong = power.mean() > (8 / PEAK) ** 2
    return bool(strong and np.exp(np.log(power).mean()) < 0.15 * power.mean())


def _model(found: Sequence[_Octave], channels: int, emptied: float, camera: bool) -> Noise:
    scale = np.sqrt(channels)
    sets = [
        (part.tones / scale, np.log(np.maximum(part.variances[:, c], 1e-10)) + 2 * j * np.log(2))
        for j, part in enumerate(found)
        for c in range(channels)
    ]
    tones, heights, shape, above = _lower_curve(sets)
    levels = np.exp(heights / 2).reshape(len(found), channels).T
    levels = np.concatenate([levels, levels[:, -1:].repeat(OCTAVES - len(found), 1)], 1)
    texture = [
        (float(np.median(part.slopes[:, 0])), above[j * channels]) for j, part in enumerate(found)
    ]
    confidence, growth = _confidence(texture, levels[0], emptied)
    white = None if camera else _white(levels)
    if white is not None:
        levels[:] = white
        confidence = confidence if channels == 1 else 1.0
    for axis, row in enumerate(levels):
        for j, most in enumerate((growth, *_GROWTH[0]) if axis == 0 else _GROWTH[1]):
            # Filters and JPEG empty the fine octaves of chroma, however much is in the others.
            other = levels[0, j + 1] if axis else 0.0
            row[j + 1] = min(row[j + 1], max(most * row[j], other))
    levels[levels < 1e-4] = 0
    if white is None:
        confidence *= _colourful(levels)
    return Noise(
        tuple(tones.tolist()),
        tuple(shape.tolist()),
        tuple(tuple(row) for row in levels.tolist()),
        confidence,
    )


def _white(levels: Array) -> float | None:
    """The level of white noise, if (axes, octaves) look like it."""
    rest = levels[1:] if len(levels) > 1 else levels
    fine, coarse = np.sqrt((rest[:, :2] ** 2).mean(0))
    # Texture is in luma first, and no camera leaves the fine octave of chroma as it was.
    if coarse > _WHITE * fine or not fine / _WHITE <= levels[0, 0] <= 2.5 * fine:
        return None
    return float(min(fine, np.sqrt((levels[:, 0] ** 2).mean())))


def _colourful(levels: Array) -> float:
    """How much of a confidence the colour of (axes, octaves) leaves, 0 to 1.

    A sensor's pixels see one colour each, so its noise has colour; whatever smooths chroma
    afterwards leaves that of four pixels and more. Grass and gravel are all luma, and where that
    would be strong noise, which nothing else tells from them, colour decides. Constants as in
    `_confidence`.
    """
    if len(levels) == 1:
        return 1.0
    chroma = float(np.sqrt((levels[1:, 2] ** 2).mean()))
    strong = np.clip((PEAK * levels[0, 1] - 8) / 6, 0, 1)
    colour = np.clip((chroma / max(float(levels[0, 2]), 1e-9) - 0.2) / 0.2, 0, 1)
    return float(1 - strong * (1 - colour))


def _confidence(
    texture: Sequence[tuple[float, float]], luma: Array, emptied: float
) -> tuple[float, float]:
    """How sure it is, 0 to 1, that luma's octaves hold noise and not texture; and by what factor
    the second may exceed the first.

    texture: by octave, what of `_Octave.slopes` and how far, as standard deviation of a
    logarithm, its tones lie off the curve. emptied: see `_emptied`. Constants were chosen on
    simulated photographs.
    """

    def ramp(value: float, good: float, bad: float) -> float:
        return float(np.clip((bad - value) / (bad - good), 0, 1))

    def noise(octave: tuple[float, float], good: float, bad: float) -> float:
        return ramp(octave[0], good, bad) * ramp(octave[1], 0.2, 0.5)

    fine = noise(texture[0], 1.1, 1.45)
    if len(texture) < 3:
        return fine, 1.0
    coarse = noise(texture[1], 1.2, 1.6)
    # Texture would be twice as strong, and more, in the third octave as in the second.
    grain = ramp(luma[2] / max(luma[1], 1e-9), 1.8, 2.3)
    sure = noise(texture[1], 1.05, 1.2) * grain
    # Where JPEG has emptied the first, unevenly, the second is the better witness.
    coded = ramp(emptied, 0.3, 0.1)
    confidence = max(fine, sure, coded * noise(texture[1], 1.1, 1.45))
    growth = max(0.8, 0.8 * coarse, 3 * sure) * grain
    return confidence, 1 + max(growth, 2 * coded)


def _lower_curve(sets: Sequence[tuple[Array, Array]]) -> tuple[Array, Array, Array, Array]:
    """Logarithms of variances of several (tones, values), each of its own height above one
    smooth curve, along their lower edge: its tones, the heights, the curve as relative level,
    and how far each set lies off it, as standard deviation of the logarithm of level."""
    every = np.concatenate([tones for tones, _ in sets])
    start, end = every.min(), max(every.max(), every.min() + 0.01)
    nodes, count = _NODES, len(sets)
    tones_of_nodes = np.linspace(start, end, nodes)
    rows, values = [], []
    for i, (tones, logs) in enumerate(sets):
        place = (tones - start) / (end - start) * (nodes - 1)
        left = np.minimum(place.astype(int), nodes - 2)
        row = np.zeros((len(tones), count + nodes))
        row[:, i] = 1
        at = np.arange(len(tones))
        row[at, count + left] = 1 - (place - left)
        row[at, count + left + 1] = place - left
        rows.append(row)
        values.append(logs)
    a, b = np.concatenate(rows), np.concatenate(values)
    smooth = np.zeros((2 * nodes - 2, count + nodes))
    # As stiff per tone whatever the span: integrals of squares of the two derivatives.
    level, straight = (end - start) ** -0.5, 2 * (end - start) ** -1.5
    for k in range(nodes - 1):
        smooth[k, count + k : count + k + 2] = level, -level
    for k in range(nodes - 2):
        smooth[nodes - 1 + k, count + k : count + k + 3] = straight, -2 * straight, straight
    smooth[-1, count:] = 0.1  # heights and curve share a constant
    penalty = 0.3 * smooth.T @ smooth
    weights = np.ones(len(b))
    for _ in range(30):
        solution = np.linalg.solve(a.T @ (a * weights[:, None]) + penalty, a.T @ (weights * b))
        residual = b - a @ solution
        weights = np.where(residual > _CHANCE, _TEXTURE, 1.0)
    heights, curve = solution[:count], solution[count:]
    mean = np.log(np.mean(np.exp(np.interp(every, tones_of_nodes, curve))))
    above = np.array([(v - r @ solution).std() / 2 for r, v in zip(rows, values, strict=True)])
    return tones_of_nodes, heights + mean, np.exp((curve - mean) / 2), above
