"""Training pictures: found in folders and zip files, and read into memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from runs import CPU
from sets import BROKEN, flat_pictures, labelled, pack, picture, same_pictures

from cdnctl.errors import ImageError, UsageError
from cdnctl.training.config import DataConfig
from cdnctl.training.datasets import find_pictures, fingerprint, load_datasets, split_holdout


def found(root: Path, split: str = "train") -> list[tuple[str, str | None]]:
    return [(s.path.relative_to(root).as_posix(), s.label) for s in find_pictures(root, split)]


@pytest.mark.parametrize("base", ["", "train/"])
def test_layouts(tmp_path: Path, base: str) -> None:
    folders, flat = tmp_path / "folders", tmp_path / "flat"
    for name in ("dog/2.png", "dog/1.png", "cat/deep/x.jpg", "cat/notes.txt"):
        if name.endswith("txt"):
            (folders / base / name).write_text("no picture")
        else:
            picture(folders / base / name)
    for name in ("b.png", "a.png"):
        picture(flat / base / name)
    assert found(folders) == [
        (f"{base}cat/deep/x.jpg", "cat"),
        (f"{base}dog/1.png", "dog"),
        (f"{base}dog/2.png", "dog"),
    ]
    assert found(flat) == [(f"{base}a.png", None), (f"{base}b.png", None)]
    assert found(folders, "val") == found(flat, "val") == []


def test_val_beside_train(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "val" / "cat" / "2.png")
    assert found(tmp_path) == [("train/cat/1.png", "cat")]
    assert found(tmp_path, "val") == [("val/cat/2.png", "cat")]


@pytest.mark.parametrize(
    "names", [["val/cat/1.png"], ["val/1.png"], ["val/cat/1.png", "cat/2.png"]]
)
def test_val_without_train(tmp_path: Path, names: list[str]) -> None:
    """Neither is it trained on, nor is it taken for a class of that name."""
    for name in names:
        picture(tmp_path / "data" / name)
    for root in (tmp_path / "data", pack(tmp_path / "data.zip", tmp_path / "data")):
        with pytest.raises(UsageError, match=r"no training pictures.*cdnctl evaluate") as caught:
            load_datasets([root], DataConfig(), CPU)
        assert repr(str(root)) in str(caught.value)
        assert ("unpacked" in str(caught.value)) is (root.suffix == ".zip")
        assert len(find_pictures(root, "val")) == 1


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        find_pictures(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"a\.png"):
        find_pictures(picture(tmp_path / "file" / "a.png"))
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(UsageError, match="no pictures"):
        find_pictures(tmp_path / "empty")


def test_pictures_beside_class_folders_are_a_question_not_a_guess(tmp_path):
    for name in ("cover.png", "cat/1.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(UsageError, match="both pictures"):
        find_pictures(tmp_path)


def test_loading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (5, 7, 3), np.uint8)
    gray = rng.integers(0, 256, (4, 6), np.uint8)
    for name, pixels in (("b/colour.png", colour), ("a/gray.png", gray)):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        PIL.Image.fromarray(pixels).save(tmp_path / "set" / name)
    picture(tmp_path / "loose" / "0.png", (3, 3), 7)
    pictures, held = load_datasets([tmp_path / "set", tmp_path / "loose"], DataConfig(), CPU)
    assert pictures.classes == ("a", "b") and len(held) == 0
    assert pictures.labels.tolist() == [0, 1, -1]
    assert pictures.sizes.tolist() == [[4, 6], [5, 7], [3, 3]]
    want = [np.repeat(gray[None], 3, 0), colour.transpose(2, 0, 1), np.full((3, 3, 3), 7)]
    for i, pixels in enumerate(want):
        at = int(pictures.offsets[i])
        got = pictures.buffer[at : at + pixels.size].reshape(pixels.shape)
        assert np.array_equal(got, pixels)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("holdout", [0, 3])
def test_a_set_with_broken_pictures_is_the_set_without_them(
    packed: bool, holdout: int, tmp_path: Path
) -> None:
    bad = {"a/0.png", "b/7.png", "b/39.png"}
    broken, good = labelled(tmp_path / "set", 40, bad), labelled(tmp_path / "good", 40)
    for name in bad:
        (good / name).unlink()
    first = []  # a set with pictures of its own for validation, where none are held out
    if not holdout:
        first = [tmp_path / "more"]
        for split in ("train", "val"):
            picture(first[0] / split / "a" / "x.png", level=99)
    data = DataConfig(holdout=holdout)
    given = pack(tmp_path / "set.zip", broken) if packed else broken
    got, want = (load_datasets([*first, r], data, CPU) for r in (given, good))
    assert all(map(same_pictures, got, want)) and fingerprint(*got) == fingerprint(*want)
    assert len(got[1]) == (holdout or 1)
    assert {u.key for u in got[0].unread} == {f"{len(first)}:{name}" for name in bad}
    for unread in got[0].unread:
        assert unread.key.partition(":")[2] in unread.reason and "damaged" in unread.reason
    # What was passed over stays out when it is mended, and when it is gone.
    keys = [u.key for u in got[0].unread]
    for last in (labelled(broken, 40), good):
        again = load_datasets([*first, last], data, CPU, without=keys)
        assert all(map(same_pictures, again, got)) and not again[0].unread


@pytest.mark.parametrize("count,most", [(3, 1), (19, 1), (20, 2), (39, 3), (250, 25)])
def test_too_many_broken_pictures(count: int, most: int, tmp_path: Path) -> None:
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count)]
    bad = names[-most:]
    root = labelled(tmp_path, count, bad)
    assert len(load_datasets([root], DataConfig(holdout=0), CPU)[0]) == count - most
    extra = names[-most - 1]
    (root / extra).write_bytes(BROKEN)
    with pytest.raises(ImageError, match=f"{most + 1} of {count} pictures") as caught:
        load_datasets([root], DataConfig(), CPU)
    message = str(caught.value)
    named = [name for name in (*bad, extra) if name in message]
    assert len(named) == min(most + 1, 20), "the first twenty by name"
    assert (f"and {most + 1 - 20} more" in message) is (most + 1 > 20)


def test_a_class_without_pictures(tmp_path: Path) -> None:
    root = labelled(tmp_path, 40)
    picture(root / "c" / "1.png").write_bytes(BROKEN)
    with pytest.raises(ImageError, match=r"no picture of 'c'[\s\S]*c/1\.png"):
        load_datasets([root], DataConfig(), CPU)


@pytest.mark.parametrize("base", ["", "train/"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_zip_file_is_the_folder_it_was_made_of(tmp_path: Path, base: str, flat: bool) -> None:
    """Also where names sort otherwise as strings than as paths."""
    names = ["b.png", "a b.jpg", "a.png", "ä.png"]
    if not flat:
        names = [f"{label}/{n}" for label in ("a", "a b", "a.b") for n in ("1.png", "x/1.png")]
    for i, name in enumerate(names):
        picture(tmp_path / "data" / base / name, (3 + i, 4), level=i)
        if base:
            picture(tmp_path / "data" / "val" / name, (2, 2), level=99 + i)
    (tmp_path / "data" / base / names[0]).with_suffix(".txt").write_text("no picture")
    made = pack(tmp_path / "data.zip", tmp_path / "data")
    for split in ("train", "val"):
        one, other = (find_pictures(root, split) for root in (tmp_path / "data", made))
        assert len(one) == len(other) == (len(names) if base or split == "train" else 0)
        assert [s.label for s in one] == [s.label for s in other]
        for a, b in zip(one, other, strict=True):
            assert b.archive == made and a.path.relative_to(tmp_path / "data") == b.path
    one, other = (load_datasets([r], DataConfig(), CPU) for r in (tmp_path / "data", made))
    assert same_pictures(one[0], other[0]) and same_pictures(one[1], other[1])
    assert fingerprint(*one) == fingerprint(*other)


def test_zip_files_and_folders_together(tmp_path: Path) -> None:
    for i, name in enumerate(("one/a/1.png", "two/b/1.png", "three/c.png")):
        picture(tmp_path / name, level=i)
    roots = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    mixed = [pack(tmp_path / "one.zip", roots[0]), roots[1], pack(tmp_path / "3.zip", roots[2])]
    want, got = (load_datasets(r, DataConfig(), CPU)[0] for r in (roots, mixed))
    assert same_pictures(want, got) and got.classes == ("a", "b")


@pytest.mark.parametrize(
    "name",
    ["../../escaped.png", "/escaped.png", "cat/../../escaped.png", "cat\\1.png", "./cat/1.png"],
)
def test_zip_files_with_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(picture(tmp_path / "a.png"), "cat/0.png")
        archive.writestr(zipfile.ZipInfo(name), (tmp_path / "a.png").read_bytes())
    with pytest.raises(UsageError) as caught:
        find_pictures(tmp_path / "data.zip")
    assert repr(name) in str(caught.value) and "data.zip" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "data.zip"]


def test_zip_files_that_are_none_or_hold_none(tmp_path: Path) -> None:
    good = pack(tmp_path / "good.zip", picture(tmp_path / "in" / "cat" / "1.png").parents[1])
    data = good.read_bytes()
    inner = pack(tmp_path / "inner.zip", good.parent / "in")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(inner, "deep/inner.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    (tmp_path / "text.zip").write_text("this is no zip file")
    (tmp_path / "nothing.zip").touch()
    (tmp_path / "cut.zip").write_bytes(data[:-30])
    locked = bytearray(data)
    locked[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of an encrypted member
    (tmp_path / "locked.zip").write_bytes(locked)
    large = bytearray(data)
    at = data.index(b"PK\x01\x02") + 24  # its size
    large[at : at + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "large.zip").write_bytes(large)
    words = {
        "outer": "'deep/inner.zip'",
        "empty": "no pictures",
        "text": "not a folder or zip file",
        "nothing": "not a folder or zip file",
        "cut": "not a folder or zip file",
        "locked": "encrypted",
        "large": "2147483648 bytes",
        "absent": "not there",
    }
    for name, word in words.items():
        with pytest.raises(UsageError, match=word) as caught:
            find_pictures(tmp_path / f"{name}.zip")
        assert f"{name}.zip" in str(caught.value)


def test_a_broken_picture_in_a_zip_file_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
    good = pack(
        tmp_path / "a.zip", picture(tmp_path / "in" / "cat" / "1.png", (16, 16), noise).parents[1]
    )
    data = good.read_bytes()
    (tmp_path / "b.zip").write_bytes(data[:200] + bytes(50) + data[250:])  # packed data overwritten
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("cat/1.png", b"\x89PNG\r\n\x1a\n nothing more")
    load_datasets([good], DataConfig(), CPU)
    for name in ("b.zip", "c.zip"):
        with pytest.raises(ImageError, match=rf"{name}:cat/1\.png") as caught:
            load_datasets([tmp_path / name], DataConfig(), CPU)
        assert "standard input" not in str(caught.value)


def test_validation_folder_or_holdout(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / "one" / "train" / "ab"[i % 2] / f"{i}.png", level=i)
    pictures, held = load_datasets([tmp_path / "one"], DataConfig(holdout=500), CPU)
    assert (len(pictures), len(held)) == (36, 4), "at most a tenth is held out"
    picture(tmp_path / "one" / "val" / "b" / "x.png", level=250)
    pictures, held = load_datasets([tmp_path / "one"], DataConfig(), CPU)
    assert (len(pictures), len(held)) == (40, 1)
    assert held.labels.tolist() == [1]
    picture(tmp_path / "one" / "val" / "c" / "x.png")
    with pytest.raises(UsageError, match="'c'"):
        load_datasets([tmp_path / "one"], DataConfig(), CPU)


@pytest.mark.parametrize("n,count", [(100, 7), (100, 500), (95, 9), (19, 5), (9, 5), (50, 0)])
def test_holdout_is_disjoint_from_training(n: int, count: int) -> None:
    pictures = flat_pictures([0] * n)
    training, held = split_holdout(pictures, count)
    a, b = (set((p.offsets // 48).tolist()) for p in (training, held))
    assert len(held) == len(b) == min(count, n // 10)
    assert not a & b and a | b == set(range(n))
    if len(b) > 1:  # evenly spaced: the files are sorted by class
        gaps = np.diff(sorted(b))
        assert gaps.max() - gaps.min() <= 1
