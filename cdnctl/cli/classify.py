"""cdnctl classify: what pictures show, as probabilities of classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import start_torch
from cdnctl.cli.each import look_at_each
from cdnctl.cli.options import (
    Device,
    Json,
    MaxMegapixels,
    ModelOption,
    Quiet,
    RangeOption,
    Recursive,
    SigmaOption,
    Threads,
    parse_sigma,
)
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.images import Image


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(classify)


def classify(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    sigma: SigmaOption = "auto",
    model: ModelOption = "auto",
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to show.")] = 1,
    recursive: Recursive = False,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what pictures show, noisy or not: p(class | picture).

    Pictures larger than those that the model was trained on are shrunk to their size.
    """
    level = parse_sigma(sigma)
    torch_device = start_torch(device, threads)
    from cdnctl.restore import classify
    from cdnctl.selection import Models

    models = Models(model, torch_device)

    def look(image: Image) -> tuple[dict[str, Any], str]:
        chosen = models.pick(*image.samples.shape[:2])
        found = classify(image, chosen, level)
        best = dict(list(found.posterior.items())[:top])
        record = {
            "model": chosen.name,
            "sigma": round(found.sigma * PEAK, 3),
            "scale": round(1 / found.factor, 4),
            "size": [found.size[1], found.size[0]],
            "classes": {k: round(v, 6) for k, v in best.items()},
        }
        listed = "  ".join(f"{name} {p:.1%}" for name, p in best.items())
        return record, f"{listed}{seen_at(found.size, found.factor)}"

    look_at_each(
        inputs,
        look,
        recursive=recursive,
        max_megapixels=max_megapixels,
        scale=scale,
        as_json=as_json,
        quiet=quiet,
    )


def seen_at(size: tuple[int, int], factor: float) -> str:
    """At which size (height, width) a picture was looked at, if not its own."""
    return f", seen at {size[1]} x {size[0]} pixels (1/{factor:.3g})" if factor > 1 else ""
