"""cdnctl denoise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import NUMBERS, save_numbers, start_torch
from cdnctl.cli.many import Beside, Files, restore_files
from cdnctl.cli.options import (
    ClassOption,
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
    SigmaOption,
    SkipExisting,
    StripMetadata,
    Threads,
    Tile,
    WithClasses,
    class_names,
    parse_class,
    parse_range,
    parse_sigma,
    parse_size,
    pixel_limit,
)
from cdnctl.cli.printer import DenoisePrinter, JpegPrinter
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Deblocked, Restored, Settings
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.plan import Job


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(denoise)


def denoise(
    inputs: Inputs,
    output_name: Output = None,
    sigma: SigmaOption = "auto",
    target: ClassOption = "none",
    model: ModelOption = "auto",
    strength: Annotated[
        float, typer.Option("--strength", help="0: the input, 1: fully denoised.")
    ] = 1.0,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", help="Weight g of --class: D + g (D_c - D).", show_default="1.0"
        ),
    ] = None,
    uncertainty: Annotated[
        Path | None,
        typer.Option(
            "--uncertainty",
            help="Write the posterior standard deviation of every pixel: a picture with its "
            "scale (.png), or the bare numbers in pixel units of 0..1 (.tif, .npy).",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", help="Write the picture before and after in one picture."),
    ] = None,
    jpeg: Annotated[
        bool,
        typer.Option(
            "--jpeg",
            help="Remove the blocks of JPEG files: never to what the file could not be made of.",
        ),
    ] = False,
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
    """Remove noise from pictures. The originals are never touched."""
    level = parse_sigma(sigma)
    wanted = parse_class(target)
    if guidance is not None and wanted is None:
        raise UsageError(
            f"--guidance {guidance:g} weighs what a class changes, but none is told: "
            "give --class as well"
        )
    if jpeg:
        unsuited = {
            "--strength": strength != 1,
            "--guidance": guidance is not None,
            "--uncertainty": uncertainty is not None,
            "--range": scale is not None,
            "--class auto": isinstance(wanted, str),
        }
        for option in (o for o, is_given in unsuited.items() if is_given):
            raise UsageError(f"{option} does not go with --jpeg: leave one of them out")
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
    )
    budget = None if memory is None else parse_size(memory)
    torch_device = start_torch(device, threads)

    from cdnctl.images import WRITE_SUFFIXES
    from cdnctl.restore import Deblock, Denoise, Settings
    from cdnctl.selection import Models

    settings = Settings(
        level,
        wanted,
        strength,
        1.0 if guidance is None else guidance,
        tile,
        budget,
        parse_range(scale),
    )
    models = Models(model, torch_device, class_names(wanted))
    if jpeg:
        compared: Beside[Deblocked] = Beside(
            "--compare",
            compare,
            WRITE_SUFFIXES,
            lambda job, path, batch, _: _write_comparison(job, path, batch, None),
        )
        operation = Deblock(level, wanted if isinstance(wanted, dict) else None, tile, budget)
        restore_files(files, operation, models, JpegPrinter(as_json, quiet), [compared])
        return
    printer = DenoisePrinter(settings, as_json, quiet)

    def write_uncertainty(job: Job, path: Path, batch: Batch[Restored], result: Restored) -> None:
        _write_uncertainty(job, path, batch, settings, printer)

    def write_comparison(job: Job, path: Path, batch: Batch[Restored], result: Restored) -> None:
        _write_comparison(job, path, batch, settings.range)

    beside = [
        Beside("--uncertainty", uncertainty, NUMBERS | {".png"}, write_uncertainty),
        Beside("--compare", compare, WRITE_SUFFIXES, write_comparison),
    ]
    restore_files(files, Denoise(settings), models, printer, beside)


def _write_uncertainty(
    job: Job, path: Path, batch: Batch[Restored], settings: Settings, printer: DenoisePrinter
) -> None:
    from cdnctl import images
    from cdnctl.analysis.uncertainty import drawn, posterior_std
    from cdnctl.restore import on_unit_scale

    image = images.read(job.source, batch.max_pixels)
    image = on_unit_scale(image, settings.range, str(job.source))
    model = batch.models.pick(*image.samples.shape[:2])
    with progress(1, printer.quiet, printer.as_json):
        std, sigma = posterior_std(image, model, settings)
    if path.suffix.lower() in NUMBERS:
        save_numbers(std[..., 0], path, batch.overwrite)
    else:
        images.write(drawn(std[..., 0], sigma), path, overwrite=batch.overwrite)


def _write_comparison(
    job: Job, path: Path, batch: Batch[Any], scale: tuple[float, float] | None
) -> None:
    """The input beside the output, both as they are in their files."""
    from cdnctl import images
    from cdnctl.figures import before_and_after
    from cdnctl.restore import on_unit_scale

    before, after = (
        on_unit_scale(images.read(p, batch.max_pixels), scale, str(p))
        for p in (job.source, job.output)
    )
    images.write(before_and_after(before, after), path, overwrite=batch.overwrite)
