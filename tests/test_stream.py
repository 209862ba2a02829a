"""--files-from: names in, an answer each, before the next is waited for."""

from __future__ import annotations

import io
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from processes import COMMAND, Run
from tiny import files, noisy_picture, write

from cdnctl import images
from cdnctl.cli.stream import SOON, names

OPTIONS = ("--sigma", "25", "--json")


class Slow(io.RawIOBase):
    """A file whose parts come when they are asked for, but each only after a sign."""

    def __init__(self, *parts: bytes):
        self.parts, self.sign = list(parts), threading.Semaphore(1)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        if not self.parts:
            return 0
        self.sign.acquire()
        part = self.parts.pop(0)
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"a.png\nb c.png\n", ["a.png", "b c.png"]),
        (b"a.png\r\n\r\n\nb.png", ["a.png", "b.png"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"\xff.png\n", ["\udcff.png"]),
        (b"", []),
        (b"\n" * 200_000 + b"a" * 100_000, ["a" * 100_000]),
    ],
)
def test_names_of_a_file(content: bytes, expected: list[str]) -> None:
    assert [name for name in names(io.BytesIO(content)) if name is not None] == expected


def test_a_pause_between_names_is_told() -> None:
    source = Slow(b"a\nb\nc", b"d\n", b"e")
    told = names(source)  # type: ignore[arg-type]
    found = [next(told), next(told), next(told)]
    assert found == ["a", "b", None], "of cd, only half has come"
    source.sign.release()
    assert next(told) == "cd" and next(told) is None
    source.sign.release()
    assert [n for n in told if n is not None] == ["e"]
    assert SOON < 1


def test_outputs_are_those_of_single_files(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    """Folders are mirrored, a bad name costs that name alone, and a picture is the same."""
    listed = ["a.png", "sub/b.jpg", "gone.png", "text.png", "sub", str(tmp_path / "away" / "c.tif")]
    for i, name in enumerate(("a.png", "sub/b.jpg", "away/c.tif")):
        write(tmp_path / name, noisy_picture(20, 24, seed=i))
    (tmp_path / "text.png").write_text("text")
    options = ("--model", weights, *OPTIONS)
    stdin = "\n".join(listed).encode()
    done = cdnctl("denoise", "--files-from", "-", "-o", "out", *options, stdin=stdin)
    assert done.code == 1
    events = {r["input"]: r for r in done.records if "input" in r}
    assert list(map(str, events)) and events.keys() == set(listed)
    assert {name for name, r in events.items() if r["event"] == "failed"} == set(listed[2:5])
    assert all(name in events[name]["error"] for name in listed[2:5])
    assert done.records[-1]["restored"] == 3 and done.records[-1]["failed"] == 3
    assert files(tmp_path / "out").keys() == {"a.png", "sub/b.jpg", "c.tif"}
    (tmp_path / "list").write_bytes(stdin)
    one = cdnctl("denoise", "a.png", "-o", "alone.png", *options)
    assert one.code == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "alone.png").read_bytes()

    again = cdnctl("denoise", "--files-from", "list", "-o", "out", "--resume", *options)
    kinds = [r["event"] for r in again.records]
    assert kinds.count("skipped") == 3 and kinds.count("failed") == 3
    manifest = (tmp_path / "out" / "cdnctl-manifest.jsonl").read_text().splitlines()
    assert sum("output_sha256" in json.loads(line) for line in manifest) == 3


def test_names_that_would_harm_each_other(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    for name in ("a.png", "one/x.png", "two/x.png", "out/y.png"):
        write(tmp_path / name)
    away = [str(tmp_path / name) for name in ("one/x.png", "two/x.png", "out/y.png")]
    before = files(tmp_path / "out")
    options = ("--model", weights, *OPTIONS)
    done = cdnctl(
        "denoise", "--files-from", "-", "-o", "out", *options, stdin="\n".join(away).encode()
    )
    errors = {r["input"]: r["error"] for r in done.records if r["event"] == "failed"}
    assert errors.keys() == set(away[1:]) and done.code == 1
    assert "both be written to 'out/x.png'" in errors[away[1]] and "itself" in errors[away[2]]
    assert files(tmp_path / "out").items() >= before.items()
    # Beside the input, and there already.
    first = cdnctl("denoise", "--files-from", "-", *options, stdin=b"a.png\n")
    assert first.code == 0 and (tmp_path / "a_denoised.png").exists()
    second = cdnctl("denoise", "--files-from", "-", *options, stdin=b"a.png\n")
    assert second.code == 1 and "'a_denoised.png' exists" in second.records[0]["error"]
    third = cdnctl("denoise", "--files-from", "-", *options, "--overwrite", stdin=b"a.png\na.png")
    assert [r["event"] for r in third.records] == ["restored", "restored", "finished"]


@pytest.mark.parametrize(
    "args, stdin, words",
    [
        (("a.png", "--files-from", "-"), b"", ["'a.png'", "--files-from -"]),
        (("--files-from", "none.txt"), b"", ["'none.txt'", "No such file"]),
        (("--files-from", "-", "--dry-run"), b"a.png", ["--dry-run"]),
        (("--files-from", "-", "--compare", "b.png"), b"a.png", ["--compare"]),
        (("--files-from", "-", "--resume"), b"a.png", ["--resume", "-o FOLDER"]),
        (("--files-from", "-", "-o", "out", "--format", "jpg", "--depth", "16"), b"a.png",
         ["--depth 16"]),
        ((), b"", ["missing argument", "--files-from"]),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, cdnctl: Run, weights: Path, args: tuple[str, ...], stdin: bytes,
    words: list[str],
) -> None:  # fmt: skip
    write(tmp_path / "a.png")
    done = cdnctl("denoise", *args, "--model", weights, stdin=stdin)
    assert done.code == 2 and all(word in done.err for word in words)
    assert len(done.err.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"a.png"}


def test_a_repair_takes_names_too(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    options = ("--steps", "1", "--model", weights, "--json")
    done = cdnctl("upscale", "--files-from", "-", "-o", "out", *options, stdin=b"a.png")
    assert done.code == 0
    assert images.read(tmp_path / "out" / "a.png").samples.shape == (40, 48, 3)


@pytest.mark.slow
def test_a_caller_gets_each_answer_before_it_asks_again(tmp_path: Path, weights: Path) -> None:
    """Though small pictures of one size would wait for others to go with."""
    command = [COMMAND, "denoise", "--files-from", "-", "-o", "out", "--model", weights, *OPTIONS]
    for i in range(3):
        write(tmp_path / f"{i}.png", noisy_picture(20, 24, seed=i))
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        guard = threading.Timer(120, process.kill)  # rather than hang
        guard.start()
        for name in ("0.png", "none.png", "1.png", "2.png"):
            process.stdin.write(f"{name}\n")
            answer = json.loads(process.stdout.readline())
            assert answer["input"] == name
            assert answer["event"] == ("failed" if name == "none.png" else "restored")
            assert (tmp_path / "out" / name).exists() == (name != "none.png")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["event"] == "finished"
        assert process.wait() == 1
        guard.cancel()
    found = [images.read(tmp_path / "out" / f"{i}.png").samples for i in range(3)]
    assert not np.array_equal(found[0], found[1])
