"""cdnctl bench repair, confidence, learning: is it as good, as sure, as quick to learn as said?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import start_torch
from cdnctl.cli.options import Json, Threads, parse_levels
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Levels, Seed
from cdnctl.cli.tables import Column, print_table
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

LEVELS = "sigma", "expected", "made"  # on the command line's scale


def register(app: typer.Typer) -> None:
    """Add the commands to those of bench."""
    for command in (repair, confidence, learning):
        app.command()(command)


def repair(
    folder: Annotated[Path, typer.Argument(help="Clean pictures.")],
    only: Annotated[
        str | None,
        typer.Option("--repairs", help="Only these, comma-separated.", show_default="all"),
    ] = None,
    crops: Annotated[int, typer.Option("--crops", min=1, help="How many pictures.")] = 20,
    size: Annotated[int, typer.Option("--size", min=64, help="Pixels of a crop's side.")] = 128,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Draws to take a mean of.")] = 10,
    seed: Seed = 0,
    model: Annotated[str, typer.Option("--model", help="Which model repairs.")] = "photo",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """inpaint, upscale, deblur and denoise --jpeg beside other ways, on crops of a folder."""
    start_torch("cpu", threads)
    from cdnctl.api import load
    from cdnctl.measure.repairs import REPAIRS, measured
    from cdnctl.measure.repairs import crops as crops_of
    from cdnctl.restore.plan import expand

    names = list(REPAIRS) if only is None else only.split(",")
    if unknown := [name for name in names if name not in REPAIRS]:
        raise UsageError(
            f"--repairs {only!r} names the unknown {', '.join(map(repr, unknown))}; known: "
            f"{', '.join(REPAIRS)}"
        )
    if size % 2:
        raise UsageError(f"--size is {size}, but upscaling by 2 is measured, too: give an even one")
    pictures = crops_of(expand([folder], recursive=True), crops, size)
    rows = []
    with progress(len(pictures) * len(names), quiet=False, as_json=as_json) as advance:
        loaded = load(model, device="cpu")
        for row in measured(pictures, loaded, names, samples=samples, seed=seed, watch=advance):
            rows.append(row)
            line = f"{row.repair}: {row.gain:+.2f} dB over {row.other}"
            print(line, file=sys.stderr, flush=True)
    columns = {
        "repair": Column("repair"),
        "psnr": Column("PSNR", ".2f"),
        "other": Column("beside"),
        "other_psnr": Column("its PSNR", ".2f"),
        "gain": Column("gain", "+.2f"),
        "worst": Column("worst", "+.2f"),
        "better": Column("better"),
        "pictures": Column("of"),
        "denoisings": Column("time in denoisings", ".1f"),
        "outside": Column("outside its box", ".2f"),
    }
    show(columns, [asdict(row) for row in rows], as_json)


def confidence(
    folder: Annotated[Path, typer.Argument(help="Clean pictures.")],
    sigma: Levels = "15,25,50",
    crops: Annotated[int, typer.Option("--crops", min=2, help="How many pictures.")] = 200,
    size: Annotated[int, typer.Option("--size", min=8, help="Pixels of a crop's side.")] = 64,
    probes: Annotated[int, typer.Option("--probes", min=1, help="Random vectors each.")] = 4,
    seed: Seed = 0,
    model: Annotated[str, typer.Option("--model", help="Which model.")] = "photo",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Does a denoiser err by as much as --uncertainty says? On crops of a folder."""
    levels = parse_levels(sigma)
    if 0 in levels:
        raise UsageError(f"sigma 0 in {sigma!r} leaves nothing uncertain: give levels above it")
    start_torch("cpu", threads)
    from cdnctl.api import load
    from cdnctl.measure.confidence import confidence
    from cdnctl.measure.repairs import crops as crops_of
    from cdnctl.restore.plan import expand

    pictures = crops_of(expand([folder], recursive=True), crops, size)
    loaded = load(model, device="cpu")
    with progress(len(pictures) * len(levels), quiet=False, as_json=as_json) as advance:
        found = list(confidence(pictures, loaded, levels, probes=probes, seed=seed, watch=advance))
    columns = {
        "sigma": Column("sigma", "g"),
        "pictures": Column("pictures"),
        "expected": Column("error expected", ".2f"),
        "made": Column("error made", ".2f"),
        "ratio": Column("squared, made / expected", ".2f"),
        "error": Column("give or take", ".2f"),
    }
    rows = [
        asdict(row) | {name: round(PEAK * getattr(row, name), 4) for name in LEVELS}
        for row in found
    ]
    show(columns, rows, as_json)


def learning(
    dataset: Annotated[Path, typer.Argument(help="Folder of class folders, or a zip file of one.")],
    classes: Annotated[str, typer.Option("--classes", help="Two of them, comma-separated.")],
    dimensions: Annotated[
        int, typer.Option("--dimensions", min=1, help="Principal components of 8 x 8 pixels.")
    ] = 8,
    counts: Annotated[
        str, typer.Option("--counts", help="Labelled pictures to learn from, comma-separated.")
    ] = "100,200,400,800,1600",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How many labels does a generative, how many a discriminative model need?"""
    import numpy as np
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    from cdnctl.measure import learning as room
    from cdnctl.training.datasets import Pictures, find_pictures

    names = classes.split(",")
    try:
        sizes = [int(n) for n in counts.split(",")]
    except ValueError:
        raise UsageError(f"--counts is {counts!r}, but must be numbers: 100,400,1600") from None
    every = find_pictures(dataset)
    found = [s for s in every if s.label in names]
    if len(set(names)) != 2 or len({s.label for s in found}) != 2:
        known = ", ".join(sorted({s.label for s in every if s.label is not None})) or "none"
        raise UsageError(f"--classes is {classes!r}: name two classes of these: {known}")
    pictures = Pictures.load(found, names, torch.device("cpu"))
    small = []
    for start, size in zip(pictures.offsets.tolist(), pictures.sizes.tolist(), strict=True):
        values = pictures.buffer[start : start + 3 * size[0] * size[1]]
        small.append(adaptive_avg_pool2d(values.view(1, 3, *size).float(), 8)[0].numpy())
    labels = pictures.labels.numpy()
    x = room.features(np.stack(small), dimensions)
    with progress(len(sizes), quiet=False, as_json=as_json) as advance:
        pair = room.learning(x, labels, sizes, seed=seed, watch=advance)
    crossing = room.meeting(*pair)
    rows = [
        {"approach": one.approach}
        | {f"at {n}": value for n, value in zip(sizes, one.losses, strict=True)}
        | asdict(one.curve)
        | {"theory": one.theory, "crossing": crossing}
        for one in pair
    ]
    columns = {"approach": Column("approach")}
    columns |= {f"at {n}": Column(f"nats at {n}", ".4f") for n in sizes}
    columns |= {
        "b": Column("b", ".4f"),
        "v": Column("v", ".2f"),
        "v_error": Column("give or take", ".2f"),
        "theory": Column("v in theory", ".2f"),
        "crossing": Column("curves cross at", ".0f"),
    }
    show(columns, rows, as_json)


def show(columns: dict[str, Column], rows: Sequence[dict[str, object]], as_json: bool) -> None:
    """Rows as one JSON list, or as a table."""
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(columns, rows)
