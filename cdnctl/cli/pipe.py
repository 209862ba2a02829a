"""A picture from standard input, or to standard output."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cdnctl.cli.common import keep_existing, need_reader
from cdnctl.cli.printer import STDIO, Printer, R
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Operation
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.writing import Writing
    from cdnctl.selection import Models


def pipe(
    inputs: Sequence[Path],
    output: Path | None,
    models: Models,
    operation: Operation[R],
    max_pixels: int,
    writing: Writing,
    overwrite: bool,
    printer: Printer[R],
) -> None:
    """One picture from standard input and/or to standard output."""
    from cdnctl import images
    from cdnctl.errors import ImageError

    source, output = _ends(inputs, output, operation.name, overwrite)
    if output != STDIO:
        writing.check({output.suffix.lower()})
    piped = source == STDIO
    data = sys.stdin.buffer.read() if piped else images.read_bytes(source)
    image = images.decode(data, "standard input" if piped else str(source), max_pixels)
    ready = operation.prepare(image, str(source), data)
    started = time.monotonic()
    with progress(1, printer.quiet, printer.as_json) as advance:
        height, width = image.samples.shape[:2]
        chosen = models.pick(height, width, operation.by_camera(ready))
        restored = operation.run([ready], chosen, advance.within)[0]
    seconds = time.monotonic() - started
    if output != STDIO:
        suffix = output.suffix.lower()
    elif writing.suffix is not None:
        suffix = writing.suffix
    else:
        suffix = restored.image.suffix
        try:
            images.conversions(restored.image, suffix)
        except ImageError:  # BMP files are read with transparency, but not written
            suffix = ".png"
    try:
        content, restored = writing.encoded(operation, restored, suffix)
    except ImageError as error:
        raise ImageError(f"cannot write {str(output)!r}: {error}") from None
    if output != STDIO:
        images.save(content, output, overwrite=overwrite)
    else:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    printer.result(source, output, restored, seconds)


def pipe_pages(
    inputs: Sequence[Path],
    output: Path | None,
    batch: Batch[Any],
    overwrite: bool,
    printer: Printer[Any],
) -> None:
    """One stack from standard input and/or to standard output, by way of files: its pages are not
    in memory together."""
    from cdnctl import images
    from cdnctl.restore.pages import PagesBatch

    assert isinstance(batch, PagesBatch)
    source, output = _ends(inputs, output, batch.operation.name, overwrite)
    started = time.monotonic()
    with ExitStack() as stack:
        place, name = source, str(source)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        if source == STDIO:
            place, name = folder / "stack", "standard input"
            with place.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        advance = stack.enter_context(progress(1, printer.quiet, printer.as_json))
        if output != STDIO:
            with images.saving(output, overwrite=overwrite) as file:
                restored = batch.write(file, output.suffix.lower(), place, name, advance.within)
        else:
            with images.open_pages(place, batch.max_pixels, name) as pages:
                suffix = pages.suffixes[0]
            with (folder / "result").open("w+b") as file:
                restored = batch.write(file, suffix, place, name, advance.within)
                file.seek(0)
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.buffer.flush()
    printer.result(source, output, restored, time.monotonic() - started)


def _ends(
    inputs: Sequence[Path], output: Path | None, name: str, overwrite: bool
) -> tuple[Path, Path]:
    """Input and output of a command of that name; UsageError if they will not do."""
    from cdnctl.restore.plan import check_suffix

    if len(inputs) != 1 or output is None:
        raise UsageError(f"with - give exactly one input and an output: cdnctl {name} - -o out.png")
    if output == STDIO:
        need_reader()
    else:
        check_suffix(output)
        keep_existing(output, overwrite)
    source = inputs[0]
    if source == STDIO and sys.stdin is None:
        raise UsageError("- reads standard input, but that is closed: pipe a picture in")
    return source, output
