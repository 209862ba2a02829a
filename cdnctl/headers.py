"""What weights files say of themselves, read without torch: for texts that must come at once.

Nothing here is checked; `checkpoints` does that, where weights are used.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

SUFFIX = ".safetensors"


def weights_folder(package: Path) -> Path:
    """Folder of the bundled weights: inside the installed package, or beside it in a checkout."""
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def bundled(package: Path) -> dict[str, Path]:
    """Bundled weights by name."""
    return {p.stem: p for p in sorted(weights_folder(package).glob(f"*{SUFFIX}"))}


def classes(path: Path) -> list[str]:
    """Class names of a weights file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            # The start of the file: its tensors, and in "__metadata__" strings of the writer.
            metadata = json.loads(file.read(min(size, 2**26)))["__metadata__"]
            return [str(name) for name in json.loads(metadata["cdnctl"])["classes"]]
    except (OSError, struct.error, ValueError, KeyError, TypeError, RecursionError):
        return []
