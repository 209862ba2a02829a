"""cdnctl denoise."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import (
    NUMBERS,
    PEAK,
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
    keep_existing,
    need_reader,
    parse_class,
    parse_range,
    parse_sigma,
    parse_size,
    pixel_limit,
    progress,
    report_error,
    save_numbers,
    shown,
    start_torch,
    warn,
)
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Restored, Settings
    from cdnctl.restore.batch import Batch, Done
    from cdnctl.restore.plan import Job
    from cdnctl.selection import Models

STDIO = Path("-")
PIXELS_PER_FILE = 4096  # that take as long as opening, closing and naming files: for progress


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses)(denoise)


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
        _pipe(inputs, output, models, settings, max_pixels, strip_metadata, overwrite, printer)
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


def _pipe(
    inputs: list[Path],
    output: Path | None,
    models: Models,
    settings: Settings,
    max_pixels: int,
    strip: bool,
    overwrite: bool,
    printer: Printer,
) -> None:
    """One picture from standard input and/or to standard output."""
    from cdnctl import images
    from cdnctl.errors import ImageError
    from cdnctl.restore import on_own_scale, on_unit_scale, restore
    from cdnctl.restore.plan import check_suffix

    if len(inputs) != 1 or output is None:
        raise UsageError("with - give exactly one input and an output: cdnctl denoise - -o out.png")
    if output == STDIO:
        need_reader()
    else:
        check_suffix(output)
        keep_existing(output, overwrite)
    source = inputs[0]
    if source == STDIO and sys.stdin is None:
        raise UsageError("- reads standard input, but that is closed: pipe a picture in")
    image = images.read(sys.stdin.buffer if source == STDIO else source, max_pixels)
    image = on_unit_scale(image, settings.range, str(source))
    started = time.monotonic()
    with progress(1, printer.quiet, printer.as_json) as advance:
        chosen = models.pick(*image.samples.shape[:2])
        restored = restore(image, chosen, settings, advance.within)
    seconds = time.monotonic() - started
    result = on_own_scale(restored.image, settings.range)
    result = replace(result, metadata=images.Metadata()) if strip else result
    if output != STDIO:
        suffix = output.suffix.lower()
        images.write(result, output, overwrite=overwrite)
    else:
        suffix = result.suffix
        try:
            images.conversions(result, suffix)
        except ImageError:  # BMP files are read with transparency, but not written
            suffix = ".png"
        sys.stdout.buffer.write(images.encode(result, suffix))
        sys.stdout.buffer.flush()
    result = replace(result, notes=result.notes + images.conversions(result, suffix))
    restored = replace(restored, image=result)
    printer.result(source, output, restored, seconds)


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


class Printer:
    """Says how each picture went: a line for people or an object for programs."""

    def __init__(self, settings: Settings, as_json: bool, quiet: bool):
        self.target = settings.target
        self.estimated = settings.sigma is None
        self.as_json, self.quiet = as_json, quiet

    def result(self, source: Path, output: Path, restored: Restored, seconds: float) -> None:
        """A picture that was restored; its noise level is in 0..255."""
        model = restored.model
        level = restored.sigma * PEAK
        low, high = (PEAK * s for s in model.sigma_range)
        if restored.told * PEAK > high + 1e-6:
            note = " (a gray picture counts sqrt(3)-fold)" if restored.told > restored.sigma else ""
            warn(
                f"{shown(source)}: sigma {level:.1f}{note} is outside the range "
                f"{low:g}..{high:g} that model {model.name!r} was trained on"
            )
        # On the 0..255 scale, root mean square.
        change = restored.class_change
        change = None if change is None else round(change * PEAK, 6)
        best = next(iter(restored.posterior.items()), None)
        # With the picture itself on standard output, remarks go to standard error.
        stream = sys.stderr if output == STDIO else sys.stdout
        if self.as_json:
            record: dict[str, Any] = {
                "event": "restored",
                "input": str(source),
                "output": str(output),
                "sigma": round(level, 3),
                "sigma_estimated": self.estimated,
                "model": model.name,
                "weights": model.hash,
                "class_change": change,
                "posterior": {k: round(v, 6) for k, v in restored.posterior.items()},
                "held": round(restored.held, 6),
                "seconds": round(seconds, 4),
                "notes": list(restored.image.notes),
            }
            print(json.dumps(record), file=stream, flush=True)
        elif not self.quiet:
            how = "estimated" if self.estimated else "given"
            where = f"{shown(source)} -> {shown(output)}"
            parts = [where, f"sigma {level:.1f} ({how})", f"model {model.name}"]
            if best is not None and (best[1] >= 0.5 or self.target == "auto"):
                parts.append(f"most probable class {best[0]} ({best[1]:.0%})")
            if change is not None:
                amount = f"{change:.2f}" if change >= 0.01 else "less than 0.01"
                parts.append(f"telling the class changed {amount} of 255 (rms)")
            print(", ".join([*parts, *restored.image.notes]), file=stream, flush=True)

    def failure(self, done: Done[Restored]) -> None:
        """A picture that could not be restored."""
        if self.as_json:
            self._event("failed", done.job, error=done.error)
        else:
            report_error(str(done.error))

    def skipped(self, job: Job) -> None:
        """A picture that an earlier run restored."""
        if self.as_json:
            self._event("skipped", job)

    def planned(self, job: Job, done: bool) -> None:
        """A picture that would be restored, or passed over."""
        if self.as_json:
            self._event("planned", job, done=done)
        else:
            note = ", done before" if done else ""
            print(f"{shown(job.source)} -> {shown(job.output)}{note}", flush=True)

    def summary(self, counts: Counter[str], seconds: float) -> None:
        """What became of all pictures."""
        if self.as_json:
            kinds = {kind: counts[kind] for kind in ("restored", "skipped", "failed")}
            record = {"event": "finished", **kinds, "seconds": round(seconds, 3)}
            print(json.dumps(record), flush=True)
        elif not self.quiet:
            plural = "" if counts["restored"] == 1 else "s"
            done = f"{counts['restored']} picture{plural} restored in {seconds:.1f} s"
            skipped = f", {counts['skipped']} done before" if counts["skipped"] else ""
            print(done + skipped, file=sys.stderr, flush=True)

    def _event(self, event: str, job: Job, **more: Any) -> None:
        record = {"event": event, "input": str(job.source), "output": str(job.output), **more}
        print(json.dumps(record), flush=True)
