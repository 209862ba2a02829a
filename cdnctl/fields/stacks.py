"""Fields in files: numpy's .npy, and TIFF of floats with a field a page."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdnctl.errors import ImageError, UsageError
from cdnctl.fields.model import check_fields

SUFFIXES = (".npy", ".tif", ".tiff")


def check_suffix(path: Path) -> None:
    """UsageError if it is none of the files that fields are in."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{str(path)!r} must end in {', '.join(SUFFIXES)}: fields are numbers")


def read(path: Path) -> Tensor:
    """Fields (B, L, L) in float64; one field (L, L) is a stack of one.

    ImageError if the file is missing or damaged, or holds other than real numbers; UsageError if
    they are no fields.
    """
    check_suffix(path)
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            import tifffile

            values = tifffile.imread(path)
    except Exception as error:  # both readers raise what they come across in a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ImageError(f"cannot read fields from {str(path)!r} ({reason})") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        kind = getattr(values, "dtype", "no array")
        raise ImageError(f"{str(path)!r} holds {kind}, but fields are real numbers")
    x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    x = x[None] if x.ndim == 2 else x
    try:
        check_fields(x)
    except UsageError as error:
        raise UsageError(f"{str(path)!r}: {error}") from None
    return x


def to_bytes(x: Tensor, path: Path) -> bytes:
    """The file of fields (..., L, L), by the suffix of its name: float64 in .npy, float32 in TIFF,
    where it is what other programs read."""
    data = io.BytesIO()
    if path.suffix.lower() == ".npy":
        np.save(data, x.numpy())
    else:
        import tifffile

        pages = x.reshape(-1, *x.shape[-2:]).numpy().astype(np.float32)
        tifffile.imwrite(data, pages, photometric="minisblack")
    return data.getvalue()
