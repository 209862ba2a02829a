"""cdnctl models: the bundled models, their cards, the export of trained ones, and new ones drawn
from their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import keep_existing
from cdnctl.cli.options import Json, Quiet
from cdnctl.cli.tables import Column, print_table
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

app = typer.Typer(help="List the bundled models, show or export one, or draw one anew.")


COLUMNS = {
    "name": Column("model"),
    "arch": Column("architecture"),
    "levels": Column("noise levels"),
    "classes": Column("classes", ", ".join),
}


def register(parent: typer.Typer, panel: str) -> None:
    """Add the commands to the app."""
    parent.add_typer(app, name="models", rich_help_panel=panel)


@app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the bundled models, show or export one, or draw one anew."""
    if context.invoked_subcommand is not None:
        return
    from cdnctl.checkpoints import bundled, read_header

    headers = {name: read_header(path) for name, path in bundled().items()}
    rows = [{"name": n, "classes": h.told_apart, "arch": h.arch} for n, h in headers.items()]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    ranges = ([PEAK * sigma for sigma in h.sigma_range] for h in headers.values())
    levels = ({"levels": f"{low:g}..{high:g}"} for low, high in ranges)
    print_table(COLUMNS, [row | level for row, level in zip(rows, levels, strict=True)])


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A bundled model, a run folder such as runs/1, or a weights file.")
    ],
) -> None:
    """Print a model's card: what it is, how it was made, how it scores. Of a run folder: how far
    training is, its scores and config, and what is in it."""
    from cdnctl.cards import card
    from cdnctl.checkpoints import bundled, find_weights
    from cdnctl.training.report import describe, is_run

    if name not in bundled() and is_run(Path(name)):
        for subject, account in describe(Path(name)):
            print(f"{subject:8} {account}".replace("\n", f"\n{'':9}"))
        return
    print(card(find_weights(name)), end="")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A run folder such as runs/1 (its best weights), or a file.")
    ],
    target: Annotated[
        Path | None, typer.Argument(help="File to write; its card goes beside it.")
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", help="NAME=FILE with what 'evaluate --json' printed; repeatable."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False,
    onnx: Annotated[
        Path | None,
        typer.Option(
            "--onnx",
            metavar="FILE.onnx",
            help="Write the denoiser as an ONNX graph of any size and noise level.",
        ),
    ] = None,
) -> None:
    """Copy trained weights with scores in their header, and write their card; or write the
    denoiser for programs without torch."""
    from cdnctl.cards import check_scores
    from cdnctl.cards import export as export_weights
    from cdnctl.checkpoints import SUFFIX, find_weights

    if onnx is not None:
        if target is not None or scores or half:
            raise UsageError(f"--onnx {str(onnx)!r} is all that is written: leave out what else")
        _export_graph(source, onnx)
        return
    if target is None:
        raise UsageError("missing argument: name a file to write (see cdnctl models export --help)")
    if target.suffix != SUFFIX:
        raise UsageError(f"{str(target)!r} must end in {SUFFIX}")
    reports = {}
    for item in scores or []:
        name, equals, file = item.partition("=")
        if not equals:
            raise UsageError(f"--scores {item!r} is not NAME=FILE")
        try:
            reports[name] = json.loads(Path(file).read_text(encoding="utf-8"))
            check_scores(reports[name])
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{file!r} does not hold what 'cdnctl evaluate --json' prints ({error})"
            ) from None
    export_weights(find_weights(source), target, reports, half)
    print(target)


@app.command()
def resample(
    source: Annotated[
        str, typer.Argument(help="A bundled model, a run folder such as runs/1, or a weights file.")
    ],
    target: Annotated[Path, typer.Argument(help="File to write; its card goes beside it.")],
    on: Annotated[
        list[Path],
        typer.Option("--on", help="Folder or zip file that it was trained on; repeatable."),
    ],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is drawn.")] = 0,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Look at this many pictures, evenly spaced.")
    ] = 1024,
    control: Annotated[
        str,
        typer.Option("--control", help="none; white: covariances forgotten; unaligned: frames."),
    ] = "none",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Draw new weights of the same covariances: a twin that tells what these are worth.

    Layers are drawn one after the other, each aligned with the old one on pictures of the training.
    'cdnctl evaluate' then tells how much of the model is left. Maps with fixed filters between them
    are all drawn, but for the last; of residual networks, the first map of every block.
    """
    from cdnctl.checkpoints import SUFFIX
    from cdnctl.measure.twins import CONTROLS, write_twin

    if target.suffix != SUFFIX:
        raise UsageError(f"{str(target)!r} must end in {SUFFIX}")
    if control not in CONTROLS:
        raise UsageError(f"--control is {control!r}, but must be one of {', '.join(CONTROLS)}")
    keep_existing(target, overwrite)
    keep_existing(target.with_suffix(".md"), overwrite)
    explained = write_twin(source, target, on, seed, limit, control)
    if not quiet:
        shares = " / ".join(f"{share:.1%}" for share in explained)
        print(f"energy of activations that alignment explains, layer by layer: {shares}")
    print(target)


def _export_graph(source: str, target: Path) -> None:
    from cdnctl.api import load
    from cdnctl.onnx import SUFFIX, export

    if target.suffix != SUFFIX:
        raise UsageError(f"--onnx {str(target)!r} must end in {SUFFIX}")
    export(load(source), target)
    print(target)
