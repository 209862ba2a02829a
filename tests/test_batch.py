"""Many pictures to many files: where they go, and what becomes of each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import files, noisy_picture, save_tiny

from cdnctl import images
from cdnctl.batch import Batch, Job, default_output, expand, plan
from cdnctl.errors import UsageError, WeightsError
from cdnctl.images import Image, Metadata
from cdnctl.restore import Settings, restore
from cdnctl.selection import Models

SIGMA = 0.2
CPU = torch.device("cpu")

# -- where to -------------------------------------------------------------------------------

NAMES = ["a b.png", "ä ö ü.png", "x[1].png", "{y}*?.png", "日本.jpg", "'q\"uote.PNG", "-dash.tif"]


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


# -- many files -----------------------------------------------------------------------------


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
    done = list(Batch(models, Settings(SIGMA)).run(plan([source], out, True)))

    bad = {d.job.source.name: d.error for d in done if d.error is not None}
    assert bad.keys() == {"b.png", "e.png", "f.png"}
    assert all(name in error for name, error in bad.items())
    assert all((d.restored is None) == (d.error is not None) for d in done)
    assert files(source) == before
    assert files(out).keys() == {"a.png", "c d.jpg", "sub/ü.tif"}, "no temporary file is left"
    for name in files(out):
        expected = restore(images.read(source / name), models.pick(20, 24), Settings(SIGMA)).image
        assert (out / name).read_bytes() == images.encode(expected, Path(name).suffix)


def test_an_output_that_cannot_be_written_costs_that_file_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    touch(tmp_path, "file")
    jobs = [
        Job(tmp_path / "in/a.png", tmp_path / "out/a.png"),
        Job(tmp_path / "in/b.png", tmp_path / "file/b.png"),  # below a file
        Job(tmp_path / "in/c.png", tmp_path / "in"),  # a folder
    ]
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), CPU)
    done = {d.job: d for d in Batch(models, Settings(SIGMA)).run(jobs)}
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
    rename = os.replace

    def interrupt(source: Path, target: Path) -> None:
        if target.name == "b.png":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(Batch(models, Settings(SIGMA)).run(jobs))
    assert files(tmp_path / "out").keys() == {"a.png"}
    images.read(tmp_path / "out/a.png")


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
        list(Batch(models, Settings(SIGMA), strip_metadata=strip).run([job]))
        assert (b"secret" in job.output.read_bytes()) == (not strip)
        assert (images.read(job.output).metadata == Metadata()) == strip
