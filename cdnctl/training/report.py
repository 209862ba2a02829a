"""What a run folder shows to people: pictures of samples, and an account of what is in it.

Everything here reads; nothing of it goes back into training.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageDraw

from cdnctl.checkpoints import MODEL, read_header
from cdnctl.core.metrics import psnr
from cdnctl.errors import ConfigError, UsageError, WeightsError
from cdnctl.images import from_unit
from cdnctl.training.config import TrainConfig, parse
from cdnctl.training.runs import CONFIG, PASSED_OVER, RESULTS
from cdnctl.training.state import STATE, read_run
from cdnctl.training.validation import Samples

CURVES = "curves.png"
SAMPLES = "samples"  # folder of a sheet a validation
CELL, GAP = 96, 4  # pixels: smallest side of a picture on a sheet, and space between two

_LOSSES = {"loss": "whole", "score_loss": "score matching", "class_loss": "cross-entropy"}
_FILES = {
    CONFIG: "the whole config, datasets and classes",
    RESULTS: "losses and scores, a row a report",
    CURVES: "loss, PSNR and accuracy over the steps",
    SAMPLES: "held-out pictures: clean, noisy and denoised; a sheet a validation",
    PASSED_OVER: "pictures that cannot be read",
    "best": "weights with the lowest validation loss",
    "last": "the newest weights, and the state from which --resume goes on",
}


# -- sample pictures -----------------------------------------------------------------------


def sheet(samples: Samples) -> bytes:
    """The samples as a PNG file: a row a picture, clean, then noisy and denoised at each level.

    Small pictures are enlarged by a whole factor. Headings tell sigma and the mean PSNR in dB.
    """
    headings, columns = ["clean"], [samples.clean]
    for sigma, noisy, denoised in zip(samples.sigmas, samples.noisy, samples.denoised, strict=True):
        score = psnr(denoised.clamp(0, 1), samples.clean).mean().item()
        headings += [f"sigma {sigma:g}", f"{score:.1f} dB"]
        columns += [noisy, denoised]
    count, side = len(samples.clean), samples.clean.shape[-1]
    factor = math.ceil(CELL / side)
    step = side * factor + GAP
    head = 16
    size = len(columns) * step - GAP, head + count * step - GAP
    picture = PIL.Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for x, (heading, column) in enumerate(zip(headings, columns, strict=True)):
        draw.text((x * step + 2, 2), heading, fill="black")
        levels = from_unit(column.numpy(), np.dtype(np.uint8))
        for y, pixels in enumerate(levels.transpose(0, 2, 3, 1)):
            large = pixels.repeat(factor, 0).repeat(factor, 1)
            shown = large if large.shape[2] == 3 else large[:, :, 0]
            picture.paste(PIL.Image.fromarray(shown), (x * step, head + y * step))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


# -- numbers -------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """results.csv of a run by column: (steps, values) where there are values.

    Empty if there is no such file. An incomplete last row and cells that are not numbers are left
    out.
    """
    columns: dict[str, tuple[list[int], list[float]]] = {}
    path = folder / RESULTS
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):
            for name, text in row.items():
                try:
                    step, value = int(row["step"]), float(text)
                except (KeyError, TypeError, ValueError):
                    continue
                if not math.isfinite(value):
                    continue
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return columns


def is_run(folder: Path) -> bool:
    """Whether `cdnctl train` made this folder."""
    return (folder / CONFIG).is_file()


def describe(folder: Path) -> list[tuple[str, str]]:
    """What is in a run folder, for people: (subject, account), of one or more lines each.

    UsageError if it is no run folder, or its config is damaged.
    """
    path = folder / CONFIG
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        config, passed = parse(run["config"]), len(run.get("passed_over", ()))
        data = f"{', '.join(run['datasets'])}\nclasses: {', '.join(run['classes'])}"
        if known := run.get("fingerprint"):  # runs of an earlier version have none
            data += f"\n{known['pictures']} pictures"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise UsageError(
            f"{str(folder)!r} is no sound run folder: {str(path)!r} cannot be read ({error})"
        ) from None
    if passed:
        data += f", {passed} passed over: see {PASSED_OVER}"
    results = read_results(folder)
    return [
        ("model", f"{config.name} ({config.model['arch']})"),
        ("step", _progress(folder, results, config.optim.steps)),
        ("data", data),
        ("loss", "; ".join(_newest(results)) or "none yet"),
        ("best", "\n".join(_best(results)) or "no validation yet"),
        ("config", "\n".join(_changed(config)) or "all defaults"),
        ("weights", "\n".join(_weights(folder)) or "none yet"),
        ("files", "\n".join(f"{n}: {t}" for n, t in _FILES.items() if (folder / n).exists())),
    ]


Results = Mapping[str, tuple[list[int], list[float]]]


def _progress(folder: Path, results: Results, total: int) -> str:
    """How far the run is, how long it took, and what is to be done."""
    steps, seconds = (results.get(name, ([], []))[1] for name in ("step", "seconds"))
    try:
        saved = read_run(folder / STATE)["state"]["step"]
        after = "finished" if saved >= total else f"saved at {saved}: goes on with --resume"
    except UsageError:
        saved, after = 0, "no state is saved"
    time = f", {clock(seconds[-1])} of training" if seconds else ""
    return f"{max(saved, int(steps[-1]) if steps else 0)} of {total}{time}; {after}"


def _newest(results: Results) -> Iterator[str]:
    for name in _LOSSES:
        if name in results:
            yield f"{_LOSSES[name]} {results[name][1][-1]:.5f}"


def _best(results: Results) -> Iterator[str]:
    """The scores of the validation with the lowest loss, whose weights are kept as the best."""
    if "val_loss" not in results:
        return
    steps, losses = results["val_loss"]
    loss, step = min(zip(losses, steps, strict=True))
    yield f"step {step}: loss {loss:.5f}"
    for kind, what, form, unit in (
        ("psnr", "PSNR", ".2f", " dB"),
        ("accuracy", "accuracy", ".1%", ""),
    ):
        found = {
            name.rpartition("_")[2]: format(dict(zip(*results[name], strict=True))[step], form)
            for name in results
            if name.startswith(f"val_{kind}_") and step in results[name][0]
        }
        if found:
            yield f"{what} at sigma {' / '.join(found)}: {' / '.join(found.values())}{unit}"


def _changed(config: TrainConfig) -> Iterator[str]:
    """The network's shape and what else is not as by default, a line a section."""
    plain = TrainConfig().to_dict()
    for section, values in config.to_dict().items():
        if section != "name":
            default = {} if section == "model" else plain[section]
            changed = [
                f"{key} = {json.dumps(value)}"
                for key, value in values.items()
                if key not in default or value != default[key]
            ]
            if changed:
                yield f"[{section}] {', '.join(changed)}"


def _weights(folder: Path) -> Iterator[str]:
    for name in ("best", "last"):
        path = folder / name / MODEL
        try:
            if path.is_file():
                yield f"{path}: of step {read_header(path).training.get('steps', '?')}"
        except WeightsError as error:
            yield str(error)


def clock(seconds: float) -> str:
    """A time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
