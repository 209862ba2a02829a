"""cdnctl evaluate."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import (
    PEAK,
    Device,
    Json,
    ModelOption,
    Quiet,
    Threads,
    parse_sigmas,
    progress,
    report_error,
    start_torch,
)
from cdnctl.errors import ImageError, UsageError

if TYPE_CHECKING:
    from cdnctl.evaluate import Row, Summary


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(evaluate)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Clean pictures: flat, or class folders.")],
    sigma: Annotated[
        str, typer.Option("--sigma", help="Noise levels to add, 0..255, comma-separated.")
    ] = "15,25,50",
    noisy: Annotated[
        Path | None, typer.Option("--noisy", help="Folder of noisy partners; adds no noise.")
    ] = None,
    model: ModelOption = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only this many pictures, evenly spaced.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write a row per picture and noise level.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure PSNR, SSIM and accuracy on folders of clean pictures.

    Noise is Gaussian, from a fixed seed, not clipped; results are clipped; scores are
    means over pictures.
    """
    levels = parse_sigmas(sigma)
    torch_device = start_torch(device, threads)
    from cdnctl.evaluate import evaluate, find_samples, summarise
    from cdnctl.restore import expand
    from cdnctl.selection import Models

    models = Models(model, torch_device)
    chosen = models.pick(*_first_size(expand([folder], recursive=True)))
    samples = find_samples(folder, noisy, chosen)
    if limit is not None and limit < len(samples):
        samples = [samples[i * len(samples) // limit] for i in range(limit)]
    rows = []
    per_picture = 1 if noisy else len(levels)
    with progress(len(samples) * per_picture, quiet) as advance:
        for row in evaluate(samples, chosen, levels, seed):
            rows.append(row)
            if row.error is not None:
                report_error(row.error)
            advance()
    summary = summarise(rows, paired=noisy is not None)
    if csv_file is not None:
        _write_csv(csv_file, rows)
    protocol = {
        "model": chosen.name,
        "weights": chosen.hash,
        "seed": seed,
        "noise": "gaussian, not clipped" if noisy is None else "given",
        "output": "clipped to [0, 1], not rounded",
        "data_range": 1.0,
        "averaging": "mean of per-picture values",
    }
    if as_json:
        print(json.dumps({"protocol": protocol, "scores": [_scaled(s) for s in summary]}))
    else:
        _table(summary)
        if not quiet:
            print(", ".join(f"{k} {v}" for k, v in protocol.items()))
    if any(row.error for row in rows):
        raise typer.Exit(1)


def _first_size(files: Sequence[Path]) -> tuple[int, int]:
    """Height and width of the first picture that can be read."""
    from cdnctl import images

    for path in files:
        with suppress(ImageError):
            pixels = images.read(path).pixels
            return pixels.shape[0], pixels.shape[1]
    return 1, 1


def _scaled(item: Row | Summary) -> dict[str, object]:
    """As a dict, with the noise level on the command line's scale."""
    values = asdict(item)
    if values["sigma"] is not None:
        values["sigma"] = round(values["sigma"] * PEAK, 4)
    return values


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    from cdnctl.checkpoints import write_atomically
    from cdnctl.evaluate import Row

    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)])
    writer.writeheader()
    writer.writerows(_scaled(row) for row in rows)
    try:
        write_atomically(path, text.getvalue().encode())
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _table(summary: Sequence[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {
        "sigma": "sigma",
        "pictures": "pictures",
        "psnr_noisy": "PSNR noisy",
        "psnr": "PSNR",
        "ssim": "SSIM",
        "psnr_class": "PSNR, class told",
        "accuracy": "accuracy",
    }
    rows = [_scaled(s) for s in summary]
    shown = [k for k in columns if any(r[k] is not None for r in rows)]
    table = Table(*(columns[k] for k in shown))
    for row in rows:
        table.add_row(*(_cell(k, row[k]) for k in shown))
    Console(highlight=False).print(table)


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name == "accuracy":
        return f"{value:.2%}"
    if name in ("pictures", "sigma"):
        return f"{value:g}"
    return f"{value:.4f}" if name == "ssim" else f"{value:.2f}"
