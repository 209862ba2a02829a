"""cdnctl noise."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import (
    PEAK,
    Json,
    MaxMegapixels,
    Quiet,
    RangeOption,
    Recursive,
    need_reader,
    parse_range,
    pixel_limit,
    progress,
    report_error,
    shown,
)
from cdnctl.errors import ImageError


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(noise)


def noise(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    recursive: Recursive = False,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what noise pictures hold: how strong by tone, colour and scale.

    It is what denoise goes by where no --sigma is given; nothing is written.
    """
    from cdnctl import images
    from cdnctl.restore import noise_level, on_unit_scale
    from cdnctl.restore.plan import expand

    files = expand(inputs, recursive)
    white = parse_range(scale)
    failed = 0
    with progress(len(files), quiet, as_json) as advance:
        for path in files:
            need_reader()
            try:
                image = images.read(path, pixel_limit(max_megapixels))
                image = on_unit_scale(image, white, str(path))
                level = noise_level(image)
            except ImageError as error:
                failed += 1
                if as_json:
                    print(json.dumps({"input": str(path), "error": str(error)}), flush=True)
                else:
                    report_error(str(error))
                advance()
                continue
            told = round(PEAK * level.sigma, 3)
            if as_json:
                record = {"input": str(path), "sigma": told}
                if level.noise is not None:
                    found = level.noise
                    record |= asdict(found) | {"grain": found.grain, "chroma": found.chroma}
                print(json.dumps(record), flush=True)
            else:
                words = "too small to tell more" if level.noise is None else level.noise.summary()
                print(f"{shown(path)}: {words}; denoise goes by sigma {told:.1f}", flush=True)
            advance()
    if failed:
        raise typer.Exit(1)
