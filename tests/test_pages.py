"""Stacks: every page as it would come out alone, and all that the file says beside them kept."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
from processes import Run
from tiny import noisy_picture, save_tiny, tiny

from cdnctl import images
from cdnctl.cli.options import parse_pages, parse_range
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.restore import Denoise, Percentiles, Settings, pages
from cdnctl.restore.manifest import NAME
from cdnctl.restore.pages import PagesBatch, Selection, looked_over
from cdnctl.restore.plan import Job
from cdnctl.selection import Models


def counts(*shape: int, seed: int = 0, dtype: Any = np.uint16, sigma: float = 0.08) -> np.ndarray:
    """Noisy pages (..., H, W) of 100 to 4095 counts."""
    *outer, height, width = shape
    count = int(np.prod(outer, dtype=int))
    found = [noisy_picture(height, width, 1, sigma, seed + i)[:, :, 0] for i in range(count)]
    unit = np.clip(np.stack(found), 0, 1).reshape(shape)
    whole = np.rint(100 + 3995 * unit)
    return whole.astype(dtype)


STACK = counts(3, 2, 24, 28)
OME = {"axes": "TZYX", "PhysicalSizeX": 0.2, "PhysicalSizeXUnit": "µm", "Plane": {"PositionX": [1.0] * 6}}  # noqa: E501  # fmt: skip
IMAGEJ = {"axes": "TZYX", "spacing": 3.0, "unit": "um", "Labels": list("abcdef"), "Info": "a=b"}


def plain(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        for i, page in enumerate(STACK.reshape(6, 24, 28)):
            writer.write(
                page,
                metadata=None,
                description=f"page {i}",
                software="scope 1",
                datetime="2021:03:04 05:06:07",
                resolution=(5, 7),
                resolutionunit="CENTIMETER",
                photometric="miniswhite" if i == 1 else "minisblack",
                compression="lzw" if i % 2 else None,
                predictor=bool(i % 2),
                extratags=[(285, 2, 0, f"name {i}", False), (65001, 3, 1, 7, False)],
                contiguous=False,
            )


def listed_once(path: Path) -> None:
    """As ImageJ writes stacks over 4 GiB: one page is listed, all lie behind it."""
    tifffile.imwrite(path, STACK, imagej=True, metadata=IMAGEJ)
    with tifffile.TiffFile(path) as file:
        end = file.pages.first.offset + 2 + 12 * len(file.pages.first.tags)
    with path.open("r+b") as raw:
        raw.seek(end)
        raw.write(bytes(4))


KINDS: dict[str, Callable[[Path], object]] = {
    "imagej.tif": lambda p: tifffile.imwrite(
        p, STACK, imagej=True, metadata=IMAGEJ, resolution=(2.0, 3.0)
    ),
    "listed.tif": listed_once,
    "ome.ome.tif": lambda p: tifffile.imwrite(
        p, STACK, ome=True, metadata=OME, compression="zlib", predictor=True
    ),
    "shaped.tif": lambda p: tifffile.imwrite(p, STACK, metadata={"axes": "TZYX", "note": "kept"}),
    "truncated.tif": lambda p: tifffile.imwrite(p, STACK, truncate=True, metadata={"axes": "TZYX"}),
    "big.tif": lambda p: tifffile.imwrite(p, STACK, bigtiff=True, byteorder=">"),
    "tiles.tif": lambda p: tifffile.imwrite(p, STACK, tile=(16, 16), compression="zstd"),
    "plain.tif": plain,
    "signed.tif": lambda p: tifffile.imwrite(p, STACK.astype(np.int16) - 200),
    "float.tif": lambda p: tifffile.imwrite(p, STACK.astype(np.float32) / 3, compression="zlib"),
    "double.tif": lambda p: tifffile.imwrite(p, STACK.astype(np.float64) / 3),
    "colour.tif": lambda p: tifffile.imwrite(
        p, counts(4, 3, 24, 28).transpose(0, 2, 3, 1).copy(), photometric="rgb"
    ),
    "planar.tif": lambda p: tifffile.imwrite(
        p, counts(4, 3, 24, 28), photometric="rgb", planarconfig="separate"
    ),
    "alpha.tif": lambda p: tifffile.imwrite(
        p, counts(3, 24, 28, 4), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "stack.npy": lambda p: np.save(p, STACK),
    "fortran.npy": lambda p: np.save(p, np.asfortranarray(STACK)),
    "big-endian.npy": lambda p: np.save(p, STACK.astype(">u2")),
    "int64.npy": lambda p: np.save(p, STACK.astype(np.int64) * 2**30 - 5),
    "int16.npy": lambda p: np.save(p, STACK[0, 0].astype(np.int16) - 200),
    "half.npy": lambda p: np.save(p, (STACK / 4095).astype(np.float16)),
    "colour.npy": lambda p: np.save(p, counts(4, 3, 24, 28).transpose(0, 2, 3, 1)),
}
PAGES = {"colour.tif": 4, "planar.tif": 4, "colour.npy": 4, "alpha.tif": 3, "int16.npy": 1}
RANGES = {"int64.npy": f"0:{2**42}", "half.npy": "0:1"}


def read(path: Path) -> np.ndarray:
    """All of a file, by another reader."""
    return np.load(path) if path.suffix == ".npy" else tifffile.imread(path)


def said(path: Path) -> list[Any]:
    """What a TIFF file says of its pages, but for where they lie and in which pieces."""
    with tifffile.TiffFile(path) as file:
        found: list[Any] = [file.is_imagej, file.is_ome, file.is_bigtiff, file.byteorder]
        found += [(s.axes, s.shape, s.dtype) for s in file.series]
        found += [file.imagej_metadata if file.is_imagej else None]
        for page in (p.aspage() for p in file.pages):
            tags = {t.code: t.value for t in page.tags if t.code in (305, 306, 282, 283, 296, 285)}
            if page.index == 0 or not file.is_shaped:
                tags |= {270: re.sub(r' UUID="[^"]*"', "", page.description)}
            found.append((tags, page.photometric, page.dtype))
        return found


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "m.safetensors")


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_changed_comes_back_with_all_that_was_said(
    name: str, tmp_path: Path, cdnctl: Run, tiny_weights: Path
) -> None:
    source, out = tmp_path / name, tmp_path / f"out_{name}"
    KINDS[name](source)
    scale = RANGES.get(name, "-100:4095")
    options = ("--pages", "all", "--range", scale, "--sigma", "9", "--model", tiny_weights)
    (done,) = cdnctl("denoise", source, "-o", out, *options, "--strength", "0", "--json").records
    before, after = read(source), read(out)
    assert after.dtype == before.dtype.newbyteorder("=") and after.shape == before.shape
    if before.dtype.itemsize < 8 and before.dtype.kind != "f":
        np.testing.assert_array_equal(after, before)
    else:  # through floats, scaled and back
        exact = {8: 1e-14, 4: 1e-5, 2: 1e-2}[before.dtype.itemsize]
        np.testing.assert_allclose(after.astype(float), before.astype(float), rtol=exact)
    assert (done["event"], done["pages"]) == ("restored", PAGES.get(name, 6))
    if name.endswith(".tif"):
        assert said(out)[:4] == said(source)[:4] or name == "listed.tif"
        if name not in ("listed.tif", "planar.tif", "truncated.tif"):
            assert said(out) == said(source)
        with tifffile.TiffFile(source) as one, tifffile.TiffFile(out) as other:
            assert other.series[0].axes[-4:] == one.series[0].axes[-4:] or name == "planar.tif"
            assert other.imagej_metadata == one.imagej_metadata
    changed = cdnctl("denoise", source, "-o", out, *options, "--overwrite")
    assert changed.code == 0, changed.err
    assert np.abs(read(out).astype(float) - before.astype(float)).max() > 0


@pytest.mark.parametrize("size", [(24, 28), (230, 290)])
def test_a_page_comes_out_as_it_would_alone(
    size: tuple[int, int], tmp_path: Path, cdnctl: Run, tiny_weights: Path
) -> None:
    """To the bit, with level and range told: small pages, which go together, and large ones."""
    stack = counts(3, *size)
    tifffile.imwrite(tmp_path / "s.tif", stack, photometric="minisblack")
    options = ("--range", "100:4095", "--sigma", "20", "--model", tiny_weights)
    for i, page in enumerate(stack):
        tifffile.imwrite(tmp_path / f"{i}.tif", page)
        assert cdnctl("denoise", f"{i}.tif", "-o", f"{i}-out.tif", *options).code == 0
    assert cdnctl("denoise", "s.tif", "-o", "o.tif", "--pages", "all", *options).code == 0
    found = tifffile.imread(tmp_path / "o.tif")
    for i in range(3):
        np.testing.assert_array_equal(found[i], tifffile.imread(tmp_path / f"{i}-out.tif"))


def opened(path: Path, stack: np.ndarray, axes: str) -> images.Pages:
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": axes})
    return images.open_pages(path)


def test_the_noise_is_that_of_the_stack_in_each_channel(tmp_path: Path) -> None:
    """Pages of one channel share a level, which more pages give more surely."""
    truth = (0.03, 0.08)
    rng = np.random.default_rng(0)
    smooth = np.linspace(0.2, 0.8, 160) * np.linspace(0.6, 1, 160)[:, None]
    noise = rng.standard_normal((6, 2, 160, 160)) * np.array(truth)[:, None, None]
    stack = np.rint(100 + 3995 * (smooth + noise)).astype(np.uint16)
    with opened(tmp_path / "s.tif", stack, "TCYX") as found:
        denoise = Denoise(Settings(range=(100.0, 4095.0)))
        operation, notes = looked_over(denoise, found, range(12), "s.tif")
        assert notes == () and operation.levels.keys() == {0, 1}
        for channel, sigma in enumerate(truth):
            noise = operation.levels[channel].noise
            assert noise is not None
            assert noise.sigma == pytest.approx(sigma, rel=0.15)
            levels = [
                operation.of_page(found.read(i), "s.tif", channel).level.sigma
                for i in range(channel, 12, 2)
            ]
            assert np.ptp(levels) < 0.1 * np.mean(levels)
        told = Denoise(Settings(sigma=0.1, range=(100.0, 4095.0)))
        assert looked_over(told, found, range(12), "s.tif")[0].levels == {}


def test_one_range_for_the_stack_or_one_for_each(tmp_path: Path) -> None:
    """Where each page has its own, a page of twice the counts gives twice the result."""
    model = tiny(tmp_path)
    page = counts(24, 28, dtype=np.float64)
    np.save(tmp_path / "s.npy", np.stack([page, 2 * page, page]))
    results = {}
    for each in (True, False):
        denoise = Denoise(Settings(sigma=0.1, range=Percentiles(1, 99, each)))
        with images.open_pages(tmp_path / "s.npy") as found:
            operation, _ = looked_over(denoise, found, range(3), "s")
            ready = [operation.of_page(found.read(i), "s", 0) for i in range(3)]
        if not each:
            whole = np.percentile(np.stack([page, 2 * page, page]), [1, 99])
            np.testing.assert_allclose(operation.ends or (), whole)
        results[each] = [r.image.samples for r in operation.run(ready, model, lambda share: None)]
    for one, _, third in results.values():
        np.testing.assert_array_equal(one, third)
    np.testing.assert_allclose(results[True][1], 2 * results[True][0], rtol=1e-4)
    assert np.abs(results[False][1] - 2 * results[False][0]).max() > 10


def test_memory_is_that_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_SAMPLES", 2**12)
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), tiny(tmp_path).device)
    batch = PagesBatch(models, Denoise(Settings(sigma=0.1, range=(0.0, 4095.0))))
    peaks = []
    for count in (3, 3, 12):
        source = tmp_path / f"{count}.tif"
        page = counts(230, 290)
        tifffile.imwrite(source, np.stack([page] * count), photometric="minisblack")
        job = Job(source, tmp_path / f"out{len(peaks)}.tif")
        tracemalloc.start()
        (done,) = batch.run([job])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert done.error is None and tifffile.imread(job.output).shape == (count, 230, 290)
    assert peaks[2] < peaks[1] + 3 * page.nbytes, "of 9 pages more"


@pytest.mark.parametrize("name", ["imagej.tif", "ome.ome.tif", "shaped.tif", "stack.npy"])
def test_some_pages(name: str, tmp_path: Path, cdnctl: Run, tiny_weights: Path) -> None:
    KINDS[name](tmp_path / name)
    options = ("--range", "0:4095", "--strength", "0", "--model", tiny_weights, "--sigma", "9")
    done = cdnctl("denoise", name, "-o", f"o-{name}", "--pages", "2,4:5", *options, "--json")
    assert done.records[0]["pages"] == 3
    chosen = STACK.reshape(6, 24, 28)[[1, 3, 4]]
    np.testing.assert_array_equal(read(tmp_path / f"o-{name}"), chosen)
    if name == "imagej.tif":
        with tifffile.TiffFile(tmp_path / f"o-{name}") as file:
            assert (file.imagej_metadata or {})["Labels"] == list("bde")
    if name == "ome.ome.tif":
        assert any("OME metadata" in note for note in done.records[0]["notes"])
    far = cdnctl("denoise", name, "-o", "far.tif", "--pages", "5:9", *options)
    assert far.code == 1 and "has 6 pages" in far.err and "page 9" in far.err


def test_from_one_kind_to_the_other(tmp_path: Path, cdnctl: Run, tiny_weights: Path) -> None:
    options = ("--pages", "all", "--range", "-999:4095", "--strength", "0", "--sigma", "9")
    KINDS["imagej.tif"](tmp_path / "a.tif")
    np.save(tmp_path / "b.npy", STACK.astype(np.int32) - 500)
    for source, out in (("a.tif", "a.npy"), ("b.npy", "b.tif")):
        done = cdnctl("denoise", source, "-o", out, *options, "--model", tiny_weights)
        assert done.code == 0, done.err
        np.testing.assert_array_equal(read(tmp_path / out), read(tmp_path / source))


def test_pipes(tmp_path: Path, cdnctl: Run, tiny_weights: Path) -> None:
    options = ("--pages", "all", "--range", "0:4095", "--sigma", "9", "--model", tiny_weights)
    for name in ("imagej.tif", "stack.npy"):
        KINDS[name](tmp_path / name)
        assert cdnctl("denoise", name, "-o", f"o-{name}", *options).code == 0
        data = (tmp_path / name).read_bytes()
        piped = cdnctl("denoise", "-", "-o", "-", *options, stdin=data)
        assert piped.out == (tmp_path / f"o-{name}").read_bytes() and "6 pages" in piped.err
    wrong = cdnctl("denoise", "-", "-o", "-", *options, stdin=b"P5 1 1 255\n0")
    assert wrong.code == 1 and "neither TIFF nor .npy" in wrong.err


def test_a_folder_with_stacks_goes_on(tmp_path: Path, cdnctl: Run, tiny_weights: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    KINDS["imagej.tif"](folder / "good.tif")
    KINDS["stack.npy"](folder / "good.npy")
    images.write(Image(STACK[0, 0][:, :, None]), folder / "one.png")
    tifffile.imwrite(folder / "bad.tif", STACK.reshape(6, 24, 28), compression="zlib")
    with tifffile.TiffFile(folder / "bad.tif") as file:
        page = file.pages[3].aspage()
        start, size = page.dataoffsets[0], page.databytecounts[0]
    with (folder / "bad.tif").open("r+b") as raw:
        raw.seek(start)
        raw.write(bytes([255]) * size)
    options = ("--range", "0:4095", "--sigma", "9", "--model", tiny_weights, "--json")
    command = ("denoise", "in", "-o", "out", *options, "--resume", "--pages", "all")
    first = cdnctl(*command)
    events = {Path(r["input"]).name: r for r in first.records if "input" in r}
    assert first.code == 1 and events["bad.tif"]["event"] == "failed"
    assert "bad.tif', page 4 of 6: " in events["bad.tif"]["error"]
    assert sum(e["event"] == "restored" for e in events.values()) == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "good.tif",
        "good.npy",
        "one.png",
        NAME,
    }
    again = cdnctl(*command).records
    assert sum(r["event"] == "skipped" for r in again) == 3
    other = cdnctl(*command[:-1], "1").records
    assert sum(r["event"] == "restored" for r in other) == 4
    lines = [json.loads(x) for x in (tmp_path / "out" / NAME).read_text("utf-8").splitlines()]
    good = [line for line in lines if line["output"] == "good.tif" and "operation" in line]
    assert [line["pages"] for line in good] == [6, 1]
    assert good[0]["parameters"]["pages"] == "all" and len(good[0]["output_sha256"]) == 64


def test_who_goes_on_after_a_sudden_death_finds_what_it_left(
    tmp_path: Path, cdnctl: Run, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest names the file that a stack is written to while it is being written."""
    (tmp_path / "in").mkdir()
    KINDS["stack.npy"](tmp_path / "in" / "s.npy")
    out, left = tmp_path / "out", []
    write_pages = images.write_pages

    def noted(*args: Any) -> Any:
        (line,) = (out / NAME).read_text("utf-8").splitlines()
        left.append(out / json.loads(line)["temporary"])
        assert left[0].exists()
        return write_pages(*args)

    options = ("--pages", "all", "--sigma", "9", "--model", tiny_weights)
    with monkeypatch.context() as patched:
        patched.setattr(images, "write_pages", noted)
        assert cdnctl("denoise", "in", "-o", "out", *options).code == 0
    (out / "s.npy").unlink()
    left[0].write_bytes(b"half")
    assert cdnctl("denoise", "in", "-o", "out", *options, "--resume").code == 0
    assert {p.name for p in out.iterdir()} == {"s.npy", NAME}


