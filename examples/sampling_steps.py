"""How many steps does sampling take? Pixels against wavelet details, in closed form.

Gaussian fields whose spectrum falls as |k|^-exponent. Prints after how many steps the worst mode's
variance is within 5 %, at three sides: for the published sampler (Euler steps, quadratic times),
and for this package's, at the same times. Details are those of the finest scale, given the coarser
picture and whitened by band; every scale takes as many steps.

    python examples/sampling_steps.py
"""

from __future__ import annotations

import math

from torch import Tensor

from cdnctl.analysis.steps import (
    LONGEST,
    MOST,
    detail_variances,
    euler_variance,
    lattice_power,
    steps_until,
)
from cdnctl.sampling import mode_variance, ornstein_uhlenbeck

SIDES = (16, 64, 256)
HIGH = math.sqrt(math.expm1(2 * LONGEST))  # noise at the longest time, in units of a pixel


def own(variance: Tensor, count: int) -> Tensor:
    """What `cdnctl.sampling.sample` gives modes of these variances."""
    return mode_variance(variance, ornstein_uhlenbeck(HIGH, count), 0.5, HIGH**2)


def row(name: str, modes: list[Tensor]) -> None:
    """Steps of both samplers at every side."""
    cells = [steps_until(v, sampled) for sampled in (euler_variance, own) for v in modes]
    print(f"{name:12}" + "".join(f"{n or f'> {MOST}':>10}" for n in cells), flush=True)


def main() -> None:
    """Print the table of each exponent."""
    for exponent in (1.75, 3.0):
        print(f"\nexponent {exponent:g}: sides {SIDES}, published sampler, then this one")
        spectra = [lattice_power(side, exponent) for side in SIDES]
        row("pixels", spectra)
        for wavelet in ("haar", "db4"):
            row(wavelet, [detail_variances(s, wavelet) for s in spectra])


if __name__ == "__main__":
    main()
