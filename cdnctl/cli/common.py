"""What the commands share: messages, readers that leave, devices, signals, and files."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cdnctl.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console

NUMBERS = frozenset({".tif", ".tiff", ".npy"})  # suffixes of maps that programs read


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
        # At the descriptor, because text that is still buffered must go somewhere, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Go on when the reader of standard output or error leaves: the results are in files."""
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


def stderr() -> Console:
    """Console for people: progress and remarks. It honours NO_COLOR and knows terminals."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


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
        torch.cuda.set_device(chosen)  # otherwise torch also takes memory of the first GPU
        torch.backends.cudnn.allow_tf32 = False  # tiles would differ from the whole
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


def keep_existing(path: Path, overwrite: bool) -> None:
    """UsageError if a file is there that ``overwrite`` does not give away."""
    if path.exists() and not overwrite:
        raise UsageError(f"{str(path)!r} exists: give --overwrite to replace it")


def save(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a whole file or none; UsageError if its place does not take it, OutputExistsError if
    its name is taken and must not be overwritten."""
    from cdnctl.files import write_atomically

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
