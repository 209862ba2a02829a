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

import numpy as np
import PIL.Image
import pytest
import skimage.data
from processes import COMMAND, Result, Run, checked, kill_all
from runs import run
from tiny import save_tiny

from cdnctl.cli import main
from cdnctl.training import state
from cdnctl.training.runs import Outcome

# Fixtures that train, start processes or build packages: whoever asks for one takes seconds.
SLOW = {"whole", "logs", "built"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds, and can be left out")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two classes of textures, and a flat folder of photographs: crops of skimage.data."""
    root = tmp_path_factory.mktemp("data")
    sources = {"textures/brick": "brick", "textures/grass": "grass", "photos": "coffee"}
    rng = np.random.default_rng(0)
    for folder, name in sources.items():
        pixels = getattr(skimage.data, name)()
        (root / folder).mkdir(parents=True)
        for i in range(20):
            top, left = (int(rng.integers(0, s - 24)) for s in pixels.shape[:2])
            crop = pixels[top : top + 24, left : left + 20]
            PIL.Image.fromarray(crop).save(root / folder / f"{i:02}.png")
    return [root / "textures", root / "photos"]


@pytest.fixture(scope="session")
def whole(datasets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, datasets) == Outcome(folder, 10, True)
    return folder


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at numbers costs, as on a GPU."""
    monkeypatch.setattr(state, "_looks_are_free", lambda device: False)
