"""Files that get their name when they are complete."""

from __future__ import annotations

import os
from pathlib import Path


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
