"""Fixtures of several test files."""

from __future__ import annotations

import os

# Before torch is loaded, as the command does it. Threads that spin while they wait make small
# networks many times slower on a machine that has other things to do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import COMMAND, Result, Run, checked, kill_all
from tiny import save_tiny

from cdnctl.cli import main


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds, and can be left out")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def cdnctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Run]:
    """The command in this process: cdnctl("denoise", path, ..., stdin=b"")."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["cdnctl", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfdbinary.readouterr()
        return checked(Result(stop.value.code or 0, out, err.decode()), tmp_path)  # type: ignore[arg-type]

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def real(tmp_path: Path) -> Run:
    """The command as users start it."""

    def run(*args: object, stdin: bytes = b"") -> Result:
        done = subprocess.run(
            [COMMAND, *map(os.fsencode, map(str, args))],
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            timeout=300,
        )
        return checked(Result(done.returncode, done.stdout, done.stderr.decode()), tmp_path)

    return run


@pytest.fixture
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `processes.start` puts what commands print."""
    yield tmp_path_factory.mktemp("logs")
    kill_all()
