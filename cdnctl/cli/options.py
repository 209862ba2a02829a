"""What users may say to more than one command: options written once, and what they mean.

The command line speaks of noise levels on the 0..255 scale; everything behind it
has pixels and sigma in [0, 1]. The conversion happens here and in images.py only.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

import cdnctl
from cdnctl.errors import UsageError
from cdnctl.headers import bundled, classes
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.restore.pages import Selection
    from cdnctl.restore.samples import Range

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads (default: all cores).")
]
SigmaOption = Annotated[
    str, typer.Option("--sigma", help="Noise level on the 0..255 scale, or auto: estimate it.")
]
NoiseOption = Annotated[
    str | None,
    typer.Option(
        "--noise",
        metavar="KIND",
        help="What the noise is like: auto (measured), white (of one level), camera (not white, "
        "even where it looks so), or a profile that noise --save wrote.",
    ),
]
StrengthOption = Annotated[
    str,
    typer.Option(
        "--strength",
        metavar="LUMA,CHROMA",
        help="0: the input, 1: fully denoised; one number, or one for luma and one for colour.",
    ),
]
MaskOption = Annotated[
    Path | None,
    typer.Option(
        "--mask", help="A picture of the same size: white is denoised, black left to the bit."
    ),
]
SheetOption = Annotated[
    Path | None,
    typer.Option(
        "--sheet",
        metavar="FILE.png",
        help="Write crops of shadows, lights and texture at full size, one column for each of "
        "--sigma 5,10,20, and nothing else.",
    ),
]
ClassOption = Annotated[
    str,
    typer.Option(
        "--class", help="Class name, none, auto (most probable), or a mixture: cat:0.7,dog:0.3."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="auto, a bundled model, a run folder (runs/1), or a .safetensors file."
    ),
]
Inputs = Annotated[
    list[Path] | None, typer.Argument(help="Pictures and folders; - for standard input.")
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="PATH",
        help="File or folder (new/ makes one); - for standard output, in the input's format "
        "or as PNG.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with a folder: redo only what is missing or has changed."),
]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Pass over inputs whose output exists.")
]
StripMetadata = Annotated[
    bool, typer.Option("--strip-metadata", help="Leave out EXIF, ICC profile and text.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")
]
Tile = Annotated[int | None, typer.Option("--tile", min=1, help="Side of tiles in pixels.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="What the network may take, such as 500M or 2G.")
]
EnsembleOption = Annotated[
    int,
    typer.Option(
        "--ensemble",
        callback=lambda count: _symmetries(count),
        help="Mean over 2 (left and right) or 8 flips and turns: better, as many times slower.",
    ),
]
Draws = Annotated[
    int, typer.Option("--draws", min=10, help="Noises to certify by: more certify a larger radius.")
]
Confidence = Annotated[
    float,
    typer.Option(
        "--confidence", min=0.5, max=0.999999, help="With which a certificate is to hold."
    ),
]
Recursive = Annotated[bool, typer.Option("-r", "--recursive", help="Look into folders' folders.")]
MaxMegapixels = Annotated[
    int | None,
    typer.Option(
        "--max-megapixels", min=1, help="Refuse pictures of more megapixels (default: 250)."
    ),
]
RangeOption = Annotated[
    str | None,
    typer.Option(
        "--range",
        help="Black and white: 0:255 for floats, 0:4095 for 12 bits in 16, or percentiles of the "
        "picture, or of a whole stack, p0.1:p99.9 (each:p0.1:p99.9: of each of its pages). "
        "Results are in the same counts.",
    ),
]
PagesOption = Annotated[
    str | None,
    typer.Option(
        "--pages",
        metavar="PAGES",
        help="Of TIFF and .npy stacks: all, or some, counted from 1, such as 1:10 or 2,4.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, one object a line.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]


def _symmetries(count: int) -> int:
    if count not in (1, 2, 8):
        raise UsageError(
            f"--ensemble is {count}, but must be 2 (left and right), 8 (quarter turns, too), or 1"
        )
    return count


class WithClasses(TyperCommand):
    """A command whose help ends with the classes of the bundled models."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Looked up only now: other runs need not wait for it."""
        from rich.markup import escape

        paths = bundled(Path(cdnctl.__file__).parent)
        known = {name: ", ".join(classes(path)) for name, path in paths.items()}
        lines = [f"Classes of {name}: {names}." for name, names in known.items() if names]
        self.epilog = escape("\n\n".join(lines))
        super().format_help(ctx, formatter)


