"""cdnctl classify and cdnctl explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import (
    PEAK,
    Device,
    Json,
    MaxMegapixels,
    ModelOption,
    Quiet,
    Recursive,
    SigmaOption,
    Threads,
    keep_existing,
    need_reader,
    parse_sigma,
    pixel_limit,
    progress,
    report_error,
    shown,
    start_torch,
)
from cdnctl.errors import ImageError, UsageError


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(classify)
    app.command()(explain)


def classify(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    sigma: SigmaOption = "auto",
    model: ModelOption = "auto",
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to show.")] = 1,
    recursive: Recursive = False,
    max_megapixels: MaxMegapixels = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what pictures show, noisy or not: p(class | picture)."""
    level = parse_sigma(sigma)
    torch_device = start_torch(device, threads)
    from cdnctl import images
    from cdnctl.batch import expand
    from cdnctl.restore import classify
    from cdnctl.selection import Models

    models = Models(model, torch_device)
    files = expand(inputs, recursive)
    max_pixels = pixel_limit(max_megapixels)
    failed = 0
    with progress(len(files), quiet, as_json) as advance:
        for path in files:
            need_reader()
            try:
                image = images.read(path, max_pixels)
                chosen = models.pick(*image.samples.shape[:2])
                found = classify(image, chosen, level)
            except ImageError as error:
                failed += 1
                if as_json:
                    print(json.dumps({"input": str(path), "error": str(error)}), flush=True)
                else:
                    report_error(str(error))
                advance()
                continue
            best = dict(list(found.posterior.items())[:top])
            if as_json:
                record = {
                    "input": str(path),
                    "model": chosen.name,
                    "sigma": round(found.sigma * PEAK, 3),
                    "classes": {k: round(v, 6) for k, v in best.items()},
                }
                print(json.dumps(record), flush=True)
            else:
                listed = "  ".join(f"{name} {p:.1%}" for name, p in best.items())
                print(f"{shown(path)}: {listed}", flush=True)
            advance()
    if failed:
        raise typer.Exit(1)


def explain(
    source: Annotated[Path, typer.Argument(help="A picture.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Overlay to write.")],
    target: Annotated[
        str, typer.Option("--class", help="Class to explain, or auto: the most probable one.")
    ] = "auto",
    sigma: SigmaOption = "auto",
    model: ModelOption = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.")
    ] = False,
    max_megapixels: MaxMegapixels = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Show which pixels speak for a class (red) and against it (blue)."""
    level = parse_sigma(sigma)
    keep_existing(output, overwrite)
    torch_device = start_torch(device, threads)
    from cdnctl import images
    from cdnctl.analysis.evidence import evidence, overlay
    from cdnctl.batch import same_file
    from cdnctl.restore import estimate_sigma
    from cdnctl.selection import Models

    if output.suffix.lower() not in images.WRITE_SUFFIXES:
        raise UsageError(f"-o {str(output)!r} must be a picture file, such as .png")
    if same_file(source, output):
        raise UsageError(f"{str(source)!r} would overwrite itself: choose another output")
    label = None if target == "auto" else target
    models = Models(model, torch_device, [] if label is None else [label])
    image = images.read(source, pixel_limit(max_megapixels))
    chosen = models.pick(*image.samples.shape[:2])
    noise = estimate_sigma(image.samples, image.alpha) if level is None else level
    with progress(1, quiet):
        found = evidence(chosen, image.samples, noise, label)
    result = images.Image.of(overlay(image.pixels, found.support))
    images.write(result, output, overwrite=overwrite)
    if not quiet:
        print(
            f"{shown(source)} -> {shown(output)}, evidence for {found.label} "
            f"(probability {found.posterior[found.label]:.1%}), model {chosen.name}"
        )
