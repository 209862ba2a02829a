"""cdnctl classify and cdnctl explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import (
    NUMBERS,
    PEAK,
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
    keep_existing,
    need_reader,
    parse_range,
    parse_sigma,
    pixel_limit,
    progress,
    report_error,
    save_numbers,
    shown,
    start_torch,
)
from cdnctl.errors import ImageError, UsageError


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(classify)
    app.command(cls=WithClasses)(explain)


def classify(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    sigma: SigmaOption = "auto",
    model: ModelOption = "auto",
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to show.")] = 1,
    recursive: Recursive = False,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what pictures show, noisy or not: p(class | picture).

    Pictures larger than those that the model was trained on are shrunk to their size.
    """
    level = parse_sigma(sigma)
    torch_device = start_torch(device, threads)
    from cdnctl import images
    from cdnctl.restore import classify, on_unit_scale
    from cdnctl.restore.plan import expand
    from cdnctl.selection import Models

    models = Models(model, torch_device)
    files = expand(inputs, recursive)
    max_pixels = pixel_limit(max_megapixels)
    white = parse_range(scale)
    failed = 0
    with progress(len(files), quiet, as_json) as advance:
        for path in files:
            need_reader()
            try:
                image = on_unit_scale(images.read(path, max_pixels), white, str(path))
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
                    "scale": round(1 / found.factor, 4),
                    "size": [found.size[1], found.size[0]],
                    "classes": {k: round(v, 6) for k, v in best.items()},
                }
                print(json.dumps(record), flush=True)
            else:
                listed = "  ".join(f"{name} {p:.1%}" for name, p in best.items())
                print(f"{shown(path)}: {listed}{_scale(found.size, found.factor)}", flush=True)
            advance()
    if failed:
        raise typer.Exit(1)


def _scale(size: tuple[int, int], factor: float) -> str:
    """At which size (height, width) a picture was looked at, if not its own."""
    return f", seen at {size[1]} x {size[0]} pixels (1/{factor:.3g})" if factor > 1 else ""


def explain(
    source: Annotated[Path, typer.Argument(help="A picture.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="A picture with its scale (.png), or the bare numbers (.tif, .npy).",
        ),
    ],
    target: Annotated[
        str, typer.Option("--class", help="Class to explain, or auto: the most probable one.")
    ] = "auto",
    sigma: SigmaOption = "auto",
    model: ModelOption = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.")
    ] = False,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Show which pixels speak for a class (red) and against it (blue).

    The map says what each place of the picture adds to the logarithm of the class's
    probability, averaged over noise and shifts.
    """
    level = parse_sigma(sigma)
    if target == "none":
        raise UsageError("--class none leaves nothing to explain: give a class, or auto")
    keep_existing(output, overwrite)
    torch_device = start_torch(device, threads)
    from cdnctl import images
    from cdnctl.analysis.evidence import drawn, evidence
    from cdnctl.restore import noise_level, on_unit_scale
    from cdnctl.restore.plan import same_file
    from cdnctl.selection import Models

    suffix = output.suffix.lower()
    if suffix not in images.WRITE_SUFFIXES | NUMBERS:
        raise UsageError(f"-o {str(output)!r} must be a picture file, such as .png, or .npy")
    if same_file(source, output):
        raise UsageError(f"{str(source)!r} would overwrite itself: choose another output")
    label = None if target == "auto" else target
    models = Models(model, torch_device, [] if label is None else [label])
    image = images.read(source, pixel_limit(max_megapixels))
    image = on_unit_scale(image, parse_range(scale), str(source))
    height, width = image.samples.shape[:2]
    chosen = models.pick(height, width)
    noise = noise_level(image, sigma=level).sigma
    with progress(1, quiet):
        found = evidence(chosen, image.samples, noise, label)
    if suffix in NUMBERS:
        save_numbers(found.heat(height, width), output, overwrite)
    else:
        images.write(drawn(image, found), output, overwrite=overwrite)
    if not quiet:
        size = found.support.shape
        print(
            f"{shown(source)} -> {shown(output)}, evidence for {found.label} "
            f"(probability {found.posterior[found.label]:.1%}), model {chosen.name}"
            f"{_scale((size[0], size[1]), min(height, width) / min(size))}"
        )
