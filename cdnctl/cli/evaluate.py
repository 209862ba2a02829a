"""cdnctl evaluate."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import (
    PEAK,
    Device,
    Json,
    Quiet,
    Threads,
    keep_existing,
    note,
    parse_levels,
    print_table,
    progress,
    report_error,
    save,
    start_torch,
    warn,
)
from cdnctl.cli.plots import check_plot, curves, draw
from cdnctl.errors import ImageError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cdnctl.analysis.attacks import Attack, Budget, Robustness
    from cdnctl.analysis.ood import Separation
    from cdnctl.api import Model
    from cdnctl.measure.evaluate import Row, Sample, Summary
    from cdnctl.selection import Models

ROBUSTNESS, OOD = (
    "Robustness (instead of the scores)",
    "Out of distribution (instead of the scores)",
)
SYNTHETIC = "synthetic"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(evaluate)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Clean pictures: flat, or class folders.")],
    sigma: Annotated[
        str | None,
        typer.Option(
            "--sigma",
            help="Noise levels, 0..255: 15,25,50 or start:stop:step "
            "(default: 15,25,50; 0 with --attack; 0,25 with --ood).",
        ),
    ] = None,
    noisy: Annotated[
        Path | None, typer.Option("--noisy", help="Folder of noisy partners; adds no noise.")
    ] = None,
    clip: Annotated[
        bool,
        typer.Option("--clip", help="Clip noisy pictures and round them, as files of 8 bits do."),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="auto, a bundled model, a run folder, or a .safetensors file; repeat to compare.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all that is random.")] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only this many pictures, evenly spaced.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write a row per picture and noise level.")
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
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            help="Accuracy under attack, by norm and radius: linf:1,2,4,8,l2:0.25,0.5 (linf on "
            "the 0..255 scale, l2 for pixels in 0..1); square:8 is linf without gradients.",
            rich_help_panel=ROBUSTNESS,
        ),
    ] = None,
    attack_from: Annotated[
        str | None,
        typer.Option(
            "--attack-from",
            help="Make the changes on this model, and try them on --model.",
            rich_help_panel=ROBUSTNESS,
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option("--steps", min=1, help="Gradient steps.", rich_help_panel=ROBUSTNESS),
    ] = 40,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts", min=1, help="Starts, all but one random.", rich_help_panel=ROBUSTNESS
        ),
    ] = 5,
    queries: Annotated[
        int,
        typer.Option("--queries", min=1, help="Tries of square.", rich_help_panel=ROBUSTNESS),
    ] = 1000,
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            min=0,
            help="Attack the mean over this many fixed noises of --sigma (0: add none).",
            rich_help_panel=ROBUSTNESS,
        ),
    ] = 0,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            "--ood",
            help="How well scores tell FOLDER from these pictures (AUROC): another folder, or "
            "synthetic; repeatable.",
            rich_help_panel=OOD,
        ),
    ] = None,
) -> None:
    """Measure PSNR, SSIM and accuracy on folders of clean pictures.

    Noise is Gaussian, from a fixed seed, and not clipped unless --clip is given; results are
    clipped; scores are means over pictures. "-" stands for what cannot be measured; why is said
    before.
    """
    mode = "--attack" if attack else "--ood" if ood else None
    others = {
        "--noisy": noisy,
        "--clip": clip,
        "--csv": csv_file,
        "--plot": plot,
        "--ood": ood if attack else None,
    }
    for option, value in others.items():
        if mode and value:
            raise UsageError(f"{option} goes with the scores, not with {mode}")
    if noisy is not None and sigma is not None:
        raise UsageError(f"--sigma {sigma} is of noise to add, but --noisy pictures have theirs")
    if clip and noisy is not None:
        raise UsageError("--clip is about noise that is added, but --noisy pictures have theirs")
    if attack_from is not None and not attack:
        raise UsageError("--attack-from says where changes come from: give --attack as well")
    default = {"--attack": "0", "--ood": "0,25", None: "15,25,50"}[mode]
    levels = parse_levels(default if sigma is None else sigma)
    for path in filter(None, (csv_file, plot)):
        keep_existing(path, overwrite)
    if plot is not None:
        if noisy is not None:
            raise UsageError("--plot draws scores over sigma, but --noisy pictures have one each")
        check_plot(plot)
    torch_device = start_torch(device, threads)
    from cdnctl.selection import Models

    run = _Run(levels, seed, limit, as_json, quiet)
    for name in model or ["auto"]:
        run.add(Models(name, torch_device), folder, noisy)
    if attack:
        from cdnctl.analysis.attacks import Budget
        from cdnctl.api import load

        source = None if attack_from is None else load(attack_from, torch_device)
        budget = Budget(steps, restarts, queries)
        _measure_robustness(run, parse_attacks(attack), budget, draws, source)
    elif ood:
        _measure_ood(run, ood)
    else:
        rows = _measure_scores(run, noisy is not None, clip)
        if csv_file is not None:
            _write_csv(csv_file, rows, overwrite)
        if plot is not None:
            _draw(plot, run.table, overwrite)
    run.print()
    if run.failed:
        raise typer.Exit(1)


@dataclass
class _Run:
    """What all measurements share, and what they have found."""

    levels: list[float]  # in [0, 1]
    seed: int
    limit: int | None
    as_json: bool
    quiet: bool
    models: list[tuple[Model, list[Sample]]] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    reports: list[dict[str, Any]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)

    def add(self, models: Models, folder: Path, noisy: Path | None) -> None:
        """A model to measure, that which suits the first picture."""
        from cdnctl.measure.evaluate import find_samples
        from cdnctl.restore.plan import expand

        chosen = models.pick(*_first_size(expand([folder], recursive=True)))
        self.models.append((chosen, self.some(find_samples(folder, noisy, chosen))))

    def some(self, items: Sequence[Any]) -> list[Any]:
        """At most ``limit`` of them, evenly spaced."""
        if self.limit is None or self.limit >= len(items):
            return list(items)
        return [items[i * len(items) // self.limit] for i in range(self.limit)]

    def fail(self, error: str) -> None:
        """A file that cannot be read, reported once."""
        if error not in self.failed:
            self.failed.add(error)
            report_error(error)

    def report(
        self, model: Model, kind: str, rows: list[dict[str, Any]], protocol: Mapping[str, Any]
    ) -> None:
        """What was found of a model."""
        about = {"model": model.name, "weights": model.hash, "seed": self.seed, **protocol}
        self.reports.append({"protocol": about, kind: rows})
        self.table += [{"model": self.label(model), **row} for row in rows]

    def label(self, model: Model) -> str:
        """Its name, which weights files may share."""
        names = [m.name for m, _ in self.models]
        return model.name if names.count(model.name) == 1 else f"{model.name} {model.hash[:6]}"

    def print(self) -> None:
        """Everything, as JSON or as a table."""
        if self.as_json:
            for report in self.reports:
                print(json.dumps(report))
            return
        if self.table:
            _print_table(self.table)
        if not self.quiet:
            for report in self.reports:
                about = report["protocol"].items()
                print(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in about))


def _gaps(run: _Run, model: Model, samples: Sequence[Sample], paired: bool) -> Iterator[str]:
    """What will not be measured of a model, and why."""
    from cdnctl.core.joint import Corrector, HasPosterior

    about = f"model {model.name!r} ({model.header.arch})"
    folders = {sample.place.partition("/")[0] for sample in samples} - {""}
    if not isinstance(model.module, Corrector):
        yield f"no PSNR and SSIM of {about}, which does not denoise"
    elif not paired and 0 in run.levels:
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


def _measure_scores(run: _Run, paired: bool, clip: bool) -> list[dict[str, Any]]:
    """Scores of every model; the rows that they are means of."""
    from cdnctl.measure.evaluate import evaluate, summarise

    gaps = dict.fromkeys(gap for m, samples in run.models for gap in _gaps(run, m, samples, paired))
    if not run.quiet:
        for gap in gaps:
            note(gap)
    per_picture = 1 if paired else len(run.levels)
    every = []
    with progress(
        sum(len(s) for _, s in run.models) * per_picture, run.quiet, run.as_json
    ) as advance:
        for model, samples in run.models:
            rows = []
            for row in evaluate(samples, model, run.levels, run.seed, clip):
                rows.append(row)
                if row.error is not None:
                    run.fail(row.error)
                advance()
            made = "gaussian, clipped to 8 bits" if clip else "gaussian, not clipped"
            protocol = {
                "noise": "given" if paired else made,
                "output": "clipped to [0, 1], not rounded",
                "data_range": 1.0,
                "averaging": "mean of per-picture values",
            }
            run.report(model, "scores", [_scaled(s) for s in summarise(rows, paired)], protocol)
            every += [{"model": run.label(model), **_scaled(row)} for row in rows]
    return every


def _measure_robustness(
    run: _Run, attacks: Sequence[Attack], budget: Budget, draws: int, source: Model | None
) -> None:
    """Accuracy of every model under every attack at every noise level that it is told."""
    from cdnctl.analysis.attacks import robustness
    from cdnctl.measure.evaluate import read_pictures

    runs = sum(len(samples) for _, samples in run.models) * len(run.levels) * len(attacks)
    with progress(runs, run.quiet, run.as_json) as advance:
        for model, samples in run.models:
            if any(sample.label is None for sample in samples):
                raise UsageError(
                    "--attack needs folders named after classes of model "
                    f"{model.name!r}: {', '.join(model.classes)}"
                )
            pictures = [(x, str(s.label)) for s, x in read_pictures(samples, run.fail)]
            if not pictures:
                continue
            rows = []
            for sigma in run.levels:
                found = robustness(
                    pictures,
                    model,
                    attacks,
                    sigma,
                    budget=budget,
                    draws=draws,
                    source=source,
                    seed=run.seed,
                    advance=advance,
                )
                rows += [_robust_row(result) for result in found]
            protocol = {**asdict(budget), "draws": draws, "interval": "95 %, exact binomial"}
            if source is not None:
                protocol |= {"made_on": source.name, "made_on_weights": source.hash}
            run.report(model, "robustness", rows, protocol)


def _robust_row(result: Robustness) -> dict[str, Any]:
    """As a dict, with the noise level and l-inf radii on the command line's scale."""
    attack = result.attack
    return {
        "sigma": round(result.sigma * PEAK, 4),
        "attack": "none" if attack is None else attack.kind,
        "radius": 0.0 if attack is None else round(attack.radius * _unit(attack.kind), 6),
        "pictures": result.pictures,
        "robust_accuracy": result.accuracy,
        "interval": result.interval,
    }


