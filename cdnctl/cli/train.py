"""cdnctl train."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import Device, Json, Quiet, Threads, start_torch, stderr, stop_on_signal
from cdnctl.errors import CdnctlError, UsageError

if TYPE_CHECKING:
    import torch

    from cdnctl.training.config import TrainConfig
    from cdnctl.training.loop import Progress
    from cdnctl.training.probe import Trial

PROBE_SECONDS = 90.0  # after which a probe begins no further trial, if nothing else is said


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(train)


def train(
    datasets: Annotated[
        list[Path] | None,
        typer.Argument(help="Class folders and/or flat folders of pictures, or zip files of them."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="TOML file, or the name of a bundled config.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Run folder to continue, such as runs/3.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.KEY=VALUE of the config; repeatable."),
    ] = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="Weights to start from: name or file.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Where run folders are made.")] = Path(
        "runs"
    ),
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", min=0, help="Save and stop after this time.")
    ] = math.inf,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Do not train: measure how fast it can be done here."),
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model on folders of pictures; stop and resume at will.

    A run that is resumed looks for its datasets where they were; give them if they have moved.
    """
    if resume is None and not datasets:
        raise UsageError("give one or more dataset folders or zip files, or --resume RUN")
    if resume is not None and (config or init_from or probe):
        raise UsageError(
            f"--resume {str(resume)!r} goes on as the run began: give no --config, --init-from "
            "or --probe with it"
        )
    if resume is None and config is None:
        raise UsageError(f"give --config: a TOML file or one of {', '.join(sorted(_bundled()))}")
    if as_json and not probe:
        raise UsageError(
            "--json is for --probe; of a run, results.csv in its folder has the numbers"
        )

    torch_device = start_torch(device, threads)
    from cdnctl.api import load as load_model
    from cdnctl.runtime import process_group
    from cdnctl.training.config import load, override
    from cdnctl.training.loop import MODEL, new_run_folder, shared_path, train
    from cdnctl.training.state import STATE, read_run

    parsed = None if config is None else load(_bundled().get(config, Path(config)))
    if parsed is not None and probe:
        _probe(override(parsed, settings or ()), datasets or (), torch_device, max_seconds, as_json)
        return

    with (
        process_group(torch_device) as (rank, _),
        stop_on_signal() as stop,
    ):
        start = None if init_from is None else load_model(init_from).path
        folder = resume or shared_path(lambda: new_run_folder(runs))
        if rank == 0 and not quiet:
            stderr().print(f"run folder: {folder}", markup=False)
            if resume is not None:
                step = read_run(folder / STATE)["state"]["step"]
                stderr().print(f"going on at step {step}", markup=False)
        try:
            # What is printed beside a table that is redrawn in place is lost.
            with _watcher(shown=rank == 0 and not quiet) as watch:
                outcome = train(
                    folder,
                    config=parsed,
                    datasets=datasets or (),
                    settings=settings or (),
                    init_from=start,
                    device=torch_device,
                    max_seconds=max_seconds,
                    should_stop=stop.is_set,
                    watch=watch,
                )
        except CdnctlError:
            with suppress(OSError):
                folder.rmdir()  # if it is empty: a run that never began
            raise
        if rank == 0:
            if not outcome.finished and not quiet:
                stderr().print(
                    f"stopped and saved at step {outcome.step}; "
                    f"continue with: cdnctl train --resume {folder}",
                    markup=False,
                )
            print(folder / "last" / MODEL)
        if stop.is_set() and not outcome.finished:
            raise typer.Exit(130)


