"""cdnctl explain: which pixels speak for a class, as a picture or as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.classify import seen_at
from cdnctl.cli.common import NUMBERS, keep_existing, save_numbers, shown, start_torch
from cdnctl.cli.options import (
    Device,
    MaxMegapixels,
    ModelOption,
    Quiet,
    RangeOption,
    SigmaOption,
    Threads,
    WithClasses,
    parse_range,
    parse_sigma,
    pixel_limit,
)
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError
from cdnctl.units import PEAK


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(explain)


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
    basis: Annotated[
        int | None,
        typer.Option(
            "--basis",
            min=1,
            help="Show instead so many patterns that are kept most, and as many that are taken "
            "for noise, of the middle of the picture, with the share of each that is kept.",
        ),
    ] = None,
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
    from cdnctl.analysis import basis as patterns
    from cdnctl.analysis.evidence import drawn, evidence
    from cdnctl.restore import noise_level, on_unit_scale
    from cdnctl.restore.plan import same_file
    from cdnctl.selection import Models

    suffix = output.suffix.lower()
    if suffix not in images.WRITE_SUFFIXES | NUMBERS:
        raise UsageError(f"-o {str(output)!r} must be a picture file, such as .png, or .npy")
    if same_file(source, output):
        raise UsageError(f"{str(source)!r} would overwrite itself: choose another output")
    if basis is not None and suffix in NUMBERS:
        raise UsageError(f"-o {str(output)!r}: --basis is drawn; give a picture file, such as .png")
    label = None if target == "auto" else target
    models = Models(model, torch_device, [] if label is None else [label])
    image = images.read(source, pixel_limit(max_megapixels))
    image = on_unit_scale(image, parse_range(scale), str(source))
    height, width = image.samples.shape[:2]
    chosen = models.pick(height, width)
    noise = noise_level(image, sigma=level).sigma
    if basis is not None:
        with progress(1, quiet):
            sheet, held = patterns.explained(image, chosen, noise, basis, label)
        images.write(sheet, output, overwrite=overwrite)
        if not quiet:
            kept = f"{held.dimension:.0f} of {held.top_vectors[0].numel()} values are kept"
            where = f"{shown(source)} -> {shown(output)}"
            print(f"{where}, sigma {noise * PEAK:.1f}, {kept}, model {chosen.name}")
        return
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
            f"{seen_at((size[0], size[1]), min(height, width) / min(size))}"
        )
