"""cdnctl sample."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import keep_existing, shown, start_torch
from cdnctl.cli.options import Device, Json, Quiet, Threads, WithClasses
from cdnctl.cli.progress import progress
from cdnctl.cli.report import Seed
from cdnctl.errors import UsageError


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(cls=WithClasses, rich_help_panel=panel)(sample)


def sample(
    output_name: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="A sheet of all (.png), or a folder (new/ makes one) for a file each.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option("--model", help="A bundled model, a run folder, or a .safetensors file."),
    ] = "cifar10",
    label: Annotated[
        str, typer.Option("--class", help="Class of which pictures are wanted, or none.")
    ] = "none",
    count: Annotated[int, typer.Option("--count", min=1, max=10000, help="Pictures.")] = 16,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=10000, help="Denoising steps a picture.")
    ] = 32,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", help="Weight g of --class: D + g (D_c - D).", show_default="2.0"
        ),
    ] = None,
    churn: Annotated[
        float,
        typer.Option(
            "--churn", help="New noise on the way: 0 none (DDIM), 1 as much as DDPM; smoother."
        ),
    ] = 0.0,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make pictures of pure noise: what a model takes for pictures of a class.

    It takes a model that knows noise up to sigma 510 and more.
    """
    if guidance is not None and label == "none":
        raise UsageError(
            f"--guidance {guidance:g} weighs what a class changes, but none is told: "
            "give --class as well"
        )
    output = Path(output_name)
    into = output_name.endswith((os.sep, os.altsep or os.sep)) or output.is_dir()
    torch_device = start_torch(device, threads)
    from cdnctl import images
    from cdnctl.analysis.synthesis import draw
    from cdnctl.api import load
    from cdnctl.figures import gallery

    stem = "sample" if label == "none" else label
    digits = len(str(count - 1))
    paths = [output / f"{stem}-{i:0{digits}}.png" for i in range(count)] if into else [output]
    if paths[0].suffix.lower() not in images.WRITE_SUFFIXES:
        raise UsageError(f"-o {output_name!r} must be a picture file, such as .png, or a folder/")
    for path in paths:
        keep_existing(path, overwrite)
    chosen = load(model, torch_device)
    weight = 1.0 if label == "none" else 2.0 if guidance is None else guidance
    started = time.monotonic()
    with progress(1, quiet, as_json) as advance:
        drawn = [
            x.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            for x in draw(
                chosen,
                count,
                steps,
                label=None if label == "none" else label,
                guidance=weight,
                churn=churn,
                seed=seed,
                watch=advance.within,
            )
        ]
    seconds = time.monotonic() - started
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    pictures = [images.Image.of(pixels) for pixels in drawn]
    if not into:
        pictures = [gallery([("", picture) for picture in pictures])]
    for path, picture in zip(paths, pictures, strict=True):
        images.write(picture, path, overwrite=overwrite)
        if as_json:
            record = {
                "output": str(path),
                "model": chosen.name,
                "weights": chosen.hash,
                "class": None if label == "none" else label,
                "pictures": 1 if into else count,
                "steps": steps,
                "guidance": weight,
                "churn": churn,
                "seed": seed,
                "seconds": round(seconds, 3),
            }
            print(json.dumps(record), flush=True)
    if not as_json and not quiet:
        what = "pictures" if label == "none" else f"pictures of {label}"
        print(
            f"{count} {what} -> {shown(output)}, {steps} steps, seed {seed}, "
            f"model {chosen.name} ({seconds:.1f} s)"
        )
