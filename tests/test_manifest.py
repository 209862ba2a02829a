"""Going on after anything: what is done is passed over, what is not or has changed is redone."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started, needs_server, start
from tiny import files, names, noisy_picture, save_tiny, write

from cdnctl import files as naming
from cdnctl import images
from cdnctl.errors import SetupError, UsageError
from cdnctl.restore import Denoise, Settings
from cdnctl.restore.batch import Batch, Done
from cdnctl.restore.manifest import NAME, Manifest, Origin, changed, digest, parts
from cdnctl.restore.plan import plan
from cdnctl.restore.writing import Writing
from cdnctl.selection import Models

CPU = torch.device("cpu")


def lines(folder: Path, name: str = NAME) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


# -- the file -------------------------------------------------------------------------------


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    odd = os.fsdecode(b"caf\xe9 \xff\n.png")
    with Manifest(out) as manifest:
        for number, name in enumerate(("a.png", "sub/ä.png", odd, "a.png")):
            manifest.add({"output": manifest.name_of(out / name), "number": number})
        assert manifest.records(out / "a.png") == [], "those that were there at the start"
    again = Manifest(out)
    again.read()
    assert [r["number"] for r in again.records(out / "a.png")] == [0, 3]
    for name, number in (("sub/ä.png", 1), (odd, 2)):
        assert [r["number"] for r in again.records(out / name)] == [number]
    assert again.records(out / "b.png") == []


def test_names_do_not_depend_on_how_a_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path("out"), tmp_path / "out", Path("x/../out")):
        assert Manifest(folder).name_of(Path("out") / "a b" / "ä.png") == "a b/ä.png"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\n\n",
        b"\xff\xfe\0\0",
        b"null",
        b"7",
        b"[]",
        b"{}",
        b'{"output": ["a.png"]}',
        b'{"output": {}}',
        b'{"output": null, "output_sha256": []}',
        b'{"input": "a.png"}',
        b"[" * 100_000,
        b'{"output": "a.png", "output_sha',
        b"somebody's own notes",
    ],
)
def test_garbage_between_lines_costs_nothing(tmp_path: Path, garbage: bytes) -> None:
    for content in (b'%b\n{"output": "a.png"}\n', b'{"output": "a.png"}\n%b'):
        (tmp_path / NAME).write_bytes(content % garbage)
        with Manifest(tmp_path) as manifest:
            assert manifest.records(tmp_path / "a.png") == [{"output": "a.png"}]
            manifest.add({"output": "b.png"})
        again = Manifest(tmp_path)
        again.read()
        for name in ("a.png", "b.png"):
            assert again.records(tmp_path / name) == [{"output": name}]


@pytest.mark.parametrize("key", ["input_sha256", "input_bytes", "input_mtime"])
@pytest.mark.parametrize("value", [None, [], {}, "x", 1.5, float("inf"), True, 10**400])
def test_lines_of_odd_values_match_no_file(tmp_path: Path, key: str, value: object) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"12345")
    right = {"input_sha256": digest(b"12345"), "input_bytes": 5, "input_mtime": 0}
    assert Origin.from_dict(right).still(source)
    expected = key == "input_mtime"  # then the content is compared
    assert Origin.from_dict(right | {key: value}).still(source) == expected


@pytest.mark.slow
def test_a_hundred_thousand_lines(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("w") as file:
        for i in range(100_000):
            file.write(json.dumps({"output": f"{i}.png", "output_sha256": f"{i:064x}"}) + "\n")
    manifest = Manifest(tmp_path)
    manifest.read()
    assert all(len(manifest.records(tmp_path / f"{i}.png")) == 1 for i in range(0, 100_000, 999))


def test_parts_are_those_of_processes_and_no_other_files(tmp_path: Path) -> None:
    ours = {NAME, "cdnctl-manifest.1-of-2.jsonl", "cdnctl-manifest.12-of-16.jsonl"}
    for name in (*ours, "cdnctl-manifest.1-of-2.jsonl.bak", "my-cdnctl-manifest.jsonl"):
        (tmp_path / name).touch()
    assert {p.name for p in parts(tmp_path)} == ours
    assert parts(tmp_path / "none") == []


def test_one_run_at_a_time(tmp_path: Path) -> None:
    second = Manifest(tmp_path)
    with Manifest(tmp_path) as first:
        first.add({"output": "a.png"})
        with pytest.raises(UsageError, match="another run"), Manifest(tmp_path):
            pass
        first.add({"output": "b.png"})
        with Manifest(tmp_path, 1, 2):  # another process of the same run
            pass
    with second:
        for name in ("a.png", "b.png"):
            assert second.records(tmp_path / name), "what was written until it was locked"


def test_a_manifest_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out" / NAME).mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "out"):
        with pytest.raises(SetupError, match=r"choose another|cannot read"), Manifest(folder):
            pass
    with pytest.raises(SetupError, match="cannot read"):
        Manifest(tmp_path / "out").read()


class Full:
    """A file on a disk with little room."""

    def __init__(self, file: object, room: int):
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.file.write(bytes(data[: self.room]))  # type: ignore[attr-defined]
        self.room -= count
        return count

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_a_full_disk_tears_no_other_line(tmp_path: Path) -> None:
    """A line of which half was written does not spoil the next."""
    with Manifest(tmp_path) as manifest:
        manifest.add({"output": "a.png"})
        disk = Full(manifest._file, 10)
        manifest._file = disk  # type: ignore[assignment]
        with pytest.raises(SetupError, match=r"No space left.*--resume"):
            manifest.add({"output": "b.png"})
        disk.room = 1000  # somebody has made room
        manifest.add({"output": "c.png"})
    again = Manifest(tmp_path)
    again.read()
    assert [bool(again.records(tmp_path / f"{n}.png")) for n in "abc"] == [True, False, True]


# -- going on -------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Pictures in "in", of two sizes, and a model."""
    for i in range(4):
        write(tmp_path / "in" / f"{i}.png", noisy_picture(20, 24 + i % 2, seed=i))
    save_tiny(tmp_path / "m.safetensors")
    return tmp_path


