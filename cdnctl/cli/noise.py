"""cdnctl noise: what noise pictures hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import keep_existing, save, shown
from cdnctl.cli.each import look_at_each
from cdnctl.cli.options import Json, MaxMegapixels, Quiet, RangeOption, Recursive
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.images import Image
    from cdnctl.restore import Noise


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(noise)


def noise(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    recursive: Recursive = False,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    save_as: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE.json",
            help="Write the noise that the pictures have in common: for denoise --noise FILE.json.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --save if it exists.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what noise pictures hold: how strong by tone, colour and scale.

    It is what denoise goes by where no --sigma is given; nothing is written but with --save.
    """
    from cdnctl.restore import noise_level

    if save_as is not None:
        keep_existing(save_as, overwrite)
    all_found: list[Noise] = []

    def finish() -> None:
        if save_as is not None:
            _save_profile(all_found, save_as, overwrite, as_json, quiet)

    def look(image: Image) -> tuple[dict[str, Any], str]:
        level = noise_level(image)
        noise = level.noise
        by_camera = noise is not None and noise.by_camera  # then it is for the model of cameras
        told = round(PEAK * (noise.heard if by_camera and noise else level.sigma), 3)
        record: dict[str, Any] = {"sigma": told}
        words = "too small to tell more"
        if level.noise is not None:
            found = level.noise
            record |= found.record()
            all_found.append(found)
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
        finish=finish,
    )


def _save_profile(
    found: Sequence[Noise], path: Path, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write what the noise of pictures has in common, and say of how many."""
    from cdnctl.restore.profiles import profile

    made = profile(found)
    record = made.noise.record() | {"pictures": made.pictures}
    save(path, json.dumps(record).encode() + b"\n", overwrite)
    if as_json:
        print(json.dumps({"profile": str(path)} | record), flush=True)
    elif not quiet:
        count = f"{made.pictures} of {len(found)} pictures"
        print(f"{shown(path)}: profile of {count}, {made.noise.summary()}", flush=True)
