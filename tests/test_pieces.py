"""Training on machines that are lent for minutes and forget everything, rehearsed on the CPU."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
import skimage.data
import torch
from typer.testing import CliRunner, Result

from cdnctl.checkpoints import MODEL, load_model, read_header
from cdnctl.cli import app
from cdnctl.errors import UsageError
from cdnctl.training.config import parse
from cdnctl.training.loop import train
from cdnctl.training.state import STATE, read_run, read_tensors

SCRIPT = Path(__file__).parent.parent / "examples" / "train_in_pieces.sh"

pytestmark = pytest.mark.slow  # they train, in processes

CONFIG = """
name = "rehearsal"
[model]
widths = [8, 16]
blocks = [1, 1]
norm = "pixel"
head = 8
[data]
patch = 16
batch = 4
[optim]
steps = 7
warmup = 2
[run]
log_every = 2
validate_every = 3
checkpoint_every = 2
validate_sigmas = [25]
"""
PIECE = 20_000  # bytes


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in the processes that are started: sums are added up in the same order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pack(target: Path, folder: Path) -> Path:
    """A zip file of all files in a folder."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    return target


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two zip files of training pictures, one class each, a folder of others, and a config."""
    sources = {"cat": skimage.data.chelsea(), "brick": skimage.data.brick()}
    for name, pixels in sources.items():
        for i in range(12):
            place = "held" if i % 4 == 3 else f"{name}-train/train"
            path = tmp_path / "home" / place / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop = pixels[12 * i : 12 * i + 20, 10 * i : 10 * i + 24]
            PIL.Image.fromarray(crop).save(path)
        pack(tmp_path / "home" / f"{name}.zip", tmp_path / "home" / f"{name}-train")
        shutil.rmtree(tmp_path / "home" / f"{name}-train")
    (tmp_path / "home" / "toy.toml").write_text(CONFIG)
    return tmp_path / "home"


def call(machine: Path, seconds: int, *more: str, **environment: str) -> str:
    """The script on a machine: its own copies of the data, and a folder for what is carried."""
    command = [SCRIPT, "toy.toml", "carried", str(seconds), "cpu", "brick.zip", "cat.zip", *more]
    settings = {"PYTHON": sys.executable, "PROBE": "0", "PIECE": str(PIECE)} | environment
    done = subprocess.run(
        ["bash", *command], cwd=machine, env=os.environ | settings, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.slow
def test_in_pieces_on_two_machines_as_in_one_go(tmp_path: Path, home: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(home, first)
    # What a call leaves that was ended before it saved anything is swept away.
    (first / "carried" / "1").mkdir(parents=True)
    (first / "carried" / "1" / "config.json").write_text("{}")
    # The probe alone takes longer than this second: one step, then it is over.
    assert "not through" in call(first, 1, SETTINGS="optim.lr=1e-3 run.seed=5")
    carried = first / "carried"
    probe = json.loads((carried / "probe.json").read_text())
    step = read_run_in_parts(carried, tmp_path / "peek")["state"]["step"]
    assert step == 1
    for path in carried.rglob("*"):
        assert path.is_dir() or path.stat().st_size <= PIECE, path
    assert list(carried.rglob("*.part-001")), "something had to be split"

    # A file that got lost or damaged on the way is found out.
    lame = tmp_path / "lame"
    shutil.copytree(home, lame)
    shutil.copytree(carried, lame / "carried")
    victim = min((lame / "carried" / "1").rglob("*.part-001"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    before = digests(lame / "carried")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        call(lame, 600)
    assert "damaged" in caught.value.stderr and digests(lame / "carried") == before

    shutil.copytree(home, second)
    shutil.move(carried, second / "carried")
    shutil.rmtree(first)
    assert "through: the model is in carried" in call(second, 600, "--", "held")
    carried = second / "carried"
    for path in carried.rglob("*"):
        assert path.is_dir() or path.stat().st_size <= PIECE, path

    # The same in one go, from the same folder of pictures, gives the same to the bit.
    join(carried)
    run = carried / "1"
    config = parse(json.loads((run / "config.json").read_text())["config"])
    assert (config.optim.lr, config.run.seed, config.optim.steps) == (1e-3, 5, 7)
    for key, value in probe["choice"].items():
        assert getattr(config.run, key.removeprefix("run.")) == value
    whole = tmp_path / "whole"
    zips = [home / "brick.zip", home / "cat.zip"]
    assert train(whole, config=config, datasets=zips, device=torch.device("cpu")).finished
    one, other = read_tensors(whole / STATE), read_tensors(run / STATE)
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    for folder in (whole, run):
        rows = (folder / "results.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["step", "2", "3", "4", "6", "7"]

    # And what was exported is that, in half precision, with scores.
    exported = load_model(carried / "model.safetensors")[0].state_dict()
    for key, value in load_model(whole / "last" / MODEL)[0].state_dict().items():
        assert torch.equal(exported[key], value.half().float())
    scores = read_header(carried / "model.safetensors").scores["held"]
    assert [row["pictures"] for row in scores["scores"]] == [6, 6, 6]
    assert scores == json.loads((carried / "scores-held.json").read_text())
    assert (carried / "model.md").is_file()


def join(folder: Path) -> None:
    """Parts of files to files, as the script does it."""
    for first in list(folder.rglob("*.part-000")):
        whole = first.with_suffix("")
        parts = sorted(first.parent.glob(f"{whole.name}.part-*"))
        whole.write_bytes(b"".join(p.read_bytes() for p in parts))
        for part in parts:
            part.unlink()


def read_run_in_parts(carried: Path, place: Path) -> dict:
    shutil.copytree(carried, place)
    join(place)
    return read_run(place / "1" / STATE)


def test_what_the_script_does_not_know_it_leaves_alone(home: Path) -> None:
    strange = home / "carried" / "1" / "holiday.jpg"
    strange.parent.mkdir(parents=True)
    strange.touch()
    with pytest.raises(subprocess.CalledProcessError):
        call(home, 0)
    assert strange.exists()


# -- the options of cdnctl train that the script uses ---------------------------------------------


def cdnctl(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_probe_prints_a_choice_that_train_takes(home: Path) -> None:
    probe = ("train", home / "cat.zip", "--config", home / "toy.toml", "--device", "cpu", "--probe")
    shown = cdnctl(*probe, "--max-seconds", "0")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("float32") >= 2 and shown.stdout.count("chosen") == 1
    options = shlex.split(shown.stdout.splitlines()[-1])
    assert [o for o in options if o != "--set"] == [
        f"run.{key}={value}"
        for key, value in zip(
            ("precision", "channels_last", "compile"),
            (options[1].partition("=")[2], options[3].partition("=")[2], "false"),
            strict=True,
        )
    ]
    train = [*probe[:-1], *options, "--runs", home / "runs", "--max-seconds", "0"]
    assert cdnctl(*train).exit_code == 0
    config = read_run(home / "runs" / "1" / STATE)["config"]
    assert config["run"]["precision"] == options[1].partition("=")[2]
    # A config that cannot be is refused whatever is measured.
    wrong = cdnctl(*probe, "--set", "data.batch=0")
    assert wrong.exit_code == 1 and "data.batch" in str(wrong.exception)


@pytest.mark.parametrize(
    "args",
    [
        ("--resume", "runs/1", "--probe"),
        ("--resume", "runs/1", "--config", "tiny"),
        ("cat.zip", "--config", "tiny", "--json"),
        ("cat.zip", "--probe"),
        ("--probe", "--config", "tiny"),
    ],
)
def test_options_that_do_not_go_together(args: tuple[str, ...]) -> None:
    refused = cdnctl("train", *args, "--device", "cpu")
    assert isinstance(refused.exception, UsageError), refused.output
