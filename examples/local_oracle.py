"""How far must a denoiser see? The best linear denoisers of a Gaussian field, in closed form.

A field of 128 x 128 pixels whose spectrum falls as (k^2 + 1)^(-3/2), like that of photographs, of
standard deviation 0.25. Prints PSNR in dB: of the filter that sees everything, of filters that see
a square of pixels, and of filters that go from coarse to fine and see a square of cells, given the
coarser picture.

    python examples/local_oracle.py
"""

from __future__ import annotations

import math

from cdnctl.analysis.locality import (
    coarser,
    detail_filters,
    flat_error,
    power_law,
    scales_error,
    wiener_error,
)

SIGMAS = (20, 100, 260)  # of 255
LEVELS = 3


def psnr(error: float) -> float:
    """In dB, of a peak of 1."""
    return -10 * math.log10(error)


def row(name: str, errors: list[float]) -> None:
    """One line of the table."""
    print(f"{name:34}" + "".join(f"{psnr(e):8.2f}" for e in errors))


def main() -> None:
    """Print the table."""
    spectrum, sigmas = power_law(128, 3, std=0.25), [s / 255 for s in SIGMAS]
    print(f"{'sigma':34}" + "".join(f"{s:8}" for s in SIGMAS))
    row("everything (Wiener)", [wiener_error(spectrum, s) for s in sigmas])
    for reach in (5, 9, 13):
        row(f"{reach} x {reach} pixels", [flat_error(spectrum, s, reach) for s in sigmas])
    for reach in (3, 5):
        errors = [scales_error(spectrum, s, reach, LEVELS) for s in sigmas]
        row(f"{reach} x {reach} cells, coarse to fine", errors)
    for level in range(LEVELS):
        errors = [detail_filters(spectrum, s, 5)[1] for s in sigmas]
        row(f"details of scale {level}, coarser known", errors)
        spectrum = coarser(spectrum)


if __name__ == "__main__":
    main()
