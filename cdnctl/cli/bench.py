"""cdnctl bench: models beside classical methods: quality, time, memory, price of gradients."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli import claims
from cdnctl.cli.claims import show
from cdnctl.cli.common import keep_existing, start_torch, stderr
from cdnctl.cli.options import Json, Threads, parse_levels
from cdnctl.cli.plots import check_plot, curves, draw
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Levels
from cdnctl.cli.tables import Column, print_table, scaled
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cdnctl.measure.benchmark import Quality

SECONDS = {"seconds_per_megapixel": Column("s per megapixel", ".2f")}
MEMORY = {"peak_mb": Column("peak MB", ".0f")}

app = typer.Typer(
    help="Compare models and classical methods, in one run each.", no_args_is_help=True
)

Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        help="Only these, comma-separated; run folders and weights files are methods, too.",
        show_default="all",
    ),
]


def register(parent: typer.Typer, panel: str) -> None:
    """Add the commands to the app."""
    claims.register(app)
    parent.add_typer(app, name="bench", rich_help_panel=panel)


@app.command()
def quality(
    folder: Annotated[Path, typer.Argument(help="Clean pictures.")],
    sigma: Levels = "15,25,50",
    methods: Methods = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw PSNR over sigma, and beside its time: FILE.png."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a plot that exists.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """PSNR, SSIM, time and peak memory on a folder of clean pictures."""
    levels = parse_levels(sigma)
    if 0 in levels:
        raise UsageError(f"sigma 0 in {sigma!r} leaves nothing to remove: give levels above it")
    if plot is not None:
        keep_existing(plot, overwrite)
        check_plot(plot)
    start_torch("cpu", threads)
    from cdnctl.measure.benchmark import quality
    from cdnctl.measure.methods import YARDSTICKS
    from cdnctl.restore.plan import expand

    names = _chosen(methods)
    files = expand([folder], recursive=True)
    if methods is not None and set(names) <= set(YARDSTICKS):
        raise UsageError(f"{names[0]!r} has random weights: it has a speed, but no quality")
    names = [n for n in names if n not in YARDSTICKS]
    rows = []
    with progress(len(files) * len(names) * len(levels), quiet=False, as_json=as_json) as advance:
        for row in quality(files, names, levels, threads=threads, watch=advance):
            rows.append(row)
            # Printed as plain text, which the bar makes room for.
            line = f"{row.method}, sigma {_level(row):g}: {row.psnr:.2f} dB"
            print(line, file=sys.stderr, flush=True)
    if plot is not None:
        _draw(plot, rows, overwrite)
    scores = {"psnr": Column("PSNR", ".2f"), "ssim": Column("SSIM", ".4f")}
    columns = {"method": Column("method"), "sigma": Column("sigma", "g")} | scores
    show(columns | SECONDS | MEMORY, [scaled(r) for r in rows], as_json)


@app.command()
def cost(
    megapixels: Annotated[
        str, typer.Option("--megapixels", help="Sizes of the pictures, comma-separated.")
    ] = "0.25,4",
    methods: Methods = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time and peak memory by the size of the picture."""
    try:
        sizes = [float(m) for m in megapixels.split(",")]
    except ValueError:
        raise UsageError(f"--megapixels is {megapixels!r}, but must be numbers: 0.25,4") from None
    start_torch("cpu", threads)
    from cdnctl.measure.benchmark import cost
    from cdnctl.measure.methods import REFERENCE

    costs = []
    for item in cost(_chosen(methods), sizes, threads):
        costs.append(item)
        stderr().print(f"{item.method}, {item.megapixels:g} megapixels: done")
    if as_json:
        print(json.dumps([asdict(c) for c in costs]))
        return
    yardstick = {c.megapixels: c.seconds_per_megapixel for c in costs if c.method == REFERENCE}
    rows = []
    for c in costs:
        reference = yardstick.get(c.megapixels)
        ratio = None if reference is None else c.seconds_per_megapixel / reference
        rows.append(asdict(c) | {"relative": ratio})
    columns = {"megapixels": Column("megapixels", "g"), "method": Column("method")}
    relative = {"relative": Column(f"relative to {REFERENCE}", ".2f")}
    print_table(columns | SECONDS | relative | MEMORY, rows)


