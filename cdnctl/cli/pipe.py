"""A picture from standard input, or to standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdnctl.cli.common import keep_existing, need_reader
from cdnctl.cli.printer import STDIO, Printer, R
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Operation
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
    from cdnctl.restore.plan import check_suffix

    if len(inputs) != 1 or output is None:
        raise UsageError(
            f"with - give exactly one input and an output: cdnctl {operation.name} - -o out.png"
        )
    if output == STDIO:
        need_reader()
    else:
        check_suffix(output)
        writing.check({output.suffix.lower()})
        keep_existing(output, overwrite)
    source = inputs[0]
    if source == STDIO and sys.stdin is None:
        raise UsageError("- reads standard input, but that is closed: pipe a picture in")
    piped = source == STDIO
    data = sys.stdin.buffer.read() if piped else images.read_bytes(source)
    image = images.decode(data, "standard input" if piped else str(source), max_pixels)
    ready = operation.prepare(image, str(source), data)
    started = time.monotonic()
    with progress(1, printer.quiet, printer.as_json) as advance:
        chosen = models.pick(*image.samples.shape[:2])
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
