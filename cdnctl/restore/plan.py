"""Which file goes where: found out, and refused if need be, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdnctl import images
from cdnctl.errors import UsageError
from cdnctl.restore.manifest import parts


@dataclass(frozen=True)
class Job:
    """One file to restore and where it goes."""

    source: Path
    output: Path


def find_pictures(folder: Path, recursive: bool) -> list[Path]:
    """Picture files of a folder, sorted; hidden files and folders are left out.

    Symbolic links are followed to files, not to folders. A folder inside that cannot be looked
    into is in the list itself, so that it is heard of when it is read.
    """
    found, folders = [], [folder]
    while folders:
        place = folders.pop()
        try:
            entries = list(os.scandir(place))
        except OSError:
            if place == folder:
                raise
            found.append(place)
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders += [path] if recursive else []
            elif images.is_image_path(path) and not os.path.isdir(path):
                found.append(path)
    return sorted(found)


def expand(inputs: Sequence[Path], recursive: bool) -> list[Path]:
    """Files, and the pictures of folders, in order. UsageError for what is not there."""
    files: list[Path] = []
    for source in inputs:
        if not source.exists():
            raise UsageError(f"no such file or folder: {str(source)!r}")
        found = find_pictures(source, recursive) if source.is_dir() else [source]
        if not found:
            hint = "" if recursive else " (-r looks into its folders)"
            raise UsageError(f"no pictures in {str(source)!r}{hint}")
        files += found
    return files


def default_output(source: Path, ending: str = "denoised", suffix: str | None = None) -> Path:
    """photo.png -> photo_denoised.png, beside it; formats that cannot be written become PNG.

    suffix: what it ends in, whatever the source does.
    """
    if suffix is None:
        suffix = source.suffix if source.suffix.lower() in images.WRITE_SUFFIXES else ".png"
    return source.with_name(f"{source.stem}_{ending}{suffix}")


def plan(
    sources: Sequence[Path],
    output: Path | None,
    recursive: bool,
    into: bool = False,
    ending: str = "denoised",
    suffix: str | None = None,
) -> list[Job]:
    """Map inputs to outputs before any work is done.

    A single file goes to ``output`` (a file, or into it if it is a folder, there already or
    with ``into`` still to be made) or beside itself, with ``ending`` in its name; a folder needs
    an ``output`` folder and is mirrored there. suffix: of outputs that are not named. UsageError
    if an input is missing, two would share an output, or one would be overwritten.
    """
    jobs: list[Job] = []
    for source in sources:
        if source.is_dir():
            if output is None:
                raise UsageError(f"{str(source)!r} is a folder: say where to with -o FOLDER")
            found = _without(expand([source], recursive), source, output)
            jobs += [Job(p, placed(output / p.relative_to(source), suffix)) for p in found]
        elif not source.exists():
            raise UsageError(f"no such file or folder: {str(source)!r}")
        elif output is None:
            jobs.append(Job(source, default_output(source, ending, suffix)))
        elif into or output.is_dir() or len(sources) > 1:
            jobs.append(Job(source, placed(output / source.name, suffix)))
        else:
            check_suffix(output)
            jobs.append(Job(source, output))
    _check_clashes(jobs)
    return jobs


def share(
    jobs: Sequence[Job],
    output: Path | None,
    *,
    skip_existing: bool = False,
    replace: bool = False,
    rank: int = 0,
    world: int = 1,
) -> tuple[list[Job], list[Job]]:
    """The planned jobs that one of several processes has to do, and those that it passes over.

    skip_existing: pass over jobs whose output exists. replace: do them again, or go on with them.
    With neither, UsageError if an output exists.
    """
    existing = [job for job in jobs if os.path.exists(job.output)]
    if skip_existing:
        there = set(existing)
        return [job for job in jobs if job not in there][rank::world], existing[rank::world]
    if existing and not replace:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        verb = "exist" if more else "exists"
        hint = "--resume to go on, " if output is not None and parts(output) else ""
        raise UsageError(
            f"{str(existing[0].output)!r}{more} {verb}: give {hint}--overwrite to replace, "
            "or --skip-existing to pass over"
        )
    return list(jobs[rank::world]), []


def check_suffix(output: Path) -> None:
    """UsageError if a file of this name cannot be written."""
    if output.suffix.lower() not in images.WRITE_SUFFIXES:
        known = ", ".join(sorted(images.WRITE_SUFFIXES))
        raise UsageError(f"cannot write {str(output)!r}: its suffix must be one of {known}")


def placed(path: Path, suffix: str | None = None) -> Path:
    """An output's name: with a suffix that is wanted, or with .png behind its own, where files
    of that cannot be written."""
    if suffix is not None:
        return path.with_suffix(suffix)
    if path.suffix.lower() in images.WRITE_SUFFIXES:
        return path
    return path.with_name(path.name + ".png")


def _without(files: list[Path], source: Path, output: Path) -> list[Path]:
    """The files of a folder, without those that an earlier run wrote into an output inside it."""
    place = output.resolve()
    if source.resolve() not in place.parents:
        return files
    rest = [p for p in files if not p.parent.resolve().is_relative_to(place)]
    if not rest:
        raise UsageError(f"no pictures in {str(source)!r} but those in {str(output)!r}")
    return rest


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, there or not."""
    try:
        return key_of(a) == key_of(b) or a.samefile(b)
    except OSError:  # one of them is not there
        return False


def key_of(path: Path) -> str:
    """What is the same for all names of a file, there or not."""
    return os.path.normcase(os.path.realpath(path))


def _check_clashes(jobs: Sequence[Job]) -> None:
    sources = {key_of(job.source): job.source for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        key = key_of(job.output)
        if same_file(job.output, job.source):
            raise UsageError(f"{str(job.source)!r} would overwrite itself: choose another output")
        if key in sources:
            raise UsageError(
                f"{str(job.source)!r} would overwrite the input {str(sources[key])!r}: "
                "choose another output, or leave one of them out"
            )
        if key in taken:
            raise UsageError(
                f"{str(taken[key])!r} and {str(job.source)!r} would both be written to "
                f"{str(job.output)!r}: rename one, or run them separately"
            )
        taken[key] = job.source
