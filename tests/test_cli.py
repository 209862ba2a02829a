"""The command line: exit codes, messages, and files that are whole or not there at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
import typer
from processes import COMMAND, Result, Run, checked
from tiny import CLASSES, files, noisy_picture, picture, save_tiny, write

from cdnctl import checkpoints, headers, images
from cdnctl import files as naming
from cdnctl.api import load
from cdnctl.checkpoints import find_weights, load_model, read_header, save_model, weights_hash
from cdnctl.cli import app
from cdnctl.cli.options import parse_size
from cdnctl.errors import UsageError, WeightsError
from cdnctl.images import Image, Metadata
from cdnctl.training import loop, report
from cdnctl.training.objectives import OBJECTIVES
from cdnctl.training.state import STATE, read_run

pytestmark = pytest.mark.slow  # seconds each

NAMES = ["a b.png", "ä ö ü.jpg", "x[1] {y}.tif", "[bold]日本[/bold].png", "sub/'q\"uote.PNG"]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundled weights of this test alone."""
    save_tiny(tmp_path / "weights" / "random.safetensors")
    monkeypatch.setattr(checkpoints, "PACKAGE", tmp_path)
    return tmp_path / "weights"


# -- denoise: files and folders -------------------------------------------------------------


def test_a_folder_with_a_bad_file(tmp_path: Path, real: Run, weights: Path) -> None:
    source, out = tmp_path / "in put", tmp_path / "out"
    for name in NAMES:
        write(source / name)
    (source / "broken [1].png").write_text("this is text")
    before = files(source)
    done = real("denoise", source, "-o", out, "-r", "--model", weights, "--json", "--sigma", "50")
    assert done.code == 1
    assert files(source) == before
    assert files(out).keys() == set(NAMES)
    good = {r["output"]: r for r in done.records if r["event"] == "restored"}
    (bad,) = [r for r in done.records if r["event"] == "failed"]
    assert good.keys() == {str(out / n) for n in NAMES}
    for record in good.values():
        assert record["sigma"] == 50 and record["sigma_estimated"] is False
        assert sum(record["posterior"].values()) == pytest.approx(1, abs=1e-4)
        assert record["model"] == "tiny" and len(record["weights"]) == 16
    assert "broken [1].png" in bad["error"] and "broken [1].png" in done.err
    assert "1 of 6" in done.err