OPTIONS = Settings(sigma=0.2)


def go_on(
    place: Path, settings: Settings = OPTIONS, model: str = "m", **options: Any
) -> dict[str, Done]:
    """What ``denoise in -o out --resume`` does to each input."""
    batch = Batch(
        Models(str(place / f"{model}.safetensors"), CPU),
        Denoise(settings),
        resume=True,
        manifest=Manifest(place / "out"),
        **options,
    )
    assert batch.manifest is not None
    with batch.manifest:
        done = list(batch.run(plan([place / "in"], place / "out", False)))
    return {d.job.source.name: d for d in done}


def redone(done: dict[str, Done]) -> set[str]:
    assert not [d.error for d in done.values() if d.error]
    return {name for name, d in done.items() if d.restored is not None}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and inode of every picture."""
    return {
        p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir() if p.name != NAME
    }


def test_what_is_done_is_not_touched(place: Path) -> None:
    assert redone(go_on(place)) == {"0.png", "1.png", "2.png", "3.png"}
    before, records = stamps(place / "out"), lines(place / "out")
    assert redone(go_on(place)) == set()
    assert stamps(place / "out") == before and lines(place / "out") == records


def test_a_line_says_what_was_done(place: Path) -> None:
    done = go_on(place)
    records = {r["output"]: r for r in lines(place / "out")}
    assert records.keys() == done.keys()
    for name, record in records.items():
        data = (place / "in" / name).read_bytes()
        assert record["output_sha256"] == digest((place / "out" / name).read_bytes())
        assert record["input_sha256"] == digest(data) and record["input_bytes"] == len(data)
        assert record["input_mtime"] == changed(place / "in" / name)
        assert record["sigma"] == 51 and record["parameters"]["sigma"] == 51
        assert record["model"] == "m" and len(record["weights"]) == 16
        assert record["parameters"] == json.loads(json.dumps(record["parameters"]))


@pytest.mark.parametrize("target, asked", [(None, "none"), ("auto", "auto"), ({"dog": 1.0},) * 2])
def test_a_line_claims_no_class_that_was_not_asked_for(
    place: Path, target: str | dict[str, float] | None, asked: object
) -> None:
    done = go_on(place, replace(OPTIONS, target=target))
    for record in lines(place / "out"):
        assert "class" not in record and record["class_asked"] == asked
        restored = done[record["output"]].restored
        assert restored is not None
        best = max(restored.posterior, key=restored.posterior.__getitem__)
        assert record["most_probable_class"] == best


def test_lines_of_earlier_versions_are_understood(place: Path) -> None:
    """Which told the most probable class as "class", and knew no operation but denoising."""
    go_on(place)
    manifest = place / "out" / NAME
    old = [dict(record) for record in lines(place / "out")]
    for record in old:
        del record["class_asked"], record["operation"]
        record["class"] = record.pop("most_probable_class")
    manifest.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert redone(go_on(place)) == set()


def test_a_changed_input_is_redone(place: Path) -> None:
    go_on(place)
    before = files(place / "out")
    shutil.copy(place / "in" / "2.png", place / "in" / "0.png")
    assert redone(go_on(place)) == {"0.png"}
    after = files(place / "out")
    assert after == before | {"0.png": before["2.png"]}
    assert redone(go_on(place)) == set()


def test_a_touched_input_is_not(place: Path) -> None:
    go_on(place)
    os.utime(place / "in" / "0.png", (1, 1))
    assert redone(go_on(place)) == set()


def test_a_changed_input_of_the_same_length(place: Path) -> None:
    go_on(place)
    source = place / "in" / "0.png"
    data = bytearray(source.read_bytes())
    data[-1] ^= 1  # of the last checksum, which no reader looks at
    source.write_bytes(data)
    os.utime(source, (1, 1))
    assert redone(go_on(place)) == {"0.png"}


def test_an_input_that_changes_while_it_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is of what was read; the next run does not take it for that of the new one."""
    source, load = place / "in" / "0.png", images.read_bytes

    def slow(path: Path) -> bytes:
        data = load(path)
        if path == source:
            swapped = data[:-1] + bytes([data[-1] ^ 1])
            source.write_bytes(swapped)
            os.utime(source, ns=(10**18, 10**18))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_bytes", slow)
        go_on(place)
    assert redone(go_on(place)) == {"0.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        replace(OPTIONS, sigma=0.3),
        replace(OPTIONS, sigma=None),
        replace(OPTIONS, strength=0.5),
        replace(OPTIONS, guidance=2.0),
        replace(OPTIONS, target="auto"),
        replace(OPTIONS, target={"cat": 1.0}),
        replace(OPTIONS, tile=500),
    ],
)
def test_other_settings_are_redone(place: Path, settings: Settings) -> None:
    go_on(place)
    before = files(place / "out")
    assert len(redone(go_on(place, settings))) == 4
    after = files(place / "out")
    assert redone(go_on(place, settings)) == set()
    # And back again, but for outputs that both settings gave.
    assert redone(go_on(place)) == {name for name in before if after[name] != before[name]}
    assert files(place / "out") == before


