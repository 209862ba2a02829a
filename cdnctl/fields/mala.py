"""The Metropolis-adjusted Langevin algorithm: exact samples of a density known up to a factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The energy (B,) of states (B, ...), its gradient like them, and whether each may be left for: (B,)
Target = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

# The best share of accepted moves in many dimensions (Roberts and Rosenthal 1998).
ACCEPTANCE = 0.574


@dataclass(frozen=True)
class Run:
    """Where chains have come to, and how."""

    x: Tensor  # (B, ...), the last states
    step: float
    accepted: Tensor  # (B,), share of the moves of each chain after the step was fixed
    left: float  # share of these moves that were refused as they lead out of the window


def mala(
    target: Target, x: Tensor, step: float, burn: int, moves: int, generator: torch.Generator
) -> Run:
    """Chains of density exp(-E) from states x (B, ...): ``burn`` moves that find a step length,
    then ``moves`` with that step.

    A move is x' = x - step * grad E(x) + sqrt(2 step) * noise, and is accepted with probability
    min(1, exp(E(x) - E(x') + log q(x | x') - log q(x' | x))). One that leads out of the window,
    where the target says that no state should be, is refused; chains that start outside may come
    in. The step is changed in the burn-in only: what still adapts does not keep the density.
    """
    energy, gradient, inside = target(x)
    accepted = x.new_zeros(len(x))
    left = 0.0
    one = (-1, *[1] * (x.ndim - 1))
    for move in range(burn + moves):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        new = x - step * gradient + (2 * step) ** 0.5 * noise
        new_energy, new_gradient, new_inside = target(new)
        back = (x - new + step * new_gradient).square().flatten(1).sum(1)
        there = 2 * step * noise.square().flatten(1).sum(1)
        ratio = energy - new_energy + (there - back) / (4 * step)
        uniform = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        allowed = new_inside | ~inside
        keep = (uniform.log() < ratio) & allowed
        x = torch.where(keep.reshape(one), new, x)
        gradient = torch.where(keep.reshape(one), new_gradient, gradient)
        energy = torch.where(keep, new_energy, energy)
        inside = torch.where(keep, new_inside, inside)
        if move < burn:
            # Coarse at first, as the step that was given may be far off.
            gain = 0.5 if move < burn / 4 else 0.1
            step *= float(torch.exp(gain * (keep.to(x).mean() - ACCEPTANCE)))
        else:
            accepted += keep.to(x) / moves
            left += float((~allowed).to(x).mean()) / moves
    return Run(x, step, accepted, left)
