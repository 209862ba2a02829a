"""Pictures one after the other, each looked at: what classify and noise do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cdnctl.cli.common import need_reader, report_error, shown
from cdnctl.cli.options import parse_range, pixel_limit
from cdnctl.cli.progress import progress
from cdnctl.errors import ImageError

if TYPE_CHECKING:
    from cdnctl.images import Image

PIXELS = 2**22  # once so many have been read, what was found is told
Told = tuple[dict[str, Any], str]  # what is found in a picture: for programs, and for people


def look_at_each(
    inputs: Sequence[Path],
    look: Callable[[Image], Any],
    tell: Callable[[Sequence[Any]], Sequence[Told]] = list,
    *,
    together: int = 1,
    only_print: bool = True,
    recursive: bool,
    max_megapixels: int | None,
    scale: str | None,
    as_json: bool,
    quiet: bool,
    record_of: Callable[[Path, dict[str, Any]], None] = lambda path, record: None,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Read pictures, on the scale of [0, 1], look at each, and print, in order, what is found: a
    record for programs, words for people; then ``finish``. Exit code 1 if one could not be read.

    look: what is kept of a picture; without ``tell`` it is what is found. tell: what is found, from
    what is kept of at most ``together`` pictures; from each on its own if one of them spoils it.
    record_of: is given every record. only_print: whether all is in vain when nobody reads.
    """
    from cdnctl import images
    from cdnctl.restore import on_unit_scale
    from cdnctl.restore.plan import expand

    files = expand(inputs, recursive)
    max_pixels = pixel_limit(max_megapixels)
    white = parse_range(scale)
    failed = False

    def groups() -> Iterator[tuple[list[Path], list[Any]]]:
        """Paths, and what is kept of each, or why it could not be read."""
        paths: list[Path] = []
        kept: list[Any] = []
        pixels = 0
        for path in files:
            paths.append(path)
            try:
                image = on_unit_scale(images.read(path, max_pixels), white, str(path))
                pixels += image.samples[..., 0].size
                kept.append(look(image))
            except ImageError as error:
                kept.append(error)
            if len(paths) == together or pixels >= PIXELS:
                yield paths, kept
                paths, kept, pixels = [], [], 0
        yield paths, kept

    def told(kept: Sequence[Any]) -> Sequence[Told | ImageError]:
        try:
            return tell(kept)
        except ImageError as error:
            return [error] if len(kept) == 1 else [told([one])[0] for one in kept]

    with progress(len(files), quiet, as_json) as advance:
        for paths, kept in groups():
            found = iter(told([one for one in kept if not isinstance(one, ImageError)]))
            for path, one in zip(paths, kept, strict=True):
                if only_print:
                    need_reader()
                answer = one if isinstance(one, ImageError) else next(found)
                if isinstance(answer, ImageError):
                    failed = True
                    record, words = {"error": str(answer)}, None
                    if not as_json:
                        report_error(str(answer))
                else:
                    record, words = answer
                if as_json:
                    print(json.dumps({"input": str(path)} | record), flush=True)
                elif words is not None:
                    print(f"{shown(path)}: {words}", flush=True)
                record_of(path, record)
                advance()
    finish()
    if failed:
        raise typer.Exit(1)
