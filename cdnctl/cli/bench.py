"""cdnctl bench."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import (
    PEAK,
    Json,
    Threads,
    keep_existing,
    parse_levels,
    print_table,
    progress,
    start_torch,
    stderr,
)
from cdnctl.cli.plots import check_plot, curves, draw
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cdnctl.measure.benchmark import Cost, Quality


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(bench)


def bench(
    folder: Annotated[
        Path | None, typer.Argument(help="Clean pictures to compare quality on.")
    ] = None,
    sigma: Annotated[
        str, typer.Option("--sigma", help="Noise levels, 0..255: 15,25,50 or start:stop:step.")
    ] = "15,25,50",
    megapixels: Annotated[
        str, typer.Option("--megapixels", help="Picture sizes for time and memory.")
    ] = "0.25,4",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Only these, comma-separated; run folders and weights files are methods, too.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw quality on FOLDER over sigma, and beside its time: FILE.png."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a plot that exists.")
    ] = False,
    folders: Annotated[
        bool, typer.Option("--folders", help="Time folders of pictures against a plain loop.")
    ] = False,
    gradient: Annotated[
        bool,
        typer.Option(
            "--gradient", help="Time the gradient network beside autograd and an equal UNet."
        ),
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare models and classical methods, in one run: quality on a folder, or time and memory."""
    chosen = {"FOLDER": folder is not None, "--folders": folders, "--gradient": gradient}
    if sum(chosen.values()) > 1:
        raise UsageError(f"give one of {', '.join(k for k, v in chosen.items() if v)} at a time")
    levels = parse_levels(sigma)
    if 0 in levels:
        raise UsageError(f"sigma 0 in {sigma!r} leaves nothing to remove: give levels above it")
    if plot is not None:
        if folder is None:
            raise UsageError("--plot draws quality: give a FOLDER of clean pictures")
        keep_existing(plot, overwrite)
        check_plot(plot)
    start_torch("cpu", threads)
    from cdnctl.checkpoints import find_weights, read_header
    from cdnctl.measure.benchmark import cost, quality
    from cdnctl.measure.methods import REFERENCE, YARDSTICKS, available
    from cdnctl.restore.plan import expand

    names = available()
    if methods is not None:
        wanted = methods.split(",")
        own = [name for name in dict.fromkeys(wanted) if name not in names]
        if unknown := [name for name in own if not name or not Path(name).exists()]:
            raise UsageError(
                f"--methods {methods!r} names the unknown {', '.join(map(repr, sorted(unknown)))}; "
                f"known: {', '.join(names)}, and run folders and weights files"
            )
        for name in own:
            read_header(find_weights(name))
        names = [n for n in names if n in wanted] + own
    if folders:
        _throughput(as_json, threads)
        return
    if gradient:
        _gradient(names if methods is not None else ["photo"], as_json)
        return
    if folder is not None:
        files = expand([folder], recursive=True)
        if methods is not None and set(names) <= set(YARDSTICKS):
            raise UsageError(f"{names[0]!r} has random weights: it has a speed, but no quality")
        names = [n for n in names if n not in YARDSTICKS]
        rows = []
        with progress(
            len(files) * len(names) * len(levels), quiet=False, as_json=as_json
        ) as advance:
            for row in quality(files, names, levels, threads=threads, watch=advance):
                rows.append(row)
                # Printed as plain text, which the bar makes room for.
                line = f"{row.method}, sigma {_scaled(row):g}: {row.psnr:.2f} dB"
                print(line, file=sys.stderr, flush=True)
        if plot is not None:
            _draw(plot, rows, overwrite)
        if as_json:
            print(json.dumps([asdict(r) | {"sigma": _scaled(r)} for r in rows]))
        else:
            _quality_table(rows)
        return
    try:
        sizes = [float(m) for m in megapixels.split(",")]
    except ValueError:
        raise UsageError(f"--megapixels is {megapixels!r}, but must be numbers: 0.25,4") from None
    costs = []
    for item in cost(names, sizes, threads):
        costs.append(item)
        stderr().print(f"{item.method}, {item.megapixels:g} megapixels: done")
    if as_json:
        print(json.dumps([asdict(c) for c in costs]))
    else:
        _cost_table(costs, REFERENCE)


