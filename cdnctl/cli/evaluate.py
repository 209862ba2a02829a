"""cdnctl evaluate: PSNR, SSIM and accuracy on folders of clean pictures, and how the layers of a
network hold the classes apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import keep_existing, note, start_torch, warn
from cdnctl.cli.options import Device, EnsembleOption, Json, Quiet, Threads, parse_levels
from cdnctl.cli.plots import check_plot, curves, draw
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Folder, Limit, ModelsOption, Report, Seed
from cdnctl.cli.tables import Column, Row, scaled, write_csv
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cdnctl.api import Model
    from cdnctl.measure.evaluate import Sample

COLUMNS = {
    "sigma": Column("sigma", "g", missing="as given"),
    "pictures": Column("pictures"),
    "psnr_noisy": Column("PSNR noisy", ".2f"),
    "psnr": Column("PSNR", ".2f"),
    "ssim": Column("SSIM", ".4f"),
    "psnr_class": Column("PSNR, class told", ".2f"),
    "accuracy": Column("accuracy", ".2%"),
}

LAYERS = {
    "sigma": Column("sigma", "g"),
    "layer": Column("layer"),
    "pictures": Column("pictures"),
    "features": Column("features"),
    "between": Column("variance between classes", ".4g"),
    "within": Column("variance within a class", ".4g"),
    "fisher": Column("Fisher ratio", ".3f"),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(evaluate)


def evaluate(
    folder: Folder,
    sigma: Annotated[
        str | None,
        typer.Option(
            "--sigma",
            help="Noise levels, 0..255: 15,25,50 or start:stop:step.",
            show_default="15,25,50; 0 with --separation",
        ),
    ] = None,
    noisy: Annotated[
        Path | None, typer.Option("--noisy", help="Folder of noisy partners; adds no noise.")
    ] = None,
    clip: Annotated[
        bool,
        typer.Option("--clip", help="Clip noisy pictures and round them, as files of 8 bits do."),
    ] = False,
    model: ModelsOption = None,
    ensemble: EnsembleOption = 1,
    separation: Annotated[
        bool,
        typer.Option(
            "--separation",
            help="How far apart every layer holds the class folders, instead of scores.",
        ),
    ] = False,
    seed: Seed = 0,
    limit: Limit = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write a row per picture (or layer) and level.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw PSNR and accuracy over sigma: FILE.png.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure PSNR, SSIM and accuracy on folders of clean pictures.

    Noise is Gaussian, from a fixed seed, and not clipped unless --clip is given; results are
    clipped; scores are means over pictures. "-" stands for what cannot be measured; why is said
    before.
    """
    if noisy is not None and sigma is not None:
        raise UsageError(f"--sigma {sigma} is of noise to add, but --noisy pictures have theirs")
    if clip and noisy is not None:
        raise UsageError("--clip is about noise that is added, but --noisy pictures have theirs")
    for option, given in (("--noisy", noisy), ("--clip", clip), ("--plot", plot)):
        if separation and given:
            raise UsageError(f"{option} is about scores, but --separation measures layers instead")
    levels = parse_levels(("0" if separation else "15,25,50") if sigma is None else sigma)
    for path in filter(None, (csv_file, plot)):
        keep_existing(path, overwrite)
    if plot is not None:
        if noisy is not None:
            raise UsageError("--plot draws scores over sigma, but --noisy pictures have one each")
        check_plot(plot)
    torch_device = start_torch(device, threads)

    kind, columns = ("layers", LAYERS) if separation else ("scores", COLUMNS)
    report = Report(kind, columns, seed, limit, as_json, quiet)
    report.add(model, torch_device, folder, noisy, ensemble)
    if separation:
        rows = _separate(report, levels)
    else:
        rows = _measure(report, None if noisy is not None else levels, clip, ensemble)
    if csv_file is not None:
        write_csv(csv_file, rows, overwrite)
    if plot is not None:
        _draw(plot, report.table, overwrite)
    report.finish()


