"""cdnctl classify: what pictures show, as probabilities of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import keep_existing, note, start_torch
from cdnctl.cli.each import Told, look_at_each
from cdnctl.cli.options import (
    Confidence,
    Device,
    Draws,
    Json,
    MaxMegapixels,
    ModelOption,
    Overwrite,
    Quiet,
    RangeOption,
    Recursive,
    SigmaOption,
    Threads,
    parse_sigma,
)
from cdnctl.cli.report import Seed
from cdnctl.cli.tables import write_csv
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.images import Image


TOGETHER = 64  # pictures that are read before they are classified


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(classify)


def classify(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders.")],
    sigma: SigmaOption = "auto",
    model: ModelOption = "auto",
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to show.")] = 1,
    certify: Annotated[
        str | None,
        typer.Option(
            "--certify",
            metavar="SIGMA",
            help="Randomised smoothing: the class under noise of this level, 0..255, and the "
            "radius within which no change of the picture alters it.",
        ),
    ] = None,
    draws: Draws = 1000,
    confidence: Confidence = 0.999,
    seed: Seed = 0,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write a row per picture as well.")
    ] = None,
    overwrite: Overwrite = False,
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
    smoothing = None if certify is None else smoothing_level(certify)
    if smoothing is not None and level is not None:
        raise UsageError(
            f"--certify {certify} adds noise of its own to the picture as it is: leave out "
            f"--sigma {sigma}"
        )
    if csv_file is not None:
        keep_existing(csv_file, overwrite)
    torch_device = start_torch(device, threads)
    from cdnctl.analysis.smoothing import certified, largest_radius
    from cdnctl.restore import Classified, Seen, classify_together, seen
    from cdnctl.selection import Models

    models = Models(model, torch_device)

    def look(image: Image) -> Seen:
        return seen(image, models.pick(*image.samples.shape[:2]), level)

    def tell(pictures: Sequence[Seen]) -> list[Told]:
        found = classify_together(pictures)
        return [said(*one) for one in zip(pictures, found, strict=True)]

    def said(picture: Seen, found: Classified) -> Told:
        best = dict(list(found.posterior.items())[:top])
        record = {
            "model": picture.view.model.name,
            "sigma": round(found.sigma * PEAK, 3),
            "scale": round(1 / found.factor, 4),
            "size": [found.size[1], found.size[0]],
            "classes": {k: round(v, 6) for k, v in best.items()},
        }
        listed = "  ".join(f"{name} {p:.1%}" for name, p in best.items())
        return record, f"{listed}{seen_at(found.size, found.factor)}"

    def look_for_certain(image: Image) -> Told:
        assert smoothing is not None
        chosen = models.pick(*image.samples.shape[:2])
        found = certified(image, chosen, smoothing, draws, confidence, seed)
        label = None if found.label is None else chosen.classes[found.label]
        record = {
            "model": chosen.name,
            "sigma": round(smoothing * PEAK, 3),
            "class": label,
            "radius": round(found.radius, 6),
            "probability": round(found.lower, 6),
            "draws": draws,
            "confidence": confidence,
            "seed": seed,
        }
        if label is None:
            return record, "abstains: no class has certainly half of the answers under such noise"
        return record, f"{label}, certified within l2 {found.radius:.3f} of pixels in 0..1"

    if smoothing is not None and not quiet:
        most = largest_radius(draws, smoothing, confidence)
        note(f"{draws} draws certify a radius of {most:.2f} at most, in pixels of the size seen")
    rows: list[dict[str, Any]] = []

    def note_row(path: Path, record: dict[str, Any]) -> None:
        rows.append({"input": str(path)} | row_of(record))

    def finish() -> None:
        if csv_file is not None:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            write_csv(csv_file, [{key: row.get(key) for key in columns} for row in rows], overwrite)

    look_at = partial(
        look_at_each,
        inputs,
        recursive=recursive,
        max_megapixels=max_megapixels,
        scale=scale,
        as_json=as_json,
        quiet=quiet,
        only_print=csv_file is None,
        record_of=note_row,
        finish=finish,
    )
    if smoothing is None:
        look_at(look, tell, together=TOGETHER)
    else:
        look_at(look_for_certain)


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a picture as a row of a table: classes, most probable first, and sizes in
    columns of their own."""
    row: dict[str, Any] = {}
    for key, value in record.items():
        if key == "classes":
            for place, (name, share) in enumerate(value.items(), 1):
                number = "" if place == 1 else f"_{place}"
                row |= {f"class{number}": name, f"probability{number}": share}
        elif key == "size":
            row |= {"width": value[0], "height": value[1]}
        else:
            row[key] = value
    return row


def smoothing_level(text: str) -> float:
    """The level of --certify, in [0, 1]."""
    try:
        sigma = parse_sigma(text)
    except UsageError as error:
        raise UsageError(f"--certify: {error}") from None
    if not sigma:
        raise UsageError(f"--certify is {text!r}, but must be a noise level such as 64")
    return sigma


def seen_at(size: tuple[int, int], factor: float) -> str:
    """At which size (height, width) a picture was looked at, if not its own."""
    return f", seen at {size[1]} x {size[0]} pixels (1/{factor:.3g})" if factor > 1 else ""
