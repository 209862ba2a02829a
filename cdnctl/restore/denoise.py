"""Denoising pictures: one Image to another, in tiles if it is large, together if it is small."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.joint import HasPosterior
from cdnctl.core.noise import ends, unclipped
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.restore import tiles
from cdnctl.restore.classes import (
    choose_class,
    class_change,
    class_mixture,
    class_shift,
    ranked,
    rms,
    weighed,
)
from cdnctl.restore.levels import Level, noise_level
from cdnctl.restore.noise import Noise
from cdnctl.restore.operation import Result
from cdnctl.restore.samples import (
    black_and_white,
    finer,
    is_bilevel,
    on_own_scale,
    on_unit_scale,
    sample_step,
)
from cdnctl.restore.settings import Settings
from cdnctl.restore.stack import Stack, batch_size
from cdnctl.restore.view import View, in_tiles_that_fit, memory_errors

END_WINDOW = 9  # pixels, see `core.noise.ends`
TOLD = 0.001  # share of a picture from which it is said that the model was held back
# Side of the tile that stands for a large picture when what the class changes is measured:
# half a second at most, where a second pass over all of it would nearly double the time.
CLASS_TILE = 512


@dataclass(frozen=True)
class Restored(Result):
    """A restored picture and what was found on the way."""

    sigma: float  # noise level used, in [0, 1] pixel units
    told: float  # what the network was told: more than sigma for gray pictures
    posterior: Mapping[str, float]  # p(c | picture), most probable class first
    held: float = 0.0  # share of the pixels where the model was held back, see core.guard
    class_change: float | None = None  # see the function of that name; None: no class was told
    noise: Noise | None = None  # what was measured; None: the level was told, or too little to tell

    def __repr__(self) -> str:
        best = [f"{name} {p:.1%}" for name, p in list(self.posterior.items())[:1]]
        return f"Restored({', '.join([repr(self.image), f'sigma {self.sigma:.4g}', *best])})"


def measured(image: Image, settings: Settings) -> Level:
    """The noise of a picture, as far as the settings do not tell it."""
    return noise_level(image, sigma=settings.sigma, kind=settings.noise)


def by_camera(level: Level, settings: Settings) -> bool:
    """Whether a picture is for a model of the noise of cameras, which knows no classes."""
    return settings.target is None and level.noise is not None and level.noise.by_camera


def _left_alone(image: Image, model: Model) -> Restored:
    note = "every sample is black or white: left as it is"
    return Restored(replace(image, notes=(*image.notes, note)), model, 0.0, 0.0, {})


@torch.no_grad()
def restore(
    image: Image,
    model: Model,
    settings: Settings,
    watch: Callable[[float], None] = lambda share: None,
    level: Level | None = None,
) -> Restored:
    """Denoise one picture. Size, depth, alpha and metadata are those of ``image`` (with
    ``settings.finer`` 8 bits become 16).

    level: of its noise, if it was measured before. watch: told the share of the work that is
    done, now and then. ImageError if memory does not suffice; without a ``settings.tile``
    smaller tiles are tried first.
    """
    check(model, settings, [image])
    if batch_size(*image.samples.shape[:2]) > 1:
        return restore_batch([image], model, settings, None if level is None else [level])[0]
    if is_bilevel(image.samples):
        return _left_alone(image, model)
    level = level or measured(image, settings)

    def blended(view: View) -> tuple[Settings, Tensor | None, np.ndarray]:
        chosen, scores = choose_class(view, settings)
        return chosen, scores, blend(image, view, chosen)

    view = View(model, image.samples, level, settings.tile, memory=settings.memory, watch=watch)
    view, (chosen, scores, samples) = in_tiles_that_fit(view, blended)
    held, change = view.held, None
    found = ranked(model, view.logits() if scores is None else scores)
    if settings.target is not None:
        logits = view.logits()
        if view.area > CLASS_TILE**2:
            view = View(model, image.samples, level, CLASS_TILE, logits=logits)
        with memory_errors(view):
            change = class_change(view, logits, chosen)
    result = _noted(
        _like(image, settings).with_samples(samples), level, held, settings.sigma is not None
    )
    return Restored(result, model, view.sigma, view.told, found, held, change, level.noise)


def _noted(image: Image, level: Level, held: float, told: bool) -> Image:
    """A restored picture with remarks on what should not go unsaid. told: of its sigma."""
    notes = []
    if held > TOLD:
        share = f"{held:.0%}" if held >= 0.01 else "less than 1%"
        why = "sigma may be too low, or " if told else ""
        notes.append(
            f"held back on {share} of the picture, where the model would change more than such "
            f"noise can: {why}it does not know such pictures"
        )
    if level.doubt:
        notes.append(level.doubt)
    noise = level.noise
    if noise is not None and noise.confidence < 0.5 and noise.told > 1 / images.PEAK:
        notes.append("unsure what is noise and what texture: give --sigma to take out more")
    return replace(image, notes=(*image.notes, *notes)) if notes else image


def blend(image: Image, view: View, settings: Settings) -> np.ndarray:
    """Samples of the restored picture."""
    choose = partial(class_mixture, view.model, settings) if settings.target else None
    places, _ = view.stream(choose)
    result = np.empty(image.samples.shape, _dtype(image.samples, settings))
    for place, correction in places:
        result[place] = _step(image.samples, place, correction, view.sigma, settings)
    return result


def moved(
    samples: np.ndarray,
    place: tiles.Box,
    correction: np.ndarray,
    sigma: float,
    strengths: tuple[float, float] = (1.0, 1.0),
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """A place of samples (H, W, C) of any dtype, moved along its correction (h, w, C) as far as
    ``strengths`` say for luma and for chroma, see `core.coloured.AXES`; gray has luma alone.
    weights: of each pixel, (h, w). float32 in [0, 1] pixel units, not clipped.

    Whole numbers hold clipped noise, whose effect on blacks and whites is undone.
    """
    if not np.isfinite(correction).all():
        raise ImageError("the network gave numbers that are not finite; check --sigma and --model")
    y = images.to_unit(samples[place])
    x = y + correction
    if samples.dtype.kind == "u" and sigma > 0:
        # A place of a picture is treated as the picture is: its surroundings are looked at.
        around, inside = _with_halo(place, samples.shape[:2])
        low, high = ends(images.to_unit(samples[around]), END_WINDOW)
        step = sample_step(samples.dtype)
        # What was held back altogether is no mean of anything.
        changed = (correction != 0).any(-1, keepdims=True)
        x = np.where(changed, unclipped(x, sigma, (low[inside], high[inside]), step), y)
    luma, chroma = (np.float32(part) for part in strengths)
    change = x - y if weights is None else weights[..., None] * (x - y)
    if luma == chroma or change.shape[-1] == 1:
        return y + luma * change
    # The mean over channels is what lies on the axis of luma; both axes of chroma hold the rest.
    return y + (chroma * change + (luma - chroma) * change.mean(-1, keepdims=True))


def _step(
    samples: np.ndarray,
    place: tiles.Box,
    correction: np.ndarray,
    sigma: float,
    settings: Settings,
) -> np.ndarray:
    """What `moved` gives, in the dtype of the results."""
    dtype = _dtype(samples, settings)
    unmoved = samples[place] if dtype == samples.dtype else samples[place].astype(dtype) * 257
    if not any(settings.strengths):
        return unmoved
    weights = None if settings.mask is None else settings.mask.weights[place]
    values = moved(samples, place, correction, sigma, settings.strengths, weights)
    result = images.from_unit(values, dtype)
    if weights is None:
        return result
    # Numbers of 32 bits and more would not come back as they were.
    return np.where(weights[..., None] == 0, unmoved, result)


def _dtype(samples: np.ndarray, settings: Settings) -> np.dtype[Any]:
    """Of the results for pictures with such samples."""
    return np.dtype(np.uint16) if settings.finer and samples.dtype == np.uint8 else samples.dtype


def _like(image: Image, settings: Settings) -> Image:
    """The picture in the dtype of the results."""
    return finer(image) if settings.finer else image


def whole_place(samples: np.ndarray) -> tiles.Box:
    """The place that is the whole of (H, W, C)."""
    return slice(0, samples.shape[0]), slice(0, samples.shape[1])


def _with_halo(place: tiles.Box, size: tuple[int, ...]) -> tuple[tiles.Box, tiles.Box]:
    """A place extended by the window of `ends`, and the place relative to that."""
    halo = END_WINDOW // 2
    around, inside = [], []
    for part, length in zip(place, size, strict=True):
        start, stop = max(0, part.start - halo), min(length, part.stop + halo)
        around.append(slice(start, stop))
        inside.append(slice(part.start - start, part.stop - start))
    return (around[0], around[1]), (inside[0], inside[1])


def check(model: Model, settings: Settings, pictures: Sequence[Image]) -> None:
    """UsageError for what the model cannot do, ImageError if pictures do not fit the mask."""
    model.corrector()
    if settings.target is not None and not isinstance(model.module, HasPosterior):
        raise UsageError(
            f"model {model.name!r} ({model.header.arch}) knows no classes: leave --class out"
        )
    if settings.mask is not None:
        for picture in pictures:
            settings.mask.check(picture.samples)


@torch.no_grad()
def restore_batch(
    pictures: Sequence[Image],
    model: Model,
    settings: Settings,
    levels: Sequence[Level] | None = None,
) -> list[Restored]:
    """Denoise small pictures of one shape (H, W, C) together; each as `restore` does.

    At most `batch_size` of them. levels: of their noise, if it was measured before.
    """
    check(model, settings, pictures)
    levels = levels or [measured(picture, settings) for picture in pictures]
    views = [View(model, p.samples, level) for p, level in zip(pictures, levels, strict=True)]
    stack = Stack(views)
    changes: list[float | None] = [None] * len(views)
    with memory_errors(stack.first):
        choices = [choose_class(view, settings) for view in views]

        def of_each(
            function: Callable[[Model, Settings, Tensor], Tensor], logits: Tensor
        ) -> Tensor:
            rows = zip(choices, logits, strict=True)
            return torch.stack([function(model, chosen, row) for (chosen, _), row in rows])

        steps = stack.solve(partial(of_each, class_mixture) if settings.target else None)
        if settings.target is not None:
            shifts = of_each(class_shift, stack.logits)
            changes = [rms(weighed(part, settings)) for part in stack.corrections(shifts)]
    everything = whole_place(views[0].pixels)
    results = []
    for i, (picture, view) in enumerate(zip(pictures, views, strict=True)):
        if is_bilevel(picture.samples):
            results.append(_left_alone(picture, model))
            continue
        samples = _step(picture.samples, everything, steps[i], view.sigma, settings)
        image = _like(picture, settings).with_samples(samples)
        image = _noted(image, view.level, view.held, settings.sigma is not None)
        scores = choices[i][1]
        found = ranked(model, stack.logits[i] if scores is None else scores)
        told, noise = view.told, view.level.noise
        found_in = Restored(image, model, view.sigma, told, found, view.held, changes[i], noise)
        results.append(found_in)
    return results


@dataclass(frozen=True)
class Ready:
    """A picture on the scale of [0, 1] and its noise."""

    image: Image
    level: Level
    ends: tuple[float, float] | None  # see `black_and_white`
    dtype: np.dtype[Any]  # that it came with


@dataclass(frozen=True)
class Denoise:
    """Denoising as an `Operation` on many files."""

    settings: Settings
    name: ClassVar[str] = "denoise"

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Operation`; the noise level is on the scale of 0..255, as people tell it."""
        mask = self.settings.mask
        values = asdict(replace(self.settings, mask=None))
        del values["memory"], values["finer"]  # the latter: see `Writing.parameters`
        values["mask"] = None if mask is None else mask.digest
        if self.settings.sigma is not None:
            values["sigma"] = round(images.PEAK * self.settings.sigma, 6)
        parameters: dict[str, Any] = json.loads(json.dumps(values))
        return parameters

    def prepare(self, image: Image, name: str, data: bytes) -> Ready:
        """The picture with its noise measured."""
        ends, dtype = black_and_white(image, self.settings.range, name), image.dtype
        image = on_unit_scale(image, ends, name)
        try:
            return Ready(image, measured(image, self.settings), ends, dtype)
        except ImageError as error:
            raise ImageError(f"{name!r}: {error}") from None

    def by_camera(self, ready: Ready) -> bool:
        """Where such noise was measured."""
        return by_camera(ready.level, self.settings)

    def together(self, height: int, width: int) -> int:
        """As many as fill up a batch."""
        return batch_size(height, width)

    def run(
        self, ready: Sequence[Ready], model: Model, watch: Callable[[float], None]
    ) -> list[Restored]:
        """Pictures of one shape, denoised, on the scale that they came with."""
        if len(ready) > 1:
            pictures, levels = [one.image for one in ready], [one.level for one in ready]
            found = restore_batch(pictures, model, self.settings, levels)
        else:
            found = [restore(ready[0].image, model, self.settings, watch, ready[0].level)]
        return [
            replace(result, image=on_own_scale(result.image, one.ends, one.dtype), ends=one.ends)
            for one, result in zip(ready, found, strict=True)
        ]

    def record(self, result: Restored) -> dict[str, Any]:
        """What was found; the noise level is on the scale of 0..255."""
        target = self.settings.target
        return {
            "sigma": round(images.PEAK * result.sigma, 3),
            "class_asked": "none" if target is None else target,
            "most_probable_class": next(iter(result.posterior), None),
            "held": round(result.held, 6),
            "noise": None if result.noise is None else result.noise.record(),
        }
