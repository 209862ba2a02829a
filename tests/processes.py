"""The command in processes of its own, which start in no time.

They are forked by a server that has loaded torch before. Everything else is as when users
start the command: signals, exit codes, file descriptors and sudden death.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

COMMAND = Path(sys.executable).with_name("cdnctl")
HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
needs_server = pytest.mark.skipif(not HAS_SERVER, reason="this system cannot fork")

if HAS_SERVER:
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(
        ["torch._dynamo", "skimage.restoration", "cdnctl.cli.denoise", "cdnctl.restore.batch"]
    )


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def records(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object a line."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Result]
"""What the fixtures ``cdnctl`` and ``real`` are."""


def checked(result: Result, folder: Path) -> Result:
    """What holds for every command, however it ends."""
    assert "Traceback" not in result.err, result.err
    assert not list(folder.rglob("*.tmp")), "half a file was left"
    if result.code == 2:
        assert result.err.strip()
    return result


@dataclass
class Started:
    """A command that runs, its standard output and error in files."""

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.join()

    def freeze(self) -> None:
        """Stop it for a while: until it gets SIGCONT."""
        self.signal(signal.SIGSTOP)
        self.until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)

    def wait(self, seconds: float = 120) -> Result:
        """Its end, which must come."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            pytest.fail(f"it hangs: {self.err.read_text('utf-8')}")
        assert self.process.exitcode is not None
        return Result(self.process.exitcode, self.out.read_bytes(), self.err.read_text("utf-8"))

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something that it does."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive():
                pytest.fail(f"it ended early: {self.wait()}")
            assert time.monotonic() < end, "it takes too long"
            time.sleep(0.002)


def start(
    *args: object,
    cwd: Path,
    logs: Path,
    env: Mapping[str, str] | None = None,
    terminal: str | None = None,
    prepare: Callable[[], None] | None = None,
) -> Started:
    """Start ``cdnctl args``.

    logs: an existing folder for what it prints. terminal: a device for standard error instead.
    prepare: called in the process first; a function of a module.
    """
    number = len(list(logs.iterdir()))
    out, err = logs / f"{number}.out", logs / f"{number}.err"
    out.touch()
    err.touch()
    process = _context.Process(
        target=_run,
        args=([str(a) for a in args], str(cwd), str(out), terminal or str(err), env, prepare),
    )
    process.start()
    started = Started(process, out, err)
    _all.append(started)
    return started


def kill_all() -> None:
    """End what a failed test has left."""
    while _all:
        _all.pop().kill()


_all: list[Started] = []


def _run(
    args: list[str],
    cwd: str,
    out: str,
    err: str,
    env: Mapping[str, str] | None,
    prepare: Callable[[], None] | None,
) -> None:
    os.environ.update(env or {})
    os.chdir(cwd)
    for path, flags, number in (
        (os.devnull, os.O_RDONLY, 0),
        (out, os.O_WRONLY | os.O_TRUNC, 1),
        (err, os.O_RDWR | os.O_NOCTTY, 2),
    ):
        os.dup2(os.open(path, flags), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), "utf-8")
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import torch

    from cdnctl.cli import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = ["cdnctl", *args]
    main()
