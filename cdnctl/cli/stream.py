"""Pictures whose names come one after the other, each answered before the next is waited for."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import typer

from cdnctl.cli.printer import Heard, Printer, R
from cdnctl.errors import ImageError, UsageError

if TYPE_CHECKING:
    from cdnctl.restore.batch import Batch, Done
    from cdnctl.restore.plan import Job

SOON = 0.02  # seconds: names that come so close go through the network together
CHUNK = 65536  # bytes that are read at once, if so many are there
AHEAD = 1024  # names that are read ahead


def restore_named(
    source: BinaryIO, output: Path | None, batch: Batch[R], printer: Printer[R]
) -> None:
    """Work on the pictures that are named in a file, as `restore_files` does on others.

    output: the folder that results go to; None: each beside its input.
    """
    started = time.monotonic()
    late: list[Done[R]] = []
    heard = Heard(printer)
    results = batch.run(_Jobs(output, batch).of(names(source)), late)
    try:
        for done in results:
            heard(done)
        stop = None
    except (KeyboardInterrupt, SystemExit) as error:
        stop = error
        results.close()  # so that late is complete
        for done in late:
            heard.once(done)
    if stop is not None:
        heard.interrupted(stop, len(heard.kinds), "")
    printer.summary(heard.counts, time.monotonic() - started)
    if heard.failed:
        raise typer.Exit(1)


def names(source: BinaryIO) -> Iterator[str | None]:
    """The names in a file as they come; None where the next is not there yet. UsageError if it
    cannot be read.

    They are lines, without CR and LF at their ends and but for empty ones; or, if the first that
    is read holds a NUL, whatever ends in NUL.
    """
    waiting: queue.Queue[str | OSError | None] = queue.Queue(AHEAD)

    def read() -> None:
        try:
            for name in _split(source):
                waiting.put(name)
            waiting.put(None)
        except OSError as error:
            waiting.put(error)

    # A thread, for no other way to ask whether a pipe holds something is known to all systems.
    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            name = waiting.get(timeout=SOON)
        except queue.Empty:
            yield None
            name = waiting.get()
        if isinstance(name, OSError):
            raise UsageError(f"cannot read what --files-from names: {name.strerror}")
        if name is None:
            return
        yield name


def opened(place: str) -> BinaryIO:
    """The file of --files-from, not buffered; standard input if it is "-". UsageError if it
    cannot be read."""
    if place != "-":
        try:
            return open(place, "rb", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot read --files-from {place!r}: {error.strerror}") from None
    if sys.stdin is None:
        raise UsageError("--files-from - reads standard input, but that is closed: pipe names in")
    # Not buffered: a thread that is still reading at the end must hold no lock.
    source: BinaryIO = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    return source


def _split(source: BinaryIO) -> Iterator[str]:
    """The names in what a file gives, each as soon as it is complete."""
    rest, end = b"", b""
    while chunk := source.read(CHUNK):
        end = end or (b"\0" if b"\0" in chunk else b"\n")
        *whole, rest = (rest + chunk).split(end)
        yield from filter(None, (_name(part, end) for part in whole))
    if name := _name(rest, end):
        yield name


def _name(part: bytes, end: bytes) -> str:
    return os.fsdecode(part.removesuffix(b"\r") if end == b"\n" else part)


class _Jobs:
    """What is to become of the pictures of names."""

    def __init__(self, output: Path | None, batch: Batch[R]):
        self.output, self.writing = output, batch.writing
        self.redone = batch.overwrite or batch.resume or batch.skip_existing
        self.sources: dict[str, Path] = {}  # by what tells one file from another
        self.outputs: dict[str, Path] = {}  # the source of each

    def of(self, given: Iterator[str | None]) -> Iterator[Job | Done[R] | None]:
        """Jobs for names, None for None; what cannot be done has failed at once."""
        from cdnctl.restore.batch import Done
        from cdnctl.restore.plan import Job

        for name in given:
            if name is None:
                yield None
                continue
            source = Path(name)
            try:
                output = self._output(source)
            except (UsageError, ImageError) as error:
                yield Done(Job(source, source), error=str(error))
            else:
                yield Job(source, output)

    def _output(self, source: Path) -> Path:
        """Where to; UsageError if that is no place for it."""
        from cdnctl.restore.plan import default_output, key_of, placed, same_file

        suffix = self.writing.suffix
        if self.output is None:
            output = default_output(source, suffix=suffix)
        else:
            # As they are named: their folders are made anew in that of the outputs.
            outside = source.is_absolute() or ".." in source.parts
            output = placed(self.output / (source.name if outside else source), suffix)
        # Where nothing is lost, a quality means nothing, as in a folder.
        replace(self.writing, quality=None).check({output.suffix.lower()})
        if same_file(source, output):
            raise UsageError(f"{str(source)!r} would overwrite itself: choose another output")
        key, own = key_of(output), key_of(source)
        if key in self.sources:
            raise UsageError(
                f"{str(source)!r} would overwrite the input {str(self.sources[key])!r}: "
                "choose another output"
            )
        before = self.outputs.setdefault(key, source)
        if key_of(before) != own:
            raise UsageError(
                f"{str(before)!r} and {str(source)!r} would both be written to {str(output)!r}: "
                "rename one, or run them separately"
            )
        if os.path.exists(output) and not self.redone:
            raise UsageError(
                f"{str(output)!r} exists: give --overwrite to replace it, or --skip-existing"
            )
        self.sources[own] = source
        return output