def infinite(path: Path) -> None:
    floats = STACK.reshape(6, 24, 28).astype(np.float32)
    floats[4, 3, 3] = np.nan
    np.save(path, floats)


@pytest.mark.parametrize(
    "make, name, options, hint",
    [
        (KINDS["stack.npy"], "s.npy", "", "holds 6 frames or pages.*--pages all"),
        (KINDS["imagej.tif"], "s.tif", "", "holds 6 frames or pages.*--pages all"),
        (
            KINDS["imagej.tif"],
            "s.tif",
            "--pages all -o o.png",
            "stack, and not to be written as .png",
        ),
        (infinite, "s.npy", "--pages all --range 0:4095", "page 5 of 6: .*not finite"),
        (
            lambda p: tifffile.imwrite(p, STACK[0].astype(np.int16) - 2500),
            "s.tif",
            "--pages all",
            r"int16 and go from -\d+ to \d+.*--range",
        ),
        (
            lambda p: np.save(p, STACK[0].astype(np.int16) - 2500),
            "s.npy",
            "--pages all",
            r"int16 and go from -\d+ to \d+.*--range",
        ),
        (
            lambda p: np.save(p, STACK[0, 0].astype(np.int16) - 4000),
            "s.npy",
            "",
            r"reach down to -\d+.*--range",
        ),
        (lambda p: np.save(p, np.zeros((24, 28, 4))), "s.npy", "--pages all", "24, 28, 4"),
        (lambda p: np.save(p, np.zeros(28)), "s.npy", "", "28,"),
        (lambda p: np.save(p, np.zeros((24, 28), complex)), "s.npy", "--pages all", "complex128"),
        (
            lambda p: tifffile.imwrite(p, STACK, metadata={"axes": "YXTZ"}),
            "s.tif",
            "--pages all",
            "axes are YXTZ",
        ),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00v\x00{"), "s.npy", "--pages all", "damaged"),
        (
            lambda p: np.save(p, np.arange(24 * 28.0).reshape(1, 24, 28)),
            "s.npy",
            "--pages all",
            "most float samples are above 1",
        ),
    ],
)
def test_what_will_not_do_is_said(
    make: Any, name: str, options: str, hint: str, tmp_path: Path, cdnctl: Run, tiny_weights: Path
) -> None:
    make(tmp_path / name)
    done = cdnctl("denoise", name, "--model", tiny_weights, *options.split())
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1
    assert re.search(hint, done.err), done.err
    assert {p.name for p in tmp_path.iterdir()} == {name}


def test_options_that_do_not_go_with_pages(cdnctl: Run, tmp_path: Path) -> None:
    KINDS["stack.npy"](tmp_path / "s.npy")
    for option in (("--jpeg",), ("--compare", "c.png"), ("--uncertainty", "u.png")):
        done = cdnctl("denoise", "s.npy", "--pages", "all", *option)
        assert done.code == 2 and option[0] in done.err
    for wrong in ("0", "3:2", "a", "1:", "", "all,2"):
        with pytest.raises(UsageError, match="--pages is"):
            parse_pages(wrong)
    assert parse_pages("2:3,7") == Selection("2:3,7", ((2, 3), (7, 7)))
    assert Selection("3,1:2,2", ((3, 3), (1, 2), (2, 2))).of(3, "a") == [0, 1, 2]
    assert parse_range("each") == Percentiles(0.1, 99.9, True)
    assert parse_range("each:p1:p99") == Percentiles(1, 99, True)
    for wrong in ("each:1:2", "eachp1:p2", "each:p1"):
        with pytest.raises(UsageError, match="--range is"):
            parse_range(wrong)


def test_single_arrays_as_pictures(tmp_path: Path) -> None:
    for samples in (STACK[0, 0], counts(24, 28, 3), STACK[0, 0] / 7.0, STACK[:1, 0]):
        np.save(tmp_path / "a.npy", samples)
        image = images.read(tmp_path / "a.npy")
        assert image.dtype == samples.dtype and image.notes == ()
        images.write(image, tmp_path / "b.npy")
        np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), samples.squeeze())
    np.save(tmp_path / "a.npy", STACK[0, 0].astype(np.int64))
    (note,) = images.read(tmp_path / "a.npy").notes
    assert note == "int64 samples stored as uint32"
    clear = Image(counts(4, 4, 3), np.ones((4, 4), np.uint16))
    with pytest.raises(ImageError, match="transparency"):
        images.write(clear, tmp_path / "c.npy")


