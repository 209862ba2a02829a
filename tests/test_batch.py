"""Many pictures to many files: where they go, and what becomes of each."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from camera import Camera, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut
from tiny import files, noisy_picture, save_tiny, write

from cdnctl import checkpoints, images
from cdnctl import files as naming
from cdnctl.core.noise import noised_array
from cdnctl.errors import UsageError, WeightsError
from cdnctl.images import Image, Metadata
from cdnctl.measure.evaluate import evaluate, find_samples
from cdnctl.restore import Denoise, Level, Restored, Settings, batch_size, noise_level, restore
from cdnctl.restore.batch import AHEAD, LARGE_PIXELS, Batch, Done, count_pixels, large_last
from cdnctl.restore.manifest import Manifest
from cdnctl.restore.plan import Job, default_output, expand, find_pictures, plan, share
from cdnctl.restore.writing import Writing
from cdnctl.selection import Models

SIGMA = 0.2
CPU = torch.device("cpu")

# -- where to -------------------------------------------------------------------------------

NAMES = ["a b.png", "ä ö ü.png", "x[1].png", "{y}*?.png", "日本.jpg", "'q\"uote.PNG", "-dash.tif"]
NAMES += [
    "new\nline.png",
    " ends in spaces .png",
    "%s {0} $HOME.png",
    "e\u0301.png",
    "\u202egnp.png",
]


def touch(folder: Path, *names: str) -> list[Path]:
    """Empty files: plans look at names alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_a_file_goes_beside_itself(tmp_path: Path) -> None:
    for source in touch(tmp_path, *NAMES):
        (job,) = plan([source], None, False)
        assert job.output == tmp_path / f"{source.stem}_denoised{source.suffix}"
        (job,) = plan([source], None, False, ending="upscaled")
        assert job.output == tmp_path / f"{source.stem}_upscaled{source.suffix}"


def test_formats_that_cannot_be_written_become_png(tmp_path: Path) -> None:
    gif, raw = touch(tmp_path, "a.gif", "b.nef")
    assert default_output(gif).name == "a_denoised.png"
    assert [j.output.name for j in plan([gif, raw], tmp_path / "out", False)] == [
        "a.gif.png",
        "b.nef.png",
    ]


def test_a_folder_is_mirrored(tmp_path: Path) -> None:
    names = [*NAMES, "a.jpg", "a.png", "sub/a.png", "sub/deep er/[b].png"]
    touch(tmp_path / "in", *names)
    touch(tmp_path / "in", "notes.txt", ".hidden.png", ".git/c.png", "sub/Thumbs.db")
    out = tmp_path / "out"
    jobs = plan([tmp_path / "in"], out, True)
    assert {j.output for j in jobs} == {out / n for n in names}
    assert all(j.source.relative_to(tmp_path / "in") == j.output.relative_to(out) for j in jobs)
    flat = plan([tmp_path / "in"], out, False)
    assert {j.output for j in flat} == {out / n for n in names if "/" not in n}


def test_a_folder_named_like_a_picture_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "folder.png/a.png", "b.png")
    found = {j.source.name for j in plan([tmp_path], tmp_path / "out", True)}
    assert found == {"a.png", "b.png"}


