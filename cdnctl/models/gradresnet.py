"""GradResNet: a residual network whose backward pass is the decoder.

Source of the idea: Thiry and Guth, "Classification-Denoising Networks", 2024
(arXiv 2410.03505). One scalar network models log p(y, c) of a noisy picture y
and a class c; the denoiser is Tweedie's formula applied to its gradient. The
parametrisation here keeps every quantity at unit scale at every noise level:

    r = y - 1/2,   tau^2 = sigma^2 + s0^2,   z = r / tau
    f_c(y) = -|r|^2 / (2 tau^2) + (s0 / sigma) U(z, sigma) + l_c(z, sigma)
    D_w(y) = 1/2 + (s0/tau)^2 r + (sigma s0 / tau) G,
    G = grad_z [U + (sigma / s0) sum_c w_c l_c]

with U extensive (a sum over pixels and stages) and l_c intensive (a mean).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cdnctl.models.adjoint import QuadraticForm
from cdnctl.models.network import Mixture, Whole, resolved
from cdnctl.models.trunk import PRIOR_STD, Classifying, Correcting, NetConfig, Normalised


class GradResNet(Correcting, Classifying):
    """Joint log-density of a noisy picture and its class."""

    def __init__(self, config: NetConfig):
        super().__init__(config)
        # The score of p(y) is that of all classes, mixed by p(c | y).
        self.needs = replace(self.needs, posterior=True)
        last = len(config.widths) - 1
        self.sides = nn.ModuleDict()
        for i, width in enumerate(config.widths):
            rank = max(round(width * config.side), int(i == last))
            if rank:
                self.sides[str(i)] = QuadraticForm(width, rank, gain=0.3)

    def energy(self, features: list[Tensor]) -> Tensor:
        """U, (B,), from the features of every stage."""
        parts = [
            form.energy(features[int(i)])
            for i, form in self.sides.items()
            if isinstance(form, QuadraticForm)
        ]
        return torch.stack(parts).sum(0)

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """f_c(y) = log p_sigma(y, c) up to a constant: (B, C, H, W) -> (B, K), in nats."""
        n = self.normalised(y, sigma)
        features = list(self.trunk.encode(n, self.compute_dtype))
        logits, _ = self.head(features[-1])  # (B, K)
        prior = -(y - 0.5).square().sum((1, 2, 3)) / (2 * n.tau.flatten().square())  # (B,)
        u = self.energy(features).to(y.dtype)  # (B,)
        return (prior + PRIOR_STD / n.sigma.flatten() * u)[:, None] + logits

    def corrected(
        self, n: Normalised, mixture: Mixture, whole: Whole | None
    ) -> tuple[Tensor, Tensor]:
        """By the trunk's adjoint: G is the gradient of a scalar."""
        features, adjoint = self.trunk(n, self.compute_dtype)  # (B, widths[i], h_i, w_i) each
        logits, head_adjoint = self.head(features[-1], whole)  # (B, K)
        w = resolved(mixture, logits, whole)  # (B, K)
        total = w.sum(1).view(-1, 1, 1, 1)  # (B, 1, 1, 1)

        # The cotangent of every stage's features: its side connection's gradient,
        # and for the last stage also that of the weighted logits.
        cotangents: list[Tensor | None] = [None] * len(features)
        for i, form in self.sides.items():
            cotangents[int(i)] = form(features[int(i)]).mul_(total.to(features[0].dtype))
        cotangents[-1] = cotangents[-1] + head_adjoint(w * (n.sigma / PRIOR_STD).view(-1, 1))
        del features  # the adjoint keeps those that it needs
        return n.correction(adjoint(cotangents), total), logits
