"""What goes wrong on real machines: signals, terminals, full disks, neighbours, hostile files."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import COMMAND, Run, Started, checked, needs_server, start
from tiny import files, names, noisy_picture, save_tiny, write

from cdnctl import checkpoints, images
from cdnctl import files as naming
from cdnctl.cli import progress
from cdnctl.images import codec
from cdnctl.restore.manifest import NAME

# One thread: sums differ in the last bit by the number of threads, of which processes have a share.
OPTIONS = ("--model", "m.safetensors", "--sigma", "25", "--threads", "1")

pytestmark = pytest.mark.slow  # most of them start processes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Twelve pictures in "in", of two sizes, and a model."""
    for i in range(12):
        size = (20, 24) if i % 3 else (260, 300)
        write(tmp_path / "in" / f"{i:02}.png", noisy_picture(*size, seed=i))
    save_tiny(tmp_path / "m.safetensors")
    return tmp_path


def slow_disk() -> None:
    """Files take a while to get their names."""
    give_name = naming.give_name

    def slow(part: Path, target: Path, overwrite: bool) -> None:
        time.sleep(0.15)
        give_name(part, target, overwrite)

    naming.give_name = slow


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path, folders and hidden ones too, with its times and size."""
    return {
        str(p.relative_to(folder)): (s.st_mtime_ns, s.st_ino, s.st_size)
        for p in sorted([folder, *folder.rglob("*")])
        for s in [p.lstat()]
    }


# -- --dry-run ------------------------------------------------------------------------------


def test_a_dry_run_tells_the_plan_and_touches_nothing(place: Path, cdnctl: Run) -> None:
    write(place / "in" / "sub" / "new\nline.png")
    before = snapshot(place)
    command = ("denoise", "in", "-r", "-o", "out", *OPTIONS)
    plan = cdnctl(*command, "--dry-run")
    assert plan.code == 0 and not plan.err and snapshot(place) == before
    told = [f"{i:02}.png" for i in range(12)] + ["sub/new\\nline.png"]
    assert plan.text.splitlines() == [f"in/{n} -> out/{n}" for n in told]
    records = cdnctl(*command, "--dry-run", "--json").records
    assert {r["event"] for r in records} == {"planned"} and snapshot(place) == before
    assert not any(r["done"] for r in records)
    assert [(r["input"], r["output"]) for r in records] == [
        (f"in/{n}", f"out/{n}") for n in [*told[:-1], "sub/new\nline.png"]
    ]

    # What it tells is what is then done.
    done = cdnctl(*command, "--json").records
    assert {r["output"] for r in done if r["event"] == "restored"} == {r["output"] for r in records}


def test_a_dry_run_of_what_is_half_done(place: Path, cdnctl: Run) -> None:
    command = ("denoise", "in", "-o", "out", *OPTIONS)
    assert cdnctl(*command, "-q").code == 0
    (place / "out" / "01.png").unlink()
    (place / "out" / "02.png").write_text("mine")
    before = snapshot(place)
    refused = cdnctl(*command, "--dry-run")
    assert refused.code == 2 and "exist" in refused.err and snapshot(place) == before

    plan = cdnctl(*command, "--dry-run", "--resume", "--json")
    told = {Path(r["input"]).name: r for r in plan.records}
    assert plan.code == 1 and len(told) == 12 and snapshot(place) == before
    assert told["02.png"]["event"] == "failed" and "--overwrite" in told["02.png"]["error"]
    assert {n: r["done"] for n, r in told.items() if r["event"] == "planned"} == {
        f"{i:02}.png": i != 1 for i in range(12) if i != 2
    }
    assert "02.png" in cdnctl(*command, "--dry-run", "--resume").err
    assert cdnctl(*command, "--dry-run", "--skip-existing").text.count("done before") == 11
    for option in ("--overwrite", "--skip-existing"):
        plan = cdnctl(*command, "--dry-run", option)
        assert plan.code == 0 and len(plan.text.splitlines()) == 12
    assert snapshot(place) == before


def test_a_dry_run_of_one_file_and_of_wrong_usage(place: Path, cdnctl: Run) -> None:
    before = snapshot(place)
    assert cdnctl("denoise", "in/01.png", "--dry-run", *OPTIONS).text == (
        "in/01.png -> in/01_denoised.png\n"
    )
    assert cdnctl("denoise", "in", "--dry-run", *OPTIONS).code == 2
    assert cdnctl("denoise", "in", "-o", "in", "--dry-run", *OPTIONS).code == 2
    assert snapshot(place) == before


@pytest.mark.parametrize("option", ["--dry-run", "--resume", "--skip-existing"])
def test_pipes_refuse_what_they_would_ignore(place: Path, cdnctl: Run, option: str) -> None:
    before, data = snapshot(place), (place / "in" / "01.png").read_bytes()
    for args in (("-", "-o", "x.png"), ("in/01.png", "-o", "-")):
        done = cdnctl("denoise", *args, option, *OPTIONS, stdin=data)
        assert done.code == 2 and option in done.err and not done.out
    assert snapshot(place) == before


def test_resume_needs_a_folder(place: Path, cdnctl: Run) -> None:
    for args in (("in/01.png",), ("in/01.png", "-o", "x.png"), ("in/01.png", "in/02.png")):
        done = cdnctl("denoise", *args, "--resume", *OPTIONS)
        assert done.code == 2 and "-o FOLDER" in done.err
    both = cdnctl("denoise", "in", "-o", "out", "--resume", "--skip-existing", *OPTIONS)
    assert both.code == 2 and not (place / "out").exists()


# -- what programs are told -----------------------------------------------------------------


def test_events(place: Path, cdnctl: Run) -> None:
    (place / "in" / "05.png").write_text("text")
    command = ("denoise", "in", "-o", "out", "--json", *OPTIONS)
    first = cdnctl(*command)
    assert first.code == 1
    *each, last = first.records
    assert last.items() >= {"event": "finished", "restored": 11, "skipped": 0, "failed": 1}.items()
    assert sorted(Path(r["input"]).name for r in each) == [f"{i:02}.png" for i in range(12)]
    for record in each:
        assert record["output"] == record["input"].replace("in/", "out/")
        bad = record["input"] == "in/05.png"
        assert record["event"] == ("failed" if bad else "restored")
        assert ("not a picture" in record["error"]) if bad else record["seconds"] > 0

    for option in ("--resume", "--skip-existing"):
        *each, last = cdnctl(*command, option).records
        assert [r["event"] for r in each].count("skipped") == last["skipped"] == 11
        assert [r["event"] for r in each].count("failed") == last["failed"] == 1
        assert last["restored"] == 0


def test_json_is_the_same_on_every_terminal(place: Path, cdnctl: Run) -> None:
    """ASCII alone, whatever the names: the encoding of standard output is anybody's guess."""
    name = os.fsdecode("é 日本 \U0001f600 ".encode() + b"\xff.png")
    shutil.copy(place / "in" / "01.png", place / name)
    for command in (("denoise", "--dry-run"), ("denoise",), ("classify",)):
        done = cdnctl(*command, name, "--json", *OPTIONS)
        assert done.code == 0 and done.out.isascii() and done.records[0]["input"] == name


