"""cdnctl compare: whether two models, of different pictures, have come to the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import keep_existing, start_torch
from cdnctl.cli.likeness import measure, tell, training_config
from cdnctl.cli.options import Device, Json, Quiet, Threads, parse_levels
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Levels, Limit, Report, Seed
from cdnctl.cli.tables import Column, Row, plain, print_table, protocol
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cdnctl.api import Model
    from cdnctl.training.datasets import Pictures

    Named = list[tuple[str, np.ndarray]]  # pictures by what their noise depends on

AGREEMENT = {
    "sigma": Column("sigma", "g"),
    "psnr_a": Column("PSNR of A", ".2f"),
    "psnr_b": Column("PSNR of B", ".2f"),
    "own_a": Column("on its own pictures", ".2f"),
    "own_b": Column("on its own pictures", ".2f"),
    "cosine": Column("cosine of residuals", ".4f"),
    "share": Column("variance in the error", ".1%"),
    "uncertain": Column("+-", ".1%"),
    "gain": Column("its loss in dB", ".2f"),
}
DRAWN = {
    "sample": Column("sample"),
    "likeness": Column("A and B", ".2f"),
    "nearest_a": Column("A and its nearest picture", ".2f"),
    "nearest_b": Column("B and its nearest picture", ".2f"),
}
WORDS = {
    "enough": "they have seen enough pictures: which ones they saw makes up {share:.1%} of the "
    "error at most, {gain:.2f} dB, and more of the same kind would change next to nothing",
    "more": "more pictures would help: which ones they saw makes up {share:.1%} of the error at "
    "sigma {sigma:g}, {gain:.2f} dB; train on more of the kind",
    "remembers": "they have seen far too few pictures: which ones they saw makes up {share:.1%} of "
    "the error at sigma {sigma:g}, as where pictures are remembered (about a half); train on many "
    "more, or with a smaller network",
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(compare)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A model: bundled, run, or file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model to compare it with.")],
    on: Annotated[
        Path, typer.Option("--on", metavar="DATA", help="Folder of pictures that neither has seen.")
    ],
    sigma: Levels = "15,25,50",
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Compare what their weights have learnt, layer by layer."),
    ] = False,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(
            "--trained-on",
            metavar="DATASET",
            help="What both were trained on, as train was given it: tells what is remembered.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=0, max=1000, help="Pictures to draw from the same noise."),
    ] = 0,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=10000, help="Denoising steps a sample.")
    ] = 64,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.png", help="A sheet of the samples."),
    ] = None,
    seed: Seed = 0,
    limit: Limit = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell whether denoisers have seen enough pictures, by two that were trained on halves of them.

    Train both with --set data.half=first and second. What they do differently to the same noisy
    pictures is due to the pictures that they saw: many enough, and there is no difference.
    """
    from cdnctl import images

    if weights and (samples or trained_on):
        raise UsageError("--weights looks at weights alone: leave out --samples and --trained-on")
    if output is not None:
        if not samples:
            raise UsageError(f"-o {str(output)!r} is for samples: say how many, such as -o 8")
        if output.suffix.lower() not in images.WRITE_SUFFIXES:
            raise UsageError(f"-o {str(output)!r} must be a picture file, such as sheet.png")
        keep_existing(output, overwrite)
    levels = parse_levels(sigma)
    torch_device = start_torch(device, threads)
    from cdnctl.api import load

    models = load(first, torch_device), load(second, torch_device)
    _check_alike(models, (first, second))
    if not weights:
        _check_levels(models, levels)
    report = Report("agreement", AGREEMENT, seed, limit, as_json, quiet)
    pictures = _pictures(on, models[0], report)
    about = {
        "models": [m.name for m in models],
        "weights": [m.hash for m in models],
        "on": str(on),
        "pictures": len(pictures),
        "size": models[0].header.patch,
        "seed": seed,
    }
    if weights:
        tell(about, measure(models, pictures, seed), as_json, quiet)
    else:
        own = _own(models, trained_on or [])
        rows = _agreement(models, pictures, levels, own, report)
        drawn, lines = _samples(models, samples, steps, own, report) if samples else ([], [])
        if output is not None:
            from cdnctl.figures import gallery

            cells = [(name, images.Image.of(x)) for name, line in lines for x in line]
            images.write(gallery(cells, columns=samples), output, overwrite=overwrite)
        _tell(about, models, rows, drawn, report)
    if report.failed:
        raise typer.Exit(1)


