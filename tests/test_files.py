"""Tests of the one way in which files are written: all or nothing, and nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdnctl.files import NotRegularError, remove_temporary, temporary_name, write_atomically


@pytest.fixture
def private() -> Iterator[None]:
    """New files are for their owner alone."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.parametrize("existing", [b"old", None])
@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bytes | None, broken: str, error: Any
) -> None:
    path = tmp_path / "deep" / "file"
    if existing:
        write_atomically(path, existing)

    def fail(*_: Any) -> None:
        raise error("at the worst moment")

    with monkeypatch.context() as patch, pytest.raises(error, match="worst"):
        patch.setattr(os, broken, fail)
        write_atomically(path, b"new")
    assert [p.read_bytes() for p in path.parent.iterdir()] == ([existing] if existing else [])
    write_atomically(path, b"new")
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"new"]


def test_the_content_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file", []
    fsync = os.fsync

    def watched(handle: int) -> None:
        fsync(handle)
        synced.append((os.fstat(handle).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, b"four")
    assert synced == [(4, False)] and path.read_bytes() == b"four"


@pytest.mark.usefixtures("private")
def test_permissions_are_those_of_the_file_before_or_those_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_bytes() == b"new"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    if there:
        write_atomically(target, b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_a_name_that_is_taken_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"new", overwrite=False)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_folders_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(NotRegularError, match=f"not a regular file.*{name}"):
            write_atomically(tmp_path / name, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pipe"]


def test_folders_are_made_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with pytest.raises(FileNotFoundError):
        write_atomically(path, b"new", make_folders=False)
    assert not list(tmp_path.iterdir())
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_a_killed_write_left_is_removed_by_its_name_and_nothing_else(tmp_path: Path) -> None:
    path, name = tmp_path / "file", temporary_name()
    assert name != temporary_name()
    for left in (name, "mine.tmp", ".cdnctl-x.tmp"):
        (tmp_path / left).touch()
        remove_temporary(path, left)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cdnctl-x.tmp", "mine.tmp"]
    remove_temporary(path, name)  # and none is missed
