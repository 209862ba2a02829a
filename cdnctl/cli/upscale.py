"""cdnctl upscale."""

from __future__ import annotations

from typing import Annotated

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


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(upscale)


@with_storing
def upscale(
    storing: Storing,
    inputs: Inputs = None,
    factor: Annotated[int, typer.Option("--factor", help="2, 3 or 4.")] = 2,
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
    """Make pictures larger: pictures whose means over squares are the given pixels.

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
    from cdnctl.restore import Upscale

    settings = settings_of(noise, steps, samples, seed, target, tile, memory, scale, files)
    operation = Upscale(settings, factor)
    repair_files(files, operation, model, torch_device, sheet, uncertainty, as_json, quiet)