def test_a_folder_of_one_picture_is_a_folder(place: Path, cdnctl: Run) -> None:
    write(place / "one" / "a.png")
    done = cdnctl("denoise", "one", "-o", "out", "--json", *OPTIONS)
    assert [r["event"] for r in done.records] == ["restored", "finished"]


def test_quiet_is_silent(place: Path, cdnctl: Run) -> None:
    command = ("denoise", "in", "-o", "out", "-q", *OPTIONS)
    for more in ((), ("--resume",), ("--skip-existing",), ("--overwrite",)):
        done = cdnctl(*command, *more)
        assert (done.code, done.out, done.err) == (0, b"", "")
    (place / "in" / "a.png").write_text("text")
    assert "a.png" in cdnctl(*command, "--resume").err


def test_names_stay_on_one_line(place: Path, cdnctl: Run) -> None:
    """And cannot command the terminal."""
    odd = "a\nb\x1b[2Jc\x07.png"
    shutil.copy(place / "in" / "01.png", place / odd)
    (place / f"bad {odd}").write_text("text")
    for command in (("denoise",), ("denoise", "--dry-run"), ("classify",), ("explain", "-o", odd)):
        for name in (odd, f"bad {odd}"):
            done = cdnctl(*command, name, *OPTIONS, *(["--overwrite"] * (command[0] == "explain")))
            if name == odd and command[0] != "explain":
                assert "a\\nb\\x1b[2Jc\\x07" in done.text
            for text in (done.text, done.err):
                assert not set(text) & {"\x1b", "\x07"} and len(text.splitlines()) <= 1
        for file in place.glob("*_denoised.png"):
            file.unlink()


# -- terminals ------------------------------------------------------------------------------


@contextmanager
def terminal() -> Iterator[tuple[str, Callable[[], str]]]:
    """Name of a terminal, and a function that tells what was written to it since."""
    master, slave = os.openpty()

    def read() -> str:
        text = b""
        while select.select([master], [], [], 0.05)[0]:
            text += os.read(master, 65536)
        return text.decode()

    try:
        yield os.ttyname(slave), read
    finally:
        os.close(slave)
        os.close(master)