# -- what is compared ---------------------------------------------------------------------


def _check_alike(models: Sequence[Model], names: Sequence[str]) -> None:
    """UsageError for two models that cannot be given the same pictures, or are one."""
    a, b = models
    if a.hash == b.hash:
        raise UsageError(
            f"{names[0]!r} and {names[1]!r} are the same weights: give two that were trained apart"
        )
    for what, one, other in (
        ("crops of side", a.header.patch, b.header.patch),
        ("channels", a.needs.channels, b.needs.channels),
    ):
        if one != other:
            raise UsageError(
                f"{names[0]!r} was trained on {what} {one} and {names[1]!r} on {other}: "
                "give two that were trained alike"
            )


def _check_levels(models: Sequence[Model], levels: Sequence[float]) -> None:
    """UsageError for what does not denoise, or not at these levels."""
    for model in models:
        model.corrector("be compared as a denoiser")
        low, high = model.sigma_range
        for level in levels:
            if level == 0 or not low <= level <= high:
                raise UsageError(
                    f"sigma {level * PEAK:g} cannot be compared: model {model.name!r} has learnt "
                    f"noise from {low * PEAK:g} to {high * PEAK:g}, and without noise there is "
                    "nothing to do"
                )


def _pictures(folder: Path, model: Model, report: Report) -> Named:
    """Squares of the pictures of a folder, as large as in training."""
    from cdnctl.analysis.agreement import crop
    from cdnctl.measure.evaluate import find_samples, read_pictures

    side, channels = model.header.patch, model.needs.channels
    found = report.some(find_samples(folder, None, model))
    named = [(s.key, crop(x, side, channels)) for s, x in read_pictures(found, report.fail)]
    if not named:
        raise UsageError(f"no picture in {str(folder)!r} can be read")
    return named


def _own(models: Sequence[Model], datasets: Sequence[Path]) -> list[Pictures]:
    """The pictures that each was trained on, if their datasets are known."""
    if not datasets:
        return []
    import torch

    from cdnctl.training.datasets import load_datasets
    from cdnctl.training.halves import chosen

    found, cpu = [], torch.device("cpu")
    for model in models:
        data = training_config(model).data
        whole, _ = load_datasets(datasets, data, cpu, channels=model.needs.channels)
        found.append(chosen(whole, data))
    return found


