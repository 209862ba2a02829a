"""Parts of a picture by which settings are judged, and what the settings make of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cdnctl import images
from cdnctl.api import Model
from cdnctl.images import Image
from cdnctl.restore import tiles
from cdnctl.restore.denoise import Restored, blend, check, restore
from cdnctl.restore.levels import Level
from cdnctl.restore.samples import is_bilevel
from cdnctl.restore.settings import Settings
from cdnctl.restore.view import View, memory_errors

CROP = 256  # pixels
_BLOCK = 8  # pixels of which tones and texture are taken
_CLIPPED = 0.1  # share of blacks and whites from which shadows and lights show nothing


def telling_places(samples: np.ndarray, side: int = CROP) -> dict[str, tiles.Box]:
    """Squares of a picture (H, W, C) with samples on the scale of [0, 1] or whole numbers, by
    what they show: its shadows, its lights, its texture; fewer where they would overlap, and the
    whole of a picture that is no larger."""
    height, width = samples.shape[:2]
    h, w = min(side, height), min(side, width)
    if (h, w) == (height, width):
        return {"the picture": (slice(0, height), slice(0, width))}
    places = [
        (slice(row, row + h), slice(column, column + w))
        for row in _starts(height, h)
        for column in _starts(width, w)
    ]
    tone, clipped, texture = np.array([_shown(samples[place]) for place in places]).T
    open_ = clipped <= max(_CLIPPED, clipped.min())
    order = {
        "shadows": np.argsort(np.where(open_, tone, np.inf), kind="stable"),
        "lights": np.argsort(np.where(open_, -tone, np.inf), kind="stable"),
        "texture": np.argsort(-texture, kind="stable"),
    }
    found: dict[str, tiles.Box] = {}
    for name, best in order.items():
        for i in best:
            if not any(overlap(places[i], other) for other in found.values()):
                found[name] = places[i]
                break
    return found


def _starts(size: int, length: int) -> list[int]:
    """Where windows along an axis begin, at half their length from each other: 24 at most."""
    count = min(24, -(-2 * (size - length) // length) + 1)
    return np.linspace(0, size - length, count).astype(int).tolist()


def _shown(samples: np.ndarray) -> tuple[float, float, float]:
    """Mean tone of a window, its share of clipped blocks, and how much the others vary."""
    luma = images.to_unit(samples).mean(2)
    h, w = (max(1, n // _BLOCK) for n in luma.shape)
    rows, columns = (min(_BLOCK, n) for n in luma.shape)
    blocks = luma[: h * rows, : w * columns].reshape(h, rows, w, columns)
    means, spread = blocks.mean((1, 3)), blocks.std((1, 3))
    end = 1 / images.PEAK
    return (
        float(means.mean()),
        float(((means < end) | (means > 1 - end)).mean()),
        float(np.median(spread)),
    )


def overlap(one: tiles.Box, other: tiles.Box) -> bool:
    """Whether two places have pixels in common."""
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


@torch.no_grad()
def restored_at(
    image: Image, model: Model, settings: Settings, level: Level, places: Sequence[tiles.Box]
) -> list[np.ndarray]:
    """Places of what `restore` makes of a picture, to the tolerance of tiles, without the work
    for all of it, where the model can see a part without the rest."""
    check(model, settings, [image])
    needs = model.needs
    apart = needs.margin is not None and not needs.posterior and settings.target is None
    if not apart or is_bilevel(image.samples):
        result: Restored = restore(image, model, settings, level=level)
        return [result.image.samples[place] for place in places]
    side = max(part.stop - part.start for place in places for part in place)
    tile = settings.tile or side + 2 * (needs.margin or 0)
    view = View(model, image.samples, level, tile)
    view.tiles = [t for t in view.tiles if any(overlap(t.place, place) for place in places)]
    with memory_errors(view):
        samples = blend(image, view, settings)
    return [samples[place] for place in places]
