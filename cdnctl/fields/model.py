"""Models of fields scale by scale: p(x) = p(coarsest) * product of p(details | coarser picture).

Each factor has an energy, fitted on its own by score matching, and is sampled by MALA, from the
coarsest to the finest (conditionally strongly log-concave models: Guth, Lempereur, Bruna and
Mallat 2023). What is known of the normalisation of a conditional energy is not needed for that;
where it would be, as in denoising, only Gaussian models of one stage are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.fields.bands import Bands, half_octaves, octave, whole
from cdnctl.fields.energy import Energy, Features, score_matching, window
from cdnctl.fields.mala import Run, mala
from cdnctl.fields.simulate import filtered
from cdnctl.transforms.wavelet import merge, split


@dataclass(frozen=True, eq=False)
class Stage:
    """The law of some bands of a picture of ``side`` given the rest of it."""

    side: int
    bands: Bands
    energy: Energy
    errors: Tensor  # (F,), standard errors of the parameters
    condition: float  # of the fit
    low: float  # the window: pixels of all pictures that it was fitted to
    high: float


@dataclass(frozen=True, eq=False)
class FieldModel:
    """Stages from the coarsest, which is unconditional, to the finest."""

    wavelet: str
    stages: tuple[Stage, ...]

    @property
    def side(self) -> int:
        """Of the fields."""
        return self.stages[-1].side

    @property
    def is_gaussian(self) -> bool:
        """Whether it is one Gaussian law of the whole field, with a stationary precision."""
        features = self.stages[0].energy.features
        return len(self.stages) == 1 and not (features.powers or features.centres)


def fit(
    x: Tensor,
    levels: int,
    wavelet: str = "db4",
    halves: bool = False,
    sigmoids: int = 30,
    reach: int = 2,
    progress: Callable[[], None] = lambda: None,
) -> FieldModel:
    """The model of fields (B, L, L) whose coarsest picture has the side L / 2^levels.

    halves: two stages per octave instead of one. sigmoids: of the potential of a pixel; with 0 of
    them every stage is Gaussian, and with no levels the model is one of the whole field. reach: of
    products of pixels. progress: called after each stage.
    """
    check_fields(x)
    x = x.double()
    side = x.shape[-1]
    if levels < 0 or side % 2 ** (levels + (halves and levels > 0)):
        raise UsageError(f"fields of {side} x {side} cannot be halved {levels} times")
    if sigmoids == 1 or sigmoids < 0 or reach < 0:
        raise UsageError(
            f"{sigmoids} sigmoids and a reach of {reach}: give none or more than one sigmoid, "
            "and a reach from 0 up"
        )
    stages: list[Stage] = []
    for _ in range(levels):
        for bands in half_octaves(wavelet) if halves else octave(wavelet):
            stages.append(_stage(x, bands, sigmoids, reach))
            x = bands.rest(x)
            progress()
        x, _ = split(x, wavelet)
    stages.append(_stage(x, whole(wavelet), sigmoids, reach))
    progress()
    return FieldModel(wavelet, tuple(reversed(stages)))


def most_levels(side: int, halves: bool) -> int:
    """How often a side can be halved: down to a single pixel, if it is a power of two."""
    levels = 0
    while side % (4 if halves else 2) == 0:
        side, levels = side // 2, levels + 1
    return levels


TAIL = 0.0005  # share of pixels below the first centre of the sigmoids, and above the last


def check_fields(x: Tensor) -> None:
    """UsageError unless x is a stack of square fields of finite numbers."""
    if x.ndim != 3 or x.shape[1] != x.shape[2] or not x.numel():
        raise UsageError(
            f"fields have the shape {tuple(x.shape)}, but must be (count, side, side), one side"
        )
    if not x.isfinite().all():
        broken = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise UsageError(f"field {broken} (from 0) holds values that are not finite numbers")


def _stage(x: Tensor, bands: Bands, sigmoids: int, reach: int) -> Stage:
    side, low, high = x.shape[-1], float(x.min()), float(x.max())
    if not low < high:
        raise UsageError(f"the fields are {low:g} everywhere: there is nothing to fit")
    # Beyond the outermost of them only the quadratic part is left: a few outliers would not
    # determine more, and sigmoids that nothing determines make wells where there is no data.
    first, last = np.quantile(x.numpy(), [TAIL, 1 - TAIL])
    centres = tuple(np.linspace(first, last, sigmoids).tolist())
    spacing = float(last - first) / max(sigmoids - 1, 1)
    features = Features(centres=centres, width=spacing, shifts=window(side, reach))
    found = score_matching(x, features, bands)
    return Stage(side, bands, found.energy, found.errors, found.condition, low, high)


@dataclass(frozen=True)
class Effort:
    """Moves of the finest stage: those that find the step, and those that then count.

    A coarser stage takes as many times more as its side is smaller: it costs little there, and
    what it does not reach no finer one can mend.
    """

    burn: int = 150
    moves: int = 350


def sample(
    model: FieldModel,
    count: int,
    generator: torch.Generator,
    effort: Effort | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Tensor, list[Run]]:
    """Fields of the model, (count, L, L), and how each stage went.

    Each field is the end of a chain of its own, so that they are independent.
    """
    if count < 1:
        raise UsageError(f"{count} fields are asked for: ask for one or more")
    coarsest = model.stages[0].side
    x = torch.zeros(count, coarsest, coarsest, dtype=torch.float64)
    return _refine(model, model.stages, x, generator, effort or Effort(), progress)


def super_resolve(
    model: FieldModel,
    low: Tensor,
    count: int,
    generator: torch.Generator,
    effort: Effort | None = None,
) -> Tensor:
    """Fields that the model thinks possible where a coarser picture of each is known.

    low: (B, l, l), as splits leave it (twice the mean at each level, if the wavelet is haar), of a
    side that a stage of the model starts from. Returns (count, B, L, L), whose pictures after as
    many splits are ``low``: their mean is the estimate, their standard deviation its error bar.
    """
    check_fields(low)
    side = low.shape[-1]
    known = sorted({stage.side for stage in model.stages[:-1] if stage.side < model.side})
    if side not in known:
        raise UsageError(
            f"the coarse fields have the side {side}, but those of this model have "
            f"{' or '.join(map(str, known)) or 'no coarser one'}"
        )
    stages = [stage for stage in model.stages if stage.side > side]
    x = low.double().repeat(count, 1, 1)
    fine, _ = _refine(model, stages, x, generator, effort or Effort(), lambda: None)
    return fine.unflatten(0, (count, len(low)))


def _refine(
    model: FieldModel,
    stages: Sequence[Stage],
    x: Tensor,
    generator: torch.Generator,
    effort: Effort,
    progress: Callable[[], None],
) -> tuple[Tensor, list[Run]]:
    """Pictures, (B, l, l), with the bands of the stages drawn one after the other."""
    runs = []
    for stage in stages:
        while x.shape[-1] < stage.side:
            x = merge(x, x.new_zeros(len(x), 3, *x.shape[1:]), model.wavelet)
        h = stage.side >> stage.bands.depth
        start = x.new_zeros(len(x), len(stage.bands.cells), h, h)
        times = model.side // stage.side
        burn, moves = effort.burn * times, effort.moves * times
        run = mala(conditional(stage, x), start, first_step(stage), burn, moves, generator)
        runs.append(run)
        x = x + stage.bands.give(run.x)
        progress()
    return x, runs


def conditional(stage: Stage, rest: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The target of `mala` for the bands of pictures whose ``rest``, (B, L, L), is known.

    A picture must stay where there was data: sigmoids are flat elsewhere.
    """
    windowed = bool(stage.energy.features.centres)

    def target(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = rest + stage.bands.give(z)
        value, gradient = stage.energy(x)
        inside = x.new_ones(len(x), dtype=torch.bool)
        if windowed:
            inside = ((x >= stage.low) & (x <= stage.high)).flatten(1).all(1)
        return value, stage.bands.take(gradient), inside

    return target


def first_step(stage: Stage) -> float:
    """A step of moves from which the right one is soon found: by the largest curvature of the
    quadratic part, or the width of the window."""
    dimensions = len(stage.bands.cells) * (stage.side >> stage.bands.depth) ** 2
    variance = ((stage.high - stage.low) / 8) ** 2
    curvature = max(float(stage.energy.transfer(stage.side).max()), 1 / variance)
    return float(1 / curvature / dimensions ** (1 / 3))


def denoise(model: FieldModel, y: Tensor, sigma: float) -> tuple[Tensor, float]:
    """E[x | y], like y (B, L, L), where y = x + sigma * white noise and x is of the model, and the
    standard deviation of the error of a pixel. Exact: for Gaussian models of the whole field.

    UsageError for other models: the law of a coarse picture under noise is not known to them.
    """
    check_fields(y)
    if y.shape[-1] != model.side:
        raise UsageError(f"the fields have the side {y.shape[-1]}, the model has {model.side}")
    if not sigma > 0:
        raise UsageError(f"sigma is {sigma!r}, but must be above 0, in the unit of the fields")
    precision = gaussian_precision(model)
    gain = 1 / (1 + sigma**2 * precision)
    return filtered(y.double(), gain), float(sigma * gain.mean().sqrt())


def gaussian_precision(model: FieldModel) -> Tensor:
    """The inverse of the spectrum of a Gaussian model of the whole field, (L, L).

    UsageError if the model is another one, or its fit is no density.
    """
    if not model.is_gaussian:
        raise UsageError(
            "only a Gaussian model of the whole field has exact formulas: fit one with no levels "
            "and no sigmoids"
        )
    precision = model.stages[0].energy.transfer(model.side)
    if not (precision > 0).all():
        raise UsageError("the fitted model is no density: its reach is too small for these fields")
    return precision
