"""What the commands share: options written once, messages, and units.

The command line speaks of noise levels on the 0..255 scale; everything behind it
has pixels and sigma in [0, 1]. The conversion happens here and in images.py only.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads (default: all cores).")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]


def stderr() -> Console:
    """Console for people: progress and remarks. It honours NO_COLOR and knows terminals."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def report_error(message: str) -> None:
    """One error message on stderr."""
    # Plain print: a message may hold brackets that rich would take for markup.
    print(f"cdnctl: error: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """One warning on stderr."""
    print(f"cdnctl: warning: {message}", file=sys.stderr)


def start_torch(device: str, threads: int | None) -> torch.device:
    """Choose the device and the number of CPU threads."""
    import torch

    from cdnctl.runtime import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    return choose_device(device)


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


def existing(path: Path) -> Path:
    """The path, if something is there; otherwise an error that quotes it."""
    from cdnctl.errors import UsageError

    if not path.exists():
        raise UsageError(f"no such file or folder: {str(path)!r}")
    return path
