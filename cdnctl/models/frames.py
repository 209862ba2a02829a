"""Tight frames: more atoms than channels, expanding without loss, and shrinkage in between.

F is (p, d), p >= d, with F^T F = 1. F^T rho(F x) with a threshold rho lessens what varies within
a class and spares the class means, as far as these are sparse in F (Zarka, Guth and Mallat
2021, arXiv 2012.10424).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.transforms.scattering import soft_threshold

BETA = 5e-4  # of a Parseval step, as published


def parseval(atoms: Tensor, beta: float = BETA) -> Tensor:
    """(1 + beta) F - beta F F^H F: a gradient step of ||F^H F - 1||^2 towards a tight frame, or,
    for fewer rows than columns, towards orthonormal rows. Real or complex, like ``atoms``.

    Every singular value s becomes (1 + beta) s - beta s^3; those below sqrt(1 + 1 / beta)
    tend to 1. To be done after every step of the optimiser (Cisse et al. 2017).
    """
    rows, columns = atoms.shape
    if rows >= columns:
        return (1 + beta) * atoms - beta * atoms @ (atoms.mH @ atoms)
    return (1 + beta) * atoms - beta * (atoms @ atoms.mH) @ atoms


def bases(count: int, channels: int) -> Tensor:
    """A tight frame whose atoms have equal norms, (count * channels, channels): random
    orthonormal bases, put together."""
    found = [torch.linalg.qr(torch.randn(channels, channels))[0] for _ in range(count)]
    return torch.cat(found) / count**0.5


def concentrate(x: Tensor, atoms: Tensor, threshold: float, rectify: bool = False) -> Tensor:
    """F^T rho(F x) of the channels of every pixel: (B, d, H, W) to the same, atoms (p, d).

    rho: the soft threshold, or, to ``rectify``, (z - t)_+.
    """
    z = F.conv2d(x, atoms[:, :, None, None])
    z = (z - threshold).relu() if rectify else soft_threshold(z, threshold)
    return F.conv2d(z, atoms.T[:, :, None, None])


class TightFrame(nn.Module):
    """``concentrate`` with learnt atoms of fixed norm sqrt(d / p).

    ``strength`` is the threshold in units of the root mean square of a coefficient, for pixels
    whose channels have a root mean square of 1: then a coefficient's is the norm of its atom.
    """

    def __init__(self, channels: int, count: int, strength: float, rectify: bool = False):
        super().__init__()
        self.norm = count**-0.5
        self.threshold, self.rectify = strength * self.norm, rectify
        self.atoms = nn.Parameter(torch.empty(count * channels, channels))
        if not self.atoms.is_meta:
            self.atoms.data.copy_(bases(count, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, H, W) to the same."""
        atoms = self.norm * F.normalize(self.atoms, dim=1)
        return concentrate(x, atoms, self.threshold, self.rectify)

    @torch.no_grad()
    def after_step(self) -> None:
        """Back towards a tight frame, after a step of the optimiser."""
        self.atoms.copy_(parseval(self.atoms))