@needs_server
@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_on_a_terminal(place: Path, logs: Path, no_color: bool) -> None:
    env = {"TERM": "xterm-256color", "COLUMNS": "100"} | ({"NO_COLOR": "1"} if no_color else {})
    (place / "in" / "05.png").write_text("text")
    with terminal() as (name, read):
        process = start(
            "denoise", "in", "-o", "out", *OPTIONS,
            cwd=place, logs=logs, env=env, terminal=name, prepare=slow_disk,
        )  # fmt: skip
        seen = ""
        while process.process.is_alive():
            seen += read()
        seen += read()
        done = process.wait()
    assert done.code == 1
    assert re.search(r"\b[1-9]\d?/12 ", seen), "how many of how many"
    assert re.search(r"\d/s", seen) and re.search(r"\d:\d\d:\d\d", seen), "rate and time left"
    colours = re.findall(r"\x1b\[[\d;]*m", seen)
    if no_color:
        assert not [c for c in colours if re.search(r"[\[;](3|4|9|10)\d", c)], colours
    else:
        assert colours
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1, "the cursor is back"
    assert "05.png': not a picture" in seen
    assert "\x1b" not in done.text and len(done.text.splitlines()) == 11


@needs_server
def test_no_bar_where_nobody_looks(place: Path, logs: Path) -> None:
    piped = start("denoise", "in", "-o", "out", *OPTIONS, cwd=place, logs=logs).wait()
    assert piped.code == 0 and "\x1b" not in piped.err and "/12" not in piped.err
    with terminal() as (name, read):
        command = ("denoise", "in", "-o", "quiet", "-q", *OPTIONS)
        quiet = start(*command, cwd=place, logs=logs, terminal=name).wait()
        assert quiet.code == 0 and read() == "" == quiet.text


@needs_server
def test_an_interrupted_bar_gives_the_cursor_back(place: Path, logs: Path) -> None:
    with terminal() as (name, read):
        process = start(
            "denoise", "in", "-o", "out", *OPTIONS,
            cwd=place, logs=logs, terminal=name, env={"TERM": "xterm"}, prepare=slow_disk,
        )  # fmt: skip
        process.until(lambda: len(names(place / "out")) > 2)
        process.signal(signal.SIGINT)
        assert process.wait().code == 130
        seen = read()
    assert seen.count("\x1b[?25h") == seen.count("\x1b[?25l") == 1
    assert "--resume" in seen and "Traceback" not in seen


@needs_server
def test_what_train_says_stays_on_the_terminal(place: Path, logs: Path) -> None:
    """It redraws its table in place: what it has to say comes before the first or after the
    last."""
    (place / "in" / "bad.png").write_text("text")
    with terminal() as (name, read):
        command = ("train", "in", "--config", "tiny", "--device", "cpu", "--max-seconds", "0",
                   "--set", "data.holdout=0", "--set", "run.log_every=1")  # fmt: skip
        env = {"TERM": "xterm-256color", "COLUMNS": "100"}
        done = start(*command, cwd=place, logs=logs, terminal=name, env=env).wait()
        seen = read()
    assert done.code == 0 and done.text == "runs/1/last/model.safetensors\n"
    end = max(seen.rindex("┘"), seen.rindex("\x1b[?25h"))
    for remark in ("stopped and saved", "use it with"):
        assert seen.index(remark) > end
    for remark in ("bad.png", "run folder"):
        assert seen.index(remark) < min(seen.index("┏"), seen.index("\x1b[?25l"))


# -- readers who leave ----------------------------------------------------------------------

# What is left of standard output and error once the shell has started the command.
LEAVERS = {
    "after a line": '"$@" | head -n 1',
    "at once": '"$@" | true',
    "of both": '"$@" 2>&1 | head -n 1',
    "before": '"$@" >&-',
    "of both, before": '"$@" >&- 2>&-',
}


@pytest.mark.parametrize("how", LEAVERS)
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["lines", "json"])
def test_the_work_outlives_its_reader(place: Path, how: str, more: tuple[str, ...]) -> None:
    (place / "in" / "05.png").write_text("text")
    command = [COMMAND, "denoise", "in", "-o", "out", *OPTIONS, *more]
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {LEAVERS[how]}", "sh", *command],
        cwd=place, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, "of one picture that failed"
    assert files(place / "out").keys() == {f"{i:02}.png" for i in range(12)} - {"05.png"}
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr
    if how in ("after a line", "at once", "before"):
        assert "1 of 12 pictures failed" in done.stderr


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["table", "json"])
def test_rows_outlive_who_looks_at_the_table(place: Path, more: tuple[str, ...]) -> None:
    command = [COMMAND, "evaluate", "in", "--csv", "rows.csv", "--model", "m.safetensors",
               "--quiet", *more]  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "sh", *command],
        cwd=place, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len((place / "rows.csv").read_text().splitlines()) == 1 + 3 * 12