def _measure_ood(run: _Run, others: Sequence[str]) -> None:
    """How well each score of each model tells other pictures from those of the folder."""
    from cdnctl.analysis.ood import fit, measure, separations, synthetic
    from cdnctl.measure.evaluate import Sample, read_pictures
    from cdnctl.restore.plan import expand

    foreign = {
        name: run.some([Sample(path) for path in expand([Path(name)], recursive=True)])
        for name in others
        if name != SYNTHETIC
    }
    for model, own in run.models:
        side, channels = model.header.patch, model.needs.channels
        sets = {
            name: [(s.key, fit(x, side, channels)) for s, x in read_pictures(samples, run.fail)]
            for name, samples in [("", own), *foreign.items()]
        }
        if SYNTHETIC in others:
            sets[SYNTHETIC] = list(synthetic(run.limit or len(own), side, channels, run.seed))
        rows = []
        count = sum(len(pictures) for pictures in sets.values()) * len(run.levels)
        with progress(count, run.quiet, run.as_json) as advance:
            for sigma in run.levels:
                inside, *outside = (
                    measure(model, pictures, sigma, run.seed, advance) for pictures in sets.values()
                )
                for name, found in zip(list(sets)[1:], outside, strict=True):
                    rows += [{"ood": name, **_scaled(s)} for s in separations(inside, found, sigma)]
        run.report(model, "ood", rows, {"size": side, "noise": "gaussian, not clipped"})


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
            raise UsageError(f"{part!r} in --attack is not KIND:RADIUS, such as linf:4 or l2:0.5")
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


