"""cdnctl certify."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import start_torch, warn
from cdnctl.cli.options import Confidence, Device, Draws, Json, Quiet, Threads, parse_levels
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Folder, Levels, Limit, ModelsOption, Report, Seed
from cdnctl.cli.tables import Column
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.analysis.smoothing import Certificate

COLUMNS = {
    "sigma": Column("sigma", "g"),
    "radius": Column("radius", "g"),
    "pictures": Column("pictures"),
    "certified_accuracy": Column("certified accuracy", ".2%"),
    "interval": Column("95 % interval", lambda ends: f"{100 * ends[0]:.1f}-{ends[1]:.1%}"),
    "abstained": Column("abstained", ".2%"),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(certify)


def certify(
    folder: Folder,
    sigma: Levels = "64",
    radius: Annotated[
        str, typer.Option("--radius", help="Of changes, in l2 of pixels in 0..1.")
    ] = "0,0.25,0.5,0.75",
    draws: Draws = 1000,
    confidence: Confidence = 0.999,
    model: ModelsOption = None,
    seed: Seed = 0,
    limit: Limit = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the accuracy that no change within a radius can take away.

    Randomised smoothing: the most frequent class under noise of --sigma counts as right within a
    radius if it is the true one, and certainly the most frequent up to there.
    """
    levels = parse_levels(sigma)
    radii = parse_radii(radius)
    torch_device = start_torch(device, threads)
    from cdnctl.analysis.smoothing import certified, check_smoothing, largest_radius
    from cdnctl.images import Image
    from cdnctl.measure.evaluate import read_pictures

    report = Report("certified", COLUMNS, seed, limit, as_json, quiet)
    report.add(model, torch_device, folder)
    for one, samples in report.models:
        if any(sample.label is None for sample in samples):
            raise UsageError(
                "certify needs folders named after classes of model "
                f"{one.name!r}: {', '.join(one.classes)}"
            )
        for level in levels:
            check_smoothing(one, level, draws, confidence)
    for level in levels:
        most = largest_radius(draws, level, confidence)
        if max(radii) > most and not quiet:
            warn(
                f"{draws} draws at sigma {level * PEAK:g} certify no more than {most:.3f} "
                "in pictures that are not shrunk: give more --draws"
            )
    runs = sum(len(samples) for _, samples in report.models) * len(levels)
    with progress(runs, quiet, as_json) as advance:
        for one, samples in report.models:
            rows = []
            for level in levels:
                found: list[tuple[int, Certificate]] = []
                for sample, pixels in read_pictures(samples, report.fail):
                    image = Image(pixels)
                    label = one.classes.index(str(sample.label))
                    # Each picture has noise of its own: the same would make chance common to all.
                    own = zlib.crc32(f"{sample.key} {seed}".encode())
                    found.append((label, certified(image, one, level, draws, confidence, own)))
                    advance()
                rows += [_row(found, level, r) for r in radii if found]
            protocol = {
                "draws": draws,
                "confidence": confidence,
                "interval": "95 %, exact binomial, for the draw of pictures",
            }
            report.tell(one, rows, protocol)
    report.finish()


def _row(found: list[tuple[int, Certificate]], sigma: float, radius: float) -> dict[str, Any]:
    """How many are right and stay so within a radius."""
    from cdnctl.core.metrics import interval

    right = sum(c.label == label and c.radius >= radius for label, c in found)
    return {
        "sigma": round(sigma * PEAK, 4),
        "radius": radius,
        "pictures": len(found),
        "certified_accuracy": right / len(found),
        "interval": interval(right, len(found)),
        "abstained": sum(c.label is None for _, c in found) / len(found),
    }


def parse_radii(text: str) -> list[float]:
    """Radii such as 0.25,0.5, for pixels in [0, 1]."""
    try:
        radii = sorted({float(part) for part in text.split(",")})
    except ValueError:
        radii = []
    if not radii or not all(0 <= r <= 10 for r in radii):
        raise UsageError(f"--radius is {text!r}, but must be numbers from 0 to 10: 0.25,0.5")
    return radii
