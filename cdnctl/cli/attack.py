"""cdnctl attack: accuracy under changes of the pictures that are made to mislead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import start_torch
from cdnctl.cli.options import Device, Json, Quiet, Threads, parse_levels
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Folder, Levels, Limit, ModelsOption, Report, Seed
from cdnctl.cli.tables import Column
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.analysis.attacks import Attack, Robustness

COLUMNS = {
    "sigma": Column("sigma", "g"),
    "attack": Column("attack"),
    "radius": Column("radius", "g"),
    "pictures": Column("pictures"),
    "robust_accuracy": Column("accuracy", ".2%"),
    "interval": Column("95 % interval", lambda ends: f"{100 * ends[0]:.1f}-{ends[1]:.1%}"),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(attack)


def attack(
    folder: Folder,
    radius: Annotated[
        list[str] | None,
        typer.Option(
            "--radius",
            help="How far pictures are changed, by norm: linf:1,2,4,8,l2:0.25,0.5 (linf on the "
            "0..255 scale, l2 for pixels in 0..1); square:8 is linf without gradients.",
            show_default="linf:1,2,4,8",
        ),
    ] = None,
    sigma: Levels = "0",
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            min=0,
            help="Attack the mean over this many fixed noises of --sigma (0: add none).",
        ),
    ] = 0,
    model: ModelsOption = None,
    made_on: Annotated[
        str | None,
        typer.Option("--from", help="Make the changes on this model, and try them on --model."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Gradient steps.")] = 40,
    restarts: Annotated[
        int, typer.Option("--restarts", min=1, help="Starts, all but one random.")
    ] = 5,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Tries of square.")] = 1000,
    seed: Seed = 0,
    limit: Limit = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy under changes of the pictures that are made to mislead.

    Projected gradient descent looks for the worst change within each radius.
    """
    levels = parse_levels(sigma)
    attacks = parse_attacks(radius or ["linf:1,2,4,8"])
    torch_device = start_torch(device, threads)
    from cdnctl.analysis.attacks import Budget, robustness
    from cdnctl.api import load
    from cdnctl.measure.evaluate import read_pictures

    report = Report("robustness", COLUMNS, seed, limit, as_json, quiet)
    report.add(model, torch_device, folder)
    source = None if made_on is None else load(made_on, torch_device)
    budget = Budget(steps, restarts, queries)
    runs = sum(len(samples) for _, samples in report.models) * len(levels) * len(attacks)
    with progress(runs, quiet, as_json) as advance:
        for one, samples in report.models:
            if any(sample.label is None for sample in samples):
                raise UsageError(
                    "attack needs folders named after classes of model "
                    f"{one.name!r}: {', '.join(one.classes)}"
                )
            pictures = [(x, str(s.label)) for s, x in read_pictures(samples, report.fail)]
            if not pictures:
                continue
            rows = []
            for level in levels:
                found = robustness(
                    pictures,
                    one,
                    attacks,
                    level,
                    budget=budget,
                    draws=draws,
                    source=source,
                    seed=seed,
                    advance=advance,
                )
                rows += [_row(result) for result in found]
            protocol = {**asdict(budget), "draws": draws, "interval": "95 %, exact binomial"}
            if source is not None:
                protocol |= {"made_on": source.name, "made_on_weights": source.hash}
            report.tell(one, rows, protocol)
    report.finish()


def parse_attacks(texts: Sequence[str]) -> list[Attack]:
    """Attacks such as linf:1,2,4,l2:0.5. Radii of linf and square are 0..255."""
    from cdnctl.analysis.attacks import Attack

    attacks, kind = [], ""
    for part in ",".join(texts).split(","):
        name, colon, number = part.strip().rpartition(":")
        kind = name if colon else kind
        try:
            radius = float(number)
        except ValueError:
            radius = math.nan
        if not kind or math.isnan(radius):
            raise UsageError(f"{part!r} in --radius is not KIND:RADIUS, such as linf:4 or l2:0.5")
        if kind == "l2" and radius > 10:
            raise UsageError(
                f"l2 radii are for pixels in 0..1: {radius:g} would allow anything; "
                f"did you mean l2:{radius / PEAK:.2g}?"
            )
        if kind != "l2" and 0 < radius < 0.2:
            raise UsageError(
                f"radii of {kind} are on the 0..255 scale: {radius:g} is next to nothing; "
                f"did you mean {kind}:{radius * PEAK:.2g}?"
            )
        attacks.append(Attack(kind, radius / _unit(kind)))
    return attacks


def _row(result: Robustness) -> dict[str, Any]:
    """As a row, with the noise level and l-inf radii on the command line's scale."""
    attack = result.attack
    return {
        "sigma": round(result.sigma * PEAK, 4),
        "attack": "none" if attack is None else attack.kind,
        "radius": 0.0 if attack is None else round(attack.radius * _unit(attack.kind), 6),
        "pictures": result.pictures,
        "robust_accuracy": result.accuracy,
        "interval": result.interval,
    }


def _unit(kind: str) -> float:
    """What a radius of an attack in [0, 1] pixel units is multiplied with to be shown."""
    return 1.0 if kind == "l2" else float(PEAK)
