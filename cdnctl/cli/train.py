"""cdnctl train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import Device, Quiet, Threads, start_torch, stderr, stop_on_signal
from cdnctl.errors import CdnctlError, UsageError

if TYPE_CHECKING:
    from cdnctl.training.loop import Progress


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(train)


def train(
    datasets: Annotated[
        list[Path] | None,
        typer.Argument(help="ImageFolders (class folders) and/or flat folders of pictures."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="TOML file, or the name of a bundled config.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Run folder to continue, such as runs/3.")
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
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train a model on folders of pictures; stop and resume at will."""
    if resume is None and not datasets:
        raise UsageError("give one or more dataset folders, or --resume RUN")
    if resume is not None and (datasets or config or init_from):
        raise UsageError("--resume takes datasets and config from the run: give nothing else")
    if resume is None and config is None:
        raise UsageError(f"give --config: a TOML file or one of {', '.join(sorted(_bundled()))}")

    torch_device = start_torch(device, threads)
    from cdnctl.api import load as load_model
    from cdnctl.runtime import process_group
    from cdnctl.training.config import load
    from cdnctl.training.loop import new_run_folder, shared_path, train

    with (
        process_group(torch_device) as (rank, _),
        stop_on_signal() as stop,
        _watcher(shown=rank == 0 and not quiet) as watch,
    ):
        parsed = None if config is None else load(_bundled().get(config, Path(config)))
        start = None if init_from is None else load_model(init_from).path
        folder = resume or shared_path(lambda: new_run_folder(runs))
        if rank == 0 and not quiet:
            stderr().print(f"run folder: {folder}", markup=False)
        try:
            outcome = train(
                folder,
                config=parsed,
                datasets=datasets or (),
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
            print(folder / "last" / "model.safetensors")
        if stop.is_set() and not outcome.finished:
            raise typer.Exit(130)


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
            _clock(p.seconds * (p.steps - p.step) / max(p.step, 1)),
            f"{p.pictures / max(p.seconds, 1e-9):.0f}",
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
    left = p.seconds * (p.steps - p.step) / max(p.step, 1)
    return (
        f"step {p.step}/{p.steps}  left {_clock(left)}  {p.pictures / max(p.seconds, 1e-9):.0f} "
        f"pictures/s  loss {p.loss:.5f}  score {p.score_loss:.5f}  class {p.class_loss:.3f}  "
        f"gradient {p.grad_norm:.4f}  {_validation(p)}"
    ).rstrip()


def _validation(p: Progress) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in p.validation.items())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
