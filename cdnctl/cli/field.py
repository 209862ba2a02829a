"""cdnctl field: simulate, fit, sample, check, denoise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdnctl.cli.common import keep_existing, save, start_torch
from cdnctl.cli.options import Json, Quiet, Threads
from cdnctl.cli.plots import check_plot, draw
from cdnctl.cli.progress import progress
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cdnctl.fields.check import Comparison

app = typer.Typer(
    help="Model physical fields, such as maps of a simulation, scale by scale.",
    no_args_is_help=True,
)

Output = Annotated[Path, typer.Option("-o", "--output", help="FILE.npy or FILE.tif to write.")]
Model = Annotated[Path, typer.Argument(help="What 'field fit' wrote, FILE.safetensors.")]
Fields = Annotated[
    Path, typer.Argument(help="FILE.npy or float TIFF: fields of one square size, a page each.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same fields.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Moves = Annotated[
    int,
    typer.Option("--moves", min=1, help="Moves of the finest stage; a third as many go before."),
]


def register(parent: typer.Typer, panel: str) -> None:
    """Add the commands to the app."""
    parent.add_typer(app, name="field", rich_help_panel=panel)


@app.command()
def simulate(
    kind: Annotated[str, typer.Argument(help="phi4, gaussian or log-normal.")],
    output: Output,
    count: Annotated[int, typer.Option("--count", min=1, help="Number of fields.")] = 100,
    side: Annotated[int, typer.Option("--side", min=2, max=4096, help="Pixels of a side.")] = 32,
    beta: Annotated[float, typer.Option(help="phi4: its coupling; critical near 0.68.")] = 0.68,
    std: Annotated[
        float, typer.Option(min=0.0, help="Others: standard deviation (of the logarithm).")
    ] = 0.5,
    exponent: Annotated[
        float, typer.Option(help="Others: power (1 + k^2)^(-exponent/2), k in waves per side.")
    ] = 3.0,
    seed: Seed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Make fields of a known law: phi^4 on a lattice, Gaussian ones, or log-normal ones."""
    start_torch("cpu", threads)
    from cdnctl.fields import simulate as laws
    from cdnctl.fields.stacks import check_suffix, to_bytes

    check_suffix(output)
    keep_existing(output, overwrite)

    def power(k: Any) -> Any:
        return (1 + k * k) ** (-exponent / 2)

    if kind == "phi4":
        x = laws.phi4(count, side, beta, seed)
    elif kind == "gaussian":
        x = laws.gaussian(count, side, power, seed, std)
    elif kind == "log-normal":
        x = laws.log_normal(count, side, power, seed, std)
    else:
        raise UsageError(f"unknown law {kind!r}; known: phi4, gaussian, log-normal")
    save(output, to_bytes(x, output), overwrite)