@app.command()
def folders(threads: Threads = None, as_json: Json = False) -> None:
    """Folders of pictures as denoise does them, against a plain loop."""
    start_torch("cpu", threads)
    from cdnctl.measure.benchmark import throughput

    columns = {
        "pictures": Column("pictures"),
        "count": Column("count"),
        "plain": Column("plain loop, per s", ".2f"),
        "batch": Column("cdnctl, per s", ".2f"),
        "ratio": Column("ratio", ".2f"),
    }
    show(columns, [asdict(r) | {"ratio": r.ratio} for r in throughput(threads=threads)], as_json)


@app.command()
def gradient(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Of whose shape: a bundled model, a run folder, or a weights file; repeatable.",
            show_default="photo",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """What the gradient of log p(y) costs: written out, by autograd, and beside an equal UNet."""
    start_torch("cpu", threads)
    from cdnctl.checkpoints import find_weights, read_header
    from cdnctl.measure.gradient import ratios

    rows = []
    for header in [read_header(find_weights(name)) for name in model or ["photo"]]:
        for row in ratios(header):
            rows.append(asdict(row))
            stderr().print(f"{row.model}, {row.task}, {row.precision}, {row.way}: {row.ratio:.2f}")
    columns = {name: Column(name) for name in ("model", "task", "precision", "way")}
    ratio = {"ratio": Column("ratio", ".2f"), "reference": Column("to")}
    show(columns | SECONDS | ratio, rows, as_json)


def _chosen(methods: str | None) -> list[str]:
    """The methods that are named, comma-separated, or all (None). UsageError for unknown ones."""
    from cdnctl.checkpoints import find_weights, read_header
    from cdnctl.measure.methods import available

    names = available()
    if methods is None:
        return names
    wanted = methods.split(",")
    own = [name for name in dict.fromkeys(wanted) if name not in names]
    if unknown := [name for name in own if not name or not Path(name).exists()]:
        raise UsageError(
            f"--methods {methods!r} names the unknown {', '.join(map(repr, sorted(unknown)))}; "
            f"known: {', '.join(names)}, and run folders and weights files"
        )
    for name in own:
        read_header(find_weights(name))
    return [n for n in names if n in wanted] + own


def _level(row: Quality) -> float:
    """The noise level on the command line's scale."""
    return round(row.sigma * PEAK, 4)


def _draw(path: Path, rows: Sequence[Quality], overwrite: bool) -> None:
    """PSNR over sigma, and PSNR at the middle one of the levels over the time it takes."""
    methods = list(dict.fromkeys(row.method for row in rows))
    levels = sorted({row.sigma for row in rows})
    middle = [row for row in rows if row.sigma == levels[len(levels) // 2]]

    def quality(axes: Axes) -> None:
        scores: dict[str, dict[float, float]] = {name: {} for name in methods}
        for row in sorted(rows, key=lambda row: row.sigma):
            scores[row.method][_level(row)] = row.psnr
        curves(axes, scores, "PSNR (dB)")
        axes.legend()

    def price(axes: Axes) -> None:
        for row in middle:
            place = row.seconds_per_megapixel, row.psnr
            color = f"C{methods.index(row.method)}"
            axes.plot(*place, "o", c=color)

            def apart(other: Quality, row: Quality = row) -> float:
                return abs(math.log(other.seconds_per_megapixel / row.seconds_per_megapixel))

            # A name goes above or below its point, away from the method that is closest in time.
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
        axes.set_ylabel(f"PSNR (dB) at sigma {_level(middle[0]):g}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.2)

    draw(path, [quality, price], overwrite)