def _squares(pictures: Pictures, which: Tensor, side: int) -> Tensor:
    """Their central squares, (B, C, side, side), reflected where they are smaller."""
    top, left = ((pictures.sizes[which] - side) // 2).T
    return pictures.crops(which, top, left, which * 0, side)


def _batches(pictures: Pictures, side: int) -> Iterator[Tensor]:
    import torch

    for which in torch.arange(len(pictures)).split(512):
        yield _squares(pictures, which, side)


# -- denoisers ------------------------------------------------------------------------------


def _agreement(
    models: Sequence[Model],
    pictures: Named,
    levels: Sequence[float],
    own: Sequence[Pictures],
    report: Report,
) -> list[dict[str, Any]]:
    """A row for each noise level, PSNR of a model on as many of its own pictures with it."""
    import torch

    from cdnctl.analysis.agreement import accord, pairs

    a, b = models
    side = a.header.patch
    seen: list[Named] = []
    for one in own:
        some = torch.linspace(0, len(one) - 1, min(len(one), len(pictures))).long()
        squares = _squares(one, some, side).permute(0, 2, 3, 1).numpy()
        seen.append([(f"own {i}", x) for i, x in zip(some.tolist(), squares, strict=True)])
    rows = []
    seed, count = report.seed, len(levels) * (1 + len(seen))
    with progress(count, report.quiet, report.as_json) as advance:
        for level in levels:
            found = accord(a, b, pairs(pictures, level, seed, a.device), level)
            advance()
            row = {
                **asdict(found),
                "sigma": round(level * PEAK, 4),
                "psnr_a": found.psnrs[0],
                "psnr_b": found.psnrs[1],
                "gain": found.gain,
            }
            for key, model, these in zip(("own_a", "own_b"), models, seen, strict=False):
                alone = accord(model, model, pairs(these, level, seed, a.device), level)
                row[key] = alone.psnrs[0]
                advance()
            rows.append(row)
    return rows


def _samples(
    models: Sequence[Model], count: int, steps: int, own: Sequence[Pictures], report: Report
) -> tuple[list[dict[str, Any]], list[tuple[str, np.ndarray]]]:
    """How like the pictures are that both make of the same noise; and lines of them, (name,
    (count, S, S, C)), with the nearest of the pictures that each was trained on."""
    import torch

    from cdnctl.analysis.agreement import likeness, nearest
    from cdnctl.analysis.synthesis import draw

    side, drawn = models[0].header.patch, []
    with progress(len(models), report.quiet, report.as_json) as advance:
        for model in models:
            made = list(draw(model, count, steps, seed=report.seed, watch=advance.within))
            drawn.append(torch.stack(made).clamp(0, 1).cpu())
            advance()
    rows: list[dict[str, Any]] = [
        {"sample": i, "likeness": value} for i, value in enumerate(likeness(*drawn).tolist())
    ]
    lines = [("A", drawn[0]), ("B", drawn[1])]
    for name, x, pictures in zip("AB", drawn, own, strict=False):
        values, which = nearest(x, _batches(pictures, side))
        for row, value in zip(rows, values.tolist(), strict=True):
            row[f"nearest_{name.lower()}"] = value
        lines.append((f"nearest of {name}", _squares(pictures, which, side)))
    return rows, [(name, x.permute(0, 2, 3, 1).numpy()) for name, x in lines]


def _parted(models: Sequence[Model]) -> str | None:
    """Why nothing follows for the number of pictures, or None for disjoint halves of as many."""
    told = []
    for model in models:
        config = model.header.training.get("config")
        data = config.get("data") if isinstance(config, Mapping) else None
        told.append(data if isinstance(data, Mapping) else {})
    halves = {str(data.get("half", "all")) for data in told}
    if halves != {"first", "second"}:
        return "their weights do not say that they were trained on disjoint halves"
    if told[0].get("limit") != told[1].get("limit"):
        return "their halves were limited to different numbers of pictures"
    if models[0].header.data != models[1].header.data:
        return "their halves are not of one dataset"
    return None


def _tell(
    about: Mapping[str, Any],
    models: Sequence[Model],
    rows: Sequence[dict[str, Any]],
    drawn: Sequence[dict[str, Any]],
    report: Report,
) -> None:
    """Print what was found, as one JSON object or as tables and a sentence."""
    from cdnctl.analysis.agreement import verdict

    worst = max(rows, key=lambda row: row["share"])
    what, doubt = verdict(worst["share"]), _parted(models)
    if report.as_json:
        said = what if doubt is None else None
        record = {"protocol": about, "agreement": rows, "verdict": said, "doubt": doubt}
        print(json.dumps(plain(record | {"samples": drawn})))
        return
    print_table(_present(AGREEMENT, rows), rows)
    if drawn:
        print_table(_present(DRAWN, drawn), drawn)
    if doubt is None:
        print("Verdict: " + WORDS[what].format(**worst) + ".")
    else:
        print(
            f"No verdict on the number of pictures: {doubt}. They differ by {worst['share']:.1%} "
            "of their error. Train them with --set data.half=first and --set data.half=second."
        )
    if not report.quiet:
        print(protocol(about))


def _present(columns: Mapping[str, Column], rows: Sequence[Row]) -> dict[str, Column]:
    """The columns that the rows have."""
    return {key: column for key, column in columns.items() if key in rows[0]}