@app.command()
def fit(
    fields: Fields,
    output: Annotated[Path, typer.Option("-o", "--output", help="FILE.safetensors to write.")],
    levels: Annotated[
        int | None,
        typer.Option("--levels", min=0, help="Halvings of the side (default: all there are)."),
    ] = None,
    wavelet: Annotated[str, typer.Option("--wavelet", help="haar, db2, db4, sym5, ...")] = "haar",
    halves: Annotated[
        bool, typer.Option("--halves", help="Two stages per halving: slower, mixes better.")
    ] = False,
    sigmoids: Annotated[
        int, typer.Option("--sigmoids", min=0, help="Terms of the potential of a pixel.")
    ] = 30,
    reach: Annotated[
        int, typer.Option("--reach", min=0, max=64, help="Of products of pixels, in pixels.")
    ] = 2,
    gaussian: Annotated[
        bool, typer.Option("--gaussian", help="One Gaussian law of the whole field: can denoise.")
    ] = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a model of fields by score matching: of thousands of them where they have two modes.

    It does not hold for heavy tails: fit the logarithm of such fields. 'field check' tells.
    """
    start_torch("cpu", threads)
    from cdnctl.fields import model as models
    from cdnctl.fields import stacks, store

    store.check_suffix(output)
    keep_existing(output, overwrite)
    x = stacks.read(fields)
    if gaussian:
        levels, sigmoids, halves = 0, 0, False
    if levels is None:
        levels = models.most_levels(x.shape[-1], halves)
    with progress(1 + levels * (1 + halves), quiet, as_json) as advance:
        fitted = models.fit(x, levels, wavelet, halves, sigmoids, reach, advance)
    if gaussian:
        models.gaussian_precision(fitted)  # or it is no density, and must not be kept
    store.save(output, fitted, overwrite)
    for stage in fitted.stages:
        row = {"side": stage.side, "parameters": len(stage.errors), "condition": stage.condition}
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            text = f"side {stage.side:4}: {len(stage.errors)} parameters"
            print(f"{text}, condition {stage.condition:.3g}", flush=True)


@app.command()
def sample(
    model: Model,
    output: Output,
    count: Annotated[int, typer.Option("--count", min=1, help="Fields to draw.")] = 16,
    coarse: Annotated[
        Path | None,
        typer.Option("--coarse", help="Refine these fields; writes the mean of --count draws."),
    ] = None,
    errors: Annotated[
        Path | None, typer.Option("--errors", help="With --coarse: standard deviation of draws.")
    ] = None,
    moves: Moves = 350,
    seed: Seed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw fields from a model; or the finer fields that coarser ones may come from."""
    start_torch("cpu", threads)
    import torch

    from cdnctl.fields import model as models
    from cdnctl.fields import stacks, store

    if errors is not None and coarse is None:
        raise UsageError("--errors are those of refined fields: give --coarse FILE")
    for path in filter(None, (output, errors)):
        stacks.check_suffix(path)
        keep_existing(path, overwrite)
    fitted = store.load(model)
    generator = torch.Generator().manual_seed(seed)
    effort = models.Effort(moves // 3, moves)
    if coarse is not None:
        draws = models.super_resolve(fitted, stacks.read(coarse), count, generator, effort)
        save(output, stacks.to_bytes(draws.mean(0), output), overwrite)
        if errors is not None:
            spread = draws.std(0, correction=int(count > 1))
            save(errors, stacks.to_bytes(spread, errors), overwrite)
        return
    with progress(len(fitted.stages), quiet, as_json) as advance:
        x, runs = models.sample(fitted, count, generator, effort, advance)
    save(output, stacks.to_bytes(x, output), overwrite)
    for stage, run in zip(fitted.stages, runs, strict=True):
        row = {"side": stage.side, "accepted": float(run.accepted.mean()), "left": run.left}
        if as_json:
            print(json.dumps(row | {"least": float(run.accepted.min())}), flush=True)
        elif not quiet:
            print(
                f"side {stage.side:4}: {row['accepted']:.0%} of the moves accepted, "
                f"{run.left:.1%} refused outside the window",
                flush=True,
            )


@app.command()
def denoise(
    model: Model,
    fields: Fields,
    output: Output,
    sigma: Annotated[float, typer.Option("--sigma", help="Of the noise, in the fields' unit.")],
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Denoise fields by a Gaussian model ('field fit --gaussian'), for which that is exact."""
    start_torch("cpu", threads)
    from cdnctl.fields import model as models
    from cdnctl.fields import stacks, store

    stacks.check_suffix(output)
    keep_existing(output, overwrite)
    x, std = models.denoise(store.load(model), stacks.read(fields), sigma)
    save(output, stacks.to_bytes(x, output), overwrite)
    print(f"standard deviation of the error of a pixel, if the model is right: {std:.4g}")


@app.command()
def check(
    fields: Fields,
    samples: Annotated[Path, typer.Argument(help="Fields to compare with them, of a model say.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw spectra and histograms: FILE.png.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Tell how log-concave this model is at FIELDS, too."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare fields in spread, spectrum and the law of a pixel, beside a Gaussian twin."""
    start_torch("cpu", threads)
    from cdnctl.fields import stacks, store
    from cdnctl.fields.check import compare, gaussian_twin, log_concavity

    if plot is not None:
        keep_existing(plot, overwrite)
        check_plot(plot)
    x, y = stacks.read(fields), stacks.read(samples)
    found = compare(x, y)
    twin = compare(x, gaussian_twin(x, len(y), seed))
    ratios = found.spectrum_ratio.tolist()
    record: dict[str, Any] = {
        "std": found.std,
        "std_ratio": found.std_ratio,
        "spectrum_ratio": ratios,
        "histogram_distance": found.distance,
        "histogram_distance_gaussian": twin.distance,
    }
    if model is not None:
        record["smallest_eigenvalues"] = log_concavity(store.load(model), x[:32])
    if as_json:
        print(json.dumps(record))
    else:
        print(f"standard deviation: {found.std[0]:.4g}, {found.std[1]:.4g} ({found.std_ratio:.3f})")
        print("spectrum, ratio by waves per side: " + " ".join(f"{r:.3f}" for r in ratios))
        print(
            f"histograms differ by {found.distance:.3f} of 2, "
            f"those of Gaussian fields of the same spectrum by {twin.distance:.3f}"
        )
        for row in record.get("smallest_eigenvalues", []):
            low, middle, high = row["quantiles"]
            print(
                f"side {row['side']:4}: smallest eigenvalue of the Hessian {middle:.3g} "
                f"({low:.3g} to {high:.3g}), negative for {row['negative']:.0%} of the fields"
            )
    if plot is not None:
        _draw(plot, found, twin, overwrite)


def _draw(path: Path, found: Comparison, twin: Comparison, overwrite: bool) -> None:
    def spectra(axes: Axes) -> None:
        for power, label in zip(found.spectra, ("fields", "samples"), strict=True):
            axes.loglog(range(1, len(power)), power[1:], "o-", ms=3, label=label)
        axes.set(xlabel="waves per side", ylabel="power")
        axes.legend()

    def histograms(axes: Axes) -> None:
        lines = (*found.histograms, twin.histograms[1])
        for shares, label in zip(lines, ("fields", "samples", "Gaussian fields"), strict=True):
            axes.stairs(shares.numpy(), found.edges.numpy(), label=label)
        axes.set(xlabel="value of a pixel", ylabel="share of pixels")
        axes.legend()

    draw(path, [spectra, histograms], overwrite)
