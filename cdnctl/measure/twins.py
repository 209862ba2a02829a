"""Models drawn from the covariances of another one's weights, as files: what is left of a model
then is what the covariances know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdnctl.analysis.blocks import resample_blocks
from cdnctl.analysis.rainbow import Resampled, resample, white
from cdnctl.api import Model, load
from cdnctl.cards import card
from cdnctl.checkpoints import save_model
from cdnctl.core.noise import sample_sigma
from cdnctl.errors import UsageError
from cdnctl.files import write_atomically
from cdnctl.models.trunk import TrunkNetwork
from cdnctl.training.datasets import Pictures, find_pictures
from cdnctl.version import VERSION

CONTROLS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "white": {"draw": white},
    "unaligned": {"aligned": False},
}
"""What is left out of the drawing, and how `resample` is told."""

BATCH = 64  # pictures
HIGH = 0.4  # of the noise that frames are taken under: few pictures have more


def look(
    roots: Sequence[Path], model: Model, count: int, generator: torch.Generator
) -> list[Tensor]:
    """Clean crops of at most so many pictures of datasets, as large as those of the training:
    (B, C, side, side) in [0, 1] each."""
    sources = [source for root in roots for source in find_pictures(root)]
    if len(sources) > count:
        sources = [sources[i * len(sources) // count] for i in range(count)]
    classes = sorted({str(s.label) for s in sources if s.label is not None})
    pictures = Pictures.load(sources, classes, torch.device("cpu"), model.needs.channels)
    side = model.header.patch
    room = (pictures.sizes - side + 1).clamp_min(1)  # smaller pictures go on beyond their edges
    places = (torch.rand(room.shape, generator=generator) * room).long()
    which = torch.arange(len(pictures))
    return [
        pictures.crops(rows, places[rows, 0], places[rows, 1], torch.zeros_like(rows), side)
        for rows in which.split(BATCH)
    ]


def draw_twin(
    model: Model, crops: Sequence[Tensor], generator: torch.Generator, control: str
) -> Resampled:
    """A network drawn from the covariances of a model's weights; ``crops`` give its frames.

    control: one of ``CONTROLS``. UsageError for a network that cannot be drawn.
    """
    options = CONTROLS[control]
    try:
        if not isinstance(model.module, TrunkNetwork):
            return resample(model.module, crops, generator, **options)
        low, high = model.sigma_range
        noisy = []
        for x in crops:
            sigma = sample_sigma(len(x), low, max(low, min(high, HIGH)), 1.0, generator)
            noise = torch.randn(x.shape, generator=generator)
            noisy.append((x + sigma.view(-1, 1, 1, 1) * noise, sigma))
        return resample_blocks(model.module, noisy, generator, **options)
    except ValueError as error:
        raise UsageError(
            f"model {model.name!r} ({model.header.arch}) cannot be drawn anew: {error}"
        ) from None


def write_twin(
    source: str | Path,
    target: Path,
    roots: Sequence[Path],
    seed: int = 0,
    count: int = 1024,
    control: str = "none",
) -> tuple[float, ...]:
    """Draw a twin of a model, and write its weights and their card, without scores.

    roots: pictures that the model was trained on, of which it looks at ``count``. The shares of
    energy that alignment explains, layer by layer. Errors as in `load`, `find_pictures` and
    `draw_twin`.
    """
    model = load(source)
    generator = torch.Generator().manual_seed(seed)
    twin = draw_twin(model, look(roots, model, count, generator), generator, control)
    name = f"{model.name}-drawn-{seed}" + (f"-{control}" if control != "none" else "")
    drawn = {"weights": model.hash, "seed": seed, "control": control, "pictures": count}
    header = replace(
        model.header,
        name=name,
        scores={},
        version=VERSION,
        training={**model.header.training, "drawn": drawn},
    )
    save_model(target, twin.network.state_dict(), header)
    write_atomically(target.with_suffix(".md"), card(target).encode())
    return twin.explained