def _unit(kind: str) -> float:
    """What a radius of an attack in [0, 1] pixel units is multiplied with to be shown."""
    return 1.0 if kind == "l2" else float(PEAK)


def _first_size(files: Sequence[Path]) -> tuple[int, int]:
    """Height and width of the first picture that can be read."""
    from cdnctl import images

    for path in files:
        with suppress(ImageError):
            pixels = images.read(path).samples
            return pixels.shape[0], pixels.shape[1]
    return 1, 1


def _scaled(item: Row | Summary | Separation) -> dict[str, Any]:
    """As a dict, with the noise level on the command line's scale."""
    values = asdict(item)
    if values["sigma"] is not None:
        values["sigma"] = round(values["sigma"] * PEAK, 4)
    return values


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], overwrite: bool) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    save(path, text.getvalue().encode(), overwrite)


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


_TITLES = {
    "model": "model",
    "ood": "other pictures",
    "sigma": "sigma",
    "attack": "attack",
    "radius": "radius",
    "score": "score",
    "pictures": "pictures",
    "others": "others",
    "psnr_noisy": "PSNR noisy",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "psnr_class": "PSNR, class told",
    "accuracy": "accuracy",
    "robust_accuracy": "accuracy",
    "interval": "95 % interval",
    "auroc": "AUROC",
}


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    shown = [k for k in _TITLES if any(k in row for row in rows)]
    if len({row["model"] for row in rows}) == 1:
        shown.remove("model")
    table = Table(*(Column(_TITLES[k], overflow="fold") for k in shown))
    for row in rows:
        table.add_row(*(escape(_cell(k, row[k])) for k in shown))
    print_table(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "as given" if name == "sigma" else "-"
    if isinstance(value, str):
        return value
    if name == "interval":
        return f"{100 * value[0]:.1f}-{value[1]:.1%}"
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    if name in ("pictures", "others", "sigma", "radius"):
        return f"{value:g}"
    return (
        f"{value:.4f}" if name == "ssim" else f"{value:.3f}" if name == "auroc" else f"{value:.2f}"
    )
