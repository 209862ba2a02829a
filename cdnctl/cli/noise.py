"""cdnctl noise: what noise pictures hold."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.each import look_at_each
from cdnctl.cli.options import Json, MaxMegapixels, Quiet, RangeOption, Recursive
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.images import Image


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(noise)


def noise(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    recursive: Recursive = False,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what noise pictures hold: how strong by tone, colour and scale.

    It is what denoise goes by where no --sigma is given; nothing is written.
    """
    from cdnctl.restore import noise_level

    def look(image: Image) -> tuple[dict[str, Any], str]:
        level = noise_level(image)
        told = round(PEAK * level.sigma, 3)
        record: dict[str, Any] = {"sigma": told}
        words = "too small to tell more"
        if level.noise is not None:
            found = level.noise
            record |= asdict(found) | {"grain": found.grain, "chroma": found.chroma}
            words = found.summary()
        return record, f"{words}; denoise goes by sigma {told:.1f}"

    look_at_each(
        inputs,
        look,
        recursive=recursive,
        max_megapixels=max_megapixels,
        scale=scale,
        as_json=as_json,
        quiet=quiet,
    )