def test_a_picture_for_nobody_is_an_error(place: Path) -> None:
    """It is the only product."""
    for rest in ('"$@" -o - | true', '"$@" -o - >&-'):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {rest}", "sh", COMMAND, "denoise", "in/00.png",
             *OPTIONS], cwd=place, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr
    done = subprocess.run(
        ["bash", "-c", '"$@" <&-', "sh", COMMAND, "denoise", "-", "-o", "x.png", *OPTIONS],
        cwd=place, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "standard input" in done.stderr
    assert not (place / "x.png").exists()


# -- progress where there is no terminal ----------------------------------------------------


def test_lines_of_progress(place: Path, cdnctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    give_name = naming.give_name
    monkeypatch.setattr("cdnctl.restore.denoise.batch_size", lambda *_: 1)

    def slow(part: Path, target: Path, overwrite: bool) -> None:
        time.sleep(0.05)
        give_name(part, target, overwrite)

    monkeypatch.setattr(naming, "give_name", slow)
    command = ("denoise", "in", "--overwrite", "-o", "out", *OPTIONS)
    said = [line for line in cdnctl(*command).err.splitlines() if " done" in line]
    counts = []
    for line in said:
        found = re.fullmatch(
            r"cdnctl: (\d+) of 12 done(, \d:\d\d:\d\d so far| \(\d+% of the work\), about "
            r"\d+:\d\d:\d\d left)",
            line,
        )
        assert found, line
        counts.append(int(found[1]))
    assert counts == sorted(counts) and len(set(counts)) > 2
    for option in ("--quiet", "--json"):
        assert " done" not in cdnctl(*command, option).err


def test_time_left_is_that_of_the_work_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the number of items, of which the last may be the most work."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    state = progress.Progress(6, amount=1010.0)
    clock[0] += 5
    assert state.line == "0 of 6 done, 0:00:05 so far"
    state.skip(10)
    assert state.line == "1 of 6 done, 0:00:05 so far"
    state(20.0)
    clock[0] += 5
    state(30.0)
    # Five percent of the work took ten seconds.
    assert state.line == "3 of 6 done (5% of the work), about 0:03:10 left"
    state.within(450.0)
    clock[0] += 3600
    assert state.line == "3 of 6 done (50% of the work), about 1:00:10 left"
    state(450.0)
    assert state.line == "4 of 6 done (50% of the work), about 1:00:10 left"
    state.within(250.0, "one")
    state.within(100.0, "another")
    assert state.done == 850
    state(150.0, "another")
    assert state.done == 900, "the end of one item does not undo what is done of another"
    state(350.0, "one")
    assert state.line == "6 of 6 done, 1:00:10 so far"


# -- the order of a folder ------------------------------------------------------------------


def test_large_pictures_wait_for_small_ones(
    place: Path, cdnctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("denoise", "in", "--json", *OPTIONS, "-o")
    assert cdnctl(*command, "by_name").code == 0
    monkeypatch.setattr("cdnctl.restore.batch.LARGE_PIXELS", 5000)
    sizes = [
        images.count_pixels(place / r["input"])
        for r in cdnctl(*command, "out").records
        if r["event"] == "restored"
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 2
    assert files(place / "out") == files(place / "by_name")
    again = cdnctl(*command, "by_name", "--resume")
    assert again.records[-1]["skipped"] == 12, "what was done in another order is done"


# -- two runs for one name ------------------------------------------------------------------


def meet() -> None:
    """In "race", give no file its name before two runs have one to name, or one has done it."""
    give_name = naming.give_name

    def wait(part: Path, target: Path, overwrite: bool) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and target.parent.name == "race" and not target.exists():
            if len(list(target.parent.glob(".*.tmp"))) > 1:
                break
            time.sleep(0.001)
        give_name(part, target, overwrite)

    naming.give_name = wait
    checkpoints.give_name = wait


def meet_piped() -> None:
    """The same, with a picture on standard input."""
    meet()
    sys.stdin = io.TextIOWrapper(open("in/00.png", "rb"))  # noqa: SIM115


@needs_server
@pytest.mark.parametrize(
    "command",
    [
        ("denoise", "in/00.png", "-o", "race/x.png"),
        ("denoise", "-", "-o", "race/x.png"),
        ("denoise", "in/00.png", "-o", "TEMPORARY.png", "--uncertainty", "race/u.png"),
        ("explain", "in/00.png", "-o", "race/why.png"),
        ("evaluate", "in", "--limit", "1", "--csv", "race/rows.csv", "-q"),
    ],
    ids=["file", "pipe", "uncertainty", "explain", "csv"],
)
def test_one_of_two_gets_the_name(place: Path, logs: Path, command: tuple[str, ...]) -> None:
    (place / "race").mkdir()
    prepare = meet_piped if "-" in command else meet
    runs = [
        start(
            *(arg.replace("TEMPORARY", f"own{i}/a") for arg in command), "--model", "m.safetensors",
            "--sigma", str(20 + i), cwd=place, logs=logs, prepare=prepare,
        )
        for i in range(2)
    ]  # fmt: skip
    results = [run.wait() for run in runs]
    assert sorted(r.code for r in results) == [0, 2], results
    (loser,) = (r for r in results if r.code == 2)
    assert len(loser.err.splitlines()) == 1 and "--overwrite" in loser.err
    assert "'race/" in loser.err and "meanwhile" in loser.err
    (made,) = (place / "race").iterdir()
    (place / "alone").mkdir()
    level = 20 + [r.code for r in results].index(0)
    start(
        *(arg.replace("race/", "alone/").replace("TEMPORARY", "own/a") for arg in command),
        "--model", "m.safetensors", "--sigma", str(level), cwd=place, logs=logs,
        prepare=lone_pipe if "-" in command else None,
    ).wait()  # fmt: skip
    assert made.read_bytes() == (place / "alone" / made.name).read_bytes(), "the winner's, whole"


def lone_pipe() -> None:
    """A picture on standard input."""
    sys.stdin = io.TextIOWrapper(open("in/00.png", "rb"))  # noqa: SIM115


@needs_server
@pytest.mark.parametrize("option, codes", [("--overwrite", [0, 0]), ("--skip-existing", [0, 0])])
def test_two_that_may_both_go_on(place: Path, logs: Path, option: str, codes: list[int]) -> None:
    (place / "race").mkdir()
    command = ("denoise", "in/00.png", "-o", "race/x.png", "--model", "m.safetensors", option)
    runs = [
        start(*command, "--json", "--sigma", str(20 + i), cwd=place, logs=logs, prepare=meet)
        for i in range(2)
    ]
    results = [run.wait() for run in runs]
    assert [r.code for r in results] == [0, 0], results
    events = sorted(r.records[0]["event"] for r in results)
    expected = ["restored", "skipped" if option == "--skip-existing" else "restored"]
    assert events == expected and images.read(place / "race" / "x.png").samples.size


@needs_server
def test_two_runs_for_the_same_files(place: Path, logs: Path) -> None:
    """Without a folder of their own, which would be locked: each file is won by one of them."""
    sources = [f"in/{i:02}.png" for i in range(0, 12, 3)]
    command = ("denoise", *sources, *OPTIONS, "--json")
    results = [
        run.wait()
        for run in [start(*command, cwd=place, logs=logs, prepare=slow_disk) for _ in range(2)]
    ]
    won = [r["output"] for result in results for r in result.records if r["event"] == "restored"]
    assert sorted(won) == [s.replace(".png", "_denoised.png") for s in sources]
    for result in results:
        lost = [r for r in result.records if r["event"] == "failed"]
        # One that came after the other had planned is refused as a whole.
        assert result.code == (2 if not result.records else 1 if lost else 0)
        assert all("meanwhile" in r["error"] for r in lost)


# -- several processes ----------------------------------------------------------------------


def crew(
    place: Path, logs: Path, *args: object, prepare: tuple[Any, ...] = (None, None)
) -> list[Started]:
    """As many processes as ``prepare`` is long share the work, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = len(prepare)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    env["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    return [
        start(
            "denoise", "in", "-o", "out", *OPTIONS, *args, cwd=place, logs=logs,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare=prepare[rank],
        )
        for rank in range(size)
    ]  # fmt: skip


@needs_server
def test_processes_share_a_folder(place: Path, logs: Path, cdnctl: Run) -> None:
    assert cdnctl("denoise", "in", "-o", "alone", *OPTIONS, "-q").code == 0
    results = [p.wait() for p in crew(place, logs, "--json", prepare=(None, None, None))]
    assert [r.code for r in results] == [0, 0, 0], results
    inputs = [r["input"] for result in results for r in result.records if "input" in r]
    assert len(inputs) == len(set(inputs)) == 12 and all(len(r.records) == 5 for r in results)
    assert files(place / "out") == files(place / "alone")
    parts = {p.name: p.read_text().splitlines() for p in (place / "out").glob("*.jsonl")}
    assert parts.keys() == {NAME} | {f"cdnctl-manifest.{i}-of-3.jsonl" for i in (1, 2)}
    assert all(len(part) == 4 for part in parts.values())

    # One process goes on where three left, and two where one left.
    (place / "out" / "07.png").unlink()
    again = cdnctl("denoise", "in", "-o", "out", "--resume", "--json", *OPTIONS)
    assert again.records[-1]["skipped"] == 11 and again.records[-1]["restored"] == 1
    (place / "out" / "08.png").unlink()
    results = [p.wait() for p in crew(place, logs, "--json", "--resume")]
    assert [r.code for r in results] == [0, 0]
    assert sum(r.records[-1]["skipped"] for r in results) == 11
    assert files(place / "out") == files(place / "alone")


@needs_server
def test_a_process_that_fails_waits_for_the_others(place: Path, logs: Path) -> None:
    """torchrun ends all of them as soon as one ends with an error."""
    for i in range(0, 12, 2):
        (place / "in" / f"{i:02}.png").write_text("text")
    first, second = crew(place, logs, prepare=(None, slow_disk))
    assert first.wait().code == 1
    assert len(files(place / "out")) == 6, "the other one's, all of them"
    assert second.wait().code == 0


@needs_server
def test_processes_wait_for_no_dead_one(place: Path, logs: Path) -> None:
    first, second = crew(place, logs, prepare=(None, slow_disk))
    out = place / "out"
    second.until(lambda: (out / "00.png").exists() and (out / "01.png").exists())
    second.kill()
    left = first.wait()
    assert left.code == 3 and "another process" in left.err and "Traceback" not in left.err
    assert {f"{i:02}.png" for i in range(0, 12, 2)} <= files(out).keys()
    assert [p.wait().code for p in crew(place, logs, "--resume")] == [0, 0]
    assert len(files(place / "out")) == 12


@needs_server
def test_a_second_crew_is_refused_before_it_writes(place: Path, logs: Path) -> None:
    first = start("denoise", "in", "-o", "out", *OPTIONS, cwd=place, logs=logs, prepare=slow_disk)
    first.until(lambda: len(names(place / "out")) > 2)
    first.freeze()
    before = snapshot(place / "out")
    lead, other = (p.wait() for p in crew(place, logs, "--overwrite"))
    assert lead.code == 2 and "another run" in lead.err
    assert other.code == 3 and "Traceback" not in other.err
    after = snapshot(place / "out")
    assert {n: s for n, s in after.items() if n in before and n != "."} == {
        n: s for n, s in before.items() if n != "."
    }
    assert after.keys() - before.keys() <= {"cdnctl-manifest.1-of-2.jsonl"}
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0


def test_torchrun(place: Path) -> None:
    (place / "in" / "00.png").write_text("text")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "cdnctl", "denoise", "in", "-o", "out", *OPTIONS],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "1 of 6 pictures failed" in done.stderr
    assert files(place / "out").keys() == {f"{i:02}.png" for i in range(1, 12)}


# -- interrupted elsewhere ------------------------------------------------------------------


@needs_server
@pytest.mark.parametrize(
    "command",
    [
        ("classify", "in", "--model", "m.safetensors"),
        ("evaluate", "in", "--model", "m.safetensors", "--csv", "rows.csv", "-q"),
        ("bench", "quality", "in", "--methods", "wavelet"),
        ("denoise", "in/00.png", "--model", "m.safetensors"),
        ("explain", "in/00.png", "-o", "why.png", "--model", "m.safetensors"),
        ("upscale", "in/00.png", "--model", "m.safetensors"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c(place: Path, logs: Path, command: tuple[str, ...], number: int, code: int) -> None:
    """One line, the exit code that shells expect, and no file."""
    before = snapshot(place)
    process = start(*command, cwd=place, logs=logs, prepare=sleepy_reading)
    process.until((place / "reading").exists)
    process.signal(number)
    done = checked(process.wait(), place)
    (place / "reading").unlink()
    assert done.code == code and len(done.err.splitlines()) <= 1 and not done.out, done
    assert files(place).keys() == {n for n in before if "." in n and n != "."}


def sleepy_reading() -> None:
    """A picture that takes long to read."""
    decode = images.decode

    def wait(data: bytes, name: str, max_pixels: int) -> images.Image:
        Path("reading").touch()
        # Python waits for its threads, but no Ctrl-C should wait for the main one.
        main = threading.current_thread() is threading.main_thread()
        end = time.monotonic() + (60 if main else 1)
        while time.monotonic() < end:
            time.sleep(0.01)
        return decode(data, name, max_pixels)

    images.decode = codec.decode = wait  # that of batches, and that within `read`


# -- places where nothing can be written ----------------------------------------------------


@pytest.mark.parametrize("output", ["file", "file/x", "file/x/y", "m.safetensors"])
def test_a_folder_below_a_file(place: Path, cdnctl: Run, output: str) -> None:
    (place / "file").write_text("mine")
    before = snapshot(place)
    for more in ((), ("--resume",), ("--overwrite",), ("--skip-existing",)):
        done = cdnctl("denoise", "in", "-o", output, *OPTIONS, *more)
        assert done.code == 3 and output in done.err and len(done.err.splitlines()) == 1
    assert snapshot(place) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_read_only_place(place: Path, cdnctl: Run) -> None:
    done = cdnctl("denoise", "in", "-o", "/proc/cdnctl", *OPTIONS)
    assert done.code == 3 and "/proc/cdnctl" in done.err and len(done.err.splitlines()) == 1


def test_a_folder_that_may_not_be_written_to(
    place: Path, cdnctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the refusal is played."""
    (place / "out").mkdir()
    real_open = open

    def refuse(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax") and "/out/" in str(place / str(file)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real_open(file, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        done = cdnctl("denoise", "in", "-o", "out", *OPTIONS)
        one = cdnctl("denoise", "in/01.png", "-o", "out/x.png", *OPTIONS)
    assert done.code == 3 and "Permission denied" in done.err and len(done.err.splitlines()) == 1
    assert one.code == 1 and "permission denied" in one.err
    assert not list((place / "out").iterdir())


@pytest.mark.parametrize("where", ["the picture", "its name", "the manifest"])
def test_a_full_disk(place: Path, cdnctl: Run, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """One line and exit code 3, nothing half-written, and --resume goes on."""
    command = ("denoise", "in", "-o", "out", *OPTIONS, "-q")
    count = [3]

    def spend() -> None:
        count[0] -= 1
        if count[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open, give_name = open, naming.give_name

    class Disk:
        def __init__(self, file: Any):
            self.file = file

        def write(self, data: Any) -> int:
            if count[0] <= 0:
                self.file.write(bytes(data)[: len(data) // 2])
            spend()
            return self.file.write(data)

        def __enter__(self) -> Disk:
            return self

        def __exit__(self, *details: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        found = real_open(file, mode, *args, **options)
        wanted = "x+b" if where == "the picture" else "a+b"
        return Disk(found) if mode == wanted and "out" in str(file) else found

    def named(part: Path, target: Path, overwrite: bool) -> None:
        spend()
        give_name(part, target, overwrite)

    with monkeypatch.context() as patch:
        if where == "its name":
            patch.setattr(naming, "give_name", named)
        else:
            patch.setattr("builtins.open", opened)
        done = cdnctl(*command)
    assert done.code == 3 and len(done.err.splitlines()) == 1, done.err
    assert "make room" in done.err
    there = files(place / "out")
    assert len(there) == 3 and all(images.read(place / "out" / n) for n in there)
    assert cdnctl(*command, "--resume").code == 0
    assert len(files(place / "out")) == 12 and there.items() <= files(place / "out").items()


# -- pipes and devices among the pictures ---------------------------------------------------


@needs_server
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_not_waited_for(place: Path, logs: Path) -> None:
    os.mkfifo(place / "in" / "pipe.png")
    (place / "in" / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(place / "in" / "socket.png"))
        done = start("denoise", "in", "-o", "out", *OPTIONS, cwd=place, logs=logs).wait(60)
    assert done.code == 1 and "3 of 15 pictures failed" in done.err
    for name in ("pipe", "null", "socket"):
        assert f"cannot read 'in/{name}.png': it is not a regular file" in done.err
    assert len(files(place / "out")) == 12
    for args in (("classify", "in/pipe.png"), ("denoise", "in/pipe.png", "-o", "x.png")):
        done = start(*args, "--model", "m.safetensors", cwd=place, logs=logs).wait(60)
        assert done.code == 1 and "not a regular file" in done.err
    os.mkfifo(place / "in" / "01_denoised.png")
    command = ("denoise", "in/01.png", "--overwrite", *OPTIONS)
    done = start(*command, cwd=place, logs=logs).wait(60)
    assert done.code == 1 and "not a regular file" in done.err


# -- hostile weights ------------------------------------------------------------------------


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def hostile(place: Path, good: bytes) -> dict[str, bytes]:
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])
    text = header["__metadata__"]["cdnctl"]

    def with_header(raw: bytes) -> bytes:
        return struct.pack("<Q", len(raw)) + raw + good[8 + size :]

    def changed(**values: Any) -> bytes:
        own = json.dumps(json.loads(text) | values)
        return with_header(json.dumps(header | {"__metadata__": {"cdnctl": own}}).encode())

    def tensors(**values: Any) -> bytes:
        return with_header(json.dumps({k: v for k, v in (header | values).items() if v}).encode())

    first = next(k for k in header if k != "__metadata__")
    nan = bytearray(good)
    nan[-4:] = struct.pack("<f", float("nan"))
    trap = place / "sprung"
    model = json.loads(text)["model"]
    return {
        "empty": b"",
        "a text": b"these are no weights\n" * 100,
        "a pickle": pickle.dumps(Trap(trap)),
        "a zip archive": b"PK\x03\x04" + bytes(100),
        "a giant header": struct.pack("<Q", 2**62) + good[8:],
        "a header up to the end": struct.pack("<Q", len(good) - 8) + good[8:],
        "no JSON": struct.pack("<Q", 9) + b"not json!" + good[8:],
        "deep JSON": with_header(b"[" * 100_000),
        "a header of nothing": with_header(b"{}"),
        "not a number": bytes(nan),
        "a missing tensor": tensors(**{first: None}),
        "a tensor beyond the end": tensors(**{first: header[first] | {"data_offsets": [0, 2**40]}}),
        "another shape": tensors(**{first: header[first] | {"shape": [1]}}),
        "the next version": changed(format_version=2),
        "an unknown network": changed(arch="os.system"),
        "a huge network": changed(model=model | {"widths": [2**40, 2**40]}),
        "a name of a place": changed(arch="../../gradresnet"),
        "a class too few": changed(classes=["cat"]),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "a text", "a pickle", "a zip archive", "a giant header",
        "a header up to the end", "no JSON", "deep JSON", "a header of nothing", "not a number",
        "a missing tensor", "a tensor beyond the end", "another shape", "the next version",
        "an unknown network", "a huge network", "a name of a place", "a class too few",
    ],
)  # fmt: skip
def test_hostile_weights(place: Path, cdnctl: Run, kind: str) -> None:
    files_of = hostile(place, (place / "m.safetensors").read_bytes())
    (place / "bad.safetensors").write_bytes(files_of[kind])
    before = snapshot(place)
    for args in (("denoise", "in", "-o", "out"), ("classify", "in")):
        done = cdnctl(*args, "--model", "bad.safetensors")
        assert done.code == 3 and not done.out
        assert "'bad.safetensors'" in done.err and len(done.err.splitlines()) == 1
        assert len(done.err) < 600
    assert snapshot(place) == before, "and no trap was sprung"
    if kind == "a pickle":
        pickle.loads(files_of[kind])
        assert (place / "sprung").exists(), "or the trap is none"


# -- alone in the world ---------------------------------------------------------------------

WATCH = """
import sys, runpy
events = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto",
          "urllib.Request", "http.client", "ftplib", "smtplib", "pickle.find_class")
armed = False

def watch(event, args):
    if armed and event.startswith(events):
        print("FORBIDDEN", event, args, flush=True)
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(watch)
import torch
def refuse(*args, **kwargs):
    print("FORBIDDEN torch.load", flush=True)
    raise RuntimeError("torch.load")
torch.load = refuse
from cdnctl.cli import main
for command in COMMANDS:
    sys.argv = ["cdnctl", *command]
    armed = True
    try:
        main()
    except SystemExit as stop:
        print("ended", stop.code or 0, flush=True)
    armed = False
import pickle, pathlib, socket
armed = True
for forbidden in (lambda: pickle.loads(pickle.dumps(pathlib.Path("x"))),
                  lambda: socket.create_connection(("127.0.0.1", 9))):
    try:
        forbidden()
    except RuntimeError:
        print("the trap works")
"""


def test_nothing_is_fetched_and_nothing_unpickled(place: Path) -> None:
    """With the bundled weights, from the loading of torch on."""
    shutil.rmtree(place / "in")
    for size in (20, 50):
        write(place / "in" / f"{size}.png", noisy_picture(size, size))
    commands = [
        ["denoise", "in", "-o", "out", "--class", "auto"],
        ["denoise", "in", "-o", "out", "--class", "auto", "--resume"],
        ["classify", "in"],
        ["explain", "in/20.png", "-o", "why.png"],
        ["models"],
        ["models", "show", "photo"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCH.replace("COMMANDS", repr(commands))],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("ended 0") == len(commands), done.stderr
    traps = [line for line in lines if line.startswith("FORBIDDEN")]
    assert lines.count("the trap works") == len(traps) == 2, traps
