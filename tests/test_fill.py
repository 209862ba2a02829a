"""The smooth fill of holes: what it keeps, and how near it comes to Laplace's equation."""

from __future__ import annotations

import pytest
import torch

from cdnctl.inverse.fill import membrane


def scene(height: int, width: int) -> torch.Tensor:
    """Linear in both directions, which solves Laplace's equation."""
    down = torch.linspace(0, 0.6, height, dtype=torch.float64)[:, None]
    return (down + torch.linspace(0, 0.4, width, dtype=torch.float64)).expand(1, 2, -1, -1)


@pytest.mark.parametrize("size", [(40, 40), (33, 50), (1, 17), (7, 1)])
def test_known_pixels_are_kept_and_others_lie_between_them(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, *size, generator=generator)
    known = torch.rand(size, generator=generator) < 0.3
    known[0, 0] = True
    found = membrane(pixels, known)
    assert torch.equal(found[..., known], pixels[..., known])
    least, most = (f(pixels[..., known], -1)[..., None] for f in (torch.amin, torch.amax))
    inside = found.flatten(2)
    assert (inside >= least - 1e-6).all() and (inside <= most + 1e-6).all()
    # What is missing plays no part.
    torch.testing.assert_close(membrane(torch.where(known, pixels, 9.0), known), found)


@pytest.mark.parametrize("hole", [(slice(12, 28), slice(12, 28)), (slice(5, 9), slice(0, 40))])
def test_a_slope_goes_on_across_a_hole(hole: tuple[slice, slice]) -> None:
    pixels = scene(40, 40)
    known = torch.ones(40, 40, dtype=torch.bool)
    known[hole] = False
    away = (membrane(pixels, known) - pixels).abs()
    flat = (pixels - pixels[..., ~known].mean()).abs()[..., ~known].max()
    assert away.max() < 0.25 * flat


def test_channels_may_have_holes_of_their_own() -> None:
    pixels = scene(16, 16)
    known = torch.ones(2, 16, 16, dtype=torch.bool)
    known[0, 4:8, 4:8] = False
    found = membrane(pixels, known)
    assert torch.equal(found[:, 1], pixels[:, 1]) and not torch.equal(found[:, 0], pixels[:, 0])
    assert torch.equal(found[:, :1], membrane(pixels[:, :1], known[0]))
