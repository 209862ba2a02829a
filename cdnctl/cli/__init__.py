"""The command line: parse, call, print. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cdnctl.cli import (
    attack,
    bench,
    certify,
    classify,
    compare,
    deblur,
    denoise,
    doctor,
    evaluate,
    explain,
    field,
    inpaint,
    models,
    noise,
    ood,
    sample,
    train,
    upscale,
)
from cdnctl.cli.common import outlive_readers, report_error
from cdnctl.errors import CdnctlError, SetupError, UsageError
from cdnctl.version import VERSION

# What typer raises for a command line that it cannot parse. It has no public name for it.
_ParseError: type[Exception] = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """The commands. typer would end an interrupted one without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            report_error("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="cdnctl",
    cls=_Commands,
    help="Denoise, classify and explain pictures with one joint density of both.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PANELS = {  # of the help, in its order: the modules whose commands it shows
    "Restore": (denoise, inpaint, upscale, deblur),
    "Understand": (classify, explain, noise, sample),
    "Measure": (evaluate, compare, attack, certify, ood, bench),
    "Models": (train, models, doctor),
    "Fields": (field,),
}
for _panel, _rooms in PANELS.items():
    for _room in _rooms:
        _room.register(app, _panel)


def _version(value: bool) -> None:
    if value:
        print(f"cdnctl {VERSION}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _unparsed(error: Any) -> str:
    """What is wrong with a command line, on one line, in the form of all other errors."""
    message = error.format_message().strip().rstrip(".")
    # Where a number was expected, typer states the rule but not the word that was given.
    faults: list[Any] = getattr(error.__cause__, "errors", list)()
    if faults:
        rule = faults[0]["msg"].split(",")[0].removeprefix("Input ")
        message = f"{message.partition(': ')[0]}: {str(faults[0]['input'])!r} {rule}"
    command = "cdnctl" if error.ctx is None else error.ctx.command_path
    return f"{message[0].lower()}{message[1:]}{_way_on(error)} (see {command} --help)"


def _way_on(error: Any) -> str:
    """What to say of a word that is no option or command here: the command of that name, or the
    commands that there are."""
    option = getattr(error, "option_name", None)
    context = error.ctx
    while option is not None and context is not None:
        name = option.lstrip("-")
        if name in getattr(context.command, "commands", ()):
            return f"; did you mean the command '{context.command_path} {name}'?"
        context = context.parent
    known = getattr(getattr(error.ctx, "command", None), "commands", ())
    if not known or "Did you mean" in error.message:
        return ""
    return f"; the commands of {error.ctx.command_path} are {', '.join(known)}"


def _terminate(number: int, frame: object) -> None:
    # As an exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)


def main() -> None:
    """Entry point: run a command, turn errors into one message and an exit code."""
    # Threads that spin while they wait slow a busy machine down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    signal.signal(signal.SIGTERM, _terminate)
    _fill_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    with outlive_readers():
        _run()


def _fill_descriptors() -> None:
    """Where standard input, output or error is closed, no file may take its number: whatever
    writes there would write into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _run() -> None:
    try:
        if "" in sys.argv[1:]:  # as a path it would be the current folder
            raise UsageError("an argument is empty: is a variable of the shell not set?")
        sys.exit(app(prog_name="cdnctl", standalone_mode=False))
    except _ParseError as error:
        # A command without any arguments has shown its help and says nothing more.
        if str(error):
            report_error(_unparsed(error))
        sys.exit(UsageError.exit_code)
    except CdnctlError as error:
        report_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        report_error("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # what was wanted has not arrived, but there is nobody left to tell
        sys.exit(1)
    except OSError as error:
        report_error(str(error))
        sys.exit(SetupError.exit_code)
