"""What the repairs, inpaint, upscale and deblur, share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import NUMBERS, save_numbers
from cdnctl.cli.many import Beside, Files, restore_files
from cdnctl.cli.options import class_names, parse_class, parse_range, parse_size
from cdnctl.cli.printer import Printer
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    import torch

    from cdnctl.restore import Repair, Repaired, RepairSettings
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.plan import Job

NoiseOption = Annotated[
    float, typer.Option("--noise", help="Noise of the picture, on the 0..255 scale.")
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        show_default="8, of draws 20",
        help="Noise levels that are gone through; each takes as long as some denoisings.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help="Draw so many answers that agree with the picture, and write their mean "
        "(default: the one answer that is found without chance).",
    ),
]
Sheet = Annotated[
    Path | None, typer.Option("--sheet", help="Write the samples side by side in one picture.")
]
Spread = Annotated[
    Path | None,
    typer.Option(
        "--uncertainty",
        help="Write the standard deviation of the samples: a picture with its scale (.png), or "
        "the bare numbers in pixel units of 0..1 (.tif, .npy).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the samples.")]
OneClass = Annotated[
    str, typer.Option("--class", help="Class name, none, or a mixture: cat:0.7,dog:0.3.")
]


def settings_of(
    noise: float,
    steps: int | None,
    samples: int | None,
    seed: int,
    target: str,
    tile: int | None,
    memory: str | None,
    scale: str | None,
    files: Files,
) -> RepairSettings:
    """What a command line says of how to repair."""
    if not 0 <= noise <= PEAK:
        raise UsageError(f"--noise is {noise:g}, but must lie between 0 and 255")
    wanted = parse_class(target)
    if isinstance(wanted, str):
        raise UsageError("--class auto: there is no whole picture to tell it from; name a class")
    budget = None if memory is None else parse_size(memory)
    levels = parse_range(scale)
    files.storing.suits(scale)
    from cdnctl.restore import Percentiles, RepairSettings

    if isinstance(levels, Percentiles):
        raise UsageError(f"--range {scale}: percentiles are for denoise; give LOW:HIGH")
    drawn, finer = samples or 0, files.writing.finer
    return RepairSettings(noise / PEAK, steps, drawn, seed, wanted, tile, budget, levels, finer)


def repair_files(
    files: Files,
    operation: Repair,
    model: str,
    device: torch.device,
    sheet: Path | None,
    spread: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Repair pictures, and write what was asked for beside them."""
    settings = operation.settings
    for option, path in (("--sheet", sheet), ("--uncertainty", spread)):
        if path is not None and settings.samples < 2:
            raise UsageError(f"{option} {str(path)!r} shows samples: give --samples 2 or more")
    from cdnctl.images import WRITE_SUFFIXES
    from cdnctl.selection import Models

    target = None if settings.target is None else dict(settings.target)
    models = Models(model, device, class_names(target))
    beside = [
        Beside("--sheet", sheet, WRITE_SUFFIXES, _write_sheet),
        Beside("--uncertainty", spread, NUMBERS | {".png"}, _write_spread),
    ]
    restore_files(files, operation, models, RepairPrinter(settings, as_json, quiet), beside)


class RepairPrinter(Printer["Repaired"]):
    """Printer of what repairs find, on the scale of 0..255."""

    def __init__(self, settings: RepairSettings, as_json: bool, quiet: bool):
        super().__init__(as_json, quiet)
        self.settings = settings

    def found(self, result: Repaired) -> dict[str, Any]:
        """See `Printer`."""
        spread = None
        if self.settings.samples > 1:
            spread = round(float((result.spread() ** 2).mean() ** 0.5) * PEAK, 4)
        return {
            "noise": round(result.noise * PEAK, 4),
            "steps": result.steps,
            "samples": self.settings.samples,
            "missed": round(result.missed * PEAK, 4),
            "spread": spread,
        }

    def words(self, result: Repaired) -> list[str]:
        """See `Printer`."""
        found = self.found(result)
        parts = [f"model {result.model.name}"]
        if self.settings.samples:
            parts.append(f"mean of {self.settings.samples} samples")
        if found["spread"] is not None:
            parts.append(f"which differ by {found['spread']:.2f} of 255 (rms)")
        return parts


def _write_sheet(job: Job, path: Path, batch: Batch[Repaired], result: Repaired) -> None:
    from cdnctl import images
    from cdnctl.figures import gallery

    cells = [(f"sample {i}", images.Image.of(x)) for i, x in enumerate(result.draws, 1)]
    mean = images.Image.of(result.draws.mean(0))
    images.write(gallery([("mean", mean), *cells]), path, overwrite=batch.overwrite)


def _write_spread(job: Job, path: Path, batch: Batch[Repaired], result: Repaired) -> None:
    from cdnctl import images
    from cdnctl.analysis.uncertainty import drawn

    if path.suffix.lower() in NUMBERS:
        save_numbers(result.spread(), path, batch.overwrite)
    else:
        picture = drawn(result.spread(), result.noise)
        images.write(picture, path, overwrite=batch.overwrite)