ANIMATIONS = {"GIF": "a.gif", "PNG": "a.png", "WEBP": "a.webp"}


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("kind", ANIMATIONS)
def test_animations_frame_by_frame(
    kind: str, transparent: bool, tmp_path: Path, cdnctl: Run, tiny_weights: Path
) -> None:
    """Pixels, alpha, durations and repeats come back; as APNG what was a GIF."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 8, (3, 24, 28, 3), np.uint8) * 32 + 16
    alpha = np.where(rng.random((3, 24, 28, 1)) < 0.2, 0, 255).astype(np.uint8)
    if transparent:
        frames = np.concatenate([frames, alpha], 3)
    first, *rest = map(PIL.Image.fromarray, frames)
    source = tmp_path / ANIMATIONS[kind]
    lossless = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    shown = {"duration": [70, 80, 90], "loop": 0, "disposal": 2} | lossless
    if kind != "GIF":
        del shown["disposal"]
    first.save(source, kind, save_all=True, append_images=rest, **shown)
    options = ("--pages", "all", "--sigma", "9", "--model", tiny_weights, "--json")
    done = cdnctl("denoise", source, "--strength", "0", *options)
    (record,) = done.records
    out = Path(record["output"])
    assert out.suffix == (".png" if kind == "GIF" else source.suffix) and record["pages"] == 3
    with PIL.Image.open(source) as before, PIL.Image.open(out) as after:
        assert after.n_frames == 3 and after.info.get("loop") == 0
        for i, duration in enumerate((70, 80, 90)):
            one, other = (np.asarray(_at(p, i).convert("RGBA")) for p in (before, after))
            assert after.info["duration"] == before.info["duration"] == duration
            seen = one[:, :, 3] > 0
            np.testing.assert_array_equal(one[seen], other[seen])
            np.testing.assert_array_equal(one[:, :, 3], other[:, :, 3])
    wrong = cdnctl("denoise", source, "-o", "a.tif", *options)
    assert wrong.code == 1 and ".webp" in wrong.records[0]["error"]


def _at(picture: Any, frame: int) -> Any:
    picture.seek(frame)
    return picture
