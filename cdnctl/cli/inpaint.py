"""cdnctl inpaint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import start_torch
from cdnctl.cli.many import Files
from cdnctl.cli.options import (
    Device,
    DryRun,
    Inputs,
    Json,
    MaxMegapixels,
    Memory,
    ModelOption,
    Output,
    Overwrite,
    Quiet,
    RangeOption,
    Recursive,
    Resume,
    SkipExisting,
    StripMetadata,
    Threads,
    Tile,
    WithClasses,
    pixel_limit,
)
from cdnctl.cli.repair import (
    NoiseOption,
    OneClass,
    Samples,
    Seed,
    Sheet,
    Spread,
    Steps,
    repair_files,
    settings_of,
)
from cdnctl.cli.storing import Storing, with_storing
from cdnctl.errors import ImageError, UsageError

if TYPE_CHECKING:
    import numpy as np


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(inpaint)


@with_storing
def inpaint(
    storing: Storing,
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            help="A picture of the same size, white where something is missing; or alpha: what "
            "is wholly transparent is.",
        ),
    ],
    inputs: Inputs = None,
    output_name: Output = None,
    noise: NoiseOption = 0.0,
    steps: Steps = None,
    samples: Samples = None,
    sheet: Sheet = None,
    uncertainty: Spread = None,
    seed: Seed = 0,
    target: OneClass = "none",
    model: ModelOption = "auto",
    recursive: Recursive = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    skip_existing: SkipExisting = False,
    strip_metadata: StripMetadata = False,
    dry_run: DryRun = False,
    tile: Tile = None,
    memory: Memory = None,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fill holes in pictures. What is not in a hole stays as it is.

    Without --samples the result is the same every time; the originals are never touched.
    """
    files = Files(
        inputs,
        output_name,
        recursive,
        overwrite,
        resume,
        skip_existing,
        strip_metadata,
        dry_run,
        pixel_limit(max_megapixels),
        storing,
    )
    torch_device = start_torch(device, threads)
    from cdnctl.restore import Inpaint

    settings = settings_of(noise, steps, samples, seed, target, tile, memory, scale, files)
    operation = Inpaint(settings, None if mask == "alpha" else _hole(Path(mask)))
    repair_files(files, operation, model, torch_device, sheet, uncertainty, as_json, quiet)


def _hole(path: Path) -> np.ndarray:
    """Where a mask is white, boolean (H, W)."""
    from cdnctl import images

    try:
        picture = images.read(path)
    except ImageError as error:
        raise UsageError(f"--mask: {error}") from None
    white: np.ndarray = picture.pixels.mean(-1) > 0.5
    if not white.any():
        raise UsageError(f"--mask {str(path)!r} has no white pixel: there is nothing to fill")
    if white.all():
        raise UsageError(f"--mask {str(path)!r} is all white: leave something to fill it from")
    return white
