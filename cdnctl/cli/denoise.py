"""cdnctl denoise: one picture, a folder or a pipe, with or without a class."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import (
    NUMBERS,
    keep_existing,
    report_error,
    save_numbers,
    start_torch,
)
from cdnctl.cli.options import (
    ClassOption,
    Device,
    Json,
    MaxMegapixels,
    ModelOption,
    Quiet,
    RangeOption,
    Recursive,
    SigmaOption,
    Threads,
    WithClasses,
    class_names,
    parse_class,
    parse_range,
    parse_sigma,
    parse_size,
    pixel_limit,
)
from cdnctl.cli.pipe import pipe
from cdnctl.cli.printer import STDIO, Printer
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Restored, Settings
    from cdnctl.restore.batch import Batch, Done
    from cdnctl.restore.plan import Job

PIXELS_PER_FILE = 4096  # that take as long as opening, closing and naming files: for progress


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(denoise)


def denoise(
    inputs: Annotated[
        list[Path], typer.Argument(help="Pictures and folders; - for standard input.")
    ],
    output_name: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="File or folder (new/ makes one); - for standard output, in the input's format "
            "or as PNG.",
        ),
    ] = None,
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
    recursive: Recursive = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a folder: redo only what is missing or has changed."
        ),
    ] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Pass over inputs whose output exists.")
    ] = False,
    strip_metadata: Annotated[
        bool, typer.Option("--strip-metadata", help="Leave out EXIF, ICC profile and text.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")
    ] = False,
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Side of tiles in pixels.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="What the network may take, such as 500M or 2G."),
    ] = None,
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
    if skip_existing and (overwrite or resume):
        other = "--overwrite" if overwrite else "--resume"
        raise UsageError(f"{other} and --skip-existing exclude each other")
    budget = None if memory is None else parse_size(memory)
    max_pixels = pixel_limit(max_megapixels)
    output = None if output_name is None else Path(output_name)
    # A path does not keep a slash at its end.
    into = (output_name or "").endswith((os.sep, os.altsep or os.sep))
    torch_device = start_torch(device, threads)
    import torch

    from cdnctl.images import WRITE_SUFFIXES
    from cdnctl.restore import Denoise, Settings
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.manifest import Manifest
    from cdnctl.restore.plan import plan, same_file, share
    from cdnctl.runtime import patient_barrier, process_group
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
    printer = Printer(settings, as_json, quiet)
    if STDIO in inputs or output == STDIO:
        given = {
            "--uncertainty": uncertainty is not None,
            "--compare": compare is not None,
            "--dry-run": dry_run,
            "--resume": resume,
            "--skip-existing": skip_existing,
        }
        for option in (o for o, is_given in given.items() if is_given):
            raise UsageError(f"{option} works with files, not with -")
        if into:
            raise UsageError(f"with - give a file, not the folder -o {output_name!r}")
        pipe(inputs, output, models, settings, max_pixels, strip_metadata, overwrite, printer)
        return
    is_folder = output is not None and (len(inputs) > 1 or inputs[0].is_dir())
    if resume and not is_folder:
        raise UsageError("--resume goes on with a folder of pictures: give one, and -o FOLDER")

    with process_group(torch.device("cpu")) as (rank, world), ExitStack() as stack:
        wait_for_all = patient_barrier()
        jobs = plan(inputs, output, recursive, into)
        if uncertainty is not None:
            _check_beside("--uncertainty", uncertainty, jobs, NUMBERS | {".png"}, overwrite)
        if compare is not None:
            _check_beside("--compare", compare, jobs, WRITE_SUFFIXES, overwrite)
            if uncertainty is not None and same_file(compare, uncertainty):
                raise UsageError(f"{str(compare)!r} is named twice: choose another file")
        jobs, passed = share(
            jobs,
            output,
            skip_existing=skip_existing,
            replace=overwrite or resume,
            rank=rank,
            world=world,
        )
        batch = Batch(
            models,
            Denoise(settings),
            strip_metadata,
            overwrite=overwrite,
            resume=resume,
            skip_existing=skip_existing,
            max_pixels=max_pixels,
        )
        if output is not None and is_folder:
            batch = replace(batch, manifest=Manifest(output, rank, world))
        if dry_run:
            failed = _announce(batch, jobs, passed, printer)
        else:
            if batch.manifest is not None:
                stack.enter_context(batch.manifest)
            wait_for_all()  # no process writes before all have planned
            failed = _report(batch, jobs, passed, printer)
            if uncertainty is not None and jobs and not failed:
                _write_uncertainty(jobs[0], uncertainty, batch, settings, printer)
            if compare is not None and jobs and not failed:
                _write_comparison(jobs[0], compare, batch, settings.range)
            # torchrun ends the other processes when one has failed: not before they are done.
            wait_for_all()
    if failed:
        alone = len(jobs) == 1 and batch.manifest is None
        raise typer.Exit(failed[0].exit_code if alone else 1)


def _announce(
    batch: Batch[Restored], jobs: list[Job], passed: list[Job], printer: Printer
) -> list[Done[Restored]]:
    """The plan, and nothing else; what would be refused is returned."""
    from cdnctl.errors import ImageError
    from cdnctl.restore.batch import Done

    if batch.manifest is not None:
        batch.manifest.read()
    refused: list[Done[Restored]] = []
    for job in jobs:
        try:
            printer.planned(job, batch.resume and batch.is_done(job))
        except ImageError as error:
            refused.append(Done(job, error=str(error)))
            printer.failure(refused[-1])
    for job in passed:
        printer.planned(job, done=True)
    return refused


def _report(
    batch: Batch[Restored], jobs: list[Job], passed: list[Job], printer: Printer
) -> list[Done[Restored]]:
    """Do the work and print each result as it comes; the failures again at the end, and
    returned. passed: jobs that are not to be done."""
    from cdnctl.restore.batch import count_pixels, large_last

    total, started = len(jobs) + len(passed), time.monotonic()
    heard: dict[Job, str] = {}
    failed: list[Done[Restored]] = []
    late: list[Done[Restored]] = []

    def hear(done: Done[Restored]) -> None:
        # Noted last: what is interrupted before comes again, as late.
        if done.error is not None:
            failed.append(done)
            printer.failure(done)
            heard[done.job] = "failed"
        elif done.restored is None:
            printer.skipped(done.job)
            heard[done.job] = "skipped"
        else:
            printer.result(done.job.source, done.job.output, done.restored, done.seconds)
            heard[done.job] = "restored"

    for job in passed:
        printer.skipped(job)
        heard[job] = "skipped"
    pixels = count_pixels(jobs)
    work = {job: count + PIXELS_PER_FILE for job, count in pixels.items()}
    with progress(len(jobs), printer.quiet, printer.as_json, sum(work.values())) as advance:
        batch = replace(batch, watch=lambda job, share: advance.within(share * work[job], job))
        results = batch.run(large_last(pixels), late)
        try:
            for done in results:
                hear(done)
                if heard[done.job] == "skipped":
                    advance.skip(work[done.job])
                else:
                    advance(work[done.job], done.job)
            stop = None
        except (KeyboardInterrupt, SystemExit) as error:  # the latter: told to terminate
            stop = error
            results.close()  # so that late is complete
            for done in late:
                if done.job not in heard:
                    hear(done)
    counts = Counter(heard.values())
    if stop is not None:
        hint = ""
        if total > 1:
            way = "--skip-existing" if batch.manifest is None else "--resume"
            hint = f": continue with {way}"
        report_error(f"interrupted after {len(heard)} of {total} pictures{hint}")
        raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 1))
    if total > 1 or batch.manifest is not None:
        printer.summary(counts, time.monotonic() - started)
    if failed and total > 1:
        report_error(f"{len(failed)} of {total} pictures failed:")
        for done in failed:
            print(f"  {done.error}", file=sys.stderr)
    return failed


def _check_beside(
    option: str, path: Path, jobs: list[Job], suffixes: Collection[str], overwrite: bool
) -> None:
    """Refuse a file that an option cannot write beside the output of a single picture."""
    from cdnctl.restore.plan import same_file

    if len(jobs) != 1:
        raise UsageError(f"{option} takes one picture, not {len(jobs)}")
    if same_file(path, jobs[0].source) or same_file(path, jobs[0].output):
        raise UsageError(f"{option} {str(path)!r} is the picture itself or its output")
    if path.suffix.lower() not in suffixes:
        known = ", ".join(sorted(suffixes))
        raise UsageError(f"{option} {str(path)!r} must be a file of one of the kinds {known}")
    keep_existing(path, overwrite)


def _write_uncertainty(
    job: Job, path: Path, batch: Batch[Restored], settings: Settings, printer: Printer
) -> None:
    from cdnctl import images
    from cdnctl.analysis.uncertainty import drawn, posterior_std
    from cdnctl.restore import on_unit_scale

    image = images.read(job.source, batch.max_pixels)
    image = on_unit_scale(image, settings.range, str(job.source))
    model = batch.models.pick(*image.samples.shape[:2])
    with progress(1, printer.quiet, printer.as_json):
        std, sigma = posterior_std(image, model, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in NUMBERS:
        save_numbers(std[..., 0], path, batch.overwrite)
    else:
        images.write(drawn(std[..., 0], sigma), path, overwrite=batch.overwrite)


def _write_comparison(
    job: Job, path: Path, batch: Batch[Restored], scale: tuple[float, float] | None
) -> None:
    """The input beside the output, both as they are in their files."""
    from cdnctl import images
    from cdnctl.figures import before_and_after
    from cdnctl.restore import on_unit_scale

    before, after = (
        on_unit_scale(images.read(p, batch.max_pixels), scale, str(p))
        for p in (job.source, job.output)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(before_and_after(before, after), path, overwrite=batch.overwrite)