def test_what_changes_no_pixel_is_not_redone(place: Path) -> None:
    go_on(place, replace(OPTIONS, target={"cat": 0.5, "dog": 0.5}))
    assert not redone(go_on(place, replace(OPTIONS, target={"dog": 0.5, "cat": 0.5})))
    assert not redone(go_on(place, replace(OPTIONS, target={"cat": 0.5, "dog": 0.5}, memory=1)))


def test_other_weights_of_the_same_name_are_redone(place: Path) -> None:
    go_on(place)
    before = files(place / "out")
    save_tiny(place / "m.safetensors", seed=1)
    assert len(redone(go_on(place))) == 4
    assert not set(files(place / "out").values()) & set(before.values())


def test_folders_may_be_moved(place: Path) -> None:
    go_on(place)
    for name in ("in", "out"):
        (place / "elsewhere").mkdir(exist_ok=True)
        (place / name).rename(place / "elsewhere" / name)
    shutil.copy(place / "m.safetensors", place / "elsewhere")
    assert redone(go_on(place / "elsewhere")) == set()


def test_another_folder_of_the_same_names_replaces_nothing(place: Path) -> None:
    """Unless the pictures are the same, or --overwrite is given."""
    go_on(place)
    before = files(place / "out")
    (place / "in").rename(place / "first")
    (place / "in").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        shutil.copy(place / "first" / ("3.png" if name == "2.png" else name), place / "in" / name)
    # The manifest knows the pictures as in/*.png; let it know them by where they are now.
    manifest = place / "out" / NAME
    old, new = (json.dumps(str(place / n))[1:-1] for n in ("in", "first"))
    manifest.write_text(manifest.read_text().replace(old, new))
    done = go_on(place)
    assert {n for n, d in done.items() if d.error} == {"2.png"}
    assert str(place / "first" / "2.png") in str(done["2.png"].error)
    assert files(place / "out") == before
    assert redone(go_on(place, overwrite=True)) == {"2.png"}