def test_links_are_followed_to_files_and_not_to_folders(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/sub/b.png", "else/c.png")
    (tmp_path / "in/file.png").symlink_to(tmp_path / "else/c.png")
    (tmp_path / "in/up").symlink_to("..")
    (tmp_path / "in/folder.png").symlink_to("sub")
    (tmp_path / "in/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    found = {str(p.relative_to(tmp_path / "in")) for p in find_pictures(tmp_path / "in", True)}
    # The last two are no pictures, which is told when they are read.
    assert found == {"a.png", "sub/b.png", "file.png", "dangling.png", "loop.png"}


def test_a_deep_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python likes to recurse."""
    monkeypatch.chdir(tmp_path)
    for _ in range(1020):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    (name,) = touch(tmp_path, "d/d/d/a.png")
    try:
        assert plan([tmp_path], tmp_path / "out", True) == [Job(name, tmp_path / "out/d/d/d/a.png")]
    finally:  # what clears up behind the tests would recurse
        name.unlink()
        for _ in range(1020):
            os.chdir("d")
        for _ in range(1020):
            os.chdir("..")
            os.rmdir("d")


def test_a_folder_that_cannot_be_looked_into_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "in/a.png", "in/secret/b.png")
    scan = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "secret":  # root may look into everything
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_pictures(tmp_path / "in", True) == [tmp_path / "in/a.png", tmp_path / "in/secret"]
    with pytest.raises(PermissionError):
        find_pictures(tmp_path / "in/secret", True)


def test_hidden_folders_are_not_even_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, ".git/a.png", "b.png")
    seen, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scan(path))
    assert find_pictures(tmp_path, True) == [tmp_path / "b.png"] and seen == [tmp_path]


def test_names_that_collide_once_they_are_png(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.gif", "a.gif.png")
    with pytest.raises(UsageError, match=r"a\.gif'.*a\.gif\.png'.*would both be written"):
        plan([tmp_path / "in"], tmp_path / "out", False)
    touch(tmp_path / "other", "a.jpg", "a.png", "A.png", "A.PNG")
    assert len(plan([tmp_path / "other"], tmp_path / "out", False)) == len(
        list((tmp_path / "other").iterdir())
    ), "as many as this file system tells apart"


def test_an_input_named_twice_is_a_collision(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png")
    for inputs in (["in/a.png", "in/a.png"], ["in", "in/a.png"], ["in", "x/../in"]):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="would both be written"):
            plan([tmp_path / i for i in inputs], tmp_path / "out", False)


def test_an_output_that_leads_back_to_an_input(tmp_path: Path) -> None:
    """Through links in the output folder, or an output folder that is a link."""
    touch(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").symlink_to(tmp_path / "in/b.png")
    (tmp_path / "same").symlink_to(tmp_path / "in")
    for output in ("out", "same"):
        with pytest.raises(UsageError, match="overwrite"):
            plan([tmp_path / "in"], tmp_path / output, False)


def test_two_outputs_that_are_one_file(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.png", "b.png")
    touch(tmp_path / "out", "b.png")
    (tmp_path / "out/a.png").symlink_to("b.png")
    with pytest.raises(UsageError, match="would both be written"):
        plan([tmp_path / "in"], tmp_path / "out", False)


def test_a_folder_needs_an_output(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(UsageError, match="-o FOLDER"):
        plan([tmp_path], None, False)


def test_output_is_a_file_or_a_folder(tmp_path: Path) -> None:
    (source,) = touch(tmp_path, "a.png")
    (tmp_path / "there").mkdir()
    assert plan([source], tmp_path / "b.tif", False)[0].output == tmp_path / "b.tif"
    assert plan([source], tmp_path / "there", False)[0].output == tmp_path / "there/a.png"
    with pytest.raises(UsageError, match="suffix"):
        plan([source], tmp_path / "b.xyz", False)


def test_two_inputs_cannot_share_an_output(tmp_path: Path) -> None:
    gif, png = touch(tmp_path, "a.gif", "a.png")
    with pytest.raises(UsageError, match=r"a\.gif.*a\.png"):
        plan([gif, png], None, False)
    twins = touch(tmp_path, "x/a.png", "y/a.png")
    with pytest.raises(UsageError, match="would both be written"):
        plan(twins, tmp_path / "out", False)


def test_nothing_is_written_over_its_source(tmp_path: Path) -> None:
    (source,) = touch(tmp_path, "a.png")
    (tmp_path / "link.png").symlink_to(source)
    (tmp_path / "hard.png").hardlink_to(source)
    for output in ("a.png", "link.png", "hard.png", "x/../a.png"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="overwrite"):
            plan([source], tmp_path / output, False)


def test_nothing_is_written_over_another_source(tmp_path: Path) -> None:
    """Not even with permission to overwrite: the originals are never touched."""
    with pytest.raises(UsageError, match="overwrite"):
        plan(touch(tmp_path, "a.png", "a_denoised.png"), None, False)
    with pytest.raises(UsageError, match="overwrite"):
        plan([*touch(tmp_path, "x/b.png", "y/b.png")], tmp_path / "y", False)


def test_a_folder_may_go_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in", "a.png")
    monkeypatch.chdir(tmp_path)
    assert plan([Path("in")], Path("."), False) == [Job(Path("in/a.png"), Path("a.png"))]


def test_a_folder_is_not_written_into_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "in", "a.png")
    monkeypatch.chdir(tmp_path)
    for output in (Path("in"), tmp_path / "in", Path("in/../in")):
        with pytest.raises(UsageError, match="overwrite"):
            plan([Path("in")], output, False)


def test_earlier_output_inside_the_input_is_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "in", "a.png", "out/a.png", "other/b.png")
    monkeypatch.chdir(tmp_path)
    for output in (Path("in/out"), tmp_path / "in/out"):
        jobs = plan([Path("in")], output, True)
        assert {j.source for j in jobs} == {Path("in/a.png"), Path("in/other/b.png")}
    touch(tmp_path / "full", "out/a.png")
    with pytest.raises(UsageError, match="no pictures"):
        plan([Path("full")], Path("full/out"), True)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        plan([tmp_path / "none.png"], None, False)
    with pytest.raises(UsageError, match="no such file"):
        expand([tmp_path / "none"], False)
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "deep/er/a.png")
    for folder in ("empty", "deep"):
        with pytest.raises(UsageError, match="no pictures"):
            plan([tmp_path / folder], tmp_path / "out", False)
    assert len(plan([tmp_path / "deep"], tmp_path / "out", True)) == 1


def test_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    (source,) = touch(tmp_path, "a.png")
    assert plan([source], tmp_path / "new", False, into=True) == [
        Job(source, tmp_path / "new" / "a.png")
    ]
    with pytest.raises(UsageError, match="suffix"):
        plan([source], tmp_path / "new", False)


# -- names that may be given once -----------------------------------------------------------


def no_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_name_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Whoever wants it at the same moment, and on file systems without hard links as well."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target, count = tmp_path / "name", 16
    for number in range(20):
        parts = touch(tmp_path, *(f"{i}.tmp" for i in range(count)))
        for part in parts:
            part.write_text(part.name)
        start = threading.Barrier(count)

        def attempt(part: Path, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                naming.give_name(part, target, overwrite=False)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(count) as pool:
            won = list(pool.map(attempt, parts))
        (winner,) = (part for part, has in zip(parts, won, strict=True) if has)
        assert target.read_text() == winner.name, number
        assert {p for p in parts if p.exists()} == set(parts) - {winner}
        loser = next(p for p in parts if p.exists())
        naming.give_name(loser, target, overwrite=True)
        assert target.read_text() == loser.name and not loser.exists()
        target.unlink()


def test_a_name_that_cannot_be_given_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileNotFoundError):
        naming.give_name(tmp_path / "none.tmp", tmp_path / "name", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_an_answer_that_got_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network file systems lose it, and try again what is done."""
    link = os.link

    def twice(part: Path, target: Path) -> None:
        link(part, target)
        link(part, target)

    monkeypatch.setattr(os, "link", twice)
    (part,) = touch(tmp_path, "a.tmp")
    naming.give_name(part, tmp_path / "a", overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("when", ["before it is read", "before it is named"])
@pytest.mark.parametrize("skip", [False, True])
def test_an_output_that_appears_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, skip: bool
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png")
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "b.png"
    if when == "before it is read":
        mine.write_text("mine")
    else:
        encode = images.encode

        def slow(image: Image, suffix: str, quality: int | None) -> bytes:
            mine.write_text("mine")
            return encode(image, suffix, quality)

        monkeypatch.setattr(images, "encode", slow)
    run = batch(tmp_path, overwrite=False, skip_existing=skip).run(jobs)
    done = {d.job.source.name: d for d in run}
    assert mine.read_text() == "mine" and files(tmp_path / "out").keys() == {"a.png", "b.png"}
    assert done["a.png"].restored is not None and done["b.png"].restored is None
    if skip:
        assert done["b.png"].error is None, "passed over, as asked"
    else:
        assert "meanwhile" in str(done["b.png"].error) and done["b.png"].exit_code == 2


def test_processes_share_what_is_to_be_done(tmp_path: Path) -> None:
    sources = touch(tmp_path, *(f"in/{i}.png" for i in range(9)))
    touch(tmp_path, *(f"out/{i}.png" for i in (0, 3, 4, 8)))
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    for options in ({"skip_existing": True}, {"replace": True}):
        parts = [share(jobs, None, rank=r, world=3, **options) for r in range(3)]
        todo, passed = ([job.source for part in parts for job in part[i]] for i in (0, 1))
        assert sorted(todo + passed) == sources, "each once"
        assert {p.name for p in passed} == (
            {"0.png", "3.png", "4.png", "8.png"} if "skip_existing" in options else set()
        )
    with pytest.raises(UsageError, match=r"0\.png' and 3 more exist: give --overwrite to"):
        share(jobs, tmp_path / "out")
    touch(tmp_path, "out/cdnctl-manifest.jsonl")
    with pytest.raises(UsageError, match=r"0\.png' exists: give --resume to go on, --overwrite"):
        share(jobs[:2], tmp_path / "out")
    assert share(jobs[1:3], None) == (jobs[1:3], [])


# -- many files -----------------------------------------------------------------------------


def batch(place: Path, options: Settings = Settings(SIGMA), **more: Any) -> Batch[Restored]:  # noqa: B008
    """With a tiny model; outputs of an earlier run may be replaced."""
    weights = place / "m.safetensors"
    models = Models(str(weights if weights.exists() else save_tiny(weights)), CPU)
    return Batch(
        models, Denoise(options), **({"overwrite": True, "writing": Writing(note=False)} | more)
    )


def write_pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images.write(Image.of(noisy_picture(20, 24, seed=i)), folder / name)


def test_a_bad_file_costs_that_file_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_pictures(source, "a.png", "c d.jpg", "sub/ü.tif")
    (source / "b.png").write_text("no picture")
    (source / "e.png").write_bytes(b"")
    (source / "f.png").write_bytes((source / "a.png").read_bytes()[:200])
    before = files(source)
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    bare = Batch(models, Denoise(Settings(SIGMA)), Writing(note=False))
    done = list(bare.run(plan([source], out, True)))

    bad = {d.job.source.name: d.error for d in done if d.error is not None}
    assert bad.keys() == {"b.png", "e.png", "f.png"}
    assert all(name in error for name, error in bad.items())
    assert all((d.restored is None) == (d.error is not None) for d in done)
    assert files(source) == before
    assert files(out).keys() == {"a.png", "c d.jpg", "sub/ü.tif"}, "no temporary file is left"
    for name in files(out):
        expected = restore(images.read(source / name), models.pick(20, 24), Settings(SIGMA)).image
        assert (out / name).read_bytes() == images.encode(expected, Path(name).suffix)


def test_auto_looks_at_the_noise_of_each_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder, in a pipe and in a table of scores: who has a camera's noise is done by the
    model of cameras, unless its level or class is told."""
    for name, arch in (("photo", "hybrid"), ("camera", "unet")):
        heard = {"coloured": arch == "unet"}
        save_tiny(tmp_path / "weights" / f"{name}.safetensors", arch, patch=48, **heard)
    monkeypatch.setattr(checkpoints, "PACKAGE", tmp_path)
    scene = astronaut()[:128, :128] / 255
    source = tmp_path / "in"
    by_camera = pair(scene, Camera(gain=2e-3, read=5e-3), np.random.default_rng(0))[1]
    white = noised_array(scene.astype(np.float32), 0.08, np.random.default_rng(0))
    for name, samples in (("a", by_camera), ("b", white), ("c", by_camera[:, ::-1])):
        write(source / f"{name}.png", samples)

    def chosen(options: Settings) -> dict[str, str]:
        jobs = plan([source], tmp_path / "out", True)
        found = {}
        for done in Batch(Models("auto", CPU), Denoise(options), overwrite=True).run(jobs):
            assert done.restored is not None
            found[done.job.source.stem] = done.restored.model.name
            alone = restore(images.read(done.job.source), done.restored.model, options)
            written = images.read(done.job.output).samples
            np.testing.assert_array_equal(written, alone.image.samples)
        return found

    assert chosen(Settings()) == {"a": "camera", "b": "photo", "c": "camera"}
    assert set(chosen(Settings(SIGMA)).values()) == {"photo"}
    assert set(chosen(Settings(target="cat")).values()) == {"photo"}
    photo, camera = (Models(name, CPU).pick(128, 128) for name in ("photo", "camera"))
    samples = find_samples(source, source, photo)
    both, first, second = (
        [row.psnr for row in evaluate(samples, one, [], camera=other)]
        for one, other in ((photo, camera), (photo, None), (camera, None))
    )
    assert both == [second[0], first[1], second[2]] and first != second


def test_an_output_that_cannot_be_written_costs_that_file_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    touch(tmp_path, "file")
    jobs = [
        Job(tmp_path / "in/a.png", tmp_path / "out/a.png"),
        Job(tmp_path / "in/b.png", tmp_path / "file/b.png"),  # below a file
        Job(tmp_path / "in/c.png", tmp_path / "in"),  # a folder
    ]
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    done = {d.job: d for d in Batch(models, Denoise(Settings(SIGMA))).run(jobs)}
    first, second, third = (done[job] for job in jobs)
    assert first.error is None and (tmp_path / "out/a.png").is_file()
    assert second.error is not None and "b.png" in second.error
    assert third.error is not None
    assert not [n for n in os.listdir(tmp_path / "in") if n.endswith(".tmp")]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png")
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    give_name = naming.give_name

    def interrupt(part: Path, target: Path, overwrite: bool) -> None:
        if target.name == "b.png":
            raise KeyboardInterrupt
        give_name(part, target, overwrite)

    monkeypatch.setattr(naming, "give_name", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(Batch(models, Denoise(Settings(SIGMA))).run(jobs))
    assert files(tmp_path / "out").keys() == {"a.png"}
    images.read(tmp_path / "out/a.png")


BAD: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("this is a text\n" * 30),
    "truncated": lambda path: path.write_bytes(write(path).read_bytes()[:-60]),
    "bomb": lambda path: path.write_bytes(bomb()),
    "dangling": lambda path: path.symlink_to("nowhere.png"),
    "circle": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/null"),
    "animation": lambda path: PIL.Image.new("RGB", (3, 3), "red").save(
        path, "GIF", save_all=True, append_images=[PIL.Image.new("RGB", (3, 3), "blue")]
    ),
}


def bomb() -> bytes:
    """100,000 x 100,000 black pixels in 100 bytes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_bad_file(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "z.png"):
        write(tmp_path / "in" / name)
    BAD[kind](tmp_path / "in" / "bad one.png")
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    done = {d.job.source.name: d for d in batch(tmp_path).run(jobs)}
    error = done.pop("bad one.png").error
    assert error is not None and "'" + str(tmp_path / "in" / "bad one.png") + "'" in error
    assert len(error.splitlines()) == 1 and len(error) > len(str(tmp_path)) + 40, "a reason"
    assert not [d.error for d in done.values() if d.error]
    assert files(tmp_path / "out").keys() == {"a.png", "z.png"}


def test_pictures_that_vanish_after_planning(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    (tmp_path / "in/b.png").unlink()
    errors = {d.job.source.name: d.error for d in batch(tmp_path).run(jobs)}
    assert errors["a.png"] is errors["c.png"] is None and "no such file" in str(errors["b.png"])
    shutil.rmtree(tmp_path / "in")
    assert all("no such file" in str(d.error) for d in batch(tmp_path).run(jobs))


def test_one_picture_spoils_none_of_its_size(tmp_path: Path) -> None:
    """They go through the network together; one of them makes it overflow."""
    for i in range(5):
        pixels = noisy_picture(20, 24, seed=i)
        if i == 3:
            pixels[2, 2] = 3e38
        write(tmp_path / "in" / f"{i}.tif", pixels, np.float32)
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    errors = {d.job.source.name: d.error for d in batch(tmp_path).run(jobs)}
    assert {n for n, e in errors.items() if e} == {"3.tif"} and "not finite" in str(errors["3.tif"])
    alone = Job(tmp_path / "in" / "1.tif", tmp_path / "alone.tif")
    list(batch(tmp_path).run([alone]))
    assert (tmp_path / "out/1.tif").read_bytes() == alone.output.read_bytes()


def test_memory_that_runs_out_while_reading_costs_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png")
    write(tmp_path / "in" / "large.png", noisy_picture(30, 30))
    measured = noise_level

    def greedy(image: Image, sigma: float | None, **options: Any) -> Level:
        if image.samples.shape[0] == 30:
            raise MemoryError
        return measured(image, sigma=sigma, **options)

    monkeypatch.setattr("cdnctl.restore.denoise.noise_level", greedy)
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    errors = {d.job.source.name: d.error for d in batch(tmp_path, Settings()).run(jobs)}
    assert {n for n, e in errors.items() if e} == {"large.png"}
    assert "memory" in str(errors["large.png"])


def test_names_too_long_for_an_output(tmp_path: Path) -> None:
    """The suffix that is added makes them too long."""
    PIL.Image.new("L", (4, 4)).save(tmp_path / ("n" * 251 + ".gif"))
    write(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    for _ in range(2):
        jobs = plan([tmp_path], tmp_path / "out", False)
        errors = sorted(str(d.error) for d in batch(tmp_path).run(jobs))
        assert errors[0] == "None" and "too long" in errors[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read and not yet written is bounded, however slow the disk is."""
    height, width, count = 200, 180, 40  # one at a time for the network
    first = write(tmp_path / "in" / "0.png", noisy_picture(height, width))
    for i in range(1, count):
        shutil.copy(first, first.with_name(f"{i}.png"))
    (tmp_path / "in" / "2.png").write_text("text")
    held, peak, lock = 0, 0, threading.Lock()
    decode, save = images.decode, images.save

    def counted(data: bytes, name: str, max_pixels: int) -> Image:
        nonlocal held, peak
        image = decode(data, name, max_pixels)
        with lock:
            held += 1
            peak = max(peak, held)
        return image

    def slow(data: bytes, path: Path, temporary: str, *, overwrite: bool) -> None:
        nonlocal held
        time.sleep(0.02)
        save(data, path, temporary, overwrite=overwrite)
        with lock:
            held -= 1

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(images, "save", slow)
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    for large in (True, False):
        monkeypatch.setattr("cdnctl.restore.batch.HELD_PIXELS", 5 * height * width)
        limit = height * width - 1 if large else height * width
        monkeypatch.setattr("cdnctl.restore.batch.LARGE_PIXELS", limit)
        peak = 0
        assert sum(d.error is None for d in batch(tmp_path).run(jobs)) == count - 1
        assert held == 0 and 3 <= peak <= 5 + (2 if large else 1 + AHEAD)


def test_large_pictures_come_last() -> None:
    sizes = [5, LARGE_PIXELS + 7, 3, LARGE_PIXELS, LARGE_PIXELS + 1, 9, LARGE_PIXELS + 1]
    jobs = [Job(Path(f"{i}"), Path(f"{i}.out")) for i in range(len(sizes))]
    order = large_last(dict(zip(jobs, sizes, strict=True)))
    assert [int(job.source.name) for job in order] == [0, 2, 3, 5, 4, 6, 1]


def test_small_pictures_do_not_wait_for_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for their turn nor to be told of, however slow the disk is."""
    write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(batch_size(20, 24) + 3)))
    write(tmp_path / "in" / "large.png", noisy_picture(200, 180))
    monkeypatch.setattr("cdnctl.restore.batch.LARGE_PIXELS", 1000)
    give_name, told = naming.give_name, []

    def slow(part: Path, target: Path, overwrite: bool) -> None:
        time.sleep(0.02)
        give_name(part, target, overwrite)

    def started(image: Image, *args: Any) -> Restored:
        assert len(told) == batch_size(20, 24) + 3
        return restore(image, *args)

    monkeypatch.setattr(naming, "give_name", slow)
    monkeypatch.setattr("cdnctl.restore.denoise.restore", started)
    monkeypatch.setattr(
        "cdnctl.restore.denoise.batch_size", lambda h, w: batch_size(h, w) if h < 99 else 1
    )
    for done in batch(tmp_path).run(plan([tmp_path / "in"], tmp_path / "out", False)):
        told.append(done.job)
        assert done.error is None
    assert told[-1].source.name == "large.png"


def test_pixels_of_jobs(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.tif")
    (tmp_path / "in" / "c.png").write_text("text")
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    assert count_pixels(jobs) == dict(zip(jobs, [480, 480, 4], strict=True))
    assert list(count_pixels(jobs[::-1])) == jobs[::-1] and count_pixels([]) == {}


def test_what_is_written_after_the_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that is closed while threads still write."""
    write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(40)))
    monkeypatch.setattr("cdnctl.restore.denoise.batch_size", lambda *_: 1)
    give_name = naming.give_name

    def slow(part: Path, target: Path, overwrite: bool) -> None:
        time.sleep(0.05)
        give_name(part, target, overwrite)

    monkeypatch.setattr(naming, "give_name", slow)
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    for stop in range(1, 6):
        late: list[Done] = []
        run = batch(tmp_path).run(jobs, late)
        heard = {next(run).job.output for _ in range(stop)}
        run.close()
        heard |= {d.job.output for d in late}
        assert {p.name for p in heard} == files(tmp_path / "out").keys()
        assert stop <= len(heard) < 40, "or nothing was cut short"
        shutil.rmtree(tmp_path / "out")


# -- the same bytes, however ----------------------------------------------------------------

SHAPES = [(20, 24, 3)] * 5 + [(20, 24, 1)] * 2 + [(1, 1, 3), (90, 120, 3), (90, 120, 3), (7, 50, 1)]
SHAPES += [(270, 260, 3)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, bytes]]:
    """A folder with pictures of many kinds, and what becomes of each on its own."""
    place = tmp_path_factory.mktemp("many")
    for i, shape in enumerate(SHAPES):
        dtype, suffix = [("uint8", "png"), ("uint16", "png"), ("float32", "tif")][i % 3]
        write(place / "in" / f"{i}.{suffix}", noisy_picture(*shape, seed=i), dtype)
    alone = {}
    for job in plan([place / "in"], place / "alone", False):
        (done,) = batch(place, Settings()).run([job])
        assert done.error is None
        alone[job.source] = job.output.read_bytes()
    return place, alone


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(st.data())
def test_neither_neighbours_nor_order_change_a_bit(
    many: tuple[Path, dict[Path, bytes]], data: st.DataObject
) -> None:
    place, alone = many
    chosen = data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, unique=True))
    jobs = [Job(source, place / "together" / source.name) for source in chosen]
    assert {d.error for d in batch(place, Settings()).run(jobs)} == {None}
    for job in jobs:
        assert job.output.read_bytes() == alone[job.source], job.source.name


def test_nor_does_a_way_past_the_batch(many: tuple[Path, dict[Path, bytes]]) -> None:
    place, alone = many
    model = batch(place).models.pick(1, 1)
    for source, expected in alone.items():
        image = restore(images.read(source), model, Settings()).image
        assert images.encode(image, source.suffix) == expected


def test_batches_are_filled(many: tuple[Path, dict[Path, bytes]]) -> None:
    """Or the tests above would show nothing."""
    assert batch_size(20, 24) > 5 and batch_size(90, 120) > 2 and batch_size(270, 260) == 1


@pytest.mark.slow
def test_as_many_at_once_as_the_network_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one batch, and more than are read ahead."""
    count = 2 * batch_size(20, 24) + 3
    write_pictures(tmp_path / "in", *(f"{i:03}.png" for i in range(count)))
    jobs = plan([tmp_path / "in"], tmp_path / "out", False)
    assert len({d.job for d in batch(tmp_path).run(jobs)}) == count
    shuffled = [replace(job, output=tmp_path / "back" / job.output.name) for job in jobs[::-1]]
    assert len({d.job for d in batch(tmp_path).run(shuffled)}) == count
    assert files(tmp_path / "out") == files(tmp_path / "back")


def test_each_picture_is_asked_for_its_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps it, with a manifest too."""
    write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    write(tmp_path / "in" / "large.png", noisy_picture(200, 180))
    some = batch(tmp_path, manifest=Manifest(tmp_path / "out"))
    some.parameters  # noqa: B018  asks once for the name
    asked, pick = [], Models.pick

    def counted(self: Models, height: int, width: int, *more: Any) -> Any:
        asked.append((height, width))
        return pick(self, height, width, *more)

    monkeypatch.setattr(Models, "pick", counted)
    with some.manifest:
        done = list(some.run(plan([tmp_path / "in"], tmp_path / "out", False)))
    assert sorted(asked) == [(20, 24)] * 5 + [(200, 180)]
    assert {d.restored.model for d in done} == {pick(some.models, 1, 1)}


def test_a_model_that_is_not_there_stops_everything(tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        Models(str(tmp_path / "none.safetensors"), CPU)


def test_metadata_is_stripped_if_wanted(tmp_path: Path) -> None:
    metadata = Metadata(xmp=b"<secret/>", dpi=(300, 300))
    image = Image(Image.of(noisy_picture(20, 24)).samples, metadata=metadata)
    images.write(image, tmp_path / "a.png")
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    for strip in (False, True):
        job = Job(tmp_path / "a.png", tmp_path / f"{strip}.png")
        list(Batch(models, Denoise(Settings(SIGMA)), writing=Writing(strip=strip)).run([job]))
        assert (b"secret" in job.output.read_bytes()) == (not strip)
        assert (images.read(job.output).metadata == Metadata()) == strip
