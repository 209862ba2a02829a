"""How like two sets of fields are: standard deviation, spectrum, and the law of one pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.fields.energy import smallest_eigenvalues
from cdnctl.fields.model import FieldModel
from cdnctl.fields.simulate import filtered, radial, spectrum
from cdnctl.transforms.wavelet import split

BINS = 50


@dataclass(frozen=True)
class Comparison:
    """Of fields y with fields x of the same side, such as samples of a model with data."""

    std: tuple[float, float]  # of a pixel: of x, of y
    spectra: tuple[Tensor, Tensor]  # (L/2 + 1,), by |k| in waves per side: of x, of y
    edges: Tensor  # (BINS + 1,), of the histograms
    histograms: tuple[Tensor, Tensor]  # (BINS,), shares of pixels: of x, of y
    distance: float  # sum of the absolute differences of the shares, 0 to 2

    @property
    def std_ratio(self) -> float:
        """That of y by that of x."""
        return self.std[1] / self.std[0]

    @property
    def spectrum_ratio(self) -> Tensor:
        """Powers of y by those of x, (L/2 + 1,)."""
        return self.spectra[1] / self.spectra[0]


def compare(x: Tensor, y: Tensor) -> Comparison:
    """Fields y (B, L, L) beside fields x (A, L, L); bins reach over all pixels of x.

    What lies beyond them counts as in the outermost bins.
    """
    if x.shape[1:] != y.shape[1:]:
        sides = " and ".join(f"{a.shape[1]} x {a.shape[2]}" for a in (x, y))
        raise UsageError(f"fields of {sides} cannot be compared: give fields of one side")
    low, high = float(x.min()), float(x.max())
    if not low < high:
        raise UsageError(f"the fields are {low:g} everywhere: there is nothing to compare with")
    shares = [torch.histc(a.clamp(low, high), BINS, low, high) / a.numel() for a in (x, y)]
    return Comparison(
        std=(float(x.std()), float(y.std())),
        spectra=(radial(spectrum(x)), radial(spectrum(y))),
        edges=torch.linspace(low, high, BINS + 1, dtype=torch.float64),
        histograms=(shares[0], shares[1]),
        distance=float((shares[0] - shares[1]).abs().sum()),
    )


def gaussian_twin(x: Tensor, count: int, seed: int) -> Tensor:
    """Gaussian fields, (count, L, L), of the mean and the spectrum of fields x: what a model that
    knows nothing else would give."""
    white = np.random.default_rng(seed).standard_normal((count, *x.shape[1:]))
    centred = x.double() - x.mean()
    return x.mean() + filtered(torch.from_numpy(white), spectrum(centred).sqrt())


def log_concavity(model: FieldModel, x: Tensor) -> list[dict[str, Any]]:
    """Of each stage, the finest first, the smallest eigenvalue of the Hessian of its energy at
    fields x (B, L, L): its least, middle and greatest value, and the share of fields where it is
    negative, so that the law of the stage is not log-concave.

    Stages of more than 32 pixels a side are left out: they would take too long.
    """
    if x.shape[-1] != model.side:
        raise UsageError(f"the fields have the side {x.shape[-1]}, the model has {model.side}")
    rows = []
    for stage in reversed(model.stages):
        while x.shape[-1] > stage.side:
            x, _ = split(x, model.wavelet)
        if stage.side <= 32:
            values = smallest_eigenvalues(stage.energy, stage.bands, x)
            quantiles = [float(v) for v in (values.min(), values.median(), values.max())]
            negative = float((values < 0).double().mean())
            rows.append({"side": stage.side, "quantiles": quantiles, "negative": negative})
        x = stage.bands.rest(x)
    return rows