def test_stripped_metadata_is_another_output(place: Path) -> None:
    go_on(place)
    assert len(redone(go_on(place, writing=Writing(strip=True)))) == 4


def test_a_deleted_output_is_redone(place: Path) -> None:
    go_on(place)
    before = files(place / "out")
    (place / "out" / "1.png").unlink()
    assert redone(go_on(place)) == {"1.png"} and files(place / "out") == before


def test_an_output_that_is_not_ours_is_left_alone(place: Path) -> None:
    """Edited by the user, damaged, or there before: that cannot be told apart."""
    go_on(place)
    before = files(place / "out")
    (place / "out" / "1.png").write_bytes(b"mine")
    data = (place / "out" / "2.png").read_bytes()
    (place / "out" / "2.png").write_bytes(data[:-1])
    os.utime(place / "in" / "2.png", (1, 1))
    done = go_on(place)
    assert {n for n, d in done.items() if d.error} == {"1.png", "2.png"}
    assert "--overwrite" in str(done["1.png"].error)
    assert (place / "out" / "1.png").read_bytes() == b"mine"
    assert (place / "out" / "2.png").read_bytes() == data[:-1]
    assert redone(go_on(place, overwrite=True)) == {"1.png", "2.png"}
    assert files(place / "out") == before
    (place / "out" / NAME).unlink()
    assert all(d.error for d in go_on(place).values())
    assert files(place / "out") == before


def test_a_file_that_failed_is_tried_again(place: Path) -> None:
    source = place / "in" / "1.png"
    data = source.read_bytes()
    source.write_text("text")
    done = go_on(place)
    assert done["1.png"].error and not (place / "out" / "1.png").exists()
    (record,) = [r for r in lines(place / "out") if "error" in r]
    assert record["output"] == "1.png" and "1.png" in record["error"]
    source.write_bytes(data)
    assert redone(go_on(place)) == {"1.png"}


def test_what_killed_runs_leave_is_removed_and_nothing_else(place: Path) -> None:
    go_on(place)
    names = {r["output"]: r["temporary"] for r in lines(place / "out")}
    leftover, other = place / "out" / names["0.png"], place / "out" / images.temporary_name()
    for path in (leftover, other):
        path.write_text("half")
    victim = place / "out" / "victim.png"
    victim.touch()
    with (place / "out" / NAME).open("a") as file:
        for name in ("victim.png", "../in/0.png", str(victim), 7, None):
            file.write(json.dumps({"output": "1.png", "temporary": name}) + "\n")
    assert redone(go_on(place)) == set()
    assert not leftover.exists() and other.exists() and victim.exists()
    assert (place / "in" / "0.png").exists()


def test_a_full_disk_ends_the_run_and_can_be_resumed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_name, room = naming.give_name, [2]

    def full(part: Path, target: Path, overwrite: bool) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        give_name(part, target, overwrite)

    with monkeypatch.context() as patch:
        patch.setattr(naming, "give_name", full)
        with pytest.raises(SetupError, match="disk is full"):
            go_on(place)
    there = files(place / "out")
    assert len(there) == 2 and not [n for n in there if n.endswith(".tmp")]
    assert len(redone(go_on(place))) == 2
    assert there.items() <= files(place / "out").items() and len(files(place / "out")) == 4