def test_one_file_goes_beside_itself(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    for name in NAMES:
        source = write(tmp_path / name)
        before = source.read_bytes()
        done = cdnctl("denoise", source, "--model", weights)
        output = source.with_name(f"{source.stem}_denoised{source.suffix}")
        assert done.code == 0 and str(output) in done.text and "estimated" in done.text
        assert images.read(output).pixels.shape == (20, 24, 3)
        assert source.read_bytes() == before
        assert not cdnctl("denoise", source, "--model", weights, "-q", "--overwrite").out


@pytest.mark.slow
def test_pipes_give_what_files_give(tmp_path: Path, cdnctl: Run, real: Run, weights: Path) -> None:
    write(tmp_path / "a.png", metadata=Metadata(xmp=b"<note/>", dpi=(72, 72)))
    data = (tmp_path / "a.png").read_bytes()
    options = ("--model", weights, "--class", "dog", "--sigma", "25")
    assert cdnctl("denoise", "a.png", "-o", "by_file.png", *options).code == 0
    expected = (tmp_path / "by_file.png").read_bytes()

    assert real("denoise", "-", "-o", "piped.png", *options, stdin=data).code == 0
    assert (tmp_path / "piped.png").read_bytes() == expected
    out = real("denoise", "a.png", "-o", "-", *options)
    assert out.code == 0 and out.out == expected and "sigma 25" in out.err
    both = cdnctl("denoise", "-", "-o", "-", "-q", *options, stdin=data)
    assert both.code == 0 and both.out == expected and not both.err
    plain = cdnctl("denoise", "-", "-o", "-", "--strip-metadata", *options, stdin=data)
    assert images.read(io.BytesIO(plain.out)).metadata == Metadata()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_pipe_keeps_the_format(tmp_path: Path, cdnctl: Run, weights: Path, suffix: str) -> None:
    source = write(tmp_path / f"a{suffix}")
    command = ("denoise", "--json", "--model", weights, "-o", "-")
    done = cdnctl(*command, source)
    assert images.read(io.BytesIO(done.out)).suffix == suffix
    assert json.loads(done.err)["output"] == "-"
    assert cdnctl(*command, "-", stdin=source.read_bytes()).out == done.out
    assert cdnctl("denoise", source, "-q", "--model", weights).code == 0
    assert (tmp_path / f"a_denoised{suffix}").read_bytes() == done.out


def test_a_pipe_gives_png_where_the_format_cannot_be_written(
    tmp_path: Path, cdnctl: Run, weights: Path
) -> None:
    gif = io.BytesIO()
    PIL.Image.new("L", (9, 8), 100).save(gif, "GIF")
    # Only this kind of BMP has alpha: its header tells where.
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII4I52x", 108, 9, 8, 1, 32, 3, 288, 0, 0, 0, 0, *masks)
    bmp = b"BM" + struct.pack("<IHHI", 410, 0, 0, 122) + header + bytes(range(36)) * 8
    assert images.read(io.BytesIO(bmp)).alpha is not None
    command = ("denoise", "-", "-o", "-", "-q", "--model", weights)
    for data in (gif.getvalue(), bmp):
        done = cdnctl(*command, stdin=data)
        assert done.code == 0 and images.read(io.BytesIO(done.out)).suffix == ".png"


def test_a_slash_makes_a_folder(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    source, options = write(tmp_path / "a.png"), ("--model", weights, "-q")
    for folder in ("nd/", "deep/er/", "x.png/", "nd2//"):
        assert cdnctl("denoise", source, "-o", folder, *options).code == 0
        assert files(tmp_path / folder).keys() == {"a.png"}
    again = cdnctl("denoise", source, "-o", "nd/", *options)
    assert again.code == 2 and "'nd/a.png' exists" in again.err
    assert cdnctl("denoise", "-", "-o", "nd3/", *options, stdin=source.read_bytes()).code == 2
    assert cdnctl("denoise", source, "-o", "nd3", *options).code == 2
    assert cdnctl("denoise", source, "-o", "a.png/", *options).code == 1
    assert not (tmp_path / "nd3").exists() and source.is_file()


@pytest.mark.slow
def test_the_limit_of_pixels_can_be_raised(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    PIL.Image.new("L", (1100, 1000)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    options = ("--model", weights, "--sigma", "25", "--max-megapixels")
    before = files(tmp_path)
    for args in (("denoise", "a.png"), ("denoise", "-", "-o", "b.png"), ("classify", "a.png"),
                 ("explain", "a.png", "-o", "c.png")):  # fmt: skip
        refused = cdnctl(*args, *options, "1", stdin=data)
        assert refused.code == 1 and "1100 x 1000" in refused.err
        assert "--max-megapixels 2" in refused.err and files(tmp_path) == before
        assert cdnctl(*args, *options, "2", "-q", stdin=data).code == 0
        before = files(tmp_path)
        assert f"{images.MAX_PIXELS / 1e6:.0f}" in cdnctl(args[0], "--help").text


def test_a_pipe_tells_what_a_format_cannot_hold(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    deep = write(tmp_path / "a.tif", dtype=np.uint16, metadata=Metadata(iptc=b"caption"))
    options = ("--model", weights, "--json")
    by_file = cdnctl("denoise", deep, "-o", "a.webp", *options)
    piped = cdnctl("denoise", "-", "-o", "b.webp", *options, stdin=deep.read_bytes())
    (notes,) = (record["notes"] for record in piped.records)
    assert notes == by_file.records[0]["notes"]
    assert notes[-2:] == ["uint16 samples stored as uint8", "IPTC data left out"]
    done = cdnctl("denoise", "-", "-o", "c.xyz", *options, stdin=deep.read_bytes())
    assert done.code == 2 and ".webp" in done.err


def test_an_empty_argument_is_not_the_current_folder(
    tmp_path: Path, cdnctl: Run, weights: Path
) -> None:
    """What a script gets from a variable that is not set."""
    write(tmp_path / "a.png")
    for args in (("", "-o", "out"), ("a.png", "-o", "")):
        done = cdnctl("denoise", *args, "--model", weights)
        assert done.code == 2 and "empty" in done.err
    assert files(tmp_path).keys() == {"a.png"}


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n\0\0"])
def test_bad_input_through_a_pipe(
    cdnctl: Run, weights: Path, tmp_path: Path, content: bytes
) -> None:
    done = cdnctl("denoise", "-", "-o", "out.png", "--model", weights, stdin=content)
    assert done.code == 1 and "standard input" in done.err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "args", [("-",), ("-", "a.png", "-o", "x.png"), ("a.png", "b.png", "-o", "-"), ("-", "-")]
)
def test_pipes_take_one_picture(tmp_path: Path, cdnctl: Run, weights: Path, args: Any) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / name)
    assert cdnctl("denoise", *args, "--model", weights).code == 2
    assert files(tmp_path).keys() == {"a.png", "b.png"}


def test_what_exists_is_left_alone(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png"):
        write(source / name)
    out.mkdir()
    (out / "b.png").write_text("mine")
    command = ("denoise", source, "-o", out, "--model", weights)

    refused = cdnctl(*command)
    assert refused.code == 2 and "b.png" in refused.err and "--overwrite" in refused.err
    assert os.listdir(out) == ["b.png"] and (out / "b.png").read_text() == "mine"
    assert cdnctl(*command, "--overwrite", "--skip-existing").code == 2
    assert cdnctl(*command, "--skip-existing").code == 0
    assert files(out).keys() == {"a.png", "b.png"} and (out / "b.png").read_text() == "mine"
    first = (out / "a.png").read_bytes()
    assert cdnctl(*command, "--overwrite").code == 0
    assert (out / "b.png").read_bytes()[1:4] == b"PNG" and (out / "a.png").read_bytes() == first
    assert cdnctl(*command, "--skip-existing").code == 0  # nothing is left to do
    assert cdnctl("denoise", "-", "-o", out / "a.png", "--model", weights).code == 2


def test_the_originals_are_never_touched(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    """Whatever is permitted."""
    for name in ("a.png", "a_denoised.png"):
        write(tmp_path / name)
    before = files(tmp_path)
    force = ("--overwrite", "--model", weights)
    assert cdnctl("denoise", "a.png", "-o", "a.png", *force).code == 2
    assert cdnctl("denoise", ".", "-o", ".", *force).code == 2
    assert cdnctl("denoise", "a.png", "a_denoised.png", *force).code == 2
    assert cdnctl("denoise", "a.png", "-o", "b.png", "--uncertainty", "a.png", *force).code == 2
    assert cdnctl("explain", "a.png", "-o", "./a.png", *force).code == 2
    assert files(tmp_path) == before


def test_awkward_pictures(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "in" / "dot.png", noisy_picture(1, 1))
    write(tmp_path / "in" / "gray dot.png", noisy_picture(1, 1, 1))
    write(tmp_path / "in" / "line.png", noisy_picture(1, 50))
    write(tmp_path / "in" / "gray.png", noisy_picture(20, 24, 1))
    write(tmp_path / "in" / "flat.png", np.full((16, 16, 3), 0.5, np.float32))
    write(tmp_path / "in" / "deep.tif", dtype=np.float32)
    done = cdnctl("denoise", "in", "-o", "out", "--model", weights)
    assert done.code == 0
    assert done.err.startswith("6 pictures restored") and len(done.err.splitlines()) == 1
    for file in (tmp_path / "in").iterdir():
        source, result = images.read(file), images.read(tmp_path / "out" / file.name)
        assert result.pixels.shape == source.pixels.shape and result.dtype == source.dtype


def test_16_bit_rgba_with_icc(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    icc = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    alpha = np.random.default_rng(0).integers(0, 2**16, (20, 24), np.uint16)
    write(tmp_path / "a.png", dtype=np.uint16, alpha=alpha, metadata=Metadata(icc=icc))
    assert cdnctl("denoise", "a.png", "--model", weights, "--sigma", "50").code == 0
    before, after = (images.read(tmp_path / n) for n in ("a.png", "a_denoised.png"))
    assert after.dtype == np.uint16 and after.metadata.icc == icc
    np.testing.assert_array_equal(after.alpha, alpha)
    assert np.abs(after.pixels - before.pixels).max() > 0.01
    low_bytes = np.rint(after.pixels * 65535).astype(np.uint16) % 257
    assert len(np.unique(low_bytes)) > 100, "16 bits, not 8 in disguise"


def test_outputs_that_cannot_be_written(
    tmp_path: Path, cdnctl: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / "in" / name)
    (tmp_path / "file").touch()
    before = files(tmp_path)
    options = ("--model", weights)
    below = cdnctl("denoise", "in", "-o", "file", *options)
    assert below.code == 3 and "choose another output folder" in below.err
    assert cdnctl("denoise", "in/a.png", "-o", "file/deep/a.png", *options).code == 1
    assert cdnctl("explain", "in/a.png", "-o", "file/a.png", *options).code == 1
    assert cdnctl("evaluate", "in", "--csv", "file/a.csv", *options).code == 2
    assert cdnctl("models", "export", weights, "file/m.safetensors").code == 3
    assert cdnctl("denoise", "in/a.png", "-o", "a.xyz", *options).code == 2

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(naming, "give_name", full)
        done = cdnctl("denoise", "in", "-o", "out", *options)
    assert done.code == 3 and "disk is full" in done.err and len(done.err.splitlines()) == 1
    assert files(tmp_path) == before


@pytest.mark.slow
def test_file_names_need_not_be_unicode(tmp_path: Path, real: Run, weights: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.png")
    data = write(tmp_path / "a.png").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / f"broken {name}").touch()
    done = real("denoise", "in", "-o", "out", "--json", "--model", weights)
    assert done.code == 1
    *each, _ = done.records
    assert {r["input"] for r in each} == {f"in/{name}", f"in/broken {name}"}
    assert files(tmp_path / "out").keys() == {name}


# -- denoise: options -----------------------------------------------------------------------


def test_sigma_looks_like_the_other_unit(tmp_path: Path, real: Run) -> None:
    write(tmp_path / "a.png")
    done = real("denoise", "a.png", "--sigma", "0.2")
    assert done.code == 2 and "did you mean --sigma 51" in done.err
    assert files(tmp_path).keys() == {"a.png"}


@pytest.mark.parametrize(
    "args",
    [
        ("--sigma", "256"),
        ("--sigma", "-1"),
        ("--sigma", "nan"),
        ("--sigma", "loud"),
        ("--class", "cat:much"),
        ("--class", ""),
        ("--class", "cat:-1"),
        ("--class", "cat:0"),
        ("--class", "cat:0.5,zebra:0.5"),
        ("--strength", "1.5"),
        ("--strength", "nan"),
        ("--class", "cat", "--guidance", "inf"),
        ("--tile", "0"),
        ("--tile", "[/b]"),
        ("--threads", "0"),
        ("--threads", "1000000"),
        ("--device", "toaster"),
        ("--device", "cpu:1"),
        ("--uncertainty", "u.xyz"),
        ("--uncertainty", "u.jpg"),
        ("--guidance", "2"),
        ("--guidance", "1", "--class", "none"),
        ("--nonsense",),
        ("--sigma",),
        ("missing.png",),
    ],
)
def test_wrong_values(tmp_path: Path, cdnctl: Run, weights: Path, args: tuple[str, ...]) -> None:
    write(tmp_path / "a.png")
    done = cdnctl("denoise", "a.png", "--model", weights, *args)
    assert done.code == 2 and not done.out
    assert done.err.startswith("cdnctl: error: ") and len(done.err.splitlines()) == 1
    assert files(tmp_path).keys() == {"a.png"}


@pytest.mark.parametrize(
    "args, words",
    [
        (("--nonsense",), ["--nonsense", "cdnctl --help"]),
        (("nonsense",), ["'nonsense'", "cdnctl --help"]),
        (("denoise",), ["missing argument", "cdnctl denoise --help"]),
        (("denoise", "a", "--strenth", "1"), ["--strenth", "--strength"]),
        (("denoise", "a", "--tile", "soft"), ["--tile", "'soft'", "cdnctl denoise --help"]),
        (("denoise", "a", "--tile", "0"), ["--tile", "'0'", "1"]),
        (("denoise", "a", "--tile", "[/b]"), ["'[/b]'"]),
        (("denoise", "a", "--guidance", "2"), ["--guidance 2", "give --class"]),
        (("explain", "a"), ["'-o'", "cdnctl explain --help"]),
        (("explain", "a", "-o", "b.png", "--class", "none"), ["--class none", "auto"]),
        (("evaluate", "a", "b"), ["b", "cdnctl evaluate --help"]),
        (("models", "nonsense"), ["'nonsense'", "cdnctl models --help"]),
        (("models", "show"), ["missing argument", "cdnctl models show --help"]),
        (("bench", "cost", "--methods", "a,wavelet,b"), ["unknown 'a', 'b'; known:"]),
        (
            ("bench", "pictures"),
            ["'pictures'", "quality, cost, folders, gradient, repair, confidence, learning"],
        ),
        (("bench", "--gradient"), ["--gradient", "'cdnctl bench gradient'"]),
        (("bench", "qualty"), ["'qualty'", "'quality'"]),
        (("evaluate", "a", "--attack", "linf:1"), ["--attack", "'cdnctl attack'"]),
        (("evaluate", "a", "--ood", "b"), ["--ood", "'cdnctl ood'"]),
        (("attack", "a", "--radius", "linf"), ["'linf'", "--radius", "linf:4"]),
        (("train", "--set"), ["'--set'"]),
    ],
    ids=lambda args: " ".join(args),
)
def test_all_errors_have_one_form(cdnctl: Run, args: Any, words: list[str]) -> None:
    """One line, whoever finds out: no boxes, no usage, no names of Python's types."""
    done = cdnctl(*args)
    assert done.code == 2 and not done.out and len(done.err.splitlines()) == 1
    assert done.err.startswith("cdnctl: error: ") and all(word in done.err for word in words)


def test_help_is_no_error(cdnctl: Run) -> None:
    asked = cdnctl("--help")
    assert asked.code == 0 and "denoise" in asked.text and not asked.err
    panels = re.findall(r"^╭─ (\w+) ─", asked.text, re.M)
    assert panels == ["Options", "Restore", "Understand", "Measure", "Models", "Fields"]
    shown = set(re.findall(r"^│ (\w+) ", asked.text, re.M))
    assert shown == set(typer.main.get_group(app).commands), "each in a panel"
    bare = subprocess.run([COMMAND], capture_output=True, text=True)
    assert bare.returncode == 2 and "denoise" in bare.stdout and not bare.stderr


def test_an_interrupted_command_says_so(
    tmp_path: Path, cdnctl: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write(tmp_path / "a.png")
    monkeypatch.setattr(images, "read", interrupt)
    done = cdnctl("classify", "a.png", "--model", weights)
    assert done.code == 130 and done.err == "cdnctl: error: interrupted\n"


def test_what_a_class_changes_is_told(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.tif", dtype=np.float32)
    command = ("denoise", "a.tif", "--model", weights, "--sigma", "50", "--overwrite")

    def result(*args: str) -> tuple[dict[str, Any], np.ndarray]:
        (record,) = cdnctl(*command, "--json", *args).records
        return record, images.read(tmp_path / "a_denoised.tif").pixels

    free, plain = result()
    told, changed = result("--class", "dog", "--guidance", "3")
    assert free["class_change"] is None
    rms = 255 * np.sqrt(np.mean((changed - plain) ** 2))
    assert told["class_change"] == pytest.approx(rms, rel=1e-3)
    text = cdnctl(*command, "--class", "dog", "--guidance", "3").text
    assert f"telling the class changed {rms:.2f} of 255 (rms)" in text
    assert "telling" not in cdnctl(*command).text
    faint = cdnctl(*command, "--class", "dog", "--guidance", "1e-4").text
    assert "changed less than 0.01 of 255" in faint


def test_photographs_without_the_photo_weights(tmp_path: Path, cdnctl: Run, shelf: Path) -> None:
    (shelf / "random.safetensors").unlink()
    save_tiny(shelf / "small.safetensors", patch=32)
    write(tmp_path / "in" / "a.png", noisy_picture(48, 64))
    write(tmp_path / "small.png")
    for args in (("denoise", "in", "-o", "out"), ("denoise", "in/a.png"), ("classify", "in"),
                 ("explain", "in/a.png", "-o", "why.png"), ("evaluate", "in")):  # fmt: skip
        done = cdnctl(*args)
        assert done.code == 3 and "'photo'" in done.err and "--model" in done.err
        assert len(done.err.splitlines()) == 1
    assert files(tmp_path).keys() == {"in/a.png", "small.png", "weights/small.safetensors"}
    assert cdnctl("denoise", "small.png").code == 0
    assert cdnctl("denoise", "in/a.png", "--model", "small").code == 0
    assert "'photo'" in cdnctl("doctor", "--device", "cpu").err


@pytest.mark.parametrize(
    "text, size",
    [
        ("1", 1), ("500M", 500 * 2**20), ("2G", 2**31), ("2g", 2**31), ("1.5GB", 3 * 2**29),
        ("2 GiB", 2**31), ("512KiB", 2**19), (" 3T ", 3 * 2**40), ("0.5k", 512), ("7B", 7),
    ],
)  # fmt: skip
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "0", "0M", "-1G", "G", "1X", "1GG", "1e9", "nan", "inf", "1,5G", "2 G B", "9" * 30, "1P"],
)
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--memory is '.*but must be an amount such as 500M"):
        parse_size(text)


@pytest.mark.slow
def test_memory_reaches_the_network(
    tmp_path: Path, cdnctl: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png", np.tile(noisy_picture(240, 300), (3, 2, 1)))
    command = ("denoise", "a.png", "--model", weights, "--sigma", "25", "-q", "-o")
    assert cdnctl(*command, "whole.png").code == 0
    pixels: list[int] = []
    network = type(load_model(weights)[0])
    correct = network.correction

    def watched(self: Any, y: Any, *args: Any) -> Any:
        pixels.append(y[0, 0].numel())
        return correct(self, y, *args)

    monkeypatch.setattr(network, "correction", watched)
    assert cdnctl(*command, "parts.png", "--memory", "10M").code == 0
    assert len(pixels) > 1 and max(pixels) <= 256**2
    whole, parts = (
        images.read(tmp_path / n).samples.astype(int) for n in ("whole.png", "parts.png")
    )
    assert np.abs(whole - parts).max() <= 1 and (whole != parts).mean() < 1e-3
    assert cdnctl(*command, "b.png", "--memory", "lots").code == 2


def test_unknown_class_names_the_near_ones(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    for command in (("denoise",), ("explain", "-o", "b.png")):
        done = cdnctl(*command, "a.png", "--class", "dogs", "--model", weights)
        assert done.code == 2 and "did you mean 'dog'" in done.err


@pytest.mark.slow
def test_unknown_model(tmp_path: Path, real: Run) -> None:
    write(tmp_path / "a.png")
    done = real("denoise", "a.png", "--model", "nonesuch")
    assert done.code == 3 and "'nonesuch'" in done.err
    assert files(tmp_path).keys() == {"a.png"}


def test_damaged_weights(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "half.safetensors").write_bytes(weights.read_bytes()[:5000])
    for args in (("denoise", "a.png", "--model"), ("models", "show")):
        assert cdnctl(*args, "half.safetensors").code == 3
    assert files(tmp_path).keys() == {"a.png", "half.safetensors"}


def test_a_device_that_is_not_there(
    tmp_path: Path, cdnctl: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:7"):
        done = cdnctl("denoise", "a.png", "--model", weights, "--device", device)
        assert done.code == 3 and f"'{device}'" in done.err
    assert files(tmp_path).keys() == {"a.png"}


def test_options_reach_the_pixels(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    """Each changes the result, but for the neutral ones."""
    write(tmp_path / "a.tif", dtype=np.float32)

    def result(*args: str) -> np.ndarray:
        done = cdnctl("denoise", "a.tif", "--model", weights, "--overwrite", "--sigma=50", *args)
        assert done.code == 0
        return images.read(tmp_path / "a_denoised.tif").pixels

    plain, given = result(), images.read(tmp_path / "a.tif").pixels
    np.testing.assert_array_equal(result("--strength", "0"), given)
    np.testing.assert_allclose(result("--strength", "0.5"), (plain + given) / 2, atol=1e-6)
    np.testing.assert_allclose(result("--class", "dog", "--guidance", "0"), plain, atol=1e-6)
    for args in (("--class", "dog"), ("--class=cat:1,dog:2",), ("--sigma", "40")):
        assert np.abs(result(*args) - plain).max() > 1e-4


def test_noise_beyond_training_is_told(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    """The model was trained up to 0.4, which is 102 on this scale; gray counts more."""
    write(tmp_path / "gray.png", noisy_picture(20, 24, 1))
    write(tmp_path / "rgb.png")
    options = ("--model", weights, "--overwrite", "--sigma")
    assert "outside" in cdnctl("denoise", "rgb.png", *options, "110").err
    assert not cdnctl("denoise", "rgb.png", *options, "100").err
    assert "sqrt(3)" in cdnctl("denoise", "gray.png", *options, "100").err
    assert not cdnctl("denoise", "gray.png", *options, "50").err


def test_uncertainty(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    command = ("denoise", "a.png", "--model", weights, "--sigma", "51", "--uncertainty")
    assert cdnctl(*command, "u.tif").code == 0
    std = images.read(tmp_path / "u.tif")
    assert std.pixels.shape == (20, 24, 1) and std.dtype == np.float32
    assert std.pixels.min() >= 0 and 0 < std.pixels.max() < 1
    assert cdnctl(*command, "u.npy", "--overwrite").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "u.npy"), std.samples[..., 0])
    assert cdnctl(*command, "u.png", "--overwrite").code == 0
    shown = images.read(tmp_path / "u.png")
    assert shown.dtype == np.uint8 and len(np.unique(shown.samples.reshape(-1, 3), axis=0)) > 50

    assert cdnctl(*command, "new/u.tif", "-o", "other/a.png").code == 0
    assert (tmp_path / "new" / "u.tif").read_bytes() == (tmp_path / "u.tif").read_bytes()

    before = files(tmp_path)
    assert cdnctl(*command, "u.tif").code == 2
    assert cdnctl(*command, "v.tif", "--skip-existing").code == 0
    assert cdnctl(*command, "a_denoised.png", "--overwrite").code == 2
    assert cdnctl(*command, "v.tif", "-o", "-").code == 2
    assert cdnctl(*command, "v.tif", "u.png", "-o", "out").code == 2
    assert files(tmp_path) == before


def test_compare(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    command = ("denoise", "a.png", "--model", weights, "--sigma", "51", "--compare")
    assert cdnctl(*command, "new/both.png", "-o", "b.png").code == 0
    both = images.read(tmp_path / "new" / "both.png").samples
    for name, columns in (("a.png", slice(24)), ("b.png", slice(-24, None))):
        np.testing.assert_array_equal(both[-20:, columns], images.read(tmp_path / name).samples)
    assert both.shape[0] > 20 and both.shape[1] > 48

    write(tmp_path / "c.png")
    before = files(tmp_path)
    for args in (
        ("b.png", "-o", "b.png", "--overwrite"),
        ("a.png", "--overwrite"),
        ("x.xyz",),
        ("x.npy",),
        ("new/both.png",),
        ("x.png", "-o", "-"),
        ("x.png", "c.png", "-o", "out"),
        ("x.png", "--uncertainty", "x.png"),
    ):
        done = cdnctl(*command, *args)
        assert done.code == 2 and "x.png" not in files(tmp_path), args
    assert files(tmp_path) == before


@pytest.mark.slow
def test_help_lists_the_classes_without_torch(cdnctl: Run) -> None:
    """It must come at once."""
    bundled = checkpoints.bundled()
    env = os.environ | {"COLUMNS": "400", "NO_COLOR": "1"}
    code = (
        "import sys; sys.argv = ['cdnctl', sys.argv[1], '--help']\n"
        "import atexit; atexit.register(lambda: print('loaded:', *sys.modules))\n"
        "from cdnctl.cli import main; main()"
    )
    for command in ("denoise", "explain"):
        done = subprocess.run(
            [sys.executable, "-c", code, command], env=env, capture_output=True, text=True
        )
        text, loaded = done.stdout.split("loaded:")
        assert not {"torch", "numpy"} & set(loaded.split())
        for name, path in bundled.items():
            assert f"Classes of {name}: {', '.join(read_header(path).classes)}." in text


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 99, b"\x02" + bytes(7) + b"[]"])
def test_damaged_weights_have_no_classes(tmp_path: Path, weights: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert headers.classes(tmp_path / "a.safetensors") == []
    assert headers.classes(tmp_path / "none.safetensors") == []
    assert headers.classes(weights) == list(CLASSES)


# -- signals --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["interrupt", "terminate"]
)
def test_stopped_in_a_folder(tmp_path: Path, weights: Path, number: int, code: int) -> None:
    first = write(tmp_path / "in" / "000.png", noisy_picture(200, 300))
    for i in range(1, 300):
        shutil.copy(first, first.with_name(f"{i:03}.png"))
    command = [COMMAND, "denoise", "in", "-o", "out", "--model", weights, "--sigma", "50", "--json"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        out = process.stdout.readline()
        process.send_signal(number)
        # Not communicate: it misses what readline has read ahead.
        out, err = out + process.stdout.read(), process.stderr.read()
    result = Result(process.returncode, out.encode(), err)
    checked(result, tmp_path)
    assert process.returncode == code
    done = files(tmp_path / "out")
    assert 1 <= len(done) < 300 and len(set(done.values())) == 1, "every file is whole"
    told = {Path(r["output"]).name for r in result.records if r["event"] == "restored"}
    assert told == done.keys(), "every one is told of"
    assert f"interrupted after {len(done)} of 300 pictures" in err


@pytest.mark.slow
def test_nobody_reads(tmp_path: Path, weights: Path) -> None:
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png")
    read, end = os.pipe()
    os.close(read)
    process = subprocess.run(
        [COMMAND, "classify", "in", "--model", weights],
        cwd=tmp_path,
        stdout=end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(end)
    assert process.returncode == 1 and "Traceback" not in process.stderr


# -- classify, explain, evaluate ------------------------------------------------------------


def test_classify(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    for name in NAMES:
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").touch()
    command = ("classify", "in", "-r", "--model", weights, "--sigma", "25")
    done = cdnctl(*command, "--json", "--top", "2")
    assert done.code == 1
    good = [r for r in done.records if "error" not in r]
    assert {r["input"] for r in good} == {f"in/{n}" for n in NAMES}
    for record in good:
        values = list(record["classes"].values())
        assert len(values) == 2 and 1 >= values[0] >= values[1] and record["sigma"] == 25
        assert record["scale"] == 1 and record["size"] == [24, 20]
    (bad,) = [r for r in done.records if "error" in r]
    assert "empty" in bad["error"]
    plain = cdnctl(*command)
    assert plain.code == 1 and "broken.png" in plain.err
    assert all(any(c in line for c in CLASSES) for line in plain.text.splitlines())
    assert cdnctl("classify", "nothing", "--model", weights).code == 2


def test_classify_says_its_scale(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "large.png", noisy_picture(128, 192))
    write(tmp_path / "small.png")
    command = ("classify", "large.png", "small.png", "--model", weights)
    large, small = cdnctl(*command, "--json").records
    assert large["scale"] == 0.5 and large["size"] == [96, 64]
    assert small["scale"] == 1 and small["size"] == [24, 20]
    large, small = cdnctl(*command).text.splitlines()
    assert large.endswith("seen at 96 x 64 pixels (1/2)") and "seen at" not in small


def test_explain(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    command = ("explain", "a.png", "-o", "why.png", "--model", weights)
    done = cdnctl(*command, "--class", "café crème")
    assert done.code == 0 and "café crème" in done.text
    sheet = images.read(tmp_path / "why.png")
    assert sheet.pixels.shape[2] == 3 and min(sheet.pixels.shape[:2]) > 100
    assert cdnctl(*command).code == 2
    assert cdnctl(*command, "--overwrite").code == 0
    numbers = ("explain", "a.png", "--model", weights, "--class", "dog", "-o")
    assert cdnctl(*numbers, "why.tif").code == cdnctl(*numbers, "why.npy").code == 0
    bare = images.read(tmp_path / "why.tif").samples
    assert bare.shape == (20, 24, 1) and bare.dtype == np.float32 and bare.min() < 0 < bare.max()
    np.testing.assert_array_equal(np.load(tmp_path / "why.npy"), bare[..., 0])
    assert cdnctl(*numbers, "why.xyz").code == 2
    (tmp_path / "text.png").write_text("text")
    assert cdnctl("explain", "text.png", "-o", "no.png", "--model", weights).code == 1
    assert not (tmp_path / "no.png").exists()


def test_evaluate(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    for i, name in enumerate(CLASSES):
        write(tmp_path / "in" / name / "1.png", picture(20, 24, top=30 * i))
    command = ("evaluate", "in", "--sigma", "15,50", "--model", weights)
    done = cdnctl(*command, "--json", "--csv", "rows.csv")
    assert done.code == 0
    (report,) = done.records
    assert [s["sigma"] for s in report["scores"]] == [15, 50]
    assert all(s["pictures"] == 3 and s["psnr"] > 0 for s in report["scores"])
    assert report["protocol"]["seed"] == 0 and len(report["protocol"]["weights"]) == 16
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {r["label"] for r in rows} == set(CLASSES)
    for score in report["scores"]:
        psnrs = [float(r["psnr"]) for r in rows if float(r["sigma"]) == score["sigma"]]
        assert np.mean(psnrs) == pytest.approx(score["psnr"])

    (tmp_path / "in" / min(CLASSES) / "0.png").write_text("text")  # now the first of all
    worse = cdnctl(*command, "--json")
    assert worse.code == 1 and "0.png" in worse.err
    assert worse.records[0]["scores"] == report["scores"]
    table = cdnctl(*command)
    assert table.code == 1 and "PSNR" in table.text and "accuracy" in table.text
    assert cdnctl(*command, "--limit", "2", "--csv", "few.csv").code in (0, 1)
    with (tmp_path / "few.csv").open(encoding="utf-8", newline="") as file:
        few = [row for row in csv.DictReader(file) if not row["error"]]
    assert few and all(row in rows for row in few), "a limit changes no score"


@pytest.mark.parametrize("args", [("--sigma", "auto"), ("--sigma", ""), ("--noisy", "nowhere")])
def test_evaluate_refuses(tmp_path: Path, cdnctl: Run, weights: Path, args: Any) -> None:
    write(tmp_path / "in" / "a.png")
    assert cdnctl("evaluate", "in", "--model", weights, *args).code == 2


def test_separation(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    """The classes of the folders, which need not be those of the model."""
    for i in range(12):
        write(tmp_path / "in" / f"class {i % 2}" / f"{i}.png", picture(20, 24, top=10 * i))
    command = ("evaluate", "in", "--separation", "--model", weights)
    done = cdnctl(*command, "--sigma", "0,25", "--json", "--csv", "layers.csv")
    (report,) = done.records
    layers = [r["layer"] for r in report["layers"] if r["sigma"] == 0]
    assert layers == ["picture", "stage 1", "stage 2", "class features"]
    assert [r["sigma"] for r in report["layers"]] == [0] * 4 + [25] * 4
    assert all(r["pictures"] == 12 and r["within"] > 0 for r in report["layers"])
    with (tmp_path / "layers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["within"]) for r in rows] == [r["within"] for r in report["layers"]]
    table = cdnctl(*command)
    assert table.code == 0 and "Fisher ratio" in table.text and "stage 2" in table.text
    assert "12 pictures are too few" in table.err and table.text.count("stage 1") == 1
    for more in (("--clip",), ("--plot", "a.png"), ("--noisy", "in"), ("--ensemble", "2")):
        assert cdnctl(*command, *more).code == 2
    write(tmp_path / "flat" / "a.png")
    flat = cdnctl("evaluate", "flat", "--separation", "--model", weights)
    assert flat.code == 2 and "FOLDER/CLASS" in flat.err


# -- models and doctor ----------------------------------------------------------------------


def test_models(cdnctl: Run, shelf: Path) -> None:
    assert "random" in cdnctl("models").text
    (record,) = cdnctl("models", "--json").records
    assert record == {"name": "random", "classes": list(CLASSES), "arch": "gradresnet"}
    by_name = cdnctl("models", "show", "random")
    assert by_name.code == 0 and "# random" in by_name.text and "café crème" in by_name.text
    assert cdnctl("models", "show", shelf / "random.safetensors").out == by_name.out
    assert cdnctl("models", "show", "nonesuch").code == 3


@pytest.mark.parametrize("given", [False, True])
def test_export_with_scores(tmp_path: Path, cdnctl: Run, weights: Path, given: bool) -> None:
    """What evaluate prints can be exported, added noise or given."""
    write(tmp_path / "in" / "a.png", picture(20, 24))
    write(tmp_path / "noisy" / "a.png")
    pair = ("--noisy", "noisy") if given else ("--sigma", "15,50")
    report = cdnctl("evaluate", "in", *pair, "--json", "--model", weights)
    (tmp_path / "scores.json").write_bytes(report.out)
    done = cdnctl("models", "export", weights, "out/m.safetensors", "--scores", "toy=scores.json")
    assert done.code == 0 and files(tmp_path / "out").keys() == {"m.safetensors", "m.md"}
    assert read_header(tmp_path / "out/m.safetensors").scores == {"toy": report.records[0]}
    shown = cdnctl("models", "show", "out/m.safetensors").text
    psnr = report.records[0]["scores"][0]["psnr"]
    assert shown == (tmp_path / "out/m.md").read_text("utf-8") and f"{psnr:.2f}" in shown
    half = cdnctl("models", "export", weights, "out/half.safetensors", "--half")
    assert half.code == 0
    sizes = [(tmp_path / "out" / f"{n}.safetensors").stat().st_size for n in ("half", "m")]
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"scores": [], "protocol": {"seed": 0}}',
                '{"scores": [{"psnr": "high"}], "protocol": {"seed": 0}}', None]
)  # fmt: skip
def test_export_refuses_other_scores(
    tmp_path: Path, cdnctl: Run, weights: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    assert cdnctl("models", "export", weights, "m.safetensors", "--scores", "x=s.json").code == 2
    assert files(tmp_path).keys() <= {"s.json"}


def test_export_refuses_other_names_and_sources(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    assert cdnctl("models", "export", weights, "m.md").code == 2
    assert cdnctl("models", "export", weights, "m.safetensors", "--scores", "x").code == 2
    assert cdnctl("models", "export", "none.safetensors", "m.safetensors").code == 3
    assert not files(tmp_path)


def test_show_damaged_scores(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    module, header = load_model(weights)
    odd = {"psnr": 31.5}
    header = type(header)(**{**vars(header), "scores": odd})
    save_model(tmp_path / "odd.safetensors", module.state_dict(), header)
    done = cdnctl("models", "show", "odd.safetensors")
    assert done.code == 3 and "'psnr'" in done.err


@pytest.mark.slow
def test_doctor(real: Run) -> None:
    """On the weights of the repository: they improve a noisy picture."""
    done = real("doctor", "--device", "cpu")
    assert done.code == 0, done.text
    assert "all is well" in done.text and "torch" in done.text


def test_doctor_finds_what_is_wrong(cdnctl: Run, shelf: Path) -> None:
    useless = cdnctl("doctor", "--device", "cpu")
    assert useless.code == 3 and "DOES NOT WORK" in useless.text
    (shelf / "random.safetensors").write_bytes(b"damaged")
    assert cdnctl("doctor", "--device", "cpu").code == 3
    (shelf / "random.safetensors").unlink()
    assert cdnctl("doctor", "--device", "cpu").code == 3


# -- train ----------------------------------------------------------------------------------

CONFIG = """
name = "toy"
[model]
widths = [8]
blocks = [1]
unshuffle = 2
norm = "pixel"
head = 8
[data]
patch = 16
batch = 2
holdout = 0
[optim]
steps = {steps}
warmup = 2
[run]
precision = "float32"
log_every = 1
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for i, name in enumerate(CLASSES):
        write(tmp_path / "data" / name / "1.png", picture(20, 24, top=30 * i))
    (tmp_path / "toy.toml").write_text(CONFIG.format(steps=6))
    (tmp_path / "long.toml").write_text(CONFIG.format(steps=1_000_000))
    return tmp_path / "data"


def steps(run: Path) -> list[int]:
    """Of results.csv."""
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_train_stop_and_resume(tmp_path: Path, cdnctl: Run, dataset: Path) -> None:
    train = ("train", dataset, "--config", "toy.toml", "--device", "cpu")
    stopped = cdnctl(*train, "--max-seconds", "0")
    run = tmp_path / "runs" / "1"
    assert stopped.code == 0 and "--resume runs/1" in stopped.err and steps(run) == [1]
    assert "cdnctl denoise PICTURE --model runs/1" in stopped.err
    resumed = cdnctl("train", "--resume", run, "--device", "cpu", "-q")
    assert resumed.code == 0 and not resumed.err and steps(run) == [1, 2, 3, 4, 5, 6]
    assert resumed.text.strip() == str(run / "last" / "model.safetensors")
    assert cdnctl(*train).code == 0 and steps(tmp_path / "runs" / "2") == [1, 2, 3, 4, 5, 6]

    # One weights file is as good as the other, and the command line takes either.
    first, second = (
        load_model(tmp_path / "runs" / n / "last" / "model.safetensors")[0].state_dict()
        for n in "12"
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    write(tmp_path / "a.png")
    assert cdnctl("denoise", "a.png", "--class", "dog", "--model", resumed.text.strip()).code == 0
    assert cdnctl(*train, "--init-from", resumed.text.strip(), "--max-seconds", "0").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_train_saves_when_told_to_stop(
    tmp_path: Path, cdnctl: Run, dataset: Path, number: int
) -> None:
    command = [COMMAND, "train", dataset, "--config", "long.toml", "--device", "cpu"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step 3/"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    checked(Result(process.returncode, out.encode(), err), tmp_path)
    assert process.returncode == 130 and "stopped and saved at step" in err
    run = tmp_path / "runs" / "1"
    step = read_run(run / STATE)["state"]["step"]
    assert 3 <= step < 1_000_000 and steps(run)[-1] == step
    assert load_model(run / "last" / "model.safetensors")[1].training["steps"] == step
    assert cdnctl("train", "--resume", run, "--max-seconds", "0", "--device", "cpu").code == 0
    assert steps(run) == list(range(1, step + 2))


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("data",),
        ("data", "--config", "nonesuch"),
        ("data", "--config", "data"),
        ("data", "--config", "bad.toml"),
        ("data", "--config", "key.toml"),
        ("data", "--config", "value.toml"),
        ("nowhere", "--config", "toy.toml"),
        ("empty", "--config", "toy.toml"),
        ("data", "--config", "toy.toml", "--resume", "runs/1"),
        ("--resume", "runs/1"),
        ("--resume", "data"),
        ("data", "--config", "toy.toml", "--init-from", "other.safetensors"),
    ],
)
def test_train_refuses(tmp_path: Path, cdnctl: Run, dataset: Path, args: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.toml").write_text("[model\n")
    (tmp_path / "key.toml").write_text("[optim]\nstep = 5\n")
    (tmp_path / "value.toml").write_text("[optim]\nsteps = 0\n")
    save_tiny(tmp_path / "other.safetensors", widths=[16, 24])
    before = files(tmp_path)
    assert cdnctl("train", *args, "--device", "cpu").code == 2
    assert files(tmp_path) == before
    assert not (tmp_path / "runs").exists(), "a run that never began"


def test_train_where_it_cannot(tmp_path: Path, cdnctl: Run, dataset: Path) -> None:
    (tmp_path / "file").touch()
    train = ("train", dataset, "--config", "toy.toml", "--device", "cpu")
    done = cdnctl(*train, "--runs", "file")
    assert done.code == 2 and "'file'" in done.err
    assert cdnctl(*train, "--init-from", "nonesuch").code == 3
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    assert cdnctl(*train, "--init-from", "bad.safetensors").code == 3
    for i in (2, 3):
        (dataset / "dog" / f"{i}.png").write_text("text")
    done = cdnctl(*train)
    assert done.code == 1 and "2 of 5 pictures" in done.err
    assert "2.png" in done.err and "3.png" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_train_names_what_it_passes_over(tmp_path: Path, cdnctl: Run, dataset: Path) -> None:
    """Even if it is to be quiet; when the run goes on, all is said."""
    (dataset / "dog" / "2.png").write_text("text")
    train = ("train", dataset, "--config", "toy.toml", "--device", "cpu")
    done = cdnctl(*train, "--max-seconds", "0", "-q")
    assert done.code == 0 and len(done.err.splitlines()) == 2
    first, line = done.err.splitlines()
    assert "1 picture " in first and "passed over" in first and "dog/2.png" in line
    assert (tmp_path / "runs" / "1" / "passed_over.txt").read_text() == f"{line.strip()}\n"
    assert not cdnctl("train", "--resume", "runs/1", "--device", "cpu", "-q").err
    probe = cdnctl(*train, "--probe", "--max-seconds", "0", "--json")
    assert probe.code == 0 and "dog/2.png" in probe.err


@pytest.mark.slow
@pytest.mark.parametrize("error,code", [(KeyboardInterrupt, 130), (MemoryError, None)])
@pytest.mark.parametrize("where", ["load_datasets", "TrainState", "train_step"])
def test_a_run_that_did_not_get_far_leaves_no_folder(
    tmp_path: Path,
    cdnctl: Run,
    dataset: Path,
    where: str,
    error: type[BaseException],
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(loop, where, fail)
    train = ("train", dataset, "--config", "toy.toml", "--device", "cpu")
    if code is None:
        with pytest.raises(error):
            cdnctl(*train)
    else:
        assert cdnctl(*train).code == code
    assert not list(tmp_path.glob("runs/*"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cdnctl(*train, "--max-seconds", "0").code == 0
    before = files(tmp_path / "runs")
    monkeypatch.setattr(loop, where, fail)
    resume = ("train", "--resume", "runs/1", "--device", "cpu")
    if code is None:
        with pytest.raises(error):
            cdnctl(*resume)
    else:
        assert cdnctl(*resume).code == code
    assert files(tmp_path / "runs").keys() == before.keys(), "one that goes on loses nothing"


@pytest.mark.slow
def test_a_loss_that_is_no_number_from_the_start(
    tmp_path: Path, cdnctl: Run, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OBJECTIVES["joint"]
    broken = lambda *args: tuple(x * math.nan for x in original(*args))  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "joint", broken)  # type: ignore[arg-type]
    done = cdnctl("train", dataset, "--config", "toy.toml", "--device", "cpu")
    assert done.code == 1 and "not a number" in done.err
    assert not list(tmp_path.glob("runs/*"))


# -- a run folder is a model, and shows what it did -----------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run with other best weights than last ones."""
    run = tmp_path / "my runs" / "1"
    for seed, name in enumerate(("best", "last")):
        save_tiny(run / name / "model.safetensors", seed=seed)
    return run


@pytest.mark.slow
def test_weights_of_a_run_folder(finished: Path, shelf: Path, monkeypatch: Any) -> None:
    """The best, or else the last; bundled names come first; a folder of weights will do."""
    best, last = (finished / name / "model.safetensors" for name in ("best", "last"))
    assert load(finished).path == find_weights(str(finished)) == best
    assert load(finished).hash == load(best).hash != load(last).hash
    assert find_weights(last.parent) == last
    best.unlink()
    assert load(finished).path == last
    last.unlink()
    for folder in (finished, finished.parent):
        with pytest.raises(WeightsError, match="holds no weights") as caught:
            load(folder)
        assert repr(str(folder)) in str(caught.value)
    monkeypatch.chdir(finished.parent)
    save_tiny(Path("random") / "best" / "model.safetensors", seed=5)
    assert find_weights("random") == shelf / "random.safetensors"
    assert find_weights("./random") == Path("random/best/model.safetensors")


@pytest.mark.slow
def test_a_run_folder_wherever_a_model_is_named(
    tmp_path: Path, cdnctl: Run, finished: Path, dataset: Path
) -> None:
    best = finished / "best" / "model.safetensors"
    write(tmp_path / "a.png")
    write(tmp_path / "in" / "a.png", picture(20, 24))

    def both(*args: object, out: str = "") -> None:
        """The same by the run folder as by the file that is meant."""
        results = []
        for name in (finished, best):
            target = tmp_path / f"{len(results)}{out}"
            done = cdnctl(*(name if a is best else target if a == "OUT" else a for a in args))
            assert done.code == 0, done.err
            results.append((target.read_bytes() if out else b"", done.out if not out else b""))
        assert results[0] == results[1] and any(results[0])

    both("denoise", "a.png", "--sigma", "25", "-o", "OUT", "--model", best, out=".png")
    both("explain", "a.png", "--sigma", "25", "-o", "OUT", "--model", best, out="why.png")
    both("models", "export", best, "OUT", out=".safetensors")
    both("classify", "a.png", "--sigma", "25", "--json", "--model", best)
    both("evaluate", "in", "--sigma", "25", "--json", "--model", best)
    both("models", "show", best)

    bench = cdnctl(
        "bench", "quality", "in", "--sigma", "25", "--json", "--methods", f"wavelet,{finished}"
    )
    assert bench.code == 0, bench.err
    assert [row["method"] for row in bench.records[0]] == ["wavelet", str(finished)]
    cost = cdnctl("bench", "cost", "--megapixels", "0.01", "--json", "--methods", finished)
    assert cost.code == 0 and cost.records[0][0]["method"] == str(finished)

    shape = ["widths=[8,16]", "blocks=[1,1]"]
    train = ["train", dataset, "--config", "toy.toml", "--device", "cpu", "--max-seconds", "0"]
    train += [f"--set=model.{s}" for s in shape]
    assert cdnctl(*train, "--init-from", finished).code == 0
    started = read_header(tmp_path / "runs/1/last/model.safetensors").training["started_from"]
    assert started["weights"] == weights_hash(best)

    shutil.rmtree(best.parent)
    shutil.rmtree(finished / "last")
    for args in (
        ("denoise", "a.png", "-o", "none.png", "--model", finished),
        ("classify", "a.png", "--model", finished),
        ("explain", "a.png", "-o", "none.png", "--model", finished),
        ("evaluate", "in", "--model", finished),
        ("attack", "in", "--model", finished),
        ("attack", "in", "--from", finished),
        ("ood", "in", "--model", finished),
        ("bench", "gradient", "--model", finished),
        ("models", "show", finished),
        ("models", "export", finished, "none.safetensors"),
        ("bench", "quality", "in", "--methods", finished),
        (*train, "--init-from", finished),
    ):
        done = cdnctl(*args)
        assert done.code == 3 and str(finished) in done.err and "holds no weights" in done.err
    assert not list(tmp_path.glob("none.*")) and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.slow
def test_what_a_run_shows(tmp_path: Path, cdnctl: Run, dataset: Path) -> None:
    for i in range(10):
        write(dataset / "dog" / f"more {i}.png", picture(20, 24, top=5 * i))
    train = ["train", dataset, "--config", "toy.toml", "--device", "cpu"]
    train += ["--set=data.holdout=1", "--set=run.validate_every=2"]
    done = cdnctl(*train)
    assert done.code == 0 and "warning" not in done.err
    run = tmp_path / "runs" / "1"
    use = next(line for line in done.err.splitlines() if "use it with: " in line)
    write(tmp_path / "a.png")
    command = shlex.split(use.partition(": ")[2].replace("PICTURE", "a.png"))
    assert command[0] == "cdnctl" and cdnctl(*command[1:]).code == 0
    assert {p.name for p in (run / "samples").iterdir()} == {f"00000000{i}.png" for i in (2, 4, 6)}
    curves = images.read(run / "curves.png").pixels
    assert curves.shape[1] > 2 * curves.shape[0], "three panels side by side"
    shown = cdnctl("models", "show", run)
    assert shown.code == 0 and "6 of 6" in shown.text and "curves.png" in shown.text

    # What cannot be drawn is told, once, and trains no differently.
    (tmp_path / "runs" / "2").mkdir()
    for number, parts in (("3", [train]), ("4", [[*train, "--max-seconds", "0"], None])):
        new = tmp_path / "runs" / number
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "sheet", blocked)
            for part in parts:
                worse = cdnctl(*(part or ("train", "--resume", new, "--device", "cpu")))
                assert worse.code == 0
        assert worse.err.count("warning") == 1 and "No space left" in worse.err
        assert not (new / "samples").exists()
        for name in ("best", "last"):
            first, second = (
                load_model(r / name / "model.safetensors")[0].state_dict() for r in (run, new)
            )
            assert all(torch.equal(first[k], second[k]) for k in first)


def blocked(*args: object) -> bytes:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_classifier_is_not_said_to_denoise(tmp_path: Path, cdnctl: Run, dataset: Path) -> None:
    train = ("train", dataset, "--config", "toy.toml", "--device", "cpu", "--max-seconds", "0")
    done = cdnctl(*train, "--set", "model.arch=classifier", "--runs", "my runs")
    assert done.code == 0 and "cdnctl classify PICTURE --model 'my runs/1'" in done.err


def test_float_pictures_on_another_scale(tmp_path: Path, cdnctl: Run) -> None:
    """Refused unless the range is told; with it as on the scale of 0..1, in the same numbers."""
    pixels = noisy_picture(40, 50)
    images.write(Image(pixels.astype(np.float32)), tmp_path / "unit.tif")
    images.write(Image((pixels * 900 + 100).astype(np.float32)), tmp_path / "counts.tif")
    model = str(save_tiny(tmp_path / "m.safetensors"))
    options = ("--model", model, "--sigma", "30")
    done = cdnctl("denoise", str(tmp_path / "counts.tif"), *options)
    assert done.code == 1 and "counts.tif" in done.err and "--range" in done.err
    assert not (tmp_path / "counts_denoised.tif").exists()
    done = cdnctl("denoise", str(tmp_path / "counts.tif"), *options, "--range", "100:1000")
    assert done.code == 0 and cdnctl("denoise", str(tmp_path / "unit.tif"), *options).code == 0
    found = images.read(tmp_path / "counts_denoised.tif").samples
    expected = images.read(tmp_path / "unit_denoised.tif").samples
    np.testing.assert_allclose((found - 100) / 900, expected, atol=1e-4)
    for wrong in ("5", "1:0", "0:nan", "a:b"):
        done = cdnctl("denoise", str(tmp_path / "unit.tif"), *options, "--range", wrong)
        assert done.code == 2 and repr(wrong) in done.err


def test_noise_says_what_denoise_goes_by(tmp_path: Path, cdnctl: Run) -> None:
    clean = picture(128, 160)
    grain = np.random.default_rng(0).standard_normal(clean.shape)
    (tmp_path / "in").mkdir()
    images.write(Image.of(clean + 0.06 * grain, np.uint8), tmp_path / "in" / "a.png")
    images.write(Image.of(clean[:30, :30], np.uint8), tmp_path / "in" / "small.png")
    (tmp_path / "in" / "bad.png").write_text("text")
    done = cdnctl("noise", str(tmp_path / "in"), "--json")
    assert done.code == 1
    found = {Path(r["input"]).name: r for r in done.records}
    assert "error" in found["bad.png"] and "levels" not in found["small.png"]
    assert found["a.png"]["sigma"] == pytest.approx(0.06 * 255, rel=0.1)
    assert len(found["a.png"]["levels"]) == 3 and found["a.png"]["confidence"] == 1
    model = str(save_tiny(tmp_path / "m.safetensors"))
    one = str(tmp_path / "in" / "a.png")
    (restored,) = cdnctl("denoise", one, "--model", model, "--json").records
    assert restored["sigma"] == found["a.png"]["sigma"]
    said = cdnctl("noise", one)
    assert said.code == 0 and "white noise" in said.text and "denoise goes by sigma" in said.text
