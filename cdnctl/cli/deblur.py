"""cdnctl deblur."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdnctl.cli.common import start_torch
from cdnctl.cli.many import Files
from cdnctl.cli.options import (
    Device,
    DryRun,
    Inputs,
    Json,
    MaxMegapixels,
    Memory,
    ModelOption,
    Output,
    Overwrite,
    Quiet,
    RangeOption,
    Recursive,
    Resume,
    SkipExisting,
    StripMetadata,
    Threads,
    Tile,
    WithClasses,
    pixel_limit,
)
from cdnctl.cli.repair import (
    NoiseOption,
    OneClass,
    Samples,
    Seed,
    Sheet,
    Spread,
    Steps,
    repair_files,
    settings_of,
)
from cdnctl.cli.storing import Storing, with_storing
from cdnctl.errors import ImageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(deblur)


@with_storing
def deblur(
    storing: Storing,
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel",
            help="gauss:WIDTH (standard deviation in pixels), motion:LENGTH@DEGREES, or a small "
            "picture of what became of a point.",
        ),
    ],
    inputs: Inputs = None,
    output_name: Output = None,
    noise: NoiseOption = 2.0,
    steps: Steps = None,
    samples: Samples = None,
    sheet: Sheet = None,
    uncertainty: Spread = None,
    seed: Seed = 0,
    target: OneClass = "none",
    model: ModelOption = "auto",
    recursive: Recursive = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    skip_existing: SkipExisting = False,
    strip_metadata: StripMetadata = False,
    dry_run: DryRun = False,
    tile: Tile = None,
    memory: Memory = None,
    max_megapixels: MaxMegapixels = None,
    scale: RangeOption = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Undo the blur of pictures by a known kernel.

    Without --samples the result is the same every time; the originals are never touched.
    """
    files = Files(
        inputs,
        output_name,
        recursive,
        overwrite,
        resume,
        skip_existing,
        strip_metadata,
        dry_run,
        pixel_limit(max_megapixels),
        storing,
    )
    torch_device = start_torch(device, threads)
    from cdnctl.restore import Deblur

    settings = settings_of(noise, steps, samples, seed, target, tile, memory, scale, files)
    operation = Deblur(settings, *_kernel(kernel))
    repair_files(files, operation, model, torch_device, sheet, uncertainty, as_json, quiet)


def _kernel(text: str) -> tuple[Tensor, str]:
    """A kernel, (h, w), and what tells it from others."""
    from cdnctl import images
    from cdnctl.inverse.operators import gaussian, motion

    kind, colon, rest = text.partition(":")
    if colon and kind in ("gauss", "motion"):
        try:
            if kind == "gauss":
                return gaussian(float(rest)), text
            length, _, degrees = rest.partition("@")
            return motion(float(length), float(degrees or 0)), text
        except ValueError:
            raise UsageError(
                f"--kernel is {text!r}, but must be such as gauss:1.6 or motion:9@30, or a file"
            ) from None
    import torch

    try:
        data = images.read_bytes(Path(text))
        picture = images.decode(data, text)
    except ImageError as error:
        raise UsageError(
            f"--kernel is neither gauss:1.6 nor motion:9@30 nor a file: {error}"
        ) from None
    values = torch.from_numpy(picture.pixels.mean(-1))
    if not values.sum() > 0:
        raise UsageError(f"--kernel {text!r} sums to 0: give one that is not black")
    return values, hashlib.sha256(data).hexdigest()