# -- sudden death ---------------------------------------------------------------------------


def slow_disk() -> None:
    """Files take a while to get their names: most kills come in between."""
    give_name = naming.give_name

    def slow(part: Path, target: Path, overwrite: bool) -> None:
        time.sleep(0.03)
        give_name(part, target, overwrite)

    naming.give_name = slow


@pytest.fixture
def forty(tmp_path: Path) -> Iterator[Path]:
    """Small and large pictures, in "in", and what an undisturbed run makes of them in "whole"."""
    for i in range(40):
        size = (30 + 10 * (i % 3), 40) if i % 4 else (200, 260)
        write(tmp_path / "in" / f"{i % 3}" / f"{i}.{'tif' if i % 5 else 'png'}",
              noisy_picture(*size, seed=i))  # fmt: skip
    save_tiny(tmp_path / "m.safetensors")
    yield tmp_path


COMMAND = ("denoise", "in", "-r", "--model", "m.safetensors", "--sigma", "25", "-q", "-o")


@needs_server
def test_killed_again_and_again(forty: Path, logs: Path) -> None:
    rng = random.Random(0)
    assert start(*COMMAND, "whole", cwd=forty, logs=logs).wait().code == 0
    expected = files(forty / "whole")
    assert len(expected) == 40
    out, kills = forty / "out", 0

    def run() -> Started:
        return start(*COMMAND, "out", "--resume", cwd=forty, logs=logs, prepare=slow_disk)

    litter = 0
    while kills < 18 or len(names(out)) < 40:
        process = run()
        if kills % 3:  # after some pictures of this run, else at any time
            wanted = min(40, len(names(out)) + rng.randint(1, 4))
            process.until(lambda n=wanted: len(names(out)) >= n)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        kills += 1
        there = {n: h for n, h in files(out).items() if not n.endswith(".tmp")}
        assert there.items() <= expected.items(), "every file that has its name is complete"
        litter += len(list(out.rglob("*.tmp")))
        if len(there) == 40 and kills < 18:
            for name in rng.sample(sorted(there), 10):
                (out / name).unlink()
    assert litter, "or kills did not come between writing and naming"
    final = run().wait()
    assert final.code == 0, final.err
    assert files(out) == expected, "and no temporary file is left"


@needs_server
def test_two_runs_at_once(forty: Path, logs: Path) -> None:
    first = start(*COMMAND, "out", cwd=forty, logs=logs, prepare=slow_disk)
    first.until(lambda: len(names(forty / "out")) > 2)
    first.freeze()  # so that it does not end too early
    there = files(forty / "out")
    for option in ("--resume", "--overwrite"):
        second = start(*COMMAND, "out", option, cwd=forty, logs=logs).wait()
        assert second.code == 2 and "another run is writing to 'out'" in second.err
        assert len(second.err.splitlines()) == 1
    assert files(forty / "out") == there
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0
    assert start(*COMMAND, "whole", cwd=forty, logs=logs).wait().code == 0
    assert files(forty / "out") == files(forty / "whole")


@needs_server
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_gone_on(forty: Path, logs: Path, number: int, code: int) -> None:
    process = start(*COMMAND, "out", cwd=forty, logs=logs, prepare=slow_disk)
    process.until(lambda: len(names(forty / "out")) > 5)
    process.signal(number)
    stopped = process.wait()
    assert stopped.code == code and not list((forty / "out").rglob("*.tmp"))
    assert "--resume" in stopped.err and len(stopped.err.splitlines()) == 1
    there = files(forty / "out")
    assert 5 < len(there) < 40
    assert f"interrupted after {len(there)} of 40 pictures" in stopped.err
    refused = start(*COMMAND, "out", cwd=forty, logs=logs).wait()
    assert refused.code == 2 and "--resume" in refused.err
    assert start(*COMMAND, "out", "--resume", cwd=forty, logs=logs).wait().code == 0
    after = files(forty / "out")
    assert len(after) == 40 and there.items() <= after.items()