def parse_sigma(text: str) -> float | None:
    """A noise level of the command line, 0..255 or ``auto``, in [0, 1] (None: auto)."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(
            f"sigma is {text!r}, but must be a number from 0 to 255, or auto"
        ) from None
    if 0 < value < 1:
        raise UsageError(
            f"sigma {text} is next to nothing on the 0..255 scale; "
            f"did you mean --sigma {value * PEAK:g} (that is {text} on a scale of 0..1)?"
        )
    if not 0 <= value <= PEAK:
        raise UsageError(f"sigma is {text}, but must lie between 0 and 255")
    return value / PEAK


def parse_sigmas(text: str) -> list[float | None]:
    """One or more noise levels of `parse_sigma`, comma-separated."""
    return [parse_sigma(part.strip()) for part in text.split(",")]


def parse_strength(text: str) -> float | tuple[float, float]:
    """How much of a change is wanted: one number, or luma's and chroma's."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 2 or not all(0 <= value <= 1 for value in values):
        raise UsageError(
            f"--strength is {text!r}, but must be a number from 0 to 1, or one for luma and one "
            "for chroma, such as 0.5,1"
        )
    return values[0] if len(set(values)) == 1 else (values[0], values[1])


def parse_levels(text: str) -> list[float]:
    """Noise levels in [0, 1]: comma-separated, 0..255, each a number or start:stop:step.

    >>> parse_levels("51,0:255:127.5")
    [0.2, 0.0, 0.5, 1.0]
    """
    parts: list[str] = []
    for part in text.split(","):
        if ":" not in part:
            parts.append(part)
            continue
        try:
            start, stop, step = (float(number) for number in part.split(":"))
            count = math.floor((stop - start) / step + 1e-9)
        except (ValueError, ZeroDivisionError, OverflowError):
            count = -1
        if not 0 <= count <= PEAK:
            raise UsageError(
                f"{part!r} in --sigma {text!r} is not start:stop:step, such as 0:100:10"
            )
        parts += [f"{start + i * step:g}" for i in range(count + 1)]
    levels = [parse_sigma(part.strip()) for part in parts if part.strip()]
    if not levels or None in levels:
        raise UsageError(f"sigma is {text!r}, but must be numbers such as 15,25,50")
    return [level for level in levels if level is not None]


def parse_class(text: str) -> str | dict[str, float] | None:
    """``none`` (None), ``auto``, a class name or a mixture (a dict).

    >>> parse_class("cat:0.7,dog:0.3")
    {'cat': 0.7, 'dog': 0.3}
    >>> parse_class("cat")
    {'cat': 1.0}
    """
    if text == "none":
        return None
    if text == "auto":
        return text
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not name or not (0 <= value < math.inf):
            raise UsageError(f"{part!r} in --class {text!r} is not NAME or NAME:WEIGHT (a number)")
        mixture[name] = mixture.get(name, 0.0) + value
    return mixture


def class_names(target: str | dict[str, float] | None) -> list[str]:
    """The classes that a parsed --class names."""
    return list(target) if isinstance(target, dict) else []


def parse_range(text: str | None) -> Range | None:
    """Black and white, such as 0:4095, or percentiles of a picture, such as p0.1:p99.9; of each
    page of a stack, each:p0.1:p99.9, or ``each`` for these two."""
    if text is None:
        return None
    each, _, told = text.partition(":") if text.startswith("each") else ("", "", text)
    parts = (told or "p0.1:p99.9").split(":")
    as_percentiles = all(part.startswith("p") for part in parts)
    try:
        black, white = (float(part.removeprefix("p") if as_percentiles else part) for part in parts)
    except ValueError:
        black = white = math.nan
    known = each in ("", "each") and (as_percentiles or not each)
    if not (known and math.isfinite(black) and math.isfinite(white) and black < white):
        raise UsageError(
            f"--range is {text!r}, but must be black and white, such as 0:255 or p0.1:p99.9, or "
            "each:p0.1:p99.9 for each page of a stack"
        )
    if not as_percentiles:
        return black, white
    if not 0 <= black < white <= 100:
        raise UsageError(f"--range is {text!r}, but percentiles lie between p0 and p100")
    from cdnctl.restore import Percentiles

    return Percentiles(black, white, bool(each))


def parse_pages(text: str | None) -> Selection | None:
    """Pages as users count them: all, or numbers and ranges from 1, such as 1:10,15."""
    if text is None:
        return None
    from cdnctl.restore.pages import Selection

    if text == "all":
        return Selection(text)
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UsageError(
                f"--pages is {text!r}, but must be all, or some counted from 1, such as 1:10 or 2,4"
            )
        ranges.append((first, last))
    return Selection(text, tuple(ranges))


def parse_size(text: str) -> int:
    """An amount of memory, such as 500M, 2G or 1.5GB, in bytes.

    >>> parse_size("1.5k")
    1536
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not 1 <= size < 2**60:
        raise UsageError(f"--memory is {text!r}, but must be an amount such as 500M or 2G")
    return int(size)


def pixel_limit(megapixels: int | None) -> int:
    """The most pixels that a picture may have."""
    from cdnctl import images

    return images.MAX_PIXELS if megapixels is None else megapixels * images.MEGAPIXEL
