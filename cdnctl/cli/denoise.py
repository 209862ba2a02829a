"""cdnctl denoise: one picture, a folder or a pipe, with or without a class."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.beside import check_sheet, write_comparison, write_sheet, write_uncertainty
from cdnctl.cli.common import NUMBERS, start_torch
from cdnctl.cli.many import Beside, Files, restore_files
from cdnctl.cli.options import (
    ClassOption,
    Device,
    DryRun,
    EnsembleOption,
    Inputs,
    Json,
    MaskOption,
    MaxMegapixels,
    Memory,
    ModelOption,
    NoiseOption,
    Output,
    Overwrite,
    PagesOption,
    Quiet,
    RangeOption,
    Recursive,
    Resume,
    SheetOption,
    SigmaOption,
    SkipExisting,
    StrengthOption,
    StripMetadata,
    Threads,
    Tile,
    WithClasses,
    class_names,
    parse_class,
    parse_pages,
    parse_range,
    parse_sigmas,
    parse_size,
    parse_strength,
    pixel_limit,
)
from cdnctl.cli.printer import DenoisePrinter, JpegPrinter
from cdnctl.cli.storing import Storing, with_storing
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Deblocked, Restored
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.plan import Job


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(denoise)


@with_storing
def denoise(
    storing: Storing,
    inputs: Inputs = None,
    output_name: Output = None,
    sigma: SigmaOption = "auto",
    noise: NoiseOption = None,
    target: ClassOption = "none",
    model: ModelOption = "auto",
    ensemble: EnsembleOption = 1,
    strength: StrengthOption = "1",
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
    mask: MaskOption = None,
    sheet: SheetOption = None,
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
    pages: PagesOption = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove noise from pictures. The originals are never touched."""
    levels = parse_sigmas(sigma)
    level = levels[0]
    if len(levels) > 1 and sheet is None:
        raise UsageError(
            f"--sigma {sigma} is a list: give one level, or --sheet FILE.png to see what each does"
        )
    wanted = parse_class(target)
    if guidance is not None and wanted is None:
        raise UsageError(
            f"--guidance {guidance:g} weighs what a class changes, but none is told: "
            "give --class as well"
        )
    if noise is not None and any(level is not None for level in levels):
        raise UsageError(
            f"--sigma {sigma} tells the level and --noise {noise!r} how to measure it: "
            "leave one of them out"
        )
    if jpeg:
        unsuited = {
            "--strength": strength != "1",
            "--noise": noise is not None,
            "--mask": mask is not None,
            "--sheet": sheet is not None,
            "--guidance": guidance is not None,
            "--uncertainty": uncertainty is not None,
            "--range": scale is not None,
            "--depth": storing.depth is not None,
            "--class auto": isinstance(wanted, str),
        }
        for option in (o for o, is_given in unsuited.items() if is_given):
            raise UsageError(f"{option} does not go with --jpeg: leave one of them out")
    storing.suits(scale)
    selection = parse_pages(pages)
    if selection is not None:
        unsuited = {
            "--jpeg": jpeg,
            "--sheet": sheet is not None,
            "--uncertainty": uncertainty is not None,
            "--compare": compare is not None,
            "--files-from": storing.names is not None,
            "--format": storing.kind is not None,
            "--depth": storing.depth is not None,
            "--quality": storing.quality is not None,
            "--linear": storing.linear,
        }
        for option in (o for o, is_given in unsuited.items() if is_given):
            raise UsageError(f"{option} does not go with --pages: leave one of them out")
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
    budget = None if memory is None else parse_size(memory)
    torch_device = start_torch(device, threads)

    from cdnctl import images
    from cdnctl.restore import Deblock, Denoise, Mask, Settings
    from cdnctl.restore.pages import PagesBatch
    from cdnctl.restore.profiles import known_noise
    from cdnctl.selection import Models

    settings = Settings(
        level,
        wanted,
        parse_strength(strength),
        1.0 if guidance is None else guidance,
        tile,
        budget,
        parse_range(scale),
        known_noise(noise or "auto"),
        finer=files.writing.finer,
    )
    models = Models(model, torch_device, class_names(wanted), ensemble)
    if jpeg:

        def as_files(job: Job, path: Path, batch: Batch[Deblocked], result: Deblocked) -> None:
            write_comparison(job, path, batch, None)

        compared = Beside("--compare", compare, images.WRITE_SUFFIXES - {".npy"}, as_files)
        operation = Deblock(level, wanted if isinstance(wanted, dict) else None, tile, budget)
        restore_files(files, operation, models, JpegPrinter(as_json, quiet), [compared])
        return
    if mask is not None:
        found = Mask.of(images.read(mask, files.max_pixels), str(mask))
        settings = replace(settings, mask=found)
    printer = DenoisePrinter(settings, as_json, quiet)
    if sheet is not None:
        others = {
            "-o": output_name is not None,
            "--files-from": storing.names is not None,
            "--uncertainty": uncertainty is not None,
            "--compare": compare is not None,
            "--dry-run": dry_run,
            "--resume": resume,
            "--skip-existing": skip_existing,
        }
        check_sheet(
            files.inputs, sheet, [option for option, given in others.items() if given], overwrite
        )
        source, most = files.inputs[0], files.max_pixels
        write_sheet(source, sheet, levels, settings, models, most, overwrite, printer)
        return

    def uncertain(job: Job, path: Path, batch: Batch[Restored], result: Restored) -> None:
        write_uncertainty(job, path, batch, settings, printer)

    def compared_with(job: Job, path: Path, batch: Batch[Restored], result: Restored) -> None:
        write_comparison(job, path, batch, settings.range)

    beside = [
        Beside("--uncertainty", uncertainty, NUMBERS | {".png"}, uncertain),
        Beside("--compare", compare, images.WRITE_SUFFIXES - {".npy"}, compared_with),
    ]
    if selection is None:
        restore_files(files, Denoise(settings), models, printer, beside)
    else:
        batch_of = partial(PagesBatch, pages=selection)
        restore_files(files, Denoise(settings), models, printer, beside, batch_of)
