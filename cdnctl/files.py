"""Files that get their name when they are complete."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path


class NotRegularError(OSError):
    """A name that a folder, a pipe or a device has: nothing to put a file in the place of."""


def write_atomically(
    path: Path,
    data: bytes,
    overwrite: bool = True,
    *,
    temporary: str | None = None,
    make_folders: bool = True,
) -> None:
    """Write the bytes of a file, all or nothing.

    They go to a file beside it, which is renamed when it is complete. Whatever goes wrong, a
    keyboard interrupt included, leaves no part of it behind.

    Args:
        path: Where to; through a symbolic link, so that the link stays and its target is replaced.
        data: All of them.
        overwrite: Replace an existing file, which keeps its permissions. Otherwise one of
            several writers of a name gets it, however close they are.
        temporary: The `temporary_name` beside it until it is complete; by default a new one.
        make_folders: Make the folders that it is to lie in, where they are missing.

    Raises:
        NotRegularError: when there is something under the name that is no file.
        FileExistsError: when there is a file that must not be replaced.
        OSError: when it cannot be written there.
    """
    with completed(path, overwrite, temporary=temporary, make_folders=make_folders) as file:
        file.write(data)


@contextmanager
def completed(
    path: Path,
    overwrite: bool = True,
    *,
    temporary: str | None = None,
    make_folders: bool = True,
) -> Iterator[BufferedRandom]:
    """A file to write and read, which gets its name when the context ends: `write_atomically` for
    what does not fit into memory, with the same arguments and errors."""
    target = Path(os.path.realpath(path))
    part = target.with_name(temporary or temporary_name())
    if target.exists() and not target.is_file():
        raise NotRegularError(errno.EINVAL, "it is not a regular file", str(path))
    if make_folders:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name with half a file
        if overwrite and target.exists():
            shutil.copymode(target, part)
        give_name(part, target, overwrite)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink()
        raise


def temporary_name() -> str:
    """Return a new name for a file that is being written."""
    return f".cdnctl-{secrets.token_hex(8)}.tmp"


def remove_temporary(path: Path, temporary: str) -> None:
    """Remove the temporary file that a killed `write_atomically` to this path may have left."""
    if re.fullmatch(r"\.cdnctl-[0-9a-f]{16}\.tmp", temporary):  # and never anything else
        with suppress(OSError):
            os.unlink(Path(os.path.realpath(path)).with_name(temporary))


def give_name(part: Path, target: Path, overwrite: bool) -> None:
    """Rename a complete file to its final name in the same folder.

    Of several that want one name at the same moment and may not overwrite, one gets it and the
    others raise FileExistsError, their ``part`` left where it is.
    """
    if overwrite:
        os.replace(part, target)
        return
    try:
        os.link(part, target)  # unlike a rename it fails where the name is taken
    except FileExistsError:
        # A network file system may do it, lose the answer and try again.
        if not os.path.samefile(part, target):
            raise
    except OSError:  # a file system without hard links
        _claim(part, target)
        return
    os.unlink(part)


def _claim(part: Path, target: Path) -> None:
    """Take the name with an empty file, which fails where it is taken, and replace that."""
    open(target, "xb").close()
    try:
        os.replace(part, target)
    except BaseException:
        os.unlink(target)
        raise