def _throughput(as_json: bool, threads: int | None) -> None:
    from rich.table import Table

    from cdnctl.measure.benchmark import throughput

    rows = list(throughput(threads=threads))
    if as_json:
        print(json.dumps([asdict(r) | {"ratio": r.ratio} for r in rows]))
        return
    table = Table("pictures", "count", "plain loop, per s", "cdnctl, per s", "ratio")
    for r in rows:
        cells = (r.pictures, r.count, f"{r.plain:.2f}", f"{r.batch:.2f}", f"{r.ratio:.2f}")
        table.add_row(*map(str, cells))
    print_table(table)


def _gradient(names: Sequence[str], as_json: bool) -> None:
    from rich.table import Table

    from cdnctl.checkpoints import bundled, find_weights, read_header
    from cdnctl.measure.gradient import ratios
    from cdnctl.measure.methods import is_model

    if foreign := [name for name in names if not is_model(name)]:
        raise UsageError(f"{foreign[0]!r} has no gradient: give some of {', '.join(bundled())}")
    rows = []
    for name in names:
        for row in ratios(read_header(find_weights(name))):
            rows.append(row)
            stderr().print(f"{row.model}, {row.task}, {row.precision}, {row.way}: {row.ratio:.2f}")
    if as_json:
        print(json.dumps([asdict(r) for r in rows]))
        return
    table = Table("model", "task", "precision", "way", "s per megapixel", "ratio", "to")
    for r in rows:
        seconds = f"{r.seconds_per_megapixel:.2f}"
        cells = (r.model, r.task, r.precision, r.way, seconds, f"{r.ratio:.2f}", r.reference)
        table.add_row(*cells)
    print_table(table)


def _quality_table(rows: Sequence[Quality]) -> None:
    from rich.table import Table

    table = Table("method", "sigma", "PSNR", "SSIM", "s per megapixel", "peak MB")
    for r in rows:
        ssim = "-" if r.ssim is None else f"{r.ssim:.4f}"
        level, psnr = f"{_scaled(r):g}", f"{r.psnr:.2f}"
        seconds, peak = f"{r.seconds_per_megapixel:.2f}", f"{r.peak_mb:.0f}"
        table.add_row(r.method, level, psnr, ssim, seconds, peak)
    print_table(table)


def _draw(path: Path, rows: Sequence[Quality], overwrite: bool) -> None:
    """PSNR over sigma, and PSNR at the middle one of the levels over the time it takes."""
    methods = list(dict.fromkeys(row.method for row in rows))
    levels = sorted({row.sigma for row in rows})
    middle = [row for row in rows if row.sigma == levels[len(levels) // 2]]

    def quality(axes: Axes) -> None:
        scores: dict[str, dict[float, float]] = {name: {} for name in methods}
        for row in sorted(rows, key=lambda row: row.sigma):
            scores[row.method][_scaled(row)] = row.psnr
        curves(axes, scores, "PSNR (dB)")
        axes.legend()

    def price(axes: Axes) -> None:
        for row in middle:
            place = row.seconds_per_megapixel, row.psnr
            color = f"C{methods.index(row.method)}"
            axes.plot(*place, "o", c=color)

            def apart(other: Quality, row: Quality = row) -> float:
                return abs(math.log(other.seconds_per_megapixel / row.seconds_per_megapixel))

            # Names keep out of each other's way: away from who is next in time.
            others = [other for other in middle if other is not row]
            above = all(row.psnr >= other.psnr for other in sorted(others, key=apart)[:1])
            axes.annotate(
                row.method,
                place,
                (0, 8 if above else -15),
                textcoords="offset points",
                ha="center",
                color=color,
            )
        axes.set(xscale="log", xlabel="seconds per megapixel")
        axes.set_ylabel(f"PSNR (dB) at sigma {_scaled(middle[0]):g}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.2)

    draw(path, [quality, price], overwrite)


def _scaled(row: Quality) -> float:
    """The noise level on the command line's scale."""
    return round(row.sigma * PEAK, 4)


def _cost_table(rows: Sequence[Cost], reference: str) -> None:
    from rich.table import Table

    table = Table("megapixels", "method", "s per megapixel", f"relative to {reference}", "peak MB")
    for r in rows:
        yardstick = [
            c.seconds_per_megapixel
            for c in rows
            if c.method == reference and c.megapixels == r.megapixels
        ]
        ratio = f"{r.seconds_per_megapixel / yardstick[0]:.2f}" if yardstick else "-"
        table.add_row(
            f"{r.megapixels:g}",
            r.method,
            f"{r.seconds_per_megapixel:.2f}",
            ratio,
            f"{r.peak_mb:.0f}",
        )
    print_table(table)
