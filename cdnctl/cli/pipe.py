"""A picture from standard input, or to standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdnctl.cli.common import keep_existing, need_reader
from cdnctl.cli.printer import STDIO, Printer
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore import Settings
    from cdnctl.selection import Models


def pipe(
    inputs: Sequence[Path],
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
    from cdnctl.restore import black_and_white, on_own_scale, on_unit_scale, restore
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
    ends, dtype = black_and_white(image, settings.range, str(source)), image.dtype
    image = on_unit_scale(image, ends, str(source))
    started = time.monotonic()
    with progress(1, printer.quiet, printer.as_json) as advance:
        chosen = models.pick(*image.samples.shape[:2])
        restored = restore(image, chosen, settings, advance.within)
    seconds = time.monotonic() - started
    result = on_own_scale(restored.image, ends, dtype)
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
