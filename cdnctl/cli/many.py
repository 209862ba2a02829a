"""Many pictures to pictures: what denoise and the repairs share of files, folders and pipes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic

import typer

from cdnctl.cli.common import keep_existing, report_error
from cdnctl.cli.pipe import pipe, pipe_pages
from cdnctl.cli.printer import STDIO, Heard, Printer, R
from cdnctl.cli.progress import progress
from cdnctl.cli.storing import Storing
from cdnctl.cli.stream import opened, restore_named
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Operation
    from cdnctl.restore.batch import Batch, Done
    from cdnctl.restore.plan import Job
    from cdnctl.restore.writing import Writing
    from cdnctl.selection import Models

PIXELS_PER_FILE = 4096  # that take as long as opening, closing and naming files: for progress


@dataclass(frozen=True)
class Files:
    """What a command line says of its inputs and outputs."""

    given: list[Path] | None
    output_name: str | None
    recursive: bool
    overwrite: bool
    resume: bool
    skip_existing: bool
    strip_metadata: bool
    dry_run: bool
    max_pixels: int
    storing: Storing = field(default_factory=Storing)

    def __post_init__(self) -> None:
        if self.skip_existing and (self.overwrite or self.resume):
            other = "--overwrite" if self.overwrite else "--resume"
            raise UsageError(f"{other} and --skip-existing exclude each other")

    @property
    def inputs(self) -> list[Path]:
        """As they are named; none with --files-from."""
        return self.given or []

    @cached_property
    def writing(self) -> Writing:
        """How outputs are written."""
        return self.storing.writing(self.strip_metadata)

    @property
    def output(self) -> Path | None:
        """Where to; None: beside the input."""
        return None if self.output_name is None else Path(self.output_name)

    @property
    def into(self) -> bool:
        """Whether the output is a folder by its slash at the end, which a path does not keep."""
        return (self.output_name or "").endswith((os.sep, os.altsep or os.sep))


@dataclass(frozen=True)
class Beside(Generic[R]):
    """A file that an option asks for beside the output of a single picture."""

    option: str
    path: Path | None  # None: not asked for
    suffixes: Collection[str]
    write: Callable[[Job, Path, Batch[R], R], None]


def restore_files(
    files: Files,
    operation: Operation[R],
    models: Models,
    printer: Printer[R],
    beside: Sequence[Beside[R]] = (),
    batch_of: Callable[..., Batch[R]] | None = None,
) -> None:
    """Do what a command line asks for, and leave with its exit code if something failed.

    batch_of: what makes the batch, if it is another than `Batch`.
    """
    import torch

    from cdnctl.restore.batch import Batch
    from cdnctl.restore.manifest import Manifest
    from cdnctl.restore.plan import plan, share
    from cdnctl.runtime import patient_barrier, process_group

    inputs, output = files.inputs, files.output
    wanted = [(one, one.path) for one in beside if one.path is not None]
    if STDIO in inputs or output == STDIO:
        given = [one.option for one, _ in wanted] + [
            option
            for option, is_given in (
                ("--dry-run", files.dry_run),
                ("--resume", files.resume),
                ("--skip-existing", files.skip_existing),
            )
            if is_given
        ]
        for option in given:
            raise UsageError(f"{option} works with files, not with -")
        if files.into:
            raise UsageError(f"with - give a file, not the folder -o {files.output_name!r}")
        if batch_of is not None:
            batch = batch_of(models, operation, files.writing, max_pixels=files.max_pixels)
            pipe_pages(inputs, output, batch, files.overwrite, printer)
            return
        pipe(
            inputs,
            output,
            models,
            operation,
            files.max_pixels,
            files.writing,
            files.overwrite,
            printer,
        )
        return
    batch = (batch_of or Batch)(
        models,
        operation,
        files.writing,
        overwrite=files.overwrite,
        resume=files.resume,
        skip_existing=files.skip_existing,
        max_pixels=files.max_pixels,
    )
    if files.storing.names is not None:
        for option in [one.option for one, _ in wanted] + ["--dry-run"] * files.dry_run:
            raise UsageError(f"{option} is for pictures that are known before: not --files-from")
        if files.resume and output is None:
            raise UsageError("--resume goes on with a folder of pictures: give -o FOLDER")
        if files.writing.suffix is not None:
            files.writing.check({files.writing.suffix})
        source = opened(files.storing.names)
        with process_group(torch.device("cpu")) as (_, world), ExitStack() as stack:
            if world > 1:
                raise UsageError(f"--files-from is for one process, and these are {world}")
            if output is not None:
                batch = replace(batch, manifest=stack.enter_context(Manifest(output)))
            restore_named(source, output, batch, printer)
        return
    is_folder = output is not None and (len(inputs) > 1 or inputs[0].is_dir())
    if files.resume and not is_folder:
        raise UsageError("--resume goes on with a folder of pictures: give one, and -o FOLDER")

    with process_group(torch.device("cpu")) as (rank, world), ExitStack() as stack:
        wait_for_all = patient_barrier()
        jobs = plan(inputs, output, files.recursive, files.into, suffix=files.writing.suffix)
        files.writing.check({job.output.suffix.lower() for job in jobs})
        _check_beside(wanted, jobs, files.overwrite)
        jobs, passed = share(
            jobs,
            output,
            skip_existing=files.skip_existing,
            replace=files.overwrite or files.resume,
            rank=rank,
            world=world,
        )
        if output is not None and is_folder:
            batch = replace(batch, manifest=Manifest(output, rank, world))
        if files.dry_run:
            failed = _announce(batch, jobs, passed, printer)
        else:
            if batch.manifest is not None:
                stack.enter_context(batch.manifest)
            wait_for_all()  # no process writes before all have planned
            failed, last = _report(batch, jobs, passed, printer)
            if last is not None and not failed:
                for one, path in wanted:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    one.write(jobs[0], path, batch, last)
            # torchrun ends the other processes when one has failed: not before they are done.
            wait_for_all()
    if failed:
        alone = len(jobs) == 1 and batch.manifest is None
        raise typer.Exit(failed[0].exit_code if alone else 1)


def _announce(
    batch: Batch[R], jobs: list[Job], passed: list[Job], printer: Printer[R]
) -> list[Done[R]]:
    """The plan, and nothing else; what would be refused is returned."""
    from cdnctl.errors import ImageError
    from cdnctl.restore.batch import Done

    if batch.manifest is not None:
        batch.manifest.read()
    refused: list[Done[R]] = []
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
    batch: Batch[R], jobs: list[Job], passed: list[Job], printer: Printer[R]
) -> tuple[list[Done[R]], R | None]:
    """Do the work and print each result as it comes; the failures again at the end, and
    returned, with the result that came last. passed: jobs that are not to be done."""
    from cdnctl.restore.batch import Done, count_pixels, large_last

    total, started = len(jobs) + len(passed), time.monotonic()
    heard = Heard(printer)
    late: list[Done[R]] = []
    for job in passed:
        heard(Done(job))
    pixels = count_pixels(jobs)
    work = {job: count + PIXELS_PER_FILE for job, count in pixels.items()}
    with progress(len(jobs), printer.quiet, printer.as_json, sum(work.values())) as advance:
        batch = replace(batch, watch=lambda job, share: advance.within(share * work[job], job))
        results = batch.run(large_last(pixels), late)
        try:
            for done in results:
                heard(done)
                if heard.kinds[done.job] == "skipped":
                    advance.skip(work[done.job])
                else:
                    advance(work[done.job], done.job)
            stop = None
        except (KeyboardInterrupt, SystemExit) as error:  # the latter: told to terminate
            stop = error
            results.close()  # so that late is complete
            for done in late:
                heard.once(done)
    if stop is not None:
        way = "--skip-existing" if batch.manifest is None else "--resume"
        heard.interrupted(stop, total, f": continue with {way}" if total > 1 else "")
    if total > 1 or batch.manifest is not None:
        printer.summary(heard.counts, time.monotonic() - started)
    if heard.failed and total > 1:
        report_error(f"{len(heard.failed)} of {total} pictures failed:")
        for done in heard.failed:
            print(f"  {done.error}", file=sys.stderr)
    return heard.failed, heard.last


def _check_beside(
    wanted: Sequence[tuple[Beside[R], Path]], jobs: list[Job], overwrite: bool
) -> None:
    """Refuse files that options cannot write beside the output of a single picture."""
    from cdnctl.restore.plan import same_file

    for i, (one, path) in enumerate(wanted):
        if len(jobs) != 1:
            raise UsageError(f"{one.option} takes one picture, not {len(jobs)}")
        if same_file(path, jobs[0].source) or same_file(path, jobs[0].output):
            raise UsageError(f"{one.option} {str(path)!r} is the picture itself or its output")
        if path.suffix.lower() not in one.suffixes:
            known = ", ".join(sorted(one.suffixes))
            raise UsageError(
                f"{one.option} {str(path)!r} must be a file of one of the kinds {known}"
            )
        keep_existing(path, overwrite)
        if any(same_file(path, other) for _, other in wanted[:i]):
            raise UsageError(f"{str(path)!r} is named twice: choose another file")