def _measure(
    report: Report, levels: Sequence[float] | None, clip: bool, ensemble: int
) -> list[Row]:
    """Scores of every model at noise levels in [0, 1], or with the noise that pictures have
    (None); the rows that they are means of."""
    from cdnctl.measure.evaluate import evaluate, summarise

    paired = levels is None
    gaps = dict.fromkeys(gap for m, samples in report.models for gap in _gaps(levels, m, samples))
    if not report.quiet:
        for gap in gaps:
            note(gap)
    per_picture = 1 if levels is None else len(levels)
    every: list[Row] = []
    with progress(
        sum(len(s) for _, s in report.models) * per_picture, report.quiet, report.as_json
    ) as advance:
        for (model, samples), camera in zip(report.models, report.cameras, strict=True):
            rows = []
            for row in evaluate(samples, model, levels or [], report.seed, clip, camera):
                rows.append(row)
                if row.error is not None:
                    report.fail(row.error)
                advance()
            made = "gaussian, clipped to 8 bits" if clip else "gaussian, not clipped"
            protocol = {
                "noise": "given" if paired else made,
                "output": "clipped to [0, 1], not rounded",
                "data_range": 1.0,
                "averaging": "mean of per-picture values",
            }
            if camera is not None:
                protocol["camera_noise"] = f"by model {camera.name}"
            if ensemble > 1:
                protocol["ensemble"] = ensemble
            report.tell(model, [scaled(s) for s in summarise(rows, paired)], protocol)
            every += [{"model": report.label(model), **scaled(row)} for row in rows]
    return every


def _separate(report: Report, levels: Sequence[float]) -> list[Row]:
    """How far apart the layers of every model hold the classes; the rows of the table."""
    from cdnctl.analysis.separation import measure
    from cdnctl.measure.evaluate import read_pictures

    runs = len(levels) * sum(len(samples) for _, samples in report.models)
    with progress(runs, report.quiet, report.as_json) as advance:
        for model, samples in report.models:
            if any(not sample.place for sample in samples):
                raise UsageError("--separation needs class folders: FOLDER/CLASS/*.png")
            pictures = [
                (s.key, x, s.place.partition("/")[0])
                for s, x in read_pictures(samples, report.fail)
            ]
            rows: list[Row] = []
            for sigma in levels:
                for layer, found in measure(model, pictures, sigma, report.seed, advance):
                    first = {"sigma": sigma, "layer": layer, "pictures": len(pictures)}
                    rows.append(scaled(found, **first))
            if not report.quiet and any(row["fisher"] is None for row in rows):
                wide = max(row["features"] for row in rows)
                note(
                    f"{len(pictures)} pictures are too few for the Fisher ratio of every layer of "
                    f"model {model.name!r}: for {wide} features it takes some {2 * wide}"
                )
            protocol = {"noise": "gaussian, not clipped", "features": "means over positions"}
            report.tell(model, rows, protocol)
    return report.table


def _gaps(levels: Sequence[float] | None, model: Model, samples: Sequence[Sample]) -> Iterator[str]:
    """What will not be measured of a model, and why."""
    from cdnctl.core.joint import Corrector, HasPosterior

    about = f"model {model.name!r} ({model.header.arch})"
    folders = {sample.place.partition("/")[0] for sample in samples} - {""}
    if not isinstance(model.module, Corrector):
        yield f"no PSNR and SSIM of {about}, which does not denoise"
    elif levels is not None and 0 in levels:
        yield "no PSNR and SSIM at sigma 0, where there is nothing to remove"
    if not isinstance(model.module, HasPosterior):
        yield f"no accuracy of {about}, which does not classify"
    elif not folders:
        yield "no accuracy, which takes folders named after classes"
    elif strange := sorted(folders - set(model.classes)):
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        yield (
            f"no accuracy of {about}, which does not know the class folders "
            f"{', '.join(strange[:3])}{more}; its classes: {', '.join(model.classes)}"
        )


def _draw(path: Path, table: Sequence[Mapping[str, Any]], overwrite: bool) -> None:
    """PSNR and accuracy of every model over sigma, as far as there is any."""
    titles = {"psnr": "PSNR (dB)", "accuracy": "accuracy"}
    models = list(dict.fromkeys(row["model"] for row in table))

    def panel(key: str, axes: Axes) -> None:
        scores: dict[str, dict[float, float]] = {model: {} for model in models}
        for row in table:
            if row[key] is not None:
                scores[row["model"]][row["sigma"]] = row[key]
        curves(axes, scores, titles[key])
        if key == "psnr":
            noisy = {row["sigma"]: row["psnr_noisy"] for row in table if row[key] is not None}
            axes.plot(list(noisy), list(noisy.values()), ":", c="gray", label="noisy")
        axes.legend()

    shown = [key for key in titles if any(row[key] is not None for row in table)]
    if not shown:
        warn(f"{str(path)!r} is not drawn: no score was measured")
        return
    draw(path, [partial(panel, key) for key in shown], overwrite)
