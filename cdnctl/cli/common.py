"""What the commands share: options written once, messages, and units.

The command line speaks of noise levels on the 0..255 scale; everything behind it
has pixels and sigma in [0, 1]. The conversion happens here and in images/ only.
"""

from __future__ import annotations

import io
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

import cdnctl
from cdnctl.errors import OutputExistsError, UsageError
from cdnctl.files import write_atomically
from cdnctl.headers import bundled, classes
from cdnctl.units import PEAK as PEAK  # the other commands take it from here

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads (default: all cores).")
]
NUMBERS = frozenset({".tif", ".tiff", ".npy"})  # suffixes of maps that programs read

SigmaOption = Annotated[
    str, typer.Option("--sigma", help="Noise level on the 0..255 scale, or auto: estimate it.")
]
ClassOption = Annotated[
    str,
    typer.Option(
        "--class", help="Class name, none, auto (most probable), or a mixture: cat:0.7,dog:0.3."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="auto, a bundled model, a run folder (runs/1), or a .safetensors file."
    ),
]
Recursive = Annotated[bool, typer.Option("-r", "--recursive", help="Look into folders' folders.")]
MaxMegapixels = Annotated[
    int | None,
    typer.Option(
        "--max-megapixels", min=1, help="Refuse pictures of more megapixels (default: 250)."
    ),
]
RangeOption = Annotated[
    str | None,
    typer.Option(
        "--range", help="Black and white of float pictures, such as 0:255 (default: 0:1)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, one object a line.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]


class WithClasses(TyperCommand):
    """A command whose help ends with the classes of the bundled models."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Looked up only now: other runs need not wait for it."""
        from rich.markup import escape

        paths = bundled(Path(cdnctl.__file__).parent)
        known = {name: ", ".join(classes(path)) for name, path in paths.items()}
        lines = [f"Classes of {name}: {names}." for name, names in known.items() if names]
        self.epilog = escape("\n\n".join(lines))
        super().format_help(ctx, formatter)


class Outliving:
    """A text stream whose reader may leave: what is printed then goes nowhere, and the work goes
    on. Everything but text, such as a picture for ``buffer``, still raises BrokenPipeError."""

    def __init__(self, stream: TextIO | None):
        self.unread = stream is None  # whether the reader has left, or never was
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        self.unread = True
        # Not only from now on: what is still in buffers must go somewhere, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Let nobody who closes our standard output or error end the work, which is in files."""
    before = sys.stdout, sys.stderr
    streams = [Outliving(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def need_reader() -> None:
    """BrokenPipeError if nobody reads standard output: where there is no work but for it."""
    if getattr(sys.stdout, "unread", False):
        raise BrokenPipeError


def pixel_limit(megapixels: int | None) -> int:
    """The most pixels that a picture may have."""
    from cdnctl import images

    return images.MAX_PIXELS if megapixels is None else megapixels * images.MEGAPIXEL


def stderr() -> Console:
    """Console for people: progress and remarks. It honours NO_COLOR and knows terminals."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """A table on standard output. Where that is no terminal, no cell is wrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100_000  # a table takes no more than it needs
    Console(highlight=False, width=width).print(table)


def shown(path: Path) -> str:
    """A path on one line: a file's name may hold line ends, and commands to the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], str(path))


def report_error(message: str) -> None:
    """One error message on stderr."""
    # Plain print: a message may hold brackets that rich would take for markup.
    print(f"cdnctl: error: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """One warning on stderr."""
    print(f"cdnctl: warning: {message}", file=sys.stderr)


def note(message: str) -> None:
    """What is as it should be, but might surprise; on stderr."""
    print(f"cdnctl: note: {message}", file=sys.stderr)


def start_torch(device: str, threads: int | None) -> torch.device:
    """Choose the device and the number of CPU threads."""
    import torch

    from cdnctl.runtime import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # or a little memory of the first would be taken, too
        torch.backends.cudnn.allow_tf32 = False  # which would part tiles from the whole
    return chosen


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second signal ends the program at once."""
    event = threading.Event()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    for s in before:
        signal.signal(s, handle)
    try:
        yield event
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def parse_sigma(text: str) -> float | None:
    """A noise level of the command line, 0..255 or ``auto``, in [0, 1] (None: auto)."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(
            f"sigma is {text!r}, but must be a number from 0 to 255, or auto"
        ) from None
    if 0 < value < 1:
        raise UsageError(
            f"sigma {text} is next to nothing on the 0..255 scale; "
            f"did you mean --sigma {value * PEAK:g} (that is {text} on a scale of 0..1)?"
        )
    if not 0 <= value <= PEAK:
        raise UsageError(f"sigma is {text}, but must lie between 0 and 255")
    return value / PEAK


def parse_levels(text: str) -> list[float]:
    """Noise levels in [0, 1]: comma-separated, 0..255, each a number or start:stop:step."""
    parts: list[str] = []
    for part in text.split(","):
        if ":" not in part:
            parts.append(part)
            continue
        try:
            start, stop, step = (float(number) for number in part.split(":"))
            count = math.floor((stop - start) / step + 1e-9)
        except (ValueError, ZeroDivisionError, OverflowError):
            count = -1
        if not 0 <= count <= PEAK:
            raise UsageError(
                f"{part!r} in --sigma {text!r} is not start:stop:step, such as 0:100:10"
            )
        parts += [f"{start + i * step:g}" for i in range(count + 1)]
    levels = [parse_sigma(part.strip()) for part in parts if part.strip()]
    if not levels or None in levels:
        raise UsageError(f"sigma is {text!r}, but must be numbers such as 15,25,50")
    return [level for level in levels if level is not None]


def parse_class(text: str) -> str | dict[str, float] | None:
    """``none`` (None), ``auto``, a class name or a mixture ``cat:0.7,dog:0.3`` (a dict)."""
    if text == "none":
        return None
    if text == "auto":
        return text
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not name or not (0 <= value < math.inf):
            raise UsageError(f"{part!r} in --class {text!r} is not NAME or NAME:WEIGHT (a number)")
        mixture[name] = mixture.get(name, 0.0) + value
    return mixture


def class_names(target: str | dict[str, float] | None) -> list[str]:
    """The classes that a parsed --class names."""
    return list(target) if isinstance(target, dict) else []


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Black and white of float samples, such as 0:255."""
    if text is None:
        return None
    try:
        black, white = (float(part) for part in text.split(":"))
    except ValueError:
        black = white = math.nan
    if not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise UsageError(f"--range is {text!r}, but must be black and white, such as 0:255")
    return black, white


def parse_size(text: str) -> int:
    """An amount of memory, such as 500M, 2G or 1.5GB, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not 1 <= size < 2**60:
        raise UsageError(f"--memory is {text!r}, but must be an amount such as 500M or 2G")
    return int(size)


def keep_existing(path: Path, overwrite: bool) -> None:
    """UsageError if a file is there that ``overwrite`` does not give away."""
    if path.exists() and not overwrite:
        raise UsageError(f"{str(path)!r} exists: give --overwrite to replace it")


def save(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a whole file or none; UsageError if its place does not take it, OutputExistsError if
    its name is taken and must not be overwritten."""
    try:
        write_atomically(path, data, overwrite)
    except FileExistsError:
        raise OutputExistsError(path) from None
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def save_numbers(values: np.ndarray, path: Path, overwrite: bool) -> None:
    """Write a float32 map (H, W) as a TIFF file, or as numpy's .npy; see NUMBERS."""
    from cdnctl import images

    if path.suffix.lower() == ".npy":
        import numpy as np

        data = io.BytesIO()
        np.save(data, values)
        save(path, data.getvalue(), overwrite)
    else:
        images.write(images.Image(values[..., None]), path, overwrite=overwrite)


EVERY = 10.0  # seconds between plain lines of progress at first; more in runs of hours


class Progress:
    """How far a run has come: by items, and by the amount of work that they are.

    Call it after each item; ``within`` is told how much of one large item is done.
    """

    def __init__(self, items: int, amount: float | None = None):
        self.items, self.count = items, 0
        self.amount = float(items) if amount is None else amount
        self._done = 0.0
        self._parts: dict[object, float] = {}
        self._started = time.monotonic()

    def __call__(self, amount: float = 1.0, item: object = None) -> None:
        """One item is done."""
        self.count += 1
        self._done += amount
        self._parts.pop(item, None)
        self._changed()

    def skip(self, amount: float = 1.0) -> None:
        """One item needs no work."""
        self.count += 1
        self.amount -= amount
        self._changed()

    def within(self, amount: float, item: object = None) -> None:
        """So much of an item is done. Its end may be told of after the next has begun."""
        self._parts[item] = amount
        self._changed()

    def _changed(self) -> None:
        """For those that show it at once."""

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def done(self) -> float:
        """Amount of the work that is done."""
        return self._done + sum(self._parts.values())

    @property
    def line(self) -> str:
        """How far, in words."""
        text = f"{self.count} of {self.items} done"
        if not 0 < self.done < self.amount:
            return f"{text}, {_clock(self.seconds)} so far"
        left = self.seconds * (self.amount - self.done) / self.done
        return f"{text} ({self.done / self.amount:.0%} of the work), about {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


@contextmanager
def progress(
    items: int, quiet: bool, as_json: bool = False, amount: float | None = None
) -> Iterator[Progress]:
    """A progress bar with rate and time left on a terminal. Elsewhere a plain line now and then,
    but none with ``as_json``: programs may take all that is said on standard error for trouble.

    amount: of all the work, if items are not alike.
    """
    console = stderr()
    if quiet or (as_json and not console.is_terminal):
        yield Progress(items, amount)
    elif console.is_terminal:
        with _bar(console, items, amount) as bar:
            yield bar
    else:
        state, over = Progress(items, amount), threading.Event()

        def tell() -> None:
            while not over.wait(min(max(EVERY, state.seconds / 10), 60 * EVERY)):
                print(f"cdnctl: {state.line}", file=sys.stderr, flush=True)

        # A thread, as a single step may take minutes.
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield state
        finally:
            over.set()
            teller.join()


@contextmanager
def _bar(console: Console, items: int, amount: float | None) -> Iterator[Progress]:
    from rich import progress as rich

    class Bar(Progress):
        def _changed(self) -> None:
            rate = f"{self.count / max(self.seconds, 1e-9):.2g}/s"
            # A single small picture is done before a bar could be read.
            shown = items > 1 or bool(self._parts)
            bar.update(
                task,
                total=self.amount,
                completed=self.done,
                done=self.count,
                rate=rate,
                visible=shown,
            )

    with rich.Progress(
        rich.BarColumn(),
        rich.TextColumn("{task.fields[done]}/{task.fields[items]}  {task.fields[rate]}"),
        rich.TimeRemainingColumn(),
        console=console,
        transient=True,
        # Results must not be drawn into the bar's stream when standard output goes elsewhere.
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        state = Bar(items, amount)
        task = bar.add_task("", total=state.amount, done=0, items=items, rate="", visible=items > 1)
        yield state