def _probe(
    config: TrainConfig,
    datasets: Sequence[Path],
    device: torch.device,
    max_seconds: float,
    as_json: bool,
) -> None:
    """Measure, and print a table with the choice as options of this command, or JSON."""
    from dataclasses import asdict

    from cdnctl.training.probe import GRADIENT_TOLERANCE, LOSS_TOLERANCE, best_trial, probe

    seconds = PROBE_SECONDS if math.isinf(max_seconds) else max_seconds
    each = min(2.0, seconds / 20)
    trials = probe(config, datasets, device=device, max_seconds=seconds, each=each)
    best = best_trial(trials)
    choice = {f"run.{k}": getattr(best, k) for k in ("precision", "channels_last", "compile")}
    if as_json:
        rows = [
            {k: None if v != v else v for k, v in asdict(t).items()} | {"sound": t.sound}
            for t in trials
        ]
        tolerance = {"loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE}
        print(json.dumps({"trials": rows, "tolerance": tolerance, "choice": choice}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("way", "pictures/s", "first, s", "GPU GB", "loss off", "gradient off", "")
    table.columns[0].no_wrap = True
    for t in trials:
        table.add_row(*_trial_cells(t, t is best))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"The fastest whose loss is within {LOSS_TOLERANCE:.0%} of float32's and whose gradient "
        f"within {GRADIENT_TOLERANCE:.0%}:",
        markup=False,
    )
    options = " ".join(f"--set {k}={json.dumps(v)}" for k, v in choice.items())
    console.print(options, markup=False, soft_wrap=True)


def _trial_cells(trial: Trial, best: bool) -> list[str]:
    """A row of the probe's table."""
    from rich.markup import escape

    def number(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    remark = "chosen" if best else "" if trial.sound else "too far off"
    return [
        " ".join(
            [
                trial.precision,
                *(["channels-last"] if trial.channels_last else []),
                *(["compiled"] if trial.compile else []),
            ]
        ),
        number(trial.rate, ".0f"),
        number(trial.first, ".1f"),
        number(trial.memory, ".1f"),
        number(trial.loss_error, ".2%"),
        number(trial.gradient_error, ".2%"),
        escape(trial.error) if trial.error else remark,
    ]


def _bundled() -> dict[str, Path]:
    folder = Path(__file__).parent.parent / "configs"
    return {p.stem: p for p in folder.glob("*.toml")}


@contextmanager
def _watcher(shown: bool) -> Iterator[Callable[[Progress], None]]:
    """A live table on a terminal, one plain line a report otherwise."""
    console = stderr()
    if not shown:
        yield lambda p: None
        return
    if not console.is_terminal:
        yield lambda p: console.print(_line(p), markup=False)
        return
    from rich.live import Live
    from rich.table import Table

    rows: list[list[str]] = []

    def watch(p: Progress) -> None:
        cells = [
            f"{p.step}/{p.steps}",
            _left(p),
            _rate(p),
            f"{p.loss:.5f}",
            f"{p.score_loss:.5f}",
            f"{p.class_loss:.3f}",
            _validation(p),
        ]
        if p.validation or not rows or rows[-1][-1]:
            rows.append(cells)
        else:
            rows[-1] = cells
        table = Table("step", "left", "pictures/s", "loss", "score", "class", "validation")
        for row in rows[-12:]:
            table.add_row(*row)
        live.update(table)

    with Live(console=console, refresh_per_second=2, redirect_stdout=False) as live:
        yield watch


def _line(p: Progress) -> str:
    return (
        f"step {p.step}/{p.steps}  left {_left(p)}  {_rate(p)} pictures/s  loss {p.loss:.5f}  "
        f"score {p.score_loss:.5f}  class {p.class_loss:.3f}  gradient {p.grad_norm:.4f}  "
        f"{_validation(p)}"
    ).rstrip()


def _rate(p: Progress) -> str:
    """Pictures per second."""
    return f"{p.pictures / max(p.seconds, 1e-9):.0f}"


def _validation(p: Progress) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in p.validation.items())


def _left(p: Progress) -> str:
    """Time to the end, if it goes on as fast."""
    minutes, seconds = divmod(round(p.seconds * (p.steps - p.step) / p.step), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
