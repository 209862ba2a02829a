"""How results are written: in which format, how deep, how good, and what the file says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cdnctl import images
from cdnctl.core.tone import to_light
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.restore.operation import Operation, R, Result
from cdnctl.version import VERSION

DEPTHS: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
SAME = ({".jpg", ".jpeg"}, {".tif", ".tiff"}, {".heic", ".heif"})  # suffixes of one format


@dataclass(frozen=True)
class Writing:
    """How results are written."""

    suffix: str | None = None  # of all outputs, such as ".png"; None: that of each input
    depth: int | None = None  # bits of a sample; None: those of the input, or what the format has
    quality: int | None = None  # of lossy formats, 1 to 100; None: `images.QUALITY`
    linear: bool = False  # linear light: the tone curve of sRGB undone, in 16 bits or more
    dither: bool = False  # noise of up to a step where 8 bits are made of more
    strip: bool = False  # leave out all metadata
    note: bool = True  # say in the file what was done

    def __post_init__(self) -> None:
        if self.suffix is not None and self.suffix not in images.WRITE_SUFFIXES:
            known = " ".join(sorted(s.removeprefix(".") for s in images.WRITE_SUFFIXES))
            raise UsageError(
                f"--format is {self.suffix.removeprefix('.')!r}, but must be one of {known}"
            )
        if self.depth not in (None, *DEPTHS):
            raise UsageError(f"--depth is {self.depth}, but must be 8 or 16")
        if self.linear and self.depth == 8:
            raise UsageError("--linear: 8 bits are too few for linear light: give --depth 16")
        if self.dither and self.depth != 8:
            raise UsageError("--dither is for pictures of 8 bits: give --depth 8 as well")

    @property
    def finer(self) -> bool:
        """Whether results are wanted in smaller steps than those of 8 bits."""
        return self.depth == 16 or self.dither or self.linear

    @property
    def parameters(self) -> dict[str, Any]:
        """What a manifest says of it, as JSON has it; what is not asked for is left out."""
        asked = {
            "format": self.suffix,
            "depth": self.depth,
            "quality": self.quality,
            "linear": self.linear or None,
            "dither": self.dither or None,
            "note": None if self.note else False,
        }
        given = {key: value for key, value in asked.items() if value is not None}
        return {"strip_metadata": self.strip, **given}

    def check(self, suffixes: set[str]) -> None:
        """UsageError if files with these suffixes, in lower case, cannot be written so."""
        for suffix in sorted(suffixes):
            if self.suffix is not None and not _same(suffix, self.suffix):
                raise UsageError(
                    f"the output ends in {suffix}, but --format is "
                    f"{self.suffix.removeprefix('.')}: leave one of them out"
                )
            if self.depth is not None and not images.holds(suffix, DEPTHS[self.depth]):
                raise UsageError(
                    f"--depth {self.depth}: {suffix} files hold 8 bits a sample; "
                    "give --format png or tif"
                )
            if self.linear and not images.holds(suffix, DEPTHS[16]):
                raise UsageError(
                    f"--linear: {suffix} files hold 8 bits a sample, too few for linear light; "
                    "give --format tif or png"
                )
        if self.quality is not None and not suffixes & images.LOSSY_SUFFIXES:
            lossy = ", ".join(sorted(images.LOSSY_SUFFIXES))
            raise UsageError(
                f"--quality {self.quality}: {', '.join(sorted(suffixes))} files lose nothing; "
                f"it is for {lossy} (give --format)"
            )

    def encoded(self, operation: Operation[R], result: R, suffix: str) -> tuple[bytes, R]:
        """The bytes of a file with this suffix; and the result, its picture as it is stored, with
        notes on what was changed for it. ImageError if the format cannot hold it."""
        image = self._stored(result, suffix)
        if self.strip:
            image = replace(image, metadata=images.Metadata())
        notes = image.notes + images.conversions(image, suffix)
        if self.note and not self.strip:
            text = what_was_done(operation, result)
            image = replace(image, metadata=images.with_note(image.metadata, text, suffix))
        data = images.encode(image, suffix, self.quality)
        return data, replace(result, image=replace(image, notes=notes))

    def _stored(self, result: Result, suffix: str) -> Image:
        """The result in the type of the samples of the file."""
        image = _linear(result.image) if self.linear else result.image
        dtype = images.stored_dtype(image, suffix)
        if self.depth is not None:
            dtype = DEPTHS[self.depth]
            if not images.holds(suffix, dtype):  # by a name given later than the check
                raise ImageError(f"{suffix} files do not hold {self.depth} bits: choose .png")
        ends = result.ends
        if dtype == image.dtype or (ends is None and self.depth is None):
            return image  # `encode` does the rest, and `conversions` says so
        full = float(np.iinfo(dtype).max)

        def cast(values: np.ndarray) -> np.ndarray:
            return images.from_unit(images.to_unit(values), dtype)

        notes = image.notes
        if ends is not None:
            notes += (f"{ends[0]:g} to {ends[1]:g} stored as 0 to {full:g}",)
        black, white = ends or (0, np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1)
        # Multiplied first: whole numbers that both types have come out as they are.
        exact = (image.samples.astype(np.float64) - black) * full / (float(white) - black)
        samples = rounded(exact, self.dither).clip(0, full).astype(dtype)
        hidden = None if image.hidden is None or ends is not None else cast(image.hidden)
        alpha = None if image.alpha is None else cast(image.alpha)
        return replace(image, samples=samples, alpha=alpha, hidden=hidden, notes=notes)


def _linear(image: Image) -> Image:
    """A picture in linear light, 16 bits or float; without a profile, which says otherwise."""
    notes, metadata = (*image.notes, "stored as linear light"), image.metadata
    if metadata.icc is not None:
        metadata, notes = replace(metadata, icc=None), (*notes, "ICC data left out")
    dtype = image.dtype if image.dtype.kind == "f" or image.dtype.itemsize > 1 else DEPTHS[16]

    def lit(values: np.ndarray) -> np.ndarray:
        light = to_light(torch.from_numpy(images.to_unit(values).astype(np.float64)))
        return images.from_unit(light.numpy(), dtype)

    alpha = None if image.alpha is None else images.from_unit(images.to_unit(image.alpha), dtype)
    hidden = None if image.hidden is None else lit(image.hidden)
    samples = lit(image.samples)
    return replace(
        image, samples=samples, alpha=alpha, hidden=hidden, metadata=metadata, notes=notes
    )


def rounded(values: np.ndarray, dither: bool) -> np.ndarray:
    """Whole numbers near to values (H, W, C).

    dither: up or down by chance, so that their mean over many is that of the values: v becomes
    floor(v + u), u uniform in [0, 1) (Roberts 1962). Whole numbers stay as they are. The chance is
    the same each time.
    """
    if not dither:
        return np.rint(values)
    return np.floor(values + np.random.default_rng(0).random(values.shape))


def what_was_done(operation: Operation[R], result: R) -> str:
    """A short note on a result, with no time in it, so that a picture always gets the same."""
    parts = [f"cdnctl {VERSION} {operation.name}", f"model {result.model.name}"]
    told = dict(operation.parameters) | dict(operation.record(result))
    level = told.get("sigma", told.get("noise"))
    if isinstance(level, int | float):
        parts.append(f"sigma {level:g}")
    return ", ".join(parts)


def _same(a: str, b: str) -> bool:
    return a == b or any({a, b} <= one for one in SAME)
