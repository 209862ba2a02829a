"""cdnctl classify: what pictures show, as probabilities of classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import note, start_torch
from cdnctl.cli.each import look_at_each
from cdnctl.cli.options import (
    Confidence,
    Device,
    Draws,
    Json,
    MaxMegapixels,
    ModelOption,
    Quiet,
    RangeOption,
    Recursive,
    SigmaOption,
    Threads,
    parse_sigma,
)
from cdnctl.cli.report import Seed
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.images import Image


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
    torch_device = start_torch(device, threads)
    from cdnctl.analysis.smoothing import certified, largest_radius
    from cdnctl.restore import classify
    from cdnctl.selection import Models

    models = Models(model, torch_device)

    def look(image: Image) -> tuple[dict[str, Any], str]:
        chosen = models.pick(*image.samples.shape[:2])
        found = classify(image, chosen, level)
        best = dict(list(found.posterior.items())[:top])
        record = {
            "model": chosen.name,
            "sigma": round(found.sigma * PEAK, 3),
            "scale": round(1 / found.factor, 4),
            "size": [found.size[1], found.size[0]],
            "classes": {k: round(v, 6) for k, v in best.items()},
        }
        listed = "  ".join(f"{name} {p:.1%}" for name, p in best.items())
        return record, f"{listed}{seen_at(found.size, found.factor)}"

    def look_for_certain(image: Image) -> tuple[dict[str, Any], str]:
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
    look_at_each(
        inputs,
        look if smoothing is None else look_for_certain,
        recursive=recursive,
        max_megapixels=max_megapixels,
        scale=scale,
        as_json=as_json,
        quiet=quiet,
    )


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
