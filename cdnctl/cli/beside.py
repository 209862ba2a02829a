"""What denoise writes beside the output of a picture, or in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdnctl.cli.common import NUMBERS, keep_existing, save_numbers, shown
from cdnctl.cli.printer import STDIO, DenoisePrinter
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.restore import Restored, Settings
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.plan import Job
    from cdnctl.restore.samples import Range
    from cdnctl.selection import Models


def write_uncertainty(
    job: Job, path: Path, batch: Batch[Restored], settings: Settings, printer: DenoisePrinter
) -> None:
    from cdnctl import images
    from cdnctl.analysis.uncertainty import drawn, posterior_std
    from cdnctl.restore import on_unit_scale

    image = images.read(job.source, batch.max_pixels)
    image = on_unit_scale(image, settings.range, str(job.source))
    model = batch.models.pick(*image.samples.shape[:2])
    with progress(1, printer.quiet, printer.as_json):
        std, sigma = posterior_std(image, model, settings)
    if path.suffix.lower() in NUMBERS:
        save_numbers(std[..., 0], path, batch.overwrite)
    else:
        images.write(drawn(std[..., 0], sigma), path, overwrite=batch.overwrite)


def write_comparison(job: Job, path: Path, batch: Batch[Any], scale: Range | None) -> None:
    """The input beside the output, both as they are in their files."""
    from cdnctl import images
    from cdnctl.figures import before_and_after
    from cdnctl.restore import black_and_white, on_unit_scale

    before, after = (images.read(p, batch.max_pixels) for p in (job.source, job.output))
    ends = black_and_white(before, scale, str(job.source))
    before = on_unit_scale(before, ends, str(job.source))
    after = on_unit_scale(after, ends, str(job.output))
    images.write(before_and_after(before, after), path, overwrite=batch.overwrite)


def check_sheet(inputs: Sequence[Path], path: Path, others: Sequence[str], overwrite: bool) -> None:
    """Refuse what does not go with --sheet. others: options that were given beside it."""
    from cdnctl.restore.plan import same_file

    if others:
        raise UsageError(f"--sheet writes nothing else: leave {others[0]} out")
    if len(inputs) != 1 or inputs[0] == STDIO or inputs[0].is_dir():
        raise UsageError("--sheet takes one picture, a file")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--sheet {str(path)!r} must be a .png file")
    if same_file(path, inputs[0]):
        raise UsageError(f"--sheet {str(path)!r} is the picture itself")
    keep_existing(path, overwrite)


def write_sheet(
    source: Path,
    path: Path,
    levels: Sequence[float | None],
    settings: Settings,
    models: Models,
    max_pixels: int,
    overwrite: bool,
    printer: DenoisePrinter,
) -> None:
    """Telling crops of a picture beside what each level, None for measured, makes of them."""
    from cdnctl import images
    from cdnctl.errors import ImageError
    from cdnctl.figures import contact_sheet
    from cdnctl.restore import on_unit_scale
    from cdnctl.restore.denoise import by_camera, measured
    from cdnctl.restore.preview import restored_at, telling_places

    image = on_unit_scale(images.read(source, max_pixels), settings.range, str(source))
    size = image.samples.shape[0], image.samples.shape[1]
    places = telling_places(image.samples)
    columns = ["input"]
    shown_as = [[image.samples[place] for place in places.values()]]
    sigmas = []
    with progress(len(levels), printer.quiet, printer.as_json) as advance:
        for given in levels:
            told = replace(settings, sigma=given)
            try:
                level = measured(image, told)
                model = models.pick(*size, by_camera(level, told))
                crops = restored_at(image, model, told, level, list(places.values()))
            except ImageError as error:
                raise ImageError(f"{str(source)!r}: {error}") from None
            shown_as.append(crops)
            sigmas.append(round(PEAK * level.sigma, 3))
            how = " (measured)" if given is None else ""
            columns.append(f"sigma {PEAK * level.sigma:.3g}{how}")
            advance()
    rows = {
        name: [
            replace(
                image,
                samples=column[i],
                alpha=None if image.alpha is None else image.alpha[place],
                hidden=None,
            )
            for column in shown_as
        ]
        for i, (name, place) in enumerate(places.items())
    }
    luma, chroma = settings.strengths
    strength = f"{luma:g}" if luma == chroma else f"{luma:g} of luma, {chroma:g} of chroma"
    caption = f"{source.name}, strength {strength}, model {model.name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(contact_sheet(columns, rows, caption), path, overwrite=overwrite)
    if printer.as_json:
        corners = {name: [p[1].start, p[0].start] for name, p in places.items()}
        record: dict[str, Any] = {"event": "sheet", "input": str(source), "output": str(path)}
        record |= {"sigmas": sigmas, "crops": corners, "model": model.name}
        print(json.dumps(record), flush=True)
    elif not printer.quiet:
        words = f"crops of {', '.join(places)}" if len(places) > 1 else "one crop"
        print(f"{shown(source)} -> {shown(path)}, {words}, model {model.name}", flush=True)
