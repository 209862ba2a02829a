"""Pictures one after the other, each looked at: what classify and noise do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cdnctl.cli.common import need_reader, report_error, shown
from cdnctl.cli.options import parse_range, pixel_limit
from cdnctl.cli.progress import progress
from cdnctl.errors import ImageError

if TYPE_CHECKING:
    from cdnctl.images import Image


def look_at_each(
    inputs: Sequence[Path],
    look: Callable[[Image], tuple[dict[str, Any], str]],
    *,
    recursive: bool,
    max_megapixels: int | None,
    scale: str | None,
    as_json: bool,
    quiet: bool,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Read pictures, on the scale of [0, 1], and print what ``look`` finds in each: a record for
    programs, words for people; then ``finish``. Exit code 1 if one could not be read."""
    from cdnctl import images
    from cdnctl.restore import on_unit_scale
    from cdnctl.restore.plan import expand

    files = expand(inputs, recursive)
    max_pixels = pixel_limit(max_megapixels)
    white = parse_range(scale)
    failed = False
    with progress(len(files), quiet, as_json) as advance:
        for path in files:
            need_reader()
            try:
                image = on_unit_scale(images.read(path, max_pixels), white, str(path))
                record, words = look(image)
            except ImageError as error:
                failed = True
                record, words = {"error": str(error)}, None
                if not as_json:
                    report_error(str(error))
            if as_json:
                print(json.dumps({"input": str(path)} | record), flush=True)
            elif words is not None:
                print(f"{shown(path)}: {words}", flush=True)
            advance()
    finish()
    if failed:
        raise typer.Exit(1)
