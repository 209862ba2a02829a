"""cdnctl train: a run from its config to its weights, with all that it shows on the way."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import start_torch, stderr, stop_on_signal, warn
from cdnctl.cli.options import Device, Json, Quiet, Threads
from cdnctl.cli.plots import draw, training_panels
from cdnctl.cli.tables import Column, drawn, print_table
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    import torch

    from cdnctl.training.config import TrainConfig
    from cdnctl.training.datasets import Unread
    from cdnctl.training.probe import Trial
    from cdnctl.training.runs import Progress
    from cdnctl.training.validation import Samples

PROBE_SECONDS = 90.0  # after which a probe begins no further trial, if nothing else is said

STEPS = {  # columns of the live table
    "step": Column("step"),
    "left": Column("left"),
    "rate": Column("pictures/s"),
    "loss": Column("loss", ".5f"),
    "score_loss": Column("score", ".5f"),
    "class_loss": Column("class", ".3f"),
    "validation": Column("validation"),
}
TRIALS = {  # columns of a probe's table
    "way": Column("way", whole=True),
    "rate": Column("pictures/s", ".0f"),
    "first": Column("first, s", ".1f"),
    "memory": Column("GPU GB", ".1f"),
    "loss_error": Column("loss off", ".2%"),
    "gradient_error": Column("gradient off", ".2%"),
    "remark": Column(""),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(train)


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
        str | None,
        typer.Option(
            "--init-from", help="Weights to start from: a model's name, run folder or file."
        ),
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

    if runs.exists() and not runs.is_dir():
        raise UsageError(f"--runs {str(runs)!r} is a file: give a folder to make run folders in")

    torch_device = start_torch(device, threads)
    from cdnctl.api import load as load_model
    from cdnctl.checkpoints import MODEL
    from cdnctl.runtime import process_group
    from cdnctl.training.config import load, override
    from cdnctl.training.loop import train
    from cdnctl.training.runs import discard, new_run_folder, shared_path
    from cdnctl.training.state import STATE, read_run

    parsed = None if config is None else load(_bundled().get(config, Path(config)))
    if parsed is not None and probe:
        _probe(override(parsed, settings or ()), datasets or (), torch_device, max_seconds, as_json)
        return

    with process_group(torch_device) as (rank, _), ExitStack() as stack:
        start = None if init_from is None else load_model(init_from).path
        begun: list[Path] = []  # the run folder, once there is one
        stop = Event()
        show = _Illustrator()

        def begin() -> Path:
            begun.append(resume or shared_path(lambda: new_run_folder(runs)))
            if rank == 0 and not quiet:
                stderr().print(f"run folder: {begun[0]}", markup=False)
                if resume is not None:
                    step = read_run(resume / STATE)["state"]["step"]
                    stderr().print(f"going on at step {step}", markup=False)
            return begun[0]

        def loaded(unread: Sequence[Unread]) -> None:
            nonlocal stop
            if rank == 0:
                _warn_of(unread, ", and listed in passed_over.txt of the run folder")
            # Until now there was nothing to save, and a signal ended the program at once.
            stop = stack.enter_context(stop_on_signal())

        try:
            with _watcher(shown=rank == 0 and not quiet) as report:

                def watch(progress: Progress) -> None:
                    report(progress)
                    if progress.validation:
                        show(begun[0], progress.step, progress.samples)

                outcome = train(
                    begin,
                    config=parsed,
                    datasets=datasets or (),
                    settings=settings or (),
                    init_from=start,
                    device=torch_device,
                    max_seconds=max_seconds,
                    should_stop=lambda: stop.is_set(),
                    loaded=loaded,
                    watch=watch,
                )
            if rank == 0:
                show(outcome.folder, outcome.step)
        except BaseException:
            if begun and resume is None and rank == 0:
                discard(begun[0])
            raise
        finally:
            if show.problem:
                warn(f"no pictures of the run, which went on without: {show.problem}")
        if rank == 0:
            if not quiet:
                name = shlex.quote(str(outcome.folder))
                if not outcome.finished:
                    stderr().print(
                        f"stopped and saved at step {outcome.step}; "
                        f"continue with: cdnctl train --resume {name}",
                        markup=False,
                    )
                use = _use(outcome.folder)
                stderr().print(f"use it with: cdnctl {use} PICTURE --model {name}", markup=False)
                stderr().print(f"see what is there: cdnctl models show {name}", markup=False)
            print(outcome.folder / "last" / MODEL)
        if stop.is_set() and not outcome.finished:
            raise typer.Exit(130)


def _warn_of(unread: Sequence[Unread], more: str = "") -> None:
    """Name the picture files that are passed over. more: words to add about all of them."""
    from cdnctl.training.datasets import listed

    if unread:
        one = len(unread) == 1
        what = "picture that cannot be read is" if one else "pictures that cannot be read are"
        warn(f"{len(unread)} {what} passed over{more}:{listed(unread)}")


def _use(folder: Path) -> str:
    """The command that suits the model of a run."""
    from cdnctl.checkpoints import find_weights, read_header
    from cdnctl.core.joint import Corrector
    from cdnctl.models import architecture

    module = architecture(read_header(find_weights(folder)).arch).module
    return "denoise" if issubclass(module, Corrector) else "classify"


class _Illustrator:
    """Draws into a run folder. Failing to draw never ends a run: the problem is kept for later."""

    def __init__(self) -> None:
        self.step = -1  # of the newest curves
        self.problem = ""  # the first; printed beside the live table it would be lost

    def __call__(self, folder: Path, step: int, samples: Samples | None = None) -> None:
        """Curves, and the samples of a validation, if not yet done at this step."""
        from cdnctl.files import write_atomically
        from cdnctl.training.report import CURVES, SAMPLES, read_results, sheet

        if step == self.step:
            return
        self.step = step
        try:
            if panels := training_panels(read_results(folder)):
                draw(folder / CURVES, panels, overwrite=True)
            if samples is not None:
                write_atomically(folder / SAMPLES / f"{step:09}.png", sheet(samples))
        except Exception as error:  # a full disk, or fonts that are not there
            self.problem = self.problem or str(error) or repr(error)


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
    trials = probe(config, datasets, device=device, max_seconds=seconds, each=each, loaded=_warn_of)
    best = best_trial(trials)
    choice = {f"run.{k}": getattr(best, k) for k in ("precision", "channels_last", "compile")}
    rows = [{k: None if v != v else v for k, v in asdict(t).items()} for t in trials]
    rows = [row | {"sound": t.sound} for row, t in zip(rows, trials, strict=True)]
    if as_json:
        tolerance = {"loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE}
        print(json.dumps({"trials": rows, "tolerance": tolerance, "choice": choice}))
        return
    words = [{"way": _way(t), "remark": _remark(t, t is best)} for t in trials]
    print_table(TRIALS, [row | more for row, more in zip(rows, words, strict=True)])
    print(
        f"The fastest whose loss is within {LOSS_TOLERANCE:.0%} of float32's and whose gradient "
        f"within {GRADIENT_TOLERANCE:.0%}:"
    )
    print(" ".join(f"--set {k}={json.dumps(v)}" for k, v in choice.items()))


def _way(trial: Trial) -> str:
    """How it computes, in words."""
    parts = {"channels-last": trial.channels_last, "compiled": trial.compile}
    return " ".join([trial.precision, *(part for part, used in parts.items() if used)])


def _remark(trial: Trial, best: bool) -> str:
    """What became of it."""
    if trial.error:
        return trial.error
    return "chosen" if best else "" if trial.sound else "too far off"


def _bundled() -> dict[str, Path]:
    folder = Path(__file__).parent.parent / "configs"
    return {p.stem: p for p in folder.glob("*.toml")}


@contextmanager
def _watcher(shown: bool) -> Iterator[Callable[[Progress], None]]:
    """A live table on a terminal, from the first report on; one plain line a report otherwise.

    What is printed beside a table that is redrawn in place is lost.
    """
    console = stderr()
    if not shown:
        yield lambda p: None
        return
    if not console.is_terminal:
        yield lambda p: console.print(_line(p), markup=False)
        return
    from rich.live import Live

    rows: list[dict[str, Any]] = []

    def watch(p: Progress) -> None:
        row = {
            "step": f"{p.step}/{p.steps}",
            "left": _left(p),
            "rate": _rate(p),
            "loss": p.loss,
            "score_loss": p.score_loss,
            "class_loss": p.class_loss,
            "validation": _validation(p),
        }
        if p.validation or not rows or rows[-1]["validation"]:
            rows.append(row)
        else:
            rows[-1] = row
        live.start()  # with the first report: what is said of the start is printed before
        live.update(drawn(STEPS, rows[-12:]))

    live = Live(console=console, refresh_per_second=2, redirect_stdout=False)
    try:
        yield watch
    finally:
        live.stop()


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
    from cdnctl.training.report import clock

    return clock(p.seconds * (p.steps - p.step) / p.step)
