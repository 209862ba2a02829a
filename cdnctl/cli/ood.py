"""cdnctl ood: how well a model tells pictures of another kind from its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import start_torch
from cdnctl.cli.options import Device, Json, Quiet, Threads, parse_levels
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Folder, Levels, Limit, ModelsOption, Report, Seed
from cdnctl.cli.tables import Column, scaled

SYNTHETIC = "synthetic"

COLUMNS = {
    "ood": Column("other pictures"),
    "sigma": Column("sigma", "g"),
    "score": Column("score"),
    "pictures": Column("pictures"),
    "others": Column("others"),
    "auroc": Column("AUROC", ".3f"),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(ood)


def ood(
    folder: Folder,
    others: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders of pictures of another kind, or synthetic: simple ones, made up here.",
            show_default=SYNTHETIC,
        ),
    ] = None,
    sigma: Levels = "0,25",
    model: ModelsOption = None,
    seed: Seed = 0,
    limit: Limit = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how well a model tells pictures of another kind from those of FOLDER (AUROC).

    By log p(y), the norm of the score, the denoising error and the largest class probability,
    as far as the model gives them.
    """
    names = others or [SYNTHETIC]
    levels = parse_levels(sigma)
    torch_device = start_torch(device, threads)
    from cdnctl.analysis.ood import fit, measure, separations, synthetic
    from cdnctl.measure.evaluate import Sample, read_pictures
    from cdnctl.restore.plan import expand

    report = Report("ood", COLUMNS, seed, limit, as_json, quiet)
    report.add(model, torch_device, folder)
    foreign = {
        name: report.some([Sample(path) for path in expand([Path(name)], recursive=True)])
        for name in names
        if name != SYNTHETIC
    }
    for one, own in report.models:
        side, channels = one.header.patch, one.needs.channels
        sets = {
            name: [(s.key, fit(x, side, channels)) for s, x in read_pictures(samples, report.fail)]
            for name, samples in [("", own), *foreign.items()]
        }
        if SYNTHETIC in names:
            sets[SYNTHETIC] = list(synthetic(limit or len(own), side, channels, seed))
        rows = []
        count = sum(len(pictures) for pictures in sets.values()) * len(levels)
        with progress(count, quiet, as_json) as advance:
            for level in levels:
                inside, *outside = (
                    measure(one, pictures, level, seed, advance) for pictures in sets.values()
                )
                for name, found in zip(list(sets)[1:], outside, strict=True):
                    rows += [{"ood": name, **scaled(s)} for s in separations(inside, found, level)]
        report.tell(one, rows, {"size": side, "noise": "gaussian, not clipped"})
    report.finish()
